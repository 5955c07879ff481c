// What softmax and cross-entropy share: slices of classes on their way into vectors and back, and their largest values.
// Included by their kernel headers, once per instruction set, hence no include guard.
//
// A slice of classes is a contiguous row, or it is one of many neighbours: then a block of up to kBlock of them is
// worked on at a time, one slice a lane, in a copy of its own: block[class][lane]. The original would not stay in the
// cache, were its classes a power of two apart. Rows too short to fill vectors are transposed to blocks.
#include "cpu/vectors.h"

constexpr int kBlock = 64;         // slices of a block: 256 bytes of float, four cache lines a class
constexpr int kShortClasses = 64;  // a row of up to so many classes is short
// The lanes of a block are worked on in groups of four vectors, which leaves registers for three values of each lane.
template <class A>
constexpr int kGroup = kUnrolled* kLanes<A>;
// A row is summed in so many vectors: 64 floats side by side on every instruction set, for the same accuracy on each.
constexpr int kRowSums = 256 / kVectorBytes;

// Slices whose classes are `pitch` apart. Lanes without a slice are zero.
template <class A, class T>
static inline void read_block(const T* input, int64_t pitch, int64_t classes, int count, A* block) {
  for (int64_t c = 0; c < classes; ++c, input += pitch, block += kBlock) {
    if (count < kBlock) {
      for (int i = 0; i < kBlock; ++i) block[i] = i < count ? static_cast<A>(input[i]) : A(0);
      continue;
    }
    for (int i = 0; i < kBlock; i += kLanes<A>) {
      prefetch(input + kBlock + i);  // the next block's
      store_vector<A>(block + i, load_vector<A>(input + i));
    }
  }
}
template <class A, class T>
static inline void write_block(const A* block, T* output, int64_t pitch, int64_t classes, int count, bool past_caches) {
  for (int64_t c = 0; c < classes; ++c) deliver(block + c * kBlock, output + c * pitch, count, past_caches);
}

// The same for rows.
template <class A, class T>
static inline void rows_to_block(const T* rows, int64_t classes, int count, A* block) {
  constexpr int L = kLanes<A>;
  if (count < kBlock || classes < L) {
    for (int i = 0; i < kBlock; ++i)
      for (int64_t c = 0; c < classes; ++c)
        block[c * kBlock + i] = i < count ? static_cast<A>(rows[i * classes + c]) : A(0);
    return;
  }
  if (classes <= kShortClasses)  // the next block fits into L1
    for (int64_t i = 0; i < kBlock * classes; i += 64 / sizeof(T)) prefetch(rows + kBlock * classes + i);
  for (int i = 0; i < kBlock; i += L)
    for (int64_t tile = 0; tile < classes; tile += L) {
      const int64_t c = tile < classes - L ? tile : classes - L;  // the last tile overlaps the one before it
      transpose_square<A>(rows + i * classes + c, classes, block + c * kBlock + i, kBlock);
    }
}
template <class A, class T>
static inline void block_to_rows(const A* block, T* rows, int64_t classes, int count) {
  constexpr int L = kLanes<A>;
  if (count < kBlock || classes < L) {
    for (int i = 0; i < count; ++i)
      for (int64_t c = 0; c < classes; ++c) rows[i * classes + c] = static_cast<T>(block[c * kBlock + i]);
    return;
  }
  for (int i = 0; i < kBlock; i += L)
    for (int64_t tile = 0; tile < classes; tile += L) {
      const int64_t c = tile < classes - L ? tile : classes - L;
      transpose_square<A>(block + c * kBlock + i, kBlock, rows + i * classes + c, classes);
    }
}

// body(first, count) over the rows in blocks.
template <class Body>
[[gnu::always_inline]] static inline void for_each_block_of_rows(int64_t rows, const Body& body) {
  for (int64_t first = 0; first < rows; first += kBlock)
    body(first, static_cast<int>(rows - first < kBlock ? rows - first : kBlock));
}

// Where NaN is on either side the second is taken, which is how the instruction has it.
template <class V>
[[gnu::always_inline]] static inline V larger(V a, V b) {
  return a > b ? a : b;
}

template <class A>
[[gnu::always_inline]] static inline A largest_of(const vector_t<A>* parts) {
  return fold<A>(larger(larger(parts[0], parts[1]), larger(parts[2], parts[3])),
                 [](auto a, auto b) { return larger(a, b); });
}
template <int kCount, class V>
[[gnu::always_inline]] static inline V sum_of_vectors(const V* parts) {
  if constexpr (kCount == 1)
    return *parts;
  else
    return sum_of_vectors<kCount / 2>(parts) + sum_of_vectors<kCount / 2>(parts + kCount / 2);
}
template <class A>
[[gnu::always_inline]] static inline A sum_of_row(const vector_t<A>* parts) {
  return sum_of_lanes<A>(sum_of_vectors<kRowSums>(parts));
}

// The largest value; NaN is passed over, it comes back in the sum of exponentials. -infinity for no value.
template <class A>
[[gnu::always_inline]] static inline A row_maximum(const A* row, int64_t classes) {
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  vector_t<A> maximum[kUnrolled];
  for (int k = 0; k < kUnrolled; ++k) maximum[k] = lowest - vector_t<A>{};
  for_each_vector<A>(
      classes, [&](int64_t c, auto lanes, int k) __attribute__((always_inline)) {
        maximum[k] = larger(load<A>(row + c, lanes, lowest), maximum[k]);
      });
  return largest_of<A>(maximum);
}

// The same for the lanes of a group.
template <class A>
[[gnu::always_inline]] static inline void group_maximum(const A* group, int64_t classes, vector_t<A>* maximum) {
  for (int k = 0; k < kUnrolled; ++k) maximum[k] = -std::numeric_limits<A>::infinity() - vector_t<A>{};
  for (int64_t c = 0; c < classes; ++c)
    for (int k = 0; k < kUnrolled; ++k)
      maximum[k] = larger(load_vector<A>(group + c * kBlock + k * kLanes<A>), maximum[k]);
}

template <class A>
[[gnu::always_inline]] static inline vector_t<A> logarithm(vector_t<A> v) {
  A values[kLanes<A>];
  store_vector<A>(values, v);
  for (int lane = 0; lane < kLanes<A>; ++lane) values[lane] = vlog(values[lane]);
  return load_vector<A>(values);
}

// Multiplies with 1/divisor: in float a last place is less than what torch's exponential loses.
template <class V, class D>
[[gnu::always_inline]] static inline V divided(V v, D divisor, D reciprocal) {
  if constexpr (sizeof(typename FloatFormat<V>::Element) == 4)
    return v * reciprocal;
  else
    return v / divisor;
}
