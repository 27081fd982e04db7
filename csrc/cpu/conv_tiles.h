// The three products that a chain of convolutions over channels-last pixels is made of, in tiles of registers:
//   expand   a few channels to many:  out[p][j] = sum_k in[p + k] w[k][j], vectors along j
//   reduce   many channels to a few:  out[p][o] = sum_j in[p][j] w[o][j], vectors along the sum
//   outer    their weights' gradient: to[k][j] += sum_p in[p + k] v[p][j], vectors along j
// j runs over the hidden channels, a multiple of the lanes. Compiled once per instruction set.
#pragma once

#include <cstdint>

#include "vectors.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int expand_rows = 6, expand_vectors = 4, reduce_pixels = 4, reduce_outputs = 6;  // 24 sums, 32 registers
#elif defined(__AVX2__)
constexpr int expand_rows = 6, expand_vectors = 2, reduce_pixels = 4, reduce_outputs = 3;  // 12 sums, 16 registers
#else
constexpr int expand_rows = 4, expand_vectors = 2, reduce_pixels = 4, reduce_outputs = 2;  // 8: no fused add here
#endif

// Splits working memory into arrays that begin on cache lines.
template <class T>
struct Arena {
  T* next;
  T* take(int64_t count) {
    T* const result = next;
    constexpr int64_t line = 64 / sizeof(T);
    next += (count + line - 1) / line * line;
    return result;
  }
};

// Scalars of one pixel that a sum runs over: `count` runs of `length` adjacent ones, `step` apart.
struct Runs {
  int64_t count, length, step;
};

// What becomes of an expanded value: a bias and a rectifier in front, a rectifier's slope behind.
template <class T>
struct Finish {
  const T* bias = nullptr;    // of output j; with it, negative sums are multiplied by slope
  const T* gate = nullptr;    // gate[p][j]; where it is not positive, the sum is multiplied by slope
  int64_t gate_step = 0;
  T slope = 0;
};

// max(x, 0) or leaky, as torch.relu and leaky_relu treat NaN and infinities.
template <class T>
inline Vec<T> rectify(Vec<T> x, T slope) {
  const Vec<T> zero{};
  return x <= zero ? (slope == T(0) ? zero : x * slope) : x;
}

template <class T>
inline Vec<T> gated(Vec<T> x, Vec<T> gate, T slope) {
  const Vec<T> zero{};
  if (slope == T(0)) return gate <= zero ? zero : x;
  return gate > zero ? x : x * slope;
}

// Pixels in rows of `width`; a whole image of adjacent ones can be a single row.
template <class T>
struct Grid {
  T* first;
  int64_t width, step, row;
};

// Goes from pixel to pixel of a grid.
template <class T>
struct Walk {
  T* at;
  int64_t left, width, step, jump;
  Walk(const Grid<T>& grid, int64_t offset)
      : at(grid.first + offset), left(grid.width), width(grid.width), step(grid.step),
        jump(grid.row - grid.width * grid.step) {}
  T* next() {
    T* const result = at;
    at += step;
    if (--left == 0) {
      left = width;
      at += jump;
    }
    return result;
  }
};

// A sum's part over some of its runs: the last finishes the value, to which the bias is added then; a sum that began
// with it would round more.
struct Part {
  bool first, last;
};

