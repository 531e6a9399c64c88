// Fibers, whose turn it is, errors, and the launch of a kernel.
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "machine.h"

Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

Thread* current;
Machine machine;

namespace {

constexpr size_t STACK = 256 << 10, GUARD = 4096;  // bytes
constexpr int PATIENCE = 200;                      // rounds without progress before it is a deadlock
constexpr size_t MOST_ERRORS = 12;

void* scheduler_stack_pointer;
void (*entry)(const void*);
const void* params;
unsigned turns;  // that were not just looks at memory
std::vector<char*> free_stacks;

// Switches stacks: the registers that a function must preserve go to the old one and come from the new one.
#if defined(__x86_64__)
extern "C" void emulator_switch(void** save, void* to);
asm(R"(
  .text
  .local emulator_switch
  .type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
constexpr int SAVED_FRAME = 5;  // where on the old stack the frame pointer lies
void* new_stack(char* stack, void (*start)()) {
  void** top = reinterpret_cast<void**>(stack + STACK) - 8;
  for (int i = 0; i < 6; ++i) top[i] = nullptr;
  top[6] = reinterpret_cast<void*>(start);
  top[7] = nullptr;  // the return address of `start`
  return top;
}
#elif defined(__aarch64__)
extern "C" void emulator_switch(void** save, void* to);
asm(R"(
  .text
  .local emulator_switch
  .type emulator_switch, %function
emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
constexpr int SAVED_FRAME = 10;
void* new_stack(char* stack, void (*start)()) {
  void** top = reinterpret_cast<void**>(stack + STACK) - 20;
  for (int i = 0; i < 20; ++i) top[i] = nullptr;
  top[11] = reinterpret_cast<void*>(start);
  return top;
}
#else
#error "The emulator switches stacks by hand, and knows how on x86-64 and AArch64 only."
#endif

// The way to a frame of a thread's, as offsets into the kernel's library, the innermost first: "@{1a2b 3c4d}".
std::string location(const Thread& thread, void* const* frame) {
  Dl_info kernel, found;
  dladdr(reinterpret_cast<const void*>(entry), &kernel);
  std::string text = "@{";
  const auto inside = [&](const void* p) { return p >= thread.stack && p < thread.stack + STACK - 2 * sizeof(void*); };
  for (; inside(frame); frame = static_cast<void* const*>(frame[0])) {
    if (!dladdr(frame[1], &found) || found.dli_fbase != kernel.dli_fbase) continue;
    char offset[20];  // of the call, not of what follows it
    snprintf(offset, sizeof(offset), " %zx", static_cast<char*>(frame[1]) - static_cast<char*>(found.dli_fbase) - 1);
    text += offset;
  }
  return text + " }";
}

// Of one that waits.
std::string location(const Thread& thread) {
  return location(thread, static_cast<void* const*>(static_cast<void**>(thread.stack_pointer)[SAVED_FRAME]));
}

void yield() { emulator_switch(&current->stack_pointer, scheduler_stack_pointer); }

void start_thread() {
  entry(params);
  exit_thread();
}

char* allocate_stack() {
  if (!free_stacks.empty()) {
    char* const stack = free_stacks.back();
    free_stacks.pop_back();
    return stack;
  }
  void* const memory = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, GUARD, PROT_NONE)) {
    perror("the emulator's stacks");
    abort();
  }
  return static_cast<char*>(memory);
}

std::unique_ptr<Block> start_block(unsigned number, unsigned threads, unsigned bytes) {
  auto block = std::make_unique<Block>();
  block->number = number;
  block->alive = threads;
  block->memory.assign(bytes + 1024, 0xff);  // NaN
  block->shared = block->memory.data() + (-reinterpret_cast<uintptr_t>(block->memory.data()) & 1023);
  block->chunks.resize((bytes + 15) / 16);
  block->threads = std::vector<Thread>(threads);
  block->warps = std::vector<Warp>(threads / LANES);
  for (unsigned i = 0; i < threads; ++i) {
    Thread& thread = block->threads[i];
    thread.block = block.get(), thread.warp = &block->warps[i / LANES], thread.number = i;
    thread.warp->threads[i % LANES] = &thread;
    thread.stack = allocate_stack();
    thread.stack_pointer = new_stack(thread.stack, start_thread);
  }
  return block;
}

void end_block(Block& block) {
  if (block.loads > 0 && !machine.failed) error("block %u ended before its TMA loads came", block.number);
  for (Thread& thread : block.threads) free_stacks.push_back(thread.stack);
}

void run_warp(Warp& warp) {
  for (Thread* thread : warp.threads) {
    if (machine.failed) return;
    if (thread->done || (thread->word && *thread->word == thread->value)) continue;
    thread->word = nullptr, thread->spins = false;
    current = thread;
    threadIdx.x = thread->number, blockIdx.x = thread->block->number;
    emulator_switch(&scheduler_stack_pointer, thread->stack_pointer);
    current = nullptr;
    if (!thread->spins) ++turns;
  }
}

void arrive(size_t i) {
  const Load load = machine.loads[i];
  machine.loads.erase(machine.loads.begin() + i);
  load.arrive();
  --load.block->loads;
  ++turns;
}

// What a thread waits for.
std::string waits_for(const Thread& thread) {
  if (thread.done) return "ended";
  std::string text = std::string("at ") + thread.where;
  const auto found = thread.block->mbarriers.find(thread.operand);
  if (found != thread.block->mbarriers.end()) {
    const Mbarrier& b = found->second;
    text += " at offset " + std::to_string(thread.operand - SHARED_BASE) + " (phase " + std::to_string(b.phase) + ", " +
            std::to_string(b.pending) + " of " + std::to_string(b.count) + " arrivals and " + std::to_string(b.bytes) +
            " bytes to come)";
  } else if (thread.operand) {
    text += " " + std::to_string(thread.operand);
  }
  return text + " " + location(thread);
}

// Where every warp is; warps and lanes in one place share a line.
void report_deadlock() {
  machine.report += "deadlock: no thread can go on\n";
  for (const auto& block : machine.blocks) {
    std::map<std::string, std::map<unsigned, int>> places;  // -> warp -> lanes
    for (const Thread& thread : block->threads) ++places[waits_for(thread)][thread.number / LANES];
    for (const auto& [place, warps] : places) {
      machine.report += "  block " + std::to_string(block->number) + ", warps";
      for (const auto& [warp, lanes] : warps)
        machine.report += " " + std::to_string(warp) + (lanes < LANES ? " (" + std::to_string(lanes) + " lanes)" : "");
      machine.report += ": " + place + "\n";
    }
  }
}

void run(unsigned grid, unsigned threads, unsigned bytes, unsigned resident) {
  unsigned next = 0;
  int idle = 0;
  for (unsigned round = 0; !machine.failed; ++round) {
    for (size_t i = 0; i < machine.blocks.size();)
      if (machine.blocks[i]->alive == 0) {
        end_block(*machine.blocks[i]);
        machine.blocks.erase(machine.blocks.begin() + i);
      } else {
        ++i;
      }
    while (next < grid && machine.blocks.size() < resident)
      machine.blocks.push_back(start_block(next++, threads, bytes));
    if (machine.blocks.empty()) return;

    const unsigned before = turns;
    for (size_t i = 0; i < machine.loads.size();)
      if (machine.timing != Timing::LATE && machine.loads[i].delay-- <= 0)
        arrive(i);
      else
        ++i;
    const size_t count = machine.blocks.size(), first = machine.random() % count;
    for (size_t b = 0; b < count; ++b) {
      auto& warps = machine.blocks[(first + b) % count]->warps;
      const size_t first_warp = machine.random() % warps.size();
      for (size_t w = 0; w < warps.size(); ++w) {
        Warp& warp = warps[(first_warp + w) % warps.size()];
        constexpr double PAUSES[] = {0, 0, 0.5, 0.9, 0.98};  // some warps fall behind, for a while
        if (machine.random() % 64 == 0) warp.pause = PAUSES[machine.random() % 5];
        if (idle > 0 || !machine.happens(warp.pause)) run_warp(warp);
      }
    }
    if (turns != before) {
      idle = 0;
    } else if (++idle > 1 && !machine.loads.empty()) {
      arrive(machine.random() % machine.loads.size());
    } else if (idle > PATIENCE && !machine.failed) {
      report_deadlock();
      machine.failed = true;
    }
  }
}

void record(const char* format, va_list arguments) {
  char text[600];
  vsnprintf(text, sizeof(text), format, arguments);
  std::string kind;  // errors that differ by their numbers only are told once
  for (const char* c = text; *c; ++c)
    if (*c < '0' || *c > '9') kind += *c;
  if (machine.errors[kind]++ > 0 || machine.errors.size() > MOST_ERRORS) return;
  if (current) {
    machine.report +=
        "block " + std::to_string(current->block->number) + ", thread " + std::to_string(current->number) + " ";
    machine.report += location(*current, static_cast<void* const*>(__builtin_frame_address(0))) + ": ";
  }
  machine.report += std::string(text) + "\n";
}

}  // namespace

