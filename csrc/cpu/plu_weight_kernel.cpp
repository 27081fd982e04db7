// W = P L U from its parts and the gradients of the parts, for one instruction set; blocks of zeros are skipped.
#include "plu_weight_kernel.h"

#include "../common/math.h"
#include "slogdet_gemm.h"

namespace fastflow::FASTFLOW_ISA {

namespace {

template <class T>
struct Plu {
  const PluMatrix& parts;
  int64_t n, ld;
  T *lower, *upper, *product, *gradient;  // n rows of ld each
  // Zero times Inf or NaN is NaN in the dense product: then nothing may be skipped.
  bool dense = false;

  explicit Plu(const PluMatrix& parts) : parts(parts), n(parts.n), ld(leading_dimension<T>(n)) {
    lower = static_cast<T*>(parts.scratch);
    upper = lower + n * ld;
    product = upper + n * ld;
    gradient = product + n * ld;
  }

  T load(const void* base, int64_t offset) {
    const T x = static_cast<const T*>(base)[offset];
    dense |= !(x - x == 0);
    return x;
  }

  T scale(int64_t i) {
    const T s = load(parts.sign_s, i * parts.sign_s_stride) * math::exp(load(parts.log_s, i * parts.log_s_stride));
    dense |= !(s - s == 0);
    return s;
  }

  // L and U, each as it is or transposed.
  void load_factors(bool transposed) {
    const int64_t row = transposed ? 1 : ld, column = transposed ? ld : 1;
    for (int64_t i = 0; i < n * ld; ++i) lower[i] = upper[i] = 0;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < i; ++j)
        lower[i * row + j * column] = load(parts.lower, i * parts.lower_strides[0] + j * parts.lower_strides[1]);
      lower[i * ld + i] = 1;
      upper[i * ld + i] = scale(i);
      for (int64_t j = i + 1; j < n; ++j)
        upper[i * row + j * column] = load(parts.upper, i * parts.upper_strides[0] + j * parts.upper_strides[1]);
    }
  }

  // product = left * right with the terms that terms() leaves.
  template <class Range>
  void multiply(const T* left, const T* right, const Range& terms) {
    gemm<T, Update::assign>(n, round_up(n, Simd<T>::lanes) / Simd<T>::lanes, left, ld, right, ld, product, ld,
                   [&](int64_t i, int64_t rows, int64_t j, int64_t columns) {
                     return dense ? Terms{0, n} : terms(i, rows, j, columns);
                   });
  }

  void forward(T* weight) {
    load_factors(false);
    multiply(lower, upper, [this](int64_t i, int64_t rows, int64_t j, int64_t columns) {
      return Terms{0, at_most(n, at_most(i + rows, j + columns))};
    });
    for (int64_t i = 0; i < n; ++i) {
      const T* from = product + parts.perm[i * parts.perm_stride] * ld;
      for (int64_t j = 0; j < n; ++j) weight[i * n + j] = from[j];
    }
  }

  void backward(const PluGradients& gradients) {
    load_factors(true);
    for (int64_t i = 0; i < n * ld; ++i) gradient[i] = 0;
    for (int64_t i = 0; i < n; ++i) {
      T* to = gradient + parts.perm[i * parts.perm_stride] * ld;
      for (int64_t j = 0; j < n; ++j)
        to[j] += load(gradients.weight, i * gradients.weight_strides[0] + j * gradients.weight_strides[1]);
    }
    multiply(gradient, upper, [this](int64_t i, int64_t rows, int64_t j, int64_t) {
      return j >= i + rows ? Terms{0, 0} : Terms{j, n};
    });
    T* out = static_cast<T*>(gradients.lower);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) out[i * n + j] = j < i ? product[i * ld + j] : T(0);
    multiply(lower, gradient, [this](int64_t i, int64_t, int64_t j, int64_t columns) {
      return j + columns <= i ? Terms{0, 0} : Terms{i, n};
    });
    out = static_cast<T*>(gradients.upper);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) out[i * n + j] = j > i ? product[i * ld + j] : T(0);
      static_cast<T*>(gradients.log_s)[i] = product[i * ld + i] * upper[i * ld + i];
    }
  }
};

}  // namespace

int64_t plu_weight_scratch(int64_t n) {
  return 4 * n * at_least(leading_dimension<double>(n) * 8, leading_dimension<float>(n) * 4);
}

void plu_weight_forward(const PluMatrix& parts, void* weight, bool is_double) {
  if (is_double)
    Plu<double>(parts).forward(static_cast<double*>(weight));
  else
    Plu<float>(parts).forward(static_cast<float*>(weight));
}

void plu_weight_backward(const PluMatrix& parts, const PluGradients& gradients, bool is_double) {
  if (is_double)
    Plu<double>(parts).backward(gradients);
  else
    Plu<float>(parts).backward(gradients);
}

}  // namespace fastflow::FASTFLOW_ISA
