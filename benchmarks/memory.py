"""Memory of a call beyond its inputs, against the sequence length: linear, where the matrix of scores is quadratic.

python -m benchmarks.memory [--paths cpu,cupy,torch] [--out DIR]

Causal attention, forward and backward, each measurement in a new process. cpu: float32, 8 heads of 64; what NumPy
allocates at the peak (tracemalloc) and by how much the process's high-water mark rises (resident set). cupy and torch:
float16 and bfloat16, 16 heads of 128; the peak of the library's own memory pool. Writes DEVICE-memory.json and a chart.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np

import anyattn
from anyattn.bench import timing
from benchmarks import chart, common

SHAPES = {"cpu": (8, 64, 4), "cupy": (16, 128, 2), "torch": (16, 128, 2)}  # heads, head dim, bytes of an element
SEQLENS = {
    "cpu": (1024, 2048, 4096, 8192, 16384),
    "cupy": (1024, 4096, 16384, 65536, 131072),
    "torch": (1024, 4096, 16384, 65536, 131072),
}
OPTIONS: dict[str, Any] = {"causal": True}


def on_cpu(shape: tuple[int, ...], direction: str) -> dict[str, int]:
    """Peak of what NumPy allocates, and growth of the resident set."""
    q, k, v, dout = (np.random.default_rng(0).standard_normal(shape, np.float32) for _ in range(4))
    small = [x[:, :64] for x in (q, k, v)]
    out, lse = anyattn.attention(*small, return_lse=True, **OPTIONS, backend="cpu")  # starts threads, imports
    anyattn.attention_backward(dout[:, :64], *small, out, lse, **OPTIONS, backend="cpu")
    if direction == "backward":
        out, lse = anyattn.attention(q, k, v, return_lse=True, **OPTIONS, backend="cpu")
    before = _resident()
    tracemalloc.start()
    if direction == "forward":
        results = anyattn.attention(q, k, v, return_lse=True, **OPTIONS, backend="cpu")
    else:
        results = anyattn.attention_backward(dout, q, k, v, out, lse, **OPTIONS, backend="cpu")
    peak = tracemalloc.get_traced_memory()[1]
    return {"peak": peak, "resident": _resident() - before, "results": sum(x.nbytes for x in results)}


def _resident() -> int:
    """The most memory that this process has held so far, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def on_cupy(shape: tuple[int, ...], direction: str) -> dict[str, int]:
    """What CuPy's pool takes from the GPU during the call; it gives nothing back meanwhile."""
    import cupy

    pool = cupy.get_default_memory_pool()
    q, k, v, dout = (cupy.zeros(shape, cupy.float16) for _ in range(4))
    out, lse = anyattn.attention(q, k, v, return_lse=True, **OPTIONS)
    if direction == "forward":
        del out, lse
    pool.free_all_blocks()
    before = pool.total_bytes()
    if direction == "forward":
        results = anyattn.attention(q, k, v, return_lse=True, **OPTIONS)
    else:
        results = anyattn.attention_backward(dout, q, k, v, out, lse, **OPTIONS)
    return {"peak": pool.total_bytes() - before, "results": sum(x.nbytes for x in results)}


def on_torch(shape: tuple[int, ...], direction: str) -> dict[str, int]:
    """The peak of what PyTorch's allocator handed out."""
    import torch

    cuda: Any = torch.cuda
    q, k, v, dout = (torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for _ in range(4))
    out, lse = anyattn.attention(q, k, v, return_lse=True, **OPTIONS)
    if direction == "forward":
        del out, lse
    before = cuda.memory_allocated()
    cuda.reset_peak_memory_stats()
    if direction == "forward":
        results = anyattn.attention(q, k, v, return_lse=True, **OPTIONS)
    else:
        results = anyattn.attention_backward(dout, q, k, v, out, lse, **OPTIONS)
    return {"peak": cuda.max_memory_allocated() - before, "results": sum(x.nbytes for x in results)}


PATHS = {"cpu": on_cpu, "cupy": on_cupy, "torch": on_torch}


def measure(path: str, seqlen: int, direction: str) -> dict[str, Any]:
    """One cell, in bytes."""
    heads, head_dim, itemsize = SHAPES[path]
    found = PATHS[path]((1, seqlen, heads, head_dim), direction)
    scores = heads * seqlen**2 * itemsize
    return {"path": path, "direction": direction, "seqlen": seqlen, **found, "scores": scores}


def main() -> None:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paths", default="cpu,cupy,torch")
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    arguments = parser.parse_args()
    cells = []
    for path in arguments.paths.split(","):
        for direction in ("forward", "backward"):
            for seqlen in SEQLENS[path]:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    cell = pool.apply(measure, (path, seqlen, direction))
                cells.append(cell)
                figures = ", ".join(
                    f"{x} {cell[x] / 2**20:.1f} MiB" for x in ("peak", "resident", "results") if x in cell
                )
                per_row = cell["peak"] / seqlen
                print(f"{path:6} {direction:8} {seqlen:7}  {figures}, {per_row:.0f} bytes a row", flush=True)
    result = {
        "benchmark": "memory",
        "meta": timing.metadata(arguments.paths != "cpu"),
        "shapes": SHAPES,
        "cells": cells,
    }
    print(chart.draw(timing.save(arguments.out, "memory", result)))


if __name__ == "__main__":
    main()
