"""Tensor maps (CUtensorMap): where the tensor memory accelerator finds the boxes of an array, in 128 bytes.

Made by the driver's cuTensorMapEncodeTiled, called through ctypes: importing cuda.bindings would take longer than a
first call may.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

__all__ = ["BYTES", "COLUMNS", "encode", "refusal"]

BYTES = 128
COLUMNS = 64  # of a box of 16-bit elements: 128 bytes, the widest that is swizzled

_TYPES = {"float16": 6, "bfloat16": 9}  # CUtensorMapDataType
_INTERLEAVE_NONE, _SWIZZLE_128B, _PROMOTION_L2_128B, _FILL_ZEROS = 0, 3, 2, 0
_MAX_STRIDE = 2**40  # bytes

_Four = tuple[int, int, int, int]


def refusal(strides: _Four, rows: int, itemsize: int) -> str | None:
    """Why no tensor map can describe an array of these strides (batch, head, row, column), in elements; or None.

    Alignment is not looked at: the pointer and the strides must be multiples of 16 bytes.
    """
    if min(strides) < 0:
        return "has a negative stride"
    if max(strides) * itemsize >= _MAX_STRIDE:
        return "has a stride of 2**40 bytes or more"
    if strides[2] == 0 and rows > 1:
        return "repeats one row"
    return None


@functools.lru_cache(maxsize=4096)
def encode(pointer: int, dtype: str, extents: _Four, strides: _Four, box_rows: int) -> bytes:
    """The map of an array for boxes of `box_rows` rows by COLUMNS columns in the 128-byte swizzle.

    extents, strides (in elements): of (batch, head, row, column). What a box holds outside the array reads as zero.
    A dimension of stride 0 becomes one of extent 1: ask for its element 0.
    """
    if 0 in extents:
        return bytes(BYTES)  # there is nothing to load
    batch, heads, rows, columns = (n if s else 1 for n, s in zip(extents, strides, strict=True))
    sizes = (ctypes.c_uint64 * 4)(columns, rows, heads, batch)
    steps = (ctypes.c_uint64 * 3)(*(2 * strides[axis] or 16 for axis in (2, 1, 0)))
    box = (ctypes.c_uint32 * 4)(COLUMNS, box_rows, 1, 1)
    element_steps = (ctypes.c_uint32 * 4)(1, 1, 1, 1)
    memory = ctypes.create_string_buffer(BYTES + 64)
    offset = -ctypes.addressof(memory) % 64  # the driver wants the map at a multiple of 64 bytes
    status = _encoder()(
        ctypes.addressof(memory) + offset, _TYPES[dtype], 4, pointer, sizes, steps, box, element_steps,
        _INTERLEAVE_NONE, _SWIZZLE_128B, _PROMOTION_L2_128B, _FILL_ZEROS,
    )  # fmt: skip
    if status:
        raise RuntimeError(
            f"cuTensorMapEncodeTiled failed with CUresult {status} for {dtype} of {extents}, strides {strides}"
        )
    return memory.raw[offset : offset + BYTES]


@functools.cache
def _encoder() -> Any:
    function = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1").cuTensorMapEncodeTiled
    number, pointer = ctypes.c_int, ctypes.c_void_p
    function.argtypes = (pointer, number, ctypes.c_uint32, pointer, *(pointer,) * 4, *(number,) * 4)
    return function
