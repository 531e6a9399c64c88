"""Calls straight into `anyattn.launch`, on GPU memory that tells when a kernel strays.

Inputs lie among NaNs, and no byte of them may change. Outputs and the workspace are NaN before a launch and lie between
guard bands that must stay as they are.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import numpy.typing as npt

from anyattn import launch, plan, problem
from anyattn.compile import Spec
from anyattn.problem import BackwardProblem, Options, View
from tests.cases import Array, Case, Inputs, Results, make, storage

cupy: Any = importlib.import_module("cupy") if importlib.util.find_spec("cupy") else None

GUARD = 4096  # bytes; keeps the alignment of the device's allocator
NAN, CANARY = 0xFF, 0xA5  # as every byte of it, the first is NaN in all four dtypes, the second finite


class Memory:
    """Device memory: NaN, or a copy of `content`, between two guard bands."""

    def __init__(self, size: int, content: npt.NDArray[np.uint8] | None = None) -> None:
        self.size, self.content = size, content
        self.guard = CANARY if content is None else NAN
        self._all = cupy.empty(size + 2 * GUARD, np.uint8)
        self.ptr = int(self._all.data.ptr) + GUARD
        self._all.data.memset(self.guard, self._all.nbytes)
        if content is None:
            self.poison()
        else:
            self.write(0, content)

    def poison(self) -> None:
        (self._all.data + GUARD).memset(NAN, self.size)

    def write(self, start: int, content: npt.NDArray[np.uint8]) -> None:
        self._all[GUARD + start : GUARD + start + content.size].set(content)

    def read(self, start: int = 0, size: int | None = None) -> npt.NDArray[np.uint8]:
        stop = self.size if size is None else start + size
        host: npt.NDArray[np.uint8] = self._all[GUARD + start : GUARD + stop].get()
        return host

    def check(self, name: str) -> None:
        """Assert that nothing wrote where nothing may."""
        for band in (self._all[:GUARD], self._all[-GUARD:]):
            assert (band.get() == self.guard).all(), f"{name}: written out of bounds"
        if self.content is not None:
            assert np.array_equal(self.read(), self.content), f"{name}, an input, was written to"


@dataclass(frozen=True)
class Job:
    """A case in a dtype; `tile` (kernel, group, index in tiles.yaml) leaves the plan no other one for that kernel."""

    case: Case
    dtype: str
    deterministic: bool = False
    tile: tuple[str, str, int] | None = None

    def __str__(self) -> str:
        tile = "-".join(map(str, self.tile)) + "-" if self.tile else ""
        return f"{tile}{self.dtype}-{'deterministic-' if self.deterministic else ''}{self.case.name}"

    def inputs(self) -> Inputs:
        return make(self.case, self.dtype, np.random.default_rng(zlib.crc32(self.case.name.encode())))

    def specs(self) -> list[Spec]:
        """The kernels the job needs; found without a GPU's help but for `launch.device`. Raises UnsupportedError."""
        views = {name: view(x, 0) for name, x in arrays(self.inputs()).items()}
        with self.only_tile():
            bp = describe(self.inputs(), views, self.deterministic)
            device = launch.device(0)
            kernels = plan.forward(bp.problem, device).kernels + plan.backward(bp, device).kernels
        return [kernel.spec for kernel in kernels]

    @contextmanager
    def only_tile(self) -> Iterator[None]:
        if self.tile is None:
            yield
            return
        kernel, group, index = self.tile
        table = plan._tiles()
        table = {**table, kernel: {group: [table[kernel][group][index]]}}
        family = {"ANYATTN_KERNEL": kernel.rpartition("_")[2]}
        with mock.patch.object(plan, "_tiles", return_value=table), mock.patch.dict(os.environ, family):
            launch.forget_plans()
            try:
                yield
            finally:
                launch.forget_plans()


def arrays(inputs: Inputs) -> dict[str, Array]:
    """What a call reads from the device, by the names of the API."""
    found = {name: getattr(inputs, name) for name in ("q", "k", "v", "dout", "cu_seqlens_q", "cu_seqlens_k")}
    found["alibi_slopes"] = inputs.options.get("alibi_slopes")
    return {name: x for name, x in found.items() if x is not None}


def view(x: Array, ptr: int) -> View:
    """The view of a host array's copy, the whole of its memory being copied to `ptr`."""
    _, offset, shape, strides = storage(x)
    return View(ptr + offset * x.itemsize, shape, strides, x.dtype.name, 0)


