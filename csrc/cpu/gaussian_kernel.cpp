// The Gaussian operators for one instruction set. A tile's operands are brought to contiguous arrays (where they are
// not that already), its noise is drawn into a small buffer, and plain loops over arrays do the rest.
#include "gaussian_kernel.h"

#include "../common/gaussian_map.h"
#include "cursor.h"
#include "gaussian_noise.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

using gaussian::Backward;
using gaussian::Forward;
using gaussian::Problem;
using gaussian::Tiling;

template <class T>
struct Sixteen;
template <>
struct Sixteen<float> {
  using Vector = float __attribute__((vector_size(64)));
};
template <>
struct Sixteen<double> {
  using Vector = double __attribute__((vector_size(128)));
};

// The sum of an array in an order that depends on nothing but its length: 32 running sums, then a tree.
template <class T>
T sum(const T* values, int64_t count) {
  constexpr int width = 16;
  using Vector = typename Sixteen<T>::Vector;
  Vector a{}, b{}, next;
  int64_t i = 0;
  for (; i + 2 * width <= count; i += 2 * width) {
    __builtin_memcpy(&next, values + i, sizeof next);
    a += next;
    __builtin_memcpy(&next, values + i + width, sizeof next);
    b += next;
  }
  if (i < count) {
    T rest[2 * width] = {};
    for (int64_t j = 0; i + j < count; ++j) rest[j] = values[i + j];
    __builtin_memcpy(&next, rest, sizeof next);
    a += next;
    __builtin_memcpy(&next, rest + width, sizeof next);
    b += next;
  }
  a += b;
  T lane[width];
  __builtin_memcpy(lane, &a, sizeof a);
  for (int half = width / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
  return lane[0];
}

// Logical elements [first, first + count), which make the partial sums [piece, piece + pieces) of `each` elements.
struct Tile {
  int64_t first, count, piece, pieces, each;
};

Tile tile_at(const Tiling& tiling, int64_t index) {
  if (tiling.group > 1) {
    const int64_t row = index * tiling.group, left = tiling.rows - row;
    const int64_t rows = left < tiling.group ? left : tiling.group;
    return {row * tiling.row, rows * tiling.row, row, rows, tiling.row};
  }
  const int64_t row = index / tiling.chunks, start = (index - row * tiling.chunks) * gaussian::chunk;
  const int64_t left = tiling.row - start, count = left < gaussian::chunk ? left : gaussian::chunk;
  return {row * tiling.row + start, count, index, 1, count};
}

template <class T>
void sum_pieces(const Tile& tile, const T* values, T* partial) {
  for (int64_t j = 0; j < tile.pieces; ++j) partial[tile.piece + j] = sum(values + j * tile.each, tile.each);
}

template <class T>
struct Scratch {
  alignas(64) T mean[gaussian::chunk], raw[gaussian::chunk], prior_mean[gaussian::chunk], prior_raw[gaussian::chunk];
  alignas(64) T eps[gaussian::chunk];
  alignas(64) float drawn[noise_size];
};

template <class T>
struct Params {
  const T *mean, *raw, *prior_mean, *prior_raw;
};

template <class T>
Params<T> fetch_params(const Problem& p, const Tile& tile, Scratch<T>& s) {
  const int64_t first = tile.first, count = tile.count;
  Params<T> in{fetch(p.mean, first, count, s.mean), fetch(p.raw, first, count, s.raw), nullptr, nullptr};
  if (p.prior_mean.data != nullptr) {
    in.prior_mean = fetch(p.prior_mean, first, count, s.prior_mean);
    in.prior_raw = fetch(p.prior_raw, first, count, s.prior_raw);
  }
  return in;
}

// Elements [at, at + count) of a result: written where they lie if they lie as contiguous T, else in buffer, from which
// `commit` moves them on. The buffer also takes what an absent result would hold.
template <class T>
struct Result {
  Cursor<T> cursor;
  T *data, *buffer;

  Result(const Operand& operand, int64_t at, int64_t count, T* where) : buffer(where) {
    cursor.seek(operand, at);
    T* const direct = cursor.present() ? cursor.in_place(count) : nullptr;
    data = direct == nullptr ? buffer : direct;
  }

  void commit(int64_t count) {
    if (data == buffer && cursor.present()) cursor.write(count, buffer);
  }
};

template <int scale, bool prior, class T>
void posterior(const Params<T>& in, int64_t count, T* __restrict sigma, T* __restrict log_sigma, T* __restrict kl) {
  const T *__restrict mean = in.mean, *__restrict raw = in.raw;
  const T *__restrict prior_mean = in.prior_mean, *__restrict prior_raw = in.prior_raw;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const gaussian::Sigma<T> q = gaussian::sigma_of<scale>(raw[i]);
    sigma[i] = q.value;
    log_sigma[i] = q.log;
    if constexpr (prior)
      kl[i] = gaussian::kl_prior(mean[i], q.log, prior_mean[i], gaussian::sigma_of<scale>(prior_raw[i]));
    else
      kl[i] = gaussian::kl_standard(mean[i], q.log);
  }
}

