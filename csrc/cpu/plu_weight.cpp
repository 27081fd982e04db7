// plu_weight: W = P (tril(lower, -1) + I) (triu(upper, 1) + diag(sign_s exp(log_s))) for N matrices, and its backward.
#include "plu_weight_kernel.h"

#include <algorithm>

#include <torch/headeronly/util/Exception.h>

#include "../fastflow.h"
#include "runtime.h"
#include "slogdet_scratch.h"

namespace fastflow {

namespace {

struct Parts {
  const Tensor &lower, &upper, &log_s, &sign_s, &perm;
  int64_t count, n, width;
  bool is_double;

  Parts(const Tensor& lower, const Tensor& upper, const Tensor& log_s, const Tensor& sign_s, const Tensor& perm)
      : lower(lower), upper(upper), log_s(log_s), sign_s(sign_s), perm(perm) {
    const Dims sizes = sizes_of(lower);
    count = sizes[0];
    n = sizes[1];
    is_double = lower.scalar_type() == ScalarType::Double;
    width = is_double ? 8 : 4;
    const int64_t* at = static_cast<const int64_t*>(perm.data_ptr());
    const Dims step = strides_of(perm);
    for (int64_t b = 0; b < count; ++b)
      for (int64_t i = 0; i < n; ++i) {
        const int64_t r = at[b * step[0] + i * step[1]];
        STD_TORCH_CHECK(0 <= r && r < n, "perm: expected row numbers in [0, ", n, "), got ", r);
      }
  }

  const void* part(const Tensor& t, int64_t b) const {
    return static_cast<const char*>(t.data_ptr()) + b * strides_of(t)[0] * width;
  }

  // f(b, parts of matrix b), over the matrices in parallel.
  template <class F>
  void for_each(const F& f) const {
    if (n == 0) return;
    const Dims low = strides_of(lower), up = strides_of(upper), p = strides_of(perm);
    // A thread is worth its start for some 50 thousand multiplications.
    parallel_for(0, count, std::max<int64_t>(1, 50000 / (n * n * n)), [&](int64_t begin, int64_t end) {
      const Scratch scratch = make_scratch(FASTFLOW_ISA_CALL(plu_weight_scratch, n));
      PluMatrix matrix{};
      matrix.n = n;
      matrix.lower_strides[0] = low[1], matrix.lower_strides[1] = low[2];
      matrix.upper_strides[0] = up[1], matrix.upper_strides[1] = up[2];
      matrix.log_s_stride = strides_of(log_s)[1];
      matrix.sign_s_stride = strides_of(sign_s)[1];
      matrix.perm_stride = p[1];
      matrix.scratch = scratch.get();
      for (int64_t b = begin; b < end; ++b) {
        matrix.lower = part(lower, b);
        matrix.upper = part(upper, b);
        matrix.log_s = part(log_s, b);
        matrix.sign_s = part(sign_s, b);
        matrix.perm = static_cast<const int64_t*>(perm.data_ptr()) + b * p[0];
        f(b, matrix);
      }
    });
  }
};

}  // namespace

Tensor plu_weight_fwd(const Tensor& lower, const Tensor& upper, const Tensor& log_s, const Tensor& sign_s,
                      const Tensor& perm) {
  const Parts parts(lower, upper, log_s, sign_s, perm);
  Tensor weight = empty(sizes_of(lower), lower.scalar_type(), lower);
  char* const data = static_cast<char*>(weight.mutable_data_ptr());
  parts.for_each([&](int64_t b, const PluMatrix& matrix) {
    FASTFLOW_ISA_CALL(plu_weight_forward, matrix, data + b * parts.n * parts.n * parts.width, parts.is_double);
  });
  return weight;
}

std::tuple<Tensor, Tensor, Tensor> plu_weight_bwd(const Tensor& grad_weight, const Tensor& lower, const Tensor& upper,
                                                  const Tensor& log_s, const Tensor& sign_s, const Tensor& perm) {
  const Parts parts(lower, upper, log_s, sign_s, perm);
  Tensor grad_lower = empty(sizes_of(lower), lower.scalar_type(), lower);
  Tensor grad_upper = empty(sizes_of(lower), lower.scalar_type(), lower);
  Tensor grad_log_s = empty(sizes_of(log_s), lower.scalar_type(), lower);
  char* const to_lower = static_cast<char*>(grad_lower.mutable_data_ptr());
  char* const to_upper = static_cast<char*>(grad_upper.mutable_data_ptr());
  char* const to_log_s = static_cast<char*>(grad_log_s.mutable_data_ptr());
  const Dims strides = strides_of(grad_weight);
  parts.for_each([&](int64_t b, const PluMatrix& matrix) {
    const int64_t line = parts.n * parts.width;
    const PluGradients gradients{parts.part(grad_weight, b), {strides[1], strides[2]},
                                 to_lower + b * parts.n * line, to_upper + b * parts.n * line, to_log_s + b * line};
    FASTFLOW_ISA_CALL(plu_weight_backward, matrix, gradients, parts.is_double);
  });
  return {grad_lower, grad_upper, grad_log_s};
}

}  // namespace fastflow
