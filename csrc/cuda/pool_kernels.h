// Max and average pooling, forward and backward, for both memory formats. Formulas: manual_ops/ops/max_pool.py and
// average_pool.py.
//
// A thread computes a pack: one element of a contiguous tensor, neighbouring threads neighbouring columns, or N
// neighbouring channels of a channels_last one. Backward gathers: an input reads the windows that cover it.
#pragma once

#include <limits>
#include <type_traits>

#include "cuda/pool.h"

namespace manual_ops {

constexpr int kPoolThreads = 256;
// Blocks that a multiprocessor has room for at least. Without a number nvcc 13 spills registers to make room for more.
template <class Index>
constexpr int kPoolBlocks = sizeof(Index) == 4 ? 3 : 2;
// Threads that keep a GPU busy; where outputs give fewer, large windows are shared out.
constexpr int64_t kFillingThreads = int64_t{1} << 18;

// What is left of a window's values in max pooling: the largest and its tap, -1 before any has come. A value takes
// the lead if it is larger, or NaN: so the first of equals wins, and the last NaN.
template <class A>
struct Largest {
  A value;
  int32_t code;

  CU_DEVICE static Largest nothing() { return {-std::numeric_limits<A>::infinity(), -1}; }

  CU_DEVICE void start(A other, int32_t other_code) { *this = {other, other_code}; }

  // Taps must come in their order.
  CU_DEVICE void take(A other, int32_t other_code) {
    const bool better = other > value || other != other;
    value = better ? other : value;
    code = better ? other_code : code;
  }
  // The same for taps from anywhere in the window.
  CU_DEVICE void merge(const Largest& other) {
    const bool nan = value != value, other_nan = other.value != other.value;
    const bool earlier = static_cast<uint32_t>(other.code) < static_cast<uint32_t>(code);
    const bool larger = other.value > value || (other.value == value && earlier);
    if (other_nan ? !nan || other.code > code : larger) *this = other;
  }
};

// And in average pooling.
template <class A>
struct Sum {
  A value;
  static constexpr int32_t code = 0;

  CU_DEVICE static Sum nothing() { return {0}; }
  CU_DEVICE void start(A other, int32_t) { value = other; }
  CU_DEVICE void take(A other, int32_t) { value += other; }
  CU_DEVICE void merge(const Sum& other) { value += other.value; }
};

template <bool kMax, class A>
using Reduced = std::conditional_t<kMax, Largest<A>, Sum<A>>;

template <int N, class Reduced>
CU_DEVICE void clear(Reduced (&reduced)[N]) {
#pragma unroll
  for (int n = 0; n < N; ++n) reduced[n] = Reduced::nothing();
}

// The tap that leads before any has taken the lead: the first that is not before the input.
template <class Index>
CU_DEVICE int32_t first_tap(const PoolArguments<Index>& p, Index depth, Index row, Index column) {
  const Index taps = (p.d.window(depth).tap * p.h.taps + p.h.window(row).tap) * p.w.taps + p.w.window(column).tap;
  return static_cast<int32_t>(taps);
}

template <class A, class Index>
CU_DEVICE A divisor_of(const PoolArguments<Index>& p, Index depth, Index row, Index column) {
  return static_cast<A>(p.d.divisor(depth)) * static_cast<A>(p.h.divisor(row)) * static_cast<A>(p.w.divisor(column));
}

// What N outputs at `offset` become of their windows' values. `first`: their first tap.
template <int N, class Index, class T, class A>
CU_DEVICE void finish(const Largest<A> (&reduced)[N], int32_t first, Index offset, T* output,
                      const NewWinners& winners) {
  Pack<T, N> values;
  Pack<int32_t, N> codes;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    values.at[n] = static_cast<T>(reduced[n].value);
    codes.at[n] = reduced[n].value == Largest<A>::nothing().value ? first : reduced[n].code;
  }
  store<N>(output + offset, values);
  store_codes<N>(winners, offset, codes);
}

template <int N, class Index, class T, class A>
CU_DEVICE void finish(const Sum<A> (&reduced)[N], A divisor, Index offset, T* output) {
  Pack<T, N> values;
#pragma unroll
  for (int n = 0; n < N; ++n) values.at[n] = static_cast<T>(reduced[n].value / divisor);
  store<N>(output + offset, values);
}

