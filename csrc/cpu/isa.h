// Which instruction set the kernels run on. MANUAL_OPS_ISA=avx512|avx2|plain caps it.
#pragma once

namespace manual_ops {

enum class Isa { plain, avx2, avx512 };

Isa isa();
const char* isa_name(Isa value);

// Whether the processor multiplies pairs of bfloat16 and adds them to float32 at once, beside Isa::avx512.
bool multiplies_bfloat16();

}  // namespace manual_ops
