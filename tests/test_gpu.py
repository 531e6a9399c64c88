"""The kernels on a GPU: the shared table of cases, straight through `launch` and through the array libraries, and all
that no table of small cases shows.

Before the first test a pool of processes compiles the kernels of all the selected ones.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import anyattn
from anyattn import compile as compiler
from anyattn import launch, plan, tensormap
from anyattn.compile import Spec
from anyattn.dropout import keep_mask
from anyattn.plan import UnsupportedError
from tests.cases import BY_NAME, CASES, DTYPES, Array, Case, Inputs, Results, check, make, storage
from tests.device import Call, Job, Memory, arrays, cupy, view

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take three quarters of the memory

pytestmark = pytest.mark.gpu

MIXED = [Job(case, list(DTYPES)[i % 4]) for i, case in enumerate(CASES)]


def slow_first(specs: set[Spec]) -> list[Spec]:
    """In the order in which many processes compile them soonest: NVRTC builds float32's for backward longest."""
    return sorted(
        specs, key=lambda spec: ("backward_sm" not in spec.source, ("Element", "float") not in spec.constants)
    )


@pytest.fixture(scope="session", autouse=True)
def kernels(request: pytest.FixtureRequest) -> None:
    """The kernels of every selected test, compiled."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # the workers of pytest -n compile side by side as they are
    jobs = {item.callspec.params.get("job") for item in request.session.items if hasattr(item, "callspec")}
    specs: set[Spec] = set()
    for job in jobs - {None}:
        try:
            specs.update(job.specs())
        except UnsupportedError:
            continue  # the test itself says so
    processes = min(len(specs), os.cpu_count() or 1)
    if processes > 1:
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(processes, spawn) as pool:
            concurrent.futures.wait([pool.submit(compiler.cubin, spec) for spec in slow_first(specs)])


def run(job: Job) -> None:
    """Forward and backward straight through `launch`, against the reference."""
    inputs = job.inputs()
    call = Call(inputs, job.deterministic)
    call.forward()
    call.backward()
    check(job.case, job.dtype, inputs, call.results())


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", [Job(case, dtype) for dtype in DTYPES for case in CASES], ids=str)
def test_launch(job: Job) -> None:
    run(job)


@pytest.mark.parametrize("job", [replace(job, deterministic=True) for job in MIXED[::2]], ids=str)
def test_launch_deterministic(job: Job) -> None:
    run(job)


def _tile_jobs() -> list[Job]:
    """A job for every line of tiles.yaml: blocks that end inside both sequences, a mask, grouped heads."""
    jobs = []
    for kernel, groups in plan._tiles().items():
        for group, tiles in groups.items():
            for index, tile in enumerate(tiles):
                d = tile["head_dim"]
                rows = tile.get("most_rows") or 217 + tile.get("seqlen_q", 0)
                case = Case(f"d{d}", 2, 4, 2, seqlen_q=rows, seqlen_k=345, head_dim=d, head_dim_v=d, window=(200, 7))
                if kernel == "backward_wide_sm90":  # to head dim 192 with dropout or a softcap only
                    case = replace(case, dropout=0.1)
                cases = [case]
                if kernel == "forward_sm80":  # thread blocks share the keys
                    cases.append(replace(case, name=f"many_keys_d{d}", seqlen_k=2345, window=(2200, 7)))
                dtype = "bfloat16" if group == "16-bit" else group
                jobs += [Job(case, dtype, tile=(kernel, group, index)) for case in cases]
    return jobs


@pytest.mark.parametrize("job", _tile_jobs(), ids=str)
def test_every_tile(job: Job) -> None:
    with job.only_tile():
        try:
            run(job)
        except UnsupportedError as error:
            pytest.skip(str(error))  # the tile is for GPUs with more shared memory


def through_api(
    case: Case, inputs: Inputs, to_device: Callable[[Array], Any], to_host: Callable[[Any], Array]
) -> Results:
    """The same call through `anyattn.attention_vjp`; the results have to be on the device that the inputs are on."""
    options = dict(inputs.options)
    if case.varlen:
        options |= {"max_seqlen_q": inputs.max_seqlen_q, "max_seqlen_k": inputs.max_seqlen_k}
        del options["layout"]
    placed = {name: to_device(x) for name, x in arrays(inputs).items()}
    q, k, v, dout = (placed.pop(name) for name in ("q", "k", "v", "dout"))
    (out, lse), pullback = anyattn.attention_vjp(q, k, v, **{**options, **placed}, return_lse=True)
    gradients = pullback(dout)
    for x, like in zip((out, lse, *gradients), (q, q, q, k, v), strict=True):
        assert type(x) is type(like)
        assert x.device == like.device
    return Results(*map(to_host, (out, lse, *gradients)))


def to_cupy(x: Array) -> Any:
    flat, offset, shape, _ = storage(x)
    memory = cupy.asarray(flat.view(np.uint8))
    return cupy.ndarray(shape, x.dtype, memory.data + offset * x.itemsize, strides=x.strides)


def from_cupy(x: Any) -> Array:
    host: Array = x.get()
    return host


@pytest.mark.parametrize("job", MIXED, ids=str)
def test_cupy(job: Job) -> None:
    inputs = job.inputs()
    check(job.case, job.dtype, inputs, through_api(job.case, inputs, to_cupy, from_cupy))


def to_torch(x: Array) -> Any:
    torch = pytest.importorskip("torch")
    flat, offset, shape, strides = storage(x)
    memory = torch.from_numpy(flat.view(np.uint8)).cuda().view(getattr(torch, x.dtype.name))
    return memory.as_strided(shape, strides, offset)


def from_torch(x: Any) -> Array:
    torch = pytest.importorskip("torch")
    if x.dtype == torch.bfloat16:
        return x.cpu().view(torch.int16).numpy().view(DTYPES["bfloat16"])  # type: ignore[no-any-return]
    return x.cpu().numpy()  # type: ignore[no-any-return]


# PyTorch has no negative strides.
@pytest.mark.parametrize("job", [job for job in MIXED if job.case.strides != "negative"], ids=str)
def test_torch_autograd(job: Job) -> None:
    torch = pytest.importorskip("torch")
    case, inputs = job.case, job.inputs()
    options: dict[str, Any] = dict(inputs.options)
    attention: Callable[..., Any] = anyattn.attention
    placed = {name: to_torch(x) for name, x in arrays(inputs).items()}
    q, k, v, dout = (placed.pop(name) for name in ("q", "k", "v", "dout"))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    if case.varlen:
        options |= {"max_seqlen_q": inputs.max_seqlen_q, "max_seqlen_k": inputs.max_seqlen_k}
        del options["layout"]
        attention = anyattn.attention_varlen
    out, lse = attention(q, k, v, **{**options, **placed}, return_lse=True)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    check(case, job.dtype, inputs, Results(*map(from_torch, (out.detach(), lse.detach(), *gradients))))


JAX_JOBS = [job for job in MIXED if job.dtype != "float64" and job.case.strides == "contiguous"]


@pytest.mark.parametrize("job", JAX_JOBS, ids=str)
def test_jax(job: Job) -> None:
    jax = pytest.importorskip("jax")
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        pytest.skip("this JAX has no CUDA support")
    inputs = job.inputs()
    results = through_api(job.case, inputs, lambda x: jax.device_put(np.array(x), device), np.asarray)
    check(job.case, job.dtype, inputs, results)


# --- sizes -----------------------------------------------------------------------------------------------------------


def formulas(inputs: Inputs) -> Results:
    """All heads at once, in float64: for very many small ones ("bshd", no mask)."""
    q, k, v, dout = (x.astype(np.float64).swapaxes(1, 2) for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat(group, axis=1), v.repeat(group, axis=1)
    scale = q.shape[-1] ** -0.5
    weights = np.exp(scale * q @ k.swapaxes(2, 3))
    total = weights.sum(-1, keepdims=True)
    p = weights / total
    dp = dout @ v.swapaxes(2, 3)
    ds = scale * p * (dp - (p * dp).sum(-1, keepdims=True))
    dk, dv = (x.swapaxes(2, 3) @ y for x, y in ((ds, q), (p, dout)))
    dk, dv = (x.reshape(len(x), -1, group, *x.shape[2:]).sum(2) for x in (dk, dv))
    out, dq, dk, dv = (x.swapaxes(1, 2) for x in (p @ v, ds @ k, dk, dv))
    return Results(out, np.log(total[..., 0]), dq, dk, dv)


MANY = [
    Case("many_batches", 70_000, 1, 1, seqlen_q=5, seqlen_k=9, head_dim=8, head_dim_v=8),
    Case("many_heads", 1, 140_000, 70_000, seqlen_q=5, seqlen_k=9, head_dim=8, head_dim_v=8),
]


@pytest.mark.parametrize("job", [Job(case, "float32") for case in MANY], ids=str)
def test_more_than_65535(job: Job) -> None:
    inputs = job.inputs()
    call = Call(inputs)
    call.forward()
    call.backward()
    results, exact = call.results(), formulas(inputs)
    for name in ("out", "lse", "dq", "dk", "dv"):
        np.testing.assert_allclose(getattr(results, name), getattr(exact, name), rtol=1e-4, atol=2e-5, err_msg=name)


def memory_or_skip(gib: int) -> None:
    """Skip where the GPU hasn't that much memory left, after the allocators gave back what they can."""
    cupy.get_default_memory_pool().free_all_blocks()
    free, _ = cupy.cuda.runtime.memGetInfo()
    if free < gib << 30:
        pytest.skip(f"needs {gib} GiB of free GPU memory")


