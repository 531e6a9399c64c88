"""Problem x Device -> Plan: which kernels, with which tiles, grid and shared memory; or the reason why none fits.

Pure Python: no GPU is touched, so every decision can be tested on any machine. Plans are cached by their problem.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyattn.compile import Spec
from anyattn.problem import ITEMSIZE, BackwardProblem, Problem

__all__ = ["Device", "Kernel", "Plan", "UnsupportedError", "backward", "default_specs", "forward"]

MAX_GRID = 2**31 - 1
FAMILIES = ("sm80",)  # of kernels, the best first; $ANYATTN_KERNEL names one to use whatever the GPU
ELEMENTS = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float", "float64": "double"}  # in cuda_src


class UnsupportedError(RuntimeError):
    """No kernel takes this call on this device; the message says why."""


@dataclass(frozen=True)
class Device:
    """What a plan needs to know of a GPU."""

    arch: str  # "sm_80", "sm_90a", ...
    shared_bytes: int  # the most one thread block may ask for


@dataclass(frozen=True)
class Kernel:
    """One launch. Its function is named like its source file."""

    spec: Spec
    grid: int
    threads: int
    shared_bytes: int

    @property
    def name(self) -> str:
        """The function's name in the cubin."""
        return self.spec.source.removesuffix(".cu")


@dataclass(frozen=True)
class Plan:
    """The launches of one call, in order, and what they share."""

    kernels: tuple[Kernel, ...]
    row_blocks: int  # blocks of rows for each head
    key_blocks: int  # blocks of keys for each head; 0 in the forward pass
    delta_bytes: int = 0  # parts of the workspace, one after another
    dq_accum_bytes: int = 0
    ticket_bytes: int = 0
    refused: tuple[tuple[str, str], ...] = ()  # better families of kernels that don't take this call, and why

    @property
    def workspace_bytes(self) -> int:
        """Device memory the call needs besides its arguments."""
        return self.delta_bytes + self.dq_accum_bytes + self.ticket_bytes


@functools.lru_cache(maxsize=4096)
def forward(problem: Problem, device: Device) -> Plan:
    """The plan of a forward call. Raises UnsupportedError."""
    name = f"forward_{_family()}"
    tile = _tile(name, problem, device, _forward_shared)
    blocks = _blocks(problem.seqlen_q, tile["BLOCK_M"])
    constants = {**_problem_constants(problem, problem.align), **_tile_constants(tile), "SHARED_BYTES": tile["shared"]}
    kernel = _kernel(name, constants, device, blocks * problem.heads * problem.batch)
    return Plan((kernel,) if kernel.grid else (), row_blocks=blocks, key_blocks=0)


@functools.lru_cache(maxsize=4096)
def backward(bp: BackwardProblem, device: Device) -> Plan:
    """The plan of a backward call: delta, the gradients, dQ from its accumulator. Raises UnsupportedError."""
    problem, name = bp.problem, f"backward_{_family()}"
    tile = _tile(name, problem, device, _backward_shared)
    row_blocks, key_blocks = _blocks(problem.seqlen_q, tile["BLOCK_M"]), _blocks(problem.seqlen_k, tile["BLOCK_N"])
    constants = {
        **_problem_constants(problem, bp.align),
        **_tile_constants(tile),
        "DETERMINISTIC": problem.deterministic,
        "SHARED_BYTES": tile["shared"],
    }
    by_rows = row_blocks * problem.heads * problem.batch
    shared_names = ("Element", "HEAD_DIM", "VARLEN", "BLOCK_M", "WARPS", "KV_WARPS_D", "Q_WARPS_M", "Q_WARPS_D")
    sums = {name: constants[name] for name in shared_names}
    delta = {name: constants[name] for name in ("HEAD_DIM_V", "COPY_BYTES", "DETERMINISTIC")}
    columns = _padded(problem.head_dim, _backward_parts(tile))
    kernels = (
        _kernel("backward_delta", sums | delta, device, by_rows),
        _kernel(name, constants, device, key_blocks * problem.heads_kv * problem.batch),
        _kernel("backward_dq", sums | {"SHARED_BYTES": tile["BLOCK_M"] * columns * problem.itemsize}, device, by_rows),
    )
    rows, blocks = problem.seqlen_q * problem.batch, row_blocks * problem.batch
    if problem.varlen:  # a sequence takes one block more than its share at the most
        rows, blocks = problem.total_q, problem.total_q // tile["BLOCK_M"] + problem.batch
    accum = ITEMSIZE[problem.lse_dtype]
    return Plan(
        tuple(kernel for kernel in kernels if kernel.grid),
        row_blocks,
        key_blocks,
        delta_bytes=_aligned(rows * problem.heads * accum),
        dq_accum_bytes=_aligned(blocks * problem.heads * tile["BLOCK_M"] * columns * accum),
        ticket_bytes=_aligned(blocks * problem.heads * 4) if problem.deterministic else 0,
    )


def default_specs(arch: str) -> list[Spec]:
    """Every kernel with every tile that fits an architecture, for a plain call: what `anyattn compile` builds."""
    device = Device(arch, SHARED_BYTES[arch])
    specs: dict[Spec, None] = {}
    for name, shared in (("forward_sm80", _forward_shared), ("backward_sm80", _backward_shared)):
        for dtype in ("bfloat16", "float32", "float64"):
            for tile in _candidates(name, dtype):
                problem = _plain(dtype, tile["head_dim"])
                if shared(tile, problem) <= device.shared_bytes:
                    if name == "forward_sm80":
                        plan = forward(problem, device)
                    else:
                        bp = BackwardProblem(
                            problem, *(problem.out_strides,) * 2, problem.lse_strides, *(problem.out_strides,) * 3,
                            problem.align, *(problem.out_shape,) * 3,
                        )  # fmt: skip
                        plan = backward(bp, device)
                    specs.update({kernel.spec: None for kernel in plan.kernels})
    return list(specs)


