// A flow of affine couplings with small networks, forward and backward. A unit of samples goes through one step after
// the other, tile by tile, and stays in the second-level cache with the step's weights.
#include "mlp_flow_kernel.h"

#include <algorithm>

#include "mlp_flow_net.h"
#include "mlp_flow_pieces.h"
#include "mlp_flow_scale.h"
#include "sum.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

static_assert(samples == tile);

template <class T>
struct Flow {
  const FlowJob& job;
  // Of a unit: blocks of `features` rows for each tile.
  T *state, *context, *grad, *grad_context, *grad_logdet;
  double* logdet;
  // Of a tile.
  T *input, *hidden, *slopes, *grad_hidden[2], *transposed_input, *moved;
  LaneSums<T>* sums;        // of each linear of a step
  T **values, **slope_rows; // where each linear's results and slopes begin
  Pieces<T>* pieces;        // of each step, those that have none without a table
  int64_t rows = 0, first = 0;  // samples of the unit, and where they begin

  Flow(const FlowJob& job, Arena& arena, bool backward) : job(job) {
    const int64_t unit = job.unit, wide = padded(job.widest), seen = job.features + job.context_features;
    state = arena.take<T>(unit * job.features);
    context = arena.take<T>(unit * job.context_features);
    logdet = arena.take<double>(backward ? 0 : unit);
    input = arena.take<T>(tile * padded(seen));
    hidden = arena.take<T>(tile * (backward ? job.hidden : 2 * wide));
    moved = arena.take<T>(tile * job.features);
    make_pieces(arena, backward);
    if (!backward) return;
    grad = arena.take<T>(unit * job.features);
    grad_context = arena.take<T>(unit * job.context_features);
    grad_logdet = arena.take<T>(unit);
    slopes = arena.take<T>(tile * job.hidden);
    for (T*& buffer : grad_hidden) buffer = arena.take<T>(tile * wide);
    transposed_input = arena.take<T>(tile * padded(at_least(job.widest, seen)));
    sums = arena.take<LaneSums<T>>(job.deepest + 1);
    T* const bias = arena.take<T>(job.hidden * Simd<T>::lanes);
    T* const weight = arena.take<T>(job.weights * Simd<T>::lanes);
    if (sums != nullptr) sums[0] = {bias, weight};
    values = arena.take<T*>(job.deepest);
    slope_rows = arena.take<T*>(job.deepest);
  }

  void make_pieces(Arena& arena, bool backward) {
    pieces = arena.take<Pieces<T>>(job.count);
    double* const work = arena.take<double>(4 * job.widest);
    for (int64_t s = 0; s < job.count; ++s) {
      Pieces<T> made;
      if (has_pieces<T>(job, job.steps[s])) {
        made = Pieces<T>::take(arena, job.steps[s], backward);
        made.work = work;
        if (work != nullptr) made.make(job.steps[s]);
      }
      if (pieces != nullptr) pieces[s] = made;
    }
  }

  int64_t tiles() const { return (rows + tile - 1) / tile; }
  int64_t rows_of(int64_t t) const { return at_most(tile, rows - t * tile); }
  int64_t lanes_of(int64_t t) const { return round_up(rows_of(t), Simd<T>::lanes); }

  void begin_unit(int64_t unit) {
    first = unit * job.unit;
    rows = at_most(job.unit, job.batch - first);
  }

  // Between a matrix (batch, features) and the tiles of the unit. What is past the end is zero.
  void load(const FlowParameter& from, int64_t features, T* to) const {
    const T* data = static_cast<const T*>(from.data) + first * from.row;
    for (int64_t t = 0; t < tiles(); ++t)
      for (int64_t f = 0; f < features; ++f, to += tile) {
        for (int64_t i = 0; i < rows_of(t); ++i) to[i] = data[(t * tile + i) * from.row + f * from.column];
        for (int64_t i = rows_of(t); i < tile; ++i) to[i] = T(0);
      }
  }

  void store(const T* from, int64_t features, void* matrix) const {
    T* to = static_cast<T*>(matrix) + first * features;
    for (int64_t t = 0; t < tiles(); ++t)
      for (int64_t f = 0; f < features; ++f, from += tile)
        for (int64_t i = 0; i < rows_of(t); ++i) to[(t * tile + i) * features + f] = from[i];
  }

