"""The oracle itself: against finite differences, against closed forms, and between its own layouts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from anyattn import reference
from anyattn.dropout import keep_mask

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (2, 1)},
    "window_causal": {"window": 2, "causal": True},
    "left_window": {"window": (1, -1)},
    "right_window": {"window": (None, 0)},
    "scale": {"scale": 0.7},
    "softcap": {"softcap": 1.5, "scale": 1.0},
    "alibi": {"alibi_slopes": np.array([0.3, 0.7, 0.1, 1.0])},
    "alibi_per_batch": {"alibi_slopes": np.linspace(0.1, 0.8, 8).reshape(2, 4)},
    "dropout": {"dropout": 0.4, "seed": 5},
    "all": {
        "causal": True,
        "window": (3, 2),
        "scale": 0.8,
        "softcap": 2.0,
        "alibi_slopes": np.array([0.3, 0.7, 0.1, 1.0]),
        "dropout": 0.3,
        "seed": 1 << 40,
    },
}


def inputs(seqlen_q: int, seqlen_k: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    shapes = [(2, seqlen_q, 4, 3), (2, seqlen_k, 2, 3), (2, seqlen_k, 2, 5), (2, seqlen_q, 4, 5)]
    q, k, v, dout = (rng.standard_normal(shape) for shape in shapes)
    return q, k, v, dout


@pytest.mark.parametrize("lengths", [(4, 4), (3, 6), (6, 3)])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_by_finite_differences(name: str, lengths: tuple[int, int]) -> None:
    q, k, v, dout = inputs(*lengths)
    gradients = reference.attention_backward(dout, q, k, v, **OPTIONS[name])
    rng, step = np.random.default_rng(1), 1e-5
    for tensor, gradient in zip((q, k, v), gradients, strict=True):
        for index in rng.permutation([*np.ndindex(tensor.shape)])[:16].tolist():
            index = tuple(index)
            saved = tensor[index]
            tensor[index] = saved + step
            above = (dout * reference.attention(q, k, v, **OPTIONS[name])[0]).sum()
            tensor[index] = saved - step
            below = (dout * reference.attention(q, k, v, **OPTIONS[name])[0]).sum()
            tensor[index] = saved
            assert gradient[index] == pytest.approx((above - below) / (2 * step), rel=1e-6, abs=1e-8)


def test_against_the_two_line_formula() -> None:
    q, k, v, _ = (x[:, :, :2] for x in inputs(5, 7))
    scores = np.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(3)
    p = np.exp(scores)
    p /= p.sum(-1, keepdims=True)
    out, lse = reference.attention(q, k, v)
    np.testing.assert_allclose(out, np.einsum("bhij,bjhd->bihd", p, v), rtol=1e-12)
    np.testing.assert_allclose(lse, np.log(np.exp(scores).sum(-1)), rtol=1e-12)


@pytest.mark.parametrize(
    ("lengths", "options", "visible"),
    [
        ((3, 3), {"causal": True}, ["100", "110", "111"]),
        ((2, 4), {"causal": True}, ["1110", "1111"]),
        ((4, 2), {"causal": True}, ["00", "00", "10", "11"]),
        ((3, 3), {"window": 1}, ["110", "111", "011"]),
        ((3, 3), {"window": (0, -1)}, ["111", "011", "001"]),
        ((2, 4), {"window": (1, 0)}, ["0110", "0011"]),
        ((3, 3), {"window": (1, 2), "causal": True}, ["100", "110", "011"]),
    ],
)
def test_which_keys_a_row_sees(lengths: tuple[int, int], options: dict[str, Any], visible: list[str]) -> None:
    seqlen_q, seqlen_k = lengths
    out, _ = reference.attention(np.zeros((seqlen_q, 2)), np.zeros((seqlen_k, 2)), np.eye(seqlen_k), **options)
    assert ["".join("01"[int(value > 0)] for value in row) for row in out] == visible


def test_rows_that_see_nothing() -> None:
    q, k, v, dout = inputs(6, 2)
    out, lse = reference.attention(q, k, v, causal=True)
    assert (out[:, :4] == 0).all()
    assert (out[:, 4:] != 0).any()
    assert (lse[:, :, :4] == -np.inf).all()
    assert np.isfinite(lse[:, :, 4:]).all()
    dq, dk, dv = reference.attention_backward(dout, q, k, v, causal=True)
    assert (dq[:, :4] == 0).all()
    assert np.isfinite(dk).all()
    assert np.isfinite(dv).all()


def test_length_zero() -> None:
    q, k, v, dout = inputs(3, 0)
    out, lse = reference.attention(q, k, v)
    assert (out == 0).all()
    assert (lse == -np.inf).all()
    assert (reference.attention_backward(dout, q, k, v)[0] == 0).all()
    q, k, v, _ = inputs(0, 3)
    assert reference.attention(q, k, v)[0].shape == (2, 0, 4, 5)


def test_dropout_uses_the_shared_mask_and_keeps_the_lse() -> None:
    q, k, _, _ = inputs(8, 16)
    v = np.broadcast_to(np.eye(16)[None, :, None, :], (2, 16, 2, 16))
    plain, lse = reference.attention(q, k, v)
    dropped, lse_dropped = reference.attention(q, k, v, dropout=0.25, seed=3)
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], plain[kept] / 0.75)
    assert np.array_equal(kept[1, :, 2], keep_mask(3, 0.25, 1, 2, range(8), range(16)))
    np.testing.assert_array_equal(lse, lse_dropped)


def test_layouts_and_ranks_agree() -> None:
    q, k, v, dout = inputs(5, 7)
    options = OPTIONS["all"]
    out, lse = reference.attention(q, k, v, **options)
    grads = reference.attention_backward(dout, q, k, v, **options)
    turned = [x.swapaxes(1, 2) for x in (q, k, v, dout)]
    out_bhsd, lse_bhsd = reference.attention(*turned[:3], layout="bhsd", **options)
    np.testing.assert_array_equal(out_bhsd.swapaxes(1, 2), out)
    np.testing.assert_array_equal(lse_bhsd, lse)
    grads_bhsd = reference.attention_backward(turned[3], *turned[:3], layout="bhsd", **options)
    for gradient, gradient_bhsd in zip(grads, grads_bhsd, strict=True):
        np.testing.assert_array_equal(gradient_bhsd.swapaxes(1, 2), gradient)

    out_3d, lse_3d = reference.attention(q[0], k[0], v[0], **options)
    np.testing.assert_array_equal(out_3d, out[0])
    np.testing.assert_array_equal(lse_3d, lse[0])

    options = {name: value for name, value in options.items() if name != "alibi_slopes"}
    out_2d, lse_2d = reference.attention(q[0, :, 0], k[0, :, 0], v[0, :, 0], **options)
    out_4d, lse_4d = reference.attention(q[:1, :, :1], k[:1, :, :1], v[:1, :, :1], **options)
    np.testing.assert_array_equal(out_2d, out_4d[0, :, 0])
    np.testing.assert_array_equal(lse_2d, lse_4d[0, 0])


def test_varlen_is_dense_sequence_by_sequence() -> None:
    rng = np.random.default_rng(1)
    lengths_q, lengths_k = [3, 0, 4, 2], [5, 2, 0, 2]
    cu_q, cu_k = np.cumsum([0, *lengths_q]), np.cumsum([0, *lengths_k])
    q, dout = rng.standard_normal((9, 4, 3)), rng.standard_normal((9, 4, 5))
    k, v = rng.standard_normal((9, 2, 3)), rng.standard_normal((9, 2, 5))
    options: dict[str, Any] = {"causal": True, "softcap": 2.0}  # dropout and ALiBi know the batch index: not here
    out, lse = reference.attention_varlen(q, k, v, cu_q, cu_k, **options)
    grads = reference.attention_varlen_backward(dout, q, k, v, cu_q, cu_k, **options)
    for b in range(4):
        i, j = slice(*cu_q[b : b + 2]), slice(*cu_k[b : b + 2])
        out_b, lse_b = reference.attention(q[i], k[j], v[j], **options)
        np.testing.assert_array_equal(out[i], out_b)
        np.testing.assert_array_equal(lse[:, i], lse_b)
        grads_b = reference.attention_backward(dout[i], q[i], k[j], v[j], **options)
        for gradient, gradient_b, rows in zip(grads, grads_b, (i, j, j), strict=True):
            np.testing.assert_array_equal(gradient[rows], gradient_b)