FAR = Job(Case("far", 1, 2, 2, seqlen_q=130, seqlen_k=130, causal=True), "bfloat16")


@pytest.mark.parametrize("job", [FAR], ids=str)
def test_inputs_over_2_to_31_elements_apart(job: Job) -> None:
    memory_or_skip(5)
    row = 16_800_000
    assert 129 * row > 2**31
    memory = Memory(2 * (129 * row + 4 * 128))
    slots = iter(range(4))  # the rows of q, k, v and dout lie side by side

    def upload(x: Array) -> tuple[Memory, Any]:
        start = 128 * next(slots)
        for i, values in enumerate(x[0]):
            memory.write(2 * (i * row + start), values.reshape(-1).view(np.uint8))
        return memory, view(x, 0)._replace(ptr=memory.ptr + 2 * start, strides=(130 * row, row, 64, 1))

    inputs = job.inputs()
    call = Call(inputs, upload=upload)
    call.forward()
    call.backward()
    check(job.case, job.dtype, inputs, call.results())


ONE_ROW = Job(Case("one_row", 1, 16, 16, seqlen_q=1, head_dim=128, head_dim_v=128), "bfloat16")


@pytest.mark.parametrize("job", [ONE_ROW], ids=str)
def test_outputs_of_over_2_to_31_elements(job: Job) -> None:
    """Every row of q and of dout is the same one, so that each row of out and dq is known."""
    memory_or_skip(20)
    one, rows = job.inputs(), 2**20 + 65
    *_, heads, dim = one.q.shape
    shape = (1, rows, heads, dim)
    assert rows * heads * dim > 2**31
    call = Call(replace(one, q=np.broadcast_to(one.q, shape), dout=np.broadcast_to(one.dout, shape)))
    call.forward()
    call.backward()
    call.check()
    size = heads * dim
    for i in (0, 2**20 - 1, 2**20, rows - 1, *np.random.default_rng(1).integers(rows, size=40).tolist()):
        out, dq = (call.read(name, i * size, size).reshape(1, 1, heads, dim) for name in ("out", "dq"))
        lse = np.stack([call.read("lse", head * rows + i, 1) for head in range(heads)])[None]
        check(job.case, job.dtype, one, Results(out, lse, dq))
    exact = formulas(one)
    for name in ("dk", "dv"):  # a million equal terms
        actual, truth = call.read(name).astype(np.float64), rows * np.asarray(getattr(exact, name)).reshape(-1)
        assert np.linalg.norm(actual - truth) < 0.02 * np.linalg.norm(truth), name


