// Elementary functions that a plain loop over them vectorises: no branches, no tables, no calls.
// Included once per instruction set (each_isa.h), hence no include guard.
//
// T is float or double; what is written over V takes vectors of them as well (vectors.h). The polynomials are minimax
// approximations; the errors stated are the largest seen against a wider type, over millions of values, in units of the
// result's last place.

// The layout of T or of a vector's elements, and 1.5 * 2^mantissa: adding it rounds to a whole number, which lands in
// the lowest bits.
template <class V>
struct FloatFormat;
template <>
struct FloatFormat<float> {
  using Element = float;
  using Bits = uint32_t;
  static constexpr int mantissa = 23;
  static constexpr float rounder = 12582912.0f;
};
template <>
struct FloatFormat<double> {
  using Element = double;
  using Bits = uint64_t;
  static constexpr int mantissa = 52;
  static constexpr double rounder = 6755399441055744.0;
};

template <class To, class From>
[[gnu::always_inline]] static inline To bit_cast(From from) {
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// c0 + c1*x + c2*x^2 + ...
template <class V, class T>
[[gnu::always_inline]] static inline T polynomial(V, T c) {
  return c;
}
template <class V, class T, class... Rest>
[[gnu::always_inline]] static inline V polynomial(V x, T c, Rest... rest) {
  return c + x * polynomial(x, rest...);
}

// |x|: as a comparison it would invite the compiler to compute both sides of what follows.
[[gnu::always_inline]] static inline float magnitude(float x) { return __builtin_fabsf(x); }
[[gnu::always_inline]] static inline double magnitude(double x) { return __builtin_fabs(x); }

// x within [low, high]; NaN stays NaN.
template <class T>
[[gnu::always_inline]] static inline T clamp(T x, T low, T high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// x as n*log(2) + r with a whole n and |r| <= log(2)/2, and 2^(n + lift), for n + lift within the normal exponents.
// log(2) is in two pieces, so that n * high is exact.
template <class V>
struct Reduced {
  V r, scale;
};
template <int lift, class V>
[[gnu::always_inline]] static inline Reduced<V> reduce_exp(V x) {
  using Format = FloatFormat<V>;
  using T = typename Format::Element;
  constexpr bool single = sizeof(T) == 4;
  constexpr T log2_e = 1.44269504088896341;
  constexpr T high = single ? 0.693145751953125 : 0.6931471805592082;
  constexpr T low = single ? 1.4286068203094173e-6 : 7.371002565167799e-13;
  constexpr T rounder = Format::rounder + T(std::numeric_limits<T>::max_exponent - 1 + lift);
  const V shifted = x * log2_e + rounder;  // its lowest bits are the exponent of the scale
  const V n = shifted - rounder;
  return {(x - n * high) - n * low, bit_cast<V>(bit_cast<typename Format::Bits>(shifted) << Format::mantissa)};
}

// (exp(r) - 1 - r) / r^2 for |r| <= log(2)/2.
template <class V>
[[gnu::always_inline]] static inline V exp_remainder(V r) {
  if constexpr (sizeof(typename FloatFormat<V>::Element) == 4)
    return polynomial(r, 0.49999997f, 0.16666546f, 0.041667443f, 0.008366253f, 0.0013869946f);
  else
    return polynomial(r, 0.5, 0.16666666666666674, 0.04166666666662412, 0.008333333333322207, 0.0013888888917217457,
                      0.00019841269886591, 2.4801521290973345e-05, 2.7557242336680357e-06, 2.7620090518499427e-07,
                      2.5110049895858716e-08);
}

// The smallest argument of an exponential: the result is zero from there.
template <class T>
constexpr T lowest_exponent = sizeof(T) == 4 ? T(-104) : T(-746);

// exp(x + tail) for x between a little below lowest_exponent and 40, and a tail much smaller than x. Gradual underflow:
// the scale is lifted into the normal exponents, and the product lowered again. 1.3 ulp.
template <class V>
[[gnu::always_inline]] static inline V bounded_exp(V x, V tail) {
  using T = typename FloatFormat<V>::Element;
  constexpr bool single = sizeof(T) == 4;
  constexpr int lift = single ? 64 : 512;
  constexpr T lower = single ? 0x1p-64 : 0x1p-512;
  const auto [reduced, scale] = reduce_exp<lift>(x);
  const V r = reduced + tail;
  return polynomial(r, T(1), T(1), exp_remainder(r)) * scale * lower;
}

// exp(x) for x <= 40: no exponential here has a larger argument.
template <class V>
[[gnu::always_inline]] static inline V vexp(V x) {
  constexpr auto lowest = lowest_exponent<typename FloatFormat<V>::Element>;
  return bounded_exp(lowest > x ? lowest : x, -V{});  // x + -0 is x: the compiler leaves it out
}

// log(2^n * (1 + f)) for 1 + f between sqrt(1/2) and sqrt(2): with s = f / (2 + f),
// log(1 + f) = 2*atanh(s) = f - f^2/2 + s * (f^2/2 + s^2 * P(s^2)).
[[gnu::always_inline]] static inline float log_of_parts(float n, float f) {
  const float s = f / (2.0f + f), z = s * s, half_square = 0.5f * f * f;
  const float p = polynomial(z, 0.6666667f, 0.40000123f, 0.28550738f, 0.23332383f);
  const float small = s * (half_square + z * p) + n * 1.4286068203094173e-6f;
  return n * 0.693145751953125f - ((half_square - small) - f);
}
[[gnu::always_inline]] static inline double log_of_parts(double n, double f) {
  const double s = f / (2.0 + f), z = s * s, half_square = 0.5 * f * f;
  const double p = polynomial(z, 0.666666666666667, 0.3999999999989845, 0.2857142862639796, 0.2222221107291914,
                              0.18182893216844614, 0.15331596971557543, 0.1461787279302967);
  const double small = s * (half_square + z * p) + n * 7.371002565167799e-13;
  return n * 0.6931471805592082 - ((half_square - small) - f);
}

// log(x) for every x: -infinity at 0, NaN below. 1 ulp.
template <class T>
[[gnu::always_inline]] static inline T vlog(T x) {
  using Bits = typename FloatFormat<T>::Bits;
  constexpr int mantissa = FloatFormat<T>::mantissa;
  constexpr Bits fraction = (Bits(1) << mantissa) - 1;
  const Bits one = bit_cast<Bits>(T(1)), sqrt_half = bit_cast<Bits>(T(0.70710678118654752));
  constexpr T whole = Bits(1) << mantissa;  // the bits of a whole number in front of it are a float's
  constexpr T bias = std::numeric_limits<T>::max_exponent - 1;
  constexpr T smallest = std::numeric_limits<T>::min(), infinity = std::numeric_limits<T>::infinity();
  constexpr T nan = std::numeric_limits<T>::quiet_NaN();
  const bool subnormal = x < smallest;
  const Bits shifted = bit_cast<Bits>(subnormal ? x * whole : x) + (one - sqrt_half);
  const T exponent = bit_cast<T>((shifted >> mantissa) | bit_cast<Bits>(whole)) - (whole + bias);
  const T n = subnormal ? exponent - T(mantissa) : exponent;
  const T result = log_of_parts(n, bit_cast<T>((shifted & fraction) + sqrt_half) - T(1));
  const T special = x == T(0) ? -infinity : (x == infinity ? infinity : nan);
  return x > T(0) && x < infinity ? result : special;
}

// log(1 + x) for 0 <= x <= 1, as in softplus. NaN stays NaN. 1.4 ulp.
template <class T>
[[gnu::always_inline]] static inline T vlog1p(T x) {
  const bool upper = x > T(0.41421356237309505);
  return log_of_parts(upper ? T(1) : T(0), upper ? (x - T(1)) * T(0.5) : x);
}

// 1 / (1 + exp(-x)), with full relative accuracy down to the subnormal results. 2.3 ulp.
template <class T>
[[gnu::always_inline]] static inline T vsigmoid(T x) {
  const T z = vexp(-magnitude(x));
  return (x < T(0) ? z : T(1)) / (T(1) + z);
}

// tanh(x) = -m / (2 + m), m = exp(-2x) - 1, for x > 0; odd. 2.7 ulp.
template <class T>
[[gnu::always_inline]] static inline T vtanh(T x) {
  const auto [r, scale] = reduce_exp<0>(T(-2) * clamp<T>(magnitude(x), 0, 22));
  const T m = (r * r * exp_remainder(r) + r) * scale + (scale - T(1));
  const T positive = m / (T(2) + m);  // negative: its sign is replaced
  return sizeof(T) == 4 ? __builtin_copysignf(positive, x) : __builtin_copysign(positive, x);
}

// The standard normal distribution: Phi(x) = (1 + erf(x / sqrt(2))) / 2 and its density exp(-x^2/2) / sqrt(2*pi).
template <class T>
struct Normal {
  T cumulative, density;
};

// Phi(-t) * exp(t^2/2) in y = 1 / (1 + k*t), for t >= 0 up to where Phi(-t) vanishes: y times a polynomial around 1/2.
[[gnu::always_inline]] static inline float scaled_normal_tail(float t) {
  const float y = 1.0f / (1.0f + 0.3046875f * t);
  return y * polynomial(y - 0.5f, 0.22498225f, 0.33091697f, 0.34113595f, 0.20810232f, 0.014114829f, -0.08049691f,
                        -0.025057934f, 0.036790498f);
}
[[gnu::always_inline]] static inline double scaled_normal_tail(double t) {
  const double w = 0.171875 * t / (1.0 + 0.171875 * t);
  return (1.0 - w) * polynomial(0.5 - w, 0.13339999804016472, 0.2391285603726439, 0.38331057062448176,
                                0.5467048383933889, 0.6879164767208876, 0.7530990039669414, 0.7007031742599861,
                                0.5305546743172074, 0.29602788150314374, 0.08266911413468149, -0.03983871866018486,
                                -0.059239494020545964, -0.02111445720566716, 0.013689681958382334, 0.01648569531841505,
                                0.0006490549237481858, -0.008072979177014926, -0.002743286379841225,
                                0.003682981023059163, 0.0015604365183359238, -0.0015396312795617725);
}

// x^2 as `high` + `low`, rounded and what the rounding took. Without fused operations `high` is exact by having half
// the digits.
template <class T>
[[gnu::always_inline]] static inline void exact_square(T x, T& high, T& low) {
#ifdef __FMA__
  high = x * x;
  low = sizeof(T) == 4 ? __builtin_fmaf(x, x, -high) : __builtin_fma(x, x, -high);
#else
  using Bits = typename FloatFormat<T>::Bits;
  const T head = bit_cast<T>(bit_cast<Bits>(x) & ~((Bits(1) << (FloatFormat<T>::mantissa / 2 + 1)) - 1));
  high = head * head;
  low = (x - head) * (x + head);
#endif
}

// One exponential gives both. No cancellation, so Phi has its full relative accuracy far below zero, where
// (1 + erf) / 2 has none left. Phi: 7 ulp above -3, 8 below; density: 2.2 ulp.
template <class T>
[[gnu::always_inline]] static inline Normal<T> vnormal(T x) {
  constexpr T limit = sizeof(T) == 4 ? 14.45 : 38.65;  // exp(-limit^2/2) is zero; a second bound below costs a third
  const T t = magnitude(x) > limit ? limit : magnitude(x);
  T high, low;  // a rounded square would cost the exponential its last digits
  exact_square(t, high, low);
  const T decay = bounded_exp(T(-0.5) * high, T(-0.5) * low);
  const T tail = decay * scaled_normal_tail(t);
  return {x < T(0) ? tail : T(1) - tail, decay * T(0.39894228040143268)};
}
