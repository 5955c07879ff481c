#include "cpu/convolution/copies.h"

// Depthwise convolution: vectors over channels, of channels_last tensors where they are and of others in a copy,
// [row][column][lane]. Sources outside the plane are left out, so that no infinity in a tensor ever meets a zero.
//
// A vector may also hold whole groups of a few channels: then it meets, one after another, the vectors whose lanes all
// hold the first channel of their group, the second, and so on.

template <class A>
void vector_lanes(int64_t* lanes) {
  *lanes = kLanes<A>;
}

// Which lane each lane is given: the `member`th of its group of `members` lanes, a power of two of them.
template <class A>
inline auto lanes_of_groups(int64_t members, int64_t member) {
  using Index = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  vector_t<Index> lanes;
  for (int lane = 0; lane < kLanes<A>; ++lane) lanes[lane] = lane;
  lanes = (lanes & static_cast<Index>(-members)) + static_cast<Index>(member);
  pin(lanes);
  return lanes;
}

// The destinations q of one column phase of one row, for some vectors of channels.
template <class A>
struct DepthwiseRow {
  const A *source, *weight, *bias;
  A* to;                                  // of q = 0
  int64_t pitch, weight_pitch, to_pitch;  // from position to position, tap to tap, q to q
  const DepthwiseTap* taps;
  int64_t tap_count, begin, end;
  int64_t members;                // channels of a group
  int64_t vectors, last_channel;  // the last vector starts no later than there, and overlaps the one before
  int64_t ahead;                  // from the last source to those that the next row is the first to read; 0: in a cache
  bool past_caches;
};

// kPixels destinations of one vector of channels. An entry of the list is kTaps neighbouring taps: each source that
// they share is read once.
template <class A, bool kGrouped, int kTaps, int kStep, int kPixels>
inline void depthwise_tile(const DepthwiseRow<A>& row, int64_t channel, int64_t q) {
  constexpr int kSources = (kPixels - 1) * kStep + kTaps;
  const int64_t first = q * kStep;
  vector_t<A> sum[kPixels];
#pragma GCC unroll 16
  for (int i = 0; i < kPixels; ++i) sum[i] = load_vector<A>(row.bias + channel);
  for (const DepthwiseTap* tap = row.taps; tap != row.taps + row.tap_count; ++tap) {
    const int64_t begin = clamp<int64_t>(tap->begin - first, 0, kSources);
    const int64_t end = clamp<int64_t>(tap->end - first, 0, kSources);
    const uint64_t inside = (~UINT64_C(0) << begin) & ~(~UINT64_C(0) << end);
    vector_t<A> factor[kTaps];
#pragma GCC unroll 8
    for (int j = 0; j < kTaps; ++j)
      factor[j] = load_vector<A>(row.weight + tap->weight + j * row.weight_pitch + channel);
    const auto lanes = lanes_of_groups<A>(row.members, tap->member);
    int64_t at = tap->source + first * row.pitch + channel;
#pragma GCC unroll 64
    for (int u = 0; u < kSources; ++u) {
      if (inside >> u & 1) {
        vector_t<A> value = load_vector<A>(row.source + at);
        if constexpr (kGrouped) value = __builtin_shuffle(value, lanes);
#pragma GCC unroll 8
        for (int j = 0; j < kTaps; ++j)
          if (u >= j && (u - j) % kStep == 0 && (u - j) / kStep < kPixels) sum[(u - j) / kStep] += value * factor[j];
      }
      at += row.pitch;
      asm("" : "+r"(at));  // one index that moves on, not an address in a register for each source
    }
  }
  if (row.ahead != 0 && row.tap_count > 0) {
    const A* next = row.source + (row.taps[row.tap_count - 1].source + row.ahead + first * row.pitch + channel);
    for (int u = 0; u < kPixels * kStep; ++u, next += row.pitch) __builtin_prefetch(next);
    if (kStep == 2) {
      next += row.ahead / kStep - kPixels * kStep * row.pitch;
      for (int u = 0; u < kPixels * kStep; ++u, next += row.pitch) __builtin_prefetch(next);
    }
  }
  A* to = row.to + q * row.to_pitch + channel;
#pragma GCC unroll 16
  for (int i = 0; i < kPixels; ++i) {
    if (row.past_caches)
      store_past_caches(sum[i], to);
    else
      store_vector<A>(to, sum[i]);
    to += row.to_pitch;
    asm("" : "+r"(to));
  }
}

