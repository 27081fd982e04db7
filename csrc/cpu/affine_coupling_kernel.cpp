// affine_coupling forward and backward over tiles that stay in the first-level cache.
#include "affine_coupling_kernel.h"

#include "../common/scale_map.h"
#include "cursor.h"
#include "sum.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

constexpr int64_t tile = AffineShape::tile;
constexpr int lanes = 16;

template <class T>
struct alignas(64) Tile {
  T values[tile];
};

template <class T>
T add_tree(T* values, int n) {
  for (int width = n / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) values[i] += values[i + width];
  return values[0];
}

// Sum of n <= tile values: 32 running sums, whatever the width of the vectors, then a tree.
template <class T>
T sum_tile(const T* values, int64_t n) {
  if (n < lanes) {
    T sum = values[0];
    for (int64_t i = 1; i < n; ++i) sum += values[i];
    return sum;
  }
  alignas(64) T sums[2 * lanes] = {};
  typedef T Vector __attribute__((vector_size(lanes * sizeof(T))));
  Vector low = {}, high = {};
  int64_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    Vector a, b;
    __builtin_memcpy(&a, values + i, sizeof a);
    __builtin_memcpy(&b, values + i + lanes, sizeof b);
    low += a;
    high += b;
  }
  __builtin_memcpy(sums, &low, sizeof low);
  __builtin_memcpy(sums + lanes, &high, sizeof high);
  for (int j = 0; i < n; ++i, ++j) sums[j] += values[i];
  return add_tree(sums, 2 * lanes);
}

template <class T>
using ForwardTile = void (*)(const ScaleMap<T>&, int64_t, const T*, const T*, const T*, T*, T*);

template <Kind K, bool Extended, bool Inverse, bool ShiftFirst, class T>
void forward_tile(const ScaleMap<T>& constants, int64_t n, const T* x, const T* raw, const T* shift, T* y, T* log_s) {
  const ScaleMap<T> map = constants;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T r = K == Kind::additive ? T(0) : raw[i];
    const Coupled<T> out = couple<K, Extended, Extended, Inverse, ShiftFirst, !Extended>(map, x[i], r, shift[i]);
    y[i] = out.y;
    log_s[i] = out.log_s;
  }
}

template <class T>
using BackwardTile = void (*)(const ScaleMap<T>&, int64_t, const T*, const T*, const T*, const T*, const T*, T*, T*,
                              T*);

template <Kind K, bool Extended, bool Inverse, bool ShiftFirst, class T>
void backward_tile(const ScaleMap<T>& constants, int64_t n, const T* grad_y, const T* grad_logdet, const T* x,
                   const T* raw, const T* shift, T* grad_x, T* grad_raw, T* grad_shift) {
  const ScaleMap<T> map = constants;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T r = K == Kind::additive ? T(0) : raw[i];
    const T t = gradient_reads_shift<Inverse, ShiftFirst> ? shift[i] : T(0);
    const CoupledGradient<T> out =
        couple_gradient<K, Extended, Extended, Inverse, ShiftFirst, !Extended>(map, grad_y[i], grad_logdet[i], x[i], r, t);
    grad_x[i] = out.x;
    if (K != Kind::additive) grad_raw[i] = out.raw;
    grad_shift[i] = out.shift;
  }
}

// Without a gradient in y only log s depends on the raw values, and x must not bring its infinities in.
template <class T>
using LogTile = void (*)(const ScaleMap<T>&, int64_t, bool, const T*, const T*, T*);

template <Kind K, bool Extended, class T>
void log_tile(const ScaleMap<T>& constants, int64_t n, bool inverse, const T* grad_logdet, const T* raw, T* grad_raw) {
  const ScaleMap<T> map = constants;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    grad_raw[i] = log_gradient(scale_slope<K, Extended, Extended, !Extended>(map, raw[i]), grad_logdet[i], inverse);
}

template <auto V>
struct Constant {
  static constexpr auto value = V;
};

template <class F>
auto with_flag(bool flag, const F& f) {
  return flag ? f(Constant<true>{}) : f(Constant<false>{});
}

