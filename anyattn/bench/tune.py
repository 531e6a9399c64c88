"""`anyattn tune`: measure tile candidates on this GPU, and write a table for $ANYATTN_TILES.

Candidates are the tiles of the table in use and their neighbours, one step away in one constant. Whatever doesn't fit
the GPU's shared memory, doesn't compile, spills registers or has its tensor-core products serialised is refused before
it is measured, and whatever gives another result, before it is timed. All but `measure` works without a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from anyattn import compile as compiler
from anyattn import launch, plan
from anyattn.compile import CompileError
from anyattn.plan import Device, Plan, UnsupportedError
from anyattn.problem import ITEMSIZE, Options, View, contiguous_backward, dense

Array: TypeAlias = npt.NDArray[Any]
Tile: TypeAlias = dict[str, Any]
Table: TypeAlias = dict[str, dict[str, list[Tile]]]

TOKENS, HIDDEN, SEQLEN = 16384, 2048, 4096  # of the calls that are timed, one full and one causal

# A tile replaces the one in use if it takes less than this share of its time: less is noise.
WORTH = 0.98

CHECKED = 512  # rows at either end that are compared

# Differences to the result of the tile in use that still are rounding (2-norm, relative).
ROUNDING = {"float16": 5e-3, "bfloat16": 2e-2, "float32": 1e-5, "float64": 1e-12}


@dataclass(frozen=True)
class Cell:
    """What one tile is chosen for."""

    direction: str  # "forward" or "backward"
    dtype: str
    head_dim: int

    @property
    def group(self) -> str:
        """Its part of the table."""
        return "16-bit" if ITEMSIZE[self.dtype] == 2 else self.dtype

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, sequence, heads, head dim) of the calls that are timed."""
        return TOKENS // SEQLEN, SEQLEN, max(1, HIDDEN // self.head_dim), self.head_dim


@dataclass(frozen=True)
class Trial:
    """What is tried for a cell."""

    cell: Cell
    kernel: str  # whose tile it is: forward_sm80, ...
    tiles: list[Tile]  # the one in use first
    plans: list[Plan | str]  # of the cell's call with each of them, or why there is none


@dataclass(frozen=True)
class Choice:
    """The outcome for a cell."""

    cell: Cell
    kernel: str
    before: Tile  # the tile in use
    tile: Tile  # the best one; equal to `before` where none is better by enough
    milliseconds: dict[str, float]  # by `name` of the tile; those measured
    refused: dict[str, str]  # why others were not


def name(tile: Tile) -> str:
    """A tile in a few words."""
    return " ".join(f"{knob}={n}" for knob, n in tile.items() if knob.isupper())


# -------------------------------------------------------------------------------------------------------- candidates