template <class A, bool kGrouped, int kTaps, int kStep, int kPixels>
void depthwise_tiles(const DepthwiseRow<A>& row) {
  for (int64_t q = row.begin; q < row.end; q += kPixels)
    for (int64_t v = 0; v < row.vectors; ++v) {
      const int64_t channel = v * kLanes<A> < row.last_channel ? v * kLanes<A> : row.last_channel;
      depthwise_tile<A, kGrouped, kTaps, kStep, kPixels>(row, channel, q + kPixels <= row.end ? q : row.end - kPixels);
    }
}

// In tiles of the width that computes the fewest destinations twice: the last tile overlaps the one before.
template <class A, bool kGrouped, int kTaps, int kStep>
void depthwise_columns(const DepthwiseRow<A>& row) {
  const int64_t count = row.end - row.begin;
  constexpr int kWidest = kVectorBytes == 64 ? 14 : 8;  // 32 registers, or 16
  int best = 1;
  int64_t least = count < 4 ? count : INT64_MAX;
  for (const int pixels : {kWidest, 8, 7, 4}) {
    const int64_t computed = (count + pixels - 1) / pixels * pixels;
    if (pixels <= count && computed < least) best = pixels, least = computed;
  }
  if (best == kWidest) return depthwise_tiles<A, kGrouped, kTaps, kStep, kWidest>(row);
  if (best == 8) return depthwise_tiles<A, kGrouped, kTaps, kStep, 8>(row);
  if (best == 7) return depthwise_tiles<A, kGrouped, kTaps, kStep, 7>(row);
  if (best == 4) return depthwise_tiles<A, kGrouped, kTaps, kStep, 4>(row);
  depthwise_tiles<A, kGrouped, kTaps, kStep, 1>(row);
}

// How many neighbouring taps of a phase are one entry of the list.
static int64_t taps_at_once(const Gather& plan, int64_t phase) {
  const GatherAxis& width = plan.axis[2];
  const int64_t begin = width.first[phase], taps = width.first[phase + 1] - begin;
  if ((taps != 3 && (plan.source_channels > 1 || (taps != 5 && taps != 7))) || width.step > 2) return 1;
  return width.offset[begin + taps - 1] - width.offset[begin] == taps - 1 ? taps : 1;
}

// One row of the destination, its columns `columns`; `to` is the first of them, and `to_pitch` lies between two.
// Source (z, y, x) is where `from` says, z counted from the first depth that a tap reads if the operand is packed.
template <class A>
void depthwise_row(const Gather& plan, int64_t depth, int64_t row, Range columns, const Operand& from, const A* source,
                   const A* weight, const A* bias, A* to, int64_t to_pitch, int64_t vectors, bool past_caches,
                   DepthwiseTap* taps) {
  const GatherAxis& width = plan.axis[2];
  const int64_t members = plan.source_channels, channels = plan.groups * members, weight_pitch = members * channels;
  for (int64_t phase = 0; phase < width.phases; ++phase) {
    const Range q = positions(width, columns, phase);
    if (q.begin >= q.end) continue;
    const int64_t begin = width.first[phase], end = width.first[phase + 1], at_once = taps_at_once(plan, phase);
    const int64_t step = at_once == 1 ? width.step : 1;  // sources from position to position
    int64_t count = 0, depths = 0;
    for_taps(plan.axis[0], depth, [&](int64_t d, int64_t z) {
      const int64_t plane = from.origin + (from.packed ? depths++ : z) * from.depth;
      for_taps(plan.axis[1], row, [&](int64_t h, int64_t y) {
        for (int64_t w = begin; w < end; w += at_once) {
          const int64_t offset = width.offset[w], past = width.source - offset;
          for (int64_t member = 0; member < members; ++member)
            taps[count++] = {plane + y * from.row + offset * from.column,
                             ((d * plan.axis[1].taps + h) * width.taps + w) * weight_pitch + member * channels,
                             offset < 0 ? (-offset + step - 1) / step : 0, past > 0 ? (past + step - 1) / step : 0,
                             member};
        }
      });
    });
    const DepthwiseRow<A> run{source,
                              weight,
                              bias,
                              to + (phase - columns.begin) * to_pitch,
                              step * from.column,
                              weight_pitch,
                              width.phases * to_pitch,
                              taps,
                              count,
                              q.begin,
                              q.end,
                              members,
                              vectors,
                              vectors == 1 ? 0 : channels - kLanes<A>,
                              from.packed ? 0 : plan.axis[1].step * from.row,
                              past_caches};
    const int64_t kind = at_once == 1 ? 1 : width.step * 10 + at_once;
    if (members > 1) {
      kind == 13   ? depthwise_columns<A, true, 3, 1>(run)
      : kind == 23 ? depthwise_columns<A, true, 3, 2>(run)
                   : depthwise_columns<A, true, 1, 1>(run);
      continue;
    }
    switch (kind) {
      case 13:
        depthwise_columns<A, false, 3, 1>(run);
        break;
      case 15:
        depthwise_columns<A, false, 5, 1>(run);
        break;
      case 17:
        depthwise_columns<A, false, 7, 1>(run);
        break;
      case 23:
        depthwise_columns<A, false, 3, 2>(run);
        break;
      case 25:
        depthwise_columns<A, false, 5, 2>(run);
        break;
      case 27:
        depthwise_columns<A, false, 7, 2>(run);
        break;
      default:
        depthwise_columns<A, false, 1, 1>(run);
    }
  }
}

