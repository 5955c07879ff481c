// In the checked build the kernels are compiled with -fsanitize=thread, and the functions at the end of this file stand
// in for that sanitizer's own library: every load and store of a kernel comes here.
#include "checker.h"

#include <algorithm>

#include "engine.h"

#pragma GCC visibility push(hidden)

namespace emulation {

namespace {

constexpr uint32_t kSeveralThreads = 1u << 30, kAtomic = 1u << 31, kThread = kSeveralThreads - 1;
constexpr uintptr_t kPageBytes = 4096;
constexpr int kWarpSize = 32;

}  // namespace

Checker& checker() {
  static Checker instance;
  return instance;
}

void Checker::set_arena(const char* arena, size_t bytes) {
  arena_ = arena;
  arena_bytes_ = bytes;
  allocated_.resize(bytes);
  shared_.resize(bytes);
}

void Checker::set_stacks(const char* stacks, size_t bytes) {
  stacks_ = stacks;
  stacks_bytes_ = bytes;
}

void Checker::begin_block(size_t warps) {
  block_time_ = ++time_;
  epochs_.assign(warps, ++last_epoch_);
  variables_.clear();
  std::fill(allocated_.begin(), allocated_.end(), 0);
}

void Checker::add_variable(size_t offset, size_t bytes, const char* name) {
  variables_.push_back({offset, bytes, name});
  std::fill_n(allocated_.begin() + offset, bytes, 1);
}

std::string Checker::variable_at(size_t offset) const {
  const Variable* nearest = nullptr;
  for (const Variable& variable : variables_)
    if (variable.offset <= offset && (nearest == nullptr || variable.offset > nearest->offset)) nearest = &variable;
  if (nearest == nullptr) return "no variable";
  return std::string("'") + nearest->name + "' (" + std::to_string(nearest->bytes) + " bytes) at byte " +
         std::to_string(offset - nearest->offset);
}

// Memory that was never named is a kernel argument or a constant; just behind a tensor it is an error all the same.
void Checker::check_global_bounds(const char* address, size_t bytes, bool write, bool& ours) const {
  bool writable = false;
  ours = false;
  for (const Range& range : ranges_) {
    if (address < range.begin || address + bytes > range.begin + range.bytes) continue;
    ours = true;
    writable = writable || range.writable;
  }
  if (ours && write && !writable) fail("write to a tensor that was taken as input");
  if (ours || ranges_.empty()) return;
  if (write) fail("out-of-bounds write of %zu bytes to global memory", bytes);
  for (const Range& range : ranges_)
    if (address + bytes > range.begin && address < range.begin + range.bytes + kPageBytes)
      fail("out-of-bounds read of %zu bytes, %ld bytes into a tensor of %zu", bytes,
           static_cast<long>(address - range.begin), range.bytes);
}

// Whether nothing orders the earlier access, of this launch, before this thread's next one.
bool Checker::unordered(const Access& earlier) const {
  if (earlier.time < block_time_) return true;  // of another block
  if (earlier.time < time_) return false;       // a barrier lies between
  if (earlier.thread & kSeveralThreads) return true;
  const int other = static_cast<int>(earlier.thread & kThread);
  if (other == thread_) return false;
  return other / kWarpSize != thread_ / kWarpSize || earlier.epoch == epochs_[thread_ / kWarpSize];
}

Byte& Checker::global_byte(uintptr_t address) {
  std::vector<Byte>& page = pages_[address / kPageBytes];
  if (page.empty()) page.resize(kPageBytes);
  return page[address % kPageBytes];
}

void Checker::access(const void* pointer, size_t bytes, size_t alignment, bool write, bool atomic) {
  if (!watching_) return;
  const char* address = static_cast<const char*>(pointer);
  if (address >= stacks_ && address < stacks_ + stacks_bytes_) return;  // the thread's own variables
  const char* verb = write ? "write" : "read";
  const auto number = reinterpret_cast<uintptr_t>(address);
  if (number % alignment != 0) fail("misaligned %s of %zu bytes", verb, bytes);

  const bool shared = address >= arena_ && address < arena_ + arena_bytes_;
  const size_t offset = shared ? static_cast<size_t>(address - arena_) : 0;
  if (shared) {
    for (size_t i = offset; i < offset + bytes; ++i)
      if (i >= arena_bytes_ || !allocated_[i])
        fail("out-of-bounds %s of %zu bytes of shared memory, next to %s", verb, bytes, variable_at(i).c_str());
  } else {
    bool ours;
    check_global_bounds(address, bytes, write, ours);
    if (!ours) return;
  }

  const uint32_t began = shared ? block_time_ : launch_time_;
  const Access now{time_, static_cast<uint32_t>(thread_) | (atomic ? kAtomic : 0), epochs_[thread_ / kWarpSize]};
  for (size_t i = 0; i < bytes; ++i) {
    Byte& byte = shared ? shared_[offset + i] : global_byte(number + i);
    const auto where = [&] {
      return shared ? "shared memory " + variable_at(offset + i) : std::string("global memory");
    };
    const bool written = byte.write.time >= began, read = byte.read.time >= began;
    if (shared && !write && !written) fail("read of uninitialised %s", where().c_str());
    if (written && unordered(byte.write) && !(atomic && (byte.write.thread & kAtomic)))
      fail("race: %s of %s after a write by thread %u%s", verb, where().c_str(), byte.write.thread & kThread,
           byte.write.time < block_time_ ? " of another block" : "");
    if (write) {
      if (read && unordered(byte.read) && !(atomic && (byte.read.thread & kAtomic)))
        fail("race: write of %s after a read by thread %u%s", where().c_str(), byte.read.thread & kThread,
             byte.read.time < block_time_ ? " of another block" : "");
      byte.write = now;
      byte.read = {};
    } else if (read && byte.read.time < block_time_) {
      // another block's read stays on record: nothing that this block does can be ordered after it
    } else if (read && byte.read.time == time_ && unordered(byte.read)) {
      byte.read.thread |= kSeveralThreads;
    } else {
      byte.read = now;
    }
  }
}

}  // namespace emulation

