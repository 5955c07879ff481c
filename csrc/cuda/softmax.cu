// Softmax and log-softmax along one dimension, and their input gradients; the formulas are those of ops/softmax.py.
//
// The values that a thread read last stay in its registers, so slices that fit are read once. Of longer ones the rest
// is read again, backwards, since what was read last is still in the caches.
#include "cuda/softmax_statistics.h"
#include "softmax.h"

namespace manual_ops {

namespace {

template <class T, bool kLog>
struct SoftmaxForward {
  using A = accumulate_t<T>;
  static constexpr int kStreams = kLog ? 2 : 1;  // the logits, and beside them their exponentials or in their place

  const T* input;
  T* output;
  Parts<A> parts{};

  template <class Team>
  CU_DEVICE void run(const SliceWork& work) const {
    for_each_tile<Team>(work, [&](const Team& team) {
      Chunk<Team, A> x;  // or exp(x - m) with the thread's own maximum m
      SoftmaxStatistics<Team, A> statistics;
      if (!Team::kWhole && parts.stage == Stage::merge) {
        statistics.add_parts(team, parts);
      } else {
        for (int chunk = 0; chunk < team.chunks(); ++chunk) {
          team.load_chunk(input, chunk, kLowest<A>, x);
          statistics.template add<!kLog>(x);
        }
      }
      A maximum[Team::kSlices], scale[Team::kSlices], held_scale[Team::kSlices];
#pragma unroll
      for (int v = 0; v < Team::kSlices; ++v) held_scale[v] = statistics.maximum[v];
      statistics.combine(team);
      if (!Team::kWhole && parts.stage == Stage::part) return statistics.store_part(team, parts);
      statistics.finish();
#pragma unroll
      for (int v = 0; v < Team::kSlices; ++v) {
        maximum[v] = statistics.maximum[v];
        scale[v] = kLog ? log(statistics.sum[v]) : A(1) / statistics.sum[v];
        if (!kLog) held_scale[v] = exp(held_scale[v] - maximum[v]) * scale[v];
      }

      for_each_chunk_back(team, parts.stage, [&](int chunk, bool held) {
        if (!held) team.load_chunk(input, chunk, A(0), x);
        if (kLog)
          change_chunk<Team>(x, [&](A value, int v) { return (value - maximum[v]) - scale[v]; });
        else if (held)
          change_chunk<Team>(x, [&](A power, int v) { return power * held_scale[v]; });
        else
          change_chunk<Team>(x, [&](A value, int v) { return exp(value - maximum[v]) * scale[v]; });
        team.store_chunk(output, chunk, x);
      });
    });
  }
};

// softmax: s * (g - sum(g * s)); log_softmax: g - exp(l) * sum(g).
template <class T, bool kLog>
struct SoftmaxInputGrad {
  using A = accumulate_t<T>;
  static constexpr int kStreams = 2;

  const T *grad_output, *output;
  T* grad_input;
  Parts<A> parts{};

  template <class Team>
  CU_DEVICE void run(const SliceWork& work) const {
    for_each_tile<Team>(work, [&](const Team& team) {
      Chunk<Team, A> g, y;
      A sum[Team::kSlices] = {};
      if (!Team::kWhole && parts.stage == Stage::merge) {
        add_part_sums(team, parts, sum);
      } else {
        for (int chunk = 0; chunk < team.chunks(); ++chunk) {
          load(team, chunk, g, y);
          A terms[Team::kPack] = {};
#pragma unroll
          for (int k = 0; k < Team::kPacks; ++k) {
#pragma unroll
            for (int j = 0; j < Team::kPack; ++j) terms[j] += kLog ? g[k][j] : g[k][j] * y[k][j];
          }
          fold<Team>(terms, sum, Plus<A>());
        }
      }
      team.reduce(sum, A(0), Plus<A>());
      if (!Team::kWhole && parts.stage == Stage::part) return store_part_sum(team, parts, sum);

      for_each_chunk_back(team, parts.stage, [&](int chunk, bool held) {
        if (!held) load(team, chunk, g, y);
#pragma unroll
        for (int k = 0; k < Team::kPacks; ++k) {
#pragma unroll
          for (int j = 0; j < Team::kPack; ++j) {
            const A total = sum[slice_of<Team>(j)];
            g[k][j] = kLog ? g[k][j] - exp(y[k][j]) * total : y[k][j] * (g[k][j] - total);
          }
        }
        team.store_chunk(grad_input, chunk, g);
      });
    });
  }

 private:
  template <class Team>
  CU_DEVICE void load(const Team& team, int chunk, Chunk<Team, A>& g, Chunk<Team, A>& y) const {
    team.load_chunk(grad_output, chunk, A(0), g);
    team.load_chunk(output, chunk, A(0), y);
  }
};

SliceShape shape_of(const Tensor& tensor, int64_t dim) {
  const Slices slices(tensor, dim);
  return {1, slices.outer * slices.inner, slices.classes, slices.inner};
}

template <bool kLog>
Tensor softmax_forward(const Tensor& input_any, int64_t dim) {
  const Tensor input = as_contiguous(input_any);
  const Tensor output = new_tensor(sizes_of(input), input.scalar_type(), input);
  const SliceShape shape = shape_of(input, dim);
  if (input.numel() == 0) return output;
  const CudaGuard guard(input);
  for_floating_dtype(input.scalar_type(), "softmax", [&](auto scalar) {
    using T = decltype(scalar);
    const SoftmaxForward<T, kLog> forward{cu_input<T>(input), cu_output<T>(output)};
    launch_in_stages<T>(guard, shape, kNoLimit, 2, forward, input, forward.input, forward.output);
  });
  return output;
}

template <bool kLog>
Tensor softmax_input_grad(const Tensor& grad_output_any, const Tensor& output_any, int64_t dim) {
  const Tensor grad_output = as_contiguous(grad_output_any), output = as_contiguous(output_any);
  STD_TORCH_CHECK(sizes_of(grad_output) == sizes_of(output) && grad_output.scalar_type() == output.scalar_type(),
                  "softmax: grad_output and output must have one shape and dtype");
  const Tensor grad_input = new_tensor(sizes_of(output), output.scalar_type(), output);
  const SliceShape shape = shape_of(output, dim);
  if (output.numel() == 0) return grad_input;
  const CudaGuard guard(output);
  for_floating_dtype(output.scalar_type(), "softmax", [&](auto scalar) {
    using T = decltype(scalar);
    const SoftmaxInputGrad<T, kLog> gradient{cu_input<T>(grad_output), cu_input<T>(output), cu_output<T>(grad_input)};
    launch_in_stages<T>(guard, shape, kNoLimit, 1, gradient, output, gradient.grad_output, gradient.output,
                        gradient.grad_input);
  });
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(manual_ops, CU_KEY, m) {
  m.impl("softmax_forward", TORCH_BOX(&softmax_forward<false>));
  m.impl("softmax_input_grad", TORCH_BOX(&softmax_input_grad<false>));
  m.impl("log_softmax_forward", TORCH_BOX(&softmax_forward<true>));
  m.impl("log_softmax_input_grad", TORCH_BOX(&softmax_input_grad<true>));
}

}  // namespace manual_ops
