// Attention backward on Hopper for head dims 129 to 192 of Q and K, to 192 of V, without dropout and softcap.
// backward_delta.cu runs before it, backward_dq.cu after it.
//
//   A thread block owns 96 keys, each of its two consumers (warpgroups) 48 of them: dK and dV of more have no room in
//   registers.  A product is 64 high, so the keys lie along it: below them S and dP have rows, dV^T and dK^T head dims.
//   Other threads bring what the consumers need and take dQ away (key_tiles.cuh).
//
//     for each query head that shares these keys, for each block of rows that sees some of them:
//       start S = Q K^T, dP = dO V^T
//       wait for S;   P = exp(score(S) - LSE), to shared memory
//       start dV^T += dO^T P
//       wait for dP;  dS = P * (dP - delta), to shared memory
//       start dQ = dS K, each consumer a half
//       start dK^T += Q^T dS
//       wait for dQ; leave it in shared memory
//     write dK, dV
#include "key_tiles.cuh"
#include "score.cuh"
#include "transposed.cuh"
#include "visible.cuh"
#include "warpgroup.cuh"

constexpr int KEY_TILES = KEYS / 8;                                      // products of 8 keys along S
constexpr int DK_TILES = TileK::COLS / 64, DV_TILES = TileV::COLS / 64;  // of 64 head dims down dK^T and dV^T
static_assert(!DROPOUT && !SOFTCAP, "there are no registers for what they keep between the products");
static_assert(BLOCK_N == 96 && D == 192 && TileK::COLS == D && SLICES == 2 && DQ_STAGES == 1);
static_assert(StoredK::BYTES <= SLICE * 4 && StoredV::BYTES <= SLICE * 4);

using TileP = Tile<Element, BLOCK_M, 64>;  // P or dS of a consumer's keys: its panel of TileS
using Scores = float[1][KEY_TILES][4];     // [BLOCK_M, KEYS]

__device__ __forceinline__ TileP p_tile(const Shared& shared, int consumer) {
  return {shared.s(0).base + consumer * TileP::BYTES};
}
__device__ __forceinline__ TileP ds_tile(const Shared& shared, int consumer) {
  return {shared.s(1).base + consumer * TileP::BYTES};
}

// dS of both consumers' keys.
struct BothDs {
  TileP first, second;

  __device__ __forceinline__ unsigned address(int row, int byte) const {
    constexpr int FIRST = KEYS * int(sizeof(Element));
    return byte < FIRST ? first.address(row, byte) : second.address(row, byte - FIRST);
  }
};

// A consumer's share of dQ, 96 columns: a panel of 64 of K's, and a half of the one between the two consumers'.
struct DqShare {
  float panel[1][8][4], half[1][4][4];

  static __device__ __forceinline__ int first_of_panel(int number) { return 2 * number * 64; }
  static __device__ __forceinline__ int first_of_half(int number) { return 64 + 32 * number; }

  __device__ __forceinline__ void start(const Shared& shared, int number) {
    pin(panel[0]);
    pin(half[0]);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < CONSUMERS; ++i) {
      const WarpgroupOperand<Major::K, TileP> ds(ds_tile(shared, i));
      const unsigned keys = shared.k().base + i * KEYS * 128;
      const WarpgroupOperand<Major::MN, TileK> k_panel(TileK{keys + first_of_panel(number) / 64 * (BLOCK_N * 128)});
      const WarpgroupOperand<Major::MN, TileK> k_half(TileK{keys + BLOCK_N * 128 + number * 64});
      warpgroup_gemm<KEYS / 16>(panel[0], ds, k_panel, i > 0);
      warpgroup_gemm<KEYS / 16>(half[0], ds, k_half, i > 0);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void add_visible_keys(const Shared& shared, int number, const Band& band, int first_row,
                                                   int first_key) {
    const BothDs ds{ds_tile(shared, 0), ds_tile(shared, 1)};
    const int row = threadIdx.x / 32 % 4 * 16;
#pragma unroll
    for (int i = 0; i < 32; ++i) panel[0][i / 4][i % 4] = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) half[0][i / 4][i % 4] = 0;
    add_visible<false>(panel, ds, row, shared.k(), first_of_panel(number), band, first_row, first_key);
    add_visible<false>(half, ds, row, shared.k(), first_of_half(number), band, first_row, first_key);
  }

  __device__ __forceinline__ void hand_over(const Shared& shared, int number, const Ring<DQ_STAGES>& ring) {
    const int first = number * (D / 2);
    ring.wait_empty();
    put_dq(panel[0], shared.dq(number, ring.stage), (first_of_panel(number) - first) / 8);
    put_dq(half[0], shared.dq(number, ring.stage), (first_of_half(number) - first) / 8);
    say_full(ring);
  }
};

