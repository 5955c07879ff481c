// The tile kernel behind product.h. A block computes a tile of rows x columns (for one group and phase) over a part of
// the terms: each step brings kDepth terms of x and y into shared memory, double-buffered, while the loads of the next
// step are on their way, and each thread multiplies a block of registers. Sums are in the accumulation dtype. Where the
// tiles are too few to fill a device, the terms are split: the parts go to scratch memory, and a second kernel adds
// them in their order. The split depends on the sizes alone.
#include "cuda/product.h"

#include <bit>
#include <climits>

namespace manual_ops {

namespace {

constexpr int kDepth = 8;
// So many terms are summed in a row; the sums of such runs are added up in shared memory. Roundings grow with the
// length of a run and the number of runs, not with all terms.
constexpr int kRunSteps = 256 / kDepth;
// The position along the depth axis of a row or a term that does not exist: with any other, and with each other, they
// add up to one that is outside.
constexpr uint32_t kNoRow = 1u << 31, kNoTerm = 1u << 30;

// Threads load a row each, so there are as many rows as threads. A thread sums a block of thread_rows x thread_columns;
// a warp is 8 threads along the rows and 4 along the columns.
template <int threads, int columns, int thread_rows, int thread_columns>
struct Tile {
  static constexpr int kThreads = threads, kRows = threads, kColumns = columns;
  static constexpr int kThreadRows = thread_rows, kThreadColumns = thread_columns;
  static constexpr int kWarpRows = 8 * thread_rows, kWarpColumns = 4 * thread_columns;
  static_assert(kRows * kColumns == kThreads * thread_rows * thread_columns && columns % kWarpColumns == 0);

