"""NumPy arrays on a GPU: how much of the copies is hidden behind the kernels, or the other way around.

python -m benchmarks.host [--rounds 5] [--out DIR]

Three times of each call: all of it; its copies alone (the same way, host memory to page-locked memory to the GPU and
back, with no kernel launched); its kernels alone (the same call on CuPy arrays). One after another, copies and kernels
would take the sum of both; the limit is 1.2 times the larger. The last cells are given 1 GiB of GPU memory. Writes
DEVICE-host.json and a chart.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import anyattn
from anyattn import launch, offload
from anyattn.bench import timing
from benchmarks import chart, common

LIMIT = 1.2


@dataclass(frozen=True)
class Cell:
    """One call."""

    direction: str
    dtype: str
    batch: int
    seqlen: int
    heads: int
    head_dim: int
    causal: bool = False
    memory: int | None = None  # bytes of GPU memory it may use; None: what is free


CELLS = (
    Cell("forward", "float16", 16, 4096, 16, 64),
    Cell("forward", "float16", 1, 32768, 16, 128),
    Cell("forward", "float16", 1, 65536, 16, 128, causal=True),
    Cell("forward", "float32", 4, 8192, 16, 64),
    Cell("backward", "float16", 4, 8192, 16, 128),
    Cell("backward", "float16", 1, 32768, 16, 128, causal=True),
    Cell("forward", "float16", 16, 16384, 16, 64, memory=1 << 30),
    Cell("backward", "float16", 8, 8192, 16, 128, memory=1 << 30),
)


def contenders(cell: Cell) -> dict[str, Callable[[], Any]]:
    """The calls to time; each is done when it returns."""
    import cupy

    rng, shape = np.random.default_rng(0), (cell.batch, cell.seqlen, cell.heads, cell.head_dim)
    some = rng.standard_normal((1 << 22) + 1, np.float32).astype(cell.dtype)  # drawing them all would take minutes
    arrays = [np.resize(np.roll(some, 1000 * i), shape) for i in range(4)]
    options: dict[str, Any] = {"causal": cell.causal, "backend": "cuda"}
    memory = cell.memory if cell.memory is not None else offload._free_bytes()

    def call(q: Any, k: Any, v: Any, dout: Any, out: Any, lse: Any) -> Any:
        if cell.direction == "forward":
            return anyattn.attention(q, k, v, return_lse=True, **options)
        return anyattn.attention_backward(dout, q, k, v, out, lse, **options)

    here = [*arrays, *anyattn.attention(*arrays[:3], return_lse=True, **options)]
    there = [cupy.asarray(x) for x in here]

    def everything() -> Any:
        with mock.patch.object(offload, "_free_bytes", return_value=memory):
            return call(*here)

    def copies() -> Any:
        with mock.patch.multiple(launch, forward=mock.DEFAULT, backward=mock.DEFAULT):
            return everything()

    def kernels() -> Any:
        results = call(*there)
        cupy.cuda.runtime.deviceSynchronize()
        return results

    for x, y in zip(everything(), kernels(), strict=True):
        np.testing.assert_allclose(x, y.get(), rtol=2e-2, atol=2e-2)
    return {"everything": everything, "copies": copies, "kernels": kernels}


def main() -> None:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    arguments = parser.parse_args()
    import cupy

    cells = []
    for cell in CELLS:
        timings, failed = timing.interleaved(contenders(cell), arguments.rounds, slice_ms=50.0, timer=timing.on_host)
        assert not failed, failed
        ms = {name: taken.median for name, taken in timings.items()}
        ratio = ms["everything"] / max(ms["copies"], ms["kernels"])
        cells.append({**vars(cell), "ms": timings, "ratio": ratio})
        figures = ", ".join(f"{name} {x:.1f} ms" for name, x in ms.items())
        print(f"{cell}: {figures}; {ratio:.2f} of the larger", flush=True)
        cupy.get_default_memory_pool().free_all_blocks()
    result = {"benchmark": "host", "meta": timing.metadata(), "limit": LIMIT, "cells": cells}
    print(chart.draw(timing.save(arguments.out, "host", result)))


if __name__ == "__main__":
    main()
