"""`anyattn.explain` and `anyattn info --call`: they tell what a call takes, and what it would raise."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import anyattn
from anyattn import cli, cpu, explanation, host, launch, offload, plan
from anyattn import compile as compiler
from anyattn.compile import CompileError
from anyattn.explanation import Explanation, Pass, parse
from anyattn.plan import Device, UnsupportedError
from anyattn.problem import contiguous_backward

SHAPE = (2, 300, 4, 64)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plans of one test's environment don't outlive it."""
    for name in ("ANYATTN_KERNEL", "ANYATTN_TILES"):
        monkeypatch.delenv(name, raising=False)
    caches = (plan.forward, plan.backward, launch.workspace_bytes)  # some tests replace them
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def explain(call: str) -> Explanation:
    return explanation.explain(*parse(call))


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Device:
    """An Ada GPU, as far as plans are concerned; a forward kernel there is sm80's."""
    ada = Device("sm_89", plan.SHARED_BYTES["sm_89"])
    monkeypatch.setattr(launch, "available", lambda *_: None)
    monkeypatch.setattr(launch, "device", lambda ordinal: ada)
    runtime = SimpleNamespace(getDevice=lambda: 0)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    monkeypatch.setattr(offload, "_free_bytes", lambda: 16 << 30)
    return ada


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a"])
def test_tells_the_plan(arch: str) -> None:
    problem, backend, device = parse(f"{','.join(map(str, SHAPE))},bfloat16,causal,softcap=20,heads_kv=2,arch={arch}")
    assert device is not None
    assert backend == "auto"
    told = explanation.explain(problem, backend, device)
    for part, chosen in (
        (told.forward, plan.forward(problem, device)),
        (told.backward, plan.backward(contiguous_backward(problem), device)),
    ):
        assert part.device == f"cuda:0 ({arch})"
        assert part.error is None
        assert part.workspace_bytes == chosen.workspace_bytes
        assert part.refused == chosen.refused
        assert [used.kernel for used in part.kernels] == [kernel.name for kernel in chosen.kernels]
        for used, kernel in zip(part.kernels, chosen.kernels, strict=True):
            constants = dict(kernel.spec.constants)
            assert (used.grid, used.threads) == (kernel.grid, kernel.threads)
            assert used.tile.items() <= constants.items()
            assert ("SOFTCAP" in used.compiled_in) is constants.get("SOFTCAP", False)
            assert used.shared_bytes >= kernel.shared_bytes
            assert used.registers is not None
            assert 16 <= used.registers <= 255
    assert "BLOCK_N" in told.forward.kernels[0].tile
    assert "HEAD_DIM" not in told.forward.kernels[0].tile


def test_registers_and_spills_are_the_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    log = (
        "Compiling entry function 'other' for\nUsed 1 registers\n"
        "Compiling entry function 'forward_sm80' for\n0 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads\n"
        "Used 77 registers, 1000 bytes smem\n"
    )
    problem, _, device = parse("1,64,1,64,arch=sm_80")
    assert device is not None
    monkeypatch.setattr(compiler, "cubin", lambda spec: compiler.Cubin("", log, 0.0))
    monkeypatch.setattr(plan, "backward", lambda bp, device: plan.Plan((), 0, 0))
    [used] = explanation.explain(problem, "auto", device).forward.kernels
    assert (used.registers, used.spill_bytes) == (77, 16)
    assert used.shared_bytes == plan.forward(problem, device).kernels[0].shared_bytes + 1000


def test_better_kernels_that_do_not_take_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    real = plan.forward

    def refusing(*arguments: Any) -> plan.Plan:
        return real(*arguments)._replace(refused=(("sm99", "they are a test"),))

    monkeypatch.setattr(plan, "forward", refusing)
    told = explain("1,64,1,64,arch=sm_80")
    assert told.forward.refused == (("sm99", "they are a test"),)
    assert "not the sm99 kernels: they are a test" in str(told)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("1,64,1,64,bfloat16,arch=sm_89", "they are for Hopper GPUs (sm_90a), this one is sm_89"),
        ("1,64,1,64,float32,arch=sm_90a", "they take float16 and bfloat16, not float32"),
        ("1,64,1,33,bfloat16,arch=sm_90a", "they need q, k and v at multiples of 16 bytes"),
    ],
)
def test_why_not_the_hopper_kernels(call: str, reason: str) -> None:
    told = explain(call)
    assert told.forward.kernels[0].kernel == "forward_sm80"
    assert f"not the sm90 kernels: {reason}" in str(told)
    taken = explain("1,512,1,64,bfloat16,arch=sm_90a").forward
    assert taken.kernels[0].kernel == "forward_sm90"
    assert taken.refused == ()


