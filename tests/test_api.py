"""The public functions through each adapter that a machine without a GPU can run, and what is the same for all.

The CuPy adapter runs here too: on CuPy arrays whose memory is the host's, with kernels that follow the same pointers
and strides on the CPU.
"""

from __future__ import annotations

import functools
import math
import subprocess
import sys
import types
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anyattn.backends import dlpack

import anyattn
from anyattn import compile as compiler
from anyattn import cpu, host, launch, reference
from anyattn.problem import BackwardProblem, Options, Problem, View, dense
from tests.cases import BY_NAME, CASES, DTYPES, Array, Case, Inputs, Results, check, make, storage

# Layouts, strides and options; single head dims and lengths are for those who compute.
JOBS = [
    (case, list(DTYPES)[i % 4]) for i, case in enumerate(CASES) if not case.name.startswith(("dim", "length", "v_"))
]  # fmt: skip


def inputs_of(case: Case, dtype: str) -> Inputs:
    return make(case, dtype, np.random.default_rng(zlib.crc32(case.name.encode())))


def call(case: Case, inputs: Inputs, to: Callable[[Array], Any], back: Callable[[Any], Array], **more: Any) -> Results:
    """The case through attention or attention_varlen, and attention_backward."""
    options = {name: to(x) if isinstance(x, np.ndarray) else x for name, x in inputs.options.items()}
    q, k, v, dout = (to(x) for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    if case.varlen:
        assert inputs.cu_seqlens_q is not None
        assert inputs.cu_seqlens_k is not None
        options |= {"cu_seqlens_q": to(inputs.cu_seqlens_q), "cu_seqlens_k": to(inputs.cu_seqlens_k)}
        options |= {"max_seqlen_q": inputs.max_seqlen_q, "max_seqlen_k": inputs.max_seqlen_k}
    forward = anyattn.attention_varlen if case.varlen else anyattn.attention
    out, lse = forward(q, k, v, **options, **more, return_lse=True)
    gradients = anyattn.attention_backward(dout, q, k, v, out, lse, **options, **more)
    for x, like in zip((out, lse, *gradients), (q, q, q, k, v), strict=True):
        assert type(x) is type(like)
    return Results(*(back(x) for x in (out, lse, *gradients)))


def same(x: Any) -> Any:
    return x


# --- NumPy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "dtype"), JOBS, ids=lambda x: x if isinstance(x, str) else x.name)
def test_numpy(case: Case, dtype: str) -> None:
    inputs = inputs_of(case, dtype)
    results = call(case, inputs, same, same, backend="cpu")
    check(case, dtype, inputs, results)
    for x, like in zip((results.out, results.dq, results.dk, results.dv), "qqkv", strict=True):
        assert x is not None
        assert x.dtype == getattr(inputs, like).dtype
        assert x.flags.c_contiguous


def arrays(*shapes: tuple[int, ...], dtype: Any = np.float32) -> list[Array]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def test_numpy_subclasses_and_read_only_arrays(tmp_path: Path) -> None:
    (x,) = arrays((4, 2, 8))
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=x.shape)
    mapped[...] = x
    x.flags.writeable = False
    assert type(anyattn.attention(mapped, x, x)) is np.ndarray
    np.testing.assert_array_equal(anyattn.attention(mapped, mapped, mapped), anyattn.attention(x, x, x))


def test_window_may_be_a_list() -> None:
    q, k, v = arrays((9, 2, 8), (9, 2, 8), (9, 2, 8))
    np.testing.assert_array_equal(
        anyattn.attention(q, k, v, window=[2, None]), anyattn.attention(q, k, v, window=(2, -1))
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "dtype"), JOBS[::5], ids=lambda x: x if isinstance(x, str) else x.name)
def test_numpy_over_a_gpu(case: Case, dtype: str) -> None:
    inputs = inputs_of(case, dtype)
    check(case, dtype, inputs, call(case, inputs, same, same, backend="cuda"))


