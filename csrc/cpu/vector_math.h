// Elementary functions that a plain loop over them vectorises: no branches, no tables, no calls.
// Included once per instruction set (each_isa.h), hence no include guard.
//
// T is float or double. The polynomials are minimax approximations; the errors stated are the largest seen against
// a wider type, over millions of values, in units of the result's last place.

// The layout of T, and 1.5 * 2^mantissa: adding it rounds to a whole number, which lands in the lowest bits.
template <class T>
struct FloatFormat;
template <>
struct FloatFormat<float> {
  using Bits = uint32_t;
  static constexpr int mantissa = 23;
  static constexpr float rounder = 12582912.0f;
};
template <>
struct FloatFormat<double> {
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
template <class T>
[[gnu::always_inline]] static inline T polynomial(T, T c) {
  return c;
}
template <class T, class... Rest>
[[gnu::always_inline]] static inline T polynomial(T x, T c, Rest... rest) {
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

// The nearest whole number, for |x| < 2^(mantissa-1).
template <class T>
[[gnu::always_inline]] static inline T nearest(T x) {
  return (x + FloatFormat<T>::rounder) - FloatFormat<T>::rounder;
}

// 2^n for a whole n within the normal exponents.
template <class T>
[[gnu::always_inline]] static inline T power_of_two(T n) {
  constexpr T bias = std::numeric_limits<T>::max_exponent - 1;
  return bit_cast<T>(bit_cast<typename FloatFormat<T>::Bits>(n + (FloatFormat<T>::rounder + bias))
                     << FloatFormat<T>::mantissa);
}

// x = n*log(2) + r with a whole n and |r| <= log(2)/2, log(2) in two pieces so that n * high is exact.
[[gnu::always_inline]] static inline void reduce_exp(float x, float& n, float& r) {
  n = nearest(x * 1.44269504088896341f);
  r = (x - n * 0.693145751953125f) - n * 1.4286068203094173e-6f;
}
[[gnu::always_inline]] static inline void reduce_exp(double x, double& n, double& r) {
  n = nearest(x * 1.44269504088896341);
  r = (x - n * 0.6931471805592082) - n * 7.371002565167799e-13;
}

// exp(r) - 1 for |r| <= log(2)/2.
[[gnu::always_inline]] static inline float reduced_expm1(float r) {
  const float p = polynomial(r, 0.5f, 0.16666667f, 0.041666467f, 0.008333286f, 0.0013933653f, 0.00019907548f);
  return r * r * p + r;
}
[[gnu::always_inline]] static inline double reduced_expm1(double r) {
  const double p = polynomial(r, 0.5, 0.16666666666666674, 0.04166666666662412, 0.008333333333322207,
                              0.0013888888917217457, 0.00019841269886591, 2.4801521290973345e-05,
                              2.7557242336680357e-06, 2.7620090518499427e-07, 2.5110049895858716e-08);
  return r * r * p + r;
}

// exp(x + tail) for every x and a tail much smaller than x: infinite above the largest finite result, gradual underflow
// below the smallest normal one. 1.2 ulp.
template <class T>
[[gnu::always_inline]] static inline T vexp(T x, T tail) {
  constexpr bool single = sizeof(T) == 4;
  T n, r;
  reduce_exp(clamp<T>(x, single ? -104.0 : -746.0, single ? 89.0 : 710.0), n, r);
  const T half = nearest(n * T(0.5));  // 2^n itself may lie beyond the normal exponents; p * 2^half does not.
  return (reduced_expm1(r + tail) + T(1)) * power_of_two(half) * power_of_two(n - half);
}

template <class T>
[[gnu::always_inline]] static inline T vexp(T x) {
  return vexp(x, T(0));
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

// 1 / (1 + exp(-x)), with full relative accuracy down to the subnormal results. 2.6 ulp.
template <class T>
[[gnu::always_inline]] static inline T vsigmoid(T x) {
  const T z = vexp(-magnitude(x));
  const T upper = T(1) / (T(1) + z);
  return x < T(0) ? z * upper : upper;
}

// tanh(x) = -m / (2 + m), m = exp(-2x) - 1, for x > 0; odd. 2.7 ulp.
template <class T>
[[gnu::always_inline]] static inline T vtanh(T x) {
  T n, r;
  reduce_exp(T(-2) * clamp<T>(magnitude(x), 0, 22), n, r);
  const T scale = power_of_two(n), m = reduced_expm1(r) * scale + (scale - T(1));
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
  const float w = 0.2109375f * t / (1.0f + 0.2109375f * t);
  return (1.0f - w) * polynomial(0.5f - w, 0.16164269f, 0.2755369f, 0.397541f, 0.4776684f, 0.46274933f, 0.33738858f,
                                 0.1515946f, -0.008950368f, -0.068837665f);
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

// One exponential gives both. No cancellation, so Phi has its full relative accuracy far below zero, where
// (1 + erf) / 2 has none left. Phi: 6 ulp above -3, 11 below; density: 2.2 ulp.
template <class T>
[[gnu::always_inline]] static inline Normal<T> vnormal(T x) {
  using Bits = typename FloatFormat<T>::Bits;
  const T t = clamp<T>(magnitude(x), 0, 40);
  // t^2 = head^2 + (t - head) * (t + head), the first exact: a rounded square would cost the exponential its last
  // digits.
  const T head = bit_cast<T>(bit_cast<Bits>(t) & ~((Bits(1) << (FloatFormat<T>::mantissa / 2 + 1)) - 1));
  const T decay = vexp(T(-0.5) * head * head, T(-0.5) * (t - head) * (t + head));
  const T tail = decay * scaled_normal_tail(t);
  return {x < T(0) ? tail : T(1) - tail, decay * T(0.39894228040143268)};
}
