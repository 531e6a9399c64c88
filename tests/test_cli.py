"""The command line, called as main([...])."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import anyattn
from anyattn import cli, demo, plan
from anyattn import compile as compiler
from anyattn.compile import Spec

GOOD = 'extern "C" __global__ void good(float* x) { x[threadIdx.x] = N; }'
SPILLING = """
extern "C" __global__ void __launch_bounds__(1024) spilling(float* x, int n) {
    float a[100];
    #pragma unroll
    for (int i = 0; i < 100; i++) a[i] = x[i * n + threadIdx.x];
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < 100; i++) x[(99 - i) * n + threadIdx.x] = a[i] * a[99 - i];
}
"""


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small sources and an empty cache in place of the real ones."""
    (tmp_path / "good.cu").write_text(GOOD)
    (tmp_path / "spilling.cu").write_text(SPILLING)
    (tmp_path / "broken.cu").write_text("not C++")
    monkeypatch.setattr(compiler, "_source_dir", lambda: tmp_path)
    monkeypatch.setenv("ANYATTN_CACHE", str(tmp_path / "cache"))
    compiler.cubin.cache_clear()
    return tmp_path


def use_specs(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    constants = (("N", 7), ("SHARED_BYTES", 1024))
    monkeypatch.setattr(plan, "default_specs", lambda arch: [Spec(f"{name}.cu", arch, constants) for name in names])


@pytest.mark.parametrize("arch", cli.ARCHITECTURES)
def test_every_kernel_compiles_without_many_spills_or_serialisation(
    arch: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = cli.main(["compile", "--arch", arch])
    _, *faults = capsys.readouterr().out.split("\n\n")
    assert status == 0, "\n".join(faults)


def test_compile_reports(toys: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    use_specs(monkeypatch, "good")
    report = toys / "report.json"
    assert cli.main(["compile", "--arch", "sm_80,sm_90a", "--report", str(report)]) == 0
    facts = json.loads(report.read_text())
    assert facts["nvrtc"] == "{}.{}".format(*compiler.nvrtc_version())
    for kernel, arch in zip(facts["kernels"], ["sm_80", "sm_90a"], strict=True):
        assert kernel["seconds"] > 0
        assert kernel["registers"] > 0
        del kernel["seconds"], kernel["registers"]
        assert kernel == {
            "kernel": "good",
            "arch": arch,
            "constants": {"N": 7, "SHARED_BYTES": 1024},
            "spill_bytes": 0,
            "shared_bytes": 1024,
            "warnings": [],
            "faults": [],
        }
    output = capsys.readouterr()
    assert "2 kernels, 0 faulty" in output.out
    assert "N=7" in output.out
    assert "2/2" in output.err or "100%" in output.err


def test_compile_for_a_cache_that_cannot_be_written(
    toys: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kernels that go with this process do not do; those that lie there already do."""

    def refuse(path: Path, content: bytes) -> None:
        if path.is_relative_to(toys):
            raise PermissionError(13, "Permission denied")
        write(path, content)

    use_specs(monkeypatch, "good")
    write = compiler._write
    monkeypatch.setattr(compiler, "_write", refuse)
    compiler._temporary_cache.cache_clear()
    assert cli.main(["compile", "--arch", "sm_80"]) == 1
    assert "anyattn: 1 of them were not kept: that folder is not writable" in capsys.readouterr().err
    compiler._temporary_cache.cache_clear()

    for function in (write, refuse):
        monkeypatch.setattr(compiler, "_write", function)
        compiler.cubin.cache_clear()
        assert cli.main(["compile", "--arch", "sm_80"]) == 0


@pytest.mark.parametrize(("name", "fault"), [("spilling", "spills"), ("broken", "could not compile broken.cu")])
def test_compile_fails(
    name: str, fault: str, toys: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_specs(monkeypatch, "good", name)
    assert cli.main(["compile", "--arch", "sm_80"]) == 1
    output = capsys.readouterr().out
    assert "1 faulty" in output
    assert fault in output


@pytest.mark.parametrize(("code", "status"), [("C7512", 1), ("C7517", 0)])
def test_compile_fails_on_serialised_products(
    code: str, status: int, toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_specs(monkeypatch, "good")
    real = compiler._compile

    def warns(spec: Spec) -> tuple[bytes, str]:
        cubin, log = real(spec)
        return cubin, f"ptxas info    : ({code}) wgmma and so on in function 'good'\n{log}"

    monkeypatch.setattr(compiler, "_compile", warns)
    assert cli.main(["compile", "--arch", "sm_90a"]) == status


def test_plain_progress_bar(toys: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    use_specs(monkeypatch, "good")
    assert cli.main(["compile", "--arch", "sm_80,sm_86"]) == 0
    error = capsys.readouterr().err
    assert "] 1/2" in error
    assert error.endswith("] 2/2\n")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("bench --seqlens 0", "'0' is not a number from 1 on"),
        ("bench --rounds 0", "'0' is not a number from 1 on"),
        ("bench --tokens -5", "'-5' is not a number from 1 on"),
        ("bench --head-dims 64,300", "head dims go to 256, got 64,300"),
        ("tune --head-dims 64,x", "'x' is not a number from 1 on"),
    ],
)
def test_bad_numbers(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(command.split())
    assert message in capsys.readouterr().err


def test_files_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told before anything is built, in one line."""
    monkeypatch.setattr(cli, "_in_threads", None)
    assert cli.main(["compile", "--report", f"{__file__}/report.json"]) == 1
    assert capsys.readouterr().err.startswith("anyattn: [Errno ")
    assert cli.main(["compile", "--report", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"anyattn: [Errno 21] Is a directory: '{tmp_path}'\n"


def test_a_reader_that_has_seen_enough() -> None:
    command = [sys.executable, "-m", "anyattn", "info", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1


def test_bad_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["compile", "--arch", "sm_80,hopper"])
    assert "'hopper' is not among sm_80, " in capsys.readouterr().err


def test_compile_without_nvrtc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing() -> tuple[int, int]:
        raise compiler.CompileError("no NVRTC")

    monkeypatch.setattr(cli, "nvrtc_version", missing)
    assert cli.main(["compile"]) == 1
    assert capsys.readouterr().err == "anyattn: no NVRTC\n"


def test_info(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ANYATTN_CACHE", str(tmp_path))
    (tmp_path / "x.cubin").write_bytes(bytes(3 << 20))
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["anyattn"] == anyattn.__version__
    assert facts["packages"]["NumPy"] == np.__version__
    assert facts["cache"] == {"folder": str(tmp_path), "kernels": 1, "mib": 3.0}
    assert (facts["gpu_problem"] is None) <= bool(facts["gpus"])

    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for needed in (anyattn.__version__, np.__version__, str(tmp_path), *(gpu["name"] for gpu in facts["gpus"])):
        assert needed in text


def test_info_without_nvrtc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing() -> tuple[int, int]:
        raise compiler.CompileError("none")

    monkeypatch.setattr(cli, "nvrtc_version", missing)
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nvrtc"] is None


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SHAPE_CPU", (1, 200, 2, 32))
    monkeypatch.setattr(demo, "SHAPE_GPU", (1, 200, 2, 32))


@pytest.mark.usefixtures("small")
def test_demo(capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["demo"])
    output = capsys.readouterr().out
    assert status == 0, output
    for library in ("numpy", "torch", "jax"):
        if library == "numpy" or cli._version(library):
            assert sum(line.startswith(library) for line in output.splitlines()) >= 2  # forward, backward
        else:
            assert f"pip install 'anyattn[{library}]'" in output


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("wrong", [1.001, np.nan])
def test_demo_fails_on_a_wrong_gradient(
    wrong: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = anyattn.attention_vjp

    def vjp(*arrays: Any, **options: Any) -> Any:
        out, pullback = real(*arrays, **options)
        return out, lambda dout: (*pullback(dout)[:2], pullback(dout)[2] * wrong)

    monkeypatch.setattr(anyattn, "attention_vjp", vjp)
    monkeypatch.setattr(demo, "find_subjects", lambda: ([demo._numpy("cpu")], []))
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().out.count("TOO LARGE") == 1
