"""`anyattn bench` and what it is made of, on the CPU: timing, the baselines, the suite, the command."""

from __future__ import annotations

import importlib
import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from anyattn import cli, launch, plan
from anyattn import compile as compiler
from anyattn.bench import timing
from anyattn.plan import Device

torch = pytest.importorskip("torch")
baselines: Any = importlib.import_module("anyattn.bench.baselines")
rivals: Any = importlib.import_module("anyattn.bench.rivals")
suite: Any = importlib.import_module("anyattn.bench.suite")

# --- timing ----------------------------------------------------------------------------------------------------------


def test_interleaved() -> None:
    slices: list[tuple[str, int]] = []

    def timer(contender: str, calls: int) -> list[float]:
        if contender == "refuses":
            raise ValueError("not this shape\nand more")
        slices.append((contender, calls))
        return [{"fast": 1.0, "slow": 50.0}[contender] + i for i in range(calls)]

    contenders = {"f": "fast", "r": "refuses", "s": "slow"}
    timings, failed = timing.interleaved(contenders, rounds=2, slice_ms=5.0, timer=timer)
    assert failed == {"r": "not this shape"}
    warm_up, rounds = slices[:4], slices[4:]
    assert warm_up == [("fast", 1), ("fast", 1), ("slow", 1), ("slow", 1)]
    assert rounds == [("fast", 5), ("slow", 1), ("slow", 1), ("fast", 5)]  # each round begins with another one
    assert timings == {"f": timing.Timing(3.0, 1.0, 5.0, 10), "s": timing.Timing(50.0, 50.0, 50.0, 2)}


def test_a_contender_that_fails_later() -> None:
    runs = iter(range(100))

    def timer(contender: str, calls: int) -> list[float]:
        if contender == "large" and next(runs) == 3:
            raise MemoryError
        return [1.0] * calls

    timings, failed = timing.interleaved({"l": "large", "s": "small"}, rounds=4, slice_ms=1.0, timer=timer)
    assert failed == {"l": "MemoryError()"}
    assert timings == {"s": timing.Timing(1.0, 1.0, 1.0, 4)}


def test_on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "PAUSE", 0.0)
    calls = []

    def call() -> None:
        calls.append(1)
        time.sleep(0.01)

    milliseconds = timing.on_host(call, 3)
    assert len(calls) == 4  # the first warms the caches
    assert len(milliseconds) == 3
    assert all(10 <= ms < 1000 for ms in milliseconds)
    monkeypatch.setattr(timing, "SLOW", 5.0)
    assert len(timing.on_host(call, 2)) == 2
    assert len(calls) == 6


@pytest.mark.gpu
def test_on_cupy_stream() -> None:
    import cupy

    small, large = (cupy.empty(1 << n) for n in (20, 26))
    stream = cupy.cuda.get_current_stream()
    quick, slow = (
        min(timing.on_cupy_stream(lambda x=x: x.data.memset_async(0, x.nbytes, stream), 5)) for x in (small, large)
    )
    assert 0 < quick < slow


def test_geometric_mean() -> None:
    assert timing.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert math.isnan(timing.geometric_mean([]))


# --- the baselines ---------------------------------------------------------------------------------------------------


def random(*shape: int, scale: float = 1.0) -> Any:
    return scale * torch.randn(shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["plain", "reformer"])
def test_exact_where_nothing_is_left_out(name: str, causal: bool) -> None:
    """Reformer's rows see two buckets: all keys, where there are two."""
    attention = getattr(baselines, name)
    q, k, v, dout = (random(2, 2 * baselines.BUCKET, 3, 16) for _ in range(4))
    exact = rivals.exact(q, k, v, dout, causal)
    assert rivals.relative_error(attention(q, k, v, causal), exact["out"]) < 1e-12
    gradients = rivals.backward_of(attention, q, k, v, dout, causal)()
    for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
        assert rivals.relative_error(gradient, exact[name]) < 1e-12


@pytest.mark.parametrize("causal", [False, True])
def test_reformer_finds_near_keys(causal: bool) -> None:
    """Where each row has a group of keys close to it, and far from all others, these are found."""
    seqlen, head_dim = 8 * baselines.BUCKET, 32
    centres = random(16, head_dim, scale=4.0)
    group = torch.randint(16, (seqlen,))
    q = k = (centres[group] + random(seqlen, head_dim, scale=0.1))[None, :, None]
    v = random(1, seqlen, 1, head_dim)
    exact = rivals.exact(q, k, v, None, causal)["out"]
    mean = v.mean(1, keepdim=True).expand_as(v)
    assert rivals.relative_error(baselines.reformer(q, k, v, causal), exact) < 0.3
    assert rivals.relative_error(mean, exact) > 0.9


