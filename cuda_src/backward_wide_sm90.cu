// Attention backward on Hopper for head dims above 128, where dK and dV of 128 keys don't fit the registers together,
// as far as backward_192_sm90.cu does not take the call.  backward_delta.cu runs before it, backward_dq.cu after it.
//
//   A thread block is for the dK or for the dV of 128 keys (its part), each of its two consumers (warpgroups) for 64 of
//   them.  Two producer threads bring K and V, and blocks of Q and dO, in panels of 64 columns, through a ring each.
//
//     for each query head that shares these keys, for each block of rows that sees some of them:
//
//       dK:  start S^T = K Q^T, dP^T = V dO^T            dV:  start S^T = K Q^T
//            wait for S;   P^T = exp(score(S) - LSE)          start dV += P^T dO with the P before
//            wait for dP;  dS^T from P^T and dP^T             wait for S;  P^T = dropout(exp(score(S) - LSE))
//            dS to shared memory                              wait for dV
//            start dQ = dS K, each consumer half the columns
//            start dK += dS^T Q, panel by panel
//            wait for dQ; add it to its accumulator in global memory
//            wait for dK; release its panels one by one
//
//     write dK, or dV
//
// That is six products in place of five.  But dQ's accumulator, which 64 keys at a time would keep too busy, is added
// to once in 128 keys.
#include "band.cuh"
#include "dq_accum.cuh"
#include "ptx/tma.cuh"
#include "ring.cuh"
#include "score.cuh"
#include "sequence.cuh"
#include "transposed.cuh"
#include "visible.cuh"
#include "warpgroup.cuh"

enum class Part { DK, DV };

constexpr int CONSUMERS = 2, THREADS = 128 * (1 + CONSUMERS);
constexpr int KEYS = 64;  // of a consumer
constexpr int DK = (HEAD_DIM + 15) / 16 * 16, DV = (HEAD_DIM_V + 15) / 16 * 16;
constexpr int Q_PANELS = (DK + 63) / 64, DOUT_PANELS = (DV + 63) / 64;  // of a block of rows
constexpr int N = BLOCK_M / 8;                                          // products of 8 rows along S^T
constexpr int SUMS_STAGES = 2;
static_assert(BLOCK_M == 64 && BLOCK_N == CONSUMERS * KEYS && WARPS == 4 * CONSUMERS);
static_assert(Q_ROWS == 16 && Q_COLUMNS % 64 == 0);

using TileK = Tile<Element, BLOCK_N, D>;  // dQ's columns may be padded further than HEAD_DIM
using TileV = Tile<Element, BLOCK_N, DOUT_PANELS * 64>;
using TileS = Tile<Element, BLOCK_M, BLOCK_N>;
using Panel = Tile<Element, BLOCK_M, 64>;  // of Q or dO

template <Part PART>
struct Shared {  // dynamic shared memory
  // For dV K alone stays, and there is room for two blocks of rows.
  static constexpr int Q_RING = PART == Part::DK ? Q_STAGES : 2 * Q_PANELS;
  static constexpr int DOUT_RING = PART == Part::DK ? DOUT_STAGES : 2 * DOUT_PANELS;
  static constexpr int ROW_SUMS = 2 * BLOCK_M * 4;
  static constexpr int V = TileK::BYTES, S = V + (PART == Part::DK ? TileV::BYTES : 0), Q = S + TileS::BYTES;
  static constexpr int DOUT = Q + Q_RING * Panel::BYTES, SUMS = DOUT + DOUT_RING * Panel::BYTES;
  static constexpr int RINGS = SUMS + SUMS_STAGES * ROW_SUMS;
  static constexpr int BYTES = RINGS + 16 * (2 + SUMS_STAGES + Q_RING + DOUT_RING);
  static_assert(SHARED_BYTES >= BYTES);
  static_assert(Q_RING >= Q_PANELS, "S^T takes a whole block before dK releases its first panel");
  unsigned base;

