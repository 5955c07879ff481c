// The compiler's header of vector instructions, outside every kernel's target.
#pragma once

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own header
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