  // Every tile's rows of features in another order, or back.
  void permute(const int64_t* order, bool back, T* values) const {
    for (int64_t t = 0; t < tiles(); ++t, values += job.features * tile) {
      for (int64_t f = 0; f < job.features; ++f)
        std::copy_n(values + (back ? f : order[f]) * tile, tile, moved + (back ? order[f] : f) * tile);
      std::copy_n(moved, job.features * tile, values);
    }
  }

  // The rows that a step overwrites in tile t, to or from job.saved.
  void save(const FlowStep& step, int64_t t, const T* values) const {
    for (int64_t f = 0; f < step.active; ++f) {
      T* to = static_cast<T*>(job.saved) + (step.saved + f) * job.batch + first + t * tile;
      for (int64_t i = 0; i < rows_of(t); ++i) to[i] = values[f * tile + i];
    }
  }

  void restore(const FlowStep& step, int64_t t, T* values) const {
    for (int64_t f = 0; f < step.active; ++f) {
      const T* from = static_cast<const T*>(job.saved) + (step.saved + f) * job.batch + first + t * tile;
      for (int64_t i = 0; i < rows_of(t); ++i) values[f * tile + i] = from[i];
    }
  }

  // Where the activations of a linear are kept of tile t, or null.
  T* kept_of(const FlowLinear& linear, int64_t t) const {
    if (job.kept == nullptr || linear.kept < 0) return nullptr;
    return static_cast<T*>(job.kept) + (first + t * tile) * job.kept_rows + linear.kept * rows_of(t);
  }

  // Between whole buffers of `features` rows and the shorter rows that a tile of n samples is kept in.
  static void copy_rows(int64_t features, int64_t n, const T* from, int64_t from_length, T* to, int64_t to_length) {
    for (int64_t f = 0; f < features; ++f)
      for (int64_t i = 0; i < n; ++i) to[f * to_length + i] = from[f * from_length + i];
  }

  // What the network of a step sees of tile t.
  const T* input_of(const FlowStep& step, int64_t t) const {
    const T* passive = state + (t * job.features + step.passive_begin) * tile;
    // A weight's gradient reads whole squares of vectors, past the last feature.
    if (job.context_features == 0 && step.passive_begin + padded(step.passive) <= job.features) return passive;
    const T* beside = context + t * job.context_features * tile;
    for (int64_t i = 0; i < step.passive * tile; ++i) input[i] = passive[i];
    for (int64_t i = 0; i < job.context_features * tile; ++i) input[step.passive * tile + i] = beside[i];
    return input;
  }

  struct Params {
    T *raw, *shift;
    int64_t step;  // from one feature's to the next
  };

  static Params params_of(const FlowStep& step, bool additive, T* rows) {
    if (additive) return {rows, rows, tile};
    T* second = rows + (step.interleaved ? tile : step.active * tile);
    const int64_t next = step.interleaved ? 2 * tile : tile;
    return step.shift_in_front ? Params{second, rows, next} : Params{rows, second, next};
  }

  static T scale_of_channel(const FlowStep& step, int64_t f) {
    return static_cast<const T*>(step.channel.weight.data)[f * step.channel.weight.row];
  }
  static T bias_of_channel(const FlowStep& step, int64_t f) {
    return static_cast<const T*>(step.channel.bias.data)[f * step.channel.bias.row];
  }

  void channel_forward(const FlowStep& step) const {
    double total = 0.;
    for (int64_t f = 0; f < job.features; ++f) {
      const T log_scale = scale_of_channel(step, f), bias = bias_of_channel(step, f);
      const T scale = math::exp(job.inverse ? -log_scale : log_scale);
      total += static_cast<double>(job.inverse ? -log_scale : log_scale);
      for (int64_t t = 0; t < tiles(); ++t) {
        T* x = state + (t * job.features + f) * tile;
        if (job.inverse)
          for (int64_t i = 0; i < tile; ++i) x[i] = x[i] * scale - bias;
        else
          for (int64_t i = 0; i < tile; ++i) x[i] = (x[i] + bias) * scale;
      }
    }
    for (int64_t i = 0; i < rows; ++i) logdet[i] += total;
  }

