// Stores that bypass the caches, for results too large to be found there again: they spare reading what they overwrite.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fastflow::FASTFLOW_ISA {
namespace {

constexpr int64_t stream_alignment = 64;

// n elements to an address that is a multiple of stream_alignment.
template <class T>
inline void stream(T* __restrict to, const T* __restrict from, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  constexpr int64_t step = 64 / sizeof(T);
  for (; i + step <= n; i += step)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
#elif defined(__AVX__)
  constexpr int64_t step = 32 / sizeof(T);
  for (; i + step <= n; i += step)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
#elif defined(__SSE2__)
  constexpr int64_t step = 16 / sizeof(T);
  for (; i + step <= n; i += step)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
#endif
  for (; i < n; ++i) to[i] = from[i];
}

// Puts streamed stores before whatever tells another thread that they are done.
inline void end_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace fastflow::FASTFLOW_ISA
