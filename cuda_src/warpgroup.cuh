// Products of tiles by one warpgroup: acc [64, N] += A [64, K] B [K, N], operands in swizzled shared memory or, for A,
// in registers.  Asynchronous: between wgmma_fence() and wgmma_commit().  And the way of a result to shared memory.
#pragma once
#include "ptx/wgmma.cuh"
#include "tile.cuh"

// A tile as wgmma reads it: rows along the result and columns along the depth (Major::K), or the reverse (Major::MN).
template <Major MAJOR_, class T>
struct WarpgroupOperand {
  static constexpr Major MAJOR = MAJOR_;
  static_assert(T::PANEL == 128 && IS_16BIT<typename T::Element>);
  unsigned low;  // of the descriptor: address and leading offset, in units of 16 bytes

  // Leading offset: from a panel to the next one, along the result.
  __device__ __forceinline__ explicit WarpgroupOperand(const T& tile)
      : low(tile.base / 16 | (MAJOR == Major::MN ? T::ROWS * 128 / 16 << 16 : 0)) {}

  // The descriptor of step `k`, 16 deep.  PTX ISA, "Matrix descriptor": 128-byte swizzle, 8 rows every 1024 bytes.
  __device__ __forceinline__ unsigned long long at(int k) const {
    const int offset = MAJOR == Major::K ? k / 4 * (T::ROWS * 128) + k % 4 * 32 : k * (16 * 128);
    constexpr unsigned HIGH = 1u << 30 | 1024 / 16;
    unsigned long long descriptor;
    asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(low + offset / 16), "n"(HIGH));
    return descriptor;
  }
};

// K is counted in steps of 16.  Without `accumulate` what acc held does not matter.
template <int K, int N, class A, class B>
__device__ __forceinline__ void warpgroup_gemm(float (&acc)[N][4], const A& a, const B& b, bool accumulate) {
#pragma unroll
  for (int k = 0; k < K; ++k)
    wgmma<A::MAJOR == Major::MN, B::MAJOR == Major::MN>(acc, a.at(k), b.at(k), accumulate || k > 0);
}
template <int K, int N, class B>
__device__ __forceinline__ void warpgroup_gemm(float (&acc)[N][4], const unsigned (&a)[K][4], const B& b) {
#pragma unroll
  for (int k = 0; k < K; ++k) wgmma<0, B::MAJOR == Major::MN>(acc, a[k], b.at(k), true);
}

// One warp's 16 rows of a product, rounded, into a tile from `row` on; each of a lane's two rows times its factor.
template <int N, class T>
__device__ __forceinline__ void store_fragments(const T& tile, int row, const float (&acc)[N][4],
                                                const float (&factors)[2] = {1, 1}) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    unsigned words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const auto& d = acc[2 * i + j / 2];
      words[j] = pack(d[j % 2 * 2] * factors[j % 2], d[j % 2 * 2 + 1] * factors[j % 2], typename T::Element{});
    }
    store_matrices(tile.address(row + lane % 16, i * 32 + lane / 16 * 16), words);
  }
}
