// Attention backward on Hopper (TMA, wgmma, warp specialisation): the algorithm of backward_sm80.cu, arranged as in
// FlashAttention-3, section 3.  backward_delta.cu runs before it, backward_dq.cu after it.
//
//   A thread block owns 128 keys, each of its two consumers (warpgroups) 64 of them.  A producer thread brings K and V,
//   and fills a ring of stages with blocks of Q and dO and their LSE and delta.
//
//     for each query head that shares these keys, for each block of rows that sees some of them:
//       start S^T = K Q^T, dP^T = V dO^T
//       wait for S;   P^T = exp(score(S) - LSE)
//       wait for dP;  dS^T = P^T * (dropout(dP) - delta) * score'(S)
//       start dV += dropout(P)^T dO           P^T and dS^T are their products' A fragments as they stand
//       dS to shared memory
//       start dQ = dS K, each consumer a half
//       start dK += dS^T Q
//       wait for dQ; add it to its accumulator in global memory
//     write dK, dV
#include "band.cuh"
#include "dq_accum.cuh"
#include "dropout.cuh"
#include "ptx/tma.cuh"
#include "ring.cuh"
#include "score.cuh"
#include "sequence.cuh"
#include "visible.cuh"
#include "warpgroup.cuh"

constexpr int CONSUMERS = 2, THREADS = 128 * (1 + CONSUMERS);
constexpr int KEYS = 64;  // of a consumer
constexpr int DK = (HEAD_DIM + 15) / 16 * 16, DV = (HEAD_DIM_V + 15) / 16 * 16;
constexpr int N = BLOCK_M / 8;  // products of 8 rows along S^T
static_assert(BLOCK_N == CONSUMERS * KEYS && WARPS == 4 * CONSUMERS && Q_ROWS == 16 && Q_COLUMNS % 8 == 0);

using TileK = Tile<Element, BLOCK_N, (D + 63) / 64 * 64>;  // dQ's columns may be padded further than HEAD_DIM
using TileV = Tile<Element, BLOCK_N, (DV + 63) / 64 * 64>;
using TileQ = Tile<Element, BLOCK_M, TileK::COLS>;
using TileO = Tile<Element, BLOCK_M, TileV::COLS>;
using TileS = Tile<Element, BLOCK_M, BLOCK_N>;

struct Shared {  // dynamic shared memory
  static constexpr int ROW_SUMS = 2 * BLOCK_M * 4, ROW_BYTES = TileQ::BYTES + TileO::BYTES;
  static constexpr int V = TileK::BYTES, ROWS = V + TileV::BYTES, DS = ROWS + STAGES * ROW_BYTES;
  static constexpr int DQ = DS + 2 * TileS::BYTES, WARP_DQ = Q_ROWS * Q_COLUMNS * 4;
  static constexpr int SUMS = DQ + WARPS * WARP_DQ, RINGS = SUMS + STAGES * ROW_SUMS;
  static constexpr int BYTES = RINGS + 16 * (1 + 2 * STAGES);
  unsigned base;

  __device__ __forceinline__ TileK k() const { return {base}; }
  __device__ __forceinline__ TileV v() const { return {base + V}; }
  __device__ __forceinline__ TileQ q(int stage) const { return {base + ROWS + stage * ROW_BYTES}; }
  __device__ __forceinline__ TileO dout(int stage) const { return {base + ROWS + stage * ROW_BYTES + TileQ::BYTES}; }
  __device__ __forceinline__ unsigned sums(int stage) const { return base + SUMS + stage * ROW_SUMS; }
  __device__ __forceinline__ TileS ds(int buffer) const { return {base + DS + buffer * TileS::BYTES}; }
  __device__ __forceinline__ unsigned dq(int warp) const { return base + DQ + warp * WARP_DQ; }
  __device__ __forceinline__ Stages<1> kv_stages() const { return {base + RINGS}; }
  __device__ __forceinline__ Stages<STAGES> q_stages() const { return {base + RINGS + 16}; }
  __device__ __forceinline__ Stages<STAGES> dout_stages() const { return {base + RINGS + 16 * (1 + STAGES)}; }
};
static_assert(SHARED_BYTES >= Shared::BYTES);

