"""PyTorch: CUDA tensors go straight to the kernels, CPU tensors to `anyattn.host`.

A call takes the shortest way that serves it:

    eager, no gradient    _forward                              no PyTorch machinery at all
    eager, gradient       _EagerAttention                       an autograd.Function
    anything else         torch.ops.anyattn.attention_forward   torch.compile, make_fx, fake and meta tensors, dispatch
                          torch.ops.anyattn.attention_backward  modes, functorch

The operators run the same `_forward` and `_backward`; no tracer sees the inside of these two. An eager call like an
earlier one goes to them without its tensors being looked at one by one (`_Kind`).

Dropout without a seed draws one from PyTorch's default CPU generator: `torch.manual_seed` makes it reproducible and the
GPU is never waited for. A captured CUDA graph therefore replays the mask it was captured with.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import lru_cache
from typing import Any, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor, is_grad_enabled
from torch._C import (
    _dispatch_tls_is_dispatch_key_included,
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
)
from torch._C._dynamo import guards
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from anyattn import host, launch
from anyattn import problem as core
from anyattn.problem import BackwardProblem, Options, Problem, View

_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
_LSE_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_DTYPES = {dtype: str(dtype).removeprefix("torch.") for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


class _Call(NamedTuple):
    """All of a call but q, k and v."""

    alibi_slopes: Tensor | None
    seed: Tensor | None  # 0-d int64 on the CPU; None = no dropout
    cu_seqlens_q: Tensor | None  # None = dense
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    options: Options
    backend: str


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    *,
    alibi_slopes: Tensor | None,
    seed: int | None,
    return_lse: bool,
    backend: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """`anyattn.attention` of tensors. out is differentiable with respect to q, k and v; the LSE is not."""
    known = None
    if alibi_slopes is None and not _dropout(options) and not is_compiling():
        # Under autocast no guard made without it holds: there is no need to ask.
        kind = _kind(options, backend, None)
        known = kind.recall(q, k, v) if kind else None
    if known:
        out, lse = _carry_out(q, k, v, known, return_lse)
    else:
        call = _Call(alibi_slopes, _seed(seed, options), None, None, 0, 0, options, backend)
        out, lse = _attention(q, k, v, call, return_lse)
    return (out, lse) if return_lse else out


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: Options,
    *,
    alibi_slopes: Tensor | None,
    seed: int | None,
    return_lse: bool,
    backend: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """`anyattn.attention_varlen` of tensors, differentiable as `attention` is."""
    core.check_array("cu_seqlens_q", cu_seqlens_q, Tensor)
    core.check_array("cu_seqlens_k", cu_seqlens_k, Tensor)
    drawn = _seed(seed, options)
    call = _Call(alibi_slopes, drawn, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options, backend)
    out, lse = _attention(q, k, v, call, return_lse)
    return (out, lse) if return_lse else out


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    *,
    alibi_slopes: Tensor | None,
    seed: int | None,
    backend: str,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`anyattn.attention_backward` of tensors; packed with cu_seqlens. The gradients are not differentiable.

    Under autocast it takes what `attention` returned there, and gives gradients of q's, k's and v's dtypes.
    """
    offsets = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    call = _Call(alibi_slopes, _seed(seed, options), *offsets, options, backend)
    if not (is_compiling() or _is_any_autocast_enabled()):
        return _attention_backward(dout, q, k, v, out, lse, call)
    dq, dk, dv = _attention_backward(
        _autocast(dout), _autocast(q), _autocast(k), _autocast(v), _autocast(out), lse, call
    )
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def under_this_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as it runs now, whether or not autocast is on when it is called."""
    if is_compiling() or not _is_any_autocast_enabled():
        return function
    dtypes = {kind: torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)}

    def call(*args: Any) -> Any:
        with ExitStack() as stack:
            for kind, dtype in dtypes.items():
                stack.enter_context(torch.autocast(kind, dtype))
            return function(*args)

    return call


def describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    alibi_slopes: Tensor | None,
    backend: str,
) -> Problem:
    """The problem that a call would be; raises what the call would raise."""
    if torch.are_deterministic_algorithms_enabled():
        options = options._replace(deterministic=True)
    offsets = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    call = _Call(alibi_slopes, None, *offsets, options, backend)
    q, k, v = _autocast(q), _autocast(k), _autocast(v)
    _check_tensors(q, k, v, call)
    problem = _problem(q, k, v, call, options)
    _extras(problem, call)  # checks the rest
    return problem


def fresh_seed() -> int:
    """A dropout seed from PyTorch's default generator."""
    return int(torch.randint(2**63 - 1, (), device="cpu"))


