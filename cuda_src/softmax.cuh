// The online softmax of a block of rows (Milakov and Gimelshein, 2018; FlashAttention-2, section 3.1): running maximum
// m and sum l of each row, and the factor by which what was accumulated under an older maximum shrinks.
//
// A lane holds 2 M rows: rows g and g + 8 of M products of 16; the four lanes of a row are neighbours.
#pragma once
#include "element.cuh"

constexpr int MAX_AHEAD = 8;  // powers of two by which a score may exceed the maximum that P is taken under

// What a row's scores, or a part of them, come to: sum(exp2(factor * score - shift)); 0 where it saw none.  In large
// numbers their logarithm would have no digits left for the sum.
template <class Accum>
struct alignas(2 * sizeof(Accum)) SoftmaxPart {
  Accum shift, sum;
};

// The largest of a row, from what its four lanes have.
template <class Accum>
__device__ __forceinline__ Accum max_of_row(Accum x) {
  x = max(x, __shfl_xor_sync(~0u, x, 1));
  return max(x, __shfl_xor_sync(~0u, x, 2));
}

// The largest of what a lane has of a row: that of row `half` in product `tile`.
template <class Accum, int M, int N>
__device__ __forceinline__ Accum max_of_lane(const Accum (&s)[M][N][4], int tile, int half) {
  Accum x = s[tile][0][2 * half];
#pragma unroll
  for (int j = 1; j < 2 * N; ++j) x = max(x, s[tile][j / 2][2 * half + j % 2]);
  return x;
}