unsigned Machine::random() {  // xorshift
  random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
  return static_cast<unsigned>(random_state >> 32);
}
bool Machine::happens(double probability) { return probability > 0 && random() < probability * 0x1p32; }

void wait_while(const unsigned& word, unsigned value, const char* where, unsigned operand) {
  if (word != value) return;
  current->word = &word, current->value = value, current->where = where, current->operand = operand;
  yield();
}

void spin(const char* where) {
  current->spins = true, current->where = where, current->operand = 0;
  yield();
}

void exit_thread() {
  end_thread(*current);
  current->done = true;
  --current->block->alive;
  ++turns;
  for (;;) yield();
}

void error(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  record(format, arguments);
  va_end(arguments);
}

void fatal(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  record(format, arguments);
  va_end(arguments);
  machine.failed = true;
  for (;;) yield();
}

bool join_collective(const char* name, void* arguments) {
  Warp& warp = *current->warp;
  if (warp.arrived == 0)
    warp.collective = name;
  else if (strcmp(warp.collective, name) != 0)
    fatal("the lanes of a warp diverge: some are at %s, some at %s", warp.collective, name);
  warp.arguments[current->number % LANES] = arguments;
  if (++warp.arrived == LANES) return true;
  wait_while(warp.generation, warp.generation, name);
  return false;
}