// dV^T += dO^T P, or dK^T += Q^T dS: [head dims, KEYS].
template <int TILES, class T>
__device__ __forceinline__ void start_gradient(float (&gradient)[TILES][KEY_TILES][4], const T& below, const TileP& p) {
#pragma unroll
  for (int i = 0; i < TILES; ++i) pin(gradient[i]);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < TILES; ++i)
    warpgroup_gemm<BLOCK_M / 16>(gradient[i], WarpgroupOperand<Major::MN, T>(T{below.base + i * BLOCK_M * 128}),
                                 WarpgroupOperand<Major::MN, TileP>(p), true);
  wgmma_commit();
}
template <int TILES>
__device__ __forceinline__ void finished(float (&gradient)[TILES][KEY_TILES][4]) {
#pragma unroll
  for (int i = 0; i < TILES; ++i) pin(gradient[i]);
}

// A gradient of KEYS keys from `first` on to global memory, through a tile in shared memory.
template <int WIDTH, class T, int TILES>
__device__ __forceinline__ void store_transposed_gradient(const T& tile, const float (&gradient)[TILES][KEY_TILES][4],
                                                          const Rows<Element>& target, int first, float factor,
                                                          int barrier) {
  const int warp = threadIdx.x / 32 % 4;
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
    float x[KEY_TILES][4];
    unsigned words[KEY_TILES / 2][4];
#pragma unroll
    for (int j = 0; j < 4 * KEY_TILES; ++j) x[j / 4][j % 4] = gradient[i][j / 4][j % 4] * factor;
    pack_transposed(words, x);
    store_transposed(tile, words, i * 64 + warp * 16);
  }
  named_barrier_sync(barrier, 128);
  store_rows<KEYS / 4, WIDTH>(tile, warp * (KEYS / 4), target, first + warp * (KEYS / 4));
  named_barrier_sync(barrier, 128);
}

