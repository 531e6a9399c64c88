"""The dropout mask: Philox against its published vectors, and independence of the tiling."""

from __future__ import annotations

import numpy as np
import pytest

from anyattn.dropout import keep_mask, philox

# The known answers of Random123 (kat_vectors, philox4x32 10): counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, int, int, int]
) -> None:
    c0, c1, c2, c3 = (np.array([c], np.uint64) for c in counter)
    assert tuple(int(word[0]) for word in philox((c0, c1, c2, c3), key)) == words


def test_each_position_reads_its_own_word() -> None:
    seed, batch, head, p = 0x0123456789ABCDEF, 3, 5, 0.5
    mask = keep_mask(seed, p, batch, head, range(40), range(40))
    for row, column in [(0, 0), (7, 8), (8, 7), (15, 15), (16, 31), (39, 33)]:
        c0, c1, c2, c3 = (np.array([c], np.uint64) for c in (row & ~8, column & ~8, head, batch))
        words = philox((c0, c1, c2, c3), (0x89ABCDEF, 0x01234567))
        word = int(words[2 * ((row >> 3) & 1) + ((column >> 3) & 1)][0])
        assert mask[row, column] == (word >= 2**31)


@pytest.mark.parametrize("block", [1, 5, 8, 16, 23])
def test_any_tiling_gives_the_same_mask(block: int) -> None:
    whole = keep_mask(7, 0.3, 1, 2, range(60), range(70))
    for i in range(0, 60, block):
        for j in range(0, 70, block):
            rows, columns = range(i, min(i + block, 60)), range(j, min(j + block, 70))
            assert np.array_equal(keep_mask(7, 0.3, 1, 2, rows, columns), whole[i : i + block, j : j + block])


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_rate(p: float) -> None:
    n = 512
    dropped = 1.0 - keep_mask(11, p, 0, 0, range(n), range(n)).mean()
    assert abs(dropped - p) <= 5 * np.sqrt(p * (1 - p)) / n  # five standard deviations


def test_masks_of_other_heads_batches_and_seeds_are_unrelated() -> None:
    def mask(seed: int, batch: int, head: int) -> np.ndarray:
        return keep_mask(seed, 0.5, batch, head, range(256), range(256))

    masks = [mask(1, 0, 0), mask(2, 0, 0), mask(1 << 32, 0, 0), mask(1, 1, 0), mask(1, 0, 1)]
    for i, first in enumerate(masks):
        for second in masks[:i]:
            assert abs((first == second).mean() - 0.5) < 0.01


def test_empty() -> None:
    assert keep_mask(1, 0.5, 0, 0, range(0), range(3)).shape == (0, 3)
    assert keep_mask(1, 0.5, 0, 0, range(20, 20), range(8, 8)).shape == (0, 0)
    assert keep_mask(1, 0.5, np.zeros(0, int), 0, range(3), range(8)).shape == (0, 3, 8)


def test_several_heads() -> None:
    batches, heads = np.array([[3], [0]]), np.array([7, 1, 2**31])
    masks = keep_mask(5, 0.4, batches, heads, range(10, 40), range(3, 20))
    assert masks.shape == (2, 3, 30, 17)
    for i, j in np.ndindex(2, 3):
        one = keep_mask(5, 0.4, int(batches[i, 0]), int(heads[j]), range(10, 40), range(3, 20))
        assert np.array_equal(masks[i, j], one)
