// The scales of a Gaussian, its KL divergence and their derivatives: csrc's counterpart of reference.sigma_and_log.
#pragma once

#include "math.h"

namespace fastflow::gaussian {

// In the order of reference.SCALES.
enum Scale { logvar, logstd, std_dev, softplus, soft_tanh, scale_count };

// reference.SOFTPLUS_FLOOR, SOFT_TANH and log(2 pi) / 2.
constexpr double softplus_floor = 1e-4, soft_tanh_bound = 5, half_log_two_pi = 0.91893853320467274178;

// exp(x), exp(x) - 1 and exp(x) - 1 - x, each to about two roundings of its own size, from one polynomial.
template <class T>
struct ExpParts {
  T exp, expm1, excess;
};

template <class T>
FASTFLOW_HD ExpParts<T> exp_parts(T x) {
  using B = math::Bits<T>;
  const T low = x < B::exp_low ? B::exp_low : x;
  const math::Reduced<T> q = math::reduce_exp(low > B::exp_high ? B::exp_high : low);
  const T beyond = q.r * q.r * math::exp_tail(q.r);  // exp(r) - 1 - r
  const T p = q.r + beyond;
  // 2^n in two factors, since n reaches past both ends of the exponents; 2^(n-1) overflows for no n.
  const T half = math::fma(q.n, T(0.5), B::rounder);
  const T a = math::power_of_two(half), b = math::power_of_two(q.rounded - (half - B::rounder));
  const T scale = a * (T(0.5) * b);
  const T expm1 = T(2) * math::fma(scale, p, scale - T(0.5));
  return {T(2) * math::fma(scale, p, scale), expm1, q.n == T(0) ? beyond : expm1 - x};
}

// exp(2x) - 1 of the parts of x.
template <class T>
FASTFLOW_HD T expm1_twice(ExpParts<T> parts) {
  return parts.expm1 * (parts.expm1 + T(2));
}

// exp(2x) - 1 - 2x of the parts of x: twice the KL divergence that a change x of log sigma makes.
template <class T>
FASTFLOW_HD T excess_twice(ExpParts<T> parts) {
  return math::fma(parts.expm1, parts.expm1, T(2) * parts.excess);
}

template <class T>
struct Pair {
  T value, slope;
};

// sigma, log sigma and their derivatives by the raw parameter.
template <class T>
struct Sigma {
  T value, log, slope, log_slope;
};

// log sigma = 5 tanh(raw / 5) and its derivative. The KL divergence takes exp(2 log sigma), so that tanh near 1 must be
// better than to 2 ulp: it is made as 1 - 2w/(1 + w), w = exp(-2 |raw| / 5).
template <class T>
FASTFLOW_HD Pair<T> soft_tanh_log(T raw) {
  const T bound = T(soft_tanh_bound);
  const T a = math::abs(raw) / bound;
  const ExpParts<T> w = exp_parts(T(-2) * a);
  const bool small = a < T(0.55);
  const T denominator = T(2) + w.expm1;
  const T quotient = (small ? -w.expm1 : T(2) * w.exp) / denominator;
  const T magnitude = small ? bound * quotient : math::fma(-bound, quotient, bound);
  return {math::copysign(magnitude, raw), T(4) * w.exp / (denominator * denominator)};
}

template <int scale, class T>
FASTFLOW_HD Sigma<T> sigma_of(T raw) {
  if constexpr (scale == std_dev) {
    return {raw, math::log(raw), T(1), T(1) / raw};
  } else if constexpr (scale == softplus) {
    const T value = math::softplus(raw) + T(softplus_floor), slope = math::sigmoid(raw);
    return {value, math::log(value), slope, slope / value};
  } else {
    T log, log_slope;
    if constexpr (scale == soft_tanh) {
      const Pair<T> soft = soft_tanh_log(raw);
      log = soft.value;
      log_slope = soft.slope;
    } else {
      log_slope = scale == logvar ? T(0.5) : T(1);
      log = log_slope * raw;
    }
    const T value = exp_parts(log).exp;  // shared with the KL divergence from N(0, 1)
    return {value, log, value * log_slope, log_slope};
  }
}

// KL(N(mean, sigma^2) || N(0, 1)) in nats.
template <class T>
FASTFLOW_HD T kl_standard(T mean, T log_sigma) {
  return T(0.5) * math::fma(mean, mean, excess_twice(exp_parts(log_sigma)));
}

// KL(N(mean, sigma^2) || N(prior_mean, prior_sigma^2)) in nats.
template <class T>
FASTFLOW_HD T kl_prior(T mean, T log_sigma, T prior_mean, Sigma<T> prior) {
  const T t = (mean - prior_mean) / prior.value;
  return T(0.5) * math::fma(t, t, excess_twice(exp_parts(log_sigma - prior.log)));
}

// Derivatives of the KL divergence by the mean, the raw scale and, with a prior, the prior's two.
template <class T>
struct KlSlopes {
  T mean, raw, prior_mean, prior_raw;
};

template <class T>
FASTFLOW_HD KlSlopes<T> kl_standard_slopes(T mean, Sigma<T> sigma) {
  return {mean, expm1_twice(exp_parts(sigma.log)) * sigma.log_slope, T(0), T(0)};
}

template <class T>
FASTFLOW_HD KlSlopes<T> kl_prior_slopes(T mean, Sigma<T> sigma, T prior_mean, Sigma<T> prior) {
  const T t = (mean - prior_mean) / prior.value, slope = t / prior.value;
  const T change = expm1_twice(exp_parts(sigma.log - prior.log));
  return {slope, change * sigma.log_slope, -slope, -math::fma(t * slope, prior.slope, change * prior.log_slope)};
}

}  // namespace fastflow::gaussian
