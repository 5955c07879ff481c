// Softmax cross-entropy and negative log-likelihood: losses and input gradients.
#include "cross_entropy.h"

#include <atomic>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/caches.h"
#include "cpu/common.h"
#include "cpu/intrinsics.h"
#include "cpu/scratch.h"

#define MANUAL_OPS_KERNELS "cpu/cross_entropy_kernels.h"
#include "cpu/each_isa.h"

namespace manual_ops {

namespace {

// Rows of classes that are contiguous (a matrix, channels_last) are cut into blocks of about this many logits: enough
// to pay for the call, few enough to share 128 rows of 1000 among threads. And of this many rows at most.
constexpr int64_t kLogitsPerBlock = 8192, kRowsPerBlock = 256;

// The rows as blocks. A block lies within one sample and, where classes are `pitch` > 1 apart, within one image. The
// cut depends on the shape alone, and sums add up block by block, so that the number of threads does not show in the
// bits.
struct RowBlocks : Rows {
  int64_t block_rows, groups, group_rows, group_blocks;

  struct Block {
    int64_t index, sample, row, offset;  // offset: of the block's first logit
    int64_t count;
  };

  RowBlocks(const Sizes& sizes, const Sizes& sample_shape, bool channels_last,
            int64_t logits_per_block = kLogitsPerBlock)
      : Rows(sizes, sample_shape, channels_last) {
    groups = strided ? images : samples;  // blocks do not cross from one group into the next
    group_rows = groups == 0 ? 0 : rows / groups;
    block_rows = strided ? plain::kBlock
                         : std::clamp<int64_t>(logits_per_block / std::max<int64_t>(1, classes), 1, kRowsPerBlock);
    group_blocks = (group_rows + block_rows - 1) / block_rows;
  }

  int64_t blocks() const { return groups * group_blocks; }

  // body(block, scratch), with room for two slices a lane.
  template <class A, class Body>
  void for_each_block(const Body& body) const {
    parallel_for(blocks(), 16 * block_rows * std::max<int64_t>(1, classes), [&](int64_t begin, int64_t end) {
      const Scratch<A> scratch(2 * classes * (strided ? plain::kBlock : 1));
      for (int64_t index = begin; index < end; ++index) {
        const int64_t group = index / group_blocks, first = index % group_blocks * block_rows;
        const int64_t row = group * group_rows + first;
        const int64_t offset = strided ? group * classes * pixels + first : row * classes;
        body(Block{index, row / (rows / samples), row, offset, std::min(block_rows, group_rows - first)},
             scratch.data());
      }
    });
  }

  // The sum of a sample's blocks, in their order.
  double sum(const std::vector<double>& partial, int64_t sample) const {
    const int64_t count = blocks() / samples;
    double total = 0;
    for (int64_t index = 0; index < count; ++index) total += partial[sample * count + index];
    return total;
  }
};

// Remembers the first target that is no class, for an exception after the parallel loop.
class TargetCheck {
 public:
  TargetCheck(const Tensor& target, int64_t classes, int64_t ignore_index)
      : target_(is_distribution(target) ? nullptr : data<int64_t>(target)),
        classes_(classes),
        ignore_index_(ignore_index) {}

  bool passes(const RowBlocks::Block& block) {
    const auto is_wrong = [this](int64_t t) {
      return (static_cast<uint64_t>(t) >= static_cast<uint64_t>(classes_)) & (t != ignore_index_);
    };
    const int64_t* const targets = target_ + block.row;
    int wrong = 0;  // without a branch, as nearly every block is right
    for (int64_t i = 0; i < block.count; ++i) wrong += is_wrong(targets[i]);
    if (wrong == 0) return true;
    for (int64_t row = block.row; row < block.row + block.count; ++row) {
      if (!is_wrong(target_[row])) continue;
      int64_t first = first_.load();
      while (row < first && !first_.compare_exchange_weak(first, row)) {
      }
      return false;
    }
    return true;
  }

