// Winograd's form of convolutions with 2 or 3 taps in each dimension and stride 1, for outputs of any size: a dimension
// is cut into long segments, whose 5 - taps outputs take 4 products where a plain sum takes taps (5 - taps), and at its
// end at most two short ones, whose 4 - taps outputs take 3 (Winograd, Arithmetic Complexity of Computations, 1980).
// Both kinds interpolate at points of 0, 1, -1 and infinity, the short one without -1, so that they share the taps'
// points. In one dimension, for inputs d, taps g and outputs y,
//   long   v = B^T d = (d0 - d2, d1 + d2, d2 - d1, d3 - d1)
//   short  v         = (d0 - d1, 2 d1, -, d2 - d1)
//   u = G g          = (g0, (g0 + .. ) / 2, (g0 - g1 + ..) / 2, the last g)
//   y_k = A^T m      = sum over the points p of p^k m_p, the last y with infinity's m;    m = u v,
// and in two dimensions the same along rows and columns. The adjoints towards the input and towards the taps are
// B (u A y), added up where segments overlap, and G^T (the sum of v A y).
//
// Compiled once per instruction set.
#pragma once

#include "vectors.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

constexpr int line_points = 4, square_points = line_points * line_points;

// The point of input number i of a segment.
constexpr int point_of(bool is_long, int i) { return is_long || i < 2 ? i : 3; }

template <bool Long>
constexpr int inputs_of = Long ? 4 : 3;
template <bool Long, int Taps>
constexpr int outputs_of = inputs_of<Long> + 1 - Taps;

template <bool Long, class V>
inline void spread_inputs(const V (&d)[4], V (&v)[4]) {  // B^T
  if constexpr (Long) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[3] - d[1];
  } else {
    v[0] = d[0] - d[1];
    v[1] = d[1] + d[1];
    v[2] = d[2] - d[1];
  }
}

template <bool Long, class V>
inline void gather_inputs(const V (&v)[4], V (&d)[4]) {  // B
  d[0] = v[0];
  if constexpr (Long) {
    d[1] = (v[1] - v[2]) - v[3];
    d[2] = (v[1] + v[2]) - v[0];
    d[3] = v[3];
  } else {
    d[1] = (v[1] + v[1]) - (v[0] + v[2]);
    d[2] = v[2];
  }
}

template <bool Long, int Taps, class V>
inline void spread_outputs(const V (&y)[4], V (&m)[4]) {  // A
  m[0] = y[0];
  if constexpr (Long && Taps == 2) {
    const V even = y[0] + y[2];
    m[1] = even + y[1];
    m[2] = even - y[1];
    m[3] = y[2];
  } else if constexpr (Long) {
    m[1] = y[0] + y[1];
    m[2] = y[0] - y[1];
    m[3] = y[1];
  } else if constexpr (Taps == 2) {
    m[1] = y[0] + y[1];
    m[2] = y[1];
  } else {
    m[1] = m[2] = y[0];
  }
}

template <bool Long, int Taps, class V>
inline void gather_outputs(const V (&m)[4], V (&y)[4]) {  // A^T
  if constexpr (Long && Taps == 2) {
    const V even = m[1] + m[2];
    y[0] = m[0] + even;
    y[1] = m[1] - m[2];
    y[2] = even + m[3];
  } else if constexpr (Long) {
    y[0] = m[0] + (m[1] + m[2]);
    y[1] = (m[1] - m[2]) + m[3];
  } else if constexpr (Taps == 2) {
    y[0] = m[0] + m[1];
    y[1] = m[1] + m[2];
  } else {
    y[0] = (m[0] + m[1]) + m[2];
  }
}

template <int Taps, class V>
inline void spread_taps(const V (&g)[4], V (&u)[4]) {  // G
  const V even = Taps == 2 ? g[0] : g[0] + g[2];
  u[0] = g[0];
  u[1] = 0.5f * (even + g[1]);
  u[2] = 0.5f * (even - g[1]);
  u[3] = g[Taps - 1];
}

template <int Taps, class V>
inline void gather_taps(const V (&u)[4], V (&g)[4]) {  // G^T
  const V even = 0.5f * (u[1] + u[2]), odd = 0.5f * (u[1] - u[2]);
  g[0] = u[0] + even;
  g[1] = Taps == 2 ? odd + u[3] : odd;
  if constexpr (Taps == 3) g[2] = even + u[3];
}

