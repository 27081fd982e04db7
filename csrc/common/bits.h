// float and double as bits, and what is one instruction on CPU and GPU: constants, casts, fma, sqrt, sign, selects.
//
// Where the target has no fused multiply-add, fma is a product and a sum.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTFLOW_HD static __host__ __device__ __forceinline__
#else
#define FASTFLOW_HD static inline __attribute__((always_inline))
#endif

// Says of the loop behind it that no iteration writes what another touches.
#if defined(__clang__)
#define FASTFLOW_NO_OVERLAP _Pragma("clang loop vectorize(assume_safety)")
#else
#define FASTFLOW_NO_OVERLAP _Pragma("GCC ivdep")
#endif

// Whether fma below rounds once.
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__aarch64__)
#define FASTFLOW_FUSED 1
#else
#define FASTFLOW_FUSED 0
#endif

namespace fastflow::math {

template <class T>
struct Bits;

template <>
struct Bits<float> {
  using uint = uint32_t;
  static constexpr int mantissa = 23;
  static constexpr uint bias = 127;
  static constexpr float tiny = 0x1p-126f, rescale = 0x1p25f, rescale_log2 = 25.f;
  static constexpr float rounder = 0x1.8p23f, integer = 0x1p23f;  // adding them leaves an integer in the low bits
  static constexpr float exp_low = -104.f, exp_high = 89.f, expm1_low = -18.f;
  static constexpr float moderate = 8.f, flush_low = -88.f;  // 2^n is 0 at flush_low
  static constexpr float ln2 = 0x1.62e43p-1f, ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  static constexpr float log2e = 0x1.715476p0f;
  static constexpr uint sqrt_half = 0x3f3504f3u;
  static constexpr float half_pi = 0x1.921fb6p0f, half_pi_low = -0x1.777a5cp-25f;
};

template <>
struct Bits<double> {
  using uint = uint64_t;
  static constexpr int mantissa = 52;
  static constexpr uint bias = 1023;
  static constexpr double tiny = 0x1p-1022, rescale = 0x1p54, rescale_log2 = 54.;
  static constexpr double rounder = 0x1.8p52, integer = 0x1p52;
  static constexpr double exp_low = -746., exp_high = 710., expm1_low = -40.;
  static constexpr double moderate = 8., flush_low = -709.;
  static constexpr double ln2 = 0x1.62e42fefa39efp-1, ln2_high = 0x1.62e42fefa3p-1, ln2_low = 0x1.3de6af278ece6p-42;
  static constexpr double log2e = 0x1.71547652b82fep0;
  static constexpr uint sqrt_half = 0x3fe6a09e667f3bcdu;
  static constexpr double half_pi = 0x1.921fb54442d18p0, half_pi_low = 0x1.1a62633145c07p-54;
};

FASTFLOW_HD uint32_t to_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  return __builtin_bit_cast(uint32_t, x);
#endif
}

FASTFLOW_HD uint64_t to_bits(double x) {
#if defined(__CUDA_ARCH__)
  return static_cast<uint64_t>(__double_as_longlong(x));
#else
  return __builtin_bit_cast(uint64_t, x);
#endif
}

FASTFLOW_HD float from_bits(uint32_t x) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(x);
#else
  return __builtin_bit_cast(float, x);
#endif
}

FASTFLOW_HD double from_bits(uint64_t x) {
#if defined(__CUDA_ARCH__)
  return __longlong_as_double(static_cast<long long>(x));
#else
  return __builtin_bit_cast(double, x);
#endif
}

FASTFLOW_HD float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return ::fmaf(a, b, c);
#elif FASTFLOW_FUSED
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

FASTFLOW_HD double fma(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return ::fma(a, b, c);
#elif FASTFLOW_FUSED
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

FASTFLOW_HD float sqrt(float x) {
#if defined(__CUDA_ARCH__)
  return ::sqrtf(x);
#else
  return __builtin_sqrtf(x);
#endif
}

FASTFLOW_HD double sqrt(double x) {
#if defined(__CUDA_ARCH__)
  return ::sqrt(x);
#else
  return __builtin_sqrt(x);
#endif
}

template <class T>
FASTFLOW_HD T infinity() {
  return static_cast<T>(__builtin_huge_val());
}

template <class T>
FASTFLOW_HD T quiet_nan() {
  return static_cast<T>(__builtin_nan(""));
}

template <class T>
FASTFLOW_HD T abs(T x) {
  using uint = typename Bits<T>::uint;
  return from_bits(static_cast<uint>(to_bits(x) & (~static_cast<uint>(0) >> 1)));
}

template <class T>
FASTFLOW_HD T copysign(T magnitude, T sign) {
  using uint = typename Bits<T>::uint;
  const uint mask = ~static_cast<uint>(0) >> 1;
  return from_bits(static_cast<uint>((to_bits(magnitude) & mask) | (to_bits(sign) & ~mask)));
}

template <class T>
FASTFLOW_HD bool isnan(T x) {
  return x != x;
}

// 2^n for the integer n = rounded - Bits::rounder, n within the normal exponents.
template <class T>
FASTFLOW_HD T power_of_two(T rounded) {
  using B = Bits<T>;
  using uint = typename B::uint;
  return from_bits(static_cast<uint>((to_bits(rounded) - to_bits(B::rounder) + B::bias) << B::mantissa));
}

template <class T>
FASTFLOW_HD T select(bool choice, T where, T elsewhere) {
  return choice ? where : elsewhere;
}

}  // namespace fastflow::math
