// 3x3 convolutions with padding 1 in Winograd's form F(2x2, 3x3): an output tile of 2x2 pixels from 16 products per
// pair of channels instead of 36 (Winograd, Arithmetic Complexity of Computations, 1980; Lavin and Gray, Fast
// Algorithms for Convolutional Neural Networks, 2016). In one dimension, for inputs d, taps g and outputs y,
//   v = B^T d = (d0 - d2, d1 + d2, d2 - d1, d3 - d1)
//   u = G g   = (g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2)
//   y = A^T m = (m0 + m1 + m2, m1 - m2 + m3),    m = u v,
// and in two the same along rows and columns. With this convolution come its two adjoints, in the same 16 points:
//   towards the input   B (u * A y) summed over the tiles that overlap,
//   towards the taps    G^T (sum over tiles of v * A y).
// So the wide, hidden side only ever meets A (24 additions a tile) or its adjoint (12), never B (32).
//
// Arrays of points are [16][...], the point's row first. Compiled once per instruction set.
#pragma once

#include "conv_segments.h"
#include "conv_tiles.h"
#include "winograd_points.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

// Output tiles out[pixel][j] = A^T m A of `length` adjacent j, with m[16][tile][j] of tiles [begin, end).
template <bool Biased, class T>
__attribute__((noinline)) void put_tiles(const int64_t* at, int64_t begin, int64_t end, const T* m, int64_t length,
                                         const Finish<T>& how, int64_t row, int64_t column, T* out) {
  constexpr int W = Simd<T>::lanes;
  const Finish<T> finish = how;  // a copy, which stores can't change
  const int64_t size = (end - begin) * length;
  for (int64_t t = begin; t < end; ++t)
    for (int64_t j = 0; j < length; j += W, m += W) {
      Vec<T> half[2][4];
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        const Vec<T> m0 = load(m + c * size), m1 = load(m + (4 + c) * size), m2 = load(m + (8 + c) * size),
                     m3 = load(m + (12 + c) * size);
        half[0][c] = m0 + m1 + m2;
        half[1][c] = m1 - m2 + m3;
      }
#pragma GCC unroll 4
      for (int pixel = 0; pixel < 4; ++pixel) {
        const Vec<T>* const h = half[pixel / 2];
        const int64_t to = at[t] + pixel / 2 * row + pixel % 2 * column + j;
        const Vec<T> value = pixel % 2 ? h[1] - h[2] + h[3] : h[0] + h[1] + h[2];
        if constexpr (Biased)
          store(out + to, rectify(value + load(finish.bias + j), finish.slope));
        else
          store(out + to, gated(value, load(finish.gate + to), finish.slope));
      }
    }
}

// A cache line at each pixel of the tiles after those at work, which come from as far as memory: a gate was saved long
// ago, an output is to be saved.
template <class T>
struct Ahead {
  const int64_t* at;
  int64_t tiles, row, column;
  const T* map;

  // Has a sixteenth of them fetched: all at once, they would hold up what is read from the caches meanwhile. Inline,
  // for gcc drops calls of a function that does nothing else.
  [[gnu::always_inline]] void fetch(int part) const {
    for (int64_t t = part / 4; t < tiles; t += 4)
      __builtin_prefetch(map + at[t] + part / 2 % 2 * row + part % 2 * column);
  }
};

// m[16][R tiles][N vectors] of v[16][tile][v_channels] and u[16][channels][N vectors]. A function of its own: inlined,
// its loop would lack registers.
template <int R, int N, class T>
__attribute__((noinline)) void multiply_points(int64_t channels, const T* v, int64_t v_step, int64_t v_channels,
                                               const T* u, T* m, const Ahead<T>& ahead) {
  constexpr int W = Simd<T>::lanes, length = N * W;
  for (int p = 0; p < points; ++p, v += v_step, u += channels * length, m += R * length) {
    ahead.fetch(p);
    Vec<T> sum[R][N];
    const T* in[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      in[r] = v + r * v_channels;
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[r][n] = Vec<T>{};
    }
    add_terms<R, N>({1, channels, 0}, in, u, length, sum);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) store(m + r * length + n * W, sum[r][n]);
  }
}

