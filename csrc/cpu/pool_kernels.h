// Max and average pooling, forward and backward, for both memory formats: one code over "lanes".
//
// A lane is a plane of the tensor, and neighbouring lanes sit in one vector, so that every tap is plain vector
// arithmetic whatever the window. With channels_last the lanes are channels, which lie side by side in memory. With
// contiguous tensors they are kLanes planes that are brought side by side, a few rows at a time, by transposing
// registers.
//
// Work comes as items: (block of lanes, tile of columns, row). A range of items can start anywhere, and its results do
// not depend on where it does.
#include "cpu/vectors.h"

// A tap's number, as wide as a lane of A, and a vector of them.
template <class A>
using code_t = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
template <class A>
using codes_t = vector_t<code_t<A>>;

// channels_last blocks of 256 bytes of A keep neighbouring cache lines together; narrower ones were slower. Where rows
// are not kept, wider ones are faster.
constexpr int kWide = 256 / kVectorBytes;
// An input tile of this many pixels, one vector each, fills half of a 64 KiB L1.
constexpr int64_t kTilePixels = 512;
// Rows are transposed in flat chunks of about this many pixels, so that short rows fill whole registers.
constexpr int64_t kChunkPixels = 256;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// load_vector and store_vector for the first `lanes` lanes, fewer than there are.
template <class A, class T>
static inline vector_t<A> load_part(const T* p, int64_t lanes) {
  T values[kLanes<A>] = {};
#if defined(__AVX512BW__)
  const __mmask64 bytes = (uint64_t{1} << lanes * sizeof(T)) - 1;
  const __m512i loaded = _mm512_maskz_loadu_epi8(bytes, p);
  __builtin_memcpy(values, &loaded, sizeof(values));
#else
  for (int64_t lane = 0; lane < lanes; ++lane) values[lane] = p[lane];
#endif
  return load_vector<A, T>(values);
}

template <class A, class T>
static inline void store_part(T* p, vector_t<A> vector, int64_t lanes) {
  T values[kLanes<A>];
  store_vector<A, T>(values, vector);
#if defined(__AVX512BW__)
  const __mmask64 bytes = (uint64_t{1} << lanes * sizeof(T)) - 1;
  __m512i stored{};
  __builtin_memcpy(&stored, values, sizeof(values));
  _mm512_mask_storeu_epi8(p, bytes, stored);
#else
  for (int64_t lane = 0; lane < lanes; ++lane) p[lane] = values[lane];
#endif
}

// Where lanes come from, and go to: planes, that have been brought side by side, one vector a pixel; channels, several
// vectors of them, of which the last overlaps the one before it where it would be short; or channels that do not fill
// one vector.
enum class Lanes { planes, channels, few_channels };

template <class A, Lanes kFrom>
static inline int64_t lane_of(int64_t v, int64_t lanes) {
  return kFrom == Lanes::channels ? least(v * kLanes<A>, lanes - kLanes<A>) : 0;
}

// Few channels are loaded and stored as a whole vector too, unless that passes `end`, the end of a row: what it loads
// of the next pixels is of no use, and what it stores over them is stored again, as pixels are stored in ascending
// order.
template <class A, Lanes kFrom, class T>
static inline vector_t<A> load(const T* p, int64_t lanes, const T* end) {
  if (kFrom == Lanes::few_channels && end - p < kLanes<A>) return load_part<A, T>(p, lanes);
  return load_vector<A, T>(p);
}

template <class A, Lanes kTo, class T>
static inline void store(T* p, vector_t<A> vector, int64_t lanes, const T* end) {
  if (kTo == Lanes::few_channels && end - p < kLanes<A>) return store_part<A, T>(p, vector, lanes);
  store_vector<A, T>(p, vector);
}

template <class T>
struct Buffer {
  T* data;
  explicit Buffer(int64_t count)
      : data(static_cast<T*>(::operator new(most(1, count) * sizeof(T), std::align_val_t(64)))) {}
  Buffer(const Buffer&) = delete;
  ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
};

// Transposes move words as wide as A's lanes, each of kPacked neighbouring elements of T, so that they take whole
// vectors of T at a time; element e of every word is then converted at once.
template <class A, class T>
constexpr int kPacked = sizeof(A) / sizeof(T);

template <class A, class T>
static inline vector_t<A> unpack(codes_t<A> words, int e) {
  constexpr int kBits = 8 * sizeof(T);
  if constexpr (std::is_same_v<A, T>) {
    return reinterpret_cast<vector_t<A>>(words);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return reinterpret_cast<vector_t<A>>(words >> kBits * e << kBits);
  } else {
    const codes_t<A> element = (words >> kBits * e) & static_cast<code_t<A>>((int64_t{1} << kBits) - 1);
    if constexpr (!std::is_same_v<T, Half>) return reinterpret_cast<vector_t<A>>(element);
    uint16_t halves[kLanes<A>];
    store_vector<int32_t>(halves, reinterpret_cast<vector_t<int32_t>>(element));
    return load_vector<A>(reinterpret_cast<const T*>(halves));
  }
}

// The bits of T(vector), in words.
template <class A, class T>
static inline codes_t<A> elements(vector_t<A> vector) {
  if constexpr (std::is_same_v<T, BFloat16>) return rounded_bfloat16(vector);
  if constexpr (!std::is_same_v<T, Half>) return reinterpret_cast<codes_t<A>>(vector);
  uint16_t halves[kLanes<A>];
  store_vector<A>(reinterpret_cast<T*>(halves), vector);
  return reinterpret_cast<codes_t<A>>(load_vector<int32_t>(halves));
}

// planes x pixels, planes `pitch` apart -> lanes[pixel][kLanes]. The last tile overlaps the one before it; lanes beyond
// the `count` of planes repeat the last plane.
template <class A, class T>
static void to_lanes(const T* planes, int64_t pitch, int64_t count, int64_t pixels, A* lanes) {
  constexpr int64_t L = kLanes<A>, P = kPacked<A, T>, kTile = L * P;
  if (pixels < kTile) {
    T short_planes[L * kTile] = {};
    A tile[kTile * L];
    for (int64_t lane = 0; lane < count; ++lane)
      __builtin_memcpy(short_planes + lane * kTile, planes + lane * pitch, pixels * sizeof(T));
    to_lanes<A, T>(short_planes, kTile, L, kTile, tile);
    __builtin_memcpy(lanes, tile, pixels * L * sizeof(A));
    return;
  }
  const T* starts[L];
  for (int64_t lane = 0; lane < L; ++lane) starts[lane] = planes + least(lane, count - 1) * pitch;
  for (int64_t tile = 0; tile < pixels; tile += kTile) {
    const int64_t pixel = least(tile, pixels - kTile);
    codes_t<A> rows[L];
#pragma GCC unroll 16
    for (int64_t lane = 0; lane < L; ++lane) {
      __builtin_memcpy(&rows[lane], starts[lane] + pixel, sizeof(rows[lane]));
      pin(rows[lane]);
    }
    transpose_from<L / 2, code_t<A>>(rows);
#pragma GCC unroll 16
    for (int64_t i = 0; i < L; ++i) {
#pragma GCC unroll 8
      for (int e = 0; e < P; ++e) store_vector<A>(lanes + (pixel + i * P + e) * L, unpack<A, T>(rows[i], e));
    }
  }
}

