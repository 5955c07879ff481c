// Vectors, and copies between the layouts of tensors and the channels-last blocks that the micro-kernel works on.

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vector = typename VectorOf<A>::type;
template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <class T>
inline Vector<accumulate_t<T>> load_lanes(const T* from) {
  Vector<accumulate_t<T>> lanes;
  if constexpr (std::is_same_v<T, accumulate_t<T>>)
    __builtin_memcpy(&lanes, from, sizeof(lanes));
  else
    for (int lane = 0; lane < kLanes<accumulate_t<T>>; ++lane) lanes[lane] = static_cast<accumulate_t<T>>(from[lane]);
  return lanes;
}

template <class T>
inline void store_lanes(const Vector<accumulate_t<T>>& lanes, T* to) {
  if constexpr (std::is_same_v<T, accumulate_t<T>>)
    __builtin_memcpy(to, &lanes, sizeof(lanes));
  else
    for (int lane = 0; lane < kLanes<accumulate_t<T>>; ++lane) to[lane] = static_cast<T>(lanes[lane]);
}

// Swaps the blocks off the diagonal, of half the size, then those of a quarter, ...: in the end the rows are columns.
template <class V, int kHalf, int... kLane>
inline void transpose_registers(V* rows, std::integer_sequence<int, kLane...> lanes) {
  constexpr int kCount = sizeof...(kLane);
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    if (i & kHalf) continue;
    const V low = rows[i], high = rows[i + kHalf];
    rows[i] = __builtin_shufflevector(low, high, (kLane & kHalf ? kCount + kLane - kHalf : kLane)...);
    rows[i + kHalf] = __builtin_shufflevector(low, high, (kLane & kHalf ? kCount + kLane : kLane + kHalf)...);
  }
  if constexpr (kHalf > 1) transpose_registers<V, kHalf / 2>(rows, lanes);
}

// to[column][row] = from[row][column]
template <class From, class To>
void transpose(const From* from, int64_t from_pitch, To* to, int64_t to_pitch, int64_t rows, int64_t columns) {
  using A = accumulate_t<From>;
  constexpr int kSide = kLanes<A>;
  if (rows < kSide || columns < kSide) {
    for (int64_t column = 0; column < columns; ++column)
      for (int64_t row = 0; row < rows; ++row)
        to[column * to_pitch + row] = static_cast<To>(static_cast<A>(from[row * from_pitch + column]));
    return;
  }
  // The last square of a row or column of squares overlaps the one before it.
  for (int64_t r = 0; r < rows; r += kSide) {
    const int64_t row = r + kSide <= rows ? r : rows - kSide;
    for (int64_t c = 0; c < columns; c += kSide) {
      const int64_t column = c + kSide <= columns ? c : columns - kSide;
      Vector<A> square[kSide];
#pragma GCC unroll 16
      for (int i = 0; i < kSide; ++i) square[i] = load_lanes(from + (row + i) * from_pitch + column);
      transpose_registers<Vector<A>, kSide / 2>(square, std::make_integer_sequence<int, kSide>());
#pragma GCC unroll 16
      for (int i = 0; i < kSide; ++i) store_lanes(square[i], to + (column + i) * to_pitch + row);
    }
  }
}

template <class From, class To>
void convert(const From* from, To* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(static_cast<accumulate_t<From>>(from[i]));
}

template <class A>
void fill_zero(A* to, int64_t count) {
  if (count > 0) __builtin_memset(to, 0, count * sizeof(A));
}

// `channels` channels of `pixels` neighbouring pixels, from any layout to [pixel][to_pitch].
template <class T>
void copy_in(const T* from, const Layout& layout, int64_t channels, int64_t pixels, accumulate_t<T>* to,
             int64_t to_pitch) {
  if (layout.channel != 1) return transpose(from, layout.channel, to, to_pitch, channels, pixels);
  if (layout.axis[2] == channels && to_pitch == channels) return convert(from, to, pixels * channels);
  for (int64_t pixel = 0; pixel < pixels; ++pixel)
    convert(from + pixel * layout.axis[2], to + pixel * to_pitch, channels);
}

// The way back.
template <class T>
void copy_out(const accumulate_t<T>* from, int64_t from_pitch, T* to, const Layout& layout, int64_t channels,
              int64_t pixels) {
  if (layout.channel != 1) return transpose(from, from_pitch, to, layout.channel, pixels, channels);
  for (int64_t pixel = 0; pixel < pixels; ++pixel)
    convert(from + pixel * from_pitch, to + pixel * layout.axis[2], channels);
}

// Rows x columns of one plane to [row][column][channel]; columns outside the plane are zero.
template <class T>
void copy_padded(const T* plane, const Layout& layout, int64_t width, Range rows, Range columns, int64_t channels,
                 accumulate_t<T>* to) {
  const int64_t left = columns.begin < 0 ? 0 : columns.begin;
  const int64_t right = columns.end > width ? width : columns.end;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    if (right <= left) {
      fill_zero(to, columns.size() * channels);
    } else {
      fill_zero(to, (left - columns.begin) * channels);
      copy_in(plane + row * layout.axis[1] + left * layout.axis[2], layout, channels, right - left,
              to + (left - columns.begin) * channels, channels);
      fill_zero(to + (right - columns.begin) * channels, (columns.end - right) * channels);
    }
    to += columns.size() * channels;
  }
}
