// Compiles the header named by MANUAL_OPS_KERNELS once for each instruction set, in namespaces of their own:
//
//     #define MANUAL_OPS_KERNELS "cpu/relu_kernels.h"
//     #include "cpu/each_isa.h"
//     ...
//     MANUAL_OPS_FOR_ISA(relu(input, output, count));       // avx512::relu, avx2::relu or plain::relu, as the CPU has
//
// Such a header has no include guard, includes nothing (standard headers come before, outside its target), defines
// static or template functions over plain pointers, and may read kVectorBytes. It must not call functions of std:: that
// are not intrinsic: their out-of-line copies would be compiled for AVX-512 and shared with code that runs elsewhere.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/caches.h"
#include "cpu/common.h"
#include "cpu/isa.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace manual_ops::avx512 {
constexpr int kVectorBytes = 64;
#include "cpu/vector_math.h"
#include MANUAL_OPS_KERNELS
}  // namespace manual_ops::avx512
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace manual_ops::avx2 {
constexpr int kVectorBytes = 32;
#include "cpu/vector_math.h"
#include MANUAL_OPS_KERNELS
}  // namespace manual_ops::avx2
#pragma GCC pop_options
#endif
namespace manual_ops::plain {
constexpr int kVectorBytes = 16;
#include "cpu/vector_math.h"
#include MANUAL_OPS_KERNELS
}  // namespace manual_ops::plain

#ifndef MANUAL_OPS_FOR_ISA
#if defined(__x86_64__)
#define MANUAL_OPS_FOR_ISA(...)          \
  switch (::manual_ops::isa()) {         \
    case ::manual_ops::Isa::avx512:      \
      ::manual_ops::avx512::__VA_ARGS__; \
      break;                             \
    case ::manual_ops::Isa::avx2:        \
      ::manual_ops::avx2::__VA_ARGS__;   \
      break;                             \
    default:                             \
      ::manual_ops::plain::__VA_ARGS__;  \
  }
#else
#define MANUAL_OPS_FOR_ISA(...) ::manual_ops::plain::__VA_ARGS__
#endif
#endif
#undef MANUAL_OPS_KERNELS
