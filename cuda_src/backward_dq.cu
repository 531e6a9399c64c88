// Last step of the backward pass: dQ from its accumulator.
#include "dq_accum.cuh"

extern "C" __global__ void __launch_bounds__(32 * WARPS) backward_dq(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const Tile<Element, BLOCK_M, D> dq_smem{shared_address(shared)};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int index = gridDim.x - 1 - blockIdx.x;  // the last ones are still in the level-2 cache
  const int block_m = index % p.row_blocks, head = index / p.row_blocks % p.heads,
            batch = index / p.row_blocks / p.heads;
  const Sequence sequence(p, batch);
  const int first_row = block_m * BLOCK_M;
  if (first_row >= sequence.seqlen_q) return;

  if (warp < Q_WARPS_M * Q_WARPS_D) {
    QFragments dq;
    DqAccum(p, sequence, head, block_m).load(dq);
    const Accum scale = static_cast<Accum>(p.scale);
    const int row0 = warp % Q_WARPS_M * Q_ROWS + lane / 4, col0 = warp / Q_WARPS_M * Q_COLUMNS + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < Q_ROWS / 8; ++i)
#pragma unroll
      for (int n = 0; n < Q_COLUMNS / 8; ++n)
        dq_smem.store_pair(row0 + 8 * i, col0 + 8 * n, dq[i / 2][n][i % 2 * 2] * scale,
                           dq[i / 2][n][i % 2 * 2 + 1] * scale);
  }
  __syncthreads();
  const auto dq_rows = sequence.rows_q(static_cast<Element*>(p.dq), p.dq_strides, head);
  for (int row = warp * 16; row < BLOCK_M; row += WARPS * 16)
    store_rows<16, HEAD_DIM>(dq_smem, row, dq_rows, first_row + row);
}