@pytest.mark.parametrize(
    ("shape", "backend", "gpu", "expected"),
    [
        ((1, 64, 4, 64), "auto", None, False),  # too small to repay the copies
        ((4, 8192, 16, 64), "auto", None, True),
        ((4, 8192, 16, 64), "auto", "no GPU", False),
        ((4, 8192, 16, 64), "cpu", None, False),
        ((1, 64, 4, 64), "cuda", None, True),
    ],
)
def test_where_host_arrays_go(
    shape: tuple[int, ...], backend: str, gpu: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "available", lambda *_: gpu)
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(4))
    x = View(0, shape, strides, "float32", -1)
    assert host._on_gpu(dense(x, x, x, None, Options()), backend, 1.0) is expected


def test_host_arrays_where_no_kernel_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """They stay on the CPU, unless they are to go to the GPU: there may be kernels in the cache."""
    monkeypatch.setattr(launch, "available", lambda *_: None)
    monkeypatch.setattr(compiler, "missing", lambda: "cuda.core is missing")
    large = (4, 8192, 16, 64)
    x = View(0, large, tuple(math.prod(large[axis + 1 :]) for axis in range(4)), "float32", -1)
    problem = dense(x, x, x, None, Options())
    assert host.route(problem, "auto", 1.0) == (False, "there is enough work for a GPU, but cuda.core is missing")
    assert host.route(problem, "cuda", 1.0) == (True, "backend='cuda'")


# --- JAX -------------------------------------------------------------------------------------------------------------

JAX_JOBS = [job for job in JOBS if job[1] != "float64" and job[0].strides == "contiguous"]


@pytest.mark.parametrize(("case", "dtype"), JAX_JOBS, ids=lambda x: x if isinstance(x, str) else x.name)
def test_jax(case: Case, dtype: str) -> None:
    jax = pytest.importorskip("jax")
    device = jax.devices("cpu")[0]
    inputs = inputs_of(case, dtype)
    results = call(case, inputs, lambda x: jax.device_put(x, device), np.asarray, backend="cpu")
    check(case, dtype, inputs, results)


def test_jax_results_are_where_the_inputs_are() -> None:
    jax = pytest.importorskip("jax")
    device = jax.devices("cpu")[-1]
    q = jax.device_put(np.ones((4, 2, 8), np.float32), device)
    assert anyattn.attention(q, q, q).devices() == {device}


def test_jax_float64_that_would_become_float32() -> None:
    pytest.importorskip("jax")
    run_python(
        "import jax, jax.numpy as jnp, anyattn\n"
        "jax.config.update('jax_enable_x64', True)\n"
        "x = jnp.ones((4, 2, 8), jnp.float64)\n"
        "assert anyattn.attention(x, x, x, backend='cpu').dtype == jnp.float64\n"
        "jax.config.update('jax_enable_x64', False)\n"
        "try:\n"
        "    anyattn.attention(x, x, x)\n"
        "except TypeError as error:\n"
        "    assert str(error) == 'q is float64, of which JAX makes float32 unless jax_enable_x64 is set'\n"
        "else:\n"
        "    raise AssertionError('not refused')"
    )


