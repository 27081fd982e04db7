// spline forward and backward: a tile's parameters are read into rows, one per parameter, and all is computed there.
#include "spline_kernel.h"

#include "cursor.h"
#include "spline_tiles.h"
#include "stream.h"
#include "sum.h"
#include "transpose.h"

#include <cstddef>
#include <cstdint>

namespace fastflow::FASTFLOW_ISA {
namespace {

template <bool V>
struct Constant {
  static constexpr bool value = V;
};

template <class F>
auto with_flag(bool flag, const F& f) {
  return flag ? f(Constant<true>{}) : f(Constant<false>{});
}

template <class F>
auto with_options(const SplineJob& job, const F& f) {
  return with_flag(job.shape.linear, [&](auto linear) {
    return with_flag(job.clamp != 0., [&](auto soft) {
      return with_flag(job.shape.inverse, [&](auto inverse) { return f(linear, soft, inverse); });
    });
  });
}

template <class T>
spline::Map<T> constants_of(const SplineJob& job) {
  return spline::make_map<T>(job.shape.bins, job.bound, job.min_width, job.min_height, job.min_derivative, job.gain,
                             job.clamp, job.end_derivative);
}

// The elements of a unit, in the order of traversal.
struct Range {
  int64_t begin, end;
};

Range elements_of(const SplineShape& shape, int64_t unit) {
  if (shape.split()) {
    const int64_t sample = unit / shape.blocks(), from = (unit - sample * shape.blocks()) * SplineShape::block;
    const int64_t to = from + SplineShape::block < shape.sample ? from + SplineShape::block : shape.sample;
    return {sample * shape.sample + from, sample * shape.sample + to};
  }
  const int64_t from = unit * shape.group(), to = from + shape.group() < shape.batch ? from + shape.group() : shape.batch;
  return {from * shape.sample, to * shape.sample};
}

// f(sample, first element of the tile that is in it, how many are) for the samples of [begin, end).
template <class F>
void each_sample(const SplineShape& shape, int64_t begin, int64_t end, const F& f) {
  for (int64_t at = begin, sample = begin / shape.sample; at < end; ++sample) {
    const int64_t next = (sample + 1) * shape.sample, to = next < end ? next : end;
    f(sample, at - begin, to - at);
    at = to;
  }
}

// The operands that a tile's parameters are: one for each of an element, `stride` apart.
template <class T>
struct Parameters {
  Cursor<T> cursor;
  int64_t count, stride;

  void seek(const Operand& operand, int64_t element, int64_t params, int64_t param_stride) {
    cursor.seek(operand, element);
    count = params;
    stride = param_stride;
  }

  // f(cursor of one parameter, its row), then on to the next tile.
  template <class F>
  void each(T* rows, const F& f) {
    const Cursor<T> start = cursor;
    for (int64_t j = 0; j < count; ++j) {
      cursor = start;
      cursor.offset += j * stride;
      f(cursor, rows + j * tile);
    }
    cursor.offset -= (count - 1) * stride;
  }

  // The next n elements if their parameters lie side by side as T, moving past them; else null, without moving.
  T* side_by_side(int64_t n) {
    const Operand& o = *cursor.operand;
    const int last = o.rank - 1;
    if (o.element != (sizeof(T) == 8 ? Element::float64 : Element::float32) || stride != 1 || last < 0) return nullptr;
    if (n < Simd<T>::lanes || count < Simd<T>::lanes || cursor.position + n > o.size[last]) return nullptr;
    T* result = static_cast<T*>(o.data) + cursor.offset + cursor.position * o.stride[last];
    cursor.skip(n);
    return result;
  }

  // Asks for what is likely to be the next tile.
  void prefetch(const T* elements, int64_t n) const {
    const int64_t size = n * cursor.operand->stride[cursor.operand->rank - 1];
    for (int64_t i = 0; i < size; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(elements + size + i);
  }

  void read(int64_t n, T* rows) {
    if (const T* elements = side_by_side(n)) {
      prefetch(elements, n);
      return transpose_rows(elements, cursor.operand->stride[cursor.operand->rank - 1], n, count, rows, tile);
    }
    each(rows, [&](Cursor<T>& one, T* row) {
      const T* values = one.read(n, row);
      if (values == row) return;
      __builtin_memcpy(row, values, static_cast<std::size_t>(n) * sizeof(T));
      for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(values + n + i);
    });
  }

  // spare: room for a tile, through which dense parameters go past the caches; null: they are not to.
  void write(int64_t n, T* rows, T* spare) {
    if (T* elements = side_by_side(n)) {
      const int64_t step = cursor.operand->stride[cursor.operand->rank - 1];
      if (spare == nullptr || step != count || reinterpret_cast<uintptr_t>(elements) % stream_alignment != 0)
        return transpose_rows(rows, tile, count, n, elements, step);
      transpose_rows(rows, tile, count, n, spare, count);
      return stream(elements, spare, n * count);
    }
    each(rows, [&](Cursor<T>& one, const T* row) { one.write(n, row); });
  }
};

// In double, in as many running sums as the widest vector has lanes, then a tree.
template <class T>
double sum_of(const T* values, int64_t n) {
  constexpr int64_t width = 8;
  double sums[width] = {};
  int64_t i = 0;
  for (; i + width <= n; i += width)
    for (int64_t j = 0; j < width; ++j) sums[j] += static_cast<double>(values[i + j]);
  for (int64_t j = 0; i < n; ++i, ++j) sums[j] += static_cast<double>(values[i]);
  for (int64_t half = width / 2; half > 0; half /= 2)
    for (int64_t j = 0; j < half; ++j) sums[j] += sums[j + half];
  return sums[0];
}

int64_t whole_lanes(int64_t n) { return (n + lanes - 1) / lanes * lanes; }

template <class T>
void read_row(Cursor<T>& cursor, int64_t n, Row<T>& row) {
  const T* values = cursor.read(n, row.values);
  if (values != row.values) __builtin_memcpy(row.values, values, static_cast<std::size_t>(n) * sizeof(T));
}

template <class T>
struct Working {
  T* raw;
  Located<T> at;

