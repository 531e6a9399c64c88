// Attention forward on Hopper (TMA, wgmma, warp specialisation): the algorithm of forward_sm80.cu, arranged as in
// FlashAttention-3, section 3.
//
//   Producer threads fill rings of shared-memory stages with blocks of Q, K and V.  Consumers, a warpgroup for each 64
//   rows of Q, do the rest:
//
//     for each tile of rows (a thread block stays for many):
//       S = Q K^T of the last block of keys, P = exp(S - m)
//       for each block before it:
//         start S = Q K^T
//         start O = O + P V of the block behind
//         wait for S;  P' = exp(S - m), while the tensor cores are at O
//         wait for O;  where m moved: O = exp(m - m') O;  P = P'
//       O = O + P V of the first block
//       write O / l and LSE = m + log(l)
//
// Consumers start their products in turn, so that those of one run beside the exponentials of the other.  The maximum m
// may lag behind, where the wait for O comes last (AHEAD: see Softmax::exponentiate_ahead); otherwise it comes before
// or amidst the exponentials, and O shrinks beside those that are left.
#include "band.cuh"
#include "dropout.cuh"
#include "forward_row.cuh"
#include "ptx/tma.cuh"
#include "ring.cuh"
#include "score.cuh"
#include "sequence.cuh"
#include "softmax.cuh"
#include "warpgroup.cuh"
#include "work.cuh"

constexpr int THREADS = 128 * (1 + CONSUMERS);
constexpr int ROWS = 64, BLOCK_M = ROWS * CONSUMERS;  // rows of a consumer and of a tile
constexpr int D = (HEAD_DIM + 15) / 16 * 16, DV = (HEAD_DIM_V + 15) / 16 * 16;
constexpr int N = BLOCK_N / 8, N_OUT = DV / 8;

// Boxes are 64 columns wide, so tiles are whole panels of 128 bytes; products stop at D and DV.
using TileQ = Tile<Element, ROWS, (D + 63) / 64 * 64>;
using TileK = Tile<Element, BLOCK_N, TileQ::COLS>;
using TileV = Tile<Element, BLOCK_N, (DV + 63) / 64 * 64>;

using TileO = Tile<Element, ROWS, TileV::COLS>;  // takes the place of its rows of Q

struct Shared {  // dynamic shared memory
  static constexpr int SLICE = TileQ::BYTES > TileO::BYTES ? TileQ::BYTES : TileO::BYTES, Q_BYTES = CONSUMERS * SLICE;
  static constexpr int K = Q_STAGES * Q_BYTES, V = K + STAGES * TileK::BYTES, WORK = V + STAGES * TileV::BYTES;
  static constexpr int RINGS = WORK + Work::BYTES, BYTES = RINGS + 16 * (1 + Q_STAGES + 2 * STAGES);
  unsigned base;

  __device__ __forceinline__ unsigned slice(int stage, int consumer) const {
    return base + stage * Q_BYTES + consumer * SLICE;
  }
  __device__ __forceinline__ TileK k(int stage) const { return {base + K + stage * TileK::BYTES}; }
  __device__ __forceinline__ TileV v(int stage) const { return {base + V + stage * TileV::BYTES}; }
  __device__ __forceinline__ unsigned work() const { return base + WORK; }
  __device__ __forceinline__ Stages<1> work_stages() const { return {base + RINGS}; }
  __device__ __forceinline__ Stages<Q_STAGES> q_stages() const { return {base + RINGS + 16}; }
  __device__ __forceinline__ Stages<STAGES> k_stages() const { return {base + RINGS + 16 * (1 + Q_STAGES)}; }
  __device__ __forceinline__ Stages<STAGES> v_stages() const { return {base + RINGS + 16 * (1 + Q_STAGES + STAGES)}; }
};
static_assert(SHARED_BYTES >= Shared::BYTES);

// The tiles of this thread block.  Later rows see more keys under a causal mask, so their tiles go first.
struct Tiles {
  const Params& p;
  int index;
  PackedPlaces packed;

  __device__ __forceinline__ explicit Tiles(const Params& params) : p(params), index(blockIdx.x) {}

  __device__ __forceinline__ Work take() { return p.tickets != nullptr ? take_free() : take_turn(); }