def test_jax_without_an_array() -> None:
    jax = pytest.importorskip("jax")
    x = jax.device_put(np.ones((4, 2, 8), np.float32), jax.devices("cpu")[0])
    for function, arguments, name in (
        (anyattn.attention, (x, None, x), "k"),
        (anyattn.attention_varlen, (x, x, x, None, None, 4, 4), "cu_seqlens_q"),
        (anyattn.attention_backward, (None, x, x, x, x, x), "dout"),
        (anyattn.attention_backward, (x, x, x, x, x, None), "lse"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be a jax.Array, as q is, got builtins.NoneType"):
            function(*arguments)


# --- anything else ---------------------------------------------------------------------------------------------------


class Wrapped:
    """An array of a library of which only the protocol is known."""

    __module__ = "unheard_of.core"

    def __init__(self, x: Any) -> None:
        self.x = x


class ByDlpack(Wrapped):
    __module__ = "unheard_of.core"

    def __dlpack__(self, **arguments: Any) -> Any:
        return self.x.__dlpack__(**arguments)

    def __dlpack_device__(self) -> Any:
        return self.x.__dlpack_device__()


class ByInterface(Wrapped):
    __module__ = "unheard_of.core"

    @property
    def __array_interface__(self) -> Any:
        return self.x.__array_interface__


class ByCudaInterface(Wrapped):
    __module__ = "unheard_of.core"

    @property
    def __cuda_array_interface__(self) -> Any:
        return self.x.__cuda_array_interface__


class Elsewhere:
    """Says that it lives on some device; nobody may ask for more."""

    __module__ = "unheard_of.core"

    def __init__(self, device: tuple[int, int]) -> None:
        self.device = device

    def __dlpack__(self, **_: Any) -> Any:
        raise AssertionError("never asked for")

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


@pytest.fixture(params=["from_dlpack", "dlpack.from_dlpack"])
def unheard_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library itself; whatever it wraps comes back as the class that q has."""
    library = types.ModuleType("unheard_of")
    holder: Any = library
    if "." in request.param:
        holder = library.dlpack = types.ModuleType("unheard_of.dlpack")  # type: ignore[attr-defined]
    holder.from_dlpack = ByDlpack  # np.from_dlpack's arrays are read-only, which NumPy before 2.1 does not export
    monkeypatch.setitem(sys.modules, "unheard_of", library)


@pytest.mark.usefixtures("unheard_of")
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.strides != "broadcast"][::4], ids=lambda case: case.name
)
def test_dlpack(case: Case) -> None:
    inputs = inputs_of(case, "float32")
    check(case, "float32", inputs, call(case, inputs, ByDlpack, lambda x: x.x, backend="cpu"))


@pytest.mark.usefixtures("unheard_of")
def test_array_interface_comes_back_through_dlpack() -> None:
    q, k, v = arrays((9, 4, 16), (7, 2, 16), (7, 2, 8))
    out = anyattn.attention(ByInterface(q), ByInterface(k), ByDlpack(v))
    np.testing.assert_array_equal(out.x, anyattn.attention(q, k, v))


def test_array_interface_without_a_way_back() -> None:
    q = ByInterface(*arrays((9, 4, 16)))
    with pytest.raises(TypeError, match=r"q must come from a library with from_dlpack, .*; unheard_of has none"):
        anyattn.attention(q, q, q)


@pytest.mark.usefixtures("unheard_of")
def test_dlpack_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    here = ByDlpack(*arrays((9, 4, 16)))
    with pytest.raises(ValueError, match=r"k must be on q's device, host memory, got cuda:3"):
        anyattn.attention(here, Elsewhere((2, 3)), here)
    with pytest.raises(ValueError, match=r"v must be on q's device, cuda:3, got cuda:1"):
        anyattn.attention(Elsewhere((2, 3)), Elsewhere((13, 3)), Elsewhere((2, 1)))
    with pytest.raises(TypeError, match=r"q must be in host or CUDA memory, got DLPack device type 8"):
        anyattn.attention(Elsewhere((8, 0)), here, here)
    with pytest.raises(TypeError, match=r"v must be of q's library, as q is a unheard_of.ByDlpack, got numpy.ndarray"):
        anyattn.attention(here, here, here.x)
    monkeypatch.setattr(launch, "available", lambda *_: "no NVIDIA GPU is usable here")
    with pytest.raises(anyattn.UnsupportedError, match=r"q is on cuda:0: no NVIDIA GPU is usable here"):
        anyattn.attention(*[Elsewhere((2, 0))] * 3)


@pytest.mark.usefixtures("unheard_of")
def test_dlpack_of_a_dtype_that_numpy_lacks() -> None:
    torch = pytest.importorskip("torch")
    x = ByDlpack(torch.ones(4, 2, 8, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"q must be float16, .*or on a GPU: NumPy's DLPack has no bfloat16"):
        anyattn.attention(x, x, x)


@pytest.mark.usefixtures("unheard_of")
def test_dlpack_that_does_not_say_where() -> None:
    class Nowhere(Wrapped):
        __module__ = "unheard_of.core"

        def __dlpack__(self, **arguments: Any) -> Any:
            return self.x.__dlpack__(**arguments)

    x = Nowhere(np.ones((4, 2, 8), np.float32))
    with pytest.raises(TypeError, match=r"q must have __dlpack_device__ beside __dlpack__, got a unheard_of.Nowhere"):
        anyattn.attention(x, x, x)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A CuPy with two GPUs, of which the first is too old, and an adapter that computes nothing."""
    seen = types.SimpleNamespace(current=0, exported=[], capturing=False, events=[])

    class Device:
        def __init__(self, ordinal: int) -> None:
            self.ordinal = ordinal

        def __enter__(self) -> None:
            self.before, seen.current = seen.current, self.ordinal

        def __exit__(self, *_: Any) -> None:
            seen.current = self.before

    class Event:
        over = False

        @property
        def done(self) -> bool:
            assert not seen.capturing  # an error of CUDA's, which ends the capture
            return self.over

    def record() -> Any:
        assert not seen.capturing
        seen.events.append(Event())
        return seen.events[-1]

    stream = types.SimpleNamespace(ptr=0, record=record, is_capturing=lambda: seen.capturing)
    properties = [{"major": 7, "minor": 5}, {"major": 9, "minor": 0}]
    properties[1] |= {"sharedMemPerBlockOptin": 227 << 10, "multiProcessorCount": 132}
    runtime = types.SimpleNamespace(
        getDevice=lambda: seen.current, getDeviceCount=lambda: 2, driverGetVersion=lambda: 13000,
        getDeviceProperties=lambda ordinal: properties[ordinal],
    )  # fmt: skip
    cuda = types.SimpleNamespace(Device=Device, get_current_stream=lambda: stream, runtime=runtime)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda))  # type: ignore[misc]
    adapter = types.SimpleNamespace(attention=lambda **_: "result")
    monkeypatch.setitem(sys.modules, "anyattn.backends.cupy", adapter)  # type: ignore[misc]
    monkeypatch.setattr(launch, "_cuda", lambda: cuda)
    monkeypatch.setattr(launch.compiler, "driver_problem", lambda version: None)
    monkeypatch.setattr(dlpack, "_gpu_view", lambda name, x, stream: x)
    monkeypatch.setattr(dlpack, "_in_flight", deque())
    library = types.ModuleType("unheard_of")
    library.from_dlpack = lambda x: seen.exported.append((x, seen.current))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "unheard_of", library)
    caches: tuple[Any, ...] = (launch._no_gpu, launch.device)
    for cache in caches:
        cache.cache_clear()
        monkeypatch.setattr(launch, cache.__name__, functools.cache(cache.__wrapped__))
    return seen