# --- streams and threads ---------------------------------------------------------------------------------------------

STREAM_JOB = Job(
    replace(BY_NAME["varlen_uneven"], name="streams", lengths=None, seqlen_q=300, seqlen_k=300), "float16", True
)


def copy_late(stream: Any, to: int, of: int, size: int) -> Any:
    """Copy device memory on a stream that is busy for some milliseconds first; return the memory that keeps it so."""
    half, device_to_device = 1 << 30, 3
    ballast = cupy.empty(2 * half, np.uint8)
    for _ in range(8):
        cupy.cuda.runtime.memcpyAsync(ballast.data.ptr, ballast.data.ptr + half, half, device_to_device, stream.ptr)
    cupy.cuda.runtime.memcpyAsync(to, of, size, device_to_device, stream.ptr)
    return ballast


def assert_same(a: Results, b: Results) -> None:
    """Bit for bit, with no NaN."""
    for name in ("out", "lse", "dq", "dk", "dv"):
        x, y = getattr(a, name), getattr(b, name)
        assert not np.isnan(x).any(), name
        assert np.array_equal(x, y), name


@pytest.mark.parametrize("job", [STREAM_JOB], ids=str)
def test_launch_uses_the_given_stream(job: Job) -> None:
    call = Call(job.inputs(), deterministic=True)
    call.forward()
    call.backward()
    results = call.results()
    q = call.inputs["q"]
    staged = Memory(q.size, q.content)
    for memory in (q, *call.outputs.values()):
        memory.poison()
    cupy.cuda.runtime.deviceSynchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    ballast = copy_late(stream, q.ptr, staged.ptr, q.size)
    call.forward(stream.ptr)
    call.backward(stream.ptr)
    assert_same(call.results(), results)
    del ballast


