// The Gaussian operators for one instruction set. A tile's operands are brought to contiguous arrays (where they are
// not that already), its noise is drawn into a small buffer, and plain loops over arrays do the rest.
#include "gaussian_kernel.h"

#include "cursor.h"
#include "gaussian_loops.h"
#include "gaussian_noise.h"
#include "stream.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

using gaussian::Backward;
using gaussian::Forward;
using gaussian::Tiling;

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

// Brings what the next tile will touch into the cache while this one computes, guessing that it lies as far from this
// one as this one does from the last. A wrong guess costs a little time and nothing else.
template <class T>
class Ahead {
 public:
  template <int write = 0>
  void fetch(const T* tile, int64_t count) {
    const uintptr_t now = reinterpret_cast<uintptr_t>(tile), next = now + (now - last_);
    last_ = now;
    if (next == now) return;
    for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(T)); i += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(next + static_cast<uintptr_t>(i)), write);
  }

 private:
  uintptr_t last_ = 0;
};

// Elements [at, at + count) of a result: written where they lie if they lie as contiguous T, else in buffer, from which
// `commit` moves them on, past the caches if `streamed`. The buffer also takes what an absent result would hold.
template <class T>
struct Result {
  Cursor<T> cursor;
  T *data, *buffer, *target;

  Result(const Operand& operand, int64_t at, int64_t count, T* where, bool streamed) : buffer(where), target(nullptr) {
    cursor.seek(operand, at);
    data = cursor.present() ? cursor.in_place(count) : nullptr;
    if (streamed && reinterpret_cast<uintptr_t>(data) % stream_alignment == 0) {
      target = data;
      data = nullptr;
    }
    if (data == nullptr) data = buffer;
  }

  void commit(int64_t count) {
    if (target != nullptr)
      stream(target, buffer, count);
    else if (data == buffer && cursor.present())
      cursor.write(count, buffer);
  }
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

template <class T>
void forward(const Forward& f, int64_t begin, int64_t end) {
  const Problem& p = f.problem;
  const Loops<T> loops = loops_of<T>(p);
  const bool keep = p.samples != 1 || f.logq != nullptr || !has_quick_loops<T>;
  Scratch<T> s;
  Ahead<T> mean_ahead, raw_ahead, z_ahead;
  alignas(64) T sigma[gaussian::chunk], log_sigma[gaussian::chunk], element[gaussian::chunk], out[gaussian::chunk];
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_at(p.tiling, index);
    const int64_t first = tile.first, count = tile.count;
    const Params<T> in = fetch_params(p, tile, s);
    mean_ahead.fetch(in.mean, count);
    raw_ahead.fetch(in.raw, count);
    T* const kl = f.elementwise == nullptr ? element : static_cast<T*>(f.elementwise) + first;
    if (keep) {
      loops.keep(in, nullptr, count, {nullptr, kl, sigma, log_sigma});
      if (f.kl != nullptr) sum_pieces(tile, kl, static_cast<T*>(f.kl));
    }
    for (int64_t k = 0; k < p.samples; ++k) {
      const int64_t at = k * p.total + first;
      const T* const eps = noise_at(p, k, first, count, s.drawn, s.eps);
      if (f.eps != nullptr) copy_run(eps, 1, static_cast<T*>(f.eps) + at, 1, count);
      Result<T> z(f.z, at, count, out, f.z_streamed);
      if (k == 0) z_ahead.template fetch<1>(z.data, count);
      if (keep)
        reparametrise(in.mean, sigma, eps, count, z.data);
      else
        loops.sample(in, eps, count, {z.data, kl, nullptr, nullptr});
      z.commit(count);
      if (f.logq != nullptr) {
        surprise(log_sigma, eps, count, element);
        sum_pieces(tile, element, static_cast<T*>(f.logq) + k * p.tiling.pieces);
      }
    }
    if (!keep && f.kl != nullptr) sum_pieces(tile, kl, static_cast<T*>(f.kl));
  }
  if (f.z_streamed) end_stream();
}

template <class T>
struct BackwardScratch {
  Ahead<T> mean_ahead, raw_ahead, z_ahead, eps_ahead, to_mean_ahead, to_raw_ahead;
  Scratch<T> in;
  SampleSum<T> z, z_eps, logq;
  alignas(64) T incoming[gaussian::chunk], by_logq[gaussian::chunk], kl[gaussian::chunk], product[gaussian::chunk];
  alignas(64) T mean[gaussian::chunk], raw[gaussian::chunk], prior_mean[gaussian::chunk], prior_raw[gaussian::chunk];
};

// Whether elements [at, at + count) are one value repeated, and which.
template <class T>
bool repeated(const Operand& operand, int64_t at, int64_t count, T& value) {
  Cursor<T> cursor;
  cursor.seek(operand, at);
  const int last = operand.rank - 1;
  if (last >= 0 && (operand.stride[last] != 0 || cursor.position + count > operand.size[last])) return false;
  value = *cursor.read(1, &value);
  return true;
}