# ------------------------------------------------------------------------------------------------ which way


def _attention(q: Tensor, k: Tensor, v: Tensor, call: _Call, return_lse: bool) -> tuple[Tensor, Any]:
    core.check_array("q", q, Tensor)
    compiling = is_compiling()
    autocast = compiling or _is_any_autocast_enabled()
    kind = None
    if not compiling and not q.is_meta:  # for which PyTorch has no autocast
        kind = _kind_of(call, torch.get_autocast_dtype(q.device.type) if autocast else None)
    known = kind.recall(q, k, v) if kind and autocast else None  # without autocast, `attention` has asked already
    if known is None:
        slopes = call.alibi_slopes
        if isinstance(slopes, Tensor) and slopes.requires_grad and is_grad_enabled():
            raise ValueError("alibi_slopes must not require grad, as they get none: pass alibi_slopes.detach()")
        if autocast:
            q, k, v = _autocast(q), _autocast(k), _autocast(v)
        if compiling or not _eager(q, k, v):
            _check_tensors(q, k, v, call)
            if not compiling:
                _check_call(q, k, v, call)
            if compiling or peek_interpreter_stack() is None:
                return _forward_operator(q, k, v, *_flat(call))
            return _apply_transformed(q, k, v, call)
        problem = _problem(q, k, v, call, call.options)
        known = _Known(problem, call, _extras(problem, call), _any_requires_grad(q, k, v))
        if kind:
            kind.remember(known, q, k, v)
    return _carry_out(q, k, v, known, return_lse)


def _carry_out(q: Tensor, k: Tensor, v: Tensor, known: _Known, return_lse: bool) -> tuple[Tensor, Any]:
    problem, call, extras, requires_grad = known
    if (requires_grad and is_grad_enabled()) or _forward_mode():
        return _apply_eagerly(q, k, v, call, problem, extras)
    return _forward(q, k, v, problem, extras, return_lse)


def _attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: _Call
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = dout, q, k, v, out, lse
    compiling = is_compiling()
    kind = None if compiling else _kind_of(call, torch.are_deterministic_algorithms_enabled())
    known = kind.recall(*tensors) if kind else None
    if known is None:
        if compiling or not _eager(q, k, v, dout, out, lse):
            _check_tensors(q, k, v, call, dout=dout, out=out, lse=lse)
            if not compiling:
                _check_call(q, k, v, call, dout, out, lse)
            if compiling or peek_interpreter_stack() is None:
                return _backward_operator(*tensors, *_flat(call))
            return _apply_gradients(*tensors, call)
        bp = _backward_problem(*tensors, call)
        known = _Known(bp, call, _extras(bp.problem, call), _any_requires_grad(*tensors))
        if kind:
            kind.remember(known, *tensors)
    if (known.requires_grad and is_grad_enabled()) or _forward_mode():  # create_graph=True
        return _apply_gradients(*tensors, call)
    return _backward(*tensors, known.problem, known.extras)


