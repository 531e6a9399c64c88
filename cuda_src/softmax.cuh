// The online softmax of a block of rows (Milakov and Gimelshein, 2018; FlashAttention-2, section 3.1): running maximum m
// and sum l of each row, and the factor by which what was accumulated under an older maximum shrinks.
//
// A lane holds 2 M rows: rows g and g + 8 of M products of 16; the four lanes of a row are neighbours.
#pragma once
#include "element.cuh"

template <class Accum, int M>
struct Softmax {
  Accum m[M][2], l[M][2];  // l is this lane's share of the sum until total()

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) m[i / 2][i % 2] = minus_infinity<Accum>(), l[i / 2][i % 2] = 0;
  }

  static __device__ __forceinline__ Accum max_of_row(Accum x) {
    x = max(x, __shfl_xor_sync(~0u, x, 1));
    return max(x, __shfl_xor_sync(~0u, x, 2));
  }

  // scores -> exp2(factor * (score - new maximum)), while l and the output accumulators move under the new maximum.
  template <int N, int N_OUT>
  __device__ __forceinline__ void update(Accum (&s)[M][N][4], Accum (&o)[M][N_OUT][4], Accum factor) {
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) {
      const int tile = i / 2, half = i % 2;
      Accum top = s[tile][0][2 * half];
#pragma unroll
      for (int n = 0; n < N; ++n) top = max(top, max(s[tile][n][2 * half], s[tile][n][2 * half + 1]));
      const Accum before = m[tile][half], now = max(before, max_of_row(top));
      m[tile][half] = now;
      const Accum shift = now == minus_infinity<Accum>() ? 0 : now * factor;  // a row that saw nothing yet: exp2(-inf - 0) = 0
      const Accum shrink = exp2_fast(before * factor - shift);
      Accum sum = l[tile][half] * shrink;
#pragma unroll
      for (int n = 0; n < N_OUT; ++n) o[tile][n][2 * half] *= shrink, o[tile][n][2 * half + 1] *= shrink;
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int j = 2 * half; j < 2 * half + 2; ++j) sum += s[tile][n][j] = exp2_fast(s[tile][n][j] * factor - shift);
      }
      l[tile][half] = sum;
    }
  }

  // The whole row's sum.
  __device__ __forceinline__ Accum total(int tile, int half) const {
    Accum x = l[tile][half];
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
  }
};
