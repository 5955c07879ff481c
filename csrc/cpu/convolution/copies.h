// Copies between the layouts of tensors and the channels-last blocks that the micro-kernel works on.
#include "cpu/vectors.h"

// The taps of axis `axis` that destination `position` meets inside the source: tap index and source, one after another.
template <class Body>
inline void for_taps(const GatherAxis& axis, int64_t position, const Body& body) {
  const int64_t phase = position % axis.phases, first = position / axis.phases * axis.step;
  for (int64_t tap = axis.first[phase]; tap < axis.first[phase + 1]; ++tap) {
    const int64_t source = first + axis.offset[tap];
    if (source >= 0 && source < axis.source) body(tap, source);
  }
}

// to[column][row] = from[row][column]
template <class From, class To>
void transpose(const From* from, int64_t from_pitch, To* to, int64_t to_pitch, int64_t rows, int64_t columns) {
  using A = accumulate_t<From>;
  constexpr int kSide = kLanes<A>;
  if (3 * rows < kSide || 3 * columns < kSide) {  // a square would be mostly empty
    for (int64_t column = 0; column < columns; ++column)
      for (int64_t row = 0; row < rows; ++row)
        to[column * to_pitch + row] = static_cast<To>(static_cast<A>(from[row * from_pitch + column]));
    return;
  }
  const auto squares = [&](auto height, auto width) {
    // The last square of a row or column of squares overlaps the one before it.
    for (int64_t r = 0; r < rows; r += kSide) {
      const int64_t row = r + kSide <= rows ? r : rows < kSide ? 0 : rows - kSide;
      for (int64_t c = 0; c < columns; c += kSide) {
        const int64_t column = c + kSide <= columns ? c : columns < kSide ? 0 : columns - kSide;
        transpose_square<A>(from + row * from_pitch + column, from_pitch, to + column * to_pitch + row, to_pitch,
                            height, width);
      }
    }
  };
  const FirstLanes few_rows{static_cast<int>(rows)}, few_columns{static_cast<int>(columns)};
  if (rows >= kSide && columns >= kSide)
    squares(AllLanes{}, AllLanes{});
  else if (rows >= kSide)
    squares(AllLanes{}, few_columns);
  else if (columns >= kSide)
    squares(few_rows, AllLanes{});
  else
    squares(few_rows, few_columns);
}

template <class From, class To>
void convert(const From* from, To* to, int64_t count) {
  using A = accumulate_t<From>;
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) store_vector<A>(to + i, load_vector<A>(from + i));
  if (i < count) {
    const FirstLanes rest{static_cast<int>(count - i)};
    store<A>(to + i, load<A>(from + i, rest), rest);
  }
}

template <class A>
void fill_zero(A* to, int64_t count) {
  if (count > 0) __builtin_memset(static_cast<void*>(to), 0, count * sizeof(A));
}

// `channels` channels of `pixels` neighbouring pixels, from any layout to [pixel][to_pitch]. Of channels_last pixels
// what lies `ahead` of them, if not 0, is fetched into the caches.
template <class T, class To>
void copy_in(const T* from, const Layout& layout, int64_t channels, int64_t pixels, To* to, int64_t to_pitch,
             int64_t ahead = 0) {
  if (layout.channel != 1) return transpose(from, layout.channel, to, to_pitch, channels, pixels);
  if (layout.axis[2] == channels && to_pitch == channels) return convert(from, to, pixels * channels);
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    if (ahead != 0) __builtin_prefetch(from + pixel * layout.axis[2] + ahead);
    convert(from + pixel * layout.axis[2], to + pixel * to_pitch, channels);
  }
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
template <class T, class To>
void copy_padded(const T* plane, const Layout& layout, int64_t width, Range rows, Range columns, int64_t channels,
                 To* to) {
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
