// Products of tiles by one warp: acc += A B, operands in shared memory or, for A, in the accumulators of an earlier
// product.
//
// Wide elements (float, double) may permute the depth: words 2t and 2t + 1 of a step take the places t and t + 4 of the
// fragment (both operands alike, so the sum is the same).  Then a lane's accumulators are its A fragment as they
// stand, and the words that it reads along a row are neighbours: one load.  For doubles that is worth it only beside
// accumulators, since from one load they'd have to be moved to their places in A's fragment.
#pragma once
#include "ptx/mma.cuh"
#include "tile.cuh"

enum class Side { A, B };  // A: 16 rows of the result; B: 16 columns of it (two n8 products)

template <class E>
struct Fragment {
  typename Traits<E>::Word w[4];
};
// float32 through TensorFloat-32 tensor cores: x = high + low, each with 11 significant bits.  The cores ignore the 13
// bits behind.
template <>
struct Fragment<float> {
  unsigned high[4], low[4];
};

__device__ __forceinline__ void split(float x, unsigned& high, unsigned& low) {
  high = (__float_as_uint(x) + 0x1000u) & 0xffffe000u;  // rounded to nearest, so that low has either sign
  low = __float_as_uint(x - __uint_as_float(high));
}

template <class E>
__device__ __forceinline__ Fragment<E> make_fragment(const typename Traits<E>::Word (&w)[4]) {
  Fragment<E> f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(E) == 4)
      split(w[i], f.high[i], f.low[i]);
    else
      f.w[i] = w[i];
  }
  return f;
}

// d0 and d1 are the accumulators of the first and the second eight columns of B.
template <class E, class Accum, class Words>
__device__ __forceinline__ void mma(Accum (&d0)[4], Accum (&d1)[4], const Words (&a)[4], const Words (&b)[4]) {
  mma_m16n8(d0, a, b[0], b[1], E{});
  mma_m16n8(d1, a, b[2], b[3], E{});
}

// Two steps at once.
template <class E>
__device__ __forceinline__ void mma(double (&d0)[4], double (&d1)[4], const Fragment<E> (&a)[2],
                                    const Fragment<E> (&b)[2]) {
  const auto &first = b[0].w, &second = b[1].w;
  mma_m16n8(d0, a[0].w, a[1].w, {first[0], first[1], second[0], second[1]});
  mma_m16n8(d1, a[0].w, a[1].w, {first[2], first[3], second[2], second[3]});
}

// An operand in shared memory.  Along the result it starts at `start` (a multiple of 16) and is EXTENT elements long.
// PAIRED: its depth is permuted.
template <Side SIDE, Major MAJOR, int EXTENT, class T, bool PAIRED = sizeof(typename T::Element) == 4>
struct SharedOperand {
  using E = typename T::Element;
  static constexpr int K_STEP = Traits<E>::K_STEP;
  static constexpr int EXTENT_BYTES = EXTENT * int(sizeof(E));
  // Whether offsets within the extent and its start never meet in one chunk index, so that the start can go into the
  // lane's address.
  static constexpr bool FOLD = MAJOR == Major::K || T::PANEL % EXTENT_BYTES == 0 || EXTENT_BYTES % T::PANEL == 0;

  unsigned lane_address, lane_address_second;  // second: of two rows (wide elements, MN-major)
  int start_byte;

  __device__ __forceinline__ SharedOperand(const T& tile, int start) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int row0 = MAJOR == Major::K ? start : 0;
    const int byte0 = MAJOR == Major::K ? 0 : start * int(sizeof(E));
    start_byte = FOLD ? 0 : byte0;
    const int folded = FOLD ? byte0 : 0;
    if constexpr (IS_16BIT<E>) {
      const bool tall =
          (SIDE == Side::A) == (MAJOR == Major::K);  // the second matrix lies below the first, not beside it
      const int row = tall ? lane % 16 : lane % 8 + lane / 16 * 8;
      const int chunk = tall ? lane / 16 : lane / 8 % 2;
      lane_address = tile.address(row0 + row, folded + chunk * 16);
    } else if constexpr (MAJOR == Major::K) {
      lane_address = tile.address(row0 + g, (PAIRED ? 2 * t : t) * int(sizeof(E)));
    } else {
      lane_address = tile.address(PAIRED ? 2 * t : t, folded + g * int(sizeof(E)));
      lane_address_second = tile.address(PAIRED ? 2 * t + 1 : t + 4, folded + g * int(sizeof(E)));
    }
  }

  // `rows` is a multiple of 8 and `byte` of a lane's 32 or 64, so both leave the swizzle of the lane's own address as
  // it is.
  __device__ __forceinline__ unsigned at(unsigned lane, int rows, int byte) const {
    if constexpr (!FOLD) byte += start_byte;
    return (lane ^ (byte % T::PANEL)) + byte / T::PANEL * (T::ROWS * T::PANEL) + rows * T::PANEL;
  }

  // The fragment of 16 rows (or columns) `outer` and step `k`.
  __device__ __forceinline__ Fragment<E> load(int outer, int k) const {
    typename Traits<E>::Word w[4];
    if constexpr (IS_16BIT<E>) {
      if constexpr (MAJOR == Major::K)
        load_matrices(w, at(lane_address, outer * 16, k * 32));
      else
        load_matrices_transposed(w, at(lane_address, k * 16, outer * 32));
    } else {
      constexpr int SECOND = SIDE == Side::A ? 1 : 2, STEP = SIDE == Side::A ? 2 : 1;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        auto &first = w[half * SECOND], &second = w[half * SECOND + STEP];
        if constexpr (MAJOR == Major::MN) {
          const int byte = (outer * 16 + half * 8) * int(sizeof(E));
          load_shared(first, at(lane_address, k * 8, byte));
          load_shared(second, at(lane_address_second, k * 8, byte));
        } else if constexpr (PAIRED) {
          load_shared_pair(first, second, at(lane_address, outer * 16 + half * 8, k * 8 * int(sizeof(E))));
        } else {
          load_shared(first, at(lane_address, outer * 16 + half * 8, k * 8 * int(sizeof(E))));
          load_shared(second, at(lane_address, outer * 16 + half * 8, (k * 8 + 4) * int(sizeof(E))));
        }
      }
    }
    return make_fragment<E>(w);
  }
};

