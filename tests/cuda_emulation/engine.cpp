// Fibers, the scheduler, barriers, meetings of warps, and the shared memory of a block.
#include "engine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "checker.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define WITH_ASAN(...) __VA_ARGS__
#else
#define WITH_ASAN(...)
#endif

#pragma GCC visibility push(hidden)

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Saves the callee-saved registers of x86-64 on one stack, and goes on with those on another.
extern "C" void emulation_switch_stacks(void** from, void* to);
asm(R"(.text
.globl emulation_switch_stacks
.hidden emulation_switch_stacks
.type emulation_switch_stacks,@function
emulation_switch_stacks:
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
.size emulation_switch_stacks,.-emulation_switch_stacks
)");

namespace emulation {

namespace {

constexpr int kWarpSize = 32, kMostThreads = 1024;
constexpr size_t kStackBytes = 128 << 10, kArenaBytes = 512 << 10, kRedzone = 64;
constexpr size_t kSharedLimit = 227 << 10, kStaticSharedLimit = 48 << 10;  // of an H100
constexpr unsigned char kUnwritten = 0xff, kForbidden = 0xfd;              // all ones is NaN in every floating dtype

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* sanitizer_state = nullptr;
};

struct Thread {
  uint3 index;
  int number;
  Fiber* fiber = nullptr;
  bool done = false;
  const char* waiting_in = "";
  Where where;
  unsigned mask = 0;
};

// Lanes of one warp that wait for each other.
struct Meeting {
  unsigned mask, arrived = 0, to_leave;
  const char* operation;
  Where where;
  bool complete = false;
  Lane lanes[kWarpSize];
};

struct Warp {
  unsigned lanes = 0, exited = 0;
  std::vector<std::unique_ptr<Meeting>> meetings;
};

enum class Order { forward, reverse, shuffled };

class Engine {
 public:
  void run(void (*thread)(void*), void* arguments, dim3 grid, dim3 block, size_t shared_bytes, const char* name);
  [[noreturn]] void fail_launch(std::string message);
  bool running() const { return running_; }

  void* place(SharedVariable& variable);
  void* dynamic_shared(Where where);
  unsigned lane() const { return current_->number % kWarpSize; }
  int barrier(int predicate, Where where);
  const Lane* meet(unsigned mask, const char* operation, const void* value, size_t bytes, Where where);

 private:
  static void thread_main();
  void make_memory();
  void make_threads(dim3 block);
  void run_block(size_t shared_bytes);
  void run_threads();
  void finish_thread(Thread& thread);
  void wait(Thread& thread, const char* in, Where where, unsigned mask);
  void wake(Thread& thread) { ready_.push_back(&thread); }
  Fiber* next_fiber();
  Fiber* idle_fiber();
  void prepare(Fiber& fiber);
  void switch_to(Fiber* fiber);
  void make_current(Thread& thread);
  size_t carve(size_t bytes, size_t alignment, const char* name);
  void fill(size_t offset, size_t bytes, unsigned char value);
  void check_redzones();
  std::string deadlock() const;
  Warp& warp_of(const Thread& thread) { return warps_[thread.number / kWarpSize]; }

  std::mutex one_launch_;
  bool running_ = false;
  std::string error_;

  Order order_ = Order::forward;
  std::mt19937 random_;
  void (*body_)(void*) = nullptr;
  void* arguments_ = nullptr;

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<int> start_order_;
  size_t started_ = 0, done_ = 0;
  std::deque<Thread*> ready_;
  Thread* current_ = nullptr;

  Fiber host_;
  Fiber* active_ = &host_;
  Fiber* previous_ = nullptr;
  const void* host_stack_ = nullptr;
  size_t host_stack_bytes_ = 0;
  char* stacks_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;

  std::vector<Thread*> at_barrier_;
  Where barrier_where_;
  int barrier_predicates_ = 0, barrier_result_ = 0;

