// Host side of mlp_flow on the CPU: operands, results, threads.
#include "../mlp_flow_program.h"

#include <algorithm>
#include <cstring>

#include "mlp_flow_kernel.h"
#include "runtime.h"
#include "slogdet_scratch.h"

namespace fastflow {

namespace {

constexpr int64_t line = 16;  // elements that rows of partial sums are rounded up to
// Tiles of a unit: enough to spread the cost of its weights and partial sums, and yet units for some threads.
constexpr int64_t most_groups = 32, most_tiles = 4, enough_units = 4;
constexpr int64_t gradients_of_a_thread = 16;

int64_t rounded(int64_t n) { return (n + line - 1) / line * line; }

FlowParameter vector_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), 0}; }
FlowParameter matrix_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1)}; }

// The job and what it points to.
struct Work {
  std::vector<FlowLinear> linears;
  std::vector<FlowStep> steps;
  FlowJob job{};

  Work(const Program& program, const Tensor& x, const optional<Tensor>& context, bool inverse) {
    size_t count = 0;
    for (const ProgramStep& step : program.steps) count += step.linears.size();
    linears.reserve(count);
    for (const ProgramStep& step : program.steps) add(step);
    if (inverse) std::reverse(steps.begin(), steps.end());
    int64_t saved = 0;
    for (FlowStep& step : steps) {
      step.saved = saved;
      saved += step.active;
    }
    job.steps = steps.data();
    job.count = static_cast<int64_t>(steps.size());
    job.inverse = inverse;
    job.is_double = x.scalar_type() == ScalarType::Double;
    job.batch = program.batch;
    job.features = program.features;
    job.context_features = program.context_features;
    job.x = matrix_of(x);
    if (context) job.context = matrix_of(*context);
    // Units, and with them the order of every sum over samples, depend on the batch alone.
    const int64_t tiles = (job.batch + FlowJob::tile - 1) / FlowJob::tile;
    job.unit = FlowJob::tile * std::clamp<int64_t>(tiles / enough_units, 1, most_tiles);
    job.groups = std::min(job.units(), most_groups);
  }

  // The activations that are kept come first, so that they are aligned, then what the steps overwrite.
  void keep_in(void* saved, int64_t kept_rows) {
    const int64_t kept = kept_rows * job.batch * static_cast<int64_t>(job.is_double ? sizeof(double) : sizeof(float));
    job.kept = kept_rows > 0 ? saved : nullptr;
    job.kept_rows = kept_rows;
    job.saved = static_cast<char*>(saved) + kept;
  }