  __device__ __forceinline__ TileK k() const { return {base}; }
  __device__ __forceinline__ TileV v() const { return {base + V}; }
  __device__ __forceinline__ TileS s() const { return {base + S}; }  // dS; P, where it takes the careful path
  __device__ __forceinline__ Panel q(int stage) const { return {base + Q + stage * Panel::BYTES}; }
  __device__ __forceinline__ Panel dout(int stage) const { return {base + DOUT + stage * Panel::BYTES}; }
  __device__ __forceinline__ unsigned sums(int stage) const { return base + SUMS + stage * ROW_SUMS; }
  // Where a gradient goes on its way out: K has served, or blocks of dO have.
  __device__ __forceinline__ TileK dk() const { return k(); }
  __device__ __forceinline__ TileV dv() const { return {base + DOUT}; }

  __device__ __forceinline__ Stages<1> k_stages() const { return {base + RINGS}; }
  __device__ __forceinline__ Stages<1> v_stages() const { return {base + RINGS + 16}; }
  __device__ __forceinline__ Stages<SUMS_STAGES> sums_stages() const { return {base + RINGS + 32}; }
  __device__ __forceinline__ Stages<Q_RING> q_stages() const { return {base + RINGS + 16 * (2 + SUMS_STAGES)}; }
  __device__ __forceinline__ Stages<DOUT_RING> dout_stages() const {
    return {base + RINGS + 16 * (2 + SUMS_STAGES + Q_RING)};
  }

  __device__ __forceinline__ void init() const {
    k_stages().init(1), v_stages().init(1);
    sums_stages().init(32 * WARPS), q_stages().init(WARPS), dout_stages().init(WARPS);
    fence_barrier_init();
  }
};

// The part and the keys of a thread block.  Under a causal mask the first keys are seen by the most rows: within a
// section of heads they go first, and dK, which takes longer, before dV.  In order of addition (backward_sm90.cu) they
// go last.
struct Work {
  int block, head_kv, batch;
  Part part;

  __device__ __forceinline__ explicit Work(const Params& p) {
    const int heads = p.heads_kv * p.batch, before = blockIdx.x / (2 * p.section * p.key_blocks) * p.section;
    const int width = min(p.section, heads - before), rest = blockIdx.x - 2 * before * p.key_blocks;
    const int round = rest / (2 * width), turn = rest - 2 * width * round, number = before + turn % width;
    block = DETERMINISTIC ? p.key_blocks - 1 - round : round;
    part = turn < width ? Part::DK : Part::DV;
    batch = number / p.heads_kv, head_kv = number - batch * p.heads_kv;
  }
};

// One step of the main loop is a block of rows of a head; the heads of the group follow one another.
struct Step {
  int head, block;
};
struct Steps {
  int first_head, end_head;
  Band::Blocks blocks;

  __device__ __forceinline__ Steps(const Params& p, const Work& work, const Band& band)
      : first_head(work.head_kv * p.group),
        end_head(first_head + p.group),
        blocks(band.row_blocks(work.block * BLOCK_N, BLOCK_N, BLOCK_M)) {
    if constexpr (VARLEN)  // the same for a whole warp, as the compiler now knows
      blocks = {__shfl_sync(~0u, blocks.begin, 0), __shfl_sync(~0u, blocks.end, 0)};
    if (blocks.begin >= blocks.end) end_head = first_head;
  }

  __device__ __forceinline__ Step first() const { return {first_head, blocks.begin}; }
  __device__ __forceinline__ bool has(const Step& x) const { return x.head < end_head; }
  __device__ __forceinline__ void advance(Step& x) const {
    if (++x.block == blocks.end) ++x.head, x.block = blocks.begin;
  }
};

template <int VALUE_>
struct Constant {
  static constexpr int VALUE = VALUE_;
};

// f(panel's number, its part of the columns of a gradient) for each panel.
template <int I = 0, int COLUMNS, class F>
__device__ __forceinline__ void for_panels(float (&gradient)[COLUMNS][4], const F& f) {
  if constexpr (8 * I < COLUMNS) {
    constexpr int TILES = COLUMNS - 8 * I < 8 ? COLUMNS - 8 * I : 8;
    f(Constant<I>{}, reinterpret_cast<float (&)[TILES][4]>(gradient[8 * I]));
    for_panels<I + 1>(gradient, f);
  }
}

