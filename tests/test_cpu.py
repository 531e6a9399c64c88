"""The tiled NumPy implementation against the reference: the whole table, every dtype."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import tracemalloc
import types
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import anyattn
from anyattn import cpu, reference
from anyattn import problem as problems
from anyattn.problem import BackwardProblem, Options, Problem, View
from tests import cases
from tests.cases import CASES, DTYPES, STRIDES, Array, Case, Inputs, Results


def view(x: Array) -> View:
    """What an adapter passes to the core."""
    strides = tuple(step // x.itemsize for step in x.strides)
    return View(x.__array_interface__["data"][0], x.shape, strides, x.dtype.name, -1)


def canonical(x: Array, layout: str, varlen: bool) -> Array:
    """The (batch, heads, seqlen, dim) or (heads, total, dim) view that `cpu` takes, bfloat16 as bit patterns."""
    if x.dtype == DTYPES["bfloat16"]:
        x = x.view(np.uint16)
    if varlen:
        return x.swapaxes(0, 1)
    if x.ndim == 2:
        return x[None, None]
    x = x if x.ndim == 4 else x[None]
    return x.swapaxes(1, 2) if layout == "bshd" else x


def validated(case: Case, inputs: Inputs) -> Problem:
    options = Options(**{name: inputs.options[name] for name in Options._fields if name in inputs.options})
    slopes = inputs.options.get("alibi_slopes")
    alibi = None if slopes is None else view(slopes)
    if not case.varlen:
        return problems.dense(view(inputs.q), view(inputs.k), view(inputs.v), alibi, options)
    assert inputs.cu_seqlens_q is not None
    assert inputs.cu_seqlens_k is not None
    assert inputs.max_seqlen_q is not None
    assert inputs.max_seqlen_k is not None
    return problems.varlen(
        view(inputs.q),
        view(inputs.k),
        view(inputs.v),
        view(inputs.cu_seqlens_q),
        view(inputs.cu_seqlens_k),
        inputs.max_seqlen_q,
        inputs.max_seqlen_k,
        alibi,
        options,
    )


def run(case: Case, inputs: Inputs, gradients: bool = True) -> Results:
    """Call `cpu` as an adapter does, on outputs full of NaN."""
    problem = validated(case, inputs)
    dtype = inputs.q.dtype

    def nans(shape: tuple[int, ...], dtype: Any = dtype) -> Array:
        return np.full(shape, np.nan, dtype)

    def turned(x: Array) -> Array:
        return canonical(x, case.layout, case.varlen)

    out, lse = nans(problem.out_shape), nans(problem.lse_shape, problem.lse_dtype)
    lse_view = lse if case.varlen else lse.reshape(problem.batch, problem.heads, problem.seqlen_q)
    rest: dict[str, Any] = {
        "alibi": inputs.options.get("alibi_slopes"),
        "cu_seqlens_q": inputs.cu_seqlens_q,
        "cu_seqlens_k": inputs.cu_seqlens_k,
        "seed": inputs.options["seed"] or 0,
    }
    q, k, v = (turned(x) for x in (inputs.q, inputs.k, inputs.v))
    cpu.forward(problem, q, k, v, turned(out), lse_view, **rest)
    if not gradients:
        return Results(out, lse)
    bp: BackwardProblem = problems.backward(problem, view(inputs.dout), view(out), view(lse))
    dq, dk, dv = (nans(shape) for shape in (bp.dq_shape, bp.dk_shape, bp.dv_shape))
    grads = (turned(x) for x in (dq, dk, dv))
    cpu.backward(bp, turned(inputs.dout), q, k, v, turned(out), lse_view, *grads, **rest)
    return Results(out, lse, dq, dk, dv)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_table(case: Case, dtype: str) -> None:
    inputs = cases.make(case, dtype, np.random.default_rng(zlib.crc32(case.name.encode())))
    cases.check(case, dtype, inputs, run(case, inputs))


# --- what the table does not show -------------------------------------------------------------------------------------


def random_inputs(case: Case, dtype: str = "float32") -> Inputs:
    return cases.make(case, dtype, np.random.default_rng(7))


@pytest.mark.parametrize("threads", ["1", "2", "5"])
@pytest.mark.parametrize("name", ["decode", "rows_that_see_nothing", "varlen_uneven", "v_narrower", "dropout_most"])
def test_any_number_of_threads(name: str, threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYATTN_THREADS", threads)
    monkeypatch.setattr(cpu, "_SMALL", 0)  # threads even where they don't pay
    case, dtype = cases.BY_NAME[name], "bfloat16"
    inputs = random_inputs(case, dtype)
    first = run(case, inputs)
    cases.check(case, dtype, inputs, first)
    for field, again in vars(run(case, inputs)).items():
        np.testing.assert_array_equal(again.view(np.uint8), getattr(first, field).view(np.uint8), err_msg=field)


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "3,2"}, 3),
        ({"OMP_NUM_THREADS": "3", "ANYATTN_THREADS": "7"}, 7),
        ({"OMP_NUM_THREADS": "many", "ANYATTN_THREADS": ""}, len(os.sched_getaffinity(0))),
    ],
)
def test_thread_count(variables: dict[str, str], threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANYATTN_THREADS", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    case = Case("large", seqlen_q=512, seqlen_k=512)
    assert cpu._thread_count(validated(case, random_inputs(case))) == threads
    case = Case("small", seqlen_q=16, seqlen_k=16)
    assert cpu._thread_count(validated(case, random_inputs(case))) == 1


@pytest.mark.parametrize("threads", ["many", "0", "-3", "1.5"])
def test_no_number_of_threads(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYATTN_THREADS", threads)
    case = Case("small", seqlen_q=16, seqlen_k=16)
    with pytest.raises(ValueError, match=f"ANYATTN_THREADS must be a number of threads from 1 on, got '{threads}'"):
        run(case, random_inputs(case))


def test_blas_gets_its_threads_back() -> None:
    blas = cpu._openblas()
    if blas is None:
        pytest.skip("NumPy does not use OpenBLAS here")
    before = blas.get_threads()
    case = Case("large", seqlen_q=300, seqlen_k=300)
    inputs = random_inputs(case)
    with ThreadPoolExecutor(4) as pool:  # calls at the same time, from several threads
        for results in pool.map(lambda _: run(case, inputs), range(8)):
            cases.check(case, "float32", inputs, results)
    assert blas.get_threads() == before


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("score", [-1000.0, -23.0, -22.0, 22.0, 23.0, 1000.0])
@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_scores_at_the_end_of_the_range_of_exp(dtype: str, score: float, size: float) -> None:
    """log(2**32) is 22.2: below, nothing is subtracted from a score; far beyond, something must be."""
    rng = np.random.default_rng(0)
    v = (size * rng.standard_normal((300, 8))).astype(dtype)
    q, k = np.ones((5, 1), dtype), np.full((300, 1), score, dtype)
    out, lse = anyattn.attention(q, k, v, scale=1.0, backend="cpu", return_lse=True)
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(axis=0, dtype=np.float64), out.shape), rtol=1e-5)
    np.testing.assert_allclose(lse, score + np.log(300), rtol=1e-6)


@pytest.mark.parametrize("own", [10, 1e2, 1e3, 1e4])
def test_own_key_far_below_the_others(own: float) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((rows, 64)).astype(np.float32) for rows in (1, 500, 500))
    k[-1] = -own * q[0]
    exact, exact_lse = reference.attention(q, k, v)
    out, lse = anyattn.attention(q, k, v, backend="cpu", return_lse=True)
    assert np.linalg.norm(out - exact) < 1e-6 * np.linalg.norm(exact)
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("factor", "own"), [(1.0, -np.inf), (1e20, -1e20)])
@pytest.mark.parametrize("causal", [False, True])
def test_own_key_of_minus_infinity(dtype: str, factor: float, own: float, causal: bool) -> None:
    """As K has it, or as float32 makes it of finite numbers."""
    q = np.full((3, 1), factor, dtype)
    k, v = np.array([[-800 / factor], [-801 / factor], [own]], dtype), np.array([[1], [2], [3]], dtype)
    with np.errstate(all="ignore"):
        exact, exact_lse = reference.attention(q, k, v, scale=1.0, causal=causal)
    out, lse = anyattn.attention(q, k, v, scale=1.0, causal=causal, backend="cpu", return_lse=True)
    np.testing.assert_allclose(out, exact, rtol=1e-5)
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-5)


def test_gradients_of_few_rows_need_one_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many threads there are."""
    monkeypatch.setenv("ANYATTN_THREADS", "16")
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((rows, 1, 64)).astype(np.float32) for rows in (8, 50_000, 50_000, 8))
    out, lse = anyattn.attention(q, k, v, backend="cpu", return_lse=True)
    tracemalloc.start()
    gradients = anyattn.attention_backward(dout, q, k, v, out, lse, backend="cpu")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * sum(x.nbytes for x in gradients)