// The keys of a thread block.  Under a causal mask the first ones are seen by the most rows: within a section of heads
// they go first.
struct Work {
  int block, head_kv, batch;

  __device__ __forceinline__ explicit Work(const Params& p) {
    const int heads = p.heads_kv * p.batch, before = blockIdx.x / (p.section * p.key_blocks) * p.section;
    const int width = min(p.section, heads - before), rest = blockIdx.x - before * p.key_blocks;
    block = rest / width;
    const int number = before + rest - block * width;
    batch = number / p.heads_kv, head_kv = number - batch * p.heads_kv;
  }
};

template <int VALUE_>
struct Constant {
  static constexpr int VALUE = VALUE_;
};

// After an addition in turn: it is done, and the next block of keys may add its own.
__device__ __forceinline__ void pass(int* ticket) {
  wait_runs();
  asm volatile("fence.proxy.async;" ::: "memory");
  add_release(ticket, 1);
}

template <class T>
__device__ __forceinline__ void load(const T& tile, Barrier full, const TensorMap& map, const Strides& s, int row,
                                     int head, int batch) {
  for (int panel = 0; panel < T::COLS / 64; ++panel)  // a dimension without a stride is not in the map
    load_box(tile.base + panel * (T::ROWS * 128), map, full, panel * 64, row, s.head ? head : 0, s.batch ? batch : 0);
}

__device__ __forceinline__ void produce(const TmaParams& p, const Shared shared, const Work& work,
                                        const Sequence& sequence, const Band::Blocks& blocks) {
  const int first_key = static_cast<int>(sequence.start_k) + work.block * BLOCK_N;
  const Barrier kv_full = shared.kv_stages().full(0);
  kv_full.arrive_and_expect(TileK::BYTES + TileV::BYTES);
  load(shared.k(), kv_full, p.k_map, p.k_strides, first_key, work.head_kv, work.batch);
  load(shared.v(), kv_full, p.v_map, p.v_strides, first_key, work.head_kv, work.batch);

  Ring<STAGES> q_ring(shared.q_stages()), dout_ring(shared.dout_stages());
  for (int head = work.head_kv * p.group; head < (work.head_kv + 1) * p.group; ++head)
    for (int block = blocks.begin; block < blocks.end; ++block) {
      const int row = static_cast<int>(sequence.start_q) + block * BLOCK_M;
      q_ring.wait_empty();
      const Barrier q_full = q_ring.expect(TileQ::BYTES + Shared::ROW_SUMS);
      load(shared.q(q_ring.stage), q_full, p.q_map, p.q_strides, row, head, work.batch);
      load_run(shared.sums(q_ring.stage), RowSums(p, sequence, head, block).lse, q_full, Shared::ROW_SUMS);
      q_ring.next();
      dout_ring.wait_empty();
      load(shared.dout(dout_ring.stage), dout_ring.expect(TileO::BYTES), p.dout_map, p.dout_strides, row, head,
           work.batch);
      dout_ring.next();
    }
}