  // f(scratch, begin, end) over `count` pieces of work on torch's threads.
  template <class F>
  void run(int64_t count, bool backward, const F& f) const {
    const int64_t bytes = FASTFLOW_ISA_CALL(mlp_flow_scratch, job, backward);
    parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch = make_scratch(bytes);
      std::memset(scratch.get(), 0, static_cast<size_t>(bytes));
      f(scratch.get(), begin, end);
    });
  }

 private:
  int64_t kept = 0;  // rows of activations

  int64_t place(int64_t elements) {
    const int64_t at = job.partials;
    job.partials += rounded(elements);
    return at;
  }

  static const int64_t* order_of(const Tensor& t) {
    const int64_t* const order = static_cast<const int64_t*>(t.data_ptr());
    std::vector<bool> seen(static_cast<size_t>(t.numel()));
    for (size_t f = 0; f < seen.size(); ++f) {
      const bool inside = order[f] >= 0 && order[f] < t.numel();
      STD_TORCH_CHECK(inside && !seen[static_cast<size_t>(order[f])], "params: an order is no permutation");
      seen[static_cast<size_t>(order[f])] = true;
    }
    return order;
  }

  FlowLinear linear_of(const Tensor& weight, const Tensor& bias, int64_t in, int64_t out) {
    const bool vector = weight.dim() == 1;
    FlowLinear linear{vector ? vector_of(weight) : matrix_of(weight), vector_of(bias), in, out, -1};
    linear.grad_ld = rounded(in);
    linear.grad_weight = place(vector ? out : out * linear.grad_ld);
    linear.grad_bias = place(out);
    return linear;
  }

  void add(const ProgramStep& from) {
    FlowStep step{from.coupling, from.order ? order_of(*from.order) : nullptr};
    step.passive_begin = from.passive_begin;
    step.passive = from.passive;
    step.active_begin = from.active_begin;
    step.active = from.active;
    if (step.order != nullptr) {
      // neither linears nor anything that it overwrites for good
    } else if (!from.coupling) {
      step.channel = linear_of(*from.log_scale, *from.bias, 1, from.active);
    } else {
      const double* c = from.constants;
      step.map = {from.kind, c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]};
      step.activation = static_cast<Activation>(from.activation);
      step.interleaved = from.flags & Program::interleaved;
      step.shift_in_front = from.flags & Program::shift_in_front;
      step.shift_first = from.flags & Program::shift_first;
      step.linears = linears.data() + linears.size();
      step.count = static_cast<int64_t>(from.linears.size());
      int64_t outputs = 0, weights = 0;
      for (const ProgramLinear& l : from.linears) {
        linears.push_back(linear_of(*l.weight, *l.bias, l.in, l.out));
        if (l.kept) {
          linears.back().kept = kept;
          kept += l.out;
        }
        outputs += rounded(l.out);
        weights += l.in * l.out;
        job.widest = std::max(job.widest, l.out);
      }
      job.deepest = std::max(job.deepest, step.count);
      job.hidden = std::max(job.hidden, outputs);
      job.weights = std::max(job.weights, weights);
    }
    steps.push_back(step);
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> mlp_flow_fwd(const Tensor& x, const optional<Tensor>& context,
                                                std::vector<Tensor> params, std::vector<int64_t> steps,
                                                std::vector<double> constants, bool inverse, int64_t save) {
  const Program program(x, context, params, steps, constants);
  Work work(program, x, context, inverse);
  Tensor z = empty({program.batch, program.features}, x.scalar_type(), x);
  Tensor logdet = empty({program.batch}, x.scalar_type(), x);
  const int64_t kept_rows = save == Program::activations ? program.kept_rows : 0;
  Tensor saved = save != Program::nothing ? empty({kept_rows + program.saved_rows, program.batch}, x.scalar_type(), x)
                                          : nothing(x);
  work.job.z = z.mutable_data_ptr();
  work.job.logdet = logdet.mutable_data_ptr();
  if (save != Program::nothing) work.keep_in(saved.mutable_data_ptr(), kept_rows);
  work.run(work.job.units(), false, [&](void* scratch, int64_t begin, int64_t end) {
    FASTFLOW_ISA_CALL(mlp_flow_forward, work.job, scratch, begin, end);
  });
  return {z, logdet, saved};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> mlp_flow_bwd(
    const optional<Tensor>& grad_z, const optional<Tensor>& grad_logdet, const Tensor& z, const Tensor& saved,
    const optional<Tensor>& context, std::vector<Tensor> params, std::vector<int64_t> steps,
    std::vector<double> constants, bool inverse, bool need_x, bool need_context, bool need_params) {
  const Program program(z, context, params, steps, constants);
  Work work(program, z, context, inverse);
  FlowJob& job = work.job;
  const ScalarType dtype = z.scalar_type();
  Tensor grad_x = need_x ? empty(sizes_of(z), dtype, z) : nothing(z);
  Tensor grad_context = need_context && context ? empty(sizes_of(*context), dtype, z) : nothing(z);
  work.keep_in(saved.data_ptr(), saved.size(0) - program.saved_rows);
  job.z = need_x ? grad_x.mutable_data_ptr() : nullptr;
  job.grad_context = need_context && context ? grad_context.mutable_data_ptr() : nullptr;
  if (grad_z) job.grad_z = matrix_of(*grad_z);
  if (grad_logdet) job.grad_logdet = vector_of(*grad_logdet);
  const Tensor partial = empty({need_params ? job.groups * job.partials : 0}, dtype, z);
  job.partial = need_params ? partial.mutable_data_ptr() : nullptr;
  work.run(job.groups, true, [&](void* scratch, int64_t begin, int64_t end) {
    FASTFLOW_ISA_CALL(mlp_flow_backward, job, scratch, begin, end);
  });

  std::vector<Tensor> grads;
  if (!need_params) return {grad_x, grad_context, grads};
  std::vector<FlowGradient> gradients;
  auto gradient_of = [&](const Tensor& of, int64_t rows, int64_t columns, int64_t at, int64_t ld) {
    grads.push_back(empty(sizes_of(of), dtype, z));
    gradients.push_back({grads.back().mutable_data_ptr(), rows, columns, at, ld});
  };
  if (inverse) std::reverse(work.steps.begin(), work.steps.end());  // back in the order of the parameters
  for (size_t s = 0; s < program.steps.size(); ++s) {
    const ProgramStep& step = program.steps[s];
    if (step.order != nullptr) {
      grads.push_back(nothing(z));
      continue;
    }
    if (!step.coupling) {
      const FlowLinear& channel = work.steps[s].channel;
      gradient_of(*step.bias, 1, channel.out, channel.grad_bias, 0);
      gradient_of(*step.log_scale, 1, channel.out, channel.grad_weight, 0);
    }
    for (size_t l = 0; l < step.linears.size(); ++l) {
      const FlowLinear& linear = work.steps[s].linears[l];
      gradient_of(*step.linears[l].weight, linear.out, linear.in, linear.grad_weight, linear.grad_ld);
      gradient_of(*step.linears[l].bias, 1, linear.out, linear.grad_bias, 0);
    }
  }
  parallel_for(0, static_cast<int64_t>(gradients.size()), gradients_of_a_thread,
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) FASTFLOW_ISA_CALL(mlp_flow_reduce, job, gradients[i]);
               });
  return {grad_x, grad_context, grads};
}

}  // namespace fastflow