# The most shared memory one block may have (CUDA C++ Programming Guide, table of compute capabilities).
SHARED_BYTES = {
    "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_87": 163 << 10, "sm_89": 99 << 10, "sm_90a": 227 << 10,
    "sm_100": 227 << 10, "sm_103": 227 << 10, "sm_120": 99 << 10,
}  # fmt: skip


def _family() -> str:
    """The kernels to use: those that $ANYATTN_KERNEL names, or the best there are."""
    name = os.environ.get("ANYATTN_KERNEL") or FAMILIES[0]
    if name not in FAMILIES:
        raise UnsupportedError(f"ANYATTN_KERNEL must be one of {', '.join(FAMILIES)}, got {name!r}")
    return name


# ------------------------------------------------------------------------------------------------ tiles


@functools.cache
def _tiles() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The tile table: $ANYATTN_TILES, or the package's own."""
    import yaml

    path = os.environ.get("ANYATTN_TILES") or Path(__file__).with_name("tiles.yaml")
    with open(path, encoding="utf-8") as file:
        return yaml.safe_load(file)  # type: ignore[no-any-return]


def _candidates(kernel: str, dtype: str) -> list[dict[str, Any]]:
    return _tiles()[kernel]["16-bit" if ITEMSIZE[dtype] == 2 else dtype]


def _tile(kernel: str, problem: Problem, device: Device, shared: Any) -> dict[str, Any]:
    """The first candidate that fits, with its shared memory."""
    head_dim = max(problem.head_dim, problem.head_dim_v)
    least = None
    for tile in _candidates(kernel, problem.dtype):
        if head_dim <= tile["head_dim"] and tile.get("arch", device.arch) == device.arch:
            needed = shared(tile, problem)
            if needed <= device.shared_bytes:
                return {**tile, "shared": needed}
            least = min(least or needed, needed)
    raise UnsupportedError(
        f"{kernel}: {problem.dtype} with head dim {head_dim} needs {least} bytes of shared memory a block, "
        f"{device.arch} has {device.shared_bytes}"
    )


def _forward_shared(tile: dict[str, Any], problem: Problem) -> int:
    d, dv = _padded(problem.head_dim, 16), _padded(problem.head_dim_v, 16 * tile["V_PARTS"])
    keys_and_rows = tile["BLOCK_M"] * d + tile["BLOCK_N"] * (d + dv)
    return int(max(keys_and_rows, tile["BLOCK_M"] * dv) * problem.itemsize)


def _backward_shared(tile: dict[str, Any], problem: Problem) -> int:
    parts = _backward_parts(tile)
    columns = _padded(problem.head_dim, parts) + _padded(problem.head_dim_v, parts)
    rows = tile["BLOCK_N"] + tile["STAGES"] * tile["BLOCK_M"]
    row_sums = tile["STAGES"] * _padded(2 * tile["BLOCK_M"] * ITEMSIZE[problem.lse_dtype], 1024)
    scores = _padded(tile["BLOCK_M"] * tile["BLOCK_N"] * problem.itemsize, 1024)
    return int(rows * columns * problem.itemsize + 2 * scores + row_sums)


def _backward_parts(tile: dict[str, Any]) -> int:
    """What head dims are padded to a multiple of: whole products for each warp that shares the columns."""
    return 16 * int(max(tile["KV"][1], tile["Q"][1]))


# ------------------------------------------------------------------------------------------------ specs


def _problem_constants(problem: Problem, align: int) -> dict[str, int | bool | str]:
    return {
        "Element": ELEMENTS[problem.dtype],
        "HEAD_DIM": problem.head_dim,
        "HEAD_DIM_V": problem.head_dim_v,
        "COPY_BYTES": align,
        "VARLEN": problem.varlen,
        "ALIBI": problem.alibi,
        "SOFTCAP": problem.softcap > 0,
        "DROPOUT": problem.dropout > 0,
        "SIGNED_SCALE": problem.scale < 2.0**-126,  # negative, zero or below what a float32 holds
    }


def _tile_constants(tile: dict[str, Any]) -> dict[str, int]:
    constants = {name: value for name, value in tile.items() if name.isupper() and isinstance(value, int)}
    for part, (first, second) in (("S", ("M", "N")), ("KV", ("N", "D")), ("Q", ("M", "D"))):
        if part in tile:
            constants[f"{part}_WARPS_{first}"], constants[f"{part}_WARPS_{second}"] = tile[part]
    return constants


def _kernel(name: str, constants: dict[str, Any], device: Device, grid: int) -> Kernel:
    from anyattn.launch import PRELUDE

    if grid > MAX_GRID:
        raise UnsupportedError(f"{name}: {grid} thread blocks are more than the {MAX_GRID} a launch may have")
    spec = Spec(f"{name}.cu", device.arch, tuple(sorted(constants.items())), PRELUDE)
    return Kernel(spec, grid, 32 * constants["WARPS"], constants.get("SHARED_BYTES", 0))


def _blocks(extent: int, block: int) -> int:
    return -(-extent // block)


def _padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _aligned(size: int) -> int:
    return _padded(size, 256)


def _plain(dtype: str, head_dim: int) -> Problem:
    """A call with nothing special about it."""
    from anyattn.problem import Options, View, dense

    shape = (1, 1024, 8, head_dim)
    view = View(0, shape, (1024 * 8 * head_dim, 8 * head_dim, head_dim, 1), dtype, 0)
    return dense(view, view, view, None, Options())
