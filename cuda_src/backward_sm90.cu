// Attention backward on Hopper (TMA, wgmma, warp specialisation): the algorithm of backward_sm80.cu, arranged as in
// FlashAttention-3, section 3.  backward_delta.cu runs before it, backward_dq.cu after it.
//
//   A thread block owns 128 keys, each of its two consumers (warpgroups) 64 of them.  A producer thread brings K and V,
//   and fills a ring of stages with blocks of Q and dO and their LSE and delta.  A thread for each consumer takes its
//   share of dQ away.
//
//     for each query head that shares these keys, for each block of rows that sees some of them:
//       start S^T = K Q^T, dP^T = V dO^T
//       wait for S;   P^T = exp(score(S) - LSE)
//       wait for dP;  dS^T = P^T * (dropout(dP) - delta) * score'(S)
//       start dV += dropout(P)^T dO           P^T and dS^T are their products' A fragments as they stand
//       dS to shared memory
//       start dQ = dS K, each consumer a half
//       start dK += dS^T Q
//       wait for dQ; leave it in shared memory
//     write dK, dV
//
//   The shares of dQ are added up in an accumulator in global memory.  It need not be zero: the first thread block that
//   comes to a block of rows sets it.
#include "band.cuh"
#include "dq_accum.cuh"
#include "ptx/tma.cuh"
#include "ring.cuh"
#include "score.cuh"
#include "sequence.cuh"
#include "transposed.cuh"
#include "visible.cuh"
#include "warpgroup.cuh"
#include "work.cuh"

constexpr int CONSUMERS = 2, THREADS = 128 * (1 + CONSUMERS);
constexpr int KEYS = 64;  // of a consumer
constexpr int DK = (HEAD_DIM + 15) / 16 * 16, DV = (HEAD_DIM_V + 15) / 16 * 16;
constexpr int N = BLOCK_M / 8;  // products of 8 rows along S^T
// A consumer's share of dQ: 64 rows, or 64 columns.  Its four warps' parts follow one another in the accumulator.
constexpr bool BY_ROWS = BLOCK_M == 128;
constexpr int SLICE = 4 * Q_ROWS * Q_COLUMNS;
static_assert(BLOCK_N == CONSUMERS * KEYS && WARPS == 4 * CONSUMERS && Q_ROWS == 16 && Q_COLUMNS % 8 == 0);

using TileK = Tile<Element, BLOCK_N, (D + 63) / 64 * 64>;  // dQ's columns may be padded further than HEAD_DIM
using TileV = Tile<Element, BLOCK_N, (DV + 63) / 64 * 64>;
using TileQ = Tile<Element, BLOCK_M, TileK::COLS>;
using TileO = Tile<Element, BLOCK_M, TileV::COLS>;
using TileS = Tile<Element, BLOCK_M, BLOCK_N>;
using StoredK = Tile<Element, KEYS, TileK::COLS>;  // a consumer's gradients on their way out, in a dS's place
using StoredV = Tile<Element, KEYS, TileV::COLS>;
static_assert(StoredK::BYTES <= TileS::BYTES && StoredV::BYTES <= TileS::BYTES);

struct Shared {  // dynamic shared memory
  static constexpr int ROW_SUMS = 2 * BLOCK_M * 4, ROW_BYTES = TileQ::BYTES + TileO::BYTES;
  static constexpr int V = TileK::BYTES, ROWS = V + TileV::BYTES, DS = ROWS + STAGES * ROW_BYTES;
  static constexpr int DQ = DS + 2 * TileS::BYTES, SUMS = DQ + CONSUMERS * 2 * SLICE * 4;
  static constexpr int WORK = SUMS + STAGES * ROW_SUMS, RINGS = WORK + Work::BYTES;
  static constexpr int BYTES = RINGS + 16 * (2 + 2 * STAGES + 2 * CONSUMERS);
  unsigned base;