// The same for outputs of which only the place is known. `same_divisor`: of all windows, or 0.
template <bool kMax, int N, class Index, class T, class Reduced, class A = accumulate_t<T>>
CU_DEVICE void finish_at(const PoolArguments<Index>& p, Index depth, Index row, Index column,
                         const Reduced (&reduced)[N], Index offset, T* output, const NewWinners& winners,
                         accumulate_t<T> same_divisor) {
  if constexpr (kMax)
    finish(reduced, first_tap(p, depth, row, column), offset, output, winners);
  else
    finish(reduced, same_divisor != 0 ? same_divisor : divisor_of<A>(p, depth, row, column), offset, output);
}

// Forward, any windows: a thread reads all taps of an output. Rows are reduced before they are put together.
template <bool kMax, int N, class Index, class T>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<Index>)
    pool_windows_kernel(PoolArguments<Index> p, PoolItems<Index> items, const T* input, T* output, NewWinners winners,
                        accumulate_t<T> same_divisor) {
  using A = accumulate_t<T>;
  const Index index = thread_index<Index>();
  if (index >= items.count) return;
  const auto at = items.at(index);
  const Window<Index> d = p.d.window(at.depth), h = p.h.window(at.row), w = p.w.window(at.column);
  const Index step = p.w.dilation * p.pitch;
  Reduced<kMax, A> all[N];
  clear(all);
  for (Index i = 0; i < d.count; ++i) {
    for (Index j = 0; j < h.count; ++j) {
      const T* from = input + p.input_row(at.image, d.first + i * p.d.dilation, h.first + j * p.h.dilation) +
                      w.first * p.pitch + at.lane * N;
      int32_t code = static_cast<int32_t>(((d.tap + i) * p.h.taps + h.tap + j) * p.w.taps + w.tap);
      Reduced<kMax, A> row[N];
      clear(row);
      for (Index k = 0; k < w.count; ++k, from += step, ++code) {
        const Pack<T, N> values = load<N>(from);
#pragma unroll
        for (int n = 0; n < N; ++n) row[n].take(static_cast<A>(values.at[n]), code);
      }
#pragma unroll
      for (int n = 0; n < N; ++n) all[n].take(row[n].value, row[n].code);
    }
  }
  const Index offset = p.output_row(at.image, at.depth, at.row) + at.column * p.pitch + at.lane * N;
  finish_at<kMax>(p, at.depth, at.row, at.column, all, offset, output, winners, same_divisor);
}

// Forward, windows of K x K taps at stride S: a thread computes R outputs, one below the other, and reduces each row of
// the input once for all of them.
template <bool kMax, int K, int S, int R, int N, class T>
__global__ void __launch_bounds__(kPoolThreads)
    pool_strip_kernel(PoolArguments<int32_t> p, PoolItems<int32_t> items, const T* input, T* output, NewWinners winners,
                      accumulate_t<T> same_divisor) {
  using A = accumulate_t<T>;
  const int32_t index = thread_index<int32_t>();
  if (index >= items.count) return;
  const auto at = items.at(index);
  const int32_t first = at.row * R, x = at.column * S - p.w.padding, y = first * S - p.h.padding;
  const int32_t row_pitch = p.w.input * p.pitch;
  const T* from = input + p.input_row(at.image, 0, 0) + at.lane * N;
  bool column_inside[K];
#pragma unroll
  for (int k = 0; k < K; ++k) column_inside[k] = x + k >= 0 && x + k < p.w.input;
  Reduced<kMax, A> all[R][N];
#pragma unroll
  for (int r = 0; r < (R - 1) * S + K; ++r) {
    // Loads that do not wait for each other. What is outside changes nothing.
    const bool row_inside = y + r >= 0 && y + r < p.h.input;
    Pack<T, N> values[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (int n = 0; n < N; ++n) values[k].at[n] = static_cast<T>(Reduced<kMax, A>::nothing().value);
      if (row_inside && column_inside[k]) values[k] = load<N>(from + (y + r) * row_pitch + (x + k) * p.pitch);
    }
    Reduced<kMax, A> row[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      row[n].start(static_cast<A>(values[0].at[n]), 0);
#pragma unroll
      for (int k = 1; k < K; ++k) row[n].take(static_cast<A>(values[k].at[n]), k);
    }
#pragma unroll
    for (int o = 0; o < R; ++o) {
      const int tap = r - o * S;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (tap == 0) all[o][n] = row[n];
        if (tap > 0 && tap < K) all[o][n].take(row[n].value, tap * K + row[n].code);
      }
    }
  }
  const int32_t offset = p.output_row(at.image, 0, first) + at.column * p.pitch + at.lane * N;
