"""`anyattn tune`: which tiles it tries, which it refuses, which it takes and what it writes; measured by stand-ins."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

import anyattn
from anyattn import cli, launch, plan
from anyattn import compile as compiler
from anyattn.bench import timing, tune
from anyattn.bench.tune import Cell, Choice, Table, Tile
from anyattn.compile import CompileError, Cubin
from anyattn.plan import Device

ADA = Device("sm_89", plan.SHARED_BYTES["sm_89"])
CELL = Cell("forward", "bfloat16", 64)

FORWARD = {"head_dim": 64, "BLOCK_M": 128, "BLOCK_N": 64, "WARPS": 4, "MIN_BLOCKS": 2, "V_PARTS": 1}
BACKWARD: Tile = {"head_dim": 64, "BLOCK_M": 64, "BLOCK_N": 64, "WARPS": 8, "STAGES": 2}
BACKWARD |= {"S": [4, 2], "KV": [4, 2], "Q": [4, 2]}
FAMILIES = plan.FAMILIES


@pytest.fixture(autouse=True)
def _own_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("ANYATTN_TILES", "ANYATTN_KERNEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(plan, "FAMILIES", ("sm80",))
    launch.forget_plans()
    yield
    launch.forget_plans()


@pytest.fixture
def table() -> Table:
    """The package's, but for what the tests know of it."""
    others = [{**FORWARD, "head_dim": 64, "BLOCK_N": 128, "arch": "sm_90a"}, FORWARD, {**FORWARD, "head_dim": 96}]
    wide = {**FORWARD, "head_dim": 256, "BLOCK_M": 64}
    real = plan._tiles()
    return {
        "forward_sm80": {**real["forward_sm80"], "16-bit": [*others, wide]},
        "backward_sm80": {**real["backward_sm80"], "16-bit": [BACKWARD]},
    }


# --- candidates ------------------------------------------------------------------------------------------------------


def test_neighbours_of_a_forward_tile() -> None:
    names = [tune.name(tile) for tile in tune.neighbours(FORWARD)]
    assert len(set(names)) == len(names)
    assert tune.name(FORWARD) not in names
    for changes in (
        *({"BLOCK_M": n} for n in (64, 112, 144, 256)),
        *({"BLOCK_N": n} for n in (32, 48, 80, 128)),
        *({"MIN_BLOCKS": n} for n in (1, 3)),
        *({"V_PARTS": 2}, {"WARPS": 8}, {"WARPS": 8, "BLOCK_M": 256}),
    ):
        names.remove(tune.name({**FORWARD, **changes}))
    assert names == []


def test_neighbours_of_a_backward_tile() -> None:
    """Warps are handed out between rows and columns, and what shares them grows with them."""
    names = {tune.name(tile) for tile in tune.neighbours(BACKWARD)}
    for changes in (
        *({"STAGES": 1}, {"STAGES": 3}),
        *({knob: split} for knob in ("S", "KV", "Q") for split in ([8, 1], [2, 4])),
        {"WARPS": 16, "S": [8, 2], "KV": [8, 2], "Q": [8, 2]},
        {"WARPS": 4, "S": [2, 2], "KV": [2, 2], "Q": [2, 2], "BLOCK_M": 32},
    ):
        assert tune.name({**BACKWARD, **changes}) in names


def test_neighbours_of_a_hopper_tile() -> None:
    tile = {"head_dim": 64, "BLOCK_N": 128, "CONSUMERS": 2, "STAGES": 2, "Q_STAGES": 2}
    names = {tune.name(tile) for tile in tune.neighbours(tile)}
    for changes in ({"CONSUMERS": 3}, {"CONSUMERS": 1}, {"STAGES": 3}, {"Q_STAGES": 1}, {"BLOCK_N": 112}):
        assert tune.name({**tile, **changes}) in names
    assert not any("STAGES=1 " in name.replace("Q_STAGES", "") for name in names)


def test_every_tile_of_the_package_has_neighbours() -> None:
    for groups in plan._tiles().values():
        for tiles in groups.values():
            for tile in tiles:
                found = list(tune.neighbours(tile))
                assert found
                assert all(other.keys() == tile.keys() for other in found)