  char* arena_ = nullptr;
  size_t arena_top_ = 0, static_bytes_ = 0, dynamic_offset_ = 0, dynamic_bytes_ = 0;
  uint64_t block_number_ = 0;
  std::vector<std::pair<size_t, size_t>> redzones_;
};

Engine engine;

std::string text(const Where& where) {
  const char* slash = strrchr(where.file_name(), '/');
  return std::string(slash ? slash + 1 : where.file_name()) + ":" + std::to_string(where.line());
}

// ---- fibers

void Engine::prepare(Fiber& fiber) {
  auto* top = reinterpret_cast<void**>(fiber.stack + kStackBytes - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&Engine::thread_main);  // where the first switch returns to
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.stack_pointer = top;
  fiber.sanitizer_state = nullptr;
}

Fiber* Engine::idle_fiber() {
  if (idle_.empty()) {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack = stacks_ + fibers_.size() * kStackBytes;
    mprotect(fiber->stack, 4096, PROT_NONE);  // an overflow is a crash, not another thread's variables
    prepare(*fiber);
    idle_.push_back(fiber.get());
    fibers_.push_back(std::move(fiber));
  }
  Fiber* fiber = idle_.back();
  idle_.pop_back();
  return fiber;
}

void Engine::switch_to(Fiber* to) {
  Fiber* from = active_;
  active_ = to;
  previous_ = from;
  WITH_ASAN(__sanitizer_start_switch_fiber(&from->sanitizer_state, to == &host_ ? host_stack_ : to->stack,
                                           to == &host_ ? host_stack_bytes_ : kStackBytes);)
  emulation_switch_stacks(&from->stack_pointer, to->stack_pointer);
  WITH_ASAN(__sanitizer_finish_switch_fiber(from->sanitizer_state, nullptr, nullptr);)
}

void Engine::make_current(Thread& thread) {
  current_ = &thread;
  threadIdx = thread.index;
  checker().set_thread(thread.number);
}

// Who runs when the active fiber cannot go on: a thread that was woken, one that has not begun, else the host.
Fiber* Engine::next_fiber() {
  if (!ready_.empty()) {
    if (order_ == Order::shuffled) std::swap(ready_.front(), ready_[random_() % ready_.size()]);
    Thread* thread = ready_.front();
    ready_.pop_front();
    return thread->fiber;
  }
  return started_ < threads_.size() ? idle_fiber() : &host_;
}

void Engine::wait(Thread& thread, const char* in, Where where, unsigned mask) {
  thread.waiting_in = in;
  thread.where = where;
  thread.mask = mask;
  switch_to(next_fiber());
  make_current(thread);
}

void Engine::thread_main() {
  WITH_ASAN({
    const void* stack;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
    if (engine.previous_ == &engine.host_) {
      engine.host_stack_ = stack;
      engine.host_stack_bytes_ = bytes;
    }
  })
  engine.run_threads();
}

// A fiber's life: it runs threads that have not begun, as long as none that waited can go on.
void Engine::run_threads() {
  for (;;) {
    while (started_ < threads_.size()) {
      Thread& thread = threads_[start_order_[started_++]];
      thread.fiber = active_;
      make_current(thread);
      body_(arguments_);
      finish_thread(thread);
      if (!ready_.empty()) break;
    }
    Fiber* self = active_;
    idle_.push_back(self);
    Fiber* next = next_fiber();
    if (next != self) switch_to(next);
  }
}

void Engine::finish_thread(Thread& thread) {
  thread.done = true;
  ++done_;
  Warp& warp = warp_of(thread);
  const unsigned lane_bit = 1u << (thread.number % kWarpSize);
  warp.exited |= lane_bit;
  for (const auto& meeting : warp.meetings)
    if (!meeting->complete && (meeting->mask & lane_bit))
      fail("%s: %s with mask 0x%08x waits for lane %d, which has exited", text(meeting->where).c_str(),
           meeting->operation, meeting->mask, thread.number % kWarpSize);
}

// ---- shared memory

void Engine::make_memory() {
  if (arena_ != nullptr) return;
  const auto map = [](size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("emulation: no memory");
    return static_cast<char*>(memory);
  };
  arena_ = map(kArenaBytes);
  stacks_ = map(kMostThreads * kStackBytes);
  checker().set_arena(arena_, kArenaBytes);
  checker().set_stacks(stacks_, kMostThreads * kStackBytes);
}

void Engine::fill(size_t offset, size_t bytes, unsigned char value) {
  WITH_ASAN(__asan_unpoison_memory_region(arena_ + offset, bytes);)
  memset(arena_ + offset, value, bytes);
  if (value != kForbidden) return;
  redzones_.emplace_back(offset, bytes);
  WITH_ASAN(__asan_poison_memory_region(arena_ + offset, bytes);)
}

size_t Engine::carve(size_t bytes, size_t alignment, const char* name) {
  const size_t offset = (arena_top_ + alignment - 1) / alignment * alignment, end = offset + bytes;
  const size_t zone = kRedzone + (64 - end % 64) % 64;
  if (end + zone > kArenaBytes) fail("no room in shared memory for '%s'", name);
  fill(arena_top_, offset - arena_top_, kForbidden);
  fill(offset, bytes, kUnwritten);
  fill(end, zone, kForbidden);
  arena_top_ = end + zone;
  checker().add_variable(offset, bytes, name);
  return offset;
}

void* Engine::place(SharedVariable& variable) {
  if (variable.block != block_number_) {
    variable.address = arena_ + carve(variable.bytes, std::max<size_t>(16, variable.alignment), variable.name);
    variable.block = block_number_;
    static_bytes_ += variable.bytes;
    if (static_bytes_ > kStaticSharedLimit) fail("%zu bytes of static shared memory are over 48 KiB", static_bytes_);
  }
  return variable.address;
}

void* Engine::dynamic_shared(Where where) {
  if (dynamic_bytes_ == 0) fail("%s: the kernel was launched without dynamic shared memory", text(where).c_str());
  return arena_ + dynamic_offset_;
}

// The redzones catch what a build without the checker writes past a variable.
void Engine::check_redzones() {
  for (const auto& [offset, bytes] : redzones_) {
    WITH_ASAN(__asan_unpoison_memory_region(arena_ + offset, bytes);)
    for (size_t i = offset; i < offset + bytes && error_.empty(); ++i)
      if (static_cast<unsigned char>(arena_[i]) != kForbidden)
        error_ = "out-of-bounds write to shared memory, next to " + checker().variable_at(i);
  }
  redzones_.clear();
}

// ---- where threads meet

int Engine::barrier(int predicate, Where where) {
  Thread& thread = *current_;
  if (at_barrier_.empty()) {
    barrier_where_ = where;
    barrier_predicates_ = 0;
  } else if (barrier_where_.line() != where.line()) {
    fail("divergent barrier: a thread is at %s while %zu wait at %s", text(where).c_str(), at_barrier_.size(),
         text(barrier_where_).c_str());
  }
  barrier_predicates_ += predicate;
  at_barrier_.push_back(&thread);
  if (at_barrier_.size() < threads_.size()) {
    wait(thread, "__syncthreads", where, 0);
    return barrier_result_;
  }
  barrier_result_ = barrier_predicates_;
  checker().barrier();
  for (Thread* waiting : at_barrier_)
    if (waiting != &thread) wake(*waiting);
  at_barrier_.clear();
  return barrier_result_;
}

const Lane* Engine::meet(unsigned mask, const char* operation, const void* value, size_t bytes, Where where) {
  Thread& thread = *current_;
  Warp& warp = warp_of(thread);
  const int lane = thread.number % kWarpSize;
  if (!(mask >> lane & 1))
    fail("%s: lane %d calls %s with mask 0x%08x, which does not name it", text(where).c_str(), lane, operation, mask);
  if (mask & ~warp.lanes)
    fail("%s: the mask 0x%08x of %s names lanes that do not exist", text(where).c_str(), mask, operation);
  if (mask & warp.exited)
    fail("%s: the mask 0x%08x of %s names lanes that have exited", text(where).c_str(), mask, operation);

  Meeting* meeting = nullptr;
  for (const auto& open : warp.meetings)
    if (!open->complete && open->mask == mask) meeting = open.get();
  if (meeting == nullptr) {
    warp.meetings.push_back(std::make_unique<Meeting>());
    meeting = warp.meetings.back().get();
    meeting->mask = mask;
    meeting->to_leave = static_cast<unsigned>(__builtin_popcount(mask));
    meeting->operation = operation;
    meeting->where = where;
  } else if (strcmp(meeting->operation, operation) != 0 || meeting->where.line() != where.line()) {
    fail("divergent warp: lane %d is in %s at %s while others wait in %s at %s", lane, operation, text(where).c_str(),
         meeting->operation, text(meeting->where).c_str());
  }
  if (bytes > 0) memcpy(meeting->lanes[lane].bytes, value, bytes);
  meeting->arrived |= 1u << lane;
  if (meeting->arrived != mask) {
    wait(thread, operation, where, mask);
  } else {
    meeting->complete = true;
    checker().warp_met(thread.number / kWarpSize);
    for (int other = 0; other < kWarpSize; ++other)
      if ((mask >> other & 1) && other != lane) wake(threads_[thread.number / kWarpSize * kWarpSize + other]);
  }
  static Lane result[kWarpSize];
  memcpy(result, meeting->lanes, sizeof(result));
  if (--meeting->to_leave == 0) std::erase_if(warp.meetings, [&](const auto& other) { return other.get() == meeting; });
  return result;
}

// ---- launches

std::string Engine::deadlock() const {
  std::map<std::string, int> places;
  for (const Thread& thread : threads_) {
    char mask[24] = "";
    if (thread.mask) snprintf(mask, sizeof(mask), " (mask 0x%08x)", thread.mask);
    ++places[thread.done ? "exited"
                         : std::string("waiting in ") + thread.waiting_in + mask + " at " + text(thread.where)];
  }
  std::string message = "deadlock:";
  for (const auto& [where, count] : places) message += " " + std::to_string(count) + " threads " + where + ";";
  return message;
}

void Engine::fail_launch(std::string message) {
  error_ = std::move(message);
  if (current_ != nullptr)
    error_ += " [block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
              std::to_string(blockIdx.z) + "), thread " + std::to_string(current_->number) + "]";
  switch_to(&host_);
  __builtin_unreachable();
}

void Engine::make_threads(dim3 block) {
  const unsigned count = block.x * block.y * block.z;
  threads_.assign(count, Thread{});
  warps_.clear();
  warps_.resize((count + kWarpSize - 1) / kWarpSize);
  start_order_.resize(count);
  for (unsigned i = 0; i < count; ++i) {
    threads_[i].index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    threads_[i].number = static_cast<int>(i);
    warps_[i / kWarpSize].lanes |= 1u << (i % kWarpSize);
    start_order_[i] = static_cast<int>(order_ == Order::reverse ? count - 1 - i : i);
  }
}

void Engine::run_block(size_t shared_bytes) {
  ++block_number_;
  started_ = done_ = 0;
  arena_top_ = static_bytes_ = 0;
  current_ = nullptr;
  if (order_ == Order::shuffled) std::shuffle(start_order_.begin(), start_order_.end(), random_);
  for (Thread& thread : threads_) thread.done = false;
  for (Warp& warp : warps_) warp.exited = 0;
  checker().begin_block(warps_.size());
  fill(0, kRedzone, kForbidden);
  arena_top_ = kRedzone;
  dynamic_bytes_ = shared_bytes;
  if (shared_bytes > 0) dynamic_offset_ = carve(shared_bytes, 1024, "dynamic shared memory");
  checker().watch(true);
  switch_to(idle_fiber());
  checker().watch(false);
  if (error_.empty() && done_ != threads_.size()) error_ = deadlock();
  check_redzones();
}

void Engine::run(void (*thread)(void*), void* arguments, dim3 grid, dim3 block, size_t shared_bytes, const char* name) {
  const std::lock_guard<std::mutex> guard(one_launch_);
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads < 1 || threads > kMostThreads || block.z > 64 || grid.x < 1 || grid.y < 1 || grid.z < 1 ||
      grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || shared_bytes > kSharedLimit)
    throw std::runtime_error(std::string("emulation: a launch that a GPU refuses: ") + name);
  make_memory();
  const char* order = getenv("CUDA_EMULATION_ORDER");  // forward, reverse, or a number that seeds a random order
  order_ = order == nullptr || strcmp(order, "forward") == 0 ? Order::forward
           : strcmp(order, "reverse") == 0                   ? Order::reverse
                                                             : Order::shuffled;
  if (order_ == Order::shuffled) random_.seed(static_cast<unsigned>(atoi(order)));
  body_ = thread;
  arguments_ = arguments;
  gridDim = grid;
  blockDim = block;
  error_.clear();
  make_threads(block);
  checker().begin_launch();
  running_ = true;
  for (unsigned z = 0; z < grid.z && error_.empty(); ++z)
    for (unsigned y = 0; y < grid.y && error_.empty(); ++y)
      for (unsigned x = 0; x < grid.x && error_.empty(); ++x) {
        blockIdx = {x, y, z};
        run_block(shared_bytes);
      }
  running_ = false;
  if (error_.empty()) return;
  // The fibers are given up where they stand: kernels own nothing that would have to be released.
  idle_.clear();
  for (const auto& fiber : fibers_) {
    WITH_ASAN(__asan_unpoison_memory_region(fiber->stack + 4096, kStackBytes - 4096);)
    prepare(*fiber);
    idle_.push_back(fiber.get());
  }
  ready_.clear();
  at_barrier_.clear();
  throw std::runtime_error(std::string("emulation: kernel ") + name + ": " + error_);
}

}  // namespace