// Rows begin .. end of the destination, numbered through the images, in place: the tensors are channels_last.
template <class A>
void depthwise_rows(const Gather& plan, int64_t begin, int64_t end, const A* source, const A* weight, const A* bias,
                    A* destination, bool past_caches, DepthwiseTap* taps) {
  const int64_t height = plan.axis[1].destination, depths = plan.axis[0].destination;
  const int64_t vectors = (plan.groups * plan.channels + kLanes<A> - 1) / kLanes<A>;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t row = index % height, depth = index / height % depths, image = index / height / depths;
    const Operand from{image * plan.source.image, plan.source.axis[0], plan.source.axis[1], plan.source.axis[2], false};
    A* to = destination + image * plan.destination.image + depth * plan.destination.axis[0] +
            row * plan.destination.axis[1];
    depthwise_row(plan, depth, row, {0, plan.axis[2].destination}, from, source, weight, bias, to,
                  plan.destination.axis[2], vectors, past_caches, taps);
  }
  if (past_caches) finish_stores_past_caches();
}

// Rows and columns of a plane of `channels` channels to [row][column][lane]. Channels_last, the next lanes come next.
template <class T>
void pack_lanes(const T* plane, const Layout& layout, int64_t width, Range rows, Range columns, int64_t channels,
                accumulate_t<T>* to) {
  constexpr int kPitch = kLanes<accumulate_t<T>>;
  if (columns.size() == width)
    return copy_in(plane + rows.begin * layout.axis[1], layout, channels, rows.size() * width, to, kPitch, channels);
  for (int64_t row = rows.begin; row < rows.end; ++row, to += columns.size() * kPitch)
    copy_in(plane + row * layout.axis[1] + columns.begin * layout.axis[2], layout, channels, columns.size(), to, kPitch,
            channels);
}

template <class T>
void unpack_lanes(const accumulate_t<T>* from, T* plane, const Layout& layout, int64_t width, Range rows, Range columns,
                  int64_t channels) {
  constexpr int kPitch = kLanes<accumulate_t<T>>;
  if (columns.size() == width)
    return copy_out(from, kPitch, plane + rows.begin * layout.axis[1], layout, channels, rows.size() * width);
  for (int64_t row = rows.begin; row < rows.end; ++row, from += columns.size() * kPitch)
    copy_out(from, kPitch, plane + row * layout.axis[1] + columns.begin * layout.axis[2], layout, channels,
             columns.size());
}

// The depths of the source that destination `depth` reads, one after another in `copy`.
template <class T>
Operand pack_source(const Gather& plan, const DepthwisePart& part, const T* source, accumulate_t<T>* copy) {
  constexpr int64_t kPitch = kLanes<accumulate_t<T>>;
  const int64_t row = part.source_columns.size() * kPitch, depth = part.source_rows.size() * row;
  int64_t depths = 0;
  for_taps(plan.axis[0], part.depth, [&](int64_t, int64_t z) {
    pack_lanes(source + part.image * plan.source.image + part.channel * plan.source.channel + z * plan.source.axis[0],
               plan.source, plan.axis[2].source, part.source_rows, part.source_columns, part.channels,
               copy + depths++ * depth);
  });
  return {-part.source_rows.begin * row - part.source_columns.begin * kPitch, depth, row, kPitch, true};
}

