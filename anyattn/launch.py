"""From a plan to the GPU: cubins loaded as cupy.RawModule, one Params struct, launches on the caller's stream.

Everything here takes raw device pointers; who allocated them does not matter. Their device is the current one, as it
has to be for whoever allocates outputs. Calls are asynchronous.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from anyattn import compile as compiler
from anyattn import plan, tensormap
from anyattn.log import info_once, log
from anyattn.plan import Device, Plan, UnsupportedError
from anyattn.problem import BackwardProblem, Problem

__all__ = ["PARAMS", "PRELUDE", "UnsupportedError", "available", "backward", "device", "forward", "workspace_bytes"]

POINTERS = (
    "q", "k", "v", "dout", "out", "lse", "dq", "dk", "dv", "dq_accum", "delta", "tickets", "o_parts",
    "softmax_parts", "alibi_slopes", "cu_seqlens_q", "cu_seqlens_k", "seed",
)  # fmt: skip
_STRIDES = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")

# The first differ from call to call, the others seldom: a launch writes them only if they do.
_ARRAYS, _OTHERS = POINTERS[:6], POINTERS[6:]
_PACKED_ARRAYS, _PACKED_OTHERS = (struct.Struct(f"{len(names)}Q") for names in (_ARRAYS, _OTHERS))
_POINTERS_BYTES = _PACKED_ARRAYS.size + _PACKED_OTHERS.size
_TICKETS = _OTHERS.index("tickets")

# cuda_src/params.cuh, field by field in the same order (a test compares them); the compiler checks the size.
PARAMS = np.dtype(
    [
        *((name, np.uint64) for name in POINTERS),
        *((f"{name}_strides", np.int64, 4) for name in _STRIDES),
        *((name, np.int64) for name in ("lse_batch", "lse_head", "lse_row", "alibi_batch", "alibi_head")),
        *((name, np.float64) for name in ("scale", "softcap", "keep_scale")),
        ("drop_below", np.uint32),
        *((name, np.int32) for name in ("batch", "heads", "heads_kv", "group", "seqlen_q", "seqlen_k")),
        *((name, np.int32) for name in ("shift", "first_batch", "first_head", "first_row")),
        *((name, np.int32) for name in ("total_q", "total_k", "left", "right", "row_blocks", "key_blocks")),
        *((name, np.int32) for name in ("section", "parts")),
    ],
    align=True,
)
# The tensor maps that may follow, in the order of TmaParams.
_MAPS = ("q", "k", "v", "dout")
_MAPS_START = -(-PARAMS.itemsize // 64) * 64
PRELUDE = f"""\
#include "element.cuh"
#include "params.cuh"
static_assert(sizeof(Params) == {PARAMS.itemsize});
static_assert(sizeof(TmaParams) == {_MAPS_START + len(_MAPS) * tensormap.BYTES});"""


class _Prepared(NamedTuple):
    """A plan whose kernels are loaded: what is left to do for a call is to fill in the pointers."""

    plan: Plan
    launches: tuple[tuple[int, int, int, int], ...]  # CUfunction, blocks, threads of a block, bytes of shared memory
    thread: _ArgumentsOfThread
    maps: tuple[Callable[[tuple[int, ...]], bytes], ...]  # from the pointers, the tensor maps behind Params
    device: int
    functions: tuple[Any, ...] = ()  # of the launches: the last to go unloads their module


class _Arguments:
    """A kernel's only argument, Params, in host memory."""

    def __init__(self, constants: bytes) -> None:
        content = bytes(_POINTERS_BYTES) + constants
        self._memory = ctypes.create_string_buffer(content, len(content))
        self.params = memoryview(self._memory).cast("B")  # a ctypes array would copy a slice byte by byte
        self.others: tuple[int, ...] = (0,) * len(_OTHERS)
        self.mapped: tuple[int, ...] = ()  # the pointers whose tensor maps it holds: to encode them takes microseconds
        self._pointer = ctypes.c_void_p(ctypes.addressof(self._memory))
        self.kernel_params = ctypes.addressof(self._pointer)  # as cuLaunchKernel calls it
        self.used = False


