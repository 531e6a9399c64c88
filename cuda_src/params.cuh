// All that a kernel is told at run time, by value.  anyattn/launch.py holds the same layout; the generated prelude
// asserts it.
#pragma once

struct Strides {  // in elements
  long long batch, head, row, column;
};

struct Params {
  const void *q, *k, *v, *dout;
  void *out, *lse, *dq, *dk, *dv;
  void *dq_accum, *delta;  // workspace of the backward pass; delta may lie in dq
  int* tickets;            // counters: of tiles taken (null: by turns), of additions to each block of rows (backward)
  void *o_parts, *softmax_parts;  // workspace of the forward pass, where several thread blocks share the keys of a row
  const float* alibi_slopes;
  const int *cu_seqlens_q, *cu_seqlens_k;  // varlen only
  unsigned long long seed;
  Strides q_strides, k_strides, v_strides, out_strides, dout_strides, dq_strides, dk_strides, dv_strides;
  long long lse_batch, lse_head, lse_row;  // strides of lse
  long long alibi_batch, alibi_head;
  double scale, softcap, keep_scale;       // keep_scale = 1 / (1 - dropout)
  unsigned drop_below;                     // an entry is dropped if its 32 random bits are less
  int batch, heads, heads_kv, group;       // group = query heads for each head of K and V
  int seqlen_q, seqlen_k;                  // varlen: the longest
  int shift;                               // of rows against keys, where the call is a part of a larger one
  int first_batch, first_head, first_row;  // which ones of the larger call it begins with: for dropout
  int total_q, total_k;                    // varlen: rows in all
  int left, right;                         // the window
  int row_blocks, key_blocks;              // blocks of rows and of keys for each head
  int section;                             // heads whose tiles are worked on together
  int parts;                               // thread blocks that share the keys of a row
};

struct alignas(64) TensorMap {  // a CUtensorMap, from anyattn/tensormap.py
  unsigned long long opaque[16];
};

// Behind them, for kernels that load through the tensor memory accelerator, the arrays in boxes of such a kernel's
// size.
struct TmaParams : Params {
  TensorMap q_map, k_map, v_map, dout_map;
};
