// The scale maps of affine_coupling: s, log s and their derivatives in the raw value r (reference.ScaleMap).
#pragma once

#include "math.h"

namespace fastflow {

// In the order of reference.KINDS.
enum class Kind : int { exp, sigmoid, tanh, atan, softplus, rational, additive };

// u = gain*r + offset, with u already divided by the clamp for tanh and atan and multiplied by out_gain for exp.
template <class T>
struct ScaleMap {
  T gain, offset;
  T amplitude;      // sigmoid: out_gain; tanh, atan: clamp*out_gain; else 1
  T log_amplitude;  // sigmoid: log(out_gain)
  T inverse_clamp;  // rational: 1/clamp
  T eps, log_eps;
  T hard_min, hard_max;  // -inf and +inf where there is none
  T log_min, log_max;
  T shift_gain;
};

// The constants in the compute type, from the arguments of the operator.
template <class T>
FASTFLOW_HD ScaleMap<T> make_scale_map(int64_t kind, double gain, double offset, double out_gain, double clamp,
                                       double eps, double hard_min, double hard_max, double shift_gain) {
  ScaleMap<T> map;
  const Kind k = static_cast<Kind>(kind);
  const bool soft_clamp = k == Kind::tanh || k == Kind::atan;
  const double factor = k == Kind::exp ? out_gain : soft_clamp ? 1. / clamp : 1.;
  map.gain = static_cast<T>(factor * gain);
  map.offset = static_cast<T>(factor * offset);
  map.amplitude = static_cast<T>(soft_clamp ? clamp * out_gain : k == Kind::sigmoid ? out_gain : 1.);
  map.log_amplitude = k == Kind::sigmoid ? static_cast<T>(math::log(out_gain)) : T(0);
  map.inverse_clamp = static_cast<T>(1. / clamp);
  map.eps = static_cast<T>(eps);
  map.log_eps = static_cast<T>(math::log(eps));
  map.hard_min = static_cast<T>(hard_min);
  map.hard_max = static_cast<T>(hard_max);
  map.log_min = hard_min > 0. ? static_cast<T>(math::log(hard_min)) : -math::infinity<T>();
  map.log_max = static_cast<T>(math::log(hard_max));
  map.shift_gain = static_cast<T>(shift_gain);
  return map;
}

FASTFLOW_HD bool has_bounds(double hard_min, double hard_max) {
  return hard_min > -math::infinity<double>() || hard_max < math::infinity<double>();
}

template <class T>
struct Scale {
  T s, log_s;
};

// s, ds/dr and d(log s)/dr before the hard bounds, and whether those let gradients through.
template <class T>
struct ScaleSlope {
  T s, ds, dlog;
  bool inside = true;
};

// NaN stays.
template <class T>
FASTFLOW_HD T clamp(T x, T low, T high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

template <class T>
FASTFLOW_HD Scale<T> with_eps(const ScaleMap<T>& map, Scale<T> scale) {
  return {scale.s + map.eps, math::logaddexp(scale.log_s, map.log_eps)};
}

template <class T>
FASTFLOW_HD Scale<T> with_bounds(const ScaleMap<T>& map, Scale<T> scale) {
  return {clamp(scale.s, map.hard_min, map.hard_max), clamp(scale.log_s, map.log_min, map.log_max)};
}

template <class T>
FASTFLOW_HD ScaleSlope<T> with_eps(const ScaleMap<T>& map, ScaleSlope<T> scale) {
  const T s = scale.s;
  const T share = ((s == math::infinity<T>()) | (map.eps == T(0))) ? T(1) : s / (s + map.eps);
  return {s + map.eps, scale.ds, scale.dlog * share, scale.inside};
}

template <class T>
FASTFLOW_HD ScaleSlope<T> with_bounds(const ScaleMap<T>& map, ScaleSlope<T> scale) {
  const T s = scale.s;
  return {clamp(s, map.hard_min, map.hard_max), scale.ds, scale.dlog,
          scale.inside && !(s < map.hard_min) && !(s > map.hard_max)};
}

// The bound of abs(log s) for tanh, atan and rational (before eps).
template <class T>
FASTFLOW_HD bool log_scale_is_moderate(const ScaleMap<T>& map) {
  return math::abs(map.amplitude) <= math::Bits<T>::moderate && T(1) / map.inverse_clamp <= math::Bits<T>::moderate;
}

// exp of a soft-clamped log s; Moderate promises that it is.
template <bool Moderate, class T>
FASTFLOW_HD T exp_of_clamped(T log_s) {
  return Moderate ? math::exp_moderate(log_s) : math::exp(log_s);
}

template <Kind K>
inline constexpr bool soft_clamped = K == Kind::tanh || K == Kind::atan || K == Kind::rational;

template <class T>
struct LogSlope {
  T log_s, dlog;
};

// log s of the soft-clamped kinds, and with its derivative in r.
template <Kind K, class T>
FASTFLOW_HD T soft_clamp(const ScaleMap<T>& map, T r) {
  const T u = math::fma(map.gain, r, map.offset);
  if constexpr (K == Kind::tanh) return map.amplitude * math::tanh(u);
  if constexpr (K == Kind::atan) return map.amplitude * math::atan(u);
  return u / math::fma(math::abs(u), map.inverse_clamp, T(1));
}

template <Kind K, class T>
FASTFLOW_HD LogSlope<T> soft_clamp_slope(const ScaleMap<T>& map, T r) {
  const T u = math::fma(map.gain, r, map.offset);
  if constexpr (K == Kind::tanh) {
    const math::TanhSlope<T> t = math::tanh_slope(u);
    return {map.amplitude * t.value, T(4) * map.amplitude * map.gain * t.quarter_slope};
  } else if constexpr (K == Kind::atan) {
    return {map.amplitude * math::atan(u), map.amplitude * map.gain / math::fma(u, u, T(1))};
  } else {
    const T inverse = T(1) / math::fma(math::abs(u), map.inverse_clamp, T(1)), log_s = u * inverse;
    return {log_s, math::fma(T(0), log_s, map.gain * inverse * inverse)};  // NaN at infinite u
  }
}

// Moderate, here and below: log_scale_is_moderate(map), for the kinds that it speaks of.
template <Kind K, bool Eps, bool Bounds, bool Moderate = false, class T>
FASTFLOW_HD Scale<T> scale_of(const ScaleMap<T>& map, T r) {
  const T u = math::fma(map.gain, r, map.offset);
  T s, log_s;
  if constexpr (K == Kind::exp) {
    log_s = u;
    s = math::exp(u);
  } else if constexpr (K == Kind::sigmoid) {
    const T w = math::exp_decay(u);
    const auto negative = u < T(0);
    const T numerator = math::select(negative, w, T(1)), low = math::select(negative, u, T(0));
    s = map.amplitude * (numerator / (T(1) + w));
    log_s = low - math::log1p_unit(w) + map.log_amplitude;
  } else if constexpr (K == Kind::softplus) {
    const T w = math::exp_decay(u);
    s = (u > T(0) ? u : T(0)) + math::log1p_unit(w);
    log_s = u < T(-20) ? math::fma(T(-0.5), w, u) : math::log(s);
  } else if constexpr (K == Kind::additive) {
    s = T(1);
    log_s = T(0);
  } else {
    log_s = soft_clamp<K>(map, r);
    s = exp_of_clamped<Moderate>(log_s);
  }
  Scale<T> scale{s, log_s};
  if constexpr (Eps) scale = with_eps(map, scale);
  if constexpr (Bounds) scale = with_bounds(map, scale);
  return scale;
}

// Non-finite values come out where differentiating the formulas above step by step gives them.
template <Kind K, bool Eps, bool Bounds, bool Moderate = false, class T>
FASTFLOW_HD ScaleSlope<T> scale_slope(const ScaleMap<T>& map, T r) {
  const T u = math::fma(map.gain, r, map.offset);
  T s, ds, dlog;
  if constexpr (K == Kind::exp) {
    s = math::exp(u);
    dlog = map.gain;
    ds = s * dlog;
  } else if constexpr (K == Kind::sigmoid) {
    const T w = math::exp_decay(u), high = T(1) / (T(1) + w), low = w * high;  // sigmoid(abs(u)) and 1 less it
    const auto negative = u < T(0);
    s = map.amplitude * math::select(negative, low, high);
    dlog = map.gain * math::select(negative, high, low);
    ds = s * dlog;
  } else if constexpr (K == Kind::softplus) {
    const T w = math::exp_decay(u);
    s = (u > T(0) ? u : T(0)) + math::log1p_unit(w);
    const T slope = (u < T(0) ? w : T(1)) / (T(1) + w);
    ds = map.gain * slope;
    dlog = map.gain * (u < T(-20) ? math::fma(T(-0.5), w, T(1)) : slope / s);
  } else if constexpr (K == Kind::additive) {
    s = T(1);
    ds = dlog = T(0);
  } else {
    const LogSlope<T> slope = soft_clamp_slope<K>(map, r);
    dlog = slope.dlog;
    s = exp_of_clamped<Moderate>(slope.log_s);
    ds = s * dlog;
  }
  ScaleSlope<T> scale{s, ds, dlog};
  if constexpr (Eps) scale = with_eps(map, scale);
  if constexpr (Bounds) scale = with_bounds(map, scale);
  return scale;
}

// Whether ds may differ from s*dlog: with bounds, and for softplus where s or dlog leaves the range of T.
template <Kind K, bool Bounds>
inline constexpr bool separate_slopes = Bounds || K == Kind::softplus;

// y of one element from its scale; t is the raw shift.
template <class T>
FASTFLOW_HD T coupled(const ScaleMap<T>& map, T s, T x, T t, bool inverse, bool shift_first) {
  const T shift = map.shift_gain * t;
  if (inverse) return shift_first ? x / s - shift : (x - shift) / s;
  return shift_first ? (x + shift) * s : math::fma(x, s, shift);
}

template <class T>
struct Coupled {
  T y, log_s;
};

// y and log s (to be subtracted where Inverse) of one element; t is the raw shift.
template <Kind K, bool Eps, bool Bounds, bool Inverse, bool ShiftFirst, bool Moderate = false, class T>
FASTFLOW_HD Coupled<T> couple(const ScaleMap<T>& map, T x, T r, T t) {
  const Scale<T> scale = scale_of<K, Eps, Bounds, Moderate>(map, r);
  return {coupled(map, scale.s, x, t, Inverse, ShiftFirst), scale.log_s};
}

// Whether the gradients below read the shift at all.
template <bool Inverse, bool ShiftFirst>
inline constexpr bool gradient_reads_shift = Inverse != ShiftFirst;

template <class T>
struct CoupledGradient {
  T x, raw, shift;
};

// Gradients in x, r and t of one element from its scale and those of y (gy) and of the summed log-det (gl).
// `separate` says whether the scale's ds may differ from s*dlog.
template <class T>
FASTFLOW_HD CoupledGradient<T> coupled_gradient(const ScaleMap<T>& map, ScaleSlope<T> scale, T gy, T gl, T x, T t,
                                                bool inverse, bool shift_first, bool separate) {
  const T s = scale.s;
  const T shift = inverse != shift_first ? map.shift_gain * t : T(0);
  const T to_log = scale.inside ? gl : T(0);
  CoupledGradient<T> grad;
  if (inverse) {
    grad.x = gy / s;
    grad.shift = -map.shift_gain * (shift_first ? gy : grad.x);
    const T scaled = shift_first ? x : x - shift;  // what s divides
    const T to_scale = grad.x * (scaled / s);
    // The zero is NaN at infinite s, as the quotient's gradient is.
    grad.raw = separate ? -math::fma(scale.inside ? to_scale : T(0), scale.ds, to_log * scale.dlog)
                        : -math::fma(grad.x, scaled, math::fma(T(0), s, gl)) * scale.dlog;
  } else {
    const T scaled = shift_first ? x + shift : x;  // what s multiplies
    const T to_scale = gy * scaled;
    grad.x = gy * s;
    grad.shift = map.shift_gain * (shift_first ? grad.x : gy);
    grad.raw = separate ? math::fma(scale.inside ? to_scale : T(0), scale.ds, to_log * scale.dlog)
                        : math::fma(grad.x, scaled, gl) * scale.dlog;
  }
  return grad;
}

// The gradient in r from the log-det alone, where y is not used.
template <class T>
FASTFLOW_HD T log_gradient(ScaleSlope<T> scale, T gl, bool inverse) {
  const T signed_gl = inverse ? -gl : gl;
  return (scale.inside ? signed_gl : T(0)) * scale.dlog;
}

template <Kind K, bool Eps, bool Bounds, bool Inverse, bool ShiftFirst, bool Moderate = false, class T>
FASTFLOW_HD CoupledGradient<T> couple_gradient(const ScaleMap<T>& map, T gy, T gl, T x, T r, T t) {
  CoupledGradient<T> grad = coupled_gradient(map, scale_slope<K, Eps, Bounds, Moderate>(map, r), gy, gl, x, t, Inverse,
                                             ShiftFirst, separate_slopes<K, Bounds>);
  if constexpr (K == Kind::additive) grad.raw = T(0);
  return grad;
}

}  // namespace fastflow
