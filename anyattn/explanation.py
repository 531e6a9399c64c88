"""What a call takes, without making it: the results of `anyattn.explain` and of `anyattn info --call`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from typing import Any

from anyattn import compile as compiler
from anyattn import cpu, host, launch, offload, plan
from anyattn.chunks import parts
from anyattn.compile import CompileError
from anyattn.plan import Device, UnsupportedError
from anyattn.problem import DTYPES, Options, Problem, View, contiguous_backward, dense, packed, place, varlen

__all__ = ["SYNTAX", "Explanation", "Launch", "Pass", "explain", "parse"]

# Constants of a kernel that follow from the call, not from a choice of tile.
_OF_THE_CALL = ("HEAD_DIM", "HEAD_DIM_V", "COPY_BYTES", "PART_COLUMNS", "SHARED_BYTES")


@dataclass(frozen=True)
class Launch:
    """One kernel of a pass."""

    kernel: str  # its function, named like its source: forward_sm80
    tile: dict[str, int]  # BLOCK_M rows of queries, BLOCK_N keys, ...: the names are explained in tiles.yaml
    compiled_in: tuple[str, ...]  # features such as SOFTCAP; what is not compiled in costs nothing
    grid: int  # thread blocks
    threads: int  # of a block
    shared_bytes: int  # of a block
    registers: int | None  # of a thread; None where the kernel can't be compiled
    spill_bytes: int | None  # of a thread, stores and loads


@dataclass(frozen=True)
class Pass:
    """The forward or the backward pass of a call."""

    device: str | None  # "cuda:0 (sm_90a)" or "cpu"; None when the call would raise UnsupportedError
    why: str  # this device
    kernels: tuple[Launch, ...]  # in order; none on the CPU, and none for an empty call
    workspace_bytes: int  # device memory besides arguments and results
    refused: tuple[tuple[str, str], ...]  # better families of kernels that don't take this call, and why
    notes: tuple[str, ...]  # what else bears on it: environment variables, alignment
    error: str | None  # the message that the call would raise


@dataclass(frozen=True)
class Explanation:
    """Which kernels a call takes, forward and backward, and why no others. Printed, it is a report."""

    call: str
    forward: Pass
    backward: Pass

    def __str__(self) -> str:
        parts = [self.call]
        for name, part in (("forward", self.forward), ("backward", self.backward)):
            parts += ["", *_lines(name, part)]
        return "\n".join(parts)


def explain(problem: Problem, backend: str, device: Device | None = None) -> Explanation:
    """What a call of this problem takes. Kernels that the cache lacks are compiled, for their registers.

    device: plan for this GPU, which need not be here, rather than for the one that the problem is on.
    """
    return Explanation(
        _describe(problem),
        _pass(problem, backend, device, backward=False),
        _pass(problem, backend, device, backward=True),
    )


def _pass(problem: Problem, backend: str, device: Device | None, backward: bool) -> Pass:
    where, why, notes = None, "", []
    try:
        if problem.device >= 0:
            on_gpu, why = True, "the arrays are in GPU memory"
        else:
            on_gpu, why = host.route(problem, backend, host.BACKWARD_WORK if backward else 1.0)
        if not on_gpu:
            function, threads = f"anyattn.cpu.{'backward' if backward else 'forward'}", cpu._thread_count(problem)
            return Pass("cpu", why, (), 0, (), (f"{function}, in NumPy, threads: {threads}",), None)
        if problem.device < 0:
            problem, count = _first_part(problem, backward)
            notes = [f"in {count} parts, copied beside kernels; these are the first part's"] * (count > 1)
        where = f"cuda:{problem.device}"
        if device is None:
            device = launch.device(problem.device)
        where += f" ({device.arch})"
        chosen = plan.backward(contiguous_backward(problem), device) if backward else plan.forward(problem, device)
    except (UnsupportedError, CompileError, MemoryError) as error:
        return Pass(where, why, (), 0, (), (), str(error))
    built = [_build(kernel) for kernel in chosen.kernels]
    failure = next((reason for _, reason in built if reason), None)
    launches = tuple(used for used, _ in built)
    return Pass(where, why, launches, chosen.workspace_bytes, chosen.refused, (*notes, *_notes(problem)), failure)


def _build(kernel: plan.Kernel) -> tuple[Launch, str | None]:
    """What a kernel takes, and why it can't be compiled."""
    numbers: tuple[int | None, ...] = (None, None)
    static_bytes, failure = 0, None
    try:
        for used in compiler.cubin(kernel.spec).resources():  # none, should a compiler tell nothing
            numbers, static_bytes = (used.registers, used.spill_bytes), used.shared_bytes
    except CompileError as error:
        failure = str(error)
    constants = kernel.spec.constants
    tile = {name: n for name, n in constants if type(n) is int and name not in _OF_THE_CALL}
    features = tuple(name for name, given in constants if given is True)
    shared_bytes = kernel.shared_bytes + static_bytes
    return Launch(kernel.name, tile, features, kernel.grid, kernel.threads, shared_bytes, *numbers), failure


