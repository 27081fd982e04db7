// silu(x) = x sigmoid(x), the activation of several kernels.
#pragma once

#include "floats.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

// Of n elements, y may be x; slopes may be null.
template <class T>
void silu(int64_t n, const T* x, T* y, T* slopes) {
  if (slopes == nullptr) {
    each_element<has_floats<T>>(n, [&](int64_t i, auto part) __attribute__((always_inline)) {
      const auto value = part.load(x + i);
      part.store(y + i, value * math::sigmoid(value));
    });
    return;
  }
  each_element<has_floats<T>>(n, [&](int64_t i, auto part) __attribute__((always_inline)) {
    const auto value = part.load(x + i), s = math::sigmoid(value), result = value * s;
    part.store(slopes + i, math::fma(result, decltype(s)(1) - s, s));
    part.store(y + i, result);
  });
}

}  // namespace
}  // namespace fastflow::FASTFLOW_ISA
