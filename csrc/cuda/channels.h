// Sums over every channel of tensors (N, C, ...), and functions applied to each element with numbers of its channel.
//
// Both layouts are matrices: contiguous tensors have a row for every image, whose columns are the channels' planes side
// by side; where the channels are innermost, a row is a pixel and a column a channel. A thread reads packs of
// neighbouring columns, of one channel or of several, whatever the size of a plane.
//
// A `Term` says what is summed and an `Op` what is computed. Both have
//   T                              the dtype of the tensors, a accumulate_t<T>
//   kInputs, inputs[kInputs]       tensors of one layout
//   Channel, channel(c)            the numbers of channel c, made once by each block that meets it; may be empty
// and a Term
//   kSums, add(channel, x, sums)   adds the element with the values x[kInputs] to sums[kSums]
// while an Op has `output` and gives op(channel, x).
#pragma once

#include <algorithm>
#include <numeric>

#include "cuda/cu.h"  // first: torch's headers leave out streams where they come before it

#include "channel_layout.h"

namespace manual_ops {

constexpr int kThreads = 256;

// How many channels' numbers a block holds.
constexpr int kBlockChannels = 256;

// Blocks that fill a large device, and leave no long tail when they come in more than one wave. Splits are made for
// this number, never for that of the device at hand: the order of a sum depends on the shape alone.
#ifdef CU_EMULATED
constexpr int64_t kSumBlocks = 8, kApplyBlocks = 1;  // threads meet their loops in small tensors already
#else
constexpr int64_t kSumBlocks = 2048, kApplyBlocks = 1024;
#endif

// Planes of at most so many pixels are summed column by column, as short ones would be read in crumbs.
constexpr int64_t kSmallPlane = 256;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Matrix {
  int64_t rows, columns, channels, pixels;  // `pixels`: columns of one channel

  explicit Matrix(const ChannelLayout& layout)
      : rows(layout.is_rows ? layout.rows : layout.batch),
        columns(layout.is_rows ? layout.channels : layout.channels * layout.pixels),
        channels(layout.channels),
        pixels(layout.is_rows ? 1 : layout.pixels) {}
};

// One number a channel, in any floating dtype; `otherwise` where there is no tensor.
struct ChannelNumbers {
  const void* values = nullptr;
  ScalarType dtype = ScalarType::Float;
  double otherwise;

  CU_DEVICE double operator[](int64_t channel) const {
    if (values == nullptr) return otherwise;
    switch (dtype) {
      case ScalarType::Double:
        return static_cast<const double*>(values)[channel];
      case ScalarType::Float:
        return static_cast<double>(static_cast<const float*>(values)[channel]);
      case ScalarType::BFloat16:
        return static_cast<double>(static_cast<float>(static_cast<const BFloat16*>(values)[channel]));
      default:
        return static_cast<double>(static_cast<float>(static_cast<const Half*>(values)[channel]));
    }
  }
};

// `dense` keeps the copy alive that is read where the tensor has gaps.
inline ChannelNumbers channel_numbers(const MaybeTensor& tensor, int64_t channels, double otherwise, const char* op,
                                      std::vector<Tensor>& dense) {
  if (!tensor) return {nullptr, ScalarType::Float, otherwise};
  check_channel_values(*tensor, channels, op);
  dense.push_back(as_contiguous(*tensor));
  ChannelNumbers numbers{nullptr, tensor->scalar_type(), otherwise};
  for_floating_dtype(numbers.dtype, op,
                     [&](auto scalar) { numbers.values = cu_input<decltype(scalar)>(dense.back()); });
  return numbers;
}

// The numbers of `count` channels from `first` on; waits for all threads.
template <class Work>
CU_DEVICE void make_channels(const Work& work, int64_t first, int count, typename Work::Channel* channels) {
  if constexpr (!std::is_empty_v<typename Work::Channel>) {
    static_assert(kBlockChannels <= kThreads);
    if (static_cast<int>(threadIdx.x) < count) channels[threadIdx.x] = work.channel(first + threadIdx.x);
    __syncthreads();
  }
}

// Those of the N columns from `column` on, whose first is of channels[0] if it is before `first_end`.
template <int N, class Channel>
CU_DEVICE void channels_of_columns(const Channel* channels, int64_t column, int64_t pixels, int64_t first_channel,
                                   Channel (&of)[N]) {
  if constexpr (!std::is_empty_v<Channel>) {
    const int64_t channel = column / pixels;
    int64_t left = (channel + 1) * pixels - column;
    const Channel* next = channels + (channel - first_channel);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (left == 0) ++next, left = pixels;
      of[k] = *next;
      --left;
    }
  }
}

