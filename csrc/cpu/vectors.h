// Vectors of the instruction set's width, and the ways of values between memory and vectors: conversions from and to
// narrower types, transposes, and stores past the caches. Included by kernel headers, once per instruction set, hence
// no include guard; cpu/intrinsics.h comes before, outside.
#include "cpu/past_caches.h"

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<int32_t> {
  typedef int32_t type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<int64_t> {
  typedef int64_t type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<uint32_t> {
  typedef uint32_t type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<uint64_t> {
  typedef uint64_t type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using vector_t = typename VectorOf<A>::type;
template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

// So that vector_math.h's functions take vectors too.
template <>
struct FloatFormat<vector_t<float>> : FloatFormat<float> {
  using Bits = vector_t<uint32_t>;
};
template <>
struct FloatFormat<vector_t<double>> : FloatFormat<double> {
  using Bits = vector_t<uint64_t>;
};

// The upper halves of bfloat16 after rounding to nearest, ties to even; a NaN stays one.
static inline vector_t<int32_t> rounded_bfloat16(vector_t<float> vector) {
  const vector_t<int32_t> bits = reinterpret_cast<vector_t<int32_t>>(vector), nan = vector != vector;
  const vector_t<int32_t> rounded = ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
  return (rounded & ~nan) | (nan & 0x7fc0);
}

// A vector's worth of T as A, and back: numbers that fit into T. GCC takes loops over lanes that convert, and
// __builtin_convertvector, apart into single elements; hence the instructions by name.
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
  constexpr bool integer = std::is_same_v<A, int32_t>;
  if constexpr (k512 && integer && std::is_same_v<T, uint8_t>)
    return reinterpret_cast<Vector>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  if constexpr (k256 && integer && std::is_same_v<T, uint8_t>)
    return reinterpret_cast<Vector>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  if constexpr (k512 && integer && std::is_same_v<T, uint16_t>)
    return reinterpret_cast<Vector>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
  if constexpr (k256 && integer && std::is_same_v<T, uint16_t>)
    return reinterpret_cast<Vector>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  if constexpr ((k512 || k256) && std::is_same_v<T, BFloat16>)
    return reinterpret_cast<Vector>(load_vector<int32_t>(reinterpret_cast<const uint16_t*>(p)) << 16);
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
  constexpr bool integer = std::is_same_v<A, int32_t>;
  // The low 16 bits of each of 8 numbers below 65536.
  [[maybe_unused]] const auto pack_16 = [](auto numbers) {
    const __m256i wide = reinterpret_cast<__m256i>(numbers);
    return _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  };
  if constexpr (k512 && integer && std::is_same_v<T, uint8_t>)
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(vector)));
  if constexpr (k256 && integer && std::is_same_v<T, uint8_t>)
    return _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(pack_16(vector), pack_16(vector)));
  if constexpr (k512 && integer && std::is_same_v<T, uint16_t>)
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(vector)));
  if constexpr (k256 && integer && std::is_same_v<T, uint16_t>)
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), pack_16(vector));
  if constexpr ((k512 || k256) && std::is_same_v<T, BFloat16>)
    return store_vector<int32_t>(reinterpret_cast<uint16_t*>(p), rounded_bfloat16(vector));
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

// As T holds them.
template <class T, class A>
[[gnu::always_inline]] static inline vector_t<A> rounded_to(vector_t<A> vector) {
  if constexpr (std::is_same_v<A, T>) return vector;
  if constexpr (std::is_same_v<T, BFloat16>) return reinterpret_cast<vector_t<A>>(rounded_bfloat16(vector) << 16);
  T narrow[kLanes<A>];
  store_vector<A>(narrow, vector);
  return load_vector<A>(narrow);
}

// The lanes of a vector that are in use: all of them, or the first few.
struct AllLanes {};
struct FirstLanes {
  int count;
};

