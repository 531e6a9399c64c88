"""The command line: `anyattn demo`, `info`, `compile`, `bench` and `tune`. Nothing else in the package prints."""

from __future__ import annotations

import argparse
import errno
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import anyattn
from anyattn import explanation, launch, plan
from anyattn.compile import CompileError, Cubin, Spec, cache_dir, cubin, nvrtc_version, serialised
from anyattn.plan import UnsupportedError
from anyattn.problem import DTYPES, MAX_HEAD_DIM

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")

T = TypeVar("T")

# Bytes a thread, stores and loads: a few loop-invariant addresses. More would be accumulators. Which kernels have any
# differs from one NVRTC to the next, and the tiles without were measured to be slower.
SPILL_LIMIT = 64


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="anyattn", description="Exact attention for every array library.")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("demo", help="run every array library found, and check it against the reference")
    command.set_defaults(run=lambda options: demo())

    command = commands.add_parser("info", help="versions, GPUs, cache folder; with --call, which kernels a call takes")
    command.add_argument("--json", action="store_true", help="for programs")
    command.add_argument("--call", metavar="B,S,H,D,...", help="the kernels that a call takes, and why; see below")
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.epilog = f"CALL is {explanation.SYNTAX}"
    command.set_defaults(run=lambda options: info(options.json, options.call))

    command = commands.add_parser("compile", help="build the default kernels into the cache; needs no GPU")
    command.add_argument(
        "--arch",
        type=_architectures,
        default=ARCHITECTURES,
        metavar="ARCH,...",
        help=f"architectures (default: {','.join(ARCHITECTURES)})",
    )
    command.add_argument(
        "--report", type=Path, metavar="FILE.json", help="write what the table shows, and the warnings"
    )
    command.set_defaults(run=lambda options: compile_kernels(options.arch, options.report))

    both: dict[str, Any] = {
        "type": _names("forward", "backward"),
        "default": ["forward", "backward"],
        "metavar": "NAME,...",
    }

    command = commands.add_parser(
        "bench",
        help="time and error beside every rival found on this machine",
        description="Times anyattn beside PyTorch's attentions, FlashAttention-2, 3 and 4 and xFormers where they are "
        "installed, the plain formula, and two approximations of it, Reformer and Performer. Prints a table; writes "
        "JSON and a chart. About two minutes.",
    )
    command.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU, if there is one")
    command.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    command.add_argument("--directions", **both, help="default: forward,backward")
    masks = _names("full", "causal")
    command.add_argument(
        "--masks", type=masks, default=["full", "causal"], metavar="NAME,...", help="default: full,causal"
    )
    command.add_argument("--head-dims", type=_head_dims, metavar="N,...", help="default: 64,128 on a GPU, else 64")
    command.add_argument("--seqlens", type=_numbers, metavar="N,...", help="default: 512,2048,8192; 512,1024,2048")
    command.add_argument("--tokens", type=_positive, metavar="N", help="in all sequences; default: 16384; 2048")
    command.add_argument("--hidden", type=_positive, metavar="N", help="heads x head dim; default: 2048; 256")
    command.add_argument("--rivals", type=lambda text: text.split(","), metavar="NAME,...", help="only these")
    command.add_argument("--rounds", type=_positive, default=3, metavar="N", help="default: 3")
    command.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="of the JSON file and the chart")
    command.set_defaults(run=bench)

    command = commands.add_parser(
        "tune",
        help="measure tiles on this GPU, and write a table for $ANYATTN_TILES",
        description="Measures the tiles in use and their neighbours, on calls of 16k tokens and hidden size 2048. What "
        "spills registers, or gives another result, is refused. A tile that is 2% faster goes into the table.",
    )
    command.add_argument("--directions", **both, help="default: forward,backward")
    command.add_argument(
        "--dtypes", type=_names(*DTYPES), default=["bfloat16"], metavar="NAME,...", help="default: bfloat16"
    )
    command.add_argument(
        "--head-dims", type=_head_dims, default=[64, 128, 256], metavar="N,...", help="default: 64,128,256"
    )
    command.add_argument("--rounds", type=_positive, default=5, metavar="N", help="default: 5")
    command.add_argument("--out", type=Path, metavar="FILE.yaml", help="default: tiles-ARCH.yaml")
    command.add_argument("--dry-run", action="store_true", help="compile the candidates and list them; measure nothing")
    command.add_argument("--arch", choices=plan.SHARED_BYTES, help="with --dry-run, which then needs no GPU")
    command.set_defaults(run=tune)

    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to flush at exit
        return 1
    except (CompileError, UnsupportedError, OSError) as error:
        print(f"anyattn: {error}", file=sys.stderr)
        return 1
    return status


