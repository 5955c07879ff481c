// Max and average pooling, forward and backward, for both memory formats: one code over "lanes".
//
// A lane is a plane of the tensor, and neighbouring lanes sit in one vector, so that every tap is plain vector
// arithmetic whatever the window. With channels_last the lanes are channels, which lie side by side in memory. With
// contiguous tensors they are kLanes planes that are brought side by side, a few rows at a time, by transposing
// registers.
//
// Work comes as items: (block of lanes, tile of columns, row). A range of items can start anywhere, and its results do
// not depend on where it does.

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t code;
  typedef int32_t code_vector __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t code;
  typedef int64_t code_vector __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<int32_t> {
  typedef int32_t type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<int64_t> {
  typedef int64_t type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using vector_t = typename VectorOf<A>::type;
template <class A>
using code_t = typename VectorOf<A>::code;  // a tap's number, as wide as a lane of A
template <class A>
using codes_t = typename VectorOf<A>::code_vector;
template <class A>
constexpr int64_t kLanes = kVectorBytes / sizeof(A);

// channels_last blocks of 4 vectors keep neighbouring cache lines together; wider and narrower ones were slower.
constexpr int kWide = 4;
// An input tile of this many pixels, one vector each, fills half of a 64 KiB L1.
constexpr int64_t kTilePixels = 512;
// Rows are transposed in flat chunks of about this many pixels, so that short rows fill whole registers.
constexpr int64_t kChunkPixels = 256;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// The upper halves of bfloat16 after rounding to nearest, ties to even; a NaN stays one.
static inline vector_t<int32_t> rounded_bfloat16(vector_t<float> vector) {
  const vector_t<int32_t> bits = reinterpret_cast<vector_t<int32_t>>(vector), nan = vector != vector;
  const vector_t<int32_t> rounded = ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
  return (rounded & ~nan) | (nan & 0x7fc0);
}

// A vector's worth of T as A, and back. Where the types differ GCC takes loops over lanes, and __builtin_convertvector,
// apart into single elements as soon as they meet a transpose; hence the instructions by name.
template <class A, class T>
static inline vector_t<A> load_vector(const T* p) {
  typedef vector_t<A> Vector;
  if constexpr (std::is_same_v<A, T>) {
    Vector loaded;
    __builtin_memcpy(&loaded, p, sizeof(loaded));
    return loaded;
  }
#if defined(__x86_64__)
  constexpr bool k512 = sizeof(Vector) == 64 && sizeof(A) == 4, k256 = sizeof(Vector) == 32 && sizeof(A) == 4;
  if constexpr (k512 && std::is_same_v<T, uint8_t>)
    return reinterpret_cast<Vector>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  if constexpr (k256 && std::is_same_v<T, uint8_t>)
    return reinterpret_cast<Vector>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  if constexpr (k512 && std::is_same_v<T, BFloat16>) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return reinterpret_cast<Vector>(_mm512_slli_epi32(wide, 16));
  }
  if constexpr (k256 && std::is_same_v<T, BFloat16>) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return reinterpret_cast<Vector>(_mm256_slli_epi32(wide, 16));
  }
  if constexpr (k512 && std::is_same_v<T, Half>)
    return reinterpret_cast<Vector>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
  if constexpr (k256 && std::is_same_v<T, Half>)
    return reinterpret_cast<Vector>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#endif
  A values[kLanes<A>];
  for (int lane = 0; lane < kLanes<A>; ++lane) values[lane] = static_cast<A>(p[lane]);
  Vector loaded;
  __builtin_memcpy(&loaded, values, sizeof(loaded));
  return loaded;
}

