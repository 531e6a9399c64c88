// Attention backward on tensor cores of sm_80 and later: FlashAttention-2, algorithm 2.  backward_delta.cu runs before
// it.
//
//   for each block of BLOCK_N keys (one thread block):
//     dK = dV = 0
//     for each query head that shares these keys, for each block of BLOCK_M rows that sees some of them:
//       S = Q K^T, dP = dO V^T
//       P = exp(score(S) - LSE), dS = P * (dropout(dP) - delta) * score'(S)
//       dV += dropout(P)^T dO, dK += dS^T Q
//       dQ += dS K                      in global memory, where every block of keys adds its share
//     write dK, dV
//
// P and dS go through shared memory, so each of the three kinds of product splits over the warps in the way that
// reads least: S and dP in S_WARPS_M x S_WARPS_N parts, dK and dV in KV_WARPS_N x KV_WARPS_D, dQ in Q_WARPS_M x
// Q_WARPS_D.  Where S leaves half of the warps idle, they compute dP meanwhile.
//
// What a row does not see must not reach its dQ, nor the row the dK and dV of a key that it does not see.  Hidden
// entries of P and dS are 0, but 0 * NaN and 0 * inf are NaN: where one of the operands isn't finite, and some entries
// are hidden, add_visible() takes the place of the products.
#include "band.cuh"
#include "dq_accum.cuh"
#include "dropout.cuh"
#include "gemm.cuh"
#include "score.cuh"
#include "sequence.cuh"
#include "visible.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int K_STEP = Traits<Element>::K_STEP;
constexpr int DV = (HEAD_DIM_V + Q_COLUMN_STEP - 1) / Q_COLUMN_STEP * Q_COLUMN_STEP;
constexpr int S_ROWS = BLOCK_M / S_WARPS_M, S_KEYS = BLOCK_N / S_WARPS_N;
constexpr int S_AT_ONCE = S_KEYS % 32 == 0 ? 32 : S_KEYS;  // keys: there are registers for no more
constexpr int S_WARPS = S_WARPS_M * S_WARPS_N;
// Whether other warps compute dP.  They hand it over in the place of dS, which must be as wide.
constexpr bool DP_APART = sizeof(Element) == sizeof(Accum) && 2 * S_WARPS <= WARPS;
constexpr int KV_KEYS = BLOCK_N / KV_WARPS_N, K_COLUMNS = D / KV_WARPS_D, V_COLUMNS = DV / KV_WARPS_D;
// Blocks that are seen whole have a loop of their own, where the compiler finds the registers for two.
constexpr bool TWO_LOOPS = !DROPOUT && !SOFTCAP &&
                           (__CUDA_ARCH__ == 900 || (__CUDA_ARCH__ < 900 && !(sizeof(Element) == 4 && HEAD_DIM > 128)));
// Whether blocks of keys begin with different rows: where steps wait for their rows, thread blocks that all ask for the
// same ones wait longer.  Not where sums are added in order, for which they would wait for each other.
constexpr bool STAGGERED = STAGES == 1 && !DETERMINISTIC;
static_assert(BLOCK_M <= THREADS);
static_assert(S_ROWS % 16 == 0 && S_KEYS % 16 == 0 && KV_KEYS % 16 == 0);
static_assert(S_WARPS <= WARPS && KV_WARPS_N * KV_WARPS_D <= WARPS);

using TileK = Tile<Element, BLOCK_N, D>;
using TileV = Tile<Element, BLOCK_N, DV>;
using TileQ = Tile<Element, BLOCK_M, D>;
using TileO = Tile<Element, BLOCK_M, DV>;
using TileP = Tile<Element, BLOCK_M, BLOCK_N>;
constexpr int P_BYTES = (TileP::BYTES + 1023) / 1024 * 1024;
constexpr int STAGE_BYTES =
    TileQ::BYTES + TileO::BYTES + (2 * BLOCK_M * int(sizeof(Accum)) + 1023) / 1024 * 1024;  // Q, dO, LSE, delta
static_assert(SHARED_BYTES >= TileK::BYTES + TileV::BYTES + STAGES * STAGE_BYTES + 2 * P_BYTES);

// This thread block's turn at a block of rows: sums are added in the order of the blocks of keys.
struct Turn {
  int* ticket;
  int order;

