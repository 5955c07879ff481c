// Convolution by register-blocked tiles, for any shape.
//
// Scratch memory: the weight once more, in the accumulation type and with its channels filled up to whole vectors, or,
// of few pixels, one panel of it in each thread; and in each thread what a block copies and sums, which
// choose_blocking() keeps below 192 KB where its least columns and channels allow it. A weight gradient takes its sums,
// of one weight or at most kPartBytes, those of one part in the threads that make them, and in each thread the copies
// of one block or at most kBatchBytes.
#include <utility>

#include "cpu/caches.h"
#include "cpu/convolution/convolution.h"
#include "cpu/intrinsics.h"
#include "cpu/scratch.h"

#define MANUAL_OPS_KERNELS "cpu/convolution/dense_kernels.h"
#include "cpu/each_isa.h"

namespace manual_ops {

namespace {

// The weight gradient is summed in at most so many parts, each over blocks of its own, and the parts are added in their
// order. Each part is as large as the weight: together they may take this many bytes, and each has so many pixels, for
// it is written and read once more.
constexpr int64_t kParts = 8, kPartBytes = 16 << 20, kPartPixels = 512;
// Blocks whose sums are larger than this go together, their copies taking at most so many bytes.
constexpr int64_t kGradientInCache = 512 << 10, kBatchBytes = 4 << 20;

struct Panels {
  int64_t width, count, step;  // columns of one, panels of a group, elements of one

  template <class A>
  static Panels of(const Gather& plan, A) {
    Panels panels;
    MANUAL_OPS_FOR_ISA(panel_width<A>(plan.channels, panels.width));
    panels.count = (plan.channels + panels.width - 1) / panels.width;
    panels.step = plan.taps() * plan.source_channels * panels.width;
    return panels;
  }
};

// The source channels of a plan that counts pairs of them.
Gather in_pairs(Gather plan) {
  plan.source_channels /= 2;
  return plan;
}

// The blocks block_of(0) .. block_of(count - 1), each at most as large as the blocking's. The plan counts source
// channels in E.
template <class E, class T, class BlockOf>
void gather_blocks(const Gather& plan, const WeightLayout& layout, const T* source, const T* weight, const T* bias,
                   T* destination, const Blocking& blocking, bool direct, int64_t count, const BlockOf& block_of) {
  using A = accumulate_t<T>;
  const Panels panels = Panels::of(plan, A{});
  const std::vector<int64_t> offsets = tap_offsets(plan, layout.window);
  const int64_t padded = panels.count * panels.width;
  const std::vector<A> bias_of_panels = padded_bias(plan, bias, padded);
  const bool past_caches =
      goes_past_caches(destination, plan.batch * plan.destination.image * sizeof(T), plan.channels * sizeof(T));
  const bool far_sources = plan.batch * plan.source.image * static_cast<int64_t>(sizeof(T)) >= kCachedBytes;
  const int64_t staged_values = std::is_same_v<E, A> ? 0 : 2 * kPairsAtOnce * plan.taps() * panels.width;
  const int64_t source_values = copied_values(plan, blocking), pixels = blocking.rows * blocking.columns;

  const auto pack = [&](int64_t group, int64_t panel, A* staged, E* to) {
    MANUAL_OPS_FOR_ISA(pack_weight(plan, layout, offsets.data(), weight + group * layout.group, panel, staged, to));
  };
  const auto gather = [&](const Block& block, Range some, const E* packed, E* sources, A* sums, Run* runs) {
    MANUAL_OPS_FOR_ISA(gather_block(plan, blocking, block, some, direct, source, packed,
                                    bias == nullptr ? nullptr : bias_of_panels.data() + block.group * padded,
                                    destination, past_caches, far_sources, sources, sums, runs));
  };

  const int64_t copied = count * source_values * ceil_div(plan.source_channels, blocking.source_channels);
  if (plan.groups == 1 && panels.count > 1 && copied <= panels.step) {
    // The sources are less than one panel of the weight: each panel is packed where it is multiplied, and they are
    // copied again for it. Threads that would have none share a panel's blocks.
    const int64_t shares = std::min<int64_t>(count, ceil_div(torch::stable::get_num_threads(), panels.count));
    const int64_t work = panels.step * (1 + count * pixels / shares / 16);
    parallel_for(panels.count * shares, work, [&](int64_t begin, int64_t end) {
      const Scratch<E> packed(panels.step), sources(direct ? 0 : source_values);
      const Scratch<A> staged(staged_values), sums(pixels * panels.width);
      const Scratch<Run> runs(plan.taps());
      for (int64_t index = begin; index < end; ++index) {
        const int64_t panel = index / shares, share = index % shares;
        if (index == begin || share == 0) pack(0, panel, staged.data(), packed.data());
        for (int64_t block = count * share / shares; block < count * (share + 1) / shares; ++block)
          gather(block_of(block), {panel, panel + 1}, packed.data(), sources.data(), sums.data(), runs.data());
      }
    });
    return;
  }

  const Scratch<E> packed(plan.groups * panels.count * panels.step);
  parallel_for(plan.groups * panels.count, panels.step, [&](int64_t begin, int64_t end) {
    const Scratch<A> staged(staged_values);
    for (int64_t index = begin; index < end; ++index)
      pack(index / panels.count, index % panels.count, staged.data(), packed.data() + index * panels.step);
  });
  parallel_for(count, pixels * panels.step * panels.count / 16, [&](int64_t begin, int64_t end) {
    const Scratch<E> sources(direct ? 0 : source_values);
    const Scratch<A> sums(pixels * padded);
    const Scratch<Run> runs(plan.taps());
    for (int64_t index = begin; index < end; ++index) {
      const Block block = block_of(index);
      gather(block, {0, panels.count}, packed.data() + block.group * panels.count * panels.step, sources.data(),
             sums.data(), runs.data());
    }
  });
}

// Whether the source is read where it is, by a micro-kernel whose operands are made of Part.
template <class Part, class T>
bool reads_in_place(const Gather& plan) {
  return std::is_same_v<T, Part> && plan.source.channel == 1 && rows_need_no_padding(plan);
}

template <class E, class Part, class T>
void gather_all(const Gather& plan, const WeightLayout& layout, const T* source, const T* weight, const T* bias,
                T* destination) {
  using A = accumulate_t<T>;
  const Panels panels = Panels::of(plan, A{});
  const bool direct = reads_in_place<Part, T>(plan);
  const Blocking blocking = choose_blocking(plan, direct, panels.count * panels.width, sizeof(E));
  gather_blocks<E>(plan, layout, source, weight, bias, destination, blocking, direct, blocking.count * plan.groups,
                   [&](int64_t index) { return block_at(plan, blocking, index / plan.groups, index % plan.groups); });
}

}  // namespace

template <class T>
void dense_gather(const Gather& plan, const WeightLayout& layout, const T* source, const T* weight, const T* bias,
                  T* destination) {
  using A = accumulate_t<T>;
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (multiplies_bfloat16() && plan.source_channels % 2 == 0)
      return gather_all<Bfloat16Pair, BFloat16>(in_pairs(plan), layout, source, weight, bias, destination);
  }
  gather_all<A, A>(plan, layout, source, weight, bias, destination);
}