 private:
  // One tile from each round over all thread blocks, every other round the other way round, so that all get alike; and
  // every other section of heads from the first rows on.
  __device__ __forceinline__ Work take_turn() {
    const Place x = Place::dense(p, index, p.row_blocks, p.heads);
    if (!x.valid) return {-1};
    index += 2 * (gridDim.x - 1 - index % gridDim.x) + 1;
    const bool upwards = p.section > 1 && ((p.heads * p.batch - 1) / p.section - x.section) % 2 == 1;
    return {(upwards ? x.block : x.blocks - 1 - x.block) * BLOCK_M, x.head, x.sequence};
  }

  // The next one that no thread block has taken yet.
  __device__ __forceinline__ Work take_free() {
    index = add_relaxed(p.tickets, 1);
    const Place x = VARLEN ? packed.find<BLOCK_M>(p, index, p.heads, &Sequence::seqlen_q)
                           : Place::dense(p, index, p.row_blocks, p.heads);
    if (!x.valid) return {-1};
    return {(x.blocks - 1 - x.block) * BLOCK_M, x.head, x.sequence};
  }
};

// A dimension without a stride is not in the map.
template <class T>
__device__ __forceinline__ void load(const T& tile, Barrier full, const TensorMap& map, const Strides& s, int row,
                                     int head, int batch) {
  for (int panel = 0; panel < T::COLS / 64; ++panel)
    load_box(tile.base + panel * (T::ROWS * 128), map, full, panel * 64, row, s.head ? head : 0, s.batch ? batch : 0);
}

// One thread takes the tiles, tells the others of them, and brings Q, a tile ahead where there are stages for it.
__device__ __forceinline__ void produce_q(const TmaParams& p, const Shared shared) {
  Ring<1> work_ring(shared.work_stages());
  Ring<Q_STAGES> ring(shared.q_stages());
  Tiles tiles(p);
  while (true) {
    const Work work = take_and_tell(tiles, shared.work(), work_ring);
    if (!work.valid()) break;
    ring.wait_empty();
    const Barrier full = ring.expect(CONSUMERS * TileQ::BYTES);
    const int row = static_cast<int>(work.sequence.start_q) + work.first;
    for (int consumer = 0; consumer < CONSUMERS; ++consumer)
      load(TileQ{shared.slice(ring.stage, consumer)}, full, p.q_map, p.q_strides, row + consumer * ROWS, work.head,
           work.sequence.batch);
    ring.next();
  }
}

// Another one brings K, a third one V, each as soon as its own ring has room: a block of K is needed before the V of
// the block behind it.
template <bool VALUES>
__device__ __forceinline__ void produce_keys(const TmaParams& p, const Shared shared) {
  Ring<1> work_ring(shared.work_stages());
  Ring<STAGES> ring(VALUES ? shared.v_stages() : shared.k_stages());
  while (true) {
    work_ring.stages.full(0).wait_asleep(work_ring.phase);
    const Work work = Work::read(p, shared.work());
    if (!work.valid()) return;
    const Band::Blocks blocks = Band(p, work.sequence).key_blocks(work.first, BLOCK_M, BLOCK_N);
    const int head_kv = work.head / p.group, batch = work.sequence.batch;
    // The next tile is taken when this one has two blocks of K left to bring: late, so that thread blocks get alike.
    const int two_left = min(blocks.begin + 1, blocks.end - 1);
    if (VALUES || two_left < blocks.begin) work_ring.stages.empty(0).arrive();
    for (int block = blocks.end - 1; block >= blocks.begin; --block) {
      if (!VALUES && block == two_left) work_ring.stages.empty(0).arrive();
      const int row = static_cast<int>(work.sequence.start_k) + block * BLOCK_N;
      ring.wait_empty();
      if constexpr (VALUES)
        load(shared.v(ring.stage), ring.expect(TileV::BYTES), p.v_map, p.v_strides, row, head_kv, batch);
      else
        load(shared.k(ring.stage), ring.expect(TileK::BYTES), p.k_map, p.k_strides, row, head_kv, batch);
      ring.next();
    }
    work_ring.next();
  }
}

