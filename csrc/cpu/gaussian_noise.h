// Philox's normals, a vector of blocks at a time.
#pragma once

#include "cursor.h"
#include "gaussian_kernel.h"
#include "normals.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fastflow::FASTFLOW_ISA {
namespace {

// Blocks side by side, a word of each in 64 bits: the product of 32-bit words is then one instruction, which no
// compiler is known to find by itself.
#if defined(__SSE2__)
#if defined(__AVX512F__)
constexpr int lanes = 8;
#elif defined(__AVX2__)
constexpr int lanes = 4;
#else
constexpr int lanes = 2;
#endif
using LaneVector = uint64_t __attribute__((vector_size(8 * lanes)));

struct Lanes {
  LaneVector v;
};

FASTFLOW_HD Lanes operator^(Lanes a, Lanes b) { return {a.v ^ b.v}; }
FASTFLOW_HD Lanes operator^(Lanes a, uint64_t b) { return {a.v ^ b}; }
FASTFLOW_HD Lanes operator>>(Lanes a, int bits) { return {a.v >> bits}; }
FASTFLOW_HD Lanes wide_product(Lanes a, uint32_t multiplier) {
  const LaneVector m = LaneVector{} + uint64_t(multiplier);
#if defined(__AVX512F__)
  // The unmasked intrinsic makes GCC 12 warn of an uninitialised value inside its own header.
  return {LaneVector(_mm512_maskz_mul_epu32(0xff, __m512i(a.v), __m512i(m)))};
#elif defined(__AVX2__)
  return {LaneVector(_mm256_mul_epu32(__m256i(a.v), __m256i(m)))};
#else
  return {LaneVector(_mm_mul_epu32(__m128i(a.v), __m128i(m)))};
#endif
}
// Two words of each block, one after the other in memory.
FASTFLOW_HD void store_pairs(uint32_t* out, Lanes first, Lanes second) {
  const LaneVector pairs = (first.v & uint64_t(0xffffffffu)) | (second.v << 32);
  __builtin_memcpy(out, &pairs, sizeof pairs);
}
FASTFLOW_HD Lanes counters(uint64_t first) {
  Lanes result;
  for (int i = 0; i < lanes; ++i) result.v[i] = first + static_cast<uint64_t>(i);
  return result;
}
FASTFLOW_HD Lanes advance(Lanes counter) { return {counter.v + uint64_t(lanes)}; }
#else
constexpr int lanes = 1;
using Lanes = uint64_t;

using philox::wide_product;
FASTFLOW_HD void store_pairs(uint32_t* out, Lanes first, Lanes second) {
  out[0] = static_cast<uint32_t>(first);
  out[1] = static_cast<uint32_t>(second);
}
FASTFLOW_HD Lanes counters(uint64_t first) { return first; }
FASTFLOW_HD Lanes advance(Lanes counter) { return counter + 1; }
#endif

// Blocks are made in batches of this size, of which the last may go beyond what was asked for: every normal comes out
// of the same instructions, wherever it stands.
constexpr int64_t batch_blocks = 8, most_blocks = 64;

// The normals of `blocks` blocks (a multiple of batch_blocks) from counter `first`.
[[gnu::noinline]] void normals_of(float* __restrict out, uint64_t first, int64_t blocks, uint64_t seed) {
  alignas(64) uint32_t radius[2 * most_blocks], angle[2 * most_blocks];
  const uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  Lanes counter = counters(first);
  while (blocks > 0) {
    const int64_t now = blocks < most_blocks ? blocks : most_blocks;
    for (int64_t b = 0; b < now; b += lanes) {
      const philox::Words<Lanes> w =
          philox::generate(philox::Words<Lanes>{counter, counter >> 32, Lanes{}, Lanes{}}, key0, key1);
      counter = advance(counter);
      store_pairs(radius + 2 * b, w.w0, w.w2);
      store_pairs(angle + 2 * b, w.w1, w.w3);
    }
    for (int64_t b = 0; b < now; b += batch_blocks) {
#if defined(__AVX512F__)
      store_normals(out + 4 * b, _mm512_load_si512(radius + 2 * b), _mm512_load_si512(angle + 2 * b));
#else
#pragma omp simd
      for (int64_t i = 2 * b; i < 2 * (b + batch_blocks); ++i) {
        const philox::Pair pair = philox::normals(radius[i], angle[i]);
        out[2 * i] = pair.first;
        out[2 * i + 1] = pair.second;
      }
#endif
    }
    out += 4 * now;
    blocks -= now;
  }
}

// A tile of noise needs a block's rest in front and a batch's rest behind.
constexpr int64_t noise_size = gaussian::chunk + 8 * batch_blocks;

// Normals [first, first + count) of the stream keyed by `seed`, within scratch (noise_size floats).
inline const float* draw(float* scratch, int64_t first, int64_t count, uint64_t offset, uint64_t seed) {
  const uint64_t block = static_cast<uint64_t>(first) >> 2;
  const int64_t skip = first & 3, blocks = (skip + count + 3) >> 2;
  normals_of(scratch, block + offset, (blocks + batch_blocks - 1) / batch_blocks * batch_blocks, seed);
  return scratch + skip;
}

// Elements [at, at + count), where they lie if they lie as contiguous T, else copied into buffer.
template <class T>
const T* fetch(const Operand& operand, int64_t at, int64_t count, T* buffer) {
  Cursor<T> cursor;
  cursor.seek(operand, at);
  return cursor.read(count, buffer);
}

// The noise of elements [first, first + count) of sample k, given or drawn.
template <class T>
const T* noise_at(const gaussian::Problem& p, int64_t k, int64_t first, int64_t count, float* drawn, T* buffer) {
  const gaussian::Noise& noise = p.noise;
  const int64_t at = k * p.total + first;
  if (noise.given.data != nullptr) return fetch(noise.given, at, count, buffer);
  const int64_t sample = static_cast<int64_t>(static_cast<uint64_t>(first) / static_cast<uint64_t>(p.length));
  if (noise.seed_stride == 0 || first + count <= (sample + 1) * p.length) {
    const uint64_t seed = static_cast<uint64_t>(noise.seeds[sample * noise.seed_stride]);
    const float* const eps = draw(drawn, at, count, noise.offset, seed);
    if constexpr (sizeof(T) == sizeof(float)) return eps;
    for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<T>(eps[i]);
    return buffer;
  }
  for (int64_t done = 0; done < count;) {
    const int64_t b = (first + done) / p.length, left = (b + 1) * p.length - (first + done);
    const int64_t run = left < count - done ? left : count - done;
    const uint64_t seed = static_cast<uint64_t>(noise.seeds[b * noise.seed_stride]);
    const float* const eps = draw(drawn, at + done, run, noise.offset, seed);
    for (int64_t i = 0; i < run; ++i) buffer[done + i] = eps[i];
    done += run;
  }
  return buffer;
}

}  // namespace
}  // namespace fastflow::FASTFLOW_ISA