# ---------------------------------------------------------------------------------------------------------------- info


def info(as_json: bool = False, call: str | None = None) -> int:
    """Prints what a bug report needs, or which kernels a call takes. Returns 2 for what is no call."""
    if call is not None:
        try:
            explained = explanation.explain(*explanation.parse(call))
        except (TypeError, ValueError) as error:
            print(f"anyattn: {error}", file=sys.stderr)
            return 2
        print(json.dumps(asdict(explained), indent=2) if as_json else explained)
        return 0
    facts = gather()
    if as_json:
        print(json.dumps(facts, indent=2))
        return 0
    rows = [("anyattn", facts["anyattn"]), ("Python", facts["python"]), ("platform", facts["platform"])]
    rows += [(name, version or "not installed") for name, version in facts["packages"].items()]
    rows += [("NVRTC", facts["nvrtc"] or "not found"), ("CUDA driver", facts["driver"] or "not found")]
    rows += [(f"GPU {i}", "{name}, {arch}, {memory_gib} GiB".format(**gpu)) for i, gpu in enumerate(facts["gpus"])]
    rows += [("GPU path", facts["gpu_problem"] or "works")]
    rows += [("kernel cache", "{folder} ({kernels} kernels, {mib} MiB)".format(**facts["cache"]))]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return 0


def gather() -> dict[str, Any]:
    """The facts of `info`: versions (None = absent), GPUs, why the GPU path doesn't work (None = it does), cache."""
    try:
        nvrtc = "{}.{}".format(*nvrtc_version())
    except CompileError:
        nvrtc = None
    driver, gpus = _gpus()
    kernels = [path.stat().st_size for path in cache_dir().glob("*.cubin")]
    return {
        "anyattn": anyattn.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(*found) for name, found in PACKAGES.items()},
        "nvrtc": nvrtc,
        "driver": driver,
        "gpus": gpus,
        "gpu_problem": launch.available(),
        "cache": {"folder": str(cache_dir()), "kernels": len(kernels), "mib": round(sum(kernels) / 2**20, 1)},
    }


PACKAGES = {
    "NumPy": ["numpy"],
    "CuPy": ["cupy-cuda13x", "cupy-cuda12x", "cupy"],
    "PyTorch": ["torch"],
    "JAX": ["jax"],
    "cuda-core": ["cuda-core"],
    "cuda-bindings": ["cuda-bindings"],
    "ml_dtypes": ["ml_dtypes"],
}


def _version(*distributions: str) -> str | None:
    """The version of the first of these that is installed, without importing it."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _gpus() -> tuple[str | None, list[dict[str, Any]]]:
    """The driver's CUDA version and its GPUs, through CuPy; (None, []) when there is no CuPy or no driver."""
    try:
        from cupy.cuda import runtime

        driver = runtime.driverGetVersion()
        count = runtime.getDeviceCount()
    except Exception:  # CuPy's own class needs a CuPy that imports, and any failure means the same here
        return None, []
    properties = [runtime.getDeviceProperties(i) for i in range(count)]
    return f"{driver // 1000}.{driver % 1000 // 10}", [
        {
            "name": p["name"].decode(),
            "arch": f"sm_{p['major']}{p['minor']}",
            "memory_gib": round(p["totalGlobalMem"] / 2**30),
        }
        for p in properties
    ]


# ------------------------------------------------------------------------------------------------------------- compile