template <class F>
auto with_kind(int64_t kind, const F& f) {
  switch (static_cast<Kind>(kind)) {
    case Kind::exp: return f(Constant<Kind::exp>{});
    case Kind::sigmoid: return f(Constant<Kind::sigmoid>{});
    case Kind::tanh: return f(Constant<Kind::tanh>{});
    case Kind::atan: return f(Constant<Kind::atan>{});
    case Kind::softplus: return f(Constant<Kind::softplus>{});
    case Kind::rational: return f(Constant<Kind::rational>{});
    default: return f(Constant<Kind::additive>{});
  }
}

template <class T>
ScaleMap<T> constants_of(const AffineMap& m) {
  return make_scale_map<T>(m.kind, m.gain, m.offset, m.out_gain, m.clamp, m.eps, m.hard_min, m.hard_max, m.shift_gain);
}

// The plain instance does without eps, without bounds and without the far ends of exp where log s is soft-clamped; the
// other does it all, and double has no other: the constants of whatever is absent change nothing.
template <class T, class F>
auto with_map(const AffineMap& map, const F& f) {
  return with_kind(map.kind, [&](auto kind) {
    if constexpr (sizeof(T) == 8)
      return f(kind, Constant<true>{});
    else
      return with_flag(map.eps != 0. || has_bounds(map.hard_min, map.hard_max) ||
                           !log_scale_is_moderate(constants_of<T>(map)),
                       [&](auto extended) { return f(kind, extended); });
  });
}

template <class T>
ForwardTile<T> choose_forward(const AffineForward& job) {
  return with_map<T>(job.map, [&](auto kind, auto extended) {
    return with_flag(job.shape.inverse, [&](auto inverse) {
      return with_flag(job.shape.shift_first, [&](auto first) -> ForwardTile<T> {
        return forward_tile<decltype(kind)::value, decltype(extended)::value, decltype(inverse)::value,
                            decltype(first)::value, T>;
      });
    });
  });
}

template <class T>
BackwardTile<T> choose_backward(const AffineBackward& job) {
  return with_map<T>(job.map, [&](auto kind, auto extended) {
    return with_flag(job.shape.inverse, [&](auto inverse) {
      return with_flag(job.shape.shift_first, [&](auto first) -> BackwardTile<T> {
        return backward_tile<decltype(kind)::value, decltype(extended)::value, decltype(inverse)::value,
                             decltype(first)::value, T>;
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
      const int64_t step = tile / shape.sample;
      for (int64_t at = from; at < to; at += step)
        tile_of((to - at < step ? to - at : step) * shape.sample, at);
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

// A result: tiles are computed where they belong if they lie there as contiguous T, else in a buffer. (Stores past the
// caches were measured slower: they stall the next tile's arithmetic.)
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
};

template <class T>
void fill(T* values, int64_t n, T value) {
  for (int64_t i = 0; i < n; ++i) values[i] = value;
}

template <class T>
void forward(const AffineForward& job, int64_t begin, int64_t end) {
  const AffineShape& shape = job.shape;
  const ScaleMap<T> map = constants_of<T>(job.map);
  const ForwardTile<T> compute = choose_forward<T>(job);
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
    compute(map, n, x.read(n, x_tile.values), raw.present() ? raw.read(n, raw_tile.values) : nullptr,
            shift.read(n, shift_tile.values), y.begin(n), log_tile.values);
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
    if (!passive.present()) return;
    int64_t left = first_passive(shape, unit + 1) - first_passive(shape, unit);
    for (; left > 0; left -= tile) {
      const int64_t n = left < tile ? left : tile;
      const T* values = passive.read(n, x_tile.values);
      passive_y.write(n, values);
    }
  };
  each_tile(shape, begin, end, one_tile, end_of_unit);
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
  const BackwardTile<T> compute = choose_backward<T>(job);
  const LogTile<T> compute_log = choose_log<T>(job);
  const bool additive = static_cast<Kind>(job.map.kind) == Kind::additive;
  const bool reads_shift = shape.inverse != shape.shift_first;
  const int64_t start = first_element(shape, begin);
  Cursor<T> grad_y, x, raw, shift;
  Result<T> grad_x, grad_raw, grad_shift;
  grad_y.seek(job.grad_y, start);
  x.seek(job.x, start);
  raw.seek(job.raw, start);
  shift.seek(job.shift, start);
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
      compute(map, n, gy, gl_tile.values, additive ? gy : x.read(n, x_tile.values), r,
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
  each_tile(shape, begin, end, one_tile, [](int64_t) {});
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