  void raise(const char* op) const {
    if (first_ == kNone) return;
    throw std::out_of_range(std::string(op) + ": target " + std::to_string(target_[first_]) + " is out of bounds for " +
                            std::to_string(classes_) + " classes");
  }

 private:
  static constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  const int64_t* target_;
  int64_t classes_, ignore_index_;
  std::atomic<int64_t> first_{kNone};
};

// One weight per class, for all samples or for each, and their sums; ones where there is none.
template <class T>
struct ClassWeight {
  using A = accumulate_t<T>;
  std::vector<A> values, sums;
  int64_t classes;

  ClassWeight(const std::optional<Tensor>& weight_any, const RowBlocks& rows) : classes(rows.classes) {
    if (!weight_any.has_value()) {
      values.assign(classes, A(1));
      sums.push_back(static_cast<A>(classes));
      return;
    }
    const Tensor weight = as_contiguous(*weight_any);
    check_class_weight(weight, rows);
    values.resize(weight.numel());
    const T* given = data<T>(weight);
    for (size_t at = 0; at < values.size(); ++at) values[at] = static_cast<A>(given[at]);
    for (size_t first = 0; first < values.size(); first += classes) {
      A sum = 0;
      for (int64_t c = 0; c < classes; ++c) sum += values[first + c];
      sums.push_back(sum);
    }
  }

  int64_t set(int64_t sample) const { return sums.size() > 1 ? sample : 0; }
  const A* of(int64_t sample) const { return values.data() + set(sample) * classes; }
  A sum_of(int64_t sample) const { return sums.empty() ? A(0) : sums[set(sample)]; }
};

template <class Body>
void for_target(const Tensor& target, double label_smoothing, const Body& body) {
  if (is_distribution(target)) return body(std::integral_constant<Target, Target::distribution>{});
  if (label_smoothing > 0) return body(std::integral_constant<Target, Target::smoothed_index>{});
  return body(std::integral_constant<Target, Target::index>{});
}

// Losses of rows, as they are or summed up per sample; the sum's denominator beside it.
template <class T>
class Losses {
 public:
  using A = accumulate_t<T>;

  Losses(const RowBlocks& rows, const std::string& reduction, const Tensor& loss, const Tensor& denominator)
      : rows_(rows),
        reduced_(reduction != "none"),
        mean_(reduction == "mean"),
        loss_(mutable_data<T>(loss)),
        denominator_(mutable_data<A>(denominator)),
        partial_(reduced_ ? rows.blocks() : 0),
        partial_weight_(mean_ ? rows.blocks() : 0) {}

  // `target` is null for distributions, whose rows weigh one each.
  void add(const RowBlocks::Block& block, const A* row_loss, const int64_t* target, const A* weight,
           int64_t ignore_index) {
    if (!reduced_) {
      for (int64_t i = 0; i < block.count; ++i) loss_[block.row + i] = static_cast<T>(row_loss[i]);
      return;
    }
    // Four sums in turn, which do not wait for each other.
    const auto sum = [&block](const auto& value) {
      double sums[4] = {};
      int64_t i = 0;
      for (; i + 4 <= block.count; i += 4)
        for (int lane = 0; lane < 4; ++lane) sums[lane] += value(i + lane);
      for (; i < block.count; ++i) sums[0] += value(i);
      return (sums[0] + sums[1]) + (sums[2] + sums[3]);
    };
    partial_[block.index] = sum([&](int64_t i) { return static_cast<double>(row_loss[i]); });
    if (!mean_) return;
    partial_weight_[block.index] = sum([&](int64_t i) -> double {
      if (target == nullptr) return rows_.classes > 0;  // as torch: no classes, no rows
      const int64_t t = target[block.row + i];
      return t == ignore_index ? A(0) : weight[t];
    });
  }

