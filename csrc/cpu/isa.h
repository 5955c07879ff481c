// Which instruction set the kernels run on. MANUAL_OPS_ISA=avx512|avx2|plain caps it.
#pragma once

namespace manual_ops {

enum class Isa { plain, avx2, avx512 };

Isa isa();
const char* isa_name(Isa value);

}  // namespace manual_ops