template <int V, class Work>
struct Inputs {
  Pack<typename Work::T, V> of[Work::kInputs];
};

template <int V, class Work>
CU_DEVICE Inputs<V, Work> load_inputs(const Work& work, int64_t offset) {
  Inputs<V, Work> inputs;
#pragma unroll
  for (int i = 0; i < Work::kInputs; ++i) inputs.of[i] = load<V>(work.inputs[i] + offset);
  return inputs;
}

template <class T, int V>
CU_DEVICE accumulate_t<T> widened(const Pack<T, V>& pack, int k) {
  if constexpr (std::is_same_v<T, BFloat16> && V % 2 == 0) {
    // From the word of two, which stays one register: 97 registers become 76 in the sums over planes.
    uint32_t word;
    memcpy(&word, &pack.at[k / 2 * 2], sizeof(word));
    word = k % 2 == 0 ? word << 16 : word & 0xffff0000u;
    float value;
    memcpy(&value, &word, sizeof(value));
    return value;
  } else {
    return static_cast<accumulate_t<T>>(pack.at[k]);
  }
}

// x[i] = the element k of input i.
template <int V, class Work>
CU_DEVICE void element(const Inputs<V, Work>& inputs, int k, accumulate_t<typename Work::T> (&x)[Work::kInputs]) {
#pragma unroll
  for (int i = 0; i < Work::kInputs; ++i) x[i] = widened(inputs.of[i], k);
}

// Accesses that a thread has under way.
template <class Work>
constexpr int kBatch = 4 / Work::kInputs;

// ---- sums

// How columns are cut: a block sums `rows` rows of `channels` whole channels, in `lanes` of `packs` threads each.
struct ColumnTiles {
  int64_t channels, rows;
  int tiles, splits, packs, lanes;

  ColumnTiles(const Matrix& matrix, int pack, size_t element_bytes) {
    // The fewest channels that end where a pack ends, and as many of them as make 512 bytes of neighbours.
    const int64_t whole = pack / std::gcd<int64_t>(pack, matrix.pixels);
    const int64_t wanted = std::min<int64_t>(512 / element_bytes, kThreads);
    const int64_t several = std::max<int64_t>(1, wanted / (whole * matrix.pixels));
    tiles = static_cast<int>(divide_up(matrix.channels, whole * several));
    channels = std::min(divide_up(divide_up(matrix.channels, tiles), whole) * whole, matrix.channels);
    packs = static_cast<int>(channels * matrix.pixels / pack);
    lanes = kThreads / packs;
    // At least 8 rows a thread, as the blocks' sums cost memory too, and at most 256, as they lose digits.
    const int64_t most = divide_up(matrix.rows, 8 * lanes), asked = std::max<int64_t>(1, kSumBlocks / tiles);
    rows = std::min<int64_t>(divide_up(matrix.rows, std::min(most, asked)), 256 * lanes);
    splits = static_cast<int>(divide_up(matrix.rows, rows));
  }
};