def test_candidates(table: Table) -> None:
    known = tune.entries(table, "forward_sm80", CELL, "sm_89")
    assert [tile["head_dim"] for tile in known] == [64, 96, 256]  # the first is another GPU's
    assert "arch" not in tune.entries(table, "forward_sm80", CELL, "sm_90a")[0]
    tiles = tune.candidates(CELL, known[0], known)
    assert tiles[0] == FORWARD
    assert len({tune.name(tile) for tile in tiles}) == len(tiles) == 1 + len(list(tune.neighbours(FORWARD)))
    assert {tile["head_dim"] for tile in tiles} == {64}
    # The tile in use is tried first, even one of a distant head dim; it is for this head dim then.
    first, *_ = tune.candidates(CELL, known[2], known)
    assert first == {**FORWARD, "BLOCK_M": 64}


# --- plans and faults ------------------------------------------------------------------------------------------------


def test_using_another_table(table: Table) -> None:
    before = tune.planned(CELL, ADA)
    other = tune.only(table, "forward_sm80", CELL, {**FORWARD, "BLOCK_N": 32})
    with tune.using(other):
        assert dict(tune.planned(CELL, ADA).kernels[0].spec.constants)["BLOCK_N"] == 32
    assert tune.planned(CELL, ADA) == before
    with pytest.raises(KeyboardInterrupt), tune.using(other):
        raise KeyboardInterrupt
    assert tune.planned(CELL, ADA) == before


def test_what_does_not_fit(table: Table) -> None:
    chosen = tune.fit(table, "forward_sm80", CELL, FORWARD, ADA)
    assert not isinstance(chosen, str)
    assert chosen.kernels[0].name == "forward_sm80"
    reason = tune.fit(table, "forward_sm80", Cell("forward", "bfloat16", 256), {**FORWARD, "head_dim": 256}, ADA)
    assert "bytes of shared memory" in str(reason)
    assert tune.fault(reason) == reason


LOG = """\
ptxas info    : (C{code}) wgmma and so on in function 'forward_sm80'
Compiling entry function 'forward_sm80' for
{spills} bytes stack frame, {spills} bytes spill stores, 0 bytes spill loads
Used 77 registers
"""


@pytest.mark.parametrize(
    ("code", "spills", "expected"),
    [
        (7517, 0, None),
        (7517, 8, "forward_sm80 spills 8 bytes"),
        (7512, 0, "forward_sm80: (C7512) wgmma and so on in function 'forward_sm80'"),
    ],
)
def test_faults(code: int, spills: int, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "cubin", lambda spec: Cubin("", LOG.format(code=code, spills=spills), 0.0))
    assert tune.fault(tune.planned(CELL, ADA)) == expected


def test_a_tile_that_does_not_compile(table: Table) -> None:
    """Really: three warps' rows are no whole products."""
    wrong = tune.fit(table, "forward_sm80", CELL, {**FORWARD, "BLOCK_M": 112}, ADA)
    assert str(tune.fault(wrong)).startswith("forward_sm80 doesn't compile: static assertion failed")
    right = tune.fit(table, "forward_sm80", CELL, {**FORWARD, "BLOCK_M": 64}, ADA)
    assert tune.fault(right) is None


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(spec: compiler.Spec) -> Cubin:
        raise CompileError("none")

    monkeypatch.setattr(compiler, "cubin", missing)
    assert tune.fault(tune.planned(CELL, ADA)) == "forward_sm80 doesn't compile"


# --- the choice ------------------------------------------------------------------------------------------------------


def choose(table: Table, milliseconds: dict[str, float], faults: dict[str, str] | None = None) -> Choice:
    """The choice for CELL, where what is not in `milliseconds` takes 10."""
    trial = tune.prepare(table, CELL, ADA)
    assert trial is not None

    def measure(cell: Cell, tables: dict[str, Table]) -> tuple[dict[str, float], dict[str, str]]:
        assert cell == CELL
        for key, its in tables.items():
            [tile] = its["forward_sm80"]["16-bit"]
            assert tune.name(tile) == key
        return {key: milliseconds.get(key, 10.0) for key in tables if key != "wrong"}, {"wrong": "another result"}

    reasons = [(faults or {}).get(tune.name(tile)) for tile in trial.tiles]
    return tune.choose(table, trial, reasons, measure)


SMALLER, LARGER = ({**FORWARD, "BLOCK_N": n} for n in (32, 128))


def test_the_fastest_is_taken(table: Table) -> None:
    choice = choose(table, {tune.name(SMALLER): 9.0, tune.name(LARGER): 8.0})
    assert (choice.kernel, choice.before, choice.tile) == ("forward_sm80", FORWARD, LARGER)
    assert choice.milliseconds[tune.name(LARGER)] == 8.0
    assert choice.refused == {"wrong": "another result"}