template <class A, class T>
static inline void store_vector(T* p, vector_t<A> vector) {
  if constexpr (std::is_same_v<A, T>) {
    __builtin_memcpy(p, &vector, sizeof(vector));
    return;
  }
#if defined(__x86_64__)
  constexpr bool k512 = sizeof(vector) == 64 && sizeof(A) == 4, k256 = sizeof(vector) == 32 && sizeof(A) == 4;
  // The low 16 bits of each of 8 numbers below 65536.
  [[maybe_unused]] const auto pack_16 = [](auto numbers) {
    const __m256i wide = reinterpret_cast<__m256i>(numbers);
    return _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  };
  if constexpr (k512 && std::is_same_v<T, uint8_t>)
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(vector)));
  if constexpr (k256 && std::is_same_v<T, uint8_t>)
    return _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(pack_16(vector), pack_16(vector)));
  if constexpr (k512 && std::is_same_v<T, BFloat16>)
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                               _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(rounded_bfloat16(vector))));
  if constexpr (k256 && std::is_same_v<T, BFloat16>)
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), pack_16(rounded_bfloat16(vector)));
  if constexpr (k512 && std::is_same_v<T, Half>)
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                               _mm512_cvtps_ph(reinterpret_cast<__m512>(vector), _MM_FROUND_TO_NEAREST_INT));
  if constexpr (k256 && std::is_same_v<T, Half>)
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                            _mm256_cvtps_ph(reinterpret_cast<__m256>(vector), _MM_FROUND_TO_NEAREST_INT));
#endif
  A values[kLanes<A>];
  __builtin_memcpy(values, &vector, sizeof(vector));
  for (int lane = 0; lane < kLanes<A>; ++lane) p[lane] = static_cast<T>(values[lane]);
}

// The same for a full vector, or, with kVectors = 0, for its first `lanes` lanes.
template <class A, int kVectors, class T>
static inline vector_t<A> load(const T* p, int64_t lanes) {
  if constexpr (kVectors > 0) {
    return load_vector<A, T>(p);
  } else {
    A values[kLanes<A>] = {};
    for (int64_t lane = 0; lane < lanes; ++lane) values[lane] = static_cast<A>(p[lane]);
    return load_vector<A, A>(values);
  }
}

template <class A, int kVectors, class T>
static inline void store(T* p, vector_t<A> vector, int64_t lanes) {
  if constexpr (kVectors > 0) {
    store_vector<A, T>(p, vector);
  } else {
    A values[kLanes<A>];
    store_vector<A, A>(values, vector);
    for (int64_t lane = 0; lane < lanes; ++lane) p[lane] = static_cast<T>(values[lane]);
  }
}

template <class T>
struct Buffer {
  T* data;
  explicit Buffer(int64_t count)
      : data(static_cast<T*>(::operator new(most(1, count) * sizeof(T), std::align_val_t(64)))) {}
  Buffer(const Buffer&) = delete;
  ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
};

// One step of a matrix transpose: swaps the off-diagonal blocks of size kBlock between rows a and b.
template <int kBlock, class V, int... kLane>
static inline void exchange(V& a, V& b, std::integer_sequence<int, kLane...>) {
  constexpr int L = sizeof...(kLane);
  const V first = __builtin_shufflevector(a, b, (kLane & kBlock ? L + kLane - kBlock : kLane)...);
  b = __builtin_shufflevector(a, b, (kLane & kBlock ? L + kLane : kLane + kBlock)...);
  a = first;
}

// Keeps GCC from looking through a vector at what it was made of.
template <class V>
static inline void pin(V& vector) {
#if defined(__x86_64__)
  asm("" : "+v"(vector));
#endif
}

template <int kBlock, class A>
static inline void transpose_from(vector_t<A>* rows) {
  if constexpr (kBlock > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; ++i)
      if (!(i & kBlock)) exchange<kBlock>(rows[i], rows[i + kBlock], std::make_integer_sequence<int, kLanes<A>>());
    transpose_from<kBlock / 2, A>(rows);
  }
}