template <class T>
void dense_gather_blocks(const Gather& plan, const WeightLayout& layout, const T* source, const T* weight,
                         const T* bias, T* destination, const std::vector<Block>& blocks) {
  using A = accumulate_t<T>;
  Blocking blocking{0, 0, plan.source_channels, 0, 0, 0};
  for (const Block& block : blocks) {
    blocking.rows = std::max(blocking.rows, block.rows.size());
    blocking.columns = std::max(blocking.columns, block.columns.size());
  }
  gather_blocks<A>(plan, layout, source, weight, bias, destination, blocking, reads_in_place<A, T>(plan),
                   static_cast<int64_t>(blocks.size()), [&](int64_t index) { return blocks[index]; });
}

namespace {

template <class E, class Part, class T>
void weight_grad_of(const Gather& plan, const WeightLayout& layout, const T* input, const T* grad_output,
                    T* grad_weight) {
  using A = accumulate_t<T>;
  const Panels panels = Panels::of(plan, A{});
  const int64_t group_values = panels.count * panels.step, values = plan.groups * group_values;
  const bool direct = reads_in_place<Part, T>(plan);
  const Blocking blocking =
      choose_blocking(plan, direct && std::is_same_v<E, A>, panels.count * panels.width, sizeof(A));
  const int64_t affordable = std::max<int64_t>(1, kPartBytes / std::max<int64_t>(1, values * sizeof(A)));
  const int64_t pixels = blocking.count * blocking.rows * blocking.columns;
  const int64_t parts = std::max<int64_t>(1, std::min({blocking.count, kParts, affordable, pixels / kPartPixels}));
  // Where the parts alone are too few for the threads, they share the panels too, each packing the input again; where
  // the input is less than one panel, so that the panel stays in the cache, each panel is a share.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t copied = copied_values(plan, blocking);
  const int64_t all_copied = blocking.count * copied * ceil_div(plan.source_channels, blocking.source_channels);
  const int64_t shares = parts == 1 && all_copied <= panels.step
                             ? panels.count
                             : std::min(panels.count, ceil_div(threads, parts * plan.groups));
  // A gradient too large for the L2 cache is read and written again for each block: several go together. Only blocks of
  // one width do.
  constexpr bool kPairs = !std::is_same_v<E, A>;
  const int64_t gradients = blocking.rows * blocking.columns * panels.count * panels.width;
  const int64_t block_bytes = (copied + gradients) * (kPairs ? 2 * sizeof(E) : sizeof(A));
  const bool together =
      group_values * static_cast<int64_t>(sizeof(A)) > kGradientInCache && blocking.column_blocks == 1;
  const int64_t batch = together ? std::clamp<int64_t>(kBatchBytes / block_bytes, 1, kMostTogether) : 1;

  const std::vector<int64_t> offsets = tap_offsets(plan, layout.window);
  const auto unpack = [&](int64_t group, int64_t panel, A* from) {
    MANUAL_OPS_FOR_ISA(unpack_panel(from, values, parts, layout.channel_step, layout.source_step, offsets.data(),
                                    plan.taps(), plan.source_channels, plan.channels, panel,
                                    grad_weight + group * layout.group));
  };
  const int64_t share_values = ceil_div(panels.count, shares) * panels.step;
  const Scratch<A> sums_of_parts(parts > 1 ? parts * values : 0);
  const int64_t work = blocking.count * blocking.rows * blocking.columns * panels.step / 16;
  parallel_for(parts * plan.groups * shares, work / parts / shares, [&](int64_t begin, int64_t end) {
    const Scratch<Part> inputs(direct ? 0 : batch * copied), grads(batch * gradients);
    const Scratch<Bfloat16Pair> input_pairs(kPairs ? batch * copied : 0), grad_pairs(kPairs ? batch * gradients : 0);
    const Scratch<A> sums_of_share(parts > 1 ? 0 : share_values);
    const Scratch<Run> runs(batch * blocking.rows);
    std::vector<Block> blocks;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t share = index % shares, group = index / shares % plan.groups, part = index / shares / plan.groups;
      const Range own{panels.count * share / shares, panels.count * (share + 1) / shares};
      A* sums = parts > 1 ? sums_of_parts.data() + part * values + group * group_values + own.begin * panels.step
                          : sums_of_share.data();
      std::fill_n(sums, own.size() * panels.step, A(0));
      const int64_t last = blocking.count * (part + 1) / parts;
      for (int64_t block = blocking.count * part / parts; block < last; block += batch) {
        blocks.clear();
        for (int64_t next = block; next < std::min(block + batch, last); ++next)
          blocks.push_back(block_at(plan, blocking, next, group));
        MANUAL_OPS_FOR_ISA(weight_grad_blocks<E>(
            plan, blocking, blocks.data(), static_cast<int64_t>(blocks.size()), direct, input, grad_output, own.begin,
            own.end, sums,
            {inputs.data(), grads.data(), input_pairs.data(), grad_pairs.data(), copied, gradients, runs.data()}));
      }
      if (parts > 1) continue;
      for (int64_t panel = own.begin; panel < own.end; ++panel)
        unpack(group, panel, sums + (panel - own.begin) * panels.step);
    }
  });
  if (parts == 1) return;
  parallel_for(plan.groups * panels.count, parts * panels.step, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index)
      unpack(index / panels.count, index % panels.count, sums_of_parts.data() + index * panels.step);
  });
}

}  // namespace

template <class T>
void dense_weight_grad(const Gather& plan, const WeightLayout& layout, const T* input, const T* grad_output,
                       T* grad_weight) {
  using A = accumulate_t<T>;
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (multiplies_bfloat16())
      return weight_grad_of<Bfloat16Pair, BFloat16>(plan, layout, input, grad_output, grad_weight);
  }
  weight_grad_of<A, A>(plan, layout, input, grad_output, grad_weight);
}

#define INSTANTIATE(T)                                                                                       \
  template void dense_gather<T>(const Gather&, const WeightLayout&, const T*, const T*, const T*, T*);       \
  template void dense_gather_blocks<T>(const Gather&, const WeightLayout&, const T*, const T*, const T*, T*, \
                                       const std::vector<Block>&);                                           \
  template void dense_weight_grad<T>(const Gather&, const WeightLayout&, const T*, const T*, T*);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)
#undef INSTANTIATE

}  // namespace manual_ops