#pragma GCC visibility pop

#ifdef CUDA_EMULATION_CHECK

#define HOOK extern "C" __attribute__((visibility("hidden")))
#define READ_WRITE(kind, bytes, alignment)                                                                   \
  HOOK void __tsan_##kind##read##bytes(void* p) { emulation::checker().access(p, bytes, alignment, false); } \
  HOOK void __tsan_##kind##write##bytes(void* p) { emulation::checker().access(p, bytes, alignment, true); }
#define ALIGNED(kind) \
  READ_WRITE(kind, 1, 1) READ_WRITE(kind, 2, 2) READ_WRITE(kind, 4, 4) READ_WRITE(kind, 8, 8) READ_WRITE(kind, 16, 16)
#define UNALIGNED(kind) READ_WRITE(kind, 2, 1) READ_WRITE(kind, 4, 1) READ_WRITE(kind, 8, 1) READ_WRITE(kind, 16, 1)
ALIGNED()
ALIGNED(volatile_)
UNALIGNED(unaligned_)
UNALIGNED(unaligned_volatile_)
HOOK void __tsan_read_range(void* p, size_t bytes) { emulation::checker().access(p, bytes, 1, false); }
HOOK void __tsan_write_range(void* p, size_t bytes) { emulation::checker().access(p, bytes, 1, true); }
HOOK void __tsan_init() {}
HOOK void __tsan_func_entry(void*) {}
HOOK void __tsan_func_exit() {}
HOOK void __tsan_vptr_update(void*, void*) {}
HOOK void __tsan_vptr_read(void*) {}

// The host's own atomics: reference counts of tensors, guards of static variables.
#define ATOMICS(bits, type)                                                                                        \
  HOOK type __tsan_atomic##bits##_load(const volatile type* p, int) { return __atomic_load_n(p, 5); }              \
  HOOK void __tsan_atomic##bits##_store(volatile type* p, type v, int) { __atomic_store_n(p, v, 5); }              \
  HOOK type __tsan_atomic##bits##_exchange(volatile type* p, type v, int) { return __atomic_exchange_n(p, v, 5); } \
  HOOK type __tsan_atomic##bits##_fetch_add(volatile type* p, type v, int) { return __atomic_fetch_add(p, v, 5); } \
  HOOK type __tsan_atomic##bits##_fetch_sub(volatile type* p, type v, int) { return __atomic_fetch_sub(p, v, 5); } \
  HOOK int __tsan_atomic##bits##_compare_exchange_strong(volatile type* p, type* old, type v, int, int) {          \
    return __atomic_compare_exchange_n(p, old, v, 0, 5, 5);                                                        \
  }
ATOMICS(8, unsigned char)
ATOMICS(16, unsigned short)
ATOMICS(32, unsigned)
ATOMICS(64, unsigned long)
HOOK void __tsan_atomic_thread_fence(int) {}

#endif