// What the kernel's roles know of their thread block.
template <Part PART>
struct Context {
  const TmaParams& p;
  const Shared<PART> shared;
  const Work& work;
  const Sequence& sequence;
  const Band& band;
  const Steps& steps;
};

// ---------------------------------------------------------------------------------------------- producers

template <class T>
__device__ __forceinline__ void load_keys(const T& tile, Barrier full, const TensorMap& map, const Strides& s,
                                          const Work& work, const Sequence& sequence) {
  const int row = static_cast<int>(sequence.start_k) + work.block * BLOCK_N;
  full.arrive_and_expect(T::BYTES);
  for (int panel = 0; panel < T::COLS / 64; ++panel)  // a dimension without a stride is not in the map
    load_box(tile.base + panel * (BLOCK_N * 128), map, full, panel * 64, row, s.head ? work.head_kv : 0,
             s.batch ? work.batch : 0);
}

// Panels of a block of rows into the next stages of a ring, the first of which is at `base`.
template <int PANELS, int STAGES>
__device__ __forceinline__ void load_rows(Ring<STAGES>& ring, unsigned base, const TensorMap& map, const Strides& s,
                                          const Work& work, const Sequence& sequence, const Step& step) {
  const int row = static_cast<int>(sequence.start_q) + step.block * BLOCK_M;
#pragma unroll 1
  for (int panel = 0; panel < PANELS; ++panel) {
    ring.wait_empty();
    load_box(base + ring.stage * Panel::BYTES, map, ring.expect(Panel::BYTES), panel * 64, row, s.head ? step.head : 0,
             s.batch ? work.batch : 0);
    ring.next();
  }
}

template <Part PART>
__device__ __forceinline__ void produce_k_and_q(const Context<PART>& x) {
  const auto& [p, shared, work, sequence, band, steps] = x;
  load_keys(shared.k(), shared.k_stages().full(0), p.k_map, p.k_strides, work, sequence);
  Ring<Shared<PART>::Q_RING> q_ring(shared.q_stages());
  Ring<SUMS_STAGES> sums_ring(shared.sums_stages());
  for (Step step = steps.first(); steps.has(step); steps.advance(step)) {
    load_rows<Q_PANELS>(q_ring, shared.q(0).base, p.q_map, p.q_strides, work, sequence, step);
    sums_ring.wait_empty();
    load_run(shared.sums(sums_ring.stage), RowSums(p, sequence, step.head, step.block).lse,
             sums_ring.expect(shared.ROW_SUMS), shared.ROW_SUMS);
    sums_ring.next();
  }
}

template <Part PART>
__device__ __forceinline__ void produce_v_and_dout(const Context<PART>& x) {
  const auto& [p, shared, work, sequence, band, steps] = x;
  if constexpr (PART == Part::DK)
    load_keys(shared.v(), shared.v_stages().full(0), p.v_map, p.v_strides, work, sequence);
  Ring<Shared<PART>::DOUT_RING> dout_ring(shared.dout_stages());
  for (Step step = steps.first(); steps.has(step); steps.advance(step))
    load_rows<DOUT_PANELS>(dout_ring, shared.dout(0).base, p.dout_map, p.dout_strides, work, sequence, step);
}

// ---------------------------------------------------------------------------------------------- consumers

template <Part PART>
struct Consumer : Context<PART> {
  using Context<PART>::p, Context<PART>::shared, Context<PART>::work, Context<PART>::sequence, Context<PART>::band,
      Context<PART>::steps;
  static constexpr int Q_RING = Shared<PART>::Q_RING, DOUT_RING = Shared<PART>::DOUT_RING;

  const int number, warp, lane, first_key, key;  // the warp's first key, in the sequence and in the thread block
  Score<float> score;
  Ring<Q_RING> q_ring;
  Ring<DOUT_RING> dout_ring;
  Ring<SUMS_STAGES> sums_ring;

