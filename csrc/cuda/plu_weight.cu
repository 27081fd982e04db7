// plu_weight: W = P L U of every matrix in one launch, and the gradients of its factors. An element to a thread; sums
// are kept in double.
#include "../common/math.h"
#include "elements.cuh"

namespace fastflow {
namespace {

constexpr int kThreads = 256;

// (N, C, C) or (N, C), elements of T.
template <class T>
struct Factor {
  const T* data;
  int64_t matrix, row, column;
  __device__ __forceinline__ T operator()(int64_t n, int64_t i, int64_t j = 0) const {
    return data[n * matrix + i * row + j * column];
  }
};

template <class T>
Factor<T> factor_of(const Tensor& t) {
  return {static_cast<const T*>(t.data_ptr()), t.stride(0), t.stride(1), t.dim() > 2 ? t.stride(2) : 0};
}

template <class T>
struct Factors {
  Factor<T> lower, upper, log_s, sign_s;
  Factor<int64_t> perm;
  int64_t size, blocks;  // blocks of threads that share a matrix

  __device__ __forceinline__ T diagonal(int64_t n, int64_t i) const { return sign_s(n, i) * math::exp(log_s(n, i)); }
  // Of L, with the ones on the diagonal, and of U.
  __device__ __forceinline__ T l(int64_t n, int64_t i, int64_t j) const { return i == j ? T(1) : lower(n, i, j); }
  __device__ __forceinline__ T u(int64_t n, int64_t i, int64_t j) const {
    return i == j ? diagonal(n, i) : upper(n, i, j);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) plu_forward(const __grid_constant__ Factors<T> f, T* weight) {
  const int64_t n = blockIdx.x / f.blocks, elements = f.size * f.size;
  const int64_t element = (blockIdx.x - n * f.blocks) * kThreads + threadIdx.x;
  if (element >= elements) return;
  const int64_t i = element / f.size, j = element - i * f.size, r = f.perm(n, i);
  double sum = math::quiet_nan<double>();
  if (r >= 0 && r < f.size) {  // else no permutation
    const int64_t last = r < j ? r : j;
    sum = 0;
    for (int64_t k = 0; k < last; ++k) sum += static_cast<double>(f.lower(n, r, k)) * f.upper(n, k, j);
    sum += static_cast<double>(f.l(n, r, last)) * f.u(n, last, j);
  }
  weight[n * elements + element] = static_cast<T>(sum);
}

template <class T>
struct Gradients {
  T *lower, *upper, *log_s;
};

// With G the gradient of LU, the rows of W's put back in order: dL = strictly lower part of G U^T, dU = upper part of
// L^T G, whose diagonal gives log_s.
template <class T>
__global__ void __launch_bounds__(kThreads)
    plu_backward(const __grid_constant__ Factors<T> f, const __grid_constant__ Factor<T> grad, Gradients<T> to) {
  FASTFLOW_DYNAMIC_SHARED(int, place);  // the row of W that holds each row of LU, -1 if none does
  const int64_t n = blockIdx.x / f.blocks, elements = f.size * f.size;
  for (int64_t i = threadIdx.x; i < f.size; i += kThreads) place[i] = -1;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < f.size; i += kThreads) {
    const int64_t r = f.perm(n, i);
    if (r >= 0 && r < f.size) place[r] = static_cast<int>(i);
  }
  __syncthreads();
  const int64_t element = (blockIdx.x - n * f.blocks) * kThreads + threadIdx.x;
  if (element >= elements) return;
  const int64_t i = element / f.size, j = element - i * f.size;
  const auto g = [&](int64_t r, int64_t c) -> double { return place[r] < 0 ? T(0) : grad(n, place[r], c); };
  double sum = 0;
  if (i > j) {
    sum = g(i, j) * static_cast<double>(f.diagonal(n, j));
    for (int64_t k = j + 1; k < f.size; ++k) sum += g(i, k) * static_cast<double>(f.upper(n, j, k));
  } else {
    sum = g(i, j);
    for (int64_t k = i + 1; k < f.size; ++k) sum += g(k, j) * static_cast<double>(f.lower(n, k, i));
  }
  to.lower[n * elements + element] = i > j ? static_cast<T>(sum) : T(0);
  to.upper[n * elements + element] = i < j ? static_cast<T>(sum) : T(0);
  if (i == j) to.log_s[n * f.size + i] = static_cast<T>(sum * static_cast<double>(f.diagonal(n, i)));
}

template <class T>
Factors<T> factors_of(const Tensor& lower, const Tensor& upper, const Tensor& log_s, const Tensor& sign_s,
                      const Tensor& perm) {
  const int64_t size = lower.size(1);
  return {factor_of<T>(lower),  factor_of<T>(upper),      factor_of<T>(log_s),
          factor_of<T>(sign_s), factor_of<int64_t>(perm), size, (size * size + kThreads - 1) / kThreads};
}

template <class F>
void by_dtype(const Tensor& t, F run) {
  if (t.scalar_type() == ScalarType::Double) run(double());
  else run(float());
}

}  // namespace

Tensor plu_weight_fwd(const Tensor& lower, const Tensor& upper, const Tensor& log_s, const Tensor& sign_s,
                      const Tensor& perm) {
  const Tensor weight = empty(sizes_of(lower), lower.scalar_type(), lower);
  const Stream stream(lower);
  by_dtype(lower, [&]<class T>(T) {
    const Factors<T> f = factors_of<T>(lower, upper, log_s, sign_s, perm);
    FASTFLOW_LAUNCH(plu_forward<T>, lower.size(0) * f.blocks, kThreads, 0, stream, f,
                    static_cast<T*>(weight.data_ptr()));
  });
  return weight;
}

std::tuple<Tensor, Tensor, Tensor> plu_weight_bwd(const Tensor& grad_weight, const Tensor& lower, const Tensor& upper,
                                                  const Tensor& log_s, const Tensor& sign_s, const Tensor& perm) {
  const ScalarType dtype = lower.scalar_type();
  const Tensor grad_lower = empty(sizes_of(lower), dtype, lower), grad_upper = empty(sizes_of(upper), dtype, lower),
               grad_log_s = empty(sizes_of(log_s), dtype, lower);
  const Stream stream(lower);
  by_dtype(lower, [&]<class T>(T) {
    const Factors<T> f = factors_of<T>(lower, upper, log_s, sign_s, perm);
    const Gradients<T> to{static_cast<T*>(grad_lower.data_ptr()), static_cast<T*>(grad_upper.data_ptr()),
                          static_cast<T*>(grad_log_s.data_ptr())};
    FASTFLOW_LAUNCH(plu_backward<T>, lower.size(0) * f.blocks, kThreads, f.size * static_cast<int64_t>(sizeof(int)),
                    stream, f, factor_of<T>(grad_weight), to);
  });
  return {grad_lower, grad_upper, grad_log_s};
}

}  // namespace fastflow
