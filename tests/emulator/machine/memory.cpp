// Shared memory and what comes and goes in the background: cp.async, TMA loads, bulk stores.
//
// While something is on its way into shared memory, NaNs stand there, and no one may look.  While something has yet to
// be read, no one may write.  What a thread wrote is not for TMA and wgmma until it has fenced, or another that heard
// of it by an mbarrier.
#include "machine.h"

namespace emulator {

namespace {

// cuTensorMapEncodeTiled's arguments, as the Python side packs them.
struct TensorMap {
  static constexpr uint64_t MAGIC = 0x70616d20726f736e;
  uint64_t magic, pointer;
  uint64_t extents[4], strides[3];  // innermost first; the strides, in bytes, are those of dimensions 1 to 3
  uint32_t box[4];
  uint32_t element_bytes, swizzle_bits;
};

template <class Function>
void each_chunk(Block& block, unsigned address, int bytes, Function f) {
  for (unsigned i = (address - SHARED_BASE) / 16; i <= (address - SHARED_BASE + bytes - 1) / 16; ++i)
    f(block.chunks[i], i * 16);
}

void check_fenced(Chunk& chunk, unsigned offset, const char* what) {
  for (uint16_t& writer : chunk.unfenced)
    if (writer) {
      error("%s takes shared memory (offset %u) that thread %d wrote without fence.proxy.async", what, offset,
            writer - 1);
      writer = 0;
    }
}

// A load begins: from here until it arrives no one may look.
void begin_load(Block& block, unsigned address, int bytes, bool is_async_proxy, const char* what) {
  bool told = false;
  each_chunk(block, address, bytes, [&](Chunk& chunk, unsigned offset) {
    if (chunk.readers && !told)
      error("%s overwrites shared memory (offset %u) that wgmma or a bulk store has yet to read", what, offset),
          told = true;
    if (chunk.loads && is_async_proxy && !told)
      error("%s into shared memory (offset %u) where another load is on its way", what, offset), told = true;
    if (is_async_proxy && !told) check_fenced(chunk, offset, what);
    ++chunk.loads;
  });
  memset(shared_bytes(block, address, bytes, 1, what), 0xff, bytes);
}
void end_load(Block& block, unsigned address, int bytes) {
  each_chunk(block, address, bytes, [](Chunk& chunk, unsigned) { --chunk.loads; });
}

void schedule(std::function<void()> arrive) {
  Block* const block = current->block;
  ++block->loads;
  const unsigned delay =
      machine.timing == Timing::EARLY ? 0 : machine.random() % (machine.random() % 4 == 0 ? 200 : 20);
  machine.loads.push_back({static_cast<int>(delay), block, std::move(arrive)});
}

void complete(Block& block, unsigned barrier, int bytes) {
  Mbarrier& b = block.mbarriers[barrier];
  b.bytes -= bytes;
  b.try_complete();
}

void check_barrier(unsigned barrier, const char* what) {
  if (!current->block->mbarriers.count(barrier)) fatal("%s: the mbarrier at %u is not initialised", what, barrier);
}

void read(Block& block, BulkStore& store) {
  if (store.read) return;
  const auto* from = shared_bytes(block, store.source, store.bytes, 16, "a bulk store");
  store.content.assign(from, from + store.bytes);
  end_read(block, store.source, store.bytes);
  store.read = true;
}

void write(Block& block, BulkStore& store) {
  read(block, store);
  if (!store.adds) {
    memcpy(store.destination, store.content.data(), store.bytes);
    return;
  }
  for (int i = 0; i < store.bytes; i += 4) {
    float x, sum;
    memcpy(&x, store.content.data() + i, 4), memcpy(&sum, store.destination + i, 4);
    sum += x;
    memcpy(store.destination + i, &sum, 4);
  }
}

void copy(Block& block, const SmallCopy& c) {
  unsigned char* const to = shared_bytes(block, c.destination, c.bytes, c.bytes, "cp.async");
  memset(to, 0, c.bytes);
  memcpy(to, c.source, c.valid);
  end_load(block, c.destination, c.bytes);
}

}  // namespace

unsigned char* shared_bytes(Block& block, unsigned address, int bytes, int alignment, const char* what) {
  const unsigned size = block.chunks.size() * 16;
  if (address < SHARED_BASE || address - SHARED_BASE + bytes > size || bytes < 0)
    fatal("%s: %d bytes at offset %d are outside of the block's %u bytes of shared memory", what, bytes,
          static_cast<int>(address - SHARED_BASE), size);
  if (address % alignment) fatal("%s: offset %u is not a multiple of %d", what, address - SHARED_BASE, alignment);
  return block.shared + (address - SHARED_BASE);
}

const void* read_shared(unsigned address, int bytes, const char* what) {
  Block& block = *current->block;
  const void* const from = shared_bytes(block, address, bytes, bytes, what);
  const Chunk& chunk = block.chunks[(address - SHARED_BASE) / 16];
  if (chunk.loads)
    error("%s reads shared memory (offset %u) into which a load is on its way", what, address - SHARED_BASE);
  return from;
}

void write_shared(unsigned address, const void* content, int bytes, const char* what, int writer) {
  Block& block = *current->block;
  Thread& thread = *current->warp->threads[writer];
  unsigned char* const to = shared_bytes(block, address, bytes, bytes, what);
  const unsigned offset = address - SHARED_BASE;
  Chunk& chunk = block.chunks[offset / 16];
  if (chunk.loads) error("%s writes shared memory (offset %u) into which a load is on its way", what, offset);
  if (memcmp(to, content, bytes) == 0) return;  // two warpgroups may write the same zeros, one after the other
  memcpy(to, content, bytes);
  if (chunk.readers)
    error("%s overwrites shared memory (offset %u) that wgmma or a bulk store has yet to read", what, offset);
  for (unsigned word = offset / 4; word <= (offset + bytes - 1) / 4; ++word) {
    chunk.unfenced[word % 4] = thread.number + 1;
    thread.unfenced.push_back({word, current->warp->arrivals});
  }
}

// For this thread's writes, and for those that others told it of by an mbarrier, a warp's lanes for one another.
void fence_proxy() {
  Block& block = *current->block;
  const auto cover = [&](const Thread& thread, unsigned arrivals) {
    for (const Thread::Write& write : thread.unfenced) {
      uint16_t& writer = block.chunks[write.word / 4].unfenced[write.word % 4];
      if (writer == thread.number + 1 && write.arrivals < arrivals) writer = 0;
    }
  };
  cover(*current, ~0u);
  current->unfenced.clear();
  for (const auto& [warp, arrivals] : current->heard) {
    unsigned& covered = current->covered[warp];
    if (arrivals == covered) continue;
    for (const Thread* lane : block.warps[warp].threads) cover(*lane, arrivals);
    covered = arrivals;
  }
}

// Whether all of it lies in one array, as far as the machine knows them.
bool is_global(const void* address, int bytes) {
  const char* const begin = static_cast<const char*>(address);
  if (bytes == 0 || machine.ranges.empty()) return true;
  for (const auto& range : machine.ranges)
    if (begin >= range.begin && begin + bytes <= range.begin + range.bytes) return true;
  return false;
}

void check_global(const void* address, int bytes, int alignment, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % alignment)
    fatal("%s: the address in global memory is not a multiple of %d", what, alignment);
  if (!is_global(address, bytes)) fatal("%s: %d bytes outside of all arrays in global memory", what, bytes);
}