// planes x pixels, planes `pitch` apart -> lanes[pixel][kLanes]. The last tile overlaps the one before it.
template <class A, class T>
static void to_lanes(const T* planes, int64_t pitch, int64_t count, int64_t pixels, A* lanes) {
  constexpr int64_t L = kLanes<A>;
  if (count < L || pixels < L) {
    for (int64_t pixel = 0; pixel < pixels; ++pixel)
      for (int64_t lane = 0; lane < L; ++lane)
        lanes[pixel * L + lane] = lane < count ? static_cast<A>(planes[lane * pitch + pixel]) : A(0);
    return;
  }
  for (int64_t tile = 0; tile < pixels; tile += L) {
    const int64_t pixel = least(tile, pixels - L);
    vector_t<A> rows[L];
#pragma GCC unroll 16
    for (int64_t lane = 0; lane < L; ++lane) pin(rows[lane] = load<A, 1>(planes + lane * pitch + pixel, L));
    transpose_from<L / 2, A>(rows);
#pragma GCC unroll 16
    for (int64_t i = 0; i < L; ++i) store<A, 1>(lanes + (pixel + i) * L, rows[i], L);
  }
}

template <class A, class T>
static void from_lanes(const A* lanes, int64_t pitch, int64_t count, int64_t pixels, T* planes) {
  constexpr int64_t L = kLanes<A>;
  if (count < L || pixels < L) {
    for (int64_t lane = 0; lane < count; ++lane)
      for (int64_t pixel = 0; pixel < pixels; ++pixel)
        planes[lane * pitch + pixel] = static_cast<T>(lanes[pixel * L + lane]);
    return;
  }
  for (int64_t tile = 0; tile < pixels; tile += L) {
    const int64_t pixel = least(tile, pixels - L);
    vector_t<A> rows[L];
#pragma GCC unroll 16
    for (int64_t i = 0; i < L; ++i) pin(rows[i] = load<A, 1>(lanes + (pixel + i) * L, L));
    transpose_from<L / 2, A>(rows);
#pragma GCC unroll 16
    for (int64_t lane = 0; lane < L; ++lane) store<A, 1>(planes + lane * pitch + pixel, rows[lane], L);
  }
}

// Where a block's lanes lie: the first of them at `base`, pixels `pixel_pitch` apart (channels_last) or planes
// `plane_pitch` apart (contiguous).
struct Block {
  int64_t base_input, base_output;  // offsets of the first lane
  int64_t lanes;
  int vectors;  // kWide or 1 full vectors, or 0: fewer lanes than a vector has
};

template <class A>
static int64_t block_count(const PoolGeometry& g) {
  constexpr int64_t L = kLanes<A>;
  if (!g.channels_last) return (g.batch * g.channels + L - 1) / L;
  const int64_t wide = g.channels / (kWide * L);
  return g.batch * (wide + (g.channels - wide * kWide * L + L - 1) / L);
}