#pragma unroll
  for (int o = 0; o < R; ++o) {
    if (first + o < p.h.output) {
      const int32_t to = offset + o * p.w.output * p.pitch;
      if constexpr (kMax)
        finish(all[o], max(-(y + o * S), 0) * K + max(-x, 0), to, output, {winners.bytes, nullptr});
      else
        finish(all[o], same_divisor != 0 ? same_divisor : divisor_of<A>(p, 0, first + o, at.column), to, output);
    }
  }
}

// Who computes an output whose window is large: `workers` threads of a block (a power of two), of which
// `column_workers` share a row, in each of `row_chunks` x `column_chunks` blocks.
struct PoolCrew {
  int workers, column_workers;
  bool workers_innermost;  // in a block's threads: they read neighbours
  unsigned row_chunks = 1, column_chunks = 1;

  int outputs() const { return kPoolThreads / workers; }  // packs of them, of a block
  unsigned chunks() const { return row_chunks * column_chunks; }
};

// Merges what the workers of an output have, in a tree; worker 0 has the result. `stride` between the threads of two
// workers.
template <int N, class Reduced>
CU_DEVICE void merge_workers(Reduced (&mine)[N], int worker, int workers, int stride) {
  CU_SHARED(Reduced, shared, [N][kPoolThreads]);
#pragma unroll
  for (int n = 0; n < N; ++n) shared[n][threadIdx.x] = mine[n];
  __syncthreads();
  for (int half = workers / 2; half > 0; half /= 2) {
    if (worker < half) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        mine[n].merge(shared[n][threadIdx.x + half * stride]);
        shared[n][threadIdx.x] = mine[n];
      }
    }
    __syncthreads();
  }
}

// Forward, large windows. kAlong: the packs lie along the rows of contiguous tensors, and windows consist of whole
// ones. With more than one chunk the results go to `partials`, chunk by chunk, in the outputs' order.
template <bool kMax, bool kAlong, int N, class Index, class T>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<Index>)
    pool_crew_kernel(PoolArguments<Index> p, PoolItems<Index> items, PoolCrew crew, unsigned blocks, const T* input,
                     T* output, NewWinners winners, Reduced<kMax, accumulate_t<T>>* partials,
                     accumulate_t<T> same_divisor) {
  using A = accumulate_t<T>;
  constexpr int kLanes = kAlong ? 1 : N;
  const int thread = static_cast<int>(threadIdx.x), outputs = kPoolThreads / crew.workers;
  const int worker = crew.workers_innermost ? thread & (crew.workers - 1) : thread / outputs;
  const int place = crew.workers_innermost ? thread / crew.workers : thread & (outputs - 1);
  const unsigned chunk = blockIdx.x / blocks;
  const Index index = static_cast<Index>(blockIdx.x - chunk * blocks) * outputs + place;
  const bool active = index < items.count;
  const auto at = items.at(active ? index : 0);

  Reduced<kMax, A> mine[N];
  clear(mine);
  if (active) {
    const Window<Index> d = p.d.window(at.depth), h = p.h.window(at.row), w = p.w.window(at.column);
    const unsigned row_chunk = chunk / crew.column_chunks, column_chunk = chunk - row_chunk * crew.column_chunks;
    const int row_workers = crew.workers / crew.column_workers;
    const Index first_row = row_chunk * row_workers + worker / crew.column_workers;
    const Index first_column = column_chunk * crew.column_workers + (worker & (crew.column_workers - 1));
    const Index row_step = crew.row_chunks * row_workers, column_step = crew.column_chunks * crew.column_workers;
    const Index columns = kAlong ? w.count / N : w.count, pitch = kAlong ? N : p.w.dilation * p.pitch;
    for (Index i = 0; i < d.count; ++i) {
      for (Index j = first_row; j < h.count; j += row_step) {
        const T* from = input + p.input_row(at.image, d.first + i * p.d.dilation, h.first + j * p.h.dilation) +
                        w.first * p.pitch + first_column * pitch + at.lane * kLanes;
        const int32_t code = static_cast<int32_t>(((d.tap + i) * p.h.taps + h.tap + j) * p.w.taps + w.tap);
#pragma unroll 4
        for (Index k = first_column; k < columns; k += column_step, from += column_step * pitch) {
          const Pack<T, N> values = load<N>(from);
#pragma unroll
          for (int n = 0; n < N; ++n)
            mine[n].take(static_cast<A>(values.at[n]), code + static_cast<int32_t>(kAlong ? k * N + n : k));
        }
      }
    }
  }
  Reduced<kMax, A> result[kLanes];
  clear(result);
#pragma unroll
  for (int n = 0; n < N; ++n) result[kAlong ? 0 : n].merge(mine[n]);
  merge_workers<kLanes>(result, worker, crew.workers, crew.workers_innermost ? 1 : outputs);
  if (!active || worker > 0) return;
  const Index offset = p.output_row(at.image, at.depth, at.row) + at.column * p.pitch + at.lane * kLanes;
  if (crew.row_chunks * crew.column_chunks > 1) {
#pragma unroll
    for (int n = 0; n < kLanes; ++n) partials[chunk * (items.count * kLanes) + offset + n] = result[n];
  } else {
    finish_at<kMax>(p, at.depth, at.row, at.column, result, offset, output, winners, same_divisor);
  }
}

