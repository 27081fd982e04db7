// The first two layers of a network that sees one feature, through ReLU. For mlp_flow_kernel.cpp alone.
//
// Each unit relu(w x + b) of the first layer has a knot at x = -b/w and is linear beside it, so that what the second
// layer makes of them all is linear in x between neighbouring knots: constant + slope * x, with a table of constants and
// slopes for every piece. A multiply-add for each output takes the place of one for each output and unit.
#pragma once

#include <algorithm>

#include "mlp_flow_net.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

constexpr int64_t most_knots = 128;
constexpr int64_t piecewise_batch = 16 * FlowJob::tile;  // from which on the table is worth its making

// Of float alone: the table is made in double.
template <class T>
bool has_pieces(const FlowJob& job, const FlowStep& step) {
  if (sizeof(T) != sizeof(float) || !step.coupling || step.activation != Activation::relu || step.count < 2) return false;
  const FlowLinear &first = step.linears[0], &second = step.linears[1];
  return job.batch >= piecewise_batch && first.in == 1 && first.out <= most_knots && second.out % Simd<T>::lanes == 0;
}

template <class T>
struct Pieces {
  int64_t knots = 0, out = 0;
  T* knot = nullptr;   // in ascending order
  T* table = nullptr;  // of piece k, which is above k knots: `out` constants, `out` slopes
  T* ends = nullptr;   // the results at minus and at plus infinity, where a sum has terms that its slope lacks
  bool usable = false;

  // Room for those of a step.
  static Pieces take(Arena& arena, const FlowStep& step) {
    Pieces pieces;
    pieces.knots = step.linears[0].out;
    pieces.out = step.linears[1].out;
    pieces.knot = arena.take<T>(pieces.knots);
    pieces.table = arena.take<T>((pieces.knots + 1) * 2 * pieces.out);
    pieces.ends = arena.take<T>(2 * pieces.out);
    return pieces;
  }

  // Usable only if every parameter and every entry is finite: a product then shows what is not.
  void make(const FlowStep& step) {
    const FlowLinear &first = step.linears[0], &second = step.linears[1];
    const T *w = static_cast<const T*>(first.weight.data), *b = static_cast<const T*>(first.bias.data);
    double *const constant = sums, *const slope = sums + out;
    const T* const bias = static_cast<const T*>(second.bias.data);
    for (int64_t i = 0; i < out; ++i) {
      constant[i] = static_cast<double>(bias[i * second.bias.row]);
      slope[i] = 0.;
    }
    struct Knot {
      double at;
      int64_t unit;
      bool operator<(const Knot& other) const { return at < other.at; }
    } order[most_knots];
    usable = true;
    int64_t count = 0;
    for (int64_t j = 0; j < knots; ++j) {
      const double wj = static_cast<double>(w[j * first.weight.row]), bj = static_cast<double>(b[j * first.bias.row]);
      usable &= finite(wj) && finite(bj);
      if (wj < 0. || (wj == 0. && bj > 0.)) add(step, j, wj, bj, 1.);  // those that are positive far below all knots
      if (wj != 0.) order[count++] = {-bj / wj, j};
    }
    if (!usable) return;
    std::sort(order, order + count);
    write(0);
    for (int64_t k = 0; k < knots; ++k) {
      if (k < count) {
        const int64_t j = order[k].unit;
        const double wj = static_cast<double>(w[j * first.weight.row]), bj = static_cast<double>(b[j * first.bias.row]);
        add(step, j, wj, bj, wj > 0. ? 1. : -1.);
      }
      knot[k] = k < count ? static_cast<T>(order[k].at) : math::infinity<T>();
      write(k + 1);
    }
    for (int64_t i = 0; i < out; ++i) {
      ends[i] = at_infinity(step, i, -math::infinity<T>());
      ends[out + i] = at_infinity(step, i, math::infinity<T>());
    }
  }

  // The second layer's results for n samples x, a multiple of the lanes.
  void apply(int64_t n, const T* x, bool rectified, T* y) const {
    constexpr int W = Simd<T>::lanes;
    using Lane = typename Simd<T>::Lane;
    for (int64_t j = 0; j < n; j += W) {
      const Vec<T> at = vec(x + j);
      Lane piece{};
      for (int64_t k = 0; k < knots; ++k) piece -= Lane(at > splat(knot[k]));
      const T* rows[W];
      for (int l = 0; l < W; ++l) rows[l] = table + piece[l] * 2 * out;
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

  double* sums = nullptr;  // of the piece at hand: 2 * out

 private:
  static bool finite(double x) { return x - x == 0.; }

  static T at_infinity(const FlowStep& step, int64_t i, T x) {
    const FlowLinear &first = step.linears[0], &second = step.linears[1];
    const Strided<T> w = weights_of<T>(first), weight = weights_of<T>(second);
    T sum = static_cast<const T*>(second.bias.data)[i * second.bias.row];
    for (int64_t j = 0; j < first.out; ++j) {
      const T value = w.data[j * w.row] * x;  // a finite bias changes nothing
      sum += weight.data[i * weight.row + j * weight.column] * (value < T(0) ? T(0) : value);
    }
    return sum;
  }

  void add(const FlowStep& step, int64_t unit, double w, double b, double sign) {
    const FlowLinear& second = step.linears[1];
    const T* weight = static_cast<const T*>(second.weight.data) + unit * second.weight.column;
    for (int64_t i = 0; i < out; ++i) {
      const double v = sign * static_cast<double>(weight[i * second.weight.row]);
      sums[i] += v * b;
      sums[out + i] += v * w;
    }
  }

  void write(int64_t piece) {
    T* to = table + piece * 2 * out;
    double differences = 0.;
    for (int64_t i = 0; i < 2 * out; ++i) {
      to[i] = static_cast<T>(sums[i]);
      differences += static_cast<double>(to[i] - to[i]);
    }
    usable &= differences == 0.;
  }
};

}  // namespace
}  // namespace fastflow::FASTFLOW_ISA
