"""Shapes beyond the grid: other head dims, float16, grouped heads, packed sequences, a fixed order of sums; and errors.

python -m benchmarks.shapes
python -m benchmarks.shapes --direction backward
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import anyattn
from anyattn.bench import rivals, timing
from anyattn.bench.suite import OURS
from benchmarks.common import RESULTS

Contender = Callable[[Tensor, Tensor, Tensor], Tensor]


def columns(direction: str, d: int, dv: int) -> int:
    """Of all products together: S and O; or S, dP, dV, dQ and dK."""
    return d + dv if direction == "forward" else 3 * d + 2 * dv


class Problem(NamedTuple):
    """The same arrays for every contender; ours is compared with the best of the others."""

    contenders: dict[str, Contender]
    arrays: tuple[Tensor, Tensor, Tensor]  # q, k, v
    flop: float  # of the pass, without what a mask hides


def random(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes)
    return q, k, v


def head_dims(
    direction: str, d: int, dv: int, seqlen: int, causal: bool, dtype: torch.dtype = torch.bfloat16
) -> Problem:
    """16k tokens in all, hidden about 2048."""
    batch, heads = 16384 // seqlen, max(1, 2048 // d)
    found = {OURS: rivals.ours(), **rivals.rivals(direction)}
    contenders = {name: partial(_masked, attention, causal) for name, attention in found.items()}
    shapes = ((batch, seqlen, heads, width) for width in (d, d, dv))
    flop = 2.0 * batch * heads * seqlen * seqlen * columns(direction, d, dv) / (2 if causal else 1)
    return Problem(contenders, random(*shapes, dtype=dtype), flop)


def _masked(attention: rivals.Attention, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, causal)


def grouped(direction: str, heads: int, heads_kv: int, d: int, seqlen: int) -> Problem:
    """Grouped heads, causal."""
    batch = 16384 // seqlen

    def sdpa(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(rivals.SDPA[name]):
            views = (x.transpose(1, 2) for x in (q, k, v))
            return scaled_dot_product_attention(*views, is_causal=True, enable_gqa=True).transpose(1, 2)

    contenders: dict[str, Contender] = {OURS: partial(_masked, rivals.ours(), True)}
    contenders |= {name: partial(sdpa, name) for name in ("FLASH", "CUDNN")}
    for name, attention in (("FA3", rivals.fa3() if direction == "forward" else None), ("FA4", rivals.fa4())):
        if attention is not None:
            contenders[name] = partial(_masked, attention, True)
    arrays = random(*((batch, seqlen, h, d) for h in (heads, heads_kv, heads_kv)))
    return Problem(contenders, arrays, 1.0 * batch * heads * seqlen * seqlen * columns(direction, d, d))


def packed(direction: str, sequences: int, low: int, high: int, heads: int, d: int) -> Problem:
    """Packed sequences of lengths uniform in [low, high], causal."""
    lengths = torch.randint(low, high + 1, (sequences,), generator=torch.Generator().manual_seed(0))
    cu = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to("cuda", torch.int32)
    longest, total = int(lengths.max()), int(lengths.sum())
    names: dict[str, Any] = {"max_seqlen_q": longest, "max_seqlen_k": longest, "causal": True}
    names |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    contenders: dict[str, Contender] = {OURS: partial(anyattn.attention_varlen, **names)}
    if direction == "forward":
        try:
            from fa3_fwd_interface import flash_attn_varlen_func as fa3

            contenders["FA3"] = partial(fa3, **names)
        except ImportError:
            pass
    try:
        from flash_attn.cute import flash_attn_varlen_func as fa4

        contenders["FA4"] = lambda q, k, v: fa4(q, k, v, **names)[0]
    except ImportError:
        pass
    flop = heads * columns(direction, d, d) * float((lengths.double() ** 2).sum())
    return Problem(contenders, random(*3 * [(total, heads, d)]), flop)


def ordered(d: int, seqlen: int) -> Problem:
    """The backward pass with dQ's sums in a fixed order, beside the same in any; causal."""
    contenders: dict[str, Contender] = {
        OURS: partial(anyattn.attention, causal=True, deterministic=True),
        "in any order": partial(anyattn.attention, causal=True),
    }
    batch, heads = 16384 // seqlen, 2048 // d
    arrays = random(*3 * [(batch, seqlen, heads, d)])
    return Problem(contenders, arrays, 1.0 * batch * heads * seqlen * seqlen * columns("backward", d, d))


