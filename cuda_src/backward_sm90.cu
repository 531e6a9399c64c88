// Attention backward on Hopper (TMA, wgmma, warp specialisation): the algorithm of backward_sm80.cu, arranged as in
// FlashAttention-3, section 3.  backward_delta.cu runs before it, backward_dq.cu after it.
//
//   A thread block owns 128 keys, each of its two consumers (warpgroups) 64 of them.  Other threads bring what they
//   need and take dQ away (key_tiles.cuh).
//
//     for each query head that shares these keys, for each block of rows that sees some of them:
//       start S^T = K Q^T, dP^T = V dO^T
//       wait for S;   P^T = exp(score(S) - LSE)
//       wait for dP;  dS^T = P^T * (dropout(dP) - delta) * score'(S), to shared memory
//       start dV += dropout(P)^T dO, dK += dS^T Q    P^T and dS^T are their products' A fragments as they stand
//       in every other block, each consumer in its turn:
//         wait for the other one's dS;  start dQ = dS K
//         wait for dQ; leave it in shared memory
//     write dK, dV
//
//   The other consumer goes on to its next block of rows, so that one's products run beside the other's exponentials.
#include "key_tiles.cuh"
#include "score.cuh"
#include "transposed.cuh"
#include "visible.cuh"
#include "warpgroup.cuh"

static_assert(READERS == 2 && SLICES == 1 && DOUT_STAGES == STAGES);
static_assert(KEYS == 64 && StoredK::BYTES <= TileS::BYTES && StoredV::BYTES <= TileS::BYTES);

struct Consumer {
  const TmaParams& p;
  const Shared shared;
  const int number, warp, lane;
  Score<float> score;
  const float keep_scale;
  const WarpgroupOperand<Major::K, TileK> k;  // this consumer's keys
  const WarpgroupOperand<Major::K, TileV> v;
  Ring<STAGES> q_ring;  // dO's moves along with it
  const Stages<DOUT_STAGES> dout_stages;
  Ring<2> ds_ring;  // both consumers fill it; a stage's number says whose dQ empties it
  Ring<DQ_STAGES> dq_ring;

  float dk[1][DK / 8][4], dv[1][DV / 8][4];  // [KEYS, DK], [KEYS, DV]

  __device__ __forceinline__ Consumer(const TmaParams& params, const Shared shared_, int number_)
      : p(params),
        shared(shared_),
        number(number_),
        warp(__shfl_sync(~0u, threadIdx.x / 32 % 4, 0)),
        lane(threadIdx.x % 32),
        score(params),
        keep_scale(static_cast<float>(params.keep_scale)),
        k(TileK{shared.k().base + number * KEYS * 128}),
        v(TileV{shared.v().base + number * KEYS * 128}),
        q_ring(shared.q_stages()),
        dout_stages(shared.dout_stages()),
        ds_ring(shared.ds_stages()),
        dq_ring(shared.dq_stages(number)) {}

