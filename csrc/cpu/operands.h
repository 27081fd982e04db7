// From tensors to the operands of the CPU kernels. For host code.
#pragma once

#include "../fastflow.h"
#include "conv_image.h"
#include "operand.h"

namespace fastflow {

inline Element element_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half: return Element::float16;
    case ScalarType::BFloat16: return Element::bfloat16;
    case ScalarType::Float: return Element::float32;
    default: return Element::float64;
  }
}

inline int64_t bytes_of(const Tensor& t) { return t.numel() * static_cast<int64_t>(t.element_size()); }

// An operand without dimensions yet, its first element `skipped` elements into t.
inline Operand operand_at(const Tensor& t, int64_t skipped) {
  Operand result;
  result.element = element_of(t.scalar_type());
  result.data = static_cast<char*>(t.data_ptr()) + skipped * static_cast<int64_t>(t.element_size());
  return result;
}

// Adds an innermost dimension, merged with the one outside it where the strides allow. False if there is no room.
inline bool append_dimension(Operand& operand, int64_t size, int64_t stride) {
  if (size == 1) return true;
  const int last = operand.rank - 1;
  if (last >= 0 && operand.stride[last] == stride * size) {
    operand.size[last] *= size;
    operand.stride[last] = stride;
    return true;
  }
  if (operand.rank == Operand::max_rank) return false;
  operand.size[operand.rank] = size;
  operand.stride[operand.rank++] = stride;
  return true;
}

inline Image image_of(const Tensor& t) {
  const Dims strides = strides_of(t);
  return {t.data_ptr(), strides[0], strides[1], strides[2], strides[3]};
}

}  // namespace fastflow