  __device__ __forceinline__ Consumer(const Context<PART>& x, int number_)
      : Context<PART>(x),
        number(number_),
        warp(__shfl_sync(~0u, threadIdx.x / 32 % 4, 0)),
        lane(threadIdx.x % 32),
        first_key(work.block * BLOCK_N + number * KEYS + warp * 16),
        key(number * KEYS + warp * 16),
        score(p),
        q_ring(shared.q_stages()),
        dout_ring(shared.dout_stages()),
        sums_ring(shared.sums_stages()) {}

  // Of this lane's first entry of S^T, and where that row's LSE is; its -delta lies BLOCK_M floats behind.
  __device__ __forceinline__ int row0(const Step& step) const { return step.block * BLOCK_M + lane % 4 * 2; }
  __device__ __forceinline__ int key0() const { return first_key + lane / 4; }
  __device__ __forceinline__ unsigned lse_smem() const { return shared.sums(sums_ring.stage) + lane % 4 * 8; }
  __device__ __forceinline__ unsigned minus_delta_smem() const { return lse_smem() + BLOCK_M * 4; }

  __device__ __forceinline__ bool masked(const Step& step) const {
    return !band.whole(step.block * BLOCK_M, BLOCK_M, work.block * BLOCK_N, work.block * BLOCK_N + BLOCK_N);
  }

  // Rows of the next sequence take part in products with 0, and 0 * NaN is NaN.
  template <class T>
  __device__ __forceinline__ void clear(const T& tile, int end, int barrier, int threads) const {
    if (VARLEN && end < T::ROWS) {
      clear_rows<128>(tile, max(end, 0));
      fence_async_shared();
      named_barrier_sync(barrier, threads);
    }
  }

  // acc = A panel^T summed over a block's panels, which are left in their ring.
  template <int DEPTH, class A, int STAGES>
  __device__ __forceinline__ void start_scores(float (&acc)[N][4], const A& a, Ring<STAGES> ring, unsigned base,
                                               const Step& step) const {
    pin(acc);
#pragma unroll
    for (int k = 0; k < DEPTH / 16; ++k) {
      const Panel panel{base + ring.stage * Panel::BYTES};
      if (k % 4 == 0) {
        ring.wait();
        clear(panel, sequence.seqlen_q - step.block * BLOCK_M, 2 + number, 128);
        wgmma_fence();
      }
      wgmma<0, 0>(acc, a.at(k), WarpgroupOperand<Major::K, Panel>(panel).at(k % 4), k > 0);
      if (k % 4 == 3) ring.next();
    }
    wgmma_commit();
  }

  // gradient += A panels, whose products become a group each.
  template <int COLUMNS, int STAGES>
  __device__ __forceinline__ void start_gradient(float (&gradient)[COLUMNS][4], unsigned (&a)[N / 2][4],
                                                 Ring<STAGES> ring, unsigned base, const Step& step) const {
    pin(a);
    for_panels(gradient, [&](auto, auto& part) {
      const Panel panel{base + ring.stage * Panel::BYTES};
      ring.wait();
      clear(panel, sequence.seqlen_q - step.block * BLOCK_M, 2 + number, 128);
      pin(part);
      wgmma_fence();
      warpgroup_gemm(part, a, WarpgroupOperand<Major::MN, Panel>(panel));
      wgmma_commit();
      ring.next();
    });
  }

  // Release each panel as soon as its product is done.
  template <int COLUMNS, int STAGES>
  __device__ __forceinline__ void finish_gradient(float (&gradient)[COLUMNS][4], unsigned (&a)[N / 2][4],
                                                  Ring<STAGES>& ring) const {
    for_panels(gradient, [&](auto i, auto& part) {
      wgmma_wait<(COLUMNS + 7) / 8 - 1 - decltype(i)::VALUE>();
      pin(part);
      ring.release();
    });
    pin(a);
  }