// The points of taps[9][channels][hidden] in the order in which expand_points reads them, panel by panel: whatever
// lies `hidden` values apart would meet in few sets of the cache.
template <class T>
inline void panel_taps(int64_t channels, int64_t hidden, const T* taps, T* to) {
  const auto spread = [](auto& g, auto& u) { spread_taps<3>(g, u); };
  const int64_t size = channels * hidden;
  for (int64_t j = 0; j < hidden; j += Simd<T>::lanes) {
    const int64_t first = j - j % (expand_vectors * Simd<T>::lanes);
    const int64_t length = panel_vectors<T>(hidden, first) * Simd<T>::lanes;
    for (int64_t k = 0; k < channels; ++k)
      along_both<3, 3, line_points, line_points, T>(
          [&](int a, int b) { return load(taps + (3 * a + b) * size + k * hidden + j); }, spread, spread,
          [&](int a, int b, Vec<T> value) {
            store(to + first * points * channels + ((line_points * a + b) * channels + k) * length + j - first, value);
          });
  }
}

// A few channels to many: out[pixel][j] from points of inputs v[16][tile][v_channels] and of taps as panel_taps puts
// them, with a bias or a gate. at[tile] is where a tile's first pixel lies in maps.
template <class T>
inline void expand_points(const Tiles& tiles, const int64_t* at, int64_t channels, const T* v, int64_t v_step,
                          int64_t v_channels, const T* u, int64_t hidden, const Finish<T>& finish, T* out) {
  constexpr int W = Simd<T>::lanes;
  alignas(64) T products[points * expand_rows * expand_vectors * W];
  const Tiling tiling(tiles.count(), expand_rows);
  const int64_t row = tiles.width() * hidden;
  for (int64_t j = 0; j < hidden; j += expand_vectors * W) {
    const int64_t vectors = panel_vectors<T>(hidden, j), length = vectors * W;
    Finish<T> here = finish;
    if (here.bias) here.bias += j;
    if (here.gate) here.gate += j;
    for (int64_t g = 0, t = 0; g < tiling.tiles; t += tiling[g++]) {
      const int64_t count = tiling[g], next = t + count, left = tiles.count() - next;
      const Ahead<T> ahead{at + next, left < count ? left : count, row, hidden, here.gate ? here.gate : out + j};
      with_count<expand_vectors>(vectors, [&](auto n) {
        with_count<expand_rows>(count, [&](auto r) {
          multiply_points<decltype(r)::value, decltype(n)::value>(channels, v + t * v_channels, v_step, v_channels,
                                                                  u + j * points * channels, products, ahead);
        });
      });
      if (here.bias)
        put_tiles<true>(at, t, t + count, products, length, here, row, hidden, out + j);
      else
        put_tiles<false>(at, t, t + count, products, length, here, row, hidden, out + j);
    }
  }
}

// A point of A y A^T as a sum of one, two or four of the output tile's 2x2 pixels: the number of rows and of columns
// that it takes, the second one's sign before them.
constexpr int point_terms[4] = {1, 2, -2, 1};