template <class A, class T>
static void from_lanes(const A* lanes, int64_t pitch, int64_t count, int64_t pixels, T* planes, bool past_caches) {
  constexpr int64_t L = kLanes<A>, P = kPacked<A, T>, kTile = L * P;
  if (pixels < kTile) {
    A tile[kTile * L] = {};
    T short_planes[L * kTile];
    __builtin_memcpy(tile, lanes, pixels * L * sizeof(A));
    from_lanes<A, T>(tile, kTile, L, kTile, short_planes, false);
    for (int64_t lane = 0; lane < count; ++lane)
      __builtin_memcpy(planes + lane * pitch, short_planes + lane * kTile, pixels * sizeof(T));
    return;
  }
  for (int64_t tile = 0; tile < pixels; tile += kTile) {
    const int64_t pixel = least(tile, pixels - kTile);
    codes_t<A> rows[L];
#pragma GCC unroll 16
    for (int64_t i = 0; i < L; ++i) {
      rows[i] = codes_t<A>{};
#pragma GCC unroll 8
      for (int e = 0; e < P; ++e)
        rows[i] |= elements<A, T>(load_vector<A>(lanes + (pixel + i * P + e) * L))
                   << 8 * static_cast<int>(sizeof(T)) * e;
      pin(rows[i]);
    }
    transpose_from<L / 2, code_t<A>>(rows);
    T* p = planes + pixel;
    if (count < L) {
      for (int64_t lane = 0; lane < count; ++lane) __builtin_memcpy(p + lane * pitch, &rows[lane], sizeof(rows[lane]));
    } else if (past_caches && reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0) {
#pragma GCC unroll 16
      for (int64_t lane = 0; lane < L; ++lane) store_past_caches(rows[lane], p + lane * pitch);
    } else {
#pragma GCC unroll 16
      for (int64_t lane = 0; lane < L; ++lane) __builtin_memcpy(p + lane * pitch, &rows[lane], sizeof(rows[lane]));
    }
  }
}

// Where a block's lanes lie: the first of them at `base_input` and `base_output`.
struct Block {
  int64_t base_input, base_output;
  int64_t lanes, vectors;
  Lanes from;
};

// Calls body.template operator()<from>() for the block's kind of lanes.
template <class Body>
static inline void for_lanes(Lanes from, const Body& body) {
  if (from == Lanes::planes) return body.template operator()<Lanes::planes>();
  if (from == Lanes::channels) return body.template operator()<Lanes::channels>();
  body.template operator()<Lanes::few_channels>();
}

// Whether channels are read in place: where they fill vectors, and windows overlap so little that each of them reading
// all it needs, with other pixels' channels between, costs less than rows that several share.
template <class A>
static bool in_place(const PoolGeometry& g) {
  const int64_t taps = g.d.taps * g.h.taps * g.w.taps;
  return g.channels_last && g.channels >= kLanes<A> && taps * g.output_pixels() <= 3 * g.input_pixels();
}

// Vectors of channels that are worked on together, at most.
template <class A>
static int64_t widest(const PoolGeometry& g) {
  return in_place<A>(g) ? 4 * kWide : kWide;
}

template <class A>
static int64_t block_count(const PoolGeometry& g) {
  constexpr int64_t L = kLanes<A>;
  if (!g.channels_last) return (g.batch * g.channels + L - 1) / L;
  const int64_t channels = widest<A>(g) * L;
  return g.batch * ((g.channels + channels - 1) / channels);
}

template <class A>
static Block block_at(const PoolGeometry& g, int64_t index) {
  constexpr int64_t L = kLanes<A>;
  if (!g.channels_last) {
    const int64_t lanes = least(L, g.batch * g.channels - index * L);
    return {index * L * g.input_pixels(), index * L * g.output_pixels(), lanes, 1, Lanes::planes};
  }
  // Blocks of like size, of whole vectors where there are several: a narrow one would read its cache lines for little.
  const int64_t per_image = block_count<A>(g) / g.batch, vectors = (g.channels + L - 1) / L;
  const int64_t n = index / per_image, b = index % per_image;
  const int64_t first = b * vectors / per_image * L, last = least((b + 1) * vectors / per_image * L, g.channels);
  return {n * g.input_pixels() * g.channels + first, n * g.output_pixels() * g.channels + first, last - first,
          (last - first + L - 1) / L, last - first < L ? Lanes::few_channels : Lanes::channels};
}

// Tiles of columns keep a row's lanes in L1; the columns are outputs in forward, inputs in backward.
static int64_t tile_columns(const AxisView& w, bool backward) {
  const int64_t columns = backward ? w.input : w.output;
  const int64_t reads = most(1, backward ? w.output : w.input), reach = backward ? w.cover_reach : w.reach;
  if (most(w.input, w.output) <= kTilePixels) return most(1, columns);
  return most(1, most(kTilePixels - reach, 16) * columns / most(reads, columns));
}

template <class A>
static void count_items(const PoolGeometry& g, bool backward, int64_t* items) {
  const int64_t columns = backward ? g.w.input : g.w.output, tile = tile_columns(g.w, backward);
  const int64_t rows = backward ? g.d.input * g.h.input : g.d.output * g.h.output;
  *items = block_count<A>(g) * ((columns + tile - 1) / tile) * rows;
}

// Rows of a tensor as lanes, side by side: [column][vectors]. Chunks of whole rows are kept, `slots` of them for each
// of a few depths.
template <class A, class T>
struct LaneRows {
  const T* source = nullptr;
  int64_t pixels, channels, height, width, lane_count = 0, start = 0, columns, rows, chunks, slots, vectors = 1;
  Lanes from = Lanes::planes;
  Buffer<A> lanes;
  Buffer<int64_t> keys;

  // `live` rows may be in use at one time for each of `depths` depths; `columns` of them are read.
  LaneRows(const PoolGeometry& g, int64_t height, int64_t width, int64_t pixels, int64_t columns, int64_t depths,
           int64_t live)
      : pixels(pixels),
        channels(g.channels),
        height(height),
        width(width),
        columns(columns),
        rows(columns < width || g.channels_last ? 1 : least(most(1, kChunkPixels / most(1, width)), most(1, height))),
        chunks((height + rows - 1) / rows),
        slots(live > 1 ? (live + rows - 2) / rows + 1 : 1),
        lanes(depths * slots * rows * columns * kLanes<A> * (g.channels_last ? kWide : 1)),
        keys(depths * slots) {}

