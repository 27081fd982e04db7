// activated_conv in Winograd's form (conv_segments.h). A fine map of stride s is one of s^2 times as many channels, the
// residues of its positions, which a dense kernel of 2 or 3 taps relates to the coarse map:
//   gather    coarse = A^T (u B^T fine)
//   scatter   fine = B (u^T A coarse)
//   weights   taps = G^T (the sum of B^T fine times A coarse)
// Some samples' points at a time, so that they stay in the second-level cache while each point's weights pass. float32.
// Compiled once per instruction set.
#pragma once

#include "activated_conv_maps.h"
#include "conv_segments.h"
#include "conv_tiles.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

using T = float;
constexpr int64_t longest_gathered = 32;     // of a sum's terms; what scatters adds up differences of such sums,
constexpr int64_t longest_scattered = 16;    // in which their rounding shows
constexpr int64_t most_values = 128 * 1024;  // of the points that are in work at once
constexpr int64_t most_rows = 64;            // of points that are summed before they are added to what is there

// Channels of a row of points, and what keeps rows from meeting in the same sets of a cache.
int64_t row_step(int64_t channels) { return (channels / 16 | 1) * 16; }

struct Plan {
  Segments vertical, horizontal;
  int64_t fine_step, coarse_step, samples, band;  // samples, and rows of segments, in work at once

  explicit Plan(const ActivatedConv& shape)
      : vertical(shape.coarse_height, static_cast<int>(shape.dense_taps())),
        horizontal(shape.coarse_width, static_cast<int>(shape.dense_taps())),
        fine_step(row_step(shape.depth())), coarse_step(row_step(shape.coarse)) {
    const int64_t line = points_of(horizontal) * 4, values = points_of(vertical) * points_of(horizontal);
    const int64_t most = most_values / (fine_step + coarse_step);
    samples = most / values < 1 ? 1 : most / values < shape.batch ? most / values : shape.batch;
    band = most / line < 1 ? 1 : most / line < vertical.count() ? most / line : vertical.count();
    if (samples > 1) band = vertical.count();
  }

  int64_t points() const {
    const int64_t rows = 4 * band < points_of(vertical) ? 4 * band : points_of(vertical);
    return samples * rows * points_of(horizontal);
  }
  int64_t step() const { return fine_step > coarse_step ? fine_step : coarse_step; }

 private:
  static int64_t points_of(const Segments& s) { return 4 * s.longs + 3 * s.shorts; }
};

// What both directions do with some samples' maps: fine ones with padding, coarse ones without.
template <int Taps>
class Square {
 public:
  Square(const ActivatedConv& shape, const Plan& plan) : shape_(shape), plan_(plan) {}

  int64_t fine_row() const { return shape_.fine_columns() * shape_.fine; }

  // f(points' rows, first row of segments) of every band.
  template <class F>
  void for_each_band(int64_t samples, const F& f) const {
    const int64_t count = plan_.vertical.count();
    for (int64_t begin = 0; begin < count; begin += plan_.band) {
      const int64_t end = begin + plan_.band < count ? begin + plan_.band : count;
      f(Band{PointRows(plan_.vertical, begin, end, plan_.horizontal, samples), samples, begin, end});
    }
  }

  struct Band {
    PointRows rows;
    int64_t samples, begin, end;
  };

  void points_of_fine(const Band& band, const T* fine, T* points) const {
    for_each(band, [&](int64_t sample, int64_t v, int64_t h, const Rows& rows, auto down, auto across) {
      for (int64_t residue = 0; residue < shape_.stride; ++residue) {
        const Pixel<const T> from{fine + sample * shape_.fine_values() + fine_offset(v, h, residue),
                                  shape_.stride * fine_row(), residues(), residues()};
        input_points<decltype(down)::value, decltype(across)::value>(
            from, places<T>(points + residue * residues(), rows, plan_.fine_step));
      }
    });
  }

  void add_to_fine(const Band& band, const T* points, T* fine) const {
    for_each(band, [&](int64_t sample, int64_t v, int64_t h, const Rows& rows, auto down, auto across) {
      for (int64_t residue = 0; residue < shape_.stride; ++residue) {
        const Pixel<T> to{fine + sample * shape_.fine_values() + fine_offset(v, h, residue),
                          shape_.stride * fine_row(), residues(), residues()};
        add_inputs<decltype(down)::value, decltype(across)::value>(
            places<const T>(points + residue * residues(), rows, plan_.fine_step), to);
      }
    });
  }