class _ArgumentsOfThread(threading.local):
    """Every thread has its own, to fill in for each launch."""

    def __init__(self, constants: bytes) -> None:
        self.arguments = _Arguments(constants)


def forward(
    problem: Problem, q: int, k: int, v: int, out: int, lse: int, stream: int,
    *, alibi: int = 0, cu_seqlens_q: int = 0, cu_seqlens_k: int = 0, seed: int = 0, workspace: int = 0,
) -> None:  # fmt: skip
    """Launch the forward kernels of a problem on a stream (a CUstream handle; 0 is the legacy default stream).

    All arguments but seed are device pointers of arrays as the problem describes them; lse may be 0 if nobody wants it.
    `workspace` points to workspace_bytes(problem) bytes of any content, 256-byte aligned, if any.
    Raises UnsupportedError when no kernel takes the problem, compile.CompileError when it can't be built.
    """
    prepared = _prepare_forward(problem)
    tickets = workspace if prepared.plan.ticket_bytes else 0  # null: tiles by turns
    o_parts = workspace if prepared.plan.o_parts_bytes else 0
    softmax_parts = o_parts + prepared.plan.o_parts_bytes
    others = (0, 0, 0, 0, 0, tickets, o_parts, softmax_parts, alibi, cu_seqlens_q, cu_seqlens_k, seed)
    _launch(prepared, q, k, v, 0, out, lse, others, stream)


def backward(
    bp: BackwardProblem, dout: int, q: int, k: int, v: int, out: int, lse: int, dq: int, dk: int, dv: int,
    workspace: int, stream: int,
    *, alibi: int = 0, cu_seqlens_q: int = 0, cu_seqlens_k: int = 0, seed: int = 0,
) -> None:  # fmt: skip
    """Launch the backward kernels; `workspace` points to workspace_bytes(bp) bytes of any content, 256-byte aligned.

    dq is 16-byte aligned, whatever its strides: sums of rows lie in it until the last kernel writes it.
    """
    prepared = _prepare_backward(bp)
    parts = prepared.plan
    delta = workspace if parts.delta_bytes else dq
    dq_accum = workspace + parts.delta_bytes
    tickets = dq_accum + parts.dq_accum_bytes
    others = (dq, dk, dv, dq_accum, delta, tickets, 0, 0, alibi, cu_seqlens_q, cu_seqlens_k, seed)
    _launch(prepared, q, k, v, dout, out, lse, others, stream)


@functools.lru_cache(maxsize=4096)
def workspace_bytes(call: Problem | BackwardProblem) -> int:
    """Device memory, in bytes, that forward() or backward() needs besides its arguments."""
    if isinstance(call, Problem):
        return plan.forward(call, device(call.device)).workspace_bytes
    return plan.backward(call, device(call.problem.device)).workspace_bytes


def forget_plans() -> None:
    """Plan each call anew: the tiles, or the environment, have changed."""
    for cache in (plan.forward, plan.backward, workspace_bytes, _prepare_forward, _prepare_backward):
        cache.cache_clear()


def available(ordinal: int | None = None) -> str | None:
    """None when the GPU path works on a GPU, by default the current one; else the reason, with what to install."""
    if reason := _no_gpu():
        return reason
    try:
        device(_cuda().runtime.getDevice() if ordinal is None else ordinal)
    except (compiler.CompileError, UnsupportedError) as error:
        return str(error)
    return None


