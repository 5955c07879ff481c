// How threads share the slices of a tensor (outer, classes, inner), a slice being the classes of a row or of a pixel.
//
// A team of threads works on a slice. Each thread holds a chunk of K packs of N neighbours in registers, and a slice
// takes as many chunks as it needs (a single one, known so to the compiler, where the team is kWhole). Where the
// classes are neighbours in memory (inner = 1) a team is
//   - lanes of a warp, one to all 32 of them, for short rows: packs lie along the classes;
//   - a block, for longer rows: the packs are those of memory, the first and the last of a row may be in part its own.
// Where pixels are neighbours, the threads of a block form `lanes` lines along them, so that accesses coalesce: a
// thread has the N slices of its pack, and the threads of a column are the team. Where there are few slices with very
// many classes, each is cut in parts, for blocks of their own.
#pragma once

#include <algorithm>
#include <iterator>
#include <limits>

#include "cuda/cu.h"

namespace manual_ops {

// A lane of a short row has so many values: lanes for more rows then fit the multiprocessor.
constexpr int kFewValues = 8;
// Values of a row's chunk, where a thread holds `streams` of them at a time: 128 bytes, as they are computed with. A
// column's chunk has half of them, to leave registers for what a thread knows of each of its slices. Arithmetic in
// double takes the registers itself.
template <class T, int streams>
constexpr int kChunkValues = std::is_same_v<T, double> ? kFewValues : 32 / streams;
template <class T>
constexpr int kColumnPack = kWidest<T> < 4 ? kWidest<T> : 4;

// Division of a slice's number, in 32 bits where all of them fit.
class SliceDivider {
 public:
  SliceDivider() = default;
  SliceDivider(int64_t divisor, int64_t slices)
      : divisor_(divisor), narrow_(slices < index_limit() ? divisor : 1), is_narrow_(slices < index_limit()) {}
  CU_DEVICE int64_t quotient(int64_t value) const {
    return is_narrow_ ? narrow_.quotient(static_cast<int32_t>(value)) : value / divisor_;
  }

 private:
  int64_t divisor_ = 1;
  Divider<int32_t> narrow_{1};
  bool is_narrow_ = true;
};

// What the threads of a launch are told. Slices form groups, each summed up by itself: no block works on two of them.
struct SliceWork {
  int64_t group_slices, classes, inner;
  SliceDivider by_inner;
  int64_t part;      // classes of a part, of which there are gridDim.y
  int64_t tiles;     // of a group: what its blocks work on in turn
  int group_blocks;  // blocks of a group
  int lanes;         // threads of a team
  int misalignment;  // of a tensor's first element, in elements
};

// A row, by `lanes` threads. `kShared`: its first and last pack may be shared with other rows, or be outside the
// tensor.
template <int N, int K, bool kShared>
class RowTeam {
 public:
  static constexpr int kPack = N, kPacks = K, kSlices = 1;

  CU_DEVICE RowTeam(const SliceWork& work, int64_t group, int64_t in_group, int lane, int lanes)
      : lane_(lane), lanes_(lanes), group_(group), slice_(group * work.group_slices + in_group) {
    const int64_t first = slice_ * work.classes;
    const int shared = kShared ? static_cast<int>((first + work.misalignment) & (N - 1)) : 0;
    class_offset_ = static_cast<int64_t>(blockIdx.y) * work.part - shared;
    offset_ = first + class_offset_;
    active_ = in_group < work.group_slices;
    begin_ = blockIdx.y == 0 ? shared : 0;
    const int64_t rest = work.classes - class_offset_;
    end_ = active_ ? static_cast<int>(rest < work.part ? rest : work.part) : 0;
  }

  CU_DEVICE int64_t group() const { return group_; }
  CU_DEVICE bool leads() const { return active_ && lane_ == 0; }
  CU_DEVICE int lane() const { return lane_; }
  CU_DEVICE int lanes() const { return lanes_; }
  CU_DEVICE bool has_slices() const { return active_; }
  CU_DEVICE int64_t slice(int) const { return slice_; }
  // A class of the slice, as an element of the tensor.
  CU_DEVICE int64_t element(int, int64_t index) const { return offset_ - class_offset_ + index; }