  __device__ __forceinline__ void run() {
    for (unsigned phase = 0;; phase ^= 1) {
      const Work work = hear(p, shared.work(), shared.work_stages(), phase);
      if (!work.valid()) break;
      const Sequence& sequence = work.sequence;
      const Band band(p, sequence);
      const RowBlocks blocks(band, work.first);
      const Band::Blocks whole = band.whole_row_blocks(work.first, BLOCK_N, BLOCK_M);
#pragma unroll
      for (int i = 0; i < DK / 2; ++i) dk[0][i / 4][i % 4] = 0;
#pragma unroll
      for (int i = 0; i < DV / 2; ++i) dv[0][i / 4][i % 4] = 0;

      shared.kv_stages().full(0).wait(phase);
      clear_from(shared.k(), sequence.seqlen_k - work.first, 1, 256);
      clear_from(shared.v(), sequence.seqlen_k - work.first, 1, 256);
      for (int head = work.head * p.group; head < (work.head + 1) * p.group; ++head) {
        score.select(p, band, sequence.batch, head);
        const Dropout dropout(p, sequence.batch, head);
        int block = blocks.start, left = blocks.count();
        while (left > 0) {
          if (whole.has(block)) {  // a loop of its own, without the instructions of masks in its midst
#pragma unroll 1
            for (; left > 0 && whole.has(block); --left, block = blocks.after(block))
              step<false>(work, band, dropout, block * BLOCK_M);
          } else {
            step<true>(work, band, dropout, block * BLOCK_M);
            --left, block = blocks.after(block);
          }
        }
      }
      shared.kv_stages().release(0);

      // dS has served: its places take dV, then dK.
      named_barrier_sync(1, 256);  // both consumers are done with it
      const int first_key = work.first + number * KEYS;
      const unsigned place = shared.s(number).base;
      store_gradient<HEAD_DIM_V>(StoredV{place}, dv[0],
                                 sequence.rows_k(static_cast<Element*>(p.dv), p.dv_strides, work.head), first_key,
                                 DROPOUT ? keep_scale : 1.f);
      store_gradient<HEAD_DIM>(StoredK{place}, dk[0],
                               sequence.rows_k(static_cast<Element*>(p.dk), p.dk_strides, work.head), first_key,
                               static_cast<float>(p.scale));
      named_barrier_sync(1, 256);
    }
  }