// A consumer's strip of a tile: 64 rows.
struct Strip {
  bool valid;  // otherwise there are no more tiles
  int first, last, head, batch;
  Sequence sequence;
  Band band;
  Band::Blocks whole, brought, seen;  // blocks of keys: it sees all of, the producers bring, it sees some of

  __device__ __forceinline__ Strip(const Params& p, const Work& work, int consumer)
      : valid(work.valid()),
        first(work.first + consumer * ROWS),
        head(work.head),
        batch(work.sequence.batch),
        sequence(work.sequence),
        band(p, sequence) {
    last = min(first + ROWS, sequence.seqlen_q) - 1;
    whole = band.whole_key_blocks(first, last, BLOCK_N);
    brought = band.key_blocks(work.first, BLOCK_M, BLOCK_N);
    seen = band.key_blocks(first, ROWS, BLOCK_N);
    if (first > last || seen.begin >= seen.end) seen = {brought.begin, brought.begin};
  }

  __device__ __forceinline__ bool sees_keys() const { return seen.begin < seen.end; }
  __device__ __forceinline__ int unseen_before() const { return brought.end - seen.end; }
  __device__ __forceinline__ int unseen_after() const { return seen.begin - brought.begin; }
};

struct Consumer {
  const TmaParams& p;
  const Shared shared;
  const int number, warp, lane;
  Ring<1> work_ring;
  Ring<Q_STAGES> q_ring;
  Ring<STAGES> k_ring, v_ring;
  Score<float> score;
  const float keep_scale;

  Softmax<float, 1> softmax;
  float o[1][N_OUT][4];      // [ROWS, DV]
  unsigned probs[N / 2][4];  // [ROWS, BLOCK_N], of the block whose share of O is next

  __device__ __forceinline__ Consumer(const TmaParams& params, Shared shared_, int number_)
      : p(params),
        shared(shared_),
        number(number_),
        warp(__shfl_sync(~0u, threadIdx.x / 32 % 4, 0)),
        lane(threadIdx.x % 32),
        work_ring(shared.work_stages()),
        q_ring(shared.q_stages()),
        k_ring(shared.k_stages()),
        v_ring(shared.v_stages()),
        score(params),
        keep_scale(static_cast<float>(params.keep_scale)) {}

  __device__ __forceinline__ void run() {
    if (number == CONSUMERS - 1) pass_turn();
    for (Strip strip = take(); strip.valid; strip = take()) {
      q_ring.wait();
      skip(strip.unseen_before());
      softmax = {};
#pragma unroll
      for (int i = 0; i < 4 * N_OUT; ++i) o[0][i / 4][i % 4] = 0;
      if (strip.sees_keys()) {
        {
          float s[1][N][4];  // [ROWS, BLOCK_N]
          wait_turn();
          start_scores(s);
          pass_turn();
          wgmma_wait<0>();
          finish_scores<true>(s, strip, strip.seen.end - 1);
          if constexpr (AHEAD) {
            softmax.exponentiate_first<Element>(probs, s, score.factor);
          } else {
            float shrink[1][2];
            softmax.raise_maximum(s, shrink, score.factor);
            softmax.exponentiate(s, score.factor);
            pack_probs(s);
          }
          drop(probs, strip, strip.seen.end - 1);
        }
        for (int block = strip.seen.end - 2; block >= strip.seen.begin;) {
          if (strip.whole.has(block)) {  // a loop of its own, without the instructions of a mask in its midst
            const int last = max(strip.whole.begin, strip.seen.begin);
#pragma unroll 1
            for (; block >= last; --block) step<false>(strip, block);
          } else {
            step<true>(strip, block--);
          }
        }
        start_output(strip, strip.seen.begin);
        finish_output();
      }
      skip(strip.unseen_after());
      store(strip);
    }
  }