// Puts the chunks of an output together, a warp an output.
template <bool kMax, class Index, class T>
__global__ void __launch_bounds__(kPoolThreads)
    pool_chunks_kernel(PoolArguments<Index> p, PoolItems<Index> items, unsigned chunks,
                       const Reduced<kMax, accumulate_t<T>>* partials, T* output, NewWinners winners,
                       accumulate_t<T> same_divisor) {
  const int worker = static_cast<int>(threadIdx.x) % kWarp;
  const Index index = static_cast<Index>(blockIdx.x) * (kPoolThreads / kWarp) + threadIdx.x / kWarp;
  const bool active = index < items.count;
  Reduced<kMax, accumulate_t<T>> mine[1];
  clear(mine);
  if (active)
    for (unsigned chunk = worker; chunk < chunks; chunk += kWarp) mine[0].merge(partials[chunk * items.count + index]);
  merge_workers<1>(mine, worker, kWarp, 1);
  if (!active || worker > 0) return;
  const auto at = items.at(index);
  finish_at<kMax>(p, at.depth, at.row, at.column, mine, index, output, winners, same_divisor);
}

// What an output adds to an input that it reads: all of its gradient where the input won, or its share.
template <bool kMax, class Index, class A>
CU_DEVICE A share_of(const PoolArguments<Index>& p, Index depth, Index row, Index column, A same_share) {
  if (kMax || same_share != 0) return kMax ? A(1) : same_share;
  return 1 / divisor_of<A>(p, depth, row, column);
}

// Backward, any windows: a thread collects the gradients of `rows` inputs, one below the other.
template <bool kMax, int N, class Index, class T>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<Index>)
    pool_gather_kernel(PoolArguments<Index> p, PoolItems<Index> items, int rows, const T* grad_output, Winners winners,
                       T* grad_input, accumulate_t<T> same_share) {
  using A = accumulate_t<T>;
  const Index index = thread_index<Index>();
  if (index >= items.count) return;
  const auto at = items.at(index);
  const Cover<Index> d = p.d.cover(at.depth), w = p.w.cover(at.column);
  const Index last_row = min((at.row + 1) * rows, p.h.input);
  for (Index in_row = at.row * rows; in_row < last_row; ++in_row) {
    const Cover<Index> h = p.h.cover(in_row);
    A sum[N] = {};
    for (Index od = d.first, d_tap = d.tap; od <= d.last; od += p.d.period, d_tap = p.d.next_tap(at.depth, od, d_tap)) {
      for (Index oh = h.first, h_tap = h.tap; oh <= h.last; oh += p.h.period, h_tap = p.h.next_tap(in_row, oh, h_tap)) {
        const Index row = p.output_row(at.image, od, oh) + at.lane * N;
        const Index base = (d_tap * p.h.taps + h_tap) * p.w.taps;
        for (Index ow = w.first, w_tap = w.tap; ow <= w.last;
             ow += p.w.period, w_tap = p.w.next_tap(at.column, ow, w_tap)) {
          const Pack<T, N> grad = load<N>(grad_output + row + ow * p.pitch);
          if constexpr (kMax) {
            const Pack<int32_t, N> codes = load_codes<N>(winners, row + ow * p.pitch);
#pragma unroll
            for (int n = 0; n < N; ++n)
              if (codes.at[n] == base + w_tap) sum[n] += static_cast<A>(grad.at[n]);
          } else {
            const A share = share_of<kMax>(p, od, oh, ow, same_share);
#pragma unroll
            for (int n = 0; n < N; ++n) sum[n] += static_cast<A>(grad.at[n]) * share;
          }
        }
      }
    }
    Pack<T, N> values;
#pragma unroll
    for (int n = 0; n < N; ++n) values.at[n] = static_cast<T>(sum[n]);
    store<N>(grad_input + p.input_row(at.image, at.depth, in_row) + at.column * p.pitch + at.lane * N, values);
  }
}

