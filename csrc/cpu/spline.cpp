// Host side of spline on the CPU: operands, results, threads.
#include "spline_kernel.h"

#include "../common/spline_map.h"
#include "slogdet_scratch.h"
#include "traversal.h"

namespace fastflow {

namespace {

constexpr int64_t grain = 2048;  // elements that are worth a thread
constexpr int64_t streamed_bytes = int64_t(8) << 20;  // of a gradient that no cache is to hold

// As it came, or contiguous where it has more dimensions than a kernel may have to take.
Tensor within_rank(const Tensor& t) {
  return t.dim() > Operand::max_rank ? torch::stable::contiguous(t) : t;
}

SplineShape shape_of(const Tensor& x, const Tensor& params, int64_t kind, bool inverse) {
  const auto sizes = x.sizes();
  int64_t space = 1;
  for (size_t d = 2; d < sizes.size(); ++d) space *= sizes[d];
  SplineShape shape{};
  shape.batch = sizes[0];
  shape.sample = sizes[1] * space;
  shape.params = sizes[1] > 0 ? params.size(1) / sizes[1] : 1;
  shape.linear = kind == spline::linear;
  shape.bins = shape.linear ? shape.params : (shape.params + 1) / 3;
  shape.is_double = x.scalar_type() == ScalarType::Double;
  shape.inverse = inverse;
  return shape;
}

template <class Job, class Kernel>
void run(const Job& job, const Kernel& kernel) {
  const SplineShape& shape = job.shape;
  const int64_t work = shape.sample * shape.batch / shape.units();
  parallel_for(0, shape.units(), work >= grain ? 1 : grain / (work > 0 ? work : 1), [&](int64_t begin, int64_t end) {
    const Scratch scratch = make_scratch(shape.scratch() + shape.tile_bytes());
    kernel(job, begin, end, scratch.get());
  });
}

}  // namespace

std::tuple<Tensor, Tensor> spline_fwd(const Tensor& x, const Tensor& params, const optional<Tensor>& logdet,
                                      int64_t kind, bool inverse, double bound, double min_width, double min_height,
                                      double min_derivative, double gain, double clamp, double end_derivative) {
  Tensor y = result_like(sizes_of(x), x, result_type(x, optional(params)));
  Tensor total = empty({x.size(0)}, compute_type(x.scalar_type()), x);
  const Tensor packed = within_rank(params);

  SplineForward job{};
  job.shape = shape_of(x, params, kind, inverse);
  job.bound = bound, job.min_width = min_width, job.min_height = min_height, job.min_derivative = min_derivative;
  job.gain = gain, job.clamp = clamp, job.end_derivative = end_derivative;
  std::vector<double> partials(static_cast<size_t>(job.shape.partials()));
  job.partials = partials.data();
  Operands operands(x);
  job.logdet = operands.of(total);
  if (logdet) job.running = operands.of(*logdet);
  if (y.numel() > 0) {
    job.x = operands.of(x);
    job.y = operands.of(y);
    job.params = operands.of(packed, {0, job.shape.params, x.size(1)});
    job.param_stride = packed.stride(1);
    run(job, [](const SplineForward& j, int64_t begin, int64_t end, void* scratch) {
      FASTFLOW_ISA_CALL(spline_forward, j, begin, end, scratch);
    });
  }
  if (job.shape.batch > 0) FASTFLOW_ISA_CALL(spline_logdet, job);
  return {y, total};
}

std::tuple<Tensor, Tensor> spline_bwd(const optional<Tensor>& grad_y, const optional<Tensor>& grad_logdet,
                                      const Tensor& x, const Tensor& params, bool need_x, bool need_params,
                                      int64_t kind, bool inverse, double bound, double min_width, double min_height,
                                      double min_derivative, double gain, double clamp, double end_derivative) {
  auto result = [&](bool needed, const Tensor& like) {
    return needed ? result_like(sizes_of(like), like, like.scalar_type()) : nothing(x);
  };
  Tensor grad_x = result(need_x, x), grad_params = result(need_params, params);
  if (x.numel() == 0) return {grad_x, grad_params};
  const Tensor packed = within_rank(params);

  SplineBackward job{};
  job.shape = shape_of(x, params, kind, inverse);
  job.bound = bound, job.min_width = min_width, job.min_height = min_height, job.min_derivative = min_derivative;
  job.gain = gain, job.clamp = clamp, job.end_derivative = end_derivative;
  Operands operands(x);
  const Channels first{0, job.shape.params, x.size(1)};
  job.x = operands.of(x);
  job.params = operands.of(packed, first);
  job.param_stride = packed.stride(1);
  if (grad_y) job.grad_y = operands.of(*grad_y);
  if (grad_logdet) job.grad_logdet = operands.of(*grad_logdet);
  if (need_x) job.grad_x = operands.of(grad_x);
  if (need_params) {
    job.grad_params = operands.of(grad_params, first);
    job.grad_param_stride = grad_params.stride(1);
    job.streamed = bytes_of(grad_params) >= streamed_bytes;
  }
  run(job, [](const SplineBackward& j, int64_t begin, int64_t end, void* scratch) {
    FASTFLOW_ISA_CALL(spline_backward, j, begin, end, scratch);
  });
  return {grad_x, grad_params};
}

}  // namespace fastflow
