// Writing the determinants of a SlogdetBatch.
#pragma once

#include "../common/math.h"
#include "slogdet_kernel.h"
#include "storage.h"

namespace fastflow::FASTFLOW_ISA {

// The three answers that a matrix with a NaN, or with an exactly zero pivot, must give are decided here.
template <class Out>
static inline void write_result(const SlogdetBatch& batch, int64_t b, double sign, double logabsdet, bool nan) {
  const double bad = math::quiet_nan<double>();
  static_cast<Out*>(batch.sign)[b] = static_cast<Out>(nan ? bad : sign);
  static_cast<Out*>(batch.logabsdet)[b] =
      static_cast<Out>(nan ? bad : sign == 0.0 ? -math::infinity<double>() : logabsdet);
}

}  // namespace fastflow::FASTFLOW_ISA