  CU_DEVICE int chunks() const { return (end_ + lanes_ * K * N - 1) / (lanes_ * K * N); }
  // The position among the part's classes of the j-th value in the k-th pack; the part may end before it.
  CU_DEVICE int position(int chunk, int k, int j) const { return ((chunk * K + k) * lanes_ + lane_) * N + j; }
  CU_DEVICE bool holds(int position) const { return position < end_ && (!kShared || position >= begin_); }
  // The class at position 0.
  CU_DEVICE int64_t class_offset() const { return class_offset_; }
  // The position of a class, -1 if it is in another part.
  CU_DEVICE int position_of(int64_t index) const {
    const int64_t position = index - class_offset_;
    return position >= 0 && position < end_ ? static_cast<int>(position) : -1;
  }

  // The chunk's values, `neutral` where there is none.
  template <class T, class A>
  CU_DEVICE void load_chunk(const T* from, int chunk, A neutral, A (&values)[K][N]) const {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int first = position(chunk, k, 0);
      if (is_whole(first)) {
        const Pack<T, N> pack = load<N>(from + offset_ + first);
#pragma unroll
        for (int j = 0; j < N; ++j) values[k][j] = static_cast<A>(pack.at[j]);
      } else {
#pragma unroll
        for (int j = 0; j < N; ++j)
          values[k][j] = kShared && holds(first + j) ? static_cast<A>(from[offset_ + first + j]) : neutral;
      }
    }
  }
  template <class T, class A>
  CU_DEVICE void store_chunk(T* to, int chunk, const A (&values)[K][N]) const {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int first = position(chunk, k, 0);
      if (is_whole(first)) {
        Pack<T, N> pack;
#pragma unroll
        for (int j = 0; j < N; ++j) pack.at[j] = static_cast<T>(values[k][j]);
        store<N>(to + offset_ + first, pack);
      } else if (kShared) {
#pragma unroll
        for (int j = 0; j < N; ++j)
          if (holds(first + j)) to[offset_ + first + j] = static_cast<T>(values[k][j]);
      }
    }
  }

 private:
  CU_DEVICE bool is_whole(int first) const { return kShared ? first >= begin_ && first + N <= end_ : first < end_; }

  int lane_, lanes_;
  int64_t group_, slice_, class_offset_, offset_;  // offset_: of position 0, in elements
  bool active_;
  int begin_, end_;  // positions of the part's classes
};

template <int N, int K>
class WarpTeam : public RowTeam<N, K, false> {
 public:
  static constexpr int kThreads = 256, kBlocks = N == 1 || N * K > kFewValues ? 3 : 4;
  static constexpr bool kWhole = true;

  CU_DEVICE WarpTeam(const SliceWork& work, int64_t group, int64_t tile)
      : RowTeam<N, K, false>(work, group, (tile * blockDim.x + threadIdx.x) / work.lanes, threadIdx.x % work.lanes,
                             work.lanes) {}

  CU_DEVICE int chunks() const { return 1; }

  // Every thread of the team gets the result. `neutral` changes nothing.
  template <class A, class Combine>
  CU_DEVICE void reduce(A (&value)[1], A, Combine combine) const {
    for (int distance = this->lanes() / 2; distance > 0; distance /= 2)
      value[0] = combine(value[0], __shfl_xor_sync(kAllLanes, value[0], distance));
  }
};

template <int N, int K>
class BlockTeam : public RowTeam<N, K, true> {
 public:
  static constexpr int kThreads = 384, kBlocks = 2;
  static constexpr bool kWhole = false;

  CU_DEVICE BlockTeam(const SliceWork& work, int64_t group, int64_t tile)
      : RowTeam<N, K, true>(work, group, tile, threadIdx.x, blockDim.x) {}

  template <class A, class Combine>
  CU_DEVICE void reduce(A (&value)[1], A neutral, Combine combine) const {
    value[0] = block_reduce(value[0], neutral, combine);
  }
};

// N neighbouring slices, by the threads of one column of the block.
template <int N, int K>
class ColumnTeam {
 public:
  static constexpr int kThreads = 256, kBlocks = N == 1 || K < 4 ? 3 : 4, kPack = N, kPacks = K, kSlices = N;
  static constexpr bool kWhole = false;

