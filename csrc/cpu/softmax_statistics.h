// What softmax and cross-entropy share: the maximum and the sum of exponentials along the classes. Included by their
// kernel headers, once per instruction set, hence no include guard.
//
// A slice of classes is a contiguous row, or it is one of many neighbours: then a block of up to kBlock of them is
// worked on at a time, one slice a lane, classes `pitch` apart. Rows too short to fill vectors are transposed to
// blocks.

// The transposed block of fewer than kBlock rows has lanes that nothing writes and nothing reads.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

constexpr int kBlock = 64;         // slices of a block: 256 bytes of float, four cache lines a class
constexpr int kShortClasses = 64;  // a row of up to so many classes is short

template <class A>
constexpr int kLanesOf = kVectorBytes / sizeof(A);
// Lanes of a sum along a row: four vectors, enough to hide the latency of an addition.
template <class A>
constexpr int kRowLanes = 4 * kLanesOf<A>;

// `count` rows to a block with the pitch kBlock, and back.
template <class T>
inline void rows_to_block(const T* rows, T* block, int count, int64_t classes) {
  for (int i = 0; i < count; ++i)
    for (int64_t c = 0; c < classes; ++c) block[c * kBlock + i] = rows[i * classes + c];
}
template <class T>
inline void block_to_rows(const T* block, T* rows, int count, int64_t classes) {
  for (int i = 0; i < count; ++i)
    for (int64_t c = 0; c < classes; ++c) rows[i * classes + c] = block[c * kBlock + i];
}

// body(first, count) over the rows in blocks.
template <class Body>
[[gnu::always_inline]] inline void for_each_block_of_rows(int64_t rows, const Body& body) {
  for (int64_t first = 0; first < rows; first += kBlock)
    body(first, static_cast<int>(rows - first < kBlock ? rows - first : kBlock));
}

template <class A>
inline A reduce_sum(const A* lanes) {
  A sum = 0;
  for (int lane = 0; lane < kRowLanes<A>; ++lane) sum += lanes[lane];
  return sum;
}

// The largest value; NaN is passed over, it comes back in the sum of exponentials. -infinity for no value.
template <class T>
inline accumulate_t<T> row_maximum(const T* input, int64_t classes) {
  using A = accumulate_t<T>;
  constexpr int kLanes = kRowLanes<A>;
  A lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = -std::numeric_limits<A>::infinity();
  int64_t c = 0;
  for (; c + kLanes <= classes; c += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      const A value = static_cast<A>(input[c + lane]);
      lanes[lane] = value > lanes[lane] ? value : lanes[lane];
    }
  for (; c + kLanesOf<A> <= classes; c += kLanesOf<A>)
    for (int lane = 0; lane < kLanesOf<A>; ++lane) {
      const A value = static_cast<A>(input[c + lane]);
      lanes[lane] = value > lanes[lane] ? value : lanes[lane];
    }
  A maximum = -std::numeric_limits<A>::infinity();
  for (; c < classes; ++c) {
    const A value = static_cast<A>(input[c]);
    maximum = value > maximum ? value : maximum;
  }
  for (int lane = 0; lane < kLanes; ++lane) maximum = lanes[lane] > maximum ? lanes[lane] : maximum;
  return maximum;
}

// visit(c) for every class of a row, summed: in lanes first, the rest behind them.
template <class A, class Visit>
[[gnu::always_inline]] inline A row_sum(int64_t classes, const Visit& visit) {
  constexpr int kLanes = kRowLanes<A>;
  A lanes[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= classes; c += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += visit(c + lane);
  for (; c + kLanesOf<A> <= classes; c += kLanesOf<A>)
    for (int lane = 0; lane < kLanesOf<A>; ++lane) lanes[lane] += visit(c + lane);
  A rest = 0;
  for (; c < classes; ++c) rest += visit(c);
  return rest + reduce_sum(lanes);
}

// maximum[i] and sum[i] of exp(input - maximum) for the first `count` slices of a block.
template <class T>
inline void block_statistics(const T* input, int64_t classes, int64_t pitch, int count, accumulate_t<T>* maximum,
                             accumulate_t<T>* sum) {
  using A = accumulate_t<T>;
  for (int i = 0; i < count; ++i) {
    maximum[i] = -std::numeric_limits<A>::infinity();
    sum[i] = 0;
  }
  for (int64_t c = 0; c < classes; ++c)
    for (int i = 0; i < count; ++i) {
      const A value = static_cast<A>(input[c * pitch + i]);
      maximum[i] = value > maximum[i] ? value : maximum[i];
    }
  for (int64_t c = 0; c < classes; ++c)
    for (int i = 0; i < count; ++i) sum[i] += vexp(static_cast<A>(input[c * pitch + i]) - maximum[i]);
}
