"""Attention as a plain implementation computes it in the inputs' own precision: the yardstick of every tolerance.

The formulas of `anyattn.reference`, but each matrix is rounded where a library that works on whole arrays would store
it: scores, probabilities, outputs and gradients. The gradients start from out and the LSE as stored. float16 and
bfloat16 products accumulate in float32, as in matrix units; float32 works in float32 throughout.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from anyattn.reference import Head


@lru_cache
def head_type(dtype: np.dtype[Any]) -> type[Head]:
    """The formulas of one head, rounding to `dtype` and computing in float32 (float64 for float64)."""
    compute = np.promote_types(np.float32, dtype) if dtype.kind == "f" else np.dtype(np.float32)  # bfloat16: kind "V"

    class RoundedHead(Head):
        def stored(self, x: Any) -> npt.NDArray[Any]:
            return np.asarray(x).astype(dtype).astype(compute)

        def product(self, a: Any, b: Any) -> Any:
            """Never of few rows: BLAS would take dot products, whose partial sums are more exact than its tiles."""
            rows = np.zeros((max(len(a), 32), a.shape[1]), a.dtype)
            rows[: len(a)] = a
            return (rows @ b)[: len(a)]

        def backward(self, dout: Any, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
            """From the stored out and LSE, as every backward pass that is given them."""
            out, lse = self.forward(q, k, v)
            dout, q, k, v = map(self.stored, (dout, q, k, v))
            s, slope_of_cap = self.scores(q, k)
            lse = np.where(lse > -np.inf, lse, 0.0).astype(compute)
            p, z = self.stored(np.exp(s - lse[:, None])), self.dropout_factor(s)
            dp = self.stored(self.product(dout, v.T)) * z
            dx = self.stored(p * (dp - (dout * out).sum(axis=1, keepdims=True)) * slope_of_cap)
            dq, dk = self.scale * self.product(dx, k), self.scale * self.product(dx.T, q)
            return self.stored(dq), self.stored(dk), self.stored(self.product(self.stored(p * z).T, dout))

    return RoundedHead
