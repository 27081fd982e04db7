// The step of winograd.h from a few channels to many where there are registers enough: the products of half the points,
// two columns of four, of three tiles are summed up and taken through A^T where they are, so that no point is stored.
//
// The taps' points lie as they are read: [vector of outputs][pair of columns][channel][row][column][lane]. Compiled once
// per instruction set.
#pragma once

#include "conv_segments.h"
#include "conv_tiles.h"
#include "winograd_points.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

#if defined(__AVX512F__)
constexpr bool expands_in_pairs = true;  // 24 sums of 32 registers
#else
constexpr bool expands_in_pairs = false;
#endif
constexpr int pair_points = 8, pair_tiles = 3;

// The points of taps[9][channels][hidden], hidden in whole vectors.
template <class T>
inline void pair_taps(int64_t channels, int64_t hidden, const T* taps, T* to) {
  constexpr int W = Simd<T>::lanes;
  const auto spread = [](auto& g, auto& u) { spread_taps<3>(g, u); };
  const int64_t size = channels * hidden;
  for (int64_t j = 0; j < hidden; j += W)
    for (int64_t k = 0; k < channels; ++k)
      along_both<3, 3, line_points, line_points, T>(
          [&](int a, int b) { return load(taps + (3 * a + b) * size + k * hidden + j); }, spread, spread,
          [&](int a, int b, Vec<T> value) {
            store(to + ((j / W * 2 + b / 2) * channels + k) * pair_points * W + (2 * a + b % 2) * W, value);
          });
}

// The value in a register of its own: each of its products takes the other factor from memory then, one broadcast
// scalar, which costs less than the vector.
template <class T>
inline Vec<T> in_register(Vec<T> x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#endif
  return x;
}

// Sums of the pair's points of R tiles, v[16][tile][v_channels] from the pair's first point on.
template <int R, class T>
inline void multiply_pair(int64_t channels, const T* v, int64_t v_step, int64_t v_channels, const T* u,
                          Vec<T> (&sum)[R][pair_points]) {
  constexpr int W = Simd<T>::lanes;
  const T* factors[pair_points];
#pragma GCC unroll 8
  for (int q = 0; q < pair_points; ++q) factors[q] = v + (q / 2 * 4 + q % 2) * v_step;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int q = 0; q < pair_points; ++q) sum[r][q] = Vec<T>{};
#pragma GCC unroll 1
  for (int64_t k = 0; k < channels; ++k, u += pair_points * W) {
#pragma GCC unroll 8
    for (int q = 0; q < pair_points; ++q) {
      const Vec<T> tap = in_register<T>(load(u + q * W));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][q] += factors[q][r * v_channels] * tap;
      ++factors[q];
    }
  }
}

// A^T of a pair's columns: half[output row][column].
template <class T>
inline void gather_rows(const Vec<T> (&m)[pair_points], Vec<T> (&half)[2][2]) {
#pragma GCC unroll 2
  for (int c = 0; c < 2; ++c) {
    half[0][c] = m[c] + m[2 + c] + m[4 + c];
    half[1][c] = m[2 + c] - m[4 + c] + m[6 + c];
  }
}

// One vector of outputs of R tiles.
template <int R, bool Biased, class T>
[[gnu::noinline]] void expand_pair_tiles(const int64_t* at, int64_t channels, const T* v, int64_t v_step,
                                         int64_t v_channels, const T* u, const Finish<T>& finish, int64_t row,
                                         int64_t column, T* out) {
  Vec<T> sum[R][pair_points], begun[R][2][2];
  multiply_pair<R>(channels, v, v_step, v_channels, u, sum);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    Vec<T> half[2][2];
    gather_rows<T>(sum[r], half);
#pragma GCC unroll 2
    for (int a = 0; a < 2; ++a) {
      begun[r][a][0] = half[a][0] + half[a][1];
      begun[r][a][1] = half[a][1];
    }
  }
  multiply_pair<R>(channels, v + 2 * v_step, v_step, v_channels, u + channels * pair_points * Simd<T>::lanes, sum);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    Vec<T> half[2][2];
    gather_rows<T>(sum[r], half);
#pragma GCC unroll 2
    for (int a = 0; a < 2; ++a) {
      const Vec<T> values[2] = {begun[r][a][0] + half[a][0], begun[r][a][1] - half[a][0] + half[a][1]};
#pragma GCC unroll 2
      for (int b = 0; b < 2; ++b) {
        const int64_t to = at[r] + a * row + b * column;
        if constexpr (Biased)
          store(out + to, rectify(values[b] + load(finish.bias), finish.slope));
        else
          store(out + to, gated(values[b], load(finish.gate + to), finish.slope));
      }
    }
  }
}

// As winograd.h's expand_points, of taps as pair_taps puts them.
template <class T>
inline void expand_pairs(const Tiles& tiles, const int64_t* at, int64_t channels, const T* v, int64_t v_step,
                         int64_t v_channels, const T* u, int64_t hidden, const Finish<T>& finish, T* out) {
  constexpr int W = Simd<T>::lanes;
  const Tiling tiling(tiles.count(), pair_tiles);
  const int64_t row = tiles.width() * hidden;
  for (int64_t j = 0; j < hidden; j += W, u += points * channels * W) {
    Finish<T> here = finish;
    if (here.bias) here.bias += j;
    if (here.gate) here.gate += j;
    for (int64_t g = 0, t = 0; g < tiling.tiles; t += tiling[g++]) {
      // The next tiles' lines, which are as far away as memory: a gate was saved long ago, an output is to be saved.
      const int64_t next = t + tiling[g];
      for (int64_t i = next; i < tiles.count() && i < next + pair_tiles; ++i)
        for (int64_t pixel = 0; pixel < 4; ++pixel) {
          const int64_t line = at[i] + pixel / 2 * row + pixel % 2 * hidden;
          if (here.gate)
            __builtin_prefetch(here.gate + line);
          else
            __builtin_prefetch(out + j + line, 1);
        }
      with_count<pair_tiles>(tiling[g], [&](auto r) {
        constexpr int R = decltype(r)::value;
        if (here.bias)
          expand_pair_tiles<R, true>(at + t, channels, v + t * v_channels, v_step, v_channels, u, here, row, hidden,
                                     out + j);
        else
          expand_pair_tiles<R, false>(at + t, channels, v + t * v_channels, v_step, v_channels, u, here, row, hidden,
                                      out + j);
      });
    }
  }
}

}  // namespace
}  // namespace fastflow::FASTFLOW_ISA
