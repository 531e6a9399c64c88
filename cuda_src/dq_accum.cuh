// The accumulator of dQ, in global memory: every block of keys adds its share.  For each head and block of BLOCK_M rows
// it holds what the warps hold in registers, in their order, so that each addition is one coalesced access.
#pragma once
#include "sequence.cuh"

using Accum = Traits<Element>::Accum;

// Head dims are padded to whole parts of Q_COLUMN_STEP columns.
constexpr int D = (HEAD_DIM + Q_COLUMN_STEP - 1) / Q_COLUMN_STEP * Q_COLUMN_STEP;
constexpr int Q_ROWS = BLOCK_M / Q_WARPS_M, Q_COLUMNS = D / Q_WARPS_D;  // of one warp's part
static_assert(Q_ROWS % 16 == 0 && Q_WARPS_M * Q_WARPS_D <= WARPS);

using QFragments = Accum[Q_ROWS / 16][Q_COLUMNS / 8][4];

struct DqAccum {
  Accum* origin;  // of this block of rows
  long long block;

  __device__ __forceinline__ DqAccum(const Params& p, const Sequence& s, int head, int block_m) {
    block = block_m +
            (VARLEN ? static_cast<long long>(head) * (p.total_q / BLOCK_M + p.batch) + s.start_q / BLOCK_M + s.batch
                    : (static_cast<long long>(s.batch) * p.heads + head) * p.row_blocks);
    origin = static_cast<Accum*>(p.dq_accum) + block * (BLOCK_M * D);
  }

  static constexpr bool VECTORS = sizeof(Accum) == 4 && __CUDA_ARCH__ >= 900;  // red.v4.f32

  // A warp's tile (m, n) is 128 accumulators; where a lane's four lie in it.
  __device__ __forceinline__ Accum* lane_origin(int warp) const {
    return origin + warp * (Q_ROWS * Q_COLUMNS) + threadIdx.x % 32 * (VECTORS ? 4 : 1);
  }
  static constexpr int STEP = VECTORS ? 1 : 32;

  template <class Fragments = QFragments>
  __device__ __forceinline__ void add(const Fragments& dq, int warp = threadIdx.x / 32) const {
    Accum* const to = lane_origin(warp);
#pragma unroll
    for (int i = 0; i < Q_ROWS / 16 * (Q_COLUMNS / 8); ++i) {
      const auto& x = dq[i / (Q_COLUMNS / 8)][i % (Q_COLUMNS / 8)];
      if constexpr (VECTORS)
        add_global(to + i * 128, x);
      else
#pragma unroll
        for (int j = 0; j < 4; ++j) add_global(to + i * 128 + j * STEP, x[j]);
    }
  }

  __device__ __forceinline__ void load(QFragments& dq) const {
    const Accum* const from = lane_origin(threadIdx.x / 32);
#pragma unroll
    for (int i = 0; i < Q_ROWS / 16 * (Q_COLUMNS / 8) * 4; ++i)
      dq[i / (Q_COLUMNS / 2)][i / 4 % (Q_COLUMNS / 8)][i % 4] = from[i / 4 * 128 + i % 4 * STEP];
  }
};

// LSE and -delta of a block of rows side by side, as the Hopper kernels take them: LSE in powers of two, +inf for rows
// that see nothing or are not there, so that their P is 0.
struct RowSums {
  Accum *lse, *minus_delta;  // [BLOCK_M]

  __device__ __forceinline__ RowSums(const Params& p, const Sequence& s, int head, int block_m)
      : lse(static_cast<Accum*>(p.delta) + DqAccum(p, s, head, block_m).block * (2 * BLOCK_M)),
        minus_delta(lse + BLOCK_M) {}
};