// sum[r][n] += the terms of R pixels, whose scalars begin at in[r], with rows of w.
template <int R, int N, class T>
[[gnu::always_inline]] inline void add_terms(const Runs& runs, const T* (&in)[R], const T* w, int64_t w_step,
                                             Vec<T> (&sum)[R][N]) {
  constexpr int W = Simd<T>::lanes;
  for (int64_t run = 0; run < runs.count; ++run) {
#pragma GCC unroll 1
    for (int64_t l = 0; l < runs.length; ++l, w += w_step) {
      Vec<T> row[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) row[n] = load(w + n * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const T factor = in[r][l];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[r][n] += factor * row[n];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) in[r] += runs.step;
  }
}

// A function of its own: inlined into a large one, its sums do not all stay in registers.
template <int R, int N, class T>
[[gnu::noinline]] void expand_tile(const Runs& runs, Part part, Walk<const T>& from, const T* w, int64_t w_step,
                                   const Finish<T>& finish, Walk<T>& to) {
  constexpr int W = Simd<T>::lanes;
  Vec<T> sum[R][N];
  const T* in[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    in[r] = from.next();
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[r][n] = Vec<T>{};
  }
  add_terms<R, N>(runs, in, w, w_step, sum);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    T* const out = to.next();
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      Vec<T> value = sum[r][n];
      if (!part.first) value += load(out + n * W);
      if (!part.last) {
        store(out + n * W, value);
        continue;
      }
      if (finish.bias) value = rectify(value + load(finish.bias + n * W), finish.slope);
      if (finish.gate) value = gated(value, load(finish.gate + r * finish.gate_step + n * W), finish.slope);
      store(out + n * W, value);
    }
  }
}

// The number of pixels in each of the fewest tiles that hold `width`, the larger tiles first.
struct Tiling {
  int64_t tiles, least, larger;
  Tiling(int64_t width, int64_t most)
      : tiles((width + most - 1) / most), least(tiles ? width / tiles : 0), larger(tiles ? width % tiles : 0) {}
  int64_t operator[](int64_t tile) const { return least + (tile < larger); }
};

// The vectors of a panel, which is as many of the hidden channels from j on as are computed at once.
template <class T>
inline int64_t panel_vectors(int64_t hidden, int64_t j) {
  constexpr int64_t lanes = Simd<T>::lanes;
  return hidden - j < expand_vectors * lanes ? (hidden - j) / lanes : expand_vectors;
}

// The values j < hidden of `count` pixels of `to` from the scalars of those of `from`. Where a sum has more terms than
// `longest`, it is one of pieces of its runs, each taken over all the pixels: its weights stay in the first-level cache
// then, and the rounding of a long sum in one go does not show.
template <class T>
inline void expand(const Runs& runs, int64_t count, const Grid<const T>& from, const T* w, int64_t hidden,
                   const Finish<T>& finish, const Grid<T>& to, int64_t longest = INT64_MAX) {
  constexpr int W = Simd<T>::lanes;
  const bool whole = runs.count * runs.length <= longest;
  const Tiling pixels(count, expand_rows), pieces(runs.length, whole ? 1 : longest);
  const int64_t passes = whole ? 1 : runs.count * pieces.tiles;
  for (int64_t j = 0; j < hidden; j += expand_vectors * W) {
    const int64_t vectors = panel_vectors<T>(hidden, j);
    Finish<T> tail = finish;
    if (tail.bias) tail.bias += j;
    with_count<expand_vectors>(vectors, [&](auto n) {
      const T* weights = w + j;
      int64_t scalar = 0;  // of the pass, the first one in its run
      for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t run = whole ? 0 : pass / pieces.tiles, piece = whole ? 0 : pass % pieces.tiles;
        const Runs here = whole ? runs : Runs{1, pieces[piece], 0};
        if (piece == 0) scalar = 0;
        Walk<const T> in(from, run * runs.step + scalar);
        Walk<T> out(to, j);
        for (int64_t t = 0, p = 0; t < pixels.tiles; p += pixels[t++]) {
          if (tail.gate)  // saved long ago: the next tile's comes from far
            for (int64_t i = p + pixels[t]; i < count && i < p + 2 * pixels[t]; ++i)
              for (int64_t v = 0; v < vectors; ++v) __builtin_prefetch(tail.gate + i * tail.gate_step + j + v * W);
          with_count<expand_rows>(pixels[t], [&](auto r) {
            Finish<T> end = tail;
            if (end.gate) end.gate += p * end.gate_step + j;
            expand_tile<decltype(r)::value, decltype(n)::value>(here, {pass == 0, pass == passes - 1}, in, weights,
                                                                hidden, end, out);
          });
        }
        scalar += here.length;
        weights += here.length * hidden;
      }
    });
  }
}

