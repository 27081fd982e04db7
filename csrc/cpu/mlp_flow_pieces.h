// The first two layers of a network that sees one feature, through ReLU. For mlp_flow_kernel.cpp alone.
//
// Each unit relu(w x + b) of the first layer has a knot at x = -b/w and is linear beside it, so that what the second
// layer makes of them all is linear in x between neighbouring knots: constant + slope * x, with a table of constants and
// slopes for every piece. A multiply-add for each output takes the place of one for each output and unit; backward, the
// gradients of samples in one piece are summed up, alone and times x, and the units share those sums out.
#pragma once

#include <algorithm>
#include <cmath>

#include "mlp_flow_net.h"
#include "transpose.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

constexpr int64_t fewest_knots = 16, most_knots = 128;
constexpr int64_t piecewise_batch = 16 * FlowJob::tile;  // from which on the table is worth its making

// Of float alone: the table is made in double.
template <class T>
bool has_pieces(const FlowJob& job, const FlowStep& step) {
  if (sizeof(T) != sizeof(float) || !step.coupling || step.activation != Activation::relu || step.count < 2)
    return false;
  const FlowLinear &first = step.linears[0], &second = step.linears[1];
  return job.batch >= piecewise_batch && first.in == 1 && first.out >= fewest_knots && first.out <= most_knots &&
         second.out > thin_out && second.out % lines == 0;
}

template <class T>
bool all_finite(int64_t rows, int64_t n, const T* values) {
  Vec<T> differences{};
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < n; i += Simd<T>::lanes)
      differences += vec(values + r * tile + i) - vec(values + r * tile + i);
  return sum_lanes<T>(differences) == T(0);
}

template <class T>
struct Pieces {
  using Index = typename Simd<T>::Integer;

  int64_t units = 0, knots = 0, out = 0;  // a unit with weight 0 has no knot
  T* knot = nullptr;        // in ascending order, infinity behind them
  int64_t* unit = nullptr;  // whose knots they are
  T* table = nullptr;       // of piece k, which is above k knots: `out` constants, `out` slopes
  T* ends = nullptr;        // the results at minus and at plus infinity, where a sum has terms that its slope lacks
  T* columns = nullptr;     // of the second layer's weight, one after the other
  // Backward alone: of piece k the gradients of its samples, and those times x; the gradients of the columns.
  T *sums = nullptr, *to_columns = nullptr;
  double* work = nullptr;   // 4 * out
  bool usable = false;

  // Room for those of a step.
  static Pieces take(Arena& arena, const FlowStep& step, bool backward) {
    Pieces pieces;
    pieces.units = step.linears[0].out;
    pieces.out = step.linears[1].out;
    pieces.knot = arena.take<T>(pieces.units);
    pieces.unit = arena.take<int64_t>(pieces.units);
    pieces.table = arena.take<T>((pieces.units + 1) * 2 * pieces.out);
    pieces.ends = arena.take<T>(2 * pieces.out);
    pieces.columns = arena.take<T>(pieces.units * pieces.out);
    pieces.sums = arena.take<T>(backward ? (pieces.units + 1) * 2 * pieces.out : 0);
    pieces.to_columns = arena.take<T>(backward ? 2 * pieces.units * pieces.out : 0);
    return pieces;
  }

  // Usable only if every parameter and every entry is finite: a product then shows what is not.
  void make(const FlowStep& step) {
    const T* const bias = static_cast<const T*>(step.linears[1].bias.data);
    for (int64_t i = 0; i < out; ++i) {
      work[i] = static_cast<double>(bias[i * step.linears[1].bias.row]);
      work[out + i] = 0.;
    }
    const Strided<T> weight = weights_of<T>(step.linears[1]);
    for (int64_t i = 0; i < out; ++i)
      for (int64_t j = 0; j < units; ++j) columns[j * out + i] = weight.data[i * weight.row + j * weight.column];
    usable = true;
    knots = 0;
    for (int64_t j = 0; j < units; ++j) {
      const double w = weight_of(step, j), b = bias_of(step, j);
      usable &= finite(w) && finite(b);
      if (w < 0. || (w == 0. && b > 0.)) add(step, j, 1.);  // those that are positive far below all knots
      if (w != 0.) unit[knots++] = j;
    }
    if (!usable) return;
    T at[most_knots];
    for (int64_t k = 0; k < knots; ++k) at[unit[k]] = knot_of(weight_of(step, unit[k]), bias_of(step, unit[k]));
    std::sort(unit, unit + knots, [&](int64_t a, int64_t b) { return at[a] < at[b] || (at[a] == at[b] && a < b); });
    write(0);
    for (int64_t k = 0; k < knots; ++k) {
      knot[k] = at[unit[k]];
      add(step, unit[k], weight_of(step, unit[k]) > 0. ? 1. : -1.);
      write(k + 1);
    }
    for (int64_t i = 0; i < out; ++i) {
      ends[i] = at_infinity(step, i, -math::infinity<T>());
      ends[out + i] = at_infinity(step, i, math::infinity<T>());
    }
  }