def compile_kernels(architectures: Sequence[str], report: Path | None = None) -> int:
    """Builds every default kernel.

    Returns 1 if one does not compile, spills much, serialises its products, or can't be kept in the cache.
    """
    if report:
        _prepare_file(report)
    nvrtc = "{}.{}".format(*nvrtc_version())
    specs = [spec for arch in architectures for spec in plan.default_specs(arch)]
    built = _in_threads([partial(_build, spec) for spec in specs], "compiling")
    rows = [row for spec, found in zip(specs, built, strict=True) for row in _kernel_rows(spec, found)]
    columns = ["kernel", "arch", "registers", "spill bytes", "shared bytes", "warnings", "seconds", "constants"]
    _print_table(columns, [[_cell(row[column.replace(" ", "_")]) for column in columns] for row in rows])
    faulty = [row for row in rows if row["faults"]]
    for row in faulty:
        print(f"\n{row['kernel']} {row['arch']} ({_cell(row['constants'])}): " + "\n  ".join(row["faults"]))
    print(f"\n{len(rows)} kernels, {len(faulty)} faulty, in {cache_dir()}")
    lost = [found for found in built if isinstance(found, Cubin) and Path(found.path).parent != cache_dir()]
    if lost:
        print(f"anyattn: {len(lost)} of them were not kept: that folder is not writable", file=sys.stderr)

    if report:
        facts = {"anyattn": anyattn.__version__, "nvrtc": nvrtc, "kernels": rows}
        report.write_text(json.dumps(facts, indent=1) + "\n")
    return 1 if faulty or lost else 0


def _build(spec: Spec) -> Cubin | CompileError:
    try:
        return cubin(spec)
    except CompileError as error:
        return error


def _kernel_rows(spec: Spec, built: Cubin | CompileError) -> Iterator[dict[str, Any]]:
    """A row for each kernel of a file, or one that says why the file could not be compiled."""
    row: dict[str, Any] = {"kernel": spec.source, "arch": spec.arch, "constants": dict(spec.constants)}
    if isinstance(built, CompileError):
        numbers = dict.fromkeys(("registers", "spill_bytes", "shared_bytes", "seconds"))
        yield {**row, **numbers, "warnings": [], "faults": [str(built)]}
        return
    for kernel in built.resources():
        warnings = [w for w in built.warnings() if "function '" not in w or f"'{kernel.kernel}'" in w]
        spills = [f"spills {kernel.spill_bytes} bytes"] if kernel.spill_bytes > SPILL_LIMIT else []
        yield {
            **row,
            "kernel": kernel.kernel,
            "registers": kernel.registers,
            "spill_bytes": kernel.spill_bytes,
            # What the kernel declares and what the launch adds, which the specification knows.
            "shared_bytes": kernel.shared_bytes + int(dict(spec.constants).get("SHARED_BYTES", 0)),
            "warnings": warnings,
            "seconds": round(built.seconds, 2) or None,  # None: it was in the cache
            "faults": spills + serialised(warnings),
        }