// Gradients that come in: by z summed over the samples (with and without the noise as a factor), by the KL and by log q.
template <class T>
struct Incoming {
  const T *z, *z_eps, *kl, *logq;  // null where there is none
};

template <class T>
struct Outgoing {
  T *mean, *raw, *prior_mean, *prior_raw;
};

template <int scale, bool prior, class T>
FASTFLOW_HD gaussian::KlSlopes<T> kl_slopes(T mean, gaussian::Sigma<T> q, T prior_mean, T prior_raw) {
  if constexpr (prior)
    return gaussian::kl_prior_slopes(mean, q, prior_mean, gaussian::sigma_of<scale>(prior_raw));
  else
    return gaussian::kl_standard_slopes(mean, q);
}

template <int scale, bool prior, class T>
void gradients(const Params<T>& in, const Incoming<T>& grad, int64_t count, const Outgoing<T>& out) {
  const T *__restrict mean = in.mean, *__restrict raw = in.raw;
  const T *prior_mean = prior ? in.prior_mean : mean, *prior_raw = prior ? in.prior_raw : raw;
  T *__restrict to_mean = out.mean, *__restrict to_raw = out.raw;
  T *__restrict to_prior_mean = out.prior_mean, *__restrict to_prior_raw = out.prior_raw;
  // A gradient that is absent must not meet an infinite slope, since 0 * inf is NaN: its terms are left out. Something
  // is read in its place all the same, so that the loop has no branches.
  const bool has_z = grad.z != nullptr, has_z_eps = grad.z_eps != nullptr;
  const bool has_kl = grad.kl != nullptr, has_logq = grad.logq != nullptr;
  const T *z = has_z ? grad.z : raw, *z_eps = has_z_eps ? grad.z_eps : raw;
  const T *kl = has_kl ? grad.kl : raw, *logq = has_logq ? grad.logq : raw;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const gaussian::Sigma<T> q = gaussian::sigma_of<scale>(raw[i]);
    const T by_z = z[i], by_sigma = z_eps[i] * q.slope, by_log = logq[i] * q.log_slope, by_kl = kl[i];
    const gaussian::KlSlopes<T> slope = kl_slopes<scale, prior>(mean[i], q, prior_mean[i], prior_raw[i]);
    to_mean[i] = (has_z ? by_z : T(0)) + (has_kl ? by_kl * slope.mean : T(0));
    to_raw[i] = (has_z_eps ? by_sigma : T(0)) - (has_logq ? by_log : T(0)) + (has_kl ? by_kl * slope.raw : T(0));
    if constexpr (prior) {
      to_prior_mean[i] = has_kl ? by_kl * slope.prior_mean : T(0);
      to_prior_raw[i] = has_kl ? by_kl * slope.prior_raw : T(0);
    }
  }
}

template <class T>
void reparametrise(const T* __restrict mean, const T* __restrict sigma, const T* __restrict eps, int64_t count,
                   T* __restrict z) {
  for (int64_t i = 0; i < count; ++i) z[i] = math::fma(sigma[i], eps[i], mean[i]);
}

template <class T>
void surprise(const T* __restrict log_sigma, const T* __restrict eps, int64_t count, T* __restrict out) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = math::fma(T(0.5) * eps[i], eps[i], T(gaussian::half_log_two_pi) + log_sigma[i]);
}

template <class T, class Posterior>
void forward(const Forward& f, int64_t begin, int64_t end, Posterior posterior) {
  const Problem& p = f.problem;
  Scratch<T> s;
  alignas(64) T sigma[gaussian::chunk], log_sigma[gaussian::chunk], element[gaussian::chunk], out[gaussian::chunk];
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_at(p.tiling, index);
    const int64_t first = tile.first, count = tile.count;
    const Params<T> in = fetch_params(p, tile, s);
    T* const kl = f.elementwise == nullptr ? element : static_cast<T*>(f.elementwise) + first;
    posterior(in, count, sigma, log_sigma, kl);
    if (f.kl != nullptr) sum_pieces(tile, kl, static_cast<T*>(f.kl));
    for (int64_t k = 0; k < p.samples; ++k) {
      const T* const eps = noise_at(p, k, first, count, s.drawn, s.eps);
      Result<T> z(f.z, k * p.total + first, count, out);
      reparametrise(in.mean, sigma, eps, count, z.data);
      z.commit(count);
      if (f.eps != nullptr) copy_run(eps, 1, static_cast<T*>(f.eps) + k * p.total + first, 1, count);
      if (f.logq != nullptr) {
        surprise(log_sigma, eps, count, element);
        sum_pieces(tile, element, static_cast<T*>(f.logq) + k * p.tiling.pieces);
      }
    }
  }
}