  // gradient += A panels, without the entries of A that are hidden; A [rows, keys] in shared memory.
  template <int COLUMNS, int STAGES>
  __device__ __forceinline__ void add_visible_gradient(float (&gradient)[COLUMNS][4], Ring<STAGES> ring, unsigned base,
                                                       const Step& step) const {
    for_panels(gradient, [&](auto, auto& part) {
      constexpr int TILES = sizeof(part) / 16;
      const Panel panel{base + ring.stage * Panel::BYTES};
      ring.wait();
      clear(panel, sequence.seqlen_q - step.block * BLOCK_M, 2 + number, 128);
      add_visible<true>(reinterpret_cast<float (&)[1][TILES][4]>(part), shared.s(), key, panel, 0, band,
                        step.block * BLOCK_M, work.block * BLOCK_N);
      ring.next();
    });
    fence_async_shared();  // before other panels come here
  }

  template <int PANELS, int STAGES>
  __device__ __forceinline__ void release(Ring<STAGES>& ring) const {
#pragma unroll
    for (int i = 0; i < PANELS; ++i) ring.release();
  }

  // A gradient to global memory, by way of shared memory that has served.
  template <int WIDTH, class T, int COLUMNS>
  __device__ __forceinline__ void store(const T& tile, const float (&gradient)[COLUMNS][4], const Rows<Element>& target,
                                        float factor) const {
    named_barrier_sync(1, 256);
    store_fragments(tile, key, gradient, {factor, factor});
    __syncwarp();  // a warp stores the rows it wrote
    store_rows<16, WIDTH>(tile, key, target, first_key);
  }
};

// dQ's shares and dK.
struct ConsumerDk : Consumer<Part::DK> {
  using Consumer::Consumer;

  int* ticket = nullptr;  // to be passed, once this warp's last addition is done

  __device__ __forceinline__ void run() {
    const WarpgroupOperand<Major::K, TileK> k(TileK{shared.k().base + number * KEYS * 128});
    const WarpgroupOperand<Major::K, TileV> v(TileV{shared.v().base + number * KEYS * 128});
    const WarpgroupOperand<Major::MN, TileK> k_columns(
        TileK{shared.k().base + number * (Q_COLUMNS / 64) * (BLOCK_N * 128)});
    float dk[DK / 8][4] = {};  // [KEYS, DK]

    shared.k_stages().full(0).wait(0);
    clear(shared.k(), sequence.seqlen_k - work.block * BLOCK_N, 1, 256);
    shared.v_stages().full(0).wait(0);
    clear(shared.v(), sequence.seqlen_k - work.block * BLOCK_N, 1, 256);
    const auto work_on = [&](const Step& step, auto mask) {
      constexpr bool MASKED = decltype(mask)::MASKED;
      float s[1][N][4], ds[1][N][4];  // [KEYS, BLOCK_M]
      unsigned ds_words[N / 2][4];
      start_scores<DK>(s[0], k, q_ring, shared.q(0).base, step);
      start_scores<DV>(ds[0], v, dout_ring, shared.dout(0).base, step);
      score.select(p, band, work.batch, step.head);
      const Dropped<N> dropped(Dropout(p, work.batch, step.head), row0(step), key0());

      float lse[N][2], minus_delta[N][2];
      sums_ring.wait();
      load_row_sums(lse, lse_smem());
      wgmma_wait<1>();
      pin(s[0]);
      // Hidden entries of dS are 0, but K's and Q's may be NaN or inf.
      const bool spoilt = MASKED && any_non_finite(s);
      apply_transposed(s[0], score, row0(step), key0());
      if constexpr (!SOFTCAP) exponentiate_transposed(s[0], score.factor, lse);

      wgmma_wait<0>();
      pin(ds[0]);
      release<DOUT_PANELS>(dout_ring);
      load_row_sums(minus_delta, minus_delta_smem());
      differentiate(ds[0], s[0], lse, minus_delta, dropped, step);
      sums_ring.release_by_each();
      if (MASKED) band.mask_transposed(ds[0], row0(step), key0(), 0.f);
      pack_transposed(ds_words, ds[0]);

      // Both are done with the dS before.
      bool careful = false;
      if (MASKED)
        careful = named_barrier_or(1, 256, spoilt);
      else
        named_barrier_sync(1, 256);
      store_transposed(shared.s(), ds_words, key);
      fence_async_shared();
      named_barrier_sync(1, 256);  // both consumers' dS is here
      if (careful) {
        add_visible_shares(dk, step);
        return;
      }
      QFragments dq;
      pin(dq[0]);
      wgmma_fence();
      warpgroup_gemm<BLOCK_N / 16>(dq[0], WarpgroupOperand<Major::K, TileS>(shared.s()), k_columns, false);
      wgmma_commit();
      start_gradient(dk, ds_words, q_ring, shared.q(0).base, step);
      wgmma_wait<Q_PANELS>();
      pin(dq[0]);
      add(dq, step);
      finish_gradient(dk, ds_words, q_ring);
    };
    for (Step step = steps.first(); steps.has(step); steps.advance(step)) {
      if (masked(step))
        work_on(step, Mask<true>{});
      else
        work_on(step, Mask<false>{});
    }
    pass_ticket();
    store<HEAD_DIM>(shared.dk(), dk, sequence.rows_k(static_cast<Element*>(p.dk), p.dk_strides, work.head_kv),
                    static_cast<float>(p.scale));
  }

