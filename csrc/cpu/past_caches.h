// Stores around the caches. Included once per instruction set (each_isa.h), hence no include guard.

// Of a tensor larger than the caches nothing would be left in them to read, and a line that is written whole need not
// be fetched first. `to` is aligned to a vector.
template <class V>
inline void store_past_caches(V lanes, void* to) {
#if defined(__x86_64__)
  if constexpr (kVectorBytes == 64)
    asm volatile("vmovntps %1, %0" : "=m"(*static_cast<V*>(to)) : "v"(lanes));
  else if constexpr (kVectorBytes == 32)
    asm volatile("vmovntps %1, %0" : "=m"(*static_cast<V*>(to)) : "x"(lanes));
  else
    asm volatile("movntps %1, %0" : "=m"(*static_cast<V*>(to)) : "x"(lanes));
#else
  *static_cast<V*>(to) = lanes;
#endif
}

inline void finish_stores_past_caches() {
#if defined(__x86_64__)
  asm volatile("sfence" ::: "memory");
#endif
}