  // A thread's i-th row and j-th column lie so far behind its first: four together, then four behind those of all
  // threads of the warp.
  CU_DEVICE static constexpr int row_of(int i) { return i % 4 + i / 4 * 32; }
  CU_DEVICE static constexpr int column_of(int j) { return j % 4 + j / 4 * 16; }
};
using Large = Tile<128, 64, 8, 8>;
using Small = Tile<64, 32, 8, 4>;

// Double's sums of a large tile would not fit the registers, and its rounding needs no runs.
template <class T>
constexpr bool has_large_tiles = !std::is_same_v<T, double>;
template <class T>
constexpr bool has_runs = !std::is_same_v<T, double>;

// How the loads of x are shared by the threads of a warp.
enum class Access {
  rows,   // a row each
  packs,  // a row each, several neighbouring terms in one access
  terms,  // neighbouring terms
};

// What a row or a term adds to the positions and the places.
struct alignas(16) Place {
  uint32_t at[4];  // an axis each, and one more for an access of 16 bytes
  int64_t x, other;
};
static_assert(kAxes < 4);

template <class T>
struct Operands {
  const T *x, *y, *bias;
  T* output;
  accumulate_t<T>* parts;  // where the terms are split: as many outputs as there are splits
  int64_t outputs;
};

struct Grid {
  Size column_tiles, row_tiles, phases, groups;
  int64_t splits;
  int64_t split_steps;  // of a split, at most
  bool wide;            // rows or terms are too many for 32 bits
};

// The last digit of `index`, which loses it.
CU_DEVICE int64_t take_digit(int64_t& index, const Size& size, bool wide) {
  const int64_t rest = wide ? index / size.value : size.divider.quotient(static_cast<int32_t>(index));
  const int64_t digit = index - rest * size.value;
  index = rest;
  return digit;
}

CU_DEVICE Place place_of(const Walk& walk, const Begin (&begin)[kAxes], int64_t index, bool wide) {
  Place place{};
  int64_t lot = walk.lots_fastest ? take_digit(index, walk.lots, wide) : 0;
#pragma unroll
  for (int axis = kAxes - 1; axis >= 0; --axis) {
    const int64_t digit = take_digit(index, walk.axis[axis].size[begin[axis].size], wide);
    place.x += begin[axis].x + digit * walk.axis[axis].x;
    place.other += begin[axis].other + digit * walk.axis[axis].other;
    place.at[axis] = begin[axis].at + static_cast<uint32_t>(digit) * walk.axis[axis].at;
  }
  if (!walk.lots_fastest) lot = index;
  place.x += lot * walk.lot_x;
  place.other += lot * walk.lot_other;
  return place;
}

CU_DEVICE int64_t count(const Walk& walk, const Begin (&begin)[kAxes]) {
  int64_t product = walk.lots.value;
#pragma unroll
  for (int axis = 0; axis < kAxes; ++axis) product *= walk.axis[axis].size[begin[axis].size].value;
  return product;
}

// Destination q*phases + phase reads, through tap t, the source (q*phases + phase + padding - t*dilation) / stride,
// where that is whole: so for the taps t with t*dilation = phase + padding modulo the stride.
CU_DEVICE void begin_phase(const PhaseAxis& axis, int64_t source_step, int64_t phase, Begin& row, Begin& term) {
  row = {0, phase * axis.row_step, 0, phase < axis.longer_rows};
  const int64_t shifted = phase + axis.padding, residue = shifted % axis.stride;
  const int64_t first = residue / axis.common * axis.inverse % axis.period;
  const int64_t source = (shifted - first * axis.dilation) / axis.stride;
  const int size = residue % axis.common != 0 ? 2 : first < axis.more_taps;
  term = {source * source_step, first * axis.tap_step, static_cast<uint32_t>(source), size};
}

// Without a branch, so that the loads that depend on it are predicated and all under way at once.
CU_DEVICE bool is_inside(const Pack<uint32_t, 4>& row, const Place& term, const uint32_t (&inside)[kAxes]) {
  const Pack<uint32_t, 4> at = load<4>(term.at);
  return (row.at[0] + at.at[0] < inside[0]) & (row.at[1] + at.at[1] < inside[1]) & (row.at[2] + at.at[2] < inside[2]);
}

// Writes neighbouring results, those of them that are `valid`, at the places offset(0) < offset(1) < ...
template <int N, class S, class A, class Offset>
CU_DEVICE void put(S* to, int valid, const Offset& offset, const A (&values)[N]) {
  S* first = to + offset(0);
  if (valid >= N && offset(N - 1) - offset(0) == N - 1 && reinterpret_cast<uintptr_t>(first) % (N * sizeof(S)) == 0) {
    Pack<S, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.at[i] = static_cast<S>(values[i]);
    store<N>(first, pack);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < valid) to[offset(i)] = static_cast<S>(values[i]);
  }
}

template <class Tile, class S, class A>
CU_DEVICE void put_tile(S* to, int64_t column_step, const Place (&rows)[Tile::kRows], int first_row, int valid_rows,
                        int first_column, int valid_columns, const A (&sums)[Tile::kThreadRows][Tile::kThreadColumns]) {
  constexpr int N = kWidest<A>;
  if (column_step == 1) {
#pragma unroll
    for (int i = 0; i < Tile::kThreadRows; ++i) {
      const int row = first_row + Tile::row_of(i);
#pragma unroll
      for (int j = 0; j < Tile::kThreadColumns; j += N) {
        const int column = first_column + Tile::column_of(j);
        A values[N];
#pragma unroll
        for (int n = 0; n < N; ++n) values[n] = sums[i][j + n];
        const int64_t place = rows[row].other + column;
        put(
            to, row < valid_rows ? valid_columns - column : 0, [=](int n) { return place + n; }, values);
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < Tile::kThreadColumns; ++j) {
      const int column = first_column + Tile::column_of(j);
#pragma unroll
      for (int i = 0; i < Tile::kThreadRows; i += N) {
        const int row = first_row + Tile::row_of(i);
        A values[N];
#pragma unroll
        for (int n = 0; n < N; ++n) values[n] = sums[i + n][j];
        const int64_t place = column * column_step;
        const auto offset = [=, &rows](int n) { return rows[row + n].other + place; };
        put(to, column < valid_columns ? valid_rows - row : 0, offset, values);
      }
    }
  }
}

template <class T, class Tile, Access access>
__global__ void __launch_bounds__(Tile::kThreads)
    product_kernel(const Product product, const Operands<T> operands, const Grid grid) {
  using A = accumulate_t<T>;
  constexpr int kThreads = Tile::kThreads, kRows = Tile::kRows, kColumns = Tile::kColumns;
  constexpr int kThreadRows = Tile::kThreadRows, kThreadColumns = Tile::kThreadColumns;
  constexpr int kTableSteps = kThreads / kDepth;  // of the table of terms
  constexpr int kPack = access == Access::packs ? kWidest<T> : 1;
  constexpr int kLoads = kDepth * kColumns / kThreads;  // of y, a thread and step
  CU_SHARED(Begin, begin_rows, [kAxes]);
  CU_SHARED(Begin, begin_terms, [kAxes]);
  CU_SHARED(Place, rows, [kRows]);
  CU_SHARED(Place, terms, [kThreads]);  // of the kTableSteps steps that come next
  CU_SHARED(A, x_tile, [2][kDepth][kRows + 4]);
  CU_SHARED(A, y_tile, [2][kDepth][kColumns + 4]);
  const int thread = threadIdx.x;

  int64_t rest = blockIdx.x;
  const int64_t first_column = take_digit(rest, grid.column_tiles, false) * kColumns;
  const int64_t first_row = take_digit(rest, grid.row_tiles, false) * kRows;
  int64_t phase = take_digit(rest, grid.phases, false);
  const int64_t group = take_digit(rest, grid.groups, false), split = rest;

  if (thread < kAxes) {
    begin_rows[thread] = product.rows.axis[thread].begin;
    begin_terms[thread] = product.terms.axis[thread].begin;
    if (product.phased) {
      for (int axis = kAxes - 1; axis > thread; --axis) phase /= product.phases[axis];
      begin_phase(product.phase[thread], product.rows.axis[thread].x, phase % product.phases[thread],
                  begin_rows[thread], begin_terms[thread]);
    }
  }
  __syncthreads();
  const int64_t row_count = count(product.rows, begin_rows), term_count = count(product.terms, begin_terms);
  if (first_row >= row_count) return;  // a phase with fewer rows than the first
  const int valid_rows = static_cast<int>(min(row_count - first_row, static_cast<int64_t>(kRows)));
  const int valid_columns = static_cast<int>(min(product.columns - first_column, static_cast<int64_t>(kColumns)));
  const int64_t all_steps = (term_count + kDepth - 1) / kDepth;
  const int64_t last_step = all_steps * (split + 1) / grid.splits;
  int64_t step = all_steps * split / grid.splits;

  Place own_row{};
  own_row.at[0] = kNoRow;
  if (thread < valid_rows) own_row = place_of(product.rows, begin_rows, first_row + thread, grid.wide);
  rows[thread] = own_row;
  const Pack<uint32_t, 4> own_at = load<4>(own_row.at);

  // A thread loads y at y_term + i*y_term_step, y_column + i*y_column_step.
  const bool y_by_terms = product.y_by_terms;
  const int y_term = y_by_terms ? thread % kDepth : thread / kColumns;
  const int y_term_step = y_by_terms ? 0 : kThreads / kColumns;
  const int y_column = y_by_terms ? thread / kDepth : thread % kColumns;
  const int y_column_step = y_by_terms ? kThreads / kDepth : 0;
  const int64_t y_load_step = y_column_step * product.column_y;
  const T *x = operands.x, *y = operands.y;
  if (step < last_step) {  // else they may be null
    x += group * product.group_x + (access == Access::terms ? 0 : own_row.x);
    y += group * product.group_y + (first_column + y_column) * product.column_y;
  }

  const auto fill_terms = [&](int64_t at_step) {
    const int64_t index = at_step * kDepth + thread;
    Place term{};
    term.at[0] = kNoTerm;
    term.other = -1;
    if (index < term_count) term = place_of(product.terms, begin_terms, index, grid.wide);
    terms[thread] = term;
  };

  Pack<T, kPack> x_next[kDepth / kPack];
  T y_next[kLoads];
  const auto fetch = [&](const Place* table) {
    if constexpr (access == Access::terms) {
      const Place& term = table[thread % kDepth];
      const int64_t place = term.x;
#pragma unroll
      for (int i = 0; i < kDepth; ++i) {
        const Place& row = rows[thread / kDepth + i * (kThreads / kDepth)];
        x_next[i].at[0] = static_cast<T>(0.0f);
        if (is_inside(load<4>(row.at), term, product.inside)) x_next[i].at[0] = x[row.x + place];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kDepth / kPack; ++i) {
        const Place& term = table[i * kPack];
        const int64_t place = term.x;
#pragma unroll
        for (int n = 0; n < kPack; ++n) x_next[i].at[n] = static_cast<T>(0.0f);
        if (is_inside(own_at, term, product.inside)) x_next[i] = load<kPack>(x + place);
      }
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t place = table[y_term + i * y_term_step].other;
      y_next[i] = static_cast<T>(0.0f);
      if ((place >= 0) & (y_column + i * y_column_step < valid_columns)) y_next[i] = y[i * y_load_step + place];
    }
  };
  const auto put_fetched = [&](int buffer) {
#pragma unroll
    for (int i = 0; i < kDepth / kPack; ++i) {
#pragma unroll
      for (int n = 0; n < kPack; ++n) {
        const A value = static_cast<A>(x_next[i].at[n]);
        if constexpr (access == Access::terms)
          x_tile[buffer][thread % kDepth][thread / kDepth + i * (kThreads / kDepth)] = value;
        else
          x_tile[buffer][i * kPack + n][thread] = value;
      }
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      y_tile[buffer][y_term + i * y_term_step][y_column + i * y_column_step] = static_cast<A>(y_next[i]);
  };

  const int lane = thread % kWarp, warp = thread / kWarp;
  const int own_rows = warp % (kRows / Tile::kWarpRows) * Tile::kWarpRows + lane % 8 * 4;
  const int own_columns = warp / (kRows / Tile::kWarpRows) * Tile::kWarpColumns + lane / 8 * 4;
  A sums[kThreadRows][kThreadColumns] = {};
  const auto accumulate = [&](int buffer) {
    constexpr int N = kWidest<A>;
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      Pack<A, N> xs[kThreadRows / N], ys[kThreadColumns / N];
#pragma unroll
      for (int i = 0; i < kThreadRows / N; ++i) xs[i] = load<N>(&x_tile[buffer][k][own_rows + Tile::row_of(i * N)]);
#pragma unroll
      for (int j = 0; j < kThreadColumns / N; ++j)
        ys[j] = load<N>(&y_tile[buffer][k][own_columns + Tile::column_of(j * N)]);
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
        for (int j = 0; j < kThreadColumns; ++j) sums[i][j] += xs[i / N].at[i % N] * ys[j / N].at[j % N];
    }
  };

  // Float's sums of the runs so far, where there is more than one run.
  bool has_totals = false;
  const auto total = [&](int i, int j) -> A& {
    return cu_dynamic_shared<A>()[(i * kThreadColumns + j) * kThreads + thread];
  };
  const auto end_run = [&] {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
      for (int j = 0; j < kThreadColumns; ++j) {
        total(i, j) = has_totals ? total(i, j) + sums[i][j] : sums[i][j];
        sums[i][j] = 0;
      }
    }
    has_totals = true;
  };

  int in_table = 0, in_run = 0, buffer = 0;
  fill_terms(step);
  __syncthreads();
  if (step < last_step) {
    fetch(terms);
    put_fetched(buffer);
  }
  __syncthreads();
  for (; step < last_step; ++step) {
    const bool more = step + 1 < last_step;
    if (more) {
      if (++in_table == kTableSteps) {
        in_table = 0;
        fill_terms(step + 1);
        __syncthreads();
      }
      fetch(terms + in_table * kDepth);
    }
    accumulate(buffer);
    buffer ^= 1;
    if (more) put_fetched(buffer);
    if constexpr (has_runs<T>) {
      if (more && ++in_run == kRunSteps) {
        in_run = 0;
        end_run();
      }
    }
    __syncthreads();
  }
  if (has_totals) {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
      for (int j = 0; j < kThreadColumns; ++j) sums[i][j] += total(i, j);
  }

  const int64_t place = group * product.group_output + first_column * product.column_output;
  if (grid.splits > 1) {
    put_tile<Tile>(operands.parts + split * operands.outputs + place, product.column_output, rows, own_rows, valid_rows,
                   own_columns, valid_columns, sums);
    return;
  }
  if (operands.bias != nullptr) {
#pragma unroll
    for (int j = 0; j < kThreadColumns; ++j) {
      const int column = own_columns + Tile::column_of(j);
      if (column >= valid_columns) continue;
      const A bias = static_cast<A>(operands.bias[group * product.columns + first_column + column]);
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) sums[i][j] += bias;
    }
  }
  put_tile<Tile>(operands.output + place, product.column_output, rows, own_rows, valid_rows, own_columns, valid_columns,
                 sums);
}