// Backward, windows of K x K taps at stride S whose padding is P modulo S: a thread owns R blocks of S x S inputs, one
// below the other, and reads each output that covers them once. Block a of an axis, inputs S*a .. S*a+S-1, is read by
// outputs a + padding/S + c, c = kFirst .. kLast, its l-th input by tap P + l - S*c.
template <bool kMax, int K, int S, int P, int R, int N, class T>
__global__ void __launch_bounds__(kPoolThreads)
    pool_gather_blocks_kernel(PoolArguments<int32_t> p, PoolItems<int32_t> items, bool whole_rows, const T* grad_output,
                              Winners winners, T* grad_input, accumulate_t<T> same_share) {
  using A = accumulate_t<T>;
  constexpr int kFirst = -((K - 1 - P) / S), kLast = (P + S - 1) / S;
  const int32_t index = thread_index<int32_t>();
  if (index >= items.count) return;
  const auto at = items.at(index);
  const int32_t block = at.row * R, oh_0 = block + p.h.padding / S, ow_0 = at.column + p.w.padding / S;
  const int32_t plane = p.output_row(at.image, 0, 0) + at.lane * N, row_pitch = p.w.output * p.pitch;
  A sum[S * R][S][N] = {};
#pragma unroll
  for (int e = kFirst; e < kLast + R; ++e) {
    const int32_t oh = oh_0 + e;
#pragma unroll
    for (int c = kFirst; c <= kLast; ++c) {
      const int32_t ow = ow_0 + c;
      const bool inside = oh >= 0 && oh < p.h.output && ow >= 0 && ow < p.w.output;
      const int32_t offset = plane + oh * row_pitch + ow * p.pitch;
      Pack<T, N> grad = {};
      Pack<uint8_t, N> codes;
#pragma unroll
      for (int n = 0; n < N; ++n) codes.at[n] = K * K;
      if (inside) grad = load<N>(grad_output + offset);
      if (kMax && inside) codes = load<N>(winners.bytes + offset);
      const A share = !kMax && inside ? share_of<kMax>(p, 0, oh, ow, same_share) : A(1);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const A value = static_cast<A>(grad.at[n]) * share;
        const int code = codes.at[n];
#pragma unroll
        for (int i = 0; i < S * R; ++i) {
#pragma unroll
          for (int j = 0; j < S; ++j) {
            const int h_tap = P + i - S * e, w_tap = P + j - S * c;
            if (h_tap >= 0 && h_tap < K && w_tap >= 0 && w_tap < K && (!kMax || code == h_tap * K + w_tap))
              sum[i][j][n] += value;
          }
        }
      }
    }
  }
  const int32_t column = at.column * S;
#pragma unroll
  for (int i = 0; i < S * R; ++i) {
    if (block * S + i < p.h.input) {
      T* to = grad_input + p.input_row(at.image, 0, block * S + i) + column * p.pitch + at.lane * N;
      Pack<T, S * N> values;
#pragma unroll
      for (int j = 0; j < S; ++j) {
#pragma unroll
        for (int n = 0; n < N; ++n) values.at[j * N + n] = static_cast<T>(sum[i][j][n]);
      }
      if constexpr (N == 1) {
        if (whole_rows) {
          store<S>(to, values);
          continue;
        }
      }
#pragma unroll
      for (int j = 0; j < S; ++j) {
        Pack<T, N> pixel;
#pragma unroll
        for (int n = 0; n < N; ++n) pixel.at[n] = values.at[j * N + n];
        if (column + j < p.w.input) store<N>(to + j * p.pitch, pixel);
      }
    }
  }
}

