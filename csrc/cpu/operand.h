// A strided operand as the CPU kernels see it: plain data, shared by host code and kernels.
#pragma once

#include <cstdint>

#include "element.h"

namespace fastflow {

// Dimensions outermost first in the order of traversal, adjacent ones merged where the strides allow; strides count
// elements. A null `data` stands for an operand that is absent.
struct Operand {
  static constexpr int max_rank = 8;
  void* data = nullptr;
  Element element = Element::float32;
  int rank = 0;
  int64_t size[max_rank];
  int64_t stride[max_rank];
};

}  // namespace fastflow
