"""What `anyattn demo` runs: every array library found, forward and backward, checked and timed."""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import anyattn
from anyattn import launch, reference

SHAPE_CPU = (1, 1024, 8, 64)
SHAPE_GPU = (2, 4096, 16, 64)

# The reference computes at most so many scores: all heads of the smaller shape, the last one of the larger.
CHECKED_SCORES = 2**24

# The largest error that may stand, relative to the largest entry of the exact result.
TOLERANCE = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 1e-5}


@dataclass(frozen=True)
class Subject:
    """One array library on one device."""

    library: str
    device: str
    dtype: str
    shape: tuple[int, int, int, int]  # batch, sequence, heads, head dim
    backend: str
    array: Callable[[npt.NDArray[np.float64]], Any]
    numpy: Callable[[Any], npt.NDArray[np.float64]]  # and back
    wait: Callable[[Any], object]  # until the work that makes this array is done


@dataclass(frozen=True)
class Result:
    direction: str  # "forward" or "backward"
    error: float  # relative to the largest entry of the exact result
    good: bool
    seconds: float
    flops: float  # floating-point operations, as the FlashAttention papers count them


def find_subjects() -> tuple[list[Subject], list[str]]:
    """What there is to run here, and for the rest what to install."""
    problem = launch.available()
    subjects = [_numpy("cpu")]
    hints = []
    if problem:
        hints.append(f"GPU: {problem}")
    else:
        subjects += [_numpy("cuda"), _cupy()]
    for name, find in (("torch", _torch), ("jax", _jax)):
        try:
            module = importlib.import_module(name)
        except ImportError:
            hints.append(f"{name}: pip install 'anyattn[{name}]'")
        else:
            subjects += find(module, gpu=problem is None)
    return subjects, hints


def measure(subject: Subject) -> Iterator[Result]:
    """The forward pass, then the backward pass."""
    batch, seqlen, heads, head_dim = subject.shape
    inputs, exact_out, exact_gradients = _exact(subject.shape)
    q, k, v, dout = map(subject.array, inputs)

    def forward() -> Any:
        return anyattn.attention(q, k, v, causal=True, backend=subject.backend)

    def result(direction: str, outputs: Any, exact: Any, call: Callable[[], Any], flops: float) -> Result:
        pairs = zip(map(subject.numpy, outputs), exact, strict=True)
        error = float(np.max([np.abs(_checked(x) - y).max() / np.abs(y).max() for x, y in pairs]))
        good = error <= TOLERANCE[subject.dtype]  # NaN is not
        return Result(direction, error, good, _time(call, subject.wait), flops)

    out, pullback = anyattn.attention_vjp(q, k, v, causal=True, backend=subject.backend)
    flops = 2.0 * batch * heads * seqlen**2 * head_dim  # half of the square of scores
    yield result("forward", [out], [exact_out], forward, flops)
    yield result("backward", pullback(dout), exact_gradients, lambda: pullback(dout)[0], 2.5 * flops)


def _numpy(backend: str) -> Subject:
    return Subject(
        library="numpy",
        device="CPU" if backend == "cpu" else "GPU, with copies",
        dtype="float32",
        shape=SHAPE_CPU if backend == "cpu" else SHAPE_GPU,
        backend=backend,
        array=lambda x: x.astype(np.float32),
        numpy=lambda x: x.astype(np.float64),
        wait=lambda x: None,
    )


def _cupy() -> Subject:
    import cupy

    return Subject(
        library="cupy",
        device="GPU",
        dtype="float16",
        shape=SHAPE_GPU,
        backend="cuda",
        array=functools.partial(cupy.asarray, dtype="float16"),
        numpy=lambda x: cupy.asnumpy(x).astype(np.float64),
        wait=lambda x: cupy.cuda.get_current_stream().synchronize(),
    )


def _torch(torch: Any, gpu: bool) -> Iterator[Subject]:
    for device in ["cpu", "cuda"] if gpu and torch.cuda.is_available() else ["cpu"]:
        dtype = "float32" if device == "cpu" else "bfloat16"
        yield Subject(
            library="torch",
            device="CPU" if device == "cpu" else "GPU",
            dtype=dtype,
            shape=SHAPE_CPU if device == "cpu" else SHAPE_GPU,
            backend=device,
            array=functools.partial(torch.as_tensor, dtype=getattr(torch, dtype), device=device),
            numpy=lambda x: x.to("cpu", torch.float64).numpy(),
            wait=lambda x: torch.cuda.synchronize() if x.is_cuda else None,
        )


def _jax(jax: Any, gpu: bool) -> Iterator[Subject]:
    for device in ["cpu", "gpu"] if gpu and jax.default_backend() == "gpu" else ["cpu"]:
        dtype = "float32" if device == "cpu" else "bfloat16"
        yield Subject(
            library="jax",
            device=device.upper(),
            dtype=dtype,
            shape=SHAPE_CPU if device == "cpu" else SHAPE_GPU,
            backend="cpu" if device == "cpu" else "cuda",
            array=functools.partial(jax.numpy.asarray, dtype=dtype, device=jax.devices(device)[0]),
            numpy=functools.partial(np.asarray, dtype=np.float64),
            wait=lambda x: x.block_until_ready(),
        )


@functools.cache
def _exact(shape: tuple[int, int, int, int]) -> tuple[Any, Any, Any]:
    """q, k, v, dout; and of the heads that are checked, the output and the gradients in float64."""
    # Multiples of 1/64 up to 4 are exact in every dtype, so one reference serves all.
    normal = np.random.default_rng(0).standard_normal((4, *shape))
    inputs = np.clip(np.round(normal * 64) / 64, -4, 4)
    q, k, v, dout = map(_checked, inputs)
    out, _ = reference.attention(q, k, v, causal=True)
    return inputs, out, reference.attention_backward(dout, q, k, v, causal=True)


def _checked(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The last heads of the last sequence."""
    return x[-1:, :, -max(1, CHECKED_SCORES // x.shape[1] ** 2) :]


def _time(call: Callable[[], Any], wait: Callable[[Any], object]) -> float:
    """Seconds of one call, in a row of calls that takes at least 0.2 s. The first, which may compile, doesn't count."""
    wait(call())
    seconds, repeats = 0.0, 1
    while seconds < 0.2:
        repeats *= 2
        start = time.perf_counter()
        for _ in range(repeats):
            result = call()
        wait(result)
        seconds = time.perf_counter() - start
    return seconds / repeats
