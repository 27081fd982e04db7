// A bin of a monotonic spline: its value, inverse and slope, and the derivatives of both. Counterpart of
// reference/spline.py.
#pragma once

#include "math.h"

namespace fastflow::spline {

// In the order of reference.SPLINES.
enum Kind { rational_quadratic, linear };

// The operators' constants, those of the sizes multiplied out.
template <class T>
struct Map {
  T bound, width_base, width_span, height_base, height_span, min_derivative, gain;
  T inverse_clamp;  // 0: no clamp
  T end_derivative;
};

template <class T>
FASTFLOW_HD Map<T> make_map(int64_t bins, double bound, double min_width, double min_height, double min_derivative,
                            double gain, double clamp, double end_derivative) {
  const double size = 2. * bound, k = static_cast<double>(bins);
  return {T(bound), T(size * min_width), T(size * (1. - k * min_width)), T(size * min_height),
          T(size * (1. - k * min_height)), T(min_derivative), T(gain), clamp == 0. ? T(0) : T(1. / clamp),
          T(end_derivative)};
}

// exp(x) for x <= 0 or NaN; 0 where it would be subnormal.
template <class T>
FASTFLOW_HD T exp_share(T x) {
  const math::Reduced<T> q = math::reduce_exp(x < math::Bits<T>::flush_low ? math::Bits<T>::flush_low : x);
  const T scale = math::power_of_two(q.rounded);
  return math::fma(scale, math::fma(q.r * q.r, math::exp_tail(q.r), q.r), scale);
}

// A raw width or height as softmax takes it.
template <bool soft, class T>
FASTFLOW_HD T bounded_size(T raw, const Map<T>& map) {
  const T scaled = map.gain * raw;
  if constexpr (soft) return scaled / math::fma(T(2) * map.inverse_clamp, math::abs(scaled), T(1));
  return scaled;
}

// d bounded_size / d raw.
template <bool soft, class T>
FASTFLOW_HD T bounded_size_slope(T raw, const Map<T>& map) {
  if constexpr (!soft) return map.gain;
  const T inverse = T(1) / math::fma(T(2) * map.inverse_clamp, math::abs(map.gain * raw), T(1));
  return map.gain * inverse * inverse;
}

template <bool soft, class T>
FASTFLOW_HD T derivative_of(T raw, const Map<T>& map) {
  if constexpr (!soft) return map.min_derivative + math::softplus(raw);
  return map.min_derivative + math::exp(raw / math::fma(map.inverse_clamp, math::abs(raw), T(1)));
}

// d derivative_of / d raw.
template <bool soft, class T>
FASTFLOW_HD T derivative_slope(T raw, const Map<T>& map) {
  if constexpr (!soft) return math::sigmoid(raw);
  const T inverse = T(1) / math::fma(map.inverse_clamp, math::abs(raw), T(1));
  return math::exp(raw * inverse) * inverse * inverse;
}

template <class T>
struct Bin {
  T left, width, bottom, height, d0, d1;
};

// Where in the bin a point lies, as a share of its width; the slope there and what it is made of.
template <class T>
struct Point {
  T theta, rest, both, s, bend, denominator, numerator, slope;
};

template <class T>
FASTFLOW_HD Point<T> point_at(const Bin<T>& bin, T theta) {
  Point<T> p;
  p.theta = theta;
  p.rest = T(1) - theta;
  p.both = theta * p.rest;
  p.s = bin.height / bin.width;
  p.bend = math::fma(T(-2), p.s, bin.d0 + bin.d1);
  p.denominator = math::fma(p.bend, p.both, p.s);
  p.numerator = bin.d1 * theta * theta + T(2) * p.s * p.both + bin.d0 * p.rest * p.rest;
  const T ratio = p.s / p.denominator;
  p.slope = p.numerator * ratio * ratio;
  return p;
}

template <class T>
FASTFLOW_HD Point<T> point_of_x(const Bin<T>& bin, T x) {
  return point_at(bin, (x - bin.left) / bin.width);
}

// f within its bin as a share of the height.
template <class T>
FASTFLOW_HD T share_at(const Bin<T>& bin, const Point<T>& p) {
  return (p.s * p.theta * p.theta + bin.d0 * p.both) / p.denominator;
}

template <class T>
FASTFLOW_HD Point<T> point_of_y(const Bin<T>& bin, T y) {
  const T eta = (y - bin.bottom) / bin.height, s = bin.height / bin.width;
  const T bend = math::fma(T(-2), s, bin.d0 + bin.d1);
  const T b = math::fma(-eta, bend, bin.d0);
  const T square = b * b + T(4) * math::fma(eta, bend, s - bin.d0) * s * eta;
  // Not negative but by rounding; NaN stays.
  return point_at(bin, T(2) * s * eta / (b + math::sqrt(square < T(0) ? T(0) : square)));
}

// A result within the interval, where rounding may have carried it out; NaN stays.
template <class T>
FASTFLOW_HD T confined(T value, T bound) {
  const T low = value < -bound ? -bound : value;
  return low > bound ? bound : low;
}

// Gradients by the operand of the direction computed and by what makes the bin.
template <class T>
struct BinGradient {
  T operand, left, width, bottom, height, d0, d1;
};

// What the incoming gradients of the result and of the log-slope (of f, whatever the direction) make of them. For the
// inverse x of y, 0 = f(x) - y gives dx = (dy - df)/f', df what the parameters do to f at a fixed x.
template <bool inverse, class T>
FASTFLOW_HD BinGradient<T> rational_quadratic_gradient(const Bin<T>& bin, const Point<T>& p, T grad_result, T grad_log) {
  const T t = p.theta, u = p.rest, a = p.both, s = p.s;
  const T per_denominator = T(1) / p.denominator, per_numerator = T(1) / p.numerator;
  const T middle = T(1) - T(2) * t;  // d both / d theta
  const T log_theta = T(2) * (math::fma(bin.d1, t, math::fma(s, middle, -bin.d0 * u)) * per_numerator -
                              p.bend * middle * per_denominator);
  BinGradient<T> g;
  T grad_f, grad_theta;
  if constexpr (inverse) {
    grad_f = -math::fma(grad_log, log_theta / bin.width, grad_result) / p.slope;
    grad_theta = -grad_result * bin.width;
    g.operand = -grad_f;
  } else {
    grad_f = grad_result;
    grad_theta = math::fma(grad_f * p.slope, bin.width, grad_log * log_theta);
    g.operand = grad_theta / bin.width;
  }
  const T of_share = grad_f * bin.height * per_denominator * per_denominator;
  const T log_both = T(2) * a * per_denominator;
  const T d1t = bin.d1 * t * t, d0u = bin.d0 * u * u;
  const T log_s = T(2) / s + T(2) * (a * per_numerator - math::fma(T(-2), a, T(1)) * per_denominator);
  const T grad_s = math::fma(of_share * a, d1t - d0u, grad_log * log_s);
  // Numerator and denominator side by side, so that infinite slopes give the NaN that they are.
  g.d0 = math::fma(of_share * a, math::fma(s * u, u, bin.d1 * a),
                   grad_log * (math::fma(-log_both, p.numerator, u * u) * per_numerator));
  g.d1 = math::fma(-of_share * a, math::fma(s * t, t, bin.d0 * a),
                   grad_log * (math::fma(-log_both, p.numerator, t * t) * per_numerator));
  g.left = -grad_theta / bin.width;
  g.width = -math::fma(grad_theta, t, grad_s * s) / bin.width;
  g.bottom = grad_f;
  g.height = math::fma(grad_f, share_at(bin, p), grad_s / bin.width);
  return g;
}

// The same for a linear bin of slope height / width, whose left end and width are fixed.
template <bool inverse, class T>
FASTFLOW_HD BinGradient<T> linear_gradient(const Bin<T>& bin, T theta, T grad_result, T grad_log) {
  const T slope = bin.height / bin.width;
  const T grad_f = inverse ? -grad_result / slope : grad_result;
  BinGradient<T> g{};
  g.operand = inverse ? -grad_f : grad_f * slope;
  g.bottom = grad_f;
  g.height = math::fma(grad_f, theta, grad_log / bin.height);
  return g;
}

}  // namespace fastflow::spline