@pytest.mark.parametrize("library", ["cupy", "torch"])
@pytest.mark.parametrize("job", [STREAM_JOB], ids=str)
def test_api_uses_the_current_stream(job: Job, library: str) -> None:
    inputs, stream = job.inputs(), cupy.cuda.Stream(non_blocking=True)
    q, k, v, dout = map(to_cupy, (inputs.q, inputs.k, inputs.v, inputs.dout))
    staged = q.copy()
    current, to_host = stream, from_cupy
    arguments = [q, k, v, dout]
    if library == "torch":
        torch = pytest.importorskip("torch")
        current, to_host = torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)), from_torch
        arguments = [torch.from_dlpack(x) for x in arguments]
    cupy.cuda.runtime.deviceSynchronize()

    def attention() -> Results:
        q, k, v, dout = arguments
        with current:
            (out, lse), pullback = anyattn.attention_vjp(q, k, v, causal=True, deterministic=True, return_lse=True)
            gradients = pullback(dout)
        cupy.cuda.runtime.deviceSynchronize()
        return Results(*map(to_host, (out, lse, *gradients)))

    on_time = attention()
    q.data.memset(0xFF, q.nbytes)
    cupy.cuda.runtime.deviceSynchronize()
    ballast = copy_late(stream, q.data.ptr, staged.data.ptr, q.nbytes)
    assert_same(attention(), on_time)
    del ballast