  __device__ __forceinline__ TileK k() const { return {base}; }
  __device__ __forceinline__ TileV v() const { return {base + V}; }
  __device__ __forceinline__ TileQ q(int stage) const { return {base + ROWS + stage * ROW_BYTES}; }
  __device__ __forceinline__ TileO dout(int stage) const { return {base + ROWS + stage * ROW_BYTES + TileQ::BYTES}; }
  __device__ __forceinline__ unsigned sums(int stage) const { return base + SUMS + stage * ROW_SUMS; }
  __device__ __forceinline__ TileS ds(int buffer) const { return {base + DS + buffer * TileS::BYTES}; }
  __device__ __forceinline__ unsigned dq(int consumer, int stage) const {
    return base + DQ + (2 * consumer + stage) * SLICE * 4;
  }
  __device__ __forceinline__ unsigned work() const { return base + WORK; }
  __device__ __forceinline__ Stages<1> work_stages() const { return {base + RINGS}; }
  __device__ __forceinline__ Stages<1> kv_stages() const { return {base + RINGS + 16}; }
  __device__ __forceinline__ Stages<STAGES> q_stages() const { return {base + RINGS + 32}; }
  __device__ __forceinline__ Stages<STAGES> dout_stages() const { return {base + RINGS + 16 * (2 + STAGES)}; }
  __device__ __forceinline__ Stages<2> dq_stages(int consumer) const {
    return {base + RINGS + 16 * (2 + 2 * (STAGES + consumer))};
  }
};
static_assert(SHARED_BYTES >= Shared::BYTES);

// The tiles of keys, each taken by the first thread block that is free.  Under a causal mask the first keys are seen by
// the most rows: within a section of heads they go first.  But in order of addition the last ones do: those come to a
// block of rows first, since they begin with it, and nobody waits for a tile that is yet to be taken, or for long for
// one that is yet to begin: tiles are taken shortly before.
struct Tiles {
  const Params& p;
  PackedPlaces packed;

  __device__ __forceinline__ explicit Tiles(const Params& params) : p(params) {}

  __device__ __forceinline__ Work take() {
    const int index = add_relaxed(p.tickets, 1);
    const Place x = VARLEN ? packed.find<BLOCK_N>(p, index, p.heads_kv, &Sequence::seqlen_k)
                           : Place::dense(p, index, p.key_blocks, p.heads_kv);
    if (!x.valid) return {-1};
    return {(DETERMINISTIC ? x.blocks - 1 - x.block : x.block) * BLOCK_N, x.head, x.sequence};
  }
};

// The blocks of rows that see some of a tile's keys. They are gone through from the diagonal on, and around: then
// thread blocks with different keys of a head are at different rows, and seldom add to the same dQ. In order of
// addition, from the first one on.
struct RowBlocks {
  int begin, end, start;

  __device__ __forceinline__ RowBlocks(const Band& band, int first_key) {
    const Band::Blocks blocks = band.row_blocks(first_key, BLOCK_N, BLOCK_M);
    begin = blocks.begin, end = blocks.end, start = begin;
    if (!DETERMINISTIC && begin < end) start += max(first_key / BLOCK_M - begin, 0) % (end - begin);
  }
  __device__ __forceinline__ int count() const { return end - begin; }
  __device__ __forceinline__ int after(int block) const { return block + 1 == end ? begin : block + 1; }
};

template <int VALUE_>
struct Constant {
  static constexpr int VALUE = VALUE_;
};

template <class T>
__device__ __forceinline__ void load(const T& tile, Barrier full, const TensorMap& map, const Strides& s, int row,
                                     int head, int batch) {
#pragma unroll 1
  for (int panel = 0; panel < T::COLS / 64; ++panel)  // a dimension without a stride is not in the map
    load_box(tile.base + panel * (T::ROWS * 128), map, full, panel * 64, row, s.head ? head : 0, s.batch ? batch : 0);
}

// One thread takes the tiles, tells the others of them, and brings Q, dO and their row sums.
__device__ __forceinline__ void produce_rows(const TmaParams& p, const Shared shared) {
  Ring<1> work_ring(shared.work_stages());
  Ring<STAGES> q_ring(shared.q_stages()), dout_ring(shared.dout_stages());
  Tiles tiles(p);
  while (true) {
    const Work work = take_and_tell(tiles, shared.work(), work_ring);
    if (!work.valid()) break;
    const Sequence& sequence = work.sequence;
    const RowBlocks blocks(Band(p, sequence), work.first);
#pragma unroll 1  // producers have few registers
    for (int head = work.head * p.group; head < (work.head + 1) * p.group; ++head) {
      int block = blocks.start;
#pragma unroll 1
      for (int i = 0; i < blocks.count(); ++i, block = blocks.after(block)) {
        const int row = static_cast<int>(sequence.start_q) + block * BLOCK_M;
        q_ring.wait_empty();
        const Barrier q_full = q_ring.expect(TileQ::BYTES + Shared::ROW_SUMS);
        load(shared.q(q_ring.stage), q_full, p.q_map, p.q_strides, row, head, sequence.batch);
        load_run(shared.sums(q_ring.stage), RowSums(p, sequence, head, block).lse, q_full, Shared::ROW_SUMS);
        q_ring.next();
        dout_ring.wait_empty();
        load(shared.dout(dout_ring.stage), dout_ring.expect(TileO::BYTES), p.dout_map, p.dout_strides, row, head,
             sequence.batch);
        dout_ring.next();
      }
    }
  }
}

