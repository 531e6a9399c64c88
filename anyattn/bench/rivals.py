"""Every implementation behind one signature: `attention(q, k, v, causal) -> out`.

q, k, v and out are CUDA tensors (batch, sequence, heads, head dim), and out is differentiable where the implementation
has a backward pass.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Attention: TypeAlias = Callable[[Tensor, Tensor, Tensor, bool], Tensor]

SDPA = {
    "FLASH": SDPBackend.FLASH_ATTENTION,  # FlashAttention-2
    "CUDNN": SDPBackend.CUDNN_ATTENTION,
    "EFFICIENT": SDPBackend.EFFICIENT_ATTENTION,  # xFormers' cutlass kernel
    "MATH": SDPBackend.MATH,  # the formulas, with the whole S x S matrix in memory
}


def sdpa(name: str) -> Attention:
    """PyTorch's scaled_dot_product_attention, held to one of its backends."""

    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        with sdpa_kernel(SDPA[name]):
            return plain_sdpa(q, k, v, causal)

    return attention


def plain_sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """PyTorch's choice of backend, or the caller's, who stands inside `sdpa_kernel`."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def fa3() -> Attention | None:
    """FlashAttention-3 (package fa3-fwd), forward only; None where it is not installed."""
    try:
        from fa3_fwd_interface import flash_attn_func  # type: ignore[import-not-found]
    except ImportError:
        return None
    return lambda q, k, v, causal: flash_attn_func(q, k, v, causal=causal)


def fa4() -> Attention | None:
    """FlashAttention-4 (package flash-attn-4), which compiles at its first call; None where it is not installed."""
    try:
        from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]
    except ImportError:
        return None
    return lambda q, k, v, causal: flash_attn_func(q, k, v, causal=causal)[0]


def rivals(direction: str) -> dict[str, Attention]:
    """Everything installed that runs `direction` ("forward" or "backward") in bfloat16 and linear memory."""
    found: dict[str, Attention | None] = {name: sdpa(name) for name in ("FLASH", "CUDNN", "EFFICIENT")}
    found["FA3"] = fa3() if direction == "forward" else None
    found["FA4"] = fa4()
    return {name: attention for name, attention in found.items() if attention is not None}


def ours(kernel: str = "auto") -> Attention:
    """anyattn through its PyTorch adapter, held to one kernel ("sm80", ...) unless it is "auto".

    The choice counts for the process: it is made before anyattn is first imported.
    """
    if kernel != "auto":
        os.environ["ANYATTN_KERNEL"] = kernel
    import anyattn

    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        out = anyattn.attention(q, k, v, causal=causal)
        assert isinstance(out, Tensor)
        return out

    return attention


def backward_of(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool
) -> Callable[[], tuple[Tensor, ...]]:
    """A function that runs the backward pass alone, each time anew; its first call runs the forward pass too."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = cache(lambda: attention(q, k, v, causal))
    return lambda: torch.autograd.grad(out(), (q, k, v), dout, retain_graph=True)
