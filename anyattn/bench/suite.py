"""`anyattn bench`: time and error of anyattn, of every rival installed and of two approximations, side by side."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn.bench import baselines, rivals, timing
from anyattn.bench.rivals import Attention

OURS = "anyattn"
QUADRATIC = ("MATH", "plain")  # these keep the whole matrix of scores
DIRECTIONS = ("forward", "backward")


class Usual(NamedTuple):
    """What is measured unless one says otherwise."""

    dtype: str
    head_dims: tuple[int, ...]
    seqlens: tuple[int, ...]
    tokens: int
    hidden: int


USUAL = {
    "cuda": Usual("bfloat16", (64, 128), (512, 2048, 8192), 16384, 2048),
    "cpu": Usual("float32", (64,), (512, 1024, 2048), 2048, 256),
}

# The largest error of ours, out or gradients, on random inputs: a few times what FLASH has, too.
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.5e-2, "float32": 1e-5, "float64": 1e-12}

# Rows of the longest sequence whose error is computed: the reference keeps a head's matrix of scores in float64.
CHECKED = 8192


@dataclass(frozen=True)
class Cell:
    """One shape: as many sequences as make up `tokens`, and as many heads as make up `hidden`."""

    head_dim: int
    causal: bool
    seqlen: int
    tokens: int = 16384
    hidden: int = 2048

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, sequence, heads, head dim)."""
        return max(1, self.tokens // self.seqlen), self.seqlen, max(1, self.hidden // self.head_dim), self.head_dim

    def flop(self, direction: str) -> float:
        """As the FlashAttention papers count it: two products forward, five backward, half of them under the mask."""
        batch, seqlen, heads, head_dim = self.shape
        forward = 4.0 * batch * heads * seqlen * seqlen * head_dim / (2 if self.causal else 1)
        return forward if direction == "forward" else 2.5 * forward


def contenders(device: str, direction: str) -> dict[str, Attention]:
    """anyattn and everything it can be compared with on "cuda" or "cpu"."""
    if device == "cuda":
        exact = {OURS: rivals.ours(), **rivals.rivals(direction), "MATH": rivals.sdpa("MATH")}
    else:
        exact = {OURS: rivals.ours(backend="cpu"), "SDPA": rivals.plain_sdpa, "MATH": rivals.sdpa("MATH")}
    return {**exact, "plain": baselines.plain, **baselines.APPROXIMATE}


def inputs(cell: Cell, dtype: str, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random q, k, v and dout, the same at every call."""
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(cell.shape, device=device, dtype=getattr(torch, dtype)) for _ in range(4))
    return q, k, v, dout


def calls(
    direction: str, attentions: Mapping[str, Attention], arrays: tuple[Tensor, Tensor, Tensor, Tensor], causal: bool
) -> dict[str, Callable[[], Any]]:
    """What to time: each returns the output, or the three gradients."""
    q, k, v, dout = arrays
    if direction == "forward":
        return {name: partial(attention, q, k, v, causal) for name, attention in attentions.items()}
    return {name: rivals.backward_of(attention, q, k, v, dout, causal) for name, attention in attentions.items()}


def measure(
    cells: Iterable[Cell], directions: Iterable[str], names: list[str] | None, dtype: str, device: str, rounds: int
) -> Iterator[dict[str, Any]]:
    """Time every contender, or those of these names, in every cell; the results as they come.

    Errors are relative (2-norm), against the formulas in float64, the worst of the results (out; dq, dk and dv), in the
    last head of the last sequence; None where the sequence is longer than CHECKED.
    """
    found = {direction: contenders(device, direction) for direction in directions}
    for direction, attentions in found.items():
        for cell in cells:
            chosen = {n: attention for n, attention in attentions.items() if names is None or n in names}
            yield _measure(cell, direction, chosen, dtype, device, rounds)
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
                timing.pause()


def _measure(
    cell: Cell, direction: str, attentions: dict[str, Attention], dtype: str, device: str, rounds: int
) -> dict[str, Any]:
    arrays = inputs(cell, dtype, device)
    batch, seqlen, heads, _ = cell.shape
    matrix = batch * heads * seqlen**2 * arrays[0].itemsize
    failed = {}
    if matrix > _memory(device) / 12:  # it is needed a few times over, and others need memory too
        failed = {name: f"a matrix of {matrix / 2**30:.0f} GiB" for name in QUADRATIC if name in attentions}
    timed = calls(direction, {n: a for n, a in attentions.items() if n not in failed}, arrays, cell.causal)
    if device == "cuda":
        timings, refused = timing.interleaved(timed, rounds)
    else:
        timings, refused = timing.interleaved(timed, rounds, slice_ms=50.0, timer=timing.on_host)
    return {
        "direction": direction,
        "head_dim": cell.head_dim,
        "causal": cell.causal,
        "seqlen": seqlen,
        "batch": batch,
        "heads": heads,
        "ms": timings,
        "tflops": {n: cell.flop(direction) / t.median / 1e9 for n, t in timings.items() if n not in APPROXIMATE},
        "errors": _errors({name: timed[name] for name in timings}, direction, arrays, cell.causal),
        "failed": failed | refused,
    }


APPROXIMATE = tuple(baselines.APPROXIMATE)


def _errors(
    timed: dict[str, Callable[[], Any]], direction: str, arrays: tuple[Tensor, ...], causal: bool
) -> dict[str, float | None]:
    if arrays[0].shape[1] > CHECKED:
        return dict.fromkeys(timed)
    q, k, v, dout = (x[-1:, :, -1:] for x in arrays)
    if direction == "forward":
        expected = [rivals.exact(q, k, v, None, causal)["out"]]
    else:
        exact = rivals.exact(q, k, v, dout, causal)
        expected = [exact[name] for name in ("dq", "dk", "dv")]
    errors: dict[str, float | None] = {}
    for name, call in timed.items():
        results = [call()] if direction == "forward" else call()
        pairs = zip(results, expected, strict=True)
        each = [rivals.relative_error(actual[-1:, :, -1:], wanted) for actual, wanted in pairs]
        errors[name] = math.nan if any(map(math.isnan, each)) else max(each)
    return errors


def _memory(device: str) -> int:
    """Bytes."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 8 << 30


def ours_is_right(cells: list[dict[str, Any]], dtype: str) -> bool:
    """Whether anyattn was measured in every cell, and within TOLERANCE where it was checked."""
    return all(
        OURS in cell["ms"] and ((error := cell["errors"][OURS]) is None or error <= TOLERANCE[dtype]) for cell in cells
    )


def summary(cells: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each contender and direction: its time over ours, its TFLOP/s (geometric means), its largest error."""
    result: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for cell in cells for name in (*cell["ms"], *cell["failed"])):
        for direction in DIRECTIONS:
            its = [cell for cell in cells if cell["direction"] == direction and name in cell["ms"]]
            if not its:
                continue
            errors = [error for cell in its if (error := cell["errors"][name]) is not None]
            result.setdefault(name, {})[direction] = {
                "time_over_ours": timing.geometric_mean(
                    cell["ms"][name].median / cell["ms"][OURS].median for cell in its if OURS in cell["ms"]
                ),
                "tflops": timing.geometric_mean(cell["tflops"][name] for cell in its if name in cell["tflops"]),
                "error": None if not errors else math.nan if any(map(math.isnan, errors)) else max(errors),
                "cells": len(its),
            }
    return result