// Another one brings K and V.
__device__ __forceinline__ void produce_kv(const TmaParams& p, const Shared shared) {
  Ring<1> work_ring(shared.work_stages()), kv_ring(shared.kv_stages());
  while (true) {
    const Work work = hear(p, shared.work(), work_ring);
    if (!work.valid()) break;
    kv_ring.wait_empty();
    const Barrier kv_full = kv_ring.expect(TileK::BYTES + TileV::BYTES);
    const int row = static_cast<int>(work.sequence.start_k) + work.first, batch = work.sequence.batch;
    load(shared.k(), kv_full, p.k_map, p.k_strides, row, work.head, batch);
    load(shared.v(), kv_full, p.v_map, p.v_strides, row, work.head, batch);
    kv_ring.next();
  }
}

// One thread takes a consumer's slices of dQ to their accumulators. Behind the counter of tiles, p.tickets holds one
// for each slice: how many thread blocks have come for it, and SET once the first one's share is there; in a fixed
// order, how many have added theirs.
__device__ __forceinline__ void take_dq(const Params& p, const Shared shared, const int consumer) {
  constexpr int SET = 1 << 30;
  Ring<1> work_ring(shared.work_stages());
  Ring<2> ring(shared.dq_stages(consumer));
  while (true) {
    const Work work = hear(p, shared.work(), work_ring);
    if (!work.valid()) break;
    const Band band(p, work.sequence);
    const RowBlocks blocks(band, work.first);
    for (int head = work.head * p.group; head < (work.head + 1) * p.group; ++head) {
      const DqAccum dq_accum(p, work.sequence, head, 0);
      int block = blocks.start;
#pragma unroll 1
      for (int i = 0; i < blocks.count(); ++i, block = blocks.after(block)) {
        int* const ticket = p.tickets + 1 + (dq_accum.block + block) * CONSUMERS + consumer;
        float* const slice = dq_accum.origin + static_cast<long long>(block * CONSUMERS + consumer) * SLICE;
        const unsigned source = shared.dq(consumer, ring.stage);
        bool first;
        ring.wait();
        // Wrong lengths may share a ticket: never wait for equality.
        if constexpr (DETERMINISTIC) {
          const int turn = band.key_blocks(block * BLOCK_M, BLOCK_M, BLOCK_N).end - 1 - work.first / BLOCK_N;
          first = turn == 0;
          while (load_acquire(ticket) < turn) __nanosleep(32);
        } else {  // whoever comes first has its share at hand: the others don't wait long
          int seen = add_acquire(ticket, 1);
          first = seen == 0;
          while (!first && seen < SET) seen = load_acquire(ticket);
        }
        if (first) {
          store_run(slice, source, SLICE * 4);
        } else {
          fence_async_global();
          add_run(slice, source, SLICE * 4);
        }
        wait_runs_read();
        ring.stages.empty(ring.stage).arrive();
        ring.next();
        if (DETERMINISTIC || first) {
          wait_runs();
          fence_async_global();
          add_release(ticket, DETERMINISTIC ? 1 : SET);
        }
      }
    }
  }
  wait_runs();
}

