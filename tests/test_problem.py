"""Problem: what shapes, strides and options become. No array is touched, so sizes may be anything."""

from __future__ import annotations

import math
from typing import Any

import pytest

from anyattn.problem import UNBOUNDED, Options, Problem, View, backward, dense, packed, varlen


def contiguous(*shape: int, ptr: int = 512, dtype: str = "float16", device: int = 0) -> View:
    return View(ptr, shape, tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape))), dtype, device)


def self_attention(x: View, **options: Any) -> Problem:
    return dense(x, x, x, None, Options(**options))


@pytest.mark.parametrize(
    ("shape", "layout", "strides", "sizes"),
    [
        ((2, 5, 3, 8), "bshd", (120, 8, 24, 1), (2, 3, 5)),
        ((2, 3, 5, 8), "bhsd", (120, 40, 8, 1), (2, 3, 5)),
        ((5, 3, 8), "bshd", (0, 8, 24, 1), (1, 3, 5)),
        ((3, 5, 8), "bhsd", (0, 40, 8, 1), (1, 3, 5)),
        ((5, 8), "bshd", (0, 0, 8, 1), (1, 1, 5)),
        ((5, 8), "bhsd", (0, 0, 8, 1), (1, 1, 5)),
    ],
)
def test_layouts_are_strides(
    shape: tuple[int, ...], layout: str, strides: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    p = self_attention(contiguous(*shape), layout=layout)
    assert (p.batch, p.heads, p.seqlen_q) == sizes
    assert p.q_strides == p.k_strides == p.v_strides == p.out_strides == strides
    assert p.out_shape == p.q_shape == p.k_shape == p.v_shape == shape
    assert p.lse_shape == sizes[4 - len(shape) :]
    assert p.lse_strides == (sizes[1] * sizes[2], sizes[2], 1)


def test_everything_may_differ_between_q_and_kv() -> None:
    q, k, v = contiguous(2, 5, 6, 8), contiguous(2, 7, 3, 8), contiguous(2, 7, 3, 9)
    p = dense(q, k, v, None, Options())
    assert (p.heads, p.heads_kv, p.seqlen_q, p.seqlen_k, p.head_dim, p.head_dim_v) == (6, 3, 5, 7, 8, 9)
    assert (p.out_shape, p.k_shape, p.v_shape) == ((2, 5, 6, 9), k.shape, v.shape)
    assert p.scale == 1 / math.sqrt(8)


def test_strides_that_no_step_uses_are_normalised() -> None:
    one = View(0, (1, 1, 1, 1), (77, 55, 33, 9), "float32", 0)
    assert self_attention(one).q_strides == (0, 0, 0, 1)
    empty = View(0, (3, 0, 2, 8), (1, 1, 8, 1), "float32", 0)
    assert self_attention(empty).q_strides == (1, 8, 0, 1)


@pytest.mark.parametrize(
    ("window", "causal", "bounds"),
    [
        (None, False, (UNBOUNDED, UNBOUNDED)),
        (None, True, (UNBOUNDED, 0)),
        ((-1, -1), False, (UNBOUNDED, UNBOUNDED)),
        ((None, 3), False, (UNBOUNDED, 3)),
        (4, False, (4, 4)),
        (-1, True, (UNBOUNDED, 0)),
        ((4, 9), True, (4, 0)),
        ((0, 0), False, (0, 0)),
        ((30, 11), False, (30, 11)),  # keys 0..31, queries 0..15: the last bounds that hide something
        ((31, 15), False, (UNBOUNDED, UNBOUNDED)),
        (10**12, False, (UNBOUNDED, UNBOUNDED)),
    ],
)
def test_window(window: Any, causal: bool, bounds: tuple[int, int]) -> None:
    q, k = contiguous(1, 16, 1, 8), contiguous(1, 32, 1, 8)
    p = dense(q, k, k, None, Options(window=window, causal=causal))
    assert (p.left, p.right) == bounds


def test_window_bounds_hide_something_unless_unbounded() -> None:
    """Against the definition, for all small lengths and windows."""

    def visible(seqlen_q: int, seqlen_k: int, left: float, right: float) -> set[tuple[int, int]]:
        shift = seqlen_k - seqlen_q
        return {
            (i, j) for i in range(seqlen_q) for j in range(seqlen_k) if i + shift - left <= j <= i + shift + right
        }  # fmt: skip

    for seqlen_q in range(5):
        for seqlen_k in range(5):
            q, k = contiguous(1, seqlen_q, 1, 8), contiguous(1, seqlen_k, 1, 8)
            for left in range(6):
                for right in range(6):
                    p = dense(q, k, k, None, Options(window=(left, right)))
                    assert visible(seqlen_q, seqlen_k, p.left, p.right) == visible(seqlen_q, seqlen_k, left, right)


def test_one_causal_query_is_not_masked() -> None:
    q, k = contiguous(1, 1, 4, 64), contiguous(1, 1000, 4, 64)
    assert dense(q, k, k, None, Options(causal=True)) == dense(q, k, k, None, Options())


@pytest.mark.parametrize(
    ("view", "align"),
    [
        (contiguous(2, 5, 3, 8), 16),
        (contiguous(2, 5, 3, 4), 8),
        (contiguous(2, 5, 3, 7), 2),
        (contiguous(2, 5, 3, 7, dtype="float64"), 8),
        (contiguous(2, 5, 3, 8, ptr=514), 2),
        (contiguous(2, 5, 3, 8, ptr=520), 8),
        (contiguous(1, 5, 1, 8), 16),
        (View(512, (2, 5, 3, 8), (-120, -24, -8, 1), "float16", 0), 16),
        (View(512, (2, 5, 3, 8), (-120, -24, -9, 1), "float16", 0), 2),
        (View(512, (2, 5, 3, 8), (0, 24, 0, 1), "float16", 0), 16),
        (View(512, (2, 5, 3, 8), (240, 48, 16, 2), "float16", 0), 2),
        (View(512, (2, 5, 3, 8), (240, 48, 16, 2), "float32", 0), 4),
        (View(512, (1, 5, 1, 8), (3, 8, 5, 1), "float16", 0), 16),
    ],
)
def test_align(view: View, align: int) -> None:
    assert self_attention(view).align == align
    good = contiguous(*view.shape, dtype=view.dtype)
    for arrays in ((view, good, good), (good, view, good), (good, good, view)):
        assert dense(*arrays, None, Options()).align == align


def test_sizes_beyond_32_bits() -> None:
    p = self_attention(contiguous(200_000, 128, 1024, 128))
    assert p.q_strides[0] * p.batch > 2**31
    assert p.lse_shape == (200_000, 1024, 128)
    assert self_attention(contiguous(1, 2**30 - 1, 64, 128)).seqlen_q == 2**30 - 1


@pytest.mark.parametrize("head_dim", [1, 256])
def test_head_dim_limits(head_dim: int) -> None:
    assert self_attention(contiguous(1, 4, 1, head_dim)).head_dim == head_dim


@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8), (2, 4, 0, 8)])
def test_nothing_is_legal(shape: tuple[int, ...]) -> None:
    assert self_attention(contiguous(*shape)).out_shape == shape


