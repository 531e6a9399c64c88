"""One table of named problems, which every backend and every kernel runs, and the rule that judges the results.

`CASES` holds hand-picked corners and a pairwise design: every value of every feature meets every value of every other
feature in at least one case. Inputs are NumPy arrays; `storage` tells how to rebuild an array's exact strides and
alignment in another library.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from anyattn import reference
from tests import naive

Array: TypeAlias = npt.NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}


EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}


@dataclass(frozen=True)
class Case:
    """One problem. `lengths`, if any, makes it varlen: the (seqlen_q, seqlen_k) of each sequence."""

    name: str
    batch: int = 2
    heads: int = 2
    heads_kv: int = 2
    seqlen_q: int = 64
    seqlen_k: int = 64
    head_dim: int = 64
    head_dim_v: int = 64
    causal: bool = False
    window: int | tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float | None = None
    alibi: str = ""  # "" | "h" (slopes per head) | "bh" (per batch and head)
    dropout: float = 0.0
    layout: str = "bshd"
    ndim: int = 4
    strides: str = "contiguous"  # a key of STRIDES
    lengths: tuple[tuple[int, int], ...] | None = None

    @property
    def varlen(self) -> bool:
        return self.lengths is not None


@dataclass(frozen=True)
class Inputs:
    """The arrays of one case. cu_seqlens (int32) and max_seqlens are None for a dense one."""

    q: Array
    k: Array
    v: Array
    dout: Array
    options: Mapping[str, Any]  # the keyword arguments of the call, alibi_slopes (float32) and seed included
    cu_seqlens_q: Array | None = None
    cu_seqlens_k: Array | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None


@dataclass(frozen=True)
class Results:
    """What a backend computes for a case; the gradients may be left out (None)."""

    out: Array
    lse: Array
    dq: Array | None = None
    dk: Array | None = None
    dv: Array | None = None


# --- inputs ----------------------------------------------------------------------------------------------------------


def _padded(values: Array, padding: tuple[tuple[int, int], ...]) -> Array:
    """`values` inside a larger NaN-filled buffer, as a view."""
    shape = tuple(before + size + after for size, (before, after) in zip(values.shape, padding, strict=True))
    buffer = np.full(shape, np.nan, values.dtype)
    view = buffer[tuple(slice(b, b + size) for size, (b, _) in zip(values.shape, padding, strict=True))]
    view[...] = values
    return view


def _contiguous(x: Array) -> Array:
    return np.ascontiguousarray(x)


def _transposed(x: Array) -> Array:
    """The other layout's memory seen through this layout's strides."""
    return np.ascontiguousarray(x.swapaxes(-3, -2)).swapaxes(-3, -2) if x.ndim > 2 else np.ascontiguousarray(x)


def _padded_rows(x: Array) -> Array:
    """Rows further apart than needed, and 16-byte aligned for even-sized heads."""
    return _padded(x, ((0, 0),) * (x.ndim - 1) + ((0, -x.shape[-1] % 8 + 8),))


def _misaligned(x: Array) -> Array:
    """One element before and two after each row: no row but by chance is 16-byte aligned."""
    return _padded(x, ((1, 0),) + ((0, 0),) * (x.ndim - 2) + ((1, 2),))


def _columns(x: Array) -> Array:
    """The sequence is the unit-stride dimension, not the head dim."""
    return np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2)


def _every_other(x: Array) -> Array:
    """The head dim has stride 2."""
    buffer = np.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan, x.dtype)
    buffer[..., ::2] = x
    return buffer[..., ::2]


def _negative(x: Array) -> Array:
    """Every axis but the head dim runs backwards in memory."""
    flip = (slice(None, None, -1),) * (x.ndim - 1)
    return np.ascontiguousarray(x[flip])[flip]


STRIDES = {
    "contiguous": _contiguous,
    "transposed": _transposed,
    "padded_rows": _padded_rows,
    "misaligned": _misaligned,
    "columns": _columns,
    "every_other": _every_other,
    "negative": _negative,
    "broadcast": _contiguous,  # K and V are one head, and dout one row, seen with stride 0
}


def _place(x: Array, strides: str, broadcast: int | None) -> Array:
    if strides == "broadcast" and broadcast is not None and x.size:
        first = np.ascontiguousarray(np.take(x, [0], axis=broadcast))
        return np.broadcast_to(first, x.shape)
    return STRIDES[strides](x)


def make(case: Case, dtype: str, rng: np.random.Generator) -> Inputs:
    """Return random inputs of `case`; every element of their buffers outside the inputs is NaN."""

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(DTYPES[dtype])

    def dense(seqlen: int, heads: int, dim: int) -> Array:
        x = normal(case.batch, seqlen, heads, dim)
        x = x.swapaxes(1, 2) if case.layout == "bhsd" else x
        return x if case.ndim == 4 else x[0] if case.ndim == 3 else x.reshape(seqlen, dim)

    heads_axis = None if case.ndim == 2 else -2 if case.layout == "bshd" else -3
    rows_axis = None if case.ndim == 2 else -3 if case.layout == "bshd" else -2
    options: dict[str, Any] = {"causal": case.causal, "window": case.window, "scale": case.scale}
    options |= {"softcap": case.softcap, "dropout": case.dropout, "layout": case.layout}
    options["seed"] = int(rng.integers(1 << 63)) if case.dropout else None
    sequences = len(case.lengths) if case.lengths is not None else case.batch
    if case.alibi:
        shape = (sequences, case.heads) if case.alibi == "bh" else (case.heads,)
        options["alibi_slopes"] = rng.uniform(-0.1, 0.4, shape).astype(np.float32)

    if case.lengths is None:
        q, k = dense(case.seqlen_q, case.heads, case.head_dim), dense(case.seqlen_k, case.heads_kv, case.head_dim)
        v = dense(case.seqlen_k, case.heads_kv, case.head_dim_v)
        dout = dense(case.seqlen_q, case.heads, case.head_dim_v)
        cu_seqlens: dict[str, Any] = {}
    else:
        lengths = np.array(case.lengths, np.int32).reshape(-1, 2)
        cu = np.concatenate([np.zeros((1, 2), np.int32), lengths.cumsum(axis=0, dtype=np.int32)])
        total_q, total_k = map(int, cu[-1])
        q, k = normal(total_q, case.heads, case.head_dim), normal(total_k, case.heads_kv, case.head_dim)
        v, dout = normal(total_k, case.heads_kv, case.head_dim_v), normal(total_q, case.heads, case.head_dim_v)
        longest_q, longest_k = (int(n) for n in lengths.max(axis=0, initial=0))
        cu_seqlens = {"cu_seqlens_q": np.ascontiguousarray(cu[:, 0]), "cu_seqlens_k": np.ascontiguousarray(cu[:, 1])}
        cu_seqlens |= {"max_seqlen_q": longest_q, "max_seqlen_k": longest_k}

    return Inputs(
        q=_place(q, case.strides, None),
        k=_place(k, case.strides, heads_axis),
        v=_place(v, case.strides, heads_axis),
        dout=_place(dout, case.strides, rows_axis),
        options=options,
        **cu_seqlens,
    )


def storage(x: Array) -> tuple[Array, int, tuple[int, ...], tuple[int, ...]]:
    """Return (the flat buffer `x` lies in, offset of x[0, ..., 0] in it, shape, strides), counted in elements.

    Copy the buffer to a device and view it with these numbers: the copy keeps the strides, the padding and, for a
    buffer aligned as the device's allocator aligns, the alignment of `x`.
    """
    root = x
    while isinstance(root.base, np.ndarray):
        root = root.base
    flat = root.reshape(-1)
    offset = (x.__array_interface__["data"][0] - flat.__array_interface__["data"][0]) // x.itemsize if x.size else 0
    return flat, offset, x.shape, tuple(stride // x.itemsize for stride in x.strides)


# --- the rule --------------------------------------------------------------------------------------------------------


def expected(case: Case, inputs: Inputs) -> Results:
    """The float64 reference of a case, gradients included."""
    return _evaluate(case, inputs, reference.Head)


def plain(case: Case, inputs: Inputs) -> Results:
    """What a plain implementation in the inputs' own precision computes; the LSE in float32 at least."""
    results = _evaluate(case, inputs, naive.head_type(inputs.q.dtype))
    if inputs.q.dtype.itemsize < 4:
        results = replace(results, lse=_evaluate(case, inputs, naive.head_type(DTYPES["float32"])).lse)
    return results


