// The inside of the machine.
#pragma once
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda.h"

namespace emulator {

enum class Timing { EARLY, LATE, RANDOM };

struct Block;
struct Warp;

// A run of bytes that leaves shared memory in the background: cp.async.bulk, cp.reduce.async.bulk.
struct BulkStore {
  char* destination;
  unsigned source;
  int bytes;
  bool adds;  // floats, to those that are there
  std::vector<char> content;
  bool read = false;
  int group = -1;  // until it is committed
};
// A copy of cp.async, of `valid` bytes and zeros behind.
struct SmallCopy {
  unsigned destination;
  const void* source;
  int bytes, valid;
  int group = -1;
};
struct Thread {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  unsigned number = 0;  // threadIdx.x
  bool done = false;
  const unsigned* word = nullptr;  // it waits as long as this holds `value`
  unsigned value = 0;
  bool spins = false;               // it looks at memory again and again
  const char* where = "the start";  // where it waits
  unsigned operand = 0;

  struct Write {
    unsigned word, arrivals;  // of shared memory; how often its warp had arrived at mbarriers before
  };
  std::vector<Write> unfenced;                     // since its last proxy fence
  std::unordered_map<unsigned, unsigned> heard;    // for each warp, how many of its arrivals this thread waited for,
  std::unordered_map<unsigned, unsigned> covered;  // and how many when it last fenced
  std::vector<BulkStore> stores;
  std::vector<SmallCopy> copies;
  int store_groups = 0, copy_groups = 0;
  std::vector<LaneProduct> products;  // wgmmas not yet committed
  bool registers_fenced = false;
};

// Accumulators on loan to the tensor cores: in the registers stands a NaN until they come back.
struct Accumulators {
  float* registers[LANES];
  int columns, products;
  float values[16][256];  // a warp's rows
};
struct Product {
  LaneProduct of[LANES];
  Accumulators* d;
  unsigned words[LANES][4];  // A from registers, as it was
  int group;
  bool done = false;
};

struct Warp {
  Thread* threads[LANES];
  void* arguments[LANES];  // of the collective under way
  const char* collective = nullptr;
  int arrived = 0;
  unsigned generation = 0;
  double pause = 0;  // how likely it is that it does not get its turn

  unsigned committed = 0;  // groups of wgmma
  unsigned arrivals = 0;   // of its lanes, at mbarriers
  std::deque<std::unique_ptr<Product>> products;
  std::vector<std::unique_ptr<Accumulators>> accumulators;
};

struct Mbarrier {
  int count, pending;
  long bytes;
  unsigned phase;
  std::unordered_map<unsigned, unsigned> arriving = {}, arrived = {};  // in this phase, the last: warps, their arrivals

  void try_complete() {
    if (pending > 0 || bytes != 0) return;
    pending = count, ++phase;
    arrived = std::move(arriving);
    arriving.clear();
  }
};
struct NamedBarrier {
  int arrived = 0, count = 0;
  bool any = false, result = false;
  unsigned generation = 0;
};
// What the asynchronous parts of the machine have to do with 16 bytes of shared memory.
struct Chunk {
  uint16_t readers;      // that have not read it yet
  uint16_t loads;        // on their way into it
  uint16_t unfenced[4];  // for each word the thread (counted from 1) whose write awaits a proxy fence
};

struct Block {
  unsigned number = 0;
  int alive = 0;
  std::vector<unsigned char> memory;
  unsigned char* shared = nullptr;
  std::vector<Chunk> chunks;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::unordered_map<unsigned, Mbarrier> mbarriers;
  NamedBarrier barriers[16];
  int loads = 0;  // on their way
};

extern Thread* current;

// Give the others their turn until `word` is no longer `value`.
void wait_while(const unsigned& word, unsigned value, const char* where, unsigned operand = 0);

struct Load {
  int delay;
  Block* block;
  std::function<void()> arrive;
};
struct Machine {
  Timing timing;
  uint64_t random_state;
  std::vector<std::unique_ptr<Block>> blocks;  // resident ones
  std::vector<Load> loads;
  struct Range {
    const char* begin;
    uint64_t bytes;
  };
  std::vector<Range> ranges;  // of global memory that bulk copies may touch; empty: all
  bool failed;
  std::map<std::string, int> errors;
  std::string report;

  unsigned random();
  bool happens(double probability);
  bool early() { return timing == Timing::EARLY || (timing == Timing::RANDOM && happens(0.5)); }
};
extern Machine machine;

bool is_global(const void* address, int bytes);
unsigned char* shared_bytes(Block& block, unsigned address, int bytes, int alignment, const char* what);
// Around a background read of shared memory: what it may not read yet, what no one may write until it has.
void begin_read(Block& block, unsigned address, int bytes, const char* what);
void end_read(Block& block, unsigned address, int bytes);
void end_thread(Thread& thread);
// The 128-byte swizzle, and those of 64 and 32 bytes.
inline unsigned swizzle(unsigned address, int bits) { return address ^ ((address >> 7 & ((1u << bits) - 1)) << 4); }

}  // namespace emulator