// out[p][j], j < hidden, of `count` pixels p in a row, in_step apart.
template <class T>
inline void expand(const Runs& runs, int64_t count, const T* in, int64_t in_step, const T* w, int64_t hidden,
                   const Finish<T>& finish, T* out) {
  expand(runs, count, Grid<const T>{in, count, in_step, 0}, w, hidden, finish, Grid<T>{out, count, hidden, 0});
}

// The taps of one row of pixels: the first of pixel x meets input pixel x - reach. Those outside of 0..width - 1 are
// read from `zeros`.
template <class T>
struct TapRows {
  const T* first;  // pixel 0 of the first input row
  int64_t rows, row_step, columns, reach, width, hidden;
  const T* zeros;
};

template <int P, int O, class T, class Put>
inline void reduce_tile(const TapRows<T>& taps, int64_t x, const T* w, int64_t w_output, const Put& put) {
  constexpr int W = Simd<T>::lanes;
  Vec<T> sum[P][O] = {};
  for (int64_t row = 0; row < taps.rows; ++row)
    for (int64_t column = 0; column < taps.columns; ++column, w += taps.hidden) {
      const T* at[P];
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        const int64_t from = x + p + column - taps.reach;
        at[p] = from < 0 || from >= taps.width ? taps.zeros : taps.first + row * taps.row_step + from * taps.hidden;
      }
#pragma GCC unroll 1
      for (int64_t j = 0; j < taps.hidden; j += W) {
        Vec<T> value[P];
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) value[p] = load(at[p] + j);
#pragma GCC unroll 8
        for (int o = 0; o < O; ++o) {
          const Vec<T> factor = load(w + o * w_output + j);
#pragma GCC unroll 8
          for (int p = 0; p < P; ++p) sum[p][o] += factor * value[p];
        }
      }
    }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) put(p, o, sum_lanes<T>(sum[p][o]));
}

// put(x, o, value) for `count` pixels x of one row and every output o. w[o] has w_output values, its first tap first.
template <class T, class Put>
inline void reduce(const TapRows<T>& taps, int64_t count, const T* w, int64_t w_output, int64_t outputs,
                   const Put& put) {
  const Tiling pixels(count, reduce_pixels), groups(outputs, reduce_outputs);
  for (int64_t g = 0, o = 0; g < groups.tiles; o += groups[g++])
    with_count<reduce_outputs>(groups[g], [&](auto outs) {
      for (int64_t t = 0, x = 0; t < pixels.tiles; x += pixels[t++])
        with_count<reduce_pixels>(pixels[t], [&](auto tile) {
          reduce_tile<decltype(tile)::value, decltype(outs)::value>(
              taps, x, w + o * w_output, w_output,
              [&](int p, int i, T value) { put(x + p, o + i, value); });
        });
    });
}

// Pixels that a sum runs over, and where their values lie.
struct Extent {
  int64_t samples, rows, width;
};

template <class T>
struct Pixels {
  const T* first;
  int64_t sample_step, row_step, step;
};

// Some of an extent's pixels: `width` from column x on of the rows [begin, end), counted through the samples.
struct Piece {
  int64_t begin, end, x, width;
};

// f(first value of a row of the piece) for each of its rows.
template <class T, class F>
inline void for_each_row(const Extent& extent, const Piece& piece, const Pixels<T>& from, const F& f) {
  int64_t sample = piece.begin / extent.rows, y = piece.begin % extent.rows;
  for (int64_t i = piece.begin; i < piece.end; ++i, ++y) {
    if (y == extent.rows) {
      y = 0;
      ++sample;
    }
    f(from.first + sample * from.sample_step + y * from.row_step + piece.x * from.step);
  }
}