void* place(SharedVariable& variable) { return engine.place(variable); }
void* dynamic_shared(Where where) { return engine.dynamic_shared(where); }
unsigned lane() { return engine.lane(); }
int barrier(int predicate, Where where) { return engine.barrier(predicate, where); }
const Lane* meet(unsigned mask, const char* operation, const void* value, size_t bytes, Where where) {
  return engine.meet(mask, operation, value, bytes, where);
}

#ifdef CUDA_EMULATION_CHECK
void note_atomic(const void* address, size_t bytes) { checker().access(address, bytes, bytes, true, true); }
#else
void note_atomic(const void*, size_t) {}
#endif

void begin_operation() { checker().begin_operation(); }
void add_range(const void* begin, size_t bytes, bool writable) {
  checker().add_range(static_cast<const char*>(begin), bytes, writable);
}

bool wide_indices() {
  const char* wide = getenv("CUDA_EMULATION_WIDE");
  return wide != nullptr && strcmp(wide, "1") == 0;
}

void fail(const char* format, ...) {
  char message[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof(message), format, arguments);
  va_end(arguments);
  if (!engine.running()) throw std::runtime_error(message);
  engine.fail_launch(message);
}

void run(void (*thread)(void*), void* arguments, dim3 grid, dim3 block, size_t shared_bytes, const char* name) {
  engine.run(thread, arguments, grid, block, shared_bytes, name);
}

}  // namespace emulation

#pragma GCC visibility pop
