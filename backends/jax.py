"""JAX, eagerly: arrays on the CPU are read as NumPy's, arrays on a GPU as CuPy's, without a copy.

There is no rule for ``jit``, ``grad`` or ``vmap``; ``anyattn.attention_vjp`` gives gradients.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.dlpack
import jax.dtypes
import numpy as np

from anyattn.problem import check_array, fresh_seed

from .dlpack import Bridge

__all__ = ["attention", "attention_backward", "attention_varlen", "describe", "fresh_seed"]


class _Jax(Bridge):
    def check(self, name: str, x: Any, q: Any) -> None:
        if isinstance(x, jax.core.Tracer):
            raise TypeError(
                f"{name} must be a concrete array, got a JAX tracer: call anyattn outside jit, grad and vmap "
                "(anyattn.attention_vjp gives gradients)"
            )
        check_array(name, x, jax.Array)
        if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:  # so would its results be
            raise TypeError(f"{name} is {x.dtype}, of which JAX makes float32 unless jax_enable_x64 is set")
        if len(x.devices()) != 1:
            raise ValueError(f"{name} must be on one device, got an array sharded over {len(x.devices())}")

    def host_view(self, name: str, x: Any) -> Any:
        return np.asarray(x)

    def returned(self, x: Any, q: Any) -> Any:
        # NumPy's DLPack has no bfloat16; device_put takes over fresh host memory as it is.
        [device] = q.devices()
        return jax.device_put(x, device) if isinstance(x, np.ndarray) else jax.dlpack.from_dlpack(x)


_bridge = _Jax()
attention = _bridge.attention
attention_varlen = _bridge.attention_varlen
attention_backward = _bridge.attention_backward
describe = _bridge.describe