// How the outputs of one dimension are cut: long segments first.
struct Segments {
  int64_t long_outputs, longs, shorts;

  Segments(int64_t outputs, int taps) : long_outputs(5 - taps) {
    const int64_t short_outputs = 4 - taps;
    shorts = 0;
    while (shorts * short_outputs < outputs && (outputs - shorts * short_outputs) % long_outputs != 0) ++shorts;
    longs = (outputs - shorts * short_outputs) / long_outputs;
  }
  int64_t count() const { return longs + shorts; }
  bool is_long(int64_t segment) const { return segment < longs; }
  int64_t first(int64_t segment) const {
    return segment <= longs ? segment * long_outputs : longs * long_outputs + (segment - longs) * (long_outputs - 1);
  }
  // How many of the segments [begin, end) have the point: they are the first of them.
  int64_t having(int point, int64_t begin, int64_t end) const {
    if (point != 2) return end - begin;
    return longs < begin ? 0 : longs < end ? longs - begin : end - begin;
  }
};

// Where the points of segments [begin, end) of the rows times all of the columns lie, of `samples` samples: an array
// for each of the 16 points, with a row for every pair of segments that has it.
struct PointRows {
  int64_t rows[square_points], first[square_points + 1], down[square_points], across[square_points];

  PointRows(const Segments& vertical, int64_t begin, int64_t end, const Segments& horizontal, int64_t samples) {
    first[0] = 0;
    for (int i = 0; i < line_points; ++i)
      for (int j = 0; j < line_points; ++j) {
        const int p = line_points * i + j;
        down[p] = vertical.having(i, begin, end);
        across[p] = horizontal.having(j, 0, horizontal.count());
        rows[p] = samples * down[p] * across[p];
        first[p + 1] = first[p] + rows[p];
      }
  }
  int64_t count() const { return first[square_points]; }

  // The row, counted through all points, of point p of a pair of segments, counted from `begin` and from 0.
  int64_t row(int p, int64_t sample, int64_t vertical, int64_t horizontal) const {
    return first[p] + (sample * down[p] + vertical) * across[p] + horizontal;
  }
};

// f with both flags as constants.
template <class F>
inline void with_kinds(bool vertical, bool horizontal, const F& f) {
  using Long = Count<1>;
  using Short = Count<0>;
  if (vertical)
    horizontal ? f(Long{}, Long{}) : f(Long{}, Short{});
  else
    horizontal ? f(Short{}, Long{}) : f(Short{}, Short{});
}

// Pixels of a map, `length` values each, of which whole vectors are taken.
template <class T>
struct Pixel {
  T* at;
  int64_t down, right, length;
};

// The points of one pair of segments: of point p at data + p's place.
template <class T>
struct Points {
  T* data;
  int64_t place[square_points];
  T* of(int row, int column) const { return data + place[line_points * row + column]; }
};

// A map of one dimension, from ColumnsIn (RowsIn) values to ColumnsOut (RowsOut), along both: `down` the columns of
// load(row, column), then `across` their rows, to store(row, column, value).
template <int RowsIn, int ColumnsIn, int RowsOut, int ColumnsOut, class T, class Load, class Down, class Across,
          class Store>
[[gnu::always_inline]] inline void along_both(const Load& load, const Down& down, const Across& across,
                                              const Store& store) {
  Vec<T> half[4][4];
#pragma GCC unroll 4
  for (int x = 0; x < ColumnsIn; ++x) {
    Vec<T> from[4], to[4];
#pragma GCC unroll 4
    for (int y = 0; y < RowsIn; ++y) from[y] = load(y, x);
    down(from, to);
#pragma GCC unroll 4
    for (int y = 0; y < RowsOut; ++y) half[y][x] = to[y];
  }
#pragma GCC unroll 4
  for (int y = 0; y < RowsOut; ++y) {
    Vec<T> to[4];
    across(half[y], to);
#pragma GCC unroll 4
    for (int x = 0; x < ColumnsOut; ++x) store(y, x, to[x]);
  }
}