// partial[channel][split][kSums]; a pack may hold several channels, a channel several packs.
template <int V, class Term>
__global__ void __launch_bounds__(kThreads)
    column_sums_kernel(Term term, Matrix matrix, ColumnTiles tiles, accumulate_t<typename Term::T>* partial) {
  using A = accumulate_t<typename Term::T>;
  constexpr int kSums = Term::kSums, kSteps = kBatch<Term>;
  CU_SHARED(typename Term::Channel, channels, [kBlockChannels]);
  CU_SHARED(A, shared, [kSums][kThreads * V]);
  const int block = blockIdx.x, split = block / tiles.tiles, tile = block % tiles.tiles;
  const int lane = threadIdx.x / tiles.packs, pack = threadIdx.x % tiles.packs, width = tiles.packs * V;
  const int64_t first_channel = tile * tiles.channels, column = first_channel * matrix.pixels + pack * V;
  const int count = static_cast<int>(min(tiles.channels, matrix.channels - first_channel));
  const bool active = lane < tiles.lanes && column < matrix.columns;
  const int rows = static_cast<int>(min(tiles.rows, matrix.rows - split * tiles.rows));
  const int64_t stride = tiles.lanes * matrix.columns;
  int64_t offset = (split * tiles.rows + lane) * matrix.columns + column;
  int row = active ? lane : rows;

  Inputs<V, Term> inputs[kSteps];
  const auto read = [&] {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      if (row + step * tiles.lanes < rows) inputs[step] = load_inputs<V>(term, offset + step * stride);
  };
  read();
  make_channels(term, first_channel, count, channels);
  A sums[V][kSums] = {};
  if (row < rows) {
    typename Term::Channel of[V];
    channels_of_columns(channels, column, matrix.pixels, first_channel, of);
    while (row < rows) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (row + step * tiles.lanes >= rows) break;
#pragma unroll
        for (int k = 0; k < V; ++k) {
          A x[Term::kInputs];
          element(inputs[step], k, x);
          term.add(of[k], x, sums[k]);
        }
      }
      row += kSteps * tiles.lanes, offset += kSteps * stride;
      read();
    }
  }

  // The lanes' sums in a tree, then the columns' of each channel.
  const auto write = [&] {
#pragma unroll
    for (int i = 0; i < kSums; ++i)
#pragma unroll
      for (int k = 0; k < V; ++k) shared[i][lane * width + pack * V + k] = sums[k][i];
  };
  if (active) write();
  for (int lanes = tiles.lanes; lanes > 1;) {
    const int half = (lanes + 1) / 2;
    __syncthreads();
    if (active && lane + half < lanes) {
#pragma unroll
      for (int i = 0; i < kSums; ++i)
#pragma unroll
        for (int k = 0; k < V; ++k) sums[k][i] += shared[i][(lane + half) * width + pack * V + k];
      write();
    }
    lanes = half;
  }
  __syncthreads();
  A* out = partial + (first_channel * tiles.splits + split) * kSums;
  if (matrix.pixels == 1) {
    const int c = threadIdx.x;
    if (c < count)
#pragma unroll
      for (int i = 0; i < kSums; ++i) out[c * tiles.splits * kSums + i] = shared[i][c];
    return;
  }
  const int pixels = static_cast<int>(matrix.pixels);
  for (int c = threadIdx.x / kWarp; c < count; c += kThreads / kWarp) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      A sum = 0;
      for (int pixel = threadIdx.x % kWarp; pixel < pixels; pixel += kWarp) sum += shared[i][c * pixels + pixel];
      sum = warp_reduce(sum, [](A a, A b) { return a + b; });
      if (threadIdx.x % kWarp == 0) out[c * tiles.splits * kSums + i] = sum;
    }
  }
}

// How planes are cut: a block sums `packs` of a channel's packs, which it counts over all images.
struct PlaneTiles {
  int64_t packs;
  int splits;

