"""PyTorch tensors: the shared table on the CPU, and all that PyTorch may do to a function besides calling it."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import weakref
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import pytest

import anyattn
from anyattn import host, launch
from anyattn.problem import Problem
from tests.cases import CASES, DTYPES, Array, Case, Results, check, make, storage
from tests.device import arrays
from tests.test_api import STREAM, HostKernels

torch: Any = pytest.importorskip("torch")
adapter: Any = pytest.importorskip("anyattn.backends.torch")
Tensor: TypeAlias = Any

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_each_device = pytest.mark.parametrize("device", DEVICES)
BACKENDS = ["eager", "aot_eager", *(["inductor"] if shutil.which("c++") else [])]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def randn(*shape: int, device: str = "cpu", dtype: Any = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=device, requires_grad=grad)


def operands(device: str = "cpu", dtype: Any = torch.float32, grad: bool = False, **sizes: int) -> list[Tensor]:
    """q, k and v in "bshd": grouped heads, more keys than queries, another head dim for v."""
    b, s_q, s_k, h, h_kv, d, d_v = {"b": 2, "s_q": 5, "s_k": 7, "h": 4, "h_kv": 2, "d": 8, "d_v": 6, **sizes}.values()
    shapes = (b, s_q, h, d), (b, s_k, h_kv, d), (b, s_k, h_kv, d_v)
    return [randn(*shape, device=device, dtype=dtype, grad=grad) for shape in shapes]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own attention of "bshd" tensors, differentiable as often as one likes."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bshd,bthd->bhst", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v)


def plain_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, each row blind to the keys behind it, bottom right."""
    group, rows, keys = q.shape[2] // k.shape[2], q.shape[1], k.shape[1]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bshd,bthd->bhst", q, k) * q.shape[-1] ** -0.5
    hidden = torch.ones(rows, keys, dtype=torch.bool, device=q.device).triu(keys - rows + 1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num()  # a row that sees nothing: 0
    return torch.einsum("bhst,bthd->bshd", weights, v)


def total(x: Tensor) -> Tensor:
    """A scalar whose gradient is dense and not constant."""
    return (x.float() * torch.linspace(-1, 1, x.numel(), device=x.device).view(x.shape)).sum()


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(total(function(*inputs)), [x for x in inputs if x.requires_grad])


def close(actual: Any, wanted: Any) -> None:
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


# --- the table -------------------------------------------------------------------------------------------------------


def to_torch(x: Array) -> Tensor:
    """A tensor of the same memory layout, in memory of its own."""
    flat, offset, shape, strides = storage(x)
    memory = torch.empty(flat.size, dtype=getattr(torch, x.dtype.name))
    memory.view(torch.uint8).numpy()[...] = flat.view(np.uint8)
    return memory.as_strided(shape, strides, offset)


def from_torch(x: Tensor) -> Array:
    if x.dtype == torch.bfloat16:
        return x.detach().view(torch.int16).numpy().view(DTYPES["bfloat16"])
    return x.detach().numpy()


# PyTorch has no negative strides. test_gpu.py has the table for CUDA tensors.
TABLE = [(case, list(DTYPES)[i % 4]) for i, case in enumerate(CASES) if case.strides != "negative"]


@pytest.mark.parametrize(("case", "dtype"), TABLE, ids=[f"{dtype}-{case.name}" for case, dtype in TABLE])
def test_table(case: Case, dtype: str) -> None:
    inputs = make(case, dtype, np.random.default_rng(zlib.crc32(case.name.encode())))
    placed = {name: to_torch(x) for name, x in arrays(inputs).items()}
    q, k, v, dout = (placed.pop(name) for name in ("q", "k", "v", "dout"))
    options = {**inputs.options, **placed, "return_lse": True}
    attention: Callable[..., Any] = anyattn.attention
    if case.varlen:
        options |= {"max_seqlen_q": inputs.max_seqlen_q, "max_seqlen_k": inputs.max_seqlen_k}
        del options["layout"]
        attention = anyattn.attention_varlen
    with torch.no_grad():
        alone = attention(q, k, v, **options)
    out, lse = attention(*(x.requires_grad_() for x in (q, k, v)), **options)
    assert torch.equal(out, alone[0])
    assert torch.equal(lse, alone[1])
    assert out.dtype == q.dtype
    assert out.is_contiguous()
    results = out, lse, *torch.autograd.grad(out, (q, k, v), dout)
    check(case, dtype, inputs, Results(*map(from_torch, results)))


# --- gradients -------------------------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": True, "softcap": 3.0, "scale": 0.7},
    {"window": (2, 1), "dropout": 0.3, "seed": 5},
    {"causal": True, "alibi_slopes": torch.tensor([0.1, 0.5, 0.0, 1.0])},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(options: dict[str, Any]) -> None:
    inputs = operands(dtype=torch.float64, grad=True)
    assert torch.autograd.gradcheck(lambda q, k, v: anyattn.attention(q, k, v, **options), inputs)


def test_gradcheck_varlen() -> None:
    q, k, v = (randn(n, h, 4, dtype=torch.float64, grad=True) for n, h in ((9, 4), (11, 2), (11, 2)))
    cu_q, cu_k = (torch.tensor(cu, dtype=torch.int32) for cu in ([0, 4, 4, 9], [0, 3, 8, 11]))
    assert torch.autograd.gradcheck(
        lambda q, k, v: anyattn.attention_varlen(q, k, v, cu_q, cu_k, 5, 5, causal=True), (q, k, v)
    )


@on_each_device
@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_some_inputs_require_grad(wanted: tuple[bool, ...], device: str) -> None:
    inputs = [x.requires_grad_(grad) for x, grad in zip(operands(device), wanted, strict=True)]
    close(gradients(anyattn.attention, *inputs), gradients(plain, *inputs))


@on_each_device
def test_leaves_accumulate(device: str) -> None:
    """Parameters, used twice."""
    q, k, v = map(torch.nn.Parameter, operands(device))
    for function in (anyattn.attention, plain):
        total(function(q, k, v) + function(q, k, v) * 2).backward()
        if function is anyattn.attention:
            found = [x.grad.clone() for x in (q, k, v)]
            for x in (q, k, v):
                x.grad = None
    close(found, [x.grad for x in (q, k, v)])


def expanded(out: Tensor) -> Tensor:
    return torch.ones((), device=out.device).expand(out.shape)


def transposed(out: Tensor) -> Tensor:
    return randn(*reversed(out.shape), device=str(out.device)).permute(3, 2, 1, 0)


def rows(out: Tensor) -> Tensor:
    return randn(1, 1, *out.shape[2:], device=str(out.device)).expand(out.shape)


def negated(out: Tensor) -> Tensor:
    """The lazily negated view that a gradient through torch.conj can be."""
    x = torch.complex(*(randn(*out.shape, device=str(out.device)) for _ in range(2))).conj().imag
    assert x.is_neg()
    return x


@on_each_device
@pytest.mark.parametrize("dout", [expanded, transposed, rows, negated])
def test_gradient_of_any_strides(dout: Callable[[Tensor], Tensor], device: str) -> None:
    inputs = operands(device, grad=True)
    out = anyattn.attention(*inputs)
    gradient = dout(out)
    close(torch.autograd.grad(out, inputs, gradient), torch.autograd.grad(plain(*inputs), inputs, gradient))


@on_each_device
def test_negated_view(device: str) -> None:
    q, k, v = operands(device)
    q = negated(q)
    close(anyattn.attention(q, k, v), plain(q, k, v))


@on_each_device
def test_sum_backward(device: str) -> None:
    inputs = operands(device, grad=True)
    anyattn.attention(*inputs).sum().backward()
    close([x.grad for x in inputs], torch.autograd.grad(plain(*inputs).sum(), inputs))


def test_no_gradient_reaches_the_output() -> None:
    """An output whose own gradient is undefined gives none, rather than zeros or an error."""

    class Undefined(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dx: Tensor) -> None:
            return None

    inputs = operands(grad=True)
    out = Undefined.apply(anyattn.attention(*inputs))
    assert torch.autograd.grad(out.sum(), inputs, allow_unused=True) == (None, None, None)


@on_each_device
@pytest.mark.parametrize("compiled", [False, True])
def test_lse_is_not_differentiable(compiled: bool, device: str) -> None:
    inputs = operands(device, grad=True)
    attention = torch.compile(anyattn.attention, backend="aot_eager", fullgraph=True) if compiled else anyattn.attention
    out, lse = attention(*inputs, return_lse=True)
    assert out.requires_grad
    assert not lse.requires_grad
    assert lse.dtype == torch.float32
    close(torch.autograd.grad(total(out), inputs), gradients(plain, *inputs))


def test_inputs_changed_before_the_backward() -> None:
    q, k, v = operands(grad=True)
    x = q * 1
    out = anyattn.attention(x, k, v)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_result_dies_with_its_last_name() -> None:
    """No cycle keeps the graph, and with it q, k and v, until the collector comes."""
    inputs = operands(grad=True)
    gc.collect()
    gc.disable()
    try:
        out = anyattn.attention(*inputs, dropout=0.5)
        out.sum().backward()
        graph = weakref.ref(out.grad_fn)
        del out
        assert graph() is None
    finally:
        gc.enable()


@on_each_device
def test_saved_tensor_hooks_and_checkpoints(device: str) -> None:
    inputs = operands(device, grad=True)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return anyattn.attention(q, k, v, dropout=0.3)

    def repeated(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        return gradients(function, *inputs)

    wanted = repeated(attention)
    close(repeated(lambda *x: torch.utils.checkpoint.checkpoint(attention, *x, use_reentrant=False)), wanted)
    with torch.autograd.graph.save_on_cpu():
        close(repeated(attention), wanted)


@on_each_device
def test_attention_backward(device: str) -> None:
    inputs = operands(device)
    options: dict[str, Any] = {"causal": True, "deterministic": True}
    out, lse = anyattn.attention(*inputs, **options, return_lse=True)
    dout = torch.randn_like(out)
    found = anyattn.attention_backward(dout, *inputs, out, lse, **options)
    for x in inputs:
        x.requires_grad_()
    wanted = torch.autograd.grad(anyattn.attention(*inputs, **options), inputs, dout)
    assert all(map(torch.equal, found, wanted))
    again = anyattn.attention_backward(dout, *inputs, out, lse, **options)
    assert all(map(torch.equal, again, wanted))


@on_each_device
def test_second_derivative_is_refused(device: str) -> None:
    q, k, v = operands(device, grad=True)
    message = "anyattn.attention has first derivatives only"
    (dq,) = torch.autograd.grad(anyattn.attention(q, k, v).square().sum(), q, create_graph=True)
    close(dq, torch.autograd.grad(plain(q, k, v).square().sum(), q)[0])
    with pytest.raises(NotImplementedError, match=message):
        torch.autograd.grad(dq.sum(), q)

    step = torch.func.grad(lambda q: anyattn.attention(q, k.detach(), v.detach()).square().sum())
    with pytest.raises(NotImplementedError, match=message):
        torch.func.grad(lambda q: step(q).sum())(q.detach())

    operator = torch.ops.anyattn.attention_forward.default(q, k, v, *FLAT)[0]
    (dq,) = torch.autograd.grad(operator.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=message):
        torch.autograd.grad(dq.sum(), q)


def test_forward_mode_is_refused() -> None:
    """Rather than leaving the tangents out."""
    q, k, v = operands()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, q)
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            anyattn.attention(dual, k, v)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda q: anyattn.attention(q, k, v), (q,), (q,))


