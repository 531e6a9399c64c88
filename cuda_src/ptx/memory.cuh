// Moving data: shared-memory matrices, asynchronous copies, reductions in global memory.
#pragma once

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Four 8x8 matrices of 16-bit elements; lane 8i + r gives the address of row r of matrix i.  PTX ISA, ldmatrix.
__device__ __forceinline__ void load_matrices(unsigned (&w)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
               : "r"(address));
}

__device__ __forceinline__ void load_matrices_transposed(unsigned (&w)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
               : "r"(address));
}

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void store_matrices(unsigned address, const unsigned (&w)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(w[0]), "r"(w[1]),
               "r"(w[2]), "r"(w[3])
               : "memory");
}
__device__ __forceinline__ void store_matrices_transposed(unsigned address, const unsigned (&w)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(w[0]),
               "r"(w[1]), "r"(w[2]), "r"(w[3])
               : "memory");
}
#endif

__device__ __forceinline__ int4 load_shared(unsigned address) {
  int4 x;
  asm volatile("ld.shared.v4.s32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}
__device__ __forceinline__ void store_shared(unsigned address, int4 x) {
  asm volatile("st.shared.v4.s32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}
__device__ __forceinline__ void load_shared(unsigned short& x, unsigned address) {
  asm volatile("ld.shared.b16 %0, [%1];" : "=h"(x) : "r"(address));
}
__device__ __forceinline__ void store_shared(unsigned address, const float (&x)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(address), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
               : "memory");
}
__device__ __forceinline__ void load_shared(float& x, unsigned address) {
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address));
}
__device__ __forceinline__ void load_shared(double& x, unsigned address) {
  asm volatile("ld.shared.f64 %0, [%1];" : "=d"(x) : "r"(address));
}
__device__ __forceinline__ void load_shared_pair(float& x, float& y, unsigned address) {
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(x), "=f"(y) : "r"(address));
}
__device__ __forceinline__ void load_shared_pair(double& x, double& y, unsigned address) {
  asm volatile("ld.shared.v2.f64 {%0,%1}, [%2];" : "=d"(x), "=d"(y) : "r"(address));
}

__device__ __forceinline__ void store_shared(unsigned address, unsigned word) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}
__device__ __forceinline__ void store_shared(unsigned address, unsigned short element) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(element) : "memory");
}
__device__ __forceinline__ void store_shared_pair(unsigned address, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}
__device__ __forceinline__ void store_shared_pair(unsigned address, double x, double y) {
  asm volatile("st.shared.v2.f64 [%0], {%1,%2};" ::"r"(address), "d"(x), "d"(y) : "memory");
}

// BYTES (4, 8 or 16) from global to shared memory; zeros, and no access to global memory, unless `inside`.
template <int BYTES>
__device__ __forceinline__ void copy_async(unsigned destination, const void* source, bool inside) {
  if constexpr (BYTES == 16)
    asm volatile(
        "{.reg .pred outside; setp.eq.s32 outside, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, outside;}" ::"r"(
            destination),
        "l"(source), "r"(int(inside))
        : "memory");
  else
    asm volatile(
        "{.reg .pred outside; setp.eq.s32 outside, %2, 0; cp.async.ca.shared.global [%0], [%1], %3, outside;}" ::"r"(
            destination),
        "l"(source), "r"(int(inside)), "n"(BYTES)
        : "memory");
}
// The same where only the first `valid` bytes are there: the rest arrives as zeros.
template <int BYTES>
__device__ __forceinline__ void copy_async_partial(unsigned destination, const void* source, int valid) {
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(valid)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(destination), "l"(source), "n"(BYTES), "r"(valid)
                 : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// BYTES (2, 4, 8 or 16) from shared to global memory, both aligned to them.
template <int BYTES>
__device__ __forceinline__ void copy_to_global(void* destination, unsigned source) {
  if constexpr (BYTES == 16) {
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(source)
                 : "memory");
    *static_cast<uint4*>(destination) = x;
  } else if constexpr (BYTES == 8) {
    uint2 x;
    asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(source) : "memory");
    *static_cast<uint2*>(destination) = x;
  } else if constexpr (BYTES == 4) {
    unsigned x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(source) : "memory");
    *static_cast<unsigned*>(destination) = x;
  } else {
    unsigned short x;
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(x) : "r"(source) : "memory");
    *static_cast<unsigned short*>(destination) = x;
  }
}

// Additions in global memory, in whatever order the hardware likes.
__device__ __forceinline__ void add_global(float* pointer, float x) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(pointer), "f"(x) : "memory");
}
__device__ __forceinline__ void add_global(double* pointer, double x) {
  asm volatile("red.global.add.f64 [%0], %1;" ::"l"(pointer), "d"(x) : "memory");
}

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void add_global(float* pointer, const float (&x)[4]) {
  asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(pointer), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
               : "memory");
}
#endif

__device__ __forceinline__ int load_acquire(const int* pointer) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(pointer) : "memory");
  return value;
}
__device__ __forceinline__ void add_release(int* pointer, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(pointer), "r"(value) : "memory");
}
// These return what was there before.
__device__ __forceinline__ int add_relaxed(int* pointer, int value) {
  int before;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(pointer), "r"(value) : "memory");
  return before;
}
__device__ __forceinline__ int add_acquire(int* pointer, int value) {
  int before;
  asm volatile("atom.acquire.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(pointer), "r"(value) : "memory");
  return before;
}
