// tanh in float by piecewise polynomials whose coefficients stay in registers: half the time of math::tanh, which
// divides. AVX-512 alone; for *_kernel.cpp alone.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>

namespace fastflow::FASTFLOW_ISA {
namespace {

// With a = abs(x) and b = a + 0.75, the exponent and three bits of b tell the piece: 1/16 wide up to a = 0.25, 1/8 up
// to 1.25, 1/4 up to 3.25, 1/2 up to 7.25, then 1. In the distance from the start of the piece tanh(a) is a quartic,
// row by row its coefficients, the lowest first; columns are the last five bits. Fitted for the least relative error,
// the rounding of each coefficient made up for by the next ones; the first piece begins with 0 and 1, so that small
// values keep their relative accuracy. All floats are within 1.31 ulp, in order, and at most 1.
alignas(64) constexpr float tanh_pieces[5][32] = {
    {0x1.b2523cp-1f, 0x1.cf6f98p-1f, 0x1.e1fbfap-1f, 0x1.ed9506p-1f, 0x1.f4bfd6p-1f, 0x1.f92582p-1f, 0x1.fbd50ap-1f,
     0x1.fd77d2p-1f, 0x1.fe767ap-1f, 0x1.ff6f18p-1f, 0x1.ffcaacp-1f, 0x1.ffec62p-1f, 0x1.fff8c8p-1f, 0x1.fffd58p-1f,
     0x1.ffff06p-1f, 0x1.ffffa4p-1f, 0x1.ffffdep-1f, 0x1.fffffcp-1f, 0.f, 0.f, 0.f, 0x1.ff559ap-5f, 0x1.fd5992p-4f,
     0x1.7b8ffap-3f, 0x1.f597eap-3f, 0x1.6ef53ep-2f, 0x1.d9353ep-2f, 0x1.1bf47ep-1f, 0x1.45323ep-1f, 0x1.68665p-1f,
     0x1.85efacp-1f, 0x1.9e5cb6p-1f},
    {0x1.1f25a4p-2f, 0x1.72154cp-3f, 0x1.d229d6p-4f, 0x1.216142p-4f, 0x1.641442p-5f, 0x1.b3b256p-6f, 0x1.09a15p-6f,
     0x1.432b0cp-7f, 0x1.88c19ap-8f, 0x1.21824ep-9f, 0x1.aa8b52p-11f, 0x1.382354p-12f, 0x1.cea666p-14f,
     0x1.56bc7ap-15f, 0x1.ee500ap-17f, 0x1.6f7b1ep-18f, 0x1.2111dap-19f, -0x1.e6aaa8p-22f, 0.f, 0.f, 0x1p+0f,
     0x1.fe013ep-1f, 0x1.f81556p-1f, 0x1.ee695cp-1f, 0x1.e1499ap-1f, 0x1.be3fbp-1f, 0x1.92a91ap-1f, 0x1.62858cp-1f,
     0x1.31742p-1f, 0x1.0250dcp-1f, 0x1.ae0c9p-2f, 0x1.614f96p-2f},
    {-0x1.e76006p-3f, -0x1.4ee5cp-3f, -0x1.b688cp-4f, -0x1.16c44p-4f, -0x1.5c5a32p-5f, -0x1.adccf8p-6f,
     -0x1.06db96p-6f, -0x1.3f16ep-7f, -0x1.849d16p-8f, -0x1.1ee36cp-9f, -0x1.a8a368p-11f, -0x1.271e4p-12f,
     -0x1.d2b89ep-14f, -0x1.6e71cap-15f, -0x1.b83dfp-17f, -0x1.694044p-18f, -0x1.62aa04p-19f, 0x1.2df64ep-18f, 0.f,
     0.f, 0x1.8edb36p-18f, -0x1.fcc62ap-5f, -0x1.f5efd8p-4f, -0x1.6dd4f6p-3f, -0x1.d76aeep-3f, -0x1.3fd1ecp-2f,
     -0x1.7420e4p-2f, -0x1.898556p-2f, -0x1.843192p-2f, -0x1.6bf38p-2f, -0x1.475f1ap-2f, -0x1.1de3f6p-2f},
    {0x1.c196e6p-4f, 0x1.66912p-4f, 0x1.fd48f2p-5f, 0x1.540668p-5f, 0x1.b966c8p-6f, 0x1.13dfeap-6f, 0x1.4e1604p-7f,
     0x1.833e0ap-8f, 0x1.e1406p-9f, 0x1.63ea3cp-10f, 0x1.0bf9p-11f, 0x1.1bb46cp-13f, 0x1.377116p-14f, 0x1.2e5b76p-15f,
     0x1.05a75ep-18f, 0x1.ad629cp-19f, 0x1.251c08p-19f, -0x1.4c821ep-17f, 0.f, 0.f, -0x1.55eccp-2f, -0x1.5271e6p-2f,
     -0x1.3dd3acp-2f, -0x1.310964p-2f, -0x1.088ca6p-2f, -0x1.6e32e4p-3f, -0x1.80a83cp-4f, -0x1.b2baap-7f,
     0x1.710308p-5f, 0x1.61ce66p-4f, 0x1.a32deep-4f, 0x1.c60658p-4f},
    {-0x1.54715p-6f, -0x1.948dbep-6f, -0x1.506528p-6f, -0x1.ecadap-7f, -0x1.5e012ep-7f, -0x1.b96d1p-8f,
     -0x1.eee696p-9f, -0x1.ae2bd4p-10f, -0x1.3fcf26p-10f, -0x1.d9879p-12f, -0x1.7210c2p-13f, -0x1.9cf2d6p-17f,
     -0x1.e41e08p-16f, -0x1.43c21ap-16f, 0x1.2837f6p-19f, -0x1.f9c626p-21f, -0x1.b99924p-21f, 0x1.bc0c66p-18f, 0.f,
     0.f, 0x1.0591b2p-6f, 0x1.26d29p-4f, 0x1.18b206p-4f, 0x1.90be3p-3f, 0x1.3fc84ap-3f, 0x1.5cff8ap-3f,
     0x1.4240e8p-3f, 0x1.bf2814p-4f, 0x1.34b858p-4f, 0x1.094016p-5f, 0x1.9978acp-6f, -0x1.7ba8ap-10f},
};

class TableTanh {
 public:
  TableTanh() {
    for (int j = 0; j < 5; ++j) {
      low_[j] = _mm512_load_ps(tanh_pieces[j]);
      high_[j] = _mm512_load_ps(tanh_pieces[j] + 16);
    }
  }

