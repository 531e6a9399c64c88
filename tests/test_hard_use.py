"""What breaks attention libraries in practice, and is in no table of cases: extreme scores, odd strides, streams,
graphs, threads, devices, too little memory.

Elsewhere: NaN and infinities that nobody may see (test_hidden.py), the kernel cache (test_compile.py), very large
arrays, poisoned memory and determinism (test_gpu.py), PyTorch's graphs and errors (test_torch.py).
"""

from __future__ import annotations

import ctypes
import sys
import threading
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import anyattn
from anyattn import compile as compiler
from anyattn import launch, offload, plan
from tests.cases import DTYPES, Array, Case, Inputs, Results, check, expected, make
from tests.device import Call, Job, cupy
from tests.test_cpu import run as run_on_cpu
from tests.test_gpu import assert_same, copy_late, from_cupy, through_api, to_cupy


def run_on_gpu(case: Case, inputs: Inputs) -> Results:
    call = Call(inputs)
    call.forward()
    call.backward()
    return call.results()


# --- extreme scores --------------------------------------------------------------------------------------------------

FAR_BELOW = Case("far_below", 1, 2, 2, seqlen_q=700, seqlen_k=30, alibi="h")
ODD = Case("odd_negative_alibi", 2, 3, 3, seqlen_q=77, seqlen_k=131, alibi="h")


def far_below(dtype: str) -> Inputs:
    """The first rows stand far before all keys: exp of their scores is 0 in float32, and so is the sum of them."""
    inputs = make(FAR_BELOW, dtype, np.random.default_rng(0))
    inputs = replace(inputs, options={**inputs.options, "alibi_slopes": np.array([1.0, 0.5], np.float32)})
    assert (expected(FAR_BELOW, inputs).lse[..., :300] < -150).all()
    return inputs


def negative_alibi(dtype: str) -> Inputs:
    """Slopes that favour far keys: what lies behind the last row and the last key would weigh most."""
    inputs = make(ODD, dtype, np.random.default_rng(0))
    return replace(inputs, options={**inputs.options, "alibi_slopes": np.array([-2.0, -0.5, -0.01], np.float32)})


EXTREME = [(FAR_BELOW, far_below), (ODD, negative_alibi)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("case", "inputs"), EXTREME, ids=["far_below", "negative_alibi"])
def test_extreme_scores(case: Case, inputs: Callable[[str], Inputs], dtype: str) -> None:
    given = inputs(dtype)
    check(case, dtype, given, run_on_cpu(case, given))


@pytest.mark.gpu
@pytest.mark.parametrize("job", [Job(FAR_BELOW, dtype) for dtype in DTYPES], ids=str)
def test_scores_far_below_zero_on_a_gpu(job: Job) -> None:
    check(job.case, job.dtype, far_below(job.dtype), run_on_gpu(job.case, far_below(job.dtype)))


@pytest.mark.gpu
@pytest.mark.parametrize("job", [Job(ODD, dtype) for dtype in DTYPES], ids=str)
def test_negative_alibi_of_odd_lengths_on_a_gpu(job: Job) -> None:
    check(job.case, job.dtype, negative_alibi(job.dtype), run_on_gpu(job.case, negative_alibi(job.dtype)))


LOW = {
    "float16": [-6e4],
    "bfloat16": [-1e9, -1e20, -1e30],
    "float32": [-1e9, -1e20, -1e30],
    "float64": [-1e20, -1e25, -1e30],
}
PADDED = Case("low_last_keys", 1, 2, 2, seqlen_q=150, seqlen_k=300)
PADDED_WINDOW = replace(PADDED, name="low_last_keys_window", window=(20, 0))  # many rows see no others


def check_low_last_keys(case: Case, dtype: str, run: Callable[[Case, Inputs], Results]) -> None:
    """A column that puts the last keys, with which the kernels begin, far below all others: a way to pad.

    Rows that see only such keys are those of no one: what they give has no digits, but spoils nothing.
    """
    for low in LOW[dtype]:
        inputs = make(case, dtype, np.random.default_rng(0))
        q, k, dout = inputs.q.copy(), inputs.k.copy(), inputs.dout.copy()
        q[..., 0], k[..., 0] = 1, 0
        k[:, 200:, :, 0] = low
        lost = slice(70 if case.window else case.seqlen_q, None)  # row i stands at position i + 150
        dout[:, lost] = 0
        inputs = replace(inputs, q=q, k=k, dout=dout)
        exact, results = expected(case, inputs), run(case, inputs)
        out, lse = results.out.copy(), results.lse.copy()
        assert np.isfinite(out.astype(np.float64)).all(), (low, "out")
        assert not np.isnan(lse).any(), (low, "lse")
        out[:, lost], lse[..., lost] = exact.out[:, lost], exact.lse[..., lost]
        check(case, dtype, inputs, replace(results, out=out, lse=lse))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [PADDED, PADDED_WINDOW], ids=lambda case: case.name)