  PlaneTiles(const Matrix& matrix, int pack) {
    // A plane that starts within a pack may take one more.
    const int64_t of_channel = matrix.rows * (divide_up(matrix.pixels, pack) + (matrix.pixels % pack != 0));
    const int64_t most = divide_up(of_channel, 8 * kThreads);
    const int64_t asked = std::max<int64_t>(1, kSumBlocks / matrix.channels);
    packs = std::min<int64_t>(divide_up(of_channel, std::min(most, asked)), 256 * kThreads);
    splits = static_cast<int>(divide_up(of_channel, packs));
  }
};

// partial[channel][split][kSums]. Where a plane starts or ends within a pack, what lies outside is read and left out.
template <int V, class Term>
__global__ void __launch_bounds__(kThreads)
    plane_sums_kernel(Term term, Matrix matrix, PlaneTiles tiles, accumulate_t<typename Term::T>* partial) {
  using A = accumulate_t<typename Term::T>;
  constexpr int kSums = Term::kSums, kSteps = kBatch<Term>;
  CU_SHARED(typename Term::Channel, channels, [1]);
  const int block = blockIdx.x, split = block % tiles.splits;
  const int64_t channel = block / tiles.splits;
  const int64_t lead = channel * matrix.pixels % V;  // of a pack's values before the plane
  const int64_t packs = (lead + matrix.pixels + V - 1) / V;
  const int before = static_cast<int>(lead), behind = static_cast<int>(packs * V - lead - matrix.pixels);
  const int64_t first = split * tiles.packs + threadIdx.x;
  int left = static_cast<int>(min((split + 1) * tiles.packs, matrix.rows * packs) - first);  // from this thread's next

  // A thread's next pack is kThreads further on: so many whole images, and so much in the next.
  const int64_t images = kThreads / packs, rest = kThreads % packs;
  const int64_t step_offset = images * matrix.columns + rest * V, wrap_offset = matrix.columns - packs * V;
  int64_t in_plane = first % packs;
  int64_t offset = first / packs * matrix.columns + channel * matrix.pixels - lead + in_plane * V;

  Inputs<V, Term> inputs[kSteps];
  unsigned edges;  // two bits a step: whether the plane starts, and whether it ends in this pack
  const auto read = [&] {
    edges = 0;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (V > 1) edges |= ((in_plane == 0 ? 1u : 0u) | (in_plane == packs - 1 ? 2u : 0u)) << 2 * step;
      if (left > step * kThreads) inputs[step] = load_inputs<V>(term, offset);
      in_plane += rest, offset += step_offset;
      if (in_plane >= packs) in_plane -= packs, offset += wrap_offset;
    }
  };
  read();
  make_channels(term, channel, 1, channels);
  typename Term::Channel of;
  if constexpr (!std::is_empty_v<typename Term::Channel>) of = channels[0];
  A sums[V][kSums] = {};
  while (left > 0) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (left <= step * kThreads) break;
      const int from = edges >> 2 * step & 1 ? before : 0, to = edges >> 2 * step & 2 ? V - behind : V;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        A x[Term::kInputs];
        element(inputs[step], k, x);
        if (V == 1 || (k >= from && k < to)) term.add(of, x, sums[k]);
      }
    }
    left -= kSteps * kThreads;
    read();
  }

#pragma unroll
  for (int i = 0; i < kSums; ++i) {
#pragma unroll
    for (int half = V / 2; half > 0; half /= 2)
#pragma unroll
      for (int k = 0; k < half; ++k) sums[k][i] += sums[k + half][i];
    const A sum = block_sum(sums[0][i]);
    if (threadIdx.x == 0) partial[(channel * tiles.splits + split) * kSums + i] = sum;
  }
}

// finish(channel, its sums), in double.
template <int kSums, class A, class Finish>
__global__ void __launch_bounds__(kThreads) finish_sums_kernel(Finish finish, const A* partial, int splits) {
  const int64_t channel = blockIdx.x;
  double sums[kSums] = {};
  for (int split = threadIdx.x; split < splits; split += blockDim.x)
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] += static_cast<double>(partial[(channel * splits + split) * kSums + i]);
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] = block_sum(sums[i]);
  if (threadIdx.x == 0) finish(channel, sums);
}

