// Stores past the caches; finish_stores_past_caches() comes after them. caches.h says when. Included once per
// instruction set (each_isa.h), hence no include guard.

// `to` is aligned to a vector.
template <class V>
[[gnu::always_inline]] static inline void store_past_caches(V vector, void* to) {
#if defined(__x86_64__)
  typedef char Bytes __attribute__((vector_size(kVectorBytes)));  // may be of any type
  if constexpr (kVectorBytes == 64)
    asm volatile("vmovntps %1, %0" : "=m"(*static_cast<Bytes*>(to)) : "v"(vector));
  else if constexpr (kVectorBytes == 32)
    asm volatile("vmovntps %1, %0" : "=m"(*static_cast<Bytes*>(to)) : "x"(vector));
  else
    asm volatile("movntps %1, %0" : "=m"(*static_cast<Bytes*>(to)) : "x"(vector));
#else
  __builtin_memcpy(to, &vector, sizeof(vector));
#endif
}

template <class T>
static inline void copy_past_caches(const T* from, T* to, int64_t count) {
  typedef char Bytes __attribute__((vector_size(kVectorBytes)));
  constexpr int64_t kStep = kVectorBytes / sizeof(T);
  const int64_t head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) % 64 / sizeof(T));
  int64_t i = 0;
  for (; i < head && i < count; ++i) to[i] = from[i];
  for (; i + kStep <= count; i += kStep) {
    Bytes bytes;
    __builtin_memcpy(&bytes, from + i, sizeof(bytes));
    store_past_caches(bytes, to + i);
  }
  for (; i < count; ++i) to[i] = from[i];
}
