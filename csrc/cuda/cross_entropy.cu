// Softmax cross-entropy and negative log-likelihood: losses and input gradients; the formulas are those of
// ops/cross_entropy.py.
//
// The logits are read once each way. What a row needs beside them (its target, its target's logit) is looked up by the
// thread that leads its team. Losses add up in double: in each thread over its rows, in each block, and then, by one
// block for each sample of a vmapped batch, over the blocks.
#include "cuda/reduction.h"
#include "cuda/softmax_statistics.h"
#include "cross_entropy.h"

#include <string>
#include <tuple>

namespace manual_ops {

namespace {

// Weights of the classes, for all samples or for each; ones where there are none.
template <class T>
struct ClassWeight {
  const T* values;
  int64_t between_samples;

  CU_DEVICE bool given() const { return values != nullptr; }
  CU_DEVICE accumulate_t<T> of(int64_t sample, int64_t index) const {
    return given() ? static_cast<accumulate_t<T>>(values[sample * between_samples + index]) : accumulate_t<T>(1);
  }
};

// The index of a row's class, or -1 if the row is ignored.
CU_DEVICE int64_t checked_target(const int64_t* target, int64_t row, int64_t classes, int64_t ignore_index) {
  const int64_t index = target[row];
  if (index == ignore_index) return -1;
  CU_ASSERT(0 <= index && index < classes);
  return index;
}

// Where the losses of rows go: to memory as they are, or into the sums of this block.
template <class T>
struct RowLosses {
  using A = accumulate_t<T>;
  T* rows;         // null for the reductions
  double* shares;  // of the losses, then of the weights

  struct Sums {
    double loss = 0, weight = 0;
  };

  CU_DEVICE void add(Sums& sums, int64_t row, A loss, A weight) const {
    if (rows != nullptr) {
      rows[row] = static_cast<T>(loss);
    } else {
      sums.loss += loss;
      sums.weight += weight;
    }
  }
  CU_DEVICE void finish(const Sums& sums) const {
    if (rows != nullptr) return;
    const double loss = block_sum(sums.loss), weight = block_sum(sums.weight);
    if (threadIdx.x == 0) {
      shares[blockIdx.x] = loss;
      shares[gridDim.x + blockIdx.x] = weight;
    }
  }
};

// A block for every sample adds up what `share_count` blocks left. Without `loss`, all denominators are 1.
template <class T>
__global__ void finish_losses_kernel(const double* shares, int64_t share_count, bool mean, T* loss,
                                     accumulate_t<T>* denominator) {
  using A = accumulate_t<T>;
  const int64_t sample = blockIdx.x;
  double weight = 1;
  if (loss != nullptr) {
    const double sum = sum_of_shares(shares + sample * share_count, share_count);
    if (mean) weight = sum_of_shares(shares + (gridDim.x + sample) * share_count, share_count);
    if (threadIdx.x == 0) loss[sample] = static_cast<T>(static_cast<A>(sum / weight));
  }
  if (threadIdx.x == 0) denominator[sample] = static_cast<A>(weight);
}

template <class T, Target kTarget>
struct CrossEntropyForward {
  using A = accumulate_t<T>;
  static constexpr bool kIndexed = kTarget != Target::distribution, kWeighted = kTarget != Target::index;
  static constexpr int kStreams = kWeighted ? 2 : 1, kNumbers = kWeighted ? 4 : 2;

  const T* input;
  const std::conditional_t<kIndexed, int64_t, T>* target;
  ClassWeight<T> weight;
  A hard, soft;
  int64_t ignore_index;
  A *maxima, *log_sums;
  RowLosses<T> losses;
  Parts<A> parts{};

  template <class Team>
  CU_DEVICE void run(const SliceWork& work) const {
    typename RowLosses<T>::Sums sums;
    for_each_tile<Team>(work, [&](const Team& team) {
      SoftmaxStatistics<Team, A, kWeighted> statistics;
      if (!Team::kWhole && parts.stage == Stage::merge) {
        statistics.add_parts(team, parts);
      } else {
        for (int chunk = 0; chunk < team.chunks(); ++chunk) {
          Chunk<Team, A> x, w;
          team.load_chunk(input, chunk, kLowest<A>, x);
          if constexpr (!kIndexed) team.load_chunk(target, chunk, A(0), w);
          statistics.add(x);
          if constexpr (kWeighted) {
            load_factors(team, chunk, w);
            statistics.add_weights(team, chunk, x, w);
          }
        }
      }
      statistics.combine(team);
      if (!Team::kWhole && parts.stage == Stage::part) return statistics.store_part(team, parts);
      statistics.finish();
      if (!team.leads()) return;
#pragma unroll
      for (int v = 0; v < Team::kSlices; ++v) add_row(team, v, work.classes, statistics, sums);
    });
    if (parts.stage != Stage::part) losses.finish(sums);
  }

