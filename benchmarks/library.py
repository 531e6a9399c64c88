"""All that is measured of anyattn beside the grid: other dtypes, host time, memory, errors, first call, import, wheel.

    python -m benchmarks.library                         every row; needs a CUDA GPU, PyTorch and CuPy
    python -m benchmarks.library --only import,wheel     some; these two need no GPU

Every row has a limit, which README.md beside this file explains.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anyattn.bench import timing
from benchmarks import chart, common

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One figure of ours, what it stands beside, and the limit it has to keep."""

    group: str
    what: str
    unit: str
    ours: float
    rivals: dict[str, float]
    limit: float
    more: bool  # ours has to be at least `limit`; else at most

    @property
    def met(self) -> bool:
        return self.ours >= self.limit if self.more else self.ours <= self.limit

    def __str__(self) -> str:
        beside = ", ".join(f"{name} {figure:.4g}" for name, figure in self.rivals.items())
        limit = f"{'>=' if self.more else '<='} {self.limit:.4g}"
        verdict = "met" if self.met else "MISSED"
        return f"{self.group:<8}{self.what:<34}{self.ours:>10.4g} {self.unit:<9}{limit:<14}{verdict:<8}{beside}"


# --- on the GPU, through PyTorch -------------------------------------------------------------------------------------