  CU_DEVICE ColumnTeam(const SliceWork& work, int64_t group, int64_t tile)
      : lanes_(work.lanes), width_(blockDim.x / work.lanes), group_(group), inner_(work.inner) {
    lane_ = threadIdx.x / width_;
    const int64_t in_group = (tile * width_ + threadIdx.x % width_) * N;
    slice_ = group * work.group_slices + in_group;
    const int64_t outer = work.by_inner.quotient(slice_);
    first_ = outer * work.classes * inner_ + (slice_ - outer * inner_);
    class_offset_ = static_cast<int64_t>(blockIdx.y) * work.part;
    active_ = in_group < work.group_slices;
    const int64_t rest = work.classes - class_offset_;
    end_ = active_ ? static_cast<int>(rest < work.part ? rest : work.part) : 0;
  }

  CU_DEVICE int64_t group() const { return group_; }
  CU_DEVICE bool leads() const { return active_ && lane_ == 0; }
  CU_DEVICE int lane() const { return lane_; }
  CU_DEVICE int lanes() const { return lanes_; }
  CU_DEVICE bool has_slices() const { return active_; }
  CU_DEVICE int64_t slice(int j) const { return slice_ + j; }
  CU_DEVICE int64_t element(int j, int64_t index) const { return first_ + j + index * inner_; }

  CU_DEVICE int chunks() const { return (end_ + lanes_ * K - 1) / (lanes_ * K); }
  CU_DEVICE int position(int chunk, int k, int) const { return (chunk * K + k) * lanes_ + lane_; }
  CU_DEVICE bool holds(int position) const { return position < end_; }
  CU_DEVICE int64_t class_offset() const { return class_offset_; }
  CU_DEVICE int position_of(int64_t index) const {
    const int64_t position = index - class_offset_;
    return position >= 0 && position < end_ ? static_cast<int>(position) : -1;
  }

  template <class T, class A>
  CU_DEVICE void load_chunk(const T* from, int chunk, A neutral, A (&values)[K][N]) const {
    int64_t at = element(0, class_offset_ + position(chunk, 0, 0));
#pragma unroll
    for (int k = 0; k < K; ++k, at += lanes_ * inner_) {
      if (holds(position(chunk, k, 0))) {
        const Pack<T, N> pack = load<N>(from + at);
#pragma unroll
        for (int j = 0; j < N; ++j) values[k][j] = static_cast<A>(pack.at[j]);
      } else {
#pragma unroll
        for (int j = 0; j < N; ++j) values[k][j] = neutral;
      }
    }
  }
  template <class T, class A>
  CU_DEVICE void store_chunk(T* to, int chunk, const A (&values)[K][N]) const {
    int64_t at = element(0, class_offset_ + position(chunk, 0, 0));
#pragma unroll
    for (int k = 0; k < K; ++k, at += lanes_ * inner_) {
      if (!holds(position(chunk, k, 0))) break;
      Pack<T, N> pack;
#pragma unroll
      for (int j = 0; j < N; ++j) pack.at[j] = static_cast<T>(values[k][j]);
      store<N>(to + at, pack);
    }
  }

  template <class A, class Combine>
  CU_DEVICE void reduce(A (&value)[N], A, Combine combine) const {
    CU_SHARED(A, shared, [kThreads * N]);
    if (lanes_ == 1) return;
    __syncthreads();  // the values of an earlier call have been read
    put(shared, value);
    for (int half = lanes_ / 2; half > 0; half /= 2) {
      __syncthreads();
      if (lane_ >= half) continue;
      const Pack<A, N> other = load<N>(shared + (threadIdx.x + half * width_) * N);
#pragma unroll
      for (int j = 0; j < N; ++j) value[j] = combine(value[j], other.at[j]);
      put(shared, value);
    }
    __syncthreads();
    const Pack<A, N> result = load<N>(shared + threadIdx.x % width_ * N);
#pragma unroll
    for (int j = 0; j < N; ++j) value[j] = result.at[j];
  }

 private:
  template <class A>
  CU_DEVICE void put(A* shared, const A (&value)[N]) const {
    Pack<A, N> pack;
#pragma unroll
    for (int j = 0; j < N; ++j) pack.at[j] = value[j];
    store<N>(shared + threadIdx.x * N, pack);
  }

  int lane_, lanes_, width_;
  int64_t group_, slice_, inner_, first_, class_offset_;  // first_: of the first slice's first class, in elements
  bool active_;
  int end_;
};

// body(team) for the tiles that the block works on in turn.
template <class Team, class Body>
CU_DEVICE void for_each_tile(const SliceWork& work, Body&& body) {
  const int64_t group = blockIdx.x / work.group_blocks;
  for (int64_t tile = blockIdx.x % work.group_blocks; tile < work.tiles; tile += work.group_blocks)
    body(Team(work, group, tile));
}