def test_a_call_that_fails_waits_for_its_threads() -> None:
    """They write to its results."""
    done = threading.Event()

    def task(_: Any) -> None:
        name = threading.current_thread().name
        time.sleep(0.05)  # until all three have begun
        if name.endswith("_0"):  # the helper that is asked first
            raise MemoryError
        if name.endswith("_1"):
            time.sleep(0.2)
            done.set()

    cpu._pool.cache_clear()
    job: Any = types.SimpleNamespace(threads=3, compute=np.dtype(np.float32))
    with pytest.raises(MemoryError):
        cpu._run([task] * 3, job)
    assert done.is_set()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_gets_threads_of_its_own() -> None:
    script = """
import os
import numpy as np
from tests.test_cpu import Case, random_inputs, run
case = Case("large", seqlen_q=512, seqlen_k=512)
inputs = random_inputs(case)
out = run(case, inputs).out
child = os.fork()
if not child:
    os._exit(0 if np.array_equal(run(case, inputs).out, out) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    root = Path(__file__).parents[1]
    environment = os.environ | {"ANYATTN_THREADS": "2", "PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", script], env=environment, cwd=root, check=True, timeout=60)


def test_a_call_at_the_interpreters_end() -> None:
    """There are no new threads then."""
    script = """
import atexit
import numpy as np
from tests.test_cpu import Case, random_inputs, run
case = Case("large", seqlen_q=512, seqlen_k=512)
inputs = random_inputs(case)
out = run(case, inputs).out
def last():
    assert np.array_equal(run(case, inputs).out, out)
    print("right")
