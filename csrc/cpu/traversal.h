// Tensors (B, C, *S) as operands in one order of traversal. For host code.
#pragma once

#include "../fastflow.h"
#include "operands.h"
#include "runtime.h"

#include <vector>

namespace fastflow {

inline Tensor result_like(const Dims& sizes, const Tensor& like, ScalarType dtype) {
  Tensor result = empty_strided(sizes, strides_like(sizes, like), dtype, like);
  advise_huge_pages(result.data_ptr(), bytes_of(result));
  return result;
}

// The order of traversal is y's order in memory, which x suggests.
class Operands {
 public:
  explicit Operands(const Tensor& x) : channels_last_(suggests_channels_last(sizes_of(x), strides_of(x))) {}

  Operand of(const Tensor& t, Channels channels = {}) {
    Operand result;
    if (!describe(t, channels, result)) {
      kept_.push_back(torch::stable::contiguous(t));
      describe(kept_.back(), channels, result);
    }
    return result;
  }

 private:
  // False if the strides leave more dimensions than a kernel takes.
  bool describe(const Tensor& t, Channels channels, Operand& out) const {
    const auto sizes = t.sizes();
    const auto strides = t.strides();
    const size_t rank = sizes.size();
    out = operand_at(t, rank > 1 ? channels.first * strides[1] : 0);
    for (size_t i = 0; i < rank; ++i) {
      const size_t d = !channels_last_ || i == 0 ? i : i == rank - 1 ? 1 : i + 1;
      const bool sliced = d == 1 && channels.count >= 0;
      if (!append_dimension(out, sliced ? channels.count : sizes[d], strides[d] * (sliced ? channels.step : 1)))
        return false;
    }
    return true;
  }

  bool channels_last_;
  std::vector<Tensor> kept_;
};

}  // namespace fastflow