 private:
  // The target's values become w_c q_c; for an index, the part of it that all classes share: w_c.
  template <class Team>
  CU_DEVICE void load_factors(const Team& team, int chunk, Chunk<Team, A>& w) const {
#pragma unroll
    for (int k = 0; k < Team::kPacks; ++k) {
#pragma unroll
      for (int j = 0; j < Team::kPack; ++j) {
        w[k][j] = kIndexed ? A(1) : hard * w[k][j] + soft;
        const int position = team.position(chunk, k, j);
        if (weight.given() && team.holds(position)) w[k][j] *= weight.of(team.group(), team.class_offset() + position);
      }
    }
  }

  template <class Team, class Statistics>
  CU_DEVICE void add_row(const Team& team, int v, int64_t classes, const Statistics& statistics,
                         typename RowLosses<T>::Sums& sums) const {
    const int64_t row = team.slice(v);
    const A maximum = statistics.maximum[v], log_sum = log(statistics.sum[v]);
    // sum_c of the factors times cost_c, cost_c = log_sum - (x_c - maximum)
    const A expected = kWeighted ? statistics.weight[v] * log_sum - statistics.excess[v] : A(0);
    maxima[row] = maximum;
    log_sums[row] = log_sum;
    if constexpr (kIndexed) {
      const int64_t index = checked_target(target, row, classes, ignore_index);
      if (index < 0) return losses.add(sums, row, A(0), A(0));
      const A cost = log_sum - (static_cast<A>(input[team.element(v, index)]) - maximum);
      const A own = weight.of(team.group(), index);
      losses.add(sums, row, kWeighted ? hard * own * cost + soft * expected : own * cost, own);
    } else if (classes > 0) {
      losses.add(sums, row, expected, A(1));
    } else {
      losses.add(sums, row, A(0), A(0));  // as torch: no classes, no rows
    }
  }
};

// The gradients of the rows' losses: their own, or that of their sample's loss over its denominator.
template <class T>
struct RowGrads {
  using A = accumulate_t<T>;
  const T* grad_output;
  const A* denominator;  // null where the losses were not reduced

  CU_DEVICE A of(int64_t sample, int64_t row) const {
    return denominator == nullptr ? static_cast<A>(grad_output[row])
                                  : static_cast<A>(grad_output[sample]) / denominator[sample];
  }
};

// row_grad * (W * p_c - w_c * q_c), W = sum_c w_c q_c. An ignored row is zero, or NaN where its softmax is.
template <class T, Target kTarget>
struct CrossEntropyInputGrad {
  using A = accumulate_t<T>;
  static constexpr bool kIndexed = kTarget != Target::distribution;
  static constexpr int kStreams = 2;  // or, for an index, registers for what a row needs beside its logits

  const T* input;
  const std::conditional_t<kIndexed, int64_t, T>* target;
  T* grad_input;
  RowGrads<T> row_grads;
  const A *maxima, *log_sums;
  ClassWeight<T> weight;
  const A* weight_sums;  // over the classes, where there are weights and smoothing
  A hard, soft;
  int64_t ignore_index;
  Parts<A> parts{};

  template <class Team>
  CU_DEVICE void run(const SliceWork& work) const {
    for_each_tile<Team>(work, [&](const Team& team) {
      A grad[Team::kSlices], maximum[Team::kSlices], log_sum[Team::kSlices], total[Team::kSlices];
#pragma unroll
      for (int v = 0; v < Team::kSlices; ++v) {
        grad[v] = maximum[v] = log_sum[v] = total[v] = 0;
        if (!team.has_slices()) continue;
        const int64_t row = team.slice(v);
        grad[v] = row_grads.of(team.group(), row);
        maximum[v] = maxima[row];
        log_sum[v] = log_sums[row];
      }
      if constexpr (kIndexed)
        by_index(team, work.classes, grad, maximum, log_sum, total);
      else
        by_distribution(team, grad, maximum, log_sum, total);
    });
  }

 private:
  template <int V>
  using OfSlices = A[V];