atexit.register(last)
"""
    root = Path(__file__).parents[1]
    environment = os.environ | {"ANYATTN_THREADS": "2", "PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, cwd=root, check=True, timeout=60, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("right\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_forked_beside_a_call_has_its_blas_threads() -> None:
    script = """
import os, threading
from anyattn import cpu
from tests.test_cpu import Case, random_inputs, run
inputs = random_inputs(case := Case("small"))
blas = cpu._openblas()
before, inside, leave = blas.get_threads(), threading.Event(), threading.Event()
def call():
    with cpu._one_blas_thread():
        inside.set()
        leave.wait()
thread = threading.Thread(target=call)
thread.start()
inside.wait()
child = os.fork()
if not child:
    run(case, inputs)
    os._exit(0 if (blas.get_threads(), cpu._blas_users) == (before, 0) else 1)
status = os.waitpid(child, 0)[1]
leave.set()
thread.join()
raise SystemExit(os.waitstatus_to_exitcode(status) or blas.get_threads() != before)
"""
    root = Path(__file__).parents[1]
    environment = os.environ | {"ANYATTN_THREADS": "2", "PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", script], env=environment, cwd=root, check=True, timeout=60)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "heads", "heads_kv"),
    [("float32", 64, 8, 8), ("bfloat16", 128, 4, 1), ("float64", 256, 1, 1)],
)
def test_memory_is_linear(
    dtype: str, head_dim: int, heads: int, heads_kv: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 16k rows and keys, less than 64 MiB a thread beyond the results; the scores of one head would take 1 GiB."""
    threads = 2
    monkeypatch.setenv("ANYATTN_THREADS", str(threads))
    seqlen = 16384
    case = Case("long", 1, heads, heads_kv, seqlen, seqlen, head_dim, head_dim, window=(300, 200))
    inputs = random_inputs(case, dtype)
    tracemalloc.start()
    results = run(case, inputs)
    peak = tracemalloc.get_traced_memory()[1] - sum(x.nbytes for x in vars(results).values())
    tracemalloc.stop()
    assert peak < threads * 64 * 2**20


