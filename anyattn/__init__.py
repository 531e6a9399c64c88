"""Exact attention for every array library, on kernels you can read.

``anyattn.attention(q, k, v)`` takes NumPy, CuPy, PyTorch, JAX or any DLPack arrays and returns the same kind. See
:mod:`anyattn.api` for the whole contract.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a checkout backends/ and cuda_src/ stand beside this folder, in an installation inside it.
__path__ += [str(p.parent) for p in [Path(__file__).resolve().parent] if not (p / "backends").is_dir()]

from anyattn.api import attention, attention_backward, attention_varlen, attention_vjp, explain  # noqa: E402

if TYPE_CHECKING:
    from anyattn.compile import CompileError
    from anyattn.plan import UnsupportedError

__version__ = "0.1.0"
__all__ = [
    "CompileError",
    "UnsupportedError",
    "__version__",
    "attention",
    "attention_backward",
    "attention_varlen",
    "attention_vjp",
    "explain",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    # The error classes live with the compiler and the planner, which a call on the CPU never loads.
    if name == "CompileError":
        from anyattn.compile import CompileError

        return CompileError
    if name == "UnsupportedError":
        from anyattn.plan import UnsupportedError

        return UnsupportedError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