// One part of the destination through copies of the source and of some rows of the result.
template <class T>
void depthwise_part(const Gather& plan, const DepthwisePart& part, const T* source, const accumulate_t<T>* weight,
                    const accumulate_t<T>* bias, T* destination, accumulate_t<T>* copy, accumulate_t<T>* result,
                    int64_t result_rows, DepthwiseTap* taps) {
  using A = accumulate_t<T>;
  const Operand from = pack_source(plan, part, source, copy);
  destination += part.image * plan.destination.image + part.channel * plan.destination.channel +
                 part.depth * plan.destination.axis[0];
  for (int64_t first = part.rows.begin; first < part.rows.end; first += result_rows) {
    const int64_t last = first + result_rows < part.rows.end ? first + result_rows : part.rows.end;
    for (int64_t row = first; row < last; ++row)
      depthwise_row<A>(plan, part.depth, row, part.columns, from, copy, weight + part.channel, bias + part.channel,
                       result + (row - first) * part.columns.size() * kLanes<A>, kLanes<A>, 1, false, taps);
    unpack_lanes(result, destination, plan.destination, plan.axis[2].destination, {first, last}, part.columns,
                 part.channels);
  }
}

// Weight gradient.

// sums[i][j] += sum over rows and columns of grad * input, for kRows rows and kTaps columns of the window: bit j of
// inside[column] says whether tap j meets a source there. The sums of a call start from zero, which keeps them short.
// Lanes are the input's channels; of groups, grad is one channel for all lanes of each.
template <class A, bool kGrouped, int kRows, int kTaps>
void add_products(const A* input, int64_t first, const InputPitches& pitch, const A* grad, const Operand& grad_at,
                  Range rows, int64_t columns, const uint8_t* inside, int64_t members, int64_t member, A* sums,
                  int64_t sums_row) {
  vector_t<A> sum[kRows][kTaps] = {};
  const auto lanes = lanes_of_groups<A>(members, member);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    int64_t x = first + row * pitch.next_row;
    const A* g = grad + (grad_at.origin + row * grad_at.row);
    for (int64_t column = 0; column < columns; ++column, x += pitch.next_column, g += grad_at.column) {
      const unsigned mask = inside[column];
      vector_t<A> value = load_vector<A>(g);
      if constexpr (kGrouped) value = __builtin_shuffle(value, lanes);
      int64_t tap = x;
      if (pitch.ahead_input != 0) {
        __builtin_prefetch(input + x + pitch.ahead_input);
        __builtin_prefetch(g + pitch.ahead_grad);
      }
#pragma GCC unroll 8
      for (int j = 0; j < kTaps; ++j) {
        if (mask >> j & 1) {
#pragma GCC unroll 4
          for (int i = 0; i < kRows; ++i) sum[i][j] += value * load_vector<A>(input + tap + i * pitch.tap_row);
        }
        tap += pitch.tap_column;
        asm("" : "+r"(tap));
      }
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kTaps; ++j) {
      A* to = sums + i * sums_row + j * kLanes<A>;
      store_vector<A>(to, load_vector<A>(to) + sum[i][j]);
    }
}

// kTaps columns of the window, from tap `w` on, and all its rows.
template <class A, int kTaps>
void add_window_columns(const Gather& plan, int64_t w, Range rows, Range columns, const Operand& from, int64_t plane,
                        const A* input, const A* grad, const Operand& grad_at, int64_t member, A* sums,
                        uint8_t* inside) {
  constexpr int kRows = kVectorBytes == 64 || kTaps <= 3 ? 3 : kTaps <= 5 ? 2 : 1;  // sums fit in the registers
  const GatherAxis &height = plan.axis[1], &width = plan.axis[2];
  const int64_t dilation = width.taps > 1 ? width.offset[1] - width.offset[0] : 0;
  const int64_t row_dilation = height.taps > 1 ? height.offset[1] - height.offset[0] : 0;
  for (int64_t column = columns.begin; column < columns.end; ++column) {
    inside[column - columns.begin] = 0;
    for (int j = 0; j < kTaps; ++j) {
      const int64_t x = column * width.step + width.offset[w + j];
      inside[column - columns.begin] |= static_cast<uint8_t>((x >= 0 && x < width.source) << j);
    }
  }
  const InputPitches pitch{height.step * from.row, width.step * from.column, row_dilation * from.row,
                           dilation * from.column,
                           // What the next part is the first to read, beside the last row of this window.
                           from.packed ? 0 : ((height.taps - 1) * row_dilation + rows.size() * height.step) * from.row,
                           rows.size() * grad_at.row};
  const int64_t sums_row = width.taps * kLanes<A>;
  const auto inside_rows = [&](int64_t h) {  // the destinations whose source for tap h is inside
    const int64_t offset = height.offset[h], past = height.source - offset;
    const int64_t begin = offset < 0 ? (-offset + height.step - 1) / height.step : 0;
    const int64_t end = past > 0 ? (past + height.step - 1) / height.step : 0;
    return Range{begin > rows.begin ? begin : rows.begin, end < rows.end ? end : rows.end};
  };
  const auto add_some = [&](auto grouped, auto count, int64_t h, Range some) {
    add_products<A, decltype(grouped)::value, decltype(count)::value, kTaps>(
        input, plane + height.offset[h] * from.row + (columns.begin * width.step + width.offset[w]) * from.column,
        pitch, grad, grad_at, some, columns.size(), inside, plan.channels, member, sums + h * sums_row + w * kLanes<A>,
        sums_row);
  };
  const auto add = [&](auto count, int64_t h, Range some) {
    if (some.begin >= some.end) return;
    plan.channels > 1 ? add_some(std::true_type(), count, h, some) : add_some(std::false_type(), count, h, some);
  };
  for (int64_t h = 0; h < height.taps; h += kRows) {
    const int64_t last = h + kRows <= height.taps ? h + kRows : height.taps;
    // Offsets ascend: the first row of the window is the last to begin, and the last the first to end.
    Range common{rows.begin, rows.begin};
    if (last - h == kRows) common = {inside_rows(h).begin, inside_rows(last - 1).end};
    if (common.end < common.begin) common = {rows.begin, rows.begin};
    add(std::integral_constant<int, kRows>(), h, common);
    for (int64_t one = h; one < last; ++one) {
      const Range all = inside_rows(one);
      if (common.begin == common.end) {
        add(std::integral_constant<int, 1>(), one, all);
      } else {
        add(std::integral_constant<int, 1>(), one, {all.begin, common.begin});
        add(std::integral_constant<int, 1>(), one, {common.end, all.end});
      }
    }
  }
}