template <class A>
static Block block_at(const PoolGeometry& g, int64_t index) {
  constexpr int64_t L = kLanes<A>;
  if (!g.channels_last) {
    const int64_t lanes = least(L, g.batch * g.channels - index * L);
    return {index * L * g.input_pixels(), index * L * g.output_pixels(), lanes, 1};
  }
  const int64_t per_image = block_count<A>(g) / g.batch, wide = g.channels / (kWide * L);
  const int64_t n = index / per_image, b = index % per_image;
  const int64_t channel = b < wide ? b * kWide * L : wide * kWide * L + (b - wide) * L;
  const int64_t lanes = b < wide ? kWide * L : least(L, g.channels - channel);
  return {n * g.input_pixels() * g.channels + channel, n * g.output_pixels() * g.channels + channel, lanes,
          b < wide ? kWide : (lanes == L ? 1 : 0)};
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

// Rows of a contiguous tensor as lanes. Chunks of whole rows are kept, `slots` of them for each of a few depths.
template <class A, class T>
struct LaneRows {
  const T* planes = nullptr;
  int64_t pitch, count = 0, height, width, start = 0, columns, rows, chunks, slots;
  Buffer<A> lanes;
  Buffer<int64_t> keys;

  // `live` rows may be in use at one time for each of `depths` depths; columns start .. start+columns-1 are read.
  LaneRows(int64_t pitch, int64_t height, int64_t width, int64_t columns, int64_t depths, int64_t live)
      : pitch(pitch),
        height(height),
        width(width),
        columns(columns),
        rows(columns < width ? 1 : least(most(1, kChunkPixels / most(1, width)), most(1, height))),
        chunks((height + rows - 1) / rows),
        slots((live + rows - 1) / rows + 1),
        lanes(depths * slots * rows * columns * kLanes<A>),
        keys(depths * slots) {}

  void restart(const T* first_plane, int64_t plane_count, int64_t first_column, int64_t depths) {
    planes = first_plane;
    count = plane_count;
    start = columns < width ? first_column : 0;
    for (int64_t slot = 0; slot < depths * slots; ++slot) keys.data[slot] = -1;
  }

  const A* row(int64_t index, int64_t d, int64_t h, int64_t used_columns) {
    const int64_t chunk = h / rows, slot = index * slots + chunk % slots, key = d * chunks + chunk;
    A* kept = lanes.data + slot * rows * columns * kLanes<A>;
    if (keys.data[slot] != key) {
      keys.data[slot] = key;
      const int64_t pixels = columns < width ? used_columns : least(rows, height - chunk * rows) * width;
      to_lanes(planes + (d * height + chunk * rows) * width + start, pitch, count, pixels, kept);
    }
    return kept + (h - chunk * rows) * columns * kLanes<A>;
  }
};

// Rows of lanes on their way into a contiguous tensor: flushed in flat runs.
template <class A, class T>
struct LaneWriter {
  T* planes = nullptr;
  int64_t pitch, count = 0, capacity, start = 0, filled = 0;
  Buffer<A> lanes;

  LaneWriter(int64_t pitch, int64_t columns)
      : pitch(pitch), capacity(most(columns, kChunkPixels)), lanes(capacity * kLanes<A>) {}

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
    if (filled) from_lanes(lanes.data, pitch, count, filled, planes + start);
    filled = 0;
  }
};

// The rule of max pooling: take what is larger, or NaN.
template <class A>
static inline void take(vector_t<A>& best, codes_t<A>& winner, vector_t<A> value, codes_t<A> code) {
  const codes_t<A> better = (value > best) | (value != value);
  best = better ? value : best;
  winner = better ? code : winner;
}

// Reduce one row of the input along W: outputs first .. last-1 -> [output][vectors].
template <bool kMax, class A, int kVectors, class S>
static void reduce_row(const S* row, int64_t pitch, const AxisView& w, int64_t first, int64_t last, int64_t lanes,
                       A* values, code_t<A>* winners) {
  constexpr int V = kVectors ? kVectors : 1;
  constexpr int64_t L = kLanes<A>;
  for (int64_t o = first; o < last; ++o) {
    const S* p = row + w.first[o] * pitch;
    const int64_t count = w.count[o];
    vector_t<A> value[V];
    codes_t<A> winner[V], code = codes_t<A>{} + static_cast<code_t<A>>(w.tap[o]);
    if (count == 0) p = row;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      value[v] = count ? load<A, kVectors>(p + v * L, lanes) : vector_t<A>{} + (kMax ? -A(__builtin_inf()) : A(0));
      winner[v] = code;
    }
    for (int64_t k = 1; k < count; ++k) {
      p += w.step * pitch;
      code += 1;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const vector_t<A> x = load<A, kVectors>(p + v * L, lanes);
        if constexpr (kMax)
          take<A>(value[v], winner[v], x, code);
        else
          value[v] += x;
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      store<A, 1>(values + ((o - first) * V + v) * L, value[v], L);
      if constexpr (kMax) store<code_t<A>, 1>(winners + ((o - first) * V + v) * L, winner[v], L);
    }
  }
}