def _eager(*tensors: Tensor) -> bool:
    """Whether tensors are plain memory, all of the CPU or all of GPUs, and nothing records what is done to them."""
    if (
        _len_torch_dispatch_stack() != 0
        or peek_interpreter_stack() is not None  # functorch
        or _dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)  # make_fx(pre_dispatch=True)
        or _get_tracing_state() is not None  # torch.jit.trace
    ):
        return False
    cuda = tensors[0].is_cuda
    for x in tensors:
        if type(x) not in _PLAIN or x.is_cuda is not cuda or not (cuda or x.is_cpu):
            return False
        if x.dtype is not torch.bfloat16 and x.is_neg():  # the imaginary part of a conjugate, yet to be negated
            return False
        try:
            x.data_ptr()
        except RuntimeError:  # a wrapper that outlives its transformation (torch.func.vjp), or of is_grads_batched
            return False
    return True


def _any_requires_grad(*tensors: Tensor) -> bool:
    return any(x.requires_grad for x in tensors)


def _forward_mode() -> bool:
    """Differentiation that the Functions refuse and the operators would ignore."""
    return forward_ad._current_level >= 0


def _autocast(x: Tensor) -> Tensor:
    """Cast as autocast casts the operands of scaled_dot_product_attention: every real dtype but float64."""
    if not isinstance(x, Tensor) or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x
    eligible = x.is_floating_point() and x.dtype is not torch.float64
    return x.to(torch.get_autocast_dtype(x.device.type)) if eligible else x


def _dropout(options: Options) -> float:
    dropout = options.dropout
    return dropout if type(dropout) is float else core.check_dropout(dropout)  # an array would not do for a condition


def _seed(seed: int | None, options: Options) -> Tensor | None:
    """The dropout seed as a 0-d int64 tensor on the CPU: an operator can take it, and reading it waits for no GPU."""
    if not _dropout(options):
        return None
    if seed is None:
        return torch.randint(2**63 - 1, (), device="cpu")
    return torch.full((), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device="cpu")


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, call: _Call, **others: Tensor) -> None:
    """What the operators would not name: another library's array, a device that is neither a CPU nor a GPU."""
    if q.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"q must be on the CPU or a CUDA device, got {q.device}")
    optional = {"alibi_slopes": call.alibi_slopes, "cu_seqlens_q": call.cu_seqlens_q, "cu_seqlens_k": call.cu_seqlens_k}
    others = {"k": k, "v": v, **others, **{name: x for name, x in optional.items() if x is not None}}
    for name, x in {"q": q, **others}.items():
        _check_dense(name, x)
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device, {q.device}, got {x.device}")


def _check_call(q: Tensor, k: Tensor, v: Tensor, call: _Call, *others: Tensor) -> None:
    """What the operators would refuse in PyTorch's words or not at all, since their schema casts. `others`: dout, out
    and lse."""
    if _concrete(call, q, k, v, *others):
        problem = _problem_of_views(_abstract_view, q, k, v, call, call.options)
        if others:
            names = zip(("dout", "out", "lse"), others, strict=True)
            core.backward(problem, *(_abstract_view(name, x) for name, x in names))


def _check_dense(name: str, x: Tensor) -> None:
    core.check_array(name, x, Tensor)
    if x.is_nested or x.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got a {'nested' if x.is_nested else x.layout} one")


# ------------------------------------------------------------------------------------------------ the work itself


