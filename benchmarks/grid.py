"""The 36 cells of the FlashAttention papers, bfloat16: TFLOP/s of anyattn and of every rival installed.

python -m benchmarks.grid --direction forward
python -m benchmarks.grid --direction backward --kernel sm80
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from anyattn.bench import rivals, suite, timing
from anyattn.bench.rivals import Attention
from anyattn.bench.suite import OURS, Cell
from anyattn.bench.timing import geometric_mean
from benchmarks import chart, common

HEAD_DIMS = (64, 128, 256)
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)


def measure(cell: Cell, direction: str, attentions: Mapping[str, Attention], rounds: int) -> dict[str, Any]:
    """Time every contender on the same random inputs, after a check that ours and another's results agree."""
    calls = suite.calls(direction, attentions, suite.inputs(cell, "bfloat16", "cuda"), cell.causal)
    _agree(cell, calls)
    timings, failed = timing.interleaved(calls, rounds)
    tflops = {name: cell.flop(direction) / taken.median / 1e9 for name, taken in timings.items()}
    return {
        "head_dim": cell.head_dim,
        "causal": cell.causal,
        "seqlen": cell.seqlen,
        "batch": cell.shape[0],
        "heads": cell.shape[2],
        "tflops": tflops,
        "ms": timings,
        "failed": failed,
    }


def _agree(cell: Cell, calls: Mapping[str, Callable[[], Any]]) -> None:
    """A wrong kernel is not worth timing."""
    other = "FLASH" if "FLASH" in calls else next((name for name in calls if name != OURS), None)
    if OURS not in calls or other is None:
        return
    mine, theirs = calls[OURS](), calls[other]()
    for a, b in [(mine, theirs)] if isinstance(mine, torch.Tensor) else zip(mine, theirs, strict=True):
        difference = ((a - b).float().norm() / b.float().norm()).item()
        if not difference < 0.02:
            raise SystemExit(f"anyattn and {other} differ by {difference:.2g} of their norm in {cell}")


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric means: of each contender's TFLOP/s, and of ours over FLASH's and over the best rival's."""
    names = dict.fromkeys(name for cell in cells for name in cell["tflops"])
    ratios = [_ratios(cell["tflops"]) for cell in cells]
    return {
        "tflops": {n: geometric_mean(c["tflops"][n] for c in cells if n in c["tflops"]) for n in names},
        "ratio": {
            "FLASH": geometric_mean(flash for flash, _ in ratios if not math.isnan(flash)),
            "best": geometric_mean(best for _, best in ratios if not math.isnan(best)),
        },
    }


def _ratios(tflops: Mapping[str, float]) -> tuple[float, float]:
    """Ours over FLASH's and over the best rival's; NaN where one of the two is missing."""
    mine = tflops.get(OURS, math.nan)
    return mine / tflops.get("FLASH", math.nan), mine / max(
        (t for n, t in tflops.items() if n != OURS), default=math.nan
    )


def _row(first: str, tflops: Mapping[str, float], names: list[str], ratios: tuple[float, float]) -> str:
    figures = "".join(f"{tflops[name]:11.0f}" if name in tflops else f"{'-':>11}" for name in names)
    return f"{first:<18}{figures}{ratios[0]:9.2f}{ratios[1]:9.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--direction", choices=("forward", "backward"), required=True)
    parser.add_argument("--kernel", default="auto", help="hold anyattn to the kernel of this name, for instance sm80")
    parser.add_argument("--rivals", help="only these, for instance FLASH,CUDNN (default: all that are installed)")
    parser.add_argument("--quick", action="store_true", help="12 cells (S 1024 and 8192), fewer rounds")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the JSON file and the chart")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU that PyTorch can use")

    direction = arguments.direction
    attentions = rivals.rivals(direction)
    if arguments.rivals is not None:
        chosen = arguments.rivals.upper().split(",")
        if missing := set(chosen) - set(attentions):
            raise SystemExit(f"not installed, or no {direction} pass: {', '.join(sorted(missing))}")
        attentions = {name: attentions[name] for name in chosen}
    attentions = {OURS: rivals.ours(arguments.kernel), **attentions}
    names = list(attentions)

    result: dict[str, Any] = {"benchmark": "grid", "direction": direction, "kernel": arguments.kernel}
    result |= {"dtype": "bfloat16", "meta": timing.metadata(), "cells": []}
    print(f"{result['meta']['device']}: {direction}, bfloat16, TFLOP/s (ours: kernel {arguments.kernel})")
    print(f"{'':<18}{''.join(f'{name:>11}' for name in names)}{'/FLASH':>9}{'/best':>9}")
    seqlens = (1024, 8192) if arguments.quick else SEQLENS
    for head_dim, causal, seqlen in itertools.product(HEAD_DIMS, (False, True), seqlens):
        cell = measure(Cell(head_dim, causal, seqlen), direction, attentions, rounds=3 if arguments.quick else 7)
        result["cells"].append(cell)
        label = f"d{head_dim} {'causal' if causal else 'full'} {seqlen}"
        print(_row(label, cell["tflops"], names, _ratios(cell["tflops"])), flush=True)
        for name, reason in cell["failed"].items():
            print(f"    {name}: {reason}", flush=True)
        timing.pause()
    means = result["geometric_mean"] = summary(result["cells"])
    print(_row("geometric mean", means["tflops"], names, (means["ratio"]["FLASH"], means["ratio"]["best"])))

    name = f"{direction}-{arguments.kernel}{'-quick' if arguments.quick else ''}"
    path = timing.save(arguments.out, name, result)
    print(path, chart.draw(path), sep="\n")


if __name__ == "__main__":
    main()
