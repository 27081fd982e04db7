// Between elements whose numbers lie side by side and rows of one number each. For *_kernel.cpp alone.
#pragma once

#include "vectors.h"

namespace fastflow::FASTFLOW_ISA {

// to[j * to_stride + i] = from[i * from_stride + j] for i < n and j < count; n and count at least Simd<T>::lanes. Blocks
// at the ends overlap those before.
template <class T>
static inline void transpose_rows(const T* from, int64_t from_stride, int64_t n, int64_t count, T* to,
                                  int64_t to_stride) {
  constexpr int W = Simd<T>::lanes;
  for (int64_t row = 0; row < n; row += W) {
    const int64_t i = row + W < n ? row : n - W;
    for (int64_t at = 0; at < count; at += W) {
      const int64_t j = at + W < count ? at : count - W;
      Vec<T> v[W];
      for (int l = 0; l < W; ++l) v[l] = load(from + (i + l) * from_stride + j);
      transpose<T>(v);
      for (int l = 0; l < W; ++l) store(to + (j + l) * to_stride + i, v[l]);
    }
  }
}

}  // namespace fastflow::FASTFLOW_ISA
