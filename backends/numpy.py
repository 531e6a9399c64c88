"""NumPy: arrays in host memory; bfloat16 is ml_dtypes' dtype, which is not imported here."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from anyattn import host, problem
from anyattn.problem import Options, Problem, View, check_array, check_cu_seqlens, fresh_seed

__all__ = ["attention", "attention_backward", "attention_varlen", "describe", "fresh_seed"]

Array = npt.NDArray[Any]


def attention(
    q: Array,
    k: Array,
    v: Array,
    options: Options,
    *,
    alibi_slopes: Array | None,
    seed: int | None,
    return_lse: bool,
    backend: str,
) -> Any:
    """``anyattn.attention`` of NumPy arrays."""
    call = problem.dense(view("q", q), view("k", k), view("v", v), _alibi(alibi_slopes), options)
    return _forward(call, q, k, v, seed, return_lse, alibi=alibi_slopes, backend=backend)


def attention_varlen(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: Options,
    *,
    alibi_slopes: Array | None,
    seed: int | None,
    return_lse: bool,
    backend: str,
) -> Any:
    """``anyattn.attention_varlen`` of NumPy arrays."""
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    call = _varlen(q, k, v, *packing, alibi_slopes, options)
    extras = {"alibi": alibi_slopes, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    return _forward(call, q, k, v, seed, return_lse, **extras, backend=backend)


def attention_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    options: Options,
    *,
    alibi_slopes: Array | None,
    seed: int | None,
    backend: str,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
) -> tuple[Array, Array, Array]:
    """``anyattn.attention_backward`` of NumPy arrays."""
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    call = describe(q, k, v, options, *packing, alibi_slopes=alibi_slopes, backend=backend)
    bp = problem.backward(call, view("dout", dout), view("out", out), view("lse", lse))
    dq, dk, dv = (np.empty(x.shape, x.dtype) for x in (q, k, v))
    arrays = [*(_bits(x) for x in (dout, q, k, v, out)), lse, *(_bits(x) for x in (dq, dk, dv))]
    host.backward(
        bp,
        *arrays,
        alibi=alibi_slopes,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seed=seed or 0,
        backend=backend,
    )
    return dq, dk, dv


def describe(
    q: Array,
    k: Array,
    v: Array,
    options: Options,
    cu_seqlens_q: Array | None,
    cu_seqlens_k: Array | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    alibi_slopes: Array | None,
    backend: str,
) -> Problem:
    """The problem that a call would be; raises what the call would raise."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return problem.dense(view("q", q), view("k", k), view("v", v), _alibi(alibi_slopes), options)
    return _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, alibi_slopes, options)


def view(name: str, x: Any) -> View:
    """What the core checks of an array; host memory is handed on as arrays, so the pointer is left out."""
    check_array(name, x, np.ndarray)
    if isinstance(x, np.ma.MaskedArray | np.matrix):
        masked = "numpy.ma.MaskedArray (its mask would be ignored)"
        got = masked if isinstance(x, np.ma.MaskedArray) else "numpy.matrix (it would stay two-dimensional)"
        raise TypeError(f"{name} must be a plain array, got a {got}")
    dtype = x.dtype.name if x.dtype.isnative else x.dtype.str
    return View(0, x.shape, tuple(step // (x.itemsize or 1) for step in x.strides), dtype, -1)


def _alibi(slopes: Array | None) -> View | None:
    return None if slopes is None else view("alibi_slopes", slopes)


def _varlen(
    q: Array,
    k: Array,
    v: Array,
    cu_q: Array,
    cu_k: Array,
    max_q: int,
    max_k: int,
    alibi: Array | None,
    options: Options,
) -> Problem:
    views = (view("q", q), view("k", k), view("v", v), view("cu_seqlens_q", cu_q), view("cu_seqlens_k", cu_k))
    call = problem.varlen(*views, max_q, max_k, _alibi(alibi), options)
    check_cu_seqlens("cu_seqlens_q", cu_q, call.total_q, max_q)
    check_cu_seqlens("cu_seqlens_k", cu_k, call.total_k, max_k)
    return call


def _forward(call: Problem, q: Array, k: Array, v: Array, seed: int | None, return_lse: bool, **extras: Any) -> Any:
    out, lse = np.empty(call.out_shape, q.dtype), np.empty(call.lse_shape, call.lse_dtype)
    if seed is None:
        seed = fresh_seed() if call.dropout else 0
    host.forward(call, _bits(q), _bits(k), _bits(v), _bits(out), lse, seed=seed, **extras)
    return (out, lse) if return_lse else out


def _bits(x: Array) -> Array:
    return x.view(np.uint16) if x.dtype.name == "bfloat16" else x