  void points_of_coarse(const Band& band, const T* coarse, T* points) const {
    for_each(band, [&](int64_t sample, int64_t v, int64_t h, const Rows& rows, auto down, auto across) {
      output_points<decltype(down)::value, decltype(across)::value, Taps>(
          coarse_pixel(coarse, sample, v, h), places<T>(points, rows, plan_.coarse_step));
    });
  }

  void put_coarse(const Band& band, const T* points, const T* bias, T* coarse) const {
    for_each(band, [&](int64_t sample, int64_t v, int64_t h, const Rows& rows, auto down, auto across) {
      put_outputs<decltype(down)::value, decltype(across)::value, Taps>(
          places<const T>(points, rows, plan_.coarse_step), bias, coarse_pixel(coarse, sample, v, h));
    });
  }

  void to_coarse(const Band& band, const T* fine, const T* weights, T* coarse) const {
    multiply(band.rows, shape_.depth(), fine, plan_.fine_step, weights, shape_.coarse, coarse, plan_.coarse_step,
             longest_gathered);
  }
  void to_fine(const Band& band, const T* coarse, const T* weights, T* fine) const {
    multiply(band.rows, shape_.coarse, coarse, plan_.coarse_step, weights, shape_.depth(), fine, plan_.fine_step,
             longest_scattered);
  }

  // to[16][fine][coarse] += the sums over the band.
  void add_taps(const Band& band, const T* fine, const T* coarse, T* to) const {
    for (int p = 0; p < square_points; ++p, to += shape_.depth() * shape_.coarse)
      for (int64_t r = 0; r < band.rows.rows[p]; r += most_rows) {
        const int64_t first = band.rows.first[p] + r, left = band.rows.rows[p] - r;
        outer({1, 1, left < most_rows ? left : most_rows},
              Pixels<T>{fine + first * plan_.fine_step, 0, 0, plan_.fine_step}, shape_.depth(),
              Pixels<T>{coarse + first * plan_.coarse_step, 0, 0, plan_.coarse_step}, shape_.coarse, to);
      }
  }

 private:
  using Rows = int64_t[square_points];

  // Values of one row of a residue that are side by side in a fine map.
  int64_t residues() const { return shape_.stride * shape_.fine; }

  int64_t fine_offset(int64_t v, int64_t h, int64_t residue) const {
    return (plan_.vertical.first(v) * shape_.stride + residue) * fine_row() +
           plan_.horizontal.first(h) * residues();
  }

  template <class P>
  Pixel<P> coarse_pixel(P* coarse, int64_t sample, int64_t v, int64_t h) const {
    const int64_t row = shape_.coarse_width * shape_.coarse;
    return {coarse + sample * shape_.coarse_height * row + plan_.vertical.first(v) * row +
                plan_.horizontal.first(h) * shape_.coarse,
            row, shape_.coarse, shape_.coarse};
  }

  template <class P>
  static Points<P> places(P* points, const Rows& rows, int64_t step) {
    Points<P> result{points, {}};
    for (int p = 0; p < square_points; ++p) result.place[p] = rows[p] * step;
    return result;
  }

  template <class F>
  void for_each(const Band& band, const F& f) const {
    for (int64_t sample = 0; sample < band.samples; ++sample)
      for (int64_t v = band.begin; v < band.end; ++v)
        for (int64_t h = 0; h < plan_.horizontal.count(); ++h) {
          Rows rows;
          for (int p = 0; p < square_points; ++p) rows[p] = band.rows.row(p, sample, v - band.begin, h);
          with_kinds(plan_.vertical.is_long(v), plan_.horizontal.is_long(h),
                     [&](auto down, auto across) { f(sample, v, h, rows, down, across); });
        }
  }

  static void multiply(const PointRows& rows, int64_t terms, const T* from, int64_t from_step, const T* weights,
                       int64_t results, T* to, int64_t to_step, int64_t longest) {
    for (int p = 0; p < square_points; ++p, weights += terms * results)
      expand({1, terms, 0}, rows.rows[p], Grid<const T>{from + rows.first[p] * from_step, rows.rows[p], from_step, 0},
             weights, results, Finish<T>{}, Grid<T>{to + rows.first[p] * to_step, rows.rows[p], to_step, 0},
             longest);
  }

  const ActivatedConv& shape_;
  const Plan& plan_;
};

}  // namespace
}  // namespace fastflow::FASTFLOW_ISA
