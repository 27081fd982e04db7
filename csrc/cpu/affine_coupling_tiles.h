// The arithmetic of affine_coupling over tiles of contiguous elements. For affine_coupling_kernel.cpp alone.
#pragma once

#include "floats.h"
#include "../common/scale_map.h"
#include "affine_coupling_kernel.h"
#include "stream.h"
#include "tanh_table.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

constexpr int64_t tile = AffineShape::tile;
constexpr int lanes = 16;

template <class T>
struct alignas(64) Tile {
  T values[tile];
};

template <class T>
T add_tree(T* values, int n) {
  for (int width = n / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) values[i] += values[i + width];
  return values[0];
}

// Sum of n <= tile values: 32 running sums, whatever the width of the vectors, then a tree.
template <class T>
T sum_tile(const T* values, int64_t n) {
  if (n < lanes) {
    T sum = values[0];
    for (int64_t i = 1; i < n; ++i) sum += values[i];
    return sum;
  }
  alignas(64) T sums[2 * lanes] = {};
  typedef T Vector __attribute__((vector_size(lanes * sizeof(T))));
  Vector low = {}, high = {};
  int64_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    Vector a, b;
    __builtin_memcpy(&a, values + i, sizeof a);
    __builtin_memcpy(&b, values + i + lanes, sizeof b);
    low += a;
    high += b;
  }
  __builtin_memcpy(sums, &low, sizeof low);
  __builtin_memcpy(sums + lanes, &high, sizeof high);
  for (int j = 0; i < n; ++i, ++j) sums[j] += values[i];
  return add_tree(sums, 2 * lanes);
}

// A soft-clamped log s apart from its exp, a step ahead: in one loop they make a chain of arithmetic so long that a
// processor sees too few elements at once (15 % slower).
template <Kind K, bool Extended>
inline constexpr bool two_passes = soft_clamped<K> && !Extended;

#if defined(__AVX512F__)
template <Kind K, class T>
inline constexpr bool by_table = K == Kind::tanh && sizeof(T) == 4;

// each(i, mask, tanh(u)) for every vector of n raw values: those of `mask` are elements i and up.
template <class F>
FASTFLOW_HD void each_tanh(const ScaleMap<float>& map, int64_t n, const float* raw, const F& each) {
  const TableTanh tanh;
  const __m512 gain = _mm512_set1_ps(map.gain), offset = _mm512_set1_ps(map.offset);
  for (int64_t i = 0; i < n; i += lanes) {
    const __mmask16 mask = static_cast<__mmask16>(n - i < lanes ? (1 << (n - i)) - 1 : -1);
    each(i, mask, tanh(_mm512_fmadd_ps(gain, _mm512_maskz_loadu_ps(mask, raw + i), offset)));
  }
}
#else
template <Kind K, class T>
inline constexpr bool by_table = false;
#endif

// log s of n soft-clamped raw values, and with its derivatives.
template <Kind K, class T>
FASTFLOW_HD void soft_clamp_run(const ScaleMap<T>& map, int64_t n, const T* raw, T* log_s) {
  if constexpr (by_table<K, T>) {
    each_tanh(map, n, raw, [&](int64_t i, auto mask, auto value) {
      _mm512_mask_storeu_ps(log_s + i, mask, map.amplitude * value);
    });
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) log_s[i] = soft_clamp<K>(map, raw[i]);
  }
}

template <Kind K, class T>
FASTFLOW_HD void soft_clamp_slope_run(const ScaleMap<T>& map, int64_t n, const T* raw, T* log_s, T* dlog) {
  if constexpr (by_table<K, T>) {
    const T steepest = map.amplitude * map.gain;
    each_tanh(map, n, raw, [&](int64_t i, auto mask, auto value) {
      _mm512_mask_storeu_ps(log_s + i, mask, map.amplitude * value);
      _mm512_mask_storeu_ps(dlog + i, mask, steepest * (T(1) - value * value));
    });
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const LogSlope<T> slope = soft_clamp_slope<K>(map, raw[i]);
      log_s[i] = slope.log_s;
      dlog[i] = slope.dlog;
    }
  }
}