// Sums over the samples in two levels, so that the error does not grow with their number.
template <class T>
class SampleSum {
 public:
  void add(const T* __restrict a, const T* __restrict b, int64_t k, int64_t count) {
    constexpr int64_t run = 32;
    if (k % run == 0) {
      for (int64_t i = 0; i < count; ++i) {
        total_[i] = k == 0 ? T(0) : total_[i] + recent_[i];
        recent_[i] = b == nullptr ? a[i] : a[i] * b[i];
      }
    } else {
      for (int64_t i = 0; i < count; ++i) recent_[i] += b == nullptr ? a[i] : a[i] * b[i];
    }
  }

  const T* finish(int64_t count) {
    for (int64_t i = 0; i < count; ++i) total_[i] += recent_[i];
    return total_;
  }

 private:
  alignas(64) T recent_[gaussian::chunk], total_[gaussian::chunk];
};

template <class T>
struct BackwardScratch {
  Scratch<T> in;
  SampleSum<T> z, z_eps, logq;
  alignas(64) T incoming[gaussian::chunk], kl[gaussian::chunk], product[gaussian::chunk];
  alignas(64) T mean[gaussian::chunk], raw[gaussian::chunk], prior_mean[gaussian::chunk], prior_raw[gaussian::chunk];
};

template <class T>
Incoming<T> fetch_gradients(const Backward& b, const Tile& tile, BackwardScratch<T>& s) {
  const Problem& p = b.problem;
  const int64_t first = tile.first, count = tile.count;
  Incoming<T> in{};
  if (b.grad_kl.data != nullptr) in.kl = fetch(b.grad_kl, first, count, s.kl);
  const bool need_eps = b.to_raw.data != nullptr;
  if (b.grad_z.data != nullptr && p.samples == 1) {
    in.z = fetch(b.grad_z, first, count, s.incoming);
    if (need_eps) {
      const T* const eps = noise_at(p, 0, first, count, s.in.drawn, s.in.eps);
      for (int64_t i = 0; i < count; ++i) s.product[i] = in.z[i] * eps[i];
      in.z_eps = s.product;
    }
  } else if (b.grad_z.data != nullptr) {
    for (int64_t k = 0; k < p.samples; ++k) {
      const T* const grad = fetch(b.grad_z, k * p.total + first, count, s.incoming);
      s.z.add(grad, nullptr, k, count);
      if (need_eps) s.z_eps.add(grad, noise_at(p, k, first, count, s.in.drawn, s.in.eps), k, count);
    }
    in.z = s.z.finish(count);
    if (need_eps) in.z_eps = s.z_eps.finish(count);
  }
  if (b.grad_logq.data != nullptr) {
    for (int64_t k = 0; k < p.samples; ++k)
      s.logq.add(fetch(b.grad_logq, k * p.total + first, count, s.incoming), nullptr, k, count);
    in.logq = s.logq.finish(count);
  }
  return in;
}

template <class T, class Gradients>
Outgoing<T> backward_tile(const Backward& b, const Tile& tile, BackwardScratch<T>& s, Gradients gradients) {
  const int64_t first = tile.first, count = tile.count;
  const Incoming<T> grad = fetch_gradients(b, tile, s);
  const Params<T> in = fetch_params(b.problem, tile, s.in);
  Result<T> mean(b.to_mean, first, count, s.mean), raw(b.to_raw, first, count, s.raw);
  Outgoing<T> out{mean.data, raw.data, s.prior_mean, s.prior_raw};
  if (b.prior.blocks > 0 || in.prior_mean == nullptr) {
    gradients(in, grad, count, out);
  } else {
    Result<T> prior_mean(b.to_prior_mean, first, count, s.prior_mean);
    Result<T> prior_raw(b.to_prior_raw, first, count, s.prior_raw);
    out.prior_mean = prior_mean.data;
    out.prior_raw = prior_raw.data;
    gradients(in, grad, count, out);
    prior_mean.commit(count);
    prior_raw.commit(count);
  }
  mean.commit(count);
  raw.commit(count);
  return out;
}