// The sum of the parts of each output, and the bias. `shares` groups of threads take every shares-th part each; theirs
// are added in order.
template <class T, class Index>
__global__ void __launch_bounds__(256)
    add_parts_kernel(const accumulate_t<T>* parts, int64_t part_count, int shares, const T* bias,
                     Divider<Index> channel_step, Divider<Index> channels, Index outputs, T* output) {
  using A = accumulate_t<T>;
  CU_SHARED(A, sums, [256]);
  const int width = 256 / shares, lane = static_cast<int>(threadIdx.x) % width;
  const int share = static_cast<int>(threadIdx.x) / width;
  const Index index = static_cast<Index>(blockIdx.x) * width + lane;
  A sum = 0;
  if (index < outputs) {
#pragma unroll 4
    for (int64_t part = share; part < part_count; part += shares) sum += parts[part * outputs + index];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (share > 0 || index >= outputs) return;
  for (int other = 1; other < shares; ++other) sum += sums[other * width + lane];
  if (bias != nullptr) {
    const Index run = channel_step.quotient(index);
    sum += static_cast<A>(bias[run - channels.quotient(run) * channels.divisor()]);
  }
  output[index] = static_cast<T>(sum);
}

#ifdef CU_EMULATED
constexpr int64_t kMultiprocessors = 2;  // so that small sizes meet both tiles, split and whole
#else
constexpr int64_t kMultiprocessors = 132;  // of an H100: no other device would give other bits
#endif
constexpr int64_t kMostSplits = 256, kMostPartBytes = int64_t{256} << 20;

struct Cut {
  bool large;
  int64_t splits;
};

// The time of a launch in clock cycles, estimated from the instructions of the kernel: a multiprocessor that holds b
// blocks takes max(latency, b * work) for a step of all of them.
struct Cost {
  int64_t rows, columns;  // of a tile
  int64_t resident;       // blocks that a multiprocessor holds
  int64_t work, latency;
};
constexpr Cost kLargeCost{Large::kRows, Large::kColumns, 3, 750, 1000};
constexpr Cost kSmallCost{Small::kRows, Small::kColumns, 9, 240, 700};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t clocks(const Cost& cost, int64_t tiles, int64_t steps, int64_t outputs, int64_t splits) {
  constexpr int64_t kBlockStart = 2000, kLaunch = 5000, kBytesPerClock = 1500;
  const int64_t blocks = ceil_div(tiles * splits, kMultiprocessors), waves = blocks / cost.resident;
  const int64_t last = blocks % cost.resident;
  const int64_t of_step = waves * cost.resident * cost.work + (last > 0 ? std::max(cost.latency, last * cost.work) : 0);
  const int64_t adding = splits == 1 ? 0 : kLaunch + 8 * outputs * splits / kBytesPerClock;
  return of_step * ceil_div(steps, splits) + (waves + 1) * kBlockStart + adding;
}

// The cheapest tile and split. Splits grow by factors of 4/3 and 3/2.
Cut cheapest(bool large_too, int64_t rows, int64_t columns, int64_t copies, int64_t steps, int64_t outputs) {
  Cut best{false, 1};
  int64_t least = INT64_MAX;
  for (const bool large : {false, true}) {
    if (large && !large_too) break;
    const Cost& cost = large ? kLargeCost : kSmallCost;
    const int64_t tiles = ceil_div(rows, cost.rows) * ceil_div(columns, cost.columns) * copies;
    for (int64_t splits = 1; splits <= std::min(kMostSplits, std::max<int64_t>(1, steps));
         splits = (splits & (splits - 1)) == 0 ? std::max(splits + 1, splits * 3 / 2) : splits * 4 / 3) {
      if (splits > 1 && splits * outputs * 8 > kMostPartBytes) break;
      const int64_t estimate = clocks(cost, tiles, steps, outputs, splits);
      if (estimate >= least) continue;
      least = estimate;
      best = {large, splits};
    }
  }
  return best;
}

int64_t most(const Walk& walk) {
  int64_t product = walk.lots.value;
  for (const Walk::Axis& axis : walk.axis) product *= std::max(axis.size[0].value, axis.size[1].value);
  return product;
}

// Whether kWidest<T> neighbouring terms of a row always lie together, are all inside or none, and are aligned.
template <class T>
bool reads_packs(const Product& product, const T* x) {
  constexpr int N = kWidest<T>;
  bool whole = product.terms.lots_fastest && product.terms.lot_x == 1 && product.terms.lots.value % N == 0 &&
               product.rows.lot_x % N == 0 && product.group_x % N == 0 && all_aligned(16, x);
  for (const Walk* walk : {&product.rows, &product.terms})
    for (const Walk::Axis& axis : walk->axis) whole = whole && axis.x % N == 0 && axis.begin.x % N == 0;
  return whole;
}

template <class T, class Tile, Access access>
void launch_as(const CudaGuard& guard, const Product& product, const Operands<T>& operands, const Grid& grid) {
  const int64_t blocks =
      grid.column_tiles.value * grid.row_tiles.value * grid.phases.value * grid.groups.value * grid.splits;
  STD_TORCH_CHECK(blocks <= INT_MAX, product.name, ": the output is too large for one launch");
  const bool has_totals = has_runs<T> && grid.split_steps > kRunSteps;
  CU_LAUNCH(guard, (product_kernel<T, Tile, access>), static_cast<unsigned>(blocks), Tile::kThreads,
            has_totals ? Tile::kRows * Tile::kColumns * sizeof(accumulate_t<T>) : 0, product, operands, grid);
}

template <class T, class Tile>
void launch(const CudaGuard& guard, const Product& product, const Operands<T>& operands, const Grid& grid) {
  if (reads_packs(product, operands.x)) return launch_as<T, Tile, Access::packs>(guard, product, operands, grid);
  if (product.x_by_terms) return launch_as<T, Tile, Access::terms>(guard, product, operands, grid);
  launch_as<T, Tile, Access::rows>(guard, product, operands, grid);
}

template <class T>
void add_parts(const CudaGuard& guard, const Product& product, const Operands<T>& operands, int64_t splits) {
  const int shares = static_cast<int>(std::clamp<int64_t>(std::bit_floor(static_cast<uint64_t>(splits)) / 2, 1, 8));
  for_index_type(operands.outputs, [&](auto index) {
    using Index = decltype(index);
    CU_LAUNCH(guard, (add_parts_kernel<T, Index>), blocks_for(operands.outputs, 256 / shares), 256, 0, operands.parts,
              splits, shares, operands.bias, Divider<Index>(product.channel_step),
              Divider<Index>(product.groups * product.columns), operands.outputs, operands.output);
  });
}

}  // namespace

