// Last step of a forward pass in which several thread blocks shared the keys of a row: O and LSE from O and l of the
// parts, which have maxima m of their own.
//
//   m' = max(m),  w = exp(m - m'),  l' = sum(w l),  O' = sum(w O) / l',  LSE = m' + log(l')
//
// A thread block has one row; its warps take the parts in turn, a lane a pair of columns in each 64.
#include "forward_row.cuh"
#include "parts.cuh"
#include "ptx/memory.cuh"

using Accum = Traits<Element>::Accum;

struct alignas(2 * sizeof(Accum)) Pair {
  Accum x, y;
};
constexpr int PAIRS = (HEAD_DIM_V + 63) / 64;  // of one lane
static_assert(SHARED_BYTES >= WARPS * PART_COLUMNS * int(sizeof(Accum)));

extern "C" __global__ void __launch_bounds__(32 * WARPS) forward_combine(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const unsigned smem = shared_address(shared);
  const int row = blockIdx.x % p.seqlen_q, head = blockIdx.x / p.seqlen_q % p.heads,
            batch = blockIdx.x / p.seqlen_q / p.heads;
  const Sequence sequence(p, batch);
  if (row >= sequence.seqlen_q) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const long long first = first_part(p, batch, head, row);
  const auto* const softmax_parts = static_cast<const SoftmaxPart<Accum>*>(p.softmax_parts) + first;
  const Pair* const o_parts = static_cast<const Pair*>(p.o_parts) + first * (PART_COLUMNS / 2);

  Accum m = minus_infinity<Accum>(), l = 0;
  for (int i = lane; i < p.parts; i += 32) {
    const SoftmaxPart<Accum> x = softmax_parts[i];
    if (x.sum != 0) m = max(m, x.shift);
  }
  for (int mask = 16; mask > 0; mask /= 2) m = max(m, __shfl_xor_sync(~0u, m, mask));
  const auto weight = [&](const SoftmaxPart<Accum>& x) { return x.sum == 0 ? 0 : exp2(x.shift - m); };
  for (int i = lane; i < p.parts; i += 32) l += weight(softmax_parts[i]) * softmax_parts[i].sum;
  for (int mask = 16; mask > 0; mask /= 2) l += __shfl_xor_sync(~0u, l, mask);

  Pair o[PAIRS] = {};
#pragma unroll 4
  for (int i = warp; i < p.parts; i += WARPS) {
    const Accum w = weight(softmax_parts[i]);
#pragma unroll
    for (int n = 0; n < PAIRS; ++n) {
      if (lane + 32 * n >= PART_COLUMNS / 2) continue;
      const Pair x = o_parts[i * (PART_COLUMNS / 2) + lane + 32 * n];
      o[n].x += w * x.x, o[n].y += w * x.y;
    }
  }
#pragma unroll
  for (int n = 0; n < PAIRS; ++n)
    if (lane + 32 * n < PART_COLUMNS / 2)
      store_shared_pair(smem + (warp * PART_COLUMNS + 2 * (lane + 32 * n)) * int(sizeof(Accum)), o[n].x, o[n].y);
  __syncthreads();
  if (warp > 0) return;

  const Accum inverse = l == 0 ? 0 : static_cast<Accum>(p.keep_scale) / l;
  const Band band(p, sequence);
  const bool sees_all = band.low(row) == 0 && band.high(row) == sequence.seqlen_k;
  bool spoilt = false;  // by a NaN or inf in the V of a key that the row does not see, perhaps
  const auto out = sequence.rows_q(static_cast<Element*>(p.out), p.out_strides, head);
#pragma unroll
  for (int n = 0; n < PAIRS; ++n) {
    const int column = 2 * (lane + 32 * n);
    if (column >= HEAD_DIM_V) continue;
    Accum x[2] = {};
#pragma unroll
    for (int i = 0; i < WARPS; ++i) {
      Accum first_column, second;
      load_shared_pair(first_column, second, smem + (i * PART_COLUMNS + column) * int(sizeof(Accum)));
      x[0] += first_column, x[1] += second;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (column + i >= HEAD_DIM_V) continue;
      spoilt |= !sees_all && !is_finite(x[i]);
      out.at(row, column + i) = narrow(x[i] * inverse, Element{});
    }
  }
  if (p.lse != nullptr && lane == 0)
    static_cast<Accum*>(p.lse)[sequence.lse_offset(p, head) + row * p.lse_row] =
        l == 0 ? minus_infinity<Accum>() : (m + log2(l)) * static_cast<Accum>(LN2);
  if (__any_sync(~0u, spoilt)) {
    __syncwarp();
    forward_row(p, batch, head, row);
  }
}
