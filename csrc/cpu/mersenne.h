// torch's CPU generator (ATen/core/MT19937RNGEngine.h: Matsumoto and Nishimura, "Mersenne Twister", 1998) from its
// state's bytes (ATen/CPUGeneratorImpl.cpp), and the normals that torch.randn makes of its words.
#pragma once

#include <cstdint>
#include <cstring>

#include "normals.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

class Mersenne {
 public:
  // `state`: torch.Generator.get_state()'s 5056 bytes; what is not of this engine stays as it is.
  explicit Mersenne(const char* state) {
    int32_t left;
    uint64_t next, words[length];
    std::memcpy(&left, state + left_at, sizeof left);
    std::memcpy(&next, state + next_at, sizeof next);
    std::memcpy(words, state + words_at, sizeof words);
    for (int i = 0; i < length; ++i) words_[i] = static_cast<uint32_t>(words[i]);
    left_ = left - 1;
    next_ = static_cast<int64_t>(next);
  }

  void store(char* state) const {
    const int32_t left = static_cast<int32_t>(left_ + 1);
    const uint64_t next = static_cast<uint64_t>(next_);
    uint64_t words[length];
    for (int i = 0; i < length; ++i) words[i] = words_[i];
    std::memcpy(state + left_at, &left, sizeof left);
    std::memcpy(state + next_at, &next, sizeof next);
    std::memcpy(state + words_at, words, sizeof words);
  }

  void draw(uint32_t* out, int64_t count) {
    while (count > 0) {
      if (left_ == 0) turn();
      const int64_t now = count < left_ ? count : left_;
      const uint32_t* const from = words_ + next_;
#pragma omp simd
      for (int64_t i = 0; i < now; ++i) {
        uint32_t y = from[i];
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c5680u;
        y ^= (y << 15) & 0xefc60000u;
        out[i] = y ^ (y >> 18);
      }
      out += now;
      count -= now;
      left_ -= now;
      next_ += now;
    }
  }

 private:
  static constexpr int length = 624, shift = 397;
  static constexpr int left_at = 8, next_at = 16, words_at = 24;

  static uint32_t turned(uint32_t far, uint32_t u, uint32_t v) {
    const uint32_t mixed = (u & 0x80000000u) | (v & 0x7fffffffu);
    return far ^ (mixed >> 1) ^ ((v & 1u) ? 0x9908b0dfu : 0u);
  }

  // The next words. Each reads words that are there in front of it: of the old ones up to 397 further on, of the new
  // ones from 227 back, so that a vector of up to 227 is right at once.
  [[gnu::noinline]] void turn() {
#pragma omp simd safelen(16)
    for (int i = 0; i < length - shift; ++i) words_[i] = turned(words_[i + shift], words_[i], words_[i + 1]);
#pragma omp simd safelen(16)
    for (int i = length - shift; i < length - 1; ++i)
      words_[i] = turned(words_[i + shift - length], words_[i], words_[i + 1]);
    words_[length - 1] = turned(words_[shift - 1], words_[length - 1], words_[0]);
    left_ = length;
    next_ = 0;
  }

  alignas(64) uint32_t words_[length];
  int64_t left_, next_;  // words of this turn that are left, and the first of them
};

// Of sixteen words eight are radii and eight are angles: normals in their place, as of torch.randn in float32.
inline void normals_in_place(float* values, int64_t blocks) {
#if defined(__AVX512F__)
  for (; blocks >= 2; blocks -= 2, values += 32) {
    const __m512i a = _mm512_loadu_si512(values), b = _mm512_loadu_si512(values + 16);
    const __m512i radii = _mm512_maskz_shuffle_i64x2(0xff, a, b, 0x44);
    const __m512i angles = _mm512_maskz_shuffle_i64x2(0xff, a, b, 0xee);
    const __m512i mask = of_all(0xffffffu);
    const __m512i k = _mm512_sub_epi32(of_all(1u << 24), _mm512_and_epi32(radii, mask));
    const __m512 r = radius(_mm512_maskz_cvtepi32_ps(0xffff, k) * of_all(256.f), of_all(0.f));
    __m512 cosine, sine;
    cos_sin(_mm512_maskz_slli_epi32(0xffff, angles, 8), 0, cosine, sine);
    const __m512i first = _mm512_castps_si512(r * cosine), second = _mm512_castps_si512(r * sine);
    _mm512_storeu_si512(values, _mm512_maskz_shuffle_i64x2(0xff, first, second, 0x44));
    _mm512_storeu_si512(values + 16, _mm512_maskz_shuffle_i64x2(0xff, first, second, 0xee));
  }
#endif
  for (; blocks > 0; --blocks, values += 16) {
    uint32_t words[16];
    std::memcpy(words, values, sizeof words);
#pragma omp simd
    for (int i = 0; i < 8; ++i) {
      const int32_t k = (1 << 24) - static_cast<int32_t>(words[i] & 0xffffffu);
      const float r = philox::radius(2 * k);
      const philox::Pair direction = philox::cos_sin(2 * static_cast<int32_t>(words[i + 8] & 0xffffffu));
      values[i] = r * direction.first;
      values[i + 8] = r * direction.second;
    }
  }
}

}  // namespace
}  // namespace fastflow::FASTFLOW_ISA