  Working(const SplineShape& shape, void* scratch) : raw(static_cast<T*>(scratch)), at{} {
    const int64_t rows = shape.scratch() / (tile * static_cast<int64_t>(sizeof(T)));
    for (int64_t i = 0; i < rows * tile; ++i) raw[i] = T(0);  // what no element fills is computed with, too
    at.heights.exponentials = raw + shape.params * tile;
    at.widths.exponentials = at.heights.exponentials + shape.bins * tile;
  }
};

template <class T>
void forward(const SplineForward& job, int64_t begin, int64_t end, void* scratch) {
  const SplineShape& shape = job.shape;
  const spline::Map<T> map = constants_of<T>(job);
  const ForwardTile<T> compute = with_options(job, [](auto linear, auto soft, auto inverse) -> ForwardTile<T> {
    return forward_tile<decltype(linear)::value, decltype(soft)::value, decltype(inverse)::value, T>;
  });
  Working<T> working(shape, scratch);
  Cursor<T> x, y;
  Parameters<T> params;
  const int64_t start = elements_of(shape, begin).begin;
  x.seek(job.x, start);
  y.seek(job.y, start);
  params.seek(job.params, start, shape.params, job.param_stride);
  Row<T> x_row{}, y_row, log_row;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Range range = elements_of(shape, unit);
    CompensatedSum sum;
    for (int64_t at = range.begin; at < range.end; at += tile) {
      const int64_t n = range.end - at < tile ? range.end - at : tile;
      read_row(x, n, x_row);
      params.read(n, working.raw);
      compute(shape, map, whole_lanes(n), x_row.values, working.raw, working.at, y_row.values, log_row.values);
      y.write(n, y_row.values);
      each_sample(shape, at, at + n, [&](int64_t sample, int64_t first, int64_t count) {
        sum.add(sum_of(log_row.values + first, count));
        if (shape.split() || (at + first + count) % shape.sample != 0) return;
        job.partials[sample] = sum.total();
        sum = CompensatedSum();
      });
    }
    if (shape.split()) job.partials[unit] = sum.total();
  }
}

template <class T>
void write_logdet(const SplineForward& job) {
  const SplineShape& shape = job.shape;
  const int64_t parts = shape.split() ? shape.blocks() : 1;
  for (int64_t b = 0; b < shape.batch; ++b) {
    CompensatedSum sum;
    for (int64_t i = 0; shape.sample > 0 && i < parts; ++i) sum.add(job.partials[b * parts + i]);
    double total = sum.total();
    if (job.running.data != nullptr) total += element<double>(job.running, b);
    static_cast<T*>(job.logdet.data)[b] = static_cast<T>(total);
  }
}

template <class T>
void backward(const SplineBackward& job, int64_t begin, int64_t end, void* scratch) {
  const SplineShape& shape = job.shape;
  const spline::Map<T> map = constants_of<T>(job);
  const BackwardTile<T> compute = with_options(job, [](auto linear, auto soft, auto inverse) -> BackwardTile<T> {
    return backward_tile<decltype(linear)::value, decltype(soft)::value, decltype(inverse)::value, T>;
  });
  Working<T> working(shape, scratch);
  Cursor<T> x, grad_y, grad_x;
  Parameters<T> params, grad_params;
  const int64_t start = elements_of(shape, begin).begin;
  x.seek(job.x, start);
  grad_y.seek(job.grad_y, start);
  grad_x.seek(job.grad_x, start);
  params.seek(job.params, start, shape.params, job.param_stride);
  grad_params.seek(job.grad_params, start, shape.params, job.grad_param_stride);
  T* spare = job.streamed ? static_cast<T*>(scratch) + shape.scratch() / static_cast<int64_t>(sizeof(T)) : nullptr;
  Row<T> x_row{}, grad_row{}, log_row{}, result;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Range range = elements_of(shape, unit);
    for (int64_t at = range.begin; at < range.end; at += tile) {
      const int64_t n = range.end - at < tile ? range.end - at : tile;
      read_row(x, n, x_row);
      params.read(n, working.raw);
      if (grad_y.present()) read_row(grad_y, n, grad_row);
      if (job.grad_logdet.data != nullptr) {
        each_sample(shape, at, at + n, [&](int64_t sample, int64_t first, int64_t count) {
          const T value = element<T>(job.grad_logdet, sample);
          for (int64_t i = first; i < first + count; ++i) log_row.values[i] = value;
        });
      }
      compute(shape, map, whole_lanes(n), x_row.values, working.raw, working.at, grad_row.values, log_row.values,
              grad_params.cursor.present(), result.values);
      if (grad_x.present()) grad_x.write(n, result.values);
      if (grad_params.cursor.present()) grad_params.write(n, working.raw, spare);
    }
  }
  if (spare != nullptr) end_stream();
}

}  // namespace

void spline_forward(const SplineForward& job, int64_t begin, int64_t end, void* scratch) {
  job.shape.is_double ? forward<double>(job, begin, end, scratch) : forward<float>(job, begin, end, scratch);
}

void spline_logdet(const SplineForward& job) {
  job.shape.is_double ? write_logdet<double>(job) : write_logdet<float>(job);
}

void spline_backward(const SplineBackward& job, int64_t begin, int64_t end, void* scratch) {
  job.shape.is_double ? backward<double>(job, begin, end, scratch) : backward<float>(job, begin, end, scratch);
}

}  // namespace fastflow::FASTFLOW_ISA