  // P of a block of keys, beside O of the one behind it.
  template <bool MASKED>
  __device__ __forceinline__ void step(const Strip& strip, int block) {
    float s[1][N][4], shrink[1][2];
    wait_turn();
    start_scores(s);
    start_output(strip, block + 1);
    pass_turn();
    wgmma_wait<1>();
    finish_scores<MASKED>(s, strip, block);
    if constexpr (AHEAD) {
      unsigned next_probs[N / 2][4];
      const bool moved = softmax.exponentiate_ahead<Element>(next_probs, s, shrink, score.factor);
      drop(next_probs, strip, block);
      pin(next_probs);
      finish_output();
      if (moved) rescale(o, shrink);
      copy(next_probs);
    } else {
      softmax.raise_maximum(0, s, shrink, score.factor);
      softmax.template exponentiate<0, N>(0, 0, s, score.factor);
      softmax.raise_maximum(1, s, shrink, score.factor);
      // O shrinks beside the exponentials that are left.  With three consumers in turn these are all: the products of
      // the other two keep the tensor cores at work, and O is there soon.
      if constexpr (CONSUMERS < 3 || !TURNS) keep_before(softmax.l[0]);
      finish_output();
      rescale(o, shrink);
      softmax.template exponentiate<N, 2 * N>(0, 0, s, score.factor);
      softmax.template exponentiate<0, 2 * N>(0, 1, s, score.factor);
      pack_probs(s);
      drop(probs, strip, block);
    }
  }

  __device__ __forceinline__ void pack_probs(const float (&s)[1][N][4]) {
#pragma unroll
    for (int i = 0; i < 2 * N; ++i)
      probs[i / 4][i % 4] = pack(s[0][i / 2][i % 2 * 2], s[0][i / 2][i % 2 * 2 + 1], Element{});
  }

  // A turn for each block of keys, with named barriers behind those of strips: the one before has arrived at this
  // one's.
  __device__ __forceinline__ void wait_turn() const {
    if constexpr (TURNS) named_barrier_sync(1 + CONSUMERS + number, 256);
  }
  __device__ __forceinline__ void pass_turn() const {
    if constexpr (TURNS) named_barrier_arrive(1 + CONSUMERS + (number + 1 == CONSUMERS ? 0 : number + 1), 256);
  }

  // The next strip.
  __device__ __forceinline__ Strip take() { return Strip(p, hear(p, shared.work(), work_ring), number); }

  __device__ __forceinline__ void start_scores(float (&s)[1][N][4]) {
    const WarpgroupOperand<Major::K, TileQ> q({shared.slice(q_ring.stage, number)});
    const WarpgroupOperand<Major::K, TileK> k(shared.k(k_ring.stage));
    k_ring.wait();
    pin(s[0]);
    wgmma_fence();
    warpgroup_gemm<D / 16>(s[0], q, k, false);
    wgmma_commit();
  }

  template <bool MASKED>
  __device__ __forceinline__ void finish_scores(float (&s)[1][N][4], const Strip& strip, int block) {
    pin(s[0]);
    k_ring.release();
    const int first_key = block * BLOCK_N, row0 = strip.first + warp * 16 + lane / 4, key0 = first_key + lane % 4 * 2;
    score.select(p, strip.band, strip.batch, strip.head);
    score.apply(s, row0, key0);
    if (MASKED && !strip.band.all_see(strip.first, strip.last, first_key, first_key + BLOCK_N))
      strip.band.mask(s, row0, key0);
  }

