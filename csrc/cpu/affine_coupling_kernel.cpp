// affine_coupling forward and backward over tiles that stay in the first-level cache.
#include "affine_coupling_kernel.h"

#include "affine_coupling_tiles.h"
#include "cursor.h"
#include "scale_choice.h"
#include "sum.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

// Null where there is none: Streamed with double or with more than the plain arithmetic.
template <bool Streamed, class T>
ForwardTile<T> choose_forward(const AffineForward& job) {
  return with_map<T>(job.map, [&](auto kind, auto extended) {
    return with_flag(job.shape.inverse, [&](auto inverse) {
      return with_flag(job.shape.shift_first, [&](auto first) -> ForwardTile<T> {
        if constexpr (Streamed && decltype(extended)::value)
          return nullptr;
        else
          return forward_tile<decltype(kind)::value, decltype(extended)::value, decltype(inverse)::value,
                              decltype(first)::value, Streamed, T>;
      });
    });
  });
}

// Null where there is none.
template <bool Streamed, class T>
SummedTile<T> choose_summed(const AffineForward& job) {
  if (sizeof(T) == 8 || !job.shape.split() || static_cast<Kind>(job.map.kind) != Kind::sigmoid) return nullptr;
  if (needs_extended<T>(job.map)) return nullptr;
  return with_flag(job.shape.inverse, [&](auto inverse) {
    return with_flag(job.shape.shift_first, [&](auto first) -> SummedTile<T> {
      return sigmoid_tile<decltype(inverse)::value, decltype(first)::value, Streamed, T>;
    });
  });
}

template <bool Streamed, class T>
BackwardTile<T> choose_backward(const AffineBackward& job) {
  return with_map<T>(job.map, [&](auto kind, auto extended) {
    return with_flag(job.shape.inverse, [&](auto inverse) {
      return with_flag(job.shape.shift_first, [&](auto first) -> BackwardTile<T> {
        if constexpr (Streamed && decltype(extended)::value)
          return nullptr;
        else
          return backward_tile<decltype(kind)::value, decltype(extended)::value, decltype(inverse)::value,
                               decltype(first)::value, Streamed, T>;
      });
    });
  });
}

template <class T>
LogTile<T> choose_log(const AffineBackward& job) {
  return with_map<T>(job.map, [](auto kind, auto extended) -> LogTile<T> {
    return log_tile<decltype(kind)::value, decltype(extended)::value, T>;
  });
}

// Calls tile(n, sample) for the tiles of units [begin, end), in the order of traversal. Sample is the first that the
// tile touches: a tile lies in one sample or holds several whole ones.
template <class F, class G>
void each_tile(const AffineShape& shape, int64_t begin, int64_t end, const F& tile_of, const G& end_of_unit) {
  for (int64_t unit = begin; unit < end; ++unit) {
    if (shape.split()) {
      const int64_t blocks = shape.blocks(), sample = unit / blocks, from = (unit - sample * blocks) * shape.block;
      const int64_t to = from + shape.block < shape.sample ? from + shape.block : shape.sample;
      for (int64_t at = from; at < to; at += tile) tile_of(to - at < tile ? to - at : tile, sample);
    } else if (shape.sample > 0) {
      const int64_t from = unit * shape.group();
      const int64_t to = from + shape.group() < shape.batch ? from + shape.group() : shape.batch;
      const int64_t most = tile / shape.sample;
      for (int64_t at = from; at < to; at += most)
        tile_of((to - at < most ? to - at : most) * shape.sample, at);
    }
    end_of_unit(unit);
  }
}

int64_t first_element(const AffineShape& shape, int64_t unit) {
  if (!shape.split()) return unit * shape.group() * shape.sample;
  const int64_t sample = unit / shape.blocks();
  return sample * shape.sample + (unit - sample * shape.blocks()) * shape.block;
}

// Passive elements that lie before those of a unit.
int64_t first_passive(const AffineShape& shape, int64_t unit) {
  if (!shape.split()) {
    const int64_t sample = unit * shape.group();
    return (sample < shape.batch ? sample : shape.batch) * shape.passive;
  }
  const int64_t blocks = shape.blocks(), sample = unit / blocks;
  return sample * shape.passive + shape.passive * (unit - sample * blocks) / blocks;
}

