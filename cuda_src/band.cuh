// Which keys a row sees: causal, sliding window and the number of keys, as one interval [low, high).
#pragma once
#include "sequence.cuh"

struct Band {
  int left, right;  // of the row's own key position, which is row + offset (bottom-right alignment)
  int offset, seqlen_q, seqlen_k;

  __device__ __forceinline__ Band(const Params& p, const Sequence& s)
      : left(p.left),
        right(p.right),
        offset(s.seqlen_k - s.seqlen_q + p.shift),
        seqlen_q(s.seqlen_q),
        seqlen_k(s.seqlen_k) {}

  __device__ __forceinline__ int low(int row) const { return max(0, row + offset - left); }
  __device__ __forceinline__ int high(int row) const { return max(0, min(seqlen_k, row + offset + right + 1)); }

  __device__ __forceinline__ bool sees(int row, int key) const {
    return row < seqlen_q && key >= low(row) && key < high(row);
  }

  // Scores of keys that a row does not see become -inf, or `hidden`.  The lane's first entry is that of row0 and key0.
  template <int M, int N, class Accum>
  __device__ __forceinline__ void mask(Accum (&s)[M][N][4], int row0, int key0,
                                       Accum hidden = minus_infinity<Accum>()) const {
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) {
      const int row = row0 + 8 * i, begin = low(row) - key0, end = high(row) - key0;
#pragma unroll
      for (int j = 0; j < 2 * N; ++j) {
        const int key = j / 2 * 8 + j % 2;
        if (key < begin || key >= end) s[i / 2][j / 2][i % 2 * 2 + j % 2] = hidden;
      }
    }
  }

  // The same for entries that lie transposed: a lane's first one is that of key0 and row0, keys g, g + 8 down, rows
  // along.
  template <int N, class Accum>
  __device__ __forceinline__ void mask_transposed(Accum (&s)[N][4], int row0, int key0, Accum hidden) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = key0 + 8 * half, begin = key - offset - right - row0;
      const int end = key < seqlen_k ? min(seqlen_q, key - offset + left + 1) - row0 : 0;
#pragma unroll
      for (int j = 0; j < 2 * N; ++j) {
        const int row = j / 2 * 8 + j % 2;
        if (row < begin || row >= end) s[j / 2][2 * half + j % 2] = hidden;
      }
    }
  }

  // Both ends only grow from row to row.  Whether all rows of [first, last] see all of these keys:
  __device__ __forceinline__ bool all_see(int first, int last, int key_begin, int key_end) const {
    return key_begin >= low(last) && key_end <= high(first);
  }

  // Whether all of the rows [first, first + count) are there and see all of these keys.  Rows that are not there are
  // zero, but 0 * inf is NaN.
  __device__ __forceinline__ bool whole(int first, int count, int key_begin, int key_end) const {
    return first + count <= seqlen_q && all_see(first, first + count - 1, key_begin, key_end);
  }

  struct Blocks {  // [begin, end)
    int begin, end;

    __device__ __forceinline__ bool has(int block) const { return block >= begin && block < end; }
    // One of `count` parts, about equal.
    __device__ __forceinline__ Blocks part(int i, int count) const {
      const int each = (end - begin) / count, more = (end - begin) % count;
      return {begin + i * each + min(i, more), begin + (i + 1) * each + min(i + 1, more)};
    }
  };

  // Blocks of keys that rows [first, first + count) may see.
  __device__ __forceinline__ Blocks key_blocks(int first, int count, int block) const {
    return blocks(low(first), high(min(first + count, seqlen_q) - 1), block);
  }

  // Those of them that all rows of [first, last] see whole.
  __device__ __forceinline__ Blocks whole_key_blocks(int first, int last, int block) const {
    return {(low(last) + block - 1) / block, high(first) / block};
  }

  // Blocks of rows that may see keys [first, first + count).
  __device__ __forceinline__ Blocks row_blocks(int first, int count, int block) const {
    const int begin = max(0, first - offset - right);
    const int end = min(seqlen_q, min(first + count, seqlen_k) - 1 - offset + left + 1);
    return blocks(begin, end, block);
  }

  // Those of them that are whole, told once for all.
  __device__ __forceinline__ Blocks whole_row_blocks(int first, int count, int block) const {
    const int begin = max(0, first + count - 1 - offset - right), end = min(seqlen_q, first + left - offset + 1);
    return {(begin + block - 1) / block, first + count <= seqlen_k ? max(end, 0) / block : 0};
  }

 private:
  // None if nothing is seen: a block of rows and one of keys agree on whether they share anything.
  static __device__ __forceinline__ Blocks blocks(int begin, int end, int block) {
    return {begin / block, begin < end ? (end + block - 1) / block : begin / block};
  }
};

// Whether something of a block is hidden, known at compile time: most blocks are whole, and what only the others need
// would spread their instructions too far for the instruction cache.
template <bool MASKED_>
struct Mask {
  static constexpr bool MASKED = MASKED_;
};
