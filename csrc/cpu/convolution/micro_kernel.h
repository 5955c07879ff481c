// The one loop that every dense convolution runs in, on a tile of the result that stays in registers:
//
//     c[i][v] = bias[v] + sum over runs r and j < run_length of
//                         a[runs[r].a + i*a_row + j*a_step] * b[runs[r].b + j*b_step + v]
//
// Forward and input gradient: i are pixels, j the channels under consecutive taps, b the packed weight. Weight
// gradient: i are input channels, j the pixels of a row, b the output's gradient.

// Its operands are numbers, or pairs of bfloat16 whose products are both added to one float32: then j counts pairs.

template <class E>
struct SumOf {
  using type = E;
};
template <>
struct SumOf<Bfloat16Pair> {
  using type = float;
};
template <class E>
using sum_t = typename SumOf<E>::type;

template <class E>
inline vector_t<sum_t<E>> broadcast(const E* p) {
  if constexpr (std::is_same_v<E, Bfloat16Pair>) {
    int32_t bits;
    __builtin_memcpy(&bits, p, sizeof(bits));
    return reinterpret_cast<vector_t<float>>(bits - vector_t<int32_t>{});
  } else {
    return *p - vector_t<E>{};  // V{} + x is two instructions
  }
}

template <class E>
inline void add_product(vector_t<sum_t<E>>& sum, vector_t<sum_t<E>> left, vector_t<sum_t<E>> right) {
  if constexpr (std::is_same_v<E, Bfloat16Pair>) {
#if defined(__x86_64__)
    // By name: the other instructions of its set are not to be used.
    if constexpr (kVectorBytes == 64) {
      asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(left), "v"(right));
      return;
    }
#endif
    typedef vector_t<int32_t> Bits;
    const Bits l = reinterpret_cast<Bits>(left), r = reinterpret_cast<Bits>(right), high = ~0xffff - Bits{};
    sum += reinterpret_cast<vector_t<float>>(l << 16) * reinterpret_cast<vector_t<float>>(r << 16);
    sum += reinterpret_cast<vector_t<float>>(l & high) * reinterpret_cast<vector_t<float>>(r & high);
  } else {
    sum += left * right;
  }
}

// 14 x 2 accumulators, 2 vectors of b and the broadcast fill the 32 registers of AVX-512; 6 x 2 the 16 of AVX2 and SSE.
constexpr int kMaxTileRows = kVectorBytes == 64 ? 14 : 6;
// Tiles of so few rows may be twice as wide, 4 x 4 accumulators.
constexpr int kWideTileRows = kVectorBytes == 64 ? 4 : 0;

template <class E>
struct Tile {
  const E* a;
  int64_t a_row, a_step;
  const E* b;
  int64_t b_step;
  const Run* runs;
  int64_t run_count, run_length;
  sum_t<E>* c;
  int64_t c_row, columns;    // columns of c that exist
  const sum_t<E>* bias;      // or null
  bool accumulate;           // onto c
  bool past_caches = false;  // c is not read again soon, and its columns are whole lines
  bool fetch_next = false;   // the rows behind these come next
};

template <class E, int kRows, int kVectors>
[[gnu::noinline]] void multiply_tile(const Tile<E>& tile) {
  using A = sum_t<E>;
  using V = vector_t<A>;
  constexpr int kSplit = kRows > 8 ? (kRows + 1) / 2 : kRows;  // rows from here on have a pointer of their own
  V sum[kRows][kVectors] = {};
  // x86 addresses base + {1, 2, 4, 8} * register: with three odd multiples at hand, 8 rows need no further arithmetic.
  // The empty asm statements keep GCC from turning them into a pointer for every row, which spill.
  const int64_t row = tile.a_row * static_cast<int64_t>(sizeof(E));
  int64_t row3 = 3 * row, row5 = 5 * row, row7 = 7 * row;
  asm("" : "+r"(row3));
  asm("" : "+r"(row5));
  if (kSplit > 7) asm("" : "+r"(row7));
  if (tile.accumulate)  // c is on its way while the sums are made
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(tile.c + i * tile.c_row + v * kLanes<A>);
  for (int64_t r = 0; r < tile.run_count; ++r) {
    const char* low = reinterpret_cast<const char*>(tile.a + tile.runs[r].a);
    const char* high = low + kSplit * row;
    const E* b = tile.b + tile.runs[r].b;
    for (int64_t j = tile.run_length; j > 0; --j) {
      V right[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) __builtin_memcpy(&right[v], b + v * kLanes<A>, sizeof(V));
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const char* base = i < kSplit ? low : high;
        const int k = i < kSplit ? i : i - kSplit;
        const int64_t offset = k == 0 ? 0 : k == 3 ? row3 : k == 5 ? row5 : k == 6 ? 2 * row3 : k == 7 ? row7 : k * row;
        const V left = broadcast(reinterpret_cast<const E*>(base + offset));
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) add_product<E>(sum[i][v], left, right[v]);
      }
      low += tile.a_step * static_cast<int64_t>(sizeof(E));
      high += tile.a_step * static_cast<int64_t>(sizeof(E));
      b += tile.b_step;
      asm("" : "+r"(low));
      asm("" : "+r"(high));
    }
  }
  if (tile.bias != nullptr) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      V bias;
      __builtin_memcpy(&bias, tile.bias + v * kLanes<A>, sizeof(V));
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) sum[i][v] += bias;
    }
  }
  if (tile.columns < kVectors * kLanes<A>) {
    A rows[kRows][kVectors * kLanes<A>];
    __builtin_memcpy(rows, sum, sizeof(sum));
    for (int i = 0; i < kRows; ++i)
      for (int64_t v = 0; v < tile.columns; ++v)
        tile.c[i * tile.c_row + v] = tile.accumulate ? tile.c[i * tile.c_row + v] + rows[i][v] : rows[i][v];
    return;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      A* c = tile.c + i * tile.c_row + v * kLanes<A>;
      V before;
      if (tile.accumulate) {
        __builtin_memcpy(&before, c, sizeof(V));
        sum[i][v] += before;
      }
      if (tile.past_caches)
        store_past_caches(sum[i][v], c);
      else
        __builtin_memcpy(c, &sum[i][v], sizeof(V));
    }
  }
}