__device__ __forceinline__ void consume(const TmaParams& p, const Shared shared, const int number, const Work& work,
                                        const Sequence& sequence, const Band& band, const Band::Blocks& blocks) {
  const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0), lane = threadIdx.x % 32, part = number * 4 + warp;
  const int first_key = work.block * BLOCK_N + number * KEYS, key0 = first_key + warp * 16 + lane / 4;
  Score<float> score(p);
  const float scale = static_cast<float>(p.scale), keep_scale = static_cast<float>(p.keep_scale);

  // This consumer's keys; and its part of dQ: 64 rows, or 64 columns.
  constexpr bool BY_ROWS = BLOCK_M == 128;
  const WarpgroupOperand<Major::K, TileK> k(TileK{shared.k().base + number * KEYS * 128});
  const WarpgroupOperand<Major::K, TileV> v(TileV{shared.v().base + number * KEYS * 128});
  const WarpgroupOperand<Major::MN, TileK> k_part(TileK{shared.k().base + (BY_ROWS ? 0 : number * BLOCK_N * 128)});

  Ring<STAGES> q_ring(shared.q_stages()), dout_ring(shared.dout_stages());
  int buffer = 0;  // of dS
  int* ticket = nullptr;
  float dk[1][DK / 8][4] = {}, dv[1][DV / 8][4] = {};  // [KEYS, DK], [KEYS, DV]

  shared.kv_stages().full(0).wait(0);
  // Rows of the next sequence take part in products with 0, and 0 * NaN is NaN.
  const auto clear = [&](const auto& tile, int end, int barrier, int threads) {
    if (VARLEN && end < tile.ROWS) {
      clear_rows<128>(tile, max(end, 0));
      fence_async_shared();
      named_barrier_sync(barrier, threads);
    }
  };
  clear(shared.k(), sequence.seqlen_k - work.block * BLOCK_N, 1, 256);
  const auto store_transposed = [&](const TileS& tile, const unsigned (&words)[N / 2][4]) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i)
      store_matrices_transposed(tile.address(16 * i + lane % 8 + lane / 16 * 8,
                                             (number * KEYS + warp * 16 + lane / 8 % 2 * 8) * int(sizeof(Element))),
                                words[i]);
  };

  for (int head = work.head_kv * p.group; head < (work.head_kv + 1) * p.group; ++head) {
    score.select(p, band, work.batch, head);
    const Dropout dropout(p, work.batch, head);
    for (int block = blocks.begin; block < blocks.end; ++block) {
      const int first_row = block * BLOCK_M, row0 = first_row + lane % 4 * 2;
      const TileQ q_smem = shared.q(q_ring.stage);
      const TileO dout_smem = shared.dout(dout_ring.stage);
      const unsigned sums = shared.sums(q_ring.stage) + lane % 4 * 8;
      float s_rmem[1][N][4], dp_rmem[1][N][4];  // [KEYS, BLOCK_M]
      auto &s = s_rmem[0], &dp = dp_rmem[0];
      unsigned p_words[N / 2][4], ds_words[N / 2][4];

      q_ring.wait();
      clear(q_smem, sequence.seqlen_q - first_row, 2 + number, 128);
      pin(s);
      wgmma_fence();
      warpgroup_gemm<DK / 16>(s, k, WarpgroupOperand<Major::K, TileQ>(q_smem), false);
      wgmma_commit();
      dout_ring.wait();
      clear(dout_smem, sequence.seqlen_q - first_row, 2 + number, 128);
      pin(dp);
      wgmma_fence();
      warpgroup_gemm<DV / 16>(dp, v, WarpgroupOperand<Major::K, TileO>(dout_smem), false);
      wgmma_commit();

      unsigned dropped[(N + 7) / 8] = {};  // bit 4 n + c of entry c of product n
      if constexpr (DROPOUT) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const int n = i / 2 * 2, odd = i % 2;
          bool keep[4];
          dropout.keep(keep, row0 + 8 * n + odd, key0);
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if (!keep[j]) dropped[n / 8] |= 1u << (n + j / 2) % 8 * 4 + j % 2 * 2 + odd;
        }
      }
      const int first_of_block = work.block * BLOCK_N, last_row = min(first_row + BLOCK_M, sequence.seqlen_q) - 1;
      const bool masked = !band.all_see(first_row, last_row, first_of_block, first_of_block + BLOCK_N);
      bool spoilt = false;  // whether a hidden entry may be, or meet, something that isn't finite

      wgmma_wait<1>();
      pin(s);
      if (masked) spoilt |= any_non_finite(s_rmem);
      if constexpr (!Score<float>::RAW) {
#pragma unroll
        for (int i = 0; i < 4 * N; ++i)
          s[i / 4][i % 4] = score.apply(s[i / 4][i % 4], row0 + i / 4 * 8 + i % 2, key0 + i % 4 / 2 * 8);
      }
      float derivative[N][4];
      if constexpr (SOFTCAP) {
#pragma unroll
        for (int i = 0; i < 4 * N; ++i)
          derivative[i / 4][i % 4] = score.derivative(s[i / 4][i % 4], row0 + i / 4 * 8 + i % 2, key0 + i % 4 / 2 * 8);
      }
      if (masked) band.mask_transposed(s, row0, key0, minus_infinity<float>());