def _evaluate(case: Case, inputs: Inputs, head_type: type[reference.Head]) -> Results:
    q, k, v, dout, options = inputs.q, inputs.k, inputs.v, inputs.dout, {**inputs.options, "head_type": head_type}
    if case.varlen:
        del options["layout"]
        cu_seqlens = inputs.cu_seqlens_q, inputs.cu_seqlens_k
        forward = reference.attention_varlen(q, k, v, *cu_seqlens, **options)
        return Results(*forward, *reference.attention_varlen_backward(dout, q, k, v, *cu_seqlens, **options))
    return Results(*reference.attention(q, k, v, **options), *reference.attention_backward(dout, q, k, v, **options))


def errors(results: Results, exact: Results) -> dict[str, float]:
    """Return the largest error of "out", "lse", "dq", "dk" and "dv", infinity for a NaN or a wrong infinity."""
    found = {}
    for name, truth in vars(exact).items():
        actual = getattr(results, name)
        if actual is not None:
            actual = np.asarray(actual).astype(np.float64)
            assert actual.shape == truth.shape, f"{name} has shape {actual.shape}, not {truth.shape}"
            with np.errstate(invalid="ignore"):
                error = np.where(actual == truth, 0.0, np.abs(actual - truth))
            found[name] = float(np.where(np.isfinite(error), error, np.inf).max(initial=0.0))
    return found