def _architectures(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in plan.SHARED_BYTES:
            raise argparse.ArgumentTypeError(f"{name!r} is not among {', '.join(plan.SHARED_BYTES)}")
    return names


# ---------------------------------------------------------------------------------------------------------------- demo


def demo() -> int:
    """Forward and backward on each library found, checked and timed. Returns 1 if an error is too large."""
    from anyattn import demo

    subjects, hints = demo.find_subjects()
    rows = []
    failures = 0
    for subject in subjects:
        for result in demo.measure(subject):
            failures += not result.good
            rows.append(
                [
                    subject.library,
                    subject.device,
                    subject.dtype,
                    "x".join(map(str, subject.shape)),
                    result.direction,
                    f"{result.error:.1e}" + ("" if result.good else " TOO LARGE"),
                    f"{result.seconds * 1e3:.3g} ms",
                    f"{result.flops / result.seconds / 1e12:.3g}",
                ]
            )
    _print_table(["library", "device", "dtype", "shape (BxSxHxD)", "pass", "error", "time", "TFLOP/s"], rows)
    print("\nCausal attention. Errors are against the float64 reference, relative to its largest entry.")
    if hints:
        print("\nTo get more:", *hints, sep="\n  ")
    return 1 if failures else 0


# --------------------------------------------------------------------------------------------------------------- bench


def bench(options: argparse.Namespace) -> int:
    """Times anyattn and its rivals; prints a table, writes JSON and a chart. Returns 1 if ours failed or is wrong."""
    try:
        import torch
    except ImportError:
        print(
            "anyattn: bench compares with PyTorch and what builds on it: pip install 'anyattn[torch]'", file=sys.stderr
        )
        return 1
    from anyattn.bench import chart, suite, timing

    gpu = torch.cuda.is_available() and launch.available() is None
    device = options.device or ("cuda" if gpu else "cpu")
    if device == "cuda" and not gpu:
        reason = launch.available() or "this PyTorch is not built for CUDA"
        print(f"anyattn: --device cuda: {reason}", file=sys.stderr)
        return 1
    usual = suite.USUAL[device]
    dtype = options.dtype or usual.dtype
    cells = [
        suite.Cell(head_dim, mask == "causal", seqlen, options.tokens or usual.tokens, options.hidden or usual.hidden)
        for head_dim in options.head_dims or usual.head_dims
        for mask in options.masks
        for seqlen in options.seqlens or usual.seqlens
    ]
    names = [suite.OURS, *options.rivals] if options.rivals else None
    known = {name for direction in options.directions for name in suite.contenders(device, direction)}
    if unknown := set(names or ()) - known:
        print(f"anyattn: no {', '.join(sorted(unknown))} here; there are {', '.join(sorted(known))}", file=sys.stderr)
        return 2

    options.out.mkdir(parents=True, exist_ok=True)
    measured = suite.measure(cells, options.directions, names, dtype, device, options.rounds)
    done = list(_progress(measured, len(cells) * len(options.directions), f"{dtype} on {device}"))
    result: dict[str, Any] = {"benchmark": "bench", "device": device, "dtype": dtype}
    result |= {"meta": timing.metadata(device == "cuda"), "cells": done, "summary": suite.summary(done)}
    _print_bench(result)
    path = timing.save(options.out, f"bench-{dtype}", result)
    print(f"\n{path}")
    try:
        chart.draw(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".png"))
        print(path.with_suffix(".png"))
    except ImportError:
        print("no chart: pip install 'anyattn[bench]'")
    return 0 if suite.ours_is_right(done, dtype) else 1


def _print_bench(result: dict[str, Any]) -> None:
    cells, summary = result["cells"], result["summary"]
    rows = []
    for cell in cells:
        shape = "x".join(str(cell[name]) for name in ("batch", "seqlen", "heads", "head_dim"))
        times = [f"{cell['ms'][name].median:.3g}" if name in cell["ms"] else "-" for name in summary]
        rows.append([cell["direction"], shape, "causal" if cell["causal"] else "full", *times])
    print("Milliseconds of one call, the median:\n")
    _print_table(["pass", "shape (BxSxHxD)", "mask", *summary], rows)
    print("\nGeometric means; errors are relative (2-norm), against the formulas in float64, the largest seen:\n")
    rows = [
        [name, direction, str(part["cells"])]
        + [
            "-" if part[key] is None or part[key] != part[key] else f"{part[key]:.3g}"
            for key in ("time_over_ours", "tflops")
        ]
        + ["not checked" if part["error"] is None else f"{part['error']:.1e}"]
        for name, parts in summary.items()
        for direction, part in parts.items()
    ]
    _print_table(["", "pass", "cells", "time over ours", "TFLOP/s", "error"], rows)
    failures = {f"{name}: {reason}" for cell in cells for name, reason in cell["failed"].items()}
    if failures:
        print("\nNot measured:", *sorted(failures), sep="\n  ")


# ---------------------------------------------------------------------------------------------------------------- tune


