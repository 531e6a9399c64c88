"""Attention as a plain implementation computes it in the inputs' own precision: the yardstick of every tolerance.

The formulas of `anyattn.reference`, but each matrix is rounded where a library that works on whole arrays would store
it: scores, probabilities, outputs and gradients. float16 and bfloat16 products accumulate in float32, as in matrix
units, and float32 works in float32 throughout.
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

    return RoundedHead