  // Columns first_column .. first_column + columns - 1 at most are read.
  void restart(const T* base, const Block& block, int64_t first_column, int64_t depths) {
    source = base;
    lane_count = block.lanes;
    vectors = block.vectors;
    from = block.from;
    start = columns < width ? first_column : 0;
    for (int64_t slot = 0; slot < depths * slots; ++slot) keys.data[slot] = -1;
  }

  // Column 0 of a row, of which `used_columns` from the first one are there.
  const A* row(int64_t index, int64_t d, int64_t h, int64_t used_columns) {
    constexpr int64_t L = kLanes<A>;
    const int64_t chunk = h / rows, slot = index * slots + chunk % slots, key = d * chunks + chunk;
    A* kept = lanes.data + slot * rows * columns * vectors * L;
    if (keys.data[slot] != key) {
      keys.data[slot] = key;
      const int64_t position = (d * height + chunk * rows) * width + start;
      const int64_t count = columns < width ? used_columns : least(rows, height - chunk * rows) * width;
      for_lanes(from, [&]<Lanes kFrom>() {
        if constexpr (kFrom == Lanes::planes) {
          to_lanes(source + position, pixels, lane_count, count, kept);
        } else {
          const T *p = source + position * channels, *end = p + count * channels;
          for (A* to = kept; p < end; p += channels)
            for (int64_t v = 0; v < vectors; ++v, to += L)
              store_vector<A>(to, load<A, kFrom>(p + lane_of<A, kFrom>(v, lane_count), lane_count, end));
        }
      });
    }
    return kept + ((h - chunk * rows) * columns - start) * vectors * L;
  }
};

// Rows of lanes on their way into a contiguous tensor: flushed in flat runs, which begin at whole vectors where rows
// allow it.
template <class A, class T>
struct LaneWriter {
  T* planes = nullptr;
  int64_t pitch, count = 0, capacity, start = 0, filled = 0;
  bool past_caches;
  Buffer<A> lanes;

  LaneWriter(int64_t pitch, int64_t columns, bool past_caches)
      : pitch(pitch), capacity(columns), past_caches(past_caches), lanes(most(columns, kChunkPixels) * kLanes<A>) {
    constexpr int64_t kTile = kLanes<A> * kPacked<A, T>;
    const int64_t rows = kChunkPixels / columns, together = kTile / least(kTile, columns & -columns);
    capacity = most(1, rows < together ? rows : rows - rows % together) * columns;
  }

  void restart(T* first_plane, int64_t plane_count) {
    planes = first_plane;
    count = plane_count;
  }
  A* next(int64_t position, int64_t pixels) {
    if (filled && (position != start + filled || filled + pixels > capacity)) flush();
    if (!filled) start = position;
    A* lane = lanes.data + filled * kLanes<A>;
    filled += pixels;
    return lane;
  }
  void flush() {
    if (filled) from_lanes(lanes.data, pitch, count, filled, planes + start, past_caches);
    filled = 0;
  }
};

// The rule of max pooling: take what is larger, or NaN.
template <class A>
static inline void take(vector_t<A>& best, codes_t<A>& winner, vector_t<A> value, codes_t<A> code) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) {  // GCC would negate the masks
    const __m512 v = value, b = best;
    const __mmask16 mask = _mm512_cmp_ps_mask(v, b, _CMP_GT_OQ) | _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    best = _mm512_mask_mov_ps(b, mask, v);
    winner = reinterpret_cast<codes_t<A>>(
        _mm512_mask_mov_epi32(reinterpret_cast<__m512i>(winner), mask, reinterpret_cast<__m512i>(code)));
    return;
  }
#endif
  const codes_t<A> better = (value > best) | (value != value);
  best = better ? value : best;
  winner = better ? code : winner;
}

// Reduce one row of the input along W: outputs first .. last-1 -> [output][vectors].
template <bool kMax, class A, Lanes kFrom, class S, class U>
static void reduce_row(const S* row, int64_t pixel_pitch, const AxisView& w, int64_t first, int64_t last,
                       int64_t vectors, int64_t lanes, A* values, U* winners) {
  constexpr int64_t L = kLanes<A>;
  const int64_t pitch = kFrom == Lanes::planes ? L : pixel_pitch, V = kFrom == Lanes::channels ? vectors : 1;
  const S* end = row + w.input * pitch;
  const int64_t step = w.step * pitch, next_row = w.input * pitch, fresh = least(w.inner_stride, w.taps);
  const auto reduce = [&]<int kTaps>(int64_t o, const S* p, int64_t count, int64_t tap) __attribute__((always_inline)) {
    for (int64_t v = 0; v < V; ++v) {
      const S* q = p + lane_of<A, kFrom>(v, lanes);
      vector_t<A> value = vector_t<A>{} + (kMax ? -A(__builtin_inf()) : A(0));
      codes_t<A> winner = codes_t<A>{} + static_cast<code_t<A>>(tap), code = winner;
      if (kTaps || count) value = load<A, kFrom>(q, lanes, end);
      if constexpr (kFrom != Lanes::planes) __builtin_prefetch(q + next_row);
#pragma GCC unroll 4
      for (int64_t k = 1; k < (kTaps ? kTaps : count); ++k) {
        q += step;
        code += 1;
        if constexpr (kFrom != Lanes::planes)
          if (k < fresh) __builtin_prefetch(q + next_row);
        const vector_t<A> x = load<A, kFrom>(q, lanes, end);
        if constexpr (kMax)
          take<A>(value, winner, x, code);
        else
          value += x;
      }
      const int64_t at = ((o - first) * V + v) * L;
      store_vector<A>(values + at, value);
      if constexpr (kMax) store_vector<code_t<A>>(winners + at, winner);
    }
  };
  int64_t o = first;
  const int64_t inner_end = least(last, w.inner_end);
  const auto edge = [&](int64_t end) {
    for (; o < end; ++o) reduce.template operator()<0>(o, row + w.first[o] * pitch, w.count[o], w.tap[o]);
  };
  const auto inner = [&]<int kTaps>() {
    for (const S* p = row + w.first[o] * pitch; o < inner_end; ++o, p += w.inner_stride * pitch)
      reduce.template operator()<kTaps>(o, p, w.taps, 0);
  };
  edge(least(inner_end, most(first, w.inner_begin)));
  if (o < inner_end) {
    if (w.taps == 2)
      inner.template operator()<2>();
    else if (w.taps == 3)
      inner.template operator()<3>();
    else
      inner.template operator()<0>();
  }
  edge(last);
}

