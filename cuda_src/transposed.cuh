// P^T and dS^T of a block of rows as a consumer of the Hopper backward pass holds them: keys down, rows along.  A
// lane's entry s[n][c] is that of row0 + 8 n + c % 2 and key0 + c / 2 * 8.
#pragma once
#include "dropout.cuh"
#include "ptx/memory.cuh"
#include "score.cuh"

// Whether entries are dropped, a bit each.
template <int N>
struct Dropped {
  unsigned bits[(N + 7) / 8] = {};

  __device__ __forceinline__ Dropped(const Dropout& dropout, int row0, int key0) {
    if constexpr (DROPOUT) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int n = i / 2 * 2, odd = i % 2;
        bool keep[4];
        dropout.keep(keep, row0 + 8 * n + odd, key0);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (!keep[j]) bits[n / 8] |= 1u << (n + j / 2) % 8 * 4 + j % 2 * 2 + odd;
      }
    }
  }

  __device__ __forceinline__ bool at(int n, int c) const { return DROPOUT && bits[n / 8] >> n % 8 * 4 + c & 1; }
};

template <int N>
__device__ __forceinline__ void apply_transposed(float (&s)[N][4], const Score<float>& score, int row0, int key0) {
  if constexpr (!Score<float>::RAW) {
#pragma unroll
    for (int i = 0; i < 4 * N; ++i)
      s[i / 4][i % 4] = score.apply(s[i / 4][i % 4], row0 + i / 4 * 8 + i % 2, key0 + i % 4 / 2 * 8);
  }
}

// LSE or -delta of a lane's rows, where `sums` is the address of row0's.
template <int N>
__device__ __forceinline__ void load_row_sums(float (&x)[N][2], unsigned sums) {
#pragma unroll
  for (int n = 0; n < N; ++n) load_shared_pair(x[n][0], x[n][1], sums + n * 32);
}

// The same as what a product of [keys, rows] starts from.
template <int N>
__device__ __forceinline__ void load_row_sums(float (&x)[N][4], unsigned sums) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    load_shared_pair(x[n][0], x[n][1], sums + n * 32);
    x[n][2] = x[n][0], x[n][3] = x[n][1];
  }
}

// S -> P.
template <int N>
__device__ __forceinline__ void exponentiate_transposed(float (&s)[N][4], float factor, const float (&lse)[N][2]) {
#pragma unroll
  for (int i = 0; i < 4 * N; ++i) s[i / 4][i % 4] = exp2_fast(fma(s[i / 4][i % 4], factor, -lse[i / 4][i % 2]));
}

// As A fragments of a product, and into a tile of [rows, keys] whose first row is row0's; `key` is the warp's first one
// there.  Gradients that lie transposed, head dims down and keys along, go the same way into tiles of [keys, head
// dims].
template <int N>
__device__ __forceinline__ void pack_transposed(unsigned (&words)[N / 2][4], const float (&s)[N][4]) {
#pragma unroll
  for (int i = 0; i < 2 * N; ++i) words[i / 4][i % 4] = pack(s[i / 2][i % 2 * 2], s[i / 2][i % 2 * 2 + 1], Element{});
}
template <int STEPS, class T>
__device__ __forceinline__ void store_transposed(const T& tile, const unsigned (&words)[STEPS][4], int key) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < STEPS; ++i)
    store_matrices_transposed(
        tile.address(16 * i + lane % 8 + lane / 16 * 8, (key + lane / 8 % 2 * 8) * int(sizeof(Element))), words[i]);
}
