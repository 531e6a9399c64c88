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

__device__ __forceinline__ float16 narrow(float x, float16) {
  return {static_cast<unsigned short>(pack(x, x, float16{}))};
}
__device__ __forceinline__ bfloat16 narrow(float x, bfloat16) {
  return {static_cast<unsigned short>(pack(x, x, bfloat16{}))};
}
__device__ __forceinline__ float narrow(float x, float) { return x; }
__device__ __forceinline__ double narrow(double x, double) { return x; }

// Of numbers from 0 on, in their order as integers; those below 0 are below.
__device__ __forceinline__ int high_word(float x) { return __float_as_int(x); }
__device__ __forceinline__ int high_word(double x) { return __double2hiint(x); }

// x * y rounded up: no x' * y with x' * y <= x * y is above it, however large the three are.
__device__ __forceinline__ float multiply_up(float x, float y) { return __fmul_ru(x, y); }
__device__ __forceinline__ double multiply_up(double x, double y) { return __dmul_ru(x, y); }

template <class A>
__device__ __forceinline__ bool is_finite(A x) {
  return x * 0 == 0;
}

// 2^x: one instruction for floats (relative error 2^-22).
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// For doubles 2^n 2^r, where n is the integer next to x, to one unit in the last place; 0 below 2^-1022.  Unlike the
// library's it has no branches, so that the compiler interleaves those of several scores: their latency is what costs.
__device__ __forceinline__ double exp2_fast(double x) {
  constexpr double ROUND = 0x1.8p52;  // x + ROUND is rounded to an integer, which its low bits hold
  // (2^r - 1) / r, interpolated at the 11 Chebyshev nodes of [-1/2, 1/2]
  constexpr double C[] = {0x1.62e42fefa39efp-1,  0x1.ebfbdff82c598p-3,  0x1.c6b08d704a0c2p-5,  0x1.3b2ab6fba1ddap-7,
                          0x1.5d87fe78a5276p-10, 0x1.430913096fd9fp-13, 0x1.ffcbfc670dcd4p-17, 0x1.62bfd47773353p-20,
                          0x1.b524fae627834p-24, 0x1.e6063f7217bc6p-28, 0x1.e9d3fe3952179p-32};
  x = x < -1022 ? -1023 : x;  // NaN stays
  const double rounded = x + ROUND, r = x - (rounded - ROUND);
  double y = C[10];
#pragma unroll
  for (int i = 9; i >= 0; --i) y = fma(y, r, C[i]);
  const int n = min(__double2loint(rounded), 1024);
  return fma(y, r, 1.0) * __hiloint2double((n + 1023) << 20, 0);
}

// The same for x that are at most a few powers above 0, where all lanes of a warp call it together.  For doubles
// 2^(n / 32) 2^r: each lane holds one of the powers 2^(i / 32) for all, which leaves a polynomial half as long.
template <class Accum>
struct WarpExp2 {
  __device__ __forceinline__ float operator()(float x) const { return exp2_fast(x); }
};
template <>
struct WarpExp2<double> {
  double power = exp2_fast(threadIdx.x % 32 / 32.0);

  __device__ __forceinline__ double operator()(double x) const {
    constexpr double ROUND = 0x1.8p47;  // x + ROUND is rounded to a multiple of 1/32
    // (2^r - 1) / r, interpolated at the 5 Chebyshev nodes of [-1/64, 1/64]
    constexpr double C[] = {0x1.62e42fefa39efp-1, 0x1.ebfbdff8131c3p-3, 0x1.c6b08d70400d0p-5, 0x1.3b2b1bee88b09p-7,
                            0x1.5d884e708e6aap-10};
    // To -1022 as -1023, by the high words as integers; NaN stays.
    const unsigned high = __double2hiint(x), least = 0xc08ff000;
    x = __hiloint2double(high - least <= 0xfff00000 - least ? 0xc08ff800 : high, __double2loint(x));
    const double rounded = x + ROUND, r = x - (rounded - ROUND);
    const int n = __double2loint(rounded);
    const int to = __shfl_sync(~0u, __double2hiint(power), n) + ((n >> 5) << 20);
    const double scale = __hiloint2double(to, __shfl_sync(~0u, __double2loint(power), n));
    double y = C[4];
#pragma unroll
    for (int i = 3; i >= 0; --i) y = fma(y, r, C[i]);
    return fma(scale * r, y, scale);
  }
};

// Likewise one instruction each, for results that end in 16 bits: log2(x) and 1 / x.
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <class A>
__device__ __forceinline__ A minus_infinity() {
  return -static_cast<A>(__int_as_float(0x7f800000));
}
