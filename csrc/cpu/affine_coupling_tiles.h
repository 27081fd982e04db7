// The arithmetic of affine_coupling over tiles of contiguous elements. For affine_coupling_kernel.cpp alone.
#pragma once

#include "../common/scale_map.h"
#include "affine_coupling_kernel.h"
#include "stream.h"

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

// A soft-clamped log s apart from its exp: in one loop they make a chain of arithmetic so long that a processor sees too
// few elements at once (10 to 15 % slower).
template <Kind K, bool Extended>
inline constexpr bool two_passes = soft_clamped<K> && !Extended;

template <class T>
using ForwardTile = void (*)(const ScaleMap<T>&, int64_t, const T*, const T*, const T*, T*, T*);

// y and log s of element i of a tile; the latter is there already where it is computed apart.
template <Kind K, bool Extended, bool Inverse, bool ShiftFirst, class T>
FASTFLOW_HD Coupled<T> couple_at(const ScaleMap<T>& map, int64_t i, const T* x, const T* raw, const T* shift,
                                 const T* log_s) {
  if constexpr (two_passes<K, Extended>)
    return {coupled(map, math::exp_moderate(log_s[i]), x[i], shift[i], Inverse, ShiftFirst), log_s[i]};
  const T r = K == Kind::additive ? T(0) : raw[i];
  return couple<K, Extended, Extended, Inverse, ShiftFirst, !Extended>(map, x[i], r, shift[i]);
}

// Streamed: y is not to be held by any cache, so that reading what it overwrites is spared: it goes past them from short
// buffers, within the arithmetic, whose time the stores then share. For whole steps.
constexpr int64_t stream_step = 4 * lanes;

template <Kind K, bool Extended, bool Inverse, bool ShiftFirst, bool Streamed, class T>
void forward_tile(const ScaleMap<T>& constants, int64_t n, const T* x, const T* raw, const T* shift, T* y, T* log_s) {
  const ScaleMap<T> map = constants;
  if constexpr (!Streamed) {
    if constexpr (two_passes<K, Extended>) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) log_s[i] = soft_clamp<K>(map, raw[i]);
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const Coupled<T> out = couple_at<K, Extended, Inverse, ShiftFirst>(map, i, x, raw, shift, log_s);
      y[i] = out.y;
      log_s[i] = out.log_s;
    }
  } else {
    for (int64_t i = 0; i < n; i += stream_step) {
      for (int64_t j = 0; j < stream_step; j += lanes) {  // of the next tile, if it follows in memory
        __builtin_prefetch(x + i + j + tile);
        if (K != Kind::additive) __builtin_prefetch(raw + i + j + tile);
        __builtin_prefetch(shift + i + j + tile);
      }
      alignas(64) T to_y[stream_step];
      if constexpr (two_passes<K, Extended>) {
#pragma omp simd
        for (int64_t j = 0; j < stream_step; ++j) log_s[i + j] = soft_clamp<K>(map, raw[i + j]);
      }
#pragma omp simd
      for (int64_t j = 0; j < stream_step; ++j) {
        const Coupled<T> out = couple_at<K, Extended, Inverse, ShiftFirst>(map, i + j, x, raw, shift, log_s);
        to_y[j] = out.y;
        log_s[i + j] = out.log_s;
      }
      stream(y + i, to_y, stream_step);
    }
  }
}

template <class T>
using BackwardTile = void (*)(const ScaleMap<T>&, int64_t, const T*, const T*, const T*, const T*, const T*, T*, T*,
                              T*);

// Slopes of log s for a tile, where they are computed apart.
template <class T>
struct Slopes {
  Tile<T> log_s, dlog;

  template <Kind K, bool Extended>
  void compute(const ScaleMap<T>& map, int64_t n, const T* raw) {
    if constexpr (two_passes<K, Extended>) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const LogSlope<T> slope = soft_clamp_slope<K>(map, raw[i]);
        log_s.values[i] = slope.log_s;
        dlog.values[i] = slope.dlog;
      }
    }
  }
};

// The gradients of element i of a tile.
template <Kind K, bool Extended, bool Inverse, bool ShiftFirst, class T>
FASTFLOW_HD CoupledGradient<T> gradient_at(const ScaleMap<T>& map, const T* log_s, const T* dlog, int64_t i,
                                           const T* grad_y, const T* grad_logdet, const T* x, const T* raw,
                                           const T* shift) {
  const T t = gradient_reads_shift<Inverse, ShiftFirst> ? shift[i] : T(0);
  if constexpr (two_passes<K, Extended>) {
    const T s = math::exp_moderate(log_s[i]);
    return coupled_gradient(map, ScaleSlope<T>{s, s * dlog[i], dlog[i]}, grad_y[i], grad_logdet[i], x[i], t, Inverse,
                            ShiftFirst, false);
  }
  const T r = K == Kind::additive ? T(0) : raw[i];
  return couple_gradient<K, Extended, Extended, Inverse, ShiftFirst, !Extended>(map, grad_y[i], grad_logdet[i], x[i], r,
                                                                                t);
}

template <Kind K, bool Extended, bool Inverse, bool ShiftFirst, bool Streamed, class T>
void backward_tile(const ScaleMap<T>& constants, int64_t n, const T* grad_y, const T* grad_logdet, const T* x,
                   const T* raw, const T* shift, T* grad_x, T* grad_raw, T* grad_shift) {
  const ScaleMap<T> map = constants;
  Slopes<T> slopes;
  slopes.template compute<K, Extended>(map, n, raw);
  if constexpr (!Streamed) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const CoupledGradient<T> out = gradient_at<K, Extended, Inverse, ShiftFirst>(
          map, slopes.log_s.values, slopes.dlog.values, i, grad_y, grad_logdet, x, raw, shift);
      grad_x[i] = out.x;
      if (K != Kind::additive) grad_raw[i] = out.raw;
      grad_shift[i] = out.shift;
    }
  } else {
    for (int64_t i = 0; i < n; i += stream_step) {
      for (int64_t j = 0; j < stream_step; j += lanes) {  // of the next tile, if it follows in memory
        __builtin_prefetch(x + i + j + tile);
        __builtin_prefetch(raw + i + j + tile);
        __builtin_prefetch(grad_y + i + j + tile);
      }
      alignas(64) T to_x[stream_step], to_raw[stream_step], to_shift[stream_step];
#pragma omp simd
      for (int64_t j = 0; j < stream_step; ++j) {
        const CoupledGradient<T> out = gradient_at<K, Extended, Inverse, ShiftFirst>(
            map, slopes.log_s.values, slopes.dlog.values, i + j, grad_y, grad_logdet, x, raw, shift);
        to_x[j] = out.x;
        to_raw[j] = out.raw;
        to_shift[j] = out.shift;
      }
      stream(grad_x + i, to_x, stream_step);
      if (K != Kind::additive) stream(grad_raw + i, to_raw, stream_step);
      stream(grad_shift + i, to_shift, stream_step);
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
