// The types that tensors are stored in, and conversions from and to those of the arithmetic. For *_kernel.cpp alone:
// compiled once per instruction set.
#pragma once

#include "../common/math.h"
#include "element.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

struct Half {
  uint16_t bits;
};

struct BFloat {
  uint16_t bits;
};

template <class T>
FASTFLOW_HD T convert(float x, T*) {
  return static_cast<T>(x);
}

template <class T>
FASTFLOW_HD T convert(double x, T*) {
  return static_cast<T>(x);
}

template <class T>
FASTFLOW_HD T convert(BFloat x, T*) {
  return static_cast<T>(math::from_bits(static_cast<uint32_t>(x.bits) << 16));
}

template <class T>
FASTFLOW_HD T convert(Half x, T*) {
  const uint32_t wide = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const float normal = math::from_bits(wide + 0x38000000u);
  // No denormal operand, which the floating-point mode may flush.
  const float subnormal = math::from_bits(wide | 0x38800000u) - 0x1p-14f;
  const float special = math::from_bits(wide | 0x7f800000u);
  const float magnitude = wide < 0x00800000u ? subnormal : wide < 0x0f800000u ? normal : special;
  return static_cast<T>(math::from_bits(math::to_bits(magnitude) | static_cast<uint32_t>(x.bits & 0x8000) << 16));
}

FASTFLOW_HD BFloat convert(float x, BFloat*) {
  const uint32_t u = math::to_bits(x);
  const uint32_t rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
}

FASTFLOW_HD Half convert(float x, Half*) {
  const uint32_t u = math::to_bits(x), a = u & 0x7fffffffu;
  const uint32_t normal = (a + 0xfffu + (a >> 13 & 1u) - 0x38000000u) >> 13;
  const uint32_t subnormal = math::to_bits(math::from_bits(a) + 0.5f) - 0x3f000000u;
  const uint32_t finite = a < 0x38800000u ? subnormal : a < 0x477ff000u ? normal : 0x7c00u;
  return {static_cast<uint16_t>((a > 0x7f800000u ? 0x7e00u : finite) | (u >> 16 & 0x8000u))};
}

FASTFLOW_HD BFloat convert(double x, BFloat* tag) { return convert(static_cast<float>(x), tag); }
FASTFLOW_HD Half convert(double x, Half* tag) { return convert(static_cast<float>(x), tag); }

// f with a null pointer of the storage type.
template <class F>
FASTFLOW_HD auto with_element(Element element, const F& f) {
  switch (element) {
    case Element::float16: return f(static_cast<Half*>(nullptr));
    case Element::bfloat16: return f(static_cast<BFloat*>(nullptr));
    case Element::float32: return f(static_cast<float*>(nullptr));
    default: return f(static_cast<double*>(nullptr));
  }
}

}  // namespace
}  // namespace fastflow::FASTFLOW_ISA