template <class E, int kVectors, int kRows = kMaxTileRows>
void multiply_tile_of(int64_t rows, const Tile<E>& tile) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply_tile_of<E, kVectors, kRows - 1>(rows, tile);
  }
  if constexpr (kRows > 0) multiply_tile<E, kRows, kVectors>(tile);
}

// A panel is the columns of b that a tile multiplies at once: one vector, or two where there is more than one.
template <class A>
void panel_width(int64_t channels, int64_t& width) {
  width = channels > kLanes<A> ? 2 * kLanes<A> : kLanes<A>;
}

// A sum is cut into pieces of about so many steps, which are added onto c: rounding errors grow with the length of a
// sum, and as much of b, 16 KB, stays in the L1 cache from one tile of rows to the next.
constexpr int64_t kLongestSum = (16 << 10) / (2 * kVectorBytes) < 256 ? (16 << 10) / (2 * kVectorBytes) : 256;

// Any number of rows, runs and steps, in tiles of nearly one height.
template <class E>
void multiply_rows(int64_t rows, const Tile<E>& whole) {
  using A = sum_t<E>;
  const int64_t tiles = (rows + kMaxTileRows - 1) / kMaxTileRows;
  const int64_t pieces = whole.run_length > kLongestSum ? (whole.run_length + kLongestSum - 1) / kLongestSum : 1;
  const int64_t runs_at_once = whole.run_length >= kLongestSum ? 1 : kLongestSum / (whole.run_length + 1) + 1;
  Tile<E> tile = whole;
  tile.past_caches = whole.past_caches && pieces == 1 && whole.run_count <= runs_at_once;
  int64_t first_run = 0;
  do {  // once where there are no runs, to store the bias
    tile.runs = whole.runs + first_run;
    tile.run_count = whole.run_count - first_run < runs_at_once ? whole.run_count - first_run : runs_at_once;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t first_step = whole.run_length * piece / pieces;
      tile.run_length = whole.run_length * (piece + 1) / pieces - first_step;
      tile.b = whole.b + first_step * tile.b_step;
      for (int64_t index = 0; index < tiles; ++index) {
        const int64_t first_row = rows * index / tiles, row_count = rows * (index + 1) / tiles - first_row;
        tile.a = whole.a + first_row * tile.a_row + first_step * tile.a_step;
        tile.c = whole.c + first_row * tile.c_row;
        if (tile.fetch_next)
          for (int64_t row = row_count; row < 2 * row_count; ++row)
            for (int64_t step = 0; step < tile.run_length; step += 64 / static_cast<int64_t>(sizeof(E)))
              __builtin_prefetch(tile.a + row * tile.a_row + step, 0, 2);
        if (tile.columns > 2 * kLanes<A>)
          multiply_tile_of<E, 4, kWideTileRows>(row_count, tile);
        else if (tile.columns > kLanes<A>)
          multiply_tile_of<E, 2>(row_count, tile);
        else
          multiply_tile_of<E, 1>(row_count, tile);
      }
      tile.accumulate = true;
      tile.bias = nullptr;
    }
    first_run += runs_at_once;
  } while (first_run < whole.run_count);
}
