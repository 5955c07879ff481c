// Weights between their place in a tensor and the panels that the micro-kernel multiplies with.

template <class A>
int64_t columns_of_panel(int64_t channels, int64_t panel) {
  int64_t width;
  panel_width<A>(channels, width);
  return channels - panel * width < width ? channels - panel * width : width;
}

template <class A>
int64_t whole_lanes(int64_t columns) {
  return (columns + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// Weights lie [channel][tap][source channel] or the other way round (channels_last), or each window whole: its taps are
// neighbours, in any order. A panel's whole windows go by way of a small buffer [source channel][tap][column], of at
// most so many rows.
constexpr int64_t kStagedRows = 144;

struct WholeWindows {
  int64_t lowest = 0;    // of the taps' offsets
  int64_t together = 1;  // source channels that are staged together: those whose windows are neighbours too

  WholeWindows(const int64_t* tap_offset, int64_t taps, int64_t source_step) : lowest(tap_offset[0]) {
    for (int64_t tap = 1; tap < taps; ++tap) lowest = tap_offset[tap] < lowest ? tap_offset[tap] : lowest;
    if (source_step == taps && taps < kStagedRows) together = kStagedRows / taps;
  }
};

// body(source, sources, tap, taps) for all source channels and taps in steps that the buffer holds; taps are counted in
// the order of memory.
template <class Body>
void for_staged(const WholeWindows& windows, int64_t source_channels, int64_t taps, const Body& body) {
  for (int64_t source = 0; source < source_channels; source += windows.together) {
    const int64_t left = source_channels - source, sources = left < windows.together ? left : windows.together;
    for (int64_t tap = 0; tap < taps; tap += kStagedRows)
      body(source, sources, tap, taps - tap < kStagedRows ? taps - tap : kStagedRows);
  }
}

// Panel `panel` of one group's weight as [tap][source channel][width], zeros behind the last channel.
// weight[channel*channel_step + source*source_step + tap_offset[tap]]
template <class T>
void pack_panel(const T* weight, int64_t channel_step, int64_t source_step, const int64_t* tap_offset, int64_t taps,
                int64_t source_channels, int64_t channels, int64_t panel, accumulate_t<T>* packed) {
  using A = accumulate_t<T>;
  int64_t width;
  panel_width<A>(channels, width);
  const int64_t count = columns_of_panel<A>(channels, panel);
  weight += panel * width * channel_step;
  if (count < width) fill_zero(packed, taps * source_channels * width);
  if (source_step == 1) {
    for (int64_t tap = 0; tap < taps; ++tap)
      transpose(weight + tap_offset[tap], channel_step, packed + tap * source_channels * width, width, count,
                source_channels);
    return;
  }
  if (channel_step == 1) {
    for (int64_t source = 0; source < source_channels; ++source)
      for (int64_t tap = 0; tap < taps; ++tap)
        convert(weight + source * source_step + tap_offset[tap], packed + (tap * source_channels + source) * width,
                count);
    return;
  }
  const WholeWindows windows(tap_offset, taps, source_step);
  A staged[kStagedRows][2 * kLanes<A>];
  for_staged(windows, source_channels, taps, [&](int64_t first, int64_t sources, int64_t first_tap, int64_t some) {
    transpose(weight + first * source_step + windows.lowest + first_tap, channel_step, staged[0], 2 * kLanes<A>, count,
              sources * some);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t row = tap_offset[tap] - windows.lowest - first_tap;
      if (row < 0 || row >= some) continue;
      for (int64_t source = 0; source < sources; ++source)
        convert(staged[source * some + row], packed + (tap * source_channels + first + source) * width, count);
    }
  });
}

// to[i] = (first[i], second[i]), of bfloat16 or of floats that hold them.
template <class T>
void join_pairs(const T* first, const T* second, int64_t count, Bfloat16Pair* to) {
  typedef vector_t<uint32_t> Bits;
  float* pairs = reinterpret_cast<float*>(to);
  for_each_vector<float>(count, [=](int64_t at, auto lanes, int) {
    const Bits low = reinterpret_cast<Bits>(load<float>(first + at, lanes));
    const Bits high = reinterpret_cast<Bits>(load<float>(second + at, lanes));
    store<float>(pairs + at, reinterpret_cast<vector_t<float>>(low >> 16 | (high & ~UINT32_C(0xffff))), lanes);
  });
}

// The sum of the parts of a panel, `part_step` apart, in their order, to its place in the weight.
template <class T>
void unpack_panel(accumulate_t<T>* parts, int64_t part_step, int64_t part_count, int64_t channel_step,
                  int64_t source_step, const int64_t* tap_offset, int64_t taps, int64_t source_channels,
                  int64_t channels, int64_t panel, T* weight) {
  using A = accumulate_t<T>;
  int64_t width;
  panel_width<A>(channels, width);
  const int64_t count = columns_of_panel<A>(channels, panel);
  weight += panel * width * channel_step;
  for (int64_t part = 1; part < part_count; ++part)
    for (int64_t i = 0; i < taps * source_channels * width; ++i) parts[i] += parts[part * part_step + i];
  if (source_step == 1) {
    for (int64_t tap = 0; tap < taps; ++tap)
      transpose(parts + tap * source_channels * width, width, weight + tap_offset[tap], channel_step, source_channels,
                count);
    return;
  }
  const WholeWindows windows(tap_offset, taps, source_step);
  A staged[kStagedRows][2 * kLanes<A>];
  for_staged(windows, source_channels, taps, [&](int64_t first, int64_t sources, int64_t first_tap, int64_t some) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t row = tap_offset[tap] - windows.lowest - first_tap;
      if (row < 0 || row >= some) continue;
      for (int64_t source = 0; source < sources; ++source)
        convert(parts + (tap * source_channels + first + source) * width, staged[source * some + row], count);
    }
    transpose(staged[0], 2 * kLanes<A>, weight + first * source_step + windows.lowest + first_tap, channel_step,
              sources * some, count);
  });
}

// Panel `panel` of one group's weight, as the micro-kernel's b: [tap][source channel][width].
template <class T>
void pack_weight(const Gather& plan, const WeightLayout& layout, const int64_t* tap_offset, const T* weight,
                 int64_t panel, accumulate_t<T>*, accumulate_t<T>* packed) {
  pack_panel(weight, layout.channel_step, layout.source_step, tap_offset, plan.taps(), plan.source_channels,
             plan.channels, panel, packed);
}

// The same of pairs of source channels, which the plan counts. `staged` holds kPairsAtOnce of them for all taps.
inline void pack_weight(const Gather& plan, const WeightLayout& layout, const int64_t* tap_offset,
                        const BFloat16* weight, int64_t panel, float* staged, Bfloat16Pair* packed) {
  int64_t width;
  panel_width<float>(plan.channels, width);
  for (int64_t first = 0; first < plan.source_channels; first += kPairsAtOnce) {
    const int64_t left = plan.source_channels - first, count = left < kPairsAtOnce ? left : kPairsAtOnce;
    pack_panel(weight + 2 * first * layout.source_step, layout.channel_step, layout.source_step, tap_offset,
               plan.taps(), 2 * count, plan.channels, panel, staged);
    for (int64_t tap = 0; tap < plan.taps(); ++tap)
      for (int64_t pair = 0; pair < count; ++pair) {
        const float* from = staged + (tap * count + pair) * 2 * width;
        join_pairs(from, from + width, width, packed + (tap * plan.source_channels + first + pair) * width);
      }
  }
}
