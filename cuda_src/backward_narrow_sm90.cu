// Attention backward on Hopper for head dims 33 to 64 without dropout and softcap, where a consumer's registers have
// room for dK and dV of 128 keys.
// backward_delta.cu runs before it, backward_dq.cu after it.
//
//   A thread block owns 128 keys.  Its two consumers (warpgroups) take blocks of rows in turn, each for all the keys:
//   so neither waits for the other, and one's products run beside the other's exponentials.  Other threads bring what
//   they need and take dQ away (key_tiles.cuh).
//
//     for every other block of rows, over all query heads that share these keys:
//       for each half of the keys:
//         start S^T = K Q^T, dP^T - delta = V dO^T - delta
//         wait for S;   P^T = exp(score(S) - LSE)
//         wait for dP;  dS^T = P^T * (dP - delta)
//         dS to shared memory
//         start dV += P^T dO                 P^T and dS^T are their products' A fragments as they stand
//         start dK += dS^T Q, in the second half behind dQ
//       start dQ = dS K
//       wait for dQ; leave it in shared memory
//     add up both consumers' dK and dV, of half the keys each; write them
#include "key_tiles.cuh"
#include "score.cuh"
#include "transposed.cuh"
#include "visible.cuh"
#include "warpgroup.cuh"

static_assert(DK <= 64 && DV <= 64 && READERS == 1 && DQ_STAGES == 2);
static_assert(STAGES == CONSUMERS * DQ_STAGES && DOUT_STAGES == STAGES);
static_assert(!DROPOUT && !SOFTCAP, "there are no registers for what they keep between the products");
static_assert(KEYS == 64 && StoredK::BYTES <= TileS::BYTES && StoredV::BYTES <= TileS::BYTES);

using Words = unsigned[N / 2][4];  // P^T or dS^T as A fragments

// What a consumer needs for a block of rows with a half of the keys, [KEYS, BLOCK_M].
template <bool MASKED_>
struct Step {
  static constexpr bool MASKED = MASKED_;  // whether something is hidden
  const TmaParams& p;
  const Shared& shared;
  const Score<float>& score;
  const Band& band;
  int first_key, first_row, stage;  // of the tile of keys, of the block of rows

  __device__ __forceinline__ TileQ q() const { return shared.q(stage); }
  __device__ __forceinline__ TileO dout() const { return shared.dout(stage); }
  __device__ __forceinline__ int last_row() const { return min(first_row + BLOCK_M, band.seqlen_q) - 1; }
  // Of this lane's first entry.
  __device__ __forceinline__ int row0() const { return first_row + threadIdx.x % 4 * 2; }
  __device__ __forceinline__ int key0(int half) const {
    return first_key + half * KEYS + recompute(threadIdx.x) / 32 % 4 * 16 + recompute(threadIdx.x) % 32 / 4;
  }
  // Of this warp's first entry, in the tile.
  __device__ __forceinline__ int key(int half) const { return half * KEYS + recompute(threadIdx.x / 32 % 4) * 16; }

  __device__ __forceinline__ void start_scores(int half, float (&s)[N][4], float (&dp)[N][4],
                                               float (&lse)[N][2]) const {
    const unsigned sums = shared.sums(stage) + threadIdx.x % 4 * 8;
    load_row_sums(lse, sums);
    load_row_sums(dp, sums + BLOCK_M * 4);
    pin(s);
    pin(dp);
    wgmma_fence();
    warpgroup_gemm<DK / 16>(s, WarpgroupOperand<Major::K, TileK>(TileK{shared.k().base + half * KEYS * 128}),
                            WarpgroupOperand<Major::K, TileQ>(q()), false);
    wgmma_commit();
    wgmma_fence();
    warpgroup_gemm<DV / 16>(dp, WarpgroupOperand<Major::K, TileV>(TileV{shared.v().base + half * KEYS * 128}),
                            WarpgroupOperand<Major::K, TileO>(dout()), true);
    wgmma_commit();
  }

  // S -> P.
  __device__ __forceinline__ void exponentiate(int half, float (&s)[N][4], const float (&lse)[N][2]) const {
    pin(s);
    apply_transposed(s, score, row0(), key0(half));
    exponentiate_transposed(s, score.factor, lse);
    if (MASKED) band.mask_transposed(s, row0(), key0(half), 0.f);  // not before: LSE may be NaN
  }

  // dP - delta -> dS.
  __device__ __forceinline__ void differentiate(int half, float (&dp)[N][4], const float (&s)[N][4]) const {
    pin(dp);
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) dp[i / 4][i % 4] *= s[i / 4][i % 4];
    if (MASKED) band.mask_transposed(dp, row0(), key0(half), 0.f);
  }
};

