// Host side of the Gaussian operators on the CPU: operands, results, threads.
#include "gaussian_kernel.h"

#include "../common/philox.h"
#include "../fastflow.h"
#include "operands.h"
#include "runtime.h"

#include <algorithm>

namespace fastflow {

namespace {

using gaussian::Problem;
using gaussian::Tiling;

enum Flags : int64_t { interleaved = 1, scale_in_front = 2 };
enum Reduce : int64_t { by_sample, by_channel, elementwise };

constexpr int64_t grain = 16384;  // elements that are worth a thread
constexpr int64_t streamed_bytes = int64_t(8) << 20;  // results of this size and above are written past the caches
// The sums of a shared prior's gradients: at most so many blocks, of at least so many samples of the batch.
constexpr int64_t prior_blocks = 64, prior_block_rows = 8;

int64_t product(const Dims& sizes, size_t from = 0) {
  int64_t result = 1;
  for (size_t d = from; d < sizes.size(); ++d) result *= sizes[d];
  return result;
}

// Operands of the kernels, each laid over the logical shape (batch, channels, *S), for samples with K in front.
class Operands {
 public:
  explicit Operands(Dims shape) : shape_(std::move(shape)) {}

  // A tensor whose sizes are the first ones of the shape; along the others, and where its own size is 1, it repeats.
  Operand of(const Tensor& t, const optional<int64_t>& n_samples = {}) {
    return over(t, 0, 1, shape_with(n_samples));
  }

  Operand of(const optional<Tensor>& t, const optional<int64_t>& n_samples = {}) {
    return t ? of(*t, n_samples) : Operand{};
  }

  // Every step-th channel of packed parameters, from the channel `first` on.
  Operand half(const Tensor& t, int64_t first, int64_t step) { return over(t, first, step, shape_); }

 private:
  Dims shape_with(const optional<int64_t>& n_samples) const {
    Dims shape;
    if (n_samples) shape.push_back(*n_samples);
    shape.insert(shape.end(), shape_.begin(), shape_.end());
    return shape;
  }

  Operand over(const Tensor& t, int64_t first, int64_t step, const Dims& shape) {
    Operand result;
    if (!describe(t, first, step, shape, result)) {
      kept_.push_back(torch::stable::contiguous(t));
      describe(kept_.back(), first, step, shape, result);
    }
    return result;
  }

  // False if the strides leave more dimensions than a kernel takes.
  static bool describe(const Tensor& t, int64_t first, int64_t step, const Dims& shape, Operand& out) {
    const Dims sizes = sizes_of(t), strides = strides_of(t);
    out = operand_at(t, first == 0 ? 0 : first * strides[1]);
    for (size_t d = 0; d < shape.size(); ++d) {
      const bool repeated = d >= sizes.size() || sizes[d] == 1;
      if (!append_dimension(out, shape[d], repeated ? 0 : strides[d] * (d == 1 ? step : 1))) return false;
    }
    return true;
  }

  Dims shape_;
  std::vector<Tensor> kept_;
};

Dims latent_shape(const Tensor& params, const optional<Tensor>& raw) {
  Dims shape = sizes_of(params);
  if (!raw) shape[1] /= 2;
  return shape;
}

Dims with_samples(const optional<int64_t>& n_samples, const Dims& shape) {
  Dims result;
  if (n_samples) result.push_back(*n_samples);
  result.insert(result.end(), shape.begin(), shape.end());
  return result;
}

// The mean and raw operands of packed or paired tensors: the parameters, or their gradients.
struct Halves {
  Operand mean, raw;

