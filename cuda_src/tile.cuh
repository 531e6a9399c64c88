// A matrix in shared memory, [ROWS, COLS], and its way in and out.
//
// Rows are cut into panels of 128 bytes (64 or 32 where 128 does not divide a row), stored one after another.
// Inside a panel row the 16-byte chunks are permuted by the row ("swizzled"), so that the accesses of a warp
// fall into different banks whether it reads along rows or along columns.
#pragma once
#include "element.cuh"
#include "ptx/memory.cuh"

// The direction of a product's operand that is contiguous in shared memory: the depth, or the result's.
enum class Major { K, MN };

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
    const int pattern = !IS_16BIT<E>   ? (((row >> 1) & 3) ^ ((row & 1) << 1)) << 1
                        : PANEL == 128 ? row & 7
                        : PANEL == 64  ? (row >> 1) & 3
                                       : (row >> 2) & 1;
    return pattern & (PANEL / 16 - 1);
  }

  __device__ __forceinline__ unsigned address(int row, int byte) const {
    return base + byte / PANEL * (ROWS * PANEL) + row * PANEL + (((byte % PANEL / 16) ^ swizzle(row)) * 16) + byte % 16;
  }

  // Two neighbouring columns of a row, rounded to the element type.
  __device__ __forceinline__ void store_pair(int row, int col, typename Traits<E>::Accum x,
                                             typename Traits<E>::Accum y) const {
    const unsigned to = address(row, col * int(sizeof(E)));
    if constexpr (IS_16BIT<E>)
      store_shared(to, pack(x, y, E{}));
    else
      store_shared_pair(to, x, y);
  }
};

// One element in shared memory, widened.
template <class E>
__device__ __forceinline__ typename Traits<E>::Accum load_element(unsigned address) {
  E x;
  if constexpr (IS_16BIT<E>)
    load_shared(x.bits, address);
  else
    load_shared(x, address);
  return widen(x);
}

// A matrix in global memory: element (r, c) at origin[r * row_stride + c * col_stride].
template <class E>
struct Rows {
  E* origin;
  long long row_stride, col_stride;
  int rows;  // how many there are

  __device__ __forceinline__ E& at(int row, int column) const { return origin[row * row_stride + column * col_stride]; }
};

