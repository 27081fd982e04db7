// Winograd's form F(2x2, 3x3) of 3x3 convolutions (winograd.h): tiles of images and points of inputs; the points of
// taps are conv_segments.h's. Compiled once per instruction set.
#pragma once

#include "vectors.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

constexpr int points = 16;

// Samples of rows x columns tiles, two pixels by two, that are worked on together.
struct Tiles {
  int64_t samples, rows, columns;
  int64_t of_sample() const { return rows * columns; }
  int64_t count() const { return samples * of_sample(); }
  int64_t width() const { return 2 * columns; }
};

// For each tile in turn: f(tile, number of its first pixel in maps (sample, row, column)).
template <class F>
inline void for_each_tile(const Tiles& tiles, int64_t begin, int64_t end, const F& f) {
  int64_t row = begin / tiles.columns, column = begin % tiles.columns;
  for (int64_t t = begin; t < end; ++t) {
    f(t, 2 * (row * tiles.width() + column));
    if (++column == tiles.columns) column = 0, ++row;
  }
}

// One array per point, `step` values apart: an odd number of cache lines, or all points would meet in the same sets.
template <class T>
inline int64_t point_step(int64_t values) {
  constexpr int64_t line = 64 / sizeof(T);
  return (values + line - 1) / line * line | line;
}

// Points of inputs, v[16][tile][channels], of samples with channels innermost, in whole vectors, and a border of one.
template <class T>
inline void input_points(const Tiles& tiles, int64_t channels, const T* bordered, T* v, int64_t step) {
  constexpr int W = Simd<T>::lanes;
  const int64_t row = (tiles.width() + 2) * channels, sample = (2 * tiles.rows + 2) * row;
  for (int64_t s = 0, t = 0; s < tiles.samples; ++s)
    for (int64_t y = 0; y < tiles.rows; ++y)
      for (int64_t x = 0; x < tiles.columns; ++x, ++t)
        for (int64_t c = 0; c < channels; c += W) {
          const T* const from = bordered + s * sample + 2 * y * row + 2 * x * channels + c;
          T* const to = v + t * channels + c;
          Vec<T> half[4][4];
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) {
            const T* const at = from + j * channels;
            const Vec<T> d0 = load(at), d1 = load(at + row), d2 = load(at + 2 * row), d3 = load(at + 3 * row);
            half[0][j] = d0 - d2;
            half[1][j] = d1 + d2;
            half[2][j] = d2 - d1;
            half[3][j] = d3 - d1;
          }
#pragma GCC unroll 4
          for (int r = 0; r < 4; ++r) {
            const Vec<T>* const d = half[r];
            store(to + (4 * r) * step, d[0] - d[2]);
            store(to + (4 * r + 1) * step, d[1] + d[2]);
            store(to + (4 * r + 2) * step, d[2] - d[1]);
            store(to + (4 * r + 3) * step, d[3] - d[1]);
          }
        }
}

}  // namespace
}  // namespace fastflow::FASTFLOW_ISA
