#include "cpu/isa.h"

#include <cstdlib>
#include <string>

#include "cpu/common.h"

namespace manual_ops {

namespace {

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return Isa::avx512;
  if (__builtin_cpu_supports("x86-64-v3")) return Isa::avx2;
#endif
  return Isa::plain;
}

Isa capped_isa() {
  const char* cap = std::getenv("MANUAL_OPS_ISA");
  if (cap == nullptr || *cap == '\0') return best_isa();
  for (Isa value : {Isa::plain, Isa::avx2, Isa::avx512}) {
    if (std::string(cap) == isa_name(value)) return std::min(value, best_isa());
  }
  STD_TORCH_CHECK(false, "MANUAL_OPS_ISA must be avx512, avx2 or plain, got ", cap);
}

std::string cpu_isa() { return isa_name(isa()); }

}  // namespace

Isa isa() {
  static const Isa value = capped_isa();
  return value;
}

bool multiplies_bfloat16() {
#if defined(__x86_64__)
  static const bool value = isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
  return value;
#else
  return false;
#endif
}

const char* isa_name(Isa value) { return value == Isa::avx512 ? "avx512" : value == Isa::avx2 ? "avx2" : "plain"; }

STABLE_TORCH_LIBRARY_FRAGMENT(manual_ops, m) { m.def("cpu_isa() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(manual_ops, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }

}  // namespace manual_ops