void multiply(const CudaGuard& guard, Product product, const Tensor& x, const Tensor& y,
              const std::optional<Tensor>& bias, const Tensor& output) {
  if (x.numel() == 0 || y.numel() == 0) product.terms.lots = 0;
  const int64_t rows = most(product.rows), terms = most(product.terms);
  const int64_t phases = product.phases[0] * product.phases[1] * product.phases[2];
  const int64_t steps = ceil_div(terms, kDepth);
  for_floating_dtype(output.scalar_type(), product.name, [&](auto scalar) {
    using T = decltype(scalar);
    using A = accumulate_t<T>;
    const Cut cut = cheapest(has_large_tiles<T>, rows, product.columns, phases * product.groups, steps, output.numel());
    const Cost& cost = cut.large ? kLargeCost : kSmallCost;
    const Grid grid{.column_tiles = ceil_div(product.columns, cost.columns),
                    .row_tiles = ceil_div(rows, cost.rows),
                    .phases = phases,
                    .groups = product.groups,
                    .splits = cut.splits,
                    .split_steps = ceil_div(steps, cut.splits),
                    .wide = std::max(rows, terms) >= index_limit()};
    Operands<T> operands{cu_input<T>(x),       cu_input<T>(y), bias ? cu_input<T>(*bias) : nullptr,
                         cu_output<T>(output), nullptr,        output.numel()};
    std::optional<Tensor> parts;
    if (cut.splits > 1) {
      parts = new_tensor({cut.splits, output.numel()}, scalar_type_of<A>(), output);
      operands.parts = cu_output<A>(*parts);
    }
    if (!cut.large) launch<T, Small>(guard, product, operands, grid);
    if constexpr (has_large_tiles<T>) {
      if (cut.large) launch<T, Large>(guard, product, operands, grid);
    }
    if (cut.splits > 1) add_parts(guard, product, operands, cut.splits);
  });
}

}  // namespace manual_ops