@functools.cache
def _no_gpu() -> str | None:
    """Why there is no GPU to ask anything of."""
    try:
        import cupy
    except ImportError as error:
        return (
            f"CuPy is not installed ({error}): pip install 'anyattn[cuda13]' ('anyattn[cuda12]' for a CUDA 12 driver)"
        )
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CuPy raises its own class, which exists only where its libraries load
        driver = cupy.cuda.runtime.driverGetVersion()  # the newest CUDA that it is for
        if driver == 0:
            return (
                "there is no NVIDIA driver here: a GPU needs one for CUDA 12 or later (https://www.nvidia.com/drivers)"
            )
        return f"no NVIDIA GPU is usable here, with a driver for CUDA {driver // 1000}.{driver % 1000 // 10} ({error})"
    if count == 0:
        return "there is no NVIDIA GPU here"
    return None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_no_gpu.cache_clear)  # where CUDA can't be used any more


@functools.cache
def device(ordinal: int) -> Device:
    """What plan needs to know of a GPU.

    Raises UnsupportedError when it is older than sm_80, or when its driver cannot load what NVRTC here builds.
    """
    try:
        properties = _cuda().runtime.getDeviceProperties(ordinal)
    except ImportError:
        raise UnsupportedError(str(available())) from None
    major, minor = properties["major"], properties["minor"]
    if major < 8:
        raise UnsupportedError(
            f"GPU {ordinal} has compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or newer: "
            "use backend='cpu' on host arrays"
        )
    if reason := compiler.driver_problem(_cuda().runtime.driverGetVersion()):
        raise UnsupportedError(reason)
    arch = "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"
    return Device(arch, properties["sharedMemPerBlockOptin"], properties["multiProcessorCount"])


# ------------------------------------------------------------------------------------------------ behind the cache


@functools.lru_cache(maxsize=4096)
def _prepare_forward(problem: Problem) -> _Prepared:
    chosen = plan.forward(problem, device(problem.device))
    problem = plan.heads_as_rows(problem)
    return _prepare(problem, chosen, _params(problem, chosen))


@functools.lru_cache(maxsize=4096)
def _prepare_backward(bp: BackwardProblem) -> _Prepared:
    chosen = plan.backward(bp, device(bp.problem.device))
    params = _params(bp.problem, chosen)
    for name in ("dout", "out", "dq", "dk", "dv"):
        params[f"{name}_strides"] = getattr(bp, f"{name}_strides")
    params["lse_batch"], params["lse_head"], params["lse_row"] = bp.lse_strides
    return _prepare(bp.problem, chosen, params)


def _params(problem: Problem, chosen: Plan) -> np.ndarray[Any, Any]:
    params = np.zeros((), PARAMS)
    for name in ("q", "k", "v", "out"):
        params[f"{name}_strides"] = getattr(problem, f"{name}_strides")
    params["lse_batch"], params["lse_head"], params["lse_row"] = problem.lse_strides
    params["alibi_batch"], params["alibi_head"] = problem.alibi_strides
    for name in ("scale", "softcap", "batch", "heads", "heads_kv", "seqlen_q", "seqlen_k", "total_q", "total_k"):
        params[name] = getattr(problem, name)
    params["group"] = problem.heads // max(1, problem.heads_kv)
    params["left"], params["right"] = (min(side, 2**30 - 1) for side in (problem.left, problem.right))
    params["shift"], (params["first_batch"], params["first_head"], params["first_row"]) = problem.shift, problem.origin
    params["keep_scale"] = 1.0 / (1.0 - problem.dropout)
    params["drop_below"] = int(problem.dropout * 2**32)
    params["row_blocks"], params["key_blocks"] = chosen.row_blocks, chosen.key_blocks
    params["section"], params["parts"] = min(chosen.section, 2**30), chosen.parts
    return params


