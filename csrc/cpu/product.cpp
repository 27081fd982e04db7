// Host side of matrix products: their parts for the threads.
#include "product.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>

#include "product_kernel.h"
#include "runtime.h"

namespace fastflow {

namespace {

constexpr int64_t grain = 1 << 20;      // multiply-adds that are worth a thread
constexpr int64_t relu_grain = 16384;  // elements that are
constexpr int64_t chunks = 8, fewest_rows = 24, most_rows = 210;  // of a chunk; more chunks where it would have more

// torch's product, of the library that Intel writes for its processors, and bias and rectifier in passes of their own.
void of_blas(const Tensor& a, const Tensor& b, const Tensor* bias, bool relu, Tensor& out) {
  STABLE_TORCH_ERROR_CODE_CHECK(bias == nullptr
                                    ? aoti_torch_cpu_mm_out(out.get(), a.get(), b.get())
                                    : aoti_torch_cpu_addmm_out(out.get(), bias->get(), a.get(), b.get(), 1., 1.));
  if (!relu) return;
  const auto rectify = [&](auto* values) {
    parallel_for(0, out.numel(), relu_grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) values[i] = values[i] <= 0 ? 0 : values[i];  // NaN stays
    });
  };
  out.scalar_type() == ScalarType::Double ? rectify(static_cast<double*>(out.mutable_data_ptr()))
                                          : rectify(static_cast<float*>(out.mutable_data_ptr()));
}

}  // namespace

Tensor product(const Tensor& a, const Tensor& b, const Tensor* bias, bool relu) {
  Tensor out = empty({a.size(0), b.size(1)}, a.scalar_type(), a);
  if (out.numel() == 0) return out;
  if (blas_is_faster()) {
    of_blas(a, b, bias, relu, out);
    return out;
  }
  const bool transposed = a.stride(0) == 1 && a.stride(1) != 1;
  const Tensor readable = transposed || a.stride(1) == 1 ? a : torch::stable::contiguous(a);
  Product job{};
  job.m = out.size(0);
  job.n = out.size(1);
  job.k = a.size(1);
  job.is_double = a.scalar_type() == ScalarType::Double;
  job.a_transposed = transposed;
  job.a = readable.data_ptr();
  job.lda = readable.stride(transposed ? 1 : 0);
  job.b = b.data_ptr();
  job.b_row = b.stride(0);
  job.b_column = b.stride(1);
  job.bias = bias == nullptr ? nullptr : bias->data_ptr();
  job.relu = relu;
  job.out = out.mutable_data_ptr();
  job.chunks = std::max({int64_t(1), std::min(chunks, job.m / fewest_rows), job.m / most_rows});
  const int64_t each = std::max<int64_t>(1, job.m * job.n * job.k / job.units());
  parallel_for(0, job.units(), std::max<int64_t>(1, grain / each),
               [&](int64_t begin, int64_t end) { FASTFLOW_ISA_CALL(product, job, begin, end); });
  return out;
}

}  // namespace fastflow