// A vector whose lanes that are not in use hold `padding`; and a store of those in use.
template <class A, class T>
[[gnu::always_inline]] static inline vector_t<A> load(const T* p, AllLanes, A = 0) {
  return load_vector<A>(p);
}
template <class A, class T>
[[gnu::always_inline]] static inline vector_t<A> load(const T* p, FirstLanes lanes, A padding = 0) {
#if defined(__x86_64__)
  if constexpr (kVectorBytes == 64 && std::is_same_v<T, A>) {
    const vector_t<A> otherwise = padding - vector_t<A>{};
    const uint32_t mask = (uint32_t{1} << lanes.count) - 1;
    if constexpr (std::is_same_v<T, float>)
      return reinterpret_cast<vector_t<A>>(_mm512_mask_loadu_ps(reinterpret_cast<__m512>(otherwise), mask, p));
    if constexpr (std::is_same_v<T, double>)
      return reinterpret_cast<vector_t<A>>(_mm512_mask_loadu_pd(reinterpret_cast<__m512d>(otherwise), mask, p));
  }
  if constexpr (kVectorBytes == 64 && sizeof(T) == 2 && std::is_same_v<A, float>) {
    const uint32_t mask = (uint32_t{1} << lanes.count) - 1;
    const __m256i some = _mm256_maskz_loadu_epi16(mask, p);
    const vector_t<A> loaded = load_vector<A>(reinterpret_cast<const T*>(&some));
    return reinterpret_cast<vector_t<A>>(
        _mm512_mask_mov_ps(_mm512_set1_ps(padding), mask, reinterpret_cast<__m512>(loaded)));
  }
#endif
  A values[kLanes<A>];
  for (int lane = 0; lane < kLanes<A>; ++lane) values[lane] = padding;
  for (int lane = 0; lane < lanes.count; ++lane) values[lane] = static_cast<A>(p[lane]);
  return load_vector<A>(values);
}
template <class A, class T>
[[gnu::always_inline]] static inline void store(T* p, vector_t<A> vector, AllLanes) {
  store_vector<A>(p, vector);
}
template <class A, class T>
[[gnu::always_inline]] static inline void store(T* p, vector_t<A> vector, FirstLanes lanes) {
#if defined(__x86_64__)
  if constexpr (kVectorBytes == 64 && std::is_same_v<T, A>) {
    const uint32_t mask = (uint32_t{1} << lanes.count) - 1;
    if constexpr (std::is_same_v<T, float>) return _mm512_mask_storeu_ps(p, mask, reinterpret_cast<__m512>(vector));
    if constexpr (std::is_same_v<T, double>) return _mm512_mask_storeu_pd(p, mask, reinterpret_cast<__m512d>(vector));
  }
  if constexpr (kVectorBytes == 64 && sizeof(T) == 2 && std::is_same_v<A, float>) {
    __m256i all;
    store_vector<A>(reinterpret_cast<T*>(&all), vector);
    return _mm256_mask_storeu_epi16(p, (uint32_t{1} << lanes.count) - 1, all);
  }
#endif
  A values[kLanes<A>];
  store_vector<A>(values, vector);
  for (int lane = 0; lane < lanes.count; ++lane) p[lane] = static_cast<T>(values[lane]);
}

// body(at, lanes, k) for the vectors of `count` elements; k counts up to kTogether, for as many sums side by side.
constexpr int kUnrolled = 4;
template <class A, int kTogether = kUnrolled, class Body>
[[gnu::always_inline]] static inline void for_each_vector(int64_t count, const Body& body) {
  constexpr int L = kLanes<A>;
  int64_t at = 0;
  for (; at + kTogether * L <= count; at += kTogether * L) {
    for (int first = 0; first < kTogether; first += kUnrolled) {
      // A loop it stays: unrolled eight times, a softmax under AVX2 takes 1.15 times as long.
      if constexpr (kTogether > kUnrolled) asm("" : "+r"(first));
#pragma GCC unroll 4
      for (int k = first; k < first + kUnrolled; ++k) body(at + k * L, AllLanes{}, k);
    }
  }
  for (; at + L <= count; at += L) body(at, AllLanes{}, 0);
  if (at < count) body(at, FirstLanes{static_cast<int>(count - at)}, 0);
}

template <class T>
[[gnu::always_inline]] static inline void prefetch(const T* p) {
  __builtin_prefetch(p);
}

// Elements worked on at a time where they go through a buffer: 4 KiB of float, which stays in L1.
constexpr int kChunk = 1024;

// The elements of `p` as A: in place, or widened in `buffer`.
template <class A, class T>
static inline const A* widened(const T* p, int64_t count, A* buffer) {
  if constexpr (std::is_same_v<A, T>) {
    return p;
  } else {
    for_each_vector<A>(count,
                       [=](int64_t at, auto lanes, int) { store<A>(buffer + at, load<A>(p + at, lanes), lanes); });
    return buffer;
  }
}

