// What the host code and the per-instruction-set code of slogdet agree on.
#pragma once

#include <cstdint>

#include "each_isa.h"
#include "element.h"

namespace fastflow {

// Up to here matrices are factorised in double, whatever their type (reference.FLOAT64_UP_TO).
constexpr int64_t float64_up_to = 48;

// `count` matrices of size n x n, matrix b starting at element offset[b] of weight.
struct SlogdetBatch {
  const void* weight;
  Element type;
  const int64_t* offset;
  int64_t count, n, row_stride, column_stride;
  void *sign, *logabsdet;  // of the computing type: double for float64, else float
  void* inverse;           // likewise, contiguous; null if not wanted
  void* scratch;           // slogdet_scratch(n) bytes, aligned to 64
};

FASTFLOW_EACH_ISA(void slogdet(const SlogdetBatch& batch); int64_t slogdet_scratch(int64_t n);)

}  // namespace fastflow