// Reduce `rows` reduced rows along D and H, into pixels `pitch` apart.
template <bool kMax, class A, Lanes kTo, class R, class T, class U>
static void reduce_rows(const A* const* values, const R* const* winners, const code_t<A>* bases, int64_t rows,
                        int64_t columns, int64_t vectors, int64_t lanes, const A* divisors, T* output, U* winner,
                        int64_t pixel_pitch) {
  constexpr int64_t L = kLanes<A>;
  const int64_t pitch = kTo == Lanes::planes ? L : pixel_pitch, V = kTo == Lanes::channels ? vectors : 1;
  const T* end = output + columns * pitch;
  const U* winner_end = winner + columns * pitch;
  const auto reduce = [&]<int kRows>() {
    for (int64_t o = 0; o < columns; ++o) {
      for (int64_t v = 0; v < V; ++v) {
        const int64_t at = (o * V + v) * L, to = o * pitch + lane_of<A, kTo>(v, lanes);
        vector_t<A> best = load_vector<A>(values[0] + at);
        codes_t<A> code{};
        if constexpr (kMax) code = load_vector<code_t<A>>(winners[0] + at) + bases[0];
#pragma GCC unroll 4
        for (int64_t r = 1; r < (kRows ? kRows : rows); ++r) {
          const vector_t<A> value = load_vector<A>(values[r] + at);
          if constexpr (kMax)
            take<A>(best, code, value, load_vector<code_t<A>>(winners[r] + at) + bases[r]);
          else
            best += value;
        }
        if constexpr (kMax)
          store<code_t<A>, kTo>(winner + to, code, lanes, winner_end);
        else
          best /= vector_t<A>{} + divisors[o];
        store<A, kTo>(output + to, best, lanes, end);
      }
    }
  };
  if (rows == 1)
    reduce.template operator()<1>();
  else if (rows == 2)
    reduce.template operator()<2>();
  else if (rows == 3)
    reduce.template operator()<3>();
  else
    reduce.template operator()<0>();
}

// Forward of channels that fill vectors, outputs first .. last-1 of a row: each reads its window where it lies, several
// vectors of channels at a time. `rows` of the input are read, from tap bases[r] on; without any, or without a column,
// the window holds padding alone and `bases[0]` is its first tap's.
template <bool kMax, class A, class T, class U>
static void reduce_windows(const T* const* inputs, const code_t<A>* bases, int64_t rows, const AxisView& w,
                           int64_t first, int64_t last, int64_t vectors, int64_t lanes, const A* divisors, T* output,
                           U* winner, int64_t pitch) {
  const auto reduce = [&]<int kVectors>(int64_t o, int64_t v) __attribute__((always_inline)) {
    int64_t lane[kVectors];
    vector_t<A> value[kVectors];
    codes_t<A> code[kVectors];
    const int64_t next_row = w.input * pitch, begin = w.first[o] * pitch, step = w.step * pitch, taps = w.count[o];
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      lane[i] = lane_of<A, Lanes::channels>(v + i, lanes);
      value[i] = vector_t<A>{} + (kMax ? -A(__builtin_inf()) : A(0));
      code[i] = codes_t<A>{} + (bases[0] + static_cast<code_t<A>>(w.tap[o]));
    }
    for (int64_t r = 0; r < rows; ++r) {
      const T* p = inputs[r] + begin;
      codes_t<A> tap = codes_t<A>{} + (bases[r] + static_cast<code_t<A>>(w.tap[o]));
      for (int64_t k = 0; k < taps; ++k, p += step) {
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) {
          const vector_t<A> x = load_vector<A>(p + lane[i]);
          __builtin_prefetch(p + lane[i] + next_row);
          if constexpr (kMax)
            take<A>(value[i], code[i], x, tap);
          else
            value[i] += x;
        }
        tap += 1;
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      const int64_t to = (o - first) * pitch + lane[i];
      if constexpr (kMax)
        store_vector<code_t<A>>(winner + to, code[i]);
      else
        value[i] /= vector_t<A>{} + divisors[o - first];
      store_vector<A>(output + to, value[i]);
    }
  };
  for (int64_t o = first; o < last; ++o) {
    int64_t v = 0;
    for (; v + 4 <= vectors; v += 4) reduce.template operator()<4>(o, v);
    for (; v < vectors; ++v) reduce.template operator()<1>(o, v);
  }
}

struct InputRange {
  int64_t begin, end;
};

// The inputs that outputs first .. last-1 read. Under dilation and padding the first inputs of windows do not ascend.
static InputRange inputs_of(const AxisView& axis, int64_t first, int64_t last) {
  InputRange range{axis.input, 0};
  for (int64_t o = first; o < last; ++o) {
    if (axis.count[o] == 0) continue;
    range.begin = least(range.begin, axis.first[o]);
    range.end = most(range.end, axis.first[o] + (axis.count[o] - 1) * axis.step + 1);
  }
  return range.begin < range.end ? range : InputRange{0, 0};
}

// What average pooling divides an output by; rows_divisor is the product over D and H.
static inline double window_divisor(const PoolGeometry& g, int64_t rows_divisor, int64_t column) {
  return g.divisor_override != 0 ? g.divisor_override : static_cast<double>(rows_divisor * g.w.divisor[column]);
}

// What average pooling divides rows of outputs by, or multiplies them with: one row a slot, computed anew where it
// differs from the slot's last.
template <class A>
struct Divisors {
  const PoolGeometry& g;
  const bool reciprocal;
  const int64_t columns;
  Buffer<A> data;
  Buffer<int64_t> rows, first, count;

  Divisors(const PoolGeometry& g, bool reciprocal, int64_t slots, int64_t columns)
      : g(g), reciprocal(reciprocal), columns(columns), data(slots * columns), rows(slots), first(slots), count(slots) {
    for (int64_t slot = 0; slot < slots; ++slot) rows.data[slot] = first.data[slot] = count.data[slot] = -1;
  }

  // `rows_divisor` is the product over D and H.
  const A* of(int64_t slot, int64_t rows_divisor, int64_t first_column, int64_t used_columns) {
    A* row = data.data + slot * columns;
    const bool known = first_column == first.data[slot] && used_columns <= count.data[slot];
    if (known && rows_divisor == rows.data[slot]) return row;
    rows.data[slot] = rows_divisor;
    first.data[slot] = first_column;
    count.data[slot] = used_columns;
    for (int64_t o = 0; o < used_columns; ++o) {
      const A divisor = static_cast<A>(window_divisor(g, rows_divisor, first_column + o));
      row[o] = reciprocal ? 1 / divisor : divisor;
    }
    return row;
  }
};