// Where results are computed: in place, or in `buffer`, from which deliver() narrows them or stores them past the
// caches.
template <class A, class T>
static inline A* computed_at(T* out, A* buffer, bool past_caches) {
  if constexpr (std::is_same_v<A, T>)
    if (!past_caches) return out;
  return buffer;
}
template <class A, class T>
static inline void deliver(const A* values, T* out, int64_t count, bool past_caches) {
  if constexpr (std::is_same_v<A, T>) {
    if (past_caches) return copy_past_caches(values, out, count);
    if (values == out) return;
  }
  const auto narrow = [](const A* from, T* to, int64_t elements) {
    for_each_vector<A>(elements,
                       [=](int64_t at, auto lanes, int) { store<A>(to + at, load<A>(from + at, lanes), lanes); });
  };
  if (!past_caches) return narrow(values, out, count);
  T chunk[kChunk];
  for (int64_t first = 0; first < count; first += kChunk) {
    const int64_t elements = count - first < kChunk ? count - first : kChunk;
    narrow(values + first, chunk, elements);
    copy_past_caches(chunk, out + first, elements);
  }
}

// All lanes combined, halves with halves.
template <class A, int kHalf, class Combine, int... kLane>
[[gnu::always_inline]] static inline A fold_from(vector_t<A> v, const Combine& combine,
                                                 std::integer_sequence<int, kLane...> lanes) {
  if constexpr (kHalf == 0)
    return v[0];
  else
    return fold_from<A, kHalf / 2>(combine(v, __builtin_shufflevector(v, v, (kLane ^ kHalf)...)), combine, lanes);
}
template <class A, class Combine>
[[gnu::always_inline]] static inline A fold(vector_t<A> v, const Combine& combine) {
  return fold_from<A, kLanes<A> / 2>(v, combine, std::make_integer_sequence<int, kLanes<A>>());
}
template <class A>
[[gnu::always_inline]] static inline A sum_of_lanes(vector_t<A> v) {
  return fold<A>(v, [](auto a, auto b) { return a + b; });
}

// One step of a matrix transpose: swaps the off-diagonal squares of size kSquare between rows a and b.
template <int kSquare, class V, int... kLane>
static inline void exchange(V& a, V& b, std::integer_sequence<int, kLane...>) {
  constexpr int L = sizeof...(kLane);
  const V first = __builtin_shufflevector(a, b, (kLane & kSquare ? L + kLane - kSquare : kLane)...);
  b = __builtin_shufflevector(a, b, (kLane & kSquare ? L + kLane : kLane + kSquare)...);
  a = first;
}

// Keeps GCC from looking through a vector at what it was made of.
template <class V>
static inline void pin(V& vector) {
#if defined(__x86_64__)
  asm("" : "+v"(vector));
#endif
}

template <int kSquare, class A>
static inline void transpose_from(vector_t<A>* rows) {
  if constexpr (kSquare > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; ++i)
      if (!(i & kSquare)) exchange<kSquare>(rows[i], rows[i + kSquare], std::make_integer_sequence<int, kLanes<A>>());
    transpose_from<kSquare / 2, A>(rows);
  }
}

// A square of kLanes x kLanes elements, its rows `pitch` apart, written as columns; or the first few rows and columns.
template <class A, class From, class To, class Rows = AllLanes, class Columns = AllLanes>
[[gnu::always_inline]] static inline void transpose_square(const From* from, int64_t pitch, To* to, int64_t to_pitch,
                                                           Rows rows_in_use = {}, Columns columns_in_use = {}) {
  constexpr int L = kLanes<A>;
  const auto is_in_use = [](int i, auto lanes) {
    if constexpr (std::is_same_v<decltype(lanes), FirstLanes>)
      return i < lanes.count;
    else
      return true;
  };
  vector_t<A> rows[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i)
    pin(rows[i] = is_in_use(i, rows_in_use) ? load<A>(from + i * pitch, columns_in_use) : vector_t<A>{});
  transpose_from<L / 2, A>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i)
    if (is_in_use(i, columns_in_use)) store<A>(to + i * to_pitch, rows[i], rows_in_use);
}