def _first_part(problem: Problem, backward: bool) -> tuple[Problem, int]:
    """What a GPU gets of a call on host arrays at a time, and how often. Packed sequences count as one here."""
    import cupy

    device = int(cupy.cuda.runtime.getDevice())
    if problem.varlen:
        return packed(problem, device), 1
    lengths = [(problem.seqlen_q, problem.seqlen_k)] * problem.batch
    whole = parts(problem, device, lengths, offload._free_bytes(), backward)
    return (whole[0].problem, len(whole)) if whole else (packed(problem, device), 1)


def _notes(problem: Problem) -> list[str]:
    notes = [f"{name}={value}" for name in ("ANYATTN_KERNEL", "ANYATTN_TILES") if (value := os.environ.get(name))]
    if problem.align < 16:
        notes.append(f"pointers and strides of q, k and v allow copies of {problem.align} bytes; 16 would be faster")
    return notes


# --------------------------------------------------------------------------------------------------------------- text


def _describe(problem: Problem) -> str:
    shapes = {"q": problem.q_shape, "k": problem.k_shape, "v": problem.v_shape}
    said = [f"{name} {shape}" for name, shape in shapes.items()]
    said += [problem.dtype, problem.layout, place(problem.device)]
    bounds = ["" if side >= 2**30 else str(side) for side in (problem.left, problem.right)]
    if problem.varlen:
        said.append(f"{problem.batch} packed sequences of up to {problem.seqlen_q} and {problem.seqlen_k}")
    if bounds == ["", "0"]:
        said.append("causal")
    elif any(bounds):
        said.append(f"window {':'.join(bounds)}")
    said += [f"{name} {getattr(problem, name):g}" for name in ("softcap", "dropout") if getattr(problem, name)]
    said += [name for name in ("alibi", "deterministic") if getattr(problem, name)]
    return ", ".join(said)


def _lines(name: str, part: Pass) -> list[str]:
    lines = [f"{name}: {part.device or 'not possible'}" + (f", because {part.why}" if part.why else "")]
    if part.kernels:
        columns = ["kernel", "blocks", "threads", "registers", "spill bytes", "shared bytes", "tile", "compiled in"]
        rows = [
            [
                *(used.kernel, str(used.grid), str(used.threads)),
                *("-" if n is None else str(n) for n in (used.registers, used.spill_bytes)),
                str(used.shared_bytes),
                " ".join(f"{knob}={n}" for knob, n in used.tile.items()),
                " ".join(used.compiled_in) or "-",
            ]
            for used in part.kernels
        ]
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        for row in [columns, *rows]:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  " + "  ".join(cells).rstrip())
        lines.append(f"  workspace: {part.workspace_bytes} bytes")
    elif part.error is None and part.device != "cpu":
        lines.append("  nothing to compute")
    lines += [f"  not the {family} kernels: {reason}" for family, reason in part.refused]
    lines += [f"  {note}" for note in part.notes]
    return lines + ([f"  error: {part.error}"] if part.error else [])


# ------------------------------------------------------------------------------------------------- calls in one line

SYNTAX = """\
B,S,H,D[,...]: batch, sequence length, heads and head dim, then in any order
  float16 | bfloat16 | float32 | float64     (default: bfloat16 on a GPU, else float32)
  seqlen_k=N  heads_kv=N  head_dim_v=N       as q's unless given
  causal  window=N | LEFT:RIGHT  scale=X  softcap=X  alibi  dropout=P  deterministic
  varlen                                     B sequences of at most S, packed
  layout=bshd | bhsd
  host                                       arrays in host memory (default: on the GPU, if there is one)
  backend=auto | cuda | cpu
  arch=sm_90a                                plan for this architecture; needs no GPU
for instance 2,4096,32,128,bfloat16,causal,heads_kv=8,arch=sm_90a"""

