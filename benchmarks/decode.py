"""Few rows that see many keys, as when a model writes a text: time, and bytes of K and V read a second.

python -m benchmarks.decode [--rounds 5] [--out DIR]

Without a mask. The rivals are scaled_dot_product_attention's backends that take the call, and FlashAttention-3 and -4
where they are installed. Each call's results are compared with another's first. Writes DEVICE-decode.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import anyattn
from anyattn.bench import rivals, timing
from anyattn.bench.suite import OURS
from benchmarks import common


@dataclass(frozen=True)
class Cell:
    """One call."""

    batch: int
    heads: int
    heads_kv: int
    rows: int
    keys: int
    head_dim: int
    dtype: str = "bfloat16"

    @property
    def bytes_read(self) -> float:
        """Of K and V."""
        elements = 2 * self.batch * self.keys * self.heads_kv * self.head_dim
        return float(elements * getattr(torch, self.dtype).itemsize)


CELLS = (
    Cell(1, 32, 8, 1, 4096, 128),
    Cell(1, 32, 8, 1, 32768, 128),
    Cell(8, 32, 8, 1, 8192, 128),
    Cell(64, 32, 8, 1, 4096, 128),
    Cell(1, 32, 32, 1, 16384, 128),
    Cell(16, 16, 16, 1, 4096, 64),
    Cell(8, 16, 2, 1, 8192, 256),
    Cell(1, 32, 8, 16, 32768, 128),
    Cell(1, 16, 16, 64, 16384, 128),
    Cell(4, 16, 16, 1, 4096, 64, "float32"),
    Cell(1, 16, 16, 1, 16384, 128, "float32"),
    Cell(1, 16, 16, 1, 4096, 128, "float64"),
)


def contenders(cell: Cell) -> dict[str, Callable[[], Any]]:
    """The calls to time."""
    dtype = getattr(torch, cell.dtype)
    q = torch.randn(cell.batch, cell.rows, cell.heads, cell.head_dim, device="cuda", dtype=dtype)
    k, v = (torch.randn(cell.batch, cell.keys, cell.heads_kv, cell.head_dim, device="cuda", dtype=dtype) for _ in "kv")

    def sdpa(backend: Any) -> Tensor:
        with torch.nn.attention.sdpa_kernel(backend):
            views = (x.transpose(1, 2) for x in (q, k, v))
            return scaled_dot_product_attention(*views, enable_gqa=cell.heads != cell.heads_kv).transpose(1, 2)

    calls: dict[str, Callable[[], Any]] = {OURS: partial(anyattn.attention, q, k, v)}
    for name in ("FLASH", "CUDNN", "EFFICIENT") if dtype.itemsize == 2 else ("EFFICIENT", "MATH"):
        calls[name] = partial(sdpa, rivals.SDPA[name])
    if dtype.itemsize == 2:
        for name, attention in (("FA3", rivals.fa3()), ("FA4", rivals.fa4())):
            if attention is not None:
                calls[name] = partial(attention, q, k, v, False)
    expected, tolerance = calls[OURS](), 2e-2 if dtype.itemsize == 2 else 1e-5
    for name in [*calls][1:]:
        try:
            found = calls[name]()
        except Exception:  # a rival may refuse a problem with any class of error
            del calls[name]
            continue
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    return calls


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    cells: list[dict[str, Any]] = []
    for cell in CELLS:
        timings, failed = timing.interleaved(contenders(cell), arguments.rounds)
        terabytes = {name: cell.bytes_read / taken.median / 1e9 for name, taken in timings.items()}
        best = max((x for name, x in terabytes.items() if name != OURS), default=None)
        ratio = terabytes[OURS] / best if best else None
        cells.append(
            asdict(cell) | {"ms": timings, "terabytes_per_second": terabytes, "failed": failed, "ratio": ratio}
        )
        shown = (f"{name} {taken.median:.4f} ms {terabytes[name]:.2f} TB/s" for name, taken in timings.items())
        print(
            f"{' '.join(str(x) for x in asdict(cell).values()):34}", *shown, f"| {ratio or 0:.2f}", sep="  ", flush=True
        )
    result = {"benchmark": "decode", "meta": timing.metadata(), "cells": cells}
    print(timing.save(arguments.out, "decode", result))


if __name__ == "__main__":
    main()