def describe(inputs: Inputs, views: Mapping[str, View], deterministic: bool = False) -> BackwardProblem:
    """The problem of a call whose outputs are contiguous and aligned."""
    given = {name: x for name, x in inputs.options.items() if name not in ("alibi_slopes", "seed")}
    options, alibi = Options(**given, deterministic=deterministic), views.get("alibi_slopes")
    q, k, v = views["q"], views["k"], views["v"]
    if inputs.cu_seqlens_q is None:
        forward = problem.dense(q, k, v, alibi, options)
    else:
        lengths = views["cu_seqlens_q"], views["cu_seqlens_k"], inputs.max_seqlen_q or 0, inputs.max_seqlen_k or 0
        forward = problem.varlen(q, k, v, *lengths, alibi, options._replace(layout="bshd"))
    out = _contiguous(forward.out_shape, forward.dtype)
    return problem.backward(forward, views["dout"], out, _contiguous(forward.lse_shape, forward.lse_dtype))


def _contiguous(shape: tuple[int, ...], dtype: str) -> View:
    strides = [1] * len(shape)
    for axis in reversed(range(len(shape) - 1)):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return View(0, shape, tuple(strides), dtype, 0)


class Call:
    """One call, forward and backward, with its memory on the current device."""

    def __init__(
        self, inputs: Inputs, deterministic: bool = False, upload: Callable[[Array], tuple[Memory, View]] | None = None
    ) -> None:
        placed = {name: (upload or _upload)(x) for name, x in arrays(inputs).items()}
        views = {name: where for name, (_, where) in placed.items()}
        self.inputs = {name: memory for name, (memory, _) in placed.items()}
        self.bp = describe(inputs, views, deterministic)
        p = self.bp.problem
        self.kinds = {"out": (p.out_shape, p.dtype), "lse": (p.lse_shape, p.lse_dtype)}
        self.kinds |= {name: (getattr(self.bp, f"{name}_shape"), p.dtype) for name in ("dq", "dk", "dv")}
        sizes = {name: int(np.prod(shape)) * problem.ITEMSIZE[dtype] for name, (shape, dtype) in self.kinds.items()}
        sizes["workspace"] = max(launch.workspace_bytes(p), launch.workspace_bytes(self.bp))
        self.outputs = {name: Memory(size) for name, size in sizes.items()}
        self._ptr = {name: where.ptr for name, where in views.items()}
        self._ptr |= {name: memory.ptr for name, memory in self.outputs.items()}
        self._extra = {name: self._ptr.get(name, 0) for name in ("cu_seqlens_q", "cu_seqlens_k")}
        self._extra |= {"alibi": self._ptr.get("alibi_slopes", 0), "seed": inputs.options["seed"] or 0}
        cupy.cuda.runtime.deviceSynchronize()  # the copies are on a stream of their own

    def forward(self, stream: int = 0) -> None:
        q, k, v, out, lse = self._pointers("q", "k", "v", "out", "lse")
        (workspace,) = self._pointers("workspace")
        launch.forward(self.bp.problem, q, k, v, out, lse, stream, **self._extra, workspace=workspace)

    def backward(self, stream: int = 0) -> None:
        dout, q, k, v, out, lse = self._pointers("dout", "q", "k", "v", "out", "lse")
        dq, dk, dv, workspace = self._pointers("dq", "dk", "dv", "workspace")
        launch.backward(self.bp, dout, q, k, v, out, lse, dq, dk, dv, workspace, stream, **self._extra)

    def _pointers(self, *names: str) -> list[int]:
        return [self._ptr[name] for name in names]

    def check(self) -> None:
        """Wait for the device, then assert that nothing strayed."""
        cupy.cuda.runtime.deviceSynchronize()
        for name, memory in (*self.inputs.items(), *self.outputs.items()):
            memory.check(name)

    def results(self) -> Results:
        """What the launches computed, after `check`."""
        self.check()
        return Results(**{name: self.read(name).reshape(shape) for name, (shape, _) in self.kinds.items()})

    def read(self, name: str, start: int = 0, count: int | None = None) -> Array:
        """`count` elements of an output, flat."""
        dtype = np.dtype(getattr(ml_dtypes if self.kinds[name][1] == "bfloat16" else np, self.kinds[name][1]))
        size = None if count is None else count * dtype.itemsize
        return self.outputs[name].read(start * dtype.itemsize, size).view(dtype)


def _upload(x: Array) -> tuple[Memory, View]:
    flat = storage(x)[0]
    memory = Memory(flat.nbytes, flat.view(np.uint8))
    return memory, view(x, memory.ptr)
