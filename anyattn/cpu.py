"""FlashAttention-2 in NumPy: exact attention, forward and backward, in linear memory.

Tiles of the score matrix that fit a core's cache are made by matrix products and a few passes in place; the whole
matrix never exists (Dao, "FlashAttention-2", 2023, algorithms 1 and 2).

    forward, for a block of rows Q [m, D] of one head:      backward, for a block of rows Q, dO of one head:
        O, l, r <- 0                                            dQ <- 0
        for the tiles K, V of keys that some row sees:          for the tiles K, V of keys that some row sees:
            P <- exp(Q K^T - r)                                     P <- exp(Q K^T - LSE)
            l <- l + rowsum(P)                                      dS <- P o (dO V^T - rowsum(dO o O))
            O <- O + P V                                            dQ <- dQ + dS K
        O <- O / l;  LSE <- r + log(l)                              dK <- dK + dS^T Q
                                                                    dV <- dV + P^T dO

O / l and r + log(l) don't depend on r, so any r that keeps exp in range will do. Where |Q| |K| shows that no score
leaves that range, r stays 0; else it is the paper's running maximum, and l and O shrink as it rises. So it is, too,
where rows see few keys: the LSE of a single key is its score, which log(l) would give only to the precision of 1.

What the backward pass subtracts from a product (LSE, rowsum(dO o O)) is subtracted inside it: the left factor carries
its negative as one more column, the right factor a column of ones.

float16 and bfloat16 (as uint16 bit patterns) are widened tile by tile and computed in float32. With grouped queries
the query heads that share a K/V head stand below each other in one tile.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from anyattn.dropout import keep_mask
from anyattn.problem import UNBOUNDED, BackwardProblem, Problem

Array: TypeAlias = npt.NDArray[Any]

# The longest sides of a tile, and its scores (the backward pass keeps two arrays of half as many). That is more than a
# level-2 cache holds, and more than the products need; but the fewer steps, the less the threads wait for Python's
# interpreter lock. So several heads share a tile, as long as what is kept of each stays small.
_ROWS, _KEYS, _TILE = 512, 512, 1 << 19
_EDGE = 128  # rows of the tiles along a mask's edge
_HEADS, _BACKWARD_HEADS = 4, 2
_KEPT_BYTES = 1 << 24
_LARGEST_P = 2.0**32  # it and its inverse are far from the ends of float32 still, even when multiplied by V
_DROPOUT = 1 << 16  # entries of the mask that are drawn at once
_SMALL = 1 << 23  # multiply-adds below which a second thread does not pay


# --- entrances -------------------------------------------------------------------------------------------------------


def forward(
    problem: Problem,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    *,
    alibi: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    seed: int = 0,
) -> None:
    """Write attention's output and its log-sum-exp (natural logarithm; -inf for a row that sees no key).

    Args:
        problem: the validated call.
        q, k, v, out: (batch, heads, seqlen, dim), or (heads, total, dim) for packed sequences, with any strides;
            bfloat16 as uint16 bit patterns.
        lse: (batch, heads, seqlen_q) or (heads, total_q); float64 for float64, else float32.
        alibi: float32 slopes, (heads,) or (batch, heads).
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) offsets of the packed sequences.
        seed: of the dropout mask.
    """
    if lse.size == 0:
        return
    job = _Job(problem, seed, _thread_count(problem))
    groups = list(_groups(job, (q, out, lse), (k, v), alibi, cu_seqlens_q, cu_seqlens_k, _HEADS))
    # Long sequences are cut into four tasks a thread, so that a thread that ends early finds another one.
    parts = max(job.parts(len(groups)), min(4 * job.threads // len(groups), problem.seqlen_q // (4 * _ROWS)))
    _run([partial(_forward, job, group, part, parts) for group in groups for part in range(parts)], job)


def backward(
    bp: BackwardProblem,
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    dq: Array,
    dk: Array,
    dv: Array,
    *,
    alibi: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    seed: int = 0,
) -> None:
    """Write the gradients dq, dk and dv; bit for bit the same at every call with the same number of threads.

    Args:
        bp: the validated call.
        dout: the gradient of out. All arrays as in `forward`, out and lse as it wrote them.
        dq, dk, dv: as q, k, v.
        alibi, cu_seqlens_q, cu_seqlens_k, seed: as in `forward`.
    """
    problem = bp.problem
    if problem.heads_kv == 0:
        return
    job = _Job(problem, seed, _thread_count(problem))
    groups = list(
        _groups(job, (q, dout, out, lse, dq), (k, v, dk, dv), alibi, cu_seqlens_q, cu_seqlens_k, _BACKWARD_HEADS)
    )
    parts = max(1, min(job.parts(len(groups)), -(-problem.seqlen_q // _ROWS)))
    tasks: list[_Task] = []
    for group in groups:
        shares: list[_Share | None] = [None] * parts
        tasks += [partial(_backward, job, group, part, shares) for part in range(parts)]
    _run(tasks, job)


# --- what a call is made of ------------------------------------------------------------------------------------------


class _Band(NamedTuple):
    """Which keys the rows of one sequence see: p - left <= j <= p + right, where row i stands at p = i + offset."""

    left: int
    right: int
    seqlen_q: int
    seqlen_k: int
    shift: int = 0

    @property
    def offset(self) -> int:
        return self.seqlen_k - self.seqlen_q + self.shift

    @property
    def most_keys(self) -> int:
        """No row sees more."""
        return min(self.seqlen_k, self.left + self.right + 1)

    def keys(self, rows: range) -> range:
        """The keys that some of these rows see."""
        start = max(rows.start + self.offset - self.left, 0)
        return range(start, max(min(rows.stop + self.offset + self.right, self.seqlen_k), start))

    def common_keys(self, rows: range) -> range:
        """The keys that all of these rows see (empty where it stops before it starts)."""
        start = max(rows.stop - 1 + self.offset - self.left, 0)
        return range(start, min(rows.start + self.offset + self.right + 1, self.seqlen_k))

    def tiles(self, rows: range, longest: int) -> Iterator[tuple[range, range]]:
        """Cover what these rows see by (rows, keys): tall tiles where all see all keys, short ones at the edges."""
        seen, common = self.keys(rows), self.common_keys(rows)
        if len(rows) <= _EDGE:
            common = seen
        elif common != seen:  # leave narrow strips to the edges
            start, stop = -(-common.start // _EDGE) * _EDGE, common.stop // _EDGE * _EDGE
            common = range(start, stop) if start < stop else range(seen.stop, seen.stop)
        for keys in _evenly(common, longest):
            yield rows, keys
        if common != seen:
            for some in _evenly(rows, _EDGE):
                edge = self.keys(some)
                for part in (range(edge.start, min(common.start, edge.stop)), range(common.stop, edge.stop)):
                    for keys in _evenly(part, _KEYS):
                        yield some, keys

    def hide(self, tile: Array, rows: range, keys: range, value: float) -> bool:
        """Overwrite the entries of a (..., rows, keys) tile that are not visible; tell whether there may be any."""
        if min(self.left, self.right) >= UNBOUNDED:
            return False
        common = self.common_keys(rows)
        before = range(keys.start, min(keys.stop, common.start))
        after = range(max(keys.start, common.stop), keys.stop)
        for part in (before, after):
            if part:
                first = part.start - (rows.start + self.offset)
                hidden = _hidden(len(rows), len(part), first, self.left, self.right)
                np.copyto(tile[..., part.start - keys.start : part.stop - keys.start], value, where=hidden)
        return bool(before or after)


@lru_cache(maxsize=16)
def _hidden(rows: int, keys: int, first: int, left: int, right: int) -> npt.NDArray[np.bool_]:
    """Where |position - key| leaves the window, for rows at positions 0, 1, ... and keys first, first + 1, ..."""
    relative = np.arange(first, first + keys)[None, :] - np.arange(rows)[:, None]
    return (relative < -left) | (relative > right)


class _Group(NamedTuple):
    """Some K/V heads of some sequences of the same lengths, and the query heads that read them: one tile holds all."""

    sequence: int  # the first one
    head: int  # the first K/V head
    band: _Band
    by_query: list[Array]  # each (sequences, K/V heads, query heads of each, seqlen_q, ...)
    by_key: list[Array]  # each (sequences, K/V heads, seqlen_k, dim)
    slopes: Array | None  # (sequences, K/V heads, query heads of each), in units of the job


def _groups(
    job: _Job,
    by_query: tuple[Array, ...],
    by_key: tuple[Array, ...],
    alibi: Array | None,
    cu_seqlens_q: Array | None,
    cu_seqlens_k: Array | None,
    heads_at_once: int,
) -> Iterator[_Group]:
    """Cut a call into groups of about `heads_at_once` K/V heads."""
    problem = job.problem
    slopes = None
    if alibi is not None:
        slopes = np.broadcast_to(alibi * job.unit, (problem.batch, problem.heads))
        slopes = slopes.reshape(problem.batch, problem.heads_kv, job.members)

    def cut(first: int, queries: list[Array], keys: list[Array]) -> Iterator[_Group]:
        queries = [x.reshape(len(x), problem.heads_kv, job.members, *x.shape[2:]) for x in queries]
        band = _Band(problem.left, problem.right, queries[0].shape[3], keys[0].shape[2], problem.shift)
        at_once = job.heads_at_once(band, heads_at_once)
        for n in _pieces(len(queries[0]), at_once // problem.heads_kv):
            for h in _pieces(problem.heads_kv, at_once):
                here = None if slopes is None else slopes[first + n.start : first + n.stop, h]
                yield _Group(first + n.start, h.start, band, [x[n, h] for x in queries], [x[n, h] for x in keys], here)

    if cu_seqlens_q is None or cu_seqlens_k is None:
        yield from cut(0, list(by_query), list(by_key))
    else:
        for b in range(problem.batch):
            i, j = (slice(int(cu[b]), int(cu[b + 1])) for cu in (cu_seqlens_q, cu_seqlens_k))
            yield from cut(b, [x[None, :, i] for x in by_query], [x[None, :, j] for x in by_key])


class _Workspace:
    """One thread's scratch arrays, kept from tile to tile and, small ones, from call to call.

    Fresh memory costs a page fault per 4 KiB: with two threads 30% of a call with 512 rows.
    """

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self._dtype = dtype
        self._arrays: dict[str, Array] = {}

    def __call__(self, name: str, *shape: int) -> Array:
        """An uninitialised C-contiguous array, which lives until the same name is asked for again."""
        size = math.prod(shape)
        array = self._arrays.get(name)
        if array is None or array.size < size:
            array = self._arrays[name] = np.empty(size, self._dtype)
        return array[:size].reshape(shape)

    def trim(self) -> None:
        """Give back what is larger than a tile of scores."""
        self._arrays = {name: array for name, array in self._arrays.items() if array.size <= _TILE}


_kept = threading.local()


def _workspace(dtype: np.dtype[Any]) -> _Workspace:
    """This thread's."""
    workspace: _Workspace = vars(_kept).setdefault(dtype.name, _Workspace(dtype))
    return workspace