template <int COLUMNS, class B>
__device__ __forceinline__ void start_gradient(float (&gradient)[COLUMNS][4], Words& a, const B& b) {
  pin(gradient);
  pin(a);
  wgmma_fence();
  warpgroup_gemm(gradient, a, b);
  wgmma_commit();
}
template <int COLUMNS>
__device__ __forceinline__ void finished(float (&gradient)[COLUMNS][4], Words& a) {
  pin(gradient);
  pin(a);
}

template <int STEPS>
__device__ __forceinline__ void start_dq(QFragments& dq, const TileS& ds, const TileK& k) {
  pin(dq[0]);
  wgmma_fence();
  warpgroup_gemm<STEPS>(dq[0], WarpgroupOperand<Major::K, TileS>(ds), WarpgroupOperand<Major::MN, TileK>(k), false);
  wgmma_commit();
}

// The sums of both consumers for one half of the keys each, its number's, left in `x[0]`; what they give each other
// goes through their own places.
template <int COLUMNS>
__device__ __forceinline__ void give(const float (&x)[2][1][COLUMNS][4], int number, unsigned place) {
#pragma unroll
  for (int n = 0; n < COLUMNS; ++n) {
    float y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = number ? x[0][0][n][i] : x[1][0][n][i];
    store_shared(place + (n * 128 + threadIdx.x % 128) * 16, y);
  }
}
template <int COLUMNS>
__device__ __forceinline__ void take(float (&x)[2][1][COLUMNS][4], int number, unsigned place) {
#pragma unroll
  for (int n = 0; n < COLUMNS; ++n) {
    const int4 words = load_shared(place + (n * 128 + threadIdx.x % 128) * 16);
    const float y[4] = {__int_as_float(words.x), __int_as_float(words.y), __int_as_float(words.z),
                        __int_as_float(words.w)};
#pragma unroll
    for (int i = 0; i < 4; ++i) x[0][0][n][i] = (number ? x[1][0][n][i] : x[0][0][n][i]) + y[i];
  }
}