def tolerances(case: Case, dtype: str, inputs: Inputs, exact: Results) -> dict[str, float]:
    """Return the largest error that "out", "lse", "dq", "dk" and "dv" may show.

    Twice the largest error of the plain same-precision result, three times with softcap and for gradients, plus one
    unit in the last place of the result's magnitude. Beyond that:

    float32 and float64 results get a second unit: the weights are divided by their sum last, with an inverse. The plain
    result of a row that sees one key has no error at all, as its weight is 1 before v comes in.

    The LSE is float32 (float64 for float64) whatever the inputs are, and so is its yardstick, with four times the
    error: the order of the sums and the exp2 and log in use differ.

    Gradients inherit the rounding of the LSE they start from: two units in its last place, relative to their size. With
    softcap, which keeps the LSE small, that of the scores, which both passes sum up in an order of their own: sums of
    head_dim products as large as q's and k's norms make them.

    The reference is itself a plain float64 implementation. So for float64 the yardstick is the error of the plain
    float32 one, scaled by the ratio of the units in the last place, and counts once more: for the reference.
    """
    if dtype == "float64":
        yardstick = errors(_evaluate(case, inputs, naive.head_type(DTYPES["float32"])), exact)
        yardstick = {name: error * EPSILON["float64"] / EPSILON["float32"] for name, error in yardstick.items()}
    else:
        yardstick = errors(plain(case, inputs), exact)
    lse_unit = _last_place(exact.lse, "float64" if dtype == "float64" else "float32")
    score_unit = lse_unit
    if case.softcap is not None:
        lengths = [np.linalg.norm(x.astype(np.float64), axis=-1).max(initial=0.0) for x in (inputs.q, inputs.k)]
        scale = case.head_dim**-0.5 if case.scale is None else abs(case.scale)
        size = scale * lengths[0] * lengths[1] / case.head_dim**0.5
        score_unit = max(lse_unit, _last_place(size, "float64" if dtype == "float64" else "float32"))
    bounds = {}
    for name, error in yardstick.items():
        if name == "lse":
            factor, slack = 4.0, lse_unit
        elif name == "out":
            units = 1 if inputs.q.dtype.itemsize == 2 else 2
            factor, slack = 2.0 if case.softcap is None else 3.0, units * _last_place(exact.out, dtype)
        else:
            # Where a row sees one key, dq and dk are differences of equal terms, of about this size.
            size = float(np.abs(getattr(exact, name)).max(initial=0.0)) or 32.0
            factor, slack = 3.0, _last_place(size, dtype) + 2 * size * score_unit
        bounds[name] = (factor + (dtype == "float64")) * error + slack
    return bounds


def _last_place(values: Array | float, dtype: str) -> float:
    """The unit in the last place of the largest finite magnitude."""
    largest = float(np.abs(values, where=np.isfinite(values), out=np.zeros(np.shape(values))).max(initial=0.0))
    return EPSILON[dtype] * 2.0 ** np.floor(np.log2(largest)) if largest else 0.0


def check(case: Case, dtype: str, inputs: Inputs, results: Results) -> None:
    """Assert that `results` obey the rule; NaN never does."""
    exact = expected(case, inputs)
    found, bounds = errors(results, exact), tolerances(case, dtype, inputs, exact)
    if any(found[name] > bounds[name] for name in found):
        # In a small case the largest plain error is a matter of luck: take the largest of several draws.
        for seed in range(4):
            other = make(case, dtype, np.random.default_rng(seed))
            more = tolerances(case, dtype, other, expected(case, other))
            bounds = {name: max(bound, more[name]) for name, bound in bounds.items()}
    for name, error in found.items():
        assert error <= min(bounds[name], np.finfo(np.float64).max), (
            f"{case.name} {dtype}: {name} is off by {error:.3g}, allowed {bounds[name]:.3g}"
        )


