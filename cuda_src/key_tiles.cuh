// What backward_sm90.cu, backward_narrow_sm90.cu and backward_192_sm90.cu share: the tiles of keys, the threads that
// bring what a tile needs and take its shares of dQ away, and the way of dK and dV to global memory.
//
//   A producer thread brings K and V, another one fills a ring of stages with blocks of Q and dO and their LSE and
//   -delta.  A thread for each consumer takes its shares of dQ away.  They are added up in an accumulator in global
//   memory, which need not be zero: the first thread block that comes to a block of rows sets it.
#pragma once
#include "band.cuh"
#include "dq_accum.cuh"
#include "ptx/tma.cuh"
#include "ring.cuh"
#include "sequence.cuh"
#include "warpgroup.cuh"
#include "work.cuh"

constexpr int CONSUMERS = 2, THREADS = 128 * (1 + CONSUMERS);
constexpr int KEYS = BLOCK_N / 2;  // of a product
constexpr int DK = (HEAD_DIM + 15) / 16 * 16, DV = (HEAD_DIM_V + 15) / 16 * 16;
constexpr int N = BLOCK_M / 8;  // products of 8 rows along S^T
static_assert(BLOCK_M == 64 && WARPS == 4 * CONSUMERS && Q_ROWS == 16);

// READERS consumers share a block of rows, each with its keys; or they take the blocks in turn, READERS == 1.  Its dQ
// is one consumer's, in turn, too; or each has a slice of it.
constexpr int SLICES = Q_WARPS_D, SLICE = BLOCK_M * D / SLICES;
static_assert((READERS == 1 || READERS == CONSUMERS) && (SLICES == 1 || SLICES == READERS));

using TileK = Tile<Element, BLOCK_N, (D + 63) / 64 * 64>;  // dQ's columns may be padded further than HEAD_DIM
using TileV = Tile<Element, BLOCK_N, (DV + 63) / 64 * 64>;
using TileQ = Tile<Element, BLOCK_M, TileK::COLS>;
using TileO = Tile<Element, BLOCK_M, TileV::COLS>;
using TileS = Tile<Element, BLOCK_M, (KEYS + 63) / 64 * 64 * CONSUMERS>;  // whole panels for each half of the keys
using StoredK = Tile<Element, KEYS, TileK::COLS>;                         // gradients on their way out
using StoredV = Tile<Element, KEYS, TileV::COLS>;

struct Shared {  // dynamic shared memory
  static constexpr int ROW_SUMS = 2 * BLOCK_M * 4;
  static constexpr int V = TileK::BYTES, Q = V + TileV::BYTES, DOUT = Q + STAGES * TileQ::BYTES;
  static constexpr int S = DOUT + DOUT_STAGES * TileO::BYTES, DQ = S + 2 * CONSUMERS / READERS * TileS::BYTES;
  static constexpr int SUMS = DQ + CONSUMERS * DQ_STAGES * SLICE * 4, WORK = SUMS + STAGES * ROW_SUMS;
  static constexpr int RINGS = WORK + Work::BYTES;
  static constexpr int BYTES = RINGS + 16 * (2 + STAGES + DOUT_STAGES + CONSUMERS * DQ_STAGES + 2);
  static_assert(SHARED_BYTES >= BYTES);
  unsigned base;

  __device__ __forceinline__ TileK k() const { return {base}; }
  __device__ __forceinline__ TileV v() const { return {base + V}; }
  __device__ __forceinline__ TileQ q(int stage) const { return {base + Q + stage * TileQ::BYTES}; }
  __device__ __forceinline__ TileO dout(int stage) const { return {base + DOUT + stage * TileO::BYTES}; }
  __device__ __forceinline__ unsigned sums(int stage) const { return base + SUMS + stage * ROW_SUMS; }
  // P or dS; a consumer's own, if it takes a block of rows alone.
  __device__ __forceinline__ TileS s(int buffer, int consumer = 0) const {
    return {base + S + (2 * consumer + buffer) * TileS::BYTES};
  }
  __device__ __forceinline__ unsigned dq(int consumer, int stage) const {
    return base + DQ + (DQ_STAGES * consumer + stage) * SLICE * 4;
  }
  __device__ __forceinline__ unsigned work() const { return base + WORK; }
  __device__ __forceinline__ Stages<1> work_stages() const { return {base + RINGS}; }
  __device__ __forceinline__ Stages<1> kv_stages() const { return {base + RINGS + 16}; }
  __device__ __forceinline__ Stages<STAGES> q_stages() const { return {base + RINGS + 32}; }
  __device__ __forceinline__ Stages<DOUT_STAGES> dout_stages() const { return {base + RINGS + 16 * (2 + STAGES)}; }
  __device__ __forceinline__ Stages<DQ_STAGES> dq_stages(int consumer) const {
    return {base + RINGS + 16 * (2 + STAGES + DOUT_STAGES + DQ_STAGES * consumer)};
  }
  __device__ __forceinline__ Stages<2> ds_stages() const {  // where one consumer's dQ takes what both have of dS
    return {base + RINGS + 16 * (2 + STAGES + DOUT_STAGES + CONSUMERS * DQ_STAGES)};
  }
  // Where consumers that take blocks in turn give each other their sums: full when all have given, empty when all have
  // taken.  Every thread says so for itself, as in Stages::release_by_each.
  __device__ __forceinline__ Stages<1> exchange() const { return {ds_stages().base}; }