  void finish() {
    for (int64_t sample = 0; sample < rows_.samples; ++sample) {
      const double weight = mean_ ? rows_.sum(partial_weight_, sample) : 1.0;
      denominator_[sample] = static_cast<A>(weight);
      if (reduced_) loss_[sample] = static_cast<T>(static_cast<A>(rows_.sum(partial_, sample) / weight));
    }
  }

 private:
  const RowBlocks& rows_;
  bool reduced_, mean_;
  T* loss_;
  A* denominator_;
  std::vector<double> partial_, partial_weight_;
};

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(const Tensor& input_any, const Tensor& target_any,
                                                         const std::optional<Tensor>& weight_any,
                                                         const std::string& reduction, const Sizes& samples,
                                                         int64_t ignore_index, double label_smoothing) {
  const CrossEntropyOperands operands(input_any, target_any);
  const Tensor &input = operands.input, &target = operands.target;
  const RowBlocks rows(sizes_of(input), samples, operands.channels_last);
  check_rows(target, rows);
  const CrossEntropyResults made(input, reduction, samples);
  const Tensor lse = made.new_lse(input);

  for_floating_dtype(input.scalar_type(), "cross_entropy", [&](auto scalar) {
    using T = decltype(scalar);
    using A = accumulate_t<T>;
    const ClassWeight<T> weight(weight_any, rows);
    const A soft = static_cast<A>(label_smoothing / std::max<int64_t>(1, rows.classes));
    Losses<T> losses(rows, reduction, made.loss, made.denominator);
    A *maxima = mutable_data<A>(lse), *log_sums = maxima + rows.rows;
    for_target(target, label_smoothing, [&](auto kind) {
      constexpr Target kTarget = kind;
      constexpr bool indexed = kTarget != Target::distribution;
      TargetCheck check(target, rows.classes, ignore_index);
      rows.for_each_block<A>([&](const RowBlocks::Block& block, A* scratch) {
        if (indexed && !check.passes(block)) return;
        const A* w = weight.of(block.sample);
        const Smoothing<A> smoothing{static_cast<A>(1 - label_smoothing), soft, weight.sum_of(block.sample),
                                     ignore_index};
        const auto* t = static_cast<const std::conditional_t<indexed, int64_t, T>*>(target.const_data_ptr()) +
                        (indexed ? block.row : block.offset);
        A row_loss[kRowsPerBlock];
        if (rows.strided) {
          MANUAL_OPS_FOR_ISA(cross_entropy_block<kTarget>(data<T>(input) + block.offset, t, w, smoothing, rows.classes,
                                                          rows.pitch, static_cast<int>(block.count), row_loss,
                                                          maxima + block.row, log_sums + block.row, scratch));
        } else {
          MANUAL_OPS_FOR_ISA(cross_entropy_rows<kTarget>(data<T>(input) + block.offset, t, w, smoothing, block.count,
                                                         rows.classes, row_loss, maxima + block.row,
                                                         log_sums + block.row, scratch));
        }
        if constexpr (indexed)
          losses.add(block, row_loss, data<int64_t>(target), w, ignore_index);
        else
          losses.add(block, row_loss, nullptr, w, ignore_index);
      });
      if (indexed) check.raise("cross_entropy");
    });
    losses.finish();
  });
  return {made.loss, lse, made.denominator};
}

// The gradient of every row's loss, for a block.
template <class T>
class RowGrad {
 public:
  using A = accumulate_t<T>;

  RowGrad(const Tensor& grad_output, const Tensor& denominator, const std::string& reduction, const RowBlocks& rows)
      : grad_output_(as_contiguous(grad_output)),
        denominator_(as_contiguous(denominator)),
        reduced_(reduction != "none") {
    check_row_grad(grad_output_, denominator_, reduced_, rows);
  }