#pragma unroll
      for (int n = 0; n < N; ++n) {
        float lse[2];
        load_shared_pair(lse[0], lse[1], sums + n * 32);
#pragma unroll
        for (int c = 0; c < 4; ++c) s[n][c] = exp2_fast(fma(s[n][c], score.factor, -lse[c % 2]));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float x[2];
#pragma unroll
          for (int j = 0; j < 2; ++j)
            x[j] = DROPOUT && dropped[n / 8] >> n % 8 * 4 + 2 * half + j & 1 ? 0 : s[n][2 * half + j];
          p_words[n / 2][n % 2 * 2 + half] = pack(x[0], x[1], Element{});
        }
      }

      wgmma_wait<0>();
      pin(dp);
      if (masked) spoilt |= any_non_finite(dp_rmem);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        float delta[2];
        load_shared_pair(delta[0], delta[1], sums + BLOCK_M * 4 + n * 32);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float x = dp[n][c];
          if constexpr (DROPOUT) x = dropped[n / 8] >> n % 8 * 4 + c & 1 ? 0 : x * keep_scale;
          dp[n][c] = s[n][c] * (x - delta[c % 2]);
          if constexpr (SOFTCAP) dp[n][c] *= derivative[n][c];
        }
      }
      if (masked) band.mask_transposed(dp, row0, key0, 0.f);
#pragma unroll
      for (int i = 0; i < 2 * N; ++i)
        ds_words[i / 4][i % 4] = pack(dp[i / 2][i % 2 * 2], dp[i / 2][i % 2 * 2 + 1], Element{});

      const TileS ds_smem = shared.ds(buffer);
      QFragments dq;
      if (!masked || !named_barrier_or(1, 256, spoilt)) {
        pin(dv[0]);
        pin(p_words);
        wgmma_fence();
        warpgroup_gemm(dv[0], p_words, WarpgroupOperand<Major::MN, TileO>(dout_smem));
        wgmma_commit();
        store_transposed(ds_smem, ds_words);
        fence_async_shared();
        named_barrier_sync(1, 256);  // both consumers' dS is here, and the other buffer is free
        pin(dq[0]);
        wgmma_fence();
        warpgroup_gemm<BLOCK_N / 16>(
            dq[0], WarpgroupOperand<Major::K, TileS>(TileS{ds_smem.base + (BY_ROWS ? number * 64 * 128 : 0)}), k_part,
            false);
        wgmma_commit();
        wgmma_wait<1>();
        pin(dv[0]);
        pin(p_words);
        dout_ring.stages.release(dout_ring.stage);
        pin(dk[0]);
        pin(ds_words);
        wgmma_fence();
        warpgroup_gemm(dk[0], ds_words, WarpgroupOperand<Major::MN, TileQ>(q_smem));
        wgmma_commit();
        wgmma_wait<1>();
        pin(dq[0]);
      } else {
        const TileS p_smem = shared.ds(buffer ^ 1);
        store_transposed(p_smem, p_words);
        store_transposed(ds_smem, ds_words);
        named_barrier_sync(1, 256);
        const int row_start = (BY_ROWS ? number * 64 : 0) + warp * 16, key_start = number * KEYS + warp * 16;
#pragma unroll
        for (int i = 0; i < Q_COLUMNS / 2; ++i) dq[0][i / 4][i % 4] = 0;
        add_visible<false>(dq, ds_smem, row_start, shared.k(), BY_ROWS ? 0 : number * 64, band, first_row,
                           first_of_block);
        add_visible<true>(dv, p_smem, key_start, dout_smem, 0, band, first_row, first_of_block);
        add_visible<true>(dk, ds_smem, key_start, q_smem, 0, band, first_row, first_of_block);
        named_barrier_sync(1, 256);
        dout_ring.stages.release(dout_ring.stage);
      }

      dout_ring.next();

      const DqAccum dq_accum(p, sequence, head, block);
      if (lane == 0) {
        if constexpr (DETERMINISTIC) {
          if (ticket != nullptr) pass(ticket);
          ticket = p.tickets + dq_accum.block * WARPS + part;
        } else {
          wait_runs_read();
        }
      }
      __syncwarp();