  // The pieces that n samples x lie in.
  void find(int64_t n, const T* x, Index* piece) const {
    using Lane = typename Simd<T>::Lane;
    for (int64_t j = 0; j < n; j += Simd<T>::lanes) {
      const Vec<T> at = vec(x + j);
      Lane found{};
      for (int64_t k = 0; k < knots; ++k) found -= Lane(at > splat(knot[k]));
      __builtin_memcpy(piece + j, &found, sizeof found);
    }
  }

  // The second layer's results for n samples x, a multiple of the lanes.
  void apply(int64_t n, const T* x, bool rectified, T* y) const {
    constexpr int W = Simd<T>::lanes;
    alignas(64) Index piece[tile];
    find(n, x, piece);
    for (int64_t j = 0; j < n; j += W) {
      const T* rows[W];
      for (int l = 0; l < W; ++l) rows[l] = table + piece[j + l] * 2 * out;
      for (int64_t i = 0; i < out; i += W) {
        Vec<T> v[W];
#pragma GCC unroll 16
        for (int l = 0; l < W; ++l) {
          v[l] = vec(rows[l] + out + i) * splat(x[j + l]) + vec(rows[l] + i);
          if (rectified) v[l] = relu<T>(v[l]);
        }
        transpose<T>(v);
#pragma GCC unroll 16
        for (int l = 0; l < W; ++l) vec(y + (i + l) * tile + j) = v[l];
      }
      for (int l = 0; l < W; ++l) {
        if (math::abs(x[j + l]) != math::infinity<T>()) continue;
        const T* end = ends + (x[j + l] > T(0) ? out : 0);
        for (int64_t i = 0; i < out; ++i) y[i * tile + j + l] = rectified && end[i] < T(0) ? T(0) : end[i];
      }
    }
  }

  void clear_sums() const {
    for (int64_t i = 0; i < (knots + 1) * 2 * out; ++i) sums[i] = T(0);
  }

  // Adds n samples x, all finite, with the gradients of the second layer's results; to[i] += the gradient of x[i].
  // rows: room for tile * out.
  void gradients(int64_t n, const T* x, const T* grad, T* rows, T* to) const {
    constexpr int W = Simd<T>::lanes;
    alignas(64) Index piece[tile];
    find(round_up(n, W), x, piece);
    transpose_rows(grad, tile, out, tile, rows, out);
    for (int64_t j = 0; j < n; ++j) {
      T* const sum = sums + piece[j] * 2 * out;
      const T* const slope = table + (piece[j] * 2 + 1) * out;
      Vec<T> through{};
      for (int64_t i = 0; i < out; i += W) {
        const Vec<T> g = vec(rows + j * out + i);
        vec(sum + i) += g;
        vec(sum + out + i) += g * splat(x[j]);
        through += g * vec(slope + i);
      }
      to[j] += sum_lanes<T>(through);
    }
  }