__device__ __forceinline__ void consume(const TmaParams& p, const Shared shared, const int number) {
  const int own_barrier = 2 + number;  // 1 is both consumers'
  Score<float> score(p);
  Ring<STAGES> q_ring(shared.q_stages());  // dO's moves along with it; a stage's number says whose turn it is
  const Stages<DOUT_STAGES> dout_stages = shared.dout_stages();
  Ring<DQ_STAGES> dq_ring(shared.dq_stages(number));
  const Stages<1> exchange = shared.exchange();

  for (unsigned phase = 0;; phase ^= 1) {
    const Work work = hear(p, shared.work(), shared.work_stages(), phase);
    __syncwarp();  // with it, NVRTC 13.5 spills less
    if (!work.valid()) break;
    const Sequence& sequence = work.sequence;
    const Band band(p, sequence);
    const RowBlocks blocks(band, work.first);
    const Band::Blocks whole = band.whole_row_blocks(work.first, BLOCK_N, BLOCK_M);
    float dk[2][1][DK / 8][4] = {}, dv[2][1][DV / 8][4] = {};  // of each half: [KEYS, DK], [KEYS, DV]

    shared.kv_stages().full(0).wait(phase);
    clear_from(shared.k(), sequence.seqlen_k - work.first, 1, 256);
    clear_from(shared.v(), sequence.seqlen_k - work.first, 1, 256);
    int keys_spoilt = -1;  // whether they have NaN or inf; not known yet
    int head = work.head * p.group, block = blocks.start;
    for (int left = blocks.count() * p.group; left > 0; --left, block = blocks.after(block)) {
      if (ALIBI && block == blocks.start) score.select(p, band, sequence.batch, head++);
      if (q_ring.stage % CONSUMERS != number) {
        q_ring.next();
        continue;
      }
      const auto work_on = [&](auto step) {
        constexpr bool MASKED = decltype(step)::MASKED;
        const int place = q_ring.stage / CONSUMERS;  // of dS; dQ's stage, which it is too, lies in a register
        const TileS ds_smem = shared.s(place, number);
        const WarpgroupOperand<Major::MN, TileQ> q(step.q());
        const WarpgroupOperand<Major::MN, TileO> dout(step.dout());
        float s[N][4], dp[N][4], lse[N][2];
        Words p_words, ds_words;
        QFragments dq;

        q_ring.wait();
        clear_from(step.q(), sequence.seqlen_q - step.first_row, own_barrier, 128);
        dout_stages.full(step.stage).wait(q_ring.phase);
        clear_from(step.dout(), sequence.seqlen_q - step.first_row, own_barrier, 128);
        const auto spoilt = [&] {
          if (keys_spoilt < 0) keys_spoilt = any_non_finite<128>(shared.k()) || any_non_finite<128>(shared.v());
          return named_barrier_or(own_barrier, 128,
                                  keys_spoilt || any_non_finite<128>(step.q()) || any_non_finite<128>(step.dout()));
        };
        if (MASKED && spoilt()) {
          const TileS p_smem = shared.s(place ^ 1, number);
#pragma unroll 1
          for (int half = 0; half < 2; ++half) {
            step.start_scores(half, s, dp, lse);
            wgmma_wait<0>();
            step.exponentiate(half, s, lse);
            step.differentiate(half, dp, s);
            pack_transposed(p_words, s);
            pack_transposed(ds_words, dp);
            store_transposed(p_smem, p_words, step.key(half));
            store_transposed(ds_smem, ds_words, step.key(half));
          }
          named_barrier_sync(own_barrier, 128);
#pragma unroll
          for (int i = 0; i < Q_COLUMNS / 2; ++i) dq[0][i / 4][i % 4] = 0;
          add_visible<false>(dq, ds_smem, step.key(0), shared.k(), 0, band, step.first_row, work.first);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            add_visible<true>(dv[half], p_smem, step.key(half), step.dout(), 0, band, step.first_row, work.first);
            add_visible<true>(dk[half], ds_smem, step.key(half), step.q(), 0, band, step.first_row, work.first);
          }
          named_barrier_sync(own_barrier, 128);
          dout_stages.release(step.stage);
          dq_ring.wait_empty();
          hand_over(dq, shared, number, dq_ring);
        } else {
          const auto start_half = [&](int half) {
            step.start_scores(half, s, dp, lse);
            wgmma_wait<1>();
            step.exponentiate(half, s, lse);
            pack_transposed(p_words, s);
            wgmma_wait<0>();
            step.differentiate(half, dp, s);
            pack_transposed(ds_words, dp);
            store_transposed(ds_smem, ds_words, step.key(half));
            start_gradient(dv[half][0], p_words, dout);
          };
          start_half(0);
          start_gradient(dk[0][0], ds_words, q);
          wgmma_wait<0>();
          finished(dv[0][0], p_words);
          finished(dk[0][0], ds_words);
          if (!MASKED || work.first + KEYS < band.high(step.last_row())) {
            start_half(1);
            fence_async_shared();
            named_barrier_sync(own_barrier, 128);  // all of dS is here
            start_dq<BLOCK_N / 16>(dq, ds_smem, shared.k());
            wgmma_wait<1>();
            finished(dv[1][0], p_words);
            dout_stages.release(step.stage);
            start_gradient(dk[1][0], ds_words, q);
            dq_ring.wait_empty();
            wgmma_wait<1>();
            pin(dq[0]);
            hand_over(dq, shared, number, dq_ring);
            wgmma_wait<0>();
            finished(dk[1][0], ds_words);
          } else {  // nobody here sees the other half
            dout_stages.release(step.stage);
            fence_async_shared();
            named_barrier_sync(own_barrier, 128);
            start_dq<KEYS / 16>(dq, ds_smem, shared.k());
            dq_ring.wait_empty();
            wgmma_wait<0>();
            pin(dq[0]);
            hand_over(dq, shared, number, dq_ring);
          }
        }
      };
      if (whole.has(block))  // instructions of its own, without those for masks in their midst
        work_on(Step<false>{p, shared, score, band, work.first, block * BLOCK_M, q_ring.stage});
      else
        work_on(Step<true>{p, shared, score, band, work.first, block * BLOCK_M, q_ring.stage});
      q_ring.release_by_each();
      dq_ring.next();
    }
    shared.kv_stages().release(0);

    // dS has served: its places take what one consumer gives the other, then dV and dK.
    named_barrier_sync(own_barrier, 128);
    give(dv, number, shared.s(0, number).base);
    give(dk, number, shared.s(1, number).base);
    exchange.full(0).arrive();
    exchange.full(0).wait(phase);
    take(dv, number, shared.s(0, 1 - number).base);
    take(dk, number, shared.s(1, 1 - number).base);
    exchange.empty(0).arrive();
    exchange.empty(0).wait(phase);
    const int first_key = work.first + number * KEYS;
    store_gradient<HEAD_DIM_V>(StoredV{shared.s(0, number).base}, dv[0][0],
                               sequence.rows_k(static_cast<Element*>(p.dv), p.dv_strides, work.head), first_key, 1.f);
    store_gradient<HEAD_DIM>(StoredK{shared.s(1, number).base}, dk[0][0],
                             sequence.rows_k(static_cast<Element*>(p.dk), p.dk_strides, work.head), first_key,
                             static_cast<float>(p.scale));
    named_barrier_sync(own_barrier, 128);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) backward_narrow_sm90(const __grid_constant__ TmaParams p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  run(p, Shared{shared_address(memory)}, consume);
}