// Adds rows and columns of one plane of grad_output to the gradients of a vector of windows, `sums` [tap][lane]; of
// groups to those of their `member`th channel.
template <class A>
void add_window(const Gather& plan, const DepthwisePart& part, const Operand& from, const A* input, const A* grad,
                const Operand& grad_at, int64_t member, A* sums, uint8_t* inside) {
  const GatherAxis& width = plan.axis[2];
  int64_t depths = 0;
  for_taps(plan.axis[0], part.depth, [&](int64_t d, int64_t z) {
    const int64_t plane = from.origin + (from.packed ? depths++ : z) * from.depth;
    A* window = sums + d * plan.axis[1].taps * width.taps * kLanes<A>;
    const auto add = [&](auto taps, int64_t w) {
      add_window_columns<A, decltype(taps)::value>(plan, w, part.rows, part.columns, from, plane, input, grad, grad_at,
                                                   member, window, inside);
    };
    int64_t w = 0;
    for (; w + 7 <= width.taps; w += 7) add(std::integral_constant<int, 7>(), w);
    for (; w + 5 <= width.taps; w += 5) add(std::integral_constant<int, 5>(), w);
    for (; w + 3 <= width.taps; w += 3) add(std::integral_constant<int, 3>(), w);
    for (; w < width.taps; ++w) add(std::integral_constant<int, 1>(), w);
  });
}

template <class T>
void depthwise_weight_grad_part(const Gather& plan, const DepthwisePart& part, bool in_place, const T* input,
                                const T* grad_output, accumulate_t<T>* sums, accumulate_t<T>* copy,
                                accumulate_t<T>* grad, uint8_t* inside) {
  using A = accumulate_t<T>;
  if constexpr (std::is_same_v<T, A>) {
    if (in_place) {
      const Operand from{part.image * plan.source.image + part.channel, plan.source.axis[0], plan.source.axis[1],
                         plan.source.axis[2], false};
      const Layout& to = plan.destination;
      const Operand grad_at{
          part.image * to.image + part.channel + part.depth * to.axis[0] + part.columns.begin * to.axis[2], to.axis[0],
          to.axis[1], to.axis[2], false};
      return add_window(plan, part, from, input, grad_output, grad_at, 0, sums, inside);
    }
  }
  const Operand from = pack_source(plan, part, input, copy);
  pack_lanes(grad_output + part.image * plan.destination.image + part.channel * plan.destination.channel +
                 part.depth * plan.destination.axis[0],
             plan.destination, plan.axis[2].destination, part.rows, part.columns, part.channels, grad);
  const int64_t row = part.columns.size() * kLanes<A>;
  const Operand grad_at{-part.rows.begin * row, 0, row, kLanes<A>, true};
  for (int64_t member = 0; member < plan.channels; ++member)
    add_window<A>(plan, part, from, copy, grad, grad_at, member, sums + member * plan.taps() * kLanes<A>, inside);
}