// v: [pixel of the piece][N vectors].
template <int R, int N, class T>
inline void outer_tile(const Extent& extent, const Piece& piece, const Pixels<T>& in, const T* v, T* to,
                       int64_t to_step) {
  constexpr int W = Simd<T>::lanes;
  Vec<T> sum[R][N] = {};
  for_each_row(extent, piece, in, [&](const T* a) {
#pragma GCC unroll 1
    for (int64_t x = 0; x < piece.width; ++x, a += in.step, v += N * W) {
      Vec<T> row[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) row[n] = load(v + n * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[r][n] += a[r] * row[n];
    }
  });
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(to + r * to_step + n * W, load(to + r * to_step + n * W) + sum[r][n]);
}

// The vectors of one piece: each is taken to a panel, whose pixels lie side by side, for all of `length` scalars.
template <class T>
inline void outer_piece(const Extent& extent, const Piece& piece, const Pixels<T>& in, int64_t length,
                        const Pixels<T>& v, int64_t hidden, T* panel, T* to) {
  constexpr int W = Simd<T>::lanes;
  const Tiling tiling(length, expand_rows);
  for (int64_t j = 0; j < hidden; j += expand_vectors * W) {
    with_count<expand_vectors>(panel_vectors<T>(hidden, j), [&](auto n) {
      constexpr int N = decltype(n)::value;
      T* put = panel;
      for_each_row(extent, piece, v, [&](const T* from) {
        for (int64_t x = 0; x < piece.width; ++x, from += v.step, put += N * W)
#pragma GCC unroll 4
          for (int i = 0; i < N; ++i) store(put + i * W, load(from + j + i * W));
      });
      for (int64_t t = 0, k = 0; t < tiling.tiles; k += tiling[t++])
        with_count<expand_rows>(tiling[t], [&](auto r) {
          outer_tile<decltype(r)::value, N>(extent, piece, {in.first + k, in.sample_step, in.row_step, in.step}, panel,
                                            to + k * hidden + j, hidden);
        });
    });
  }
}

// to[k][j] += sum over the pixels of in[p][k] v[p][j], for `length` adjacent scalars k and j < hidden. Some 64 pixels are
// summed before they are added to what is there: they stay in the first-level cache, and the rounding of a long sum in
// one go would show.
template <class T>
inline void outer(const Extent& extent, const Pixels<T>& in, int64_t length, const Pixels<T>& v, int64_t hidden,
                  T* to) {
  constexpr int64_t most = 64;
  alignas(64) T panel[most * expand_vectors * Simd<T>::lanes];
  const Tiling parts(extent.width, most);
  const int64_t rows = extent.samples * extent.rows, step = extent.width < most ? most / extent.width : 1;
  for (int64_t i = 0; i < rows; i += step)
    for (int64_t t = 0, x = 0; t < parts.tiles; x += parts[t++])
      outer_piece(extent, {i, i + step < rows ? i + step : rows, x, parts[t]}, in, length, v, hidden, panel, to);
}

// to[j] += sum of v[p][j] over `count` adjacent pixels.
template <class T>
inline void add_pixels(int64_t count, const T* v, int64_t hidden, T* to) {
  constexpr int W = Simd<T>::lanes;
  for (int64_t j = 0; j < hidden; j += W) {
    const T* at = v + j;
    Vec<T> sum0{}, sum1{}, sum2{}, sum3{};
    int64_t p = 0;
    for (; p + 4 <= count; p += 4, at += 4 * hidden) {
      sum0 += load(at);
      sum1 += load(at + hidden);
      sum2 += load(at + 2 * hidden);
      sum3 += load(at + 3 * hidden);
    }
    for (; p < count; ++p, at += hidden) sum0 += load(at);
    store(to + j, load(to + j) + ((sum0 + sum1) + (sum2 + sum3)));
  }
}

}  // namespace
}  // namespace fastflow::FASTFLOW_ISA