  __device__ __forceinline__ void init() const {
    work_stages().init(32 * WARPS + CONSUMERS + 1);
    kv_stages().init(WARPS);
    q_stages().init(128 * READERS);
    dout_stages().init(4 * READERS);
    for (int consumer = 0; consumer < CONSUMERS; ++consumer) dq_stages(consumer).init(1, 4);
    if (READERS == 1)
      exchange().init(32 * WARPS, 32 * WARPS);
    else
      ds_stages().init(4, WARPS);
    fence_barrier_init();
  }
};

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
  Ring q_ring(shared.q_stages());
  Ring dout_ring(shared.dout_stages());
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
  Ring ring(shared.dq_stages(consumer));
  unsigned turn_to_take = 0;
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
        if (SLICES == 1 && int(turn_to_take++ % CONSUMERS) != consumer) continue;
        int* const ticket = p.tickets + 1 + (dq_accum.block + block) * SLICES + consumer % SLICES;
        float* const slice = dq_accum.origin + static_cast<long long>(block * SLICES + consumer % SLICES) * SLICE;
        const unsigned source = shared.dq(consumer, ring.stage);
        bool first;
        ring.stages.full(ring.stage).wait_asleep(ring.phase);
        fence_async_shared();  // for its writers, too: they would lose hundreds of cycles to it
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

// Rows of the next sequence take part in products with 0, and 0 * NaN is NaN.
template <class T>
__device__ __forceinline__ void clear_from(const T& tile, int end, int barrier, int threads) {
  if (VARLEN && end < T::ROWS) {
    clear_rows<128>(tile, max(end, 0));
    fence_async_shared();
    named_barrier_sync(barrier, threads);
  }
}

// Part of a consumer's share of dQ, from column 8 * first on, to its place on the way out.
template <int COUNT>
__device__ __forceinline__ void put_dq(const float (&dq)[COUNT][4], unsigned place, int first) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < COUNT; ++n) store_shared(place + ((warp * (Q_COLUMNS / 8) + first + n) * 32 + lane) * 16, dq[n]);
}
// A warp's part of a stage is there.
template <int COUNT>
__device__ __forceinline__ void say_full(const Ring<COUNT>& ring) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) ring.stages.full(ring.stage).arrive();
}
// The whole share, to a place that is empty.
__device__ __forceinline__ void hand_over(const QFragments& dq, const Shared& shared, int number,
                                          const Ring<DQ_STAGES>& ring) {
  put_dq(dq[0], shared.dq(number, ring.stage), 0);
  say_full(ring);
}

// A gradient of KEYS keys from `first` on to global memory, through a tile in shared memory.
template <int WIDTH, class T, int COLUMNS>
__device__ __forceinline__ void store_gradient(const T& tile, const float (&gradient)[COLUMNS][4],
                                               const Rows<Element>& target, int first, float factor) {
  const int row = threadIdx.x / 32 % 4 * 16;
  __syncwarp();
  store_fragments(tile, row, gradient, {factor, factor});
  __syncwarp();  // a warp stores the rows it wrote
  store_rows<16, WIDTH>(tile, row, target, first + row);
}

// All roles of a thread block.
template <class Consume>
__device__ __forceinline__ void run(const TmaParams& p, const Shared& shared, const Consume& consume) {
  if (threadIdx.x == 0) shared.init();
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
