"""The fuzzer finds nothing in a short run, finds what is planted, and draws from the whole contract."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from anyattn import cpu
from anyattn.problem import MAX_HEAD_DIM, BackwardProblem, Problem
from tests import fuzz
from tests.cases import CASES, DTYPES, STRIDES, Case, errors, expected, plain, tolerances


def draws(count: int, backend: str = "cpu", libraries: tuple[str, ...] = ("numpy", "torch")) -> list[fuzz.Trial]:
    return list(itertools.islice(fuzz.draw(0, backend, libraries), count))


def test_a_short_run(capfd: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--seconds", "10", "--backend", "cpu", "--seed", "0"]) == 0, capfd.readouterr().out
    cases = re.match(r"(\d+) cases on cpu .* 0 refused, 0 failed", capfd.readouterr().out)
    assert cases
    assert int(cases[1]) > 0


@pytest.mark.gpu
def test_a_short_run_on_a_gpu(capfd: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--seconds", "10", "--backend", "cuda", "--seed", "0"]) == 0, capfd.readouterr().out
    cases = re.match(r"(\d+) cases on cuda .* 0 refused, 0 failed", capfd.readouterr().out)
    assert cases
    assert int(cases[1]) > 0


# --- planted faults --------------------------------------------------------------------------------------------------


def forgets_the_last_row(problem: Problem, *arrays: Any, **rest: Any) -> None:
    cpu_forward(problem, *arrays, **rest)
    if problem.right == 0 and problem.seqlen_q % 2:
        arrays[3][..., -1:, :] = 0


def leaves_nan(problem: Problem, *arrays: Any, **rest: Any) -> None:
    cpu_forward(problem, *arrays, **rest)
    if problem.softcap and problem.layout == "bhsd":
        out = arrays[3]
        out[..., :1] = np.nan if out.dtype.kind == "f" else 0xFFFF  # bfloat16 comes as its bits


def takes_another_head(bp: BackwardProblem, *arrays: Any, **rest: Any) -> None:
    cpu_backward(bp, *arrays, **rest)
    if bp.problem.heads_kv > 1 and not bp.problem.varlen:
        dk = arrays[-2]
        dk[:, 0] = dk[:, 1]


cpu_forward, cpu_backward = cpu.forward, cpu.backward


@pytest.mark.parametrize(
    ("where", "fault"),
    [("forward", forgets_the_last_row), ("forward", leaves_nan), ("backward", takes_another_head)],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_planted_fault_is_found_and_reproduced(
    where: str, fault: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fuzz, "MOST_FAILURES", 1)
    with monkeypatch.context() as planted:
        planted.setattr(cpu, where, fault)
        assert fuzz.main(["--seconds", "60", "--backend", "cpu", "--library", "numpy"]) == 1
        failure, line, *_, summary = capfd.readouterr().out.splitlines()
        assert failure.startswith("FAILED: AssertionError: ")
        assert summary.endswith(" 1 failed")
        python, m, module, *arguments = shlex.split(line)
        assert (python, m, module) == ("python", "-m", "tests.fuzz")
        assert fuzz.main(arguments) == 1
        assert capfd.readouterr().out.startswith(f"{failure}\n{line}\n")
    assert fuzz.main(arguments) == 0


def test_an_exception_is_a_failure(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(cpu, "backward", fails)
    monkeypatch.setattr(fuzz, "MOST_FAILURES", 3)
    assert fuzz.main(["--library", "numpy"]) == 1
    out = capfd.readouterr().out
    assert out.count("FAILED: RuntimeError: planted\n    python -m tests.fuzz ") == 3


def test_gradients_that_differ_from_run_to_run_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = itertools.count()

    def wavers(bp: BackwardProblem, *arrays: Any, **rest: Any) -> None:
        cpu_backward(bp, *arrays, **rest)
        if next(runs):
            dv = arrays[-1]
            dv[...] = np.nextafter(dv, dv + 1)

    monkeypatch.setattr(cpu, "backward", wavers)
    trial = fuzz.Trial(Case("small", seqlen_q=9, seqlen_k=9), "float32", deterministic=True)
    with pytest.raises(AssertionError, match="dv differs from run to run"):
        fuzz.run(trial)


def test_the_margin_is_never_less_than_the_rule() -> None:
    """Dropout takes the only key that these rows see, in 16 other draws; in this one it leaves it."""
    case = Case("alone", batch=1, heads_kv=1, seqlen_q=187, seqlen_k=1, head_dim=143, head_dim_v=148, window=0)
    case = replace(case, alibi="h", dropout=0.92, layout="bhsd", ndim=3)
    trial = fuzz.Trial(case, "bfloat16", seed=980032028)
    inputs = trial.inputs()
    results = plain(case, inputs)
    assert errors(results, expected(case, inputs))["dq"] > 0
    assert fuzz.judge(trial, inputs, results, margin=1.0)
    bound = tolerances(case, "bfloat16", inputs, expected(case, inputs))["lse"]
    assert not fuzz.judge(trial, inputs, replace(results, lse=results.lse + 1.1 * bound), margin=2.0)
    with pytest.raises(AssertionError, match="lse is off by"):
        fuzz.judge(trial, inputs, replace(results, lse=results.lse + 10 * bound), margin=2.0)


def test_the_command() -> None:
    command = [sys.executable, *shlex.split(str(draws(1)[0]))[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("1 cases on cpu (")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--library", "numpy,lists"], "lists not found for cpu; there are numpy"),
        (["--case", "print('x')"], "invalid read value"),
        (["--case", "Case('x', heads=__import__('os'))"], "invalid read value"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fuzz.main(arguments)
    assert message in capsys.readouterr().err


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_cases_are_read_as_they_are_written() -> None:
    for case in [*CASES, *(trial.case for trial in draws(300))]:
        assert fuzz.read(fuzz.written(case)) == case


def test_draws_repeat() -> None:
    assert draws(50) == draws(50)


def test_kernels_are_few_on_a_gpu() -> None:
    """Most neighbours share what their kernels are compiled for."""
    trials = draws(320, "cuda", ("launch", "numpy"))
    assert {trial.library for trial in trials} == {"launch", "numpy"}
    features = [(t.dtype, t.case.head_dim, t.case.head_dim_v, t.case.dropout, t.strides) for t in trials]
    assert len(set(features)) <= 320 // fuzz.CALLS_PER_KERNEL


def test_the_whole_contract_is_drawn() -> None:
    trials = draws(3000)
    cases = [trial.case for trial in trials]
    dense = [case for case in cases if not case.varlen]
    packed = [case for case in cases if case.lengths is not None]
    assert {trial.dtype for trial in trials} == set(DTYPES)
    assert {trial.library for trial in trials} == {"numpy", "torch"}
    assert {(case.ndim, case.layout) for case in dense} >= {
        (n, layout) for n in (2, 3, 4) for layout in ("bshd", "bhsd")
    }
    assert {case.strides for case in cases} == set(STRIDES)
    assert {name for trial in trials for name in trial.strides} == {*STRIDES} - {"broadcast"}
    for lengths in ({case.seqlen_q for case in dense}, {case.seqlen_k for case in dense}):
        assert lengths >= {0, 1, 2, 63, 64, 65, 127, 128, 129}
    for dims in ({case.head_dim for case in cases}, {case.head_dim_v for case in cases}):
        assert {1, 64, 128, MAX_HEAD_DIM} <= dims <= set(range(1, MAX_HEAD_DIM + 1))
        assert len(dims) > 100
    assert {len(case.lengths or ()) for case in packed} == {0, 1, 2, 3, 5}
    assert any((0, n) in (case.lengths or ()) for case in packed for n in range(1, 300))
    features: dict[str, Callable[[fuzz.Trial], bool]] = {
        "grouped heads": lambda t: 1 < t.case.heads_kv < t.case.heads,
        "one K/V head": lambda t: 1 == t.case.heads_kv < t.case.heads,
        "no heads": lambda t: t.case.heads == 0,
        "no batch": lambda t: t.case.batch == 0,
        "causal": lambda t: t.case.causal and t.case.seqlen_q != t.case.seqlen_k,
        "one bound": lambda t: isinstance(t.case.window, int),
        "open on the left": lambda t: isinstance(t.case.window, tuple) and t.case.window[0] in (None, -1),
        "causal window": lambda t: t.case.causal and t.case.window is not None,
        "negative scale": lambda t: (t.case.scale or 0) < 0,
        "scale 0": lambda t: t.case.scale == 0,
        "large scale": lambda t: abs(t.case.scale or 0) >= 3,
        "softcap": lambda t: t.case.softcap is not None,
        "ALiBi": lambda t: t.case.alibi == "h",
        "ALiBi for each batch": lambda t: t.case.alibi == "bh",
        "dropout": lambda t: t.case.dropout > 0,
        "deterministic": lambda t: t.deterministic,
        "without LSE": lambda t: t.without_lse,
        "max_seqlen above the longest": lambda t: t.case.varlen and t.longer > 0,
    }
    rare = {"no heads", "no batch"}
    for feature, drawn in features.items():
        assert sum(map(drawn, trials)) >= (10 if feature in rare else 100), feature
