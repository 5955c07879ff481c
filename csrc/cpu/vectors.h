// Vectors of the accumulation type, and tensors' values as such. Included once per instruction set (each_isa.h), hence
// no include guard.

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vector = typename VectorOf<A>::type;
template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <class T>
inline Vector<accumulate_t<T>> load_lanes(const T* from) {
  Vector<accumulate_t<T>> lanes;
  if constexpr (std::is_same_v<T, accumulate_t<T>>)
    __builtin_memcpy(&lanes, from, sizeof(lanes));
  else
    for (int lane = 0; lane < kLanes<accumulate_t<T>>; ++lane) lanes[lane] = static_cast<accumulate_t<T>>(from[lane]);
  return lanes;
}

template <class T>
inline void store_lanes(const Vector<accumulate_t<T>>& lanes, T* to) {
  if constexpr (std::is_same_v<T, accumulate_t<T>>)
    __builtin_memcpy(to, &lanes, sizeof(lanes));
  else
    for (int lane = 0; lane < kLanes<accumulate_t<T>>; ++lane) to[lane] = static_cast<T>(lanes[lane]);
}
