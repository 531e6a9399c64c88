// Attention forward on tensor cores of sm_80 and later (mma.sync, cp.async): FlashAttention-2, algorithm 1.
//
//   for each block of BLOCK_M rows of Q (one thread block; a warp owns WARP_ROWS of them):
//     m = -inf, l = 0, O = 0
//     for each block of BLOCK_N keys that some row sees, the last one first:
//       S = Q K^T                      raw scores, in registers
//       S = score(S), masked           score.cuh, band.cuh
//       m' = max(m, rowmax(S)), P = exp(S - m')       softmax.cuh; for wide elements m may lag behind
//       l = exp(m - m') l + rowsum(P), O = exp(m - m') O
//       O = O + dropout(P) V           P stays in registers
//     write O / l and LSE = m + log(l)
//
// Where few rows see many keys, several thread blocks share them (PARTED): each writes O, not yet divided, and l of its
// part, and forward_combine.cu adds them up.
//
// K and V have one buffer each: while S is computed V arrives, while O is computed the next K does.  Where the
// registers of one warp can't hold the rows of O, V_PARTS warps share them: each computes the same S, and O for its
// part of the columns.
#include "band.cuh"
#include "dropout.cuh"
#include "forward_row.cuh"
#include "gemm.cuh"
#include "parts.cuh"
#include "score.cuh"

using Accum = Traits<Element>::Accum;

constexpr int THREADS = 32 * WARPS;
constexpr int ROW_WARPS = WARPS / V_PARTS, WARP_ROWS = BLOCK_M / ROW_WARPS;
constexpr int D = (HEAD_DIM + 15) / 16 * 16, DV = (HEAD_DIM_V + 16 * V_PARTS - 1) / (16 * V_PARTS) * (16 * V_PARTS);
constexpr int K_STEP = Traits<Element>::K_STEP, STEPS = sizeof(Element) == 8 ? 2 : 1;
constexpr int M = WARP_ROWS / 16, N = BLOCK_N / 8, N_OUT = DV / V_PARTS / 8;
static_assert(WARPS % V_PARTS == 0 && WARP_ROWS % 16 == 0 && BLOCK_N % 16 == 0);

using TileQ = Tile<Element, BLOCK_M, D>;
using TileK = Tile<Element, BLOCK_N, D>;
using TileV = Tile<Element, BLOCK_N, DV>;
using TileO = Tile<Element, BLOCK_M, DV>;  // takes the place of all the others
static_assert(SHARED_BYTES >= TileQ::BYTES + TileK::BYTES + TileV::BYTES && SHARED_BYTES >= TileO::BYTES);

// A thread block's work.  Later rows see more keys under a causal mask: they go first, so that the last blocks to run
// are short.
struct Work {
  int block_m, head, batch, share;