def _forward(
    q: Tensor, k: Tensor, v: Tensor, problem: Problem, extras: dict[str, Any], return_lse: bool = True
) -> tuple[Tensor, Any]:
    """out, contiguous in the caller's layout, and the LSE; None for that if nobody wants it, on a GPU."""
    device = problem.device
    if device >= 0 and _current_device() != device:
        with torch.cuda.device(device):
            return _forward(q, k, v, problem, extras, return_lse)
    empty = _empty_on(device)
    out = empty(problem.out_shape, q.dtype)
    lse: Any = empty(problem.lse_shape, _LSE_DTYPES[problem.lse_dtype]) if return_lse or device < 0 else None
    if device < 0:
        host.forward(problem, *(_array(x) for x in (q, k, v, out, lse)), **extras)
        return out, lse
    if size := launch.workspace_bytes(problem):  # often 0
        workspace = empty((size,), torch.uint8)
        extras = {**extras, "workspace": workspace.data_ptr()}
    lse_ptr = 0 if lse is None else lse.data_ptr()
    # One by one: to unpack a tuple of them takes as long again as the call.
    launch.forward(
        problem, q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse_ptr, _raw_stream(device), **extras
    )
    return out, lse


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bp: BackwardProblem, extras: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, contiguous in the caller's layout."""
    if bp.dout_strides[-1] != 1:  # expanded, as by out.sum(): a copy costs less than loads of one element at a time
        dout = dout.contiguous()
        bp = _cached_backward(bp.problem, _key(dout), _key(out), _key(lse))
    device = bp.problem.device
    if device >= 0 and _current_device() != device:
        with torch.cuda.device(device):
            return _backward(dout, q, k, v, out, lse, bp, extras)
    empty = _empty_on(device)
    dq, dk, dv = (empty(shape, q.dtype) for shape in (bp.dq_shape, bp.dk_shape, bp.dv_shape))
    if device < 0:
        host.backward(bp, *(_array(x) for x in (dout, q, k, v, out, lse, dq, dk, dv)), **extras)
    else:
        workspace = empty((launch.workspace_bytes(bp),), torch.uint8)
        inputs = dout.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr()
        outputs = dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), workspace.data_ptr()
        launch.backward(bp, *inputs, *outputs, _raw_stream(device), **extras)
    return dq, dk, dv


def _empty_on(device: int) -> Callable[[tuple[int, ...], torch.dtype], Tensor]:
    """What allocates contiguous tensors in host memory or on the current device."""
    return _empty_on_host if device < 0 else _empty_on_current


