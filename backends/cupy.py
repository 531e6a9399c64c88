"""CuPy: arrays in GPU memory, read in place; the current stream of their device; memory from CuPy's allocator."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

from cupy import ndarray
from cupy.cuda import Device, alloc, get_current_stream
from cupy.cuda.runtime import getDevice

from anyattn import launch, problem
from anyattn.problem import Options, Problem, View, check_array, fresh_seed

__all__ = ["attention", "attention_backward", "attention_varlen", "describe", "fresh_seed"]


def attention(
    q: Any, k: Any, v: Any, options: Options, *, alibi_slopes: Any, seed: int | None, return_lse: bool, backend: str
) -> Any:
    """``anyattn.attention`` of CuPy arrays; asynchronous on the current stream."""
    call = _dense(q, k, v, alibi_slopes, options)
    return _forward(call, q, k, v, alibi_slopes, None, None, seed, return_lse, backend)


def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: Options,
    *,
    alibi_slopes: Any,
    seed: int | None,
    return_lse: bool,
    backend: str,
) -> Any:
    """``anyattn.attention_varlen`` of CuPy arrays; the offsets are not read by the host."""
    call = _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, alibi_slopes, options)
    return _forward(call, q, k, v, alibi_slopes, cu_seqlens_q, cu_seqlens_k, seed, return_lse, backend)


def attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    options: Options,
    *,
    alibi_slopes: Any,
    seed: int | None,
    backend: str,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
) -> tuple[Any, Any, Any]:
    """``anyattn.attention_backward`` of CuPy arrays; asynchronous on the current stream."""
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    call = describe(q, k, v, options, *packing, alibi_slopes=alibi_slopes, backend=backend)
    bp = problem.backward(call, _view("dout", dout), _view("out", out), _view("lse", lse))
    with Device(call.device):
        dq, dk, dv = (ndarray(shape, q.dtype) for shape in (bp.dq_shape, bp.dk_shape, bp.dv_shape))
        stream = get_current_stream(call.device)
        workspace = _workspace(launch.workspace_bytes(bp), stream)
        pointers = [x.data.ptr for x in (dout, q, k, v, out, lse, dq, dk, dv)]
        pointers += [workspace.ptr, stream.ptr]
        launch.backward(bp, *pointers, **_extras(alibi_slopes, cu_seqlens_q, cu_seqlens_k, seed or 0))
    return dq, dk, dv


def describe(
    q: Any,
    k: Any,
    v: Any,
    options: Options,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    alibi_slopes: Any,
    backend: str,
) -> Problem:
    """The problem that a call would be; raises what the call would raise."""
    if cu_seqlens_q is None:
        call = _dense(q, k, v, alibi_slopes, options)
    else:
        call = _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, alibi_slopes, options)
    _refuse_cpu(call, backend)
    return call


def _forward(
    call: Problem,
    q: Any,
    k: Any,
    v: Any,
    alibi: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    seed: int | None,
    return_lse: bool,
    backend: str,
) -> Any:
    if backend == "cpu":
        _refuse_cpu(call, backend)
    if getDevice() != call.device:
        with Device(call.device):
            return _forward(call, q, k, v, alibi, cu_seqlens_q, cu_seqlens_k, seed, return_lse, backend)
    if seed is None and call.dropout:
        seed = fresh_seed()
    out = ndarray(call.out_shape, q.dtype)
    lse = ndarray(call.lse_shape, call.lse_dtype) if return_lse else None
    lse_ptr = 0 if lse is None else lse.data.ptr
    stream = get_current_stream(call.device)  # without the device it would ask the driver for the current one again
    extras = {}
    if alibi is not None or cu_seqlens_q is not None or seed:
        extras = _extras(alibi, cu_seqlens_q, cu_seqlens_k, seed or 0)
    if size := launch.workspace_bytes(call):  # often 0
        workspace = _workspace(size, stream)
        extras["workspace"] = workspace.ptr
    # One by one: to unpack a tuple of them takes as long again as the call.
    launch.forward(call, q.data.ptr, k.data.ptr, v.data.ptr, out.data.ptr, lse_ptr, stream.ptr, **extras)
    return (out, lse) if return_lse else out


_of_graphs: list[Any] = []


def _workspace(size: int, stream: Any) -> Any:
    """Memory that goes back to CuPy's pool with the call; but a graph that is being captured writes to it again."""
    memory = alloc(size)
    if stream.is_capturing():
        _of_graphs.append(memory)
    return memory


def _dense(q: Any, k: Any, v: Any, alibi: Any, options: Options) -> Problem:
    if alibi is None:
        try:
            return _cached_dense(_key(q), _key(k), _key(v), options)
        except (AttributeError, TypeError, ValueError):  # what is wrong will be named on the way below
            pass
    return problem.dense(_view("q", q), _view("k", k), _view("v", v), _alibi(alibi), options)


@lru_cache(maxsize=4096)
def _cached_dense(q: tuple[Any, ...], k: tuple[Any, ...], v: tuple[Any, ...], options: Options) -> Problem:
    # problem.dense has a cache too, but three Views take longer to build than all the rest of a look-up.
    return problem.dense(_from_key(*q), _from_key(*k), _from_key(*v), None, options)


def _key(x: Any) -> tuple[Any, ...]:
    data = x.data  # it is three times as long to ask for strides as whether they are the usual ones
    return x.shape, x._c_contiguous or x.strides, x.dtype, data.device_id, data.ptr & 15


def _from_key(
    shape: tuple[int, ...], strides: Literal[True] | tuple[int, ...], dtype: Any, device: int, ptr: int
) -> View:
    if strides is True:
        return View(ptr, shape, problem.row_major(shape), dtype.name, device)
    if any(n > 1 and step % dtype.itemsize for n, step in zip(shape, strides, strict=True)):
        raise ValueError(f"its strides must be whole elements, got {strides} bytes of {dtype.name}")
    return View(ptr, shape, tuple(step // dtype.itemsize for step in strides), dtype.name, device)


def _view(name: str, x: Any) -> View:
    check_array(name, x, ndarray)
    try:
        return _from_key(*_key(x))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _alibi(slopes: Any) -> View | None:
    return None if slopes is None else _view("alibi_slopes", slopes)


def _varlen(
    q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, alibi: Any, options: Options
) -> Problem:
    views = (_view("q", q), _view("k", k), _view("v", v), _view("cu_seqlens_q", cu_q), _view("cu_seqlens_k", cu_k))
    return problem.varlen(*views, max_q, max_k, _alibi(alibi), options)


def _extras(alibi: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, seed: int) -> dict[str, int]:
    arrays = {"alibi": alibi, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    return {**{name: 0 if x is None else x.data.ptr for name, x in arrays.items()}, "seed": seed}


def _refuse_cpu(call: Problem, backend: str) -> None:
    if backend == "cpu":
        raise ValueError(f"backend='cpu' needs arrays in host memory, got q on cuda:{call.device}")
