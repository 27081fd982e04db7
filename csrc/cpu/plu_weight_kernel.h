// What the host code and the per-instruction-set code of plu_weight agree on.
#pragma once

#include <cstdint>

#include "each_isa.h"

namespace fastflow {

// Where the parts of one matrix W = P L U lie, strides in elements, all of one type.
struct PluMatrix {
  const void *lower, *upper, *log_s, *sign_s;
  const int64_t* perm;
  int64_t n, lower_strides[2], upper_strides[2], log_s_stride, sign_s_stride, perm_stride;
  void* scratch;  // plu_weight_scratch(n) bytes, aligned to 64
};

struct PluGradients {
  const void* weight;  // the gradient that came
  int64_t weight_strides[2];
  void *lower, *upper, *log_s;  // the gradients that go, contiguous
};

FASTFLOW_EACH_ISA(
    int64_t plu_weight_scratch(int64_t n);
    void plu_weight_forward(const PluMatrix& parts, void* weight, bool is_double);
    void plu_weight_backward(const PluMatrix& parts, const PluGradients& gradients, bool is_double);)

}  // namespace fastflow
