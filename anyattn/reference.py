"""The plain formulas in float64, forward and backward: the oracle of every test.

Each function follows the definitions word for word, one head at a time, and stores the whole S_q x S_k matrix. With
x = scale * q k^T, everything is

    s = softcap * tanh(x / softcap)  -  slope * |p - j|       p = i + S_k - S_q: where query i stands among the keys
    P = softmax of s over the keys row i sees                 a row that sees none: P = 0, LSE = -inf
    out = (P o Z) v                                           Z = keep / (1 - dropout)
    dv = (P o Z)^T dout       dP = (dout v^T) o Z       dS = P o (dP - rowsum(P o dP))
    dX = dS o (1 - tanh^2(x / softcap))       dq = scale * dX k       dk = scale * dX^T q

What is hidden is absent: where P = 0 because row i does not see key j, neither reaches the other's results, NaN or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from anyattn.dropout import keep_mask

Floats: TypeAlias = npt.NDArray[np.floating[Any]]
Window: TypeAlias = "int | tuple[int | None, int | None] | None"


@dataclass(frozen=True)
class Head:
    """One head of one sequence: the formulas."""

    scale: float
    softcap: float | None
    left: float  # window bounds; inf = unbounded
    right: float
    dropout: float
    seed: int
    slope: float
    batch: int
    head: int

    def stored(self, x: Any) -> Any:
        """The identity. A subclass that rounds here shows what storing each matrix in a low precision costs."""
        return x

    def product(self, a: Floats, b: Floats) -> Floats:
        """The matrix product."""
        return a @ b

    def product_of_seen(self, a: Floats, b: Floats, hidden: Any) -> Floats:
        """The product a b without the terms where a is hidden (0 there): 0 * NaN would be NaN."""
        if np.isfinite(b).all():
            return self.product(a, b)
        rows = [row[seen] @ b[seen] for row, seen in zip(a, ~hidden, strict=True)]
        return np.array(rows).reshape(len(a), b.shape[1])

    def hidden(self, seqlen_q: int, seqlen_k: int) -> npt.NDArray[np.bool_]:
        """Return (S_q, S_k): which keys the rows do not see."""
        position = np.arange(seqlen_q)[:, None] + (seqlen_k - seqlen_q)
        key = np.arange(seqlen_k)[None, :]
        return (key < position - self.left) | (key > position + self.right)

    def scores(self, q: Floats, k: Floats) -> tuple[Floats, Floats]:
        """Return s, -inf where hidden, and its derivative ds/dx, both (S_q, S_k)."""
        distance = np.abs(np.arange(len(q))[:, None] + (len(k) - len(q)) - np.arange(len(k))[None, :])
        s = self.stored(self.scale * self.product(q, k.T))
        slope_of_cap = np.ones_like(s)
        if self.softcap is not None:
            tanh = np.tanh(s / self.softcap)
            s, slope_of_cap = self.stored(self.softcap * tanh), 1.0 - tanh * tanh
        s = self.stored(s - self.slope * distance)
        s[self.hidden(len(q), len(k))] = -np.inf
        return s, slope_of_cap

    def softmax(self, s: Floats) -> tuple[Floats, Floats]:
        """Return P and the LSE (S_q,)."""
        highest = s.max(axis=1, initial=-np.inf)
        shift = np.where(highest > -np.inf, highest, 0.0)
        weights = np.exp(s - shift[:, None])
        total = weights.sum(axis=1)
        with np.errstate(divide="ignore"):
            lse = shift + np.log(total)
        return self.stored(weights / np.where(total == 0.0, 1.0, total)[:, None]), lse

    def dropout_factor(self, s: Floats) -> Floats:
        """Return Z, of the shape of s."""
        z = np.ones_like(s)
        if self.dropout:
            z *= keep_mask(self.seed, self.dropout, self.batch, self.head, range(s.shape[0]), range(s.shape[1]))
        return z / (1.0 - self.dropout)

    def forward(self, q: Floats, k: Floats, v: Floats) -> tuple[Floats, Floats]:
        """Return out (S_q, D_v) and the LSE (S_q,)."""
        q, k, v = map(self.stored, (q, k, v))
        p, lse = self.softmax(self.scores(q, k)[0])
        p = self.stored(p * self.dropout_factor(p))
        return self.stored(self.product_of_seen(p, v, self.hidden(len(q), len(k)))), lse

    def backward(self, dout: Floats, q: Floats, k: Floats, v: Floats) -> tuple[Floats, Floats, Floats]:
        """Return dq, dk and dv."""
        s, slope_of_cap = self.scores(q, k)
        p, z, hidden = self.softmax(s)[0], self.dropout_factor(s), self.hidden(len(q), len(k))
        p[hidden] = 0.0
        dp = (dout @ v.T) * z
        dp[hidden] = 0.0
        dx = p * (dp - (p * dp).sum(axis=1, keepdims=True)) * slope_of_cap
        dx[hidden] = 0.0
        dq, dk = self.product_of_seen(dx, k, hidden), self.product_of_seen(dx.T, q, hidden.T)
        return self.scale * dq, self.scale * dk, self.product_of_seen((p * z).T, dout, hidden.T)


def _heads(
    sequences: int,
    heads: int,
    heads_kv: int,
    head_dim: int,
    *,
    causal: bool = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    dropout: float = 0.0,
    seed: int | None = None,
    head_type: type[Head] = Head,
) -> Iterator[tuple[int, int, int, Head]]:
    """Yield (sequence, query head, the K/V head it reads, its formulas)."""
    bounds = window if isinstance(window, tuple) else (window, window)
    left, right = (math.inf if bound is None or bound < 0 else float(bound) for bound in bounds)
    if causal:
        right = min(right, 0.0)
    slopes = np.zeros(heads) if alibi_slopes is None else np.asarray(alibi_slopes, np.float64)
    slopes = np.broadcast_to(slopes, (sequences, heads))
    if scale is None:
        scale = 1.0 / math.sqrt(head_dim)
    for b in range(sequences):
        for h in range(heads):
            head = head_type(scale, softcap, left, right, dropout, seed or 0, float(slopes[b, h]), b, h)
            yield b, h, h * heads_kv // heads, head


def _bhsd(x: Any, layout: str) -> Floats:
    """A (batch, heads, sequence, dim) float64 view or copy of a 2-D to 4-D array in `layout`."""
    array = np.asarray(x).astype(np.float64)
    if array.ndim == 2:
        return array[None, None]
    if array.ndim == 3:
        array = array[None]
    return array.swapaxes(1, 2) if layout == "bshd" else array


def _restored(x: Floats, ndim: int, layout: str) -> Floats:
    """The inverse of `_bhsd`."""
    if layout == "bshd":
        x = x.swapaxes(1, 2)
    return x.reshape(x.shape[4 - ndim :]) if ndim > 2 else x.reshape(-1, x.shape[-1])


def attention(q: Any, k: Any, v: Any, *, layout: str = "bshd", **options: Any) -> tuple[Floats, Floats]:
    """Exact attention, straight from the formulas.

    Args:
        q, k, v: arrays of any real dtype, (B, S, H, D) for "bshd", (B, H, S, D) for "bhsd", 3-D without the batch, 2-D
            (S, D) for one head. K and V may have fewer heads (H % H_kv == 0) and V another head dim.
        layout: "bshd" or "bhsd".
        options: causal, window, scale, softcap, alibi_slopes, dropout and seed, as in `anyattn.attention`; head_type
            replaces the formulas by a subclass of `Head`.

    Returns:
        out in float64 in the layout of q, and the natural-log LSE (B, H, S_q), (H, S_q) or (S_q,).
    """
    qs, ks, vs = (_bhsd(x, layout) for x in (q, k, v))
    batch, heads, seqlen_q, head_dim = qs.shape
    out, lse = np.zeros((batch, heads, seqlen_q, vs.shape[-1])), np.zeros((batch, heads, seqlen_q))
    for b, h, h_kv, head in _heads(batch, heads, ks.shape[1], head_dim, **options):
        out[b, h], lse[b, h] = head.forward(qs[b, h], ks[b, h_kv], vs[b, h_kv])
    return _restored(out, np.ndim(q), layout), lse.reshape(lse.shape[4 - np.ndim(q) :])


def attention_backward(
    dout: Any, q: Any, k: Any, v: Any, *, layout: str = "bshd", **options: Any
) -> tuple[Floats, Floats, Floats]:
    """The gradients of sum(dout * out) with respect to q, k and v, in float64; arguments as in `attention`."""
    douts, qs, ks, vs = (_bhsd(x, layout) for x in (dout, q, k, v))
    dq, dk, dv = np.zeros_like(qs), np.zeros_like(ks), np.zeros_like(vs)
    for b, h, h_kv, head in _heads(len(qs), qs.shape[1], ks.shape[1], qs.shape[-1], **options):
        dq[b, h], dk_head, dv_head = head.backward(douts[b, h], qs[b, h], ks[b, h_kv], vs[b, h_kv])
        dk[b, h_kv] += dk_head
        dv[b, h_kv] += dv_head
    ndim = np.ndim(q)
    return _restored(dq, ndim, layout), _restored(dk, ndim, layout), _restored(dv, ndim, layout)


def attention_varlen(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, **options: Any
) -> tuple[Floats, Floats]:
    """`attention` of sequences packed one after the other.

    Args:
        q, k, v: (total_q, H, D), (total_k, H_kv, D), (total_k, H_kv, D_v).
        cu_seqlens_q, cu_seqlens_k: (N + 1,) integers: sequence b holds the rows cu_seqlens[b]:cu_seqlens[b + 1].

    Returns:
        out (total_q, H, D_v) and the LSE (H, total_q), in float64.
    """
    qs, ks, vs = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    out, lse = np.zeros((*qs.shape[:2], vs.shape[-1])), np.zeros((qs.shape[1], qs.shape[0]))
    for b, h, h_kv, head in _heads(len(cu_seqlens_q) - 1, qs.shape[1], ks.shape[1], qs.shape[-1], **options):
        i, j = slice(*cu_seqlens_q[b : b + 2]), slice(*cu_seqlens_k[b : b + 2])
        out[i, h], lse[h, i] = head.forward(qs[i, h], ks[j, h_kv], vs[j, h_kv])
    return out, lse


def attention_varlen_backward(
    dout: Any, q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, **options: Any
) -> tuple[Floats, Floats, Floats]:
    """The gradients of `attention_varlen`, in float64."""
    douts, qs, ks, vs = (np.asarray(x).astype(np.float64) for x in (dout, q, k, v))
    dq, dk, dv = np.zeros_like(qs), np.zeros_like(ks), np.zeros_like(vs)
    for b, h, h_kv, head in _heads(len(cu_seqlens_q) - 1, qs.shape[1], ks.shape[1], qs.shape[-1], **options):
        i, j = slice(*cu_seqlens_q[b : b + 2]), slice(*cu_seqlens_k[b : b + 2])
        dq[i, h], dk_head, dv_head = head.backward(douts[i, h], qs[i, h], ks[j, h_kv], vs[j, h_kv])
        dk[j, h_kv] += dk_head
        dv[j, h_kv] += dv_head
    return dq, dk, dv