template <class T>
using ForwardTile = void (*)(const ScaleMap<T>&, int64_t, const T*, const T*, const T*, T*, T*);

// Streamed, below: the results are not to be held by any cache, so that reading what they overwrite is spared. They go
// past the caches from short buffers, within the arithmetic, whose time the stores then share. For whole steps.
constexpr int64_t step = 4 * lanes;

// Asks for the line at element i of the next tile, should that follow this one in memory.
template <class... T>
FASTFLOW_HD void prefetch_line(int64_t i, const T*... operands) {
  (__builtin_prefetch(operands + i + tile), ...);
}

// The kinds whose loops run in Floats.
template <Kind K, bool Extended, class T>
inline constexpr bool by_floats = (K == Kind::exp || K == Kind::sigmoid) && !Extended && has_floats<T>;

#if defined(__AVX512F__)
FASTFLOW_HD ScaleMap<Floats> in_floats(const ScaleMap<float>& map) {
  return {map.gain,     map.offset,   map.amplitude, map.log_amplitude, map.inverse_clamp, map.eps, map.log_eps,
          map.hard_min, map.hard_max, map.log_min,   map.log_max,       map.shift_gain};
}

template <bool Streamed, class Part>
FASTFLOW_HD void put(const Part& part, float* to, Floats values) {
  if constexpr (Streamed)
    _mm512_stream_ps(to, values.v);
  else
    part.store(to, values);
}

template <Kind K, bool Inverse, bool ShiftFirst, bool Streamed>
FASTFLOW_HD void forward_floats(const ScaleMap<float>& constants, int64_t n, const float* x, const float* raw,
                                const float* shift, float* y, float* log_s) {
  const ScaleMap<Floats> map = in_floats(constants);
  each_vector(n, [&](int64_t i, auto part) __attribute__((always_inline)) {
    if constexpr (Streamed) prefetch_line(i, x, raw, shift);
    const Coupled<Floats> out = couple<K, false, false, Inverse, ShiftFirst>(map, part.load(x + i), part.load(raw + i),
                                                                             part.load(shift + i));
    put<Streamed>(part, y + i, out.y);
    part.store(log_s + i, out.log_s);
  });
}

template <Kind K, bool Inverse, bool ShiftFirst, bool Streamed>
FASTFLOW_HD void backward_floats(const ScaleMap<float>& constants, int64_t n, const float* grad_y,
                                 const float* grad_logdet, const float* x, const float* raw, const float* shift,
                                 float* grad_x, float* grad_raw, float* grad_shift) {
  const ScaleMap<Floats> map = in_floats(constants);
  each_vector(n, [&](int64_t i, auto part) __attribute__((always_inline)) {
    if constexpr (Streamed) prefetch_line(i, x, raw, grad_y);
    const Floats t = gradient_reads_shift<Inverse, ShiftFirst> ? part.load(shift + i) : Floats(0);
    const CoupledGradient<Floats> out = couple_gradient<K, false, false, Inverse, ShiftFirst>(
        map, part.load(grad_y + i), part.load(grad_logdet + i), part.load(x + i), part.load(raw + i), t);
    put<Streamed>(part, grad_x + i, out.x);
    put<Streamed>(part, grad_raw + i, out.raw);
    put<Streamed>(part, grad_shift + i, out.shift);
  });
}
#endif

template <Kind K, bool Extended, bool Inverse, bool ShiftFirst, bool Streamed, class T>
void forward_tile(const ScaleMap<T>& constants, int64_t n, const T* x, const T* raw, const T* shift, T* y, T* log_s) {
  if constexpr (by_floats<K, Extended, T>)
    return forward_floats<K, Inverse, ShiftFirst, Streamed>(constants, n, x, raw, shift, y, log_s);
  constexpr bool apart = two_passes<K, Extended>;
  const ScaleMap<T> map = constants;
  alignas(64) T to_y[step];
  const int64_t length = apart || Streamed ? step : n;
  for (int64_t i = 0; i < n; i += length) {
    const int64_t count = Streamed ? step : n - i < length ? n - i : length;
    if constexpr (Streamed)
      for (int64_t j = 0; j < step; j += lanes) prefetch_line(i + j, x, raw, shift);
    if constexpr (apart) soft_clamp_run<K>(map, count, raw + i, log_s + i);
    T* const at_y = Streamed ? to_y : y + i;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      if constexpr (apart) {
        at_y[j] = coupled(map, math::exp_moderate(log_s[i + j]), x[i + j], shift[i + j], Inverse, ShiftFirst);
      } else {
        const T r = K == Kind::additive ? T(0) : raw[i + j];
        const Coupled<T> out =
            couple<K, Extended, Extended, Inverse, ShiftFirst, !Extended>(map, x[i + j], r, shift[i + j]);
        at_y[j] = out.y;
        log_s[i + j] = out.log_s;
      }
    }
    if constexpr (Streamed) stream(y + i, to_y, step);
  }
}