@pytest.mark.parametrize("job", [STREAM_JOB], ids=str)
def test_threads_on_streams_of_their_own(job: Job) -> None:
    inputs = [make(job.case, job.dtype, np.random.default_rng(seed)) for seed in range(2)]
    options = {"causal": True, "deterministic": True, "return_lse": True}
    start = threading.Barrier(2)

    def once(q: Any, k: Any, v: Any, dout: Any) -> Results:
        (out, lse), pullback = anyattn.attention_vjp(q, k, v, **options)
        return Results(*map(from_cupy, (out, lse, *pullback(dout))))

    alone = [once(*map(to_cupy, (x.q, x.k, x.v, x.dout))) for x in inputs]

    def thread(i: int) -> None:
        x = inputs[i]
        with cupy.cuda.Device(0), cupy.cuda.Stream(non_blocking=True):
            placed = [to_cupy(a) for a in (x.q, x.k, x.v, x.dout)]
            start.wait()
            for _ in range(50):
                assert_same(once(*placed), alone[i])

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(thread, i) for i in range(2)]:
            done.result()


@pytest.mark.parametrize("job", [STREAM_JOB], ids=str)
def test_thread_that_never_used_the_gpu(job: Job) -> None:
    call = Call(job.inputs(), deterministic=True)
    call.forward()
    call.backward()
    results = call.results()
    for memory in call.outputs.values():
        memory.poison()
    cupy.cuda.runtime.deviceSynchronize()
    launch.forget_plans()
    tensormap.encode.cache_clear()
    for launches in (call.forward, call.backward):
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(launches).result()
    assert_same(call.results(), results)


# --- determinism and dropout -----------------------------------------------------------------------------------------


REPEATS = [
    Job(Case(f"d{d}", 2, 8, 4, seqlen_q=700, seqlen_k=700, head_dim=d, head_dim_v=d, causal=True), dtype, True)
    for d in (32, 64, 96, 128, 192, 256)
    for dtype in (DTYPES if d in (64, 128) else ("bfloat16",))
]


@pytest.mark.parametrize("job", REPEATS, ids=str)
def test_repeats_bit_for_bit(job: Job) -> None:
    """$REPEATS times, or a hundred, with whatever a call may write poisoned before it."""
    call = Call(job.inputs(), deterministic=True)
    call.forward()
    call.backward()
    first = call.results()
    for _ in range(int(os.environ.get("REPEATS", "100"))):
        for memory in call.outputs.values():
            memory.poison()
        call.forward()
        call.backward()
        assert_same(call.results(), first)


DROPOUT = Case("mask", 2, 3, 3, seqlen_q=256, seqlen_k=500, head_dim_v=256, dropout=0.3, scale=1e-3)


@pytest.mark.parametrize("job", [Job(DROPOUT, dtype) for dtype in DTYPES], ids=str)
def test_dropout_mask(job: Job) -> None:
    """With nearly equal weights, v = 1 shows the mask in out, and dout = 1 shows the backward pass's own in dv."""
    inputs = job.inputs()
    seed, masks = inputs.options["seed"], np.empty((2, 3, 256, 500), np.bool_)
    for b, h in np.ndindex(2, 3):
        masks[b, h] = keep_mask(seed, DROPOUT.dropout, b, h, range(256), range(500))
    identity = np.eye(500, dtype=inputs.v.dtype)
    dout = np.broadcast_to(np.eye(256, dtype=inputs.v.dtype)[:, None], inputs.dout.shape)
    for columns in (slice(0, 256), slice(244, 500)):
        v = np.ascontiguousarray(np.broadcast_to(identity[:, None, columns], inputs.v.shape))
        call = Call(replace(inputs, v=v, dout=np.ascontiguousarray(dout)))
        call.forward()
        call.backward()
        results = call.results()
        assert np.array_equal(results.out.swapaxes(1, 2) != 0, masks[..., columns])
        assert results.dv is not None
        assert np.array_equal(results.dv.transpose(0, 2, 3, 1) != 0, masks)


# --- bad lengths, bad neighbours -------------------------------------------------------------------------------------

WRONG_OFFSETS = [
    [0, 40, 20, 64],
    [0, 1_000_000_000, 40, 64],
    [-7, 20, 40, 64],
    [0, 20, 40, 1000],
    [5, 20, 40, 64],
    [64, 40, 20, 0],
    [-(2**31), 2**31 - 1, -(2**31), 2**31 - 1],
    [2**31 - 1] * 4,
]
VARLEN = Case("offsets", heads=2, heads_kv=1, lengths=((20, 20), (20, 20), (24, 24)))