def test_alibi_strides() -> None:
    x = contiguous(2, 5, 3, 8)
    for slopes, strides in (
        (contiguous(3, dtype="float32"), (0, 1)),
        (contiguous(2, 3, dtype="float32"), (3, 1)),
        (View(0, (2, 3), (1, -2), "float32", 0), (1, -2)),
    ):
        p = dense(x, x, x, slopes, Options())
        assert p.alibi
        assert p.alibi_strides == strides
    assert not dense(x, x, x, None, Options()).alibi


def test_options_by_value() -> None:
    x = contiguous(2, 5, 3, 8)
    p = self_attention(x, causal=1, window=(3.0, None), scale=2, softcap=5, dropout=0, deterministic=True)
    assert p == self_attention(x, causal=True, window=(3, -1), scale=2.0, softcap=5.0, dropout=0.0, deterministic=True)
    assert (p.scale, p.softcap, p.deterministic) == (2.0, 5.0, True)


def test_a_repeated_call_is_a_look_up() -> None:
    x = contiguous(2, 5, 3, 8)
    p = self_attention(x, causal=True)
    assert self_attention(x._replace(ptr=x.ptr + 1024), causal=True) is p
    assert self_attention(x._replace(ptr=x.ptr + 2), causal=True) is not p
    assert self_attention(x._replace(device=1), causal=True) != p