// Packs need every row to start at a multiple of 16 bytes.
template <class Work>
bool takes_packs(const Work& work, const Matrix& matrix) {
  using T = typename Work::T;
  bool aligned = matrix.columns % kWidest<T> == 0;
  for (const T* input : work.inputs) aligned = aligned && all_aligned(16, input);
  return aligned;
}

// The sums of `term` over each channel, in a tree that depends on the shape alone, then finish(channel, sums), once a
// channel. `like` is a tensor of the device.
template <class Term, class Finish>
void sum_channels(const CudaGuard& guard, const Term& term, const Matrix& matrix, const Finish& finish,
                  const Tensor& like) {
  using T = typename Term::T;
  using A = accumulate_t<T>;
  if (matrix.channels == 0) return;
  const auto finish_sums = [&](const A* partial, int splits) {
    const int64_t threads = std::clamp<int64_t>(divide_up(splits, kWarp), 1, kThreads / kWarp) * kWarp;
    CU_LAUNCH(guard, (finish_sums_kernel<Term::kSums, A, Finish>), static_cast<unsigned>(matrix.channels),
              static_cast<unsigned>(threads), 0, finish, partial, splits);
  };
  if (matrix.rows == 0 || matrix.pixels == 0) return finish_sums(nullptr, 0);
  const auto run = [&](auto pack) {
    constexpr int V = decltype(pack)::value;
    const auto launch = [&](auto kernel, const auto& tiles, int64_t parts) {
      const Tensor partial = new_tensor({matrix.channels * tiles.splits * Term::kSums}, scalar_type_of<A>(), like);
      A* sums = cu_output<A>(partial);
      CU_LAUNCH(guard, kernel, static_cast<unsigned>(parts * tiles.splits), kThreads, 0, term, matrix, tiles, sums);
      finish_sums(sums, tiles.splits);
    };
    if (matrix.pixels <= kSmallPlane) {
      const ColumnTiles tiles(matrix, V, sizeof(T));
      launch(column_sums_kernel<V, Term>, tiles, tiles.tiles);
    } else {
      const PlaneTiles tiles(matrix, V);
      launch(plane_sums_kernel<V, Term>, tiles, matrix.channels);
    }
  };
  if (takes_packs(term, matrix)) {
    run(std::integral_constant<int, kWidest<T>>{});
  } else {
    run(std::integral_constant<int, 1>{});
  }
}

// ---- functions of an element and its channel

// How elements are cut: a block takes `packs` threads of V neighbouring columns, in `lanes` of different rows.
// Blocks are counted backwards, so that they first meet what the sums before them read last.
struct Tiles {
  int64_t columns, rows, pixels;
  int tiles, row_blocks, rows_per_block, packs, lanes;
  bool rows_outside;

  // `pixels`: columns of a channel.
  Tiles(int64_t rows_, int64_t columns_, int64_t pixels_, int pack, bool rows_outside_)
      : columns(columns_), rows(rows_), pixels(pixels_), rows_outside(rows_outside_) {
    // So many columns meet at most kBlockChannels channels, wherever they begin.
    const int64_t most =
        std::max<int64_t>(1, ((kBlockChannels - 2) * std::min(pixels, int64_t{kThreads} * 8) + 2) / pack);
    const int64_t all = divide_up(columns, pack);
    tiles = static_cast<int>(divide_up(all, std::min<int64_t>(most, kThreads)));
    packs = static_cast<int>(divide_up(all, tiles));
    lanes = kThreads / packs;
    const int64_t rows_per_lane = std::clamp<int64_t>(int64_t{tiles} * rows / (lanes * kApplyBlocks), 1, 8);
    rows_per_block = static_cast<int>(rows_per_lane) * lanes;
    row_blocks = static_cast<int>(divide_up(rows, rows_per_block));
  }

  unsigned blocks() const { return static_cast<unsigned>(int64_t{tiles} * row_blocks); }
};

