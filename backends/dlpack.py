"""Any other library whose arrays speak DLPack or an array interface: NumPy or CuPy does the work on the same memory.

Arrays come in through ``__dlpack__``, ``__cuda_array_interface__`` or ``__array_interface__`` without a copy; results
go back through the library's own ``from_dlpack``. GPU arrays are used on the current CuPy stream of their device, which
waits for the work that produces them.
"""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from anyattn.problem import Options, Problem, fresh_seed, place

__all__ = ["Bridge", "attention", "attention_backward", "attention_varlen", "describe", "fresh_seed"]

_HOST = (1, 3)  # DLDeviceType: kDLCPU, kDLCUDAHost
_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged
_OPTIONAL = ("alibi_slopes", "cu_seqlens_q", "cu_seqlens_k")  # may be None; of attention_varlen the first alone


class Bridge:
    """An adapter made of NumPy's and CuPy's: subclasses say how arrays of a library come in and go back."""

    def check(self, name: str, x: Any, q: Any) -> None:
        """Raise TypeError or ValueError, naming the argument, unless x is an array of q's library."""
        if _from_dlpack(type(q)) is None:
            library = type(q).__module__.partition(".")[0]
            raise TypeError(f"q must come from a library with from_dlpack, to return results; {library} has none")
        if _from_dlpack(type(x)) is not _from_dlpack(type(q)):
            raise TypeError(f"{name} must be of q's library, as q is a {_full_name(q)}, got {_full_name(x)}")

    def host_view(self, name: str, x: Any) -> Any:
        """The NumPy array on the memory of an array in host memory."""
        if not hasattr(x, "__dlpack__"):
            return np.asarray(x)
        try:
            return np.from_dlpack(x)
        except (BufferError, RuntimeError) as error:  # a dtype that NumPy lacks
            got = f", got {x.dtype}" if hasattr(x, "dtype") else ""
            raise TypeError(
                f"{name} must be float16, float32 or float64 or on a GPU: NumPy's DLPack has no bfloat16{got} ({error})"
            ) from None

    def returned(self, x: Any, q: Any) -> Any:
        """A NumPy or CuPy array as an array of q's library, where q is."""
        function = _from_dlpack(type(q))
        assert function is not None  # by check()
        return function(x)

    def attention(
        self,
        q: Any,
        k: Any,
        v: Any,
        options: Options,
        *,
        alibi_slopes: Any,
        seed: int | None,
        return_lse: bool,
        backend: str,
    ) -> Any:
        """``anyattn.attention`` of such arrays."""
        arrays = {"q": q, "k": k, "v": v, "alibi_slopes": alibi_slopes}
        return self._run("attention", arrays, options=options, seed=seed, return_lse=return_lse, backend=backend)

    def attention_varlen(
        self,
        q: Any,
        k: Any,
        v: Any,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        max_seqlen_q: int,
        max_seqlen_k: int,
        options: Options,
        *,
        alibi_slopes: Any,
        seed: int | None,
        return_lse: bool,
        backend: str,
    ) -> Any:
        """``anyattn.attention_varlen`` of such arrays."""
        arrays = {"q": q, "k": k, "v": v, "alibi_slopes": alibi_slopes}
        arrays |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
        plain = {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k, "options": options, "seed": seed}
        return self._run("attention_varlen", arrays, **plain, return_lse=return_lse, backend=backend)

    def attention_backward(
        self,
        dout: Any,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        lse: Any,
        options: Options,
        *,
        alibi_slopes: Any,
        seed: int | None,
        backend: str,
        cu_seqlens_q: Any = None,
        cu_seqlens_k: Any = None,
        max_seqlen_q: int = 0,
        max_seqlen_k: int = 0,
    ) -> Any:
        """``anyattn.attention_backward`` of such arrays."""
        arrays = {"q": q, "dout": dout, "k": k, "v": v, "out": out, "lse": lse, "alibi_slopes": alibi_slopes}
        arrays |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
        plain = {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k, "options": options, "seed": seed}
        return self._run("attention_backward", arrays, **plain, backend=backend)

    def describe(
        self,
        q: Any,
        k: Any,
        v: Any,
        options: Options,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        alibi_slopes: Any,
        backend: str,
    ) -> Problem:
        """The problem that a call would be; raises what the call would raise."""
        arrays = {"q": q, "k": k, "v": v, "alibi_slopes": alibi_slopes}
        arrays |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
        plain = {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k, "options": options, "backend": backend}
        described: Problem = self._results("describe", arrays, **plain)
        return described

    def _run(self, function: str, arrays: dict[str, Any], **plain: Any) -> Any:
        q, results = arrays["q"], self._results(function, arrays, **plain)
        with _current(_device("q", q)):  # CuPy lets whoever imports an array wait for the current device's stream
            if isinstance(results, tuple):
                return tuple(self.returned(x, q) for x in results)
            return self.returned(results, q)

    def _results(self, function: str, arrays: dict[str, Any], **plain: Any) -> Any:
        """What NumPy's or CuPy's adapter returns."""
        q = arrays["q"]
        optional = _OPTIONAL[:1] if function == "attention_varlen" else _OPTIONAL
        present = {name: x for name, x in arrays.items() if x is not None or name not in optional}
        for name, x in present.items():
            self.check(name, x, q)
        device = _device("q", q)
        for name, x in present.items():
            if (there := _device(name, x)) != device:
                raise ValueError(f"{name} must be on q's device, {place(device)}, got {place(there)}")
        if device >= 0:
            return _run_on_gpu(device, function, present, {**dict.fromkeys(arrays), **plain})
        views = {name: self.host_view(name, x) for name, x in present.items()}
        adapter = importlib.import_module("anyattn.backends.numpy")
        return getattr(adapter, function)(**{**dict.fromkeys(arrays), **views, **plain})


