// Elementary functions in float and double for CPU and GPU, within 2 ulp unless said otherwise.
//
// Everything is branch-free (selects only) and touches no library, so that a CPU compiler vectorises loops over these
// functions and every backend computes alike. Where the target has no fused multiply-add, FASTFLOW's fma is a product
// and a sum: results then differ by rounding between instruction sets, never between threads. Contraction by the
// compiler is harmless: no identity below relies on the rounding of a product.
#pragma once

#include "bits.h"

namespace fastflow::math {

// Horner's scheme, lowest power first.
template <class T, class C>
FASTFLOW_HD T horner(T, C c0) {
  return c0;
}

template <class T, class C, class... Rest>
FASTFLOW_HD T horner(T x, C c0, Rest... rest) {
  return fma(horner(x, rest...), x, T(c0));
}

// (exp(r) - 1 - r) / r^2 for |r| <= ln(2)/2; relative error in exp(r) below 4e-9 and 4e-18.
template <class T>
FASTFLOW_HD T exp_tail(T r) {
  if constexpr (Bits<T>::mantissa == Bits<float>::mantissa)
    return horner(r, 0x1.fffffcp-2f, 0x1.55549p-3f, 0x1.5558f8p-5f, 0x1.123b02p-7f, 0x1.6a226ep-10f);
  else
    return horner(r, 0x1.000000000000ap-1, 0x1.55555555554f8p-3, 0x1.5555555550755p-5, 0x1.11111111281a5p-7,
                  0x1.6c16c1846fbb1p-10, 0x1.a01a0128ec744p-13, 0x1.a0199944632fap-16, 0x1.71df27455ca69p-19,
                  0x1.28ae34718c0aep-22, 0x1.ad7e50364f2b4p-26);
}

// x = n ln 2 + r with |r| <= ln(2)/2 and n = rounded - Bits::rounder.
template <class T>
struct Reduced {
  T rounded, n, r;
};

template <class T>
FASTFLOW_HD Reduced<T> reduce_exp(T x) {
  using B = Bits<T>;
  const T rounded = fma(x, B::log2e, B::rounder);
  const T n = rounded - B::rounder;
  return {rounded, n, fma(-n, B::ln2_low, fma(-n, B::ln2_high, x))};
}

// The same with one constant for ln 2 where the product is exact: r is wrong by at most n * 2e-9 (1e-17).
template <class T>
FASTFLOW_HD Reduced<T> reduce_exp_near(T x) {
  using B = Bits<T>;
  if constexpr (!FASTFLOW_FUSED) return reduce_exp(x);
  const T rounded = fma(x, B::log2e, B::rounder);
  const T n = rounded - B::rounder;
  return {rounded, n, fma(-n, B::ln2, x)};
}

// exp(x) for x within [exp_low, exp_high] or NaN.
template <class T>
FASTFLOW_HD T exp_in_range(T x) {
  using B = Bits<T>;
  const Reduced<T> q = reduce_exp(x);
  const T p = fma(q.r * q.r, exp_tail(q.r), q.r) + T(1);
  // 2^n in two factors, since n reaches past both ends of the exponents.
  const T half = fma(q.n, T(0.5), B::rounder);
  return p * power_of_two(half) * power_of_two(q.rounded - (half - B::rounder));
}

template <class T>
FASTFLOW_HD T exp(T x) {
  using B = Bits<T>;
  const T low = x < B::exp_low ? B::exp_low : x;
  return exp_in_range(low > B::exp_high ? B::exp_high : low);
}

// exp(x) for abs(x) <= Bits::moderate, or NaN.
template <class T>
FASTFLOW_HD T exp_moderate(T x) {
  const Reduced<T> q = reduce_exp_near(x);
  const T scale = power_of_two(q.rounded);
  return fma(fma(q.r * q.r, exp_tail(q.r), q.r), scale, scale);
}

// exp(-abs(x)). Only the low end of the exponents needs care: 2^n is taken 64 powers higher, the product brought down.
template <class T>
FASTFLOW_HD T exp_decay(T x) {
  using B = Bits<T>;
  const T a = abs(x);
  const Reduced<T> q = reduce_exp(a > -B::exp_low ? B::exp_low : -a);
  const T scale = power_of_two(q.rounded + T(64));
  return fma(fma(q.r * q.r, exp_tail(q.r), q.r), scale, scale) * T(0x1p-64);
}

template <class T>
FASTFLOW_HD T expm1(T x) {
  using B = Bits<T>;
  const T low = x < B::expm1_low ? B::expm1_low : x;
  const T clamped = low > B::exp_high ? B::exp_high : low;
  const Reduced<T> q = reduce_exp(clamped);
  const T p = fma(q.r * q.r, exp_tail(q.r), q.r);
  const T half_scale = power_of_two(q.rounded - T(1));  // 2^n itself overflows before the result does
  const T scaled = T(2) * fma(half_scale, p, half_scale - T(0.5));
  return q.n == T(0) ? p : scaled;
}

// log(1 + f) for sqrt(1/2) - 1 <= f <= sqrt(2) - 1.
template <class T>
FASTFLOW_HD T log1p_core(T f) {
  if constexpr (Bits<T>::mantissa == Bits<float>::mantissa) {
    const T tail = horner(f, 0x1.555546p-2f, -0x1.ffffeep-3f, 0x1.99a546p-3f, -0x1.5562e2p-3f, 0x1.2332bcp-3f,
                          -0x1.fb4354p-4f, 0x1.e650fap-4f, -0x1.e2e8ecp-4f, 0x1.1b4126p-4f);
    const T f2 = f * f;
    return fma(f2, fma(f, tail, T(-0.5)), f);
  } else {
    const T s = f / (2. + f), z = s * s;
    const T tail = z * horner(z, 0x1.5555555555593p-1, 0x1.999999997fb2dp-2, 0x1.2492494217d16p-2,
                              0x1.c71c51e7d6fcep-3, 0x1.74664632755eep-3, 0x1.39a0f473b94edp-3, 0x1.2f0d9409abdc7p-3);
    const T half_square = 0.5 * f * f;
    return f - (half_square - s * (half_square + tail));
  }
}

// x = 2^n (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), for positive finite x.
template <class T>
struct Mantissa {
  T n, f;
};

template <class T>
FASTFLOW_HD Mantissa<T> split_mantissa(T x) {
  using B = Bits<T>;
  using uint = typename B::uint;
  const uint one = B::bias << B::mantissa;
  const uint shifted = to_bits(x) + (one - B::sqrt_half);
  const T exponent = from_bits(static_cast<uint>((shifted >> B::mantissa) | to_bits(B::integer)));
  const T m = from_bits(static_cast<uint>((shifted & ((uint(1) << B::mantissa) - 1)) + B::sqrt_half));
  return {exponent - (B::integer + T(B::bias)), m - T(1)};
}

// log1p_core(f) + n ln 2.
template <class T>
FASTFLOW_HD T log_sum(T n, T f) {
  using B = Bits<T>;
  return fma(n, B::ln2_high, fma(n, B::ln2_low, log1p_core(f)));
}

template <class T>
FASTFLOW_HD T log(T x) {
  using B = Bits<T>;
  const bool small = x < B::tiny;
  const Mantissa<T> q = split_mantissa(small ? x * B::rescale : x);
  const T result = log_sum(small ? q.n - B::rescale_log2 : q.n, q.f);
  const T outside = x < T(0) ? quiet_nan<T>() : x;  // NaN and +inf stay
  const T special = x == T(0) ? -infinity<T>() : outside;
  return ((x > T(0)) & (x < infinity<T>())) ? result : special;
}

template <class T>
FASTFLOW_HD T log1p(T x) {
  using B = Bits<T>;
  const T u = T(1) + x;
  const Mantissa<T> q = split_mantissa(u);
  // What 1 + x rounded away, scaled like f; the smaller of 1 and x is lost first.
  const T lost = abs(x) < T(1) ? x - (u - T(1)) : T(1) - (u - x);
  const T scale = power_of_two(B::rounder - (q.n > T(64) ? T(64) : q.n));
  const T result = log_sum(q.n, fma(lost, scale, q.f));
  const T outside = x < T(-1) ? quiet_nan<T>() : x;
  const T special = x == T(-1) ? -infinity<T>() : outside;
  return ((x > T(-1)) & (x < infinity<T>()) & (x != T(0))) ? result : special;
}

// log(1 + w) for 0 <= w <= 1 (or NaN), cheaper than log1p.
template <class T>
FASTFLOW_HD T log1p_unit(T w) {
  // The selects side by side: apart, a compiler computes the rest once for each of their outcomes.
  const auto high = w > T(0.41421356237309503);
  const T f = select(high, fma(T(0.5), w, T(-0.5)), w);
  const T offset = select(high, T(Bits<T>::ln2), T(0));
  return log1p_core(f) + offset;
}

// exp(-2 abs(x)) and the same minus 1, each to its own last digits.
template <class T>
struct Decay {
  T value, minus_one;
};

template <class T>
FASTFLOW_HD Decay<T> tanh_decay(T x) {
  using B = Bits<T>;
  const T a = abs(x) + abs(x);
  const Reduced<T> q = reduce_exp_near(a > -B::flush_low ? B::flush_low : -a);
  const T p = fma(q.r * q.r, exp_tail(q.r), q.r), scale = power_of_two(q.rounded);
  return {fma(scale, p, scale), fma(scale, p, scale - T(1))};
}

// With z = exp(-2 abs(x)) - 1, tanh(abs(x)) = -z/(z + 2) = -z/2 + (z^2/2)/(z + 2), and 1 - 2 (z + 1)/(z + 2) near 1.
template <class T>
FASTFLOW_HD T tanh(T x) {
  const Decay<T> decay = tanh_decay(x);
  const T z = decay.minus_one, half = T(0.5) * z;
  const bool far = decay.value < T(0.33);
  const T numerator = far ? T(-2) * decay.value : z * half, base = far ? T(1) : -half;
  return copysign(base + numerator / (z + T(2)), x);
}

// tanh(x) and a quarter of its derivative 1/cosh(x)^2, which keeps its relative accuracy where tanh(x) is near 1.
template <class T>
struct TanhSlope {
  T value, quarter_slope;
};

template <class T>
FASTFLOW_HD TanhSlope<T> tanh_slope(T x) {
  const Decay<T> decay = tanh_decay(x);
  const T z = decay.minus_one, half = T(0.5) * z, inverse = T(1) / (z + T(2)), share = decay.value * inverse;
  const T value = decay.value < T(0.33) ? fma(T(-2), share, T(1)) : fma(z * half, inverse, -half);
  return {copysign(value, x), share * inverse};
}

FASTFLOW_HD float atan_tail(float z) {
  return horner(z, -0x1.55554ap-2f, 0x1.9991a6p-3f, -0x1.23b636p-3f, 0x1.b1fa12p-4f, -0x1.f22afap-5f);
}

FASTFLOW_HD double atan_tail(double z) {
  return horner(z, -0x1.555555555553dp-2, 0x1.9999999995863p-3, -0x1.24924922ad9b8p-3, 0x1.c71c70e632d3cp-4,
                -0x1.745cf8e0428fp-4, 0x1.3b111951029b4p-4, -0x1.10ebb99cf318p-4, 0x1.df0f4d8c51357p-5,
                -0x1.9cd2743c72f1dp-5, 0x1.37d410d322d0dp-5, -0x1.2564ff7d87721p-6);
}

template <class T>
FASTFLOW_HD T atan(T x) {
  using B = Bits<T>;
  const T a = abs(x);
  const bool middle = a > T(0.41421356237309503), high = a > T(2.414213562373095);
  const T near = middle ? a - T(1) : a, near_denominator = middle ? a + T(1) : T(1);
  const T near_offset = middle ? T(0.5) * B::half_pi : T(0), near_low = middle ? T(0.5) * B::half_pi_low : T(0);
  const T numerator = high ? T(-1) : near, denominator = high ? a : near_denominator;
  const T offset = high ? B::half_pi : near_offset, offset_low = high ? B::half_pi_low : near_low;
  const T t = numerator / denominator, z = t * t;
  return copysign(offset + (t + fma(t * z, atan_tail(z), offset_low)), x);
}

// 1 / (1 + exp(-u)).
template <class T>
FASTFLOW_HD T sigmoid(T u) {
  const T w = exp_decay(u);
  return select(u < T(0), w, T(1)) / (T(1) + w);
}

// log(sigmoid(u)).
template <class T>
FASTFLOW_HD T logsigmoid(T u) {
  const T w = exp_decay(u);
  return (u < T(0) ? u : T(0)) - log1p_unit(w);
}

// log(1 + exp(u)).
template <class T>
FASTFLOW_HD T softplus(T u) {
  const T w = exp_decay(u);
  return (u > T(0) ? u : T(0)) + log1p_unit(w);
}

// log(softplus(u)), finite where softplus(u) underflows.
template <class T>
FASTFLOW_HD T log_softplus(T u) {
  const T w = exp_decay(u);
  const T direct = log((u > T(0) ? u : T(0)) + log1p_unit(w));
  return u < T(-20) ? fma(T(-0.5), w, u) : direct;
}

// log(exp(a) + exp(b)).
template <class T>
FASTFLOW_HD T logaddexp(T a, T b) {
  const T high = a > b ? a : b;
  const T sum = (isnan(a) ? a : high) + log1p_unit(exp_decay(a - b));
  return a == b ? a + Bits<T>::ln2 : sum;
}

}  // namespace fastflow::math
