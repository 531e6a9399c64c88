// What happens to a raw score q.k before the softmax: scale, softcap, ALiBi; beside it, its derivative.
//
// The softmax works in powers of two on  factor * score.  With scale alone the scores stay raw and factor is
// scale * log2(e); otherwise apply() brings them to log2 units and factor is 1.
#pragma once
#include "band.cuh"

constexpr double LOG2E = 1.4426950408889634, LN2 = 0.6931471805599453;

template <class Accum>
struct Score {
  static constexpr bool RAW = !SOFTCAP && !ALIBI && !SIGNED_SCALE;  // a negative scale would turn the maximum around

  Accum scale, softcap, slope, factor;
  int offset;

  __device__ __forceinline__ explicit Score(const Params& p)
      : scale(static_cast<Accum>(p.scale)),
        softcap(static_cast<Accum>(p.softcap)),
        slope(0),
        factor(RAW ? static_cast<Accum>(p.scale * LOG2E) : Accum(1)),
        offset(0) {}

  __device__ __forceinline__ void select(const Params& p, const Band& band, int batch, int head) {
    offset = band.offset;
    if constexpr (ALIBI) slope = p.alibi_slopes[batch * p.alibi_batch + head * p.alibi_head];
  }

  __device__ __forceinline__ Accum apply(Accum x, int row, int key) const {
    x *= scale;
    if constexpr (SOFTCAP) x = softcap * tanh(x / softcap);
    if constexpr (ALIBI) x -= slope * static_cast<Accum>(abs(row + offset - key));
    return x * static_cast<Accum>(LOG2E);
  }

  template <int M, int N>
  __device__ __forceinline__ void apply(Accum (&s)[M][N][4], int row0, int key0) const {
    if constexpr (!RAW) {
#pragma unroll
      for (int i = 0; i < M * N * 4; ++i) {
        const int m = i / (4 * N), n = i / 4 % N, c = i % 4;
        s[m][n][c] = apply(s[m][n][c], row0 + 16 * m + c / 2 * 8, key0 + 8 * n + c % 2);
      }
    }
  }

  // d(score) / d(scale * q.k), from what apply() returned.
  __device__ __forceinline__ Accum derivative(Accum x, int row, int key) const {
    if constexpr (!SOFTCAP) return 1;
    x *= static_cast<Accum>(LN2);
    if constexpr (ALIBI) x += slope * static_cast<Accum>(abs(row + offset - key));
    const Accum t = max(x / softcap, Accum(-1));  // tanh; a masked score is -inf
    return 1 - t * t;
  }
};