// to[r][j] += (if fresh, =) sum over k < count of factors[k][r] (A y A^T)[k][j]; the first pixel of y[k] that counts is
// at y + at[k].
template <int R, int N, int Rows, int Columns, class T>
inline void mixed_tile(int64_t count, const T* factors, int64_t factor_step, const T* y, int64_t down, int64_t right,
                       const int64_t* at, bool fresh, T* to, int64_t to_step) {
  constexpr int W = Simd<T>::lanes;
  const auto column = [&](const T* from) {
    const Vec<T> first = load(from);
    if constexpr (Rows == 1) return first;
    return Rows > 0 ? first + load(from + down) : first - load(from + down);
  };
  Vec<T> sum[R][N] = {};
#pragma GCC unroll 1
  for (int64_t k = 0; k < count; ++k, factors += factor_step) {
    const T* const from = y + at[k];
    Vec<T> row[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      row[n] = column(from + n * W);
      if constexpr (Columns == 2) row[n] += column(from + right + n * W);
      if constexpr (Columns == -2) row[n] -= column(from + right + n * W);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[r][n] += factors[r] * row[n];
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      T* const place = to + r * to_step + n * W;
      store(place, fresh ? sum[r][n] : load(place) + sum[r][n]);
    }
}

// The same for `rows` factors and N vectors, of every point: factors[16], to[16].
template <int N, class T>
inline void mixed_products(int64_t rows, int64_t count, const T* factors, int64_t factor_point, int64_t factor_step,
                           const T* y, int64_t down, int64_t right, const int64_t* at, bool fresh, T* to,
                           int64_t to_point, int64_t to_step) {
  const Tiling tiling(rows, expand_rows);
  const auto point = [&](auto i, auto j) {
    constexpr int p = 4 * decltype(i)::value + decltype(j)::value;
    constexpr int down_terms = point_terms[decltype(i)::value], right_terms = point_terms[decltype(j)::value];
    const T* const first = y + (p / 4 == 3 ? down : 0) + (p % 4 == 3 ? right : 0);
    for (int64_t g = 0, r = 0; g < tiling.tiles; r += tiling[g++])
      with_count<expand_rows>(tiling[g], [&](auto height) {
        mixed_tile<decltype(height)::value, N, down_terms, right_terms>(
            count, factors + p * factor_point + r, factor_step, first, down, right, at, fresh,
            to + p * to_point + r * to_step, to_step);
      });
  };
  const auto row = [&](auto i) {
    point(i, Count<0>{});
    point(i, Count<1>{});
    point(i, Count<2>{});
    point(i, Count<3>{});
  };
  row(Count<0>{});
  row(Count<1>{});
  row(Count<2>{});
  row(Count<3>{});
}

// Values of a map that its adjoints copy, to have them side by side in the first-level cache: pixels that lie a power of
// two apart meet in few of its sets.
#if defined(__AVX512F__)
constexpr int64_t copied_values = 8192;
#else
constexpr int64_t copied_values = 4096;
#endif

// Adjoint towards the taps: to[16][channels][j] += (if fresh, =) sum over tiles of v[tile][channel] (A y A^T)[tile][j],
// for maps y[pixel][j]; at[tile] is where a tile's first pixel lies in them.
template <class T>
inline void outer_points(const Tiles& tiles, const int64_t* at, int64_t channels, const T* v, int64_t v_step,
                         int64_t v_channels, const T* y, int64_t hidden, bool fresh, T* to) {
  constexpr int W = Simd<T>::lanes;
  constexpr int64_t most = copied_values / (4 * expand_vectors * W);
  alignas(64) T copied[copied_values];
  int64_t lines[most];
  const int64_t row = tiles.width() * hidden;
  for (int64_t t = 0; t < tiles.count(); t += most) {
    const int64_t count = tiles.count() - t < most ? tiles.count() - t : most;
    for (int64_t j = 0; j < hidden; j += expand_vectors * W)
      with_count<expand_vectors>(panel_vectors<T>(hidden, j), [&](auto n) {
        constexpr int N = decltype(n)::value;
        for (int64_t i = 0; i < count; ++i) {
          lines[i] = 4 * N * W * i;
#pragma GCC unroll 4
          for (int pixel = 0; pixel < 4; ++pixel) {
            const T* const from = y + at[t + i] + pixel / 2 * row + pixel % 2 * hidden + j;
#pragma GCC unroll 4
            for (int l = 0; l < N; ++l) store(copied + lines[i] + (pixel * N + l) * W, load(from + l * W));
          }
        }
        mixed_products<N>(channels, count, v + t * v_channels, v_step, v_channels, copied, 2 * N * W, N * W, lines,
                          fresh && t == 0, to + j, channels * hidden, hidden);
      });
  }
}

// Adjoint towards the input, first half: many channels to a few, to[16][channel][tile] = sum over j of
// (A y A^T)[tile][j] u[16][j][channel], for maps y[pixel][j]. Vectors run along tiles, `padded` in whole vectors.
template <class T>
inline void reduce_points(const Tiles& tiles, const int64_t* at, int64_t padded, const T* y, int64_t hidden, const T* u,
                          int64_t channels, const T* zeros, T* to, int64_t step) {
  constexpr int W = Simd<T>::lanes;
  constexpr int64_t most = expand_vectors * W;           // tiles at once
  constexpr int64_t depth = copied_values / (4 * most);  // hidden channels at once
  alignas(64) T turned[copied_values];                   // [pixel of the tile][j][tile]
  const int64_t row = tiles.width() * hidden;
  for (int64_t t = 0; t < padded; t += most) {
    const int64_t length = padded - t < most ? padded - t : most;
    int64_t lines[depth];
    for (int64_t i = 0; i < depth; ++i) lines[i] = i * length;
    for (int64_t j = 0; j < hidden; j += depth) {
      const int64_t deep = hidden - j < depth ? hidden - j : depth;
      for (int64_t l = 0; l < length; l += W)
        for (int pixel = 0; pixel < 4; ++pixel)
          for (int64_t i = 0; i < deep; i += W) {
            Vec<T> x[W];
            const int64_t offset = pixel / 2 * row + pixel % 2 * hidden + j + i;
#pragma GCC unroll 16
            for (int w = 0; w < W; ++w) x[w] = load(t + l + w < tiles.count() ? y + at[t + l + w] + offset : zeros);
            transpose<T>(x);
#pragma GCC unroll 16
            for (int w = 0; w < W; ++w) store(turned + (pixel * deep + i + w) * length + l, x[w]);
          }
      with_count<expand_vectors>(length / W, [&](auto n) {
        mixed_products<decltype(n)::value>(channels, deep, u + j * channels, hidden * channels, channels, turned,
                                           2 * deep * length, deep * length, lines, j == 0, to + t, step, padded);
      });
    }
  }
}

// Which neighbours a tile has inside its sample: all bits or none, per tile.
template <class T>
struct Neighbours {
  using Integer = typename Simd<T>::Integer;
  Integer *above, *below, *left, *right;

  void fill(const Tiles& tiles, int64_t padded) const {
    for (int64_t t = 0; t < padded; ++t) {
      const int64_t y = t / tiles.columns % tiles.rows, x = t % tiles.columns;
      above[t] = y > 0 ? -1 : 0;
      below[t] = y + 1 < tiles.rows ? -1 : 0;
      left[t] = x > 0 ? -1 : 0;
      right[t] = x + 1 < tiles.columns ? -1 : 0;
    }
  }
};

template <class T>
inline Vec<T> masked(Vec<T> x, typename Simd<T>::Lane mask) {
  typename Simd<T>::Lane bits;
  __builtin_memcpy(&bits, &x, sizeof x);
  bits &= mask;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// Second half: each tile's B p B^T of 4x4 pixels, added up where tiles overlap. For every channel in turn,
// put(channel, pixel of the tile, first tile, values of a vector of tiles). `working` has points times
// point_step(padded + 2 margin) values.

template <class T, class Put>
inline void overlap_points(const Tiles& tiles, int64_t padded, int64_t channels, const T* p, int64_t step,
                           const Neighbours<T>& near, T* working, const Put& put) {
  constexpr int W = Simd<T>::lanes;
  const int64_t margin = (tiles.columns + W) / W * W, size = point_step<T>(padded + 2 * margin);
  for (int64_t i = 0; i < points * size; i += W) store(working + i, Vec<T>{});
  T* const grid = working + margin;
  const auto mask = [](const typename Neighbours<T>::Integer* from) {
    typename Simd<T>::Lane lanes;
    __builtin_memcpy(&lanes, from, sizeof lanes);
    return lanes;
  };
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t t = 0; t < padded; t += W) {
      Vec<T> half[4][4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const T* const at = p + i * step + c * padded + t;
        const Vec<T> p0 = load(at), p1 = load(at + 4 * step), p2 = load(at + 8 * step), p3 = load(at + 12 * step);
        half[0][i] = p0;
        half[1][i] = p1 - p2 - p3;
        half[2][i] = p1 + p2 - p0;
        half[3][i] = p3;
      }
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const Vec<T>* const h = half[r];
        T* const at = grid + 4 * r * size + t;
        store(at, h[0]);
        store(at + size, h[1] - h[2] - h[3]);
        store(at + 2 * size, h[1] + h[2] - h[0]);
        store(at + 3 * size, h[3]);
      }
    }
    for (int64_t t = 0; t < padded; t += W)
#pragma GCC unroll 2
      for (int a = 0; a < 2; ++a) {
        const auto vertical = mask((a ? near.below : near.above) + t);
        const int64_t row_shift = a ? tiles.columns : -tiles.columns;
#pragma GCC unroll 2
        for (int b = 0; b < 2; ++b) {
          const auto horizontal = mask((b ? near.right : near.left) + t);
          const int64_t shift = b ? 1 : -1;
          const T* const own = grid + (4 * (1 + a) + 1 + b) * size + t;
          const T* const beside = grid + (4 * (1 + a) + (b ? 0 : 3)) * size + t + shift;
          const T* const across = grid + (4 * (a ? 0 : 3) + 1 + b) * size + t + row_shift;
          const T* const corner = grid + (4 * (a ? 0 : 3) + (b ? 0 : 3)) * size + t + row_shift + shift;
          put(c, 2 * a + b, t,
              (load(own) + masked<T>(load(beside), horizontal)) +
                  (masked<T>(load(across), vertical) + masked<T>(load(corner), vertical & horizontal)));
        }
      }
  }
}

}  // namespace
}  // namespace fastflow::FASTFLOW_ISA