// A result: tiles are computed where they belong if they lie there as contiguous T, else in a buffer.
template <class T>
struct Result {
  Cursor<T> cursor;
  bool direct;
  Tile<T> buffer;

  T* begin(int64_t n) {
    T* target = cursor.present() ? cursor.in_place(n) : nullptr;
    direct = target != nullptr;
    return direct ? target : buffer.values;
  }

  void finish(int64_t n) {
    if (cursor.present() && !direct) cursor.write(n, buffer.values);
  }

  // Whether the tile of n at this target may be streamed.
  bool streams(const T* target, int64_t n) const {
    return direct && n % step == 0 && reinterpret_cast<uintptr_t>(target) % stream_alignment == 0;
  }
};

template <class T>
void fill(T* values, int64_t n, T value) {
  for (int64_t i = 0; i < n; ++i) values[i] = value;
}

// Copies `count` elements, or writes zeros where there is nothing to copy.
template <class T>
void copy_passive(Cursor<T>& from, Cursor<T>& to, int64_t count, Tile<T>& buffer) {
  for (; count > 0; count -= tile) {
    const int64_t n = count < tile ? count : tile;
    if (!from.present()) fill(buffer.values, n, T(0));
    to.write(n, from.present() ? from.read(n, buffer.values) : buffer.values);
  }
}

template <class T>
void forward(const AffineForward& job, int64_t begin, int64_t end) {
  const AffineShape& shape = job.shape;
  const ScaleMap<T> map = constants_of<T>(job.map);
  const ForwardTile<T> compute = choose_forward<false, T>(job);
  const ForwardTile<T> compute_streamed = job.streamed ? choose_forward<true, T>(job) : nullptr;
  const SummedTile<T> summed = choose_summed<false, T>(job), summed_streamed = choose_summed<true, T>(job);
  const int64_t start = first_element(shape, begin);
  Cursor<T> x, raw, shift, passive, passive_y;
  Result<T> y;
  x.seek(job.x, start);
  raw.seek(job.raw, start);
  shift.seek(job.shift, start);
  y.cursor.seek(job.y, start);
  passive.seek(job.passive, first_passive(shape, begin));
  passive_y.seek(job.passive_y, first_passive(shape, begin));
  Tile<T> x_tile, raw_tile, shift_tile, log_tile;
  CompensatedSum sum;

  auto one_tile = [&](int64_t n, int64_t sample) {
    T* to_y = y.begin(n);
    const bool streamed = compute_streamed != nullptr && y.streams(to_y, n);
    const T* at_x = x.read(n, x_tile.values);
    const T* r = raw.present() ? raw.read(n, raw_tile.values) : nullptr;
    const T* t = shift.read(n, shift_tile.values);
    if (summed != nullptr) {
      sum.add(static_cast<double>((streamed ? summed_streamed : summed)(map, n, at_x, r, t, to_y)));
      return y.finish(n);
    }
    (streamed ? compute_streamed : compute)(map, n, at_x, r, t, to_y, log_tile.values);
    y.finish(n);
    if (shape.split()) {
      sum.add(static_cast<double>(sum_tile(log_tile.values, n)));
      return;
    }
    for (int64_t i = 0; i < n; i += shape.sample)
      job.partials[sample++] = static_cast<double>(sum_tile(log_tile.values + i, shape.sample));
  };
  auto end_of_unit = [&](int64_t unit) {
    if (shape.split()) {
      job.partials[unit] = sum.total();
      sum = CompensatedSum();
    }
    if (passive.present())
      copy_passive(passive, passive_y, first_passive(shape, unit + 1) - first_passive(shape, unit), x_tile);
  };
  each_tile(shape, begin, end, one_tile, end_of_unit);
  if (job.streamed) end_stream();
}

template <class T>
void write_logdet(const AffineForward& job) {
  const AffineShape& shape = job.shape;
  const int64_t parts = shape.split() ? shape.blocks() : 1;
  for (int64_t b = 0; b < shape.batch; ++b) {
    CompensatedSum sum;
    for (int64_t i = 0; shape.sample > 0 && i < parts; ++i) sum.add(job.partials[b * parts + i]);
    double total = shape.inverse ? -sum.total() : sum.total();
    if (job.running.data != nullptr) total += element<double>(job.running, b);
    static_cast<T*>(job.logdet.data)[b] = static_cast<T>(total);
  }
}

