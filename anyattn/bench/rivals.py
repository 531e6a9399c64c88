"""Every implementation behind one signature: `attention(q, k, v, causal) -> out`.

q, k, v and out are tensors (batch, sequence, heads, head dim) on a GPU, or where it is said on the CPU; out is
differentiable where the implementation has a backward pass.
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


def fa2() -> Attention | None:
    """FlashAttention-2 (package flash-attn); None where it is not installed. FLASH is PyTorch's copy of it."""
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None
    return lambda q, k, v, causal: flash_attn_func(q, k, v, causal=causal)


def fa3() -> Attention | None:
    """FlashAttention-3 (package fa3-fwd), forward only; None where it is not installed."""
    try:
        from fa3_fwd_interface import flash_attn_func
    except ImportError:
        return None
    return lambda q, k, v, causal: flash_attn_func(q, k, v, causal=causal)


def fa4() -> Attention | None:
    """FlashAttention-4 (package flash-attn-4), which compiles at its first call; None where it is not installed."""
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError:
        return None
    return lambda q, k, v, causal: flash_attn_func(q, k, v, causal=causal)[0]


def xformers() -> Attention | None:
    """xFormers' choice among its kernels; None where it is not installed."""
    try:
        from xformers.ops import LowerTriangularMask, memory_efficient_attention
    except ImportError:
        return None
    return lambda q, k, v, causal: memory_efficient_attention(
        q, k, v, attn_bias=LowerTriangularMask() if causal else None
    )


def rivals(direction: str) -> dict[str, Attention]:
    """Everything installed that runs `direction` ("forward" or "backward") on a GPU, in bfloat16 and linear memory."""
    found: dict[str, Attention | None] = {name: sdpa(name) for name in ("FLASH", "CUDNN", "EFFICIENT")}
    found |= {"FA2": fa2(), "FA3": fa3() if direction == "forward" else None, "FA4": fa4(), "XFORMERS": xformers()}
    return {name: attention for name, attention in found.items() if attention is not None}


def ours(kernel: str = "auto", backend: str = "auto") -> Attention:
    """anyattn through its PyTorch adapter, held to one kernel ("sm80", ...) unless it is "auto".

    The choice counts for the process: it is made before anyattn is first imported.
    """
    if kernel != "auto":
        os.environ["ANYATTN_KERNEL"] = kernel
    import anyattn

    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        out = anyattn.attention(q, k, v, causal=causal, backend=backend)
        assert isinstance(out, Tensor)
        return out

    return attention


def exact(q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None, causal: bool) -> dict[str, Tensor]:
    """out, and where dout is given dq, dk and dv: the plain formulas in float64, a head at a time."""
    results = {"out": torch.empty(q.shape, dtype=torch.float64, device=q.device)}
    if dout is not None:
        results |= {name: torch.empty_like(results["out"]) for name in ("dq", "dk", "dv")}
    seqlen, head_dim = q.shape[1], q.shape[3]
    hidden = torch.ones(seqlen, seqlen, dtype=torch.bool, device=q.device).triu(1)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            heads = [x[b, :, h].double().requires_grad_(dout is not None) for x in (q, k, v)]
            scores = heads[0] @ heads[1].T * head_dim**-0.5
            out = (scores.masked_fill(hidden, -torch.inf) if causal else scores).softmax(-1) @ heads[2]
            results["out"][b, :, h] = out.detach()
            if dout is not None:
                gradients = torch.autograd.grad(out, heads, dout[b, :, h].double())
                for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
                    results[name][b, :, h] = gradient
    return results


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative to the norm; NaN if there is one."""
    return float((actual.double() - expected).norm() / expected.norm())


def backward_of(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool
) -> Callable[[], tuple[Tensor, ...]]:
    """A function that runs the backward pass alone, each time anew; its first call runs the forward pass too."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = cache(lambda: attention(q, k, v, causal))
    return lambda: torch.autograd.grad(out(), (q, k, v), dout, retain_graph=True)