  // A block of rows.
  template <bool MASKED>
  __device__ __forceinline__ void step(const Work& work, const Band& band, const Dropout& dropout, int first_row) {
    const int row0 = first_row + lane % 4 * 2, key0 = work.first + number * KEYS + warp * 16 + lane / 4;
    const TileQ q_smem = shared.q(q_ring.stage);
    const TileO dout_smem = shared.dout(q_ring.stage);
    const unsigned sums = shared.sums(q_ring.stage) + lane % 4 * 8;
    float s_rmem[1][N][4], dp_rmem[1][N][4];  // [KEYS, BLOCK_M]
    auto &s = s_rmem[0], &dp = dp_rmem[0];
    unsigned p_words[N / 2][4], ds_words[N / 2][4];

    q_ring.wait();
    clear_from(q_smem, work.sequence.seqlen_q - first_row, 2 + number, 128);
    float lse[N][2], minus_delta[N][2];
    load_row_sums(lse, sums);  // now, since shared memory is slow while products use it
    pin(s);
    wgmma_fence();
    warpgroup_gemm<DK / 16>(s, k, WarpgroupOperand<Major::K, TileQ>(q_smem), false);
    wgmma_commit();
    dout_stages.full(q_ring.stage).wait(q_ring.phase);
    clear_from(dout_smem, work.sequence.seqlen_q - first_row, 2 + number, 128);
    pin(dp);
    wgmma_fence();
    warpgroup_gemm<DV / 16>(dp, v, WarpgroupOperand<Major::K, TileO>(dout_smem), false);
    wgmma_commit();

    const Dropped<N> dropped(dropout, row0, key0);
    bool spoilt = false;  // whether a hidden entry may be, or meet, something that isn't finite

    wgmma_wait<1>();
    pin(s);
    if (MASKED) spoilt |= any_non_finite(s_rmem);
    apply_transposed(s, score, row0, key0);
    float derivative[N][4];
    if constexpr (SOFTCAP) {
#pragma unroll
      for (int i = 0; i < 4 * N; ++i)
        derivative[i / 4][i % 4] = score.derivative(s[i / 4][i % 4], row0 + i / 4 * 8 + i % 2, key0 + i % 4 / 2 * 8);
    }
    exponentiate_transposed(s, score.factor, lse);
    if (MASKED) band.mask_transposed(s, row0, key0, 0.f);  // not before: LSE may be NaN
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) x[j] = dropped.at(n, 2 * half + j) ? 0 : s[n][2 * half + j];
        p_words[n / 2][n % 2 * 2 + half] = pack(x[0], x[1], Element{});
      }
    }

    load_row_sums(minus_delta, sums + BLOCK_M * 4);  // before the wait for the same reason
    wgmma_wait<0>();
    pin(dp);
    if (MASKED) spoilt |= any_non_finite(dp_rmem);
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float x = dp[n][c];
        if constexpr (DROPOUT) x = dropped.at(n, c) ? 0 : x * keep_scale;
        dp[n][c] = s[n][c] * (x + minus_delta[n][c % 2]);
        if constexpr (SOFTCAP) dp[n][c] *= derivative[n][c];
      }
    }
    if (MASKED) band.mask_transposed(dp, row0, key0, 0.f);
    pack_transposed(ds_words, dp);

    const TileS ds_smem = shared.s(ds_ring.stage);
    const bool takes_dq = ds_ring.stage == number;
    QFragments dq;
    if (!MASKED || !named_barrier_or(1, 256, spoilt)) {
      ds_ring.wait_empty();
      store_transposed(ds_smem, ds_words, number * KEYS + warp * 16);
      pin(dv[0]);
      pin(p_words);
      wgmma_fence();
      warpgroup_gemm(dv[0], p_words, WarpgroupOperand<Major::MN, TileO>(dout_smem));
      wgmma_commit();
      say_full(ds_ring);
      pin(dk[0]);
      pin(ds_words);
      wgmma_fence();
      warpgroup_gemm(dk[0], ds_words, WarpgroupOperand<Major::MN, TileQ>(q_smem));
      wgmma_commit();
      wgmma_wait<1>();
      pin(dv[0]);
      pin(p_words);
      dout_stages.release(q_ring.stage);
      wgmma_wait<0>();
      pin(dk[0]);
      pin(ds_words);
      q_ring.stages.release_by_each(q_ring.stage);
      if (takes_dq) {
        ds_ring.wait();
        fence_async_shared();  // for both consumers, whose stores are done by now
        pin(dq[0]);
        wgmma_fence();
        warpgroup_gemm<BLOCK_N / 16>(dq[0], WarpgroupOperand<Major::K, TileS>(ds_smem),
                                     WarpgroupOperand<Major::MN, TileK>(shared.k()), false);
        wgmma_commit();
        dq_ring.wait_empty();
        wgmma_wait<0>();
        pin(dq[0]);
        ds_ring.stages.release(ds_ring.stage);
        hand_over(dq, shared, number, dq_ring);
        dq_ring.next();
      }
    } else {
      const TileS p_smem = shared.s(ds_ring.stage ^ 1);
      const int key_start = number * KEYS + warp * 16;
      store_transposed(p_smem, p_words, key_start);
      store_transposed(ds_smem, ds_words, key_start);
      say_full(ds_ring);
      named_barrier_sync(1, 256);
      add_visible<true>(dv, p_smem, key_start, dout_smem, 0, band, first_row, work.first);
      add_visible<true>(dk, ds_smem, key_start, q_smem, 0, band, first_row, work.first);
      dout_stages.release(q_ring.stage);
      q_ring.stages.release_by_each(q_ring.stage);
      if (takes_dq) {
#pragma unroll
        for (int i = 0; i < Q_COLUMNS / 2; ++i) dq[0][i / 4][i % 4] = 0;
        add_visible<false>(dq, ds_smem, warp * 16, shared.k(), 0, band, first_row, work.first);
        ds_ring.stages.release(ds_ring.stage);
        dq_ring.wait_empty();
        hand_over(dq, shared, number, dq_ring);
        dq_ring.next();
      }
      named_barrier_sync(1, 256);  // P's place is free
    }
    q_ring.next();
    ds_ring.next();
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) backward_sm90(const __grid_constant__ TmaParams p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  run(p, Shared{shared_address(memory)},
      [](const TmaParams& params, const Shared& shared, int number) { Consumer(params, shared, number).run(); });
}
