// A ring of shared-memory stages between a producer, which fills them, and consumers, which empty them.
#pragma once
#include "ptx/barrier.cuh"

template <int COUNT>
struct Stages {
  unsigned base;  // 16 bytes a stage

  __device__ __forceinline__ Barrier full(int stage) const { return {base + 16 * stage}; }
  __device__ __forceinline__ Barrier empty(int stage) const { return {base + 16 * stage + 8}; }
  __device__ __forceinline__ void init(int consumers, int producers = 1) const {  // how many arrivals of each
    for (int stage = 0; stage < COUNT; ++stage) full(stage).init(producers), empty(stage).init(consumers);
  }
  __device__ __forceinline__ void release(int stage) const {  // by all threads of a consumer's warp
    __syncwarp();
    if (threadIdx.x % 32 == 0) empty(stage).arrive();
  }
  // Where threads have read the stage themselves, each says so for itself: compute-sanitizer's racecheck does not see
  // that a warp's lanes have read before one of them says so for all.
  __device__ __forceinline__ void release_by_each(int stage) const { empty(stage).arrive(); }
};

// One side's place in the ring.
template <int COUNT>
struct Ring {
  Stages<COUNT> stages;
  int stage = 0;
  unsigned phase = 0;  // which round over the stages, modulo 2

  __device__ __forceinline__ explicit Ring(Stages<COUNT> s) : stages(s) {}

  __device__ __forceinline__ void next() {
    if (++stage == COUNT) stage = 0, phase ^= 1;
  }

  // The producer's: wait until the stage is empty; then say that `bytes` are to come, to the barrier that counts them.
  __device__ __forceinline__ void wait_empty() const { stages.empty(stage).wait_asleep(phase ^ 1); }
  __device__ __forceinline__ Barrier expect(int bytes) const {
    const Barrier full = stages.full(stage);
    full.arrive_and_expect(bytes);
    return full;
  }

  // The consumers'.
  __device__ __forceinline__ void wait() const { stages.full(stage).wait(phase); }
  __device__ __forceinline__ void release() {
    stages.release(stage);
    next();
  }
  __device__ __forceinline__ void release_by_each() {
    stages.release_by_each(stage);
    next();
  }
};