  __device__ __forceinline__ void wait() const {
    if (threadIdx.x == 0)
      while (load_acquire(ticket) < order)
        __nanosleep(64);  // wrong lengths may share a ticket: never wait for equality
    __syncthreads();
  }
  __device__ __forceinline__ void pass() const {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) add_release(ticket, 1);
  }
};

// Writes a gradient out through a tile that no one else uses any more.
template <int WIDTH, class T, int M, int N>
__device__ __forceinline__ void store_gradient(const T& tile, const Accum (&acc)[M][N][4], Accum scale,
                                               const Rows<Element>& to, int first, int part_row, int part_column,
                                               bool active) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (active) {
#pragma unroll
    for (int i = 0; i < M * N * 2; ++i) {
      const int m = i / (2 * N), n = i / 2 % N, half = i % 2;
      tile.store_pair(part_row + 16 * m + 8 * half + lane / 4, part_column + 8 * n + lane % 4 * 2,
                      acc[m][n][2 * half] * scale, acc[m][n][2 * half + 1] * scale);
    }
  }
  __syncthreads();
  for (int row = warp * 16; row < T::ROWS; row += WARPS * 16) store_rows<16, WIDTH>(tile, row, to, first + row);
}

// A block of rows of a query head.  One step goes through it; the heads of the group follow one another.
struct Step {
  int head, block_m;
  unsigned stage;  // address of its buffers

  __device__ __forceinline__ int first_row() const { return block_m * BLOCK_M; }
  __device__ __forceinline__ TileQ q() const { return {stage}; }
  __device__ __forceinline__ TileO dout() const { return {stage + TileQ::BYTES}; }
  __device__ __forceinline__ unsigned lse() const { return stage + TileQ::BYTES + TileO::BYTES; }
  __device__ __forceinline__ unsigned delta() const { return lse() + BLOCK_M * int(sizeof(Accum)); }
};

// A warp's part of the products.  Where it is constructed it is computed anew, and with it the addresses that depend on
// it: there are no registers to keep those of all products, nor in one loop those of the other.
struct Part {
  int lane;
  int s_row, s_key;     // of S and dP
  int kv_key, kv_part;  // of dK and dV
  int q_row, q_part;    // of dQ
  bool s_active, kv_active, q_active;
  bool dp_active;  // where DP_APART

  __device__ __forceinline__ Part() {
    const int thread = recompute(threadIdx.x), warp = thread / 32;
    lane = thread % 32;
    s_row = warp % S_WARPS_M * S_ROWS, s_key = (DP_APART ? warp % S_WARPS : warp) / S_WARPS_M * S_KEYS;
    kv_key = warp % KV_WARPS_N * KV_KEYS, kv_part = warp / KV_WARPS_N;
    q_row = warp % Q_WARPS_M * Q_ROWS, q_part = warp / Q_WARPS_M;
    s_active = warp < S_WARPS;
    dp_active = !s_active && warp < 2 * S_WARPS;
    kv_active = warp < KV_WARPS_N * KV_WARPS_D;
    q_active = warp < Q_WARPS_M * Q_WARPS_D;
  }
};

// A block of keys, whose dK and dV a thread block computes.
struct KeyBlock {
  const Params& p;
  const Sequence& sequence;
  const int batch, head_kv, block_n, first_key;
  const Band band;
  const Band::Blocks blocks;  // of rows that see some of its keys
  Score<Accum> score;

  const TileK k_smem;
  const TileV v_smem;
  const TileP p_smem, ds_smem;
  const unsigned stages;

  Accum dk[KV_KEYS / 16][K_COLUMNS / 8][4] = {}, dv[KV_KEYS / 16][V_COLUMNS / 8][4] = {};

  __device__ __forceinline__ KeyBlock(const Params& params, const Sequence& sequence_, int batch_, int head_kv_,
                                      int block_n_, unsigned smem)
      : p(params),
        sequence(sequence_),
        batch(batch_),
        head_kv(head_kv_),
        block_n(block_n_),
        first_key(block_n * BLOCK_N),
        band(p, sequence),
        blocks(band.row_blocks(first_key, BLOCK_N, BLOCK_M)),
        score(p),
        k_smem{smem},
        v_smem{k_smem.base + TileK::BYTES},
        p_smem{v_smem.base + TileV::BYTES},
        ds_smem{p_smem.base + P_BYTES},
        stages(ds_smem.base + P_BYTES) {}

