"""Problem x Device -> Plan: which kernels, with which tiles, grid and shared memory; or the reason why none fits.

Pure Python: no GPU is touched, so every decision can be tested on any machine. Plans are cached by their problem.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from anyattn import tensormap, wgmma
from anyattn.compile import Spec, kept
from anyattn.problem import ITEMSIZE, MAX_HEAD_DIM, UNBOUNDED, BackwardProblem, Problem, Strides

__all__ = ["Device", "Kernel", "Plan", "UnsupportedError", "backward", "default_specs", "forward"]

MAX_GRID = 2**31 - 1
FAMILIES = ("sm90", "sm80")  # of kernels, the best first; $ANYATTN_KERNEL names one to use in place of the best
ELEMENTS = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float", "float64": "double"}  # in cuda_src


class UnsupportedError(RuntimeError):
    """No kernel takes this call on this device; the message says why."""


class Device(NamedTuple):
    """What a plan needs to know of a GPU."""

    arch: str  # "sm_80", "sm_90a", ...
    shared_bytes: int  # the most one thread block may ask for
    multiprocessors: int = 132


class Kernel(NamedTuple):
    """One launch. Its function is named like its source file."""

    spec: Spec
    grid: int
    threads: int
    shared_bytes: int

    @property
    def name(self) -> str:
        """The function's name in the cubin."""
        return self.spec.source.removesuffix(".cu")


class Plan(NamedTuple):
    """The launches of one call, in order, and what they share."""

    kernels: tuple[Kernel, ...]
    row_blocks: int  # blocks of rows for each head
    key_blocks: int  # blocks of keys for each head; 0 in the forward pass
    delta_bytes: int = 0  # parts of the workspace, one after another; without the first, delta lies in dq
    dq_accum_bytes: int = 0
    ticket_bytes: int = 0
    o_parts_bytes: int = 0  # in the place of all of these, where keys are shared
    softmax_parts_bytes: int = 0
    parts: int = 1  # thread blocks that share the keys of a block of rows (forward)
    section: int = 0  # heads whose tiles are worked on together
    boxes: tuple[tuple[str, int], ...] = ()  # arrays that go through tensor maps, and how many rows at a time
    refused: tuple[tuple[str, str], ...] = ()  # better families of kernels that don't take this call, and why

    @property
    def workspace_bytes(self) -> int:
        """Device memory the call needs besides its arguments."""
        backward = self.delta_bytes + self.dq_accum_bytes
        return backward + self.ticket_bytes + self.o_parts_bytes + self.softmax_parts_bytes


@functools.lru_cache(maxsize=4096)
def forward(problem: Problem, device: Device) -> Plan:
    """The plan of a forward call. Raises UnsupportedError."""
    return _choose({"sm90": _forward_sm90, "sm80": _forward_sm80}, heads_as_rows(problem), device)


def heads_as_rows(problem: Problem) -> Problem:
    """The call as the kernels see it: where each query head has one row, those that share keys are rows of one head.

    Then the keys are read once for all of them. Rows at different positions, or that differ by their head's number
    (slopes, dropout), stay apart.
    """
    group = problem.heads // max(problem.heads_kv, 1)
    alike = not (problem.varlen or problem.alibi or problem.dropout) and min(problem.left, problem.right) >= UNBOUNDED
    if problem.seqlen_q != 1 or group <= 1 or not alike:
        return problem

    def rows(strides: Strides) -> Strides:
        batch, head, _, column = strides
        return batch, head * group, head, column

    batch, head, _ = problem.lse_strides
    return replace(
        problem,
        heads=problem.heads_kv,
        seqlen_q=group,
        q_strides=rows(problem.q_strides),
        out_strides=rows(problem.out_strides),
        lse_strides=(batch, head * group, head),
    )


@functools.lru_cache(maxsize=4096)
def backward(bp: BackwardProblem, device: Device) -> Plan:
    """The plan of a backward call: delta, the gradients, dQ from its accumulator. Raises UnsupportedError."""
    return _choose({"sm90": _backward_sm90, "sm80": _backward_sm80}, bp, device)


_Call = TypeVar("_Call", Problem, BackwardProblem)