  void of(const RowBlocks::Block& block, A* row_grad) const {
    const T* grad = data<T>(grad_output_);
    if (!reduced_) {
      for (int64_t i = 0; i < block.count; ++i) row_grad[i] = static_cast<A>(grad[block.row + i]);
      return;
    }
    const A same = static_cast<A>(grad[block.sample]) / data<A>(denominator_)[block.sample];
    for (int64_t i = 0; i < block.count; ++i) row_grad[i] = same;
  }

 private:
  Tensor grad_output_, denominator_;
  bool reduced_;
};

Tensor cross_entropy_input_grad(const Tensor& grad_output, const Tensor& input_any, const Tensor& target_any,
                                const std::optional<Tensor>& weight_any, const Tensor& lse_any,
                                const Tensor& denominator, const std::string& reduction, const Sizes& samples,
                                int64_t ignore_index, double label_smoothing) {
  const CrossEntropyOperands operands(input_any, target_any);
  const Tensor &input = operands.input, &target = operands.target;
  const RowBlocks rows(sizes_of(input), samples, operands.channels_last);
  check_rows(target, rows);
  const Tensor lse = as_contiguous(lse_any);
  check_lse(lse, rows);
  const Tensor grad_input = new_tensor(sizes_of(input), input.scalar_type(), input, operands.channels_last);

  for_floating_dtype(input.scalar_type(), "cross_entropy", [&](auto scalar) {
    using T = decltype(scalar);
    using A = accumulate_t<T>;
    const ClassWeight<T> weight(weight_any, rows);
    const RowGrad<T> row_grads(grad_output, denominator, reduction, rows);
    const A soft = static_cast<A>(label_smoothing / std::max<int64_t>(1, rows.classes));
    const A *maxima = data<A>(lse), *log_sums = maxima + rows.rows;
    const bool past_caches = elementwise_goes_past_caches<T>(input.numel());
    for_target(target, label_smoothing, [&](auto kind) {
      constexpr Target kTarget = kind;
      constexpr bool indexed = kTarget != Target::distribution;
      TargetCheck check(target, rows.classes, ignore_index);
      rows.for_each_block<A>([&](const RowBlocks::Block& block, A* scratch) {
        if (indexed && !check.passes(block)) return;
        const A* w = weight.of(block.sample);
        const Smoothing<A> smoothing{static_cast<A>(1 - label_smoothing), soft, weight.sum_of(block.sample),
                                     ignore_index};
        const auto* t = static_cast<const std::conditional_t<indexed, int64_t, T>*>(target.const_data_ptr()) +
                        (indexed ? block.row : block.offset);
        A row_grad[kRowsPerBlock];
        row_grads.of(block, row_grad);
        T* out = mutable_data<T>(grad_input) + block.offset;
        if (rows.strided) {
          MANUAL_OPS_FOR_ISA(cross_entropy_input_grad_block<kTarget>(
              row_grad, data<T>(input) + block.offset, t, w, smoothing, rows.classes, rows.pitch,
              static_cast<int>(block.count), maxima + block.row, log_sums + block.row, out, scratch, past_caches));
        } else {
          MANUAL_OPS_FOR_ISA(cross_entropy_input_grad_rows<kTarget>(
              row_grad, data<T>(input) + block.offset, t, w, smoothing, block.count, rows.classes, maxima + block.row,
              log_sums + block.row, out, scratch));
        }
      });
      if (indexed) check.raise("cross_entropy");
    });
  });
  return grad_input;
}

std::tuple<Tensor, Tensor> nll_loss_forward(const Tensor& input_any, const Tensor& target_any,
                                            const std::optional<Tensor>& weight_any, const std::string& reduction,
                                            const Sizes& samples, int64_t ignore_index) {
  STD_TORCH_CHECK(!is_distribution(target_any), "nll_loss: target must hold int64 indices");
  const CrossEntropyOperands operands(input_any, target_any);
  const Tensor &input = operands.input, &target = operands.target;
  // One logit of a row is read: blocks of as many rows as there may be.
  const RowBlocks rows(sizes_of(input), samples, operands.channels_last, kRowsPerBlock * input.size(1));
  check_rows(target, rows);
  const CrossEntropyResults made(input, reduction, samples);
  for_floating_dtype(input.scalar_type(), "nll_loss", [&](auto scalar) {
    using T = decltype(scalar);
    using A = accumulate_t<T>;
    const ClassWeight<T> weight(weight_any, rows);
    Losses<T> losses(rows, reduction, made.loss, made.denominator);
    TargetCheck check(target, rows.classes, ignore_index);
    const int64_t between_rows = rows.strided ? 1 : rows.classes;
    rows.for_each_block<A>([&](const RowBlocks::Block& block, A*) {
      if (!check.passes(block)) return;
      const A* w = weight.of(block.sample);
      const T* x = data<T>(input) + block.offset;
      const int64_t* targets = data<int64_t>(target) + block.row;
      A row_loss[kRowsPerBlock];
      for (int64_t i = 0; i < block.count; ++i) {
        const int64_t t = targets[i];
        row_loss[i] = t == ignore_index ? A(0) : -w[t] * static_cast<A>(x[i * between_rows + t * rows.pitch]);
      }
      losses.add(block, row_loss, data<int64_t>(target), w, ignore_index);
    });
    check.raise("nll_loss");
    losses.finish();
  });
  return {made.loss, made.denominator};
}

Tensor nll_loss_input_grad(const Tensor& grad_output, const Tensor& target_any, const std::optional<Tensor>& weight_any,
                           const Tensor& denominator, int64_t classes, const std::string& reduction,
                           const Sizes& samples, int64_t ignore_index) {
  STD_TORCH_CHECK(!is_distribution(target_any) && target_any.dim() >= 1, "nll_loss: target must hold int64 indices");
  const Tensor target = as_contiguous(target_any);
  Sizes sizes = sizes_of(target);
  sizes.insert(sizes.begin() + 1, classes);
  // Blocks of 128 KiB of float32, for memset: it writes long runs without reading them first.
  const RowBlocks rows(sizes, samples, false, 4 * kLogitsPerBlock);
  const Tensor grad_input = new_tensor(sizes, grad_output.scalar_type(), grad_output);
  for_floating_dtype(grad_output.scalar_type(), "nll_loss", [&](auto scalar) {
    using T = decltype(scalar);
    using A = accumulate_t<T>;
    const ClassWeight<T> weight(weight_any, rows);
    const RowGrad<T> row_grads(grad_output, denominator, reduction, rows);
    TargetCheck check(target, classes, ignore_index);
    const int64_t between_rows = rows.strided ? 1 : classes;
    rows.for_each_block<A>([&](const RowBlocks::Block& block, A*) {
      if (!check.passes(block)) return;
      const A* w = weight.of(block.sample);
      T* out = mutable_data<T>(grad_input) + block.offset;
      A row_grad[kRowsPerBlock];
      row_grads.of(block, row_grad);
      if (rows.strided) {
        for (int64_t c = 0; c < classes; ++c) std::memset(out + c * rows.pitch, 0, block.count * sizeof(T));
      } else {
        std::memset(out, 0, block.count * classes * sizeof(T));
      }
      const int64_t* targets = data<int64_t>(target) + block.row;
      for (int64_t i = 0; i < block.count; ++i) {
        const int64_t t = targets[i];
        if (t != ignore_index) out[i * between_rows + t * rows.pitch] = static_cast<T>(-row_grad[i] * w[t]);
      }
    });
    check.raise("nll_loss");
  });
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(manual_ops, CPU, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&cross_entropy_forward));
  m.impl("cross_entropy_input_grad", TORCH_BOX(&cross_entropy_input_grad));
  m.impl("nll_loss_forward", TORCH_BOX(&nll_loss_forward));
  m.impl("nll_loss_input_grad", TORCH_BOX(&nll_loss_input_grad));
}

}  // namespace manual_ops