@pytest.mark.parametrize("causal", [False, True])
def test_performer_converges(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (random(1, 2 * baselines.CHUNK, 2, 16, scale=scale) for scale in (0.7, 0.7, 1.0))
    exact = rivals.exact(q, k, v, None, causal)["out"]
    errors = []
    for features in (64, 1024, 16384):
        monkeypatch.setattr(baselines, "FEATURES", features)
        baselines._features.cache_clear()
        errors.append(rivals.relative_error(baselines.performer(q, k, v, causal), exact))
    baselines._features.cache_clear()
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < errors[0] / 3


@pytest.mark.parametrize("name", ["plain", "reformer", "performer"])
def test_the_future_is_hidden(name: str) -> None:
    q, k, v = (random(1, 4 * baselines.CHUNK, 1, 8) for _ in range(3))
    changed = v.clone()
    changed[:, 200:] = 9.0
    attention = getattr(baselines, name)
    before, after = attention(q, k, v, True), attention(q, k, changed, True)
    assert torch.equal(before[:, :200], after[:, :200])
    assert not torch.equal(before[:, 200:], after[:, 200:])


def test_lengths_that_the_baselines_refuse() -> None:
    q = random(1, 100, 1, 8)
    with pytest.raises(ValueError, match="multiple of 128, got 100"):
        baselines.reformer(q, q, q, False)
    with pytest.raises(ValueError, match="multiple of 128, got 100"):
        baselines.performer(q, q, q, True)


# --- the suite -------------------------------------------------------------------------------------------------------

CELLS = [suite.Cell(16, causal, 128, tokens=256, hidden=32) for causal in (False, True)]


def measure(**changes: Any) -> list[dict[str, Any]]:
    arguments = {"cells": CELLS, "directions": suite.DIRECTIONS, "names": None, "dtype": "float32", "device": "cpu"}
    return list(suite.measure(**{**arguments, "rounds": 1, **changes}))


def test_cell() -> None:
    cell = suite.Cell(64, False, 512)
    assert cell.shape == (32, 512, 32, 64)
    assert cell.flop("forward") == 4 * 32 * 32 * 512 * 512 * 64
    assert cell.flop("backward") == 2.5 * cell.flop("forward")
    assert replace(cell, causal=True).flop("forward") == cell.flop("forward") / 2
    assert replace(cell, seqlen=32768).shape[0] == 1


def test_measure() -> None:
    cells = measure()
    assert [(cell["direction"], cell["causal"]) for cell in cells] == [
        *(("forward", False), ("forward", True)),
        *(("backward", False), ("backward", True)),
    ]
    names = ["anyattn", "SDPA", "MATH", "plain", "Reformer", "Performer"]
    for cell in cells:
        assert (cell["batch"], cell["seqlen"], cell["heads"], cell["head_dim"]) == (2, 128, 2, 16)
        assert list(cell["ms"]) == list(cell["errors"]) == names
        assert list(cell["tflops"]) == names[:4]  # an approximation does other arithmetic
        assert cell["failed"] == {}
        for name in names[:4]:
            assert cell["errors"][name] < 1e-5
        assert cell["errors"]["Performer"] > 1e-3
    assert suite.ours_is_right(cells, "float32")
    assert not suite.ours_is_right(cells, "float64")

    told = suite.summary(cells)
    assert list(told) == names
    assert told["anyattn"]["forward"]["time_over_ours"] == pytest.approx(1.0)
    ratios = [cell["ms"]["MATH"].median / cell["ms"]["anyattn"].median for cell in cells[:2]]
    assert told["MATH"]["forward"]["time_over_ours"] == pytest.approx(math.sqrt(ratios[0] * ratios[1]))
    assert told["Performer"]["backward"]["error"] == max(cell["errors"]["Performer"] for cell in cells[2:])
    assert math.isnan(told["Performer"]["forward"]["tflops"])


def test_what_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "_memory", lambda device: 1 << 20)
    monkeypatch.setattr(suite, "CHECKED", 64)
    [cell] = measure(cells=[suite.Cell(16, True, 192, tokens=192, hidden=32)], directions=["forward"])
    assert list(cell["ms"]) == ["anyattn", "SDPA"]
    assert cell["errors"] == {"anyattn": None, "SDPA": None}
    assert cell["failed"]["MATH"] == cell["failed"]["plain"] == "a matrix of 0 GiB"
    assert "must be a multiple of 128, got 192" in cell["failed"]["Reformer"]
    assert suite.ours_is_right([cell], "float32")
    [cell] = measure(cells=CELLS[:1], directions=["forward"], names=["SDPA"])
    assert not suite.ours_is_right([cell], "float32")