  __device__ __forceinline__ void run() {
    int steps = blocks.begin < blocks.end ? (blocks.end - blocks.begin) * p.group : 0;
    Step step{head_kv * p.group, first_block(), stages};
    if (steps > 0) {
      load_tile<COPY_BYTES, HEAD_DIM, THREADS>(
          k_smem, sequence.rows_k(static_cast<const Element*>(p.k), p.k_strides, head_kv), first_key);
      load_tile<COPY_BYTES, HEAD_DIM_V, THREADS>(
          v_smem, sequence.rows_k(static_cast<const Element*>(p.v), p.v_strides, head_kv), first_key);
      load_rows(step);
    }
    while (steps > 0) {
      const Part part;
      if (whole(step)) {  // a loop of its own, without the instructions of a mask in its midst
#pragma unroll 1
        do take<false>(part, step, steps);
        while (steps > 0 && whole(step));
      } else {
        take<true>(part, step, steps);
      }
    }

    __syncthreads();  // K and V have served: their places take dK and dV
    const Part part;
    const auto dk_rows = sequence.rows_k(static_cast<Element*>(p.dk), p.dk_strides, head_kv);
    const auto dv_rows = sequence.rows_k(static_cast<Element*>(p.dv), p.dv_strides, head_kv);
    store_gradient<HEAD_DIM>(k_smem, dk, static_cast<Accum>(p.scale), dk_rows, first_key, part.kv_key,
                             part.kv_part * K_COLUMNS, part.kv_active);
    store_gradient<HEAD_DIM_V>(v_smem, dv, DROPOUT ? static_cast<Accum>(p.keep_scale) : Accum(1), dv_rows, first_key,
                               part.kv_key, part.kv_part * V_COLUMNS, part.kv_active);
  }

  // Whether all of a step's rows are there and see all of these keys, and the loop for it exists.
  __device__ __forceinline__ bool whole(const Step& step) const {
    return TWO_LOOPS && band.whole(step.first_row(), BLOCK_M, first_key, first_key + BLOCK_N);
  }

  // The band; computed anew where that is SELDOM, so that the other loop does not keep it in registers.
  template <bool SELDOM>
  __device__ __forceinline__ Band again() const {
    return SELDOM && (TWO_LOOPS || __CUDA_ARCH__ == 900) ? Band(p, Sequence(p, recompute(batch))) : band;
  }

  __device__ __forceinline__ int first_block() const {
    return STAGGERED ? max(blocks.begin, min(first_key / BLOCK_M, blocks.end - 1)) : blocks.begin;
  }

  __device__ __forceinline__ Step next(Step x) const {
    if (++x.block_m == blocks.end) {
      if constexpr (!STAGGERED) ++x.head;
      x.block_m = blocks.begin;
    }
    if (STAGGERED && x.block_m == first_block()) ++x.head;
    if constexpr (STAGES == 2) x.stage = 2 * stages + STAGE_BYTES - x.stage;
    return x;
  }

  __device__ __forceinline__ void load_rows(const Step& x) const {
    load_tile<COPY_BYTES, HEAD_DIM, THREADS>(
        x.q(), sequence.rows_q(static_cast<const Element*>(p.q), p.q_strides, x.head), x.first_row());
    load_tile<COPY_BYTES, HEAD_DIM_V, THREADS>(
        x.dout(), sequence.rows_q(static_cast<const Element*>(p.dout), p.dout_strides, x.head), x.first_row());
    if (const int i = threadIdx.x; i < BLOCK_M) {
      const int row = x.first_row() + i, byte = i * int(sizeof(Accum));
      const bool inside = row < sequence.seqlen_q;
      copy_async<sizeof(Accum)>(
          x.lse() + byte, static_cast<const Accum*>(p.lse) + sequence.lse_offset(p, x.head) + row * p.lse_row, inside);
      copy_async<sizeof(Accum)>(x.delta() + byte,
                                static_cast<const Accum*>(p.delta) + sequence.workspace_row(p, x.head) + row, inside);
    }
    copy_async_commit();
  }

  // One step, and on to the next one.
  template <bool MASKED>
  __device__ __forceinline__ void take(const Part& part, Step& step, int& steps) {
    copy_async_wait<0>();
    __syncthreads();  // Q, dO, LSE and delta are here, and everyone is done with the previous P and dS
    if (STAGES == 2 && steps > 1) load_rows(next(step));

    bool spoilt = false;  // whether a hidden entry may be, or meet, something that isn't finite
    if (DP_APART || part.s_active) {
#pragma unroll
      for (int i = 0; i < S_KEYS; i += S_AT_ONCE) spoilt |= store_probs<MASKED>(part, step, part.s_key + i);
    }
    if constexpr (!MASKED) {
      __syncthreads();  // P and dS are here
      add_shares<false>(step);
    } else if (!__syncthreads_or(spoilt)) {
      add_shares<false>(step);
    } else {
      add_shares<true>(step);
    }
    --steps, step = next(step);
    if (STAGES == 1 && steps > 0) {
      __syncthreads();  // everyone is done with Q and dO
      load_rows(step);
    }
  }

