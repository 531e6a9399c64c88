"""anyattn on the CPU against PyTorch's scaled_dot_product_attention: float32, 8 heads of 64, the same threads.

python -m benchmarks.cpu [--threads 2] [--rounds 9] [--seqlens 512,2048,8192]

Both run in one process on the same arrays, by turns; each cell is the median over all calls. On a shared machine others
take a part of some calls' time, so that the ratio by the least times is given, too. Without PyTorch only anyattn is
timed. Writes benchmarks/results/cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import anyattn
from anyattn.bench import timing
from benchmarks import common

HEADS, HEAD_DIM = 8, 64
OURS, RIVAL = "anyattn", "torch"


def contenders(seqlen: int, causal: bool, direction: str, threads: int) -> dict[str, Callable[[], Any]]:
    """The calls to time, which return the output or the gradients as NumPy arrays (batch, heads, seqlen, dim)."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, HEADS, seqlen, HEAD_DIM), np.float32) for _ in range(4))
    options: dict[str, Any] = {"causal": causal, "layout": "bhsd", "backend": "cpu"}
    out, lse = anyattn.attention(q, k, v, return_lse=True, **options)
    calls: dict[str, Callable[[], Any]] = {
        OURS: (
            (lambda: [anyattn.attention(q, k, v, **options)])
            if direction == "forward"
            else (lambda: anyattn.attention_backward(dout, q, k, v, out, lse, **options))
        )
    }
    try:
        import torch
    except ImportError:
        return calls
    torch.set_num_threads(threads)
    attention = torch.nn.functional.scaled_dot_product_attention
    tq, tk, tv = (torch.from_numpy(x).requires_grad_(direction == "backward") for x in (q, k, v))
    rival_out = attention(tq, tk, tv, is_causal=causal)

    def forward() -> list[Any]:
        return [attention(tq, tk, tv, is_causal=causal).numpy()]

    def backward() -> list[Any]:
        grads = torch.autograd.grad(rival_out, (tq, tk, tv), torch.from_numpy(dout), retain_graph=True)
        return [x.numpy() for x in grads]

    return calls | {RIVAL: forward if direction == "forward" else backward}


def measure(seqlen: int, causal: bool, direction: str, threads: int, rounds: int) -> dict[str, Any]:
    """Time one cell: GFLOP/s by name, and ours over the rival's."""
    calls = contenders(seqlen, causal, direction, threads)
    results = {name: call() for name, call in calls.items()}
    for ours, theirs in zip(results[OURS], results.get(RIVAL, ()), strict=False):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)

    flop = 4.0 * HEADS * seqlen**2 * HEAD_DIM * (2.5 if direction == "backward" else 1.0) / (2 if causal else 1)
    timings, _ = timing.interleaved(calls, rounds, slice_ms=50.0, timer=timing.on_host)
    gflops = {name: flop / taken.median / 1e6 for name, taken in timings.items()}
    cell = {"direction": direction, "seqlen": seqlen, "causal": causal, "gflops": gflops, "ms": timings}
    if RIVAL not in timings:
        return cell
    least = timings[RIVAL].low / timings[OURS].low
    return cell | {"ratio": gflops[OURS] / gflops[RIVAL], "ratio_of_least_times": least}


def main() -> None:
    """Run the cells, print them and write them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seqlens", default="512,2048,8192")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of cpu.json")
    arguments = parser.parse_args()
    os.environ["ANYATTN_THREADS"] = str(arguments.threads)

    cells: list[dict[str, Any]] = []
    means: dict[str, dict[str, float]] = {}
    for direction in ("forward", "backward"):
        for seqlen in map(int, arguments.seqlens.split(",")):
            for causal in (False, True):
                cell = measure(seqlen, causal, direction, arguments.threads, arguments.rounds)
                cells.append(cell)
                speeds = "  ".join(f"{name} {speed:6.1f}" for name, speed in cell["gflops"].items())
                mask = "causal" if causal else "full"
                print(
                    f"{direction:8} {seqlen:6} {mask:6}  {speeds} GFLOP/s  ratio {cell.get('ratio', np.nan):.2f}, "
                    f"of least times {cell.get('ratio_of_least_times', np.nan):.2f}",
                    flush=True,
                )
        means[direction] = {
            name: timing.geometric_mean(c[name] for c in cells if c["direction"] == direction and name in c)
            for name in ("ratio", "ratio_of_least_times")
        }
        ratio, least = means[direction].values()
        print(f"{direction}: geometric mean of the ratios {ratio:.3f}, of least times {least:.3f}")
    meta = timing.metadata(gpu=False) | {"threads": arguments.threads}
    result = {"meta": meta, "heads": HEADS, "head_dim": HEAD_DIM, "dtype": "float32", "ratios": means, "cells": cells}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "cpu.json").write_text(json.dumps(result, indent=1, default=asdict) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
