"""Calls on host arrays through a GPU, of whatever size: part by part, copies beside kernels.

Two slots take turns, each with a stream, page-locked buffers and device buffers of its own: while the GPU copies and
computes one part, the CPU fills the other slot's buffers or empties them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from anyattn import cpu, launch
from anyattn.chunks import Part, parts
from anyattn.problem import Problem, contiguous_backward

__all__ = ["backward", "forward"]

Array = npt.NDArray[Any]
Lengths = Sequence[tuple[int, int]]
_OPTIONAL = ("alibi", "cu_seqlens_q", "cu_seqlens_k")
_THREADS = 4  # that copy between pageable and page-locked memory; more don't make it faster
_SHARE = 1 << 22  # bytes that repay one of them
_MEMORY = 0.8  # of what is free


def forward(
    problem: Problem, arrays: Mapping[str, Array], results: Mapping[str, Array], lengths: Lengths, seed: int
) -> None:
    """Attention of host arrays into host arrays; done when it returns.

    Args:
        problem: the call on the host arrays.
        arrays: q, k, v as (batch, heads, rows, columns) views (batch 1 where sequences are packed) and, where the call
            has them, alibi, cu_seqlens_q and cu_seqlens_k.
        results: out like q, and lse (batch, heads, rows).
        lengths: (rows, keys) of each sequence.
        seed: of dropout.
    """

    def start(part: Part, there: Mapping[str, int], stream: int) -> None:
        q, k, v, out, lse, workspace = (there[name] for name in ("q", "k", "v", "out", "lse", "workspace"))
        launch.forward(part.problem, q, k, v, out, lse, stream, **_optional(there), seed=seed, workspace=workspace)

    def workspace(part: Part) -> int:
        return launch.workspace_bytes(part.problem)

    _run(_parts(problem, lengths, backward=False), arrays, results, start, workspace)


def backward(
    problem: Problem, arrays: Mapping[str, Array], results: Mapping[str, Array], lengths: Lengths, seed: int
) -> None:
    """The gradients dq, dk and dv (in `results`), from dout, out and lse beside what `forward` takes."""

    def start(part: Part, there: Mapping[str, int], stream: int) -> None:
        dout, q, k, v, out, lse = (there[name] for name in ("dout", "q", "k", "v", "out", "lse"))
        dq, dk, dv, workspace = (there[name] for name in ("dq", "dk", "dv", "workspace"))
        bp = contiguous_backward(part.problem)
        launch.backward(
            bp, dout, q, k, v, out, lse, dq, dk, dv, workspace, stream, **_optional(there), seed=seed
        )  # fmt: skip

    def workspace(part: Part) -> int:
        return launch.workspace_bytes(contiguous_backward(part.problem))

    _run(_parts(problem, lengths, backward=True), arrays, results, start, workspace)


def _parts(problem: Problem, lengths: Lengths, backward: bool) -> list[Part]:
    import cupy

    return parts(problem, cupy.cuda.runtime.getDevice(), lengths, _free_bytes(), backward)


def _free_bytes() -> int:
    """Memory of the current GPU that a call may use."""
    import cupy

    kept = cupy.get_default_memory_pool().free_bytes()
    return int(_MEMORY * (cupy.cuda.runtime.memGetInfo()[0] + kept))


def _optional(there: Mapping[str, int]) -> dict[str, int]:
    return {name: there.get(name, 0) for name in _OPTIONAL}


def _run(
    whole: Sequence[Part],
    arrays: Mapping[str, Array],
    results: Mapping[str, Array],
    start: Callable[[Part, Mapping[str, int], int], None],
    workspace: Callable[[Part], int],
) -> None:
    slots = [_Slot() for _ in whole[:2]]
    sums: dict[str, Array] = {}
    try:
        for i, part in enumerate(whole):
            slot = slots[i % 2]
            slot.empty(sums)
            slot.fill(part, arrays, results, start, workspace(part))
        for i in range(len(slots)):
            slots[(len(whole) + i) % len(slots)].empty(sums)
    finally:  # no buffer may be given back while something is copied to or from it
        for slot in slots:
            slot.stream.synchronize()


class _Slot:
    """A stream and the buffers of one part at a time."""

    def __init__(self) -> None:
        import cupy

        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._here: dict[str, tuple[int, Any]] = {}  # page-locked buffers, with their bytes
        self._there: dict[str, tuple[int, Any]] = {}  # device buffers
        self._held: dict[str, Any] = {}  # which keys and values lie there
        self._pending: tuple[Part, list[tuple[str, Array, Array]]] | None = None

    def fill(
        self,
        part: Part,
        arrays: Mapping[str, Array],
        results: Mapping[str, Array],
        start: Callable[[Part, Mapping[str, int], int], None],
        workspace: int,
    ) -> None:
        """Copy a part's arrays to the GPU, compute and copy back; returns when the last has been asked for."""
        there = {}
        for name, x in arrays.items():
            cut = _cut(name, x, part)
            if cut is None:
                continue
            here, pointer = self._buffers(name, cut)
            there[name] = int(pointer.ptr)
            which = (part.sequences, part.heads_kv) if name in ("k", "v") else None  # shared by parts of few rows
            if which is None or self._held.get(name) != which:
                _copy(here, cut)
                pointer.copy_from_host_async(here.ctypes.data, here.nbytes, self.stream)
            self._held[name] = which
        outputs = []
        for name, x in results.items():
            cut = _cut(name, x, part)
            assert cut is not None
            here, pointer = self._buffers(name, cut)
            there[name] = int(pointer.ptr)
            outputs.append((name, cut, here))
        there["workspace"] = int(self._device("workspace", workspace).ptr) if workspace else 0
        start(part, there, self.stream.ptr)
        for name, _, here in outputs:
            self._there[name][1].copy_to_host_async(here.ctypes.data, here.nbytes, self.stream)
        self._pending = part, outputs

    def empty(self, sums: dict[str, Array]) -> None:
        """Wait for the part in the slot and hand its results over; shares of dk and dv are added up in `sums`."""
        if self._pending is None:
            return
        part, outputs = self._pending
        self._pending = None
        self.stream.synchronize()
        for name, to, here in outputs:
            if name not in ("dk", "dv") or (part.last and name not in sums):
                _copy(to, here)
                continue
            compute = np.float64 if here.dtype == np.float64 else np.float32
            share = np.empty(here.shape, compute)
            cpu.widen(here, share)
            with np.errstate(all="ignore"):  # infinities and NaN are results, as the kernels' are
                sums[name] = sums[name] + share if name in sums else share
                if part.last:
                    cpu.narrow(sums.pop(name), to)

    def _buffers(self, name: str, like: Array) -> tuple[Array, Any]:
        """The page-locked array of a shape and dtype, and the device memory that belongs to it."""
        import cupy

        size, memory = self._here.get(name, (-1, None))
        if size < like.nbytes:
            self._here.pop(name, None)
            memory = cupy.cuda.alloc_pinned_memory(max(like.nbytes, 1))
            self._here[name] = like.nbytes, memory
        here = np.frombuffer(memory, like.dtype, like.size).reshape(like.shape)
        return here, self._device(name, like.nbytes)

    def _device(self, name: str, size: int) -> Any:
        import cupy

        if self._there.get(name, (-1, None))[0] < size:
            self._there.pop(name, None)
            self._held.pop(name, None)
            self._there[name] = size, cupy.cuda.alloc(size)
            # The pool may have it from work of the current stream that is still under way.
            self.stream.wait_event(cupy.cuda.get_current_stream().record())
        return self._there[name][1]