def tune(options: argparse.Namespace) -> int:
    """Measures the tiles near those in use, and writes a table with the best. Returns 1 where there is no GPU."""
    from anyattn.bench import timing
    from anyattn.bench import tune as tuning

    if options.arch and not options.dry_run:
        print("anyattn: --arch needs --dry-run: tiles are measured on the GPU that is here", file=sys.stderr)
        return 2
    if not options.arch and (reason := launch.available()):
        print(f"anyattn: tune needs a GPU: {reason}", file=sys.stderr)
        return 1
    if "bfloat16" in options.dtypes and not options.dry_run and not importlib.util.find_spec("ml_dtypes"):
        print("anyattn: bfloat16 arrays of CuPy need ml_dtypes: pip install 'anyattn[bench]'", file=sys.stderr)
        return 1
    device = plan.Device(options.arch, plan.SHARED_BYTES[options.arch]) if options.arch else launch.device(0)
    table = plan._tiles()
    cells = [
        tuning.Cell(direction, dtype, head_dim)
        for direction in options.directions
        for dtype in options.dtypes
        for head_dim in options.head_dims
    ]
    if options.out:
        _prepare_file(options.out)
    trials = [trial for cell in cells if (trial := tuning.prepare(table, cell, device))]
    faults = _in_threads([partial(tuning.fault, chosen) for trial in trials for chosen in trial.plans], "compiling")
    found = iter(faults)
    of_each = [[next(found) for _ in trial.tiles] for trial in trials]
    if options.dry_run:
        for trial, reasons in zip(trials, of_each, strict=True):
            print(f"\n{trial.kernel} {trial.cell.dtype} {trial.cell.head_dim}")
            rows = [[tuning.name(tile), reason or "ok"] for tile, reason in zip(trial.tiles, reasons, strict=True)]
            _print_table(["tile (the first is in use)", "verdict"], rows)
        return 0

    measure = partial(tuning.measure, rounds=options.rounds)
    pairs = _progress(zip(trials, of_each, strict=True), len(trials), "measuring")
    choices = [tuning.choose(table, trial, reasons, measure) for trial, reasons in pairs]
    rows = []
    for choice in choices:
        cell, (before, best) = choice.cell, (tuning.name(choice.before), tuning.name(choice.tile))
        times = [choice.milliseconds.get(tile) for tile in (before, best)]
        figures = ["-" if ms is None else f"{ms:.3f}" for ms in times]
        tried = f"{len(choice.milliseconds)}, {len(choice.refused)} refused"
        changed = best if best != before else "the one in use"
        rows.append([choice.kernel, cell.dtype, str(cell.head_dim), *figures, tried, changed])
    _print_table(["kernel", "dtype", "head dim", "ms in use", "ms best", "measured", "best tile"], rows)

    meta = timing.metadata()
    versions = meta["versions"].get("anyattn", anyattn.__version__)
    comment = f"Measured by anyattn tune on {meta.get('device')}, driver {meta.get('driver')}, {meta['time'][:10]}, "
    comment += f"anyattn {versions}. Use it: ANYATTN_TILES=THIS_FILE"
    path = options.out or Path(f"tiles-{device.arch}.yaml")
    path.write_text(tuning.dump(tuning.tuned(table, choices, device.arch), comment), encoding="utf-8")
    print(f"\n{path}: use it with ANYATTN_TILES={path.resolve()}")
    return 0


def _prepare_file(path: Path) -> None:
    """Make the folder of a file that will be written after minutes of work; raise OSError now if it can't be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


def _names(*known: str) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} not among {', '.join(known)}")
        return names

    return parse


def _numbers(text: str) -> list[int]:
    return [_positive(number) for number in text.split(",")]


def _positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _head_dims(text: str) -> list[int]:
    found = _numbers(text)
    if max(found) > MAX_HEAD_DIM:
        raise argparse.ArgumentTypeError(f"head dims go to {MAX_HEAD_DIM}, got {text}")
    return found


# -------------------------------------------------------------------------------------------------------------- output


def _in_threads(tasks: Sequence[Callable[[], T]], title: str) -> list[T]:
    """What the tasks return, behind a progress bar. The compiler runs outside of Python's lock."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        futures = [pool.submit(task) for task in tasks]
        for _ in _progress(as_completed(futures), len(futures), title):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    return [future.result() for future in futures]


def _progress(items: Iterable[Any], total: int, title: str) -> Iterator[Any]:
    """Passes the items on behind a progress bar on the error stream: rich's where it is installed."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        for count, item in enumerate(items, 1):
            filled = 40 * count // total
            end = "\n" if count == total else ""
            print(
                f"\r{title} [{'#' * filled}{'.' * (40 - filled)}] {count}/{total}", end=end, file=sys.stderr, flush=True
            )
            yield item
    else:
        yield from track(items, title, total, console=Console(stderr=True))


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in [columns, ["-" * width for width in widths], *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={item}" for name, item in value.items() if item is not False)
    if isinstance(value, list):
        return str(len(value))
    return "-" if value is None else str(value)
