// Sum of `batch` planes of `pixels` values, `pitch` apart: one channel of a contiguous tensor.
template <class T>
void sum_planes(const T* input, T* output, int64_t batch, int64_t pitch, int64_t pixels) {
  using A = accumulate_t<T>;
  constexpr int kLanes = 4 * kVectorBytes / sizeof(A);
  constexpr int64_t kChunk = 4096;  // values that are summed before the sum goes into the double
  double total = 0;
  for (int64_t n = 0; n < batch; ++n) {
    const T* plane = input + n * pitch;
    for (int64_t i = 0; i < pixels;) {
      const int64_t stop = i + kChunk < pixels ? i + kChunk : pixels;
      A lanes[kLanes] = {};
      for (; i + kLanes <= stop; i += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += static_cast<A>(plane[i + lane]);
      A sum = 0;
      for (; i < stop; ++i) sum += static_cast<A>(plane[i]);
      for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
      total += sum;
    }
  }
  *output = static_cast<T>(total);
}

// Column sums of a (rows, channels) matrix.
template <class T>
void sum_rows(const T* input, accumulate_t<T>* sum, int64_t rows, int64_t channels) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t channel = 0; channel < channels; ++channel)
      sum[channel] += static_cast<accumulate_t<T>>(input[row * channels + channel]);
}