# --- the table -------------------------------------------------------------------------------------------------------

# (seqlen_q, seqlen_k, head_dim, head_dim_v): each pairwise case takes the next one.
SHAPES = [
    (64, 64, 64, 64),
    (129, 129, 128, 128),
    (127, 300, 80, 80),
    (192, 192, 192, 128),
    (300, 63, 24, 24),
    (17, 17, 1, 1),
    (128, 65, 256, 256),
    (65, 128, 37, 37),
    (1, 192, 96, 96),
    (192, 1, 40, 40),
    (63, 127, 64, 256),
    (300, 300, 32, 32),
    (65, 65, 160, 160),
    (17, 129, 8, 24),
    (128, 192, 128, 64),
    (192, 300, 100, 13),
    (64, 17, 224, 256),
]

# Every pair of values of two of these features meets in some case.
FEATURES: dict[str, dict[str, dict[str, Any]]] = {
    "mask": {
        "full": {},
        "causal": {"causal": True},
        "window": {"window": (20, 9)},
        "left": {"window": (33, -1)},
        "narrow_causal": {"window": 5, "causal": True},
    },
    "softcap": {"": {}, "softcap": {"softcap": 2.0}},
    "alibi": {"": {}, "alibi": {"alibi": "h"}, "alibi_bh": {"alibi": "bh"}},
    "dropout": {"": {}, "dropout": {"dropout": 0.2}},
    "heads": {
        "mha": {"heads": 2, "heads_kv": 2},
        "gqa": {"heads": 4, "heads_kv": 2},
        "mqa": {"heads": 3, "heads_kv": 1},
    },
    "form": {
        "bshd": {},
        "bhsd": {"layout": "bhsd"},
        "bshd3": {"ndim": 3, "batch": 1},
        "bhsd3": {"ndim": 3, "batch": 1, "layout": "bhsd"},
        "varlen": {"lengths": ()},  # filled in from the shape
    },
    "strides": {name: {"strides": name} for name in STRIDES},
    "scale": {"": {}, "scaled": {"scale": 0.3}},
}


def _pairwise() -> Iterator[dict[str, str]]:
    """Yield few choices of one value per feature such that every pair of values occurs (greedy, deterministic)."""
    rng = random.Random(0)
    names = list(FEATURES)

    def pairs(row: dict[str, str]) -> set[tuple[tuple[str, str], tuple[str, str]]]:
        return set(itertools.combinations(row.items(), 2))

    missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in FEATURES[a] for y in FEATURES[b]}
    while missing:
        start = dict(min(missing))  # so that every row covers at least one missing pair
        candidates = [{name: start.get(name) or rng.choice([*FEATURES[name]]) for name in names} for _ in range(100)]
        candidates = [row for row in candidates if start.items() <= row.items()]
        best = max(candidates, key=lambda row: len(pairs(row) & missing), default=None)
        if best is not None:
            missing -= pairs(best)
            yield best