// 32-bit registers of a value that is computed with: blocks of doubles get the registers of as many others.
template <class Operation>
constexpr int kWords = sizeof(typename Operation::A) / 4;

// kBlocks: how many must fit a multiprocessor, which bounds the registers of a thread.
template <class Team, class Operation>
__global__ void __launch_bounds__(Team::kThreads, (Team::kBlocks + kWords<Operation> - 1) / kWords<Operation>)
    slices_kernel(SliceWork work, Operation operation) {
  operation.template run<Team>(work);
}

// ---- on the host

struct SliceShape {
  int64_t groups, group_slices, classes, inner;
};

enum class TeamKind { small_warp, large_warp, unaligned_warp, block, column, unaligned_column };

// How the slices of a tensor are shared.
struct SlicePlan {
  SliceWork work{};
  TeamKind team{};
  unsigned blocks = 0, parts = 1, threads = 0;
};

// Blocks that keep a large device busy: smaller ones are cut for fewer.
constexpr int64_t kEnoughBlocks = 512;
// Values of a part at least: a part costs a launch and scratch.
constexpr int64_t kPartValues = 8192;
// Positions in a part are counted in 32 bits.
constexpr int64_t kLongestPart = int64_t{1} << 30;

// For operations that sum nothing over slices: as many blocks as there are tiles.
constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

inline int next_power_of_2(int64_t value) {
  int power = 1;
  while (power < value) power *= 2;
  return power;
}

// At most `most_blocks` share the tiles of all groups, or one block a group.
inline void set_blocks(SlicePlan& plan, int64_t groups, int64_t tile_slices, int64_t most_blocks) {
  SliceWork& work = plan.work;
  work.tiles = (work.group_slices + tile_slices - 1) / tile_slices;
  const int64_t most = std::max<int64_t>(1, std::min(most_blocks, kIndexLimit) / std::max<int64_t>(1, groups));
  work.group_blocks = static_cast<int>(std::min(work.tiles, most));
  plan.blocks = static_cast<unsigned>(groups * work.group_blocks);
}

// `pointers`: the tensors that are read or written chunk by chunk.
template <class T, int streams, class... Pointers>
SlicePlan plan_slices(const SliceShape& shape, int64_t most_blocks, Pointers... pointers) {
  constexpr int kWide = kWidest<T>, kMany = kChunkValues<T, streams>;
  const auto& [groups, group_slices, classes, inner] = shape;
  SlicePlan plan;
  SliceWork& work = plan.work;
  work.group_slices = group_slices;
  work.classes = classes;
  work.inner = inner;
  work.by_inner = SliceDivider(inner, groups * group_slices);
  int64_t tile_slices, part_multiple = 1;
  if (inner > 1) {
    constexpr int kPack = kColumnPack<T>;
    const bool aligned = inner % kPack == 0 && all_aligned(sizeof(T) * kPack, pointers...);
    plan.team = aligned ? TeamKind::column : TeamKind::unaligned_column;
    const int pack = aligned ? kPack : 1, packs = aligned ? kMany / kPack / 2 : kFewValues;
    work.lanes = next_power_of_2(std::min<int64_t>(32, (classes + packs - 1) / packs));
    int64_t width = 256 / work.lanes;
    const auto blocks = [&] { return groups * ((group_slices + width * pack - 1) / (width * pack)); };
    while (width > 8 && width * work.lanes > kWarp && blocks() < kEnoughBlocks) width /= 2;
    tile_slices = width * pack;
    plan.threads = static_cast<unsigned>(width * work.lanes);
  } else {
    const uintptr_t phases[] = {reinterpret_cast<uintptr_t>(pointers) % (sizeof(T) * kWide)...};
    const bool one_phase = std::count(std::begin(phases), std::end(phases), phases[0]) == std::ssize(phases);
    const bool aligned = one_phase && phases[0] == 0 && classes % kWide == 0;
    if (classes <= (aligned ? kMany : kFewValues) * kWarp) {
      const bool few = classes <= kFewValues * kWarp;
      plan.team = !aligned ? TeamKind::unaligned_warp : few ? TeamKind::small_warp : TeamKind::large_warp;
      const int values = few ? kFewValues : kMany;
      work.lanes = next_power_of_2((classes + values - 1) / values);
      plan.threads = 256;
      while (plan.threads > kWarp && groups * group_slices * work.lanes / plan.threads < kEnoughBlocks)
        plan.threads /= 2;
      tile_slices = plan.threads / work.lanes;
    } else if (one_phase) {
      plan.team = TeamKind::block;
      work.misalignment = static_cast<int>(phases[0] / sizeof(T));
      part_multiple = kWide;
      plan.threads = static_cast<unsigned>(std::min<int64_t>(384, round_up((classes + kMany - 1) / kMany, kWarp)));
      tile_slices = 1;
    } else {  // a column of all threads, whose neighbours are classes
      plan.team = TeamKind::unaligned_column;
      plan.threads = work.lanes = 256;
      tile_slices = 1;
    }
  }
  set_blocks(plan, groups, tile_slices, most_blocks);

  const int64_t positions = classes + part_multiple - 1;  // with those of a pack that is shared with the row before
  int64_t parts = (positions + kLongestPart - 1) / kLongestPart;
  if (plan.blocks > 0 && 2 * plan.blocks <= kEnoughBlocks)
    parts = std::max(parts, std::min(kEnoughBlocks / plan.blocks, tile_slices * classes / kPartValues));
  parts = std::max<int64_t>(parts, 1);
  work.part = round_up((positions + parts - 1) / parts, part_multiple);
  plan.parts = static_cast<unsigned>(parts);
  return plan;
}