  template <class Team>
  CU_DEVICE void by_index(const Team& team, int64_t classes, OfSlices<Team::kSlices>& grad,
                          const OfSlices<Team::kSlices>& maximum, const OfSlices<Team::kSlices>& log_sum,
                          OfSlices<Team::kSlices>& total) const {
    A own[Team::kSlices], spread[Team::kSlices];  // w_t (1 - eps) of the target, eps / C of all classes
    int own_position[Team::kSlices];
#pragma unroll
    for (int v = 0; v < Team::kSlices; ++v) {
      own[v] = spread[v] = 0;
      own_position[v] = -1;
      const int64_t index =
          team.has_slices() ? checked_target(target, team.slice(v), classes, ignore_index) : int64_t{-1};
      if (index < 0) {
        grad[v] = 0;
        continue;
      }
      own[v] = total[v] = hard * weight.of(team.group(), index);
      if (kTarget == Target::smoothed_index) {
        spread[v] = soft;
        total[v] += soft * (weight.given() ? weight_sums[weight.between_samples > 0 ? team.group() : 0] : A(classes));
      }
      own_position[v] = team.position_of(index);
    }
    for (int chunk = 0; chunk < team.chunks(); ++chunk) {
      Chunk<Team, A> x;
      team.load_chunk(input, chunk, A(0), x);
#pragma unroll
      for (int k = 0; k < Team::kPacks; ++k) {
#pragma unroll
        for (int j = 0; j < Team::kPack; ++j) {
          const int v = slice_of<Team>(j), position = team.position(chunk, k, j);
          const A p = exp((x[k][j] - maximum[v]) - log_sum[v]);
          A factor = position == own_position[v] ? own[v] : A(0);
          if (kTarget == Target::smoothed_index && team.holds(position))
            factor += spread[v] * weight.of(team.group(), team.class_offset() + position);
          x[k][j] = grad[v] * (total[v] * p - factor);
        }
      }
      team.store_chunk(grad_input, chunk, x);
    }
  }

  template <class Team>
  CU_DEVICE void by_distribution(const Team& team, const OfSlices<Team::kSlices>& grad,
                                 const OfSlices<Team::kSlices>& maximum, const OfSlices<Team::kSlices>& log_sum,
                                 OfSlices<Team::kSlices>& total) const {
    Chunk<Team, A> x, w;
    if (!Team::kWhole && parts.stage == Stage::merge) {
      add_part_sums(team, parts, total);
    } else {
      for (int chunk = 0; chunk < team.chunks(); ++chunk) {
        load_factors(team, chunk, w);
        A terms[Team::kPack] = {};
#pragma unroll
        for (int k = 0; k < Team::kPacks; ++k) {
#pragma unroll
          for (int j = 0; j < Team::kPack; ++j) terms[j] += w[k][j];
        }
        fold<Team>(terms, total, Plus<A>());
      }
    }
    team.reduce(total, A(0), Plus<A>());
    if (!Team::kWhole && parts.stage == Stage::part) return store_part_sum(team, parts, total);

    for_each_chunk_back(team, parts.stage, [&](int chunk, bool held) {
      if (!held) load_factors(team, chunk, w);
      team.load_chunk(input, chunk, A(0), x);
#pragma unroll
      for (int k = 0; k < Team::kPacks; ++k) {
#pragma unroll
        for (int j = 0; j < Team::kPack; ++j) {
          const int v = slice_of<Team>(j);
          x[k][j] = grad[v] * (total[v] * exp((x[k][j] - maximum[v]) - log_sum[v]) - w[k][j]);
        }
      }
      team.store_chunk(grad_input, chunk, x);
    });
  }

