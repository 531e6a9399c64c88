// What CUDA C++ gives a kernel without being asked.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "interface.h"

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// Dynamic shared memory, which no one defines: its address is 0.  Every block has its own (ptx::shared_address).
#define __shared__ __attribute__((weak, visibility("hidden")))

struct Index {
  unsigned x, y, z;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};

// --- arithmetic

using std::abs, std::exp2, std::fma, std::log2, std::sqrt, std::tanh;

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
// Of a number and NaN, the number.
inline float min(float a, float b) { return a < b || b != b ? a : b; }
inline float max(float a, float b) { return a > b || b != b ? a : b; }
inline double min(double a, double b) { return a < b || b != b ? a : b; }
inline double max(double a, double b) { return a > b || b != b ? a : b; }

namespace emulator {
template <class To, class From>
inline To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
}  // namespace emulator
inline float __int_as_float(int x) { return emulator::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bits<float>(x); }
inline int __float_as_int(float x) { return emulator::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emulator::bits<unsigned>(x); }
inline int __double2loint(double x) { return static_cast<int>(emulator::bits<uint64_t>(x)); }
inline int __double2hiint(double x) { return static_cast<int>(emulator::bits<uint64_t>(x) >> 32); }
inline double __hiloint2double(int high, int low) {
  return emulator::bits<double>(static_cast<uint64_t>(static_cast<unsigned>(high)) << 32 | static_cast<unsigned>(low));
}
inline float __fmul_ru(float x, float y) {
  const float rounded = x * y;
  return rounded < static_cast<double>(x) * y ? nextafterf(rounded, HUGE_VALF) : rounded;
}
inline double __dmul_ru(double x, double y) {
  const double rounded = x * y;
  return fma(x, y, -rounded) > 0 ? nextafter(rounded, HUGE_VAL) : rounded;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<uint64_t>(a) * b >> 32; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }

// --- threads

inline void __syncwarp(unsigned = ~0u) {
  int none = 0;
  emulator::collective("__syncwarp", none, [](auto&) {});
}
inline void __syncthreads() { emulator::barrier(0, 0, true, false, "__syncthreads"); }
inline int __syncthreads_or(int x) { return emulator::barrier(0, 0, true, x != 0, "__syncthreads_or"); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { emulator::spin("__nanosleep"); }

namespace emulator {
template <class T>
struct Shuffle {
  T value;
  int from;
};
template <class T>
inline T shuffle(const char* name, T x, int from) {
  Shuffle<T> mine{x, from};
  collective(name, mine, [](Shuffle<T>* const(&lanes)[LANES]) {
    T values[LANES];
    for (int i = 0; i < LANES; ++i) values[i] = lanes[i]->value;
    for (int i = 0; i < LANES; ++i) lanes[i]->value = values[lanes[i]->from];
  });
  return mine.value;
}
inline unsigned vote(const char* name, bool x) {
  unsigned mine = x;
  collective(name, mine, [](unsigned* const(&lanes)[LANES]) {
    unsigned all = 0;
    for (int i = 0; i < LANES; ++i) all |= *lanes[i] << i;
    for (int i = 0; i < LANES; ++i) *lanes[i] = all;
  });
  return mine;
}
}  // namespace emulator
template <class T>
inline T __shfl_sync(unsigned, T x, int from) {
  return emulator::shuffle("__shfl_sync", x, from & (emulator::LANES - 1));
}
template <class T>
inline T __shfl_xor_sync(unsigned, T x, int mask) {
  return emulator::shuffle("__shfl_xor_sync", x, emulator::lane() ^ mask);
}
template <class T>
inline T __shfl_up_sync(unsigned, T x, int by) {
  return emulator::shuffle("__shfl_up_sync", x, emulator::lane() < by ? emulator::lane() : emulator::lane() - by);
}
template <class T>
inline T __shfl_down_sync(unsigned, T x, int by) {
  const int from = emulator::lane() + by;
  return emulator::shuffle("__shfl_down_sync", x, from < emulator::LANES ? from : emulator::lane());
}
inline unsigned __ballot_sync(unsigned, bool x) { return emulator::vote("__ballot_sync", x); }
inline bool __any_sync(unsigned, bool x) { return emulator::vote("__any_sync", x) != 0; }
inline bool __all_sync(unsigned, bool x) { return emulator::vote("__all_sync", x) == ~0u; }

// --- memory

inline uint64_t __cvta_generic_to_shared(const void* pointer) {  // of an offset into dynamic shared memory
  return emulator::SHARED_BASE + reinterpret_cast<uint64_t>(pointer);
}
template <class T>
inline T __ldg(const T* pointer) {
  return *pointer;
}
template <class T>
inline T atomicAdd(T* pointer, T x) {
  emulator::check_global(pointer, sizeof(T), sizeof(T), "atomicAdd");
  const T before = *pointer;
  *pointer += x;
  return before;
}

#include "ptx.h"

// --- how the machine calls a kernel

namespace emulator {
template <class Params>
inline void call(void (*kernel)(Params), const void* params) {
  kernel(*static_cast<const Params*>(params));
}
template <class Params>
constexpr int params_bytes(void (*)(Params)) {
  return sizeof(Params);
}
}  // namespace emulator
