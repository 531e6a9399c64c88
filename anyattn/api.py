"""The public functions. Their signatures and docstrings are the specification.

**Arrays.** NumPy, CuPy, PyTorch and JAX arrays, and any others that speak DLPack or an array interface and whose
library has ``from_dlpack``. Results are arrays of the same library, dtype, device and layout. All arrays of a call come
from one library and live on one device. dtypes: float16, bfloat16, float32, float64 (bfloat16 in host memory: of NumPy,
PyTorch and JAX only, as NumPy's DLPack has none). Strides are free: transposed, broadcast (stride 0), reversed and
misaligned views are taken as they come.

**Layouts.** With B batches, S rows, H heads and head dim D, from 1 to 256:

========== ==================== ================= ==========
layout      4-D                  3-D               2-D
========== ==================== ================= ==========
``"bshd"``  (B, S, H, D)         (S, H, D)         (S, D)
``"bhsd"``  (B, H, S, D)         (H, S, D)         (S, D)
========== ==================== ================= ==========

k and v may have fewer heads than q (H % H_kv == 0; query head h reads head h * H_kv // H), v another head dim.
Lengths may be 0.

**Formula.** With x = scale * q k^T and query i at key position p = i + S_k - S_q (bottom-right alignment),

    score = softcap * tanh(x / softcap) - alibi_slope[h] * abs(p - j),    out = dropout(softmax(score)) v

over the keys j that row i sees. A row that sees no key gives 0, with log-sum-exp -inf and gradients 0. Scores are
float32 (float64 for float64): a row that sees none between -1e8 and 1e8 (1e17) has no digits left; beside others, keys
of -1e30 count as hidden. float32 on a GPU: an infinity that a row sees makes it NaN.

**Where it runs.** ``backend="auto"``: arrays on a GPU run on the GPU kernels, asynchronously, on their device and the
library's current stream; arrays in host memory run on a GPU if there is one and the work is large enough to repay the
copies, else on the CPU. ``"cuda"`` and ``"cpu"`` force it.

**Errors.** TypeError or ValueError naming the argument, what came and what is needed, raised before anything is
launched; :class:`anyattn.UnsupportedError` if there is no usable GPU or no kernel for the call,
:class:`anyattn.CompileError` if a kernel can't be built. Both say what to install.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from anyattn.problem import Options, check_dropout, check_flag, check_seed

if TYPE_CHECKING:
    from anyattn.explanation import Explanation

__all__ = ["attention", "attention_backward", "attention_varlen", "attention_vjp", "explain"]

Window = int | tuple[int | None, int | None] | None

_ADAPTERS: dict[type, Any] = {}  # array type -> module of anyattn.backends
_LIBRARIES = {"numpy": "numpy", "cupy": "cupy", "torch": "torch", "jax": "jax", "jaxlib": "jax"}
_AUTO = "auto"  # as a default the same object: a call without it needs no look at it
_PROTOCOLS = ("__dlpack__", "__cuda_array_interface__", "__array_interface__")


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    dropout: float = 0.0,
    seed: int | None = None,
    layout: str = "bshd",
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str = "auto",
) -> Any:
    """Exact attention: ``softmax(scale * q k^T) v`` without ever storing the S_q x S_k matrix.

    Args:
        q: queries, (B, S_q, H, D) for ``layout="bshd"``, (B, H, S_q, D) for ``"bhsd"``; also 3-D (no batch) and 2-D
            (S_q, D). float16, bfloat16, float32 or float64.
        k: keys, (B, S_k, H_kv, D) or likewise; H % H_kv == 0.
        v: values, (B, S_k, H_kv, D_v) or likewise.
        causal: row i sees only the keys j <= p, where p = i + S_k - S_q.
        window: (left, right): row i sees only the keys p - left <= j <= p + right. -1 or None is unbounded on that
            side; an int n means (n, n).
        scale: factor of the dot products; None = 1 / sqrt(D).
        softcap: cap c > 0: scaled products x become c * tanh(x / c); None = no cap.
        alibi_slopes: float32 array (H,) or (B, H) of q's library and device: ``slope * abs(p - j)`` is taken off the
            scores.
        dropout: probability in [0, 1) of dropping an attention weight; those kept are scaled by 1 / (1 - dropout).
        seed: int in [0, 2**64) that determines the mask, alike on every backend (Philox4x32-10 keyed by batch, head,
            row and column); None = a fresh one per call. Pass one to call :func:`attention_backward` later.
        layout: ``"bshd"`` or ``"bhsd"``.
        return_lse: return ``(out, lse)``.
        deterministic: gradients equal bit for bit from run to run (the forward pass always is).
        backend: ``"auto"``, ``"cuda"`` or ``"cpu"``.

    Returns:
        out: q's shape with D_v as its last dimension; q's library, dtype and device. PyTorch tensors that require
            gradients are differentiable; for other libraries see :func:`attention_vjp`.
        lse: with ``return_lse``: natural-log sum of the exponentials of each row's scores, (B, H, S_q), (H, S_q) or
            (S_q,) whatever the layout; float64 for float64 inputs, else float32. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is needed.
        UnsupportedError, CompileError: the GPU can't do it; see the module's text.
        MemoryError: host arrays, of which one head's keys and values don't fit in the GPU's memory.

    What a row does not see is as if absent: NaN and infinities there reach neither its output nor any gradient.

    Source: FlashAttention-2, Dao 2023 (arXiv:2307.08691), algorithm 1.
    """
    adapter = _ADAPTERS.get(type(q)) or _adapter(q)
    if seed is not None:
        seed = check_seed(seed)
    if backend is not _AUTO:
        _check_backend(backend)
    if return_lse is not False:
        return_lse = check_flag("return_lse", return_lse)
    options = Options(causal, _pair(window), scale, softcap, dropout, layout, deterministic)
    return adapter.attention(
        q, k, v, options, alibi_slopes=alibi_slopes, seed=seed, return_lse=return_lse, backend=backend
    )


def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    dropout: float = 0.0,
    seed: int | None = None,
    layout: str = "bshd",
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str = "auto",
) -> Any:
    """:func:`attention` over sequences of different lengths, packed one after the other without padding.

    Args:
        q: (total_q, H, D): the rows of all sequences.
        k: (total_k, H_kv, D).
        v: (total_k, H_kv, D_v).
        cu_seqlens_q: int32 (B + 1,), on q's device: sequence b has the rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] of
            q. It starts at 0, ascends and ends at total_q. In host memory this is checked. In GPU memory it is not
            read by the host, which would wait for the GPU: the kernels keep every sequence inside the arrays, so that
            wrong offsets give meaningless numbers but no access out of bounds.
        cu_seqlens_k: int32 (B + 1,), likewise for k and v.
        max_seqlen_q: at least the longest sequence of q; rows beyond it are not computed.
        max_seqlen_k: at least the longest sequence of k.
        layout: ``"bshd"``, the only one here.

    The other arguments, the results and the errors are those of :func:`attention`; positions, masks and dropout count
    inside each sequence, alibi_slopes is (H,) or (B, H), and lse is (H, total_q).
    """
    adapter = _ADAPTERS.get(type(q)) or _adapter(q)
    if seed is not None:
        seed = check_seed(seed)
    if backend is not _AUTO:
        _check_backend(backend)
    if return_lse is not False:
        return_lse = check_flag("return_lse", return_lse)
    return adapter.attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        Options(causal, _pair(window), scale, softcap, dropout, layout, deterministic),
        alibi_slopes=alibi_slopes,
        seed=seed,
        return_lse=return_lse,
        backend=backend,
    )


def attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    dropout: float = 0.0,
    seed: int | None = None,
    layout: str = "bshd",
    deterministic: bool = False,
    backend: str = "auto",
) -> tuple[Any, Any, Any]:
    """The gradients of :func:`attention`, or with ``cu_seqlens_*`` and ``max_seqlen_*`` of :func:`attention_varlen`.

    Args:
        dout: the gradient with respect to out; out's shape, dtype and device, any strides.
        q, k, v: as in the forward call.
        out, lse: what the forward call returned with ``return_lse=True``.
        seed: the forward call's; required with dropout.

    All other arguments as in the forward call.

    Returns:
        dq, dk, dv: contiguous arrays of the shapes and dtype of q, k and v.

    Source: FlashAttention-2, Dao 2023 (arXiv:2307.08691), algorithm 2.
    """
    adapter = _ADAPTERS.get(type(q)) or _adapter(q)
    if seed is not None:
        seed = check_seed(seed)
    elif check_dropout(dropout):
        raise ValueError("seed must be the forward call's seed when dropout > 0, got None")
    if backend is not _AUTO:
        _check_backend(backend)
    gradients: tuple[Any, Any, Any] = adapter.attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        Options(causal, _pair(window), scale, softcap, dropout, layout, deterministic),
        alibi_slopes=alibi_slopes,
        seed=seed,
        backend=backend,
        **_packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
    )
    return gradients


def attention_vjp(
    q: Any,
    k: Any,
    v: Any,
    *,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    dropout: float = 0.0,
    seed: int | None = None,
    **same: Any,
) -> tuple[Any, Callable[[Any], tuple[Any, Any, Any]]]:
    """Attention and its pullback, without a framework: ``out, pullback = attention_vjp(q, k, v)``.

    ``dq, dk, dv = pullback(dout)`` gives the gradients of ``sum(dout * out)``; it may be called any number of times.
    The pullback holds q, k, v, out, lse and the seed (drawn here if it is None), and no other memory: it reads these
    very arrays, which must not change before its last call (``x = out + x``, not ``out += x``). The arguments are those
    of :func:`attention`, or with ``cu_seqlens_*`` and ``max_seqlen_*`` those of :func:`attention_varlen`.

    Returns:
        out: as :func:`attention`; with ``return_lse`` the pair (out, lse).
        pullback: a function from dout to (dq, dk, dv).
    """
    return_lse = check_flag("return_lse", return_lse)
    if seed is None and check_dropout(dropout):
        seed = (_ADAPTERS.get(type(q)) or _adapter(q)).fresh_seed()
    same.update(dropout=dropout, seed=seed)
    packing = _packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    forward = attention_varlen if packing else attention
    out, lse = forward(q, k, v, **packing, return_lse=True, **same)

    def pullback(dout: Any) -> tuple[Any, Any, Any]:
        return attention_backward(dout, q, k, v, out, lse, **packing, **same)

    adapter = _ADAPTERS.get(type(q)) or _adapter(q)
    if hasattr(adapter, "under_this_autocast"):  # PyTorch's
        pullback = adapter.under_this_autocast(pullback)
    return ((out, lse) if return_lse else out), pullback


def explain(
    q: Any,
    k: Any,
    v: Any,
    *,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    dropout: float = 0.0,
    seed: int | None = None,
    layout: str = "bshd",
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str = "auto",
) -> Explanation:
    """Which kernels :func:`attention` takes with these arguments, and why: ``print(anyattn.explain(q, k, v))``.

    Nothing is computed and no array is read but ``cu_seqlens_*`` in host memory. Kernels that the cache lacks are
    compiled, for their registers. The arguments are those of :func:`attention`, or with ``cu_seqlens_*`` and
    ``max_seqlen_*`` those of :func:`attention_varlen`; return_lse and the seed's value make no difference.

    Returns:
        An :class:`anyattn.explanation.Explanation`: for the forward and for the backward pass the device and why it is
        this one, the kernels in order (tile, thread blocks, threads, registers, spilled and shared bytes), the
        workspace, the better kernels that don't take the call and why. ``str()`` of it is a report.

    Raises:
        TypeError, ValueError: as the call would. That no kernel takes the call is not raised but told.
    """
    adapter = _ADAPTERS.get(type(q)) or _adapter(q)
    if seed is not None:
        check_seed(seed)
    if backend is not _AUTO:
        _check_backend(backend)
    packing = _packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    problem = adapter.describe(
        q,
        k,
        v,
        Options(causal, _pair(window), scale, softcap, dropout, layout, deterministic),
        *(tuple(packing.values()) or (None, None, 0, 0)),
        alibi_slopes=alibi_slopes,
        backend=backend,
    )
    from anyattn import explanation

    return explanation.explain(problem, backend)


def _packing(
    cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int | None, max_seqlen_k: int | None
) -> dict[str, Any]:
    """The four arguments that packed sequences add, or none."""
    given = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 4:
        return {}
    if missing:
        raise TypeError(f"{missing[0]} is needed beside {next(n for n in given if n not in missing)}, got None")
    return given


def _check_backend(backend: Any) -> None:
    if not isinstance(backend, str) or backend not in ("auto", "cuda", "cpu"):
        raise ValueError(f"backend must be 'auto', 'cuda' or 'cpu', got {backend!r}")


def _pair(window: Any) -> Any:
    return tuple(window) if type(window) is list else window


def _adapter(q: Any) -> Any:
    """The module of anyattn.backends for q's type: its library's own, else the one for whatever speaks DLPack."""
    name = None
    for base in type(q).__mro__:  # no further than needed: torch.compile cannot follow object.__module__
        if name := _LIBRARIES.get(base.__module__.partition(".")[0]):
            break
    if name is None and any(hasattr(q, protocol) for protocol in _PROTOCOLS):
        name = "dlpack"
    if name is None:
        raise TypeError(
            f"q must be an array of NumPy, CuPy, PyTorch, JAX or a library that speaks DLPack, got {type(q).__name__}"
        )
    if name == "torch":  # torch.compile follows an import statement, but not importlib
        from anyattn.backends import torch as adapter
    else:
        adapter = importlib.import_module(f"anyattn.backends.{name}")
    _ADAPTERS[type(q)] = adapter
    return adapter
