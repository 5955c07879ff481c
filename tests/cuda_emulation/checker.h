// Watches every access of a kernel to shared and global memory: bounds, races, reads of what was never written. Without
// CUDA_EMULATION_CHECK it watches nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#pragma GCC visibility push(hidden)

namespace emulation {

// The last write of a byte, and the last read: when, by which thread, and in which epoch of its warp. The clock moves
// at each barrier; a warp's epoch moves when its lanes meet.
struct Access {
  uint32_t time = 0, thread = 0, epoch = 0;
};
struct Byte {
  Access write, read;
};

class Checker {
 public:
  // What the engine tells.
  void set_arena(const char* arena, size_t bytes);
  void set_stacks(const char* stacks, size_t bytes);
  void begin_operation() { ranges_.clear(); }
  void add_range(const char* begin, size_t bytes, bool writable) { ranges_.push_back({begin, bytes, writable}); }
  void begin_launch() { launch_time_ = ++time_; }
  void begin_block(size_t warps);
  void barrier() { ++time_; }
  void warp_met(int warp) { epochs_[warp] = ++last_epoch_; }
  void set_thread(int thread) { thread_ = thread; }
  void watch(bool on) { watching_ = on; }
  void add_variable(size_t offset, size_t bytes, const char* name);
  std::string variable_at(size_t offset) const;

  // What the instrumented kernels tell.
  void access(const void* address, size_t bytes, size_t alignment, bool write, bool atomic = false);

 private:
  struct Range {
    const char* begin;
    size_t bytes;
    bool writable;
  };
  struct Variable {
    size_t offset, bytes;
    const char* name;
  };

  void check_global_bounds(const char* address, size_t bytes, bool write, bool& ours) const;
  bool unordered(const Access& earlier) const;
  Byte& global_byte(uintptr_t address);

  const char* arena_ = nullptr;
  size_t arena_bytes_ = 0;
  const char* stacks_ = nullptr;
  size_t stacks_bytes_ = 0;
  bool watching_ = false;
  int thread_ = 0;
  uint32_t time_ = 1, launch_time_ = 1, block_time_ = 1, last_epoch_ = 1;
  std::vector<uint32_t> epochs_;
  std::vector<Range> ranges_;
  std::vector<Variable> variables_;
  std::vector<uint8_t> allocated_;  // bytes of the arena that belong to a variable
  std::vector<Byte> shared_;
  std::unordered_map<uintptr_t, std::vector<Byte>> pages_;
};

Checker& checker();

}  // namespace emulation

#pragma GCC visibility pop
