// The tensor memory accelerator: boxes of a tensor in global memory to and from shared memory.
#pragma once
#include "params.cuh"
#include "ptx/barrier.cuh"

// The box at these coordinates (innermost first) into shared memory; what lies outside the tensor arrives as zeros. Its
// bytes count towards the barrier's phase.  PTX ISA, cp.async.bulk.tensor.
__device__ __forceinline__ void load_box(unsigned destination, const TensorMap& map, Barrier full, int column, int row,
                                         int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(destination),
      "l"(&map), "r"(full.address), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}