def _empty_on_host(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")


def _empty_on_current(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return _empty_cuda(shape, _row_major(shape), dtype)


def _problem(q: Tensor, k: Tensor, v: Tensor, call: _Call, options: Options) -> Problem:
    if call.cu_seqlens_q is None and call.alibi_slopes is None:
        try:
            return _dense(*_key(q), *_key(k), *_key(v), options)
        except (AttributeError, RuntimeError, TypeError, ValueError):  # what is wrong will be named on the way below
            pass
    return _problem_of_views(_view, q, k, v, call, options)


def _problem_of_views(
    view: Callable[[str, Tensor], View], q: Tensor, k: Tensor, v: Tensor, call: _Call, options: Options
) -> Problem:
    views = view("q", q), view("k", k), view("v", v)
    slopes = None if call.alibi_slopes is None else view("alibi_slopes", call.alibi_slopes)
    if call.cu_seqlens_q is None or call.cu_seqlens_k is None:
        return core.dense(*views, slopes, options)
    offsets = view("cu_seqlens_q", call.cu_seqlens_q), view("cu_seqlens_k", call.cu_seqlens_k)
    return core.varlen(*views, *offsets, call.max_seqlen_q, call.max_seqlen_k, slopes, options)


def _backward_problem(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: _Call
) -> BackwardProblem:
    options = call.options
    if torch.are_deterministic_algorithms_enabled():
        options = options._replace(deterministic=True)
    problem = _problem(q, k, v, call, options)
    try:
        return _cached_backward(problem, _key(dout), _key(out), _key(lse))
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return core.backward(problem, _view("dout", dout), _view("out", out), _view("lse", lse))


class _Known(NamedTuple):
    """All that is the same in calls of which nothing but the tensors' contents and addresses differs."""

    problem: Any  # a Problem or BackwardProblem
    call: _Call
    extras: dict[str, Any]
    requires_grad: bool  # of any of the tensors


class _Kind:
    """Calls with the same arguments besides the tensors: what is known of the last few, and guards that tell which.

    The guards are torch.compile's: at one glance they compare types, dtypes, devices, shapes, strides, requires_grad
    and the dispatch keys in force, by which functorch, tracers and autocast show. To ask for all that takes five times
    as long.
    """

    def __init__(self) -> None:
        self._known: tuple[tuple[_Known, Callable[..., bool]], ...] = ()
        self._once: set[Any] = set()  # guards take 6 us to make: for the second call like it

    def recall(self, *tensors: Tensor) -> _Known | None:
        """What is known of the call with these."""
        if self._known and _len_torch_dispatch_stack() == 0 and _guarded(tensors):
            for known, same in self._known:
                if same(*tensors):
                    return known
        return None

    def remember(self, known: _Known, *tensors: Tensor) -> None:
        problem = known.problem
        if problem not in self._once:
            if len(self._once) == 64:
                self._once.clear()
            self._once.add(problem)
        elif _TensorGuards and _guarded(tensors) and len({id(x) for x in tensors}) == len(tensors):
            self._once.discard(problem)
            sizes, strides = [list(x.shape) for x in tensors], [list(x.stride()) for x in tensors]
            same = _TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
            self._known = ((known, same), *self._known[:3])


def _guarded(tensors: tuple[Tensor, ...]) -> bool:
    """Whether guards may be asked: they don't see how memory is aligned, and at nested tensors abort the process."""
    addresses = 0
    try:
        for x in tensors:
            if x.is_nested:
                return False
            addresses |= x.data_ptr()
    except (AttributeError, RuntimeError, TypeError):  # no tensors, or without memory
        return False
    return addresses & 15 == 0


def _kind_of(call: _Call, setting: Any) -> _Kind | None:
    """None where an argument is a tensor: there is no telling such calls by their arguments."""
    if call.alibi_slopes is not None or call.seed is not None or call.cu_seqlens_q is not None:
        return None
    return _kind(call.options, call.backend, setting)


def _kind(options: Options, backend: str, setting: Any) -> _Kind | None:
    """Calls without other tensors. `setting` is what the guards don't see: autocast's dtype, if it is on, of a forward
    call, whether algorithms are to be deterministic of a backward call. None where an option will be refused."""
    try:
        return _kinds(options, backend, setting)
    except (TypeError, ValueError):
        return None


@lru_cache(maxsize=4096)
def _kinds(options: Options, backend: str, setting: Any) -> _Kind:
    core.check_options(options)  # else a tensor among them would be kept
    return _Kind()


# `anyattn.problem` has caches too, but the Views that key them take longer to build than all the rest of a look-up.

_Key = tuple[torch.Size, tuple[int, ...], torch.dtype, int, int]


def _key(x: Tensor) -> _Key:
    return x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() & 15


def _from_key(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, device: int, ptr: int) -> View:
    return View(ptr, tuple(shape), strides, _DTYPES[dtype], device)


_row_major = lru_cache(maxsize=4096)(core.row_major)


@lru_cache(maxsize=4096)
def _dense(*keys_and_options: Any) -> Problem:
    """The problem of a dense call without slopes, from the keys of q, k and v in a row."""
    *keys, options = keys_and_options
    q, k, v = (_from_key(*keys[i : i + 5]) for i in (0, 5, 10))
    return core.dense(q, k, v, None, options)


@lru_cache(maxsize=4096)
def _cached_backward(problem: Problem, dout: _Key, out: _Key, lse: _Key) -> BackwardProblem:
    return core.backward(problem, _from_key(*dout), _from_key(*out), _from_key(*lse))


def _view(name: str, x: Tensor) -> View:
    _check_dense(name, x)
    if not (x.is_cpu or x.is_cuda):
        raise ValueError(f"{name} must be on the CPU or a CUDA device, got {x.device}")
    return _from_key(*_key(x))


def _array(x: Tensor) -> npt.NDArray[Any]:
    """The tensor's memory as NumPy sees it, bfloat16 as its bits."""
    x = x.detach()
    return (x.view(torch.uint16) if x.dtype is torch.bfloat16 else x).numpy()


def _extras(problem: Problem, call: _Call) -> dict[str, Any]:
    """The keyword arguments of `anyattn.host` or `anyattn.launch`."""
    extras: dict[str, Any] = {}
    on_gpu = problem.device >= 0
    if on_gpu and call.backend == "cpu":
        raise ValueError(f"backend='cpu' needs tensors in host memory, got q on cuda:{problem.device}")
    if not on_gpu:
        extras["backend"] = call.backend
    if call.seed is not None:
        extras["seed"] = int(call.seed) % 2**64
    if call.alibi_slopes is not None:
        extras["alibi"] = call.alibi_slopes.data_ptr() if on_gpu else _array(call.alibi_slopes)
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
        offsets = {"cu_seqlens_q": call.cu_seqlens_q, "cu_seqlens_k": call.cu_seqlens_k}
        extras |= {name: x.data_ptr() if on_gpu else _array(x) for name, x in offsets.items()}
        if not on_gpu:
            core.check_cu_seqlens("cu_seqlens_q", extras["cu_seqlens_q"], problem.total_q, problem.seqlen_q)
            core.check_cu_seqlens("cu_seqlens_k", extras["cu_seqlens_k"], problem.total_k, problem.seqlen_k)
    return extras


def _current_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _current_stream)
# As Inductor's code allocates: on the current device, without the dispatcher.
_empty_cuda: Callable[..., Tensor] = getattr(guards, "_empty_strided_cuda", None) or (
    lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device="cuda")
)
_TensorGuards: Callable[..., Any] | None = getattr(guards, "TensorGuards", None)
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