// Reduce `rows` reduced rows along D and H, into pixels `pitch` apart.
template <bool kMax, class A, int kVectors, class T, class U>
static void reduce_rows(const A* const* values, const code_t<A>* const* winners, const int64_t* bases, int64_t rows,
                        int64_t columns, int64_t lanes, const A* divisors, T* output, U* winner, int64_t pitch) {
  constexpr int V = kVectors ? kVectors : 1;
  constexpr int64_t L = kLanes<A>;
  for (int64_t o = 0; o < columns; ++o) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const int64_t at = (o * V + v) * L;
      vector_t<A> best = load<A, 1>(values[0] + at, L);
      codes_t<A> code{};
      if constexpr (kMax) code = load<code_t<A>, 1>(winners[0] + at, L) + static_cast<code_t<A>>(bases[0]);
      for (int64_t r = 1; r < rows; ++r) {
        const vector_t<A> value = load<A, 1>(values[r] + at, L);
        if constexpr (kMax)
          take<A>(best, code, value, load<code_t<A>, 1>(winners[r] + at, L) + static_cast<code_t<A>>(bases[r]));
        else
          best += value;
      }
      if constexpr (kMax)
        store<code_t<A>, kVectors>(winner + o * pitch + v * L, code, lanes);
      else
        best /= vector_t<A>{} + divisors[o];
      store<A, kVectors>(output + o * pitch + v * L, best, lanes);
    }
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

