"""The GPU kernels of several checkouts beside each other, in one process: their launches alone, interleaved.

    python -m benchmarks.sources ../before . --direction backward --head-dims 64,192/128 --seqlens 512,4096

A checkout's kernels and its tiles.yaml count; calls are planned by the one that runs, so its constants have to suit all
of them. Beside the speed stands the greatest difference from the first one's results.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import math
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from anyattn import compile as compiler
from anyattn import launch, plan
from anyattn.bench import timing
from anyattn.compile import Spec
from anyattn.problem import BackwardProblem, Options, View, backward, dense, row_major
from benchmarks.common import RESULTS

if TYPE_CHECKING:
    from torch import Tensor

TOKENS, HIDDEN = 16384, 2048


@contextmanager
def using(checkout: Path) -> Iterator[None]:
    """Let calls be planned with the tiles, and kernels be built from the sources, of a checkout."""

    def forget() -> None:
        plan._tiles.cache_clear()
        compiler.cubin.cache_clear()
        launch.forget_plans()

    tiles = {"ANYATTN_TILES": str(checkout / "anyattn" / "tiles.yaml")}
    sources = mock.patch.object(compiler, "_source_dir", return_value=checkout / "cuda_src")
    with sources, mock.patch.dict(os.environ, tiles):
        forget()
        try:
            yield
        finally:
            forget()


@dataclass(frozen=True)
class Cell:
    """A call: 16k tokens in all, hidden about 2048 or a number of heads, each of keys for `group` of them."""

    direction: str
    d: int
    dv: int
    causal: bool
    seqlen: int
    dtype: str = "bfloat16"
    group: int = 1
    heads: int | None = None

    def __str__(self) -> str:
        widths = f"{self.d}/{self.dv}" if self.d != self.dv else str(self.d)
        grouped = f" grouped by {self.group}" if self.group > 1 else ""
        return f"d{widths} {'causal' if self.causal else 'full'} {self.seqlen}{grouped}"

    @property
    def shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """Of q, k, v and out."""
        batch, heads = max(1, TOKENS // self.seqlen), self.heads or max(1, HIDDEN // self.d)
        sizes = (heads, self.d), (heads // self.group, self.d), (heads // self.group, self.dv), (heads, self.dv)
        q, k, v, out = ((batch, self.seqlen, *size) for size in sizes)
        return q, k, v, out

    @property
    def flop(self) -> float:
        """Without what the mask hides."""
        batch, seqlen, heads, _ = self.shapes[0]
        columns = self.d + self.dv if self.direction == "forward" else 3 * self.d + 2 * self.dv
        return 2.0 * batch * heads * seqlen * seqlen * columns / (2 if self.causal else 1)

    @property
    def call(self) -> BackwardProblem:
        """Both passes."""
        q, k, v, out = (View(0, shape, row_major(shape), self.dtype, 0) for shape in self.shapes)
        problem = dense(q, k, v, None, Options(causal=self.causal))
        lse = View(0, problem.lse_shape, row_major(problem.lse_shape), problem.lse_dtype, 0)
        return backward(problem, out, out, lse)


def specs(checkout: Path, cell: Cell, device: plan.Device) -> list[Spec]:
    """The kernels that a cell needs: of the forward pass too, where the backward pass starts from it."""
    with using(checkout):
        kernels = plan.forward(cell.call.problem, device).kernels
        if cell.direction == "backward":
            kernels += plan.backward(cell.call, device).kernels
    return [kernel.spec for kernel in kernels]


def build(checkout: Path, spec: Spec) -> None:
    """Into the cache on the disk, in a process of its own."""
    with using(checkout):
        compiler.cubin(spec)


def measure(cell: Cell, checkouts: dict[str, Path], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """TFLOP/s of each checkout, and by how much its results differ from the first one's."""
    import torch

    torch.manual_seed(0)
    q, k, v, out = (torch.randn(shape, device="cuda", dtype=getattr(torch, cell.dtype)) for shape in cell.shapes)
    problem = cell.call.problem
    lse = torch.empty(problem.lse_shape, device="cuda", dtype=getattr(torch, problem.lse_dtype))
    dout = torch.randn_like(out)
    stream = torch.cuda.current_stream().cuda_stream
    inputs = tuple(x.data_ptr() for x in (q, k, v))
    results: dict[str, list[Tensor]] = {}
    calls: dict[str, Any] = {}
    workspaces: list[Tensor] = []  # live as long as the calls
    for name, checkout in checkouts.items():
        with using(checkout):
            if cell.direction == "backward" and not calls:  # what it starts from
                forward = launch._prepare_forward(problem)
                tickets = torch.empty(forward.plan.workspace_bytes + 1, device="cuda", dtype=torch.uint8)
                others = (0, 0, 0, 0, 0, tickets.data_ptr() if forward.plan.ticket_bytes else 0, 0, 0, 0, 0)
                launch._launch(forward, *inputs, 0, out.data_ptr(), lse.data_ptr(), others, stream)
            if cell.direction == "forward":
                prepared = launch._prepare_forward(problem)
            else:
                prepared = launch._prepare_backward(cell.call)
        parts = prepared.plan
        workspace = torch.empty(parts.workspace_bytes + 1, device="cuda", dtype=torch.uint8)
        if cell.direction == "forward":
            results[name] = [torch.full_like(out, math.nan)]
            target, gradients = results[name][0].data_ptr(), (0, 0, 0)
            accum, delta, tickets_at = 0, 0, workspace.data_ptr() if parts.ticket_bytes else 0
        else:
            results[name] = [torch.full_like(x, math.nan) for x in (q, k, v)]
            target, gradients = out.data_ptr(), tuple(x.data_ptr() for x in results[name])  # type: ignore[assignment]
            delta = workspace.data_ptr() if parts.delta_bytes else gradients[0]
            accum = workspace.data_ptr() + parts.delta_bytes
            tickets_at = accum + parts.dq_accum_bytes
        others = (*gradients, accum, delta, tickets_at, 0, 0, 0, 0)
        backward_in = dout.data_ptr() if cell.direction == "backward" else 0
        arguments = (prepared, *inputs, backward_in, target, lse.data_ptr(), others, stream)
        calls[name] = partial(launch._launch, *arguments)
        workspaces.append(workspace)
    timings, failed = timing.interleaved(calls, rounds=rounds, slice_ms=12)
    if failed:
        raise SystemExit(f"{cell}: {failed}")
    first = next(iter(results.values()))
    off = {
        name: max(float((x.double() - y.double()).abs().max()) for x, y in zip(found, first, strict=True))
        for name, found in results.items()
    }
    return {name: cell.flop / taken.median / 1e9 for name, taken in timings.items()}, off


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="+", type=Path, help="their folders; the first is what others are over")
    parser.add_argument("--direction", choices=("forward", "backward"), default="forward")
    parser.add_argument("--head-dims", default="64,128,256", help="comma-separated, 192/128 where V's differs")
    parser.add_argument("--seqlens", default="512,2048,16384")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "float64"), default="bfloat16")
    parser.add_argument("--group", type=int, default=1, help="heads for each head of keys")
    parser.add_argument("--heads", type=int, help="default: hidden 2048")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    given = parser.parse_args()
    checkouts = {path.resolve().name if str(path) == "." else str(path): path.resolve() for path in given.checkouts}
    widths = [tuple(map(int, f"{text}/{text}".split("/")[:2])) for text in given.head_dims.split(",")]
    cells = [
        Cell(given.direction, d, dv, causal, int(seqlen), given.dtype, given.group, given.heads)
        for (d, dv), causal, seqlen in itertools.product(widths, (False, True), given.seqlens.split(","))
    ]
    device = launch.device(0)
    jobs = {(path, spec) for path in checkouts.values() for cell in cells for spec in specs(path, cell, device)}
    with concurrent.futures.ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for built in [pool.submit(build, *job) for job in jobs]:
            built.result()

    result: dict[str, Any] = {"benchmark": "sources", "direction": given.direction, "meta": timing.metadata()}
    result |= {"dtype": given.dtype, "cells": {}}
    ratios: dict[str, list[float]] = {name: [] for name in checkouts}
    for cell in cells:
        tflops, off = measure(cell, checkouts, given.rounds)
        base = next(iter(tflops.values()))
        result["cells"][str(cell)] = {"tflops": tflops, "off": off}
        figures = (f"{name} {t:.4g} ({t / base:.3f}, off {off[name]:.0e})" for name, t in tflops.items())
        print(f"{cell!s:24}", *figures, flush=True)
        for name, t in tflops.items():
            ratios[name].append(t / base)
        timing.pause()
    result["ratio"] = {name: timing.geometric_mean(found) for name, found in ratios.items()}
    print(f"{'geometric mean':24}", *(f"{name} {ratio:.3f}" for name, ratio in result["ratio"].items()))
    print(timing.save(given.out, f"sources-{given.direction}", result))


if __name__ == "__main__":
    main()
