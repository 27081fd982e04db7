// wide_mlp between its matrix products, for one instruction set.
#include "wide_mlp_kernel.h"

#include "silu.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

// The columns [first, first + count): sums of 32 rows each are added up, which rounds less than one long sum.
template <class T, LayerActivation activation>
void columns(const WideMlpBackward& job, int64_t first, int64_t count) {
  constexpr int64_t together = 32;
  T totals[WideMlpBackward::block] = {};
  for (int64_t begin = 0; begin < job.rows; begin += together) {
    const int64_t end = begin + together < job.rows ? begin + together : job.rows;
    T sums[WideMlpBackward::block] = {};
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * job.columns + first;
      T* const __restrict grad = static_cast<T*>(job.grad) + at;
      if (job.added != nullptr) {
        const T* const added = static_cast<const T*>(job.added) + at;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) grad[i] += added[i];
      }
      if constexpr (activation == LayerActivation::none) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) sums[i] += grad[i];
      } else if constexpr (activation == LayerActivation::relu) {
        const T* const values = static_cast<const T*>(job.values) + at;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
          const T g = values[i] <= T(0) ? T(0) : grad[i];
          grad[i] = g;
          sums[i] += g;
        }
      } else {
        const T* const slopes = static_cast<const T*>(job.slopes) + at;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
          const T g = grad[i] * slopes[i];
          grad[i] = g;
          sums[i] += g;
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) totals[i] += sums[i];
  }
  if (job.sums == nullptr) return;
  T* const to = static_cast<T*>(job.sums) + first;
  for (int64_t i = 0; i < count; ++i) to[i] = totals[i];
}

template <class T>
void backward(const WideMlpBackward& job, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * WideMlpBackward::block, left = job.columns - first;
    const int64_t count = left < WideMlpBackward::block ? left : WideMlpBackward::block;
    switch (job.activation) {
      case LayerActivation::none: columns<T, LayerActivation::none>(job, first, count); break;
      case LayerActivation::relu: columns<T, LayerActivation::relu>(job, first, count); break;
      case LayerActivation::silu: columns<T, LayerActivation::silu>(job, first, count); break;
    }
  }
}

}  // namespace

void wide_mlp_silu(const WideMlpSilu& job, int64_t begin, int64_t end) {
  auto run = [&](auto* values) {
    auto* const slopes = static_cast<decltype(values)>(job.slopes);
    silu(end - begin, values + begin, values + begin, slopes == nullptr ? slopes : slopes + begin);
  };
  job.is_double ? run(static_cast<double*>(job.values)) : run(static_cast<float*>(job.values));
}

void wide_mlp_backward(const WideMlpBackward& job, int64_t begin, int64_t end) {
  job.is_double ? backward<double>(job, begin, end) : backward<float>(job, begin, end);
}

}  // namespace fastflow::FASTFLOW_ISA
