// The affine coupling of one feature of many samples, forward and backward. For mlp_flow_kernel.cpp alone.
#pragma once

#include "affine_coupling_kernel.h"
#include "scale_choice.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

constexpr int64_t samples = 64;  // of a tile

template <class T>
using Row = T (&)[samples];

// s and log s of n raw values.
template <class T>
using ScaleRow = void (*)(const ScaleMap<T>&, int64_t, const T*, Row<T>, Row<T>);

template <Kind K, bool Extended, class T>
void scale_row(const ScaleMap<T>& constants, int64_t n, const T* raw, Row<T> s, Row<T> log_s) {
  const ScaleMap<T> map = constants;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Scale<T> scale = scale_of<K, Extended, Extended, !Extended>(map, K == Kind::additive ? T(0) : raw[i]);
    s[i] = scale.s;
    log_s[i] = scale.log_s;
  }
}

// y of n elements.
template <class T>
using CoupleRow = void (*)(const ScaleMap<T>&, int64_t, const T*, const T*, Row<T>, T*);

template <bool Inverse, bool ShiftFirst, class T>
void couple_row(const ScaleMap<T>& constants, int64_t n, const T* x, const T* shift, Row<T> s, T* y) {
  const ScaleMap<T> map = constants;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = coupled(map, s[i], x[i], shift[i], Inverse, ShiftFirst);
}

// s, ds/dr and d(log s)/dr of n raw values; inside is 0 where hard bounds let no gradient through.
template <class T>
struct SlopeRows {
  alignas(64) T s[samples], ds[samples], dlog[samples], inside[samples];
};

template <class T>
using SlopeRow = void (*)(const ScaleMap<T>&, int64_t, const T*, SlopeRows<T>&);

template <Kind K, bool Extended, class T>
void slope_row(const ScaleMap<T>& constants, int64_t n, const T* raw, SlopeRows<T>& to) {
  const ScaleMap<T> map = constants;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const ScaleSlope<T> slope = scale_slope<K, Extended, Extended, !Extended>(map, K == Kind::additive ? T(0) : raw[i]);
    to.s[i] = slope.s;
    to.ds[i] = slope.ds;
    to.dlog[i] = slope.dlog;
    to.inside[i] = slope.inside ? T(1) : T(0);
  }
}

// Gradients of n elements: grad is that of y and becomes that of x.
template <class T>
using GradientRow = void (*)(const ScaleMap<T>&, int64_t, const SlopeRows<T>&, const T*, const T*, const T*, T*, T*, T*);

template <bool Inverse, bool ShiftFirst, bool Separate, class T>
void gradient_row(const ScaleMap<T>& constants, int64_t n, const SlopeRows<T>& slope, const T* x, const T* shift,
                  const T* grad_logdet, T* grad, T* to_raw, T* to_shift) {
  const ScaleMap<T> map = constants;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    // Not a variable of its own, which gcc would keep in memory instead of making a loop of vectors.
    const CoupledGradient<T> out =
        coupled_gradient(map, ScaleSlope<T>{slope.s[i], slope.ds[i], slope.dlog[i], slope.inside[i] != T(0)}, grad[i],
                         grad_logdet[i], x[i], shift[i], Inverse, ShiftFirst, Separate);
    grad[i] = out.x;
    to_raw[i] = out.raw;
    to_shift[i] = out.shift;
  }
}

// The functions of a step's map and direction.
template <class T>
struct CouplingRows {
  ScaleMap<T> map;
  bool additive;
  ScaleRow<T> scale;
  SlopeRow<T> slope;
  CoupleRow<T> couple;
  GradientRow<T> gradient;
};

template <class T>
CouplingRows<T> coupling_rows(const AffineMap& m, bool inverse, bool shift_first) {
  CouplingRows<T> rows{constants_of<T>(m), static_cast<Kind>(m.kind) == Kind::additive};
  with_map<T>(m, [&](auto kind, auto extended) {
    constexpr Kind K = decltype(kind)::value;
    constexpr bool Extended = decltype(extended)::value;
    rows.scale = scale_row<K, Extended, T>;
    rows.slope = slope_row<K, Extended, T>;
    with_flag(inverse, [&](auto inverse) {
      with_flag(shift_first, [&](auto first) {
        constexpr bool Inverse = decltype(inverse)::value, First = decltype(first)::value;
        rows.couple = couple_row<Inverse, First, T>;
        rows.gradient = separate_slopes<K, Extended> ? gradient_row<Inverse, First, true, T>
                                                     : gradient_row<Inverse, First, false, T>;
      });
    });
  });
  return rows;
}

}  // namespace
}  // namespace fastflow::FASTFLOW_ISA