__device__ __forceinline__ void consume(const TmaParams& p, const Shared shared, const int number) {
  const int own_barrier = 2 + number;  // 1 is both consumers'
  const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0), lane = threadIdx.x % 32;
  Score<float> score(p);

  const WarpgroupOperand<Major::K, TileK> k(TileK{shared.k().base + number * KEYS * 128});
  const WarpgroupOperand<Major::K, TileV> v(TileV{shared.v().base + number * KEYS * 128});
  const TileP p_smem = p_tile(shared, number), ds_smem = ds_tile(shared, number);

  Ring<STAGES> q_ring(shared.q_stages());
  Ring<DOUT_STAGES> dout_ring(shared.dout_stages());
  Ring<DQ_STAGES> dq_ring(shared.dq_stages(number));

  for (unsigned phase = 0;; phase ^= 1) {
    const Work work = hear(p, shared.work(), shared.work_stages(), phase);
    if (!work.valid()) break;
    const Sequence& sequence = work.sequence;
    const Band band(p, sequence);
    const RowBlocks blocks(band, work.first);
    const Band::Blocks whole = band.whole_row_blocks(work.first, BLOCK_N, BLOCK_M);
    const int first_key = work.first + number * KEYS, key0 = first_key + lane % 4 * 2;
    float dk[DK_TILES][KEY_TILES][4] = {}, dv[DV_TILES][KEY_TILES][4] = {};

    shared.kv_stages().full(0).wait(phase);
    clear_from(shared.k(), sequence.seqlen_k - work.first, 1, 256);
    clear_from(shared.v(), sequence.seqlen_k - work.first, 1, 256);
    int keys_spoilt = -1;  // whether they have NaN or inf; not known yet
    for (int head = work.head * p.group; head < (work.head + 1) * p.group; ++head) {
      score.select(p, band, sequence.batch, head);
      int block = blocks.start;
      for (int i = 0; i < blocks.count(); ++i, block = blocks.after(block)) {
        const int first_row = block * BLOCK_M, row0 = first_row + warp * 16 + lane / 4;
        const auto work_on = [&](auto mask) {
          constexpr bool MASKED = decltype(mask)::MASKED;
          const TileQ q_smem = shared.q(q_ring.stage);
          const TileO dout_smem = shared.dout(dout_ring.stage);
          Scores s, dp;
          float lse[2], minus_delta[2];

          const auto start_s = [&] {
            const unsigned sums = shared.sums(q_ring.stage) + (warp * 16 + lane / 4) * 4;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              load_shared(lse[half], sums + half * 32);
              load_shared(minus_delta[half], sums + half * 32 + BLOCK_M * 4);
            }
            pin(s[0]);
            wgmma_fence();
            warpgroup_gemm<DK / 16>(s[0], WarpgroupOperand<Major::K, TileQ>(q_smem), k, false);
            wgmma_commit();
          };
          const auto start_dp = [&] {
            pin(dp[0]);
            wgmma_fence();
            warpgroup_gemm<DV / 16>(dp[0], WarpgroupOperand<Major::K, TileO>(dout_smem), v, false);
            wgmma_commit();
          };
          const auto exponentiate = [&] {  // S -> P
            pin(s[0]);
            score.apply(s, row0, key0);
#pragma unroll
            for (int e = 0; e < 4 * KEY_TILES; ++e) {
              float& x = s[0][e / 4][e % 4];
              x = exp2_fast(fma(x, score.factor, -lse[e % 4 / 2]));
            }
            if (MASKED) band.mask(s, row0, key0, 0.f);  // not before: LSE may be NaN
          };
          const auto differentiate = [&] {  // dP -> dS
            pin(dp[0]);
#pragma unroll
            for (int e = 0; e < 4 * KEY_TILES; ++e) {
              float& x = dp[0][e / 4][e % 4];
              x = s[0][e / 4][e % 4] * (x + minus_delta[e % 4 / 2]);
            }
            if (MASKED) band.mask(dp, row0, key0, 0.f);
          };
          const auto spoilt = [&] {
            if (keys_spoilt < 0) keys_spoilt = any_non_finite<256>(shared.k()) || any_non_finite<256>(shared.v());
            return named_barrier_or(1, 256,
                                    keys_spoilt || any_non_finite<256>(q_smem) || any_non_finite<256>(dout_smem));
          };

          DqShare dq;
          q_ring.wait();
          clear_from(q_smem, sequence.seqlen_q - first_row, own_barrier, 128);
          if (MASKED) {  // look at it all first
            dout_ring.wait();
            clear_from(dout_smem, sequence.seqlen_q - first_row, own_barrier, 128);
          }
          if (!MASKED || !spoilt()) {
            start_s();
            dout_ring.wait();
            if (!MASKED) clear_from(dout_smem, sequence.seqlen_q - first_row, own_barrier, 128);
            start_dp();
            wgmma_wait<1>();
            exponentiate();
            named_barrier_sync(1, 256);  // both consumers are done with the last P and dS
            store_fragments(p_smem, warp * 16, s[0]);
            fence_async_shared();
            named_barrier_sync(own_barrier, 128);
            start_gradient(dv, dout_smem, p_smem);
            wgmma_wait<1>();
            differentiate();
            store_fragments(ds_smem, warp * 16, dp[0]);
            fence_async_shared();
            named_barrier_sync(1, 256);  // both consumers' dS is here
            dq.start(shared, number);
            start_gradient(dk, q_smem, ds_smem);
            wgmma_wait<2>();
            finished(dv);
            dout_ring.release();
            wgmma_wait<1>();
            pin(dq.panel[0]);
            pin(dq.half[0]);
            dq.hand_over(shared, number, dq_ring);
            wgmma_wait<0>();
            finished(dk);
          } else {
            start_s();
            start_dp();
            wgmma_wait<0>();
            exponentiate();
            differentiate();
            named_barrier_sync(1, 256);
            store_fragments(p_smem, warp * 16, s[0]);
            store_fragments(ds_smem, warp * 16, dp[0]);
            named_barrier_sync(1, 256);
            dq.add_visible_keys(shared, number, band, first_row, work.first);
            add_visible_to_transposed(dv, p_smem, dout_smem, warp * 16, band, first_row, first_key);
            add_visible_to_transposed(dk, ds_smem, q_smem, warp * 16, band, first_row, first_key);
            named_barrier_sync(1, 256);
            dout_ring.release();
            dq.hand_over(shared, number, dq_ring);
          }
        };
        if (whole.has(block))  // instructions of its own, without those for masks in their midst
          work_on(Mask<false>{});
        else
          work_on(Mask<true>{});
        q_ring.release_by_each();
        dq_ring.next();
      }
    }
    shared.kv_stages().release(0);

    // The place of dQ's share takes dV, then dK.
    dq_ring.wait_empty();
    const unsigned place = shared.dq(number, 0);
    store_transposed_gradient<HEAD_DIM_V>(StoredV{place}, dv,
                                          sequence.rows_k(static_cast<Element*>(p.dv), p.dv_strides, work.head),
                                          first_key, 1.f, own_barrier);
    store_transposed_gradient<HEAD_DIM>(StoredK{place}, dk,
                                        sequence.rows_k(static_cast<Element*>(p.dk), p.dk_strides, work.head),
                                        first_key, static_cast<float>(p.scale), own_barrier);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) backward_192_sm90(const __grid_constant__ TmaParams p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  run(p, Shared{shared_address(memory)}, consume);
}
