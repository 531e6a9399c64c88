// The four element types: what they accumulate in, and how they convert.
#pragma once

struct float16 {
  unsigned short bits;
};
struct bfloat16 {
  unsigned short bits;
};

template <class E>
struct Traits {  // 16-bit
  using Accum = float;
  using Word = unsigned;             // two elements
  static constexpr int K_STEP = 16;  // depth of one tensor-core product, in elements
};
template <>
struct Traits<float> {
  using Accum = float;
  using Word = float;
  static constexpr int K_STEP = 8;
};
template <>
struct Traits<double> {
  using Accum = double;
  using Word = double;
  static constexpr int K_STEP = 8;
};

template <class E>
constexpr bool IS_16BIT = sizeof(E) == 2;

__device__ __forceinline__ unsigned pack(float low, float high, float16) {
  unsigned word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ unsigned pack(float low, float high, bfloat16) {
  unsigned word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

__device__ __forceinline__ float widen(float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ __forceinline__ float widen(bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }

// 2^x: one instruction for floats (relative error 2^-22), the library's for doubles.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ double exp2_fast(double x) { return exp2(x); }

template <class A>
__device__ __forceinline__ A minus_infinity() {
  return -static_cast<A>(__int_as_float(0x7f800000));
}