def neighbours(tile: Tile) -> Iterator[Tile]:
    """Tiles one step away: one constant changed, or two that belong together. Not all of them work."""

    def changed(**constants: Any) -> Tile:
        return {**tile, **constants}

    for side, least in (("BLOCK_M", 16), ("BLOCK_N", 16)):
        if n := tile.get(side):
            for other in sorted({n // 2, n - 16, n + 16, 2 * n}):
                if least <= other <= 256 and other % 16 == 0:
                    yield changed(**{side: other})
    stages = 2 if "CONSUMERS" in tile else 1  # with one, a producer of its own would have nothing to do ahead
    for knob, least, most in (("STAGES", stages, 4), ("Q_STAGES", 1, 2), ("MIN_BLOCKS", 1, 3), ("CONSUMERS", 1, 3)):
        if n := tile.get(knob):
            yield from (changed(**{knob: other}) for other in (n - 1, n + 1) if least <= other <= most)
    if parts := tile.get("V_PARTS"):
        yield from (changed(V_PARTS=other) for other in (parts // 2, parts * 2) if 1 <= other <= tile["WARPS"])
    splits = [knob for knob in ("S", "KV", "Q") if knob in tile]
    for knob in splits:  # warps along rows and along columns
        first, second = tile[knob]
        if second % 2 == 0:
            yield changed(**{knob: [first * 2, second // 2]})
        if first % 2 == 0:
            yield changed(**{knob: [first // 2, second * 2]})
    if warps := tile.get("WARPS"):
        for more in (True, False):
            others = {"WARPS": warps * 2 if more else warps // 2}
            if not 4 <= others["WARPS"] <= 16:
                continue
            halves = {
                knob: [tile[knob][0] * 2, tile[knob][1]] if more else [max(1, tile[knob][0] // 2), tile[knob][1]]
                for knob in splits
            }
            yield changed(**others, **halves)
            rows = tile["BLOCK_M"] * 2 if more else tile["BLOCK_M"] // 2
            if 16 <= rows <= 256:
                yield changed(**others, **halves, BLOCK_M=rows)


def entries(table: Table, kernel: str, cell: Cell, arch: str) -> list[Tile]:
    """The tiles of the table that serve a cell, in its order."""
    return [
        {"head_dim": tile["head_dim"], **{knob: n for knob, n in tile.items() if knob.isupper()}}
        for tile in table[kernel].get(cell.group, [])
        if tile["head_dim"] >= cell.head_dim and tile.get("arch", arch) == arch and "most_rows" not in tile
    ]


def candidates(cell: Cell, before: Tile, tiles: list[Tile]) -> list[Tile]:
    """What to try where `before` is in use: it, others of the two nearest head dims, their neighbours; each once."""
    nearest = sorted({tile["head_dim"] for tile in tiles})[:2]
    near = [before, *(tile for tile in tiles if tile["head_dim"] in nearest)]
    head_dim = {"head_dim": cell.head_dim}
    return list({name(tile): tile | head_dim for tile in [*near, *(t for n in near for t in neighbours(n))]}.values())


# -------------------------------------------------------------------------------------------------------------- plans


@contextmanager
def using(table: Table) -> Iterator[None]:
    """Let calls be planned from this table, as if $ANYATTN_TILES named it. Not beside other threads."""
    real = plan._tiles
    vars(plan)["_tiles"] = lambda: table
    launch.forget_plans()
    try:
        yield
    finally:
        vars(plan)["_tiles"] = real
        launch.forget_plans()


def planned(cell: Cell, device: Device) -> Plan:
    """The plan of the full call. Raises UnsupportedError."""
    _, seqlen, heads, head_dim = cell.shape
    strides = (seqlen * heads * head_dim, heads * head_dim, head_dim, 1)
    view = View(0, cell.shape, strides, cell.dtype, 0)
    problem = dense(view, view, view, None, Options())
    if cell.direction == "forward":
        return plan.forward(problem, device)
    return plan.backward(contiguous_backward(problem), device)


def only(table: Table, kernel: str, cell: Cell, tile: Tile) -> Table:
    """The table with this one tile for the kernel and the cell's dtype."""
    return {**table, kernel: {**table[kernel], cell.group: [tile]}}


def fit(table: Table, kernel: str, cell: Cell, tile: Tile, device: Device) -> Plan | str:
    """The plan of the cell's call with this tile, or why the kernel can't have it."""
    try:
        with using(only(table, kernel, cell, tile)):
            chosen = planned(cell, device)
    except UnsupportedError as error:
        return str(error)
    if kernel in [used.name for used in chosen.kernels]:
        return chosen
    return "; ".join(reason for _, reason in chosen.refused)  # another family took the call


def fault(chosen: Plan | str) -> str | None:
    """Compile the kernels of a plan; why they are not to be used, or None. It may run in a thread."""
    if isinstance(chosen, str):
        return chosen
    for kernel in chosen.kernels:
        try:
            built = compiler.cubin(kernel.spec)
        except CompileError as error:
            asserted = re.search(r"static assertion failed[^\n]*", str(error))
            return f"{kernel.name} doesn't compile" + (f": {asserted[0]}" if asserted else "")
        if spilled := sum(used.spill_bytes for used in built.resources()):
            return f"{kernel.name} spills {spilled} bytes"
        if serialised := compiler.serialised(built.warnings()):
            return f"{kernel.name}: {serialised[0]}"
    return None


# ---------------------------------------------------------------------------------------------------------- measuring


def prepare(table: Table, cell: Cell, device: Device) -> Trial | None:
    """What to compile and to measure for a cell; None where no kernel takes it."""
    try:
        with using(table):
            chosen = planned(cell, device)
    except UnsupportedError:
        return None
    kernel = next(used.name for used in chosen.kernels if used.name in table)
    known = entries(table, kernel, cell, device.arch)
    before = next(tile for tile in known if isinstance(fit(table, kernel, cell, tile, device), Plan))
    tiles = candidates(cell, before, known)
    return Trial(cell, kernel, tiles, [fit(table, kernel, cell, tile, device) for tile in tiles])


def choose(
    table: Table,
    trial: Trial,
    faults: Iterable[str | None],
    measure: Callable[[Cell, dict[str, Table]], tuple[dict[str, float], dict[str, str]]],
) -> Choice:
    """The best of a trial's tiles, of which `faults` tells why some are not to be used.

    measure: gives the milliseconds of the cell's calls with each of these tables, by their names, and why some can't be
    had; the first is the one in use, which is measured whatever its faults.
    """
    before, *others = trial.tiles
    _, *reasons = faults
    refused = {name(tile): reason for tile, reason in zip(others, reasons, strict=True) if reason}
    good = [before, *(tile for tile in others if name(tile) not in refused)]
    tables = {name(tile): only(table, trial.kernel, trial.cell, tile) for tile in good}
    milliseconds, wrong = measure(trial.cell, tables)
    return Choice(trial.cell, trial.kernel, before, _best(good, milliseconds), milliseconds, refused | wrong)


def _best(tiles: list[Tile], milliseconds: dict[str, float]) -> Tile:
    """The fastest, or the first where that is not worth a change. Without a measurement the first."""
    if name(tiles[0]) not in milliseconds:
        return tiles[0]
    best = min((tile for tile in tiles if name(tile) in milliseconds), key=lambda tile: milliseconds[name(tile)])
    return best if milliseconds[name(best)] < WORTH * milliseconds[name(tiles[0])] else tiles[0]


def measure(cell: Cell, tables: dict[str, Table], rounds: int = 5) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds of a full and a causal call with each table, by turns, on the current GPU; and what went wrong."""
    import cupy

    import anyattn
    from anyattn.bench import timing

    # Arrays are made and compared on the host: CuPy's own kernels would need CUDA's headers and libraries.
    rng = np.random.default_rng(0)
    dtype = _numpy_dtype(cell.dtype)
    each = [rng.standard_normal(cell.shape[1:], np.float32).astype(dtype) for _ in range(4)]
    q, k, v, dout = (cupy.asarray(np.repeat(x[None], cell.shape[0], axis=0)) for x in each)
    known = [(causal, *anyattn.attention(q, k, v, causal=causal, return_lse=True)) for causal in (False, True)]

    def run() -> list[Any]:
        if cell.direction == "forward":
            return [anyattn.attention(q, k, v, causal=causal) for causal, *_ in known]
        pairs = ((x, anyattn.attention_backward(dout, q, k, v, out, lse, causal=x)) for x, out, lse in known)
        return [gradient for _, gradients in pairs for gradient in gradients]

    def ends(x: Any) -> Array:
        """The first and the last rows of an array, one after the other."""
        parts = [cupy.asnumpy(part) for part in (x[0, :CHECKED], x[-1, -CHECKED:])]
        return np.concatenate(parts).astype(np.promote_types(dtype, np.float32))

    expected: list[Array] = []
    wrong = {}
    for key, table in tables.items():
        with using(table):
            try:
                results = [ends(x) for x in run()]
            except Exception as error:  # CuPy's own, too, where a launch asks for too much
                wrong[key] = (str(error) or repr(error)).splitlines()[0]
                continue
        expected = expected or results
        pairs = zip(results, expected, strict=True)
        errors = [float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in pairs]
        if not all(error <= ROUNDING[cell.dtype] for error in errors):  # NaN is not
            wrong[key] = f"another result: {max(errors):.1e} off"

    def timer(table: Table, calls: int) -> list[float]:
        with using(table):
            run()
            return timing.on_cupy_stream(run, calls)

    right = {key: table for key, table in tables.items() if key not in wrong}
    timings, failed = timing.interleaved(right, rounds, timer=timer)
    return {key: taken.median for key, taken in timings.items()}, wrong | failed


def _numpy_dtype(name: str) -> np.dtype[Any]:
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


# --------------------------------------------------------------------------------------------------------- the table


def tuned(table: Table, choices: Iterable[Choice], arch: str) -> Table:
    """The table with the new tiles in it, for this architecture alone, each before those that it goes before."""
    result = {kernel: {group: list(tiles) for group, tiles in groups.items()} for kernel, groups in table.items()}
    for choice in choices:
        if choice.tile != choice.before:
            tiles = result[choice.kernel][choice.cell.group]
            place = next(i for i, tile in enumerate(tiles) if tile["head_dim"] >= choice.cell.head_dim)
            tiles.insert(place, {**choice.tile, "arch": arch})
    return result


def dump(table: Table, comment: str = "") -> str:
    """The table as YAML, a line for each tile."""
    lines = [f"# {line}" for line in comment.splitlines()]
    for kernel, groups in table.items():
        lines.append(f"{kernel}:")
        for group, tiles in groups.items():
            lines.append(f"  {group}:" + ("" if tiles else " []"))
            lines += ["    - {" + ", ".join(f"{knob}: {n}" for knob, n in tile.items()) + "}" for tile in tiles]
    return "\n".join(lines) + "\n"