def _cut(name: str, x: Array, part: Part) -> Array | None:
    """What a part has of an array, in the layout of the part's own problem; None for what it does not need."""
    if name == "alibi":
        return x[..., part.heads] if x.ndim == 1 else x[part.sequences, part.heads]
    if name.startswith("cu_seqlens"):
        offsets = x[part.sequences.start : part.sequences.stop + 1]
        return offsets - offsets[0] if part.problem.varlen else None
    heads, rows = (part.heads_kv, part.keys) if name in ("k", "v", "dk", "dv") else (part.heads, part.rows)
    x = x[part.batch, heads, rows]
    if part.problem.varlen:
        x = x[0]
    order = [axis for axis in part.problem.axes if axis is not None]
    return x if name == "lse" else x.transpose(np.argsort(order))


def _copy(to: Array, of: Array) -> None:
    """Copy an array by several threads."""
    pieces = min(_THREADS, os.cpu_count() or 1, to.nbytes // _SHARE)
    if pieces < 2:
        to[...] = of
        return
    axis = int(np.argmax(to.shape[:-1]))
    cuts = np.linspace(0, to.shape[axis], pieces + 1).astype(int)

    def piece(i: int) -> None:
        here = (slice(None),) * axis + (slice(cuts[i], cuts[i + 1]),)
        to[here] = of[here]

    try:
        list(_pool().map(piece, range(pieces)))
    except RuntimeError:  # at the interpreter's end there are no new threads
        to[...] = of


@lru_cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="anyattn-copy")