  Halves(Operands& operands, const Tensor& params, const optional<Tensor>& raw_or_none, int64_t channels,
         int64_t flags) {
    if (raw_or_none) {
      mean = operands.of(params);
      raw = operands.of(*raw_or_none);
    } else {
      const bool alternate = flags & interleaved, swapped = flags & scale_in_front;
      const int64_t second = alternate ? 1 : channels, step = alternate ? 2 : 1;
      mean = operands.half(params, swapped ? second : 0, step);
      raw = operands.half(params, swapped ? 0 : second, step);
    }
  }
};

Tiling tiling_of(int64_t rows, int64_t row, bool whole_samples) {
  Tiling tiling{row, rows, 1, 1, rows, rows};
  if (row <= gaussian::short_row && !whole_samples) {
    tiling.group = gaussian::grouped / row;
    tiling.tiles = (rows + tiling.group - 1) / tiling.group;
  } else {
    tiling.chunks = (row + gaussian::chunk - 1) / gaussian::chunk;
    tiling.tiles = tiling.pieces = rows * tiling.chunks;
  }
  return tiling;
}

int64_t tiles_per_thread(const Problem& p) {
  const int64_t work = p.total * p.samples / p.tiling.tiles;
  return work >= grain ? 1 : grain / std::max<int64_t>(work, 1);
}

// What forward and backward share; `seed_value` must outlive the result, and the tiling is the caller's.
Problem problem_of(Operands& operands, const Dims& shape, const Tensor& params, const optional<Tensor>& raw,
                   const optional<Tensor>& prior_mean, const optional<Tensor>& prior_raw, const optional<Tensor>& eps,
                   const optional<Tensor>& seed, const int64_t& seed_value, int64_t offset,
                   const optional<int64_t>& n_samples, int64_t scale, int64_t flags) {
  const Halves halves(operands, params, raw, shape[1], flags);
  Problem p{};
  p.wide = params.scalar_type() == ScalarType::Double;
  p.scale = scale;
  p.length = product(shape, 1);
  p.total = product(shape);
  p.samples = n_samples ? *n_samples : 1;
  p.mean = halves.mean;
  p.raw = halves.raw;
  p.prior_mean = operands.of(prior_mean);
  p.prior_raw = operands.of(prior_raw);
  p.noise.given = operands.of(eps, n_samples);
  p.noise.seeds = seed ? static_cast<const int64_t*>(seed->data_ptr()) : &seed_value;
  p.noise.seed_stride = seed && seed->dim() == 1 ? seed->stride(0) : 0;
  p.noise.offset = static_cast<uint64_t>(offset);
  return p;
}

// out[i] = factor * the sum of the i-th `each` of the partial sums.
template <class T>
void add_up(const T* partial, int64_t each, T factor, T* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    double total = 0.;
    for (int64_t j = 0; j < each; ++j) total += static_cast<double>(partial[i * each + j]);
    out[i] = factor * static_cast<T>(total);
  }
}

void add_up(const Tensor& partial, int64_t each, double factor, const Tensor& out) {
  if (out.scalar_type() == ScalarType::Double)
    add_up(static_cast<const double*>(partial.data_ptr()), each, factor, static_cast<double*>(out.data_ptr()),
           out.numel());
  else
    add_up(static_cast<const float*>(partial.data_ptr()), each, static_cast<float>(factor),
           static_cast<float*>(out.data_ptr()), out.numel());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_fwd(
    const Tensor& params, const optional<Tensor>& raw, const optional<Tensor>& prior_mean,
    const optional<Tensor>& prior_raw, const optional<Tensor>& eps, const optional<Tensor>& seed, int64_t seed_value,
    int64_t offset, optional<int64_t> n_samples, int64_t scale, int64_t flags, int64_t reduce, bool want_logq,
    bool save_eps) {
  const Dims shape = latent_shape(params, raw), z_shape = with_samples(n_samples, shape);
  const ScalarType dtype = compute_type(params.scalar_type());
  const auto kept = reduce == by_sample ? shape.begin() + 1 : reduce == by_channel ? shape.begin() + 2 : shape.end();
  const Dims kl_shape(shape.begin(), kept);
  Tensor z = empty(z_shape, result_type(params, raw, prior_mean, prior_raw, eps), params);
  Tensor kl = empty(kl_shape, dtype, params);
  Tensor logq = empty(want_logq ? with_samples(n_samples, {shape[0]}) : Dims{0}, dtype, params);
  Tensor drawn = empty(save_eps && !eps ? z_shape : Dims{0}, dtype, params);

  Operands operands(shape);
  gaussian::Forward f{};
  f.problem = problem_of(operands, shape, params, raw, prior_mean, prior_raw, eps, seed, seed_value, offset, n_samples,
                         scale, flags);
  Problem& p = f.problem;
  const bool by_element = reduce == elementwise || kl.numel() == p.total;
  const int64_t rows = reduce == by_channel && !by_element ? shape[0] * shape[1] : shape[0];
  Tensor kl_partial = kl, logq_partial = logq;
  if (p.total > 0) {
    p.tiling = tiling_of(rows, p.total / rows, false);
    f.z = operands.of(z, n_samples);
    f.z_streamed = bytes_of(z) >= streamed_bytes;
    f.eps = drawn.numel() > 0 ? drawn.data_ptr() : nullptr;
    if (by_element) {
      f.elementwise = kl.data_ptr();
    } else {
      if (p.tiling.pieces != kl.numel()) kl_partial = empty({p.tiling.pieces}, dtype, params);
      f.kl = kl_partial.data_ptr();
    }
    if (want_logq) {
      if (p.tiling.pieces != shape[0]) logq_partial = empty({p.samples, p.tiling.pieces}, dtype, params);
      f.logq = logq_partial.data_ptr();
    }
    parallel_for(0, p.tiling.tiles, tiles_per_thread(p),
                 [&](int64_t begin, int64_t end) { FASTFLOW_ISA_CALL(gaussian_forward, f, begin, end); });
  }
  if (!by_element && kl.numel() > 0) add_up(kl_partial, p.tiling.pieces / kl.numel(), 1., kl);
  if (want_logq && logq.numel() > 0) add_up(logq_partial, p.tiling.pieces / shape[0], -1., logq);
  return {z, kl, logq, drawn};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_bwd(
    const optional<Tensor>& grad_z, const optional<Tensor>& grad_kl, const optional<Tensor>& grad_logq,
    const Tensor& params, const optional<Tensor>& raw, const optional<Tensor>& prior_mean,
    const optional<Tensor>& prior_raw, const optional<Tensor>& eps, const optional<Tensor>& seed, int64_t seed_value,
    int64_t offset, optional<int64_t> n_samples, int64_t scale, int64_t flags, int64_t reduce, bool need_params,
    bool need_raw, bool need_prior_mean, bool need_prior_raw) {
  const Dims shape = latent_shape(params, raw);
  auto result = [&](const optional<Tensor>& like, bool needed) {
    if (!needed) return nothing(params);
    const Dims sizes = sizes_of(*like);
    return empty_strided(sizes, strides_like(sizes, *like), like->scalar_type(), *like);
  };
  Tensor to_params = result(params, need_params), to_raw = result(raw, need_raw);
  Tensor to_prior_mean = result(prior_mean, need_prior_mean), to_prior_raw = result(prior_raw, need_prior_raw);

  Operands operands(shape);
  gaussian::Backward b{};
  b.problem = problem_of(operands, shape, params, raw, prior_mean, prior_raw, eps, seed, seed_value, offset, n_samples,
                         scale, flags);
  Problem& p = b.problem;
  b.grad_z = operands.of(grad_z, n_samples);
  b.grad_kl = operands.of(grad_kl);
  if (grad_logq) b.grad_logq = operands.of(*grad_logq, n_samples);
  if (raw) {
    if (need_params) b.to_mean = operands.of(to_params);
    if (need_raw) b.to_raw = operands.of(to_raw);
  } else if (need_params) {
    const Halves halves(operands, to_params, {}, shape[1], flags);
    b.to_mean = halves.mean;
    b.to_raw = halves.raw;
  }
  b.streamed = bytes_of(params) >= streamed_bytes;
  const bool shared = (need_prior_mean || need_prior_raw) && prior_mean->size(0) != shape[0];
  Operands prior_operands(shared ? sizes_of(*prior_mean) : shape);
  if (need_prior_mean) b.to_prior_mean = prior_operands.of(to_prior_mean);
  if (need_prior_raw) b.to_prior_raw = prior_operands.of(to_prior_raw);

  if (!shared) {
    if (p.total == 0) return {to_params, to_raw, to_prior_mean, to_prior_raw};
    p.tiling = tiling_of(shape[0], p.length, false);
    parallel_for(0, p.tiling.tiles, tiles_per_thread(p),
                 [&](int64_t begin, int64_t end) { FASTFLOW_ISA_CALL(gaussian_backward, b, begin, end); });
    return {to_params, to_raw, to_prior_mean, to_prior_raw};
  }

  if (p.length == 0) return {to_params, to_raw, to_prior_mean, to_prior_raw};
  p.tiling = tiling_of(shape[0], p.length, true);
  b.prior.block = std::max(prior_block_rows, (shape[0] + prior_blocks - 1) / prior_blocks);
  b.prior.blocks = (shape[0] + b.prior.block - 1) / b.prior.block;
  const Dims partial{b.prior.blocks, p.length};
  Tensor mean_partial = empty(need_prior_mean ? partial : Dims{0}, ScalarType::Double, params);
  Tensor raw_partial = empty(need_prior_raw ? partial : Dims{0}, ScalarType::Double, params);
  if (need_prior_mean) b.prior.mean = static_cast<double*>(mean_partial.data_ptr());
  if (need_prior_raw) b.prior.raw = static_cast<double*>(raw_partial.data_ptr());
  const int64_t tasks = b.prior.blocks * p.tiling.chunks;
  const int64_t work = std::max<int64_t>(p.total * p.samples, 1);
  parallel_for(0, tasks, std::max<int64_t>(1, grain * tasks / work),
               [&](int64_t begin, int64_t end) { FASTFLOW_ISA_CALL(gaussian_prior_blocks, b, begin, end); });
  parallel_for(0, p.tiling.chunks, std::max<int64_t>(1, grain / gaussian::chunk / std::max<int64_t>(b.prior.blocks, 1)),
               [&](int64_t begin, int64_t end) { FASTFLOW_ISA_CALL(gaussian_prior_sums, b, begin, end); });
  return {to_params, to_raw, to_prior_mean, to_prior_raw};
}

Tensor philox4x32(const Tensor& counter, const Tensor& key) {
  const int64_t count = counter.size(0);
  Tensor words = empty({count, 4}, ScalarType::Long, counter);
  const int64_t* const c = static_cast<const int64_t*>(counter.data_ptr());
  const int64_t* const k = static_cast<const int64_t*>(key.data_ptr());
  const int64_t row = counter.stride(0), step = counter.stride(1), key_row = key.stride(0), key_step = key.stride(1);
  int64_t* const out = static_cast<int64_t*>(words.data_ptr());
  parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      auto word = [&](int64_t j) { return static_cast<uint64_t>(c[i * row + j * step]); };
      auto key_word = [&](int64_t j) { return static_cast<uint32_t>(k[i * key_row + j * key_step]); };
      const philox::Words<uint64_t> block{word(0), word(1), word(2), word(3)};
      const auto w = philox::generate(block, key_word(0), key_word(1));
      const uint64_t found[4] = {w.w0, w.w1, w.w2, w.w3};
      for (int64_t j = 0; j < 4; ++j) out[4 * i + j] = static_cast<int64_t>(found[j] & 0xffffffffu);
    }
  });
  return words;
}

}  // namespace fastflow
