// Where NaN or inf of what a mask hides would reach the gradients: hidden entries of P and dS are 0, but 0 * NaN is
// NaN.
#pragma once
#include "band.cuh"
#include "ptx/memory.cuh"
#include "tile.cuh"

// Whether a product A B had a NaN or inf in A or B: it spoils a row or a column, so one of each tells.
template <int M, int N>
__device__ __forceinline__ bool any_non_finite(const Accum (&x)[M][N][4]) {
  Accum zero = 0;
#pragma unroll
  for (int i = 0; i < 2 * N; ++i) zero += x[0][i / 2][i % 2] * 0;
#pragma unroll
  for (int i = 1; i < 2 * M; ++i) zero += x[i / 2][0][i % 2 * 2] * 0;
  return zero != 0;
}

// sum + 0 * word for each of the two elements: NaN from NaN or inf on.
__device__ __forceinline__ unsigned add_zeros(unsigned word, unsigned sum, float16) {
  unsigned y;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(word), "r"(0), "r"(sum));
  return y;
}
__device__ __forceinline__ unsigned add_zeros(unsigned word, unsigned sum, bfloat16) {
  unsigned y;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(word), "r"(0), "r"(sum));
  return y;
}

// Whether a tile has a NaN or inf, in what each of THREADS threads looks at; all of them together see all.
template <int THREADS, class T>
__device__ __forceinline__ bool any_non_finite(const T& tile) {
  static_assert(T::BYTES % (16 * THREADS) == 0);
  unsigned zeros = 0;
#pragma unroll
  for (int i = 0; i < T::BYTES / 16 / THREADS; ++i) {
    const int4 x = load_shared(tile.base + (i * THREADS + threadIdx.x % THREADS) * 16);
    zeros = add_zeros(x.x, zeros, typename T::Element{});
    zeros = add_zeros(x.y, zeros, typename T::Element{});
    zeros = add_zeros(x.z, zeros, typename T::Element{});
    zeros = add_zeros(x.w, zeros, typename T::Element{});
  }
  return zeros & 0x7fff7fff;
}

// acc += A B for A = P or dS [rows, keys], or their transpose, without the entries of A that are hidden.
template <bool TRANSPOSED, int M, int N, class A, class T>
__device__ __forceinline__ void add_visible(Accum (&acc)[M][N][4], const A& a, int a_start, const T& b, int b_start,
                                            const Band& band, int first_row, int first_key) {
#pragma unroll
  for (int n = 0; n < N; ++n) {  // a few columns at a time: there are no registers for more
    const int lane = recompute(threadIdx.x) % 32, outer0 = a_start + lane / 4, col = b_start + 8 * n + lane % 4 * 2;
#pragma unroll 1
    for (int depth = 0; depth < (TRANSPOSED ? BLOCK_M : BLOCK_N); ++depth) {
      const Accum y[2] = {load_element<Element>(b.address(depth, col * int(sizeof(Element)))),
                          load_element<Element>(b.address(depth, (col + 1) * int(sizeof(Element))))};
#pragma unroll
      for (int i = 0; i < 2 * M; ++i) {
        const int outer = outer0 + 8 * i, row = TRANSPOSED ? depth : outer, key = TRANSPOSED ? outer : depth;
        if (!band.sees(first_row + row, first_key + key)) continue;
        const Accum x = load_element<Element>(a.address(row, key * int(sizeof(Element))));
#pragma unroll
        for (int j = 0; j < 2; ++j) acc[i / 2][n][i % 2 * 2 + j] += x * y[j];
      }
    }
  }
}

// The same for a transposed result: acc += B^T A, where B has a row for each of A's.  Columns of B down, of a lane
// from col0 on; keys along.
template <int M, int N, class A, class T>
__device__ __forceinline__ void add_visible_to_transposed(Accum (&acc)[M][N][4], const A& a, const T& b, int col0,
                                                          const Band& band, int first_row, int first_key) {
#pragma unroll
  for (int i = 0; i < M * N; ++i) {  // M products of 64 columns by the four warps
    const int lane = recompute(threadIdx.x) % 32, col = col0 + i / N * 64 + lane / 4, key = i % N * 8 + lane % 4 * 2;
    Accum(&x)[4] = acc[i / N][i % N];
#pragma unroll 1
    for (int row = 0; row < BLOCK_M; ++row) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (!band.sees(first_row + row, first_key + key + j)) continue;
        const Accum y = load_element<Element>(a.address(row, (key + j) * int(sizeof(Element))));
#pragma unroll
        for (int half = 0; half < 2; ++half)
          x[2 * half + j] += y * load_element<Element>(b.address(row, (col + 8 * half) * int(sizeof(Element))));
      }
    }
  }
}