// A thread's part: of the columns from `column` on, a row in every `lanes` while `left`, counted from its next, lasts.
struct Spot {
  int64_t first, column, row;  // `first`: the block's first column
  int left;

  CU_DEVICE Spot(const Tiles& tiles, int pack) {
    const int block = gridDim.x - 1 - blockIdx.x, inside = tiles.rows_outside ? tiles.tiles : tiles.row_blocks;
    const int outer = block / inside, inner = block % inside, lane = threadIdx.x / tiles.packs;
    const int64_t tile = tiles.rows_outside ? inner : outer, row_block = tiles.rows_outside ? outer : inner;
    first = tile * tiles.packs * pack;
    column = first + static_cast<int>(threadIdx.x) % tiles.packs * pack;
    row = row_block * tiles.rows_per_block + lane;
    left = static_cast<int>(min((row_block + 1) * tiles.rows_per_block, tiles.rows) - row);
    if (lane >= tiles.lanes || column >= tiles.columns) left = 0;
  }

  CU_DEVICE int64_t first_channel(const Tiles& tiles) const { return first / tiles.pixels; }
  CU_DEVICE int channels(const Tiles& tiles, int pack) const {
    const int64_t last = min(first + tiles.packs * pack, tiles.columns) - 1;
    return static_cast<int>(last / tiles.pixels - first_channel(tiles) + 1);
  }
};

// A pack is of one channel or of up to V. Three blocks on a multiprocessor have 48 KB under way, enough for its share
// of the bandwidth; to fit more of them the compiler spills.
template <int V, bool kOneChannel, class Op>
__global__ void __launch_bounds__(kThreads, 3) apply_kernel(Op op, Tiles tiles) {
  using T = typename Op::T;
  constexpr int kSteps = kBatch<Op>;
  CU_SHARED(typename Op::Channel, channels, [kBlockChannels]);
  const Spot spot(tiles, V);
  const int64_t stride = tiles.lanes * tiles.columns;
  int64_t offset = spot.row * tiles.columns + spot.column;
  int left = spot.left;

  Inputs<V, Op> inputs[kSteps];
  const auto read = [&] {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      if (left > step * tiles.lanes) inputs[step] = load_inputs<V>(op, offset + step * stride);
  };
  read();
  make_channels(op, spot.first_channel(tiles), spot.channels(tiles, V), channels);
  if (left <= 0) return;
  typename Op::Channel of[kOneChannel ? 1 : V];
  channels_of_columns(channels, spot.column, tiles.pixels, spot.first_channel(tiles), of);
  while (left > 0) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (left <= step * tiles.lanes) break;
      Pack<T, V> result;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        accumulate_t<T> x[Op::kInputs];
        element(inputs[step], k, x);
        result.at[k] = op(of[kOneChannel ? 0 : k], x);
      }
      store<V>(op.output + offset + step * stride, result);
    }
    left -= kSteps * tiles.lanes, offset += kSteps * stride;
    read();
  }
}

template <class Op>
void apply_to_channels(const CudaGuard& guard, const Op& op, const Matrix& matrix) {
  constexpr int kMany = kWidest<typename Op::T>;
  if (matrix.rows == 0 || matrix.columns == 0) return;
  const bool packs = takes_packs(op, matrix) && all_aligned(16, op.output);
  // In the order of the sums.
  const Tiles tiles(matrix.rows, matrix.columns, matrix.pixels, packs ? kMany : 1, matrix.pixels <= kSmallPlane);
  const auto launch = [&](auto kernel) { CU_LAUNCH(guard, kernel, tiles.blocks(), kThreads, 0, op, tiles); };
  if (!packs) {
    launch(apply_kernel<1, true, Op>);
  } else if (matrix.pixels % kMany == 0) {
    launch(apply_kernel<kMany, true, Op>);
  } else {
    launch(apply_kernel<kMany, false, Op>);
  }
}

}  // namespace manual_ops
