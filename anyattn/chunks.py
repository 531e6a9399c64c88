"""Which parts of a call on host arrays go through a GPU one after another, so that each fits in a share of its memory.

Whole sequences where they fit, then some of a sequence's K/V heads with the query heads that share them, then some of
the rows of one K/V head. Pure Python: no GPU is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from anyattn.problem import ITEMSIZE, Problem, packed

__all__ = ["Part", "parts"]

_ROWS = 128  # rows are cut at multiples of this; no tile is longer
_PAD = 128  # what a kernel's workspace pads head dims to, at the most
_IN_FLIGHT = 2  # parts on the GPU at a time: one is copied while another is computed
# Bytes of a part: enough to fill a GPU and to copy at full speed, and of a small call an eighth, so that most of it is
# copied beside kernels.
_LARGE, _SMALL, _SHARE = 64 << 20, 8 << 20, 8


@dataclass(frozen=True)
class Part:
    """A part of a call, and the call that it is by itself."""

    problem: Problem  # on contiguous copies of its arrays
    sequences: slice
    batch: slice  # of the arrays; packed ones count as one batch entry
    heads: slice  # query heads
    heads_kv: slice
    rows: slice  # of q, out and lse; of all packed rows where the whole call is packed
    keys: slice
    last: bool  # whether it holds the last rows of its sequences: dk and dv are sums up to such a part


def parts(problem: Problem, device: int, lengths: Sequence[tuple[int, int]], memory: int, backward: bool) -> list[Part]:
    """Cut a call into parts.

    Args:
        problem: the call on host arrays.
        device: the CUDA ordinal its parts run on.
        lengths: (rows, keys) of each sequence; of each batch entry where they are dense.
        memory: bytes of GPU memory that may be used.
        backward: whether gradients are computed.

    Raises MemoryError where the keys of one head and `_ROWS` rows don't fit.
    """
    return [*_parts(problem, device, lengths, memory, backward)] if problem.heads_kv else []


def _parts(
    problem: Problem, device: int, lengths: Sequence[tuple[int, int]], memory: int, backward: bool
) -> Iterator[Part]:
    of_row, of_key = _bytes(problem, backward)
    sizes = np.array(lengths, np.int64).reshape(-1, 2)
    starts = np.concatenate([np.zeros((1, 2), np.int64), sizes.cumsum(axis=0)])
    # A workspace has room for one block of rows more in each sequence.
    costs = [int(c) for c in problem.heads_kv * ((sizes[:, 0] + 2 * _ROWS) * of_row + sizes[:, 1] * of_key)]
    largest = memory // _IN_FLIGHT
    wanted = min(largest, _LARGE, max(sum(costs) // _SHARE, _SMALL))

    def part(sequences: range, heads_kv: range, rows: range | None = None) -> Part:
        group = problem.heads // problem.heads_kv
        heads = range(heads_kv.start * group, heads_kv.stop * group)
        first, end = starts[sequences.start].tolist(), starts[sequences.stop].tolist()
        seqlen_q, seqlen_k = sizes[sequences.start : sequences.stop].max(axis=0).tolist()
        packed_part = problem.varlen and rows is None
        if not problem.varlen:
            first, end = [0, 0], [seqlen_q, seqlen_k]
        all_rows = range(first[0], end[0]) if rows is None else range(first[0] + rows.start, first[0] + rows.stop)
        keys = range(first[1], end[1])
        alone = replace(
            problem,
            batch=len(sequences),
            heads=len(heads),
            heads_kv=len(heads_kv),
            seqlen_q=seqlen_q if rows is None else len(rows),
            seqlen_k=seqlen_k,
            varlen=packed_part,
            total_q=len(all_rows) if packed_part else 0,
            total_k=len(keys) if packed_part else 0,
            shift=0 if rows is None else rows.stop - seqlen_q,
            origin=(sequences.start, heads.start, 0 if rows is None else rows.start) if problem.dropout else (0, 0, 0),
        )
        return Part(
            packed(alone, device),
            sequences=_slice(sequences),
            batch=slice(0, 1) if problem.varlen else _slice(sequences),
            heads=_slice(heads),
            heads_kv=_slice(heads_kv),
            rows=_slice(all_rows),
            keys=_slice(keys),
            last=rows is None or rows.stop == seqlen_q,
        )

    for sequences in _together(costs, wanted):
        cost = sum(costs[sequences.start : sequences.stop])
        if cost <= wanted or len(sequences) > 1:
            yield part(sequences, range(problem.heads_kv))
            continue
        each = cost // problem.heads_kv
        for heads_kv in _evenly(range(problem.heads_kv), max(1, wanted // each)):
            if each <= largest:
                yield part(sequences, heads_kv)
                continue
            seqlen_q, seqlen_k = map(int, sizes[sequences.start])
            fit = (largest - seqlen_k * of_key) // of_row // _ROWS * _ROWS - 2 * _ROWS
            if fit < _ROWS:
                raise MemoryError(
                    f"the keys of one head and {_ROWS} rows need {_IN_FLIGHT} x "
                    f"{seqlen_k * of_key + 3 * _ROWS * of_row} bytes of GPU memory, {memory} are free"
                )
            for rows in _evenly(range(seqlen_q), fit, _ROWS):
                yield part(sequences, heads_kv, rows)


def _slice(x: range) -> slice:
    return slice(x.start, x.stop)


def _bytes(problem: Problem, backward: bool) -> tuple[int, int]:
    """GPU memory for a row of all the query heads of a K/V head, and for one of its keys; never too little.

    But for what lies beside: the parts of O where thread blocks share keys, some tens of MiB at the most.
    """
    group, columns = problem.heads // problem.heads_kv, problem.head_dim + problem.head_dim_v
    accum, arrays = ITEMSIZE[problem.lse_dtype], 2 if backward else 1  # gradients are as large as what they are of
    row = arrays * columns * problem.itemsize + accum
    if backward:  # delta, and dQ's accumulator
        row += accum * (1 + -(-problem.head_dim // _PAD) * _PAD)
    return group * row, arrays * columns * problem.itemsize


def _together(costs: Sequence[int], limit: int) -> Iterator[range]:
    """Cut a sequence where the sum of its costs would exceed the limit; each piece has one item at least."""
    first, total = 0, 0
    for i, cost in enumerate(costs):
        if i > first and total + cost > limit:
            yield range(first, i)
            first, total = i, 0
        total += cost
    if first < len(costs):
        yield range(first, len(costs))


def _evenly(whole: range, longest: int, multiple: int = 1) -> Iterator[range]:
    """Cut a range into the fewest pieces of at most `longest`, about equal, at multiples of `multiple`."""
    pieces = -(-len(whole) // longest)
    length = -(-len(whole) // (pieces * multiple)) * multiple
    for start in range(whole.start, whole.stop, length):
        yield range(start, min(start + length, whole.stop))