def _prepare(problem: Problem, chosen: Plan, params: np.ndarray[Any, Any]) -> _Prepared:
    for family, reason in chosen.refused:
        info_once(f"not the {family} kernels: {reason}")
    paths = [compiler.cubin(kernel.spec).path for kernel in chosen.kernels]
    with _loading:
        functions = tuple(
            _function(path, kernel.name, kernel.shared_bytes, problem.device)
            for path, kernel in zip(paths, chosen.kernels, strict=True)
        )
    launches = tuple(
        (function.ptr, kernel.grid, kernel.threads, kernel.shared_bytes)
        for function, kernel in zip(functions, chosen.kernels, strict=True)
    )
    constants = params.tobytes()[_POINTERS_BYTES:]
    maps: tuple[Callable[[tuple[int, ...]], bytes], ...] = ()
    if chosen.boxes:
        constants = constants.ljust(_MAPS_START + len(_MAPS) * tensormap.BYTES - _POINTERS_BYTES, b"\0")
        maps = tuple(_map(problem, name, params, dict(chosen.boxes).get(name)) for name in _MAPS)
    return _Prepared(chosen, launches, _ArgumentsOfThread(constants), maps, problem.device, functions)


def _map(
    problem: Problem, name: str, params: np.ndarray[Any, Any], box_rows: int | None
) -> Callable[[tuple[int, ...]], bytes]:
    """How to make an array's tensor map once its pointer is known; zeros if the kernel asks for none."""
    if box_rows is None:
        return lambda pointers: bytes(tensormap.BYTES)
    keys = name in ("k", "v")
    heads = problem.heads_kv if keys else problem.heads
    rows = (problem.total_k or problem.seqlen_k) if keys else (problem.total_q or problem.seqlen_q)
    columns = problem.head_dim if name in ("q", "k") else problem.head_dim_v
    extents = (problem.batch, heads, rows, columns)
    strides = tuple(params[f"{name}_strides"].tolist())
    index = POINTERS.index(name)
    return lambda pointers: tensormap.encode(pointers[index], problem.dtype, extents, strides, box_rows)


# Two threads that load the same module at once would each have one of their own, of which the caches keep the later.
_loading = threading.Lock()


@functools.cache
def _function(path: str, name: str, shared_bytes: int, ordinal: int) -> Any:
    """A kernel loaded on a device, allowed its shared memory. To be called with `_loading` held."""
    import cupy

    with cupy.cuda.Device(ordinal):
        kernel = cupy.RawModule(path=path).get_function(name)
        if shared_bytes > 48 << 10:
            kernel.max_dynamic_shared_size_bytes = shared_bytes
        log.info("first use of %s on cuda:%d, %d bytes of shared memory, from %s", name, ordinal, shared_bytes, path)
        return kernel.kernel  # its cupy.cuda.Function


@functools.cache
def _cuda() -> Any:
    import cupy

    return cupy.cuda


def _launch(
    prepared: _Prepared, q: int, k: int, v: int, dout: int, out: int, lse: int, others: tuple[int, ...], stream: int
) -> None:
    cuda, arguments = _cuda(), prepared.thread.arguments
    if not arguments.used:  # a new thread has no context before it names the device, not even for a map
        cuda.runtime.setDevice(prepared.device)
        arguments.used = True
    _PACKED_ARRAYS.pack_into(arguments.params, 0, q, k, v, dout, out, lse)
    if arguments.others != others:
        arguments.others = ()  # should an interrupt come between
        arguments.params[_PACKED_ARRAYS.size : _POINTERS_BYTES] = _PACKED_OTHERS.pack(*others)
        arguments.others = others
    if prepared.maps and arguments.mapped != (mapped := (q, k, v, dout)):
        arguments.mapped = ()
        arguments.params[_MAPS_START:] = b"".join([make(mapped) for make in prepared.maps])
        arguments.mapped = mapped
    if prepared.plan.ticket_bytes:
        cuda.runtime.memsetAsync(others[_TICKETS], 0, prepared.plan.ticket_bytes, stream)
    for function, blocks, threads, shared_bytes in prepared.launches:
        # The driver's own function: a Function would take as long again to look at what it is given.
        cuda.driver.launchKernel(
            function, blocks, 1, 1, threads, 1, 1, shared_bytes, stream, arguments.kernel_params, 0
        )