// Returns the sum of log s instead of the terms.
template <class T>
using SummedTile = T (*)(const ScaleMap<T>&, int64_t, const T*, const T*, const T*, T*);

// y of one element. With w = exp(-abs(u)), log s is u - log(1 + w) below zero and -log(1 + w) above: u is added to
// `linear`, and 1 + w multiplied into 1 + `product`, which keeps the relative accuracy of small w.
template <bool Inverse, bool ShiftFirst, class T>
FASTFLOW_HD T sigmoid_at(const ScaleMap<T>& map, T x, T raw, T shift, T& linear, T& product) {
  const T u = math::fma(map.gain, raw, map.offset), w = math::exp_decay(u);
  // The selects side by side: apart, a compiler branches between them instead of making a loop of vectors.
  const auto negative = u < T(0);
  const T numerator = math::select(negative, w, T(1)), below = math::select(negative, u, T(0));
  const T s = map.amplitude * (numerator / (T(1) + w));
  linear = linear + (below + map.log_amplitude);
  product = product + math::fma(product, w, w);
  return coupled(map, s, x, shift, Inverse, ShiftFirst);
}

#if defined(__AVX512F__)
template <bool Inverse, bool ShiftFirst>
FASTFLOW_HD void sigmoid_floats(const ScaleMap<float>& constants, int64_t n, const float* x, const float* raw,
                                const float* shift, float* y, float* linear, float* product) {
  const ScaleMap<Floats> map = in_floats(constants);
  each_vector(n, [&](int64_t i, auto part) __attribute__((always_inline)) {
    Floats sum = part.load(linear + i), less_one = part.load(product + i);
    part.store(y + i, sigmoid_at<Inverse, ShiftFirst>(map, part.load(x + i), part.load(raw + i), part.load(shift + i),
                                                      sum, less_one));
    part.store(linear + i, sum);
    part.store(product + i, less_one);
  });
}
#endif

// Eight elements share a product and its log1p.
template <bool Inverse, bool ShiftFirst, bool Streamed, class T>
T sigmoid_tile(const ScaleMap<T>& constants, int64_t n, const T* x, const T* raw, const T* shift, T* y) {
  constexpr int64_t width = 2 * lanes, group = 8 * width;
  const ScaleMap<T> map = constants;
  alignas(64) T sums[width] = {}, rest[group], to_y[width];
  int64_t i = 0;
  for (; i + group <= n; i += group) {
    alignas(64) T linear[width] = {}, product[width] = {};
    for (int64_t at = i; at < i + group; at += width) {
      if constexpr (Streamed)
        for (int64_t j = 0; j < width; j += lanes) prefetch_line(at + j, x, raw, shift);
      T* const at_y = Streamed ? to_y : y + at;
      if constexpr (by_floats<Kind::sigmoid, false, T>) {
        sigmoid_floats<Inverse, ShiftFirst>(map, width, x + at, raw + at, shift + at, at_y, linear, product);
      } else {
#pragma omp simd
        for (int64_t j = 0; j < width; ++j)
          at_y[j] = sigmoid_at<Inverse, ShiftFirst>(map, x[at + j], raw[at + j], shift[at + j], linear[j], product[j]);
      }
      if constexpr (Streamed) stream(y + at, to_y, width);
    }
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) sums[j] += linear[j] - math::log1p(product[j]);
  }
  T total = add_tree(sums, width);
  if (i < n) {
    forward_tile<Kind::sigmoid, false, Inverse, ShiftFirst, false>(constants, n - i, x + i, raw + i, shift + i, y + i,
                                                                   rest);
    total += sum_tile(rest, n - i);
  }
  return total;
}

