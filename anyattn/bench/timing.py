"""Interleaved timing, facts about the machine, result files."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

PACKAGES = (
    *("anyattn", "numpy", "torch", "cupy-cuda12x", "cupy-cuda13x", "jax", "cuda-core", "cuda-bindings"),
    *("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12", "flash-attn", "fa3-fwd", "flash-attn-4", "xformers"),
)

# GPU cycles, a millisecond or two: the host gets this far ahead, so that no event waits for it.
HEAD_START = 3_000_000

PAUSE = 0.05  # seconds; the threads of OpenMP spin on their cores for a while after a call on the CPU
SLOW = 100.0  # milliseconds of a call on the CPU that cold caches don't make longer


@dataclass(frozen=True)
class Timing:
    """Time of one call in milliseconds: the median, least and greatest of `calls` calls."""

    median: float
    low: float
    high: float
    calls: int


def on_torch_stream(call: Callable[[], object], calls: int) -> list[float]:
    """Milliseconds of each call on PyTorch's current CUDA stream."""
    import torch

    cuda: Any = torch.cuda  # has no types
    events = [cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    cuda._sleep(HEAD_START)
    for event in events[:-1]:
        event.record()
        call()
    events[-1].record()
    cuda.synchronize()
    return [float(start.elapsed_time(end)) for start, end in itertools.pairwise(events)]


def on_cupy_stream(call: Callable[[], object], calls: int) -> list[float]:
    """Milliseconds of each call on CuPy's current stream; the first must keep the GPU busy while others are queued."""
    import cupy

    events = [cupy.cuda.Event() for _ in range(calls + 1)]
    for event in events[:-1]:
        event.record()
        call()
    events[-1].record()
    events[-1].synchronize()
    return [float(cupy.cuda.get_elapsed_time(start, end)) for start, end in itertools.pairwise(events)]


def on_host(call: Callable[[], object], calls: int) -> list[float]:
    """Milliseconds of each call that is done when it returns, after one that warms the caches, if they matter."""
    time.sleep(PAUSE)
    start = time.perf_counter()
    call()
    seconds = [start, time.perf_counter()]
    if (seconds[1] - start) * 1e3 < SLOW:
        del seconds[0]
    while len(seconds) <= calls:
        call()
        seconds.append(time.perf_counter())
    return [(end - start) * 1e3 for start, end in itertools.pairwise(seconds)]


def interleaved(
    contenders: Mapping[str, Any],
    rounds: int = 7,
    slice_ms: float = 20.0,
    timer: Callable[[Any, int], list[float]] = on_torch_stream,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time each contender.

    After a warm-up every contender has a slice of about `slice_ms` in each round, and each round begins with another
    one, so that clocks and temperature treat them alike. `timer(contender, calls)` makes so many calls and gives the
    milliseconds of each.

    Returns:
        the timings, and for the contenders that raised, why.
    """
    calls: dict[str, int] = {}
    failed: dict[str, str] = {}
    samples: dict[str, list[float]] = {}

    def attempt(name: str, calls: int) -> list[float]:
        try:
            return timer(contenders[name], calls)
        except Exception as error:  # a rival may refuse a problem with any class of error, and memory may run out
            failed[name] = (str(error) or repr(error)).splitlines()[0]
            return []

    for name in contenders:
        attempt(name, 1)  # compiles, tunes, allocates
        if name not in failed and (taken := attempt(name, 1)):
            calls[name] = min(max(round(slice_ms / max(taken[0], 1e-3)), 1), 20)
            samples[name] = []
    order = list(calls)
    for _ in range(rounds):
        for name in order:
            if name not in failed:
                samples[name] += attempt(name, calls[name])
        order = order[1:] + order[:1]
    good = {name: ms for name, ms in samples.items() if name not in failed}
    return {name: Timing(statistics.median(ms), min(ms), max(ms), len(ms)) for name, ms in good.items()}, failed


def pause(seconds: float = 0.3) -> None:
    """Let the card cool down between cells: under a constant load it throttles by 5 to 10%."""
    time.sleep(seconds)


def geometric_mean(values: Iterable[float]) -> float:
    """NaN when there are none."""
    logs = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logs)) if logs else math.nan


# ------------------------------------------------------------------------------------------------- machine and results


def metadata(gpu: bool = True) -> dict[str, Any]:
    """The machine, without its GPU if that had no part in it, the versions and the commit that a result belongs to."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "cpu": _cpu(),
        **(_gpu(versions) if gpu else {}),
        "versions": versions,
    }


def _cpu() -> str:
    """The processor's name, as Linux tells it; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _gpu(versions: dict[str, str]) -> dict[str, Any]:
    """The current GPU, if CuPy sees one; adds CUDA's and cuDNN's versions to `versions`, if PyTorch is loaded."""
    try:
        from cupy.cuda import runtime

        properties = runtime.getDeviceProperties(runtime.getDevice())
    except Exception:  # CuPy's own class needs a CuPy that imports, and any failure means the same here
        return {}
    if torch := sys.modules.get("torch"):
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return {
        "device": properties["name"].decode(),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "multiprocessors": properties["multiProcessorCount"],
        "memory_gib": round(properties["totalGlobalMem"] / 2**30, 1),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "power_limit": _output("nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader"),
    }


def _commit() -> str | None:
    """$GIT_COMMIT (for a copy without .git), else git's HEAD, with "+" where tracked files differ from it.

    None for an installed package.
    """
    if given := os.environ.get("GIT_COMMIT"):
        return given
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    head = _output("git", "-C", str(root), "rev-parse", "HEAD")
    dirty = head and _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f"{head}+" if dirty else head


def _output(*command: str) -> str | None:
    """The first line a program prints; None when it is missing, fails or is silent."""
    try:
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return lines[0].strip() if lines else None


def save(folder: Path, name: str, result: Mapping[str, Any]) -> Path:
    """Write DEVICE-name.json, with dataclasses as objects; return its path."""
    device = str(result["meta"].get("device", "cpu")).lower().removeprefix("nvidia ")
    path = folder / f"{re.sub('[^a-z0-9]+', '-', device)}-{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, default=asdict) + "\n", encoding="utf-8")
    return path
