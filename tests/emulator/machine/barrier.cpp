// Barriers: mbarriers in shared memory, and the numbered ones.
#include "machine.h"

namespace emulator {

namespace {

Mbarrier& find(unsigned address) {
  const auto found = current->block->mbarriers.find(address);
  if (found == current->block->mbarriers.end()) fatal("the mbarrier at %u is not initialised", address);
  return found->second;
}

}  // namespace

void mbarrier_init(unsigned address, int count) {
  shared_bytes(*current->block, address, 8, 8, "mbarrier.init");
  if (count < 1) fatal("mbarrier.init: a count of %d", count);
  current->block->mbarriers[address] = {count, count, 0, 0};
}

void mbarrier_arrive(unsigned address, int count, long bytes) {
  Mbarrier& b = find(address);
  b.bytes += bytes;
  b.pending -= count;
  if (b.pending < 0) fatal("the mbarrier at %u: more than %d arrivals in a phase", address, b.count);
  b.arriving[current->number / LANES] = ++current->warp->arrivals;
  b.try_complete();
}

void mbarrier_wait(unsigned address, unsigned parity) {
  if (parity > 1) fatal("mbarrier.try_wait.parity: a parity of %u", parity);
  Mbarrier& b = find(address);
  while ((b.phase & 1) == parity) wait_while(b.phase, b.phase, "an mbarrier", address);
  for (const auto& [warp, arrivals] : b.arrived) {
    unsigned& heard = current->heard[warp];
    heard = std::max(heard, arrivals);
  }
}

namespace {

struct Arrival {
  int id, count;
  bool predicate;
  unsigned generation;
};

}  // namespace

bool barrier(int id, int count, bool waits, bool predicate, const char* name) {
  if (id < 0 || id > 15) fatal("%s: there is no barrier %d", name, id);
  NamedBarrier& b = current->block->barriers[id];
  Arrival mine{id, count, predicate, 0};
  collective(name, mine, [&](Arrival* const(&lanes)[LANES]) {
    if (count % LANES) fatal("%s: %d threads are not whole warps", name, count);
    if (b.arrived > 0 && b.count != count)
      fatal("%s %d: here for %d threads, elsewhere for %d", name, id, count, b.count);
    b.count = count;
    for (Arrival* lane : lanes) {
      if (lane->id != id || lane->count != count) fatal("%s: the lanes of a warp are at different barriers", name);
      b.any |= lane->predicate;
      lane->generation = b.generation;
    }
    b.arrived += LANES;
    const int wanted = count ? count : current->block->alive;
    if (b.arrived > wanted) fatal("%s %d: more than %d threads", name, id, wanted);
    if (b.arrived == wanted) b.result = b.any, b.any = false, b.arrived = 0, ++b.generation;
  });
  if (!waits) return false;
  while (b.generation == mine.generation) wait_while(b.generation, mine.generation, name, id);
  return b.result;
}

}  // namespace emulator