// Forward, for items begin .. end-1: rows of the input are reduced along W as they are needed and kept in a ring, so
// that windows that overlap along H share them; then along D and H. Windows that are read in place need no ring.
template <bool kMax, class T, class U>
static void pool_forward(const PoolGeometry& g, const T* input, T* output, U* winner, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  constexpr int64_t L = kLanes<A>;
  const AxisView &d = g.d, &h = g.h, &w = g.w;
  const int64_t tile = tile_columns(w, false), tiles = (w.output + tile - 1) / tile, rows = d.output * h.output;
  int64_t tile_inputs = 1;
  for (int64_t first = 0; first < w.output; first += tile) {
    const InputRange range = inputs_of(w, first, least(first + tile, w.output));
    tile_inputs = most(tile_inputs, range.end - range.begin);
  }

  const bool lanes_made = !g.channels_last, windows_in_place = in_place<A>(g);
  const int64_t plane_bytes = g.output_pixels() * static_cast<int64_t>(sizeof(T));
  const bool past_caches = lanes_made && goes_past_caches(output, g.batch * g.channels * plane_bytes, plane_bytes);
  LaneRows<A, T> source(g, h.input, w.input, g.input_pixels(), lanes_made ? tile_inputs : 0, d.taps, 1);
  LaneWriter<A, T> values_out(g.output_pixels(), lanes_made ? tile : 1, past_caches);
  LaneWriter<code_t<A>, U> winners_out(g.output_pixels(), lanes_made && kMax ? tile : 1, false);
  const int64_t slots = d.taps * h.reach, slot_size = windows_in_place ? 0 : tile * L * (g.channels_last ? kWide : 1);
  Buffer<A> ring(slots * slot_size);
  Buffer<U> ring_winners(kMax ? slots * slot_size : 1);
  Buffer<int64_t> keys(slots);
  Buffer<code_t<A>> bases(d.taps * h.taps);
  Buffer<const A*> row_values(d.taps * h.taps);
  Buffer<const U*> row_winners(d.taps * h.taps);
  Buffer<const T*> row_inputs(d.taps * h.taps);
  Buffer<A> nothing(slot_size);
  Buffer<U> nothing_winners(slot_size);
  Divisors<A> divisors(g, false, 1, kMax ? 0 : tile);

  int64_t block_and_tile = -1, first = 0, last = 0, first_input = 0;
  Block block{};
  for (int64_t item = begin; item < end; ++item) {
    if (item / rows != block_and_tile) {
      values_out.flush();
      winners_out.flush();
      block_and_tile = item / rows;
      block = block_at<A>(g, block_and_tile / tiles);
      first = block_and_tile % tiles * tile;
      last = least(first + tile, w.output);
      first_input = inputs_of(w, first, last).begin;
      for (int64_t slot = 0; slot < slots; ++slot) keys.data[slot] = -1;
      if (lanes_made) {
        source.restart(input + block.base_input, block, first_input, d.taps);
        values_out.restart(output + block.base_output, block.lanes);
        if constexpr (kMax) winners_out.restart(winner + block.base_output, block.lanes);
      }
    }
    const int64_t row = item % rows, od = row / h.output, oh = row % h.output, columns = last - first;
    int64_t used = 0;
    for (int64_t i = 0; i < d.count[od]; ++i) {
      for (int64_t j = 0; j < h.count[oh]; ++j, ++used) {
        const int64_t in_d = d.first[od] + i * d.step, in_h = h.first[oh] + j * h.step;
        const int64_t slot = i * h.reach + in_h % h.reach, key = in_d * h.input + in_h;
        A* values = ring.data + slot * slot_size;
        U* winners = kMax ? ring_winners.data + slot * slot_size : nullptr;
        row_values.data[used] = values;
        row_winners.data[used] = winners;
        row_inputs.data[used] = input + block.base_input + key * w.input * (lanes_made ? 1 : g.channels);
        bases.data[used] = static_cast<code_t<A>>(((d.tap[od] + i) * h.taps + h.tap[oh] + j) * w.taps);
        if (windows_in_place || keys.data[slot] == key) continue;
        keys.data[slot] = key;
        for_lanes(block.from, [&]<Lanes kFrom>() {
          if constexpr (kFrom == Lanes::planes)
            reduce_row<kMax, A, kFrom>(source.row(i, in_d, in_h, least(tile_inputs, w.input - first_input)), L, w,
                                       first, last, 1, L, values, winners);
          else
            reduce_row<kMax, A, kFrom>(row_inputs.data[used], g.channels, w, first, last, block.vectors, block.lanes,
                                       values, winners);
        });
      }
    }
    const int64_t position = row * w.output + first, position_in_place = block.base_output + position * g.channels;
    const A* divisor = kMax ? nullptr : divisors.of(0, d.divisor[od] * h.divisor[oh], first, columns);
    if (used == 0) bases.data[0] = static_cast<code_t<A>>((d.tap[od] * h.taps + h.tap[oh]) * w.taps);
    if (windows_in_place) {
      reduce_windows<kMax, A>(row_inputs.data, bases.data, used, w, first, last, block.vectors, block.lanes, divisor,
                              output + position_in_place, kMax ? winner + position_in_place : nullptr, g.channels);
      continue;
    }
    if (used == 0) {  // a window with nothing but padding
      const int64_t width = block.vectors * L;
      for (int64_t o = 0; o < columns; ++o) {
        for (int64_t lane = 0; lane < width; ++lane) {
          nothing.data[o * width + lane] = kMax ? -A(__builtin_inf()) : A(0);
          nothing_winners.data[o * width + lane] = static_cast<U>(w.tap[first + o]);
        }
      }
      row_values.data[0] = nothing.data;
      row_winners.data[0] = nothing_winners.data;
      used = 1;
    }
    for_lanes(block.from, [&]<Lanes kTo>() {
      const auto finish = [&](auto* to, auto* to_winner) {
        reduce_rows<kMax, A, kTo>(row_values.data, row_winners.data, bases.data, used, columns, block.vectors,
                                  block.lanes, divisor, to, to_winner, g.channels);
      };
      if constexpr (kTo == Lanes::planes)
        finish(values_out.next(position, columns), kMax ? winners_out.next(position, columns) : nullptr);
      else
        finish(output + position_in_place, kMax ? winner + position_in_place : nullptr);
    });
  }
  values_out.flush();
  winners_out.flush();
  if (past_caches) finish_stores_past_caches();
}

// Backward, columns first .. last-1 of a row of the input's gradient. Where whole windows lie, kStride inputs at a time
// meet windows o, o-1, ... at taps that the compiler knows; elsewhere the tables tell. `cell(o, i)` does kStride inputs
// from i, the first of window o; `single(i)` does one.
template <int kTaps, int kStride, class Cell, class Single>
static inline void for_inputs(const AxisView& w, int64_t first, int64_t last, const Cell& cell, const Single& single) {
  constexpr int64_t kBefore = (kTaps - 1) / kStride;  // windows before o that meet its first input
  int64_t o = w.inner_begin + kBefore, i = first;
  if (o < w.inner_end) {
    const int64_t from = w.first[o];
    if (from < first) o += (first - from + kStride - 1) / kStride;
    const int64_t begin = from + (o - w.inner_begin - kBefore) * kStride;
    const int64_t cells = least(w.inner_end - o, (last - begin) / kStride);
    if (cells > 0) {
      for (; i < begin; ++i) single(i);
      for (const int64_t stop = o + cells; o < stop; ++o, i += kStride) cell(o, i);
    }
  }
  for (; i < last; ++i) single(i);
}

// Calls body.template operator()<taps, stride>() for windows with code of their own, else <1, 0>.
template <class Body>
static inline void for_windows(const AxisView& w, const Body& body) {
  if (w.step == 1 && w.taps == 2 && w.inner_stride == 2) return body.template operator()<2, 2>();
  if (w.step == 1 && w.taps == 3 && w.inner_stride == 2) return body.template operator()<3, 2>();
  if (w.step == 1 && w.taps == 3 && w.inner_stride == 1) return body.template operator()<3, 1>();
  body.template operator()<0, 0>();
}

