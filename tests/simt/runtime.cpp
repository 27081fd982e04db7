// The fibers, the scheduler and the controls behind simt.h. Not itself under sanitizers, for its speed, but part of a
// process under AddressSanitizer: it tells it of the fibers, and memcpy is AddressSanitizer's.
#include "simt.h"

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

Index thread_index{0}, block_index{0}, block_size{0}, grid_size{0};

namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kMaxThreads = 1024;

enum class State { ready, barrier, collective, finished };

// One stack and the place where its owner stopped; the scheduler's own stack has no memory of ours.
struct Context {
  void* stack = nullptr;
  size_t bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
#if defined(__x86_64__)
  void* stopped_at = nullptr;
#else
  ucontext_t stopped_at;
#endif
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber : Context {
  State state = State::finished;
  Index index{0};
  const char* file = nullptr;  // of the barrier that it waits at
  int line = 0;
  Collective kind{};
  unsigned mask = 0;
  uint64_t value = 0;
  int operand = 0;
  std::vector<Copy> copies;       // not waited for
  std::vector<size_t> groups;     // where each committed group of them ends
  size_t waited = 0;              // how many groups were waited for
};

struct SharedBlock {
  void* storage;
  size_t bytes;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<SharedBlock> shared_arrays;
Context scheduler;
Fiber* running = nullptr;
const std::function<void()>* body = nullptr;
int alive = 0, at_barrier = 0;
std::string failure;
std::unique_ptr<unsigned char[]> dynamic_storage;
uint64_t order_seed = 0;
int64_t launch_count = 0;
int64_t shared_bytes_limit = 227 * 1024;

#if defined(__x86_64__)
// Saves what the calling convention asks a callee to keep, changes stacks, restores the other side's.
__attribute__((naked, noinline)) void change_stack(void** /*save rdi*/, void* /*load rsi*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

// Tells AddressSanitizer that `here` runs again. Only the scheduler resumes fibers, on whichever thread called.
void arrived(Context& here) {
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(here.fake_stack, &bottom, &bytes);
  if (&here != &scheduler) {
    scheduler.stack = const_cast<void*>(bottom);
    scheduler.bytes = bytes;
  }
}

void change_context(Context& from, Context& to) {
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.bytes);
#if defined(__x86_64__)
  change_stack(&from.stopped_at, to.stopped_at);
#else
  swapcontext(&from.stopped_at, &to.stopped_at);
#endif
  arrived(from);
}

void release_barrier() {
  const Fiber* first = nullptr;
  for (int t = 0; t < static_cast<int>(block_size.x); ++t) {
    Fiber& fiber = *fibers[t];
    if (fiber.state != State::barrier) continue;
    if (first == nullptr) first = &fiber;
    const bool same_file = fiber.file == first->file || std::strcmp(fiber.file, first->file) == 0;
    if ((fiber.line != first->line || !same_file) && failure.empty())
      failure = "threads wait at different __syncthreads: lines " + std::to_string(first->line) + " and " +
                std::to_string(fiber.line);
    fiber.state = State::ready;
  }
  at_barrier = 0;
}

// Entry of every fiber: one thread of one block per turn of the loop.
void fiber_main() {
  arrived(*running);
  for (;;) {
    Fiber* self = running;
    (*body)();
    self->state = State::finished;
    --alive;
    if (alive > 0 && at_barrier == alive) release_barrier();
    change_context(*self, scheduler);
  }
}

void prepare(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    fiber.bytes = kStackBytes;
    fiber.stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fiber.stack == MAP_FAILED) throw std::bad_alloc();
  }
  __asan_unpoison_memory_region(fiber.stack, fiber.bytes);
  fiber.fake_stack = nullptr;
#if defined(__x86_64__)
  // As change_stack finds it: six registers, the address to return to, and a return address for fiber_main that leaves
  // the stack aligned as after a call.
  void** top = reinterpret_cast<void**>(static_cast<char*>(fiber.stack) + fiber.bytes) - 8;
  std::fill(top, top + 8, nullptr);
  top[6] = reinterpret_cast<void*>(&fiber_main);
  fiber.stopped_at = top;
#else
  getcontext(&fiber.stopped_at);
  fiber.stopped_at.uc_stack.ss_sp = fiber.stack;
  fiber.stopped_at.uc_stack.ss_size = fiber.bytes;
  fiber.stopped_at.uc_link = nullptr;
  makecontext(&fiber.stopped_at, fiber_main, 0);
#endif
}

void resume(Fiber& fiber) {
  running = &fiber;
  thread_index = fiber.index;
  change_context(scheduler, fiber);
}

void pause() {
  Fiber* self = running;
  change_context(*self, scheduler);
}

std::string describe_stop() {
  std::string text = "no thread can go on:";
  int shown = 0;
  for (int t = 0; t < static_cast<int>(block_size.x) && shown < 4; ++t) {
    const Fiber& fiber = *fibers[t];
    if (fiber.state == State::barrier)
      text += " thread " + std::to_string(t) + " waits at __syncthreads, line " + std::to_string(fiber.line) + ";";
    else if (fiber.state == State::collective)
      text += " thread " + std::to_string(t) + " waits in a warp collective;";
    else
      continue;
    ++shown;
  }
  return text + " " + std::to_string(alive) + " of " + std::to_string(block_size.x) + " threads alive";
}

void run_block(std::mt19937_64& random, int64_t shared_bytes) {
  const int threads = static_cast<int>(block_size.x);
  for (const SharedBlock& array : shared_arrays) std::memset(array.storage, 0xff, array.bytes);
  // Allocated anew at its exact size, so that its ends are guarded.
  dynamic_storage.reset(new unsigned char[std::max<int64_t>(shared_bytes, 1)]);
  std::memset(dynamic_storage.get(), 0xff, shared_bytes);
  std::vector<int> order(threads);
  for (int t = 0; t < threads; ++t) {
    order[t] = t;
    fibers[t]->state = State::ready;
    fibers[t]->copies.clear();
    fibers[t]->groups.clear();
    fibers[t]->waited = 0;
    fibers[t]->index.x = static_cast<unsigned>(t);
  }
  std::shuffle(order.begin(), order.end(), random);
  alive = threads;
  at_barrier = 0;
  while (alive > 0 && failure.empty()) {
    bool moved = false;
    for (int t : order) {
      if (fibers[t]->state != State::ready) continue;
      moved = true;
      resume(*fibers[t]);
    }
    if (!moved && failure.empty()) failure = describe_stop();
  }
}

}  // namespace

void barrier(const char* file, int line) {
  running->file = file;
  running->line = line;
  running->state = State::barrier;
  if (++at_barrier == alive) release_barrier();
  pause();
}

void begin_copy(void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes == 0 && reinterpret_cast<uintptr_t>(from) % bytes == 0)
    running->copies.push_back({to, from, bytes});
  else if (failure.empty())
    failure = "a copy of " + std::to_string(bytes) + " bytes at an address that is no multiple of them";
}

void commit_copies() { running->groups.push_back(running->copies.size()); }

void wait_for_copies(size_t pending) {
  Fiber& self = *running;
  while (self.groups.size() > self.waited + pending) {
    const size_t end = self.groups[self.waited];
    for (size_t c = self.waited == 0 ? 0 : self.groups[self.waited - 1]; c < end; ++c)
      std::memcpy(self.copies[c].to, self.copies[c].from, self.copies[c].bytes);
    ++self.waited;
  }
  if (self.waited == self.groups.size() && self.copies.size() == (self.groups.empty() ? 0 : self.groups.back())) {
    self.copies.clear();
    self.groups.clear();
    self.waited = 0;
  }
}

uint64_t collective(Collective kind, unsigned mask, uint64_t value, int operand) {
  Fiber* self = running;
  const int me = lane(), first = static_cast<int>(self->index.x) - me;
  self->kind = kind;
  self->mask = mask;
  self->value = value;
  self->operand = operand;
  self->state = State::collective;
  auto lane_at = [&](int l) { return fibers[first + l].get(); };
  if (!(mask >> me & 1) && failure.empty()) failure = "a thread calls a warp collective whose mask leaves it out";
  bool complete = true;
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    if (first + l >= static_cast<int>(block_size.x) || lane_at(l)->state == State::finished) {
      if (failure.empty()) failure = "the mask of a warp collective names a lane that is not there";
      complete = false;
    } else if (lane_at(l)->state != State::collective || lane_at(l)->kind != kind || lane_at(l)->mask != mask) {
      complete = false;
    }
  }
  if (!complete) {
    pause();
    return self->value;
  }
  uint64_t values[32] = {}, joined = 0;
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    values[l] = lane_at(l)->value;
    if (kind == Collective::ballot) joined |= values[l] << l;
  }
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    Fiber* other = lane_at(l);
    if (kind == Collective::shuffle && !(mask >> other->operand & 1)) {
      if (failure.empty()) failure = "a shuffle reads from a lane outside its mask";
    } else {
      other->value = kind == Collective::shuffle ? values[other->operand] : joined;
    }
    other->state = State::ready;
  }
  return self->value;
}

void* dynamic_shared() { return dynamic_storage.get(); }
void register_shared(void* storage, size_t bytes) {
  std::memset(storage, 0xff, bytes);
  shared_arrays.push_back({storage, bytes});
}
int64_t shared_limit() { return shared_bytes_limit; }

void run(const char* name, int64_t grid, int block, int64_t shared_bytes, const std::function<void()>& kernel) {
  const std::string where = std::string("simt: ") + name + ": ";
  if (grid > 0x7fffffff) throw std::runtime_error(where + "too many blocks");
  if (block < 1 || block > kMaxThreads) throw std::runtime_error(where + "a block of " + std::to_string(block));
  if (shared_bytes > shared_bytes_limit) throw std::runtime_error(where + "too much shared memory");
  ++launch_count;
  while (static_cast<int>(fibers.size()) < block) {
    fibers.push_back(std::make_unique<Fiber>());
    prepare(*fibers.back());
  }
  std::mt19937_64 random(order_seed);
  body = &kernel;
  block_size.x = static_cast<unsigned>(block);
  grid_size.x = static_cast<unsigned>(grid);
  for (int64_t b = 0; b < grid && failure.empty(); ++b) {
    block_index.x = static_cast<unsigned>(b);
    run_block(random, shared_bytes);
  }
  if (!failure.empty()) {
    for (auto& fiber : fibers) prepare(*fiber);  // some stopped in mid-kernel
    throw std::runtime_error(where + "block " + std::to_string(block_index.x) + ": " + std::exchange(failure, ""));
  }
}

}  // namespace simt

#define SIMT_CONTROL extern "C" __attribute__((visibility("default")))

SIMT_CONTROL void simt_set_order(uint64_t seed) { simt::order_seed = seed; }
SIMT_CONTROL void simt_set_shared_limit(int64_t bytes) { simt::shared_bytes_limit = bytes; }
// Launches since the last call.
SIMT_CONTROL int64_t simt_launches() { return std::exchange(simt::launch_count, 0); }