template <class T>
Incoming<T> fetch_gradients(const Backward& b, const Tile& tile, BackwardScratch<T>& s) {
  const Problem& p = b.problem;
  const int64_t first = tile.first, count = tile.count;
  const bool need_eps = b.to_raw.data != nullptr, single = p.samples == 1 && b.grad_z.data != nullptr;
  Incoming<T> in{};
  if (single) in.z = fetch(b.grad_z, first, count, s.incoming);
  if (single && need_eps) in.eps = noise_at(p, 0, first, count, s.in.drawn, s.in.eps);
  in.plain = has_quick_loops<T> && in.eps != nullptr && b.grad_logq.data == nullptr && b.grad_kl.data != nullptr &&
             repeated(b.grad_kl, first, count, in.kl_each);
  if (in.plain) return in;
  if (in.eps != nullptr) {
    for (int64_t i = 0; i < count; ++i) s.product[i] = in.z[i] * in.eps[i];
    in.z_eps = s.product;
  }
  if (b.grad_kl.data != nullptr) in.kl = fetch(b.grad_kl, first, count, s.kl);
  if (b.grad_z.data != nullptr && !single) {
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
      s.logq.add(fetch(b.grad_logq, k * p.total + first, count, s.by_logq), nullptr, k, count);
    in.logq = s.logq.finish(count);
  }
  return in;
}

template <class T>
Outgoing<T> backward_tile(const Backward& b, const Tile& tile, BackwardScratch<T>& s, const Loops<T>& loops) {
  const int64_t first = tile.first, count = tile.count;
  const Incoming<T> grad = fetch_gradients(b, tile, s);
  const Params<T> in = fetch_params(b.problem, tile, s.in);
  s.mean_ahead.fetch(in.mean, count);
  s.raw_ahead.fetch(in.raw, count);
  s.z_ahead.fetch(grad.z, count);
  s.eps_ahead.fetch(grad.eps, count);
  const auto gradients = grad.plain ? loops.plain_gradients : loops.gradients;
  Result<T> mean(b.to_mean, first, count, s.mean, b.streamed), raw(b.to_raw, first, count, s.raw, b.streamed);
  s.to_mean_ahead.template fetch<1>(mean.data, count);
  s.to_raw_ahead.template fetch<1>(raw.data, count);
  Outgoing<T> out{mean.data, raw.data, s.prior_mean, s.prior_raw};
  if (b.prior.blocks > 0 || in.prior_mean == nullptr) {
    gradients(in, grad, count, out);
  } else {
    Result<T> prior_mean(b.to_prior_mean, first, count, s.prior_mean, b.streamed);
    Result<T> prior_raw(b.to_prior_raw, first, count, s.prior_raw, b.streamed);
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

template <class T>
void backward(const Backward& b, int64_t begin, int64_t end) {
  const Loops<T> loops = loops_of<T>(b.problem);
  BackwardScratch<T> s;
  for (int64_t index = begin; index < end; ++index) backward_tile(b, tile_at(b.problem.tiling, index), s, loops);
  if (b.streamed) end_stream();
}

template <class T>
void accumulate(double* __restrict total, const T* __restrict values, int64_t count, bool first) {
  for (int64_t i = 0; i < count; ++i) total[i] = (first ? 0. : total[i]) + static_cast<double>(values[i]);
}

template <class T>
void prior_blocks(const Backward& b, int64_t begin, int64_t end) {
  const Loops<T> loops = loops_of<T>(b.problem);
  const Problem& p = b.problem;
  const int64_t samples = p.total / p.length, chunks = p.tiling.chunks;
  BackwardScratch<T> s;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t block = index / chunks, chunk = index - block * chunks, from = block * b.prior.block;
    const int64_t to = from + b.prior.block < samples ? from + b.prior.block : samples;
    const int64_t start = block * p.length + chunk * gaussian::chunk;
    for (int64_t sample = from; sample < to; ++sample) {
      const Tile tile = tile_at(p.tiling, sample * chunks + chunk);
      const Outgoing<T> out = backward_tile(b, tile, s, loops);
      if (b.prior.mean != nullptr) accumulate(b.prior.mean + start, out.prior_mean, tile.count, sample == from);
      if (b.prior.raw != nullptr) accumulate(b.prior.raw + start, out.prior_raw, tile.count, sample == from);
    }
  }
  if (b.streamed) end_stream();
}

template <class T>
void sum_blocks(const Backward& b, const double* partial, const Operand& to, int64_t start, int64_t count) {
  if (to.data == nullptr) return;
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

}  // namespace

void gaussian_forward(const Forward& f, int64_t begin, int64_t end) {
  if (f.problem.wide)
    forward<double>(f, begin, end);
  else
    forward<float>(f, begin, end);
}

void gaussian_backward(const Backward& b, int64_t begin, int64_t end) {
  if (b.problem.wide)
    backward<double>(b, begin, end);
  else
    backward<float>(b, begin, end);
}

void gaussian_prior_blocks(const Backward& b, int64_t begin, int64_t end) {
  if (b.problem.wide)
    prior_blocks<double>(b, begin, end);
  else
    prior_blocks<float>(b, begin, end);
}

void gaussian_prior_sums(const Backward& b, int64_t begin, int64_t end) {
  if (b.problem.wide)
    prior_sums<double>(b, begin, end);
  else
    prior_sums<float>(b, begin, end);
}

}  // namespace fastflow::FASTFLOW_ISA
