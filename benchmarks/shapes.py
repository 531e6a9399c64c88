"""Forward passes beyond the grid: other head dims, float16, grouped heads, packed sequences; and errors.

python -m benchmarks.shapes
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from anyattn.bench import rivals, timing
from benchmarks.common import RESULTS

Calls = dict[str, Callable[[], Any]]


def head_dims(d: int, dv: int, seqlen: int, causal: bool, dtype: torch.dtype = torch.bfloat16) -> tuple[Calls, float]:
    """16k tokens in all, hidden about 2048; and the floating-point operations of a call."""
    batch, heads = 16384 // seqlen, max(1, 2048 // d)
    q, k = (torch.randn(batch, seqlen, heads, d, device="cuda", dtype=dtype) for _ in range(2))
    v = torch.randn(batch, seqlen, heads, dv, device="cuda", dtype=dtype)
    calls: Calls = {"anyattn": partial(rivals.ours(), q, k, v, causal)}
    calls |= {name: partial(attention, q, k, v, causal) for name, attention in rivals.rivals("forward").items()}
    return calls, 2.0 * batch * heads * seqlen * seqlen * (d + dv) / (2 if causal else 1)


def grouped(heads: int, heads_kv: int, d: int, seqlen: int) -> tuple[Calls, float]:
    """Grouped heads, causal."""
    batch = 16384 // seqlen
    q = torch.randn(batch, seqlen, heads, d, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(batch, seqlen, heads_kv, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def sdpa(name: str) -> Tensor:
        with torch.nn.attention.sdpa_kernel(rivals.SDPA[name]):
            views = (x.transpose(1, 2) for x in (q, k, v))
            return scaled_dot_product_attention(*views, is_causal=True, enable_gqa=True)

    calls: Calls = {"anyattn": partial(rivals.ours(), q, k, v, True)}
    calls |= {name: partial(sdpa, name) for name in ("FLASH", "CUDNN")}
    for name, attention in (("FA3", rivals.fa3()), ("FA4", rivals.fa4())):
        if attention is not None:
            calls[name] = partial(attention, q, k, v, True)
    return calls, 2.0 * batch * heads * seqlen * seqlen * d


def packed(sequences: int, low: int, high: int, heads: int, d: int) -> tuple[Calls, float]:
    """Packed sequences of lengths uniform in [low, high], causal."""
    import anyattn

    lengths = torch.randint(low, high + 1, (sequences,), generator=torch.Generator().manual_seed(0))
    cu = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to("cuda", torch.int32)
    longest, total = int(lengths.max()), int(lengths.sum())
    q, k, v = (torch.randn(total, heads, d, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    calls: Calls = {"anyattn": lambda: anyattn.attention_varlen(q, k, v, cu, cu, longest, longest, causal=True)}
    names = {"max_seqlen_q": longest, "max_seqlen_k": longest, "causal": True}
    try:
        from fa3_fwd_interface import flash_attn_varlen_func as fa3

        calls["FA3"] = lambda: fa3(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, **names)
    except ImportError:
        pass
    try:
        from flash_attn.cute import flash_attn_varlen_func as fa4

        calls["FA4"] = lambda: fa4(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, **names)
    except ImportError:
        pass
    return calls, 2.0 * heads * d * float((lengths.double() ** 2).sum())


def errors(dtype: torch.dtype, d: int, seqlen: int, causal: bool) -> dict[str, list[float]]:
    """Of each contender: relative to the norm, and the greatest absolute one, against float64."""
    q, k, v = (torch.randn(1, seqlen, 4, d, device="cuda", dtype=dtype) for _ in range(3))
    expected = rivals.exact(q, k, v, None, causal)["out"]
    found = {}
    for name, attention in {"anyattn": rivals.ours(), **rivals.rivals("forward")}.items():
        try:
            out = attention(q, k, v, causal)
        except Exception:  # a rival may refuse a problem with any class of error
            continue
        found[name] = [rivals.relative_error(out, expected), float((out.double() - expected).abs().max())]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    problems: dict[str, Callable[[], tuple[Calls, float]]] = {}
    for (d, dv), seqlen, causal in itertools.product(
        ((32, 32), (96, 96), (192, 192), (192, 128)), (4096, 16384), (False, True)
    ):
        name = f"d{d}{f'/{dv}' if d != dv else ''} {'causal' if causal else 'full'} {seqlen}"
        problems[name] = partial(head_dims, d, dv, seqlen, causal)
    problems["float16 d128 full 4096"] = partial(head_dims, 128, 128, 4096, False, torch.float16)
    problems["bfloat16 d128 full 4096"] = partial(head_dims, 128, 128, 4096, False)
    problems["heads 32/8 d128 causal 4096"] = partial(grouped, 32, 8, 128, 4096)
    problems["packed 64 x 128..2048 d128 causal"] = partial(packed, 64, 128, 2048, 16, 128)

    result: dict[str, Any] = {"benchmark": "shapes", "meta": timing.metadata(), "problems": {}, "errors": {}}
    for name, make in problems.items():
        calls, flop = make()
        timings, failed = timing.interleaved(calls, rounds=5, slice_ms=10)
        tflops = {contender: flop / t.median / 1e9 for contender, t in timings.items()}
        best = max((t for contender, t in tflops.items() if contender != "anyattn"), default=math.nan)
        result["problems"][name] = {
            "tflops": tflops,
            "ms": timings,
            "failed": failed,
            "ratio": tflops["anyattn"] / best,
        }
        print(
            f"{name:34}", *(f"{n} {t:.0f}" for n, t in tflops.items()), f"| {tflops['anyattn'] / best:.2f}", flush=True
        )
    for dtype, d, seqlen, causal in itertools.product(
        (torch.bfloat16, torch.float16), (64, 128, 256), (1024, 4096), (False, True)
    ):
        name = f"{str(dtype).removeprefix('torch.')} d{d} {'causal' if causal else 'full'} {seqlen}"
        found = result["errors"][name] = errors(dtype, d, seqlen, causal)
        print(f"{name:30}", *(f"{n} {relative:.3e} {most:.2e}" for n, (relative, most) in found.items()), flush=True)
    print(timing.save(arguments.out, "shapes", result))


if __name__ == "__main__":
    main()