  // partial += the gradients of both layers' weights and of the first one's biases, from the sums: a unit has those of
  // the pieces where it is positive.
  void finish(const FlowStep& step, T* partial) const {
    double *const all = work, *const below = work + 2 * out;
    for (int64_t i = 0; i < 2 * out; ++i) all[i] = below[i] = 0.;
    for (int64_t k = 0; k <= knots; ++k)
      for (int64_t i = 0; i < 2 * out; ++i) all[i] += static_cast<double>(sums[k * 2 * out + i]);
    for (int64_t i = 0; i < units * out; ++i) to_columns[i] = T(0);
    for (int64_t k = 0; k < knots; ++k) {
      for (int64_t i = 0; i < 2 * out; ++i) below[i] += static_cast<double>(sums[k * 2 * out + i]);
      const bool rises = weight_of(step, unit[k]) > 0.;
      share(step, unit[k], rises ? 1. : 0., rises ? -1. : 1., partial);
    }
    for (int64_t j = 0; j < units; ++j)
      if (weight_of(step, j) == 0. && bias_of(step, j) > 0.) share(step, j, 1., 0., partial);
    T* const rows = to_columns + units * out;
    transpose_rows(to_columns, out, units, out, rows, units);
    T* const to = partial + step.linears[1].grad_weight;
    for (int64_t i = 0; i < out; ++i)
      for (int64_t j = 0; j < units; ++j) to[i * step.linears[1].grad_ld + j] += rows[i * units + j];
  }

 private:
  static bool finite(double x) { return x - x == 0.; }

  static double weight_of(const FlowStep& step, int64_t unit) {
    const FlowParameter& weight = step.linears[0].weight;
    return static_cast<double>(static_cast<const T*>(weight.data)[unit * weight.row]);
  }
  static double bias_of(const FlowStep& step, int64_t unit) {
    const FlowParameter& bias = step.linears[0].bias;
    return static_cast<double>(static_cast<const T*>(bias.data)[unit * bias.row]);
  }
  // The largest number that is not above the knot; below it where the unit falls, which is not positive at its knot.
  static T knot_of(double w, double b) {
    const double exact = -b / w;
    const T near = static_cast<T>(exact);
    const bool high = w > 0. ? static_cast<double>(near) > exact : static_cast<double>(near) >= exact;
    return high ? std::nextafter(near, -math::infinity<T>()) : near;
  }

  T at_infinity(const FlowStep& step, int64_t i, T x) const {
    T sum = static_cast<const T*>(step.linears[1].bias.data)[i * step.linears[1].bias.row];
    for (int64_t j = 0; j < units; ++j) {
      const T value = static_cast<T>(weight_of(step, j)) * x;  // a finite bias changes nothing
      sum += columns[j * out + i] * (value < T(0) ? T(0) : value);
    }
    return sum;
  }

  void add(const FlowStep& step, int64_t j, double sign) {
    const T* const column = columns + j * out;
    const double b = sign * bias_of(step, j), w = sign * weight_of(step, j);
    for (int64_t i = 0; i < out; ++i) {
      const double v = static_cast<double>(column[i]);
      work[i] += v * b;
      work[out + i] += v * w;
    }
  }

  void write(int64_t piece) {
    T* to = table + piece * 2 * out;
    double differences = 0.;
    for (int64_t i = 0; i < 2 * out; ++i) {
      to[i] = static_cast<T>(work[i]);
      differences += static_cast<double>(to[i] - to[i]);
    }
    usable &= differences == 0.;
  }

  // What a unit gets of the sums all * of_all + below * of_below.
  void share(const FlowStep& step, int64_t j, double of_all, double of_below, T* partial) const {
    const double *const all = work, *const below = work + 2 * out, w = weight_of(step, j), b = bias_of(step, j);
    const T* const column = columns + j * out;
    T* const to = to_columns + j * out;
    double to_weight = 0., to_bias = 0.;
#pragma omp simd reduction(+ : to_weight, to_bias)
    for (int64_t i = 0; i < out; ++i) {
      const double plain = of_all * all[i] + of_below * below[i];
      const double times_x = of_all * all[out + i] + of_below * below[out + i];
      const double v = static_cast<double>(column[i]);
      to[i] = static_cast<T>(w * times_x + b * plain);
      to_weight += v * times_x;
      to_bias += v * plain;
    }
    partial[step.linears[0].grad_weight + j * step.linears[0].grad_ld] += static_cast<T>(to_weight);
    partial[step.linears[0].grad_bias + j] += static_cast<T>(to_bias);
  }
};

}  // namespace
}  // namespace fastflow::FASTFLOW_ISA
