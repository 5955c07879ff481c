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

// The rows of a panel's taps lie powers of two apart, on few cache sets: so many taps of one source channel go by way
// of a small buffer, which makes packing a 512 x 512 x 3 x 3 weight several times faster.
constexpr int kStagedTaps = 16;

// Panel `panel` of one group's weight as [tap][source channel][width], zeros behind the last channel.
// weight[channel*channel_step + source*source_step + tap_offset[tap]]
template <class T>
void pack_panel(const T* weight, int64_t channel_step, int64_t source_step, const int64_t* tap_offset, int64_t taps,
                int64_t source_channels, int64_t channels, int64_t panel, accumulate_t<T>* packed) {
  using A = accumulate_t<T>;
  int64_t width;
  panel_width<A>(channels, width);
  const int64_t first = panel * width, count = channels - first < width ? channels - first : width;
  if (count < width) fill_zero(packed, taps * source_channels * width);
  if (source_step == 1) {
    for (int64_t tap = 0; tap < taps; ++tap)
      transpose(weight + first * channel_step + tap_offset[tap], channel_step, packed + tap * source_channels * width,
                width, count, source_channels);
    return;
  }
  A staged[kStagedTaps][2 * kLanes<A>];
  for (int64_t source = 0; source < source_channels; ++source)
    for (int64_t tap = 0; tap < taps; tap += kStagedTaps) {
      const int64_t staged_taps = taps - tap < kStagedTaps ? taps - tap : kStagedTaps;
      for (int64_t v = 0; v < count; ++v) {
        const T* from = weight + (first + v) * channel_step + source * source_step;
        for (int64_t t = 0; t < staged_taps; ++t) staged[t][v] = static_cast<A>(from[tap_offset[tap + t]]);
      }
      for (int64_t t = 0; t < staged_taps; ++t)
        convert(staged[t], packed + ((tap + t) * source_channels + source) * width, count);
    }
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
  const int64_t first = panel * width, count = channels - first < width ? channels - first : width;
  for (int64_t part = 1; part < part_count; ++part)
    for (int64_t i = 0; i < taps * source_channels * width; ++i) parts[i] += parts[part * part_step + i];
  if (source_step == 1) {
    for (int64_t tap = 0; tap < taps; ++tap)
      transpose(parts + tap * source_channels * width, width, weight + first * channel_step + tap_offset[tap],
                channel_step, source_channels, count);
    return;
  }
  A staged[kStagedTaps][2 * kLanes<A>];
  for (int64_t source = 0; source < source_channels; ++source)
    for (int64_t tap = 0; tap < taps; tap += kStagedTaps) {
      const int64_t staged_taps = taps - tap < kStagedTaps ? taps - tap : kStagedTaps;
      for (int64_t t = 0; t < staged_taps; ++t)
        convert(parts + ((tap + t) * source_channels + source) * width, staged[t], count);
      for (int64_t v = 0; v < count; ++v) {
        T* to = weight + (first + v) * channel_step + source * source_step;
        for (int64_t t = 0; t < staged_taps; ++t) to[tap_offset[tap + t]] = static_cast<T>(staged[t][v]);
      }
    }
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