def test_dlpack_on_a_gpu_that_is_not_the_current_one(two_gpus: types.SimpleNamespace) -> None:
    """Whoever imports the results waits for the stream that is current then."""
    x = Elsewhere((2, 1))
    anyattn.attention(x, x, x)
    assert two_gpus.exported == [("result", 1)]
    assert two_gpus.current == 0


def test_each_gpu_is_judged_by_itself(two_gpus: types.SimpleNamespace) -> None:
    x = Elsewhere((2, 0))
    with pytest.raises(anyattn.UnsupportedError, match=r"q is on cuda:0: GPU 0 has compute capability 7.5"):
        anyattn.attention(x, x, x)
    assert "GPU 0 has compute capability 7.5" in str(launch.available())
    two_gpus.current = 1
    assert launch.available() is None


def test_dlpack_keeps_arrays_until_the_gpu_has_read_them(two_gpus: types.SimpleNamespace) -> None:
    x = Elsewhere((2, 1))
    for _ in range(3):
        anyattn.attention(x, x, x)
    assert len(dlpack._in_flight) == 3
    for event in two_gpus.events:
        event.over = True
    anyattn.attention(x, x, x)
    assert len(dlpack._in_flight) == 1
    two_gpus.capturing = True  # a captured event is never done: nobody may wait for one
    anyattn.attention(x, x, x)
    assert len(dlpack._in_flight) == 1


def test_strides_that_cupy_exports() -> None:
    divided_as_unsigned = (2**64 - 512) // 4
    assert dlpack.byte_strides((128, 1, 0, -128, divided_as_unsigned), 4) == (512, 4, 0, -512, -512)


# Some of all, and each with strides that CuPy exports wrong.
GPU_JOBS = [job for i, job in enumerate(JOBS) if i % 5 == 1 or job[0].strides == "negative"]


@pytest.mark.gpu
@pytest.mark.usefixtures("unheard_of")
@pytest.mark.parametrize(("case", "dtype"), GPU_JOBS, ids=lambda x: x if isinstance(x, str) else x.name)
def test_dlpack_on_a_gpu(case: Case, dtype: str) -> None:
    inputs = inputs_of(case, dtype)
    check(case, dtype, inputs, call(case, inputs, lambda x: ByDlpack(to_cupy(x)), lambda x: x.x.get()))