// Forward, for items begin .. end-1: rows of the input are reduced along W as they are needed and kept in a ring, so
// that windows that overlap along H share them; then along D and H.
template <bool kMax, class T, class U>
static void pool_forward(const PoolGeometry& g, const T* input, T* output, U* winner, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  constexpr int64_t L = kLanes<A>;
  const AxisView &d = g.d, &h = g.h, &w = g.w;
  const int64_t tile = tile_columns(w, false), tiles = (w.output + tile - 1) / tile, rows = d.output * h.output;
  const int64_t width = g.channels_last ? kWide * L : L;  // lanes of a pixel in the ring
  int64_t tile_inputs = 1;
  for (int64_t first = 0; first < w.output; first += tile) {
    const InputRange range = inputs_of(w, first, least(first + tile, w.output));
    tile_inputs = most(tile_inputs, range.end - range.begin);
  }

  const bool lanes_made = !g.channels_last;
  LaneRows<A, T> source(g.input_pixels(), h.input, w.input, lanes_made ? tile_inputs : 0, d.taps, 1);
  LaneWriter<A, T> values_out(g.output_pixels(), lanes_made ? tile : 1);
  LaneWriter<code_t<A>, U> winners_out(g.output_pixels(), lanes_made && kMax ? tile : 1);
  const int64_t slots = d.taps * h.reach, slot_size = tile * width;
  Buffer<A> ring(slots * slot_size);
  Buffer<code_t<A>> ring_winners(kMax ? slots * slot_size : 1);
  Buffer<int64_t> keys(slots), bases(d.taps * h.taps);
  Buffer<const A*> row_values(d.taps * h.taps);
  Buffer<const code_t<A>*> row_winners(d.taps * h.taps);
  Buffer<A> divisors(tile), nothing(slot_size);
  Buffer<code_t<A>> nothing_winners(slot_size);

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
        source.restart(input + block.base_input, block.lanes, first_input, d.taps);
        values_out.restart(output + block.base_output, block.lanes);
        if constexpr (kMax) winners_out.restart(winner + block.base_output, block.lanes);
      }
    }
    const int64_t row = item % rows, od = row / h.output, oh = row % h.output, columns = last - first;
    const int64_t block_width = most(1, block.vectors) * L;
    int64_t used = 0;
    for (int64_t i = 0; i < d.count[od]; ++i) {
      for (int64_t j = 0; j < h.count[oh]; ++j, ++used) {
        const int64_t in_d = d.first[od] + i * d.step, in_h = h.first[oh] + j * h.step;
        const int64_t slot = i * h.reach + in_h % h.reach, key = in_d * h.input + in_h;
        A* values = ring.data + slot * slot_size;
        code_t<A>* winners = kMax ? ring_winners.data + slot * slot_size : nullptr;
        row_values.data[used] = values;
        row_winners.data[used] = winners;
        bases.data[used] = ((d.tap[od] + i) * h.taps + h.tap[oh] + j) * w.taps;
        if (keys.data[slot] == key) continue;
        keys.data[slot] = key;
        if (lanes_made) {
          const A* lanes = source.row(i, in_d, in_h, least(tile_inputs, w.input - first_input)) - source.start * L;
          reduce_row<kMax, A, 1>(lanes, L, w, first, last, L, values, winners);
        } else {
          const T* lanes = input + block.base_input + key * w.input * g.channels;
          if (block.vectors == kWide)
            reduce_row<kMax, A, kWide>(lanes, g.channels, w, first, last, block.lanes, values, winners);
          else if (block.vectors == 1)
            reduce_row<kMax, A, 1>(lanes, g.channels, w, first, last, block.lanes, values, winners);
          else
            reduce_row<kMax, A, 0>(lanes, g.channels, w, first, last, block.lanes, values, winners);
        }
      }
    }
    if (used == 0) {  // a window with nothing but padding
      for (int64_t o = 0; o < columns; ++o) {
        for (int64_t lane = 0; lane < block_width; ++lane) {
          nothing.data[o * block_width + lane] = kMax ? -A(__builtin_inf()) : A(0);
          nothing_winners.data[o * block_width + lane] = static_cast<code_t<A>>(w.tap[first + o]);
        }
      }
      row_values.data[0] = nothing.data;
      row_winners.data[0] = nothing_winners.data;
      bases.data[0] = (d.tap[od] * h.taps + h.tap[oh]) * w.taps;
      used = 1;
    }
    if constexpr (!kMax) {
      const A rows_divisor = static_cast<A>(d.divisor[od] * h.divisor[oh]);
      for (int64_t o = 0; o < columns; ++o)
        divisors.data[o] = g.divisor_override != 0 ? static_cast<A>(g.divisor_override)
                                                   : rows_divisor * static_cast<A>(w.divisor[first + o]);
    }
    const int64_t position = row * w.output + first;
    const auto finish = [&]<int kVectors>(auto* to, auto* to_winner, int64_t pitch, int64_t lanes) {
      reduce_rows<kMax, A, kVectors>(row_values.data, row_winners.data, bases.data, used, columns, lanes, divisors.data,
                                     to, to_winner, pitch);
    };
    if (lanes_made) {
      A* to = values_out.next(position, columns);
      code_t<A>* to_winner = kMax ? winners_out.next(position, columns) : nullptr;
      finish.template operator()<1>(to, to_winner, L, L);
    } else {
      T* to = output + block.base_output + position * g.channels;
      U* to_winner = kMax ? winner + block.base_output + position * g.channels : nullptr;
      if (block.vectors == kWide)
        finish.template operator()<kWide>(to, to_winner, g.channels, block.lanes);
      else if (block.vectors == 1)
        finish.template operator()<1>(to, to_winner, g.channels, block.lanes);
      else
        finish.template operator()<0>(to, to_winner, g.channels, block.lanes);
    }
  }
  values_out.flush();
  winners_out.flush();
}