  void coupling_forward(const FlowStep& step, int64_t t, const CouplingRows<T>& coupling) const {
    const int64_t n = lanes_of(t);
    const T* x = input_of(step, t);
    T* y = nullptr;
    const Pieces<T>& piecewise = pieces[&step - job.steps];
    for (int64_t l = piecewise.usable ? 1 : 0; l < step.count; ++l) {
      T* const kept = kept_of(step.linears[l], t);
      const bool in_place = kept != nullptr && rows_of(t) == tile;
      y = in_place ? kept : hidden + (l % 2) * tile * padded(job.widest);
      const bool last = l == step.count - 1;
      if (l == 1 && piecewise.usable)
        piecewise.apply(n, x, !last, y);
      else
        linear_forward<T>(step.linears[l], last, step.activation, n, x, y, nullptr);
      if (kept != nullptr && !in_place) copy_rows(step.linears[l].out, rows_of(t), y, tile, kept, rows_of(t));
      x = y;
    }
    const Params params = params_of(step, coupling.additive, y);
    T* active = state + (t * job.features + step.active_begin) * tile;
    alignas(64) T s[tile], log_s[tile], sum[tile] = {};
    for (int64_t f = 0; f < step.active; ++f) {
      coupling.scale(coupling.map, n, params.raw + f * params.step, s, log_s);
      coupling.couple(coupling.map, n, active + f * tile, params.shift + f * params.step, s, active + f * tile);
      for (int64_t i = 0; i < n; ++i) sum[i] += log_s[i];
    }
    for (int64_t i = 0; i < rows_of(t); ++i)
      logdet[t * tile + i] += static_cast<double>(job.inverse ? -sum[i] : sum[i]);
  }

  void forward(int64_t unit) {
    begin_unit(unit);
    load(job.x, job.features, state);
    load(job.context, job.context_features, context);
    for (int64_t i = 0; i < rows; ++i) logdet[i] = 0.;
    for (const FlowStep* step = job.steps; step != job.steps + job.count; ++step) {
      for (int64_t t = 0; job.saved != nullptr && t < tiles(); ++t)
        save(*step, t, state + (t * job.features + step->active_begin) * tile);
      if (step->order != nullptr) {
        permute(step->order, job.inverse, state);
        continue;
      }
      if (!step->coupling) {
        channel_forward(*step);
        continue;
      }
      const CouplingRows<T> coupling = coupling_rows<T>(step->map, job.inverse, step->shift_first);
      for (int64_t t = 0; t < tiles(); ++t) coupling_forward(*step, t, coupling);
    }
    store(state, job.features, job.z);
    for (int64_t i = 0; i < rows; ++i) static_cast<T*>(job.logdet)[first + i] = static_cast<T>(logdet[i]);
  }

  void channel_backward(const FlowStep& step, T* partial) const {
    for (int64_t t = 0; t < tiles(); ++t) restore(step, t, state + t * job.features * tile);
    CompensatedSum through_logdet;
    for (int64_t i = 0; i < rows; ++i) through_logdet.add(static_cast<double>(grad_logdet[i]));
    for (int64_t f = 0; f < job.features; ++f) {
      const T log_scale = scale_of_channel(step, f), bias = bias_of_channel(step, f);
      const T scale = math::exp(job.inverse ? -log_scale : log_scale);
      double to_bias = 0., to_scale = 0.;
      for (int64_t t = 0; t < tiles(); ++t) {
        const T* x = state + (t * job.features + f) * tile;
        T* g = grad + (t * job.features + f) * tile;
        for (int64_t i = 0; i < rows_of(t); ++i) {
          to_bias += static_cast<double>(job.inverse ? g[i] : g[i] * scale);
          to_scale += static_cast<double>(g[i] * (job.inverse ? x[i] : x[i] + bias));
        }
        for (int64_t i = 0; i < tile; ++i) g[i] *= scale;
      }
      if (partial == nullptr) continue;
      const double total = to_scale * static_cast<double>(scale) + through_logdet.total();
      partial[step.channel.grad_bias + f] += static_cast<T>(job.inverse ? -to_bias : to_bias);
      partial[step.channel.grad_weight + f] += static_cast<T>(job.inverse ? -total : total);
    }
  }

