"""Host arrays through a GPU part by part: how calls are cut, and, on a GPU that is but a queue, what comes out."""

from __future__ import annotations

import ctypes
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import anyattn
from anyattn import chunks, launch, offload
from anyattn.problem import Problem
from tests.cases import BY_NAME, Array, Case, Inputs, Results, check, make
from tests.test_api import STREAM, HostKernels, same
from tests.test_api import call as call_api
from tests.test_cpu import validated

CASES = [
    Case("plain", 3, 4, 2, seqlen_q=300, seqlen_k=200),
    Case("causal", 2, 2, 2, seqlen_q=300, seqlen_k=300, causal=True, layout="bhsd", strides="transposed"),
    Case("more_rows", 1, 1, 1, seqlen_q=400, seqlen_k=150, causal=True),
    Case("band", 1, 2, 1, seqlen_q=390, seqlen_k=500, window=(30, 200), alibi="bh", dropout=0.3),
    Case("unmasked_alibi", 2, 2, 2, seqlen_q=300, seqlen_k=260, alibi="h", softcap=3.0, dropout=0.5),
    Case("packed", heads=4, heads_kv=2, lengths=((300, 200), (0, 40), (5, 0), (130, 290), (1, 1)), causal=True,
         alibi="bh", dropout=0.2),
    *(BY_NAME[name] for name in ("two_dimensional", "no_keys", "no_queries", "no_batch", "no_heads", "varlen_empty",
                                "few_rows_decode", "few_rows_varlen")),
]  # fmt: skip
CUTS = ["nothing", "heads", "rows"]  # what there is too little memory for


def lengths_of(case: Case) -> list[tuple[int, int]]:
    return [*case.lengths] if case.lengths is not None else [(case.seqlen_q, case.seqlen_k)] * case.batch


def memory(problem: Problem, lengths: list[tuple[int, int]], cut: str, backward: bool) -> int:
    """Just enough for the longest head, or for the least number of its rows."""
    if cut == "nothing" or not problem.heads_kv:
        return 1 << 40
    of_row, of_key = chunks._bytes(problem, backward)
    rows, keys = (max((n[i] for n in lengths), default=0) for i in (0, 1))
    return 2 * (keys * of_key + of_row * ((rows if cut == "heads" else 128) + 256))


# --- how calls are cut -----------------------------------------------------------------------------------------------


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_SMALL", 1 << 16)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parts_cover_the_call(case: Case, cut: str, backward: bool) -> None:
    problem = validated(case, make(case, "float32", np.random.default_rng(0)))
    most = memory(problem, lengths_of(case), cut, backward)
    rows = np.zeros((1 if case.varlen else problem.batch, problem.heads, problem.total_q or problem.seqlen_q), int)
    keys = np.zeros((len(rows), problem.heads_kv, problem.total_k or problem.seqlen_k), int)
    for part in chunks.parts(problem, 0, lengths_of(case), most, backward):
        rows[part.batch, part.heads, part.rows] += 1
        keys[part.batch, part.heads_kv, part.keys] += part.last
        p = part.problem
        assert 2 * sum(bytes_of(p, backward)) <= most
        assert (p.head_dim, p.head_dim_v, p.scale, p.softcap) == tuple(
            getattr(problem, name) for name in ("head_dim", "head_dim_v", "scale", "softcap")
        )
    if cut == "rows" and case in CASES[:5]:
        assert not all(part.last for part in chunks.parts(problem, 0, lengths_of(case), most, backward))
    assert (rows == 1).all()
    assert (keys == 1).all()


def bytes_of(p: Problem, backward: bool) -> list[int]:
    """What a part's arrays take on the GPU."""
    shapes = [p.q_shape, p.k_shape, p.v_shape, p.out_shape] * (2 if backward else 1)
    found = [int(np.prod(shape)) * p.itemsize for shape in shapes]
    if backward:
        from anyattn import plan
        from anyattn.problem import contiguous_backward

        found.append(plan.backward(contiguous_backward(p), plan.Device("sm_90a", 227 << 10)).workspace_bytes)
    return found


def test_large_calls_are_cut_into_many_parts_and_small_ones_are_not() -> None:
    def count(batch: int, seqlen: int) -> int:
        case = Case("", batch, 16, 16, seqlen_q=seqlen, seqlen_k=seqlen)
        inputs = make(Case("", 1, 16, 16, seqlen_q=1, seqlen_k=1), "bfloat16", np.random.default_rng(0))
        wide = {name: np.broadcast_to(getattr(inputs, name), (batch, seqlen, 16, 64)) for name in ("q", "k", "v")}
        problem = validated(case, Inputs(**wide, dout=inputs.dout, options=inputs.options))
        return len(chunks.parts(problem, 0, lengths_of(case), 60 << 30, False))

    assert count(1, 512) == 1
    assert 6 <= count(8, 4096) <= 10
    assert count(64, 16384) >= 128  # 8 GiB, in parts of at most 64 MiB


@pytest.mark.parametrize("backward", [False, True])
def test_keys_that_do_not_fit(backward: bool) -> None:
    case = Case("", 1, 2, 2, seqlen_q=100, seqlen_k=10_000)
    problem = validated(case, make(case, "float32", np.random.default_rng(0)))
    with pytest.raises(MemoryError, match=r"keys of one head .* 3000000 are free"):
        chunks.parts(problem, 0, lengths_of(case), 3_000_000, backward)


# --- on a GPU that is but a queue ------------------------------------------------------------------------------------


class Stream:
    """Does what it was asked for when somebody waits for it, and not before."""

    made: list[Stream]

    def __init__(self, non_blocking: bool = False) -> None:
        self.queue: list[Callable[[], None]] = []
        self.waited = ""
        self.ptr = len(Stream.made)
        Stream.made.append(self)

    def wait_event(self, event: str) -> None:
        self.waited = event

    def synchronize(self) -> None:
        for work in self.queue:
            work()
        self.queue.clear()


