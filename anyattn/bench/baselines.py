"""What FlashAttention's papers compare with beside other kernels: the plain formula, and two approximations of it.

`attention(q, k, v, causal) -> out` on PyTorch tensors (batch, sequence, heads, head dim), CPU or GPU, differentiable.
The approximations are as their papers describe them, at the papers' usual sizes; on random inputs, whose attention has
no structure to find, they are at their worst.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BUCKET, HASHES = 64, 4  # Reformer's
FEATURES, CHUNK = 256, 128  # Performer's; rows a step of the causal sum


def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The formula as one writes it: the whole matrix of scores in memory, in the inputs' dtype."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -torch.inf)
    out: Tensor = scores.softmax(-1) @ v
    return out.transpose(1, 2)


def reformer(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Reformer's LSH attention (Kitaev et al. 2020, arXiv:2001.04451, section 2), for keys of their own.

    Queries and keys are hashed by random rotations and sorted by their hash; rows see the BUCKET keys of their place in
    that order and the BUCKET before. The results of HASHES rounds are weighed by their sums of exponentials.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    seqlen, head_dim = q.shape[2:]
    if seqlen % (2 * BUCKET):
        raise ValueError(f"the sequence length must be a multiple of {2 * BUCKET}, got {seqlen}")
    lowest = torch.finfo(q.dtype).min
    outs, sums = [], []
    for rotation in _rotations(head_dim, seqlen // BUCKET, q.dtype, q.device):
        of_q, of_k = (_hash(x.detach() @ rotation).argsort(-1) for x in (q, k))
        qs, ks, vs = (_parts(_rows(x, order), BUCKET) for x, order in ((q, of_q), (k, of_k), (v, of_k)))
        ks, vs = (torch.cat([x.roll(1, 2), x], 3) for x in (ks, vs))
        scores = (qs * head_dim**-0.5) @ ks.transpose(-2, -1)
        if causal:
            rows, columns = (_parts(x, BUCKET) for x in (of_q, of_k))
            hidden = torch.cat([columns.roll(1, 2), columns], 3)[..., None, :] > rows[..., None]
            scores = scores.masked_fill(hidden, lowest)
        weights = scores.softmax(-1)
        if causal:
            weights = weights.masked_fill(hidden, 0)  # a row that sees no key: 0
        back = of_q.argsort(-1)
        outs.append(_rows((weights @ vs).flatten(2, 3), back))
        sums.append(scores.to(_wide(q)).logsumexp(-1).flatten(2, 3).gather(2, back))
    shares = torch.stack(sums).softmax(0).to(q.dtype)
    return (torch.stack(outs) * shares[..., None]).sum(0).transpose(1, 2)


def performer(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Performer's FAVOR+ (Choromanski et al. 2021, arXiv:2009.14794): softmax's kernel by FEATURES positive features.

    exp(q . k) is the mean over w ~ N(0, 1) of exp(w . q - |q|^2 / 2) exp(w . k - |k|^2 / 2), so that the sums over the
    keys need no matrix of scores; under the causal mask they are running sums, here CHUNK rows at a time.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    seqlen, head_dim = q.shape[2:]
    if causal and seqlen % CHUNK:
        raise ValueError(f"the sequence length must be a multiple of {CHUNK}, got {seqlen}")
    projection = _features(head_dim, q.dtype, q.device)

    def exponents(x: Tensor) -> Tensor:
        x = x * head_dim**-0.25
        return x @ projection.T - x.square().sum(-1, keepdim=True) / 2

    qe, ke = exponents(q), exponents(k)
    # A factor of a row's features, or of all keys' features, cancels.
    qf = (qe - qe.detach().amax(-1, keepdim=True)).exp() + 1e-4
    kf = (ke - ke.detach().amax((-1, -2), keepdim=True)).exp() + 1e-4
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1)  # a last column for the denominators
    if causal:
        qf, kf, v = (_parts(x, CHUNK) for x in (qf, kf, v))
        sums = (kf.transpose(-2, -1) @ v).to(_wide(q))
        before = torch.cat([torch.zeros_like(sums[:, :, :1]), sums[:, :, :-1].cumsum(2)], 2).to(q.dtype)
        out = (qf @ before + (qf @ kf.transpose(-2, -1)).tril() @ v).flatten(2, 3)
    else:
        out = qf @ (kf.transpose(-2, -1) @ v)
    quotient: Tensor = out[..., :-1] / out[..., -1:]
    return quotient.transpose(1, 2)


APPROXIMATE = {"Reformer": reformer, "Performer": performer}


def _wide(x: Tensor) -> torch.dtype:
    """The dtype for sums of many terms."""
    return torch.promote_types(x.dtype, torch.float32)


def _parts(x: Tensor, length: int) -> Tensor:
    """Dimension 2 in parts of this length."""
    return x.reshape(*x.shape[:2], -1, length, *x.shape[3:])


def _rows(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[-1]))


def _hash(rotated: Tensor) -> Tensor:
    return torch.cat([rotated, -rotated], -1).argmax(-1)


@lru_cache(maxsize=8)
def _rotations(head_dim: int, buckets: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(HASHES, head_dim, buckets // 2, generator=generator).to(device, dtype)


@lru_cache(maxsize=8)
def _features(head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """FEATURES rows (FEATURES, head_dim), orthogonal block by block, as long as Gaussian ones."""
    generator = torch.Generator().manual_seed(0)
    blocks = [
        torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator))[0]
        for _ in range(-(-FEATURES // head_dim))
    ]
    lengths = torch.randn(FEATURES, head_dim, generator=generator).norm(dim=1, keepdim=True)
    rows: Tensor = torch.cat(blocks)[:FEATURES] * lengths
    return rows.to(device, dtype)
