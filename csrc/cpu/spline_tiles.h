// The arithmetic of spline over tiles. For spline_kernel.cpp alone.
//
// Rows hold one number per element of a tile. Loops run over `whole` elements, the tile's rounded up to full blocks of
// lanes: what lies behind the last element is computed like the rest and read by nobody.
#pragma once

#include "../common/spline_map.h"
#include "spline_kernel.h"
#include "vectors.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

constexpr int64_t tile = SplineShape::tile;
constexpr int64_t lanes = 16;

template <class T>
struct alignas(64) Row {
  T values[tile];
};

// A softmax of one tile: exponentials (a row per bin) and, per element, one over their sum.
template <class T>
struct Shares {
  T* exponentials;
  Row<T> inverse_sum;
};

// The bin of each element along one axis: its number, its exponential, and the sum of those before it.
template <class T>
struct Chosen {
  Row<T> exponential, before;
};

// Zeroes the raw parameters of elements outside the interval, so that whatever they are, nothing of them is left.
template <class T>
void mask_rows(T* raw, int64_t rows, const Row<T>& outside, int64_t whole) {
  for (int64_t k = 0; k < rows; ++k, raw += tile) {
#pragma omp simd
    for (int64_t i = 0; i < whole; ++i) raw[i] = outside.values[i] != T(0) ? T(0) : raw[i];
  }
}