def _device(name: str, x: Any) -> int:
    """The CUDA ordinal of an array, -1 for host memory; TypeError for anything else."""
    if hasattr(x, "__dlpack_device__"):
        kind, ordinal = x.__dlpack_device__()
        if kind not in _HOST + _CUDA:
            raise TypeError(f"{name} must be in host or CUDA memory, got DLPack device type {int(kind)}")
        return int(ordinal) if kind in _CUDA else -1
    if hasattr(x, "__cuda_array_interface__"):
        import cupy

        return int(cupy.cuda.runtime.pointerGetAttributes(x.__cuda_array_interface__["data"][0]).device)
    if hasattr(x, "__array_interface__"):
        return -1
    if hasattr(x, "__dlpack__"):
        raise TypeError(f"{name} must have __dlpack_device__ beside __dlpack__, got a {_full_name(x)} without")
    raise TypeError(f"{name} must speak DLPack or an array interface, got a {_full_name(x)}")


def _current(device: int) -> AbstractContextManager[Any]:
    """Makes a CUDA device CuPy's current one."""
    if device < 0:
        return nullcontext()
    import cupy

    context: AbstractContextManager[Any] = cupy.cuda.Device(device)
    return context


def _run_on_gpu(device: int, function: str, arrays: dict[str, Any], others: dict[str, Any]) -> Any:
    from anyattn import launch

    if reason := launch.available(device):
        raise launch.UnsupportedError(f"q is on cuda:{device}: {reason}")
    import cupy

    adapter = importlib.import_module("anyattn.backends.cupy")
    with _current(device):
        stream = cupy.cuda.get_current_stream()
        capturing = stream.is_capturing()  # then no event can be asked, and whoever replays the graph keeps the arrays
        if not capturing:
            _drop_done()
        views = {name: _gpu_view(name, x, stream.ptr) for name, x in arrays.items()}
        results = getattr(adapter, function)(**{**others, **views})
        if not capturing:
            _hold_until_done(stream.record(), views)
    return results


def _gpu_view(name: str, x: Any, stream: int) -> Any:
    """A CuPy array on the memory of x, which is ready on the stream. (cupy.from_dlpack takes several times as long.)"""
    import cupy

    try:  # DLPack calls the legacy default stream 1, CUDA 0
        view = _memory_view().from_any_interface(x, stream_ptr=stream or 1)
        dtype = np.dtype(view.dtype)
    except (BufferError, NotImplementedError, TypeError) as error:
        raise TypeError(f"{name} must be an array that CuPy can read; bfloat16 needs ml_dtypes ({error})") from None
    strides = None if view.strides is None else byte_strides(view.strides, dtype.itemsize)
    memory = cupy.cuda.UnownedMemory(view.ptr, view.size * dtype.itemsize, view, view.device_id)
    return cupy.ndarray(view.shape, dtype, cupy.cuda.MemoryPointer(memory, 0), strides)


@functools.cache
def _memory_view() -> Any:
    from anyattn.compile import INSTALL, cuda_core
    from anyattn.launch import UnsupportedError

    try:
        return cuda_core("cuda.core.utils").StridedMemoryView
    except ImportError as error:
        raise UnsupportedError(f"arrays of other libraries on a GPU need cuda.core ({error}): {INSTALL}") from None


def byte_strides(steps: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Of strides in elements. CuPy 14 divides negative ones as unsigned: in bytes they are right again, modulo 2^64."""
    return tuple((step * itemsize + 2**63) % 2**64 - 2**63 for step in steps)


_lock = threading.Lock()
_in_flight: deque[tuple[Any, Any]] = deque()  # (event, arrays that the work before it reads)


def _hold_until_done(event: Any, arrays: Any) -> None:
    """Keep other libraries' arrays alive while kernels read them: their allocators don't know of CuPy's stream.

    They are let go with the next call.
    """
    with _lock:
        _in_flight.append((event, arrays))


def _drop_done() -> None:
    done = []  # to go when the lock is free: whose arrays they are may call us then
    with _lock:
        while _in_flight and _in_flight[0][0].done:
            done.append(_in_flight.popleft())


def _from_dlpack(kind: type) -> Callable[[Any], Any] | None:
    """The from_dlpack of the library that an array type comes from."""
    for base in kind.__mro__:
        library = sys.modules.get(base.__module__.partition(".")[0])
        for holder in (library, getattr(library, "dlpack", None)):
            function: Callable[[Any], Any] | None = getattr(holder, "from_dlpack", None)
            if function is not None:
                return function
    return None


def _full_name(x: Any) -> str:
    return f"{type(x).__module__.partition('.')[0]}.{type(x).__name__}"


_bridge = Bridge()
attention = _bridge.attention
attention_varlen = _bridge.attention_varlen
attention_backward = _bridge.attention_backward
describe = _bridge.describe