// The same value, but what depends on it is computed anew: cheaper than to hold it in registers across a main loop.
__device__ __forceinline__ int recompute(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// How threads share the copy of a tile, VECTOR bytes each at a time: along a row's segment (a panel, where there are
// threads enough), then down the rows.  Rows that are a multiple of 8 apart have the same swizzle, so that a thread's
// later addresses differ from its first by constants.
template <class T, int VECTOR, int THREADS, int ROWS>
struct CopyLayout {
  static constexpr int PER_ROW = T::PANEL / VECTOR < THREADS ? T::PANEL / VECTOR : THREADS, SEGMENT = PER_ROW * VECTOR;
  static constexpr int ROW_STEP = THREADS / PER_ROW, STEPS = (ROWS + ROW_STEP - 1) / ROW_STEP,
                       SEGMENTS = T::ROW_BYTES / SEGMENT;
  static constexpr bool WHOLE = ROWS % ROW_STEP == 0;  // else the last step is for some threads only
  static_assert(THREADS % PER_ROW == 0);

  int row, byte;  // of this thread's first copy
  unsigned first_address;

  __device__ __forceinline__ CopyLayout(const T& tile, int thread, int start_row)
      : row(thread / PER_ROW), byte(thread % PER_ROW * VECTOR), first_address(tile.address(start_row + row, byte)) {}

  __device__ __forceinline__ unsigned address(const T& tile, int start_row, int step, int segment) const {
    if constexpr (ROW_STEP % 8 == 0 && SEGMENT == T::PANEL)
      return first_address + step * (ROW_STEP * T::PANEL) + segment * (T::ROWS * T::PANEL);
    else
      return tile.address(start_row + row + step * ROW_STEP, segment * SEGMENT + byte);
  }
};

// Global rows [first, first + T::ROWS) x columns [0, WIDTH) into a tile, asynchronously where COPY_BYTES allows; what
// lies outside is zero.  COPY_BYTES divides every row's address; below 4 (or with strided columns) elements go one by
// one.
template <int COPY_BYTES, int WIDTH, int THREADS, class T, class E>
__device__ __forceinline__ void load_tile(const T& tile, const Rows<const E>& source, int first) {
  constexpr bool VECTORS = COPY_BYTES > int(sizeof(E)) && COPY_BYTES >= 4;
  constexpr int VECTOR = VECTORS ? COPY_BYTES : int(sizeof(E));  // bytes a copy
  using Layout = CopyLayout<T, VECTOR, THREADS, T::ROWS>;
  const Layout layout(tile, recompute(threadIdx.x), 0);
  const long long column = VECTORS ? 1 : source.col_stride;
  const E* from = source.origin + (first + layout.row) * source.row_stride + layout.byte / int(sizeof(E)) * column;
#pragma unroll
  for (int step = 0; step < Layout::STEPS; ++step, from += Layout::ROW_STEP * source.row_stride) {
    const int row = layout.row + step * Layout::ROW_STEP;
    if (!Layout::WHOLE && row >= T::ROWS) break;
    const bool inside = first + row < source.rows;
#pragma unroll
    for (int segment = 0; segment < Layout::SEGMENTS; ++segment) {
      const int left =
          WIDTH * int(sizeof(E)) - segment * Layout::SEGMENT - layout.byte;  // bytes from here to the end of the row
      const unsigned to = layout.address(tile, 0, step, segment);
      const E* vector = from + segment * (Layout::SEGMENT / int(sizeof(E))) * column;
      if constexpr (VECTOR < 4)
        store_shared(to, inside && left > 0 ? vector->bits : static_cast<unsigned short>(0));
      else if constexpr (WIDTH * int(sizeof(E)) % VECTOR == 0)
        copy_async<VECTOR>(to, vector, inside && left > 0);
      else
        copy_async_partial<VECTOR>(to, vector, inside ? min(VECTOR, max(0, left)) : 0);
    }
  }
}

// Rows [start_row, start_row + COUNT) of a tile, columns [0, WIDTH), into global rows from `first` on, by one warp. The
// global columns are contiguous and rows start at multiples of gcd(16, WIDTH * sizeof(E)) bytes.
template <int COUNT, int WIDTH, class T, class E>
__device__ __forceinline__ void store_rows(const T& tile, int start_row, const Rows<E>& target, int first) {
  constexpr int WIDTH_BYTES = WIDTH * int(sizeof(E));
  constexpr int VECTOR = WIDTH_BYTES % 16 == 0 ? 16 : WIDTH_BYTES % 8 == 0 ? 8 : WIDTH_BYTES % 4 == 0 ? 4 : 2;
  using Layout = CopyLayout<T, VECTOR, 32, COUNT>;
  const Layout layout(tile, threadIdx.x % 32, start_row);
#pragma unroll
  for (int step = 0; step < Layout::STEPS; ++step) {
    const int row = layout.row + step * Layout::ROW_STEP;
    if ((!Layout::WHOLE && row >= COUNT) || first + row >= target.rows) break;
    char* const to = reinterpret_cast<char*>(target.origin + (first + row) * target.row_stride) + layout.byte;
#pragma unroll
    for (int segment = 0; segment < Layout::SEGMENTS; ++segment)
      if (segment * Layout::SEGMENT + layout.byte < WIDTH_BYTES)
        copy_to_global<VECTOR>(to + segment * Layout::SEGMENT, layout.address(tile, start_row, step, segment));
  }
}

// Rows [begin, T::ROWS) of a tile become zero; by THREADS threads, numbered from a multiple of THREADS on.
template <int THREADS, class T>
__device__ __forceinline__ void clear_rows(const T& tile, int begin) {
  constexpr int CHUNKS = T::ROW_BYTES / 16;  // the swizzle stays within a row
  for (int i = threadIdx.x % THREADS; i < (T::ROWS - begin) * CHUNKS; i += THREADS) {
    const unsigned to = tile.address(begin + i / CHUNKS, i % CHUNKS * 16);
    store_shared_pair(to, 0.0, 0.0);
  }
}