// Backward of contiguous tensors where an image's one output reads all of it: a thread fills N neighbours.
template <bool kMax, int N, class Index, class T>
__global__ void __launch_bounds__(kPoolThreads)
    pool_fill_kernel(PoolArguments<Index> p, Index count, const T* grad_output, Winners winners, T* grad_input,
                     accumulate_t<T> same_share) {
  using A = accumulate_t<T>;
  const Index first = thread_index<Index>() * N;
  if (first >= count) return;
  Index image = p.w.by_input.quotient(first), pixel = first - image * p.w.input;
  const auto value_of = [&](Index of) {
    return kMax ? grad_output[of] : static_cast<T>(static_cast<A>(grad_output[of]) * same_share);
  };
  const auto winner_of = [&](Index of) { return kMax ? load_codes<1>(winners, of).at[0] : 0; };
  T value = value_of(image);
  int32_t winner = winner_of(image);
  Pack<T, N> values;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    if (pixel == p.w.input && first + n < count) {
      ++image;
      pixel = 0;
      value = value_of(image);
      winner = winner_of(image);
    }
    values.at[n] = !kMax || winner == pixel ? value : T(0);
    ++pixel;
  }
  if (first + N <= count) {
    store<N>(grad_input + first, values);
  } else {
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (first + n < count) grad_input[first + n] = values.at[n];
  }
}

// ---- the choice of a kernel

inline bool aligned(const void* values, const void* others, const Winners& winners) {
  return all_aligned(16, values, others, winners.bytes, winners.numbers);
}

// Calls body(N) with the channels of a thread: `kPack` where they come in whole packs, else 1.
template <int kPack, class Body>
void for_pack(const PoolPlan& plan, bool aligned, Body&& body) {
  if (aligned && plan.pitch % kPack == 0) return body(std::integral_constant<int, kPack>{});
  body(std::integral_constant<int, 1>{});
}

// Calls body(K, S), and returns true, for the windows of K x K taps at stride S that have kernels of their own.
template <class T, class Body>
bool for_common_window(const PoolPlan& plan, Body&& body) {
  const PoolAxis &h = plan.h, &w = plan.w;
  const bool square = h.taps == w.taps && h.stride == w.stride && !h.adaptive && !w.adaptive;
  if constexpr (!std::is_same_v<T, double>) {
    if (!square || plan.dilated() || !plan.is_flat() || plan.reach() >= index_limit()) return false;
    using std::integral_constant;
    if (w.taps == 2 && w.stride == 2) return body(integral_constant<int, 2>{}, integral_constant<int, 2>{}), true;
    if (w.taps == 3 && w.stride == 2) return body(integral_constant<int, 3>{}, integral_constant<int, 2>{}), true;
    if (w.taps == 3 && w.stride == 1) return body(integral_constant<int, 3>{}, integral_constant<int, 1>{}), true;
  }
  return false;
}

inline int64_t quotient_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

inline int64_t power_of_2_from(int64_t value) {
  int64_t power = 1;
  while (power < value) power *= 2;
  return power;
}

// The crew for windows of packs of `pack` columns, and outputs of which `lanes` lie side by side.
inline PoolCrew crew_for(const PoolPlan& plan, int64_t pack, int64_t lanes) {
  // What a worker reads: to aim at, to be worth a second kernel, and at most, which bounds the rounding of long sums.
  constexpr int64_t kTaps = 8, kTapsOfChunk = 16, kMostTaps = 256;
  const int64_t columns = quotient_up(plan.w.taps, pack), rows = plan.h.taps, taps = plan.d.taps * rows * columns;
  const int64_t outputs = plan.images * plan.output_pixels() * lanes;
  const int64_t side_by_side = plan.pitch > 1 ? std::min<int64_t>(32, power_of_2_from(outputs)) : 1;
  const int64_t workers = std::min(power_of_2_from(quotient_up(taps, kTaps)), kPoolThreads / side_by_side);
  const int64_t column_workers = std::min(workers, power_of_2_from(columns)), row_workers = workers / column_workers;
  const int64_t threads = quotient_up(outputs * workers, kPoolThreads) * kPoolThreads;
  const int64_t chunks = std::max<int64_t>(1, std::min(kFillingThreads / threads, taps / (workers * kTapsOfChunk)));
  const int64_t row_chunks = std::min(chunks, quotient_up(rows, row_workers));
  const int64_t column_chunks = std::max(rows > 1 ? 1 : chunks, quotient_up(columns, column_workers * kMostTaps));
  return {static_cast<int>(workers), static_cast<int>(column_workers), plan.pitch == 1,
          static_cast<unsigned>(row_chunks), static_cast<unsigned>(column_chunks)};
}