template <class Accum>
__device__ __forceinline__ Accum sum_of_row(Accum x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

template <class Accum, int M, int N_OUT>
__device__ __forceinline__ void rescale(Accum (&o)[M][N_OUT][4], const Accum (&shrink)[M][2]) {
#pragma unroll
  for (int i = 0; i < 4 * M * N_OUT; ++i) o[i / 4 % M][i / 4 / M][i % 4] *= shrink[i / 4 % M][i % 4 / 2];
}

template <class Accum, int M>
struct Softmax {
  Accum m[M][2], l[M][2];  // l is this lane's share of the sum until total()

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) m[i / 2][i % 2] = minus_infinity<Accum>(), l[i / 2][i % 2] = 0;
  }

  // The maximum of these scores too.  Returns whether that of any row of the warp moved: only then is `shrink` set, by
  // which all that was accumulated must be multiplied.
  template <int N>
  __device__ __forceinline__ bool raise_maximum(const Accum (&s)[M][N][4], Accum (&shrink)[M][2], Accum factor) {
    Accum before[M][2];
    bool moved = false;
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) {
      Accum& maximum = m[i / 2][i % 2];
      before[i / 2][i % 2] = maximum;
      maximum = max(maximum, max_of_row(max_of_lane(s, i / 2, i % 2)));
      moved |= before[i / 2][i % 2] != maximum;
    }
    if (!__any_sync(~0u, moved)) return false;
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) {
      const Accum from = before[i / 2][i % 2], to = m[i / 2][i % 2];
      // Exactly 1 where the maximum stays: anything else would add up over the blocks.
      shrink[i / 2][i % 2] = from == to ? 1 : exp2_fast((from - to) * factor);
    }
    return true;
  }

  // The same for one of the lane's two rows, without a branch; l has shrunk when it returns.
  template <int N>
  __device__ __forceinline__ void raise_maximum(int half, const Accum (&s)[M][N][4], Accum (&shrink)[M][2],
                                                Accum factor) {
    static_assert(M == 1);
    const Accum before = m[0][half];
    m[0][half] = max(before, max_of_row(max_of_lane(s, 0, half)));
    shrink[0][half] = before == m[0][half] ? 1 : exp2_fast((before - m[0][half]) * factor);
    l[0][half] *= shrink[0][half];
  }

  // scores -> exp2(factor * (score - maximum)); some of a lane's columns, or all
  template <int BEGIN, int END, int N>
  __device__ __forceinline__ void exponentiate(int tile, int half, Accum (&s)[M][N][4], Accum factor) {
    const Accum below = shift(tile, half, factor);
#pragma unroll
    for (int j = BEGIN; j < END; ++j) {
      Accum& x = s[tile][j / 2][2 * half + j % 2];
      x = exp2_fast(x * factor - below);
      l[tile][half] += x;
    }
  }
  template <int N>
  __device__ __forceinline__ void exponentiate(Accum (&s)[M][N][4], Accum factor) {
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) exponentiate<0, 2 * N>(i / 2, i % 2, s, factor);
  }

  // The same for a warpgroup's block: P goes straight into the words of the next product's A fragments.  Nothing was
  // accumulated before.
  template <class E, int N>
  __device__ __forceinline__ void exponentiate_first(unsigned (&p)[N / 2][4], const Accum (&s)[M][N][4], Accum factor) {
    Accum shrink[M][2], top[2];
    raise_maximum(s, shrink, factor);
    exponentiate_packed<E>(p, s, factor, l[0], top);
  }

  // And for the blocks behind it, without waiting for their maximum: P is taken under the maximum so far.  Only if a
  // score of the warp exceeds that by more than MAX_AHEAD powers of two is it computed again, under the new maximum;
  // then this returns true, and O must be multiplied by `shrink`.  Which maximum a row goes by does not matter as long
  // as P, l and O agree on it: P is at most 2^MAX_AHEAD, with as many digits as ever.
  template <class E, int N>
  __device__ __forceinline__ bool exponentiate_ahead(unsigned (&p)[N / 2][4], const Accum (&s)[M][N][4],
                                                     Accum (&shrink)[M][2], Accum factor) {
    Accum sum[2], top[2];
    exponentiate_packed<E>(p, s, factor, sum, top);
    const bool exceeded = (top[0] - m[0][0]) * factor > MAX_AHEAD || (top[1] - m[0][1]) * factor > MAX_AHEAD;
    const bool again = __any_sync(~0u, exceeded);
    if (again) {
      raise_maximum(s, shrink, factor);
      l[0][0] *= shrink[0][0], l[0][1] *= shrink[0][1];
      exponentiate_packed<E>(p, s, factor, sum, top);
    }
    l[0][0] += sum[0], l[0][1] += sum[1];
    return again;
  }

  // Both, while l and the output accumulators move under the new maximum.
  template <int N, int N_OUT>
  __device__ __forceinline__ void update(Accum (&s)[M][N][4], Accum (&o)[M][N_OUT][4], Accum factor) {
    Accum shrink[M][2];
    if (raise_maximum(s, shrink, factor)) {  // seldom, after the first blocks
#pragma unroll
      for (int i = 0; i < 2 * M; ++i) l[i / 2][i % 2] *= shrink[i / 2][i % 2];
      rescale(o, shrink);
    }
    exponentiate(s, factor);
  }

  // factor * maximum; 0 for a row that saw nothing yet: exp2(-inf - 0) = 0.  Rounded up, for P to be 1 at most: that of
  // the maximum is 2 to the power of the rounding error, which in numbers beyond 2^31 is in the hundreds.
  __device__ __forceinline__ Accum shift(int tile, int half, Accum factor) const {
    const Accum maximum = m[tile][half];
    return maximum == minus_infinity<Accum>() ? 0 : multiply_up(maximum, factor);
  }

  // The whole row's sum.
  __device__ __forceinline__ Accum total(int tile, int half) const { return sum_of_row(l[tile][half]); }

  __device__ __forceinline__ SoftmaxPart<Accum> part(int tile, int half, Accum total, Accum factor) const {
    return {shift(tile, half, factor), total};
  }

  // LSE of a row with that total, in powers of two.
  __device__ __forceinline__ Accum lse2(int tile, int half, Accum total, Accum factor) const {
    return shift(tile, half, factor) + log2(total);
  }

 private:
  // Step k of the fragments, word 2 j + half: the pair of row `half` in the eight columns 2 k + j.
  template <class E, int N>
  __device__ __forceinline__ void exponentiate_packed(unsigned (&p)[N / 2][4], const Accum (&s)[M][N][4], Accum factor,
                                                      Accum (&sum)[2], Accum (&top)[2]) const {
    static_assert(M == 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) sum[half] = 0, top[half] = m[0][half];
    const Accum below[2] = {shift(0, 0, factor), shift(0, 1, factor)};
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) {
      const int n = i / 2, half = i % 2;
      const Accum x = s[0][n][2 * half], y = s[0][n][2 * half + 1];
      const Accum a = exp2_fast(fma(x, factor, -below[half])), b = exp2_fast(fma(y, factor, -below[half]));
      p[n / 2][n % 2 * 2 + half] = pack(a, b, E{});
      sum[half] += a + b;
      top[half] = max(top[half], max(x, y));
    }
  }
};