  // P and dS of this warp's rows and S_AT_ONCE keys, to shared memory.  Returns whether a hidden entry may be, or meet,
  // something that isn't finite.  Where DP_APART, all warps come here.
  template <bool MASKED>
  __device__ __forceinline__ bool store_probs(const Part& part, const Step& step, int s_key) {
    constexpr int M = S_ROWS / 16, N = S_AT_ONCE / 8;
    const int first_row = step.first_row();
    const int row0 = first_row + part.s_row + part.lane / 4,
              key0 = first_key + s_key + part.lane % 4 * 2;  // of its first entry
    bool spoilt = false;
    Accum s[M][N][4] = {}, dp[M][N][4] = {};  // [S_ROWS, S_AT_ONCE]
    const auto multiply_dp = [&] {
      gemm<Element, DV / K_STEP>(dp, SharedOperand<Side::A, Major::K, S_ROWS, TileO>(step.dout(), part.s_row),
                                 SharedOperand<Side::B, Major::K, S_AT_ONCE, TileV>(v_smem, s_key));
      if constexpr (MASKED) spoilt |= any_non_finite(dp);
    };
    const auto for_pairs = [&](auto move) {  // of neighbours: their place in P and dS, and among the accumulators
#pragma unroll
      for (int i = 0; i < M * N * 2; ++i) {
        const int m = i / (2 * N), n = i / 2 % N, half = i % 2;
        const int row = part.s_row + 16 * m + 8 * half + part.lane / 4, key = s_key + 8 * n + part.lane % 4 * 2;
        move(row, key, m, n, 2 * half);
      }
    };
    if (!DP_APART || part.s_active) {
      gemm<Element, D / K_STEP>(s, SharedOperand<Side::A, Major::K, S_ROWS, TileQ>(step.q(), part.s_row),
                                SharedOperand<Side::B, Major::K, S_AT_ONCE, TileK>(k_smem, s_key));
      const Band band = again<MASKED>();
      score.select(p, band, batch, step.head);
      if constexpr (MASKED) spoilt |= any_non_finite(s);
      score.apply(s, row0, key0);
      if constexpr (MASKED) band.mask(s, row0, key0);
    }
    if constexpr (DP_APART) {
      if (part.dp_active) {
        multiply_dp();
        for_pairs(
            [&](int row, int key, int m, int n, int i) { ds_smem.store_pair(row, key, dp[m][n][i], dp[m][n][i + 1]); });
      }
      __syncthreads();  // dP is here
      if (!part.s_active) return spoilt;
      for_pairs([&](int row, int key, int m, int n, int i) {
        load_shared_pair(dp[m][n][i], dp[m][n][i + 1], ds_smem.address(row, key * int(sizeof(Element))));
      });
    } else {
      multiply_dp();
    }

    // Rows past the end, and rows that see nothing, get an LSE of +inf: their P is 0.
    Accum lse_rmem[M][2], delta_rmem[M][2];
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) {
      const int byte = (part.s_row + 8 * i + part.lane / 4) * int(sizeof(Accum));
      Accum &lse = lse_rmem[i / 2][i % 2], &delta = delta_rmem[i / 2][i % 2];
      load_shared(lse, step.lse() + byte);
      load_shared(delta, step.delta() + byte);
      if constexpr (MASKED) spoilt |= !(lse < -minus_infinity<Accum>()) || !is_finite(delta);
      const bool absent = lse == minus_infinity<Accum>() || (MASKED && row0 + 8 * i >= sequence.seqlen_q);
      lse = absent ? -minus_infinity<Accum>() : lse * static_cast<Accum>(LOG2E);
    }
    const Accum keep_scale = static_cast<Accum>(p.keep_scale);
    const Dropout dropout(p, batch, step.head);
#pragma unroll
    for (int i = 0; i < M * N;
         ++i) {  // S -> dropout(P), dP -> dS, four entries at a time: rows r, r + 8 and keys c, c + 8
      const int m = i / N, n = i % N / 2 * 2, odd = i % 2;
      bool keep[4] = {true, true, true, true};
      if constexpr (DROPOUT) dropout.keep(keep, row0 + 16 * m, key0 + 8 * n + odd);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int half = j / 2, row = row0 + 16 * m + 8 * half, key = key0 + 8 * (n + j % 2) + odd;
        Accum &x = s[m][n + j % 2][2 * half + odd], &y = dp[m][n + j % 2][2 * half + odd];
        const Accum prob = exp2_fast(x * score.factor - lse_rmem[m][half]);
        if constexpr (DROPOUT) y = keep[j] ? y * keep_scale : 0;
        y = prob * (y - delta_rmem[m][half]) * score.derivative(x, row, key);
        x = keep[j] ? prob : 0;
      }
    }
    for_pairs([&](int row, int key, int m, int n, int i) {
      p_smem.store_pair(row, key, s[m][n][i], s[m][n][i + 1]);
      ds_smem.store_pair(row, key, dp[m][n][i], dp[m][n][i + 1]);
    });
    return spoilt;
  }

  // What this block of rows adds to dQ, dK and dV, from P and dS in shared memory; where CAREFUL without what is
  // hidden.
  template <bool CAREFUL>
  __device__ __forceinline__ void add_shares(const Step& step) {
    const Band band = again<CAREFUL>();
    add_dq<CAREFUL>(step, band);
    add_dk_dv<CAREFUL>(step, band);
  }

  template <bool CAREFUL>
  __device__ __forceinline__ void add_dq(const Step& step, const Band& band) {
    const Part part;
    const int first_row = step.first_row();
    const DqAccum dq_accum(p, sequence, step.head, step.block_m);
    QFragments dq = {};
    if (!CAREFUL && part.q_active)
      gemm<Element, BLOCK_N / K_STEP>(
          dq, SharedOperand<Side::A, Major::K, Q_ROWS, TileP>(ds_smem, part.q_row),
          SharedOperand<Side::B, Major::MN, Q_COLUMNS, TileK>(k_smem, part.q_part * Q_COLUMNS));
    else if (part.q_active)
      add_visible<false>(dq, ds_smem, part.q_row, k_smem, part.q_part * Q_COLUMNS, band, first_row, first_key);
    const Turn turn{p.tickets + dq_accum.block, block_n - band.key_blocks(first_row, BLOCK_M, BLOCK_N).begin};
    if constexpr (DETERMINISTIC) turn.wait();
    if (part.q_active) dq_accum.add(dq);
    if constexpr (DETERMINISTIC) turn.pass();
  }

  template <bool CAREFUL>
  __device__ __forceinline__ void add_dk_dv(const Step& step, const Band& band) {
    const Part part;
    if (!part.kv_active) return;
    const int k_column = part.kv_part * K_COLUMNS, v_column = part.kv_part * V_COLUMNS;
    if constexpr (CAREFUL) {
      add_visible<true>(dv, p_smem, part.kv_key, step.dout(), v_column, band, step.first_row(), first_key);
      add_visible<true>(dk, ds_smem, part.kv_key, step.q(), k_column, band, step.first_row(), first_key);
    } else {
      constexpr int STEPS = BLOCK_M / K_STEP;
      gemm<Element, STEPS>(dv, SharedOperand<Side::A, Major::MN, KV_KEYS, TileP>(p_smem, part.kv_key),
                           SharedOperand<Side::B, Major::MN, V_COLUMNS, TileO>(step.dout(), v_column));
      gemm<Element, STEPS>(dk, SharedOperand<Side::A, Major::MN, KV_KEYS, TileP>(ds_smem, part.kv_key),
                           SharedOperand<Side::B, Major::MN, K_COLUMNS, TileQ>(step.q(), k_column));
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) backward_sm80(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  // Earlier keys are seen by more rows under a causal mask, and a turn waits only for earlier blocks, which the
  // hardware starts first: ascending order serves both.
  const int block_n = blockIdx.x % p.key_blocks;
  const int head_kv = blockIdx.x / p.key_blocks % p.heads_kv, batch = blockIdx.x / p.key_blocks / p.heads_kv;
  const Sequence sequence(p, batch);
  if (block_n * BLOCK_N < sequence.seqlen_k)
    KeyBlock(p, sequence, batch, head_kv, block_n, shared_address(shared)).run();
}