  // ds, which is dP, becomes dS = P * (dropout(dP) - delta) * score'(S); s is P, or S where its derivative is wanted:
  // there are no registers for both.
  __device__ __forceinline__ void differentiate(float (&ds)[N][4], float (&s)[N][4], const float (&lse)[N][2],
                                                const float (&minus_delta)[N][2], const Dropped<N>& dropped,
                                                const Step& step) const {
    float derivative[4];
    const float keep_scale = static_cast<float>(p.keep_scale);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if constexpr (SOFTCAP) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          derivative[c] = score.derivative(s[n][c], row0(step) + n * 8 + c % 2, key0() + c / 2 * 8);
          s[n][c] = exp2_fast(fma(s[n][c], score.factor, -lse[n][c % 2]));
        }
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float x = ds[n][c];
        if constexpr (DROPOUT) x = dropped.at(n, c) ? 0 : x * keep_scale;
        ds[n][c] = s[n][c] * (x + minus_delta[n][c % 2]);
        if constexpr (SOFTCAP) ds[n][c] *= derivative[c];
      }
    }
  }

  // The careful path: what a step adds to dQ and dK, without the entries of dS that are hidden.
  __device__ __forceinline__ void add_visible_shares(float (&dk)[DK / 8][4], const Step& step) {
    QFragments dq = {};
    add_visible<false>(dq, shared.s(), warp * 16, shared.k(), number * Q_COLUMNS, band, step.block * BLOCK_M,
                       work.block * BLOCK_N);
    add(dq, step);
    add_visible_gradient(dk, q_ring, shared.q(0).base, step);
    release<Q_PANELS>(q_ring);
  }

  __device__ __forceinline__ void add(const QFragments& dq, const Step& step) {
    const DqAccum dq_accum(p, sequence, step.head, step.block);
    const int part = number * 4 + warp;
    if constexpr (DETERMINISTIC) {
      pass_ticket();
      ticket = p.tickets + dq_accum.block * WARPS + part;
      const int order = band.key_blocks(step.block * BLOCK_M, BLOCK_M, BLOCK_N).end - 1 - work.block;
      // Wrong lengths may share a ticket: never wait for equality.  The whole warp waits, so that it stays together.
      while (__shfl_sync(~0u, load_acquire(ticket), 0) < order) __nanosleep(64);
    }
    dq_accum.add(dq, part);
  }

  // The next block of keys may add its share.
  __device__ __forceinline__ void pass_ticket() const {
    if constexpr (DETERMINISTIC) {
      __threadfence();
      __syncwarp();
      if (lane == 0 && ticket != nullptr) add_release(ticket, 1);
    }
  }
};

struct ConsumerDv : Consumer<Part::DV> {
  using Consumer::Consumer;

