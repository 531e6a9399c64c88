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

// A run of bytes (16-byte aligned, a multiple of 16 long) into shared memory, counted like a box.  PTX ISA,
// cp.async.bulk.
__device__ __forceinline__ void load_run(unsigned destination, const void* source, Barrier full, int bytes) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(destination),
      "l"(source), "r"(bytes), "r"(full.address)
      : "memory");
}

// Adds a run of floats in shared memory to one in global memory.  PTX ISA, cp.reduce.async.bulk.
__device__ __forceinline__ void add_run(float* destination, unsigned source, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(destination),
               "r"(source), "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Or sets it.  PTX ISA, cp.async.bulk.
__device__ __forceinline__ void store_run(float* destination, unsigned source, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(destination), "r"(source), "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until this thread's additions have read shared memory; until they are done.
__device__ __forceinline__ void wait_runs_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void wait_runs() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
