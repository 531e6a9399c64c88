// Which probabilities are dropped: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011),
// keyed by the seed and counted by (batch, head, row, key), so that every tiling and every backend drops the same ones.
// One call yields four words: those of rows r, r + 8 and keys c, c + 8, just what a lane holds of a 16x16 product.
#pragma once
#include "params.cuh"

struct Dropout {
  unsigned key0, key1, head, batch, first_row, drop_below;

  __device__ __forceinline__ Dropout(const Params& p, int batch_, int head_)
      : key0(static_cast<unsigned>(p.seed)),
        key1(static_cast<unsigned>(p.seed >> 32)),
        head(p.first_head + head_),
        batch(p.first_batch + batch_),
        first_row(p.first_row),
        drop_below(p.drop_below) {}

  // keep[2 i + j] is that of row + 8 i and key + 8 j; bit 3 of row and key is clear.
  __device__ __forceinline__ void keep(bool (&keep)[4], int row, int key) const {
    unsigned c0 = first_row + row, c1 = key, c2 = head, c3 = batch, k0 = key0, k1 = key1;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const unsigned high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
      const unsigned high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
      c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    const unsigned words[4] = {c0, c1, c2, c3};
#pragma unroll
    for (int i = 0; i < 4; ++i) keep[i] = words[i] >= drop_below;
  }

  // The same of any one entry.
  __device__ __forceinline__ bool keeps(int row, int key) const {
    bool four[4];
    keep(four, row & ~8, key & ~8);
    return row & 8 ? (key & 8 ? four[3] : four[2]) : (key & 8 ? four[1] : four[0]);
  }
};
