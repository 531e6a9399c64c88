// Synchronisation inside a thread block: mbarriers, named barriers, the async proxy, register budgets.
#pragma once

// PTX ISA, "mbarrier".  A phase ends when `count` arrivals and all announced bytes have come; waiting for parity 0 is
// waiting for the end of the first phase.
struct Barrier {
  unsigned address;

  __device__ __forceinline__ void init(int count) const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(count) : "memory");
  }
  __device__ __forceinline__ void arrive() const {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address) : "memory");
  }
  __device__ __forceinline__ void arrive_and_expect(int bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
  }
  __device__ __forceinline__ void wait(unsigned parity) const {  // asks again every few cycles
    asm volatile(
        "{.reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;}" ::"r"(address),
        "r"(parity)
        : "memory");
  }
  __device__ __forceinline__ void wait_asleep(unsigned parity) const {  // leaves the time to other warps
    constexpr unsigned NANOSECONDS = 10'000'000;                        // at most; it wakes when the phase ends
    asm volatile(
        "{.reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, %2;\n"
        "@!done bra again;}" ::"r"(address),
        "r"(parity), "r"(NANOSECONDS)
        : "memory");
  }
};

// Makes initialised barriers visible to the async proxy.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Orders this thread's accesses to shared memory before later ones of TMA and wgmma.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The same for global memory.
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Threads that meet at a numbered barrier (0 is __syncthreads's).
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Without waiting for the others.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// And learn whether the predicate holds for any of them.
__device__ __forceinline__ bool named_barrier_or(int id, int threads, bool predicate) {
  int any;
  asm volatile(
      "{.reg .pred mine, all; setp.ne.s32 mine, %3, 0; bar.red.or.pred all, %1, %2, mine; selp.s32 %0, 1, 0, all;}"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(int(predicate))
      : "memory");
  return __shfl_sync(~0u, any, 0);
}

// How many registers each thread of this warpgroup has from here on.  PTX ISA, setmaxnreg.
template <int COUNT>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