void* const* collective_arguments() { return current->warp->arguments; }

int lane() { return current->number % LANES; }

void finish_collective() {
  current->warp->arrived = 0;
  ++current->warp->generation;
}

}  // namespace emulator

// Runs a kernel; returns what went wrong, or "".  `ranges`: begin and length of what bulk copies may touch in global
// memory.
extern "C" const char* emulator_launch(void (*kernel)(const void*), const void* kernel_params, unsigned bytes_of_params,
                                       unsigned grid, unsigned threads, unsigned shared_bytes, unsigned resident,
                                       int timing, uint64_t seed, const uint64_t* ranges, int count) {
  using namespace emulator;
  static std::string report;
  std::vector<unsigned char> storage(bytes_of_params + 64);
  unsigned char* const aligned = storage.data() + (-reinterpret_cast<uintptr_t>(storage.data()) & 63);
  memcpy(aligned, kernel_params, bytes_of_params);
  entry = kernel, params = aligned;
  machine = Machine{};
  machine.timing = static_cast<Timing>(timing);
  machine.random_state = (seed + 1) * 0x9E3779B97F4A7C15u;
  for (int i = 0; i < count; ++i)
    machine.ranges.push_back({reinterpret_cast<const char*>(ranges[2 * i]), ranges[2 * i + 1]});
  gridDim = {grid, 1, 1}, blockDim = {threads, 1, 1};
  run(grid, threads, shared_bytes, resident);
  for (const auto& block : machine.blocks) end_block(*block);  // those of a kernel that failed
  machine.blocks.clear();
  report = machine.report;
  return report.c_str();
}