# --- the operators ---------------------------------------------------------------------------------------------------

FLAT = (None, None, None, None, 0, 0, False, [-1, -1], None, None, 0.0, "bshd", False, "auto")  # the default options


def recorded(call: Callable[[], Any]) -> list[tuple[Any, ...]]:
    """The arguments that a call passes to the operators."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.namespace == "anyattn":
                calls.append((function, args))
            return function(*args, **(kwargs or {}))

    with Recorder():
        call()
    return calls


def packed(device: str) -> tuple[Tensor, ...]:
    q, k, v = (randn(n, h, 8, device=device) for n, h in ((9, 4), (11, 2), (11, 2)))
    return q, k, v, *(torch.tensor(cu, dtype=torch.int32, device=device) for cu in ([0, 4, 4, 9], [0, 3, 8, 11]))


CALLS: dict[str, Callable[[str], Any]] = {
    "dense": lambda device: anyattn.attention_vjp(*operands(device)),
    "options": lambda device: anyattn.attention_vjp(
        *operands(device, torch.float16),
        causal=True,
        window=3,
        scale=0.5,
        softcap=20.0,
        dropout=0.2,
        seed=2**64 - 1,
        alibi_slopes=torch.rand(2, 4, device=device),
        deterministic=True,
    ),
    "bhsd": lambda device: anyattn.attention_vjp(*(x.transpose(1, 2) for x in operands(device)), layout="bhsd"),
    "bshd3": lambda device: anyattn.attention_vjp(*(x[0] for x in operands(device, torch.float64))),
    "bhsd3": lambda device: anyattn.attention_vjp(*(x[0].swapaxes(0, 1) for x in operands(device)), layout="bhsd"),
    "bfloat16": lambda device: anyattn.attention_vjp(*(x[0, :, 0] for x in operands(device, torch.bfloat16))),
    "packed": lambda device: anyattn.attention_vjp(
        **dict(zip(("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"), packed(device), strict=True)),
        max_seqlen_q=5,
        max_seqlen_k=5,
        window=(1, None),
    ),
    "empty": lambda device: anyattn.attention_vjp(*operands(device, s_k=0)),
}


@on_each_device
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str, device: str) -> None:
    dout = torch.randn_like(CALLS[name](device)[0])
    (forward, arguments), (backward, more) = recorded(lambda: CALLS[name](device)[1](dout))
    torch.library.opcheck(forward, arguments)
    torch.library.opcheck(forward, (*(x.clone().requires_grad_() for x in arguments[:3]), *arguments[3:]))
    torch.library.opcheck(backward, more)


@pytest.mark.parametrize("name", CALLS)
def test_fake_tensors_have_the_shapes_of_real_ones(name: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    def described(out: Tensor, pullback: Callable[[Tensor], tuple[Tensor, ...]]) -> list[Any]:
        return [(x.shape, x.stride(), x.dtype, x.device) for x in (out, *pullback(torch.empty_like(out)))]

    real = described(*CALLS[name]("cpu"))
    with FakeTensorMode():
        assert described(*CALLS[name]("cpu")) == real


def test_meta_tensors() -> None:
    out, lse = anyattn.attention(*(x.to("meta") for x in operands(h=4)), return_lse=True)
    assert out.is_meta
    assert out.shape == (2, 5, 4, 6)
    assert lse.shape == (2, 4, 5)
    for device in ("cpu", "cuda"):
        with torch.autocast(device, torch.bfloat16):  # none for them: SDPA takes them as they are, too
            assert anyattn.attention(*(x.to("meta") for x in operands(h=4))).is_meta


def test_plain_calls_skip_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_forward_operator", "_backward_operator"):
        monkeypatch.setattr(adapter, name, None)
    inputs = operands(grad=True)
    gradients(anyattn.attention, *inputs)
    with torch.no_grad():
        anyattn.attention(*inputs)
    with torch.inference_mode():
        assert anyattn.attention(*inputs).is_inference()
    q, k, v = (x.detach() for x in inputs)
    out, pullback = anyattn.attention_vjp(q, k, v, dropout=0.5)
    pullback(out)


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the adapter has looked up or computed, rather than known again."""
    found: list[Any] = []
    for name in ("_problem", "_backward_problem", "_forward_operator"):
        original = getattr(adapter, name)

        def spy(*args: Any, name: str = name, original: Any = original) -> Any:
            found.append(name)
            return original(*args)

        monkeypatch.setattr(adapter, name, spy)
    return found