template <class T>
using BackwardTile = void (*)(const ScaleMap<T>&, int64_t, const T*, const T*, const T*, const T*, const T*, T*, T*,
                              T*);

// The gradients of element i; log_s and dlog are read where they are computed apart.
template <Kind K, bool Extended, bool Inverse, bool ShiftFirst, class T>
FASTFLOW_HD CoupledGradient<T> gradient_at(const ScaleMap<T>& map, T log_s, T dlog, T grad_y, T grad_logdet, T x,
                                           const T* raw, const T* shift) {
  const T t = gradient_reads_shift<Inverse, ShiftFirst> ? *shift : T(0);
  if constexpr (two_passes<K, Extended>) {
    const T s = math::exp_moderate(log_s);
    return coupled_gradient(map, ScaleSlope<T>{s, s * dlog, dlog}, grad_y, grad_logdet, x, t, Inverse, ShiftFirst,
                            false);
  }
  const T r = K == Kind::additive ? T(0) : *raw;
  return couple_gradient<K, Extended, Extended, Inverse, ShiftFirst, !Extended>(map, grad_y, grad_logdet, x, r, t);
}

template <Kind K, bool Extended, bool Inverse, bool ShiftFirst, bool Streamed, class T>
void backward_tile(const ScaleMap<T>& constants, int64_t n, const T* grad_y, const T* grad_logdet, const T* x,
                   const T* raw, const T* shift, T* grad_x, T* grad_raw, T* grad_shift) {
  if constexpr (by_floats<K, Extended, T>)
    return backward_floats<K, Inverse, ShiftFirst, Streamed>(constants, n, grad_y, grad_logdet, x, raw, shift, grad_x,
                                                             grad_raw, grad_shift);
  constexpr bool apart = two_passes<K, Extended>;
  const ScaleMap<T> map = constants;
  alignas(64) T log_s[step], dlog[step], to_x[step], to_raw[step], to_shift[step];
  const int64_t length = apart || Streamed ? step : n;
  for (int64_t i = 0; i < n; i += length) {
    const int64_t count = Streamed ? step : n - i < length ? n - i : length;
    if constexpr (Streamed)
      for (int64_t j = 0; j < step; j += lanes) prefetch_line(i + j, x, raw, grad_y);
    if constexpr (apart) soft_clamp_slope_run<K>(map, count, raw + i, log_s, dlog);
    T *const at_x = Streamed ? to_x : grad_x + i, *const at_raw = Streamed ? to_raw : grad_raw + i,
             *const at_shift = Streamed ? to_shift : grad_shift + i;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      const CoupledGradient<T> out = gradient_at<K, Extended, Inverse, ShiftFirst>(
          map, apart ? log_s[j] : T(0), apart ? dlog[j] : T(0), grad_y[i + j], grad_logdet[i + j], x[i + j],
          raw + i + j, shift + i + j);
      at_x[j] = out.x;
      if (K != Kind::additive) at_raw[j] = out.raw;
      at_shift[j] = out.shift;
    }
    if constexpr (Streamed) {
      stream(grad_x + i, to_x, step);
      if (K != Kind::additive) stream(grad_raw + i, to_raw, step);
      stream(grad_shift + i, to_shift, step);
    }
  }
}

// Without a gradient in y only log s depends on the raw values, and x must not bring its infinities in.
template <class T>
using LogTile = void (*)(const ScaleMap<T>&, int64_t, bool, const T*, const T*, T*);

template <Kind K, bool Extended, class T>
void log_tile(const ScaleMap<T>& constants, int64_t n, bool inverse, const T* grad_logdet, const T* raw, T* grad_raw) {
  const ScaleMap<T> map = constants;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    grad_raw[i] = log_gradient(scale_slope<K, Extended, Extended, !Extended>(map, raw[i]), grad_logdet[i], inverse);
}

}  // namespace
}  // namespace fastflow::FASTFLOW_ISA
