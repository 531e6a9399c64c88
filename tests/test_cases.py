"""The table keeps its promises: unique names, every pair of features, strides as named, and a rule that can fail."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from tests.cases import BY_NAME, CASES, DTYPES, FEATURES, SHAPES, STRIDES, check, expected, make, plain, storage
from tests.cases import _pairwise as pairwise


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(CASES)


def test_every_pair_of_features_meets() -> None:
    rows = list(pairwise())
    assert len(rows) >= 2 * len(SHAPES)  # so that every shape comes twice
    for first, second in itertools.combinations(FEATURES, 2):
        seen = {(row[first], row[second]) for row in rows}
        assert seen == set(itertools.product(FEATURES[first], FEATURES[second]))


@pytest.mark.parametrize("strides", STRIDES)
def test_storage_rebuilds_the_view(strides: str) -> None:
    case = replace(BY_NAME["v_narrower"], strides=strides)
    inputs = make(case, "float16", np.random.default_rng(0))
    for x in (inputs.q, inputs.k, inputs.v, inputs.dout):
        flat, offset, shape, steps = storage(x)
        again = np.lib.stride_tricks.as_strided(flat[offset:], shape, [2 * step for step in steps])
        np.testing.assert_array_equal(again, x)
        assert again.strides == x.strides
        assert not np.isnan(x).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["decode", "large_scores", "varlen_uneven"])
def test_the_rule_accepts_the_yardstick_and_rejects_worse(name: str, dtype: str) -> None:
    case = BY_NAME[name]
    inputs = make(case, dtype, np.random.default_rng(0))
    results = plain(case, inputs)
    check(case, dtype, inputs, results)
    exact = expected(case, inputs)
    for field in ("out", "lse", "dq", "dk", "dv"):
        good, truth = getattr(results, field), getattr(exact, field)
        with pytest.raises(AssertionError, match=field):
            check(case, dtype, inputs, replace(results, **{field: np.where(truth == truth.max(), np.nan, good)}))
        finite = np.isfinite(truth)
        step = float(np.abs(truth[finite]).max()) * 2.0**-5  # four units in bfloat16's last place or more
        worse = good + 8 * np.abs(good[finite] - truth[finite]).max() + step
        with pytest.raises(AssertionError, match=field):
            check(case, dtype, inputs, replace(results, **{field: worse}))
