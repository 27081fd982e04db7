// Host side of affine_coupling on the CPU: operands, results, threads.
#include "affine_coupling_kernel.h"

#include "../fastflow.h"
#include "gradients.h"
#include "runtime.h"
#include "traversal.h"

#include <vector>

namespace fastflow {

namespace {

enum Flags : int64_t { interleave = 1, shift_comes_first = 2, shift_first = 4, inverse = 8 };

constexpr int64_t grain = 32768;  // elements that are worth a thread
constexpr int64_t streamed_bytes = int64_t(8) << 20;  // of a result that no cache is to hold

// Where the raw scale and the shift lie in packed parameters with `channels` channels each.
struct Halves {
  Channels raw, shift;

  Halves(int64_t flags, int64_t channels) {
    const bool alternate = flags & interleave;
    const Channels first{0, alternate ? 2 : 1, channels}, second{alternate ? 1 : channels, first.step, channels};
    raw = flags & shift_comes_first ? second : first;
    shift = flags & shift_comes_first ? first : second;
  }
};

AffineShape shape_of(const Tensor& x, const CouplingParts& parts, int64_t flags) {
  const auto sizes = x.sizes();
  int64_t space = 1;
  for (size_t d = 2; d < sizes.size(); ++d) space *= sizes[d];
  AffineShape shape{};
  shape.batch = sizes[0];
  shape.sample = parts.active.count * space;
  shape.passive = parts.passive.count * space;
  shape.is_double = x.scalar_type() == ScalarType::Double;
  shape.inverse = flags & inverse;
  shape.shift_first = flags & shift_first;
  return shape;
}

int64_t units_per_thread(const AffineShape& shape) {
  const int64_t work = (shape.sample + shape.passive) * shape.batch / shape.units();
  return work >= grain ? 1 : grain / (work > 0 ? work : 1);
}

}  // namespace

std::tuple<Tensor, Tensor> affine_coupling_fwd(
    const Tensor& x, const Tensor& params, const optional<Tensor>& shift, const optional<Tensor>& logdet,
    const optional<Tensor>& passive, int64_t kept, int64_t flags, int64_t kind, double gain, double offset,
    double out_gain, double clamp, double eps, double hard_min, double hard_max, double shift_gain) {
  const bool additive = kind == 6;
  Dims sizes = sizes_of(x);
  const CouplingParts from(sizes[1], kept);  // of x
  if (passive) sizes[1] += passive->size(1);
  const CouplingParts to(sizes[1], passive ? passive->size(1) : kept);  // of y
  Tensor y = result_like(sizes, x, result_type(x, optional(params), shift, passive));
  Tensor total = empty({sizes[0]}, compute_type(x.scalar_type()), x);

  AffineForward job{};
  job.shape = shape_of(x, to, flags);
  job.map = {kind, gain, offset, out_gain, clamp, eps, hard_min, hard_max, shift_gain};
  Operands operands(x);
  if (job.shape.sample > 0) {
    const Halves halves(flags, from.active.count);
    job.x = operands.of(x, from.active);
    job.y = operands.of(y, to.active);
    if (additive) {
      job.shift = operands.of(params);
    } else {
      job.raw = shift ? operands.of(params) : operands.of(params, halves.raw);
      job.shift = shift ? operands.of(*shift) : operands.of(params, halves.shift);
    }
  }
  if (job.shape.passive > 0) {
    job.passive = passive ? operands.of(*passive) : operands.of(x, from.passive);
    job.passive_y = operands.of(y, to.passive);
  }
  std::vector<double> partials(static_cast<size_t>(job.shape.partials()));
  job.partials = partials.data();
  job.logdet = operands.of(total);
  if (logdet) job.running = operands.of(*logdet);
  job.streamed = bytes_of(x) >= streamed_bytes;
  if (y.numel() > 0) {
    parallel_for(0, job.shape.units(), units_per_thread(job.shape),
                 [&](int64_t begin, int64_t end) { FASTFLOW_ISA_CALL(affine_forward, job, begin, end); });
  }
  if (job.shape.batch > 0) FASTFLOW_ISA_CALL(affine_logdet, job);
  return {y, total};
}

std::tuple<Tensor, Tensor, Tensor> affine_coupling_gradients(
    const optional<Tensor>& grad_y, const optional<Tensor>& grad_logdet, const Tensor& x, const Tensor& params,
    const optional<Tensor>& shift, int64_t kept, bool need_x, bool need_params, bool need_shift, bool passes,
    int64_t flags, int64_t kind, double gain, double offset, double out_gain, double clamp, double eps,
    double hard_min, double hard_max, double shift_gain) {
  const bool additive = kind == 6;
  const CouplingParts parts(x.size(1), kept);
  auto result = [&](bool needed, const Tensor& like) {
    return needed ? result_like(sizes_of(like), like, like.scalar_type()) : nothing(x);
  };
  Tensor grad_x = result(need_x, x);
  Tensor grad_params = result(need_params, params);
  Tensor grad_shift = result(need_shift && shift, shift ? *shift : params);

  AffineBackward job{};
  job.shape = shape_of(x, parts, flags);
  job.map = {kind, gain, offset, out_gain, clamp, eps, hard_min, hard_max, shift_gain};
  if (x.numel() == 0) return {grad_x, grad_params, grad_shift};
  job.streamed = bytes_of(x) >= streamed_bytes;
  Operands operands(x);
  // Where x keeps no channels of its own, those that grad_y has more than x belong to a tensor in front.
  const CouplingParts of_y = grad_y && kept == 0 ? CouplingParts(grad_y->size(1), grad_y->size(1) - x.size(1)) : parts;
  if (grad_logdet) job.grad_logdet = operands.of(*grad_logdet);
  if (need_x && passes && job.shape.passive > 0) {
    if (grad_y) job.passive_grad_y = operands.of(*grad_y, of_y.passive);
    job.passive_grad_x = operands.of(grad_x, parts.passive);
  }
  if (job.shape.sample > 0) {
    const Halves halves(flags, parts.active.count);
    if (grad_y) job.grad_y = operands.of(*grad_y, of_y.active);
    job.x = operands.of(x, parts.active);
    if (need_x) job.grad_x = operands.of(grad_x, parts.active);
    if (additive) {
      job.shift = operands.of(params);
      if (need_params) job.grad_shift = operands.of(grad_params);
    } else if (shift) {
      job.raw = operands.of(params);
      job.shift = operands.of(*shift);
      if (need_params) job.grad_raw = operands.of(grad_params);
      if (need_shift) job.grad_shift = operands.of(grad_shift);
    } else {
      job.raw = operands.of(params, halves.raw);
      job.shift = operands.of(params, halves.shift);
      if (need_params) job.grad_raw = operands.of(grad_params, halves.raw);
      if (need_params) job.grad_shift = operands.of(grad_params, halves.shift);
    }
  }
  parallel_for(0, job.shape.units(), units_per_thread(job.shape),
               [&](int64_t begin, int64_t end) { FASTFLOW_ISA_CALL(affine_backward, job, begin, end); });
  return {grad_x, grad_params, grad_shift};
}

std::tuple<Tensor, Tensor, Tensor> affine_coupling_bwd(
    const optional<Tensor>& grad_y, const optional<Tensor>& grad_logdet, const Tensor& x, const Tensor& params,
    const optional<Tensor>& shift, int64_t kept, bool need_x, bool need_params, bool need_shift,
    int64_t flags, int64_t kind, double gain, double offset, double out_gain, double clamp, double eps,
    double hard_min, double hard_max, double shift_gain) {
  return affine_coupling_gradients(grad_y, grad_logdet, x, params, shift, kept, need_x, need_params, need_shift, true,
                                   flags, kind, gain, offset, out_gain, clamp, eps, hard_min, hard_max, shift_gain);
}

}  // namespace fastflow