void begin_read(Block& block, unsigned address, int bytes, const char* what) {
  shared_bytes(block, address, bytes, 16, what);
  bool told = false;
  each_chunk(block, address, bytes, [&](Chunk& chunk, unsigned offset) {
    if (chunk.loads && !told)
      error("%s takes shared memory (offset %u) into which a load is on its way", what, offset), told = true;
    check_fenced(chunk, offset, what);
    ++chunk.readers;
  });
}
void end_read(Block& block, unsigned address, int bytes) {
  each_chunk(block, address, bytes, [](Chunk& chunk, unsigned) { --chunk.readers; });
}

// --- cp.async

void copy_async(unsigned destination, const void* source, int bytes, int valid) {
  Block& block = *current->block;
  check_global(source, valid, valid ? bytes : 1, "cp.async");
  shared_bytes(block, destination, bytes, bytes, "cp.async");
  begin_load(block, destination, bytes, false, "cp.async");
  const SmallCopy c{destination, source, bytes, valid};
  if (machine.timing == Timing::EARLY)
    copy(block, c);
  else
    current->copies.push_back(c);
}

void copy_async_commit() {
  for (SmallCopy& c : current->copies)
    if (c.group < 0) c.group = current->copy_groups;
  ++current->copy_groups;
}

void copy_async_wait(int pending) {
  std::vector<SmallCopy> rest;
  for (const SmallCopy& c : current->copies)
    if (c.group >= 0 && c.group < current->copy_groups - pending)
      copy(*current->block, c);
    else
      rest.push_back(c);
  current->copies = std::move(rest);
}

// --- the tensor memory accelerator

