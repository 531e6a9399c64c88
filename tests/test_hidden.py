"""What a row does not see is as if absent: NaN and infinities there reach neither its results nor its gradients.

One spot of q, k, v or dout is spoilt at a time. What it reaches is NaN or infinite in the reference, and must be in the
result; everything else must be as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from anyattn import reference
from tests.cases import DTYPES, Array, Case, Inputs, Results, expected, make, tolerances
from tests.device import Call, Job
from tests.test_cpu import run

CASES = [
    Case("causal", 1, 2, 2, seqlen_q=200, seqlen_k=200, causal=True),
    Case("band", 2, 4, 2, seqlen_q=150, seqlen_k=260, head_dim=128, head_dim_v=128, window=(37, 20)),
    Case("scores", 1, 2, 1, seqlen_q=130, seqlen_k=130, head_dim=80, head_dim_v=40, causal=True, softcap=5.0,
         alibi="h"),
    Case("dropout", 1, 2, 1, seqlen_q=130, seqlen_k=130, head_dim=80, head_dim_v=40, causal=True, dropout=0.2),
    Case("rows_that_see_nothing", 1, 2, 2, seqlen_q=192, seqlen_k=65, causal=True),
    Case("wide", 1, 1, 1, seqlen_q=100, seqlen_k=140, head_dim=256, head_dim_v=256, window=(-1, 3)),
    Case("of_192", 1, 2, 1, seqlen_q=100, seqlen_k=140, head_dim=192, head_dim_v=144, window=(60, 3)),
    Case("few_rows", 1, 2, 1, seqlen_q=5, seqlen_k=1500, causal=True),
    Case("packed", heads=2, heads_kv=1, causal=True, lengths=((70, 70), (1, 90), (65, 130))),
]  # fmt: skip
JOBS = [Job(case, dtype, deterministic=bool(i % 2)) for i, case in enumerate(CASES) for dtype in DTYPES]


def spots(case: Case, inputs: Inputs) -> Iterator[Inputs]:
    """The inputs with one element spoilt, in several places: first and last rows, tiles' edges, the middle."""
    rng = np.random.default_rng(0)
    for name, value in (
        ("q", np.nan),
        ("dout", np.nan),
        ("dout", np.inf),
        ("k", np.nan),
        ("v", np.nan),
        ("v", -np.inf),
    ):
        clean: Array = getattr(inputs, name)
        rows = clean.shape[0 if case.varlen else 1]
        for row in {0, 63, rows // 2, rows - 2} & {*range(rows)}:
            spoilt = clean.copy()
            batch = () if case.varlen else (rng.integers(clean.shape[0]),)
            spoilt[(*batch, row, rng.integers(clean.shape[-2]), rng.integers(clean.shape[-1]))] = value
            yield replace(inputs, **{name: spoilt})
    # A key that gets a weight of 0 from every row; but 0 * inf is NaN, and there may be zeros behind the last row.
    if inputs.k.dtype == np.float32:
        return  # on a GPU, an infinity's two halves make NaN
    infinite = inputs.k.copy()
    infinite[..., infinite.shape[-3] // 2, 0, 1] = -np.inf
    yield replace(inputs, q=np.abs(inputs.q), k=infinite)


def check_hidden(case: Case, dtype: str, compute: Callable[[Inputs], Results]) -> None:
    """Assert that what a spoilt element does not reach is right, and that what it does reach shows it."""
    inputs = make(case, dtype, np.random.default_rng(1))
    bounds = tolerances(case, dtype, inputs, expected(case, inputs))
    for spoilt in spots(case, inputs):
        with np.errstate(invalid="ignore"):
            reached, results = expected(case, spoilt), compute(spoilt)
        for name, truth in vars(reached).items():
            actual, finite = np.asarray(getattr(results, name)).astype(np.float64), np.isfinite(truth)
            assert np.isfinite(actual[finite]).all(), name
            if not case.dropout:  # a NaN weight that is dropped may as well count as 0
                assert not np.isfinite(actual[~finite]).any(), name
            error = np.abs(actual[finite] - truth[finite])
            assert error.max(initial=0.0) <= 2 * bounds[name], name


@pytest.mark.parametrize("case", CASES[:4], ids=lambda case: case.name)
def test_reference(case: Case) -> None:
    """Row by row on the keys that it sees, and nothing else."""
    inputs = make(replace(case, dropout=0.0), "float64", np.random.default_rng(1))
    options: dict[str, Any] = {"causal": case.causal, "window": case.window, "softcap": case.softcap}
    *_, head = next(reference._heads(1, 1, 1, case.head_dim, **options))
    q, k, v, dout = (x[0, :, 0] for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    for spoilt in (k, v, q, dout):
        spoilt[len(spoilt) // 2, 3] = np.nan
    hidden = head.hidden(len(q), len(k))
    out, lse = head.forward(q, k, v)
    dq, dk, dv = head.backward(dout, q, k, v)
    dk_sum, dv_sum = np.zeros_like(dk), np.zeros_like(dv)
    for i, seen in enumerate(~hidden):
        # A sequence of one row, which stands behind its last key: nothing is hidden from it.
        alone = replace(head, left=np.inf, right=np.inf)
        out_i, lse_i = alone.forward(q[i : i + 1], k[seen], v[seen])
        dq_i, dk_i, dv_i = alone.backward(dout[i : i + 1], q[i : i + 1], k[seen], v[seen])
        dk_sum[seen] += dk_i
        dv_sum[seen] += dv_i
        for actual, truth in ((out[i], out_i[0]), (lse[i], lse_i[0]), (dq[i], dq_i[0])):
            np.testing.assert_allclose(actual, truth, atol=1e-12)
    np.testing.assert_allclose(dk, dk_sum, atol=1e-12)
    np.testing.assert_allclose(dv, dv_sum, atol=1e-12)
    assert np.isfinite(out).all(axis=1).any()


@pytest.mark.parametrize("job", JOBS[::5] + JOBS[2::5], ids=str)
def test_cpu(job: Job) -> None:
    check_hidden(job.case, job.dtype, lambda inputs: run(job.case, inputs))


# With the kernels that the GPU prefers and, where that may make a difference, with the portable ones.
GPU = [(job, "") for job in JOBS] + [(job, "sm80") for job in JOBS if job.dtype in ("float16", "bfloat16")]


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_plans")
@pytest.mark.parametrize(("job", "kernels"), GPU, ids=str)
def test_gpu(job: Job, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels:
        monkeypatch.setenv("ANYATTN_KERNEL", kernels)

    def compute(inputs: Inputs) -> Results:
        call = Call(inputs, job.deterministic)
        call.forward()
        call.backward()
        return call.results()

    check_hidden(job.case, job.dtype, compute)
