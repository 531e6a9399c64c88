"""Random problems over the whole public contract, forward and backward, against the float64 reference.

    python -m tests.fuzz --seconds 60 --backend cpu --seed 0

Each failure prints a line that runs the same problem again; any failure makes the exit status 1. With `--backend cuda`
half of the problems go straight through `anyattn.launch` on guarded memory (tests/device.py), the others through the
public API with each array library found here.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import itertools
import multiprocessing
import os
import random
import shlex
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

import anyattn
from anyattn import compile as compiler
from anyattn import launch
from anyattn.plan import UnsupportedError
from anyattn.problem import MAX_HEAD_DIM
from tests.cases import (
    DTYPES,
    STRIDES,
    Array,
    Case,
    Inputs,
    Results,
    check,
    errors,
    expected,
    make,
    storage,
    tolerances,
)
from tests.device import Call, Job, arrays, cupy

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take three quarters of the memory

WORK = 6_000_000  # the most multiplications of one product: the reference takes the time
MARGIN = 2.0  # times what the rule allows: among thousands of cases some are unlucky, and a wrong one is wrong by more
CALLS_PER_KERNEL = 16  # on a GPU, where a kernel takes seconds to compile
AHEAD = 4 * CALLS_PER_KERNEL  # problems whose kernels are being compiled before their turn
MOST_FAILURES = 20


# --- one problem -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial(Job):
    """A case and all else that determines a run."""

    backend: str = "cpu"
    library: str = "numpy"  # a key of LIBRARIES, or "launch"
    seed: int = 0  # of the inputs
    strides: tuple[str, ...] = ()  # a key of STRIDES for each of q, k, v and dout, or none: as the case says
    longer: int = 0  # what max_seqlen_* exceed the longest sequence by
    without_lse: bool = False  # call attention without return_lse, and attention_vjp for the gradients

    def inputs(self) -> Inputs:
        inputs = make(self.case, self.dtype, np.random.default_rng(self.seed))
        names = ("q", "k", "v", "dout")
        moved: dict[str, Any] = {
            name: STRIDES[strides](getattr(inputs, name)) for name, strides in zip(names, self.strides, strict=False)
        }
        inputs = replace(inputs, **moved)
        if self.case.varlen:
            longest = (inputs.max_seqlen_q or 0) + self.longer, (inputs.max_seqlen_k or 0) + self.longer
            inputs = replace(inputs, max_seqlen_q=longest[0], max_seqlen_k=longest[1])
        return inputs

    def __str__(self) -> str:
        """The command line that runs it."""
        line = ["python", "-m", "tests.fuzz", "--backend", self.backend, "--library", self.library]
        line += ["--case", written(self.case), "--dtype", self.dtype, "--seed", str(self.seed)]
        if self.strides:
            line += ["--strides", ",".join(self.strides)]
        if self.longer:
            line += ["--longer", str(self.longer)]
        line += ["--deterministic"] * self.deterministic + ["--without-lse"] * self.without_lse
        return shlex.join(line)


def written(case: Case) -> str:
    """`Case(...)` without the defaults."""
    given = {field.name: getattr(case, field.name) for field in fields(case)}
    defaults = {field.name: field.default for field in fields(case) if field.default is not MISSING}
    return f"Case({', '.join(f'{k}={x!r}' for k, x in given.items() if k not in defaults or x != defaults[k])})"


def read(text: str) -> Case:
    """The inverse of `written`."""
    call = ast.parse(text, mode="eval").body
    if not isinstance(call, ast.Call) or ast.unparse(call.func) != "Case":
        raise ValueError(f"not a Case(...): {text}")
    values = {keyword.arg or "": ast.literal_eval(keyword.value) for keyword in call.keywords}
    return Case(*map(ast.literal_eval, call.args), **values)


# --- drawing ---------------------------------------------------------------------------------------------------------


def _head_dim(rng: random.Random) -> int:
    usual = rng.choice((1, 8, 16, 32, 40, 64, 80, 96, 128, 160, 192, 256))
    return rng.choice((usual, rng.randint(1, MAX_HEAD_DIM), int(2 ** rng.uniform(0, 6))))


def _length(rng: random.Random) -> int:
    near_a_tile = max(0, rng.choice((16, 32, 64, 64, 128, 128, 192, 256)) + rng.randint(-2, 2))
    return rng.choice((near_a_tile, near_a_tile, int(2 ** rng.uniform(0, 8.3)), rng.choice((0, 1, 1, 2, 3))))


def _many(rng: random.Random) -> int:
    """Keys that thread blocks share, where there are few rows."""
    return int(2 ** rng.uniform(10, 12.5))


def _window(rng: random.Random, seqlen: int) -> int | tuple[int | None, int | None] | None:
    def bound() -> int | None:
        return rng.choice((None, -1, 0, 1, rng.randint(0, seqlen), rng.randint(0, seqlen), 10 * seqlen))

    both = bound()
    return rng.choice((None, both, (both, bound()), (bound(), bound())))


def _strides(rng: random.Random) -> tuple[str, tuple[str, ...]]:
    """What the case says, and how each array lies in memory, if they differ."""
    names = list(STRIDES)
    if rng.random() < 0.5:
        return rng.choice(names), ()
    names.remove("broadcast")  # it makes values equal, so it is the case's to say
    return "contiguous", tuple(rng.choices(names, k=4))


def kernels(rng: random.Random) -> Iterator[Trial]:
    """Trials of one row and one key that differ in what the kernels are compiled for."""
    while True:
        head_dim = _head_dim(rng)
        strides, each = _strides(rng)
        case = Case(
            "fuzz",
            head_dim=head_dim,
            head_dim_v=head_dim if rng.random() < 0.5 else _head_dim(rng),
            scale=rng.choice((None, None, rng.choice((1, 1, -1)) * rng.choice((0.0, 0.02, 0.1, 0.3, 1.0, 3.0)))),
            softcap=rng.choice((None, None, round(2 ** rng.uniform(-1, 6), 2))),
            alibi=rng.choice(("", "", "h", "bh")),
            dropout=rng.choice((0.0, 0.0, round(rng.uniform(0.01, 0.95), 2))),
            strides=strides,
            lengths=() if rng.random() < 0.3 else None,
        )
        yield Trial(case, rng.choice([*DTYPES]), deterministic=rng.random() < 0.3, strides=each)


def calls(rng: random.Random, kernel: Trial) -> Iterator[Trial]:
    """Trials that differ from `kernel` in all the rest."""
    case = kernel.case
    while True:
        work = WORK * 2 ** rng.uniform(-9, 0)
        heads_kv = rng.choice((1, 1, 2, 3))
        case = replace(
            case,
            heads=heads_kv * rng.choice((1, 1, 1, 2, 3, 8)) if rng.random() < 0.98 else 0,
            heads_kv=heads_kv,
            causal=rng.random() < 0.5,
        )
        if case.varlen:
            lengths = tuple(
                (_length(rng), rng.choice((_length, _length, _many))(rng)) for _ in range(rng.choice((0, 1, 2, 3, 5)))
            )
            case = replace(case, lengths=lengths)
        else:
            batch, ndim = rng.choice((1, 1, 2, 3) if rng.random() < 0.98 else (0,)), rng.choice((4, 4, 3, 2))
            case = replace(case, batch=batch, ndim=ndim, layout=rng.choice(("bshd", "bhsd")))
            if ndim < 4:
                case = replace(case, batch=1)
            if ndim < 3:
                case = replace(case, heads=1, heads_kv=1)
            seqlen_q = _length(rng)
            seqlen_k = rng.choice((seqlen_q, *(_length(rng) for _ in range(2)), _many(rng)))
            case = replace(case, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
            lengths = ((case.seqlen_q, case.seqlen_k),) * batch
        case = replace(case, window=_window(rng, max((k for _, k in lengths), default=0)))
        columns = max(case.head_dim, case.head_dim_v)
        if sum(q * k for q, k in lengths) * case.heads * columns <= work:
            longer = rng.choice((0, 0, 1, 100)) if case.varlen else 0
            yield replace(
                kernel, case=case, seed=rng.getrandbits(32), longer=longer, without_lse=rng.random() < 0.3
            )  # fmt: skip


def draw(seed: int, backend: str, libraries: Sequence[str]) -> Iterator[Trial]:
    """Endless random trials."""
    rng = random.Random(seed)
    for kernel in kernels(rng):
        for trial in itertools.islice(calls(rng, kernel), CALLS_PER_KERNEL if backend == "cuda" else 1):
            usable = [name for name in libraries if name == "launch" or LIBRARIES[name].takes(trial)]
            if usable:
                library = "launch" if "launch" in usable and rng.random() < 0.5 else rng.choice(usable)
                yield replace(trial, backend=backend, library=library)


# --- running ---------------------------------------------------------------------------------------------------------


class Library(NamedTuple):
    """How arrays get in and out, strides and alignment kept where the library can."""

    put: Callable[[Array, str], Any]  # from a host array and a backend
    get: Callable[[Any], Array]
    takes: Callable[[Trial], bool]  # whether it can express the inputs


def _cupy_put(x: Array, backend: str) -> Any:
    flat, offset, shape, _ = storage(x)
    return cupy.ndarray(
        shape, x.dtype, cupy.asarray(flat.view(np.uint8)).data + offset * x.itemsize, strides=x.strides
    )  # fmt: skip


def _torch_put(x: Array, backend: str) -> Any:
    import torch

    flat, offset, shape, strides = storage(x)
    memory = torch.tensor(flat.view(np.uint8), device=backend).view(getattr(torch, x.dtype.name))
    return memory.as_strided(shape, strides, offset)


def _torch_get(x: Any) -> Array:
    import torch

    bits = x.detach().cpu()
    bits = bits.view(torch.int16) if x.dtype == torch.bfloat16 else bits
    return bits.numpy().view(DTYPES[str(x.dtype).removeprefix("torch.")])  # type: ignore[no-any-return]


def _jax_put(x: Array, backend: str) -> Any:
    import jax

    return jax.device_put(np.array(x), jax.devices(backend)[0])


LIBRARIES = {
    "numpy": Library(lambda x, _: x, lambda x: x, lambda trial: True),
    "cupy": Library(_cupy_put, lambda x: x.get(), lambda trial: True),
    # PyTorch has no negative strides, JAX none at all; without a switch, nor does JAX have float64.
    "torch": Library(_torch_put, _torch_get, lambda trial: "negative" not in (trial.case.strides, *trial.strides)),
    "jax": Library(_jax_put, np.asarray, lambda trial: trial.dtype != "float64"),
}


def found(backend: str) -> list[str]:
    """The libraries that a backend can be reached through here."""
    names = [name for name in LIBRARIES if importlib.util.find_spec(name)]
    if backend == "cpu":
        return [name for name in names if name != "cupy"]
    if "torch" in names:
        import torch

        if not torch.cuda.is_available():
            names.remove("torch")
    if "jax" in names:
        import jax

        try:
            jax.devices("cuda")
        except RuntimeError:
            names.remove("jax")
    return ["launch", *names]


def compute(trial: Trial, inputs: Inputs) -> Results:
    """What the backend makes of the inputs."""
    if trial.library == "launch":
        call = Call(inputs, trial.deterministic)
        call.forward()
        call.backward()
        return call.results()
    put, get, _ = LIBRARIES[trial.library]
    placed = {name: put(x, trial.backend) for name, x in arrays(inputs).items()}
    q, k, v, dout = (placed.pop(name) for name in ("q", "k", "v", "dout"))
    options: dict[str, Any] = {**inputs.options, **placed}
    options |= {"deterministic": trial.deterministic, "backend": trial.backend}
    attention: Callable[..., Any] = anyattn.attention
    if trial.case.varlen:
        options |= {"max_seqlen_q": inputs.max_seqlen_q, "max_seqlen_k": inputs.max_seqlen_k, "layout": "bshd"}
        attention = anyattn.attention_varlen
    gradients: tuple[Any, ...]
    if trial.without_lse:
        out = attention(q, k, v, **options)
        (_, lse), pullback = anyattn.attention_vjp(q, k, v, **options, return_lse=True)
        gradients = pullback(dout)
    elif trial.library == "torch":
        import torch

        q, k, v = (x.requires_grad_() for x in (q, k, v))
        out, lse = attention(q, k, v, **options, return_lse=True)
        gradients = torch.autograd.grad(out, (q, k, v), dout)
    else:
        out, lse = attention(q, k, v, **options, return_lse=True)
        gradients = anyattn.attention_backward(dout, q, k, v, out, lse, **options)
    for name, x in zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True):
        assert (type(x), x.dtype, x.device) == (type(q), q.dtype, q.device), f"{name} is not what q is"
    return Results(*map(get, (out, lse, *gradients)))


def judge(trial: Trial, inputs: Inputs, results: Results, margin: float) -> bool:
    """Whether the results obey the rule; raise AssertionError if they are off by more than `margin` times as much."""
    for name, x in vars(results).items():
        assert not np.isnan(x).any(), f"{name} has NaN"  # also where the yardstick itself overflows
    try:
        check(trial.case, trial.dtype, inputs, results)
    except AssertionError:
        case, dtype, exact = trial.case, trial.dtype, expected(trial.case, inputs)
        found, bounds = errors(results, exact), tolerances(case, dtype, inputs, exact)
        for seed in range(16):
            other = replace(trial, seed=seed).inputs()
            for name, bound in tolerances(case, dtype, other, expected(case, other)).items():
                bounds[name] = max(bounds[name], bound)
        slack = dict.fromkeys(found, 0.0) | {
            name: rounding_of_scores(trial, inputs, name) for name in ("out", "dq", "dk", "dv")
        }
        for name, error in found.items():
            if error > margin * bounds[name] + slack[name]:
                off = f"{name} is off by {error:.3g}, allowed {margin:g} times {bounds[name]:.3g}"
                raise AssertionError(f"{case.name} {dtype}: {off}") from None
        return False
    return True


def rounding_of_scores(trial: Trial, inputs: Inputs, name: str) -> float:
    """What a result may be off because its scores are rounded in another order than the yardstick's.

    Probabilities change by the scores' error, at the most a unit roundoff of |scale| |q| |k|; it matters with large
    scores and few visible keys. (The plain backward pass, moreover, uses the scores of its forward pass.)
    """
    if not inputs.q.size or not inputs.k.size:
        return 0.0
    q, k = (np.linalg.norm(x.astype(np.float64), axis=-1).max() for x in (inputs.q, inputs.k))
    scale = abs(trial.case.scale) if trial.case.scale is not None else trial.case.head_dim**-0.5
    size = float(np.abs(getattr(expected(trial.case, inputs), name)).max(initial=0.0))
    return float(np.finfo("float64" if trial.dtype == "float64" else "float32").epsneg * scale * q * k * size)


def run(trial: Trial, margin: float = MARGIN) -> bool:
    """Whether the results obey the rule; raise whatever is wrong."""
    inputs = trial.inputs()
    results = compute(trial, inputs)
    obeys = judge(trial, inputs, results, margin)
    if trial.deterministic:
        for name, x in vars(compute(trial, inputs)).items():
            assert x.tobytes() == getattr(results, name).tobytes(), f"{name} differs from run to run"
    return obeys


def compiled(trials: Iterator[Trial]) -> Iterator[Trial]:
    """The same trials, while a pool of processes compiles the kernels of those to come."""
    compiling: dict[compiler.Spec, Future[Any]] = {}
    pool = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"))

    def begun(trial: Trial) -> tuple[Trial, list[Future[Any]]]:
        try:
            specs = trial.specs()
        except UnsupportedError:
            specs = []  # the trial itself says so
        for spec in specs:
            if spec not in compiling:
                compiling[spec] = pool.submit(compiler.cubin, spec)
        return trial, [compiling[spec] for spec in specs]

    waiting: deque[tuple[Trial, list[Future[Any]]]] = deque()
    try:
        while True:
            while len(waiting) < AHEAD:
                waiting.append(begun(next(trials)))
            trial, needed = waiting.popleft()
            for future in needed:
                future.exception()  # an error is the trial's to raise
            yield trial
    finally:
        pool.shutdown(cancel_futures=True)


def fuzz(trials: Iterator[Trial], seconds: float, margin: float) -> tuple[Counter[str], Counter[str]]:
    """Run trials for some time, at least one; return how many of each library ran, and how many ended how."""
    ran: Counter[str] = Counter()
    ended: Counter[str] = Counter()
    end = time.monotonic() + seconds
    for trial in trials:
        ran[trial.library] += 1
        try:
            ended["within the rule" if run(trial, margin) else "within the margin"] += 1
        except UnsupportedError as error:
            ended["refused"] += 1
            print(f"refused: {error}\n    {trial}", flush=True)
        except Exception as error:  # whatever is wrong is a finding
            ended["failed"] += 1
            rule = "" if margin == MARGIN else f" --margin {margin:g}"
            print(f"FAILED: {type(error).__name__}: {error}\n    {trial}{rule}", flush=True)
            if ended["failed"] >= MOST_FAILURES or (trial.backend == "cuda" and _lost()):
                print("giving up")
                break
        if time.monotonic() > end:
            break
    return ran, ended


def _lost() -> bool:
    """Whether an error left the GPU unusable to this process."""
    try:
        cupy.cuda.runtime.deviceSynchronize()
    except cupy.cuda.runtime.CUDARuntimeError:
        return True
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--backend", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the problems drawn; with --case of its inputs")
    parser.add_argument("--library", help="comma-separated; default: all that are found")
    parser.add_argument("--margin", type=float, default=MARGIN, help="times what the rule allows is a failure")
    one = parser.add_argument_group("to run one problem")
    one.add_argument("--case", type=read, help="Case(...) of tests/cases.py")
    one.add_argument("--dtype", choices=DTYPES, default="float32")
    one.add_argument("--strides", default="", help="of q,k,v,dout: " + ", ".join(STRIDES))
    one.add_argument("--longer", type=int, default=0, help="what max_seqlen_* exceed the longest sequence by")
    one.add_argument("--deterministic", action="store_true")
    one.add_argument("--without-lse", action="store_true")
    args = parser.parse_args(arguments)

    if args.backend == "cuda" and (reason := launch.available()):
        parser.error(reason)
    here = found(args.backend)
    libraries = args.library.split(",") if args.library else here
    if missing := [name for name in libraries if name not in here]:
        parser.error(f"--library: {', '.join(missing)} not found for {args.backend}; there are {', '.join(here)}")

    if args.case:
        strides = tuple(filter(None, args.strides.split(",")))
        trial = Trial(
            args.case,
            args.dtype,
            args.deterministic,
            backend=args.backend,
            seed=args.seed,
            strides=strides,
            longer=args.longer,
            without_lse=args.without_lse,
        )
        trials = iter([replace(trial, library=name) for name in libraries])
    else:
        trials = draw(args.seed, args.backend, libraries)
        trials = compiled(trials) if args.backend == "cuda" else trials
    start = time.monotonic()
    ran, ended = fuzz(trials, args.seconds, args.margin)
    by_library = ", ".join(f"{name} {n}" for name, n in ran.most_common())
    outcomes = ", ".join(
        f"{ended[name]} {name}" for name in ("within the rule", "within the margin", "refused", "failed")
    )
    took = time.monotonic() - start
    print(f"{sum(ran.values())} cases on {args.backend} ({by_library}) in {took:.0f} s: {outcomes}")
    return 1 if ended["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