// One row of the gradient of max pooling's input, columns first .. last-1: over the rows and columns of the windows
// that cover an input, the gradients of those it won.
template <class A, int kVectors, class S, class R, class T>
static void collect_winners(const S* const* grads, const R* const* winners, const int64_t* bases, int64_t rows,
                            int64_t pitch, const AxisView& w, int64_t first, int64_t last, int64_t lanes, T* grad_input,
                            int64_t input_pitch) {
  constexpr int V = kVectors ? kVectors : 1;
  constexpr int64_t L = kLanes<A>;
  for (int64_t i = first; i < last; ++i) {
    vector_t<A> sum[V] = {};
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = w.cover[i]; j < w.cover[i + 1]; ++j) {
        const int64_t at = w.cover_output[j] * pitch;
        const codes_t<A> code = codes_t<A>{} + static_cast<code_t<A>>(bases[r] + w.cover_tap[j]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          vector_t<A> grad = load<A, kVectors>(grads[r] + at + v * L, lanes);
          pin(grad);  // or the load becomes a masked one that waits for the comparison
          const codes_t<A> winner = load<code_t<A>, kVectors>(winners[r] + at + v * L, lanes);
          sum[v] += winner == code ? grad : vector_t<A>{};
        }
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store<A, kVectors>(grad_input + (i - first) * input_pitch + v * L, sum[v], lanes);
  }
}

// The same of average pooling, along one axis after the other: `shares` is room for the sum over the rows.
template <class A, int kVectors, class S, class T>
static void collect_shares(const S* const* grads, const A* const* scales, int64_t rows, int64_t pitch,
                           const AxisView& w, int64_t first_output, int64_t last_output, int64_t first, int64_t last,
                           int64_t lanes, A* shares, T* grad_input, int64_t input_pitch) {
  constexpr int V = kVectors ? kVectors : 1;
  constexpr int64_t L = kLanes<A>;
  for (int64_t o = first_output; o < last_output; ++o) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      vector_t<A> sum{};
      for (int64_t r = 0; r < rows; ++r)
        sum += load<A, kVectors>(grads[r] + o * pitch + v * L, lanes) * (vector_t<A>{} + scales[r][o - first_output]);
      store<A, 1>(shares + ((o - first_output) * V + v) * L, sum, L);
    }
  }
  for (int64_t i = first; i < last; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      vector_t<A> sum{};
      for (int64_t j = w.cover[i]; j < w.cover[i + 1]; ++j)
        sum += load<A, 1>(shares + ((w.cover_output[j] - first_output) * V + v) * L, L);
      store<A, kVectors>(grad_input + (i - first) * input_pitch + v * L, sum, lanes);
    }
  }
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
  const int64_t depths = d.cover_count, most_rows = d.cover_count * h.cover_count;
  LaneRows<A, T> grads(g.output_pixels(), h.output, w.output, lanes_made ? tile_outputs : 0, depths, h.cover_reach);
  LaneRows<code_t<A>, U> winners(g.output_pixels(), h.output, w.output, lanes_made && kMax ? tile_outputs : 0, depths,
                                 h.cover_reach);
  LaneWriter<A, T> out(g.input_pixels(), lanes_made ? tile : 1);
  Buffer<const void*> row_grads(most_rows), row_winners(most_rows);
  Buffer<int64_t> bases(most_rows);
  Buffer<A> scales(kMax ? 1 : most_rows * most(1, tile_outputs));
  Buffer<const A*> row_scales(most_rows);
  Buffer<A> shares(kMax ? 1 : tile_outputs * (g.channels_last ? kWide * L : L));

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
      if (lanes_made) {
        grads.restart(grad_output + block.base_output, block.lanes, first_output, depths);
        if constexpr (kMax) winners.restart(winner + block.base_output, block.lanes, first_output, depths);
        out.restart(grad_input + block.base_input, block.lanes);
      }
    }
    const int64_t row = item % rows, in_d = row / h.input, in_h = row % h.input, outputs = last_output - first_output;
    int64_t used = 0;
    if (outputs > 0) {
      for (int64_t i = d.cover[in_d]; i < d.cover[in_d + 1]; ++i) {
        for (int64_t j = h.cover[in_h]; j < h.cover[in_h + 1]; ++j, ++used) {
          const int64_t od = d.cover_output[i], oh = h.cover_output[j], index = i - d.cover[in_d];
          const int64_t offset = block.base_output + (od * h.output + oh) * w.output * g.channels;
          if (lanes_made)
            row_grads.data[used] = grads.row(index, od, oh, outputs) - grads.start * L;
          else
            row_grads.data[used] = grad_output + offset;
          if constexpr (kMax) {
            if (lanes_made)
              row_winners.data[used] = winners.row(index, od, oh, outputs) - winners.start * L;
            else
              row_winners.data[used] = winner + offset;
            bases.data[used] = (d.cover_tap[i] * h.taps + h.cover_tap[j]) * w.taps;
          } else {
            A* scale = scales.data + used * outputs;
            row_scales.data[used] = scale;
            const A rows_divisor = static_cast<A>(d.divisor[od] * h.divisor[oh]);
            for (int64_t o = 0; o < outputs; ++o)
              scale[o] = 1 / (g.divisor_override != 0 ? static_cast<A>(g.divisor_override)
                                                      : rows_divisor * static_cast<A>(w.divisor[first_output + o]));
          }
        }
      }
    }
    const int64_t position = row * w.input + first;
    const auto collect = [&]<int kVectors, class S, class R>(auto* to, int64_t output_pitch, int64_t input_pitch,
                                                             int64_t lanes) {
      if constexpr (kMax)
        collect_winners<A, kVectors>(reinterpret_cast<const S* const*>(row_grads.data),
                                     reinterpret_cast<const R* const*>(row_winners.data), bases.data, used,
                                     output_pitch, w, first, last, lanes, to, input_pitch);
      else
        collect_shares<A, kVectors>(reinterpret_cast<const S* const*>(row_grads.data), row_scales.data, used,
                                    output_pitch, w, first_output, last_output, first, last, lanes, shares.data, to,
                                    input_pitch);
    };
    if (lanes_made) {
      collect.template operator()<1, A, code_t<A>>(out.next(position, last - first), L, L, L);
    } else {
      T* to = grad_input + block.base_input + position * g.channels;
      if (block.vectors == kWide)
        collect.template operator()<kWide, T, U>(to, g.channels, g.channels, block.lanes);
      else if (block.vectors == 1)
        collect.template operator()<1, T, U>(to, g.channels, g.channels, block.lanes);
      else
        collect.template operator()<0, T, U>(to, g.channels, g.channels, block.lanes);
    }
  }
  out.flush();
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