template <class Team, class Operation>
void launch_team(const CudaGuard& guard, const SlicePlan& plan, const Operation& operation) {
  if (plan.blocks == 0) return;
  CU_LAUNCH(guard, (slices_kernel<Team, Operation>), dim3(plan.blocks, plan.parts), plan.threads, 0, plan.work,
            operation);
}

// Operation::run<Team>(work) for every block. `Operation::kStreams` tensors are read at a time.
template <class T, class Operation>
void launch_slices(const CudaGuard& guard, const SlicePlan& plan, const Operation& operation) {
  constexpr int kWide = kWidest<T>, kMany = kChunkValues<T, Operation::kStreams>, kColumn = kColumnPack<T>;
  switch (plan.team) {
    case TeamKind::small_warp:
      return launch_team<WarpTeam<kWide, kFewValues / kWide>>(guard, plan, operation);
    case TeamKind::large_warp:
      return launch_team<WarpTeam<kWide, kMany / kWide>>(guard, plan, operation);
    case TeamKind::unaligned_warp:
      return launch_team<WarpTeam<1, kFewValues>>(guard, plan, operation);
    case TeamKind::block:
      return launch_team<BlockTeam<kWide, kMany / kWide>>(guard, plan, operation);
    case TeamKind::column:
      return launch_team<ColumnTeam<kColumn, kMany / kColumn / 2>>(guard, plan, operation);
    case TeamKind::unaligned_column:
      return launch_team<ColumnTeam<1, kFewValues>>(guard, plan, operation);
  }
}

// For launches that read no chunks: single slices, by `lanes` threads each.
inline SlicePlan plan_of_lookup(const SliceShape& shape, int64_t most_blocks, int lanes) {
  const auto& [groups, group_slices, classes, inner] = shape;
  SlicePlan plan;
  plan.team = TeamKind::unaligned_column;
  plan.threads = 256;
  SliceWork& work = plan.work;
  work.group_slices = group_slices;
  work.classes = classes;
  work.inner = inner;
  work.by_inner = SliceDivider(inner, groups * group_slices);
  work.lanes = lanes;
  set_blocks(plan, groups, 256 / lanes, most_blocks);
  return plan;
}

// ---- slices in parts

enum class Stage { whole, part, merge };

// What teams leave of the parts that they worked on, `numbers` for each slice and part.
template <class A>
struct Parts {
  Stage stage = Stage::whole;
  A* numbers = nullptr;
  int count = 1;

  // The i-th of `size` numbers.
  CU_DEVICE A& at(int64_t slice, int part, int i, int size) const { return numbers[(slice * count + part) * size + i]; }
};

template <class A>
Tensor scratch_of_parts(const SliceShape& shape, const SlicePlan& plan, int size, const Tensor& like) {
  return new_tensor({shape.groups * shape.group_slices * plan.parts * size}, scalar_type_of<A>(), like);
}

}  // namespace manual_ops
