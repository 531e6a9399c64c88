// The online softmax of a block of rows (Milakov and Gimelshein, 2018; FlashAttention-2, section 3.1): running maximum
// m and sum l of each row, and the factor by which what was accumulated under an older maximum shrinks.
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
    Accum before[2 * M];
    bool moved = false;
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) {
      Accum& maximum = m[i / 2][i % 2];
      before[i] = maximum;
      Accum top = s[i / 2][0][i % 2 * 2];
#pragma unroll
      for (int j = 1; j < 2 * N; ++j) top = max(top, s[i / 2][j / 2][i % 2 * 2 + j % 2]);
      maximum = max(before[i], max_of_row(top));
      moved |= before[i] != maximum;
    }
    if (__any_sync(~0u, moved)) {  // seldom, after the first blocks
#pragma unroll
      for (int i = 0; i < 2 * M; ++i) {
        const Accum maximum = m[i / 2][i % 2];
        // Exactly 1 where the maximum stays: anything else would add up over the blocks.
        const Accum shrink = before[i] == maximum ? 1 : exp2_fast((before[i] - maximum) * factor);
        l[i / 2][i % 2] *= shrink;
#pragma unroll
        for (int j = 0; j < 2 * N_OUT; ++j) o[i / 2][j / 2][i % 2 * 2 + j % 2] *= shrink;
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) {
      const Accum maximum = m[i / 2][i % 2];
      const Accum shift =
          maximum == minus_infinity<Accum>() ? 0 : maximum * factor;  // a row that saw nothing yet: exp2(-inf - 0) = 0
#pragma unroll
      for (int j = 0; j < 2 * N; ++j) {
        Accum& x = s[i / 2][j / 2][i % 2 * 2 + j % 2];
        x = exp2_fast(x * factor - shift);
        l[i / 2][i % 2] += x;
      }
    }
  }

  // The whole row's sum.
  __device__ __forceinline__ Accum total(int tile, int half) const {
    Accum x = l[tile][half];
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
  }
};
