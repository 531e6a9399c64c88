// One row of the forward pass by one warp, from the formulas: what the row does not see is not touched.
//
// In a product P V on tensor cores a hidden key has P = 0, but 0 * NaN and 0 * inf are NaN.  A kernel that finds its
// tile spoilt by such a key writes the tile's rows anew with this.
#pragma once
#include "band.cuh"
#include "dropout.cuh"
#include "score.cuh"
#include "sequence.cuh"

// Overwrites the row of out, which stands already, unless it is rightly NaN: then its scores are.
template <class Accum = Traits<Element>::Accum>
__device__ __forceinline__ void forward_row(const Params& p, int batch, int head, int row) {
  constexpr int COLUMNS = (HEAD_DIM_V + 31) / 32;  // of one lane
  const Sequence sequence(p, batch);
  const Band band(p, sequence);
  Score<Accum> score(p);
  score.select(p, band, batch, head);
  const Dropout dropout(p, batch, head);
  const int lane = threadIdx.x % 32, begin = band.low(row), end = band.high(row);
  const auto q = sequence.rows_q(static_cast<const Element*>(p.q), p.q_strides, head);
  const auto k = sequence.rows_k(static_cast<const Element*>(p.k), p.k_strides, head / p.group);
  const auto v = sequence.rows_k(static_cast<const Element*>(p.v), p.v_strides, head / p.group);
  const auto exponent = [&](int key) {
    Accum x = 0;
#pragma unroll 1
    for (int d = 0; d < HEAD_DIM; ++d) x += widen(q.at(row, d)) * widen(k.at(key, d));
    if constexpr (!Score<Accum>::RAW) x = score.apply(x, row, key);
    return multiply_up(x, score.factor);  // and nothing else: no product may exceed the largest when that is subtracted
  };

  Accum m = minus_infinity<Accum>(), l = 0, o[COLUMNS] = {};
  for (int first = begin; first < end; first += 32) {
    const Accum x = first + lane < end ? exponent(first + lane) : m;
    if (__any_sync(~0u, x != x)) return;
    m = max(m, x);
  }
  for (int mask = 16; mask > 0; mask /= 2) m = max(m, __shfl_xor_sync(~0u, m, mask));
  for (int first = begin; first < end; first += 32) {
    const int key = first + lane;
    Accum weight = key < end && m > minus_infinity<Accum>() ? exp2_fast(exponent(key) - m) : 0;
    l += weight;
    if constexpr (DROPOUT) weight = dropout.keeps(row, key) ? weight * static_cast<Accum>(p.keep_scale) : 0;
#pragma unroll 1
    for (int j = 0; j < min(32, end - first); ++j) {
      const Accum x = __shfl_sync(~0u, weight, j);
#pragma unroll
      for (int i = 0; i < COLUMNS; ++i)
        if (lane + 32 * i < HEAD_DIM_V) o[i] += x * widen(v.at(first + j, lane + 32 * i));
    }
  }
  for (int mask = 16; mask > 0; mask /= 2) l += __shfl_xor_sync(~0u, l, mask);
  const auto out = sequence.rows_q(static_cast<Element*>(p.out), p.out_strides, head);
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i)
    if (lane + 32 * i < HEAD_DIM_V) out.at(row, lane + 32 * i) = narrow(l == 0 ? 0 : o[i] / l, Element{});
}
