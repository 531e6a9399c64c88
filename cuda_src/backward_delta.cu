// First step of the backward pass: delta = rowsum(dO * O); dQ's accumulator and the tickets are set to zero.  One warp for each row.
#include "sequence.cuh"

using Accum = Traits<Element>::Accum;

extern "C" __global__ void __launch_bounds__(32 * WARPS) backward_delta(const __grid_constant__ Params p) {
  const int lane = threadIdx.x % 32;
  const int block = blockIdx.x % p.row_blocks, head = blockIdx.x / p.row_blocks % p.heads, batch = blockIdx.x / p.row_blocks / p.heads;
  const Sequence sequence(p, batch);
  const auto dout = sequence.rows_q(static_cast<const Element*>(p.dout), p.dout_strides, head);
  const auto out = sequence.rows_q(static_cast<const Element*>(p.out), p.out_strides, head);
  const auto dq_accum = sequence.rows_q(static_cast<Accum*>(p.dq_accum), p.dq_accum_strides, head);
  Accum* const delta = static_cast<Accum*>(p.delta) + sequence.workspace_row(p, head);

  if constexpr (DETERMINISTIC)
    if (threadIdx.x == 0) p.tickets[blockIdx.x] = 0;
  const int end = min((block + 1) * BLOCK_M, sequence.seqlen_q);
  for (int row = block * BLOCK_M + threadIdx.x / 32; row < end; row += WARPS) {
    Accum sum = 0;
#pragma unroll(4)
    for (int col = lane; col < HEAD_DIM_V; col += 32)
      sum += widen(dout.origin[row * dout.row_stride + col * dout.col_stride]) * widen(out.origin[row * out.row_stride + col * out.col_stride]);
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
    if (lane == 0) delta[row] = sum;
#pragma unroll(4)
    for (int col = lane; col < HEAD_DIM; col += 32) dq_accum.origin[row * dq_accum.row_stride + col] = 0;
  }
}
