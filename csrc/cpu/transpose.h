// Between elements whose numbers lie side by side and rows of one number each. For *_kernel.cpp alone.
#pragma once

#include "vectors.h"

namespace fastflow::FASTFLOW_ISA {

// Transposes the square matrix of Simd<T>::lanes vectors by swapping blocks off its diagonal, halves first.
template <class T, int Half = Simd<T>::lanes / 2>
static inline void transpose(Vec<T>* v) {
  constexpr int W = Simd<T>::lanes;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & Half) continue;
    const Vec<T> top = v[i], bottom = v[i + Half];
    v[i] = shuffle<T>(top, bottom, [](int l) { return l & Half ? W + l - Half : l; });
    v[i + Half] = shuffle<T>(top, bottom, [](int l) { return l & Half ? W + l : l + Half; });
  }
  if constexpr (Half > 1) transpose<T, Half / 2>(v);
}

// rows[j * row_stride + i] = elements[i * stride + j] for i < n and j < count; n and count at least Simd<T>::lanes.
// Blocks at the ends overlap those before.
template <class T>
static inline void elements_to_rows(const T* elements, int64_t stride, int64_t n, int64_t count, T* rows,
                                    int64_t row_stride) {
  constexpr int W = Simd<T>::lanes;
  for (int64_t from = 0; from < n; from += W) {
    const int64_t i = from + W < n ? from : n - W;
    for (int64_t at = 0; at < count; at += W) {
      const int64_t j = at + W < count ? at : count - W;
      Vec<T> v[W];
      for (int l = 0; l < W; ++l) v[l] = load(elements + (i + l) * stride + j);
      transpose<T>(v);
      for (int l = 0; l < W; ++l) store(rows + (j + l) * row_stride + i, v[l]);
    }
  }
}

// The way back.
template <class T>
static inline void rows_to_elements(const T* rows, int64_t row_stride, int64_t n, int64_t count, T* elements,
                                    int64_t stride) {
  constexpr int W = Simd<T>::lanes;
  for (int64_t from = 0; from < n; from += W) {
    const int64_t i = from + W < n ? from : n - W;
    for (int64_t at = 0; at < count; at += W) {
      const int64_t j = at + W < count ? at : count - W;
      Vec<T> v[W];
      for (int l = 0; l < W; ++l) v[l] = load(rows + (j + l) * row_stride + i);
      transpose<T>(v);
      for (int l = 0; l < W; ++l) store(elements + (i + l) * stride + j, v[l]);
    }
  }
}

}  // namespace fastflow::FASTFLOW_ISA