_Task: TypeAlias = Callable[[_Workspace], None]


class _Job:
    """What every tile of a call has in common."""

    def __init__(self, problem: Problem, seed: int, threads: int) -> None:
        self.problem = problem
        self.seed = seed
        self.threads = threads
        self.lock = threading.Lock()
        self.compute = np.dtype(np.float64 if problem.dtype == "float64" else np.float32)
        self.members = problem.heads // problem.heads_kv  # query heads of each K/V head
        # exp runs in base 2 where that is faster: every score is multiplied by `unit`, whatever it is made of.
        base_2 = self.compute == np.float32 and _exp2_is_faster()
        self.exp: np.ufunc = np.exp2 if base_2 else np.exp
        self.log: np.ufunc = np.log2 if base_2 else np.log
        self.unit = math.log2(math.e) if base_2 else 1.0
        self.softcap = problem.softcap * self.unit
        self.gain = problem.scale / problem.softcap if problem.softcap else problem.scale * self.unit
        self.kept = 1.0 / (1.0 - problem.dropout)  # the weight of what dropout keeps

    def heads_at_once(self, band: _Band, most: int) -> int:
        """K/V heads in one tile: `most` or, of short sequences, more, but no fewer tasks than threads."""
        problem = self.problem
        scores = max(self.members * min(band.seqlen_q, _ROWS) * min(band.seqlen_k, _KEYS), 1)
        kept = (problem.head_dim + problem.head_dim_v) * max(band.seqlen_k, 1) * self.compute.itemsize
        share = -(-problem.heads_kv * problem.batch // self.threads)
        return max(min(max(_TILE // scores, most), _KEPT_BYTES // kept, share), 1)

    def members_at_once(self, rows: range) -> list[slice]:
        """The query heads of a K/V head that stand below each other in a tile; more than one only in short blocks."""
        return _pieces(self.members, _ROWS // len(rows) if len(rows) <= _EDGE else 1)

    def parts(self, groups: int) -> int:
        """Into how many parts to cut the work of each group of heads, for every thread to have a share."""
        return 1 if groups >= 4 * self.threads or not groups else self.threads // math.gcd(groups, self.threads)


class _Tile(NamedTuple):
    """Some query heads, rows and keys of a group. Its arrays are (K/V heads of all sequences, members, rows, keys)."""

    job: _Job
    group: _Group
    members: slice  # query heads of each K/V head
    rows: range
    keys: range

    def finish_scores(self, s: Array, ws: _Workspace, tanh: Array | None = None) -> bool:
        """Turn products of scaled Q and K into scores, -inf where hidden; tell whether anything may be hidden.

        Args:
            s: the products, overwritten. Without softcap something may be subtracted from them already.
            ws: scratch.
            tanh: if given, receives tanh(x / softcap), which the derivative needs.
        """
        if self.job.softcap:
            np.tanh(s, out=s)
            if tanh is not None:
                np.copyto(tanh, s)
            s *= self.job.softcap
        if self.group.slopes is not None:
            position = np.arange(self.rows.start, self.rows.stop)[:, None] + self.group.band.offset
            distance = np.abs(position - np.arange(self.keys.start, self.keys.stop)).astype(s.dtype)
            slopes = self.group.slopes[:, :, self.members].reshape(*s.shape[:2], 1, 1)
            s -= np.multiply(slopes, distance, out=ws("bias", *s.shape))
        return self.hide(s, -np.inf)

    def hide(self, x: Array, value: float) -> bool:
        """Overwrite what is not visible; tell whether there may be any."""
        return self.group.band.hide(x, self.rows, self.keys, value)

    def kept(self) -> npt.NDArray[np.bool_] | None:
        """What dropout keeps; None when there is no dropout."""
        job, group = self.job, self.group
        if not job.problem.dropout:
            return None
        sequences, heads = group.by_key[0].shape[:2]
        first, first_head, first_row = job.problem.origin
        rows = range(first_row + self.rows.start, first_row + self.rows.stop)
        sequence = first + group.sequence + np.arange(sequences)[:, None, None]
        members = np.arange(job.members)[self.members]
        head = first_head + (group.head + np.arange(heads)[:, None]) * job.members + members
        sequence, head = (x.reshape(-1) for x in np.broadcast_arrays(sequence, head))
        keep = np.empty((sequences * heads * len(members), len(self.rows), len(self.keys)), np.bool_)
        # Many short heads at a time: a call for each would take longer than its numbers.
        for some in _pieces(len(keep), _DROPOUT // ((len(rows) + 15) * (len(self.keys) + 15))):
            keep[some] = keep_mask(job.seed, job.problem.dropout, sequence[some], head[some], rows, self.keys)
        return keep.reshape(-1, len(members), *keep.shape[1:])

    def visible(self) -> Iterator[tuple[int, slice]]:
        """For each row, its index and the keys it sees, counted inside the tile."""
        for index, row in enumerate(self.rows):
            keys = self.group.band.keys(range(row, row + 1))
            start = max(keys.start, self.keys.start)
            yield index, slice(start - self.keys.start, max(min(keys.stop, self.keys.stop), start) - self.keys.start)


# --- forward ---------------------------------------------------------------------------------------------------------


def _forward(job: _Job, group: _Group, part: int, parts: int, ws: _Workspace) -> None:
    """Attention of each `parts`-th block of a group's rows."""
    band = group.band
    blocks = _evenly(range(band.seqlen_q), _ROWS)[part::parts]
    if not blocks:
        return
    seen = band.keys(range(blocks[0].start, blocks[-1].stop))
    k_rows = _readable("k", group.by_key[0][:, :, seen.start : seen.stop], group, ws)
    k_norm = _largest_norm(k_rows)
    for rows in blocks:
        for members in job.members_at_once(rows):
            _forward_block(job, group, members, rows, k_rows, k_norm, seen.start, ws)


def _forward_block(
    job: _Job,
    group: _Group,
    members: slice,
    rows: range,
    k_rows: Array,  # [K/V heads, keys from first_key on, D]
    k_norm: float,
    first_key: int,
    ws: _Workspace,
) -> None:
    q, out, lse = (x[:, :, members, rows.start : rows.stop] for x in group.by_query)
    v = group.by_key[1]
    count, (taken, height, head_dim), head_dim_v = len(k_rows), q.shape[2:], v.shape[3]

    q_tile = ws("q", count, taken, height, head_dim)
    widen(q, _unfold(q_tile, group), job.gain)
    r = np.zeros((count, taken, height), job.compute)
    bound = job.softcap or _largest_norm(q_tile) * k_norm
    in_range = bound <= job.log(_LARGEST_P) and group.slopes is None and group.band.most_keys >= _EDGE
    if not in_range:  # or NaN
        r[...] = np.finfo(r.dtype).min / 2  # not -inf: it may be subtracted from -inf
    total = np.zeros_like(r)
    o = ws("o", count, taken, height, head_dim_v)
    o[...] = 0.0

    ones = np.ones(_KEYS, o.dtype)
    for some, keys in group.band.tiles(rows, min(_TILE // (count * taken * height), _KEYS)):
        tile = _Tile(job, group, members, some, keys)
        here = slice(some.start - rows.start, some.stop - rows.start)
        flat = count, taken * len(some), -1  # the rows of the members, below each other
        p = ws("p", count, taken, len(some), len(keys))
        p_flat, q_flat = p.reshape(flat), q_tile[:, :, here].reshape(flat)
        k_tile = k_rows[:, keys.start - first_key : keys.stop - first_key]
        v_tile = _readable("v", v[:, :, keys.start : keys.stop], group, ws)

        np.matmul(q_flat, k_tile.swapaxes(1, 2), out=p_flat)
        masked = tile.finish_scores(p, ws)
        if not in_range:
            highest = np.maximum(r[:, :, here], p.max(axis=-1))
            p -= highest[..., None]
            fall = job.exp(r[:, :, here] - highest)
            total[:, :, here] *= fall
            o[:, :, here] *= fall[..., None]
            r[:, :, here] = highest
        job.exp(p, out=p)
        total[:, :, here] += (p_flat @ ones[: len(keys)]).reshape(p.shape[:-1])

        keep = tile.kept()
        if keep is not None:
            p *= keep
        pv = ws("pv", count, taken, len(some), head_dim_v)
        np.matmul(p_flat, v_tile, out=pv.reshape(flat))
        if masked and not np.isfinite(pv).all():  # 0 * inf: the products again, of what each row sees
            for i, j in tile.visible():
                pv[:, :, i] = p[:, :, i, j] @ v_tile[:, j]
        o[:, :, here] += pv

    lse[...] = _unfold((r + job.log(total).astype(np.float64)) / job.unit, group)
    total[total == 0.0] = 1.0  # rows that see nothing: 0 / 1
    o /= total[..., None]
    if job.problem.dropout:
        o *= job.kept
    narrow(_unfold(o, group), out)


def _readable(name: str, x: Array, group: _Group, ws: _Workspace) -> Array:
    """Rows of K or V as a product reads them, [K/V heads of all sequences, keys, D]: as they are, or widened."""
    if len(x) == 1 and x.dtype in (np.float32, np.float64) and x.strides[3] == x.itemsize:
        rows: Array = x[0]
        return rows
    tile = ws(name, x.shape[0] * x.shape[1], *x.shape[2:])
    widen(x, _unfold(tile, group))
    return tile


def _largest_norm(x: Array) -> float:
    """Of all rows, the largest Euclidean norm."""
    return float(np.sqrt(np.einsum("...d,...d->...", x, x).max(initial=0.0)))


# --- backward --------------------------------------------------------------------------------------------------------

_Share: TypeAlias = tuple[Array, Array]  # of dK and dV


def _backward(job: _Job, group: _Group, part: int, shares: list[_Share | None], ws: _Workspace) -> None:
    """dQ of each `len(shares)`-th block of a group's rows, and its share of dK and dV.

    The part that ends last adds up the shares, in their order, so that no sum depends on the threads' timing.
    """
    dk, dv = group.by_key[2:]
    if part == 0 and dk.dtype == job.compute:
        dk_sum, dv_sum = dk, dv
    elif len(shares) > 1:
        dk_sum, dv_sum = np.empty(dk.shape, job.compute), np.empty(dv.shape, job.compute)
    else:
        dk_sum, dv_sum = ws("dk_sum", *dk.shape), ws("dv_sum", *dv.shape)
    dk_sum[...] = dv_sum[...] = 0.0

    for rows in _evenly(range(group.band.seqlen_q), _ROWS)[part :: len(shares)]:
        for members in job.members_at_once(rows):
            _backward_block(job, group, members, rows, dk_sum, dv_sum, ws)

    with job.lock:
        shares[part] = dk_sum, dv_sum
        complete = [share for share in shares if share]
    if len(complete) == len(shares):
        shares.clear()
        for dk_share, dv_share in complete[1:]:
            np.add(complete[0][0], dk_share, out=complete[0][0])
            np.add(complete[0][1], dv_share, out=complete[0][1])
        if complete[0][0] is not dk:
            narrow(complete[0][0], dk)
            narrow(complete[0][1], dv)


def _backward_block(
    job: _Job,
    group: _Group,
    members: slice,
    rows: range,
    dk_sum: Array,  # [sequences, K/V heads, S_k, D]
    dv_sum: Array,  # [sequences, K/V heads, S_k, D_v]
    ws: _Workspace,
) -> None:
    problem = job.problem
    q, dout, out, lse, dq = (x[:, :, members, rows.start : rows.stop] for x in group.by_query)
    k, v = group.by_key[:2]
    count, (taken, height, head_dim), head_dim_v = k.shape[0] * k.shape[1], q.shape[2:], v.shape[3]

    q_tile, dout_tile = ws("q", count, taken, height, head_dim + 1), ws("dout", count, taken, height, head_dim_v + 1)
    out_tile, dq_sum = ws("out", count, taken, height, head_dim_v), ws("dq_sum", count, taken, height, head_dim)
    widen(q, _unfold(q_tile[..., :-1], group), job.gain)
    widen(dout, _unfold(dout_tile[..., :-1], group))
    widen(out, _unfold(out_tile, group))
    dots = np.einsum("hmid,hmid->hmi", dout_tile[..., :-1], out_tile)
    # A row of LSE -inf sees no key: any finite value will do.
    lse = np.where(lse == -np.inf, 0.0, lse).reshape(count, taken, height)
    shift = np.multiply(lse, job.unit, dtype=np.float64).astype(job.compute)
    q_tile[..., -1] = 0.0 if problem.softcap else -shift
    dout_tile[..., -1] = 0.0 if problem.dropout else -dots
    dq_sum[...] = 0.0

    for some, keys in group.band.tiles(rows, min(_TILE // 2 // (count * taken * height), _KEYS)):
        tile = _Tile(job, group, members, some, keys)
        here = slice(some.start - rows.start, some.stop - rows.start)
        flat = count, taken * len(some), -1  # the rows of the members, below each other
        q_flat, dout_flat = q_tile[:, :, here].reshape(flat), dout_tile[:, :, here].reshape(flat)
        k_tile, v_tile = ws("k", count, len(keys), head_dim + 1), ws("v", count, len(keys), head_dim_v + 1)
        widen(k[:, :, keys.start : keys.stop], _unfold(k_tile[..., :-1], group))
        widen(v[:, :, keys.start : keys.stop], _unfold(v_tile[..., :-1], group))
        k_tile[..., -1] = v_tile[..., -1] = 1.0

        p, ds = (ws(name, count, taken, len(some), len(keys)) for name in ("p", "ds"))
        p_flat, ds_flat = p.reshape(flat), ds.reshape(flat)
        tanh = ws("tanh", *p.shape) if problem.softcap else None
        np.matmul(q_flat, k_tile.swapaxes(1, 2), out=p_flat)
        masked = tile.finish_scores(p, ws, tanh)
        if tanh is not None:
            p -= shift[:, :, here, None]
        job.exp(p, out=p)

        np.matmul(dout_flat, v_tile.swapaxes(1, 2), out=ds_flat)
        keep = tile.kept()
        if keep is not None:
            ds *= keep
            ds *= job.kept
            ds -= dots[:, :, here, None]
        ds *= p
        if tanh is not None:
            np.multiply(tanh, tanh, out=tanh)
            ds *= np.subtract(1.0, tanh, out=tanh)
        if masked:
            tile.hide(ds, 0.0)
        if keep is not None:
            p *= keep

        dq_tile = ws("dq", count, taken, len(some), head_dim)
        dk_tile, dv_tile = ws("dk", count, len(keys), head_dim), ws("dv", count, len(keys), head_dim_v)
        np.matmul(ds_flat, k_tile[..., :-1], out=dq_tile.reshape(flat))
        np.matmul(ds_flat.swapaxes(1, 2), q_flat[..., :-1], out=dk_tile)
        np.matmul(p_flat.swapaxes(1, 2), dout_flat[..., :-1], out=dv_tile)
        if masked and not all(np.isfinite(x).all() for x in (dq_tile, dk_tile, dv_tile)):
            # 0 * inf: the products again, of what each row sees
            dk_tile[...] = dv_tile[...] = 0.0
            for i, j in tile.visible():
                dq_tile[:, :, i] = ds[:, :, i, j] @ k_tile[:, j, :-1]
                dk_tile[:, j] += ds[:, :, i, j].swapaxes(1, 2) @ q_tile[:, :, here.start + i, :-1]
                dv_tile[:, j] += p[:, :, i, j].swapaxes(1, 2) @ dout_tile[:, :, here.start + i, :-1]
        dq_sum[:, :, here] += dq_tile
        dk_tile *= problem.softcap or 1.0 / job.unit  # scale / gain
        dk_sum[:, :, keys.start : keys.stop] += _unfold(dk_tile, group)
        if keep is not None:
            dv_tile *= job.kept
        dv_sum[:, :, keys.start : keys.stop] += _unfold(dv_tile, group)

    dq_sum *= problem.scale
    narrow(_unfold(dq_sum, group), dq)


# --- pieces ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _evenly(whole: range, longest: int) -> tuple[range, ...]:
    """Cut a range into the fewest pieces of at most `longest`, about equal, starting at multiples of 16."""
    count = -(-len(whole) // max(longest, 16))
    length = -(-len(whole) // (16 * max(count, 1))) * 16
    return tuple(range(start, min(start + length, whole.stop)) for start in whole[:: max(length, 1)])


def _unfold(x: Array, group: _Group) -> Array:
    """Split the first dimension of a tile's array into (sequences, K/V heads); a view."""
    return x.reshape(*group.by_key[0].shape[:2], *x.shape[1:])


def _pieces(total: int, length: int) -> list[slice]:
    """Cut a dimension into pieces of this length (of 1 at least)."""
    return [slice(start, min(start + max(length, 1), total)) for start in range(0, total, max(length, 1))]


def widen(x: Array, out: Array, gain: float = 1.0) -> None:
    """Write gain * x into a float32 or float64 array; uint16 holds bfloat16, the upper half of a float32."""
    if x.dtype == np.uint16:
        bits = out.view(np.uint32)
        bits[...] = x
        bits <<= 16
        x = out
    if gain != 1.0:
        np.multiply(x, gain, out=out, dtype=out.dtype)
    elif x is not out:
        out[...] = x


def narrow(x: Array, out: Array) -> None:
    """Copy from a float32 or float64 array, rounding to the nearest, ties to even."""
    if out.dtype == np.uint16:
        bits = x.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        out[...] = np.where(np.isnan(x), 0x7FC0, rounded)  # rounding could turn a NaN's payload into infinity
    else:
        out[...] = x


@lru_cache
def _exp2_is_faster() -> bool:
    """Whether NumPy's float32 exp2 is vectorised: with AVX-512 on Linux. exp is, with much less."""
    found = np.show_config(mode="dicts").get("SIMD Extensions", {})
    return sys.platform == "linux" and not {"AVX512_SKX", "X86_V4"}.isdisjoint(found.get("found", ()))


# --- threads ---------------------------------------------------------------------------------------------------------


def _thread_count(problem: Problem) -> int:
    """Threads for this call: $ANYATTN_THREADS, else $OMP_NUM_THREADS, else the cores this process may use.

    One where NumPy has no OpenBLAS: then its own threads do the work.
    """
    chosen = os.environ.get("ANYATTN_THREADS")
    if chosen and not (chosen.isdecimal() and int(chosen)):
        raise ValueError(f"ANYATTN_THREADS must be a number of threads from 1 on, got {chosen!r}")
    rows = problem.total_q or problem.batch * problem.seqlen_q
    scores = problem.heads * rows * min(problem.seqlen_k, problem.left + problem.right + 1)
    if scores * (problem.head_dim + problem.head_dim_v) < _SMALL or _openblas() is None:
        return 1
    if chosen:
        return int(chosen)
    value = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # one for each level of nesting
    if value.isdecimal() and int(value) > 0:
        return int(value)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _run(tasks: list[_Task], job: _Job) -> None:
    """Run the tasks on the job's threads, this one among them; the last tasks first."""
    with _one_blas_thread():

        def work() -> None:
            ws = _workspace(job.compute)
            try:
                with np.errstate(all="ignore"):  # overflow, 0 * inf and log(0) are expected and handled
                    while tasks:
                        try:
                            task = tasks.pop()
                        except IndexError:  # another thread took it
                            return
                        task(ws)
            finally:
                ws.trim()

        helpers: list[Future[None]] = []
        with suppress(RuntimeError):  # at the interpreter's end there are no new threads: this one does it all
            for _ in range(min(job.threads, len(tasks)) - 1):
                helpers.append(_pool(job.threads).submit(work))
        try:
            work()
        finally:
            tasks.clear()
            wait(helpers)  # all of them, also where one has raised: they write to the results
            for helper in helpers:
                helper.result()


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="anyattn")


class _OpenBLAS(NamedTuple):
    get_threads: Callable[[], int]
    set_threads: Callable[[int], None]


@lru_cache
def _openblas() -> _OpenBLAS | None:
    """The thread controls of the OpenBLAS that NumPy uses; None when it uses another library."""
    package = Path(np.__file__).parent
    paths = [*package.parent.glob("numpy.libs/*openblas*"), *package.glob(".dylibs/*openblas*")]
    extension = importlib.util.find_spec("numpy.linalg._umath_linalg")
    if extension and extension.origin:
        paths.append(Path(extension.origin))  # on Linux and macOS its dependencies' symbols are found through it
    for path in paths:
        try:
            library = ctypes.CDLL(str(path))
        except OSError:
            continue
        for prefix in ("scipy_", ""):
            for suffix in ("64_", "_64", ""):
                get = getattr(library, f"{prefix}openblas_get_num_threads{suffix}", None)
                set_ = getattr(library, f"{prefix}openblas_set_num_threads{suffix}", None)
                if get and set_:
                    set_.restype = None
                    return _OpenBLAS(get, set_)
    return None


_blas_lock = threading.Lock()
_blas_users = 0
_blas_threads = 1


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """Keep BLAS from starting threads of its own below ours; the last call to end restores its setting."""
    global _blas_users, _blas_threads
    blas = _openblas()
    if blas is None:
        yield
        return
    with _blas_lock:
        if _blas_users == 0:
            _blas_threads = blas.get_threads()
            blas.set_threads(1)
        _blas_users += 1
    try:
        yield
    finally:
        with _blas_lock:
            _blas_users -= 1
            if _blas_users == 0:
                blas.set_threads(_blas_threads)


def _after_fork() -> None:
    """A child process has none of its parent's threads, and none of the calls they were in."""
    global _blas_lock, _blas_users
    _pool.cache_clear()
    _blas_lock = threading.Lock()
    if _blas_users and (blas := _openblas()):
        blas.set_threads(_blas_threads)
    _blas_users = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