def test_nan_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q: Any, k: Any, v: Any, causal: bool) -> Any:
        return baselines.plain(q, k, v, causal) * math.nan

    monkeypatch.setattr(suite, "contenders", lambda device, direction: {"anyattn": wrong})
    for direction in suite.DIRECTIONS:
        cells = measure(directions=[direction])
        assert math.isnan(cells[0]["errors"]["anyattn"])
        assert not suite.ours_is_right(cells, "float32")
        assert math.isnan(suite.summary(cells)["anyattn"][direction]["error"])


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    cells = measure(device="cuda", dtype="bfloat16", cells=[suite.Cell(64, True, 512, tokens=1024, hidden=256)])
    assert {"anyattn", "FLASH", "MATH", "plain", "Reformer", "Performer"} <= set(cells[0]["ms"])
    assert suite.ours_is_right(cells, "bfloat16")


def test_what_stays_in_the_checkout_imports() -> None:
    for name in ("grid", "library", "cpu", "chart", "sources"):
        importlib.import_module(f"benchmarks.{name}")


def test_sources_of_another_checkout(tmp_path: Path) -> None:
    from benchmarks import sources
    from benchmarks.common import ROOT

    (tmp_path / "anyattn").mkdir()
    shutil.copytree(ROOT / "cuda_src", tmp_path / "cuda_src")
    table = (ROOT / "anyattn" / "tiles.yaml").read_text()
    (tmp_path / "anyattn" / "tiles.yaml").write_text(table.replace("BLOCK_N: 64", "BLOCK_N: 48"))
    (tmp_path / "cuda_src" / "forward_sm80.cu").write_text("// another one\n")
    cell = sources.Cell("backward", 128, 128, True, 512)
    device = Device("sm_80", plan.SHARED_BYTES["sm_80"])
    before, sources_before = plan.forward(cell.call.problem, device), compiler._source_dir()
    for checkout, block in ((ROOT, 64), (tmp_path, 48)):
        forward, *backward = sources.specs(checkout, cell, device)
        assert dict(forward.constants)["BLOCK_N"] == block
        assert [spec.source for spec in backward] == ["backward_delta.cu", "backward_sm80.cu", "backward_dq.cu"]
    with sources.using(tmp_path):
        assert compiler._key(forward) != compiler._key(before.kernels[0].spec)
        assert compiler._source_dir() == tmp_path / "cuda_src"
    assert compiler._source_dir() == sources_before
    assert plan.forward(cell.call.problem, device) == before


def test_sources_by_dtype() -> None:
    from benchmarks import sources
    from benchmarks.common import ROOT

    device = Device("sm_90a", plan.SHARED_BYTES["sm_90a"])
    for dtype, element in (("bfloat16", "bfloat16"), ("float64", "double")):
        cell = sources.Cell("backward", 64, 64, False, 512, dtype)
        assert cell.call.problem.dtype == dtype
        assert {dict(spec.constants)["Element"] for spec in sources.specs(ROOT, cell, device)} == {element}


# --- the command -----------------------------------------------------------------------------------------------------

SMALL = ["--device", "cpu", "--head-dims", "16", "--seqlens", "128,256", "--tokens", "256", "--hidden", "32"]


def test_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *SMALL, "--rounds", "1", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr()
    assert "8/8" in output.err or "100%" in output.err
    for line in (
        "forward   1x256x2x16       causal",
        "Performer  backward  4",
        str(tmp_path / "cpu-bench-float32.json"),
    ):
        assert line in output.out
    result = json.loads((tmp_path / "cpu-bench-float32.json").read_text())
    assert len(result["cells"]) == 8
    assert result["meta"]["versions"]["torch"] == torch.__version__
    assert result["summary"]["SDPA"]["forward"]["error"] < 1e-5
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "cpu-bench-float32.png").read_bytes().startswith(b"\x89PNG")
    else:
        assert "no chart" in output.out


def test_bench_of_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = ["--rivals", "plain,Performer", "--directions", "forward", "--masks", "causal", "--seqlens", "64"]
    assert cli.main(["bench", *SMALL, *some, "--rounds", "1", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "SDPA" not in output
    assert "Not measured:\n  Performer: the sequence length must be a multiple of 128, got 64" in output


def test_bench_fails_on_a_wrong_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(q: Any, k: Any, v: Any, causal: bool) -> Any:
        return baselines.plain(q, k, v, causal) * 1.001

    monkeypatch.setattr(suite, "contenders", lambda device, direction: {"anyattn": wrong})
    some = ["--directions", "forward", "--masks", "full", "--seqlens", "128", "--rounds", "1"]
    assert cli.main(["bench", *SMALL, *some, "--out", str(tmp_path)]) == 1
    assert "1.0e-03" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--rivals", "FLOSS"], 2, "no FLOSS here; there are "),
        (["--device", "cuda"], 1, "--device cuda: there is no GPU in this test"),
    ],
)
def test_bench_refuses(
    arguments: list[str],
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(launch, "available", lambda *_: "there is no GPU in this test")
    assert cli.main(["bench", *arguments]) == status
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--seqlens", "1k"], ["--masks", "causal,half"], ["--dtype", "int8"]])
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", *arguments])
    assert "usage: anyattn bench" in capsys.readouterr().err