class Memory:
    """Device memory in the host's, NaN at first."""

    uploads = 0

    def __init__(self, size: int) -> None:
        self.bytes = np.full(size + 16, 255, np.uint8)
        self.ptr = self.bytes.ctypes.data + -self.bytes.ctypes.data % 16

    def copy_from_host_async(self, here: int, size: int, stream: Stream) -> None:
        assert stream.waited == "all asked of the current stream"  # the pool may have this memory from there
        Memory.uploads += 1
        stream.queue.append(lambda: ctypes.memmove(self.ptr, here, size) and None)

    def copy_to_host_async(self, here: int, size: int, stream: Stream) -> None:
        stream.queue.append(lambda: ctypes.memmove(here, self.ptr, size) and None)


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> HostKernels:
    """A CuPy whose only GPU is a queue, and kernels that run on the host when their turn comes."""
    runtime = types.SimpleNamespace(getDevice=lambda: 0, memGetInfo=lambda: (1 << 30, 1 << 30))
    current = types.SimpleNamespace(record=lambda: "all asked of the current stream")
    cuda = types.SimpleNamespace(
        Stream=Stream,
        alloc=Memory,
        alloc_pinned_memory=lambda size: bytearray(b"\xff" * size),
        runtime=runtime,
        get_current_stream=lambda: current,
    )
    pool = types.SimpleNamespace(free_bytes=lambda: 0)
    fake = types.SimpleNamespace(cuda=cuda, get_default_memory_pool=lambda: pool)
    monkeypatch.setitem(sys.modules, "cupy", fake)  # type: ignore[misc]
    monkeypatch.setattr(Stream, "made", [], raising=False)
    monkeypatch.setattr(Memory, "uploads", 0)
    kernels = HostKernels()

    def later(function: Callable[..., None], at: int) -> Callable[..., None]:
        def launch(*args: Any, **rest: Any) -> None:
            stream = Stream.made[args[at]]
            stream.queue.append(lambda: function(*args[:at], STREAM, *args[at + 1 :], **rest))

        return launch

    monkeypatch.setattr(launch, "available", lambda *_: None)
    monkeypatch.setattr(launch, "forward", later(kernels.forward, 6))
    monkeypatch.setattr(launch, "backward", later(kernels.backward, 11))
    monkeypatch.setattr(launch, "workspace_bytes", kernels.workspace_bytes)
    return kernels


def compute(case: Case, inputs: Inputs, cut: str, monkeypatch: pytest.MonkeyPatch) -> Results:
    def parts(problem: Problem, device: int, lengths: Any, _: int, backward: bool) -> list[chunks.Part]:
        return chunks.parts(problem, device, lengths, memory(problem, lengths, cut, backward), backward)

    monkeypatch.setattr(offload, "parts", parts)
    return call_api(case, inputs, same, same, backend="cuda")


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_part_by_part(case: Case, cut: str, dtype: str, queue: HostKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(case, dtype, np.random.default_rng(0))
    check(case, dtype, inputs, compute(case, inputs, cut, monkeypatch))
    assert len(Stream.made) in (0, 2, 3, 4)  # two a call, one where a single part is all


@pytest.mark.usefixtures("small_parts")
def test_keys_are_copied_once_a_slot(queue: HostKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).standard_normal((3000, 64)).astype(np.float32)
    monkeypatch.setattr(offload, "_free_bytes", lambda: 4_000_000)
    out = anyattn.attention(x, x, x, causal=True, backend="cuda")
    np.testing.assert_allclose(out, anyattn.attention(x, x, x, causal=True, backend="cpu"), atol=1e-5)
    assert queue.calls >= 5
    assert Memory.uploads == queue.calls + 2 * 2  # q for each part, k and v for each slot


@pytest.mark.usefixtures("small_parts")
def test_an_error_leaves_no_copy_behind(queue: HostKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.zeros((8, 64, 4, 64), np.float32)
    calls = 0

    def forward(*_: Any, **__: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(launch, "forward", forward)
    monkeypatch.setattr(offload, "_free_bytes", lambda: 700_000)
    with pytest.raises(RuntimeError, match="out of memory"):
        anyattn.attention(x, x, x, backend="cuda")
    assert all(not stream.queue for stream in Stream.made)


@pytest.mark.parametrize("ending", [False, True])
def test_copies_by_several_threads(ending: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the interpreter's end by none but its own."""

    class Pool:
        def map(self, *_: Any) -> None:
            raise RuntimeError("cannot schedule new futures after shutdown")

    if ending:
        monkeypatch.setattr(offload, "_pool", Pool)
    monkeypatch.setattr(offload, "_SHARE", 100)
    monkeypatch.setattr(offload.os, "cpu_count", lambda: 4)
    of: Array = np.random.default_rng(0).standard_normal((3, 50, 7, 8)).swapaxes(1, 2)
    to = np.empty(of.shape)
    offload._copy(to, of)
    np.testing.assert_array_equal(to, of)


@pytest.mark.usefixtures("small_parts", "queue")
def test_gradients_beyond_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are infinite, as on the CPU, and nobody is warned."""
    case = CASES[0]
    inputs = make(case, "float16", np.random.default_rng(0))
    inputs = replace(inputs, dout=np.full_like(inputs.dout, 60_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compute(case, inputs, "rows", monkeypatch)
    assert found.dv is not None
    assert np.isinf(found.dv).any()


# --- on a real one ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gpu(case: Case, cut: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(case, dtype, np.random.default_rng(0))
    check(case, dtype, inputs, compute(case, inputs, cut, monkeypatch))
