"""The tiled NumPy implementation against the reference: the whole table, every dtype."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest

from anyattn import cpu
from anyattn import problem as problems
from anyattn.problem import BackwardProblem, Options, Problem, View
from tests import cases
from tests.cases import CASES, DTYPES, Array, Case, Inputs, Results


def view(x: Array) -> View:
    """What an adapter passes to the core."""
    strides = tuple(step // x.itemsize for step in x.strides)
    return View(x.__array_interface__["data"][0], x.shape, strides, x.dtype.name, -1)


def canonical(x: Array, layout: str, varlen: bool) -> Array:
    """The (batch, heads, seqlen, dim) or (heads, total, dim) view that `cpu` takes, bfloat16 as bit patterns."""
    if x.dtype == DTYPES["bfloat16"]:
        x = x.view(np.uint16)
    if varlen:
        return x.swapaxes(0, 1)
    if x.ndim == 2:
        return x[None, None]
    x = x if x.ndim == 4 else x[None]
    return x.swapaxes(1, 2) if layout == "bshd" else x


def validated(case: Case, inputs: Inputs) -> Problem:
    options = Options(**{name: inputs.options[name] for name in Options._fields if name in inputs.options})
    slopes = inputs.options.get("alibi_slopes")
    alibi = None if slopes is None else view(slopes)
    if not case.varlen:
        return problems.dense(view(inputs.q), view(inputs.k), view(inputs.v), alibi, options)
    assert inputs.cu_seqlens_q is not None
    assert inputs.cu_seqlens_k is not None
    assert inputs.max_seqlen_q is not None
    assert inputs.max_seqlen_k is not None
    return problems.varlen(
        view(inputs.q),
        view(inputs.k),
        view(inputs.v),
        view(inputs.cu_seqlens_q),
        view(inputs.cu_seqlens_k),
        inputs.max_seqlen_q,
        inputs.max_seqlen_k,
        alibi,
        options,
    )


def run(case: Case, inputs: Inputs, gradients: bool = True) -> Results:
    """Call `cpu` as an adapter does, on outputs full of NaN."""
    problem = validated(case, inputs)
    dtype = inputs.q.dtype

    def nans(shape: tuple[int, ...], dtype: Any = dtype) -> Array:
        return np.full(shape, np.nan, dtype)

    def turned(x: Array) -> Array:
        return canonical(x, case.layout, case.varlen)

    out, lse = nans(problem.out_shape), nans(problem.lse_shape, problem.lse_dtype)
    lse_view = lse if case.varlen else lse.reshape(problem.batch, problem.heads, problem.seqlen_q)
    rest: dict[str, Any] = {
        "alibi": inputs.options.get("alibi_slopes"),
        "cu_seqlens_q": inputs.cu_seqlens_q,
        "cu_seqlens_k": inputs.cu_seqlens_k,
        "seed": inputs.options["seed"] or 0,
    }
    q, k, v = (turned(x) for x in (inputs.q, inputs.k, inputs.v))
    cpu.forward(problem, q, k, v, turned(out), lse_view, **rest)
    if not gradients:
        return Results(out, lse)
    bp: BackwardProblem = problems.backward(problem, view(inputs.dout), view(out), view(lse))
    dq, dk, dv = (nans(shape) for shape in (bp.dq_shape, bp.dk_shape, bp.dv_shape))
    grads = (turned(x) for x in (dq, dk, dv))
    cpu.backward(bp, turned(inputs.dout), q, k, v, turned(out), lse_view, *grads, **rest)
    return Results(out, lse, dq, dk, dv)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_table(case: Case, dtype: str) -> None:
    inputs = cases.make(case, dtype, np.random.default_rng(zlib.crc32(case.name.encode())))
    cases.check(case, dtype, inputs, run(case, inputs))
