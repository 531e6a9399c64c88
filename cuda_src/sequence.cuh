// Where the rows of one sequence lie: dense batches (a batch stride) or packed ones (varlen: cumulative lengths).
#pragma once
#include "params.cuh"
#include "tile.cuh"

struct Sequence {
  int batch;
  long long start_q, start_k;  // first row within its batch entry: 0 unless packed
  int seqlen_q, seqlen_k;

  Sequence() = default;
  __device__ __forceinline__ Sequence(int batch_, int first_q, int first_k, int count_q, int count_k)
      : batch(batch_), start_q(first_q), start_k(first_k), seqlen_q(count_q), seqlen_k(count_k) {}
  __device__ __forceinline__ Sequence(const Params& p, int batch_) : batch(batch_) {
    if constexpr (VARLEN) {
      // Lengths come from the device and can't be checked before the launch; clamped, they can't lead outside the
      // arrays.
      const int q0 = clamp(p.cu_seqlens_q[batch], 0, p.total_q), k0 = clamp(p.cu_seqlens_k[batch], 0, p.total_k);
      start_q = q0, start_k = k0;
      seqlen_q = min(clamp(p.cu_seqlens_q[batch + 1], q0, p.total_q) - q0, p.seqlen_q);
      seqlen_k = min(clamp(p.cu_seqlens_k[batch + 1], k0, p.total_k) - k0, p.seqlen_k);
    } else {
      start_q = start_k = 0;
      seqlen_q = p.seqlen_q, seqlen_k = p.seqlen_k;
    }
  }

  template <class E>
  __device__ __forceinline__ Rows<E> rows_q(E* pointer, const Strides& s, int head) const {
    return {pointer + batch * s.batch + head * s.head + start_q * s.row, s.row, s.column, seqlen_q};
  }
  template <class E>
  __device__ __forceinline__ Rows<E> rows_k(E* pointer, const Strides& s, int head) const {
    return {pointer + batch * s.batch + head * s.head + start_k * s.row, s.row, s.column, seqlen_k};
  }

  // Index of this sequence's first entry in a per-row array of a head (lse: rows are lse_row apart).
  __device__ __forceinline__ long long lse_offset(const Params& p, int head) const {
    return batch * p.lse_batch + head * p.lse_head + start_q * p.lse_row;
  }

  // Rows of the workspace are dense and in this order.
  __device__ __forceinline__ long long workspace_row(const Params& p, int head) const {
    return VARLEN ? static_cast<long long>(head) * p.total_q + start_q
                  : (static_cast<long long>(batch) * p.heads + head) * p.seqlen_q;
  }

 private:
  static __device__ __forceinline__ int clamp(int x, int low, int high) { return min(max(x, low), high); }
};