def timed(direction: str, problem: Problem) -> dict[str, Callable[[], Any]]:
    """What to time of each contender."""
    contenders, arrays, _ = problem
    if direction == "forward":
        return {name: partial(contender, *arrays) for name, contender in contenders.items()}
    q, _, v = arrays
    dout = torch.randn(*q.shape[:-1], v.shape[-1], device="cuda", dtype=q.dtype)

    def gradients(contender: Contender) -> Callable[[], Any]:
        return rivals.backward_of(lambda q, k, v, _: contender(q, k, v), *arrays, dout, True)

    return {name: gradients(contender) for name, contender in contenders.items()}


def errors(direction: str, dtype: torch.dtype, d: int, seqlen: int, causal: bool) -> dict[str, dict[str, list[float]]]:
    """Of each contender and each of its results: relative to the norm, and the greatest absolute one; to float64."""
    q, k, v = random(*3 * [(1, seqlen, 4, d)], dtype=dtype)
    dout = torch.randn_like(q) if direction == "backward" else None
    expected = rivals.exact(q, k, v, dout, causal)
    found = {}
    for name, attention in {OURS: rivals.ours(), **rivals.rivals(direction)}.items():
        try:
            if dout is None:
                results = {"out": attention(q, k, v, causal)}
            else:
                gradients = rivals.backward_of(attention, q, k, v, dout, causal)()
                results = dict(zip(("dq", "dk", "dv"), gradients, strict=True))
        except Exception:  # a rival may refuse a problem with any class of error
            continue
        found[name] = {
            result: [rivals.relative_error(x, expected[result]), float((x.double() - expected[result]).abs().max())]
            for result, x in results.items()
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--direction", choices=("forward", "backward"), default="forward")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    arguments = parser.parse_args()
    direction = arguments.direction
    torch.manual_seed(0)
    problems: dict[str, Callable[[], Problem]] = {}
    for (d, dv), seqlen, causal in itertools.product(
        ((32, 32), (96, 96), (192, 192), (192, 128)), (4096, 16384), (False, True)
    ):
        name = f"d{d}{f'/{dv}' if d != dv else ''} {'causal' if causal else 'full'} {seqlen}"
        problems[name] = partial(head_dims, direction, d, dv, seqlen, causal)
    for dtype in (torch.float16, torch.bfloat16):
        problems[f"{str(dtype)[6:]} d128 full 4096"] = partial(head_dims, direction, 128, 128, 4096, False, dtype)
    problems["heads 32/8 d128 causal 4096"] = partial(grouped, direction, 32, 8, 128, 4096)
    problems["packed 64 x 128..2048 d128 causal"] = partial(packed, direction, 64, 128, 2048, 16, 128)
    if direction == "backward":
        for d in (64, 128, 256):
            problems[f"deterministic d{d} causal 8192"] = partial(ordered, d, 8192)

    result: dict[str, Any] = {"benchmark": "shapes", "direction": direction, "meta": timing.metadata()}
    result |= {"problems": {}, "errors": {}}
    for name, make in problems.items():
        problem = make()
        timings, failed = timing.interleaved(timed(direction, problem), rounds=5, slice_ms=10)
        tflops = {contender: problem.flop / t.median / 1e9 for contender, t in timings.items()}
        best = max((t for contender, t in tflops.items() if contender != OURS), default=math.nan)
        ratio = tflops[OURS] / best
        result["problems"][name] = {"tflops": tflops, "ms": timings, "failed": failed, "ratio": ratio}
        print(f"{name:34}", *(f"{n} {t:.0f}" for n, t in tflops.items()), f"| {ratio:.2f}", flush=True)
        del problem
        timing.pause()
    save = partial(timing.save, arguments.out, "shapes" if direction == "forward" else "shapes-backward", result)
    save()  # the errors take longer
    for dtype, d, seqlen, causal in itertools.product(
        (torch.bfloat16, torch.float16), (64, 128, 256), (1024, 4096), (False, True)
    ):
        name = f"{str(dtype)[6:]} d{d} {'causal' if causal else 'full'} {seqlen}"
        found = result["errors"][name] = errors(direction, dtype, d, seqlen, causal)
        for kind in ("out",) if direction == "forward" else ("dq", "dk", "dv"):
            shown = (f"{n} {x[kind][0]:.3e} {x[kind][1]:.2e}" for n, x in found.items())
            print(f"{name:30} {kind}", *shown, flush=True)
    print(save())


if __name__ == "__main__":
    main()