// Whether windows are large enough to be shared out: where there are too few outputs to fill the GPU, and in contiguous
// tensors where neighbouring outputs read far from each other.
inline bool needs_crew(const PoolPlan& plan, int64_t lanes) {
  constexpr double kLarge = 32;
  constexpr int64_t kFar = 16;
  return plan.taps() >= kLarge && (plan.images * plan.output_pixels() * lanes < kFillingThreads / 2 ||
                                   (plan.pitch == 1 && plan.w.stride >= kFar));
}

template <bool kMax, bool kAlong, int N, class Index, class T>
void pool_with_crew(const CudaGuard& guard, const PoolPlan& plan, const Tensor& like, const T* input, T* output,
                    const NewWinners& winners, accumulate_t<T> same_divisor) {
  using Part = Reduced<kMax, accumulate_t<T>>;
  const int64_t lanes = kAlong ? 1 : plan.pitch / N;
  const PoolArguments<Index> arguments(plan);
  const PoolItems<Index> items(plan.images, plan.d.output, plan.h.output, plan.w.output, lanes);
  const PoolCrew crew = crew_for(plan, kAlong ? N : 1, lanes);
  const int64_t outputs = plan.outputs(), chunks = crew.chunks();
  const unsigned blocks = blocks_for(items.count, crew.outputs());
  if (chunks == 1) {
    Part* const no_partials = nullptr;
    CU_LAUNCH(guard, (pool_crew_kernel<kMax, kAlong, N, Index, T>), blocks, kPoolThreads, 0, arguments, items, crew,
              blocks, input, output, winners, no_partials, same_divisor);
    return;
  }
  const Tensor scratch = new_tensor({outputs * chunks * static_cast<int64_t>(sizeof(Part))}, ScalarType::Byte, like);
  Part* const partials = reinterpret_cast<Part*>(cu_output<uint8_t>(scratch));
  CU_LAUNCH(guard, (pool_crew_kernel<kMax, kAlong, N, Index, T>), static_cast<unsigned>(blocks * chunks), kPoolThreads,
            0, arguments, items, crew, blocks, input, output, winners, partials, same_divisor);
  const PoolItems<Index> elements(plan.images, plan.d.output, plan.h.output, plan.w.output, plan.pitch);
  CU_LAUNCH(guard, (pool_chunks_kernel<kMax, Index, T>), blocks_for(outputs, kPoolThreads / kWarp), kPoolThreads, 0,
            arguments, elements, crew.chunks(), partials, output, winners, same_divisor);
}

template <bool kMax, class T>
void pool_forward(const CudaGuard& guard, const PoolPlan& plan, const Tensor& like, const T* input, T* output,
                  const NewWinners& winners, double divisor) {
  if (plan.outputs() == 0) return;
  const auto same_divisor = static_cast<accumulate_t<T>>(divisor);
  const bool packs = aligned(input, output, {winners.bytes, winners.numbers});

  const bool common = for_common_window<T>(plan, [&](auto taps, auto stride) {
    for_pack<4>(plan, packs, [&](auto pack) {
      constexpr int K = decltype(taps)::value, S = decltype(stride)::value, N = decltype(pack)::value;
      constexpr int R = N > 1 ? 2 : S == 1 ? 8 : 4;
      const PoolItems<int32_t> items(plan.images, 1, quotient_up(plan.h.output, R), plan.w.output, plan.pitch / N);
      CU_LAUNCH(guard, (pool_strip_kernel<kMax, K, S, R, N, T>), blocks_for(items.count, kPoolThreads), kPoolThreads, 0,
                PoolArguments<int32_t>(plan), items, input, output, winners, same_divisor);
    });
  });
  if (common) return;

  for_index_type(plan.reach(), [&](auto index) {
    using Index = decltype(index);
    // In 64 bits a thread takes one lane: that many elements are rare.
    for_pack<sizeof(Index) == 4 ? kWidest<T> : 1>(plan, packs, [&](auto pack) {
      constexpr int N = decltype(pack)::value;
      const int64_t lanes = plan.pitch / N;
      if (needs_crew(plan, lanes)) {
        if constexpr (N == 1 && sizeof(Index) == 4) {
          constexpr int kPack = std::min(4, kWidest<T>);
          if (packs && plan.rows_of_packs(kPack))
            return pool_with_crew<kMax, true, kPack, Index>(guard, plan, like, input, output, winners, same_divisor);
        }
        return pool_with_crew<kMax, false, N, Index>(guard, plan, like, input, output, winners, same_divisor);
      }
      const PoolItems<Index> items(plan.images, plan.d.output, plan.h.output, plan.w.output, lanes);
      CU_LAUNCH(guard, (pool_windows_kernel<kMax, N, Index, T>), blocks_for(items.count, kPoolThreads), kPoolThreads, 0,
                PoolArguments<Index>(plan), items, input, output, winners, same_divisor);
    });
  });
}

