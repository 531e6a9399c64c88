// Tiles of work, where thread blocks stay for many: one thread takes them and tells the others through shared memory.
#pragma once
#include "ptx/memory.cuh"
#include "ring.cuh"
#include "sequence.cuh"

// Rows (of the forward pass) or keys (of the backward pass) of a head, from `first` on.
struct Work {
  int first, head;
  Sequence sequence;

  __device__ __forceinline__ bool valid() const { return first >= 0; }  // otherwise there are no more

  static constexpr int BYTES = 32;
  __device__ __forceinline__ void publish(unsigned address) const {
    store_shared(address, int4{first, head, sequence.batch, static_cast<int>(sequence.start_q)});
    if constexpr (VARLEN)
      store_shared(address + 16, int4{static_cast<int>(sequence.start_k), sequence.seqlen_q, sequence.seqlen_k, 0});
  }
  static __device__ __forceinline__ Work read(const Params& p, unsigned address) {
    const int4 x = load_shared(address);
    if constexpr (VARLEN) {
      const int4 y = load_shared(address + 16);
      return {x.x, x.y, {x.z, x.w, y.x, y.y, y.z}};
    } else {
      return {x.x, x.y, Sequence(p, x.z)};
    }
  }
};

// Its taker tells the others, once all have heard of the one before.
template <class Tiles>
__device__ __forceinline__ Work take_and_tell(Tiles& tiles, unsigned address, Ring<1>& ring) {
  ring.wait_empty();
  const Work work = tiles.take();
  work.publish(address);
  ring.expect(0);
  ring.next();
  return work;
}

// What a thread hears.
__device__ __forceinline__ Work hear(const Params& p, unsigned address, Stages<1> stages, unsigned phase) {
  stages.full(0).wait(phase);
  const Work work = Work::read(p, address);
  stages.release_by_each(0);
  return work;
}
__device__ __forceinline__ Work hear(const Params& p, unsigned address, Ring<1>& ring) {
  ring.stages.full(0).wait_asleep(ring.phase);
  const Work work = hear(p, address, ring.stages, ring.phase);
  ring.next();
  return work;
}

// Where the tile of an index lies, if there is one.
struct Place {
  bool valid;
  int section;        // of heads
  int block, blocks;  // which one of the head's
  int head;
  Sequence sequence;

  // Dense: all heads have as many blocks. They are ordered by sections of heads, within them by blocks.
  static __device__ __forceinline__ Place dense(const Params& p, int index, int blocks, int heads) {
    const int all = heads * p.batch;
    if (index >= blocks * all) return {false};
    const int section = index / (p.section * blocks), before = section * p.section;
    const int width = min(p.section, all - before), rest = index - before * blocks;
    const int block = rest / width, number = before + rest - block * width, batch = number / heads;
    return {true, section, block, blocks, number - batch * heads, Sequence(p, batch)};
  }
};

// Packed sequences, whose lengths only the device knows: head by head. Finds ascending indices on one walk along them.
struct PackedPlaces {
  int batch = 0, before = 0;  // the sequence where the last one was found, and how many tiles lie before it

  template <int BLOCK>
  __device__ __forceinline__ Place find(const Params& p, int index, int heads, int Sequence::* length) {
    for (; batch < p.batch; ++batch) {
      const Sequence sequence(p, batch);
      const int blocks = (sequence.*length + BLOCK - 1) / BLOCK, rest = index - before;
      if (rest < blocks * heads) {
        const int head = rest / blocks;
        return {true, 0, rest - head * blocks, blocks, head, sequence};
      }
      before += blocks * heads;
    }
    return {false};
  }
};