__device__ __forceinline__ void consume(const TmaParams& p, const Shared shared, const int number) {
  const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0), lane = threadIdx.x % 32;
  Score<float> score(p);
  const float scale = static_cast<float>(p.scale), keep_scale = static_cast<float>(p.keep_scale);

  // This consumer's keys, and those columns that its share of dQ takes.
  const WarpgroupOperand<Major::K, TileK> k(TileK{shared.k().base + number * KEYS * 128});
  const WarpgroupOperand<Major::K, TileV> v(TileV{shared.v().base + number * KEYS * 128});
  const WarpgroupOperand<Major::MN, TileK> k_part(TileK{shared.k().base + (BY_ROWS ? 0 : number * BLOCK_N * 128)});

  Ring<STAGES> q_ring(shared.q_stages());  // dO's moves along with it
  const Stages<STAGES> dout_stages = shared.dout_stages();
  Ring<2> dq_ring(shared.dq_stages(number));  // its stage is dS's, too

  // Rows of the next sequence take part in products with 0, and 0 * NaN is NaN.
  const auto clear = [&](const auto& tile, int end, int barrier, int threads) {
    if (VARLEN && end < tile.ROWS) {
      clear_rows<128>(tile, max(end, 0));
      fence_async_shared();
      named_barrier_sync(barrier, threads);
    }
  };
  for (unsigned phase = 0;; phase ^= 1) {
    shared.work_stages().full(0).wait(phase);
    const Work work = Work::read(p, shared.work());
    shared.work_stages().release(0);
    if (!work.valid()) break;
    const Sequence& sequence = work.sequence;
    const Band band(p, sequence);
    const RowBlocks blocks(band, work.first);
    const int first_key = work.first + number * KEYS, key0 = first_key + warp * 16 + lane / 4;
    float dk[1][DK / 8][4] = {}, dv[1][DV / 8][4] = {};  // [KEYS, DK], [KEYS, DV]

    shared.kv_stages().full(0).wait(phase);
    clear(shared.k(), sequence.seqlen_k - work.first, 1, 256);
    clear(shared.v(), sequence.seqlen_k - work.first, 1, 256);
    for (int head = work.head * p.group; head < (work.head + 1) * p.group; ++head) {
      score.select(p, band, sequence.batch, head);
      const Dropout dropout(p, sequence.batch, head);
      int block = blocks.start;
      for (int i = 0; i < blocks.count(); ++i, block = blocks.after(block)) {
        const int first_row = block * BLOCK_M, row0 = first_row + lane % 4 * 2;
        const TileQ q_smem = shared.q(q_ring.stage);
        const TileO dout_smem = shared.dout(q_ring.stage);
        const unsigned sums = shared.sums(q_ring.stage) + lane % 4 * 8;
        float s_rmem[1][N][4], dp_rmem[1][N][4];  // [KEYS, BLOCK_M]
        auto &s = s_rmem[0], &dp = dp_rmem[0];
        unsigned p_words[N / 2][4], ds_words[N / 2][4];

        q_ring.wait();
        clear(q_smem, sequence.seqlen_q - first_row, 2 + number, 128);
        float lse[N][2], delta[N][2];
        load_row_sums(lse, sums);  // now, since shared memory is slow while products use it
        pin(s);
        wgmma_fence();
        warpgroup_gemm<DK / 16>(s, k, WarpgroupOperand<Major::K, TileQ>(q_smem), false);
        wgmma_commit();
        dout_stages.full(q_ring.stage).wait(q_ring.phase);
        clear(dout_smem, sequence.seqlen_q - first_row, 2 + number, 128);
        pin(dp);
        wgmma_fence();
        warpgroup_gemm<DV / 16>(dp, v, WarpgroupOperand<Major::K, TileO>(dout_smem), false);
        wgmma_commit();

        const Dropped<N> dropped(dropout, row0, key0);
        const int last_row = min(first_row + BLOCK_M, sequence.seqlen_q) - 1;
        const bool masked = !band.all_see(first_row, last_row, work.first, work.first + BLOCK_N);
        bool spoilt = false;  // whether a hidden entry may be, or meet, something that isn't finite

        wgmma_wait<1>();
        pin(s);
        if (masked) spoilt |= any_non_finite(s_rmem);
        apply_transposed(s, score, row0, key0);
        float derivative[N][4];
        if constexpr (SOFTCAP) {
#pragma unroll
          for (int i = 0; i < 4 * N; ++i)
            derivative[i / 4][i % 4] =
                score.derivative(s[i / 4][i % 4], row0 + i / 4 * 8 + i % 2, key0 + i % 4 / 2 * 8);
        }
        exponentiate_transposed(s, score.factor, lse);
        if (masked) band.mask_transposed(s, row0, key0, 0.f);  // not before: LSE may be NaN
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

        // Before the wait for the same reason; but for 128 rows there are no registers.
        if constexpr (N == 8) load_row_sums(delta, sums + BLOCK_M * 4);
        wgmma_wait<0>();
        if constexpr (N > 8) load_row_sums(delta, sums + BLOCK_M * 4);
        pin(dp);
        if (masked) spoilt |= any_non_finite(dp_rmem);
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            float x = dp[n][c];
            if constexpr (DROPOUT) x = dropped.at(n, c) ? 0 : x * keep_scale;
            dp[n][c] = s[n][c] * (x - delta[n][c % 2]);
            if constexpr (SOFTCAP) dp[n][c] *= derivative[n][c];
          }
        }
        if (masked) band.mask_transposed(dp, row0, key0, 0.f);
        pack_transposed(ds_words, dp);

        const TileS ds_smem = shared.ds(dq_ring.stage);
        QFragments dq;
        if (!masked || !named_barrier_or(1, 256, spoilt)) {
          store_transposed(ds_smem, ds_words, number * KEYS + warp * 16);
          pin(dv[0]);
          pin(p_words);
          wgmma_fence();
          warpgroup_gemm(dv[0], p_words, WarpgroupOperand<Major::MN, TileO>(dout_smem));
          wgmma_commit();
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
          dout_stages.release(q_ring.stage);
          pin(dk[0]);
          pin(ds_words);
          wgmma_fence();
          warpgroup_gemm(dk[0], ds_words, WarpgroupOperand<Major::MN, TileQ>(q_smem));
          wgmma_commit();
          wgmma_wait<1>();
          pin(dq[0]);
        } else {
          const TileS p_smem = shared.ds(dq_ring.stage ^ 1);
          store_transposed(p_smem, p_words, number * KEYS + warp * 16);
          store_transposed(ds_smem, ds_words, number * KEYS + warp * 16);
          named_barrier_sync(1, 256);
          const int row_start = (BY_ROWS ? number * 64 : 0) + warp * 16, key_start = number * KEYS + warp * 16;
#pragma unroll
          for (int i = 0; i < Q_COLUMNS / 2; ++i) dq[0][i / 4][i % 4] = 0;
          add_visible<false>(dq, ds_smem, row_start, shared.k(), BY_ROWS ? 0 : number * 64, band, first_row,
                             work.first);
          add_visible<true>(dv, p_smem, key_start, dout_smem, 0, band, first_row, work.first);
          add_visible<true>(dk, ds_smem, key_start, q_smem, 0, band, first_row, work.first);
          named_barrier_sync(1, 256);
          dout_stages.release(q_ring.stage);
        }

        dq_ring.wait_empty();
#pragma unroll
        for (int n = 0; n < Q_COLUMNS / 8; ++n)
          store_shared(shared.dq(number, dq_ring.stage) + ((warp * (Q_COLUMNS / 8) + n) * 32 + lane) * 16, dq[0][n]);
        fence_async_shared();
        __syncwarp();
        if (lane == 0) dq_ring.stages.full(dq_ring.stage).arrive();

        wgmma_wait<0>();
        pin(dk[0]);
        pin(ds_words);
        q_ring.release();
        dq_ring.next();
      }
    }
    shared.kv_stages().release(0);

    // dS has served: its places take dV, then dK.
    const auto store = [&](const auto& tile, const auto& gradient, auto width, const Rows<Element>& target,
                           float factor) {
      __syncwarp();
#pragma unroll
      for (int i = 0; i < sizeof(gradient) / 32; ++i) {
        unsigned words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const auto& d = gradient[2 * i + j / 2];
          words[j] = pack(d[j % 2 * 2] * factor, d[j % 2 * 2 + 1] * factor, Element{});
        }
        store_matrices(tile.address(warp * 16 + lane % 16, i * 32 + lane / 16 * 16), words);
      }
      __syncwarp();  // a warp stores the rows it wrote
      store_rows<16, decltype(width)::VALUE>(tile, warp * 16, target, first_key + warp * 16);
    };
    named_barrier_sync(1, 256);  // both consumers are done with it
    const unsigned place = shared.ds(number).base;
    store(StoredV{place}, dv[0], Constant<HEAD_DIM_V>{},
          sequence.rows_k(static_cast<Element*>(p.dv), p.dv_strides, work.head), DROPOUT ? keep_scale : 1.f);
    store(StoredK{place}, dk[0], Constant<HEAD_DIM>{},
          sequence.rows_k(static_cast<Element*>(p.dk), p.dk_strides, work.head), scale);
    named_barrier_sync(1, 256);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) backward_sm90(const __grid_constant__ TmaParams p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const Shared shared{shared_address(memory)};
  if (threadIdx.x == 0) {
    shared.work_stages().init(WARPS + CONSUMERS + 1);
    shared.kv_stages().init(WARPS);
    shared.q_stages().init(WARPS);
    shared.dout_stages().init(WARPS);
    for (int consumer = 0; consumer < CONSUMERS; ++consumer) shared.dq_stages(consumer).init(1, 4);
    fence_barrier_init();
  }
  __syncthreads();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // the same for a whole warp, as the compiler now knows
  if (warp >= 4) {
    claim_registers<CONSUMER_REGISTERS>();
    consume(p, shared, warp / 4 - 1);
    return;
  }
  release_registers<PRODUCER_REGISTERS>();
  if (threadIdx.x == 0) produce_rows(p, shared);
  if (threadIdx.x == 32) produce_kv(p, shared);
  if (threadIdx.x == 64) take_dq(p, shared, 0);
  if (threadIdx.x == 96) take_dq(p, shared, 1);
}