@pytest.mark.parametrize("strides", ["contiguous", "every_other"])
def test_memory_of_the_forward_pass_alone(strides: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same limit, where rows are widest; no product reads every other column as it is."""
    threads = 2
    monkeypatch.setenv("ANYATTN_THREADS", str(threads))
    q, k, v = (STRIDES[strides](np.zeros((16384, 2, 256))) for _ in range(3))
    tracemalloc.start()
    out, lse = anyattn.attention(q, k, v, window=(300, 200), backend="cpu", return_lse=True)
    peak = tracemalloc.get_traced_memory()[1] - out.nbytes - lse.nbytes
    tracemalloc.stop()
    assert peak < threads * 64 * 2**20


def test_scratch_stays_from_call_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tile takes; not what a long sequence takes."""
    monkeypatch.setenv("ANYATTN_THREADS", "1")
    rng = np.random.default_rng(0)
    short, long = (rng.standard_normal((rows, 8, 64)).astype(np.float32) for rows in (512, 16384))
    window = {"window": 64, "backend": "cpu"}
    anyattn.attention(short, short, short, **window)
    tracemalloc.start()
    out = anyattn.attention(short, short, short, **window)
    assert tracemalloc.get_traced_memory()[1] < out.nbytes + 2**19
    out = anyattn.attention(long, long, long, **window)
    assert tracemalloc.get_traced_memory()[0] < out.nbytes + 2**22
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["long", "narrow", "grouped"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_hidden_values_do_not_leak(name: str, value: float) -> None:
    """A NaN or an infinity in q, k, v or dout reaches what sees it, and nothing else."""
    shape: dict[str, Any] = {"batch": 1, "head_dim": 16, "head_dim_v": 8, "heads": 1, "heads_kv": 1}
    case = {
        "long": Case(name, **shape, seqlen_q=300, seqlen_k=400, causal=True, window=(150, -1)),
        "narrow": Case(name, **shape, seqlen_q=130, seqlen_k=130, window=(3, 2)),
        "grouped": Case(name, **(shape | {"heads": 3}), seqlen_q=40, seqlen_k=60, window=(9, 4), softcap=3.0),
    }[name]
    rng = np.random.default_rng(0)
    clean = random_inputs(case)
    problem = validated(case, clean)
    position = np.arange(case.seqlen_q)[:, None] + case.seqlen_k - case.seqlen_q
    key = np.arange(case.seqlen_k)[None, :]
    sees = (key >= position - problem.left) & (key <= position + problem.right)
    before = run(case, clean)
    for field, spot in [("q", 20), ("dout", 30), ("k", case.seqlen_k - 25), ("v", case.seqlen_k - 3), ("k", 0)]:
        poisoned = replace(clean, **{field: getattr(clean, field).copy()})
        getattr(poisoned, field)[0, spot, 0, rng.integers(8)] = value
        after = run(case, poisoned)
        rows = sees[:, spot] if field in ("k", "v") else np.arange(case.seqlen_q) == spot  # rows that read it
        for result, reached in [
            ("out", rows if field != "dout" else rows & False),
            ("dq", rows),
            ("dk", sees[rows].any(axis=0)),
            ("dv", sees[rows].any(axis=0)),
        ]:
            actual = getattr(after, result)[:, ~reached]
            np.testing.assert_allclose(actual, getattr(before, result)[:, ~reached], rtol=1e-4, atol=1e-6)
        if field in ("k", "v") and np.isnan(value):
            assert np.isnan(after.out[:, rows]).any(axis=(-1, -2)).all()


@pytest.mark.parametrize("size", [30.0, 300.0])
def test_scores_far_beyond_the_range_of_exp(size: float) -> None:
    """Later tiles raise the maximum over and over."""
    case = Case("rising", batch=1, seqlen_q=200, seqlen_k=2000, heads=1, heads_kv=1, causal=True)
    inputs = random_inputs(case)
    ramp = np.linspace(-size, size, case.seqlen_k, dtype=np.float32)[None, :, None, None]
    direction = np.ones(case.head_dim, np.float32)
    for ascending in (ramp, -ramp):
        q = inputs.q * np.float32(0.1) + direction
        k = inputs.k * np.float32(0.1) + ascending * direction
        rising = replace(inputs, q=q, k=k)
        # dq is a difference of large equal terms here, as good as the agreement of the products in both directions.
        cases.check(case, "float32", rising, replace(run(case, rising), dq=None))


def test_rounding_to_bfloat16_and_back() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -0.0, 3.4e38, np.inf, -np.inf, np.nan, 1e-40, 65504.0], np.float32)
    bits = np.empty(values.shape, np.uint16)
    cpu.narrow(values, bits)
    np.testing.assert_array_equal(bits, values.astype(DTYPES["bfloat16"]).view(np.uint16))
    cpu.narrow(np.array([0x7FFFFFFF], np.uint32).view(np.float32), bits[:1])
    assert np.isnan(bits[:1].view(DTYPES["bfloat16"])).all()
    every = np.arange(2**16, dtype=np.uint16)
    wide = np.empty(every.shape, np.float32)
    cpu.widen(every, wide)
    np.testing.assert_array_equal(wide, every.view(DTYPES["bfloat16"]).astype(np.float32))
