// A GPU for one kernel at a time: thread blocks whose threads are fibers of one CPU thread.
//
// Threads run until they wait: for the other lanes of their warp (a collective), at a barrier, for memory that another
// thread writes.  Who goes on next is a matter of chance.  What the hardware does in the background (TMA loads, bulk
// stores, wgmma, cp.async) happens, in each of the three timings, as early or as late as the program allows or at a
// random moment between; a kernel has to be right with all of them.
//
// This is what kernels call, by way of cuda.h and ptx.h; machine.h is the inside.
#pragma once
#include <cstdint>
#include <cstring>

namespace emulator {

constexpr int LANES = 32;
constexpr unsigned SHARED_BASE = 1024;  // the address of a block's first byte of shared memory: not 0, which is a bug's

// What one lane says of a wgmma.
struct LaneProduct {
  float* d;                     // in registers, contiguous
  const unsigned* a;            // in registers: four words, contiguous; else nullptr
  uint64_t a_matrix, b_matrix;  // descriptors
  int columns;
  bool accumulate, transpose_a, transpose_b, bfloat16;
};

// --- scheduling

// Give the others their turn.
void spin(const char* where);
[[noreturn]] void exit_thread();
// An error that lets the kernel go on, and one that does not.
void error(const char* format, ...) __attribute__((format(printf, 1, 2)));
[[noreturn]] void fatal(const char* format, ...) __attribute__((format(printf, 1, 2)));
// All lanes of the warp come here; true for the last one, which then calls finish_collective; the others wait for that.
bool join_collective(const char* name, void* arguments);
void* const* collective_arguments();
void finish_collective();
int lane();

// `all` gets every lane's arguments, and may write to them.
template <class Arguments, class Function>
inline void collective(const char* name, Arguments& mine, Function all) {
  if (join_collective(name, &mine)) {
    all(*reinterpret_cast<Arguments* const(*)[LANES]>(collective_arguments()));
    finish_collective();
  }
}

// --- memory

// A plain access to shared memory.
const void* read_shared(unsigned address, int bytes, const char* what);
void write_shared(unsigned address, const void* content, int bytes, const char* what, int writer = lane());
void check_global(const void* address, int bytes, int alignment, const char* what);
void fence_proxy();

void copy_async(unsigned destination, const void* source, int bytes, int valid);
void copy_async_commit();
void copy_async_wait(int pending);

void load_box(unsigned destination, const void* map, unsigned barrier, int column, int row, int head, int batch);
void load_run(unsigned destination, const void* source, int bytes, unsigned barrier);
void store_run(void* destination, unsigned source, int bytes, bool adds);
void store_commit();
void store_wait(int pending, bool read_only);

// --- barriers

void mbarrier_init(unsigned address, int count);
void mbarrier_arrive(unsigned address, int count, long bytes);
void mbarrier_wait(unsigned address, unsigned parity);
// count 0: all threads of the block that have not ended.
bool barrier(int id, int count, bool waits, bool predicate, const char* name);

// --- wgmma

void wgmma_fence();
void wgmma_issue(const LaneProduct& product);
void wgmma_commit();
void wgmma_wait(int pending);

}  // namespace emulator
