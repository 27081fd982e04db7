// Loops over elements, one or sixteen floats at a time. Sixteen are for loops whose exp a compiler makes slow: AVX-512
// rounds, clamps and scales by a power of two in one instruction each, none of which GCC finds. The templates of
// csrc/common take Floats for T as they take float. To be included before those templates, whose calls of functions of
// math:: mean what has been declared by then.
#pragma once

#include "../common/math.h"

#include <cstdint>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace fastflow::FASTFLOW_ISA {
namespace {

struct Single {
  template <class T>
  inline __attribute__((always_inline)) T load(const T* from) const {
    return *from;
  }
  template <class T>
  inline __attribute__((always_inline)) void store(T* to, T value) const {
    *to = value;
  }
};

#if defined(__AVX512F__)

struct Floats {
  static constexpr int64_t width = 16;

  __m512 v;

  Floats() = default;
  inline __attribute__((always_inline)) Floats(__m512 lanes) : v(lanes) {}
  inline __attribute__((always_inline)) Floats(double value) : v(_mm512_set1_ps(static_cast<float>(value))) {}
};

FASTFLOW_HD Floats operator+(Floats a, Floats b) { return a.v + b.v; }
FASTFLOW_HD Floats operator-(Floats a, Floats b) { return a.v - b.v; }
FASTFLOW_HD Floats operator*(Floats a, Floats b) { return a.v * b.v; }
FASTFLOW_HD Floats operator/(Floats a, Floats b) { return a.v / b.v; }
FASTFLOW_HD Floats operator-(Floats a) { return -a.v; }
FASTFLOW_HD __mmask16 operator<(Floats a, Floats b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
FASTFLOW_HD __mmask16 operator>(Floats a, Floats b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
FASTFLOW_HD __mmask16 operator==(Floats a, Floats b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }

// Sixteen in memory, or the first ones of them, which the mask has.
struct All {
  inline __attribute__((always_inline)) Floats load(const float* from) const { return _mm512_loadu_ps(from); }
  inline __attribute__((always_inline)) void store(float* to, Floats values) const { _mm512_storeu_ps(to, values.v); }
};
struct First {
  __mmask16 mask;
  inline __attribute__((always_inline)) Floats load(const float* from) const {
    return _mm512_maskz_loadu_ps(mask, from);
  }
  inline __attribute__((always_inline)) void store(float* to, Floats values) const {
    _mm512_mask_storeu_ps(to, mask, values.v);
  }
};

// each(i, All or First) for the vectors from element i on that make up n elements.
template <class F>
FASTFLOW_HD void each_vector(int64_t n, const F& each) {
  int64_t i = 0;
  for (; i + Floats::width <= n; i += Floats::width) each(i, All{});
  if (i < n) each(i, First{static_cast<__mmask16>((1 << (n - i)) - 1)});
}

FASTFLOW_HD Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
FASTFLOW_HD Floats abs(Floats x) { return _mm512_abs_ps(x.v); }
FASTFLOW_HD Floats select(__mmask16 mask, Floats where, Floats elsewhere) {
  return _mm512_mask_mov_ps(elsewhere.v, mask, where.v);
}

// The smaller, the larger one; a second operand that is NaN stays. (Masked forms, here and below, since GCC 12 warns
// within the plain ones.)
FASTFLOW_HD Floats smaller(Floats high, Floats x) { return _mm512_maskz_min_ps(0xffff, high.v, x.v); }
FASTFLOW_HD Floats larger(Floats low, Floats x) { return _mm512_maskz_max_ps(0xffff, low.v, x.v); }

FASTFLOW_HD Floats nearest_integer(Floats x) { return _mm512_maskz_roundscale_ps(0xffff, x.v, _MM_FROUND_NO_EXC); }
// x * 2^floor(n), rounded once, whatever becomes of the exponent.
FASTFLOW_HD Floats times_power(Floats x, Floats n) { return _mm512_maskz_scalef_ps(0xffff, x.v, n.v); }
// x - n ln 2.
FASTFLOW_HD Floats less_multiple_of_ln2(Floats x, Floats n) {
  return fma(-n, -0x1.05c61p-29, fma(-n, math::Bits<float>::ln2, x));
}

// 2^(j/32).
alignas(64) constexpr float powers_of_two[32] = {
    0x1p+0f, 0x1.059b0ep+0f, 0x1.0b5586p+0f, 0x1.11301ep+0f, 0x1.172b84p+0f, 0x1.1d4874p+0f, 0x1.2387a6p+0f,
    0x1.29e9ep+0f, 0x1.306fep+0f, 0x1.371a74p+0f, 0x1.3dea64p+0f, 0x1.44e086p+0f, 0x1.4bfdaep+0f, 0x1.5342b6p+0f,
    0x1.5ab07ep+0f, 0x1.6247ecp+0f, 0x1.6a09e6p+0f, 0x1.71f75ep+0f, 0x1.7a1148p+0f, 0x1.82589ap+0f, 0x1.8ace54p+0f,
    0x1.93737cp+0f, 0x1.9c4918p+0f, 0x1.a5503cp+0f, 0x1.ae89fap+0f, 0x1.b7f77p+0f, 0x1.c199bep+0f, 0x1.cb720ep+0f,
    0x1.d5818ep+0f, 0x1.dfc974p+0f, 0x1.ea4afap+0f, 0x1.f50766p+0f};

// 1 / c and log c for a c near 1 + j/31.
alignas(64) constexpr float unit_reciprocals[32] = {
    0x1p+0f, 0x1.fp-1f, 0x1.e1p-1f, 0x1.d3p-1f, 0x1.c58p-1f, 0x1.b9p-1f, 0x1.adp-1f, 0x1.a18p-1f, 0x1.97p-1f,
    0x1.8dp-1f, 0x1.83p-1f, 0x1.7ap-1f, 0x1.71p-1f, 0x1.688p-1f, 0x1.608p-1f, 0x1.59p-1f, 0x1.518p-1f, 0x1.4a8p-1f,
    0x1.44p-1f, 0x1.3d8p-1f, 0x1.37p-1f, 0x1.31p-1f, 0x1.2b8p-1f, 0x1.26p-1f, 0x1.208p-1f, 0x1.1b8p-1f, 0x1.168p-1f,
    0x1.118p-1f, 0x1.0dp-1f, 0x1.088p-1f, 0x1.04p-1f, 0x1p-1f};
alignas(64) constexpr float unit_logs[32] = {
    0x0p+0f, 0x1.0415d8p-5f, 0x1.ffa692p-5f, 0x1.78d022p-4f, 0x1.f0f70cp-4f, 0x1.31b994p-3f, 0x1.6a399ep-3f,
    0x1.a1dfc4p-3f, 0x1.d60a18p-3f, 0x1.047e6p-2f, 0x1.1e9e16p-2f, 0x1.36b678p-2f, 0x1.4f637ep-2f, 0x1.6740aep-2f,
    0x1.7e3b8ap-2f, 0x1.944144p-2f, 0x1.aac2e6p-2f, 0x1.c03924p-2f, 0x1.d49024p-2f, 0x1.e950acp-2f, 0x1.fe7f18p-2f,
    0x1.0938fap-1f, 0x1.128a24p-1f, 0x1.1c0784p-1f, 0x1.25b2c6p-1f, 0x1.2ea64cp-1f, 0x1.37c29ap-1f, 0x1.410928p-1f,
    0x1.4987acp-1f, 0x1.522aep-1f, 0x1.5af406p-1f, 0x1.62e43p-1f};

FASTFLOW_HD Floats entry(const float* table, Floats bits) {
  return _mm512_permutex2var_ps(_mm512_load_ps(table), _mm512_castps_si512(bits.v), _mm512_load_ps(table + 16));
}

// exp(x) for x within [exp_low, exp_high] or NaN, within 1.1 ulp: x = n ln 2 + r with n a multiple of 1/32, whose last
// five bits choose the fraction's power.
FASTFLOW_HD Floats exp_by_table(Floats x) {
  const Floats rounder = 0x1.8p18, rounded = fma(x, math::Bits<float>::log2e, rounder), n = rounded - rounder;
  const Floats r = less_multiple_of_ln2(x, n), expm1 = fma(r * r, fma(r, 1. / 6., 0.5), r);
  const Floats power = entry(powers_of_two, rounded);
  return times_power(fma(power, expm1, power), n);
}

// As their namesakes of math.h.
FASTFLOW_HD Floats exp_moderate(Floats x) { return exp_by_table(x); }
FASTFLOW_HD Floats exp(Floats x) {
  return exp_by_table(larger(math::Bits<float>::exp_low, smaller(math::Bits<float>::exp_high, x)));
}
FASTFLOW_HD Floats exp_decay(Floats x) {
  return exp_by_table(larger(math::Bits<float>::exp_low, _mm512_or_ps(x.v, _mm512_set1_ps(-0.f))));
}
// 1 + w = c (1 + f), and the last five bits of w's sum with a large number are the interval of width 1/31 around w.
FASTFLOW_HD Floats log1p_unit(Floats w) {
  const Floats interval = fma(w, 31., 0x1.8p23), reciprocal = entry(unit_reciprocals, interval);
  const Floats f = fma(w, reciprocal, reciprocal - Floats(1.));
  const Floats tail = fma(f, fma(f, -0x1.000ca2p-2, 0x1.555f14p-2), -0.5);
  return entry(unit_logs, interval) + fma(f * f, tail, f);
}

#endif

// Whether loops over T are to run in Floats.
#if defined(__AVX512F__)
template <class T>
inline constexpr bool has_floats = sizeof(T) == sizeof(float);
#else
template <class T>
inline constexpr bool has_floats = false;
#endif

// each(i, part) for n elements: in vectors, or one by one in a loop that may be vectorised, as nothing overlaps.
template <bool Vectors, class F>
FASTFLOW_HD void each_element(int64_t n, const F& each) {
  if constexpr (Vectors) {
    each_vector(n, each);
  } else {
    FASTFLOW_NO_OVERLAP
    for (int64_t i = 0; i < n; ++i) each(i, Single{});
  }
}

}  // namespace
}  // namespace fastflow::FASTFLOW_ISA

#if defined(__AVX512F__)
// For templates that name the namespace.
namespace fastflow::math {

using FASTFLOW_ISA::abs;
using FASTFLOW_ISA::exp;
using FASTFLOW_ISA::exp_decay;
using FASTFLOW_ISA::exp_moderate;
using FASTFLOW_ISA::fma;
using FASTFLOW_ISA::log1p_unit;
using FASTFLOW_ISA::select;

template <>
struct Bits<FASTFLOW_ISA::Floats> : Bits<float> {};

}  // namespace fastflow::math
#endif