def test_what_spills_is_not_even_measured(table: Table) -> None:
    times = {tune.name(SMALLER): 9.0, tune.name(LARGER): 8.0}
    choice = choose(table, times, faults={tune.name(LARGER): "forward_sm80 spills 8 bytes"})
    assert choice.tile == SMALLER
    assert tune.name(LARGER) not in choice.milliseconds
    assert choice.refused[tune.name(LARGER)] == "forward_sm80 spills 8 bytes"


def test_the_tile_in_use_stays(table: Table) -> None:
    """Unless another one is better by more than noise; and it is measured whatever its faults."""
    choice = choose(table, {tune.name(LARGER): 9.9}, faults={tune.name(FORWARD): "forward_sm80 spills 8 bytes"})
    assert choice.tile == choice.before == FORWARD
    assert tune.name(FORWARD) in choice.milliseconds


def test_nothing_to_choose() -> None:
    assert tune.prepare(plan._tiles(), Cell("backward", "float64", 256), ADA) is None


def test_every_cell_has_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, every dtype and GPU: the tile in use is found, and there are others that fit."""
    monkeypatch.setattr(plan, "FAMILIES", FAMILIES)
    launch.forget_plans()
    for arch in ("sm_80", "sm_89", "sm_90a"):
        device = Device(arch, plan.SHARED_BYTES[arch])
        for direction in ("forward", "backward"):
            for dtype in ("float16", "bfloat16", "float32", "float64"):
                for head_dim in (64, 128):
                    cell = Cell(direction, dtype, head_dim)
                    trial = tune.prepare(plan._tiles(), cell, device)
                    assert trial is not None
                    assert trial.plans[0] == tune.planned(cell, device)  # the tile in use is the first
                    assert sum(not isinstance(chosen, str) for chosen in trial.plans) > 3


# --- measuring, on NumPy arrays in place of CuPy's -------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_measure(direction: str, table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    real = anyattn.attention

    def in_use() -> str:
        return tune.name(plan._tiles()["forward_sm80"]["16-bit"][0])

    def attention(q: Any, k: Any, v: Any, **options: Any) -> Any:
        result = real(q, k, v, backend="cpu", **options)
        if in_use() == tune.name(SMALLER):  # a wrong kernel
            return (result[0] * 1.1, *result[1:]) if isinstance(result, tuple) else result * np.float32(1.1)
        return result

    def backward(*arrays: Any, **options: Any) -> Any:
        dq, dk, dv = real_backward(*arrays, backend="cpu", **options)
        return dq, dk, dv * (np.float32(np.nan) if in_use() == tune.name(SMALLER) else 1)

    real_backward = anyattn.attention_backward
    timed = []

    def on_cupy_stream(call: Any, calls: int) -> list[float]:
        call()
        timed.append(in_use())
        return [4.0 if in_use() == tune.name(LARGER) else 5.0] * calls

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(asarray=np.asarray, asnumpy=np.asarray))
    monkeypatch.setattr(anyattn, "attention", attention)
    monkeypatch.setattr(anyattn, "attention_backward", backward)
    monkeypatch.setattr(timing, "on_cupy_stream", on_cupy_stream)
    for name, n in (("TOKENS", 128), ("SEQLEN", 64), ("HIDDEN", 32)):
        monkeypatch.setattr(tune, name, n)
    cell = Cell(direction, "float32", 16)
    tables = {tune.name(t): tune.only(table, "forward_sm80", CELL, t) for t in (FORWARD, SMALLER, LARGER)}
    names = list(tables)
    milliseconds, wrong = tune.measure(cell, tables, rounds=2)
    assert milliseconds == {names[0]: 5.0, names[2]: 4.0}
    assert list(wrong) == [names[1]]
    assert wrong[names[1]].startswith("another result: ")
    assert set(timed) == {names[0], names[2]}


@pytest.mark.gpu
def test_measure_on_a_gpu() -> None:
    device = launch.device(0)
    cell = Cell("forward", "float16", 64)
    trial = tune.prepare(plan._tiles(), cell, device)
    assert trial is not None
    good = [tile for tile, chosen in zip(trial.tiles, trial.plans, strict=True) if tune.fault(chosen) is None][:2]
    tables = {tune.name(tile): tune.only(plan._tiles(), trial.kernel, cell, tile) for tile in good}
    milliseconds, wrong = tune.measure(cell, tables, rounds=1)
    assert wrong == {}
    assert list(milliseconds) == list(tables)
    assert all(0 < ms < 1000 for ms in milliseconds.values())


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_table_that_is_written(table: Table, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wide = Cell("forward", "bfloat16", 128)
    choices = [
        Choice(CELL, "forward_sm80", FORWARD, LARGER, {}, {}),
        Choice(wide, "forward_sm80", FORWARD, {**FORWARD, "head_dim": 128, "BLOCK_M": 64}, {}, {}),
        Choice(Cell("backward", "bfloat16", 64), "backward_sm80", BACKWARD, BACKWARD, {}, {}),  # nothing better
    ]
    result = tune.tuned(table, choices, "sm_89")
    assert result["backward_sm80"] == table["backward_sm80"]
    assert [(t["head_dim"], t["BLOCK_M"], t["BLOCK_N"], t.get("arch")) for t in result["forward_sm80"]["16-bit"]] == [
        (64, 128, 128, "sm_89"),
        (64, 128, 128, "sm_90a"),
        (64, 128, 64, None),
        (96, 128, 64, None),
        (128, 64, 64, "sm_89"),
        (256, 64, 64, None),
    ]
    assert len(table["forward_sm80"]["16-bit"]) == 4  # unharmed

    path = tmp_path / "tiles.yaml"
    path.write_text(tune.dump(result, "Measured on\na GPU"))
    assert path.read_text().startswith(
        "# Measured on\n# a GPU\nforward_sm80:\n  16-bit:\n    - {head_dim: 64, BLOCK_M: "
    )
    assert yaml.safe_load(path.read_text()) == result
    monkeypatch.setenv("ANYATTN_TILES", str(path))
    monkeypatch.setattr(plan, "_tiles", plan._tiles.__wrapped__)
    for cell, block in ((CELL, (128, 128)), (Cell("forward", "bfloat16", 96), (128, 64)), (wide, (64, 64))):
        constants = dict(tune.planned(cell, ADA).kernels[0].spec.constants)
        assert (constants["BLOCK_M"], constants["BLOCK_N"]) == block


def test_the_packages_table_survives() -> None:
    assert yaml.safe_load(tune.dump(plan._tiles())) == plan._tiles()


# --- the command -----------------------------------------------------------------------------------------------------

ARGUMENTS = ["tune", "--directions", "forward", "--head-dims", "64"]


def test_tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With a GPU that isn't here, on which 16 keys more are faster."""
    monkeypatch.setattr(launch, "available", lambda *_: None)
    monkeypatch.setattr(launch, "device", lambda ordinal: ADA)
    monkeypatch.setattr(tune, "fault", lambda chosen: "it is a test" if isinstance(chosen, str) else None)
    better = "BLOCK_M=128 BLOCK_N=80 WARPS=4 MIN_BLOCKS=2 V_PARTS=1"

    def measure(cell: Cell, tables: dict[str, Table], rounds: int) -> Any:
        assert rounds == 2
        return {key: 0.5 if key == better else 1.0 for key in tables}, {}

    monkeypatch.setattr(tune, "measure", measure)
    path = tmp_path / "mine.yaml"
    assert cli.main([*ARGUMENTS, "--rounds", "2", "--out", str(path)]) == 0
    output = capsys.readouterr()
    assert "compiling" in output.err
    assert "measuring" in output.err
    [line] = [line for line in output.out.splitlines() if line.startswith("forward_sm80  bfloat16  64 ")]
    assert line.split()[3:5] == ["1.000", "0.500"]
    assert line.endswith(better)
    assert f"ANYATTN_TILES={path}" in output.out
    [tile] = [t for t in yaml.safe_load(path.read_text())["forward_sm80"]["16-bit"] if t.get("arch") == "sm_89"]
    assert (tile["head_dim"], tile["BLOCK_N"]) == (64, 80)
    assert path.read_text().startswith("# Measured by anyattn tune on ")


def test_dry_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tune, "fault", lambda chosen: chosen if isinstance(chosen, str) else None)
    assert cli.main([*ARGUMENTS, "--dry-run", "--arch", "sm_89"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("\nforward_sm80 bfloat16 64\n")
    assert "BLOCK_M=128 BLOCK_N=64 WARPS=4 MIN_BLOCKS=2 V_PARTS=1   ok" in output


def test_tune_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(launch, "available", lambda *_: "there is no GPU in this test")
    assert cli.main(ARGUMENTS) == 1
    assert capsys.readouterr().err == "anyattn: tune needs a GPU: there is no GPU in this test\n"
    assert cli.main([*ARGUMENTS, "--arch", "sm_80"]) == 2
    assert "--arch needs --dry-run" in capsys.readouterr().err
    monkeypatch.setattr(launch, "available", lambda *_: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(ARGUMENTS) == 1
    assert "bfloat16 arrays of CuPy need ml_dtypes" in capsys.readouterr().err
