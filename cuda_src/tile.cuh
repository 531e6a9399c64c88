// A matrix in shared memory, [ROWS, COLS], and its way in and out.
//
// Rows are cut into panels of 128 bytes (64 or 32 where 128 does not divide a row), stored one after another.
// Inside a panel row the 16-byte chunks are permuted by the row ("swizzled"), so that the accesses of a warp
// fall into different banks whether it reads along rows or along columns.
#pragma once
#include "element.cuh"
#include "ptx/memory.cuh"

template <class E, int ROWS_, int COLS_>
struct Tile {
  using Element = E;
  static constexpr int ROWS = ROWS_, COLS = COLS_;
  static constexpr int ROW_BYTES = COLS * int(sizeof(E));
  static constexpr int PANEL = ROW_BYTES % 128 == 0 ? 128 : ROW_BYTES % 64 == 0 ? 64 : 32;
  static constexpr int BYTES = ROWS * ROW_BYTES;
  static_assert(ROW_BYTES % 32 == 0 && ROWS % 8 == 0, "panels hold whole swizzle patterns");

  unsigned base;  // shared-memory address, a multiple of 1024

  // 16-bit tiles are read by ldmatrix, whose 8 rows must differ in all chunk bits.  Wider ones are read a pair of
  // words a lane, 4 rows at once: rows 0-3, rows 4-7, the even and the odd rows must each differ in the upper two.
  static __device__ __forceinline__ int swizzle(int row) {
    const int pattern = !IS_16BIT<E> ? (((row >> 1) & 3) ^ ((row & 1) << 1)) << 1
                        : PANEL == 128 ? row & 7
                        : PANEL == 64  ? (row >> 1) & 3
                                       : (row >> 2) & 1;
    return pattern & (PANEL / 16 - 1);
  }

  __device__ __forceinline__ unsigned address(int row, int byte) const {
    return base + byte / PANEL * (ROWS * PANEL) + row * PANEL + (((byte % PANEL / 16) ^ swizzle(row)) * 16) + byte % 16;
  }

  // Two neighbouring columns of a row, rounded to the element type.
  __device__ __forceinline__ void store_pair(int row, int col, typename Traits<E>::Accum x, typename Traits<E>::Accum y) const {
    const unsigned to = address(row, col * int(sizeof(E)));
    if constexpr (IS_16BIT<E>)
      store_shared(to, pack(x, y, E{}));
    else
      store_shared_pair(to, x, y);
  }
};

// A matrix in global memory: element (r, c) at origin[r * row_stride + c * col_stride].
template <class E>
struct Rows {
  E* origin;
  long long row_stride, col_stride;
  int rows;  // how many there are
};

// Global rows [first, first + T::ROWS) x columns [0, WIDTH) into a tile, asynchronously where COPY_BYTES allows; what
// lies outside is zero.  COPY_BYTES divides every row's address; below 4 (or with strided columns) elements go one by one.
template <int COPY_BYTES, int WIDTH, int THREADS, class T, class E>
__device__ __forceinline__ void load_tile(const T& tile, const Rows<const E>& source, int first) {
  constexpr int VECTOR = COPY_BYTES > int(sizeof(E)) && COPY_BYTES >= 4 ? COPY_BYTES : int(sizeof(E));  // bytes a copy
  constexpr int PER_ROW = T::ROW_BYTES / VECTOR;
  constexpr int COPIES = T::ROWS * PER_ROW;
#pragma unroll(VECTOR == 16 ? 16 : 4)
  for (int i = threadIdx.x; i < (COPIES + THREADS - 1) / THREADS * THREADS; i += THREADS) {
    if (COPIES % THREADS != 0 && i >= COPIES) break;
    const int row = i / PER_ROW, byte = i % PER_ROW * VECTOR;
    const bool inside = first + row < source.rows;
    const unsigned to = tile.address(row, byte);
    if constexpr (VECTOR > int(sizeof(E))) {
      const int valid = max(0, min(VECTOR, WIDTH * int(sizeof(E)) - byte));
      // A row outside is not addressed at all: its pointer may be anywhere.
      const char* from = reinterpret_cast<const char*>(source.origin + (inside ? (first + row) * source.row_stride : 0)) + byte;
      copy_async<VECTOR>(to, valid > 0 ? from : reinterpret_cast<const char*>(source.origin), inside ? valid : 0);
    } else {
      const int col = byte / int(sizeof(E));
      const bool present = inside && col < WIDTH;
      const E* from = source.origin + (present ? (first + row) * source.row_stride + col * source.col_stride : 0);
      if constexpr (sizeof(E) == 2)
        store_shared(to, present ? from->bits : static_cast<unsigned short>(0));
      else
        copy_async<int(sizeof(E))>(to, from, present ? int(sizeof(E)) : 0);
    }
  }
}

// Rows [row, row + COUNT) of a tile, columns [0, WIDTH), into global rows from `first` on, by one warp.  The global
// columns are contiguous and rows start at multiples of gcd(16, WIDTH * sizeof(E)) bytes.
template <int COUNT, int WIDTH, class T, class E>
__device__ __forceinline__ void store_rows(const T& tile, int row, const Rows<E>& to, int first, int lane) {
  constexpr int WIDTH_BYTES = WIDTH * int(sizeof(E));
  constexpr int VECTOR = WIDTH_BYTES % 16 == 0 ? 16 : WIDTH_BYTES % 8 == 0 ? 8 : WIDTH_BYTES % 4 == 0 ? 4 : 2;
  constexpr int PER_ROW = WIDTH_BYTES / VECTOR;
#pragma unroll(4)
  for (int i = lane; i < COUNT * PER_ROW; i += 32) {
    const int r = i / PER_ROW, byte = i % PER_ROW * VECTOR;
    if (first + r >= to.rows) break;
    char* pointer = reinterpret_cast<char*>(to.origin + (first + r) * to.row_stride) + byte;
    const unsigned from = tile.address(row + r, byte);
    if constexpr (VECTOR == 16) {
      uint4 x;
      asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(from) : "memory");
      *reinterpret_cast<uint4*>(pointer) = x;
    } else if constexpr (VECTOR == 8) {
      uint2 x;
      asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(from) : "memory");
      *reinterpret_cast<uint2*>(pointer) = x;
    } else if constexpr (VECTOR == 4) {
      unsigned x;
      asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(from) : "memory");
      *reinterpret_cast<unsigned*>(pointer) = x;
    } else {
      unsigned short x;
      asm volatile("ld.shared.b16 %0, [%1];" : "=h"(x) : "r"(from) : "memory");
      *reinterpret_cast<unsigned short*>(pointer) = x;
    }
  }
}