def _random(shape: tuple[int, ...], dtype: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and dout."""
    import torch

    torch.manual_seed(seed)
    q, k, v, dout = (torch.randn(shape, device="cuda", dtype=getattr(torch, dtype)) for _ in range(4))
    return q, k, v, dout


def wide(dtype: str, seqlen: int, rival: str, factor: float) -> Iterator[Row]:
    """TFLOP/s (16k tokens, hidden 2048) against a rival's; in float32 the errors, too.

    The forward pass at head dims 64 and 128 against `factor` times the rival's, all else against once that.
    """
    from anyattn.bench import rivals, suite

    for head_dim in (64, 128, 256):
        for causal in (False, True):
            cell = suite.Cell(head_dim, causal, seqlen)
            arrays = q, k, v, _ = _random(cell.shape, dtype)
            attentions = {"anyattn": rivals.ours(), rival: rivals.sdpa(rival)}
            shape = f"d{head_dim} {'causal' if causal else 'full'} S{seqlen}"
            for direction, limit in (("forward", factor if head_dim <= 128 else 1.0), ("backward", 1.0)):
                calls = suite.calls(direction, attentions, arrays, causal)
                timings, failed = timing.interleaved(calls)
                if failed:
                    raise SystemExit(f"{dtype} d{head_dim}: {failed}")
                tflops = {name: cell.flop(direction) / taken.median / 1e9 for name, taken in timings.items()}
                mine, theirs = tflops["anyattn"], tflops[rival]
                yield Row(dtype, f"{direction} {shape}", "TFLOP/s", mine, {rival: theirs}, limit * theirs, more=True)
                timing.pause()
            del calls  # and what the rival keeps for its backward pass
            if dtype == "float64":  # no reference is more exact
                continue
            q, k, v = q[:1], k[:1], v[:1]
            exact = rivals.exact(q, k, v, None, causal)["out"]
            mine, theirs = (
                rivals.relative_error(attention(q, k, v, causal), exact) for attention in attentions.values()
            )
            yield Row(dtype, f"forward {shape} error", "relative", mine, {rival: theirs}, theirs, more=False)


SAME = 1.001  # both round at the same places; what is left is the order of the sums


def errors() -> Iterator[Row]:
    """Errors against float64 of 16-bit forward and gradients, each at the shape where we do worst beside FLASH."""
    from anyattn.bench import rivals

    attentions = {"anyattn": rivals.ours(), "FLASH": rivals.sdpa("FLASH")}
    for dtype in ("float16", "bfloat16"):
        rows: dict[str, list[Row]] = {"out": [], "dq": [], "dk": [], "dv": []}
        for head_dim in (64, 128, 256):
            for causal in (False, True):
                seen: dict[tuple[str, str], list[float]] = {}
                for seed in range(3):
                    q, k, v, dout = _random((2, 2048, 8, head_dim), dtype, seed)
                    exact = rivals.exact(q, k, v, dout, causal)
                    for name, attention in attentions.items():
                        actual = {"out": attention(q, k, v, causal)}
                        gradients = rivals.backward_of(attention, q, k, v, dout, causal)()
                        actual |= zip(("dq", "dk", "dv"), gradients, strict=True)
                        for tensor, values in actual.items():
                            seen.setdefault((tensor, name), []).append(rivals.relative_error(values, exact[tensor]))
                for tensor, found in rows.items():
                    mine, flash = (statistics.fmean(seen[tensor, name]) for name in attentions)
                    what = f"{dtype} {tensor} (d{head_dim} {'causal' if causal else 'full'})"
                    found.append(Row("error", what, "relative", mine, {"FLASH": flash}, SAME * flash, more=False))
        for found in rows.values():
            yield max(found, key=lambda row: row.ours / row.limit)


def memory() -> Iterator[Row]:
    """Peak memory of one call beyond what is allocated before it: B1 H16 S8k D128 bfloat16."""
    import torch

    from anyattn.bench import rivals

    shape = batch, seqlen, heads, _ = 1, 8192, 16, 128
    q, k, v, dout = _random(shape, "bfloat16")
    attentions = {"anyattn": rivals.ours(), **{name: rivals.sdpa(name) for name in ("FLASH", "CUDNN", "EFFICIENT")}}
    mib = {n: _peak(partial(attention, q, k, v, False)) for n, attention in attentions.items()}
    necessary = (q.nbytes + 4 * batch * heads * seqlen) / 2**20  # out and the LSE
    mine = mib.pop("anyattn")
    yield Row("memory", "forward (limit: out + LSE)", "MiB", mine, mib, necessary, more=False)
    mib = {}
    for name, attention in attentions.items():
        mib[name] = _peak(rivals.backward_of(attention, q, k, v, dout, False))
        torch.cuda.empty_cache()
    mine = mib.pop("anyattn")
    yield Row("memory", "backward (limit: CUDNN)", "MiB", mine, mib, mib["CUDNN"], more=False)


def _peak(call: Callable[[], object]) -> float:
    """MiB, of PyTorch's allocator and of CuPy's pool."""
    import cupy
    import torch

    call()  # what a first call builds stays
    gc.collect()
    torch.cuda.synchronize()
    pool = cupy.get_default_memory_pool()
    before, pooled = torch.cuda.memory_allocated(), pool.total_bytes()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before + pool.total_bytes() - pooled
    del result
    return float(peak) / 2**20


def host() -> Iterator[Row]:
    """Host time of one small call (B1 S64 H4 D64 bfloat16, no gradient), which the GPU outruns.

    PyTorch's call takes the transposes from and to the same (batch, sequence, heads, head dim) along; "FLASH bhsd" is
    without them, of tensors that lie as PyTorch wants them.
    """
    import cupy
    import ml_dtypes
    import torch
    from torch.nn.attention import sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    import anyattn
    from anyattn.bench import rivals

    q, k, v, _ = _random((1, 64, 4, 64), "bfloat16")
    transposed = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    rng = np.random.default_rng(0)
    arrays = [cupy.asarray(rng.standard_normal(q.shape).astype(ml_dtypes.bfloat16)) for _ in range(3)]
    names = ("FLASH", "CUDNN", "EFFICIENT")
    calls: dict[str, Callable[[], object]] = {
        "CuPy in": partial(anyattn.attention, *arrays),
        "PyTorch in": partial(anyattn.attention, q, k, v),
        **dict.fromkeys(names, partial(rivals.plain_sdpa, q, k, v, False)),
        "FLASH bhsd": partial(scaled_dot_product_attention, *transposed),
    }
    backends = {name: partial(sdpa_kernel, rivals.SDPA[name.split()[0]]) for name in (*names, "FLASH bhsd")}
    us = _host_times(calls, backends, torch.cuda.synchronize)
    beside = {name: us[name] for name in backends}
    for what in ("CuPy in", "PyTorch in"):
        yield Row("host", f"{what} (limit: FLASH / 2)", "us", us[what], beside, us["FLASH"] / 2, more=False)


def _host_times(
    calls: Mapping[str, Callable[[], object]],
    contexts: Mapping[str, Callable[[], AbstractContextManager[object]]],
    synchronize: Callable[[], None],
) -> dict[str, float]:
    """Microseconds. The contenders take turns, since hosts have fast and slow seconds.

    A batch is shorter than the launch queue, so no call of it waits for the GPU.
    """
    size, rounds = 100, 50
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            with contexts.get(name, nullcontext)():
                call()
                synchronize()
                start = time.perf_counter()
                for _ in range(size):
                    call()
                samples[name].append((time.perf_counter() - start) / size)
                synchronize()
    return {name: statistics.median(seconds) * 1e6 for name, seconds in samples.items()}


# --- in processes of their own ---------------------------------------------------------------------------------------

_FIRST_CALL = {
    "CuPy": """
import cupy, ml_dtypes, numpy as np
synchronize = cupy.cuda.runtime.deviceSynchronize
rng = np.random.default_rng(0)
q, k, v = (cupy.asarray(rng.standard_normal((1, 1024, 8, 64)).astype(ml_dtypes.bfloat16)) for _ in range(3))
""",
    "PyTorch": """
import torch
synchronize = torch.cuda.synchronize
q, k, v = (torch.randn(1, 1024, 8, 64).to("cuda", torch.bfloat16) for _ in range(3))
""",
}
_FIRST_CALL["CuPy imported, PyTorch"] = "import cupy" + _FIRST_CALL["PyTorch"]  # else the call imports it
_TIME_IT = """
import anyattn, time
synchronize()
start = time.perf_counter()
anyattn.attention(q, k, v, causal=True)
synchronize()
print(time.perf_counter() - start)
"""


def first() -> Iterator[Row]:
    """The first call of a process (bfloat16, after the import), with an empty kernel cache and with a filled one."""
    for library, setup in _FIRST_CALL.items():
        seconds: dict[str, list[float]] = {"empty": [], "filled": []}
        for _ in range(3):
            with tempfile.TemporaryDirectory() as cache:
                for state in ("empty", "filled"):
                    seconds[state].append(_in_process(setup + _TIME_IT, ANYATTN_CACHE=cache))
        for state, limit in (("empty", 2.0), ("filled", 0.1)):
            what = f"{library} in, {state} cache"
            yield Row("first", what, "s", statistics.median(seconds[state]), {}, limit, more=False)


def imports() -> Iterator[Row]:
    """`import anyattn` after `import numpy`."""
    program = "import numpy, time; start = time.perf_counter(); import anyattn; print(time.perf_counter() - start)"
    seconds = statistics.median(_in_process(program) for _ in range(7))
    yield Row("import", "anyattn, beyond NumPy", "s", seconds, {}, 0.15, more=False)


def _in_process(program: str, **environment: str) -> float:
    command = [sys.executable, "-c", program]
    environment = {**os.environ, **environment}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode
    done = subprocess.run(command, cwd=common.ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout)


def wheel() -> Iterator[Row]:
    """The size of the wheel, built with the setuptools that is installed."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")  # an earlier build's leavings would go into the wheel
        shutil.copytree(common.ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info"))
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder]
        subprocess.run([*command, str(source)], check=True)
        [built] = Path(folder).glob("*.whl")
        yield Row("wheel", built.name, "MB", built.stat().st_size / 1e6, {}, 1.0, more=False)


GROUPS: dict[str, Callable[[], Iterator[Row]]] = {
    "fp32": partial(wide, "float32", 4096, "EFFICIENT", 1.2),
    "fp64": partial(wide, "float64", 2048, "MATH", 2.5),
    "host": host,
    "memory": memory,
    "errors": errors,
    "first": first,
    "import": imports,
    "wheel": wheel,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"some of: {','.join(GROUPS)}")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the JSON file and the chart")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",") if arguments.only else list(GROUPS)
    if unknown := set(chosen) - set(GROUPS):
        raise SystemExit(f"no such rows: {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")

    result: dict[str, Any] = {"benchmark": "library", "meta": timing.metadata(), "rows": []}
    for group in chosen:
        for row in GROUPS[group]():
            print(row, flush=True)
            result["rows"].append({**asdict(row), "met": row.met})
    path = timing.save(arguments.out, "library" if not arguments.only else f"library-{'-'.join(chosen)}", result)
    print(path, chart.draw(path), sep="\n")


if __name__ == "__main__":
    main()