// Where backward reads vector v of output o: from its row of lanes, or in place.
template <class A, Lanes kTo, bool kInPlace>
static inline int64_t output_at(int64_t o, int64_t v, int64_t vectors, int64_t lanes, int64_t pitch) {
  return kInPlace ? o * pitch + lane_of<A, kTo>(v, lanes) : (o * vectors + v) * kLanes<A>;
}

// One row of the gradient of max pooling's input, columns first .. last-1: over the rows and columns of the windows
// that cover an input, the gradients of those it won.
template <class A, Lanes kTo, bool kInPlace, class G, class W, class T>
static void collect_winners(const G* const* grads, const W* const* winners, const code_t<A>* bases, int64_t rows,
                            const AxisView& w, int64_t first, int64_t last, int64_t vectors, int64_t lanes,
                            T* grad_input, int64_t pixel_pitch, bool past_caches) {
  constexpr int64_t L = kLanes<A>;
  const int64_t pitch = kTo == Lanes::planes ? L : pixel_pitch, V = kTo == Lanes::channels ? vectors : 1;
  const T* end = grad_input + (last - first) * pitch;
  const auto put = [&](int64_t i, int64_t v, vector_t<A> sum) {
    T* to = grad_input + (i - first) * pitch + lane_of<A, kTo>(v, lanes);
    if constexpr (kTo == Lanes::channels && std::is_same_v<A, T>)
      if (past_caches) return store_past_caches(sum, to);
    store<A, kTo>(to, sum, lanes, end);
  };
  const auto add = [&](vector_t<A>& sum, vector_t<A> grad, codes_t<A> winner, int64_t tap) {
    sum += winner == codes_t<A>{} + static_cast<code_t<A>>(tap) ? grad : vector_t<A>{};
  };
  // The gradients of a row, and by which of its taps along W they were won.
  const auto read = [&](int64_t r, int64_t o, int64_t v, vector_t<A>& grad, codes_t<A>& winner) {
    const int64_t at = output_at<A, kTo, kInPlace>(o, v, V, lanes, pitch);
    grad = load_vector<A>(grads[r] + at);
    pin(grad);  // or the load becomes a masked one that waits for the comparison
    winner = load_vector<code_t<A>>(winners[r] + at) - bases[r];
  };
  const auto single = [&](int64_t i) {
    for (int64_t v = 0; v < V; ++v) {
      vector_t<A> sum{}, grad;
      codes_t<A> winner;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = w.cover[i]; j < w.cover[i + 1]; ++j) {
          read(r, w.cover_output[j], v, grad, winner);
          add(sum, grad, winner, w.cover_tap[j]);
        }
      }
      put(i, v, sum);
    }
  };
  for_windows(w, [&]<int kTaps, int kStride>() {
    if constexpr (kTaps == 0) {
      for (int64_t i = first; i < last; ++i) single(i);
    } else {
      const auto cell = [&](int64_t o, int64_t i) {
        for (int64_t v = 0; v < V; ++v) {
          vector_t<A> sums[kStride] = {}, grad;
          codes_t<A> winner;
          for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
            for (int before = (kTaps - 1) / kStride; before >= 0; --before) {
              read(r, o - before, v, grad, winner);
#pragma GCC unroll 4
              for (int k = 0; k < kStride; ++k)
                if (k + before * kStride < kTaps) add(sums[k], grad, winner, k + before * kStride);
            }
          }
#pragma GCC unroll 4
          for (int k = 0; k < kStride; ++k) put(i + k, v, sums[k]);
        }
      };
      for_inputs<kTaps, kStride>(w, first, last, cell, single);
    }
  });
}

// The same of average pooling, along one axis after the other: `shares` is room for the sum over the rows.
template <class A, Lanes kTo, bool kInPlace, class G, class T>
static void collect_shares(const G* const* grads, const A* const* scales, int64_t rows, const AxisView& w,
                           int64_t first_output, int64_t last_output, int64_t first, int64_t last, int64_t vectors,
                           int64_t lanes, A* shares, T* grad_input, int64_t pixel_pitch, bool past_caches) {
  constexpr int64_t L = kLanes<A>;
  const int64_t pitch = kTo == Lanes::planes ? L : pixel_pitch, V = kTo == Lanes::channels ? vectors : 1;
  for (int64_t o = first_output; o < last_output; ++o) {
    for (int64_t v = 0; v < V; ++v) {
      const int64_t at = output_at<A, kTo, kInPlace>(o, v, V, lanes, pitch);
      vector_t<A> sum{};
      for (int64_t r = 0; r < rows; ++r)
        sum += load_vector<A>(grads[r] + at) * (vector_t<A>{} + scales[r][o - first_output]);
      store_vector<A>(shares + ((o - first_output) * V + v) * L, sum);
    }
  }
  const T* end = grad_input + (last - first) * pitch;
  const auto put = [&](int64_t i, int64_t v, vector_t<A> sum) {
    T* to = grad_input + (i - first) * pitch + lane_of<A, kTo>(v, lanes);
    if constexpr (kTo == Lanes::channels && std::is_same_v<A, T>)
      if (past_caches) return store_past_caches(sum, to);
    store<A, kTo>(to, sum, lanes, end);
  };
  const auto share = [&](int64_t o, int64_t v) { return load_vector<A>(shares + ((o - first_output) * V + v) * L); };
  const auto single = [&](int64_t i) {
    for (int64_t v = 0; v < V; ++v) {
      vector_t<A> sum{};
      for (int64_t j = w.cover[i]; j < w.cover[i + 1]; ++j) sum += share(w.cover_output[j], v);
      put(i, v, sum);
    }
  };
  for_windows(w, [&]<int kTaps, int kStride>() {
    if constexpr (kTaps == 0) {
      for (int64_t i = first; i < last; ++i) single(i);
    } else {
      const auto cell = [&](int64_t o, int64_t i) {
        for (int64_t v = 0; v < V; ++v) {
          vector_t<A> sums[kStride] = {};
#pragma GCC unroll 4
          for (int before = (kTaps - 1) / kStride; before >= 0; --before) {
            const vector_t<A> part = share(o - before, v);
#pragma GCC unroll 4
            for (int k = 0; k < kStride; ++k)
              if (k + before * kStride < kTaps) sums[k] += part;
          }
#pragma GCC unroll 4
          for (int k = 0; k < kStride; ++k) put(i + k, v, sums[k]);
        }
      };
      for_inputs<kTaps, kStride>(w, first, last, cell, single);
    }
  });
}