def familiar(device: str = "cpu", grad: bool = False, **sizes: Any) -> list[Tensor]:
    """Tensors of a kind that has come often enough to be known again."""
    inputs = operands(device, grad=grad, **sizes)
    for _ in range(3):
        out = anyattn.attention(*inputs, causal=True)
        if grad:
            total(out).backward()
    return inputs


@on_each_device
@pytest.mark.parametrize("grad", [False, True])
def test_a_kind_of_call_is_known_again(grad: bool, device: str, lookups: list[Any]) -> None:
    familiar(device, grad, s_q=9)
    lookups.clear()
    q, k, v = operands(device, grad=grad, s_q=9)
    out = anyattn.attention(q, k, v, causal=True)
    if grad:
        close(torch.autograd.grad(total(out), (q, k, v)), gradients(plain_causal, q, k, v))
    close(out, plain_causal(q, k, v))
    assert not lookups


def another(change: str, x: Tensor) -> Tensor:
    if change == "shape":
        return x[:, 1:]
    if change == "strides":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if change == "dtype":
        return x.double()
    if change == "alignment":
        return torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x)
    if change == "negated":
        return torch._neg_view(x)
    return x.clone().requires_grad_()


@pytest.mark.parametrize("change", ["shape", "strides", "dtype", "alignment", "negated", "requires_grad"])
def test_another_kind_of_call_is_told_apart(change: str, lookups: list[Any]) -> None:
    inputs = [another(change, x) for x in familiar(s_q=7)]
    lookups.clear()
    close(anyattn.attention(*inputs, causal=True), plain_causal(*inputs))
    assert lookups


def _vmapped(attention: Any, inputs: list[Tensor]) -> Tensor:
    return torch.vmap(lambda scale: attention(*inputs) * scale)(torch.ones(1))[0]


def _differentiated(attention: Any, inputs: list[Tensor]) -> Tensor:
    torch.func.grad(lambda q: attention(q, *inputs[1:]).sum())(inputs[0])
    return attention(*inputs)


def _faked(attention: Any, inputs: list[Tensor]) -> Tensor:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(attention(*inputs), FakeTensor)
    return attention(*inputs)


def _made(attention: Any, inputs: list[Tensor], **mode: Any) -> Tensor:
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda *x: attention(*x), **mode)(*inputs)
    return graph(*(0 * x for x in inputs)) + graph(*inputs)


def _traced(attention: Any, inputs: list[Tensor]) -> Tensor:
    traced = torch.jit.trace(lambda *x: attention(*x), tuple(inputs))
    return traced(*(0 * x for x in inputs)) + traced(*inputs)


def _cast(attention: Any, inputs: list[Tensor]) -> Tensor:
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            for x in (inputs, [x.bfloat16() for x in inputs]):
                assert [attention(*x).dtype for _ in range(4)] == [dtype] * 4
    return attention(*inputs)


