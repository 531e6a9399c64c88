"""The wgmma instructions of a kernel, as text for its prelude.

`wgmma.mma_async` names each accumulator register (N / 2 of them), and inline assembly cannot list a number of operands
that is a template parameter. So the functions are written here, for just the widths that a kernel uses.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["functions"]

TYPES = {"float16": "f16", "bfloat16": "bf16"}

_TEMPLATE = """\
template <int TRANSPOSE_A = 0, int TRANSPOSE_B = 0>
__device__ __forceinline__ void wgmma(float (&d)[{tiles}][4], {a_type}, unsigned long long b, bool accumulate) {{
  asm volatile("{{.reg .pred p; setp.ne.b32 p, %{flag}, 0; wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{t}.{t} "
    "{{{d}}}, {a}, %{b}, p, 1, 1{immediates};}}"
    : {outputs} : {a_inputs}, "l"(b), "r"(int(accumulate)), "n"(TRANSPOSE_A), "n"(TRANSPOSE_B));
}}
"""


def functions(dtype: str, widths: Iterable[int]) -> str:
    """wgmma(d, a, b, accumulate) for float16 or bfloat16 operands, one pair of overloads for each width N of D.

    d is float[N / 8][4]; a is a descriptor (A in shared memory) or unsigned[4] (in registers); b is a descriptor.
    TRANSPOSE_A and TRANSPOSE_B: the operand is contiguous along D's side instead of along the depth.
    """
    return "".join(_function(TYPES[dtype], n, shared) for n in sorted(set(widths)) for shared in (True, False))


def _function(t: str, n: int, shared: bool) -> str:
    if n % 8 or not 8 <= n <= 256:
        raise ValueError(f"a wgmma is from 8 to 256 columns wide, in steps of 8, got {n}")
    registers = n // 2
    a = [registers] if shared else list(range(registers, registers + 4))
    b = a[-1] + 1
    names = ", ".join(f"%{i}" for i in a)
    return _TEMPLATE.format(
        tiles=n // 8,
        n=n,
        t=t,
        d=", ".join(f"%{i}" for i in range(registers)),
        a=names if shared else f"{{{names}}}",
        a_type="unsigned long long a" if shared else "const unsigned (&a)[4]",
        a_inputs='"l"(a)' if shared else ", ".join(f'"r"(a[{i}])' for i in range(4)),
        b=b,
        flag=b + 1,
        immediates=f", %{b + 2}, %{b + 3}" if shared else f", %{b + 3}",
        outputs=", ".join(f'"+f"(d[{i // 4}][{i % 4}])' for i in range(registers)),
    )
