// Last step of the backward pass for 16-bit elements: dQ from its float32 accumulator.  One warp for each row.
#include "sequence.cuh"

extern "C" __global__ void __launch_bounds__(32 * WARPS) backward_dq(const __grid_constant__ Params p) {
  const int lane = threadIdx.x % 32;
  const int block = blockIdx.x % p.row_blocks, head = blockIdx.x / p.row_blocks % p.heads, batch = blockIdx.x / p.row_blocks / p.heads;
  const Sequence sequence(p, batch);
  const auto dq = sequence.rows_q(static_cast<Element*>(p.dq), p.dq_strides, head);
  const auto dq_accum = sequence.rows_q(static_cast<const float*>(p.dq_accum), p.dq_accum_strides, head);

  const int end = min((block + 1) * BLOCK_M, sequence.seqlen_q);
  for (int row = block * BLOCK_M + threadIdx.x / 32; row < end; row += WARPS) {
    const float* from = dq_accum.origin + row * dq_accum.row_stride;
    Element* to = dq.origin + row * dq.row_stride;
    if constexpr (HEAD_DIM % 2 == 0) {
#pragma unroll(4)
      for (int col = 2 * lane; col < HEAD_DIM; col += 64) {
        const float2 x = *reinterpret_cast<const float2*>(from + col);
        *reinterpret_cast<unsigned*>(to + col) = pack(x.x, x.y, Element{});
      }
    } else {
      for (int col = lane; col < HEAD_DIM; col += 32) to[col] = narrow<Element>(from[col]);
    }
  }
}
