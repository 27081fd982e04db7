// bernoulli_log_prob forward and backward for one instruction set, on tiles [begin, end).
#include "bernoulli_log_prob_kernel.h"

#include "cursor.h"
#include "floats.h"
#include "stream.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

constexpr int64_t chunk = BernoulliShape::chunk;

// The elements [first, first + count) of a tile: `rows` rows from `row` on, or a part of one.
struct Tile {
  int64_t first, count, row, rows, piece;
};

Tile tile_at(const BernoulliShape& shape, int64_t index) {
  if (shape.row < chunk) {
    const int64_t row = index * shape.group(), left = shape.rows - row;
    const int64_t rows = left < shape.group() ? left : shape.group();
    return {row * shape.row, rows * shape.row, row, rows, row};
  }
  const int64_t row = index / shape.chunks(), start = (index - row * shape.chunks()) * chunk;
  const int64_t left = shape.row - start;
  return {row * shape.row + start, left < chunk ? left : chunk, row, 1, index};
}

// x l - softplus(l) in the form that neither cancels nor, for an infinite l, differs from logsigmoid(l) - (1 - x) l.
template <class T>
FASTFLOW_HD T log_prob(T x, T l) {
  const auto negative = l < T(0);
  const T factor = math::select(negative, x, x - T(1));
  const T infinite = math::select(negative, l - l, T(0));
  return factor * l + infinite - math::log1p_unit(math::exp_decay(l));
}

// The sum in an order that depends on nothing but the length: 32 running sums, then those in double.
template <class T>
double log_prob_sum(const T* __restrict x, const T* __restrict logits, int64_t count) {
  constexpr int width = 32;
  T running[width] = {};
  int64_t i = 0;
  for (; i + width <= count; i += width) {
    each_element<has_floats<T>>(width, [&](int64_t j, auto part) __attribute__((always_inline)) {
      part.store(running + j, part.load(running + j) + log_prob(part.load(x + i + j), part.load(logits + i + j)));
    });
  }
  double total = 0.;
  for (; i < count; ++i) total += static_cast<double>(log_prob(x[i], logits[i]));
  for (int j = 0; j < width; ++j) total += static_cast<double>(running[j]);
  return total;
}

template <class T>
void forward(const BernoulliForward& job, int64_t begin, int64_t end) {
  alignas(64) T x_buffer[chunk], logits_buffer[chunk];
  Cursor<T> x_at, logits_at;
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_at(job.shape, index);
    x_at.seek(job.x, tile.first);
    logits_at.seek(job.logits, tile.first);
    const T* x = x_at.read(tile.count, x_buffer);
    const T* logits = logits_at.read(tile.count, logits_buffer);
    const int64_t each = tile.count / tile.rows;
    for (int64_t r = 0; r < tile.rows; ++r)
      job.partials[tile.piece + r] = log_prob_sum(x + r * each, logits + r * each, each);
  }
}

template <class T>
void slopes(T grad, const T* __restrict x, const T* __restrict logits, int64_t count, T* __restrict out) {
  each_element<has_floats<T>>(count, [&](int64_t i, auto part) __attribute__((always_inline)) {
    const auto l = part.load(logits + i);
    part.store(out + i, decltype(l)(grad) * (part.load(x + i) - math::sigmoid(l)));
  });
}

template <class T>
void backward(const BernoulliBackward& job, int64_t begin, int64_t end) {
  alignas(64) T x_buffer[chunk], logits_buffer[chunk], out_buffer[chunk];
  Cursor<T> x_at, logits_at, out_at;
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_at(job.shape, index);
    x_at.seek(job.x, tile.first);
    logits_at.seek(job.logits, tile.first);
    out_at.seek(job.grad_logits, tile.first);
    const T* x = x_at.read(tile.count, x_buffer);
    const T* logits = logits_at.read(tile.count, logits_buffer);
    T* const direct = out_at.in_place(tile.count);
    const bool streamed = job.streamed && direct != nullptr &&
                          reinterpret_cast<uintptr_t>(direct) % stream_alignment == 0;
    T* const out = direct == nullptr || streamed ? out_buffer : direct;
    const int64_t each = tile.count / tile.rows;
    for (int64_t r = 0; r < tile.rows; ++r)
      slopes(element<T>(job.grad, tile.row + r), x + r * each, logits + r * each, each, out + r * each);
    if (streamed)
      stream(direct, out, tile.count);
    else if (direct == nullptr)
      out_at.write(tile.count, out);
  }
  if (job.streamed) end_stream();
}

}  // namespace

void bernoulli_forward(const BernoulliForward& job, int64_t begin, int64_t end) {
  job.shape.is_double ? forward<double>(job, begin, end) : forward<float>(job, begin, end);
}

void bernoulli_backward(const BernoulliBackward& job, int64_t begin, int64_t end) {
  job.shape.is_double ? backward<double>(job, begin, end) : backward<float>(job, begin, end);
}

}  // namespace fastflow::FASTFLOW_ISA
