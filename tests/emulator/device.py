"""An emulated Hopper GPU in the place of CuPy's: what `anyattn.launch` and `tests.device` ask of one.

with emulated(seed=1):
    call = Call(job.inputs())
    call.forward()
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
import os
import re
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from anyattn import compile as compiler
from anyattn import launch, tensormap
from anyattn.compile import Cubin, Spec
from anyattn.plan import Device
from tests import device as device_tests
from tests.emulator import build

__all__ = ["DEVICE", "EmulationError", "Timing", "emulated"]

DEVICE = Device("sm_90a", 227 << 10, multiprocessors=4)


class EmulationError(RuntimeError):
    """A kernel did what it must not; the message lists all of it."""


class Timing(enum.IntEnum):
    """When that happens which runs in the background."""

    EARLY = 0  # at once
    LATE = 1  # when a thread waits for it; loads, when no thread can go on without
    RANDOM = 2


@contextlib.contextmanager
def emulated(
    timing: Timing = Timing.RANDOM,
    seed: int = 0,
    device: Device = DEVICE,
    family: str | None = None,
    sources: Path | None = None,
) -> Iterator[None]:
    """Launches run on the CPU, and `tests.device.Memory` lies in the host's; a launch may raise EmulationError.

    seed: of the order of warps and of random moments. device: as many thread blocks are resident as it has
    multiprocessors. family: of kernels, in place of the best. sources: a folder in place of anyattn.cuda_src.
    """
    emulator = _Emulator(timing, seed, device.multiprocessors)

    def library(spec: Spec) -> Cubin:
        return Cubin(str(build.kernel(spec, sources)), "", 0.0)

    with contextlib.ExitStack() as stack:
        for target, name, substitute in (
            (launch, "device", lambda ordinal: device),
            (launch, "_function", lambda path, *rest: _kernel(path)),
            (launch, "_cuda", lambda: emulator.cuda),
            (compiler, "cubin", library),
            (tensormap, "_encoder", lambda: emulator.encode),
            (device_tests, "cupy", emulator.cupy),
        ):
            stack.enter_context(mock.patch.object(target, name, substitute))
        if family:
            stack.enter_context(mock.patch.dict(os.environ, {"ANYATTN_KERNEL": family}))
        for forget in (launch.forget_plans, tensormap.encode.cache_clear):
            forget()
            stack.callback(forget)
        yield


class _Emulator:
    """As much of CuPy as a launch and `tests.device` use."""

    def __init__(self, timing: Timing, seed: int, resident: int) -> None:
        self.timing, self.seed, self.resident = timing, seed, resident
        self.arrays: list[_Array] = []
        self.thread = threading.local()  # `context`: whether the thread has one
        self.set_device(0)
        runtime = types.SimpleNamespace(
            setDevice=self.set_device, memsetAsync=self.memset, deviceSynchronize=lambda: None
        )
        self.cuda = types.SimpleNamespace(runtime=runtime, driver=types.SimpleNamespace(launchKernel=self.launch))
        self.cupy = types.SimpleNamespace(empty=self.empty, cuda=self.cuda)

    def set_device(self, ordinal: int) -> None:
        self.thread.context = True

    def encode(self, *arguments: Any) -> int:
        return _encode(*arguments) if hasattr(self.thread, "context") else _INVALID_CONTEXT

    def empty(self, size: int, dtype: Any) -> _Array:
        array = _Array(size * np.dtype(dtype).itemsize)
        self.arrays.append(array)
        return array

    def memset(self, pointer: int, value: int, size: int, stream: int = 0) -> None:
        ctypes.memset(pointer, value, size)

    def launch(
        self, kernel: Any, grid: int, y: int, z: int, threads: int, threads_y: int, threads_z: int, shared_bytes: int,
        stream: int, params: int, extra: int,
    ) -> None:  # fmt: skip
        assert hasattr(self.thread, "context"), "this thread has named no device"
        assert (y, z, threads_y, threads_z, extra) == (1, 1, 1, 1, 0)
        assert grid > 0, "the driver refuses a launch without thread blocks"
        # What lies between the guard bands of tests.device.Memory.
        guard = device_tests.GUARD
        spans = [(array.data.ptr + guard, array.nbytes - 2 * guard) for array in self.arrays]
        ranges = (ctypes.c_uint64 * (2 * len(spans)))(*(x for span in spans for x in span))
        (pointer,) = (ctypes.c_uint64.from_address(params).value,)
        report = _machine().emulator_launch(
            kernel.entry, pointer, kernel.params_bytes, grid, threads, shared_bytes,
            self.resident, int(self.timing), self.seed, ranges, len(spans),
        )  # fmt: skip
        if report:
            text = _located(kernel.path, report.decode())
            raise EmulationError(f"{kernel.name}, timing {self.timing.name}, seed {self.seed}:\n{text}")


class _Array:
    """A part of host memory, with the methods of a cupy.ndarray of bytes."""

    def __init__(self, size: int, memory: npt.NDArray[np.uint8] | None = None) -> None:
        if memory is None:
            memory = np.empty(size + 512, np.uint8)
            memory = memory[-memory.ctypes.data % 512 :][:size]
        self.memory, self.nbytes = memory, size
        self.data = _Pointer(memory.ctypes.data)

    def __getitem__(self, part: slice) -> _Array:
        memory = self.memory[part]
        return _Array(memory.size, memory)

    def set(self, content: npt.NDArray[np.uint8]) -> None:
        self.memory[:] = content

    def get(self) -> npt.NDArray[np.uint8]:
        return self.memory.copy()


class _Pointer:
    def __init__(self, ptr: int) -> None:
        self.ptr = ptr

    def __add__(self, offset: int) -> _Pointer:
        return _Pointer(self.ptr + offset)

    def memset(self, value: int, size: int) -> None:
        ctypes.memset(self.ptr, value, size)


@functools.cache
def _machine() -> Any:
    library = ctypes.CDLL(str(build.machine()), mode=ctypes.RTLD_GLOBAL)  # kernels find its functions
    pointer, number, word = ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint64
    library.emulator_launch.argtypes = (pointer, pointer, *(number,) * 5, ctypes.c_int, word, pointer, ctypes.c_int)
    library.emulator_launch.restype = ctypes.c_char_p
    return library


@functools.cache
def _kernel(path: str) -> Any:
    _machine()
    library = ctypes.CDLL(path)
    entry = ctypes.cast(library.emulator_entry, ctypes.c_void_p)
    kernel = types.SimpleNamespace(
        entry=entry, params_bytes=ctypes.c_int.in_dll(library, "emulator_params_bytes").value
    )
    kernel.path, kernel.name, kernel.ptr = Path(path), Path(path).stem.partition("-")[0], kernel
    return kernel


def _located(library: Path, report: str) -> str:
    """With source lines for "@{1a2b 3c4d}", which are calls, the innermost first."""
    return re.sub(r"@\{([0-9a-f ]*)\}", lambda match: f"({build.locate(library, match[1].split())})", report)


_MAGIC = 0x70616D20726F736E
_ELEMENT_BYTES = {6: 2, 9: 2, 7: 4, 8: 8}  # by CUtensorMapDataType: float16, bfloat16, float32, float64
_INVALID_VALUE, _INVALID_CONTEXT = 1, 201  # of CUresult


def _encode(
    to: int, kind: int, rank: int, pointer: int, extents: Any, strides: Any, box: Any, element_strides: Any,
    interleave: int, swizzle: int, promotion: int, fill: int,
) -> int:  # fmt: skip
    """cuTensorMapEncodeTiled, into machine/memory.cpp's TensorMap; refuses what the driver refuses."""
    size = _ELEMENT_BYTES[kind]
    sound = (
        rank == 4
        and (to | pointer << 2) % 64 == 0
        and all(1 <= n <= 2**32 for n in extents)
        and all(stride % 16 == 0 and stride < 2**40 for stride in strides)
        and all(1 <= n <= 256 for n in box)
        and all(step == 1 for step in element_strides)
        and box[0] * size % 16 == 0
        and (swizzle == 0 or box[0] * size <= 16 << swizzle)
        and (interleave, fill) == (0, 0)
    )
    if not sound:
        return _INVALID_VALUE
    content = np.zeros(128, np.uint8)
    content[:72].view(np.uint64)[:] = (_MAGIC, pointer, *extents, *strides)
    content[72:96].view(np.uint32)[:] = (*box, size, swizzle)
    ctypes.memmove(to, content.ctypes.data, 128)
    return 0