// Backward, for items begin .. end-1, a row of the input's gradient each.
template <bool kMax, class T, class U>
static void pool_backward(const PoolGeometry& g, const T* grad_output, const U* winner, T* grad_input, int64_t begin,
                          int64_t end) {
  using A = accumulate_t<T>;
  constexpr int64_t L = kLanes<A>;
  const AxisView &d = g.d, &h = g.h, &w = g.w;
  const int64_t tile = tile_columns(w, true), tiles = (w.input + tile - 1) / tile, rows = d.input * h.input;
  // Outputs that read columns first .. last-1 of the input.
  const auto outputs_of = [&](int64_t first, int64_t last, int64_t* first_output, int64_t* last_output) {
    *first_output = w.output;
    *last_output = 0;
    for (int64_t j = w.cover[first]; j < w.cover[last]; ++j) {
      *first_output = least(*first_output, w.cover_output[j]);
      *last_output = most(*last_output, w.cover_output[j] + 1);
    }
    *first_output = least(*first_output, *last_output);
  };
  int64_t tile_outputs = w.output;
  if (tiles > 1) {
    tile_outputs = 0;
    for (int64_t first = 0; first < w.input; first += tile) {
      int64_t a, b;
      outputs_of(first, least(first + tile, w.input), &a, &b);
      tile_outputs = most(tile_outputs, b - a);
    }
  }

  const bool lanes_made = !g.channels_last;
  const int64_t run = (lanes_made ? g.input_pixels() : g.channels) * static_cast<int64_t>(sizeof(T));
  const bool past_caches =
      goes_past_caches(grad_input, g.batch * g.channels * g.input_pixels() * static_cast<int64_t>(sizeof(T)), run);
  const int64_t depths = d.cover_count, most_rows = d.cover_count * h.cover_count, pixels = g.output_pixels();
  const bool outputs_in_place = in_place<A>(g);
  const int64_t kept_outputs = outputs_in_place ? 0 : tile_outputs;
  LaneRows<A, T> grads(g, h.output, w.output, pixels, kept_outputs, depths, h.cover_reach);
  LaneRows<code_t<A>, U> winners(g, h.output, w.output, pixels, kMax ? kept_outputs : 0, depths, h.cover_reach);
  LaneWriter<A, T> out(g.input_pixels(), lanes_made ? tile : 1, past_caches);
  Buffer<const A*> row_grads(most_rows);
  Buffer<const code_t<A>*> row_winners(most_rows);
  Buffer<const T*> channel_grads(most_rows);
  Buffer<const U*> channel_winners(most_rows);
  Buffer<code_t<A>> bases(most_rows);
  Buffer<const A*> row_scales(most_rows);
  Divisors<A> scales(g, true, most_rows, kMax ? 0 : tile_outputs);
  Buffer<A> shares(kMax ? 1 : tile_outputs * L * (g.channels_last ? widest<A>(g) : 1));

  int64_t block_and_tile = -1, first = 0, last = 0, first_output = 0, last_output = 0;
  Block block{};
  for (int64_t item = begin; item < end; ++item) {
    if (item / rows != block_and_tile) {
      out.flush();
      block_and_tile = item / rows;
      block = block_at<A>(g, block_and_tile / tiles);
      first = block_and_tile % tiles * tile;
      last = least(first + tile, w.input);
      outputs_of(first, last, &first_output, &last_output);
      grads.restart(grad_output + block.base_output, block, first_output, depths);
      if constexpr (kMax) winners.restart(winner + block.base_output, block, first_output, depths);
      if (lanes_made) out.restart(grad_input + block.base_input, block.lanes);
    }
    const int64_t row = item % rows, in_d = row / h.input, in_h = row % h.input, outputs = last_output - first_output;
    int64_t used = 0;
    if (outputs > 0) {
      for (int64_t i = d.cover[in_d]; i < d.cover[in_d + 1]; ++i) {
        for (int64_t j = h.cover[in_h]; j < h.cover[in_h + 1]; ++j, ++used) {
          const int64_t od = d.cover_output[i], oh = h.cover_output[j], index = i - d.cover[in_d];
          const int64_t channel_row = block.base_output + (od * h.output + oh) * w.output * g.channels;
          if (outputs_in_place)
            channel_grads.data[used] = grad_output + channel_row;
          else
            row_grads.data[used] = grads.row(index, od, oh, outputs);
          if constexpr (kMax) {
            if (outputs_in_place)
              channel_winners.data[used] = winner + channel_row;
            else
              row_winners.data[used] = winners.row(index, od, oh, outputs);
            bases.data[used] = static_cast<code_t<A>>((d.cover_tap[i] * h.taps + h.cover_tap[j]) * w.taps);
          } else {
            row_scales.data[used] = scales.of(used, d.divisor[od] * h.divisor[oh], first_output, outputs);
          }
        }
      }
    }
    const int64_t position = row * w.input + first;
    for_lanes(block.from, [&]<Lanes kTo>() {
      const auto collect = [&]<bool kInPlace>(auto* to, auto* from, auto* from_winners) {
        if constexpr (kMax)
          collect_winners<A, kTo, kInPlace>(from, from_winners, bases.data, used, w, first, last, block.vectors,
                                            block.lanes, to, g.channels, past_caches);
        else
          collect_shares<A, kTo, kInPlace>(from, row_scales.data, used, w, first_output, last_output, first, last,
                                           block.vectors, block.lanes, shares.data, to, g.channels, past_caches);
      };
      T* to = grad_input + block.base_input + position * g.channels;
      if constexpr (kTo == Lanes::planes)
        collect.template operator()<false>(out.next(position, last - first), row_grads.data, row_winners.data);
      else if (kTo == Lanes::channels && outputs_in_place)
        collect.template operator()<true>(to, channel_grads.data, channel_winners.data);
      else
        collect.template operator()<false>(to, row_grads.data, row_winners.data);
    });
  }
  out.flush();
  if (past_caches) finish_stores_past_caches();
}

// Max pooling at fixed winners, for output pixels begin .. end-1 (N, C, *O in memory order): each reads its winner.
template <class T, class U>
static void pick(const PoolGeometry& g, const T* input, const U* winner, T* output, int64_t begin, int64_t end) {
  const AxisView &d = g.d, &h = g.h, &w = g.w;
  const int64_t lanes = g.channels_last ? g.channels : 1, pixels = g.output_pixels();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t outer = item / pixels, pixel = item % pixels;
    const int64_t ow = pixel % w.output, oh = pixel / w.output % h.output, od = pixel / w.output / h.output;
    const T* x = input + outer * g.input_pixels() * lanes;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t code = winner[item * lanes + lane];
      const int64_t kw = code % w.taps - w.tap[ow], kh = code / w.taps % h.taps - h.tap[oh];
      const int64_t kd = code / w.taps / h.taps - d.tap[od];
      const bool inside = kw >= 0 && kw < w.count[ow] && kh >= 0 && kh < h.count[oh] && kd >= 0 && kd < d.count[od];
      const int64_t at =
          ((d.first[od] + kd * d.step) * h.input + h.first[oh] + kh * h.step) * w.input + w.first[ow] + kw * w.step;
      output[item * lanes + lane] = inside ? x[at * lanes + lane] : T(0);
    }
  }
}

