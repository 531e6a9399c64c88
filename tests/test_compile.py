"""The way from a Spec to a cubin on disk, on machines without a GPU."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from anyattn import compile as compiler
from anyattn.compile import CompileError, Spec

SOURCE = """
#include "inner/scale.cuh"
extern "C" __global__ void __launch_bounds__(128) scale_up(float* x) { x[threadIdx.x] *= scale(N); }
extern "C" __global__ void __launch_bounds__(128) reverse(float* x) {
    __shared__ float tile[N];
    tile[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = tile[N - 1 - threadIdx.x];
}
"""
HEADER = '#pragma once\n#include "deepest.cuh"\n__device__ inline float scale(int n) { return BASE * n; }\n'
SPEC = Spec("toy.cu", "sm_80", (("N", 128),))


@pytest.fixture(autouse=True)
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of small CUDA sources and an empty cache in place of the real ones."""
    folder = tmp_path / "sources"
    (folder / "inner").mkdir(parents=True)
    (folder / "toy.cu").write_text(SOURCE)
    (folder / "inner" / "scale.cuh").write_text(HEADER)
    (folder / "deepest.cuh").write_text("#pragma once\nconstexpr float BASE = 3;\n")
    monkeypatch.setattr(compiler, "_source_dir", lambda: folder)
    monkeypatch.setenv("ANYATTN_CACHE", str(tmp_path / "cache"))
    forget()
    return folder


def forget() -> None:
    """Drops what is cached in memory, as a new process would."""
    compiler.cubin.cache_clear()
    compiler._temporary_cache.cache_clear()


def rebuilt(spec: Spec = SPEC) -> bool:
    forget()
    return compiler.cubin(spec).seconds > 0


def test_prelude() -> None:
    spec = Spec("toy.cu", "sm_80", (("T", "Half"), ("N", 4), ("CAUSAL", True)), prelude="struct Half {};")
    assert spec.text().splitlines() == [
        "[[maybe_unused]] constexpr int N = 4;",
        "[[maybe_unused]] constexpr bool CAUSAL = true;",
        "struct Half {};",
        "using T = Half;",
        '#line 1 "toy.cu"',
    ]


def test_builds_a_cubin_and_reports_its_resources() -> None:
    built = compiler.cubin(SPEC)
    assert Path(built.path).read_bytes()[:4] == b"\x7fELF"
    scale_up, reverse = sorted(built.resources(), key=lambda r: r.kernel, reverse=True)
    assert (scale_up.kernel, reverse.kernel) == ("scale_up", "reverse")
    assert (scale_up.shared_bytes, reverse.shared_bytes) == (0, 4 * 128)
    assert 0 < scale_up.registers < 32
    assert scale_up.spill_bytes == scale_up.stack_bytes == 0
    assert built.warnings() == []


def test_reports_spills_and_warnings(sources: Path) -> None:
    # 1024 threads leave 64 registers a thread, less than the 100 values that live over the barrier.
    (sources / "spills.cu").write_text("""
extern "C" __global__ void __launch_bounds__(1024) spills(float* x, int n) {
    int unused;
    float a[100];
    #pragma unroll
    for (int i = 0; i < 100; i++) a[i] = x[i * n + threadIdx.x];
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < 100; i++) x[(99 - i) * n + threadIdx.x] = a[i] * a[99 - i];
}
""")
    built = compiler.cubin(Spec("spills.cu", "sm_80"))
    [resources] = built.resources()
    assert resources.spill_bytes > 0
    assert resources.stack_bytes > 0
    [warning] = built.warnings()
    assert "unused" in warning
    assert "spills.cu(3)" in warning  # the lines of the prelude don't count


def test_reports_serialised_wgmma(sources: Path) -> None:
    # The accumulator is read while the products are in flight.
    (sources / "serialised.cu").write_text("""
extern "C" __global__ void __launch_bounds__(128, 1) serialised(float* x, unsigned long long a, unsigned long long b) {
    float d[4] = {};
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    for (int i = 0; i < 4; i++) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a + i), "l"(b));
        d[0] *= x[i];
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    for (int i = 0; i < 4; i++) x[threadIdx.x + i] = d[i];
}
""")
    warnings = compiler.cubin(Spec("serialised.cu", "sm_90a")).warnings()
    assert any("serialized" in warning and warning.startswith("(C75") for warning in warnings)


def test_second_process_reads_the_disk() -> None:
    first = compiler.cubin(SPEC)
    assert first.seconds > 0
    forget()
    second = compiler.cubin(SPEC)
    assert second == first._replace(seconds=0.0)


@pytest.mark.skipif(os.name != "posix", reason="no such modes on this system")
def test_another_user_may_read_the_disk() -> None:
    path = Path(compiler.cubin(SPEC).path)
    for file in path.parent.iterdir():
        assert file.stat().st_mode & 0o777 == 0o644, file.name


def test_parsed_text_stays_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []

    def parse(text: str) -> object:
        parsed.append(text)
        return object() if text == "no JSON" else {"words": text.split()}

    def parses(text: str) -> bool:
        before = len(parsed)
        assert text == "no JSON" or compiler.kept("toy", text, parse) == {"words": text.split()}
        compiler.kept("toy", text, parse)
        return len(parsed) > before

    assert parses("one two")
    assert not parses("one two")
    assert parses("three")  # another text
    numbers = '{"sha256": "1", "content": 1}'
    for damaged in (
        lambda text: text[:-3],
        lambda text: text.replace("two", "six"),
        lambda text: "null",
        lambda text: numbers,
    ):
        for file in (tmp_path / "cache").iterdir():
            file.write_text(damaged(file.read_text()))
        assert parses("one two")
        assert not parses("one two")
    assert parses("no JSON")
    assert parses("no JSON")
    (tmp_path / "file").touch()
    monkeypatch.setenv("ANYATTN_CACHE", str(tmp_path / "file" / "cache"))
    assert parses("one two")
    assert parses("one two")


def test_threads_build_a_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    compile_, start = compiler._compile, threading.Barrier(8)
    monkeypatch.setattr(compiler, "_compile", lambda spec: (built.append(spec.source), compile_(spec))[1])

    def thread(_: int) -> str:
        start.wait()
        return compiler.cubin(SPEC).path

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(thread, range(8)))) == 1
    assert built == ["toy.cu"]


