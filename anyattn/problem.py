"""One call, validated and normalised: shapes, strides and options become a frozen :class:`Problem`.

Pure Python: no array, no device, no pointer survives into a ``Problem``, so it can be built, compared and planned for
on a machine without a GPU. Every error message of the public contract that concerns arrays or options is born here.
A repeated call costs one ``lru_cache`` look-up.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import index
from typing import Any, NamedTuple

import numpy as np

DTYPES = ("float16", "bfloat16", "float32", "float64")
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "int32": 4}
UNBOUNDED = 2**30  # a window's open side; positions stay below it, so position + bound fits in 32 bits
MAX_HEAD_DIM = 256

Strides = tuple[int, int, int, int]

# Where (batch, head, row, column) sit in an array of this layout and rank; None = no such dimension.
_AXES: dict[tuple[str, int], tuple[int | None, int | None, int, int]] = {
    ("bshd", 4): (0, 2, 1, 3),
    ("bshd", 3): (None, 1, 0, 2),
    ("bshd", 2): (None, None, 0, 1),
    ("bhsd", 4): (0, 1, 2, 3),
    ("bhsd", 3): (None, 0, 1, 2),
    ("bhsd", 2): (None, None, 0, 1),
}
_AXIS_NAMES = {"b": "batch", "s": "seqlen", "h": "heads", "d": "head_dim"}
_CACHE = 4096


class View(NamedTuple):
    """All the core knows of an array."""

    ptr: int  # address of element [0, ..., 0]
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    dtype: str  # a name in DTYPES, "int32", or the library's own name (an error later)
    device: int  # CUDA ordinal; -1 = host memory


class Options(NamedTuple):
    """The hashable part of the keyword arguments, as the caller gave them: not yet validated."""

    causal: bool = False
    window: int | tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float | None = None
    dropout: float = 0.0
    layout: str = "bshd"
    deterministic: bool = False


@dataclass(frozen=True)
class Problem:
    """One validated, normalised call, without pointers. Strides are in elements.

    Strides of dimensions of extent 1 (or 0) are normalised: 1 for columns, 0 for the others. A window side that no
    position of these lengths can reach is UNBOUNDED, so a causal call with one query is an unmasked one.
    """

    dtype: str
    device: int  # CUDA ordinal; -1 = host memory
    layout: str  # "bshd" or "bhsd"; with len(out_shape) it tells how the caller's arrays are laid out
    batch: int
    heads: int
    heads_kv: int
    seqlen_q: int  # varlen: max_seqlen_q
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    left: int  # key j is visible to row i iff p - left <= j <= p + right, with p = i + seqlen_k - seqlen_q
    right: int
    scale: float
    softcap: float  # 0.0 = none
    dropout: float
    deterministic: bool
    alibi: bool
    varlen: bool
    total_q: int  # 0 when dense
    total_k: int
    q_strides: Strides  # (batch, head, row, column); varlen: batch stride 0
    k_strides: Strides
    v_strides: Strides
    out_strides: Strides  # of the contiguous output in the caller's layout
    alibi_strides: tuple[int, int]  # (batch, head); (0, 0) when there are no slopes
    align: int  # bytes (a power of two <= 16) that divide every pointer and every row, head and batch step of q, k, v
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    lse_strides: tuple[int, int, int]  # (batch, head, row)
    # Of a part of a larger call: what is added to its rows' positions, and the (batch, head, row) dropout counts from.
    shift: int = 0
    origin: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash(tuple(self.__dict__.values())))

    def __hash__(self) -> int:
        # Problems key the caches below this one: hash the thirty fields once.
        return self._hash  # type: ignore[attr-defined, no-any-return]

    @property
    def itemsize(self) -> int:
        """Bytes of one element of q, k, v and the output."""
        return ITEMSIZE[self.dtype]

    @property
    def lse_dtype(self) -> str:
        """The dtype of the log-sum-exp: float64 for float64, else float32."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def q_shape(self) -> tuple[int, ...]:
        """The shape of q in the caller's layout."""
        return self._shape(self.heads, self.total_q if self.varlen else self.seqlen_q, self.head_dim)

    @property
    def k_shape(self) -> tuple[int, ...]:
        """The shape of k in the caller's layout."""
        return self._shape(self.heads_kv, self.total_k if self.varlen else self.seqlen_k, self.head_dim)

    @property
    def v_shape(self) -> tuple[int, ...]:
        """The shape of v in the caller's layout."""
        return self._shape(self.heads_kv, self.total_k if self.varlen else self.seqlen_k, self.head_dim_v)

    @property
    def axes(self) -> tuple[int | None, int | None, int, int]:
        """Where (batch, head, row, column) sit in the caller's arrays; None = no such dimension."""
        return _AXES[self.layout, len(self.out_shape)]

    def _shape(self, heads: int, rows: int, columns: int) -> tuple[int, ...]:
        extents = zip(self.axes, (self.batch, heads, rows, columns), strict=True)
        return tuple(n for _, n in sorted((axis, n) for axis, n in extents if axis is not None))