// The same for elements as wide as their accumulators, whose P is as exact under any maximum near the row's.  So that
// of the first keys stands for it, and moves only where a score exceeds it by more than MAX_AHEAD powers of two: after
// the first blocks hardly ever.  The maximum of two doubles takes ten instructions, one of which follows the other; to
// see that no score is that large, their high words are compared, beside the pipe of doubles.
template <class Accum, int M>
struct LazySoftmax {
  static constexpr int LEAST = -2147483648;

  WarpExp2<Accum> exp2;
  Accum shift[M][2], l[M][2];  // factor * maximum, 0 before there is one; l as above
  int limit[M][2];             // high word of the score MAX_AHEAD above the shift; LEAST if that is negative
  unsigned unseen;             // a bit for each of the lane's rows that has seen no key yet

  __device__ __forceinline__ LazySoftmax() : unseen((1u << 2 * M) - 1) {
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) shift[i / 2][i % 2] = l[i / 2][i % 2] = 0, limit[i / 2][i % 2] = LEAST;
  }

  // Scores -> P, while l and the output accumulators move where the shift does.
  template <int N, int N_OUT>
  __device__ __forceinline__ void update(Accum (&s)[M][N][4], Accum (&o)[M][N_OUT][4], Accum factor) {
    bool large = false;
#pragma unroll
    for (int i = 0; i < M * N * 4; ++i)
      large |= high_word(s[i / 4 / N][i / 4 % N][i % 4]) >= limit[i / 4 / N][i % 4 / 2];
    if (__any_sync(~0u, large)) raise_shift(s, o, factor);
#pragma unroll
    for (int i = 0; i < M * N * 4; ++i) {
      Accum& x = s[i / 4 / N][i / 4 % N][i % 4];
      x = exp2(fma(x, factor, -shift[i / 4 / N][i % 4 / 2]));
      l[i / 4 / N][i % 4 / 2] += x;
    }
  }

  __device__ __forceinline__ Accum total(int tile, int half) const { return sum_of_row(l[tile][half]); }

  __device__ __forceinline__ SoftmaxPart<Accum> part(int tile, int half, Accum total, Accum) const {
    return {shift[tile][half], total};
  }

  __device__ __forceinline__ Accum lse2(int tile, int half, Accum total, Accum) const {
    return shift[tile][half] + log2(total);
  }

 private:
  template <int N, int N_OUT>
  __device__ __forceinline__ void raise_shift(const Accum (&s)[M][N][4], Accum (&o)[M][N_OUT][4], Accum factor) {
    Accum shrink[M][2];
    bool moved = false;
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) {
      const int m = i / 2, half = i % 2;
      const Accum top = max_of_row(max_of_lane(s, m, half));
      const bool first = unseen >> i & 1;
      shrink[m][half] = 1;
      if (top > minus_infinity<Accum>() && (first || top * factor > shift[m][half] + MAX_AHEAD)) {
        const Accum to = multiply_up(top, factor), ahead = (to + MAX_AHEAD) * a_little_less_than_inverse(factor);
        if (!first) shrink[m][half] = exp2_fast(shift[m][half] - to);
        shift[m][half] = to;
        limit[m][half] = ahead < 0 ? LEAST : high_word(ahead);
        unseen &= ~(1u << i);
        moved = true;
      }
      l[m][half] *= shrink[m][half];
    }
    if (__any_sync(~0u, moved)) rescale(o, shrink);
  }

  // By which a limit comes out too low rather than too high.
  static __device__ __forceinline__ Accum a_little_less_than_inverse(Accum x) {
    return Accum(1 - 0x1p-20) * reciprocal_fast(static_cast<float>(x));
  }
};

template <class E, int M>
struct SoftmaxOf {
  using Type = LazySoftmax<typename Traits<E>::Accum, M>;
};
template <int M>
struct SoftmaxOf<float16, M> {
  using Type = Softmax<float, M>;
};
template <int M>
struct SoftmaxOf<bfloat16, M> {
  using Type = Softmax<float, M>;
};