# ------------------------------------------------------------------------------------------------ gradients


def _save(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: _Call, out: Tensor, lse: Tensor) -> None:
    ctx.save_for_backward(q, k, v, out, lse, *call[:4])
    ctx.rest = call[4:]
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # no zeros for the gradient that the LSE doesn't have


def _differentiate(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if dout is None:
        return None, None, None
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    return _attention_backward(dout, q, k, v, out, lse, _Call(*tensors, *ctx.rest))


def _refuse_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError("anyattn.attention has first derivatives only: its gradients can't be differentiated")


def _refuse_forward_mode(ctx: Any, *tangents: Tensor) -> None:
    raise NotImplementedError("anyattn.attention has no forward-mode derivative: use backward, grad or vjp")


class _EagerAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: _Call, problem: Problem, extras: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        out, lse = _forward(q, k, v, problem, extras)
        _save(ctx, q, k, v, call, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: None) -> tuple[Tensor | None, ...]:
        return *_differentiate(ctx, dout), None, None, None

    jvp = staticmethod(_refuse_forward_mode)


class _Attention(torch.autograd.Function):
    """The same in the form that functorch's transformations ask for, which takes longer to call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
        return (_forward_kernel if _eager(q, k, v) else _forward_operator)(q, k, v, *_flat(call))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, _Call], output: tuple[Tensor, Tensor]) -> None:
        _save(ctx, *inputs, *output)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: None) -> tuple[Tensor | None, ...]:
        return *_differentiate(ctx, dout), None

    jvp = staticmethod(_refuse_forward_mode)


class _Gradients(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: _Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        if _eager(q, k, v, dout, out, lse):
            return _backward_kernel(dout, q, k, v, out, lse, *_flat(call))
        return _backward_operator(dout, q, k, v, out, lse, *_flat(call))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        _refuse_second_derivative(ctx, *gradients)

    jvp = staticmethod(_refuse_forward_mode)


_apply_transformed: Callable[..., tuple[Tensor, Tensor]] = _Attention.apply
_apply_gradients: Callable[..., tuple[Tensor, Tensor, Tensor]] = _Gradients.apply
# Function.apply without the 20 us that it spends on the signature of forward and on functorch.
_apply_eagerly: Callable[..., tuple[Tensor, Tensor]] = super(torch.autograd.Function, _EagerAttention).apply


# ------------------------------------------------------------------------------------------------ operators

_ARGUMENTS = (  # a flat _Call
    "Tensor? alibi_slopes, Tensor? seed, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, bool causal, SymInt[] window, float? scale, float? softcap, float dropout, str layout, "
    "bool deterministic, str backend"
)


def _flat(call: _Call) -> tuple[Any, ...]:
    *head, options, backend = call
    causal, window, *others = options
    pair = window if isinstance(window, tuple) else (window, window)
    sides = [int(n) if isinstance(n, float) and n.is_integer() else -1 if n is None else n for n in pair]
    return *head, causal, sides, *others, backend


def _unflat(flat: tuple[Any, ...]) -> _Call:
    slopes, seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window, *others, backend = flat
    options = Options(causal, tuple(window), *others)
    return _Call(slopes, seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options, backend)


def _forward_kernel(q: Tensor, k: Tensor, v: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    call = _unflat(flat)
    problem = _problem(q, k, v, call, call.options)
    return _forward(q, k, v, problem, _extras(problem, call))


def _abstract_view(name: str, x: Tensor) -> View:
    """Of a tensor without memory; which device it stands for does not matter."""
    return View(0, tuple(x.shape), x.stride(), _DTYPES[x.dtype], -1)


def _concrete(call: _Call, *tensors: Tensor) -> bool:
    """Whether there is no symbol among the sizes."""
    sizes = [n for x in (*tensors, *call[:4]) if x is not None for n in (*x.shape, *x.stride())]
    return all(type(n) is int for n in (*sizes, call.max_seqlen_q, call.max_seqlen_k))


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    call = _unflat(flat)
    _check_call(q, k, v, call)
    lse_shape = list(q.shape[:-1])
    if len(lse_shape) > 1 and call.options.layout == "bshd":  # ..., rows, heads
        lse_shape[-2:] = lse_shape[:-3:-1]
    lse_dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(lse_shape, dtype=lse_dtype)


def _forward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *flat = inputs
    _save(ctx, q, k, v, _unflat(tuple(flat)), *output)


def _forward_gradient(ctx: Any, dout: Tensor | None, dlse: None) -> tuple[Tensor | None, ...]:
    return *_differentiate(ctx, dout), *(None,) * 14


def _backward_kernel(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *flat: Any
) -> tuple[Tensor, Tensor, Tensor]:
    call = _unflat(flat)
    bp = _backward_problem(dout, q, k, v, out, lse, call)
    return _backward(dout, q, k, v, out, lse, bp, _extras(bp.problem, call))


def _backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *flat: Any
) -> tuple[Tensor, Tensor, Tensor]:
    call = _unflat(flat)
    _check_call(q, k, v, call, dout, out, lse)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _register(name: str, inputs: str, outputs: str, kernel: Any, fake: Any, gradient: Any, context: Any = None) -> None:
    torch.library.define(name, f"({inputs}, {_ARGUMENTS}) -> ({outputs})", tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_kernel(name, ["cpu", "cuda"], kernel)
    torch.library.impl(name, "Meta", fake)  # register_fake would search all modules for the source of this line
    torch.library.register_autograd(name, gradient, setup_context=context)


_register(
    "anyattn::attention_forward",
    "Tensor q, Tensor k, Tensor v",
    "Tensor, Tensor",
    _forward_kernel,
    _forward_fake,
    _forward_gradient,
    _forward_context,
)
_register(
    "anyattn::attention_backward",
    "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse",
    "Tensor, Tensor, Tensor",
    _backward_kernel,
    _backward_fake,
    _refuse_second_derivative,
)
_forward_operator: Callable[..., tuple[Tensor, Tensor]] = torch.ops.anyattn.attention_forward.default
_backward_operator: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.ops.anyattn.attention_backward.default