def test_equal_problems_hash_alike() -> None:
    x = contiguous(2, 5, 3, 8)
    a, b = self_attention(x), self_attention(x, window=(-1, -1))
    assert a is not b
    assert a == b
    assert hash(a) == hash(b)


def packed_sequences(**options: Any) -> Problem:
    q, k, v = contiguous(10, 4, 8), contiguous(20, 2, 8), contiguous(20, 2, 24)
    cu = contiguous(4, dtype="int32")
    return varlen(q, k, v, cu, cu, 6, 9, None, Options(**options))


def test_varlen() -> None:
    p = packed_sequences(causal=True)
    assert (p.batch, p.heads, p.heads_kv, p.seqlen_q, p.seqlen_k, p.total_q, p.total_k) == (3, 4, 2, 6, 9, 10, 20)
    assert (p.q_strides, p.v_strides, p.out_strides) == ((0, 8, 32, 1), (0, 24, 48, 1), (0, 24, 96, 1))
    assert (p.out_shape, p.lse_shape, p.lse_strides) == ((10, 4, 24), (4, 10), (0, 10, 1))
    assert (p.q_shape, p.k_shape, p.v_shape) == ((10, 4, 8), (20, 2, 8), (20, 2, 24))
    assert p.varlen
    assert (p.left, p.right) == (UNBOUNDED, 0)


def test_varlen_without_sequences() -> None:
    x, cu = contiguous(0, 4, 8), contiguous(1, dtype="int32")
    assert varlen(x, x, x, cu, cu, 0, 0, None, Options()).batch == 0


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_backward(layout: str) -> None:
    swap = [0, 2, 1, 3] if layout == "bhsd" else [0, 1, 2, 3]

    def array(*bshd: int) -> View:
        return contiguous(*(bshd[axis] for axis in swap))

    q, k, v, out = array(2, 5, 6, 8), array(2, 7, 3, 8), array(2, 7, 3, 16), array(2, 5, 6, 16)
    p = dense(q, k, v, None, Options(layout=layout))
    dout = out._replace(strides=(0, 0, 0, 1))
    wide = out._replace(strides=(*(2 * s for s in out.strides[:3]), 1))
    bp = backward(p, dout, wide, contiguous(2, 6, 5, dtype="float32"))
    assert (bp.dq_shape, bp.dk_shape, bp.dv_shape) == (q.shape, k.shape, v.shape)
    assert (bp.dq_strides, bp.dk_strides, bp.dv_strides) == (p.q_strides, p.k_strides, p.v_strides)
    assert bp.dout_strides == (0, 0, 0, 1)
    assert bp.out_strides == (*(2 * s for s in p.out_strides[:3]), 1)
    assert bp.lse_strides == (30, 5, 1)
    assert bp.align == 16
    assert backward(p, dout._replace(ptr=516), wide, contiguous(2, 6, 5, dtype="float32")).align == 4
    assert backward(p, dout, wide, contiguous(2, 6, 5, dtype="float32")) is bp


