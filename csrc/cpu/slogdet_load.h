// Reading and writing the matrices of a SlogdetBatch, one element at a time, with the types converted on the way.
#pragma once

#include "../common/math.h"
#include "slogdet_kernel.h"

namespace fastflow::FASTFLOW_ISA {

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

static inline float to_float(float x) { return x; }
static inline double to_float(double x) { return x; }
static inline float to_float(Bfloat16 x) { return math::from_bits(static_cast<uint32_t>(x.bits) << 16); }
static inline float to_float(Half x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  // The product moves the exponent's bias and is exact for subnormals too; Inf and NaN need the exponent of all ones.
  const uint32_t finite = math::to_bits(math::from_bits(magnitude) * 0x1p112f);
  const uint32_t value = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite;
  return math::from_bits(value | static_cast<uint32_t>(x.bits & 0x8000) << 16);
}

// Calls f with a null pointer of the storage type of a batch's matrices.
template <class F>
static inline void with_type(MatrixType type, const F& f) {
  switch (type) {
    case MatrixType::half: return f(static_cast<const Half*>(nullptr));
    case MatrixType::bfloat16: return f(static_cast<const Bfloat16*>(nullptr));
    case MatrixType::float32: return f(static_cast<const float*>(nullptr));
    case MatrixType::float64: return f(static_cast<const double*>(nullptr));
  }
}

// The three answers that a matrix with a NaN, or with an exactly zero pivot, must give are decided here.
template <class Out>
static inline void write_result(const SlogdetBatch& batch, int64_t b, double sign, double logabsdet, bool nan) {
  const double bad = math::quiet_nan<double>();
  static_cast<Out*>(batch.sign)[b] = static_cast<Out>(nan ? bad : sign);
  static_cast<Out*>(batch.logabsdet)[b] =
      static_cast<Out>(nan ? bad : sign == 0.0 ? -math::infinity<double>() : logabsdet);
}

}  // namespace fastflow::FASTFLOW_ISA