  __device__ __forceinline__ void run() {
    const WarpgroupOperand<Major::K, TileK> k(TileK{shared.k().base + number * KEYS * 128});
    float dv[DV / 8][4] = {};  // [KEYS, DV]

    shared.k_stages().full(0).wait(0);
    if (Step step = steps.first(); steps.has(step)) {
      float s[N][4];               // [KEYS, BLOCK_M]
      unsigned p_words[N / 2][4];  // of the step whose share of dV is next
      start_scores<DK>(s, k, q_ring, shared.q(0).base, step);
      wgmma_wait<0>();
      bool careful = finish_scores(s, step);
      pack_transposed(p_words, s);
      Step next = step;
      for (steps.advance(next); steps.has(next); step = next, steps.advance(next)) {
        start_scores<DK>(s, k, q_ring, shared.q(0).base, next);
        start(dv, p_words, careful, step);
        wgmma_wait<DOUT_PANELS>();
        careful = finish_scores(s, next);
        finish_gradient(dv, p_words, dout_ring);
        pack_transposed(p_words, s);
      }
      start(dv, p_words, careful, step);
      finish_gradient(dv, p_words, dout_ring);
    }
    store<HEAD_DIM_V>(shared.dv(), dv, sequence.rows_k(static_cast<Element*>(p.dv), p.dv_strides, work.head_kv),
                      DROPOUT ? static_cast<float>(p.keep_scale) : 1.f);
  }

  // S -> dropout(P).  Returns whether dO has a NaN or inf where some entries of P are hidden: it makes its row's delta
  // one.
  __device__ __forceinline__ bool finish_scores(float (&s)[N][4], const Step& step) {
    pin(s);
    release<Q_PANELS>(q_ring);
    score.select(p, band, work.batch, step.head);
    const Dropped<N> dropped(Dropout(p, work.batch, step.head), row0(step), key0());
    apply_transposed(s, score, row0(step), key0());
    float lse[N][2];
    sums_ring.wait();
    load_row_sums(lse, lse_smem());
    exponentiate_transposed(s, score.factor, lse);
    bool spoilt = false;
    if (masked(step)) {
      band.mask_transposed(s, row0(step), key0(), 0.f);
      float minus_delta[N][2];
      load_row_sums(minus_delta, minus_delta_smem());
#pragma unroll
      for (int n = 0; n < N; ++n) spoilt |= !is_finite(minus_delta[n][0] + minus_delta[n][1]);
      spoilt = __any_sync(~0u, spoilt);  // all warps look at all rows
    }
    sums_ring.release_by_each();
    if constexpr (DROPOUT) {
#pragma unroll
      for (int i = 0; i < 4 * N; ++i)
        if (dropped.at(i / 4, i % 4)) s[i / 4][i % 4] = 0;
    }
    return spoilt;
  }

  __device__ __forceinline__ void start(float (&dv)[DV / 8][4], unsigned (&p_words)[N / 2][4], bool careful,
                                        const Step& step) const {
    if (!careful) {
      start_gradient(dv, p_words, dout_ring, shared.dout(0).base, step);
    } else {
      wgmma_wait<0>();
      __syncwarp();
      store_transposed(shared.s(), p_words, key);
      __syncwarp();  // a warp takes the P that it stored
      add_visible_gradient(dv, dout_ring, shared.dout(0).base, step);
    }
  }
};

template <Part PART, class ConsumerOfPart>
__device__ __forceinline__ void run(const TmaParams& p, const unsigned memory, const Work& work) {
  const Sequence sequence(p, work.batch);
  if (work.block * BLOCK_N >= sequence.seqlen_k) return;
  const Band band(p, sequence);
  const Steps steps(p, work, band);
  const Context<PART> context{p, {memory}, work, sequence, band, steps};
  if (threadIdx.x == 0) context.shared.init();
  __syncthreads();
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the same for a whole warp, as the compiler now knows
  if (warpgroup == 0) {
    release_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) produce_k_and_q(context);
    if (threadIdx.x == 32) produce_v_and_dout(context);
  } else {
    claim_registers<CONSUMER_REGISTERS>();
    ConsumerOfPart(context, warpgroup - 1).run();
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) backward_wide_sm90(const __grid_constant__ TmaParams p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const Work work(p);
  if (work.part == Part::DK)
    run<Part::DK, ConsumerDk>(p, shared_address(memory), work);
  else
    run<Part::DV, ConsumerDv>(p, shared_address(memory), work);
}