  __device__ __forceinline__ void drop(unsigned (&words)[N / 2][4], const Strip& strip, int block) const {
    if constexpr (DROPOUT) {
      const Dropout dropout(p, strip.batch, strip.head);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        bool keep[4];
        dropout.keep(keep, strip.first + warp * 16 + lane / 4, block * BLOCK_N + lane % 4 * 2 + i / 2 * 16 + i % 2);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (!keep[j]) words[i / 2][j % 2 * 2 + j / 2] &= i % 2 ? 0x0000ffffu : 0xffff0000u;
      }
    }
  }

  __device__ __forceinline__ void start_output(const Strip& strip, int block) {
    const TileV v = shared.v(v_ring.stage);
    v_ring.wait();
    if (VARLEN && (block + 1) * BLOCK_N > strip.sequence.seqlen_k) {  // the next sequence's rows: 0 * NaN is NaN
      clear_rows<128>(v, strip.sequence.seqlen_k - block * BLOCK_N);
      fence_async_shared();
      named_barrier_sync(1 + number, 128);
    }
    pin(o[0]);
    pin(probs);
    wgmma_fence();
    warpgroup_gemm(o[0], probs, WarpgroupOperand<Major::MN, TileV>(v));
    wgmma_commit();
  }

  __device__ __forceinline__ void finish_output() {
    wgmma_wait<0>();
    pin(o[0]);
    pin(probs);
    v_ring.release();
  }

  __device__ __forceinline__ void copy(const unsigned (&next_probs)[N / 2][4]) {
    // Not as it is: the compiler would keep both in the same registers, and wait for O before it starts the next P.
    const unsigned opaque_zero = static_cast<unsigned>(p.row_blocks) >> 31;
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) probs[i / 4][i % 4] = next_probs[i / 4][i % 4] ^ opaque_zero;
  }

  // Leave blocks to the other consumers.
  __device__ __forceinline__ void skip(int blocks) {
#pragma unroll 1
    for (; blocks > 0; --blocks) {
      wait_turn(), pass_turn();
      k_ring.wait(), k_ring.release();
      v_ring.wait(), v_ring.release();
    }
  }

  // O and LSE to global memory, O by way of the strip's rows of Q.
  __device__ __forceinline__ void store(const Strip& strip) {
    const TileO o_smem{shared.slice(q_ring.stage, number)};
    float l[2], inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      l[half] = softmax.total(0, half);
      inverse[half] = l[half] == 0 ? 0 : keep_scale * reciprocal_fast(l[half]);  // l is NaN if the row's scores are
    }
    // A NaN or inf in the V of a key that only some rows see has spoilt its column in all of them: any row tells.
    float zero = 0;
    if (!strip.band.all_see(strip.first, strip.last, strip.seen.begin * BLOCK_N,
                            min(strip.seen.end * BLOCK_N, strip.sequence.seqlen_k))) {
#pragma unroll
      for (int i = 0; i < 2 * N_OUT; ++i) zero += o[0][i / 2][i % 2] * 0;
    }
    const bool spoilt = __any_sync(~0u, zero != 0);

    named_barrier_sync(1 + number, 128);  // the whole warpgroup is done with Q
    store_fragments(o_smem, warp * 16, o[0], inverse);
    fence_async_shared();  // before Q comes here again
    __syncwarp();          // a warp stores the rows it wrote
    store_rows<16, HEAD_DIM_V>(o_smem, warp * 16,
                               strip.sequence.rows_q(static_cast<Element*>(p.out), p.out_strides, strip.head),
                               strip.first + warp * 16);
    q_ring.release();
    if (spoilt) {
      __syncwarp();
      for (int row = strip.first + warp * 16; row <= min(strip.first + warp * 16 + 15, strip.last); ++row)
        forward_row(p, strip.batch, strip.head, row);
    }

    if (p.lse != nullptr && lane % 4 == 0) {
      float* const lse = static_cast<float*>(p.lse) + strip.sequence.lse_offset(p, strip.head);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = strip.first + warp * 16 + lane / 4 + 8 * half;
        if (row < strip.sequence.seqlen_q)
          lse[row * p.lse_row] = l[half] == 0
                                     ? minus_infinity<float>()
                                     : (softmax.shift(0, half, score.factor) + log2_fast(l[half])) * float(LN2);
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) forward_sm90(const __grid_constant__ TmaParams p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const Shared shared{shared_address(memory)};
  if (threadIdx.x == 0) {
    shared.work_stages().init(128 * CONSUMERS + 2);
    shared.q_stages().init(4 * CONSUMERS);
    shared.k_stages().init(4 * CONSUMERS);
    shared.v_stages().init(4 * CONSUMERS);
    fence_barrier_init();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the same for a whole warp, as the compiler now knows
  if (warpgroup > 0) {
    claim_registers<CONSUMER_REGISTERS>();
    Consumer(p, shared, warpgroup - 1).run();
    return;  // the order of the two matters: after the producers', ptxas takes this path to be divergent (C7518)
  }
  release_registers<PRODUCER_REGISTERS>();
  if (threadIdx.x == 0) produce_keys<false>(p, shared);
  if (threadIdx.x == 32) produce_q(p, shared);
  if (threadIdx.x == 64) produce_keys<true>(p, shared);
}
