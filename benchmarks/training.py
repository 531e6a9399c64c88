"""A training step of examples/train_char_lm.py: anyattn beside PyTorch's own attention.

python -m benchmarks.training [--rounds 7] [--out DIR]

Forward, backward and AdamW, of the example's model and of one of nanoGPT's size. As the example trains them: captured
in a CUDA graph, so that the GPU's time counts; and call by call, where Python's time is most of it. The rivals are
scaled_dot_product_attention with the backend of PyTorch's choice ("torch"), and held to one. Writes
DEVICE-training.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import sdpa_kernel

from anyattn.bench import rivals, timing
from benchmarks import common

sys.path.insert(0, str(common.ROOT / "examples"))
import train_char_lm

VOCABULARY = 96
WARM_UP = train_char_lm.TrainingStep.WARM_UP + 2


@dataclass(frozen=True)
class Model:
    """Sizes of a model and of its batches."""

    name: str
    batch: int
    context: int
    width: int
    heads: int
    layers: int


MODELS = (Model("example", 16, 128, 128, 4, 2), Model("nanoGPT", 64, 256, 384, 6, 6))


def step(model: Model, dtype: torch.dtype, captured: bool, backend: str) -> Callable[[], float]:
    """A step on random characters, after some to warm up."""
    torch.manual_seed(0)
    attention = train_char_lm.ATTENTIONS["anyattn" if backend == "anyattn" else "torch"]
    sizes = model.context, model.width, model.heads, model.layers
    network = train_char_lm.CharLM(VOCABULARY, *sizes, attention).to("cuda", dtype)
    training = train_char_lm.TrainingStep(network, 1e-3, model.batch, model.context, torch.device("cuda"))
    if not captured:
        training.graph = None
    run = partial(training, torch.randint(VOCABULARY, (model.batch, model.context + 1)))
    with sdpa_kernel(rivals.SDPA[backend]) if backend in rivals.SDPA else nullcontext():
        for _ in range(WARM_UP):
            run()
    return run


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    arguments = parser.parse_args()

    cells: list[dict[str, Any]] = []
    for model in MODELS:
        for dtype in (torch.float32, torch.bfloat16):
            for captured in (True, False):
                contenders = ["anyattn", "torch"]
                if captured:  # call by call, to choose a backend would itself take time
                    contenders += ["EFFICIENT"] if dtype == torch.float32 else ["FLASH", "CUDNN", "EFFICIENT"]
                steps = {name: step(model, dtype, captured, name) for name in contenders}
                timings, failed = timing.interleaved(steps, arguments.rounds, timer=timing.on_host)
                assert not failed, failed
                ms = {name: taken.median for name, taken in timings.items()}
                ratio = min(x for name, x in ms.items() if name != "anyattn") / ms["anyattn"]
                way = "captured" if captured else "call by call"
                cell = {"model": vars(model), "dtype": str(dtype)[6:], "way": way, "ms": timings, "ratio": ratio}
                cells.append(cell)
                figures = ", ".join(f"{name} {x:.3f} ms" for name, x in ms.items())
                print(f"{model.name} {cell['dtype']} {way}: {figures}; best / anyattn {ratio:.3f}", flush=True)
    result = {"benchmark": "training", "meta": timing.metadata(), "cells": cells}
    print(timing.save(arguments.out, "training", result))


if __name__ == "__main__":
    main()
