// Where several thread blocks share the keys of a row: what their parts leave in the workspace, for forward_combine.cu.
#pragma once
#include "sequence.cuh"
#include "softmax.cuh"

// The parts of a row lie one after the other, SoftmaxPart and O apart.  Every sequence has room for the longest one.
__device__ __forceinline__ long long first_part(const Params& p, int batch, int head, int row) {
  return ((static_cast<long long>(batch) * p.heads + head) * p.seqlen_q + row) * p.parts;
}