template <class T, class Gradients>
void backward(const Backward& b, int64_t begin, int64_t end, Gradients gradients) {
  BackwardScratch<T> s;
  for (int64_t index = begin; index < end; ++index) backward_tile(b, tile_at(b.problem.tiling, index), s, gradients);
}

template <class T>
void accumulate(double* __restrict total, const T* __restrict values, int64_t count, bool first) {
  for (int64_t i = 0; i < count; ++i) total[i] = (first ? 0. : total[i]) + static_cast<double>(values[i]);
}

template <class T, class Gradients>
void prior_blocks(const Backward& b, int64_t begin, int64_t end, Gradients gradients) {
  const Problem& p = b.problem;
  const int64_t samples = p.total / p.length, chunks = p.tiling.chunks;
  BackwardScratch<T> s;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t block = index / chunks, chunk = index - block * chunks, from = block * b.prior.block;
    const int64_t to = from + b.prior.block < samples ? from + b.prior.block : samples;
    const int64_t start = block * p.length + chunk * gaussian::chunk;
    for (int64_t sample = from; sample < to; ++sample) {
      const Tile tile = tile_at(p.tiling, sample * chunks + chunk);
      const Outgoing<T> out = backward_tile(b, tile, s, gradients);
      if (b.prior.mean != nullptr) accumulate(b.prior.mean + start, out.prior_mean, tile.count, sample == from);
      if (b.prior.raw != nullptr) accumulate(b.prior.raw + start, out.prior_raw, tile.count, sample == from);
    }
  }
}

template <class T>
void sum_blocks(const Backward& b, const double* partial, const Operand& to, int64_t start, int64_t count) {
  if (partial == nullptr) return;
  alignas(64) double total[gaussian::chunk] = {};
  alignas(64) T values[gaussian::chunk];
  for (int64_t block = 0; block < b.prior.blocks; ++block) {
    const double* const row = partial + block * b.problem.length + start;
    for (int64_t i = 0; i < count; ++i) total[i] += row[i];
  }
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<T>(total[i]);
  Cursor<T> cursor;
  cursor.seek(to, start);
  cursor.write(count, values);
}

template <class T>
void prior_sums(const Backward& b, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const int64_t start = index * gaussian::chunk, left = b.problem.length - start;
    const int64_t count = left < gaussian::chunk ? left : gaussian::chunk;
    sum_blocks<T>(b, b.prior.mean, b.to_prior_mean, start, count);
    sum_blocks<T>(b, b.prior.raw, b.to_prior_raw, start, count);
  }
}

// The loops of one scale, with or without a prior.
template <class T>
struct Loops {
  decltype(&posterior<0, false, T>) posterior;
  decltype(&gradients<0, false, T>) gradients;
};

template <class T, bool prior>
Loops<T> loops_of(int64_t scale) {
  static constexpr Loops<T> table[gaussian::scale_count] = {
      {posterior<0, prior, T>, gradients<0, prior, T>}, {posterior<1, prior, T>, gradients<1, prior, T>},
      {posterior<2, prior, T>, gradients<2, prior, T>}, {posterior<3, prior, T>, gradients<3, prior, T>},
      {posterior<4, prior, T>, gradients<4, prior, T>}};
  return table[scale];
}

template <class T>
Loops<T> loops_of(const Problem& p) {
  return p.prior_mean.data != nullptr ? loops_of<T, true>(p.scale) : loops_of<T, false>(p.scale);
}

}  // namespace

void gaussian_forward(const Forward& f, int64_t begin, int64_t end) {
  if (f.problem.wide)
    forward<double>(f, begin, end, loops_of<double>(f.problem).posterior);
  else
    forward<float>(f, begin, end, loops_of<float>(f.problem).posterior);
}

void gaussian_backward(const Backward& b, int64_t begin, int64_t end) {
  if (b.problem.wide)
    backward<double>(b, begin, end, loops_of<double>(b.problem).gradients);
  else
    backward<float>(b, begin, end, loops_of<float>(b.problem).gradients);
}

void gaussian_prior_blocks(const Backward& b, int64_t begin, int64_t end) {
  if (b.problem.wide)
    prior_blocks<double>(b, begin, end, loops_of<double>(b.problem).gradients);
  else
    prior_blocks<float>(b, begin, end, loops_of<float>(b.problem).gradients);
}

void gaussian_prior_sums(const Backward& b, int64_t begin, int64_t end) {
  if (b.problem.wide)
    prior_sums<double>(b, begin, end);
  else
    prior_sums<float>(b, begin, end);
}

}  // namespace fastflow::FASTFLOW_ISA
