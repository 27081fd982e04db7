// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the normals made from it.
#pragma once

#include "math.h"

namespace fastflow::philox {

constexpr uint32_t multiplier0 = 0xD2511F53u, multiplier1 = 0xCD9E8D57u;
constexpr uint32_t weyl0 = 0x9E3779B9u, weyl1 = 0xBB67AE85u;

// A counter or a block of random words. A Lane is a uint64_t, or anything with its ^ and >> and a `wide_product`; only
// the low 32 bits of each element of a Lane count, the high ones hold what a product left there.
template <class Lane>
struct Words {
  Lane w0, w1, w2, w3;
};

// The 64-bit product of a's low 32 bits.
FASTFLOW_HD uint64_t wide_product(uint64_t a, uint32_t multiplier) {
  return static_cast<uint64_t>(static_cast<uint32_t>(a)) * multiplier;
}

template <class Lane>
FASTFLOW_HD Words<Lane> round(const Words<Lane>& c, uint32_t key0, uint32_t key1) {
  const Lane p0 = wide_product(c.w0, multiplier0), p1 = wide_product(c.w2, multiplier1);
  return {(p1 >> 32) ^ c.w1 ^ uint64_t(key0), p1, (p0 >> 32) ^ c.w3 ^ uint64_t(key1), p0};
}

template <class Lane>
FASTFLOW_HD Words<Lane> generate(Words<Lane> c, uint32_t key0, uint32_t key1) {
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (uint32_t r = 0; r < 10; ++r) c = round(c, key0 + r * weyl0, key1 + r * weyl1);
  return c;
}

// The random words of block `counter` (words 2 and 3 of the full counter are zero) under `seed`.
FASTFLOW_HD Words<uint64_t> block(uint64_t counter, uint64_t seed) {
  return generate(Words<uint64_t>{counter, counter >> 32, 0, 0}, static_cast<uint32_t>(seed),
                  static_cast<uint32_t>(seed >> 32));
}

// The uniform of word w is u = ((w >> 8) + 0.5) * 2^-24 = odd(w) * 2^-25, exactly.
FASTFLOW_HD int32_t odd(uint32_t word) { return static_cast<int32_t>((word >> 7) | 1u); }

// sqrt(-2 log u) with u = n * 2^-25, n odd, 0 < n < 2^25.
FASTFLOW_HD float radius(int32_t n) {
  using B = math::Bits<float>;
  // u = 2^(e - 25) (1 + f). Rounding n to float serves to find e; f itself comes from the integers, without error.
  const uint32_t one = B::bias << B::mantissa;
  const uint32_t shifted = math::to_bits(static_cast<float>(n)) + (one - B::sqrt_half);
  const uint32_t power = shifted & (0xFFu << B::mantissa);  // the float 2^e
  const float inverse = math::from_bits(2 * one - power);
  const float f = static_cast<float>(n - static_cast<int32_t>(math::from_bits(power))) * inverse;
  const float exponent = static_cast<float>(static_cast<int32_t>(power >> B::mantissa) - (127 + 25));
  return math::sqrt(-2.f * math::log_sum(exponent, f));
}

struct Pair {
  float first, second;
};

// (cos, sin) of 2 pi u with u = n * 2^-25, n odd, 0 < n < 2^25; within 7.4e-8.
FASTFLOW_HD Pair cos_sin(int32_t n) {
  const int32_t quarter = (n + (1 << 22)) >> 23;  // 0 to 4
  // pi/4 v is what remains of the angle, -1 <= v <= 1.
  const float v = static_cast<float>(n - (quarter << 23)) * 0x1p-22f, z = v * v;
  const float cos_tail = math::horner(z, -0x1.3bd3ccp-2f, 0x1.03c1dep-6f, -0x1.55c664p-12f, 0x1.d9f7bap-19f);
  const float c = math::fma(z, cos_tail, 1.f);
  const float pi_4 = 0x1.921fb6p-1f, pi_4_low = -0x1.777a5cp-26f;
  const float sin_tail = math::horner(z, pi_4_low, -0x1.4abbcp-4f, 0x1.46603p-9f, -0x1.2dd046p-15f);
  const float s = math::fma(v, pi_4, v * sin_tail);
  const bool swap = (quarter & 1) != 0;
  const uint32_t cos_sign = static_cast<uint32_t>((quarter + 1) & 2) << 30;
  const uint32_t sin_sign = static_cast<uint32_t>(quarter & 2) << 30;
  return {math::from_bits(math::to_bits(swap ? s : c) ^ cos_sign),
          math::from_bits(math::to_bits(swap ? c : s) ^ sin_sign)};
}

// Box-Muller: two standard normals from two random words, within 1e-6 of the exact ones.
FASTFLOW_HD Pair normals(uint32_t radius_word, uint32_t angle_word) {
  const float r = radius(odd(radius_word));
  const Pair direction = cos_sin(odd(angle_word));
  return {r * direction.first, r * direction.second};
}

// Normals 0 to 3 of a block are (w0, w1)'s and (w2, w3)'s; this is normal `which` alone.
FASTFLOW_HD float normal(const Words<uint64_t>& words, int which) {
  const bool second = (which & 2) != 0;
  const Pair pair = normals(static_cast<uint32_t>(second ? words.w2 : words.w0),
                            static_cast<uint32_t>(second ? words.w3 : words.w1));
  return (which & 1) != 0 ? pair.second : pair.first;
}

}  // namespace fastflow::philox
