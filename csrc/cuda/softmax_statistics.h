// What softmax and cross-entropy share: the maximum and the sum of exponentials along the classes, found in one
// reading.
//
// Every thread keeps the maximum m of what it has seen, and sum exp(x - m), which it scales down as m grows. The team
// then agrees on the largest m, and adds the sums up. NaN is passed over by the maximum, it comes back in the sum.
#pragma once

#include "cuda/slices.h"

namespace manual_ops {

template <class A>
constexpr A kLowest = static_cast<A>(-INFINITY);

// What values are measured from: their maximum, or 0 while that is -infinity, for there inf - inf must not arise.
template <class A>
CU_DEVICE A reference(A maximum) {
  return maximum == kLowest<A> ? A(0) : maximum;
}

template <class Team, class A>
using Chunk = A[Team::kPacks][Team::kPack];

// The slice of a thread that the j-th value of a pack belongs to.
template <class Team>
CU_DEVICE constexpr int slice_of(int j) {
  return Team::kSlices == 1 ? 0 : j;
}

// result = change(value, slice of the thread), for every value of a chunk.
template <class Team, class A, class Change>
CU_DEVICE void change_chunk(A (&x)[Team::kPacks][Team::kPack], const Change& change) {
#pragma unroll
  for (int k = 0; k < Team::kPacks; ++k) {
#pragma unroll
    for (int j = 0; j < Team::kPack; ++j) x[k][j] = change(x[k][j], slice_of<Team>(j));
  }
}

// visit(chunk, held) for the chunks of a team, the last one first. It is held if this launch has read it already.
template <class Team, class Visit>
CU_DEVICE void for_each_chunk_back(const Team& team, Stage stage, const Visit& visit) {
  const int last = team.chunks() - 1;
  for (int chunk = last; chunk >= 0; --chunk) visit(chunk, Team::kWhole || (chunk == last && stage == Stage::whole));
}

// The values of a pack, combined with what the thread has of each of its slices.
template <class Team, class A, class Combine>
CU_DEVICE void fold(const A (&pack)[Team::kPack], A (&result)[Team::kSlices], Combine combine) {
#pragma unroll
  for (int j = 0; j < Team::kPack; ++j) result[slice_of<Team>(j)] = combine(result[slice_of<Team>(j)], pack[j]);
}

template <class A>
struct Larger {
  CU_DEVICE A operator()(A a, A b) const { return fmax(a, b); }
};
template <class A>
struct Plus {
  CU_DEVICE A operator()(A a, A b) const { return a + b; }
};

// kWeighted: also sum w and sum w * (x - m) for factors w.
template <class Team, class A, bool kWeighted = false>
struct SoftmaxStatistics {
  static constexpr int kSlices = Team::kSlices, kNumbers = kWeighted ? 4 : 2;
  A maximum[kSlices], sum[kSlices], weight[kSlices], excess[kSlices];

  CU_DEVICE SoftmaxStatistics() {
#pragma unroll
    for (int v = 0; v < kSlices; ++v) {
      maximum[v] = kLowest<A>;
      sum[v] = weight[v] = excess[v] = 0;
    }
  }

  // Adds a chunk, -infinity where it has no value, and leaves exp(x - m) in its place if kKeepPowers.
  template <bool kKeepPowers = false>
  CU_DEVICE void add(Chunk<Team, A>& x) {
    A top[Team::kPack], powers[Team::kPack], grown[kSlices];
#pragma unroll
    for (int j = 0; j < Team::kPack; ++j) {
      top[j] = x[0][j];
      powers[j] = 0;
#pragma unroll
      for (int k = 1; k < Team::kPacks; ++k) top[j] = fmax(top[j], x[k][j]);
    }
#pragma unroll
    for (int v = 0; v < kSlices; ++v) grown[v] = maximum[v];
    fold<Team>(top, grown, Larger<A>());
    move_to(grown);
#pragma unroll
    for (int k = 0; k < Team::kPacks; ++k) {
#pragma unroll
      for (int j = 0; j < Team::kPack; ++j) {
        const A power = exp(x[k][j] - reference(maximum[slice_of<Team>(j)]));
        powers[j] += power;
        if (kKeepPowers) x[k][j] = power;
      }
    }
    fold<Team>(powers, sum, Plus<A>());
  }

  // Adds the factors of the chunk that was added last.
  CU_DEVICE void add_weights(const Team& team, int chunk, const Chunk<Team, A>& x, const Chunk<Team, A>& w) {
#pragma unroll
    for (int k = 0; k < Team::kPacks; ++k) {
#pragma unroll
      for (int j = 0; j < Team::kPack; ++j) {
        const int v = slice_of<Team>(j);
        if (!team.holds(team.position(chunk, k, j))) continue;
        weight[v] += w[k][j];
        excess[v] += w[k][j] * (x[k][j] - reference(maximum[v]));
      }
    }
  }

