// Stores past the caches; finish_stores_past_caches() comes after them. caches.h says when. Included once per
// instruction set (each_isa.h), hence no include guard; cpu/intrinsics.h comes before, outside.

// `to` is aligned to a vector.
template <class V>
[[gnu::always_inline]] static inline void store_past_caches(V vector, void* to) {
#if defined(__x86_64__)
  if constexpr (kVectorBytes == 64)
    _mm512_stream_si512(static_cast<__m512i*>(to), reinterpret_cast<__m512i>(vector));
  else if constexpr (kVectorBytes == 32)
    _mm256_stream_si256(static_cast<__m256i*>(to), reinterpret_cast<__m256i>(vector));
  else
    _mm_stream_si128(static_cast<__m128i*>(to), reinterpret_cast<__m128i>(vector));
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