#pragma unroll
      for (int n = 0; n < Q_COLUMNS / 8; ++n) store_shared(shared.dq(part) + (n * 32 + lane) * 16, dq[0][n]);
      fence_async_shared();
      __syncwarp();
      if (lane == 0) {
        if constexpr (DETERMINISTIC) {
          const int order = work.block - band.key_blocks(first_row, BLOCK_M, BLOCK_N).begin;
          while (load_acquire(ticket) < order)
            __nanosleep(64);  // wrong lengths may share a ticket: never wait for equality
        }
        add_run(dq_accum.origin + part * (Q_ROWS * Q_COLUMNS), shared.dq(part), Shared::WARP_DQ);
      }

      wgmma_wait<0>();
      pin(dk[0]);
      pin(ds_words);
      q_ring.release();
      buffer ^= 1;
    }
  }
  if (lane == 0) {
    if (DETERMINISTIC && ticket != nullptr)
      pass(ticket);
    else
      wait_runs();
  }

  // K and V have served: their places take dK and dV.
  const auto store = [&](const auto& tile, const auto& gradient, auto width, const Rows<Element>& target,
                         float factor) {
#pragma unroll
    for (int i = 0; i < sizeof(gradient) / 32; ++i) {
      unsigned words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const auto& d = gradient[2 * i + j / 2];
        words[j] = pack(d[j % 2 * 2] * factor, d[j % 2 * 2 + 1] * factor, Element{});
      }
      store_matrices(tile.address(number * KEYS + warp * 16 + lane % 16, i * 32 + lane / 16 * 16), words);
    }
    __syncwarp();  // a warp stores the rows it wrote
    store_rows<16, decltype(width)::VALUE>(tile, number * KEYS + warp * 16, target, first_key + warp * 16);
  };
  named_barrier_sync(1, 256);  // both consumers are done with K
  store(shared.v(), dv[0], Constant<HEAD_DIM_V>{},
        sequence.rows_k(static_cast<Element*>(p.dv), p.dv_strides, work.head_kv), DROPOUT ? keep_scale : 1.f);
  store(shared.k(), dk[0], Constant<HEAD_DIM>{},
        sequence.rows_k(static_cast<Element*>(p.dk), p.dk_strides, work.head_kv), scale);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) backward_sm90(const __grid_constant__ TmaParams p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const Shared shared{shared_address(memory)};
  const Work work(p);
  const Sequence sequence(p, work.batch);
  if (work.block * BLOCK_N >= sequence.seqlen_k) return;
  const Band band(p, sequence);
  Band::Blocks blocks = band.row_blocks(work.block * BLOCK_N, BLOCK_N, BLOCK_M);

  if (threadIdx.x == 0) {
    shared.kv_stages().init(1);
    shared.q_stages().init(WARPS);
    shared.dout_stages().init(WARPS);
    fence_barrier_init();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the same for a whole warp, as the compiler now knows
  if (warpgroup == 0) {
    release_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) produce(p, shared, work, sequence, blocks);
  } else {
    claim_registers<CONSUMER_REGISTERS>();
    consume(p, shared, warpgroup - 1, work, sequence, band, blocks);
  }
}