  // Measures from another maximum, no smaller.
  CU_DEVICE void move_to(const A (&larger)[kSlices]) {
#pragma unroll
    for (int v = 0; v < kSlices; ++v) {
      const A from = reference(larger[v]);
      if (kWeighted) excess[v] += weight[v] * (reference(maximum[v]) - from);
      sum[v] *= exp(maximum[v] - from);
      maximum[v] = larger[v];
    }
  }

  // Of the slice, for every thread of the team. The sum is NaN where the maximum is infinite, of either sign.
  CU_DEVICE void combine(const Team& team) {
    A largest[kSlices];
#pragma unroll
    for (int v = 0; v < kSlices; ++v) largest[v] = maximum[v];
    team.reduce(largest, kLowest<A>, Larger<A>());
    move_to(largest);
    team.reduce(sum, A(0), Plus<A>());
    if (kWeighted) {
      team.reduce(weight, A(0), Plus<A>());
      team.reduce(excess, A(0), Plus<A>());
    }
  }
  CU_DEVICE void finish() {
#pragma unroll
    for (int v = 0; v < kSlices; ++v) sum[v] += maximum[v] - maximum[v];
  }

  CU_DEVICE void store_part(const Team& team, const Parts<A>& parts) const {
    if (!team.leads()) return;
#pragma unroll
    for (int v = 0; v < kSlices; ++v) {
      const int64_t slice = team.slice(v);
      const int part = blockIdx.y;
      parts.at(slice, part, 0, kNumbers) = maximum[v];
      parts.at(slice, part, 1, kNumbers) = sum[v];
      if (kWeighted) {
        parts.at(slice, part, 2, kNumbers) = weight[v];
        parts.at(slice, part, 3, kNumbers) = excess[v];
      }
    }
  }
  // Adds what this thread's share of the parts left.
  CU_DEVICE void add_parts(const Team& team, const Parts<A>& parts) {
    if (!team.has_slices()) return;
    for (int part = team.lane(); part < parts.count; part += team.lanes()) {
      A larger[kSlices];
#pragma unroll
      for (int v = 0; v < kSlices; ++v) larger[v] = fmax(maximum[v], parts.at(team.slice(v), part, 0, kNumbers));
      move_to(larger);
#pragma unroll
      for (int v = 0; v < kSlices; ++v) {
        const int64_t slice = team.slice(v);
        const A theirs = parts.at(slice, part, 0, kNumbers), from = reference(larger[v]);
        sum[v] += parts.at(slice, part, 1, kNumbers) * exp(theirs - from);
        if (kWeighted) {
          const A factors = parts.at(slice, part, 2, kNumbers);
          weight[v] += factors;
          excess[v] += parts.at(slice, part, 3, kNumbers) + factors * (reference(theirs) - from);
        }
      }
    }
  }
};

// Sums of a slice, the same way.
template <class Team, class A>
CU_DEVICE void store_part_sum(const Team& team, const Parts<A>& parts, const A (&sum)[Team::kSlices]) {
  if (!team.leads()) return;
#pragma unroll
  for (int v = 0; v < Team::kSlices; ++v) parts.at(team.slice(v), blockIdx.y, 0, 1) = sum[v];
}
template <class Team, class A>
CU_DEVICE void add_part_sums(const Team& team, const Parts<A>& parts, A (&sum)[Team::kSlices]) {
  if (!team.has_slices()) return;
  for (int part = team.lane(); part < parts.count; part += team.lanes()) {
#pragma unroll
    for (int v = 0; v < Team::kSlices; ++v) sum[v] += parts.at(team.slice(v), part, 0, 1);
  }
}

// Launches Operation, whose `parts` says what it works on: whole slices, or their parts and then, merged, the rest.
// `numbers` is what it leaves of each part.
template <class T, class Operation, class... Pointers>
void launch_in_stages(const CudaGuard& guard, const SliceShape& shape, int64_t most_blocks, int numbers,
                      Operation operation, const Tensor& like, Pointers... pointers) {
  using A = accumulate_t<T>;
  const SlicePlan plan = plan_slices<T, Operation::kStreams>(shape, most_blocks, pointers...);
  if (plan.parts == 1) return launch_slices<T>(guard, plan, operation);
  const Tensor scratch = scratch_of_parts<A>(shape, plan, numbers, like);
  operation.parts = {Stage::part, cu_output<A>(scratch), static_cast<int>(plan.parts)};
  launch_slices<T>(guard, plan, operation);
  operation.parts.stage = Stage::merge;
  launch_slices<T>(guard, plan, operation);
}

}  // namespace manual_ops
