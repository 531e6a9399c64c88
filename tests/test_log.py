"""What the library tells the logger `anyattn`, and that it prints nothing itself."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import anyattn
from anyattn import compile as compiler
from anyattn import host, launch, log, plan
from anyattn.compile import Cubin, Spec
from anyattn.problem import Options, View, dense

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _told_nothing(caplog: pytest.LogCaptureFixture) -> None:
    log.info_once.cache_clear()
    caplog.set_level(logging.INFO, "anyattn")


def test_compilation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "toy.cu").write_text('extern "C" __global__ void toy(float* x) { x[threadIdx.x] = N; }')
    monkeypatch.setattr(compiler, "_source_dir", lambda: tmp_path)
    monkeypatch.setenv("ANYATTN_CACHE", str(tmp_path / "cache"))
    spec = Spec("toy.cu", "sm_80", (("N", 7),))
    compiler.cubin.__wrapped__(spec)
    [message] = caplog.messages
    assert message.startswith("compiled toy.cu for sm_80 in ")
    assert message.endswith(" s: {'N': 7}")
    assert float(message.split()[-4]) > 0
    caplog.clear()
    compiler.cubin.__wrapped__(spec)  # from the disk
    assert caplog.messages == []


def test_first_use_of_kernels(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """With a CuPy that loads nothing."""

    class Context:
        def __init__(self, ordinal: int) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *error: object) -> None:
            pass

    module = SimpleNamespace(get_function=lambda name: SimpleNamespace(kernel=SimpleNamespace(ptr=0)))
    fake = SimpleNamespace(cuda=SimpleNamespace(Device=Context), RawModule=lambda path: module)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(compiler, "cubin", lambda spec: Cubin("/cache/x.cubin", "", 0.0))
    monkeypatch.setattr(launch, "device", lambda ordinal: plan.Device("sm_90a", plan.SHARED_BYTES["sm_90a"]))
    launch._function.cache_clear()
    monkeypatch.setattr(plan, "FAMILIES", ("sm80",))
    real = plan.forward.__wrapped__

    def refusing(*arguments: Any) -> plan.Plan:
        chosen = real(*arguments)
        return plan.Plan(chosen.kernels, chosen.row_blocks, 0, refused=(("sm99", "it is a test"),))

    monkeypatch.setattr(plan, "forward", refusing)
    for seqlen in (100, 200):  # two problems, one kernel
        view = View(0, (1, seqlen, 2, 64), (seqlen * 128, 128, 64, 1), "float16", 3)
        launch._prepare_forward.__wrapped__(dense(view, view, view, None, Options()))
    launch._function.cache_clear()
    not_taken, first = caplog.messages
    assert not_taken == "not the sm99 kernels: it is a test"
    assert first.startswith("first use of forward_sm80 on cuda:3, ")
    assert first.endswith("from /cache/x.cubin")


def test_threads_load_a_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy unloads the module that is not kept, whoever launches its functions."""
    loaded: list[str] = []

    def load(path: str) -> Any:
        loaded.append(path)
        time.sleep(0.05)
        module = SimpleNamespace(number=len(loaded))
        return SimpleNamespace(get_function=lambda name: SimpleNamespace(kernel=SimpleNamespace(ptr=module.number)))

    fake = SimpleNamespace(cuda=SimpleNamespace(Device=lambda ordinal: nullcontext()), RawModule=load)
    monkeypatch.setitem(sys.modules, "cupy", fake)  # type: ignore[misc]
    monkeypatch.setattr(compiler, "cubin", lambda spec: Cubin("/cache/x.cubin", "", 0.0))
    monkeypatch.setattr(launch, "device", lambda ordinal: plan.Device("sm_80", plan.SHARED_BYTES["sm_80"]))
    launch._function.cache_clear()
    start = threading.Barrier(4)

    def thread(seqlen: int) -> int:
        view = View(0, (1, seqlen, 2, 64), (seqlen * 128, 128, 64, 1), "float16", 0)
        problem = dense(view, view, view, None, Options())
        start.wait()
        return int(launch._prepare_forward.__wrapped__(problem).launches[0][0])

    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(thread, (100, 100, 200, 200))] == [1] * 4
    launch._function.cache_clear()
    assert loaded == ["/cache/x.cubin"]


def test_fallback_to_the_cpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(launch, "available", lambda *_: "there is no GPU in this test")
    view = View(0, (4, 8192, 16, 64), (8192 * 16 * 64, 16 * 64, 64, 1), "float32", -1)
    for _ in range(2):
        assert not host._on_gpu(dense(view, view, view, None, Options()), "auto", 1.0)
    assert caplog.messages == ["on the CPU: there is enough work for a GPU, but there is no GPU in this test"]


def test_first_use_of_the_cpu_path(caplog: pytest.LogCaptureFixture) -> None:
    x = np.ones((1, 4, 1, 8), np.float32)
    for _ in range(2):
        _, pullback = anyattn.attention_vjp(x, x, x, backend="cpu")
        pullback(x)
    assert caplog.messages == ["first use of anyattn.cpu.forward", "first use of anyattn.cpu.backward"]


def test_nothing_is_printed(tmp_path: Path) -> None:
    """Not even warnings, here of a cache that can't be written, where the application has not set logging up."""
    (tmp_path / "file").touch()
    program = (
        "import anyattn, logging, sys, numpy as np\n"
        "from anyattn import compile, plan\n"
        "if len(sys.argv) > 1: logging.basicConfig(level='INFO')\n"
        "x = np.ones((1, 4, 1, 8), np.float32)\n"
        "anyattn.attention_vjp(x, x, x)[1](x)\n"
        "compile.cubin(plan.default_specs('sm_80')[0])\n"
    )
    environment = {**os.environ, "ANYATTN_CACHE": str(tmp_path / "file" / "cache"), "PYTHONPATH": str(ROOT)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)

    silent = run()
    assert silent.stdout + silent.stderr == ""
    told = run("set logging up").stderr
    assert "WARNING:anyattn:the kernel cache is not writable" in told
    assert "INFO:anyattn:compiled forward_sm80.cu for sm_80 in " in told
    assert "INFO:anyattn:first use of anyattn.cpu.forward" in told