MANY_KEYS = replace(VARLEN, name="offsets_of_many_keys", lengths=((20, 1100), (20, 1100), (24, 1300)))
OFFSETS = [
    (Job(case, "float16", deterministic), kernels)
    for deterministic in (False, True)
    for case, kernels in ((VARLEN, "sm80"), (VARLEN, "sm90"), (MANY_KEYS, "sm80"), (MANY_KEYS, "sm90"))
]


def hold_to(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take this family of kernels, if it is for this GPU."""
    if kernels == "sm90" and launch.device(0).arch != "sm_90a":
        pytest.skip("these kernels are for Hopper")
    monkeypatch.setenv("ANYATTN_KERNEL", kernels)


@pytest.mark.usefixtures("fresh_plans")
@pytest.mark.parametrize("which", ["cu_seqlens_q", "cu_seqlens_k", "both"])
@pytest.mark.parametrize("offsets", WRONG_OFFSETS, ids=str)
@pytest.mark.parametrize(("job", "kernels"), OFFSETS, ids=str)
def test_wrong_offsets_stay_in_bounds(
    job: Job, kernels: str, offsets: list[int], which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold_to(kernels, monkeypatch)
    inputs, wrong = job.inputs(), np.array(offsets, np.int32)
    if which != "cu_seqlens_k":
        inputs = replace(inputs, cu_seqlens_q=wrong)
    if which != "cu_seqlens_q":
        inputs = replace(inputs, cu_seqlens_k=wrong)
    call = Call(inputs, job.deterministic)
    call.forward()
    call.backward()
    call.check()


def among_nans(x: Array) -> Array:
    """(batch, rows, heads, dim) with 70 rows of NaN before and after each sequence's own."""
    buffer = np.full((x.shape[0], x.shape[1] + 140, *x.shape[2:]), np.nan, x.dtype)
    buffer[:, 70:-70] = x
    return buffer[:, 70:-70]


PADDED = Case("padded", 2, 4, 2, seqlen_q=90, seqlen_k=75, head_dim=128, head_dim_v=128)


@pytest.mark.parametrize("job", [Job(PADDED, dtype) for dtype in DTYPES], ids=str)
def test_nan_beyond_the_sequence(job: Job) -> None:
    inputs = job.inputs()
    padded: dict[str, Any] = {name: among_nans(getattr(inputs, name)) for name in ("q", "k", "v", "dout")}
    call = Call(replace(inputs, **padded))
    call.forward()
    call.backward()
    check(job.case, job.dtype, inputs, call.results())


@pytest.mark.usefixtures("fresh_plans")
@pytest.mark.parametrize(
    ("job", "kernels"),
    [
        (Job(VARLEN, dtype, deterministic=True), kernels)
        for dtype in DTYPES
        for kernels in (("sm80", "sm90") if DTYPES[dtype].itemsize == 2 else ("sm80",))
    ],
    ids=str,
)
def test_nan_in_the_neighbouring_sequence(job: Job, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hold_to(kernels, monkeypatch)

    def results(inputs: Inputs) -> Results:
        call = Call(inputs, deterministic=True)
        call.forward()
        call.backward()
        return call.results()

    inputs = job.inputs()
    clean = results(inputs)
    spoilt: dict[str, Any] = {name: getattr(inputs, name).copy() for name in ("q", "k", "v", "dout")}
    for x in spoilt.values():
        x[20:40] = np.nan
    others = np.r_[0:20, 40:64]

    def without_the_middle(x: Results) -> Results:
        lse: npt.NDArray[Any] = x.lse[:, others]
        return Results(x.out[others], lse, *(g[others] for g in (x.dq, x.dk, x.dv) if g is not None))

    assert_same(without_the_middle(results(replace(inputs, **spoilt))), without_the_middle(clean))