@dataclass(frozen=True)
class BackwardProblem:
    """A :class:`Problem` with the arrays its backward pass adds. Strides are (batch, head, row, column)."""

    problem: Problem
    dout_strides: Strides
    out_strides: Strides  # of the out that was given, which may differ from problem.out_strides
    lse_strides: tuple[int, int, int]  # (batch, head, row)
    dq_strides: Strides  # the gradients are contiguous in the caller's layout
    dk_strides: Strides
    dv_strides: Strides
    align: int  # as Problem.align, dout and out included
    dq_shape: tuple[int, ...]
    dk_shape: tuple[int, ...]
    dv_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash(tuple(self.__dict__.values())))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined, no-any-return]


# ------------------------------------------------------------------------------------------------ the three entrances


def dense(q: View, k: View, v: View, alibi: View | None, options: Options) -> Problem:
    """The problem of a call on 2-D, 3-D or 4-D arrays; raises ValueError or TypeError naming what is wrong."""
    slopes = None if alibi is None else alibi[1:]
    problem = _cached(_dense, q[1:], q[0] & 15, k[1:], k[0] & 15, v[1:], v[0] & 15, slopes, options)
    _check_alignment(alibi_slopes=alibi)
    return problem


def varlen(
    q: View,
    k: View,
    v: View,
    cu_seqlens_q: View,
    cu_seqlens_k: View,
    max_seqlen_q: int,
    max_seqlen_k: int,
    alibi: View | None,
    options: Options,
) -> Problem:
    """The problem of a call on packed sequences, (total, heads, head_dim); raises ValueError or TypeError."""
    slopes = None if alibi is None else alibi[1:]
    lengths = (cu_seqlens_q[1:], cu_seqlens_k[1:], max_seqlen_q, max_seqlen_k)
    problem = _cached(_varlen, q[1:], q[0] & 15, k[1:], k[0] & 15, v[1:], v[0] & 15, slopes, options, *lengths)
    _check_alignment(alibi_slopes=alibi, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    return problem


def backward(problem: Problem, dout: View, out: View, lse: View) -> BackwardProblem:
    """The backward problem of ``problem``; checks dout, out and lse against it (ValueError, TypeError)."""
    return _backward(problem, dout[1:], dout[0] & 15, out[1:], out[0] & 15, lse[1:], lse[0] & 15)


def contiguous_backward(problem: Problem) -> BackwardProblem:
    """The backward problem of ``problem`` with contiguous, aligned dout, out and lse."""

    def view(shape: tuple[int, ...], dtype: str) -> View:
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return View(0, shape, strides, dtype, problem.device)

    out = view(problem.out_shape, problem.dtype)
    return backward(problem, out, out, view(problem.lse_shape, problem.lse_dtype))


def packed(problem: Problem, device: int) -> Problem:
    """The same call on C-contiguous copies of its arrays on another device, dense ones with all four dimensions."""
    rows = problem.total_q if problem.varlen else problem.seqlen_q
    axes = _AXES[problem.layout, 3 if problem.varlen else 4]
    extents = zip(axes, (problem.batch, problem.heads, rows, problem.head_dim_v), strict=True)
    out_shape = tuple(n for _, n in sorted((axis, n) for axis, n in extents if axis is not None))
    lse_shape = (problem.heads, rows) if problem.varlen else (problem.batch, problem.heads, rows)
    lse_strides = (0 if problem.varlen else problem.heads * rows, rows, 1)
    problem = replace(problem, device=device, out_shape=out_shape, lse_shape=lse_shape, lse_strides=lse_strides)
    q, k, v = (_contiguous(shape, axes) for shape in (problem.q_shape, problem.k_shape, problem.v_shape))
    return replace(
        problem,
        q_strides=q,
        k_strides=k,
        v_strides=v,
        out_strides=_contiguous(out_shape, axes),
        align=_align(16, problem.itemsize, ((0, q), (0, k), (0, v))),
        alibi_strides=(problem.heads if problem.alibi_strides[0] else 0, 1) if problem.alibi else (0, 0),
    )


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a C-contiguous array, in elements."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 1, 0, -1):
        strides[axis - 1] = strides[axis] * shape[axis]
    return tuple(strides)


def check_options(options: Options) -> None:
    """Refuse what no arrays would make right."""
    check_flag("causal", options.causal)
    _window(options.window, False, 1, 1)
    if options.scale is not None:
        _finite("scale", options.scale)
    _softcap(options.softcap)
    check_dropout(options.dropout)
    _layout(options.layout)
    check_flag("deterministic", options.deterministic)


def check_dropout(dropout: Any) -> float:
    """The dropout probability as a float in [0, 1)."""
    if not isinstance(dropout, _REAL):
        raise TypeError(f"dropout must be a real number in [0, 1), got {_describe(dropout)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    return float(dropout)


def check_flag(name: str, flag: Any) -> bool:
    """True or False, or what equals one of them."""
    if not isinstance(flag, (*_REAL, np.bool_)) or flag not in (0, 1):
        raise TypeError(f"{name} must be True or False, got {_describe(flag)}")
    return bool(flag)


def check_array(name: str, array: Any, kind: type) -> None:
    """Refuse an argument that is not of the array type that q has."""
    if not isinstance(array, kind):
        wanted, got = (f"{t.__module__.partition('.')[0]}.{t.__name__.rpartition('.')[2]}" for t in (kind, type(array)))
        raise TypeError(f"{name} must be a {wanted}{', as q is' if name != 'q' else ''}, got {got}")


def check_seed(seed: int) -> int:
    """The dropout seed as a plain int in [0, 2**64)."""
    try:
        value = index(seed)
    except TypeError:
        raise TypeError(f"seed must be an int in [0, 2**64) or None, got {_describe(seed)}") from None
    if not 0 <= value < 2**64:
        raise ValueError(f"seed must be in [0, 2**64), got {value}")
    return value


def fresh_seed() -> int:
    """A dropout seed from the operating system's entropy, in [0, 2**63)."""
    return int.from_bytes(os.urandom(8), "little") >> 1


def check_cu_seqlens(name: str, offsets: np.ndarray[Any, Any], total: int, max_seqlen: int) -> None:
    """Check the values of a host ``cu_seqlens`` array: from 0 to ``total``, ascending, no step above ``max_seqlen``.

    Offsets in device memory are not read (that would wait for the GPU): the kernels clamp every sequence into the
    arrays, so that wrong ones give wrong numbers and never an access out of bounds.
    """
    if offsets[0] != 0:
        raise ValueError(f"{name} must start at 0, got {offsets[0]}")
    if offsets[-1] != total:
        raise ValueError(f"{name} must end at the number of packed rows, {total}, got {offsets[-1]}")
    lengths = np.diff(offsets.astype(np.int64))
    if lengths.size and lengths.min() < 0:
        at = int(lengths.argmin())
        raise ValueError(f"{name} must ascend, got {offsets[at]} followed by {offsets[at + 1]} at entry {at}")
    if lengths.size and lengths.max() > max_seqlen:
        at = int(lengths.argmax())
        raise ValueError(
            f"max_seqlen_{name[-1]} must be at least the longest sequence, {lengths[at]} rows (number {at} of {name}), "
            f"got {max_seqlen}"
        )


# ------------------------------------------------------------------------------------------------ behind the cache

_Key = tuple[Any, ...]  # a View without its pointer


def _cached(function: Any, *key: Any) -> Problem:
    """function(*key). What can't be hashed passes no check: then the function names it, without its cache."""
    try:
        return function(*key)  # type: ignore[no-any-return]
    except TypeError:
        try:
            hash(key)
        except TypeError:
            pass
        else:
            raise
    return function.__wrapped__(*key)  # type: ignore[no-any-return]


@lru_cache(maxsize=_CACHE)
def _dense(
    q_key: _Key, q_low: int, k_key: _Key, k_low: int, v_key: _Key, v_low: int, alibi: _Key | None, options: Options
) -> Problem:
    q, k, v = View(q_low, *q_key), View(k_low, *k_key), View(v_low, *v_key)
    rank = len(q.shape)
    if rank not in (2, 3, 4):
        raise ValueError(
            f"q must have 2 (seqlen, head_dim), 3 (seqlen, heads, head_dim) or 4 dimensions, got shape {q.shape}"
        )
    axes = _AXES[_layout(options.layout), rank]
    _check_arrays(q, k, v, _dims(options.layout, rank))

    batch, heads, seqlen_q, head_dim = _extents(q.shape, axes)
    batch_k, heads_kv, seqlen_k, head_dim_k = _extents(k.shape, axes)
    batch_v, heads_v, seqlen_v, head_dim_v = _extents(v.shape, axes)
    _same("k", "batch", batch_k, "q", batch)
    _same("v", "batch", batch_v, "q", batch)
    _same("v", "seqlen", seqlen_v, "k", seqlen_k)
    _check_heads(heads, heads_kv, heads_v)
    _check_head_dims(head_dim, head_dim_k, head_dim_v)
    for name, seqlen in (("q", seqlen_q), ("k", seqlen_k)):
        if seqlen >= UNBOUNDED:
            raise ValueError(f"{name}: seqlen must be below 2**30, got {seqlen}")

    out_shape = (*q.shape[:-1], head_dim_v)
    return Problem(
        batch=batch,
        heads=heads,
        heads_kv=heads_kv,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        varlen=False,
        total_q=0,
        total_k=0,
        out_shape=out_shape,
        lse_shape=(batch, heads, seqlen_q)[4 - rank :],
        lse_strides=(heads * seqlen_q, seqlen_q, 1),
        **_common(q, k, v, axes, out_shape, alibi, options, batch, heads, seqlen_q, seqlen_k),
    )


@lru_cache(maxsize=_CACHE)
def _varlen(
    q_key: _Key,
    q_low: int,
    k_key: _Key,
    k_low: int,
    v_key: _Key,
    v_low: int,
    alibi: _Key | None,
    options: Options,
    cu_q: _Key,
    cu_k: _Key,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> Problem:
    q, k, v = View(q_low, *q_key), View(k_low, *k_key), View(v_low, *v_key)
    if _layout(options.layout) != "bshd":
        raise ValueError(f"layout must be 'bshd' for packed sequences (total, heads, head_dim), got {options.layout!r}")
    if len(q.shape) != 3:
        raise ValueError(f"q must have 3 dimensions (total, heads, head_dim), got shape {q.shape}")
    _check_arrays(q, k, v, "(total, heads, head_dim)")
    total_q, heads, head_dim = q.shape
    total_k, heads_kv, head_dim_k = k.shape
    total_v, heads_v, head_dim_v = v.shape
    _same("v", "total", total_v, "k", total_k)
    _check_heads(heads, heads_kv, heads_v)
    _check_head_dims(head_dim, head_dim_k, head_dim_v)
    for name, total in (("q", total_q), ("k", total_k)):
        if total >= 2**31:
            raise ValueError(f"{name}: the packed rows must be fewer than 2**31, got {total}")

    for name, cu in (("cu_seqlens_q", View(0, *cu_q)), ("cu_seqlens_k", View(0, *cu_k))):
        if cu.dtype != "int32":
            raise TypeError(f"{name} must be int32, got {cu.dtype}")
        if len(cu.shape) != 1 or cu.shape[0] < 1:
            raise ValueError(f"{name} must have one dimension, of length batch + 1, got shape {cu.shape}")
        if cu.shape[0] > 1 and cu.strides[0] != 1:
            raise ValueError(f"{name} must be contiguous, got stride {cu.strides[0]}")
        if cu.device != q.device:
            raise ValueError(f"{name} must be on q's device, {place(q.device)}, got {place(cu.device)}")
    if cu_q[0] != cu_k[0]:
        raise ValueError(
            f"cu_seqlens_k must have the length of cu_seqlens_q, batch + 1 = {cu_q[0][0]}, got {cu_k[0][0]}"
        )
    batch = cu_q[0][0] - 1
    seqlen_q = _length("max_seqlen_q", max_seqlen_q)
    seqlen_k = _length("max_seqlen_k", max_seqlen_k)

    out_shape = (total_q, heads, head_dim_v)
    return Problem(
        batch=batch,
        heads=heads,
        heads_kv=heads_kv,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        varlen=True,
        total_q=total_q,
        total_k=total_k,
        out_shape=out_shape,
        lse_shape=(heads, total_q),
        lse_strides=(0, total_q, 1),
        **_common(q, k, v, _AXES["bshd", 3], out_shape, alibi, options, batch, heads, seqlen_q, seqlen_k),
    )


def _common(
    q: View,
    k: View,
    v: View,
    axes: tuple[int | None, int | None, int, int],
    out_shape: tuple[int, ...],
    alibi: _Key | None,
    options: Options,
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
) -> dict[str, Any]:
    """The fields of a Problem that dense and packed calls derive alike."""
    strides = [_strides(x, axes) for x in (q, k, v)]
    itemsize = ITEMSIZE[q.dtype]
    _check_alignment(q=q, k=k, v=v)
    head_dim = q.shape[-1]
    left, right = _window(options.window, check_flag("causal", options.causal), seqlen_q, seqlen_k)
    scale = 1.0 / math.sqrt(head_dim) if options.scale is None else _finite("scale", options.scale)
    softcap = _softcap(options.softcap)
    _check_range(scale, softcap, "float64" if q.dtype == "float64" else "float32")
    return {
        "dtype": q.dtype,
        "device": q.device,
        "layout": options.layout,
        "head_dim": head_dim,
        "head_dim_v": v.shape[-1],
        "left": left,
        "right": right,
        "scale": scale,
        "softcap": softcap,
        "dropout": check_dropout(options.dropout),
        "deterministic": check_flag("deterministic", options.deterministic),
        "alibi": alibi is not None,
        "q_strides": strides[0],
        "k_strides": strides[1],
        "v_strides": strides[2],
        "out_strides": _contiguous(out_shape, axes),
        "alibi_strides": (0, 0) if alibi is None else _alibi_strides(View(0, *alibi), batch, heads, q.device),
        "align": _align(16, itemsize, zip((q.ptr, k.ptr, v.ptr), strides, strict=True)),
    }


@lru_cache(maxsize=_CACHE)
def _backward(
    problem: Problem, dout_key: _Key, dout_low: int, out_key: _Key, out_low: int, lse_key: _Key, lse_low: int
) -> BackwardProblem:
    dout, out, lse = View(dout_low, *dout_key), View(out_low, *out_key), View(lse_low, *lse_key)
    for name, x, shape, dtype in (
        ("dout", dout, problem.out_shape, problem.dtype),
        ("out", out, problem.out_shape, problem.dtype),
        ("lse", lse, problem.lse_shape, problem.lse_dtype),
    ):
        if x.shape != shape:
            raise ValueError(f"{name} must have shape {shape} for these q, k, v, got {x.shape}")
        if x.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} for {problem.dtype} q, k, v, got {x.dtype}")
        if x.device != problem.device:
            raise ValueError(f"{name} must be on q's device, {place(problem.device)}, got {place(x.device)}")
        _check_alignment(**{name: x})

    axes = problem.axes
    dout_strides, out_strides = _strides(dout, axes), _strides(out, axes)
    steps = tuple(s if n > 1 else 0 for n, s in zip(lse.shape, lse.strides, strict=True))
    return BackwardProblem(
        problem=problem,
        dout_strides=dout_strides,
        out_strides=out_strides,
        lse_strides=((0,) * (3 - len(steps)) + steps),  # type: ignore[arg-type]
        dq_strides=_contiguous(problem.q_shape, axes),
        dk_strides=_contiguous(problem.k_shape, axes),
        dv_strides=_contiguous(problem.v_shape, axes),
        align=_align(problem.align, problem.itemsize, ((dout.ptr, dout_strides), (out.ptr, out_strides))),
        dq_shape=problem.q_shape,
        dk_shape=problem.k_shape,
        dv_shape=problem.v_shape,
    )


# ------------------------------------------------------------------------------------------------ shapes and strides


def _extents(shape: Sequence[int], axes: Iterable[int | None]) -> tuple[int, ...]:
    return tuple(1 if axis is None else shape[axis] for axis in axes)


def _strides(x: View, axes: tuple[int | None, int | None, int, int]) -> Strides:
    """(batch, head, row, column); a dimension that is never stepped along has stride 0, its columns 1."""
    *steps, column = (0 if axis is None or x.shape[axis] <= 1 else x.strides[axis] for axis in axes)
    return (*steps, column if x.shape[-1] > 1 else 1)  # type: ignore[return-value]


def _contiguous(shape: tuple[int, ...], axes: tuple[int | None, int | None, int, int]) -> Strides:
    strides = row_major(shape)
    return tuple(0 if axis is None else strides[axis] for axis in axes)  # type: ignore[return-value]


def _align(limit: int, itemsize: int, arrays: Iterable[tuple[int, Strides]]) -> int:
    """The largest power of two up to ``limit`` that divides every pointer and, in bytes, every step between rows."""
    bits = limit
    for ptr, (*steps, column) in arrays:
        if column != 1:
            return itemsize
        bits |= ptr
        for step in steps:
            bits |= step * itemsize
    return bits & -bits


def _alibi_strides(alibi: View, batch: int, heads: int, device: int) -> tuple[int, int]:
    if alibi.dtype != "float32":
        raise TypeError(f"alibi_slopes must be float32, got {alibi.dtype}")
    if alibi.shape not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes must have shape (heads,) or (batch, heads), {(heads,)} or {batch, heads}, got {alibi.shape}"
        )
    if alibi.device != device:
        raise ValueError(f"alibi_slopes must be on q's device, {place(device)}, got {place(alibi.device)}")
    return (alibi.strides[0], alibi.strides[1]) if len(alibi.shape) == 2 else (0, alibi.strides[0])


def _check_arrays(q: View, k: View, v: View, dims: str) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {x.dtype}")
        if len(x.shape) != len(q.shape):
            raise ValueError(f"{name} must have q's {len(q.shape)} dimensions {dims}, got shape {x.shape}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype, {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device, {place(q.device)}, got {place(x.device)}")


def _check_alignment(**views: View | None) -> None:
    """On a GPU a misaligned address would be the end of the process."""
    for name, x in views.items():
        if x is not None and x.device >= 0 and x.ptr % (size := ITEMSIZE[x.dtype]):
            raise ValueError(f"{name}: its data must be aligned to its {size}-byte elements")


def _check_heads(heads: int, heads_kv: int, heads_v: int) -> None:
    _same("v", "heads", heads_v, "k", heads_kv)
    if heads % heads_kv if heads_kv else heads:
        raise ValueError(f"k: its {heads_kv} heads must divide q's {heads} (grouped queries share a head of k and v)")


def _check_head_dims(head_dim: int, head_dim_k: int, head_dim_v: int) -> None:
    _same("k", "head_dim", head_dim_k, "q", head_dim)
    for name, n in (("q", head_dim), ("v", head_dim_v)):
        if not 1 <= n <= MAX_HEAD_DIM:
            raise ValueError(f"{name}: head_dim must be from 1 to {MAX_HEAD_DIM}, got {n}")


def _same(name: str, what: str, got: int, other: str, needed: int) -> None:
    if got != needed:
        raise ValueError(f"{name}: {what} must equal {other}'s, {needed}, got {got}")


def _dims(layout: str, rank: int) -> str:
    letters = "sd" if rank == 2 else layout[-rank:]
    return "(" + ", ".join(_AXIS_NAMES[letter] for letter in letters) + ")"


def place(device: int) -> str:
    return "host memory" if device < 0 else f"cuda:{device}"


# ------------------------------------------------------------------------------------------------ options
# The rules go by value (1 and np.True_ are True, 2.0 is 2): equal values share a cache entry.

_REAL = (int, float, np.integer, np.floating)


def _layout(layout: str) -> str:
    if not isinstance(layout, str) or layout not in ("bshd", "bhsd"):
        raise ValueError(f"layout must be 'bshd' or 'bhsd', got {layout!r}")
    return layout


def _window(
    window: int | tuple[int | None, int | None] | None, causal: bool, seqlen_q: int, seqlen_k: int
) -> tuple[int, int]:
    pair: Any = window if isinstance(window, tuple) else (window, window)
    if len(pair) != 2:
        raise ValueError(f"window must be an int, a pair (left, right) or None, got {len(pair)} entries")
    left, right = (UNBOUNDED if n is None else _bound(n) for n in pair)
    if causal:
        right = min(right, 0)
    # positions run from seqlen_k - seqlen_q to seqlen_k - 1, keys from 0 to seqlen_k - 1
    return (UNBOUNDED if left >= seqlen_k - 1 else left), (UNBOUNDED if right >= seqlen_q - 1 else right)


def _bound(n: Any) -> int:
    if not _whole(n):
        raise TypeError(f"window must be an int, a pair (left, right) of ints or None, got {_describe(n)}")
    if n < -1:
        raise ValueError(f"window must be >= 0 on each side, or -1 or None for no bound, got {n}")
    return UNBOUNDED if n == -1 else min(int(n), UNBOUNDED)


def _length(name: str, n: Any) -> int:
    if not _whole(n):
        raise TypeError(f"{name} must be an int, got {_describe(n)}")
    if not 0 <= n < UNBOUNDED:
        raise ValueError(f"{name} must be in [0, 2**30), got {n}")
    return int(n)


def _whole(n: Any) -> bool:
    return isinstance(n, (int, np.integer)) or (isinstance(n, _REAL) and math.isfinite(n) and int(n) == n)


def _finite(name: str, x: Any) -> float:
    if not isinstance(x, _REAL):
        raise TypeError(f"{name} must be a real number or None, got {_describe(x)}")
    try:
        number = float(x)
    except OverflowError:
        raise ValueError(f"{name} must be finite as a float, got a larger int") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {x}")
    return number


def _softcap(softcap: Any) -> float:
    if softcap is None:
        return 0.0
    cap = _finite("softcap", softcap)
    if cap <= 0:
        raise ValueError(f"softcap must be > 0, or None for no cap, got {softcap}")
    return cap


def _check_range(scale: float, softcap: float, dtype: str) -> None:
    """What is computed of them must be a number of this dtype, in which scores are computed.

    That is log2(e) times either of them, for powers of two, and with a cap c c * tanh(scale / c * x).
    """
    smallest, most = float(np.finfo(dtype).tiny), float(np.finfo(dtype).max) * math.log(2)
    for name, x in (("scale", scale), ("softcap", softcap)):
        if abs(x) > most:
            raise ValueError(f"{name} must be at most {most:.3g} in {dtype}, in which scores are computed, got {x}")
    if not softcap:
        return
    least, largest = max(smallest, abs(scale) / most), most
    if abs(scale) >= smallest:
        largest = min(most, abs(scale) / smallest)
    if not least <= softcap <= largest:
        raise ValueError(
            f"softcap must be from {least:.2g} to {largest:.2g}, for scale / softcap to be a number of {dtype}, "
            f"got {softcap}"
        )


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text}" if len(text) <= 40 and "\n" not in text else type(value).__name__