void load_box(unsigned destination, const void* map_pointer, unsigned barrier, int column, int row, int head,
              int batch) {
  TensorMap map;
  memcpy(&map, map_pointer, sizeof(map));
  if (map.magic != TensorMap::MAGIC) fatal("cp.async.bulk.tensor: not a tensor map");
  check_barrier(barrier, "cp.async.bulk.tensor");
  const int bytes = map.box[0] * map.box[1] * map.box[2] * map.box[3] * map.element_bytes;
  Block& block = *current->block;
  shared_bytes(block, destination, bytes, 128, "cp.async.bulk.tensor");
  begin_load(block, destination, bytes, true, "cp.async.bulk.tensor");
  const long long start[4] = {column, row, head, batch};
  schedule([=, &block] {
    unsigned to = destination;
    for (unsigned i3 = 0; i3 < map.box[3]; ++i3)
      for (unsigned i2 = 0; i2 < map.box[2]; ++i2)
        for (unsigned i1 = 0; i1 < map.box[1]; ++i1) {
          const long long at[4] = {start[0], start[1] + i1, start[2] + i2, start[3] + i3};
          bool inside = true;
          for (int d = 1; d < 4; ++d) inside &= at[d] >= 0 && at[d] < static_cast<long long>(map.extents[d]);
          const char* from = reinterpret_cast<const char*>(map.pointer) + at[0] * map.element_bytes;
          for (int d = 1; d < 4; ++d) from += at[d] * static_cast<long long>(map.strides[d - 1]);
          const long long first = std::max(0ll, -at[0]), last = std::min<long long>(map.box[0], map.extents[0] - at[0]);
          if (inside && first < last &&
              !is_global(from + first * map.element_bytes, (last - first) * map.element_bytes)) {
            error("cp.async.bulk.tensor: a box reads outside of all arrays in global memory");
            inside = false;
          }
          for (unsigned i0 = 0; i0 < map.box[0]; ++i0, to += map.element_bytes) {
            const bool there = inside && i0 >= first && i0 < last;
            unsigned char* const target = block.shared + (swizzle(to, map.swizzle_bits) - SHARED_BASE);
            if (there)
              memcpy(target, from + i0 * map.element_bytes, map.element_bytes);
            else
              memset(target, 0, map.element_bytes);
          }
        }
    end_load(block, destination, bytes);
    complete(block, barrier, bytes);
  });
}

void load_run(unsigned destination, const void* source, int bytes, unsigned barrier) {
  check_barrier(barrier, "cp.async.bulk");
  if (bytes % 16) fatal("cp.async.bulk: %d bytes are not a multiple of 16", bytes);
  check_global(source, bytes, 16, "cp.async.bulk");
  Block& block = *current->block;
  shared_bytes(block, destination, bytes, 16, "cp.async.bulk");
  begin_load(block, destination, bytes, true, "cp.async.bulk");
  schedule([=, &block] {
    memcpy(block.shared + (destination - SHARED_BASE), source, bytes);
    end_load(block, destination, bytes);
    complete(block, barrier, bytes);
  });
}

void store_run(void* destination, unsigned source, int bytes, bool adds) {
  const char* const name = adds ? "cp.reduce.async.bulk" : "cp.async.bulk";
  if (bytes % 16) fatal("%s: %d bytes are not a multiple of 16", name, bytes);
  check_global(destination, bytes, 16, name);
  begin_read(*current->block, source, bytes, name);
  current->stores.push_back({static_cast<char*>(destination), source, bytes, adds, {}});
  if (machine.early()) read(*current->block, current->stores.back());
}

void store_commit() {
  for (BulkStore& store : current->stores)
    if (store.group < 0) store.group = current->store_groups;
  ++current->store_groups;
}

void store_wait(int pending, bool read_only) {
  std::vector<BulkStore> rest;
  for (BulkStore& store : current->stores) {
    const bool due = store.group >= 0 && store.group < current->store_groups - pending;
    if (due) read(*current->block, store);
    if (due && (!read_only || machine.early()))
      write(*current->block, store);
    else
      rest.push_back(std::move(store));
  }
  current->stores = std::move(rest);
}

void end_thread(Thread& thread) {
  if (!thread.products.empty()) error("a thread ends with a wgmma that it did not commit");
  for (const auto& product : thread.warp->products)
    if (!product->done) {
      error("a thread ends with a wgmma that it did not wait for");
      break;
    }
  for (BulkStore& store : thread.stores) {
    if (!store.read) error("a thread ends before its bulk store has read shared memory");
    write(*thread.block, store);
  }
  thread.stores.clear();
  copy_async_commit();
  copy_async_wait(0);
}

}  // namespace emulator