@pytest.mark.parametrize(
    "recorder", [_vmapped, _differentiated, _faked, _made, partial(_made, pre_dispatch=True), _traced, _cast], ids=str
)
def test_what_records_a_familiar_call_sees_it(recorder: Any) -> None:
    inputs = familiar()
    close(recorder(partial(anyattn.attention, causal=True), inputs), plain_causal(*inputs))


def test_deterministic_algorithms_after_a_familiar_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = familiar(grad=True)
    asked: list[bool] = []
    backward = adapter._backward
    monkeypatch.setattr(
        adapter, "_backward", lambda *args: (asked.append(args[6].problem.deterministic), backward(*args))[1]
    )
    for wanted in (False, True, False):
        torch.use_deterministic_algorithms(wanted)
        try:
            total(anyattn.attention(*inputs, causal=True)).backward()
        finally:
            torch.use_deterministic_algorithms(False)
    assert asked == [False, True, False]


def test_subclass() -> None:
    class Tagged(torch.Tensor):
        pass

    q, k, v = operands(grad=True)
    tagged = [x.detach().as_subclass(Tagged).requires_grad_() for x in (q, k, v)]
    close(anyattn.attention(*tagged).as_subclass(torch.Tensor), anyattn.attention(q, k, v))
    close(
        [x.as_subclass(torch.Tensor) for x in gradients(anyattn.attention, *tagged)],
        gradients(anyattn.attention, q, k, v),
    )


# --- torch.compile and other tracers ---------------------------------------------------------------------------------


