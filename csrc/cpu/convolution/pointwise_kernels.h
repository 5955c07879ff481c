// Convolution with windows of one tap over contiguous planes: each plane of the destination is a sum of the source's
// planes. Its vectors hold neighbouring pixels, so that nothing is transposed: the micro-kernel's rows are the
// destination's channels, its a is the weight, its b some pixels of all sources, and its c lies in place.
#include "cpu/convolution/copies.h"
#include "cpu/convolution/micro_kernel.h"
#include "cpu/convolution/panels.h"

// From one source channel of a packed tile of the weight to the next.
constexpr int64_t kPackedRows = kMaxTileRows > 8 ? 16 : 8;

// From one panel of pixels to the next: not a power of two, of which few would fit into a cache.
template <class A>
int64_t panel_step(const Gather& plan) {
  return (plan.source_channels * 2 + 1) * kLanes<A>;
}

inline int64_t count_tiles(const Gather& plan) { return (plan.channels + kMaxTileRows - 1) / kMaxTileRows; }

inline Range rows_of_tile(const Gather& plan, int64_t tile) {
  const int64_t tiles = count_tiles(plan);
  return {plan.channels * tile / tiles, plan.channels * (tile + 1) / tiles};
}

template <class A>
void pointwise_sizes(const Gather& plan, int64_t& tiles, int64_t& tile_values, int64_t& panel_pixels,
                     int64_t& panel_values) {
  tiles = count_tiles(plan);
  tile_values = plan.source_channels * kPackedRows;
  panel_pixels = 2 * kLanes<A>;
  panel_values = panel_step<A>(plan);
}

// A tile of the weight's rows as [source channel][kPackedRows].
template <class A>
void pack_pointwise(const Gather& plan, const WeightLayout& layout, const A* weight, int64_t tile, A* packed) {
  const Range rows = rows_of_tile(plan, tile);
  weight += rows.begin * layout.channel_step;
  if (layout.channel_step != 1)  // then the source channels are neighbours
    return transpose(weight, layout.channel_step, packed, kPackedRows, rows.size(), plan.source_channels);
  for (int64_t source = 0; source < plan.source_channels; ++source)
    convert(weight + source * layout.source_step, packed + source * kPackedRows, rows.size());
}

// Some pixels of all channels of one image and group. `weight` holds tiles of rows, `bias` (or null) a value for each
// channel; `panels` is scratch memory.
template <class A>
void pointwise_strip(const Gather& plan, const A* source, const A* weight, const A* bias, A* destination, Range pixels,
                     bool past_caches, A* panels) {
  constexpr int64_t kWide = 2 * kLanes<A>, kLine = 64 / sizeof(A);
  const int64_t tiles = count_tiles(plan), step = panel_step<A>(plan);
  for (int64_t channel = 0; channel < plan.source_channels; ++channel) {
    const A* from = source + channel * plan.source.channel;
    A* to = panels + channel * kWide;
    for (int64_t pixel = pixels.begin; pixel < pixels.end; pixel += kWide, to += step) {
      const int64_t columns = pixels.end - pixel < kWide ? pixels.end - pixel : kWide;
      convert(from + pixel, to, columns);
      fill_zero(to + columns, whole_lanes<A>(columns) - columns);
    }
  }
  const Run run{0, 0};
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const Range rows = rows_of_tile(plan, tile);
    const A* panel = panels;
    for (int64_t pixel = pixels.begin; pixel < pixels.end; pixel += kWide, panel += step) {
      const int64_t columns = pixels.end - pixel < kWide ? pixels.end - pixel : kWide;
      A* sums = destination + rows.begin * plan.destination.channel + pixel;
      // The next strip's sources, some channels' with each tile.
      const A* next = source + pixel + pixels.size();
      for (int64_t channel = plan.source_channels * tile / tiles; channel < plan.source_channels * (tile + 1) / tiles;
           ++channel)
        for (int64_t ahead = 0; ahead < columns; ahead += kLine)
          __builtin_prefetch(next + channel * plan.source.channel + ahead, 0, 2);
      if (bias != nullptr)
        for (int64_t row = rows.begin; row < rows.end; ++row)
          for (int64_t column = 0; column < columns; ++column)
            sums[(row - rows.begin) * plan.destination.channel + column] = bias[row];
      multiply_rows<A>(rows.size(), {.a = weight + tile * plan.source_channels * kPackedRows,
                                     .a_row = 1,
                                     .a_step = kPackedRows,
                                     .b = panel,
                                     .b_step = kWide,
                                     .runs = &run,
                                     .run_count = 1,
                                     .run_length = plan.source_channels,
                                     .c = sums,
                                     .c_row = plan.destination.channel,
                                     .columns = columns,
                                     .bias = nullptr,
                                     .accumulate = bias != nullptr,
                                     .past_caches = past_caches});
    }
  }
  if (past_caches) finish_stores_past_caches();
}