// The gradient by blocks of inputs, where the windows allow.
template <bool kMax, class T>
bool pool_backward_by_blocks(const CudaGuard& guard, const PoolPlan& plan, const T* grad_output, const Winners& winners,
                             T* grad_input, accumulate_t<T> same_share) {
  if (kMax && winners.bytes == nullptr) return false;
  bool done = false;
  for_common_window<T>(plan, [&](auto taps, auto stride) {
    for_pack<4>(plan, aligned(grad_output, grad_input, winners), [&](auto pack) {
      constexpr int K = decltype(taps)::value, S = decltype(stride)::value, N = decltype(pack)::value;
      constexpr int R = N == 1 ? (S == 1 ? 8 : 4) : (S == 1 ? 4 : 1);
      const auto launch = [&](auto padding) {
        constexpr int P = decltype(padding)::value;
        if (plan.h.padding % S != P || plan.w.padding % S != P) return;
        const int64_t strips = quotient_up(quotient_up(plan.h.input, S), R);
        const PoolItems<int32_t> items(plan.images, 1, strips, quotient_up(plan.w.input, S), plan.pitch / N);
        const bool whole_rows = plan.pitch == 1 && plan.w.input % S == 0;
        CU_LAUNCH(guard, (pool_gather_blocks_kernel<kMax, K, S, P, R, N, T>), blocks_for(items.count, kPoolThreads),
                  kPoolThreads, 0, PoolArguments<int32_t>(plan), items, whole_rows, grad_output, winners, grad_input,
                  same_share);
        done = true;
      };
      launch(std::integral_constant<int, 0>{});
      if constexpr (K == 3 && S == 2) launch(std::integral_constant<int, 1>{});
    });
  });
  return done;
}

template <bool kMax, class T>
void pool_backward(const CudaGuard& guard, const PoolPlan& plan, const T* grad_output, const Winners& winners,
                   T* grad_input, double divisor) {
  using A = accumulate_t<T>;
  const int64_t count = plan.inputs();
  if (count == 0) return;
  const A same_share = divisor != 0 ? 1 / static_cast<A>(divisor) : 0;
  if (pool_backward_by_blocks<kMax>(guard, plan, grad_output, winners, grad_input, same_share)) return;

  for_index_type(plan.reach(), [&](auto index) {
    using Index = decltype(index);
    if (plan.is_whole() && plan.pitch == 1) {
      constexpr int N = kWidest<T>;
      CU_LAUNCH(guard, (pool_fill_kernel<kMax, N, Index, T>), blocks_for(count, kPoolThreads * N), kPoolThreads, 0,
                PoolArguments<Index>(plan), static_cast<Index>(count), grad_output, winners, grad_input, same_share);
      return;
    }
    constexpr int kPack = sizeof(Index) == 4 ? kWidest<T> : 1;
    for_pack<kPack>(plan, aligned(grad_output, grad_input, winners), [&](auto pack) {
      constexpr int N = decltype(pack)::value;
      // Where a thread has one lane, several rows share the work on their column.
      const int rows = plan.pitch > 1 ? 1 : 4;
      const PoolItems<Index> items(plan.images, plan.d.input, quotient_up(plan.h.input, rows), plan.w.input,
                                   plan.pitch / N);
      CU_LAUNCH(guard, (pool_gather_kernel<kMax, N, Index, T>), blocks_for(items.count, kPoolThreads), kPoolThreads, 0,
                PoolArguments<Index>(plan), items, rows, grad_output, winners, grad_input, same_share);
    });
  });
}

}  // namespace manual_ops
