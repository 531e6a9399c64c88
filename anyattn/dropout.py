"""The dropout mask every backend shares: a pure function of (seed, batch, head, row, column).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is keyed by the seed and counts
positions, so any tiling, on any device, forward or backward, regenerates the same mask. One call yields four 32-bit
words; they serve the positions (row, column), (row, column + 8), (row + 8, column), (row + 8, column + 8), which is
what one thread of a tensor-core accumulator holds.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

UInt64s: TypeAlias = npt.NDArray[np.uint64]

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
_LOW, _HIGH = np.uint64(_WORD), np.uint64(32)


def philox(counter: tuple[UInt64s, UInt64s, UInt64s, UInt64s], key: tuple[int, int]) -> tuple[UInt64s, ...]:
    """Return the four words of Philox4x32-10 for each counter; words are 32-bit values held in uint64 arrays.

    The arrays of `counter` broadcast together, and parts that do not vary stay small until they are mixed.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (product1 >> _HIGH) ^ c1 ^ np.uint64(k0), product1 & _LOW
        c2, c3 = (product0 >> _HIGH) ^ c3 ^ np.uint64(k1), product0 & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def keep_mask(
    seed: int,
    p: float,
    batch: int | npt.NDArray[np.integer[Any]],
    head: int | npt.NDArray[np.integer[Any]],
    rows: range,
    columns: range,
) -> npt.NDArray[np.bool_]:
    """Return which entries of a head's probability matrix, or of several heads', survive dropout.

    Args:
        seed: 64-bit seed of the call.
        p: probability of dropping an entry, in [0, 1); survivors are to be scaled by 1 / (1 - p).
        batch: index of the sequence in the batch; one, or an array of them.
        head: index of the query head; one, or an array of them that broadcasts with `batch`.
        rows: query positions inside the sequence (step 1).
        columns: key positions inside the sequence (step 1).

    Returns:
        A (..., len(rows), len(columns)) array, True where the entry is kept.
    """
    batches, heads = np.asarray(batch, np.uint64), np.asarray(head, np.uint64)
    several = np.broadcast_shapes(batches.shape, heads.shape)
    first_row, first_column = rows.start & ~15, columns.start & ~15
    row_tiles, column_tiles = -(-(rows.stop - first_row) // 16), -(-(columns.stop - first_column) // 16)

    def low_halves(start: int, tiles: int) -> UInt64s:  # the positions whose bit 3 is clear: 0..7, 16..23, ...
        tile, offset = np.arange(tiles, dtype=np.uint64)[:, None], np.arange(8, dtype=np.uint64)
        return (start + 16 * tile + offset).reshape(-1)

    words = philox(
        (
            low_halves(first_row, row_tiles)[:, None],
            low_halves(first_column, column_tiles)[None, :],
            heads[..., None, None],
            batches[..., None, None],
        ),
        (seed & _WORD, (seed >> 32) & _WORD),
    )
    keep = np.empty((*several, row_tiles, 2, 8, column_tiles, 2, 8), np.bool_)
    threshold = int(p * 2.0**32)
    for index, word in enumerate(words):
        half = (word >= threshold).reshape(*several, row_tiles, 8, column_tiles, 8)
        keep[..., :, index >> 1, :, :, index & 1, :] = half
    mask = keep.reshape(*several, 16 * row_tiles, 16 * column_tiles)
    here = slice(rows.start - first_row, rows.stop - first_row)
    return mask[..., here, columns.start - first_column : columns.stop - first_column]