// points = B^T d B of the inputs.
template <bool V, bool H, class T>
[[gnu::noinline]] void input_points(const Pixel<const T>& from, const Points<T>& points) {
  for (int64_t c = 0; c < from.length; c += Simd<T>::lanes)
    along_both<inputs_of<V>, inputs_of<H>, inputs_of<V>, inputs_of<H>, T>(
        [&](int y, int x) { return load(from.at + y * from.down + x * from.right + c); },
        [](auto& d, auto& v) { spread_inputs<V>(d, v); }, [](auto& d, auto& v) { spread_inputs<H>(d, v); },
        [&](int y, int x, Vec<T> value) { store(points.of(point_of(V, y), point_of(H, x)) + c, value); });
}

// The inputs += B points B^T.
template <bool V, bool H, class T>
[[gnu::noinline]] void add_inputs(const Points<const T>& points, const Pixel<T>& to) {
  for (int64_t c = 0; c < to.length; c += Simd<T>::lanes)
    along_both<inputs_of<V>, inputs_of<H>, inputs_of<V>, inputs_of<H>, T>(
        [&](int y, int x) { return load(points.of(point_of(V, y), point_of(H, x)) + c); },
        [](auto& v, auto& d) { gather_inputs<V>(v, d); }, [](auto& v, auto& d) { gather_inputs<H>(v, d); },
        [&](int y, int x, Vec<T> value) {
          T* const at = to.at + y * to.down + x * to.right + c;
          store(at, load(at) + value);
        });
}

// points = A y A^T of the outputs.
template <bool V, bool H, int Taps, class T>
[[gnu::noinline]] void output_points(const Pixel<const T>& from, const Points<T>& points) {
  for (int64_t c = 0; c < from.length; c += Simd<T>::lanes)
    along_both<outputs_of<V, Taps>, outputs_of<H, Taps>, inputs_of<V>, inputs_of<H>, T>(
        [&](int y, int x) { return load(from.at + y * from.down + x * from.right + c); },
        [](auto& y, auto& m) { spread_outputs<V, Taps>(y, m); },
        [](auto& y, auto& m) { spread_outputs<H, Taps>(y, m); },
        [&](int y, int x, Vec<T> value) { store(points.of(point_of(V, y), point_of(H, x)) + c, value); });
}

// The outputs = A^T points A, and the bias, if there is one.
template <bool V, bool H, int Taps, class T>
[[gnu::noinline]] void put_outputs(const Points<const T>& points, const T* bias, const Pixel<T>& to) {
  for (int64_t c = 0; c < to.length; c += Simd<T>::lanes) {
    const Vec<T> shift = bias ? load(bias + c) : Vec<T>{};
    along_both<inputs_of<V>, inputs_of<H>, outputs_of<V, Taps>, outputs_of<H, Taps>, T>(
        [&](int y, int x) { return load(points.of(point_of(V, y), point_of(H, x)) + c); },
        [](auto& m, auto& y) { gather_outputs<V, Taps>(m, y); },
        [](auto& m, auto& y) { gather_outputs<H, Taps>(m, y); },
        [&](int y, int x, Vec<T> value) { store(to.at + y * to.down + x * to.right + c, value + shift); });
  }
}

// to[16] = G taps G^T of `count` adjacent values; tap (a, b) at from + a down + b right, the points `step` apart.
template <int Taps, class T>
inline void tap_points(const T* from, int64_t down, int64_t right, int64_t count, T* to, int64_t step) {
  const auto spread = [](auto& g, auto& u) { spread_taps<Taps>(g, u); };
  for (int64_t c = 0; c < count; c += Simd<T>::lanes)
    along_both<Taps, Taps, line_points, line_points, T>(
        [&](int a, int b) { return load(from + a * down + b * right + c); }, spread, spread,
        [&](int a, int b, Vec<T> value) { store(to + (line_points * a + b) * step + c, value); });
}

// The adjoint: taps = G^T points G.
template <int Taps, class T>
inline void taps_of_points(const T* from, int64_t step, int64_t count, T* to, int64_t down, int64_t right) {
  const auto gather = [](auto& u, auto& g) { gather_taps<Taps>(u, g); };
  for (int64_t c = 0; c < count; c += Simd<T>::lanes)
    along_both<line_points, line_points, Taps, Taps, T>(
        [&](int a, int b) { return load(from + (line_points * a + b) * step + c); }, gather, gather,
        [&](int a, int b, Vec<T> value) { store(to + a * down + b * right + c, value); });
}

}  // namespace
}  // namespace fastflow::FASTFLOW_ISA