// Accumulators [M tiles of 16][N tiles of 8][4] of an earlier product as the A operand of the next, whose depth is
// their columns.
template <class E, int M, int N>
struct RegisterOperand {
  const typename Traits<E>::Accum (&acc)[M][N][4];

  __device__ __forceinline__ Fragment<E> load(int m, int k) const {
    if constexpr (IS_16BIT<E>) {
      const auto &left = acc[m][2 * k], &right = acc[m][2 * k + 1];
      return {{pack(left[0], left[1], E{}), pack(left[2], left[3], E{}), pack(right[0], right[1], E{}),
               pack(right[2], right[3], E{})}};
    } else {
      const auto& c = acc[m][k];
      const typename Traits<E>::Word w[4] = {c[0], c[2], c[1], c[3]};
      return make_fragment<E>(w);
    }
  }
};

struct Nothing {
  __device__ __forceinline__ void operator()() const {}
};

// acc [16 M, 8 N] += A [16 M, K] B [K, 8 N], K counted in steps; STEPS of them at once, which may be 2 for doubles.
// `meanwhile` is called behind the first products: what it has to do runs beside them.
template <class E, int K, int STEPS = 1, int M, int N, class Accum, class OperandA, class OperandB,
          class Meanwhile = Nothing>
__device__ __forceinline__ void gemm(Accum (&acc)[M][N][4], const OperandA& a, const OperandB& b,
                                     const Meanwhile& meanwhile = {}) {
  if constexpr (sizeof(E) == 4) {
    // Tensor cores truncate TensorFloat-32 sums as they accumulate, which is worse than float32's rounding.  So a sum
    // is kept to GROUP steps, their small terms first (low * low is below float32's precision), and is added to acc in
    // float32.
    constexpr int GROUP = K % 4 == 0 ? 4 : 2;
    static_assert(K % GROUP == 0);
#pragma unroll
    for (int k = 0; k < K; k += GROUP) {
      Fragment<E> fragment_a[GROUP][M], fragment_b[GROUP];
#pragma unroll
      for (int i = 0; i < GROUP * M; ++i) fragment_a[i / M][i % M] = a.load(i % M, k + i / M);
#pragma unroll
      for (int n = 0; n < N; n += 2) {
#pragma unroll
        for (int i = 0; i < GROUP; ++i) fragment_b[i] = b.load(n / 2, k + i);
#pragma unroll
        for (int m = 0; m < M; ++m) {
          Accum sum[2][4] = {};
#pragma unroll
          for (int i = 0; i < GROUP; ++i) {
            mma<E>(sum[0], sum[1], fragment_a[i][m].low, fragment_b[i].high);
            mma<E>(sum[0], sum[1], fragment_a[i][m].high, fragment_b[i].low);
          }
#pragma unroll
          for (int i = 0; i < GROUP; ++i) mma<E>(sum[0], sum[1], fragment_a[i][m].high, fragment_b[i].high);
#pragma unroll
          for (int i = 0; i < 8; ++i) acc[m][n + i / 4][i % 4] += sum[i / 4][i % 4];
        }
      }
      if (k == 0) meanwhile();
    }
  } else {
    static_assert(K % STEPS == 0);
#pragma unroll
    for (int k = 0; k < K; k += STEPS) {
      Fragment<E> fragment_a[M][STEPS], fragment_b[STEPS];
#pragma unroll
      for (int i = 0; i < STEPS * M; ++i) fragment_a[i / STEPS][i % STEPS] = a.load(i / STEPS, k + i % STEPS);
#pragma unroll
      for (int n = 0; n < N; n += 2) {
#pragma unroll
        for (int i = 0; i < STEPS; ++i) fragment_b[i] = b.load(n / 2, k + i);
#pragma unroll
        for (int m = 0; m < M; ++m) {
          if constexpr (STEPS == 2)
            mma<E>(acc[m][n], acc[m][n + 1], fragment_a[m], fragment_b);
          else
            mma<E>(acc[m][n], acc[m][n + 1], fragment_a[m][0].w, fragment_b[0].w);
        }
      }
      if (k == 0) meanwhile();
    }
  }
}