def test_last_keys_far_below_all_others(case: Case, dtype: str) -> None:
    check_low_last_keys(case, dtype, run_on_cpu)


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_plans")
@pytest.mark.parametrize(
    ("job", "kernels"),
    [
        (Job(case, dtype), kernels)
        for case in (PADDED, PADDED_WINDOW)
        for dtype in DTYPES
        for kernels in (("", "sm80") if DTYPES[dtype].itemsize == 2 else ("",))
    ],
    ids=str,
)
def test_last_keys_far_below_all_others_on_a_gpu(job: Job, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels:
        monkeypatch.setenv("ANYATTN_KERNEL", kernels)
    check_low_last_keys(job.case, job.dtype, run_on_gpu)


ALIKE = Case("large_alike_scores", 1, 2, 2, seqlen_q=2, seqlen_k=4200, head_dim=64, head_dim_v=64, scale=1.0)


def check_alike_scores(dtype: str, run: Callable[[Case, Inputs], Results]) -> None:
    """All keys weigh the same, whatever their score: where thread blocks share them, so must their parts."""
    for factor in (8, 8192):
        inputs = make(ALIKE, dtype, np.random.default_rng(0))
        q, k, v = (np.zeros_like(x) for x in (inputs.q, inputs.k, inputs.v))
        q[..., 0], k[..., 0], v[:, :300] = factor, factor, 1
        out = run(ALIKE, replace(inputs, q=q, k=k, v=v)).out.astype(np.float64)
        np.testing.assert_allclose(out, 300 / 4200, rtol=2 * float(ml_dtypes.finfo(DTYPES[dtype]).eps))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_that_are_alike(dtype: str) -> None:
    check_alike_scores(dtype, run_on_cpu)


@pytest.mark.gpu
@pytest.mark.parametrize("job", [Job(ALIKE, dtype) for dtype in DTYPES], ids=str)
def test_large_scores_that_are_alike_on_a_gpu(job: Job) -> None:
    check_alike_scores(job.dtype, run_on_gpu)


# --- strides ---------------------------------------------------------------------------------------------------------

OVERLAP = Case("overlapping", 1, 2, 2, seqlen_q=90, seqlen_k=110, causal=True)


def overlapping(dtype: str) -> Inputs:
    """Rows, heads and keys that share memory: each row begins a few elements behind the one before it."""
    inputs = make(OVERLAP, dtype, np.random.default_rng(0))
    arrays: dict[str, Array] = {}
    for i, name in enumerate(("q", "k", "v", "dout")):
        shape, item = getattr(inputs, name).shape, inputs.q.dtype.itemsize
        flat = np.random.default_rng(i).standard_normal(8 * shape[1] + 16 * shape[2] + 64).astype(inputs.q.dtype)
        arrays[name] = np.ndarray(shape, flat.dtype, flat, 0, (0, 8 * item, 16 * item, item))  # keeps flat as its base
    return replace(inputs, **arrays)


@pytest.mark.parametrize("dtype", DTYPES)
def test_overlapping_strides(dtype: str) -> None:
    inputs = overlapping(dtype)
    check(OVERLAP, dtype, inputs, run_on_cpu(OVERLAP, inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("job", [Job(OVERLAP, dtype) for dtype in DTYPES], ids=str)
def test_overlapping_strides_on_a_gpu(job: Job) -> None:
    inputs = overlapping(job.dtype)
    check(job.case, job.dtype, inputs, run_on_gpu(job.case, inputs))
    check(job.case, job.dtype, inputs, through_api(job.case, inputs, to_cupy, from_cupy))


# --- streams and graphs ----------------------------------------------------------------------------------------------


class Late:
    """An array that another stream still writes: whoever asks for it by DLPack waits for that."""

    __module__ = "unheard_of.core"

    def __init__(self, x: Any, stream: Any) -> None:
        self.x, self.stream = x, stream

    def __dlpack__(self, **arguments: Any) -> Any:
        with self.stream:
            return self.x.__dlpack__(**arguments)

    def __dlpack_device__(self) -> Any:
        return self.x.__dlpack_device__()


STREAM_JOB = Job(Case("late", 2, 4, 2, seqlen_q=300, seqlen_k=300, causal=True), "float16", True)


@pytest.mark.gpu
@pytest.mark.parametrize("job", [STREAM_JOB], ids=str)
def test_input_that_another_stream_still_writes(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    library = types.ModuleType("unheard_of")
    library.from_dlpack = lambda x: Late(x, cupy.cuda.Stream.null)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "unheard_of", library)
    inputs, producer, consumer = job.inputs(), cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    q, k, v = map(to_cupy, (inputs.q, inputs.k, inputs.v))
    wanted = from_cupy(anyattn.attention(q, k, v, causal=True))
    staged = q.copy()
    q.data.memset(0xFF, q.nbytes)
    cupy.cuda.runtime.deviceSynchronize()
    ballast = copy_late(producer, q.data.ptr, staged.data.ptr, q.nbytes)
    with consumer:
        out = anyattn.attention(*(Late(x, producer) for x in (q, k, v)), causal=True)
    consumer.synchronize()
    np.testing.assert_array_equal(from_cupy(out.x), wanted)
    del ballast


@pytest.mark.gpu
@pytest.mark.parametrize("job", [STREAM_JOB, replace(STREAM_JOB, dtype="float32")], ids=str)
def test_graph_replays_on_changed_contents(job: Job) -> None:
    first, second = (make(job.case, job.dtype, np.random.default_rng(seed)) for seed in (1, 2))
    call, other = Call(first, deterministic=True), Call(second, deterministic=True)
    for x in (call, other):
        x.forward()
        x.backward()
    wanted = other.results()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        call.forward(stream.ptr)
        call.backward(stream.ptr)
        graph = stream.end_capture()
    for name, memory in call.inputs.items():
        content = other.inputs[name].content
        assert content is not None
        memory.write(0, content)
        memory.content = content
    for memory in call.outputs.values():
        memory.poison()
    cupy.cuda.runtime.deviceSynchronize()
    graph.launch(stream)
    stream.synchronize()
    assert_same(call.results(), wanted)


# --- threads and devices ---------------------------------------------------------------------------------------------

FIRST = Job(Case("first_call", 1, 2, 2, seqlen_q=65, seqlen_k=65, head_dim=72, head_dim_v=72), "bfloat16")


@pytest.mark.gpu
def test_first_call_of_two_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both compile, load and launch the same kernels at once, on an empty cache."""
    monkeypatch.setenv("ANYATTN_CACHE", str(tmp_path))
    launch.forget_plans()
    compiler.cubin.cache_clear()
    launch._function.cache_clear()
    inputs, start = FIRST.inputs(), threading.Barrier(2)

    def thread(_: int) -> Results:
        with cupy.cuda.Device(0), cupy.cuda.Stream(non_blocking=True):
            start.wait()
            return through_api(FIRST.case, inputs, to_cupy, from_cupy)

    with ThreadPoolExecutor(2) as pool:
        for results in pool.map(thread, range(2)):
            check(FIRST.case, FIRST.dtype, inputs, results)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A driver that keeps what it is asked for, and a kernel to launch with a map and without tickets."""
    seen = types.SimpleNamespace(devices=[], pointers=[], asked=[])

    def launch_kernel(*arguments: Any) -> None:
        (params,) = ctypes.cast(arguments[9], ctypes.POINTER(ctypes.c_void_p * 1)).contents
        values = (ctypes.c_uint64 * len(launch.POINTERS)).from_address(params)
        seen.pointers.append(dict(zip(launch.POINTERS, values, strict=True)))
        seen.asked.append("launch")

    def set_device(ordinal: int) -> None:
        seen.devices.append(ordinal)
        seen.asked.append("device")

    def make_map(pointers: tuple[int, ...]) -> bytes:
        seen.asked.append("map")
        return b""

    runtime = types.SimpleNamespace(setDevice=set_device)
    cuda = types.SimpleNamespace(runtime=runtime, driver=types.SimpleNamespace(launchKernel=launch_kernel))
    prepared = launch._Prepared(plan.Plan((), 0, 0), ((0, 1, 32, 0),), launch._ArgumentsOfThread(b""), (make_map,), 1)
    monkeypatch.setattr(launch, "_cuda", lambda: cuda)
    for name in ("_prepare_forward", "_prepare_backward"):
        monkeypatch.setattr(launch, name, lambda problem: prepared)
    return seen


def test_each_thread_names_the_device_once(driver: types.SimpleNamespace) -> None:
    """A map and a launch need a context, which a thread lacks until it has named a device."""

    def twice() -> None:
        for _ in range(2):
            launch.forward(None, 1, 2, 3, 4, 5, 0)  # type: ignore[arg-type]

    twice()
    thread = threading.Thread(target=twice)
    thread.start()
    thread.join()
    assert len(driver.pointers) == 4
    assert driver.devices == [1, 1]
    assert driver.asked == ["device", "map", "launch", "launch"] * 2


def test_no_pointer_outlives_its_call(driver: types.SimpleNamespace) -> None:
    """Every launch sees its own call's, whatever the last one's were."""
    calls: list[tuple[dict[str, int], dict[str, int]]] = [
        ({"q": 1, "k": 2, "v": 3, "out": 4, "lse": 5}, {}),
        ({"q": 1, "k": 2, "v": 3, "out": 6, "lse": 0}, {"alibi": 7, "cu_seqlens_q": 8, "cu_seqlens_k": 9}),
        ({"q": 1, "k": 2, "v": 3, "out": 6, "lse": 0}, {"seed": 2**64 - 1}),
        ({"q": 1, "k": 2, "v": 3, "out": 6, "lse": 7}, {}),
        ({"dout": 1, "q": 2, "k": 3, "v": 4, "out": 5, "lse": 6, "dq": 7, "dk": 8, "dv": 9}, {"seed": 1}),
        ({"q": 10, "k": 2, "v": 3, "out": 6, "lse": 7}, {}),
    ]
    for pointers, others in calls:
        if "dout" in pointers:
            launch.backward(None, **pointers, workspace=10, stream=0, **others)  # type: ignore[arg-type]
            others = {**others, "delta": 7, "dq_accum": 10, "tickets": 10}  # the plan's parts have no bytes
        else:
            launch.forward(None, **pointers, stream=0, **others)  # type: ignore[arg-type]
        wanted = {"alibi_slopes" if name == "alibi" else name: x for name, x in {**pointers, **others}.items()}
        assert driver.pointers[-1] == {**dict.fromkeys(launch.POINTERS, 0), **wanted}


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("job", [replace(STREAM_JOB, deterministic=False)], ids=str)
def test_out_of_memory(job: Job) -> None:
    """CuPy's own error, nothing left behind, and the next call works."""
    pool, inputs = cupy.get_default_memory_pool(), job.inputs()
    pool.free_all_blocks()
    q, k, v, dout = map(to_cupy, (inputs.q, inputs.k, inputs.v, inputs.dout))
    out, lse = anyattn.attention(q, k, v, causal=True, return_lse=True)
    wanted = anyattn.attention_backward(dout, q, k, v, out, lse, causal=True, deterministic=True)
    # The same a hundred times over takes no memory, but its results do.
    many = [cupy.broadcast_to(x[:1], (100, *x.shape[1:])) for x in (dout, q, k, v, out, lse)]
    pool.free_all_blocks()
    before = pool.used_bytes()
    pool.set_limit(size=pool.total_bytes() + 4096)
    try:
        for call in (
            lambda: anyattn.attention(*many[1:4], causal=True),
            lambda: anyattn.attention_backward(*many, causal=True, deterministic=True),
        ):
            with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
                call()
            assert pool.used_bytes() == before
    finally:
        pool.set_limit(size=0)
    again = anyattn.attention_backward(dout, q, k, v, out, lse, causal=True, deterministic=True)
    assert all(cupy.array_equal(x, y) for x, y in zip(again, wanted, strict=True))


@pytest.mark.gpu
def test_host_arrays_that_a_gpu_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of one head beyond the GPU's memory: NumPy's own error, before anything is copied."""
    monkeypatch.setattr(offload, "_free_bytes", lambda: 1 << 20)
    pool, x = cupy.get_default_memory_pool(), np.zeros((5000, 2, 64), np.float32)
    before = pool.used_bytes()
    with pytest.raises(MemoryError, match=r"keys of one head .* 1048576 are free"):
        anyattn.attention(x, x, x, backend="cuda")
    assert pool.used_bytes() == before


def test_grids_beyond_what_a_launch_may_have() -> None:
    """2^31 thread blocks and more are refused, by a plan and not by the driver."""
    from anyattn.problem import Options, View, dense

    x = View(0, (2**25, 128, 64, 1), (128 * 64, 64, 1, 1), "bfloat16", 0)
    with pytest.raises(plan.UnsupportedError, match=r"thread blocks are more than"):
        plan.forward(dense(x, x, x, None, Options()), plan.Device("sm_80", 163 << 10))