template <bool soft, class T>
void make_shares(const spline::Map<T>& map, int64_t bins, int64_t whole, const T* raw, Shares<T>& shares) {
  Row<T> peak;
  for (int64_t k = 0; k < bins; ++k) {
    const T* row = raw + k * tile;
    T* to = shares.exponentials + k * tile;
#pragma omp simd
    for (int64_t i = 0; i < whole; ++i) {
      const T value = spline::bounded_size<soft>(row[i], map);
      to[i] = value;
      peak.values[i] = k == 0 || value > peak.values[i] ? value : peak.values[i];
    }
  }
  Row<T> sum{};
  for (int64_t k = 0; k < bins; ++k) {
    T* to = shares.exponentials + k * tile;
#pragma omp simd
    for (int64_t i = 0; i < whole; ++i) {
      to[i] = spline::exp_share(to[i] - peak.values[i]);
      sum.values[i] += to[i];
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < whole; ++i) shares.inverse_sum.values[i] = T(1) / sum.values[i];
}

// Searches the bin [left, right) of each value: knot k is start + k * base + span * (share of the bins before it).
template <class T>
void search(const Shares<T>& shares, int64_t bins, int64_t whole, T start, T base, T span, const Row<T>& value,
            Row<T>& number, Chosen<T>& chosen) {
  constexpr int W = Simd<T>::lanes;
  for (int64_t i = 0; i < whole; i += W) {
    const Vec<T> v = vec(value.values + i), scale = span * vec(shares.inverse_sum.values + i);
    Vec<T> sum = vec(shares.exponentials + i), index{}, exponential = sum, before{};
    for (int64_t k = 1; k < bins; ++k) {
      const Vec<T> e = vec(shares.exponentials + k * tile + i);
      const auto beyond = v >= scale * sum + (start + static_cast<T>(k) * base);
      index = beyond ? splat(static_cast<T>(k)) : index;
      exponential = beyond ? e : exponential;
      before = beyond ? sum : before;
      sum += e;
    }
    vec(number.values + i) = index;
    vec(chosen.exponential.values + i) = exponential;
    vec(chosen.before.values + i) = before;
  }
}

// The same in bins of equal width.
template <class T>
void search_equal(int64_t bins, int64_t whole, T start, T width, const Row<T>& value, Row<T>& number) {
#pragma omp simd
  for (int64_t i = 0; i < whole; ++i) number.values[i] = T(0);
  for (int64_t k = 1; k < bins; ++k) {
    const T knot = start + static_cast<T>(k) * width, index = static_cast<T>(k);
#pragma omp simd
    for (int64_t i = 0; i < whole; ++i) number.values[i] = value.values[i] >= knot ? index : number.values[i];
  }
}

// What belongs to the bins of these numbers along the other axis.
template <class T>
void choose(const Shares<T>& shares, int64_t bins, int64_t whole, const Row<T>& number, Chosen<T>& chosen) {
  constexpr int W = Simd<T>::lanes;
  for (int64_t i = 0; i < whole; i += W) {
    const Vec<T> index = vec(number.values + i);
    Vec<T> sum = vec(shares.exponentials + i), exponential = sum, before{};
    for (int64_t k = 1; k < bins; ++k) {
      const Vec<T> e = vec(shares.exponentials + k * tile + i);
      const auto beyond = index >= splat(static_cast<T>(k));
      exponential = beyond ? e : exponential;
      before = beyond ? sum : before;
      sum += e;
    }
    vec(chosen.exponential.values + i) = exponential;
    vec(chosen.before.values + i) = before;
  }
}

// The raw slopes at both ends of each bin; row k of raw is that of knot k + 1. 0 at the ends of the interval.
template <class T>
void choose_slopes(const T* raw, int64_t bins, int64_t whole, const Row<T>& number, Row<T>& first, Row<T>& second) {
  constexpr int W = Simd<T>::lanes;
  for (int64_t i = 0; i < whole; i += W) {
    const Vec<T> index = vec(number.values + i);
    Vec<T> left{}, right{};
    for (int64_t k = 0; k < bins - 1; ++k) {
      const Vec<T> value = vec(raw + k * tile + i);
      left = index == splat(static_cast<T>(k + 1)) ? value : left;
      right = index == splat(static_cast<T>(k)) ? value : right;
    }
    vec(first.values + i) = left;
    vec(second.values + i) = right;
  }
}

// Everything about the bins of a tile's elements.
template <class T>
struct Located {
  Row<T> value, outside, number;
  Shares<T> widths, heights;
  Chosen<T> width, height;
  Row<T> raw_first, raw_second;  // raw slopes
};

template <bool linear, bool soft, class T>
void locate(const SplineShape& shape, const spline::Map<T>& map, int64_t whole, const T* x, T* raw, Located<T>& at) {
  const int64_t bins = shape.bins;
#pragma omp simd
  for (int64_t i = 0; i < whole; ++i) {
    const bool outside = math::abs(x[i]) > map.bound;
    at.outside.values[i] = outside ? T(1) : T(0);
    at.value.values[i] = outside ? T(0) : x[i];
  }
  mask_rows(raw, shape.params, at.outside, whole);
  if constexpr (linear) {
    make_shares<soft>(map, bins, whole, raw, at.heights);
    if (shape.inverse) {
      search(at.heights, bins, whole, -map.bound, map.height_base, map.height_span, at.value, at.number, at.height);
    } else {
      search_equal(bins, whole, -map.bound, T(2) * map.bound / static_cast<T>(bins), at.value, at.number);
      choose(at.heights, bins, whole, at.number, at.height);
    }
  } else {
    make_shares<soft>(map, bins, whole, raw, at.widths);
    make_shares<soft>(map, bins, whole, raw + bins * tile, at.heights);
    if (shape.inverse) {
      search(at.heights, bins, whole, -map.bound, map.height_base, map.height_span, at.value, at.number, at.height);
      choose(at.widths, bins, whole, at.number, at.width);
    } else {
      search(at.widths, bins, whole, -map.bound, map.width_base, map.width_span, at.value, at.number, at.width);
      choose(at.heights, bins, whole, at.number, at.height);
    }
    choose_slopes(raw + 2 * bins * tile, bins, whole, at.number, at.raw_first, at.raw_second);
  }
}

// The bin of element i.
template <bool linear, bool soft, class T>
FASTFLOW_HD spline::Bin<T> bin_of(const spline::Map<T>& map, const Located<T>& at, T last, int64_t i) {
  const T number = at.number.values[i];
  spline::Bin<T> bin;
  const T height_scale = map.height_span * at.heights.inverse_sum.values[i];
  bin.height = math::fma(height_scale, at.height.exponential.values[i], map.height_base);
  bin.bottom = math::fma(height_scale, at.height.before.values[i], math::fma(number, map.height_base, -map.bound));
  if constexpr (linear) {
    bin.width = T(2) * map.bound / (last + T(1));
    bin.left = math::fma(number, bin.width, -map.bound);
    bin.d0 = bin.d1 = T(1);
  } else {
    const T width_scale = map.width_span * at.widths.inverse_sum.values[i];
    bin.width = math::fma(width_scale, at.width.exponential.values[i], map.width_base);
    bin.left = math::fma(width_scale, at.width.before.values[i], math::fma(number, map.width_base, -map.bound));
    const T d0 = spline::derivative_of<soft>(at.raw_first.values[i], map);
    const T d1 = spline::derivative_of<soft>(at.raw_second.values[i], map);
    bin.d0 = number == T(0) ? map.end_derivative : d0;
    bin.d1 = number == last ? map.end_derivative : d1;
  }
  return bin;
}

template <class T>
using ForwardTile = void (*)(const SplineShape&, const spline::Map<T>&, int64_t, const T*, T*, Located<T>&, T*, T*);

template <bool linear, bool soft, bool inverse, class T>
void forward_tile(const SplineShape& shape, const spline::Map<T>& map, int64_t whole, const T* x, T* raw,
                  Located<T>& at, T* y, T* log_slope) {
  locate<linear, soft>(shape, map, whole, x, raw, at);
  const T last = static_cast<T>(shape.bins - 1);
#pragma omp simd
  for (int64_t i = 0; i < whole; ++i) {
    const spline::Bin<T> bin = bin_of<linear, soft>(map, at, last, i);
    const T value = at.value.values[i];
    T result, slope;
    if constexpr (linear) {
      slope = bin.height / bin.width;
      result = inverse ? bin.left + (value - bin.bottom) / slope : math::fma(value - bin.left, slope, bin.bottom);
    } else {
      const spline::Point<T> p = inverse ? spline::point_of_y(bin, value) : spline::point_of_x(bin, value);
      result = inverse ? math::fma(p.theta, bin.width, bin.left)
                       : math::fma(bin.height, spline::share_at(bin, p), bin.bottom);
      slope = p.slope;
    }
    const bool outside = at.outside.values[i] != T(0);
    const T log = math::log(slope), inside = spline::confined(result, map.bound);
    y[i] = outside ? x[i] : inside;
    log_slope[i] = outside ? T(0) : inverse ? -log : log;
  }
}

// Per element of the bins along one axis: the gradients of what lies below the chosen bin and of its size.
template <class T>
struct AxisGradient {
  Row<T> start, size;
};

// Gradients of the raw sizes, in place of them: softmax's, times the span.
template <bool soft, class T>
void size_gradients(const spline::Map<T>& map, T span, int64_t bins, int64_t whole, const Row<T>& number,
                    const Shares<T>& shares, const Chosen<T>& chosen, AxisGradient<T>& gradient, T* raw) {
  Row<T> mean, factor;
#pragma omp simd
  for (int64_t i = 0; i < whole; ++i) {
    const T inverse_sum = shares.inverse_sum.values[i];
    mean.values[i] = math::fma(gradient.start.values[i], chosen.before.values[i],
                               gradient.size.values[i] * chosen.exponential.values[i]) * inverse_sum;
    factor.values[i] = span * inverse_sum;
  }
  for (int64_t k = 0; k < bins; ++k) {
    T* row = raw + k * tile;
    const T* exponential = shares.exponentials + k * tile;
    const T index = static_cast<T>(k);
#pragma omp simd
    for (int64_t i = 0; i < whole; ++i) {
      const T below = index < number.values[i] ? gradient.start.values[i] : T(0);
      const T own = index == number.values[i] ? gradient.size.values[i] : below;
      row[i] = exponential[i] * factor.values[i] * (own - mean.values[i]) *
               spline::bounded_size_slope<soft>(row[i], map);
    }
  }
}

template <class T>
using BackwardTile = void (*)(const SplineShape&, const spline::Map<T>&, int64_t, const T*, T*, Located<T>&, const T*,
                              const T*, bool, T*);

// The gradient of x; those of the raw parameters, if wanted, in place of them. grad_log: by the log-slope of the
// direction computed.
template <bool linear, bool soft, bool inverse, class T>
void backward_tile(const SplineShape& shape, const spline::Map<T>& map, int64_t whole, const T* x, T* raw,
                   Located<T>& at, const T* grad_y, const T* grad_log, bool need_params, T* grad_x) {
  locate<linear, soft>(shape, map, whole, x, raw, at);
  const int64_t bins = shape.bins;
  const T last = static_cast<T>(bins - 1);
  AxisGradient<T> width, height;
  Row<T> first, second;
#pragma omp simd
  for (int64_t i = 0; i < whole; ++i) {
    const spline::Bin<T> bin = bin_of<linear, soft>(map, at, last, i);
    const T value = at.value.values[i];
    const bool outside = at.outside.values[i] != T(0);
    const T incoming = outside ? T(0) : grad_y[i], of_log = inverse ? -grad_log[i] : grad_log[i];
    const T log = outside ? T(0) : of_log;
    spline::BinGradient<T> g;
    if constexpr (linear) {
      const T theta = inverse ? (value - bin.bottom) / bin.height : (value - bin.left) / bin.width;
      g = spline::linear_gradient<inverse>(bin, theta, incoming, log);
    } else {
      const spline::Point<T> p = inverse ? spline::point_of_y(bin, value) : spline::point_of_x(bin, value);
      g = spline::rational_quadratic_gradient<inverse>(bin, p, incoming, log);
      const T number = at.number.values[i];
      const T d0 = g.d0 * spline::derivative_slope<soft>(at.raw_first.values[i], map);
      const T d1 = g.d1 * spline::derivative_slope<soft>(at.raw_second.values[i], map);
      first.values[i] = number == T(0) ? T(0) : d0;
      second.values[i] = number == last ? T(0) : d1;
      width.start.values[i] = g.left;
      width.size.values[i] = g.width;
    }
    height.start.values[i] = g.bottom;
    height.size.values[i] = g.height;
    grad_x[i] = outside ? grad_y[i] : g.operand;
  }
  if (!need_params) return;
  if constexpr (linear) {
    size_gradients<soft>(map, map.height_span, bins, whole, at.number, at.heights, at.height, height, raw);
  } else {
    size_gradients<soft>(map, map.width_span, bins, whole, at.number, at.widths, at.width, width, raw);
    size_gradients<soft>(map, map.height_span, bins, whole, at.number, at.heights, at.height, height,
                         raw + bins * tile);
    for (int64_t k = 0; k < bins - 1; ++k) {
      T* row = raw + (2 * bins + k) * tile;
      const T left = static_cast<T>(k + 1), right = static_cast<T>(k);
#pragma omp simd
      for (int64_t i = 0; i < whole; ++i) {
        const T of_first = at.number.values[i] == left ? first.values[i] : T(0);
        row[i] = at.number.values[i] == right ? second.values[i] : of_first;
      }
    }
  }
}

}  // namespace
}  // namespace fastflow::FASTFLOW_ISA