@pytest.mark.gpu
@pytest.mark.usefixtures("unheard_of")
def test_cuda_array_interface_on_a_gpu() -> None:
    q, k, v = arrays((9, 4, 16), (7, 2, 16), (7, 2, 8))
    out = anyattn.attention(*(ByCudaInterface(to_cupy(x)) for x in (q, k, v)))
    np.testing.assert_allclose(out.x.get(), anyattn.attention(q, k, v, backend="cpu"), atol=1e-5)


# --- CuPy, on the host's memory --------------------------------------------------------------------------------------


def to_cupy(x: Array) -> Any:
    """A copy with x's strides; in GPU memory, or in the host's under the fixture below."""
    cupy = pytest.importorskip("cupy", reason="CuPy, the GPU array library, is not installed")
    flat, offset, shape, _ = storage(x)
    memory = cupy.ndarray(max(flat.nbytes, 1), np.uint8)
    if isinstance(memory.data.mem, cupy.cuda.Memory | cupy.cuda.memory.PooledMemory):
        memory[: flat.nbytes] = cupy.asarray(flat.view(np.uint8))
    else:
        memory.data.mem.bytes[: flat.nbytes] = flat.view(np.uint8)
    return cupy.ndarray(shape, x.dtype, memory.data + offset * x.itemsize, x.strides)