def test_relative_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ANYATTN_CACHE", "here")
    path = Path(compiler.cubin(SPEC).path)
    monkeypatch.chdir(tmp_path.parent)
    assert path.is_file()


def test_nowhere_to_keep_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ANYATTN_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(compiler.CompileError, match=r"there is nowhere to keep a kernel: .* Set ANYATTN_CACHE"):
        compiler.cubin(SPEC)


def test_what_kernels_are_compiled_with(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler.missing.__wrapped__() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "cuda.core and cuda.bindings. Install them: pip install" in str(compiler.missing.__wrapped__())


def test_threads_that_import_cuda_core_at_once() -> None:
    """One for the compiler, one for DLPack. Imported as they come, one of the two often fails."""
    script = """
import threading
from anyattn.compile import cuda_core
start, imported = threading.Barrier(2), []
def thread(module, name):
    start.wait()
    imported.append(getattr(cuda_core(module), name))
names = ("cuda.core.utils", "StridedMemoryView"), ("cuda.core", "Program")
threads = [threading.Thread(target=thread, args=pair) for pair in names]
for t in threads: t.start()
for t in threads: t.join()
assert len(imported) == 2
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_key_covers_everything_that_matters(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.cubin(SPEC)
    assert rebuilt(SPEC._replace(arch="sm_86"))
    assert rebuilt(SPEC._replace(constants=(("N", 64),)))
    assert rebuilt(SPEC._replace(prelude="static_assert(N == 128);"))
    for name in ("toy.cu", "inner/scale.cuh", "deepest.cuh"):
        (sources / name).write_text((sources / name).read_text() + "// edited\n")
        assert rebuilt(), name
    (sources / "unrelated.cuh").write_text("")
    assert not rebuilt()
    with monkeypatch.context() as patch:
        patch.setitem(compiler.OPTIONS, "std", "c++20")
        assert rebuilt()
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (99, 0))
    assert rebuilt()


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-1] + bytes([b[-1] ^ 1])])
@pytest.mark.parametrize("suffix", ["cubin", "json"])
def test_damaged_file_is_rebuilt(damage, suffix: str) -> None:  # type: ignore[no-untyped-def]
    path = Path(compiler.cubin(SPEC).path)
    intact = path.read_bytes()
    [victim] = path.parent.glob(f"*.{suffix}")
    victim.write_bytes(damage(victim.read_bytes()))
    assert rebuilt()
    assert path.read_bytes() == intact
    assert not rebuilt()


@pytest.mark.parametrize("content", ["[]", "{}", '{"sha256": 1, "log": ""}', '{"sha256": "/etc/passwd", "log": ""}'])
def test_strange_entry_is_rebuilt(content: str) -> None:
    path = Path(compiler.cubin(SPEC).path)
    [entry] = path.parent.glob("*.json")
    entry.write_text(content)
    assert rebuilt()
    assert json.loads(entry.read_text())["sha256"] == path.stem


def test_unwritable_cache_falls_back_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")  # a folder below a file can't be made, not even by root
    monkeypatch.setenv("ANYATTN_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING, "anyattn"):
        first = compiler.cubin(SPEC)
        compiler.cubin(SPEC._replace(arch="sm_86"))
    assert Path(first.path).exists()
    [message] = caplog.messages
    assert "ANYATTN_CACHE" in message


def test_failed_write_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: str, target: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        compiler.cubin(SPEC)
    assert list(compiler.cache_dir().iterdir()) == []


def test_sixteen_at_once() -> None:
    """Processes that start together on an empty cache all end with a whole cubin."""
    program = (
        "import sys; from pathlib import Path; from anyattn import compile as c; "
        "c._source_dir = lambda: Path(sys.argv[1]); built = c.cubin(c.Spec('toy.cu', 'sm_80', (('N', 128),))); "
        "print(len(Path(built.path).read_bytes()))"
    )
    command = [sys.executable, "-c", program, str(compiler._source_dir())]

    def start(_: int) -> str:
        return subprocess.run(command, env=child_environment(), check=True, capture_output=True, text=True).stdout

    with ThreadPoolExecutor(16) as pool:
        sizes = set(pool.map(start, range(16)))
    assert len(sizes) == 1
    assert {path.suffix for path in compiler.cache_dir().iterdir()} == {".cubin", ".json"}
    assert not rebuilt()


def test_filled_cache_needs_no_compiler_and_little_time() -> None:
    compiler.cubin(SPEC)
    program = (
        "import numpy, anyattn, sys, time; from pathlib import Path; from anyattn import compile as c; "
        "c._source_dir = lambda: Path(sys.argv[1]); start = time.perf_counter(); "
        "built = c.cubin(c.Spec('toy.cu', 'sm_80', (('N', 128),))); "
        "print(time.perf_counter() - start, built.seconds, 'cuda.core' in sys.modules, 'cuda.bindings' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(compiler._source_dir())]
    best = 1.0
    for _ in range(3):
        output = subprocess.run(command, env=child_environment(), check=True, capture_output=True, text=True).stdout
        seconds, *rest = output.split()
        assert rest == ["0.0", "False", "False"]
        best = min(best, float(seconds))
    assert best < 0.1


def child_environment() -> dict[str, str]:
    root = str(Path(__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}


def test_empty_cache_is_quick() -> None:
    start = time.perf_counter()
    compiler.cubin(SPEC)
    assert time.perf_counter() - start < 2


def test_error_in_the_source_names_file_and_line(sources: Path) -> None:
    (sources / "wrong.cu").write_text("\n\nint x = undeclared_name;\n")
    with pytest.raises(CompileError, match=r"(?s)wrong\.cu for sm_80.*wrong\.cu\(3\).*undeclared_name"):
        compiler.cubin(Spec("wrong.cu", "sm_80", (("N", 1),)))


def test_unknown_architecture() -> None:
    with pytest.raises(CompileError, match=r"too old for sm_999.*pip install"):
        compiler.cubin(SPEC._replace(arch="sm_999"))


def test_missing_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.nvrtc_version.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)
    with pytest.raises(CompileError, match=r"NVRTC.*not found.*pip install 'anyattn\[cuda13\]'"):
        compiler.cubin(SPEC)


def test_missing_cuda_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(CompileError, match=r"cuda\.core.*pip install 'anyattn\[cuda13\]'"):
        compiler.cubin(SPEC)


def test_many_threads_at_once_in_a_new_process(sources: Path, tmp_path: Path) -> None:
    """None sees cuda.core half imported."""
    program = (
        "import sys; from concurrent.futures import ThreadPoolExecutor; from pathlib import Path\n"
        "from anyattn import compile\n"
        f"compile._source_dir = lambda: Path({str(sources)!r})\n"
        "sys.setswitchinterval(1e-5)\n"
        "specs = [compile.Spec('toy.cu', 'sm_80', (('N', 32 * n),)) for n in range(1, 9)]\n"
        "print(len({built.path for built in ThreadPoolExecutor(8).map(compile.cubin, specs)}))\n"
    )
    environment = {**os.environ, "ANYATTN_CACHE": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "8\n"


def test_driver_of_an_older_major_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (13, 5))
    assert compiler.driver_problem(13000) is None
    assert compiler.driver_problem(14010) is None
    problem = compiler.driver_problem(12080)
    assert problem is not None
    assert "NVRTC 13.5" in problem
    assert "CUDA 12.8" in problem
    assert "anyattn[cuda12]" in problem


def test_old_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (12, 0))
    with pytest.raises(CompileError, match=r"NVRTC 12\.0 is too old.*pip install"):
        compiler.cubin(SPEC)
    assert "NVRTC 12.0 is too old" in str(compiler.driver_problem(12080))


def test_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANYATTN_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert compiler.cache_dir() == Path("/home/x/.cache/anyattn")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert compiler.cache_dir() == Path("/caches/anyattn")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert compiler.cache_dir() == Path("/home/x/Library/Caches/anyattn")
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    assert compiler.cache_dir() == Path("/local/anyattn")