  __device__ __forceinline__ Work(const Params& p, unsigned block) {
    const unsigned index = PARTED ? block / p.parts : block;
    share = PARTED ? block % p.parts : 0;
    block_m = p.row_blocks - 1 - index % p.row_blocks;
    head = index / p.row_blocks % p.heads, batch = index / p.row_blocks / p.heads;
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) forward_sm80(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const unsigned smem = shared_address(shared);
  const TileQ q_smem{smem};
  const TileK k_smem{smem + TileQ::BYTES};
  const TileV v_smem{smem + TileQ::BYTES + TileK::BYTES};
  const int warp = threadIdx.x / 32 % ROW_WARPS, part = threadIdx.x / 32 / ROW_WARPS, lane = threadIdx.x % 32;

  const Work work(p, blockIdx.x);
  const int head = work.head, batch = work.batch, first_row = work.block_m * BLOCK_M;
  const Sequence sequence(p, batch);
  if (first_row >= sequence.seqlen_q) return;

  const Band band(p, sequence);
  Score<Accum> score(p);
  score.select(p, band, batch, head);
  const Dropout dropout(p, batch, head);
  const auto q = sequence.rows_q(static_cast<const Element*>(p.q), p.q_strides, head);
  const int head_kv = head / p.group;
  const auto rows_k = [&](const void* pointer, const Strides& strides) {
    const Sequence here = VARLEN ? sequence : Sequence(p, recompute(batch));
    return here.rows_k(static_cast<const Element*>(pointer), strides, recompute(head_kv));
  };
  const auto load_k = [&](int first) {
    load_tile<COPY_BYTES, HEAD_DIM, THREADS>(k_smem, rows_k(p.k, p.k_strides), first);
    copy_async_commit();
  };
  const auto load_v = [&](int first) {
    load_tile<COPY_BYTES, HEAD_DIM_V, THREADS>(v_smem, rows_k(p.v, p.v_strides), first);
    copy_async_commit();
  };

  const int last_row = min(first_row + BLOCK_M, sequence.seqlen_q) - 1;
  const Band::Blocks seen = band.key_blocks(first_row, BLOCK_M, BLOCK_N);
  const Band::Blocks blocks = PARTED ? seen.part(work.share, p.parts) : seen;
  const int row0 = first_row + warp * WARP_ROWS + lane / 4;  // of this lane's first accumulator

  typename SoftmaxOf<Element, M>::Type softmax;
  Accum o[M][N_OUT][4] = {};  // [WARP_ROWS, DV / V_PARTS]

  const SharedOperand<Side::A, Major::K, WARP_ROWS, TileQ> q_operand(q_smem, warp * WARP_ROWS);
  const SharedOperand<Side::B, Major::K, BLOCK_N, TileK> k_operand(k_smem, 0);
  const SharedOperand<Side::B, Major::MN, DV / V_PARTS, TileV, true> v_operand(v_smem, part * (DV / V_PARTS));

  if (blocks.begin < blocks.end) {
    load_tile<COPY_BYTES, HEAD_DIM, THREADS>(q_smem, q, first_row);
    load_k((blocks.end - 1) * BLOCK_N);
  }
  for (int block = blocks.end - 1; block >= blocks.begin; --block) {
    const int first_key = block * BLOCK_N;
    copy_async_wait<0>();
    __syncthreads();  // K is here, and everyone is done with the previous V

    Accum s[M][N][4] = {};  // [WARP_ROWS, BLOCK_N]
    gemm<Element, D / K_STEP, STEPS>(s, q_operand, k_operand, [&] { load_v(first_key); });

    copy_async_wait<0>();
    __syncthreads();  // V is here, and everyone is done with K
    if (block > blocks.begin) load_k(first_key - BLOCK_N);

    const int key0 = first_key + recompute(lane) % 4 * 2;
    score.apply(s, row0, key0);
    const int first = PARTED ? recompute(first_row) : first_row;  // PARTED is short of a few registers
    const int last = PARTED ? first + BLOCK_M - 1 : last_row;
    if (!band.all_see(first, last, first_key, first_key + BLOCK_N)) band.mask(s, row0, key0);

    softmax.update(s, o, score.factor);

    if constexpr (DROPOUT) {
#pragma unroll
      for (int i = 0; i < M * N; ++i) {  // two rows, two keys each
        const int m = i / N, n = i % N / 2 * 2, odd = i % 2;
        bool keep[4];
        dropout.keep(keep, row0 + 16 * m, key0 + 8 * n + odd);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (!keep[j]) s[m][n + j % 2][j / 2 * 2 + odd] = 0;
      }
    }

    const RegisterOperand<Element, M, N> p_operand{s};
    gemm<Element, BLOCK_N / K_STEP, STEPS>(o, p_operand, v_operand);
  }

  if constexpr (PARTED) {
    static_assert(PART_COLUMNS == DV);
    // All of it anew: the loop has no registers to keep it in.
    const int thread = recompute(threadIdx.x), lane = thread % 32, part = thread / 32 / ROW_WARPS;
    const Work work(p, recompute(blockIdx.x));
    const int row0 = work.block_m * BLOCK_M + thread / 32 % ROW_WARPS * WARP_ROWS + lane / 4;
    const int seqlen_q = Sequence(p, work.batch).seqlen_q;
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) {
      const int m = i / 2, half = i % 2, row = row0 + 16 * m + 8 * half;
      const Accum l = softmax.total(m, half);
      if (row >= seqlen_q) continue;
      const long long to = first_part(p, work.batch, work.head, row) + work.share;
      if (lane % 4 == 0 && part == 0)
        static_cast<SoftmaxPart<Accum>*>(p.softmax_parts)[to] = softmax.part(m, half, l, score.factor);
      Accum* const o_part = static_cast<Accum*>(p.o_parts) + to * DV + part * (DV / V_PARTS) + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < 2 * N_OUT; ++n) o_part[n / 2 * 8 + n % 2] = o[m][n / 2][2 * half + n % 2];
    }
    return;
  }

  // A NaN or inf in the V of a key that only some rows see has spoilt its column in all of them: any row tells.
  Accum zero = 0;
  const Band::Blocks all = band.key_blocks(recompute(first_row), BLOCK_M, BLOCK_N);
  if (!band.all_see(first_row, last_row, all.begin * BLOCK_N, min(all.end * BLOCK_N, sequence.seqlen_k))) {
#pragma unroll
    for (int i = 0; i < 2 * N_OUT; ++i) zero += o[0][i / 2][i % 2] * 0;
  }
  const bool spoilt = __syncthreads_or(zero != 0);  // and shared memory is free for O
  const TileO o_smem{smem};
  Accum* const lse = static_cast<Accum*>(p.lse) + sequence.lse_offset(p, head);
#pragma unroll
  for (int i = 0; i < 2 * M; ++i) {
    const int m = i / 2, half = i % 2, row = row0 + 16 * m + 8 * half;
    const Accum l = softmax.total(m, half);
    const Accum inverse = l == 0 ? 0 : static_cast<Accum>(p.keep_scale) / l;  // l is NaN if the row's scores are
    if (p.lse != nullptr && lane % 4 == 0 && part == 0 && row < sequence.seqlen_q)
      lse[row * p.lse_row] =
          l == 0 ? minus_infinity<Accum>() : softmax.lse2(m, half, l, score.factor) * static_cast<Accum>(LN2);
#pragma unroll
    for (int n = 0; n < N_OUT; ++n)
      o_smem.store_pair(row - first_row, part * (DV / V_PARTS) + lane % 4 * 2 + 8 * n, o[m][n][2 * half] * inverse,
                        o[m][n][2 * half + 1] * inverse);
  }
  if constexpr (V_PARTS == 1)
    __syncwarp();  // a warp stores the rows it wrote
  else
    __syncthreads();
  const auto out = sequence.rows_q(static_cast<Element*>(p.out), p.out_strides, head);
  constexpr int STORE_ROWS = BLOCK_M / WARPS;
  const int store_row = threadIdx.x / 32 * STORE_ROWS;
  store_rows<STORE_ROWS, HEAD_DIM_V>(o_smem, store_row, out, first_row + store_row);
  if (spoilt) {
    __syncwarp();
    for (int row = first_row + store_row; row <= min(first_row + store_row + STORE_ROWS - 1, last_row); ++row)
      forward_row(p, batch, head, row);
  }
}