def from_cupy(x: Any) -> Array:
    dtype = {"bfloat16": "u2"}.get(x.dtype.name, x.dtype.name)
    strides = tuple(step // x.itemsize for step in x.strides)
    return pointed_at(x.data.ptr, x.shape, strides, dtype).copy().view(x.dtype)


def pointed_at(ptr: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str) -> Array:
    """The array at an address in host memory."""
    kind = np.dtype({"bfloat16": "uint16"}.get(dtype, dtype))
    if math.prod(shape) == 0:
        return np.empty(shape, kind)
    steps = tuple(step * kind.itemsize for step in strides)
    interface = {"data": (ptr, False), "shape": shape, "strides": steps, "typestr": kind.str, "version": 3}
    return np.asarray(types.SimpleNamespace(__array_interface__=interface))


STREAM = 4321


class HostKernels:
    """`launch` for addresses in host memory: it knows nothing but the problem and the pointers, as the kernels do."""

    def __init__(self) -> None:
        self.calls = 0

    def forward(
        self, problem: Problem, q: int, k: int, v: int, out: int, lse: int, stream: int,
        *, alibi: int = 0, cu_seqlens_q: int = 0, cu_seqlens_k: int = 0, seed: int = 0, workspace: int = 0,
    ) -> None:  # fmt: skip
        assert stream == STREAM
        self.calls += 1
        rest = self.rest(problem, alibi, cu_seqlens_q, cu_seqlens_k)
        if size := launch.workspace_bytes(problem):
            assert workspace
            pointed_at(workspace, (size,), (1,), "uint8")[:] = 255
        cpu.forward(problem, *self.inputs(problem, q, k, v), self.rows(problem, out, problem.out_strides, "out"),
                    self.lse(problem, lse, problem.lse_strides), **rest, seed=seed)  # fmt: skip

    def backward(
        self, bp: BackwardProblem, dout: int, q: int, k: int, v: int, out: int, lse: int, dq: int, dk: int, dv: int,
        workspace: int, stream: int,
        *, alibi: int = 0, cu_seqlens_q: int = 0, cu_seqlens_k: int = 0, seed: int = 0,
    ) -> None:  # fmt: skip
        assert stream == STREAM
        self.calls += 1
        problem = bp.problem
        given = [self.rows(problem, dout, bp.dout_strides, "out"), *self.inputs(problem, q, k, v)]
        given += [self.rows(problem, out, bp.out_strides, "out"), self.lse(problem, lse, bp.lse_strides)]
        wanted = [self.rows(problem, dq, bp.dq_strides, "q"), self.rows(problem, dk, bp.dk_strides, "k")]
        wanted += [self.rows(problem, dv, bp.dv_strides, "v")]
        pointed_at(workspace, (self.workspace_bytes(bp),), (1,), "uint8")[:] = 255
        cpu.backward(bp, *given, *wanted, **self.rest(problem, alibi, cu_seqlens_q, cu_seqlens_k), seed=seed)

    def workspace_bytes(self, call: Problem | BackwardProblem) -> int:
        return 1000

    def inputs(self, problem: Problem, q: int, k: int, v: int) -> list[Array]:
        strides = zip((q, k, v), (problem.q_strides, problem.k_strides, problem.v_strides), "qkv", strict=True)
        return [self.rows(problem, ptr, steps, which) for ptr, steps, which in strides]

    def rows(self, problem: Problem, ptr: int, strides: tuple[int, ...], which: str) -> Array:
        keys = which in "kv"
        heads = problem.heads_kv if keys else problem.heads
        total, seqlen = (
            (problem.total_k, problem.seqlen_k) if keys else (problem.total_q, problem.seqlen_q)
        )  # fmt: skip
        columns = problem.head_dim if which in "qk" else problem.head_dim_v
        if problem.varlen:
            return pointed_at(ptr, (heads, total, columns), strides[1:], problem.dtype)
        return pointed_at(ptr, (problem.batch, heads, seqlen, columns), strides, problem.dtype)

    def lse(self, problem: Problem, ptr: int, strides: tuple[int, ...]) -> Array:
        shape: tuple[int, ...] = (problem.batch, problem.heads, problem.seqlen_q)
        if problem.varlen:
            shape, strides = (problem.heads, problem.total_q), strides[1:]
        if ptr == 0:  # nobody wants it
            return np.empty(shape, problem.lse_dtype)
        return pointed_at(ptr, shape, strides, problem.lse_dtype)

    def rest(self, problem: Problem, alibi: int, cu_seqlens_q: int, cu_seqlens_k: int) -> dict[str, Any]:
        given: dict[str, Any] = {}
        if problem.alibi:
            given["alibi"] = pointed_at(alibi, (problem.batch, problem.heads), problem.alibi_strides, "float32")
        if problem.varlen:
            given["cu_seqlens_q"] = pointed_at(cu_seqlens_q, (problem.batch + 1,), (1,), "int32")
            given["cu_seqlens_k"] = pointed_at(cu_seqlens_k, (problem.batch + 1,), (1,), "int32")
        return given


@pytest.fixture
def host_cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """CuPy arrays in host memory (full of NaN at first), on a device and a stream that don't exist."""
    cupy = pytest.importorskip("cupy", reason="CuPy, the GPU array library, is not installed")
    from importlib import import_module

    class HostMemory(cupy.cuda.memory.BaseMemory):  # type: ignore[misc]
        device = 0

        def __init__(self, size: int) -> None:
            self.bytes = np.full(size + 256, 255, np.uint8)
            skipped = -self.bytes.ctypes.data % 256
            self.bytes = self.bytes[skipped : skipped + size]
            self.ptr, self.size, self.device_id = self.bytes.ctypes.data, size, HostMemory.device

    class Device:
        current = 0

        def __init__(self, ordinal: int) -> None:
            self.ordinal = ordinal

        def __enter__(self) -> None:
            self.before, Device.current = Device.current, self.ordinal

        def __exit__(self, *_: Any) -> None:
            Device.current = self.before

    adapter = import_module("anyattn.backends.cupy")
    kernels = HostKernels()
    for name in ("forward", "backward", "workspace_bytes"):
        monkeypatch.setattr(launch, name, getattr(kernels, name))
    monkeypatch.setattr(adapter, "Device", Device)
    monkeypatch.setattr(adapter, "getDevice", lambda: Device.current)

    class Stream:
        capturing = False

        def __init__(self, device: int) -> None:
            self.ptr = STREAM if device == Device.current else None

        def is_capturing(self) -> bool:
            return self.capturing

    monkeypatch.setattr(adapter, "get_current_stream", Stream)
    before = cupy.cuda.get_allocator()
    cupy.cuda.set_allocator(lambda size: cupy.cuda.MemoryPointer(HostMemory(size), 0))
    yield types.SimpleNamespace(kernels=kernels, memory=HostMemory, device=Device, stream=Stream, adapter=adapter)
    cupy.cuda.set_allocator(before)


@pytest.mark.parametrize(("case", "dtype"), JOBS, ids=lambda x: x if isinstance(x, str) else x.name)
def test_cupy(case: Case, dtype: str, host_cupy: Any) -> None:
    inputs = inputs_of(case, dtype)
    check(case, dtype, inputs, call(case, inputs, to_cupy, from_cupy))
    assert host_cupy.kernels.calls == 2


def test_cupy_without_lse(host_cupy: Any) -> None:
    q, k, v = arrays((9, 4, 16), (7, 2, 16), (7, 2, 8))
    out = anyattn.attention(*map(to_cupy, (q, k, v)))
    np.testing.assert_array_equal(from_cupy(out), anyattn.attention(q, k, v))


def test_cupy_looks_a_repeated_call_up(host_cupy: Any) -> None:
    q, k, v = map(to_cupy, arrays((9, 4, 16), (7, 2, 16), (7, 2, 8)))
    anyattn.attention(q, k, v, causal=True)
    before = host_cupy.adapter._cached_dense.cache_info()
    anyattn.attention(q, k, v, causal=True)
    after = host_cupy.adapter._cached_dense.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)