  // w_c q_c of a chunk, 0 where it has no value.
  template <class Team>
  CU_DEVICE void load_factors(const Team& team, int chunk, Chunk<Team, A>& w) const {
    team.load_chunk(target, chunk, A(0), w);
#pragma unroll
    for (int k = 0; k < Team::kPacks; ++k) {
#pragma unroll
      for (int j = 0; j < Team::kPack; ++j) {
        const int position = team.position(chunk, k, j);
        const bool holds = team.holds(position);
        w[k][j] = holds ? hard * w[k][j] + soft : A(0);
        if (weight.given() && holds) w[k][j] *= weight.of(team.group(), team.class_offset() + position);
      }
    }
  }
};

// The sum over the classes of every set of weights, a block each.
template <class T>
__global__ void weight_sums_kernel(const T* weight, int64_t classes, accumulate_t<T>* sums) {
  using A = accumulate_t<T>;
  A sum = 0;
  for (int64_t index = threadIdx.x; index < classes; index += blockDim.x)
    sum += static_cast<A>(weight[blockIdx.x * classes + index]);
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// A thread for every row.
template <class T>
struct NllForward {
  using A = accumulate_t<T>;

  const T* input;
  const int64_t* target;
  ClassWeight<T> weight;
  int64_t ignore_index;
  RowLosses<T> losses;

  template <class Team>
  CU_DEVICE void run(const SliceWork& work) const {
    typename RowLosses<T>::Sums sums;
    for_each_tile<Team>(work, [&](const Team& team) {
      if (!team.leads()) return;
      const int64_t row = team.slice(0), index = checked_target(target, row, work.classes, ignore_index);
      if (index < 0) return losses.add(sums, row, A(0), A(0));
      const A own = weight.of(team.group(), index);
      losses.add(sums, row, -own * static_cast<A>(input[team.element(0, index)]), own);
    });
    losses.finish(sums);
  }
};

// Zero but at the targets.
template <class T>
struct NllInputGrad {
  using A = accumulate_t<T>;
  static constexpr int kStreams = 1;

  const int64_t* target;
  T* grad_input;
  RowGrads<T> row_grads;
  ClassWeight<T> weight;
  int64_t ignore_index;

  template <class Team>
  CU_DEVICE void run(const SliceWork& work) const {
    for_each_tile<Team>(work, [&](const Team& team) {
      A own[Team::kSlices];
      int own_position[Team::kSlices];
#pragma unroll
      for (int v = 0; v < Team::kSlices; ++v) {
        own[v] = 0;
        own_position[v] = -1;
        if (!team.has_slices()) continue;
        const int64_t row = team.slice(v), index = checked_target(target, row, work.classes, ignore_index);
        if (index < 0) continue;
        own[v] = -row_grads.of(team.group(), row) * weight.of(team.group(), index);
        own_position[v] = team.position_of(index);
      }
      for (int chunk = 0; chunk < team.chunks(); ++chunk) {
        Chunk<Team, A> x;
#pragma unroll
        for (int k = 0; k < Team::kPacks; ++k) {
#pragma unroll
          for (int j = 0; j < Team::kPack; ++j) {
            const int v = slice_of<Team>(j);
            x[k][j] = team.position(chunk, k, j) == own_position[v] ? own[v] : A(0);
          }
        }
        team.store_chunk(grad_input, chunk, x);
      }
    });
  }
};

// ---- on the host

SliceShape shape_of(const Rows& rows) {
  return {rows.samples, rows.samples == 0 ? 0 : rows.rows / rows.samples, rows.classes, rows.pitch};
}

// The weights, contiguous and kept alive.
struct WeightOperand {
  Tensor tensor;
  bool given, by_sample;
  int64_t classes;

  WeightOperand(const std::optional<Tensor>& weight, const Rows& rows, const Tensor& like)
      : tensor(weight.has_value() ? as_contiguous(*weight) : like), given(weight.has_value()), classes(rows.classes) {
    if (given) check_class_weight(tensor, rows);
    by_sample = given && tensor.numel() > classes;
  }

  template <class T>
  ClassWeight<T> values() const {
    return {given ? cu_input<T>(tensor) : nullptr, by_sample ? classes : 0};
  }
};

// The results of a forward pass, and the scratch for their sums.
template <class T>
class LossResults {
 public:
  using A = accumulate_t<T>;

  LossResults(const Rows& rows, const std::string& reduction, const Tensor& loss, const Tensor& denominator)
      : samples_(rows.samples),
        reduced_(reduction != "none"),
        mean_(reduction == "mean"),
        loss_(cu_output<T>(loss)),
        denominator_(cu_output<A>(denominator)),
        scratch_(denominator) {}

  // Where the rows' losses go in a launch of `blocks` blocks.
  RowLosses<T> rows(int64_t blocks) {
    if (!reduced_) return {loss_, nullptr};
    blocks_ = blocks;
    scratch_ = new_tensor({2 * blocks}, ScalarType::Double, scratch_);
    return {nullptr, cu_output<double>(scratch_)};
  }

  void finish(const CudaGuard& guard) const {
    if (samples_ == 0) return;
    CU_LAUNCH(guard, finish_losses_kernel<T>, static_cast<unsigned>(samples_), 256, 0,
              reduced_ ? data<double>(scratch_) : nullptr, blocks_ / samples_, mean_, reduced_ ? loss_ : nullptr,
              denominator_);
  }

 private:
  int64_t samples_, blocks_ = 0;
  bool reduced_, mean_;
  T* loss_;
  A* denominator_;
  Tensor scratch_;
};

template <class T, Target kTarget>
void launch_forward(const CudaGuard& guard, const Rows& rows, CrossEntropyForward<T, kTarget> forward,
                    LossResults<T>& results, const Tensor& like) {
  using A = accumulate_t<T>;
  using Forward = CrossEntropyForward<T, kTarget>;
  const SliceShape shape = shape_of(rows);
  const auto plan = [&] {
    if constexpr (Forward::kIndexed)
      return plan_slices<T, Forward::kStreams>(shape, kMostShares, forward.input);
    else
      return plan_slices<T, Forward::kStreams>(shape, kMostShares, forward.input, forward.target);
  }();
  if (plan.parts == 1) {
    forward.losses = results.rows(plan.blocks);
    return launch_slices<T>(guard, plan, forward);
  }
  const Tensor scratch = scratch_of_parts<A>(shape, plan, Forward::kNumbers, like);
  forward.parts = {Stage::part, cu_output<A>(scratch), static_cast<int>(plan.parts)};
  launch_slices<T>(guard, plan, forward);
  const SlicePlan merge = plan_of_lookup(shape, kMostShares, kWarp);
  forward.parts.stage = Stage::merge;
  forward.losses = results.rows(merge.blocks);
  launch_slices<T>(guard, merge, forward);
}

template <class Body>
void for_target(const Tensor& target, double label_smoothing, const Body& body) {
  if (is_distribution(target)) return body(std::integral_constant<Target, Target::distribution>{});
  if (label_smoothing > 0) return body(std::integral_constant<Target, Target::smoothed_index>{});
  return body(std::integral_constant<Target, Target::index>{});
}

// The target's values, of the type that the kind of target has.
template <class T, bool indexed>
auto target_values(const Tensor& target) {
  if constexpr (indexed) return cu_input<int64_t>(target);
  if constexpr (!indexed) return cu_input<T>(target);
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(const Tensor& input_any, const Tensor& target_any,
                                                         const std::optional<Tensor>& weight_any,
                                                         const std::string& reduction, const Sizes& samples,
                                                         int64_t ignore_index, double label_smoothing) {
  const CrossEntropyOperands operands(input_any, target_any);
  const Tensor &input = operands.input, &target = operands.target;
  const Rows rows(sizes_of(input), samples, operands.channels_last);
  check_rows(target, rows);
  const WeightOperand weight(weight_any, rows, input);
  const CrossEntropyResults made(input, reduction, samples);
  const Tensor lse = made.new_lse(input);

  const CudaGuard guard(input);
  for_floating_dtype(input.scalar_type(), "cross_entropy", [&](auto scalar) {
    using T = decltype(scalar);
    using A = accumulate_t<T>;
    LossResults<T> results(rows, reduction, made.loss, made.denominator);
    A* maxima = cu_output<A>(lse);
    for_target(target, label_smoothing, [&](auto kind) {
      constexpr Target kTarget = kind;
      const CrossEntropyForward<T, kTarget> forward{
          cu_input<T>(input),
          target_values<T, kTarget != Target::distribution>(target),
          weight.values<T>(),
          static_cast<A>(1 - label_smoothing),
          static_cast<A>(label_smoothing / std::max<int64_t>(1, rows.classes)),
          ignore_index,
          maxima,
          maxima + rows.rows,
          {}};
      launch_forward(guard, rows, forward, results, input);
    });
    results.finish(guard);
  });
  return {made.loss, lse, made.denominator};
}

// grad_output and the denominator, contiguous and kept alive.
struct RowGradOperands {
  Tensor grad_output, denominator;
  bool reduced;

  RowGradOperands(const Tensor& grad_output_any, const Tensor& denominator_any, const std::string& reduction,
                  const Rows& rows)
      : grad_output(as_contiguous(grad_output_any)),
        denominator(as_contiguous(denominator_any)),
        reduced(reduction != "none") {
    check_row_grad(grad_output, denominator, reduced, rows);
  }

  template <class T>
  RowGrads<T> values() const {
    return {cu_input<T>(grad_output), reduced ? cu_input<accumulate_t<T>>(denominator) : nullptr};
  }
};

Tensor cross_entropy_input_grad(const Tensor& grad_output, const Tensor& input_any, const Tensor& target_any,
                                const std::optional<Tensor>& weight_any, const Tensor& lse_any,
                                const Tensor& denominator, const std::string& reduction, const Sizes& samples,
                                int64_t ignore_index, double label_smoothing) {
  const CrossEntropyOperands operands(input_any, target_any);
  const Tensor &input = operands.input, &target = operands.target;
  const Rows rows(sizes_of(input), samples, operands.channels_last);
  check_rows(target, rows);
  const WeightOperand weight(weight_any, rows, input);
  const RowGradOperands row_grads(grad_output, denominator, reduction, rows);
  const Tensor lse = as_contiguous(lse_any);
  check_lse(lse, rows);
  const Tensor grad_input = new_tensor(sizes_of(input), input.scalar_type(), input, operands.channels_last);
  if (input.numel() == 0) return grad_input;

  const CudaGuard guard(input);
  const SliceShape shape = shape_of(rows);
  for_floating_dtype(input.scalar_type(), "cross_entropy", [&](auto scalar) {
    using T = decltype(scalar);
    using A = accumulate_t<T>;
    const ClassWeight<T> weights = weight.values<T>();
    const A hard = static_cast<A>(1 - label_smoothing), soft = static_cast<A>(label_smoothing / rows.classes);
    const A* maxima = cu_input<A>(lse);
    const bool summed = weight.given && label_smoothing > 0;
    const int64_t sets = summed ? weight.tensor.numel() / rows.classes : 0;
    const Tensor weight_sums = new_tensor({sets}, accumulation_type(input.scalar_type()), input);
    A* sums = summed ? cu_output<A>(weight_sums) : nullptr;
    if (summed)
      CU_LAUNCH(guard, weight_sums_kernel<T>, static_cast<unsigned>(sets), 256, 0, weights.values, rows.classes, sums);
    for_target(target, label_smoothing, [&](auto kind) {
      constexpr Target kTarget = kind;
      using Gradient = CrossEntropyInputGrad<T, kTarget>;
      const Gradient gradient{cu_input<T>(input),
                              target_values<T, Gradient::kIndexed>(target),
                              cu_output<T>(grad_input),
                              row_grads.values<T>(),
                              maxima,
                              maxima + rows.rows,
                              weights,
                              sums,
                              hard,
                              soft,
                              ignore_index};
      if constexpr (Gradient::kIndexed)
        launch_slices<T>(
            guard, plan_slices<T, Gradient::kStreams>(shape, kNoLimit, gradient.input, gradient.grad_input), gradient);
      else
        launch_in_stages<T>(guard, shape, kNoLimit, 1, gradient, input, gradient.input, gradient.target,
                            gradient.grad_input);
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
  const Rows rows(sizes_of(input), samples, operands.channels_last);
  check_rows(target, rows);
  const WeightOperand weight(weight_any, rows, input);
  const CrossEntropyResults made(input, reduction, samples);
  const CudaGuard guard(input);
  for_floating_dtype(input.scalar_type(), "nll_loss", [&](auto scalar) {
    using T = decltype(scalar);
    LossResults<T> results(rows, reduction, made.loss, made.denominator);
    const SlicePlan plan = plan_of_lookup(shape_of(rows), kMostShares, 1);
    launch_team<ColumnTeam<1, 1>>(guard, plan,
                                  NllForward<T>{cu_input<T>(input), cu_input<int64_t>(target), weight.values<T>(),
                                                ignore_index, results.rows(plan.blocks)});
    results.finish(guard);
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
  const Rows rows(sizes, samples, false);
  const WeightOperand weight(weight_any, rows, target);
  const RowGradOperands row_grads(grad_output, denominator, reduction, rows);
  const Tensor grad_input = new_tensor(sizes, grad_output.scalar_type(), grad_output);
  if (grad_input.numel() == 0) return grad_input;
  const CudaGuard guard(grad_input);
  for_floating_dtype(grad_output.scalar_type(), "nll_loss", [&](auto scalar) {
    using T = decltype(scalar);
    const NllInputGrad<T> gradient{cu_input<int64_t>(target), cu_output<T>(grad_input), row_grads.values<T>(),
                                   weight.values<T>(), ignore_index};
    launch_slices<T>(guard, plan_slices<T, 1>(shape_of(rows), kNoLimit, gradient.grad_input), gradient);
  });
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(manual_ops, CU_KEY, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&cross_entropy_forward));
  m.impl("cross_entropy_input_grad", TORCH_BOX(&cross_entropy_input_grad));
  m.impl("nll_loss_forward", TORCH_BOX(&nll_loss_forward));
  m.impl("nll_loss_input_grad", TORCH_BOX(&nll_loss_input_grad));
}

}  // namespace manual_ops