  // NaN stays: the minimum takes its second operand then. (Masked forms, since GCC 12 warns within the plain ones.)
  inline __attribute__((always_inline)) __m512 operator()(__m512 x) const {
    const __m512 base = _mm512_set1_ps(0.75f);
    const __m512 a = _mm512_maskz_min_ps(0xffff, _mm512_set1_ps(9.f), _mm512_abs_ps(x));
    const __m512i bits = _mm512_castps_si512(_mm512_add_ps(a, base));
    const __m512i piece = _mm512_maskz_srli_epi32(0xffff, bits, 20);
    const __m512 start = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(-1 << 20)));
    const __m512 t = _mm512_sub_ps(a, _mm512_sub_ps(start, base));
    __m512 result = coefficient(4, piece);
    for (int j = 3; j >= 0; --j) result = _mm512_fmadd_ps(result, t, coefficient(j, piece));
    return _mm512_or_ps(result, _mm512_and_ps(x, _mm512_set1_ps(-0.f)));
  }

 private:
  inline __attribute__((always_inline)) __m512 coefficient(int j, __m512i piece) const {
    return _mm512_permutex2var_ps(low_[j], piece, high_[j]);
  }

  __m512 low_[5], high_[5];
};

}  // namespace
}  // namespace fastflow::FASTFLOW_ISA
#endif