def _varlen(case: Case) -> Case:
    """The same case as packed sequences of uneven lengths, two of them empty."""
    q, k = case.seqlen_q, case.seqlen_k
    return replace(case, lengths=((q, k), (0, 5), (3, 0), (q // 2 + 1, k), (1, 1)))


def _pairwise_cases() -> Iterator[Case]:
    for row, shape in zip(_pairwise(), itertools.cycle(SHAPES), strict=False):
        name = "-".join([*filter(None, row.values()), "x".join(map(str, shape[:3]))])
        values: dict[str, Any] = {}
        for feature, choice in row.items():
            values |= FEATURES[feature][choice]
        case = Case(
            name, **(dict(zip(("seqlen_q", "seqlen_k", "head_dim", "head_dim_v"), shape, strict=True)) | values)
        )
        yield _varlen(case) if case.varlen else case


def _square(name: str, seqlen: int, head_dim: int = 64, **rest: Any) -> Case:
    return Case(name, seqlen_q=seqlen, seqlen_k=seqlen, head_dim=head_dim, **({"head_dim_v": head_dim} | rest))


CORNERS = [
    *(_square(f"dim{d}", 65, d, batch=1, causal=True) for d in (1, 8, 24, 32, 37, 40, 64, 80, 96, 128, 160, 192, 256)),
    *(_square(f"length{s}", s, 32, batch=1, causal=True, heads=1, heads_kv=1) for s in (1, 17, 63, 64, 127, 128, 192)),
    _square("v_wider", 129, 64, head_dim_v=256, causal=True),
    _square("v_narrower", 192, 192, head_dim_v=128, causal=True),
    _square("several_tiles_of_192", 330, 192, heads=4, heads_kv=2, causal=True),
    *(  # long enough for blocks of which nothing is hidden
        _square(f"several_blocks_of_{d}_{seqlen}", seqlen, d, batch=1, heads=2, heads_kv=1, causal=True)
        for d, seqlen in ((32, 530), (64, 600), (64, 1050), (96, 530), (128, 530), (192, 530), (256, 530))
    ),
    _square("v_of_1", 70, 128, head_dim_v=1),
    Case("rows_that_see_nothing", seqlen_q=192, seqlen_k=65, causal=True),
    Case("rows_past_the_window", seqlen_q=300, seqlen_k=64, window=(7, 7)),
    Case("no_keys", seqlen_q=17, seqlen_k=0),
    Case("no_queries", seqlen_q=0, seqlen_k=17, causal=True),
    Case("no_queries_of_many_keys", seqlen_q=0, seqlen_k=1100),
    Case("no_batch", batch=0),
    Case("no_batch_of_many_keys", batch=0, seqlen_q=1, seqlen_k=1100),
    Case("no_heads", heads=0),
    *(
        _square(f"half_a_tile_{name}", seqlen, 128, batch=1, **mask)  # the lengths that cuDNN once got wrong
        for name, seqlen, mask in (
            ("causal", 192, {"causal": True}),
            ("window", 320, {"window": (70, 0)}),
            ("both", 320, {"window": (64, 64)}),
        )
    ),
    Case("one_key", seqlen_q=65, seqlen_k=1),
    Case("decode", seqlen_q=1, seqlen_k=300, heads=8, heads_kv=2, head_dim=128, head_dim_v=128, causal=True),
    *(  # few rows: thread blocks share the keys
        Case(f"few_rows_{name}", **{"batch": 1, "heads": 4, "seqlen_k": 2100, "head_dim": 64, "head_dim_v": 64, **rest})
        for name, rest in {
            "decode": {"heads": 8, "seqlen_q": 1, "head_dim": 128, "head_dim_v": 128, "causal": True},
            "decode_window": {"batch": 2, "seqlen_q": 1, "window": (1700, 0), "strides": "columns"},
            "softcap": {"heads_kv": 4, "seqlen_q": 9, "head_dim": 80, "head_dim_v": 37, "causal": True, "softcap": 2.0},
            "dropout": {"seqlen_q": 3, "dropout": 0.2, "alibi": "bh", "layout": "bhsd"},
            "wide": {"seqlen_q": 2, "head_dim": 256, "head_dim_v": 256, "scale": -0.1},
            "more": {"heads": 2, "seqlen_q": 70, "seqlen_k": 4100, "head_dim": 128, "window": (3000, 0)},
            "varlen": {"lengths": ((3, 2600), (1, 0), (2, 1500), (0, 5), (5, 2100)), "causal": True},
        }.items()
    ),
    Case("two_dimensional", batch=1, heads=1, heads_kv=1, ndim=2, seqlen_q=65, seqlen_k=129, causal=True),
    Case("two_dimensional_columns", batch=1, heads=1, heads_kv=1, ndim=2, layout="bhsd", strides="columns"),
    _square("window_0", 129, 64, window=0),
    _square("window_wider_than_all", 100, 64, window=(1000, 1000)),
    _square("scale_negative", 64, 64, scale=-0.2),
    _square("scale_0", 64, 64, scale=0.0, causal=True),
    _square("large_scores", 192, 64, scale=3.0, causal=True),
    _square("dropout_most", 129, 64, dropout=0.9, causal=True),
    Case("varlen_empty", lengths=((0, 0), (0, 0))),
    Case("varlen_one_each", lengths=((1, 1),) * 5, causal=True),
    Case("varlen_uneven", lengths=((129, 63), (0, 17), (1, 300), (64, 0), (65, 65)), causal=True, heads=4, heads_kv=1),
]

CASES: list[Case] = [*CORNERS, *_pairwise_cases()]
BY_NAME: dict[str, Case] = {case.name: case for case in CASES}
