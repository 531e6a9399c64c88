// First step of the backward pass: delta = rowsum(dO * O), with dQ's accumulator set to zero unless a block of keys
// will come that sets it (SET_BY_FIRST).
#include "band.cuh"
#include "dq_accum.cuh"
#include "score.cuh"

constexpr int BYTES =
    HEAD_DIM_V * int(sizeof(Element)) | COPY_BYTES;              // its lowest bit is the widest access that rows allow
constexpr int VECTOR = (BYTES & -BYTES) / int(sizeof(Element));  // elements
constexpr int LANES = HEAD_DIM_V / VECTOR > 16 ? 32 : HEAD_DIM_V / VECTOR > 8 ? 16 : 8;  // that share a row

struct alignas(VECTOR * sizeof(Element)) Vector {
  Element x[VECTOR];
};

extern "C" __global__ void __launch_bounds__(32 * WARPS) backward_delta(const __grid_constant__ Params p) {
  const int index = gridDim.x - 1 - blockIdx.x;  // the main kernel begins with the first heads: they shall be in cache
  const int block_m = index % p.row_blocks, head = index / p.row_blocks % p.heads,
            batch = index / p.row_blocks / p.heads;
  const Sequence sequence(p, batch);
  const int end = min((block_m + 1) * BLOCK_M, sequence.seqlen_q);
  if (block_m * BLOCK_M >= end) return;
  const auto dout = sequence.rows_q(static_cast<const Element*>(p.dout), p.dout_strides, head);
  const auto out = sequence.rows_q(static_cast<const Element*>(p.out), p.out_strides, head);
  Accum* const delta = static_cast<Accum*>(p.delta) + sequence.workspace_row(p, head);
  const RowSums sums(p, sequence, head, block_m);

  const int lane = threadIdx.x % LANES;
  for (int row = block_m * BLOCK_M + threadIdx.x / LANES; row - threadIdx.x / LANES % (32 / LANES) < end;
       row += 32 * WARPS / LANES) {
    Accum sum = 0;
    if (row < end) {
#pragma unroll(4)
      for (int col = lane * VECTOR; col < HEAD_DIM_V; col += LANES * VECTOR) {
        const Vector x = *reinterpret_cast<const Vector*>(dout.origin + row * dout.row_stride + col * dout.col_stride);
        const Vector y = *reinterpret_cast<const Vector*>(out.origin + row * out.row_stride + col * out.col_stride);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) sum += widen(x.x[i]) * widen(y.x[i]);
      }
    }
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
    if (lane == 0 && row < end) {
      if constexpr (ROW_SUMS) {
        const Accum lse = static_cast<const Accum*>(p.lse)[sequence.lse_offset(p, head) + row * p.lse_row];
        sums.lse[row - block_m * BLOCK_M] =
            lse == minus_infinity<Accum>() ? -minus_infinity<Accum>() : lse * static_cast<Accum>(LOG2E);
        sums.minus_delta[row - block_m * BLOCK_M] = -sum;
      } else {
        delta[row] = sum;
      }
    }
  }
  if constexpr (ROW_SUMS)
    for (int i = end - block_m * BLOCK_M + threadIdx.x; i < BLOCK_M; i += 32 * WARPS)
      sums.lse[i] = -minus_infinity<Accum>(), sums.minus_delta[i] = 0;

  const Band::Blocks keys = Band(p, sequence).key_blocks(block_m * BLOCK_M, BLOCK_M, BLOCK_N);
  if (SET_BY_FIRST && keys.begin < keys.end) return;
  const DqAccum dq_accum(p, sequence, head, block_m);
  for (int i = threadIdx.x; i < BLOCK_M * D * int(sizeof(Accum)) / 16; i += 32 * WARPS)
    reinterpret_cast<uint4*>(dq_accum.origin)[i] = uint4{0, 0, 0, 0};
}