template <class T>
void backward(const AffineBackward& job, int64_t begin, int64_t end) {
  const AffineShape& shape = job.shape;
  const ScaleMap<T> map = constants_of<T>(job.map);
  const BackwardTile<T> compute = choose_backward<false, T>(job);
  const BackwardTile<T> compute_streamed = job.streamed ? choose_backward<true, T>(job) : nullptr;
  const LogTile<T> compute_log = choose_log<T>(job);
  const bool additive = static_cast<Kind>(job.map.kind) == Kind::additive;
  const bool reads_shift = shape.inverse != shape.shift_first;
  const int64_t start = first_element(shape, begin);
  Cursor<T> grad_y, x, raw, shift, passive_grad_y, passive_grad_x;
  Result<T> grad_x, grad_raw, grad_shift;
  grad_y.seek(job.grad_y, start);
  x.seek(job.x, start);
  raw.seek(job.raw, start);
  shift.seek(job.shift, start);
  passive_grad_y.seek(job.passive_grad_y, first_passive(shape, begin));
  passive_grad_x.seek(job.passive_grad_x, first_passive(shape, begin));
  grad_x.cursor.seek(job.grad_x, start);
  grad_raw.cursor.seek(job.grad_raw, start);
  grad_shift.cursor.seek(job.grad_shift, start);
  Tile<T> gy_tile, gl_tile, x_tile, raw_tile, shift_tile;
  fill(gl_tile.values, tile, T(0));
  int64_t filled = -1;

  auto one_tile = [&](int64_t n, int64_t sample) {
    if (job.grad_logdet.data != nullptr && filled != sample) {
      const int64_t length = shape.split() ? tile : shape.sample;
      for (int64_t i = 0, b = sample; i < (shape.split() ? tile : n); i += length, ++b)
        fill(gl_tile.values + i, length, element<T>(job.grad_logdet, b));
      filled = sample;
    }
    T* gx = grad_x.begin(n);
    T* gr = grad_raw.begin(n);
    T* gt = grad_shift.begin(n);
    const T* r = raw.present() ? raw.read(n, raw_tile.values) : nullptr;
    if (grad_y.present()) {
      const T* gy = grad_y.read(n, gy_tile.values);
      const bool streamed = compute_streamed != nullptr && grad_x.streams(gx, n) && grad_shift.streams(gt, n) &&
                            (additive || grad_raw.streams(gr, n));
      (streamed ? compute_streamed : compute)(map, n, gy, gl_tile.values, additive ? gy : x.read(n, x_tile.values), r,
              reads_shift ? shift.read(n, shift_tile.values) : nullptr, gx, gr, gt);
    } else {
      fill(gx, n, T(0));
      fill(gt, n, T(0));
      if (!additive) compute_log(map, n, shape.inverse, gl_tile.values, r, gr);
    }
    grad_x.finish(n);
    grad_raw.finish(n);
    grad_shift.finish(n);
  };
  auto end_of_unit = [&](int64_t unit) {
    if (passive_grad_x.present())
      copy_passive(passive_grad_y, passive_grad_x, first_passive(shape, unit + 1) - first_passive(shape, unit),
                   x_tile);
  };
  each_tile(shape, begin, end, one_tile, end_of_unit);
  if (job.streamed) end_stream();
}

}  // namespace

void affine_forward(const AffineForward& job, int64_t begin, int64_t end) {
  job.shape.is_double ? forward<double>(job, begin, end) : forward<float>(job, begin, end);
}

void affine_logdet(const AffineForward& job) {
  job.shape.is_double ? write_logdet<double>(job) : write_logdet<float>(job);
}

void affine_backward(const AffineBackward& job, int64_t begin, int64_t end) {
  job.shape.is_double ? backward<double>(job, begin, end) : backward<float>(job, begin, end);
}

}  // namespace fastflow::FASTFLOW_ISA
