// How a convolution with windows of 3 x 3 taps at stride 1 is cut for F(4x4, 3x3); winograd_kernels.h has the
// algorithm.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/convolution/plan.h"

namespace manual_ops {

constexpr int kPatch = 4;    // a patch is kPatch x kPatch destinations
constexpr int kPoints = 36;  // pairs of points, at which a patch is multiplied
constexpr int kTaps = 9;

// The patches of all planes at one depth. A strip is a row of patches, as wide as the plane or as one of several parts
// of it. The strips of a part lie one below the other; then come the other parts, then the other images.
struct Patches {
  int64_t rows, columns;  // of a plane
  int64_t parts, strips;
  int64_t widest;  // columns of a strip, at most

  // The strips from strips.begin on that lie one below the other.
  struct Stack {
    int64_t image;
    Range rows, columns;
    int64_t count() const { return rows.size() * columns.size(); }
  };
  Stack stack_at(Range strips) const {
    const int64_t part = strips.begin / rows, row = strips.begin % rows, index = part % parts;
    return {part / parts,
            {row, std::min(rows, row + strips.size())},
            {columns * index / parts, columns * (index + 1) / parts}};
  }

  int64_t count(Range strips) const {
    int64_t count = 0;
    while (strips.begin < strips.end) {
      const Stack stack = stack_at(strips);
      count += stack.count();
      strips.begin += stack.rows.size();
    }
    return count;
  }
};

// A weight goes to its points by way of a small buffer, for so many source channels at a time.
constexpr int64_t kChannelsAtOnce = 64;

// Values at the 36 points, `step` apart: at[point*step + patch*pitch + channel].
template <class A>
struct AtPoints {
  A* at;
  int64_t pitch, step;
};

}  // namespace manual_ops