@on_each_device
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(backend: str, dynamic: bool, device: str) -> None:
    if backend == "inductor" and device == "cuda":
        pytest.importorskip("triton")

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = anyattn.attention(q * 2, k, v, causal=True, window=(4, None), return_lse=True)
        return out.cos() + torch.where(lse.isinf(), 0, lse).transpose(1, 2)[..., None]

    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=dynamic)
    inputs = operands(device, grad=True)
    close(compiled(*inputs), block(*inputs))
    close(gradients(compiled, *inputs), gradients(block, *inputs))
    with torch.no_grad():
        close(compiled(*inputs), block(*inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_varlen(backend: str) -> None:
    def block(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest: int) -> Tensor:
        return anyattn.attention_varlen(q, k, v, cu_q, cu_k, longest, longest, causal=True).sin()

    q, k, v, *cu = packed("cpu")
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=True)
    for longest in (5, 6):
        close(
            torch.autograd.grad(total(compiled(q, k, v, *cu, longest)), (q, k, v)),
            torch.autograd.grad(total(block(q, k, v, *cu, longest)), (q, k, v)),
        )


def test_compile_backward() -> None:
    inputs = operands()
    out, lse = anyattn.attention(*inputs, return_lse=True)
    compiled = torch.compile(anyattn.attention_backward, backend="aot_eager", fullgraph=True)
    close(compiled(out, *inputs, out, lse), anyattn.attention_backward(out, *inputs, out, lse))


def test_dynamic_shapes_compile_once() -> None:
    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return anyattn.attention(q, k, v, causal=True).cos()

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    anyattn.attention(*operands())  # the first call of all adds to what Dynamo guards
    torch._dynamo.utils.counters.clear()
    for sizes in ({}, {"s_q": 9}, {"s_k": 12, "d": 16}, {"b": 5, "d_v": 10}, {"h": 8, "h_kv": 4}):
        inputs = operands(grad=True, **{"b": 3, **sizes})  # at first all sizes differ: equal ones count as one
        close(gradients(compiled, *inputs), gradients(block, *inputs))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_with_options_that_change(dynamic: bool | None) -> None:
    """They may be symbols, as the sizes."""

    def block(q: Tensor, scale: float) -> Tensor:
        return anyattn.attention(q, q, q, scale=scale * q.shape[-1] ** -0.5)

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows, scale in ((4, 0.3), (4, 0.4), (5, 0.5), (6, 0.7)):
        q = randn(1, rows, 2, 8)
        close(compiled(q, scale), block(q, scale))


def test_compile_is_the_first_call() -> None:
    """The adapter is not loaded yet when Dynamo looks for it."""
    program = (
        "import torch, anyattn\n"
        "q = torch.randn(1, 3, 2, 4)\n"
        "out = torch.compile(anyattn.attention, backend='eager', fullgraph=True)(q, q, q, causal=True)\n"
        "torch.testing.assert_close(out, anyattn.attention(q, q, q, causal=True))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(tracing_mode: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.detach().requires_grad_()
        return torch.autograd.grad(total(anyattn.attention(q, k, v)), q)[0]

    inputs = operands()
    graph = make_fx(step, tracing_mode=tracing_mode)(*inputs)
    others = operands()
    close(graph(*others), step(*others))


def test_make_fx_before_dispatch() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda q, k, v: anyattn.attention(q, k, v), pre_dispatch=True)(*operands())
    assert torch.ops.anyattn.attention_forward.default in [node.target for node in graph.graph.nodes]


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return anyattn.attention(q, k, v, causal=True)

    length = torch.export.Dim("length", min=2)
    exported = torch.export.export(
        Attention(), tuple(operands()), dynamic_shapes=({1: length}, None, None), strict=strict
    )
    longer = operands(s_q=6)
    close(exported.module()(*longer), anyattn.attention(*longer, causal=True))


def test_jit_trace() -> None:
    traced = torch.jit.trace(lambda q, k, v: anyattn.attention(q, k, v), tuple(operands()))
    others = operands()
    close(traced(*others), plain(*others))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@on_each_device
def test_functorch(device: str) -> None:
    q, k, v = operands(device)

    def step(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.func.grad(lambda *x: function(*x).square().sum(), (0, 1, 2))

    wanted = step(plain)(q, k, v)
    close(step(anyattn.attention)(q, k, v), wanted)
    close(torch.func.vmap(step(anyattn.attention))(q, k, v), wanted)  # gradients of each sample
    close(torch.func.vmap(anyattn.attention)(q, k, v), plain(q, k, v))
    banded = partial(anyattn.attention, window=(2.0, None))  # type: ignore[arg-type]
    close(torch.func.vmap(banded)(q, k, v), banded(q, k, v))


@on_each_device
@pytest.mark.parametrize("options", [{}, {"dropout": 0.5, "seed": 3}], ids=str)
def test_pullback_outside_its_transformation(options: dict[str, Any], device: str) -> None:
    """There q, k and v are wrappers that are dead."""
    inputs = operands(device, grad=True)
    out, pullback = torch.func.vjp(partial(anyattn.attention, **options), *(x.detach() for x in inputs))
    wanted = torch.autograd.grad(anyattn.attention(*inputs, **options), inputs, out)
    close(pullback(out), wanted)

    q, k, v, cu_q, cu_k = packed(device)
    _, pullback = torch.func.vjp(lambda x: anyattn.attention_varlen(x, k, v, cu_q, cu_k, 5, 5), q)
    q.requires_grad_()
    packed_out = anyattn.attention_varlen(q, k, v, cu_q, cu_k, 5, 5)
    close(pullback(packed_out.detach()), torch.autograd.grad(packed_out, q, packed_out))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@on_each_device
def test_many_gradients_at_once(device: str) -> None:
    q, k, v = operands(device, grad=True)
    for function in (anyattn.attention, plain):
        out = function(q, k, v)
        douts = torch.eye(out.numel(), device=device)[:7].reshape(7, *out.shape)
        batched = torch.autograd.grad(out, q, douts, is_grads_batched=True, retain_graph=True)[0]
        close(batched, torch.stack([torch.autograd.grad(out, q, dout, retain_graph=True)[0] for dout in douts]))


class Subclass(torch.Tensor):
    pass


OPTIONS_OF_NO_CALL = [
    ({"scale": torch.ones((), requires_grad=True)}, TypeError, "scale must be a real number or None, got Tensor"),
    ({"scale": "1"}, TypeError, "scale must be a real number or None, got str '1'"),
    ({"causal": 2}, TypeError, "causal must be True or False, got int 2"),
    ({"window": (1, 2, 3)}, ValueError, "window must be .*, got 3 entries"),
    ({"window": 2.5}, TypeError, "window must be an int, .*, got float 2.5"),
    ({"layout": 3}, ValueError, "layout must be 'bshd' or 'bhsd', got 3"),
    ({"q": torch.ones(2, 5, 4, 9)}, ValueError, "k: head_dim must equal q's, 9, got 8"),
]


@pytest.mark.parametrize(
    "way",
    [
        lambda call, *x: torch.func.vmap(call)(*x),
        lambda call, q, k, v: call(q.as_subclass(Subclass), k, v),
        lambda call, *x: call(*(y.to("meta") for y in x)),
    ],
    ids=["vmap", "subclass", "meta"],
)
@pytest.mark.parametrize(("changes", "error", "message"), OPTIONS_OF_NO_CALL)
def test_options_are_checked_before_an_operator_casts_them(
    changes: dict[str, Any], error: type[Exception], message: str, way: Callable[..., Any]
) -> None:
    q, k, v = operands()
    options = {name: value for name, value in changes.items() if name != "q"}
    way(anyattn.attention, q, k, v)
    with pytest.raises(error, match=message):
        way(partial(anyattn.attention, **options), changes.get("q", q), k, v)


def test_a_refused_tensor_is_let_go() -> None:
    inputs, refused = operands(), []
    for name in ("scale", "causal", "softcap"):
        option = torch.zeros(10)
        refused.append(weakref.ref(option))
        with pytest.raises(TypeError, match=f"{name} must be"):
            anyattn.attention(*inputs, **{name: option})
        del option
    gc.collect()
    assert [x() for x in refused] == [None] * 3


# --- autocast --------------------------------------------------------------------------------------------------------


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_autocast(dtype: Any, device: str) -> None:
    """The dtype is the one that PyTorch's own attention has."""
    inputs = operands(device, dtype, h=2, d_v=8)
    heads_first = [x.transpose(1, 2) for x in inputs]
    with torch.autocast(device, torch.bfloat16):
        wanted = torch.nn.functional.scaled_dot_product_attention(*heads_first).dtype
        assert anyattn.attention(*inputs).dtype == wanted
        assert anyattn.attention(*(x.requires_grad_() for x in inputs)).dtype == wanted
        compiled = torch.compile(anyattn.attention, backend="aot_eager", fullgraph=True)
        assert compiled(*inputs).dtype == wanted
        found = gradients(anyattn.attention, *inputs)
    assert [x.dtype for x in found] == [dtype] * 3


def test_gradients_without_autograd_under_autocast() -> None:
    q, k, v = operands()
    with torch.autocast("cpu", torch.bfloat16):
        out, pullback = anyattn.attention_vjp(q, k, v)
        within = pullback(out)
        _, lse = anyattn.attention(q, k, v, return_lse=True)
        explicit = anyattn.attention_backward(out.float(), q, k, v, out, lse)
    narrow = [x.bfloat16() for x in (q, k, v)]
    wanted = anyattn.attention_backward(out, *narrow, out, lse)
    for found in (within, explicit, pullback(out)):
        assert [x.dtype for x in found] == [torch.float32] * 3
        assert all(torch.equal(x.bfloat16(), y) for x, y in zip(found, wanted, strict=True))


def test_autocast_casts_as_the_caller_would() -> None:
    slopes = torch.rand(4)
    q, k, v = operands(grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(lambda *x: anyattn.attention(*x, alibi_slopes=slopes), q, k, v)
    wanted = gradients(lambda *x: anyattn.attention(*(y.bfloat16() for y in x), alibi_slopes=slopes), q, k, v)
    assert all(map(torch.equal, found, wanted))


def test_autocast_within_compile() -> None:
    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return anyattn.attention(q, k, v)

    assert torch.compile(block, backend="aot_eager", fullgraph=True)(*operands()).dtype == torch.bfloat16


# --- dropout ---------------------------------------------------------------------------------------------------------


@on_each_device
def test_seeds(device: str) -> None:
    inputs = operands(device)
    with_grad = [x.clone().requires_grad_() for x in inputs]
    compiled = torch.compile(anyattn.attention, backend="aot_eager", fullgraph=True)

    def drawn(attention: Callable[..., Tensor], inputs: list[Tensor], draws: int = 1) -> Tensor:
        torch.manual_seed(7)
        return [attention(*inputs, dropout=0.5) for _ in range(draws)][-1]

    first = drawn(anyattn.attention, inputs)
    for attention, arguments in ((anyattn.attention, inputs), (anyattn.attention, with_grad), (compiled, with_grad)):
        assert torch.equal(drawn(attention, arguments), first)
    assert not torch.equal(drawn(anyattn.attention, inputs, 2), first)

    for seed in (0, 1, 2**63 - 1, 2**63, 2**64 - 1):
        known = anyattn.attention(*inputs, dropout=0.5, seed=seed)
        assert torch.equal(anyattn.attention(*with_grad, dropout=0.5, seed=seed), known)
        assert torch.equal(compiled(*inputs, dropout=0.5, seed=seed), known)
        numpy = anyattn.attention(*(x.cpu().numpy() for x in inputs), dropout=0.5, seed=seed, backend="cpu")
        close(known.cpu(), torch.from_numpy(numpy))


@on_each_device
@pytest.mark.parametrize("compiled", [False, True])
def test_backward_replays_the_mask(compiled: bool, device: str) -> None:
    inputs = operands(device, grad=True)
    attention = torch.compile(anyattn.attention, backend="aot_eager", fullgraph=True) if compiled else anyattn.attention
    torch.manual_seed(11)
    seed = adapter.fresh_seed()
    torch.manual_seed(11)
    drawn = gradients(lambda *x: attention(*x, dropout=0.5), *inputs)
    close(drawn, gradients(lambda *x: anyattn.attention(*x, dropout=0.5, seed=seed), *inputs))


def test_vjp_draws_from_the_generator_of_torch() -> None:
    inputs = operands()

    def drawn() -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        out, pullback = anyattn.attention_vjp(*inputs, dropout=0.5)
        return out, *pullback(out)

    assert all(map(torch.equal, drawn(), drawn()))


def test_no_dropout_draws_nothing() -> None:
    state = torch.get_rng_state()
    anyattn.attention(*operands_from_state(state), seed=None)
    assert torch.equal(torch.get_rng_state(), state)


def operands_from_state(state: Tensor) -> list[Tensor]:
    inputs = operands()
    torch.set_rng_state(state)
    return inputs


# --- what goes on to the core ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_algorithms(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(host, "backward", lambda bp, *_, **__: seen.append(bp.problem.deterministic))
    inputs = operands(grad=True)
    out = anyattn.attention(*inputs, deterministic=deterministic)
    torch.autograd.grad(out, inputs, out, retain_graph=True)
    torch.use_deterministic_algorithms(True)
    try:
        torch.autograd.grad(out, inputs, out)
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [deterministic, True]


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(host, "forward", lambda *_, **options: seen.append(options["backend"]))
    anyattn.attention(*operands(), backend=backend)
    assert seen == [backend]


BAD = [
    ({"k": np.ones((2, 7, 2, 8), np.float32)}, TypeError, r"k must be a torch.Tensor, as q is, got numpy.ndarray"),
    ({"v": None}, TypeError, r"v must be a torch.Tensor, as q is, got builtins.NoneType"),
    ({"k": torch.ones(2, 7, 2, 8, device="meta")}, ValueError, r"k must be on q's device, cpu, got meta"),
    ({"k": torch.ones(2, 7, 2, 8, dtype=torch.int32)}, TypeError, r"k must be float16, .* or float64, got int32"),
    ({"v": torch.ones(2, 7, 2, 8, dtype=torch.complex64)}, TypeError, r"v must be float16, .*, got complex64"),
    ({"k": torch.ones(2, 7, 2, 8).half()}, TypeError, r"k must have q's dtype, float32, got float16"),
    ({"k": torch.ones(2, 7, 2, 9)}, ValueError, r"k: head_dim must equal q's, 8, got 9"),
    ({"q": torch.ones(8)}, ValueError, r"q must have 2 .* dimensions, got shape \(8,\)"),
    ({"window": {}}, TypeError, r"window must be an int, a pair .*, got dict"),
    ({"window": torch.ones(2)}, TypeError, r"window must be an int, .*, got Tensor"),
    ({"scale": "1"}, TypeError, r"scale must be a real number or None, got str '1'"),
    ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
    ({"alibi_slopes": [0.5] * 4}, TypeError, r"alibi_slopes must be a torch.Tensor, as q is, got builtins.list"),
    ({"alibi_slopes": torch.ones(4).double()}, TypeError, r"alibi_slopes must be float32, got float64"),
    ({"alibi_slopes": torch.ones(4, requires_grad=True)}, ValueError, r"alibi_slopes must not require grad, .*detach"),
    ({"alibi_slopes": torch.ones(4, device="meta")}, ValueError, r"alibi_slopes must be on the CPU or .*, got meta"),
    ({"q": torch.nn.Linear(2, 2)}, TypeError, r"q must be a torch.Tensor, got torch.Linear"),
    ({"q": torch.Tensor}, TypeError, r"q must be a torch.Tensor, got torch._TensorMeta"),
    ({"q": torch.ones(2, 5, 4, 8).to_sparse()}, TypeError, r"q must be a dense tensor, got a torch.sparse_coo one"),
    ({"k": torch.ones(2, 7, 2, 8).to_sparse()}, TypeError, r"k must be a dense tensor, got a torch.sparse_coo one"),
    ({"v": torch.nested.nested_tensor([torch.ones(2, 8)])}, TypeError, r"v must be a dense tensor, got a nested one"),
    (
        {"q": torch.nested.nested_tensor([torch.ones(2, 8)], layout=torch.jagged)},
        TypeError,
        r"q must be a dense tensor, got a nested one",
    ),
    ({"dropout": np.array([0.1, 0.2])}, TypeError, r"dropout must be a real number in \[0, 1\), got ndarray"),
]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_input(
    changes: dict[str, Any], error: type[Exception], message: str, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = operands(grad=grad)
    for _ in range(3):
        anyattn.attention(q, k, v)  # from now on the good call is known
    monkeypatch.setattr(host, "forward", None)
    with pytest.raises(error, match=message):
        anyattn.attention(**{"q": q, "k": k, "v": v, **changes})


def test_bad_packing() -> None:
    q, k, v, cu_q, cu_k = packed("cpu")
    good: dict[str, Any] = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    good |= {"max_seqlen_q": 5, "max_seqlen_k": 5}
    for changes, error, message in (
        ({"cu_seqlens_q": None}, TypeError, r"cu_seqlens_q must be a torch.Tensor, as q is, got builtins.NoneType"),
        ({"cu_seqlens_k": cu_k.tolist()}, TypeError, r"cu_seqlens_k must be a torch.Tensor, .*, got builtins.list"),
        ({"cu_seqlens_q": cu_q.long()}, TypeError, r"cu_seqlens_q must be int32, got int64"),
        ({"cu_seqlens_k": cu_k + 1}, ValueError, r"cu_seqlens_k must start at 0, got 1"),
        ({"max_seqlen_q": 4}, ValueError, r"max_seqlen_q must be at least the longest sequence, 5 rows"),
        ({"max_seqlen_q": torch.tensor([5])}, TypeError, r"max_seqlen_q must be an int, got Tensor"),
    ):
        with pytest.raises(error, match=message):
            anyattn.attention_varlen(**{**good, **changes})


def test_bad_backward() -> None:
    inputs = operands()
    out, lse = anyattn.attention(*inputs, return_lse=True)
    for dout, error, message in (
        (out.numpy(), TypeError, r"dout must be a torch.Tensor, as q is, got numpy.ndarray"),
        (out[..., :-1], ValueError, r"dout must have shape \(2, 5, 4, 6\) .*, got \(2, 5, 4, 5\)"),
        (out.sum(), ValueError, r"dout must have shape \(2, 5, 4, 6\) .*, got \(\)"),
        (out.double(), TypeError, r"dout must be float32 .*, got float64"),
        (out.to("meta"), ValueError, r"dout must be on q's device, cpu, got meta"),
        (out.to_sparse(), TypeError, r"dout must be a dense tensor, got a torch.sparse_coo one"),
    ):
        with pytest.raises(error, match=message):
            anyattn.attention_backward(dout, *inputs, out, lse)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k": torch.ones(2, 7, 3, 8, device="meta")}, ValueError, r"v: heads must equal k's, 3, got 2"),
        ({"k": torch.ones(2, 7, 2, 8, device="meta").int()}, TypeError, r"k must be float16, .*, got int32"),
        ({"softcap": -1.0}, ValueError, r"softcap must be > 0"),
        ({"window": (-2, 0)}, ValueError, r"window must be >= 0 on each side"),
        ({"layout": "hbsd"}, ValueError, r"layout must be 'bshd' or 'bhsd', got 'hbsd'"),
    ],
)
def test_bad_input_without_memory(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = operands("meta")
    assert anyattn.attention(q, k, v).shape == (2, 5, 4, 6)
    with pytest.raises(error, match=message):
        anyattn.attention(**{"q": q, "k": k, "v": v, **changes})


def test_bad_backward_without_memory() -> None:
    inputs = operands("meta")
    out, lse = anyattn.attention(*inputs, return_lse=True)
    assert [x.shape for x in anyattn.attention_backward(out, *inputs, out, lse)] == [x.shape for x in inputs]
    with pytest.raises(ValueError, match=r"dout must have shape \(2, 5, 4, 6\) .*, got \(2, 5, 4, 5\)"):
        anyattn.attention_backward(out[..., :-1], *inputs, out, lse)


def test_other_devices() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(2, 3, 4, 8, device="xpu")
        with pytest.raises(ValueError, match=r"q must be on the CPU or a CUDA device, got xpu:0"):
            anyattn.attention(q, q, q)


# --- CUDA ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [{}, {"s_q": 1, "s_k": 2100}], ids=["small", "many_keys"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_graph_replays_on_new_contents(options: dict[str, Any], sizes: dict[str, int]) -> None:
    options = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    inputs = operands("cuda", torch.bfloat16, grad=True, **sizes)
    dout = torch.randn_like(anyattn.attention(*inputs))

    def step() -> list[Tensor]:
        out = anyattn.attention(*inputs, **options, deterministic=True)
        return [out.detach(), *torch.autograd.grad(out, inputs, dout)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            for x in (*inputs, dout):
                x.copy_(torch.randn_like(x))
        graph.replay()
        for found, wanted in zip(captured, step(), strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.gpu
def test_graph_replays_varlen_on_new_offsets() -> None:
    q, k, v, cu_q, cu_k = packed("cuda")
    call = lambda: anyattn.attention_varlen(q, k, v, cu_q, cu_k, 9, 11, causal=True)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for offsets in ([0, 4, 4, 9], [0, 9, 9, 9], [0, 1, 2, 9]):
        cu_q.copy_(torch.tensor(offsets))
        graph.replay()
        assert torch.equal(captured, call())


@pytest.mark.gpu
def test_compiled_with_cuda_graphs() -> None:
    pytest.importorskip("triton")
    compiled = torch.compile(lambda q, k, v: anyattn.attention(q * 2, k, v), mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        inputs = operands("cuda", torch.bfloat16, grad=True)
        wanted = gradients(lambda q, k, v: anyattn.attention(q * 2, k, v), *inputs)
        torch.compiler.cudagraph_mark_step_begin()
        for x, y in zip(gradients(compiled, *inputs), wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [*OPTIONS, {"dropout": 0.5}], ids=str)
def test_nothing_waits_for_the_gpu(options: dict[str, Any]) -> None:
    options = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    inputs = operands("cuda", grad=True)
    q, k, v, cu_q, cu_k = packed("cuda")
    packed_inputs = [x.requires_grad_() for x in (q, k, v)]

    def calls() -> None:
        anyattn.attention(*(x.detach() for x in inputs), **options)
        anyattn.attention(*inputs, **options).sum().backward()
        anyattn.attention_varlen(*packed_inputs, cu_q, cu_k, 5, 5, **options).sum().backward()

    calls()
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_backward_runs_on_the_stream_of_the_forward() -> None:
    inputs = operands("cuda", s_q=2048, s_k=2048, d=64, d_v=64, grad=True)
    dout = randn(2, 2048, 4, 64, device="cuda")
    torch.cuda.synchronize()
    wanted = torch.autograd.grad(anyattn.attention(*inputs, deterministic=True), inputs, dout)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = [x * 1 for x in inputs]
        out = anyattn.attention(*late, deterministic=True)
    stream.synchronize()
    assert all(map(torch.equal, torch.autograd.grad(out, inputs, dout), wanted))


@pytest.mark.gpu
def test_raw_stream() -> None:
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            assert adapter._raw_stream(0) == adapter._current_stream(0) == stream.cuda_stream


@pytest.mark.gpu
def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = operands("cuda:1", grad=True)
    out = anyattn.attention(*inputs)
    assert out.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    close(gradients(anyattn.attention, *inputs), gradients(plain, *inputs))
    with pytest.raises(ValueError, match=r"k must be on q's device, cuda:1, got cuda:0"):
        anyattn.attention(inputs[0], inputs[1].to("cuda:0"), inputs[2])


@pytest.fixture
def second_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Tensors in host memory pass for tensors on device 1, which exists no more than device 0, the current one."""
    kernels = HostKernels()
    gpu = SimpleNamespace(current=0, asked=[])

    class Device:
        def __init__(self, ordinal: int) -> None:
            self.ordinal = ordinal

        def __enter__(self) -> None:
            self.before, gpu.current = gpu.current, self.ordinal

        def __exit__(self, *_: Any) -> None:
            gpu.current = self.before

    def on_current(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (gpu.asked.append((what, gpu.current)), function(*args, **kwargs))[1]

    from_key = adapter._from_key
    monkeypatch.setattr(adapter, "_from_key", lambda *key: from_key(*key[:3], 1, key[4]))
    monkeypatch.setattr(adapter, "_raw_stream", lambda device: STREAM)
    monkeypatch.setattr(adapter, "_current_device", lambda: gpu.current)
    monkeypatch.setattr(torch.cuda, "device", Device)
    empty = on_current("empty", lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype))
    monkeypatch.setattr(adapter, "_empty_cuda", empty)
    for name in ("forward", "backward", "workspace_bytes"):
        monkeypatch.setattr(launch, name, on_current(name, getattr(kernels, name)))
    caches = (adapter._dense, adapter._cached_backward, adapter._kinds)
    for cache in caches:
        cache.cache_clear()
    yield gpu
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("workspace", [0, 1000])
def test_the_tensors_device_is_current_for_the_work(
    workspace: int, second_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not workspace:
        needed = launch.workspace_bytes
        monkeypatch.setattr(launch, "workspace_bytes", lambda call: 0 if isinstance(call, Problem) else needed(call))
    inputs = operands(grad=True)
    for _ in range(4):  # by and by the call is known again
        close(gradients(anyattn.attention, *inputs), gradients(plain, *inputs))
        with torch.no_grad():
            close(anyattn.attention(*inputs), plain(*inputs))
            out, lse = anyattn.attention(*inputs, return_lse=True)
        assert lse.isfinite().all()
        close(out, plain(*inputs))
    assert {device for _, device in second_gpu.asked} == {1}
    assert {"empty", "forward", "backward"} <= {what for what, _ in second_gpu.asked}
    assert second_gpu.current == 0


def test_no_lse_unless_asked_for(second_gpu: Any) -> None:
    inputs = operands()
    for _ in range(4):
        second_gpu.asked.clear()
        anyattn.attention(*inputs)
        assert [what for what, _ in second_gpu.asked].count("empty") == 2  # out, and the workspace of these kernels


@pytest.mark.gpu
def test_devices_do_not_mix() -> None:
    q, k, v = operands("cuda")
    with pytest.raises(ValueError, match=r"k must be on q's device, cuda:0, got cpu"):
        anyattn.attention(q, k.cpu(), v)
    with pytest.raises(ValueError, match=r"alibi_slopes must be on q's device, cuda:0, got host memory"):
        anyattn.attention(q, k, v, alibi_slopes=torch.ones(4))
    with pytest.raises(ValueError, match=r"backend='cpu' needs tensors in host memory, got q on cuda:0"):
        anyattn.attention(q, k, v, backend="cpu")


@pytest.mark.gpu
def test_host_tensors_on_the_gpu() -> None:
    inputs = operands(grad=True)
    out = anyattn.attention(*inputs, backend="cuda")
    assert out.device.type == "cpu"
    close(out, plain(*inputs))
    close(gradients(lambda *x: anyattn.attention(*x, backend="cuda"), *inputs), gradients(plain, *inputs))


@pytest.mark.gpu
def test_no_memory_is_kept() -> None:
    inputs = operands("cuda", torch.bfloat16, s_q=512, s_k=512, d=64, d_v=64, grad=True)

    def step() -> None:
        torch.autograd.grad(anyattn.attention(*inputs, dropout=0.1).sum(), inputs)
        anyattn.attention(*(x.detach() for x in inputs))

    step()
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        step()
    assert torch.cuda.memory_allocated() == before  # without waiting for the collector of cycles


@pytest.mark.gpu
def test_forward_allocates_its_results_only() -> None:
    q, k, v = operands("cuda", torch.bfloat16, s_q=4096, s_k=4096, d=64, d_v=64)
    anyattn.attention(q, k, v)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse = anyattn.attention(q, k, v, return_lse=True)
    # And a counter of tiles where the kernel wants one: four bytes, of which the allocator makes 512.
    counter = anyattn.explain(q, k, v).forward.workspace_bytes
    assert counter in (0, 4)
    assert torch.cuda.max_memory_allocated() - before == out.nbytes + lse.nbytes + 128 * counter


@pytest.mark.gpu
def test_out_of_memory() -> None:
    """PyTorch's own error, and nothing left behind."""
    q, k, v = operands("cuda", torch.float16, b=1, s_q=1 << 16, s_k=128, d=64, d_v=256, grad=True)
    anyattn.attention(q, k, v)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - before
    fraction = (before + (64 << 20)) / torch.cuda.get_device_properties(0).total_memory
    assert free > 256 << 20
    torch.cuda.set_per_process_memory_fraction(fraction)
    try:
        for inputs in ((q, k, v), [x.detach() for x in (q, k, v)]):
            with pytest.raises(torch.OutOfMemoryError):
                anyattn.attention(*inputs)
            assert torch.cuda.memory_allocated() == before
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    found, wanted = anyattn.attention(q, k, v)[:, :8], plain(q[:, :8].float(), k.float(), v.float())
    torch.testing.assert_close(found.float(), wanted, rtol=1e-2, atol=1e-3)