  // Sums over lanes must not see what lies past the last sample: zero times infinity.
  void clear_tail(int64_t t, int64_t features, T* values) const {
    const int64_t from = rows_of(t), to = lanes_of(t);
    if (from == to) return;
    for (int64_t f = 0; f < features; ++f)
      for (int64_t i = from; i < to; ++i) values[f * tile + i] = T(0);
  }

  void coupling_backward(const FlowStep& step, int64_t t, const CouplingRows<T>& coupling, T* partial) const {
    const int64_t n = lanes_of(t), last = step.count - 1;
    T* const active = state + (t * job.features + step.active_begin) * tile;
    T* const grad_active = grad + (t * job.features + step.active_begin) * tile;
    restore(step, t, active);
    const T* const x = input_of(step, t);
    const Pieces<T>& piecewise = pieces[&step - job.steps];
    const bool by_pieces = piecewise.usable && all_finite(1, n, x);
    for (int64_t l = by_pieces ? 1 : 0, at = by_pieces ? tile * padded(step.linears[0].out) : 0; l <= last;
         at += tile * padded(step.linears[l].out), ++l) {
      values[l] = hidden + at;
      slope_rows[l] = slopes + at;
      T* const kept = kept_of(step.linears[l], t);
      if (kept != nullptr && rows_of(t) == tile) {
        values[l] = kept;
        continue;
      }
      if (kept != nullptr) {
        copy_rows(step.linears[l].out, rows_of(t), kept, rows_of(t), values[l], tile);
        clear_tail(t, step.linears[l].out, values[l]);
        continue;
      }
      if (l == 1 && piecewise.usable)
        piecewise.apply(n, x, l != last, values[l]);
      else
        linear_forward<T>(step.linears[l], l == last, step.activation, n, l == 0 ? x : values[l - 1], values[l],
                          slope_rows[l]);
      clear_tail(t, step.linears[l].out, values[l]);
    }

    T* g = grad_hidden[last % 2];
    const Params params = params_of(step, coupling.additive, values[last]);
    const Params to = params_of(step, coupling.additive, g);
    SlopeRows<T> slope;
    alignas(64) T nowhere[tile];
    for (int64_t f = 0; f < step.active; ++f) {
      coupling.slope(coupling.map, n, params.raw + f * params.step, slope);
      coupling.gradient(coupling.map, n, slope, active + f * tile, params.shift + f * params.step,
                        grad_logdet + t * tile, grad_active + f * tile,
                        coupling.additive ? nowhere : to.raw + f * to.step, to.shift + f * to.step);
    }
    clear_tail(t, step.active, grad_active);
    clear_tail(t, step.linears[last].out, g);

    for (int64_t l = last; l >= 0; --l) {
      const FlowLinear& linear = step.linears[l];
      if (l == 1 && by_pieces && all_finite(linear.out, n, g)) {
        if (partial != nullptr) sums[l].add(linear, n, nullptr, g);
        return piecewise.gradients(rows_of(t), x, g, transposed_input,
                                   grad + (t * job.features + step.passive_begin) * tile);
      }
      if (l == 1 && by_pieces) {
        values[0] = hidden;
        linear_forward<T>(step.linears[0], false, step.activation, n, x, values[0], nullptr);
        clear_tail(t, step.linears[0].out, values[0]);
      }
      const T* below = l == 0 ? x : values[l - 1];
      if (partial != nullptr) {
        sums[l].add(linear, n, below, g);
        if (!is_thin(linear)) weight_gradient(linear, rows_of(t), below, g, transposed_input, partial);
      }
      if (l == 0) break;
      T* next = grad_hidden[(l - 1) % 2];
      linear_backward<T>(linear, step.activation, n, g, below, slope_rows[l - 1], next);
      clear_tail(t, linear.in, next);
      g = next;
    }
    input_backward(step.linears[0], 0, step.passive, n, g, grad + (t * job.features + step.passive_begin) * tile);
    if (job.grad_context != nullptr)
      input_backward(step.linears[0], step.passive, job.context_features, n, g,
                     grad_context + t * job.context_features * tile);
  }

