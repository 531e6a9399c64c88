"""Arrays in host memory: computed on the CPU, or on a GPU, part by part, where that is faster.

Shared by the adapters of NumPy, CPU torch, CPU JAX and CPU DLPack arrays. All arrays are NumPy's, in the caller's
layout and rank; bfloat16 travels as its bits in uint16.
"""

from __future__ import annotations

import os
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from anyattn.log import info_once
from anyattn.problem import BackwardProblem, Problem

Array = npt.NDArray[Any]

# What a first guess needs, to a factor of two or so: FLOP/s of one core, and of the smallest GPUs of this kind.
_CORE = {"float16": 4e10, "bfloat16": 4e10, "float32": 5e10, "float64": 2.5e10}
_GPU = {"float16": 4e13, "bfloat16": 4e13, "float32": 1e13, "float64": 3e11}
_COPY = 6e9  # bytes/s between pageable memory and a GPU
_OVERHEAD = 2e-4  # seconds: allocations, launches and one wait
BACKWARD_WORK = 2.5  # backward arithmetic over forward


def forward(
    problem: Problem,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    *,
    alibi: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    seed: int = 0,
    backend: str = "auto",
) -> None:
    """Attention into the C-contiguous ``out`` and ``lse``; done when it returns.

    Raises UnsupportedError when backend is "cuda" and there is no usable GPU, with what to install.
    """
    arrays = {"q": _canonical(problem, q), "k": _canonical(problem, k), "v": _canonical(problem, v)}
    results = {"out": _canonical(problem, out), "lse": _canonical_lse(problem, lse)}
    optional: dict[str, Any] = {"alibi": alibi, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    if not _on_gpu(problem, backend, 1.0):
        from anyattn import cpu

        info_once("first use of anyattn.cpu.forward")
        cpu.forward(problem, *arrays.values(), *results.values(), **optional, seed=seed)
    else:
        from anyattn import offload

        given = _batched(problem, arrays) | {name: x for name, x in optional.items() if x is not None}
        offload.forward(problem, given, _batched(problem, results), _lengths(problem, cu_seqlens_q, cu_seqlens_k), seed)


def backward(
    bp: BackwardProblem,
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    dq: Array,
    dk: Array,
    dv: Array,
    *,
    alibi: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    seed: int = 0,
    backend: str = "auto",
) -> None:
    """The gradients into the C-contiguous ``dq``, ``dk`` and ``dv``; done when it returns. Raises as forward()."""
    problem = bp.problem
    arrays = {"dout": dout, "q": q, "k": k, "v": v, "out": out}
    arrays = {name: _canonical(problem, x) for name, x in arrays.items()} | {"lse": _canonical_lse(problem, lse)}
    results = {"dq": _canonical(problem, dq), "dk": _canonical(problem, dk), "dv": _canonical(problem, dv)}
    optional: dict[str, Any] = {"alibi": alibi, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    if not _on_gpu(problem, backend, BACKWARD_WORK):
        from anyattn import cpu

        info_once("first use of anyattn.cpu.backward")
        cpu.backward(bp, *arrays.values(), *results.values(), **optional, seed=seed)
    else:
        from anyattn import offload

        given = _batched(problem, arrays) | {name: x for name, x in optional.items() if x is not None}
        lengths = _lengths(problem, cu_seqlens_q, cu_seqlens_k)
        offload.backward(problem, given, _batched(problem, results), lengths, seed)


def route(problem: Problem, backend: str, work: float) -> tuple[bool, str]:
    """Whether a call on host arrays runs on a GPU, and why; `work`: its arithmetic over that of the forward pass.

    Raises UnsupportedError when backend is "cuda" and there is no usable GPU.
    """
    if backend == "cpu":
        return False, "backend='cpu'"
    if backend == "auto":
        on_gpu, on_cpu = _estimate(problem, work)
        times = f"a GPU would take about {on_gpu * 1e3:.2g} ms, copies included, the CPU {on_cpu * 1e3:.2g} ms"
        if on_gpu >= on_cpu:
            return False, f"arrays in host memory, and too little work: {times}"
    from anyattn import compile as compiler
    from anyattn import launch

    reason = launch.available() or (compiler.missing() if backend == "auto" else None)
    if reason is None:
        return True, "backend='cuda'" if backend == "cuda" else f"arrays in host memory, but enough work: {times}"
    if backend == "cuda":
        raise launch.UnsupportedError(f"backend='cuda': {reason}")
    why = f"there is enough work for a GPU, but {reason}"
    info_once(f"on the CPU: {why}")
    return False, why


def _on_gpu(problem: Problem, backend: str, work: float) -> bool:
    return route(problem, backend, work)[0]


def _estimate(problem: Problem, work: float) -> tuple[float, float]:
    """Seconds on a GPU, copies included, and on the CPU; the kernels are taken as compiled."""
    keys = min(problem.seqlen_k, problem.left + 1 + problem.right)
    rows = problem.total_q if problem.varlen else problem.batch * problem.seqlen_q
    flops = work * 2 * problem.heads * rows * keys * (problem.head_dim + problem.head_dim_v)
    elements = sum(prod(shape) for shape in (problem.q_shape, problem.k_shape, problem.v_shape, problem.out_shape))
    on_gpu = _OVERHEAD + work * elements * problem.itemsize / _COPY + flops / _GPU[problem.dtype]
    return on_gpu, flops / (_CORE[problem.dtype] * (os.cpu_count() or 1))


def _canonical(problem: Problem, x: Array) -> Array:
    """A (batch, heads, rows, columns) view of an array in the caller's layout; (heads, rows, columns) if packed."""
    x = x.transpose([axis for axis in problem.axes if axis is not None])
    return x if problem.varlen else x[(None,) * (4 - x.ndim)]


def _canonical_lse(problem: Problem, lse: Array) -> Array:
    return lse if problem.varlen else lse[(None,) * (3 - lse.ndim)]


def _batched(problem: Problem, arrays: dict[str, Array]) -> dict[str, Array]:
    """Packed arrays as those of one batch entry."""
    return {name: x[None] for name, x in arrays.items()} if problem.varlen else arrays


def _lengths(problem: Problem, cu_seqlens_q: Array | None, cu_seqlens_k: Array | None) -> list[tuple[int, int]]:
    """The rows and the keys of each sequence."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return [(problem.seqlen_q, problem.seqlen_k)] * problem.batch
    return [*zip(np.diff(cu_seqlens_q).tolist(), np.diff(cu_seqlens_k).tolist(), strict=True)]
