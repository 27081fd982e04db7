// Box-Muller for sixteen pairs of random words at once: philox::normals in the instructions and by the tables that
// AVX-512 has. The same normals to within 2e-6, as on every backend.
#pragma once

#include "../common/philox.h"

#if defined(__AVX512F__)
#include <immintrin.h>

namespace fastflow::FASTFLOW_ISA {
namespace {

// Of the interval of [3/4, 3/2) that the first five bits of a float's fraction name: 2^95 / c and -2 log c, for a c
// near its middle with few bits. The two that meet at 1 have c = 1, since the logarithm must vanish there.
alignas(64) constexpr float reciprocal[32] = {
    0x1p+95f, 0x1.e92p+94f, 0x1.daep+94f, 0x1.cd8p+94f, 0x1.c0ep+94f, 0x1.b4ep+94f, 0x1.a98p+94f, 0x1.9ecp+94f,
    0x1.948p+94f, 0x1.8acp+94f, 0x1.818p+94f, 0x1.78ap+94f, 0x1.702p+94f, 0x1.682p+94f, 0x1.606p+94f, 0x1.58ep+94f,
    0x1.51dp+95f, 0x1.4bp+95f, 0x1.447p+95f, 0x1.3e2p+95f, 0x1.381p+95f, 0x1.324p+95f, 0x1.2cap+95f, 0x1.273p+95f,
    0x1.22p+95f, 0x1.1cfp+95f, 0x1.181p+95f, 0x1.136p+95f, 0x1.0edp+95f, 0x1.0a7p+95f, 0x1.062p+95f, 0x1p+95f};
alignas(64) constexpr float minus_two_logs[32] = {
    0x0p+0f, -0x1.766d92p-4f, -0x1.34517ap-3f, -0x1.a956d4p-3f, -0x1.0d79e8p-2f, -0x1.44f8b8p-2f, -0x1.7b0092p-2f,
    -0x1.af6896p-2f, -0x1.e2a878p-2f, -0x1.0a504ep-1f, -0x1.22982p-1f, -0x1.3a71c6p-1f, -0x1.51d1dap-1f,
    -0x1.685182p-1f, -0x1.7e9884p-1f, -0x1.94a042p-1f, 0x1.1bf816p-1f, 0x1.071b86p-1f, 0x1.e533fp-2f, 0x1.bcf674p-2f,
    0x1.958eaep-2f, 0x1.6f0d28p-2f, 0x1.4915d8p-2f, 0x1.23b412p-2f, 0x1.fec914p-3f, 0x1.b6a688p-3f, 0x1.6ff73p-3f,
    0x1.2ad44ap-3f, 0x1.cccb3cp-4f, 0x1.475eeap-4f, 0x1.83625p-5f, 0x0p+0f};

// Cosine and sine in the middle of each of 32 sectors of the circle.
alignas(64) constexpr float sector_cos[32] = {
    0x1.fd88dap-1f, 0x1.e9f416p-1f, 0x1.c38b3p-1f, 0x1.8bc806p-1f, 0x1.44cf32p-1f, 0x1.e2b5d4p-2f, 0x1.294062p-2f,
    0x1.917a6cp-4f, -0x1.917a6cp-4f, -0x1.294062p-2f, -0x1.e2b5d4p-2f, -0x1.44cf32p-1f, -0x1.8bc806p-1f,
    -0x1.c38b3p-1f, -0x1.e9f416p-1f, -0x1.fd88dap-1f, -0x1.fd88dap-1f, -0x1.e9f416p-1f, -0x1.c38b3p-1f,
    -0x1.8bc806p-1f, -0x1.44cf32p-1f, -0x1.e2b5d4p-2f, -0x1.294062p-2f, -0x1.917a6cp-4f, 0x1.917a6cp-4f,
    0x1.294062p-2f, 0x1.e2b5d4p-2f, 0x1.44cf32p-1f, 0x1.8bc806p-1f, 0x1.c38b3p-1f, 0x1.e9f416p-1f, 0x1.fd88dap-1f};
alignas(64) constexpr float sector_sin[32] = {
    0x1.917a6cp-4f, 0x1.294062p-2f, 0x1.e2b5d4p-2f, 0x1.44cf32p-1f, 0x1.8bc806p-1f, 0x1.c38b3p-1f, 0x1.e9f416p-1f,
    0x1.fd88dap-1f, 0x1.fd88dap-1f, 0x1.e9f416p-1f, 0x1.c38b3p-1f, 0x1.8bc806p-1f, 0x1.44cf32p-1f, 0x1.e2b5d4p-2f,
    0x1.294062p-2f, 0x1.917a6cp-4f, -0x1.917a6cp-4f, -0x1.294062p-2f, -0x1.e2b5d4p-2f, -0x1.44cf32p-1f,
    -0x1.8bc806p-1f, -0x1.c38b3p-1f, -0x1.e9f416p-1f, -0x1.fd88dap-1f, -0x1.fd88dap-1f, -0x1.e9f416p-1f,
    -0x1.c38b3p-1f, -0x1.8bc806p-1f, -0x1.44cf32p-1f, -0x1.e2b5d4p-2f, -0x1.294062p-2f, -0x1.917a6cp-4f};

FASTFLOW_HD __m512 entry(const float* table, __m512i index) {
  return _mm512_permutex2var_ps(_mm512_load_ps(table), index, _mm512_load_ps(table + 16));
}
FASTFLOW_HD __m512 of_all(float value) { return _mm512_set1_ps(value); }
FASTFLOW_HD __m512i of_all(uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }
// (Masked forms, here and below, since GCC 12 warns within the plain ones.)
FASTFLOW_HD __m512i shifted_right(__m512i a, unsigned bits) { return _mm512_maskz_srli_epi32(0xffff, a, bits); }
FASTFLOW_HD __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }

// sqrt(-2 log((u + last) 2^-32)), 0 < u + last <= 2^32. To round the sum serves to find the exponent e and the interval
// of what the logarithm is of, 2^e m, 3/4 <= m < 3/2.
FASTFLOW_HD __m512 radius(__m512 u, __m512 last) {
  const __m512i bits = _mm512_castps_si512(u + last);
  const __m512i power = _mm512_add_epi32(bits, of_all((1u << 22) - (32u << 23)));
  const __m512i exponent = _mm512_and_epi32(power, of_all(0xffu << 23)), interval = shifted_right(bits, 18);
  const __m512 e = _mm512_maskz_getexp_ps(0xffff, _mm512_castsi512_ps(power));
  // m = c (1 + f)
  const __m512 scale =
      _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_castps_si512(entry(reciprocal, interval)), exponent));
  const __m512 f = fma(last, scale, fma(u, scale, of_all(-1.f)));
  const __m512 tail = fma(f, fma(f, of_all(0x1.f1f352p-2f), of_all(-0x1.555948p-1f)), of_all(0x1.00003p+0f));
  const __m512 of_m = fma(f * f, tail, fma(f, of_all(-2.f), entry(minus_two_logs, interval)));
  return _mm512_maskz_sqrt_ps(0xffff, fma(e, of_all(-0x1.62e43p+0f), of_m));
}

