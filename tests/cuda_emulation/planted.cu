// Kernels with a mistake each, for the test that the emulator notices: `planted(input, mistake)` is twice the input
// where `mistake` is "none".
#include <map>
#include <string>

#include "cuda/cu.h"

namespace manual_ops {

namespace {

enum Mistake {
  kNone,
  kMissingBarrier,
  kMissingBarrierAtLoopEnd,
  kMissingSyncwarp,
  kReturnBeforeBarrier,
  kDivergentBarrier,
  kSharedOutOfBounds,
  kSharedUninitialised,
  kWrongShuffleMask,
  kOffByOneGuard,
  kReadOutOfBounds,
  kWriteToInput,
  kPlainAddForAtomic,
  kMisalignedPack,
};

const std::map<std::string, Mistake> kMistakes = {
    {"none", kNone},
    {"missing barrier", kMissingBarrier},
    {"missing barrier at the end of a loop", kMissingBarrierAtLoopEnd},
    {"missing __syncwarp", kMissingSyncwarp},
    {"return before a barrier", kReturnBeforeBarrier},
    {"divergent barrier", kDivergentBarrier},
    {"write past a shared array", kSharedOutOfBounds},
    {"read of uninitialised shared memory", kSharedUninitialised},
    {"wrong shuffle mask", kWrongShuffleMask},
    {"off-by-one guard", kOffByOneGuard},
    {"read behind the tensor", kReadOutOfBounds},
    {"write to an input", kWriteToInput},
    {"+= for atomicAdd", kPlainAddForAtomic},
    {"misaligned pack", kMisalignedPack},
};

constexpr int kThreads = 64;

// Each block turns its elements around in shared memory, twice, then adds what its neighbour lane holds: its own.
__global__ void planted_kernel(const float* input, float* output, float* total, int count, Mistake mistake) {
  CU_SHARED(float, values, [kThreads]);
  const int i = thread_index<int>(), t = threadIdx.x;
  if (mistake == kReturnBeforeBarrier && i >= count) return;
  float value = i < count || mistake == kReadOutOfBounds ? input[i] : 0;

  for (int turn = 0; turn < 2; ++turn) {
    if (mistake != kSharedUninitialised || t != 5) values[t + (mistake == kSharedOutOfBounds && t == 63)] = value;
    if (mistake == kDivergentBarrier && t % 2 == 0) {
      __syncthreads();
    } else if (mistake != kMissingBarrier) {
      __syncthreads();
    }
    value = values[kThreads - 1 - t];
    if (mistake != kMissingBarrierAtLoopEnd) __syncthreads();
  }

  // Within a warp: each lane leaves its value where its neighbour finds it.
  values[t] = value;
  if (mistake != kMissingSyncwarp) __syncwarp();
  const float neighbour = values[t ^ 1];
  const unsigned mask = mistake == kWrongShuffleMask ? 0x0000ffffu : kAllLanes;
  value += __shfl_xor_sync(mask, neighbour, 1);

  if (mistake == kWriteToInput && i < count) const_cast<float*>(input)[i] = value;
  if (mistake == kOffByOneGuard ? i <= count : i < count) output[i] = value;
  if (mistake == kPlainAddForAtomic) {
    *total += value;
  } else {
    atomicAdd(total, value);
  }
  if (mistake == kMisalignedPack && i == 0) store<4>(output + 1, load<4>(input + 1));
}

Tensor planted(const Tensor& input, std::string mistake) {
  const Tensor output = new_tensor(sizes_of(input), ScalarType::Float, input);
  Tensor total = new_tensor({1}, ScalarType::Float, input);
  torch::stable::zero_(total);
  const CudaGuard guard(input);
  CU_LAUNCH(guard, planted_kernel, blocks_for(input.numel(), kThreads), kThreads, 0, cu_input<float>(input),
            cu_output<float>(output), cu_output<float>(total), static_cast<int>(input.numel()), kMistakes.at(mistake));
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY(cuda_emulation, m) { m.def("planted(Tensor input, str mistake) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(cuda_emulation, CU_KEY, m) { m.impl("planted", TORCH_BOX(&planted)); }

}  // namespace manual_ops