@pytest.mark.parametrize(("shape", "strides"), [((7, 6, 8), (0, 7, 1)), ((7, 8), (0, 0, 1))])
def test_backward_of_fewer_dimensions(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    x = contiguous(*shape)
    lse = contiguous(*self_attention(x).lse_shape, dtype="float32")
    bp = backward(self_attention(x), x, x, lse)
    assert bp.dq_shape == shape
    assert bp.lse_strides == strides


def test_lse_of_float64_is_float64() -> None:
    x = contiguous(2, 5, 3, 8, dtype="float64")
    assert self_attention(x).lse_dtype == "float64"
    assert backward(self_attention(x), x, x, contiguous(2, 3, 5, dtype="float64")).lse_strides == (15, 5, 1)


def test_packed_copies() -> None:
    x = View(514, (2, 5, 3, 8), (1000, 100, 11, 2), "float16", -1)
    slopes = View(0, (3,), (7,), "float32", -1)
    p = packed(dense(x, x, x, slopes, Options(causal=True)), 1)
    assert p == dense(*[contiguous(2, 5, 3, 8, device=1)] * 3, contiguous(3, dtype="float32", device=1), Options(True))
    assert packed(packed_sequences(), 0) == packed_sequences()


CPU, GPU = contiguous(2, 5, 3, 8, device=-1), contiguous(2, 5, 3, 8)
CU, CU_CPU = contiguous(3, dtype="int32"), contiguous(3, dtype="int32", device=-1)
ROWS = contiguous(10, 3, 8)
LSE = contiguous(2, 3, 5, dtype="float32")
PLAIN = Options()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: dense(CPU, GPU, CPU, None, PLAIN), ValueError, r"k must be on q's device, host memory, got cuda:0"),
        (lambda: dense(GPU, GPU, CPU, None, PLAIN), ValueError, r"v must be on q's device, cuda:0, got host memory"),
        (
            lambda: dense(GPU, GPU._replace(device=1), GPU, None, PLAIN),
            ValueError,
            r"k must be on q's device, cuda:0, got cuda:1",
        ),
        (
            lambda: dense(GPU, GPU, GPU, contiguous(3, dtype="float32", device=-1), PLAIN),
            ValueError,
            r"alibi_slopes must be on q's device, cuda:0, got host memory",
        ),
        (
            lambda: varlen(ROWS, ROWS, ROWS, CU, CU_CPU, 5, 5, None, PLAIN),
            ValueError,
            r"cu_seqlens_k must be on q's device, cuda:0, got host memory",
        ),
        (
            lambda: backward(self_attention(GPU), CPU, GPU, LSE),
            ValueError,
            r"dout must be on q's device, cuda:0, got host memory",
        ),
        (
            lambda: dense(GPU, GPU._replace(ptr=513), GPU, None, PLAIN),
            ValueError,
            r"k: its data must be aligned to its 2-byte elements",
        ),
        (
            lambda: backward(self_attention(GPU), GPU, GPU, LSE._replace(ptr=514)),
            ValueError,
            r"lse: its data must be aligned to its 4-byte elements",
        ),
        (
            lambda: dense(GPU, GPU, GPU, contiguous(GPU.shape[2], ptr=514, dtype="float32"), Options()),
            ValueError,
            r"alibi_slopes: its data must be aligned to its 4-byte elements",
        ),
        (
            lambda: varlen(ROWS, ROWS, ROWS, CU, CU._replace(ptr=514), 5, 5, None, PLAIN),
            ValueError,
            r"cu_seqlens_k: its data must be aligned to its 4-byte elements",
        ),
        (
            lambda: self_attention(GPU, scale=-1e39),
            ValueError,
            r"scale must be at most 2.36e\+38 in float32, in which scores are computed, got -1e\+39",
        ),
        (
            lambda: self_attention(contiguous(2, 3, 5, 8, dtype="float32"), softcap=1e39),
            ValueError,
            r"softcap must be at most 2.36e\+38 in float32, in which scores are computed, got 1e\+39",
        ),
        (
            lambda: self_attention(contiguous(1, 2**30, 1, 8)),
            ValueError,
            r"q: seqlen must be below 2\*\*30, got 1073741824",
        ),
        (
            lambda: varlen(contiguous(2**31, 3, 8), ROWS, ROWS, CU, CU, 5, 5, None, PLAIN),
            ValueError,
            r"q: the packed rows must be fewer than 2\*\*31, got 2147483648",
        ),
    ],
)
def test_what_only_devices_and_sizes_can_show(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