def test_a_call_that_no_kernel_takes() -> None:
    told = explain("1,512,2,256,float64,arch=sm_89")
    assert told.forward.error is None
    assert told.backward.error is not None
    assert "float64 with head dim 256 needs" in told.backward.error
    assert told.backward.kernels == ()
    assert f"error: {told.backward.error}" in str(told)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(spec: compiler.Spec) -> compiler.Cubin:
        raise CompileError("NVRTC was not found: install it")

    monkeypatch.setattr(compiler, "cubin", missing)
    part = explain("1,512,2,64,arch=sm_80").forward
    assert part.error == "NVRTC was not found: install it"
    assert [(used.kernel, used.registers, used.spill_bytes) for used in part.kernels] == [("forward_sm80", None, None)]


def test_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert explain("1,64,1,64,arch=sm_80").forward.notes == ()
    monkeypatch.setenv("ANYATTN_KERNEL", "sm80")
    told = explain("1,64,1,33,bfloat16,arch=sm_80")
    assert told.forward.notes[0] == "ANYATTN_KERNEL=sm80"
    assert "copies of 2 bytes" in told.forward.notes[1]
    assert told.forward.notes[1] in str(told)


def test_an_empty_call() -> None:
    told = explain("1,0,2,64,arch=sm_80")
    assert told.forward.kernels == ()
    assert "nothing to compute" in str(told)


# --- in host memory --------------------------------------------------------------------------------------------------


def test_backend_cpu() -> None:
    q = np.ones(SHAPE, np.float32)
    told = anyattn.explain(q, q, q, backend="cpu")
    for part in (told.forward, told.backward):
        assert (part.device, part.why, part.kernels) == ("cpu", "backend='cpu'", ())
    threads = cpu._thread_count(explanation.parse("2,300,4,64,host")[0])
    assert f"anyattn.cpu.forward, in NumPy, threads: {threads}\n" in str(told)
    assert f"anyattn.cpu.backward, in NumPy, threads: {threads}" in str(told)


@pytest.mark.usefixtures("a_gpu")
def test_too_little_work_for_a_gpu() -> None:
    q = np.ones((1, 16, 1, 8), np.float32)
    told = anyattn.explain(q, q, q)
    assert told.forward.device == "cpu"
    assert "too little work: a GPU would take about 0.2 ms" in told.forward.why


def test_large_enough_but_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "available", lambda *_: "there is no GPU in this test")
    part = explain("4,8192,16,64,float32,host").forward
    assert part.device == "cpu"
    assert part.why == "there is enough work for a GPU, but there is no GPU in this test"


@pytest.mark.usefixtures("a_gpu")
def test_over_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, backend, _ = parse("4,8192,16,64,float32,host")
    told = explanation.explain(problem, backend)
    assert told.forward.device == "cuda:0 (sm_89)"
    assert "but enough work: a GPU would take" in told.forward.why
    assert [used.kernel for used in told.forward.kernels] == ["forward_sm80"]
    assert [used.kernel for used in told.backward.kernels] == ["backward_delta", "backward_sm80", "backward_dq"]
    [note] = told.forward.notes
    count = int(note.removeprefix("in ").partition(" parts, copied beside kernels")[0])
    assert count > 1
    rows = told.forward.kernels[0].tile["BLOCK_M"] * told.forward.kernels[0].grid
    assert rows == pytest.approx(4 * 8192 * 16 / count, rel=0.5)

    assert explain("1,8192,16,64,float32,host,backend=cpu").forward.device == "cpu"
    packed = parse("4,8192,16,64,float32,host,varlen")[0]
    assert explanation.explain(packed, "cuda").forward.notes == ()
    monkeypatch.setattr(offload, "_free_bytes", lambda: 1 << 10)
    starved = explanation.explain(problem, "cuda").forward
    assert starved.kernels == ()
    assert starved.error


