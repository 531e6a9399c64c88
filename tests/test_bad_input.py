"""Bad input: each message names the argument, what came and what is needed, and nothing is computed."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest

import anyattn
from anyattn import cpu, launch

F32 = np.float32
Q = np.ones((2, 8, 4, 16), F32)
K = np.ones((2, 6, 2, 16), F32)
V = np.ones((2, 6, 2, 24), F32)
ROWS_Q, ROWS_K = np.ones((10, 4, 16), F32), np.ones((12, 2, 16), F32)
CU_Q, CU_K = np.array([0, 4, 10], np.int32), np.array([0, 7, 12], np.int32)

DENSE: dict[str, Any] = {"q": Q, "k": K, "v": V}
VARLEN: dict[str, Any] = {
    "q": ROWS_Q,
    "k": ROWS_K,
    "v": ROWS_K,
    "cu_seqlens_q": CU_Q,
    "cu_seqlens_k": CU_K,
    "max_seqlen_q": 6,
    "max_seqlen_k": 7,
}
BACKWARD: dict[str, Any] = {
    **DENSE,
    "dout": np.ones((2, 8, 4, 24), F32),
    "out": np.ones((2, 8, 4, 24), F32),
    "lse": np.ones((2, 4, 8), F32),
}


class OtherArray:
    """An array of a library that nobody knows."""

    def __dlpack__(self, **_: Any) -> Any:
        raise AssertionError("never asked for")

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


def shaped(*shape: int, dtype: Any = F32) -> np.ndarray[Any, Any]:
    return np.ones(shape, dtype)


ATTENTION = [
    # arrays: kind, rank, dtype
    ({"q": [[1.0, 2.0]]}, TypeError, r"q must be an array of NumPy, .*, got list"),
    ({"q": None}, TypeError, r"q must be an array of NumPy, .*, got NoneType"),
    ({"q": F32(1)}, TypeError, r"q must be a numpy.ndarray, got numpy.float32"),
    ({"k": K.tolist()}, TypeError, r"k must be a numpy.ndarray, as q is, got builtins.list"),
    ({"v": None}, TypeError, r"v must be a numpy.ndarray, as q is, got builtins.NoneType"),
    ({"k": OtherArray()}, TypeError, r"k must be a numpy.ndarray, as q is, got tests.OtherArray"),
    ({"q": OtherArray()}, TypeError, r"q must come from a library with from_dlpack, .*; tests has none"),
    ({"v": np.ma.masked_array(V)}, TypeError, r"v must be a plain array, got a numpy.ma.MaskedArray"),
    ({"q": np.matrix(np.ones((3, 16), F32))}, TypeError, r"q must be a plain array, got a numpy.matrix"),
    ({"q": shaped(16)}, ValueError, r"q must have 2 .*, 3 .* or 4 dimensions, got shape \(16,\)"),
    ({"q": shaped(1, 2, 8, 4, 16)}, ValueError, r"q must have 2 .* or 4 dimensions, got shape \(1, 2, 8, 4, 16\)"),
    ({"k": K[0]}, ValueError, r"k must have q's 4 dimensions \(batch, seqlen, heads, head_dim\), got shape \(6, 2, 16"),
    ({"v": V[None]}, ValueError, r"v must have q's 4 dimensions .*, got shape \(1, 2, 6, 2, 24\)"),
    ({"k": K[0], "layout": "bhsd"}, ValueError, r"k must have q's 4 dimensions \(batch, heads, seqlen, head_dim\)"),
    ({"q": Q.astype(np.int32)}, TypeError, r"q must be float16, bfloat16, float32 or float64, got int32"),
    ({"q": Q.astype(np.complex64)}, TypeError, r"q must be float16, .*, got complex64"),
    ({"q": Q.astype(bool)}, TypeError, r"q must be float16, .*, got bool"),
    ({"q": Q.astype(object)}, TypeError, r"q must be float16, .*, got object"),
    ({"q": Q.astype(">f4")}, TypeError, r"q must be float16, .*, got >f4"),
    ({"k": K.astype(np.int64)}, TypeError, r"k must be float16, .*, got int64"),
    ({"k": K.astype(np.float64)}, TypeError, r"k must have q's dtype, float32, got float64"),
    ({"v": V.astype(np.float16)}, TypeError, r"v must have q's dtype, float32, got float16"),
    # sizes
    ({"k": shaped(3, 6, 2, 16)}, ValueError, r"k: batch must equal q's, 2, got 3"),
    ({"v": shaped(1, 6, 2, 24)}, ValueError, r"v: batch must equal q's, 2, got 1"),
    ({"v": shaped(2, 7, 2, 24)}, ValueError, r"v: seqlen must equal k's, 6, got 7"),
    ({"v": shaped(2, 6, 4, 24)}, ValueError, r"v: heads must equal k's, 2, got 4"),
    ({"k": shaped(2, 6, 3, 16), "v": shaped(2, 6, 3, 24)}, ValueError, r"k: its 3 heads must divide q's 4"),
    ({"k": shaped(2, 6, 0, 16), "v": shaped(2, 6, 0, 24)}, ValueError, r"k: its 0 heads must divide q's 4"),
    ({"k": shaped(2, 6, 2, 32)}, ValueError, r"k: head_dim must equal q's, 16, got 32"),
    (
        {"q": shaped(2, 8, 4, 257), "k": shaped(2, 6, 2, 257)},
        ValueError,
        r"q: head_dim must be from 1 to 256, got 257",
    ),
    ({"q": shaped(2, 8, 4, 0), "k": shaped(2, 6, 2, 0)}, ValueError, r"q: head_dim must be from 1 to 256, got 0"),
    ({"v": shaped(2, 6, 2, 300)}, ValueError, r"v: head_dim must be from 1 to 256, got 300"),
    # options
    ({"layout": "sbhd"}, ValueError, r"layout must be 'bshd' or 'bhsd', got 'sbhd'"),
    ({"layout": None}, ValueError, r"layout must be 'bshd' or 'bhsd', got None"),
    ({"layout": ["bshd"]}, ValueError, r"layout must be 'bshd' or 'bhsd', got \['bshd'\]"),
    ({"causal": "yes"}, TypeError, r"causal must be True or False, got str 'yes'"),
    ({"causal": None}, TypeError, r"causal must be True or False, got NoneType"),
    ({"causal": 2}, TypeError, r"causal must be True or False, got int 2"),
    ({"causal": np.ones((6, 6), bool)}, TypeError, r"causal must be True or False, got ndarray"),
    ({"deterministic": "no"}, TypeError, r"deterministic must be True or False, got str 'no'"),
    ({"window": -2}, ValueError, r"window must be >= 0 on each side, or -1 or None for no bound, got -2"),
    ({"window": (3, -5)}, ValueError, r"window must be >= 0 .*, got -5"),
    ({"window": (1,)}, ValueError, r"window must be an int, a pair \(left, right\) or None, got 1 entries"),
    ({"window": [1, 2, 3]}, ValueError, r"window must be .* a pair .*, got 3 entries"),
    ({"window": (0.5, 1)}, TypeError, r"window must be an int, a pair .*, got float 0.5"),
    ({"window": float("nan")}, TypeError, r"window must be an int, .*, got float nan"),
    ({"window": "3"}, TypeError, r"window must be an int, .*, got str '3'"),
    ({"window": np.array([1, 2])}, TypeError, r"window must be an int, a pair .*, got ndarray"),
    ({"scale": float("nan")}, ValueError, r"scale must be finite, got nan"),
    ({"scale": float("-inf")}, ValueError, r"scale must be finite, got -inf"),
    ({"scale": "1"}, TypeError, r"scale must be a real number or None, got str '1'"),
    ({"scale": 1j}, TypeError, r"scale must be a real number or None, got complex 1j"),
    ({"scale": np.ones(4)}, TypeError, r"scale must be a real number or None, got ndarray"),
    ({"scale": 10**400}, ValueError, r"scale must be finite as a float, got a larger int"),
    (
        {"scale": 3e38},
        ValueError,
        r"scale must be at most 2.36e\+38 in float32, in which scores are computed, got 3e\+38",
    ),
    ({"return_lse": "no"}, TypeError, r"return_lse must be True or False, got str 'no'"),
    ({"return_lse": 2}, TypeError, r"return_lse must be True or False, got int 2"),
    ({"softcap": 0}, ValueError, r"softcap must be > 0, or None for no cap, got 0"),
    ({"softcap": -30.0}, ValueError, r"softcap must be > 0, .*, got -30.0"),
    ({"softcap": float("inf")}, ValueError, r"softcap must be finite, got inf"),
    ({"softcap": 1e-39}, ValueError, r"softcap must be from 1.2e-38 to 2.1e\+37, .* of float32, got 1e-39"),
    ({"softcap": 0.5, "scale": -2e38}, ValueError, r"softcap must be from 0.85 to 2.4e\+38, .* of float32, got 0.5"),
    ({"softcap": 1e38}, ValueError, r"softcap must be from 1.2e-38 to 2.1e\+37, .* of float32, got 1e\+38"),
    ({"softcap": 10**400}, ValueError, r"softcap must be finite as a float, got a larger int"),
    ({"window": (10**400, 0.5)}, TypeError, r"window must be an int, a pair .*, got float 0.5"),
    ({"backend": np.array(["auto", "cpu"])}, ValueError, r"backend must be 'auto', 'cuda' or 'cpu', got array"),
    ({"softcap": "high"}, TypeError, r"softcap must be a real number or None, got str 'high'"),
    ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
    ({"dropout": -0.1}, ValueError, r"dropout must be in \[0, 1\), got -0.1"),
    ({"dropout": float("nan")}, ValueError, r"dropout must be in \[0, 1\), got nan"),
    ({"dropout": None}, TypeError, r"dropout must be a real number in \[0, 1\), got NoneType"),
    ({"dropout": np.zeros(2)}, TypeError, r"dropout must be a .*, got ndarray"),
    ({"dropout": 0.1, "seed": -1}, ValueError, r"seed must be in \[0, 2\*\*64\), got -1"),
    ({"seed": 2**64}, ValueError, r"seed must be in \[0, 2\*\*64\), got 18446744073709551616"),
    ({"seed": 1.5}, TypeError, r"seed must be an int in \[0, 2\*\*64\) or None, got float 1.5"),
    ({"alibi_slopes": [0.5] * 4}, TypeError, r"alibi_slopes must be a numpy.ndarray, as q is, got builtins.list"),
    ({"alibi_slopes": shaped(4, dtype=np.float64)}, TypeError, r"alibi_slopes must be float32, got float64"),
    ({"alibi_slopes": shaped(3)}, ValueError, r"alibi_slopes must have shape .*\(4,\) or \(2, 4\), got \(3,\)"),
    ({"alibi_slopes": shaped(4, 2)}, ValueError, r"alibi_slopes must have shape .*, got \(4, 2\)"),
    ({"alibi_slopes": shaped()}, ValueError, r"alibi_slopes must have shape .*, got \(\)"),
    ({"backend": "gpu"}, ValueError, r"backend must be 'auto', 'cuda' or 'cpu', got 'gpu'"),
    ({"backend": None}, ValueError, r"backend must be 'auto', 'cuda' or 'cpu', got None"),
]

ATTENTION_VARLEN = [
    ({"q": Q}, ValueError, r"q must have 3 dimensions \(total, heads, head_dim\), got shape \(2, 8, 4, 16\)"),
    ({"k": K}, ValueError, r"k must have q's 3 dimensions \(total, heads, head_dim\), got shape"),
    ({"v": ROWS_K[1:]}, ValueError, r"v: total must equal k's, 12, got 11"),
    ({"layout": "bhsd"}, ValueError, r"layout must be 'bshd' for packed sequences .*, got 'bhsd'"),
    ({"cu_seqlens_q": [0, 4, 10]}, TypeError, r"cu_seqlens_q must be a numpy.ndarray, as q is, got builtins.list"),
    ({"cu_seqlens_q": CU_Q.astype(np.int64)}, TypeError, r"cu_seqlens_q must be int32, got int64"),
    ({"cu_seqlens_k": CU_K.astype(F32)}, TypeError, r"cu_seqlens_k must be int32, got float32"),
    ({"cu_seqlens_q": CU_Q[None]}, ValueError, r"cu_seqlens_q must have one dimension, of length batch \+ 1, got"),
    ({"cu_seqlens_q": CU_Q[:0]}, ValueError, r"cu_seqlens_q must have one dimension, .*, got shape \(0,\)"),
    ({"cu_seqlens_k": np.repeat(CU_K, 2)[::2]}, ValueError, r"cu_seqlens_k must be contiguous, got stride 2"),
    ({"cu_seqlens_k": CU_K[1:]}, ValueError, r"cu_seqlens_k must have the length of cu_seqlens_q, .* = 3, got 2"),
    ({"cu_seqlens_q": CU_Q + 1}, ValueError, r"cu_seqlens_q must start at 0, got 1"),
    ({"cu_seqlens_k": np.array([0, 13, 12], np.int32)}, ValueError, r"cu_seqlens_k must ascend, got 13 followed by 12"),
    ({"cu_seqlens_k": np.array([0, 7, 11], np.int32)}, ValueError, r"cu_seqlens_k must end at .*, 12, got 11"),
    ({"cu_seqlens_q": np.array([0, 7, 11], np.int32)}, ValueError, r"cu_seqlens_q must end at .*, 10, got 11"),
    ({"max_seqlen_q": 5}, ValueError, r"max_seqlen_q must be at least the longest sequence, 6 rows .*, got 5"),
    ({"max_seqlen_k": 0}, ValueError, r"max_seqlen_k must be at least the longest sequence, 7 rows .*, got 0"),
    ({"max_seqlen_k": -1}, ValueError, r"max_seqlen_k must be in \[0, 2\*\*30\), got -1"),
    ({"max_seqlen_q": 2**30}, ValueError, r"max_seqlen_q must be in \[0, 2\*\*30\), got 1073741824"),
    ({"max_seqlen_q": 6.5}, TypeError, r"max_seqlen_q must be an int, got float 6.5"),
    ({"max_seqlen_q": None}, TypeError, r"max_seqlen_q must be an int, got NoneType"),
    ({"max_seqlen_k": np.array([7])}, TypeError, r"max_seqlen_k must be an int, got ndarray"),
    ({"alibi_slopes": shaped(3, 4)}, ValueError, r"alibi_slopes must have shape .*\(2, 4\), got \(3, 4\)"),
]

ATTENTION_BACKWARD = [
    ({"dout": shaped(2, 8, 4, 16)}, ValueError, r"dout must have shape \(2, 8, 4, 24\) .*, got \(2, 8, 4, 16\)"),
    ({"dout": shaped(2, 8, 4, 24, dtype=np.float64)}, TypeError, r"dout must be float32 .*, got float64"),
    ({"dout": OtherArray()}, TypeError, r"dout must be a numpy.ndarray, as q is, got tests.OtherArray"),
    ({"dout": None}, TypeError, r"dout must be a numpy.ndarray, as q is, got builtins.NoneType"),
    ({"out": shaped(2, 4, 8, 24)}, ValueError, r"out must have shape \(2, 8, 4, 24\) .*, got \(2, 4, 8, 24\)"),
    ({"lse": shaped(2, 8, 4)}, ValueError, r"lse must have shape \(2, 4, 8\) .*, got \(2, 8, 4\)"),
    ({"lse": shaped(2, 4, 8, dtype=np.float64)}, TypeError, r"lse must be float32 for float32 q, k, v, got float64"),
    ({"dropout": 0.5}, ValueError, r"seed must be the forward call's seed when dropout > 0, got None"),
    ({"dropout": "half"}, TypeError, r"dropout must be a real number in \[0, 1\), got str 'half'"),
    ({"q": Q.astype(np.int8)}, TypeError, r"q must be float16, .*, got int8"),
    ({"cu_seqlens_q": CU_Q}, TypeError, r"cu_seqlens_k is needed beside cu_seqlens_q, got None"),
    ({"max_seqlen_k": 5}, TypeError, r"cu_seqlens_q is needed beside max_seqlen_k, got None"),
    ({"backend": "gpu"}, ValueError, r"backend must be 'auto', 'cuda' or 'cpu', got 'gpu'"),
]

FUNCTIONS = {
    "attention": (DENSE, ATTENTION),
    "attention_vjp": (DENSE, ATTENTION),
    "attention_varlen": (VARLEN, ATTENTION_VARLEN),
    "attention_backward": (BACKWARD, ATTENTION_BACKWARD),
}


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("computed all the same")

    for module in (cpu, launch):
        monkeypatch.setattr(module, "forward", refuse)
        monkeypatch.setattr(module, "backward", refuse)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("function", "changes", "error", "message"),
    [
        pytest.param(function, *row, id=f"{function}-{'-'.join(row[0])}-{i}")
        for function, (_, rows) in FUNCTIONS.items()
        for i, row in enumerate(rows)
    ],
)
def test_bad_input(function: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    good, _ = FUNCTIONS[function]
    with pytest.raises(error, match=message) as caught:
        getattr(anyattn, function)(**{**good, **changes})
    assert type(caught.value) is error
    assert caught.value.__context__ is None or caught.value.__suppress_context__


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_unchanged_call_is_good(function: str) -> None:
    good, _ = FUNCTIONS[function]
    getattr(anyattn, function)(**good)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("backend", ["cuda", "auto"])
def test_no_gpu(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """backend='cuda' without a GPU says what to install; 'auto' goes on to the CPU."""
    monkeypatch.setattr(launch, "available", lambda *_: "CuPy is not installed: pip install 'anyattn[cuda13]'")
    large = np.ones((1, 8192, 16, 64), F32)
    message = r"backend='cuda': CuPy is not installed: pip install"
    error, text = (
        (anyattn.UnsupportedError, message) if backend == "cuda" else (AssertionError, "computed all the same")
    )
    with pytest.raises(error, match=text):
        anyattn.attention(large, large, large, backend=backend)


@pytest.mark.parametrize(
    ("driver", "message"),
    [
        (0, r"there is no NVIDIA driver here: a GPU needs one for CUDA 12 or later"),
        (11080, r"no NVIDIA GPU is usable here, with a driver for CUDA 11\.8 \(insufficient driver\)"),
    ],
)
def test_no_driver_for_it(driver: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def count() -> int:
        raise RuntimeError("insufficient driver")

    runtime = types.SimpleNamespace(getDeviceCount=count, driverGetVersion=lambda: driver)
    cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime))
    monkeypatch.setitem(sys.modules, "cupy", cupy)  # type: ignore[misc]
    monkeypatch.setattr(launch, "_no_gpu", launch._no_gpu.__wrapped__)
    with pytest.raises(anyattn.UnsupportedError, match=message):
        anyattn.attention(Q, K, V, backend="cuda")


def test_the_errors_are_listed() -> None:
    assert set(anyattn.__all__) <= set(dir(anyattn))


def test_unknown_keyword() -> None:
    for function in (anyattn.attention, anyattn.attention_vjp):
        with pytest.raises(TypeError, match="casual"):
            function(Q, K, V, casual=True)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("name", ["k", "v", "alibi_slopes"])
def test_mixed_libraries_torch(name: str) -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=rf"{name} must be a numpy.ndarray, as q is, got torch.Tensor"):
        anyattn.attention(**{**DENSE, name: torch.ones(2, 6, 2, 16)})


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("name", ["k", "v", "alibi_slopes"])
def test_mixed_libraries_jax(name: str) -> None:
    jnp = pytest.importorskip("jax.numpy")
    arrays = {key: jnp.asarray(x) for key, x in DENSE.items()}
    with pytest.raises(TypeError, match=rf"{name} must be a jax.Array, as q is, got numpy.ndarray"):
        anyattn.attention(**{**arrays, name: K})


@pytest.mark.usefixtures("nothing_runs")
def test_jax_tracers() -> None:
    jax = pytest.importorskip("jax")
    for transformed in (jax.jit(anyattn.attention), jax.vmap(anyattn.attention)):
        with pytest.raises(TypeError, match=r"q must be a concrete array, got a JAX tracer"):
            transformed(*(jax.numpy.asarray(x) for x in (Q, K, V)))