def test_cupy_tells_strides_apart(host_cupy: Any) -> None:
    """Of the same shape, contiguous or not in one way or another."""
    x = arrays((6, 6, 6))[0]
    turned = [x, x.transpose(1, 0, 2), x.transpose(2, 1, 0), x[::-1], np.broadcast_to(x[:1], x.shape)]
    for q in turned:
        for k in turned:
            out = anyattn.attention(to_cupy(q), to_cupy(k), to_cupy(x))
            np.testing.assert_array_equal(from_cupy(out), anyattn.attention(q, k, x))


def test_cupy_computes_on_the_arrays_device(host_cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = host_cupy.kernels.forward
    monkeypatch.setattr(
        launch,
        "forward",
        lambda p, *rest, **more: (seen.append((p.device, host_cupy.device.current)), forward(p, *rest, **more)),
    )
    host_cupy.memory.device = 1
    anyattn.attention(*map(to_cupy, arrays((9, 4, 16), (9, 4, 16), (9, 4, 16))))
    assert seen == [(1, 1)]
    assert host_cupy.device.current == 0


def test_cupy_keeps_the_workspace_of_a_captured_call(host_cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each replay of the graph writes to it."""
    kept: list[Any] = []
    monkeypatch.setattr(host_cupy.adapter, "_of_graphs", kept)
    q, k, v = map(to_cupy, arrays((9, 4, 16), (7, 2, 16), (7, 2, 8)))
    out, lse = anyattn.attention(q, k, v, return_lse=True)
    anyattn.attention_backward(out, q, k, v, out, lse)
    assert not kept
    monkeypatch.setattr(host_cupy.stream, "capturing", True)
    anyattn.attention(q, k, v)
    anyattn.attention_backward(out, q, k, v, out, lse)
    assert [memory.mem.size for memory in kept] == [1000, 1000]


def test_cupy_strides_of_half_elements(host_cupy: Any) -> None:
    """As those of a view of a dtype of half the size, in rows of an odd number of these."""
    (q,) = arrays((4, 1, 16))
    whole = to_cupy(q)
    half = whole.view(np.float16)[..., :30].view(np.float32)  # rows of 15, 16 apart
    assert anyattn.attention(half, half, half).shape == (4, 1, 15)
    odd = to_cupy(np.zeros((4, 1, 33), np.float16))[..., :32].view(np.float32)
    for function in (anyattn.attention, anyattn.explain):
        with pytest.raises(
            ValueError, match=r"k: its strides must be whole elements, got \(66, 66, 4\) bytes of float"
        ):
            function(whole, odd, whole)


def test_cupy_bad_input(host_cupy: Any) -> None:
    q, k, v = arrays((9, 4, 16), (7, 2, 16), (7, 2, 8))
    gpu_q, gpu_k, gpu_v = map(to_cupy, (q, k, v))
    host_cupy.memory.device = 1
    for arguments, error, message in (
        ((gpu_q, k, gpu_v), TypeError, r"k must be a cupy.ndarray, as q is, got numpy.ndarray"),
        ((q, gpu_k, v), TypeError, r"k must be a numpy.ndarray, as q is, got cupy.ndarray"),
        ((gpu_q, gpu_k, to_cupy(v)), ValueError, r"v must be on q's device, cuda:0, got cuda:1"),
        ((gpu_q, gpu_k, None), TypeError, r"v must be a cupy.ndarray, as q is, got builtins.NoneType"),
    ):
        with pytest.raises(error, match=message):
            anyattn.attention(*arguments)
    for options, error, message in (
        ({"alibi_slopes": np.ones(4, np.float32)}, TypeError, r"alibi_slopes must be a cupy.ndarray"),
        ({"window": np.ones(2)}, TypeError, r"window must be an int, a pair .*, got ndarray"),
        ({"backend": "cpu"}, ValueError, r"backend='cpu' needs arrays in host memory, got q on cuda:0"),
    ):
        with pytest.raises(error, match=message):
            anyattn.attention(gpu_q, gpu_k, gpu_v, **options)
    assert host_cupy.kernels.calls == 0


# --- what is the same for all ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dim64", "two_dimensional", "varlen_uneven", "dropout_most", "no_keys"])
def test_vjp(name: str) -> None:
    case = BY_NAME[name]
    inputs = inputs_of(case, "float32")
    options: dict[str, Any] = dict(inputs.options)
    if case.varlen:
        options |= {"cu_seqlens_q": inputs.cu_seqlens_q, "cu_seqlens_k": inputs.cu_seqlens_k}
        options |= {"max_seqlen_q": inputs.max_seqlen_q, "max_seqlen_k": inputs.max_seqlen_k}
    (out, lse), pullback = anyattn.attention_vjp(inputs.q, inputs.k, inputs.v, return_lse=True, **options)
    check(case, "float32", inputs, Results(out, lse, *pullback(inputs.dout)))
    only_out, _ = anyattn.attention_vjp(inputs.q, inputs.k, inputs.v, **options)
    np.testing.assert_array_equal(only_out, out)


def test_vjp_replays_the_mask_it_drew() -> None:
    """out is linear in v: its change along dv is exactly what the pullback says, only under the same mask."""
    q, k, v, dout = arrays((50, 2, 16), (60, 2, 16), (60, 2, 8), (50, 2, 8), dtype=np.float64)
    out, pullback = anyattn.attention_vjp(q, k, v, dropout=0.5)
    other, _ = anyattn.attention_vjp(q, k, v, dropout=0.5)
    assert abs(out - other).max() > 1e-3
    for _ in range(2):
        _, _, dv = pullback(dout)
        assert np.vdot(dv, v) == pytest.approx(np.vdot(dout, out), rel=1e-9)


def test_seeds() -> None:
    q, k, v = arrays((50, 2, 16), (60, 2, 16), (60, 2, 8))
    seeded = [anyattn.attention(q, k, v, dropout=0.5, seed=seed) for seed in (7, np.int64(7), 2**64 - 1)]
    np.testing.assert_array_equal(seeded[0], seeded[1])
    assert abs(seeded[0] - seeded[2]).max() > 1e-3
    fresh = [anyattn.attention(q, k, v, dropout=0.5) for _ in range(2)]
    assert abs(fresh[0] - fresh[1]).max() > 1e-3
    exact, _ = reference.attention(q, k, v, dropout=0.5, seed=2**64 - 1)
    np.testing.assert_allclose(seeded[2], exact, atol=1e-5)


def run_python(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_only_the_callers_library_is_imported() -> None:
    run_python(
        "import sys, numpy as np, anyattn\n"
        "x = np.ones((4, 2, 8), np.float32)\n"
        "out, pullback = anyattn.attention_vjp(x, x, x)\n"
        "pullback(out)\n"
        "heavy = {'cupy', 'torch', 'jax', 'cuda', 'yaml', 'ml_dtypes', 'anyattn.compile'} & {*sys.modules}\n"
        "assert not heavy, heavy"
    )


def test_the_first_call_may_be_compiled() -> None:
    """The adapter is imported while torch.compile traces."""
    pytest.importorskip("torch")
    run_python(
        "import torch, anyattn\n"
        "attention = torch.compile(lambda x: anyattn.attention(x, x, x), fullgraph=True, backend='eager')\n"
        "x = torch.randn(4, 2, 8)\n"
        "assert torch.equal(attention(x), anyattn.attention(x, x, x))"
    )


def test_import_is_light() -> None:
    program = (
        "import time, numpy\nstart = time.perf_counter()\nimport anyattn\nprint(time.perf_counter() - start)"
    )  # fmt: skip
    assert min(float(run_python(program)) for _ in range(5)) < 0.15