def test_what_is_told_is_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report and the call take the same decision, by the same function."""
    asked = []
    real = host.route

    def route(*arguments: Any) -> tuple[bool, str]:
        asked.append(arguments[1:])
        return real(*arguments)

    monkeypatch.setattr(host, "route", route)
    q = np.ones((1, 16, 1, 8), np.float32)
    anyattn.explain(q, q, q)
    told = list(asked)
    anyattn.attention_vjp(q, q, q)[1](q)
    assert asked == told * 2


def test_no_gpu_where_one_is_demanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "available", lambda *_: "there is no GPU in this test")
    q = np.ones(SHAPE, np.float32)
    told = anyattn.explain(q, q, q, backend="cuda").forward
    assert told == Pass(None, "", (), 0, (), (), "backend='cuda': there is no GPU in this test")
    with pytest.raises(UnsupportedError, match="there is no GPU in this test"):
        anyattn.attention(q, q, q, backend="cuda")


# --- the arrays of every library -------------------------------------------------------------------------------------


def test_shapes_and_options() -> None:
    q, k, v = (np.ones(shape, np.float64) for shape in ((2, 30, 4, 16), (2, 50, 2, 16), (2, 50, 2, 24)))
    slopes = np.ones(4, np.float32)
    told = anyattn.explain(
        q, k, v, window=[7, 0], softcap=3.5, alibi_slopes=slopes, dropout=0.25, seed=1, deterministic=True
    )
    assert told.call == (
        "q (2, 30, 4, 16), k (2, 50, 2, 16), v (2, 50, 2, 24), float64, bshd, host memory, window 7:0, softcap 3.5, "
        "dropout 0.25, alibi, deterministic"
    )
    starts = np.array([0, 10, 30], np.int32)
    packed = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 20, "max_seqlen_k": 20}
    told = anyattn.explain(q[0], q[0], q[0], causal=True, **packed)
    assert told.call.endswith("host memory, 2 packed sequences of up to 20 and 20, causal")


@pytest.mark.parametrize("library", ["torch", "jax", "dlpack"])
def test_other_libraries(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q = np.ones((2, 4, 300, 32), np.float32)
    if library == "torch":
        torch = pytest.importorskip("torch")
        x = torch.from_numpy(q).requires_grad_()
    elif library == "jax":
        x = pytest.importorskip("jax").numpy.asarray(q)
    else:
        body = {"__module__": "unheard_of", "__dlpack__": lambda self, **_: q.__dlpack__()}
        x = type("Array", (), {**body, "__dlpack_device__": lambda self: q.__dlpack_device__()})()
        monkeypatch.setitem(sys.modules, "unheard_of", SimpleNamespace(from_dlpack=np.from_dlpack))
    told = anyattn.explain(x, x, x, layout="bhsd", causal=True, backend="cpu")
    assert told == anyattn.explain(q, q, q, layout="bhsd", causal=True, backend="cpu")


def test_pytorch_says_deterministic() -> None:
    torch = pytest.importorskip("torch")
    x = torch.ones(1, 8, 2, 16)
    torch.use_deterministic_algorithms(True)
    try:
        assert "deterministic" in anyattn.explain(x, x, x).call
    finally:
        torch.use_deterministic_algorithms(False)
    assert "deterministic" not in anyattn.explain(x, x, x).call


@pytest.mark.gpu
def test_arrays_on_a_gpu() -> None:
    import cupy

    q = cupy.empty((1, 1000, 4, 64), np.float16)
    told = anyattn.explain(q, q, q, causal=True)
    arch = launch.device(0).arch
    assert told.forward.device == told.backward.device == f"cuda:0 ({arch})"
    assert told.forward.why == "the arrays are in GPU memory"
    assert told.forward.kernels[-1].registers
    with pytest.raises(ValueError, match="backend='cpu' needs arrays in host memory"):
        anyattn.explain(q, q, q, backend="cpu")
    launched = launch._prepare_forward(parse("1,1000,4,64,float16,causal")[0])
    assert [name.kernel for name in told.forward.kernels] == [kernel.name for kernel in launched.plan.kernels]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"softcap": -1.0}, ValueError, "softcap must be > 0"),
        ({"layout": "sbhd"}, ValueError, "layout must be"),
        ({"seed": "x"}, TypeError, "seed must be an int"),
        ({"backend": "tpu"}, ValueError, "backend must be"),
        ({"max_seqlen_q": 3}, TypeError, "cu_seqlens_q is needed beside max_seqlen_q"),
        ({"k": np.ones((2, 300, 3, 64), np.float32)}, ValueError, "heads must equal|must divide"),
    ],
)
def test_raises_what_the_call_raises(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    q = np.ones(SHAPE, np.float32)
    with pytest.raises(error, match=message):
        anyattn.explain(**{"q": q, "k": q, "v": q, **arguments})


# --- info --call -----------------------------------------------------------------------------------------------------


def test_parse() -> None:
    problem, backend, device = parse(
        "2, 100,8,64,fp16,seqlen_k=50,heads_kv=2,head_dim_v=32,window=5:,scale=0.5,alibi,dropout=0.1,deterministic,"
        "layout=bhsd,arch=sm_90a"
    )
    assert device == Device("sm_90a", plan.SHARED_BYTES["sm_90a"])
    assert backend == "auto"
    assert (problem.dtype, problem.layout, problem.device) == ("float16", "bhsd", 0)
    assert problem.q_shape == (2, 8, 100, 64)
    assert problem.k_shape == (2, 2, 50, 64)
    assert problem.v_shape == (2, 2, 50, 32)
    assert problem.left == 5
    assert problem.right > 100
    assert (problem.scale, problem.dropout, problem.alibi, problem.deterministic) == (0.5, 0.1, True, True)

    problem, backend, device = parse("3,100,8,64,seqlen_k=70,varlen,causal,backend=cpu")
    assert device is None
    assert backend == "cpu"
    assert (problem.dtype, problem.device, problem.batch) == ("float32", -1, 3)
    assert (problem.total_q, problem.total_k, problem.seqlen_q, problem.seqlen_k) == (300, 210, 100, 70)
    assert (parse("1,100,1,8,window=3,host")[0].left, parse("1,100,1,8,window=3,host")[0].right) == (3, 3)


@pytest.mark.usefixtures("a_gpu")
def test_parse_where_there_is_a_gpu() -> None:
    assert (parse("1,8,1,8")[0].device, parse("1,8,1,8")[0].dtype) == (0, "bfloat16")
    assert (parse("1,8,1,8,host")[0].device, parse("1,8,1,8,host")[0].dtype) == (-1, "float32")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("1,2,3", "a call begins with four numbers, B,S,H,D, got '1,2,3'"),
        ("1,2,x,4", "a call begins with four numbers"),
        ("1,2,3,4,casual", "'casual' is not one of float16, "),
        ("1,2,3,4,seqlen_k=-4", "no array has a negative size"),
        ("1,2,3,4,causal=1", "'causal=1' is not one of"),
        ("1,2,3,4,float8", "'float8' is not one of"),
        ("1,2,3,4,softcap", "'softcap' is not one of"),
        ("1,2,3,4,heads_kv=two", "heads_kv= can't be 'two'"),
        ("1,2,3,4,arch=hopper", "arch= can't be 'hopper': it is one of sm_80, "),
        ("1,2,3,4,layout=sbhd", "layout= can't be 'sbhd': it is one of bshd, bhsd"),
        ("1,2,3,4,arch=sm_80,host", "arch= plans for arrays on a GPU"),
        ("1,2,3,400,host", "head_dim must be from 1 to 256"),
        ("1,2,3,4,heads_kv=2,host", "k: its 2 heads must divide q's 3"),
    ],
)
def test_what_is_no_call(call: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--call", call]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("anyattn: ")
    assert message in output.err


def test_info_call(capsys: pytest.CaptureFixture[str]) -> None:
    call = "2,4096,16,128,bfloat16,causal,arch=sm_80"
    assert cli.main(["info", "--call", call]) == 0
    told = explain(call)
    assert capsys.readouterr().out == f"{told}\n"
    used = told.forward.kernels[0]
    [line] = [line for line in str(told).splitlines() if line.startswith(f"  {used.kernel} ")]
    for figure in (used.grid, used.threads, used.registers, used.spill_bytes, used.shared_bytes):
        assert f" {figure} " in line
    assert "BLOCK_M=128" in line
    assert f"workspace: {told.backward.workspace_bytes} bytes" in str(told)

    assert cli.main(["info", "--json", "--call", call]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(dataclasses.asdict(told)))


def test_info_explains_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["info", "--help"])
    text = capsys.readouterr().out
    for word in (*explanation._FLAGS, *(f"{name}=" for name in explanation._VALUES)):
        assert word in text
    parse(explanation.SYNTAX.rpartition(" ")[2])