def _choose(planners: Mapping[str, Callable[[_Call, Device], Plan]], call: _Call, device: Device) -> Plan:
    """The plan of the best family that takes the call."""
    forced = os.environ.get("ANYATTN_KERNEL")
    if forced and forced not in FAMILIES:
        raise UnsupportedError(f"ANYATTN_KERNEL must be one of {', '.join(FAMILIES)}, got {forced!r}")
    refused: list[tuple[str, str]] = []
    for family in (forced,) if forced and forced in planners else FAMILIES:
        try:
            if family in planners:
                return planners[family](call, device)._replace(refused=tuple(refused))
        except UnsupportedError as error:
            refused.append((family, str(error)))
    raise UnsupportedError("; ".join(f"the {family} kernels: {reason}" for family, reason in refused))


# ------------------------------------------------------------------------------------------------ Hopper


def _forward_sm90(problem: Problem, device: Device) -> Plan:
    _check_tma(problem, device)
    if os.environ.get("ANYATTN_KERNEL") != "sm90" and (reason := _better_elsewhere(problem, device)):
        raise UnsupportedError(reason)
    tile = _tile("forward_sm90", problem, device, _forward_sm90_shared)
    consumers = tile["CONSUMERS"]
    producer_registers, consumer_registers = REGISTERS[consumers]
    constants = {
        **_problem_constants(problem, problem.align),
        **_tile_constants(tile),
        "PRODUCER_REGISTERS": producer_registers,
        "CONSUMER_REGISTERS": consumer_registers,
        "SHARED_BYTES": tile["shared"],
    }
    row_blocks = _blocks(problem.seqlen_q, 64 * consumers)
    tiles = row_blocks * problem.heads * problem.batch
    _check_tiles(tiles)
    grid = min(tiles, device.multiprocessors)
    # Thread blocks take the next free tile, by a counter; but by turns where Q has one stage, since a tile taken late
    # would begin late there. (Of packed sequences, only the GPU knows the tiles.)
    counted = problem.varlen or (tile["Q_STAGES"] > 1 and tiles > grid)
    products = wgmma.functions(problem.dtype, (tile["BLOCK_N"], _padded(problem.head_dim_v, 16)))
    kernel = _kernel("forward_sm90", constants, device, grid, 128 * (1 + consumers), products)
    return Plan(
        (kernel,) if grid else (),
        row_blocks,
        key_blocks=0,
        ticket_bytes=4 if counted and grid else 0,
        section=(_counted_section if counted else _section)(problem, row_blocks, device),
        boxes=(("q", 64), ("k", tile["BLOCK_N"]), ("v", tile["BLOCK_N"])),
    )


# Registers of a producer's and of a consumer's thread, by the number of consumers, in steps of 8. Together no more than
# the thread block starts with, or it waits for ever: its threads' equal parts of a multiprocessor's 64 Ki, rounded so.
REGISTERS = {1: (40, 240), 2: (40, 232), 3: (32, 160)}


def _check_tiles(tiles: int) -> None:
    if tiles > 2**30:  # thread blocks that stay count a little further
        raise UnsupportedError(f"{tiles} tiles are more than the {2**30} they can count")


def _check_tma(problem: Problem, device: Device) -> None:
    """Raise UnsupportedError unless kernels that load through the tensor memory accelerator take the call."""
    if device.arch != "sm_90a":
        raise UnsupportedError(f"they are for Hopper GPUs (sm_90a), this one is {device.arch}")
    if problem.itemsize != 2:
        raise UnsupportedError(f"they take float16 and bfloat16, not {problem.dtype}")
    if problem.align < 16:
        raise UnsupportedError("they need q, k and v at multiples of 16 bytes, row by row, with contiguous columns")
    for name, strides, rows in (
        ("q", problem.q_strides, problem.total_q or problem.seqlen_q),
        ("k", problem.k_strides, problem.total_k or problem.seqlen_k),
        ("v", problem.v_strides, problem.total_k or problem.seqlen_k),
    ):
        if reason := tensormap.refusal(strides, rows, problem.itemsize):
            raise UnsupportedError(f"they load through tensor maps, but {name} {reason}")