// The same with u = (w >> 8) * 2^-24 + 2^-25: 25 bits, all but the last of which are a float without error.
FASTFLOW_HD __m512 radius(__m512i w) {
  return radius(_mm512_maskz_cvtepu32_ps(0xffff, _mm512_and_epi32(w, of_all(0xffffff00u))), of_all(128.f));
}

// cos and sin of 2 pi u with u = (w >> 8) * 2^-24 + last * 2^-37.
FASTFLOW_HD void cos_sin(__m512i w, uint32_t last, __m512& cosine, __m512& sine) {
  // The first five bits are the sector, the others the way from its middle.
  const __m512i sector = shifted_right(w, 27);
  const __m512i way = _mm512_ternarylogic_epi32(_mm512_maskz_slli_epi32(0xffff, w, 5), of_all(0xffffe000u),
                                                of_all(0x80000000u | last), (0xf0 & 0xcc) ^ 0xaa);
  const __m512 angle = _mm512_maskz_cvtepi32_ps(0xffff, way) * of_all(0x1.921fb6p-35f), z = angle * angle;
  const __m512 s = angle * fma(z, of_all(-0x1.5530b6p-3f), of_all(1.f));
  const __m512 c = z * fma(z, of_all(0x1.553c2ap-5f), of_all(-0.5f));
  const __m512 at_cos = entry(sector_cos, sector), at_sin = entry(sector_sin, sector);
  cosine = fma(at_cos, c, _mm512_fnmadd_ps(at_sin, s, at_cos));
  sine = fma(at_sin, c, fma(at_cos, s, at_sin));
}

// The 32 normals of sixteen pairs of words, in the order of the pairs.
FASTFLOW_HD void store_normals(float* out, __m512i radius_words, __m512i angle_words) {
  __m512 cosine, sine;
  cos_sin(angle_words, 1u << 12, cosine, sine);
  const __m512 r = radius(radius_words), first = r * cosine, second = r * sine;
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, of_all(8u));
  _mm512_storeu_ps(out, _mm512_permutex2var_ps(first, low, second));
  _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(first, high, second));
}

}  // namespace
}  // namespace fastflow::FASTFLOW_ISA

#endif