// Average pooling to one output: the mean of whole planes begin .. end-1, which need no transpose. A plane is summed in
// kSums vectors side by side, so that neither latency nor rounding grows with every element.
template <class T>
static void average_planes(const T* input, T* output, int64_t pixels, double divisor, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  constexpr int kSums = 4;
  constexpr int64_t L = kLanes<A>, kChunk = 4096;  // values that are summed before the sum goes into the double
  for (int64_t plane = begin; plane < end; ++plane) {
    const T* p = input + plane * pixels;
    double total = 0;
    for (int64_t i = 0; i < pixels;) {
      const int64_t stop = least(pixels, i + kChunk);
      vector_t<A> sums[kSums] = {};
      for (; i + kSums * L <= stop; i += kSums * L) {
#pragma GCC unroll 4
        for (int s = 0; s < kSums; ++s) sums[s] += load<A, 1>(p + i + s * L, L);
      }
      for (; i + L <= stop; i += L) sums[0] += load<A, 1>(p + i, L);
      const vector_t<A> lanes = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      A sum = 0;
      for (; i < stop; ++i) sum += static_cast<A>(p[i]);
      for (int64_t lane = 0; lane < L; ++lane) sum += lanes[lane];
      total += sum;
    }
    output[plane] = static_cast<T>(total / divisor);
  }
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