def _better_elsewhere(problem: Problem, device: Device) -> str | None:
    """Why the portable kernel is faster (as measured on an H200), or None."""
    keys = _most_keys(problem, 128)
    narrow = max(problem.head_dim, problem.head_dim_v) <= 128
    if problem.seqlen_q <= 16 or (problem.seqlen_q <= 64 and keys <= 128 and narrow):
        return "smaller tiles are faster for so few rows"
    tiles = _blocks(problem.seqlen_q, 128) * problem.heads * problem.batch
    if 4 * tiles <= device.multiprocessors and keys >= 2048:
        return "for so few rows it is faster that thread blocks share the keys"
    return None


def _backward_sm90(bp: BackwardProblem, device: Device) -> Plan:
    problem = bp.problem
    _check_tma(problem, device)
    if bp.align < 16:
        raise UnsupportedError("they need dout and out at multiples of 16 bytes, row by row, with contiguous columns")
    if reason := tensormap.refusal(bp.dout_strides, problem.total_q or problem.seqlen_q, problem.itemsize):
        raise UnsupportedError(f"they load through tensor maps, but dout {reason}")
    kernel = next(kernel for kernel in _BACKWARD_SM90 if kernel.takes(problem))
    tile = _tile(kernel.name, problem, device, kernel.shared)
    key_blocks = _blocks(problem.seqlen_k, tile["BLOCK_N"])
    tiles = key_blocks * problem.heads_kv * problem.batch
    _check_tiles(tiles)
    wide = tile["head_dim"] > 64 and _keeps_more(problem)
    producer_registers, consumer_registers = (24, 240) if wide or not kernel.stays else (40, 232)
    constants = {
        **_problem_constants(problem, bp.align),
        **_tile_constants(tile),
        "PRODUCER_REGISTERS": producer_registers,
        "CONSUMER_REGISTERS": consumer_registers,
        "DETERMINISTIC": problem.deterministic,
        "SHARED_BYTES": tile["shared"],
        "Q_COLUMN_STEP": _dq_column_step(tile),
        "ROW_SUMS": True,
        "SET_BY_FIRST": kernel.stays,
    }
    main = _Main(
        kernel.name,
        constants,
        min(tiles, device.multiprocessors) if kernel.stays else 2 * tiles,
        128 * (1 + tile["WARPS"] // 4),
        _dq_columns(tile, problem),
        # Each slice's turn to add, whether or not in order, behind a counter of tiles; or each warp's.
        tickets=tile["Q"][1] if kernel.stays else tile["WARPS"] * problem.deterministic,
        counters=1 if kernel.stays else 0,
        products=wgmma.functions(problem.dtype, kernel.products(tile, problem)),
    )
    return _backward(bp, device, tile, main)._replace(
        section=_section(problem, key_blocks, device) if kernel.stays else 1,
        boxes=(("q", tile["BLOCK_M"]), ("k", tile["BLOCK_N"]), ("v", tile["BLOCK_N"]), ("dout", tile["BLOCK_M"])),
    )


def _dq_column_step(tile: dict[str, Any]) -> int:
    """What dQ's columns are padded to a multiple of: panels of 64 for each consumer that takes some of them."""
    return int(tile.get("Q_COLUMN_STEP", 64 * tile["Q"][1] if tile["Q"][1] > 1 else 16))


def _dq_columns(tile: dict[str, Any], problem: Problem) -> int:
    return _padded(problem.head_dim, _dq_column_step(tile))


def _keeps_more(problem: Problem) -> bool:
    """Whether a score needs more registers between the products of the backward pass."""
    return problem.dropout > 0 or problem.softcap > 0


def _key_tiles_shared(tile: dict[str, Any], problem: Problem) -> int:
    columns = _dq_columns(tile, problem)
    d, dv = _padded(columns, 64), _padded(problem.head_dim_v, 64)
    m, n, slices, readers = tile["BLOCK_M"], tile["BLOCK_N"], tile["Q"][1], tile["READERS"]
    stages, dout_stages, dq_stages = tile["STAGES"], tile["DOUT_STAGES"], tile["DQ_STAGES"]
    scores = 4 // readers * m * 2 * _padded(n // 2, 64)  # two of P or dS, for each block of rows that is worked on
    elements = n * (d + dv) + stages * m * d + dout_stages * m * dv + scores
    dq, sums = 2 * dq_stages // slices * m * columns * 4, stages * 2 * m * 4
    return int(elements * problem.itemsize + dq + sums + 32 + 16 * (2 + stages + dout_stages + 2 * dq_stages + 2))


def _wide_shared(tile: dict[str, Any], problem: Problem) -> int:
    """The larger of what thread blocks for dK and for dV take."""
    k, q, dv = _dq_columns(tile, problem), _padded(problem.head_dim, 64), _padded(problem.head_dim_v, 64)
    m, n = tile["BLOCK_M"], tile["BLOCK_N"]

    def part(panels: int, v: int) -> int:
        return int((n * (k + v) + m * n + panels * m * 64) * problem.itemsize + 2 * 2 * m * 4 + 16 * (4 + panels))

    return max(part(tile["Q_STAGES"] + tile["DOUT_STAGES"], dv), part(2 * (q + dv) // 64, 0))


def _backward_products(tile: dict[str, Any], problem: Problem) -> list[int]:
    """S^T and dP^T, a consumer's share of dQ, dK, dV."""
    gradients = (_padded(head_dim, 16) for head_dim in (problem.head_dim, problem.head_dim_v))
    return [tile["BLOCK_M"], _dq_columns(tile, problem) // tile["Q"][1], *gradients]


def _wide_products(tile: dict[str, Any], problem: Problem) -> list[int]:
    """dK and dV panel by panel."""
    scores, dq, *gradients = _backward_products(tile, problem)
    return [scores, dq, *(width for columns in gradients for width in (64, columns % 64) if width)]


def _transposed_products(tile: dict[str, Any], problem: Problem) -> list[int]:
    """All along a consumer's keys, but for a panel and a half of dQ."""
    return [tile["BLOCK_N"] // 2, 64, 32]


class _BackwardSm90(NamedTuple):
    """A main kernel of the backward pass on Hopper."""

    name: str
    head_dims: range  # of Q and K that it takes; V's end there too
    shared: Callable[[dict[str, Any], Problem], int]  # bytes of memory
    products: Callable[[dict[str, Any], Problem], list[int]]  # how wide they are
    keeps_more: bool = True  # whether it takes calls that do
    stays: bool = True  # a thread block, for tile after tile of keys; or there are two for each

    def takes(self, problem: Problem) -> bool:
        return (
            problem.head_dim in self.head_dims
            and problem.head_dim_v < self.head_dims.stop
            and (self.keeps_more or not _keeps_more(problem))
        )


# A call goes to the first that takes it.
_BACKWARD_SM90: Final = (
    _BackwardSm90("backward_narrow_sm90", range(33, 65), _key_tiles_shared, _backward_products, keeps_more=False),
    _BackwardSm90("backward_sm90", range(1, 129), _key_tiles_shared, _backward_products),
    _BackwardSm90("backward_192_sm90", range(129, 193), _key_tiles_shared, _transposed_products, keeps_more=False),
    _BackwardSm90("backward_wide_sm90", range(1, MAX_HEAD_DIM + 1), _wide_shared, _wide_products, stays=False),
)


def _forward_sm90_shared(tile: dict[str, Any], problem: Problem) -> int:
    d, dv = _padded(problem.head_dim, 64), _padded(problem.head_dim_v, 64)
    elements = tile["Q_STAGES"] * tile["CONSUMERS"] * 64 * max(d, dv) + tile["STAGES"] * tile["BLOCK_N"] * (d + dv)
    return int(elements * problem.itemsize + 32 + 16 * (1 + tile["Q_STAGES"] + 2 * tile["STAGES"]))


def _section(problem: Problem, blocks: int, device: Device) -> int:
    """Heads whose tiles a Hopper kernel orders together, the longest first.

    One head after the other shares K and V in the level-2 cache. But the tiles of a long one under a causal mask are so
    unlike that about two rounds of tiles must be ordered by length for all thread blocks to get alike.
    """
    unlike = problem.right < UNBOUNDED <= problem.left
    return _power_of_two(2 * device.multiprocessors // blocks if unlike and blocks > 16 else 1)


def _counted_section(problem: Problem, blocks: int, device: Device) -> int:
    """The same in the forward pass, where thread blocks take the next free tile by a counter.

    As many as have 8 MiB of K and V, which the level-2 cache holds beside the rest; at most two rounds of tiles.
    """
    head_bytes = problem.seqlen_k * (problem.head_dim + problem.head_dim_v) * problem.itemsize
    heads = 2**23 * problem.heads // max(problem.heads_kv * head_bytes, 1)
    return _power_of_two(min(2 * device.multiprocessors // max(blocks, 1), heads))


def _power_of_two(x: int) -> int:
    """The greatest that is at most x; 1 below that."""
    return 1 << max(0, x.bit_length() - 1)


# ------------------------------------------------------------------------------------------------ portable


def _forward_sm80(problem: Problem, device: Device) -> Plan:
    tile = _tile("forward_sm80", problem, device, _forward_shared)
    row_blocks = _blocks(problem.seqlen_q, tile["BLOCK_M"])
    grid = row_blocks * problem.heads * problem.batch
    parts = _key_parts(problem, device, tile, grid)
    of_call = _problem_constants(problem, problem.align)
    of_parts = {"PARTED": parts > 1, "PART_COLUMNS": _padded(problem.head_dim_v, 16 * tile["V_PARTS"])}
    constants = {**of_call, **of_parts, **_tile_constants(tile), "SHARED_BYTES": tile["shared"]}
    main = _kernel("forward_sm80", constants, device, grid * parts, 32 * tile["WARPS"])
    if parts == 1:
        return Plan((main,) if grid else (), row_blocks, key_blocks=0)

    warps, row_bytes = 4, of_parts["PART_COLUMNS"] * ITEMSIZE[problem.lse_dtype]
    constants = {**of_call, **of_parts, "WARPS": warps, "SHARED_BYTES": warps * row_bytes}
    grid = problem.seqlen_q * problem.heads * problem.batch
    combine = _kernel("forward_combine", constants, device, grid, 32 * warps)
    rows = problem.batch * problem.heads * problem.seqlen_q
    return Plan(
        (main, combine),
        row_blocks,
        key_blocks=0,
        o_parts_bytes=_aligned(rows * parts * row_bytes),
        softmax_parts_bytes=_aligned(rows * parts * 2 * ITEMSIZE[problem.lse_dtype]),
        parts=parts,
    )


def _key_parts(problem: Problem, device: Device, tile: dict[str, Any], blocks: int) -> int:
    """Thread blocks that share the keys of a block of rows: as many as the GPU holds, if each has work enough."""
    keys = _most_keys(problem, tile["BLOCK_M"])
    if blocks == 0 or keys < 1024:
        return 1
    room = device.multiprocessors * int(tile["MIN_BLOCKS"]) // blocks
    return max(1, min(room, keys // max(4 * int(tile["BLOCK_N"]), 256)))


def _most_keys(problem: Problem, rows: int) -> int:
    """Keys that some of so many rows see, at the most."""
    return min(problem.seqlen_k, rows + problem.left + min(problem.right, problem.seqlen_q))


def _backward_sm80(bp: BackwardProblem, device: Device) -> Plan:
    problem = bp.problem
    tile = _tile("backward_sm80", problem, device, _backward_shared)
    parts = _backward_parts(tile)
    constants = {
        **_problem_constants(problem, bp.align),
        **_tile_constants(tile),
        "DETERMINISTIC": problem.deterministic,
        "SHARED_BYTES": tile["shared"],
        "Q_COLUMN_STEP": parts,
        "ROW_SUMS": False,
        "SET_BY_FIRST": False,
    }
    blocks = _blocks(problem.seqlen_k, tile["BLOCK_N"]) * problem.heads_kv * problem.batch
    columns = _padded(problem.head_dim, parts)
    main = _Main("backward_sm80", constants, blocks, 32 * tile["WARPS"], columns, tickets=int(problem.deterministic))
    return _backward(bp, device, tile, main)


class _Main(NamedTuple):
    """The main kernel of a backward pass."""

    name: str
    constants: dict[str, Any]
    grid: int
    threads: int
    columns: int  # of dQ's accumulator
    tickets: int  # for each block of rows
    counters: int = 0  # before them
    products: str = ""


def _backward(bp: BackwardProblem, device: Device, tile: dict[str, Any], main: _Main) -> Plan:
    """All its launches."""
    problem, constants = bp.problem, main.constants
    row_blocks = _blocks(problem.seqlen_q, tile["BLOCK_M"])
    by_rows, threads = row_blocks * problem.heads * problem.batch, 32 * tile["WARPS"]
    accumulator = ["Element", "HEAD_DIM", "VARLEN", "BLOCK_M", "WARPS", "Q_COLUMN_STEP", "Q_WARPS_M", "Q_WARPS_D"]
    sums = {name: constants[name] for name in accumulator}
    delta_names = [
        "BLOCK_N",
        "HEAD_DIM_V",
        "COPY_BYTES",
        "ROW_SUMS",
        "SET_BY_FIRST",
        "SOFTCAP",
        "ALIBI",
        "SIGNED_SCALE",
    ]
    delta = sums | {name: constants[name] for name in delta_names}
    convert = sums | {"SHARED_BYTES": tile["BLOCK_M"] * main.columns * problem.itemsize}
    kernels = (
        _kernel("backward_delta", delta, device, by_rows, threads),
        _kernel(main.name, constants, device, main.grid, main.threads, main.products),
        _kernel("backward_dq", convert, device, by_rows, threads),
    )
    rows, blocks = problem.seqlen_q * problem.batch, row_blocks * problem.batch
    if problem.varlen:  # a sequence takes one block more than its share at the most
        rows, blocks = problem.total_q, problem.total_q // tile["BLOCK_M"] + problem.batch
    accum = ITEMSIZE[problem.lse_dtype]
    delta_bytes = (blocks * 2 * tile["BLOCK_M"] if constants["ROW_SUMS"] else rows) * problem.heads * accum
    # It lies in dq, which is written last, if there is room.
    in_dq = delta_bytes <= math.prod(bp.dq_shape) * problem.itemsize
    return Plan(
        tuple(kernel for kernel in kernels if kernel.grid),
        row_blocks,
        key_blocks=_blocks(problem.seqlen_k, tile["BLOCK_N"]),
        delta_bytes=0 if in_dq else _aligned(delta_bytes),
        dq_accum_bytes=_aligned(blocks * problem.heads * tile["BLOCK_M"] * main.columns * accum),
        ticket_bytes=_aligned((main.counters + blocks * problem.heads * main.tickets) * 4),
    )


def default_specs(arch: str) -> list[Spec]:
    """What `anyattn compile` builds: every kernel with every tile that fits an architecture.

    For a plain call of its head dim, of few and of many keys where that makes a difference; where it takes another
    kernel, for one with dropout, and for the plain call of the greatest head dim that doesn't.
    """
    device = Device(arch, SHARED_BYTES[arch])
    specs: dict[Spec, None] = {}
    planners: list[tuple[str, Any, Any]] = [
        ("forward_sm90", _forward_sm90_shared, _forward_sm90),
        ("forward_sm80", _forward_shared, _forward_sm80),
        *((kernel.name, kernel.shared, _backward_sm90) for kernel in _BACKWARD_SM90),
        ("backward_sm80", _backward_shared, _backward_sm80),
    ]
    for name, shared, planner in planners:

        def add(problem: Problem, name: str = name, planner: Any = planner) -> bool:
            """Whether the kernel takes the call."""
            call: Any = _plain_backward(problem) if name.startswith("backward") else problem
            try:
                kernels = planner(call, device).kernels
            except UnsupportedError:  # not a kernel of this architecture
                return False
            takes = any(kernel.name == name for kernel in kernels)
            specs.update({kernel.spec: None for kernel in kernels if takes})
            return takes

        for dtype in ("bfloat16", "float32", "float64"):
            for tile in _candidates(name, dtype):
                head_dim, rows = tile["head_dim"], tile.get("most_rows") or tile.get("seqlen_q", 128)
                for keys in (128, 4096) if name == "forward_sm80" else (rows,):  # thread blocks share many
                    plain = partial(_plain, dtype, seqlen=rows, keys=keys)
                    if shared(tile, plain(head_dim)) > device.shared_bytes or add(plain(head_dim)):
                        continue
                    add(plain(head_dim, dropout=0.1))
                    any(add(plain(lower)) for lower in range(head_dim - 8, 0, -8))
    return list(specs)


# The most shared memory one block may have (CUDA C++ Programming Guide, table of compute capabilities).
SHARED_BYTES = {
    "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_87": 163 << 10, "sm_89": 99 << 10, "sm_90a": 227 << 10,
    "sm_100": 227 << 10, "sm_103": 227 << 10, "sm_120": 99 << 10,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ tiles


@functools.cache
def _tiles() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The tile table: $ANYATTN_TILES, or the package's own."""
    path = Path(os.environ.get("ANYATTN_TILES") or Path(__file__).with_name("tiles.yaml"))

    def parse(text: str) -> Any:
        import yaml  # it and the parsing take 20 ms, of the first process only

        try:
            table = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # libyaml's, where PyYAML has it
            tiles = [tile for groups in table.values() for group in groups.values() for tile in group]
            if not all(isinstance(tile["head_dim"], int) for tile in tiles):
                raise TypeError("a head_dim is not an int")
        except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
            raise UnsupportedError(f"{path} (ANYATTN_TILES) is no table of tiles, as tiles.yaml is: {error}") from None
        return table

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UnsupportedError(f"{path} (ANYATTN_TILES) can't be read: {error}") from None
    return kept("tiles", text, parse)  # type: ignore[no-any-return]


def _candidates(kernel: str, dtype: str) -> list[dict[str, Any]]:
    return _tiles().get(kernel, {}).get("16-bit" if ITEMSIZE[dtype] == 2 else dtype, [])


def _tile(kernel: str, problem: Problem, device: Device, shared: Any) -> dict[str, Any]:
    """The first candidate that fits, with its shared memory."""
    head_dim = max(problem.head_dim, problem.head_dim_v)
    least = None
    for tile in _candidates(kernel, problem.dtype):
        if (
            head_dim <= tile["head_dim"]
            and tile.get("arch", device.arch) == device.arch
            and tile.get("seqlen_q", 0) <= problem.seqlen_q <= tile.get("most_rows", problem.seqlen_q)
        ):
            needed = shared(tile, problem)
            if needed <= device.shared_bytes:
                return {**tile, "shared": needed}
            least = min(least or needed, needed)
    if least is None:
        raise UnsupportedError(f"the tile table has none for {problem.dtype} with head dim {head_dim}")
    raise UnsupportedError(
        f"{problem.dtype} with head dim {head_dim} needs {least} bytes of shared memory a block, {device.arch} has "
        f"{device.shared_bytes}"
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


def _kernel(
    name: str, constants: dict[str, Any], device: Device, grid: int, threads: int, products: str = ""
) -> Kernel:
    from anyattn.launch import PRELUDE

    if grid > MAX_GRID:
        raise UnsupportedError(f"{name}: {grid} thread blocks are more than the {MAX_GRID} a launch may have")
    spec = Spec(f"{name}.cu", device.arch, tuple(sorted(constants.items())), PRELUDE + "\n" + products)
    return Kernel(spec, grid, threads, constants.get("SHARED_BYTES", 0))


def _blocks(extent: int, block: int) -> int:
    return -(-extent // block)


def _padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _aligned(size: int) -> int:
    return _padded(size, 256)


def _plain(dtype: str, head_dim: int, seqlen: int, dropout: float = 0.0, keys: int | None = None) -> Problem:
    """A call with nothing special about it."""
    from anyattn.problem import Options, View, dense, row_major

    q, k = ((1, length, 8, head_dim) for length in (seqlen, keys or seqlen))
    q_view, k_view = (View(0, shape, row_major(shape), dtype, 0) for shape in (q, k))
    return dense(q_view, k_view, k_view, None, Options(dropout=dropout))


def _plain_backward(problem: Problem) -> BackwardProblem:
    strides, shape = problem.out_strides, problem.out_shape
    return BackwardProblem(
        problem, strides, strides, problem.lse_strides, strides, strides, strides, problem.align, shape, shape, shape
    )
