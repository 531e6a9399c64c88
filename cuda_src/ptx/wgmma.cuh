// Tensor-core products of one warpgroup (four warps): D (64xN) += A (64x16) B (16xN), asynchronous.  PTX ISA,
// "Asynchronous Warpgroup Level Matrix Multiply-Accumulate".
//
// Warp w of the four holds rows 16 w to 16 w + 15 of D in the fragment layout of mma.cuh: d[n] is the 16x8 tile at
// column 8 n.  A comes from registers (again mma.cuh's fragment) or from shared memory, B from shared memory.
//
// The instructions themselves, wgmma(d, a, b, accumulate), stand in the generated prelude (anyattn/wgmma.py): inline
// assembly cannot list a number of registers that is a template parameter.
#pragma once

// Around a batch of products: fence before the first (registers that they read or write are ready), commit after the
// last.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving its own accesses to these registers across the point.
template <int N>
__device__ __forceinline__ void pin(float (&d)[N][4]) {
#pragma unroll
  for (int i = 0; i < 4 * N; ++i) asm volatile("" : "+f"(d[i / 4][i % 4])::"memory");
}
template <int N>
__device__ __forceinline__ void pin(unsigned (&w)[N][4]) {
#pragma unroll
  for (int i = 0; i < 4 * N; ++i) asm volatile("" : "+r"(w[i / 4][i % 4])::"memory");
}

// The compiler moves a wait up as far as it can within a basic block.  Here one ends, behind all that `sums` are made
// of (they are never -1, but the compiler does not know).
__device__ __forceinline__ void keep_before(const float (&sums)[2]) {
  asm volatile("{.reg .pred never; setp.eq.f32 never, %0, 0fbf800000; @never exit;}" ::"f"(sums[0] + sums[1])
               : "memory");
}
