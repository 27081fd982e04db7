// Matrix products on the CPU.
#pragma once

#include "../fastflow.h"

namespace fastflow {

// A B, contiguous, of two matrices of one dtype, float or double, and any strides; plus a contiguous bias, (columns of
// B,), and no less than 0 with relu, where they are wanted.
Tensor product(const Tensor& a, const Tensor& b, const Tensor* bias = nullptr, bool relu = false);

}  // namespace fastflow