// The gradient of max pooling's input where few inputs win: zeros, and each output's gradient added where its winner
// is. For planes begin .. end-1, or images with channels_last. offsets[code] is where a tap lies from the first one of
// its window, which may be one of the padding.
template <class T, class U>
static void place(const PoolGeometry& g, const T* grad_output, const U* winner, T* grad_input, const int64_t* offsets,
                  int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const AxisView &d = g.d, &h = g.h, &w = g.w;
  const int64_t lanes = g.channels_last ? g.channels : 1, taps = d.taps * h.taps * w.taps, pixels = g.input_pixels();
  const auto start = [](const AxisView& axis, int64_t o) { return axis.first[o] - axis.tap[o] * axis.step; };
  for (int64_t outer = begin; outer < end; ++outer) {
    T* to = grad_input + outer * pixels * lanes;
    __builtin_memset(static_cast<void*>(to), 0, pixels * lanes * sizeof(T));
    int64_t item = outer * g.output_pixels() * lanes;
    for (int64_t od = 0; od < d.output; ++od) {
      for (int64_t oh = 0; oh < h.output; ++oh) {
        const int64_t row = (start(d, od) * h.input + start(h, oh)) * w.input;
        for (int64_t ow = 0; ow < w.output; ++ow) {
          const int64_t window = row + start(w, ow);
          for (int64_t lane = 0; lane < lanes; ++lane, ++item) {
            const int64_t code = winner[item];
            if (code < 0 || code >= taps) continue;
            const int64_t pixel = window + offsets[code];
            if (pixel < 0 || pixel >= pixels) continue;
            T* p = to + pixel * lanes + lane;
            *p = static_cast<T>(static_cast<A>(*p) + static_cast<A>(grad_output[item]));
          }
        }
      }
    }
  }
}

// The sum of neighbouring elements: in kSums vectors side by side, so that neither latency nor rounding grows with
// every element.
template <class T>
static double sum_of_run(const T* p, int64_t count) {
  using A = accumulate_t<T>;
  constexpr int kSums = 4;
  constexpr int64_t L = kLanes<A>, kFlush = 4096;  // elements that are summed before the sum goes into the double
  double total = 0;
  for (int64_t i = 0; i < count;) {
    const int64_t stop = least(count, i + kFlush);
    vector_t<A> sums[kSums] = {};
    for (; i + kSums * L <= stop; i += kSums * L) {
#pragma GCC unroll 4
      for (int s = 0; s < kSums; ++s) sums[s] += load_vector<A>(p + i + s * L);
    }
    for (; i + L <= stop; i += L) sums[0] += load_vector<A>(p + i);
    A sum = sum_of_lanes<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < stop; ++i) sum += static_cast<A>(p[i]);
    total += sum;
  }
  return total;
}

// Average pooling to one output: the mean of whole planes begin .. end-1, which need no transpose.
template <class T>
static void average_planes(const T* input, T* output, int64_t pixels, double divisor, int64_t begin, int64_t end) {
  for (int64_t plane = begin; plane < end; ++plane)
    output[plane] = static_cast<T>(sum_of_run(input + plane * pixels, pixels) / divisor);
}

// Its transpose: every element of a plane gets the same share.
template <class T>
static void spread_planes(const T* grad_output, T* grad_input, int64_t pixels, double divisor, int64_t begin,
                          int64_t end) {
  using A = accumulate_t<T>;
  for (int64_t plane = begin; plane < end; ++plane) {
    const T share = static_cast<T>(static_cast<A>(grad_output[plane]) / static_cast<A>(divisor));
    T* p = grad_input + plane * pixels;
    for (int64_t i = 0; i < pixels; ++i) p[i] = share;
  }
}

// Average pooling of contiguous tensors by windows that are long along W, which need no transposes. For planes begin ..
// end-1.
template <class T>
static void average_runs(const PoolGeometry& g, const T* input, T* output, int64_t begin, int64_t end) {
  const AxisView &d = g.d, &h = g.h, &w = g.w;
  for (int64_t plane = begin; plane < end; ++plane) {
    const T* p = input + plane * g.input_pixels();
    T* out = output + plane * g.output_pixels();
    for (int64_t od = 0; od < d.output; ++od) {
      for (int64_t oh = 0; oh < h.output; ++oh) {
        for (int64_t ow = 0; ow < w.output; ++ow, ++out) {
          double total = 0;
          for (int64_t i = d.first[od]; i < d.first[od] + d.count[od]; ++i)
            for (int64_t j = h.first[oh]; j < h.first[oh] + h.count[oh]; ++j)
              total += sum_of_run(p + (i * h.input + j) * w.input + w.first[ow], w.count[ow]);
          *out = static_cast<T>(total / window_divisor(g, d.divisor[od] * h.divisor[oh], ow));
        }
      }
    }
  }
}

// Its transpose: every element of a window gets the same share.
template <class T>
static void spread_runs(const PoolGeometry& g, const T* grad_output, T* grad_input, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  constexpr int64_t L = kLanes<A>;
  const AxisView &d = g.d, &h = g.h, &w = g.w;
  const bool past_caches = elementwise_goes_past_caches<T>(g.batch * g.channels * g.input_pixels());
  Buffer<A> shares(w.input);
  for (int64_t plane = begin; plane < end; ++plane) {
    for (int64_t row = 0; row < d.input * h.input; ++row) {
      const int64_t in_d = row / h.input, in_h = row % h.input;
      const auto share_of = [&](int64_t ow) {
        A share = 0;
        for (int64_t i = d.cover[in_d]; i < d.cover[in_d + 1]; ++i) {
          for (int64_t j = h.cover[in_h]; j < h.cover[in_h + 1]; ++j) {
            const int64_t od = d.cover_output[i], oh = h.cover_output[j];
            const T grad = grad_output[plane * g.output_pixels() + (od * h.output + oh) * w.output + ow];
            share += static_cast<A>(grad) / static_cast<A>(window_divisor(g, d.divisor[od] * h.divisor[oh], ow));
          }
        }
        return share;
      };
      T* to = grad_input + plane * g.input_pixels() + row * w.input;
      // Shares are added to what the windows before left, up to column `written`; behind it there are none yet.
      int64_t written = 0;
      for (int64_t ow = 0; ow < w.output; ++ow) {
        const A share = share_of(ow);
        int64_t column = w.first[ow];
        const int64_t stop = column + w.count[ow];
        for (; written < column; ++written) shares.data[written] = 0;
        for (; column < least(written, stop); ++column) shares.data[column] += share;
        for (; column + L <= stop; column += L) store_vector<A>(shares.data + column, vector_t<A>{} + share);
        for (; column < stop; ++column) shares.data[column] = share;
        written = most(written, stop);
      }
      for (; written < w.input; ++written) shares.data[written] = 0;
      deliver(shares.data, to, w.input, past_caches);
    }
  }
  if (past_caches) finish_stores_past_caches();
}