  void backward(int64_t unit, T* partial) {
    begin_unit(unit);
    load(job.x, job.features, state);
    load(job.context, job.context_features, context);
    load_or_clear(job.grad_z, job.features, grad);
    load_or_clear(job.grad_logdet, 1, grad_logdet);
    for (int64_t i = 0; i < job.unit * job.context_features; ++i) grad_context[i] = T(0);
    for (const FlowStep* step = job.steps + job.count; step-- != job.steps;) {
      if (step->order != nullptr) {
        permute(step->order, !job.inverse, state);
        permute(step->order, !job.inverse, grad);
        continue;
      }
      if (!step->coupling) {
        channel_backward(*step, partial);
        continue;
      }
      const CouplingRows<T> coupling = coupling_rows<T>(step->map, job.inverse, step->shift_first);
      for (int64_t l = 0; l < step->count; ++l) sums[l + 1] = sums[l].begin(step->linears[l]);
      const Pieces<T>& piecewise = pieces[step - job.steps];
      if (piecewise.usable) piecewise.clear_sums();
      for (int64_t t = 0; t < tiles(); ++t) coupling_backward(*step, t, coupling, partial);
      if (piecewise.usable && partial != nullptr) piecewise.finish(*step, partial);
      for (int64_t l = 0; partial != nullptr && l < step->count; ++l) sums[l].finish(step->linears[l], partial);
    }
    if (job.z != nullptr) store(grad, job.features, job.z);
    if (job.grad_context != nullptr) store(grad_context, job.context_features, job.grad_context);
  }

  void load_or_clear(const FlowParameter& from, int64_t features, T* to) const {
    if (from.data != nullptr) return load(from, features, to);
    for (int64_t i = 0; i < tiles() * tile * features; ++i) to[i] = T(0);
  }
};

template <class T>
void run_forward(const FlowJob& job, void* scratch, int64_t begin, int64_t end) {
  Arena arena{static_cast<char*>(scratch)};
  Flow<T> flow(job, arena, false);
  for (int64_t unit = begin; unit < end; ++unit) flow.forward(unit);
}

template <class T>
void run_backward(const FlowJob& job, void* scratch, int64_t begin, int64_t end) {
  Arena arena{static_cast<char*>(scratch)};
  Flow<T> flow(job, arena, true);
  for (int64_t group = begin; group < end; ++group) {
    T* const partial = job.partial == nullptr ? nullptr : static_cast<T*>(job.partial) + group * job.partials;
    for (int64_t i = 0; partial != nullptr && i < job.partials; ++i) partial[i] = T(0);
    const int64_t from = group * job.units() / job.groups, to = (group + 1) * job.units() / job.groups;
    for (int64_t unit = from; unit < to; ++unit) flow.backward(unit, partial);
  }
}

template <class T>
void reduce(const PartialSums& sums, const FlowGradient& gradient) {
  constexpr int64_t block = 64;
  for (int64_t r = 0; r < gradient.rows; ++r)
    for (int64_t begin = 0; begin < gradient.columns; begin += block) {
      const int64_t n = at_most(block, gradient.columns - begin);
      const T* from = static_cast<const T*>(sums.partial) + gradient.at + r * gradient.ld + begin;
      T* to = static_cast<T*>(gradient.to) + r * gradient.columns + begin;
      double total[block] = {};
      for (int64_t g = 0; g < sums.groups; ++g)
        for (int64_t i = 0; i < n; ++i) total[i] += static_cast<double>(from[g * sums.partials + i]);
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(total[i]);
    }
}

}  // namespace

int64_t mlp_flow_scratch(const FlowJob& job, bool backward) {
  Arena arena{nullptr};
  if (job.is_double)
    Flow<double>(job, arena, backward);
  else
    Flow<float>(job, arena, backward);
  return arena.used;
}

void mlp_flow_forward(const FlowJob& job, void* scratch, int64_t begin, int64_t end) {
  job.is_double ? run_forward<double>(job, scratch, begin, end) : run_forward<float>(job, scratch, begin, end);
}

void mlp_flow_backward(const FlowJob& job, void* scratch, int64_t begin, int64_t end) {
  job.is_double ? run_backward<double>(job, scratch, begin, end) : run_backward<float>(job, scratch, begin, end);
}

void mlp_flow_reduce(const PartialSums& sums, const FlowGradient& gradient) {
  sums.is_double ? reduce<double>(sums, gradient) : reduce<float>(sums, gradient);
}

}  // namespace fastflow::FASTFLOW_ISA
