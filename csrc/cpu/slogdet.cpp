// slogdet_fwd: sign, log|det| and the inverse of a batch of matrices, one factorisation each.
#include "slogdet_kernel.h"

#include <algorithm>

#include "../fastflow.h"
#include "operands.h"
#include "runtime.h"
#include "slogdet_scratch.h"

namespace fastflow {

std::tuple<Tensor, Tensor, Tensor> slogdet_fwd(const Tensor& weight, bool want_inverse) {
  const Dims sizes = sizes_of(weight), strides = strides_of(weight);
  const size_t rank = sizes.size() - 2;
  const Dims batch(sizes.begin(), sizes.begin() + rank);
  const int64_t n = sizes[rank];
  int64_t count = 1;
  for (int64_t size : batch) count *= size;

  const ScalarType dtype = compute_type(weight.scalar_type());
  const int64_t width = dtype == ScalarType::Double ? 8 : 4;
  Tensor sign = empty(batch, dtype, weight), logabsdet = empty(batch, dtype, weight);
  Tensor inverse = empty(want_inverse ? sizes : Dims{0}, dtype, weight);
  char* const sign_data = static_cast<char*>(sign.mutable_data_ptr());
  char* const logabsdet_data = static_cast<char*>(logabsdet.mutable_data_ptr());
  if (n == 0) {
    auto fill = [&](auto one) {
      std::fill_n(reinterpret_cast<decltype(one)*>(sign_data), count, one);
      std::fill_n(reinterpret_cast<decltype(one)*>(logabsdet_data), count, one - one);
    };
    dtype == ScalarType::Double ? fill(1.0) : fill(1.0f);
  }
  if (n == 0 || count == 0) return {sign, logabsdet, inverse};

  SlogdetBatch whole{};
  whole.weight = weight.data_ptr();
  whole.type = element_of(weight.scalar_type());
  whole.n = n;
  whole.row_stride = strides[rank];
  whole.column_stride = strides[rank + 1];
  char* const inverse_data = want_inverse ? static_cast<char*>(inverse.mutable_data_ptr()) : nullptr;

  const int64_t group = n <= float64_up_to ? 8 : 1;  // matrices per kernel call: whole tiles of any vector's lanes
  // A thread is worth its start for some 50 thousand multiplications.
  const int64_t grain = std::max<int64_t>(1, 50000 / (group * n * n * n));
  parallel_for(0, (count + group - 1) / group, grain, [&](int64_t begin, int64_t end) {
    const Scratch scratch = make_scratch(FASTFLOW_ISA_CALL(slogdet_scratch, n));
    int64_t offset[8];
    for (int64_t g = begin; g < end; ++g) {
      SlogdetBatch part = whole;
      const int64_t first = g * group;
      part.count = std::min(group, count - first);
      for (int64_t b = 0; b < part.count; ++b) {
        offset[b] = 0;
        for (int64_t rest = first + b, d = rank; d-- > 0; rest /= batch[d]) offset[b] += rest % batch[d] * strides[d];
      }
      part.offset = offset;
      part.scratch = scratch.get();
      part.sign = sign_data + first * width;
      part.logabsdet = logabsdet_data + first * width;
      part.inverse = want_inverse ? inverse_data + first * n * n * width : nullptr;
      FASTFLOW_ISA_CALL(slogdet, part);
    }
  });
  return {sign, logabsdet, inverse};
}

}  // namespace fastflow