_FLAGS = ("causal", "alibi", "deterministic", "varlen", "host")
_SHORT = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}


def parse(text: str) -> tuple[Problem, str, Device | None]:
    """A call in the words of SYNTAX, as `explain` takes it. Raises ValueError or TypeError."""
    words = [word.strip() for word in text.split(",")]
    try:
        batch, seqlen, heads, head_dim = map(int, words[:4])
    except ValueError:
        raise ValueError(f"a call begins with four numbers, B,S,H,D, got {text!r}") from None
    given: dict[str, Any] = {}
    for word in words[4:]:
        name, equals, value = word.partition("=")
        if not equals and (dtype := _SHORT.get(name, name)) in DTYPES:
            given["dtype"] = dtype
        elif not equals and name in _FLAGS:
            given[name] = True
        elif equals and name in _VALUES:
            try:
                given[name] = _VALUES[name](value)
            except ValueError as error:
                raise ValueError(f"{name}= can't be {value!r}: {error}") from None
        else:
            raise ValueError(f"{word!r} is not one of {', '.join((*DTYPES, *_FLAGS, *(f'{n}=' for n in _VALUES)))}")

    backend, arch = given.get("backend", "auto"), given.get("arch")
    if given.get("host") or backend == "cpu":
        if arch:
            raise ValueError("arch= plans for arrays on a GPU: it goes with neither host nor backend=cpu")
        ordinal = -1
    else:
        ordinal = 0 if arch or launch.available() is None else -1
    dtype = given.get("dtype", "bfloat16" if ordinal >= 0 else "float32")
    seqlen_k, heads_kv = given.get("seqlen_k", seqlen), given.get("heads_kv", heads)
    if min(batch, seqlen, heads, seqlen_k, heads_kv) < 0:
        raise ValueError(f"no array has a negative size, got {text!r}")
    packing, layout = given.get("varlen", False), given.get("layout", "bshd")

    def view(rows: int, heads: int, columns: int) -> View:
        if packing:
            shape: tuple[int, ...] = (batch * rows, heads, columns)
        else:
            shape = (batch, heads, rows, columns) if layout == "bhsd" else (batch, rows, heads, columns)
        return _view(shape, dtype, ordinal)

    q, k = view(seqlen, heads, head_dim), view(seqlen_k, heads_kv, head_dim)
    v = view(seqlen_k, heads_kv, given.get("head_dim_v", head_dim))
    alibi = _view((heads,), "float32", ordinal) if "alibi" in given else None
    options = Options(**{name: value for name, value in given.items() if name in Options._fields})
    if packing:
        offsets = _view((batch + 1,), "int32", ordinal)
        problem = varlen(q, k, v, offsets, offsets, seqlen, seqlen_k, alibi, options)
    else:
        problem = dense(q, k, v, alibi, options)
    return problem, backend, Device(arch, plan.SHARED_BYTES[arch]) if arch else None


def _view(shape: tuple[int, ...], dtype: str, ordinal: int) -> View:
    return View(0, shape, tuple(prod(shape[axis + 1 :]) for axis in range(len(shape))), dtype, ordinal)


def _window(text: str) -> tuple[int | None, int | None]:
    left, colon, right = text.partition(":")
    sides = [int(side) if side else None for side in (left, right if colon else left)]
    return sides[0], sides[1]


def _one_of(*names: str) -> Any:
    def check(text: str) -> str:
        if text not in names:
            raise ValueError(f"it is one of {', '.join(names)}")
        return text

    return check


_VALUES: dict[str, Any] = {
    **dict.fromkeys(("seqlen_k", "heads_kv", "head_dim_v"), int),
    **dict.fromkeys(("scale", "softcap", "dropout"), float),
    "window": _window,
    "layout": _one_of("bshd", "bhsd"),
    "backend": _one_of("auto", "cuda", "cpu"),
    "arch": _one_of(*plan.SHARED_BYTES),
}
