// Host side of top_down on the CPU: operands, results, threads.
#include "top_down_kernel.h"

#include "../fastflow.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>

#include "runtime.h"
#include "slogdet_scratch.h"

namespace fastflow {

namespace {

constexpr int64_t line = 16;  // elements that rows of partial sums, and rows of a network's values, are rounded up to
constexpr int64_t thin = 4;   // mlp_flow_net.h, thin_in and thin_out
constexpr int64_t most_groups = 32;
constexpr int64_t gradients_of_a_thread = 16;

int64_t rounded(int64_t n) { return (n + line - 1) / line * line; }

FlowParameter vector_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), 0}; }
FlowParameter matrix_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1)}; }

// The job and what it points to. Integers of a level: mode and scale, then of prior, posterior and merge the number of
// linears, the activation, and whether it is residual. Parameters: weight and bias of every linear.
struct Work {
  static constexpr size_t integers = 11;

  std::vector<FlowLinear> linears;
  std::vector<TopDownLevel> levels;
  TopDownJob job{};
  int64_t latents = 0;  // of all levels together, of one sample

  // save: whether every level has a block of its own.
  Work(const Tensor& h, const std::vector<Tensor>& features, const std::vector<Tensor>& params,
       const std::vector<int64_t>& code, bool save)
      : params_(params) {
    STD_TORCH_CHECK(code.size() == integers * features.size() && !code.empty(),
                    "levels: expected ", integers, " integers to each of the features");
    job.is_double = h.scalar_type() == ScalarType::Double;
    job.batch = h.size(0);
    job.h = matrix_of(h);
    linears.reserve(params.size() / 2);
    for (const Tensor& t : params)
      STD_TORCH_CHECK(t.scalar_type() == h.scalar_type(), "params: expected the dtype of h");
    int64_t state = h.size(1), largest = 0, begin = 0;
    for (size_t l = 0; l < features.size(); ++l) {
      const Tensor& d = features[l];
      STD_TORCH_CHECK(d.dim() == 2 && d.size(0) == job.batch && d.scalar_type() == h.scalar_type(),
                      "features: expected (B, F) of h's dtype");
      rows_ = 0;
      add(code.data() + l * integers, d, state);
      state = levels.back().merge.linears[levels.back().merge.count - 1].out;
      levels.back().block = begin;
      begin += rows_;
      largest = std::max(largest, rows_);
    }
    STD_TORCH_CHECK(parameter_ == params.size(), "params: more than the levels have");
    if (!save)
      for (size_t l = 0; l < levels.size(); ++l) levels[l].block = static_cast<int64_t>(l % 2) * largest;
    job.last = save ? begin : 2 * largest;
    job.out = state;
    job.rows = job.last + rounded(state);
    job.seen = std::max(job.seen, rounded(state));
    job.levels = levels.data();
    job.linears = linears.data();
    job.count = static_cast<int64_t>(levels.size());
    job.groups = std::min(job.tiles(), most_groups);  // of the batch alone, and with it the order of every sum
  }

  // f(scratch, begin, end) over `count` pieces of work on torch's threads.
  template <class F>
  void run(int64_t count, bool backward, const F& f) const {
    const int64_t bytes = FASTFLOW_ISA_CALL(top_down_scratch, job, backward);
    parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch = make_scratch(bytes);
      std::memset(scratch.get(), 0, static_cast<size_t>(bytes));
      f(scratch.get(), begin, end);
    });
  }

 private:
  const std::vector<Tensor>& params_;
  size_t parameter_ = 0;
  int64_t rows_ = 0;  // of the level's block so far

  int64_t place(int64_t elements) {
    const int64_t at = job.partials;
    job.partials += rounded(elements);
    return at;
  }

  int64_t take(int64_t rows) {
    const int64_t at = rows_;
    rows_ += rounded(rows);
    return at;
  }

  // A network of `in` inputs; `stored` tells whether its outputs lie in the block too.
  LevelNetwork network(const int64_t* code, int64_t in, bool stored) {
    const int64_t count = code[0];
    STD_TORCH_CHECK(count > 0 && parameter_ + 2 * static_cast<size_t>(count) <= params_.size(),
                    "params: too few for the levels");
    LevelNetwork net{linears.data() + linears.size(), count, static_cast<Activation>(code[1]), code[2] != 0, 0, 0};
    int64_t rows = 0, width = in;
    for (int64_t l = 0; l < count; ++l, parameter_ += 2) {
      const Tensor &weight = params_[parameter_], &bias = params_[parameter_ + 1];
      STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == width && bias.numel() == weight.size(0),
                      "params: a weight or bias does not fit the layer below it");
      FlowLinear linear{matrix_of(weight), vector_of(bias), width, weight.size(0), -1};
      linear.grad_ld = rounded(width);
      linear.grad_weight = place(linear.out * linear.grad_ld);
      linear.grad_bias = place(linear.out);
      linears.push_back(linear);
      const bool is_thin = width <= thin || linear.out <= thin;
      job.largest = std::max(job.largest, rounded(linear.out) + (is_thin ? linear.out * linear.grad_ld : 0));
      job.widest = std::max(job.widest, linear.out);
      job.seen = std::max(job.seen, width);
      if (is_thin) job.lane_sums = std::max(job.lane_sums, width * linear.out);
      width = linear.out;
      rows += l + 1 < count || stored ? rounded(width) : 0;
    }
    STD_TORCH_CHECK(!net.residual || width <= in, "levels: a residual network has more outputs than inputs");
    net.values = take(rows);
    net.slopes = take(rows);
    return net;
  }

  static int64_t outputs_of(const LevelNetwork& net) { return net.linears[net.count - 1].out; }

  void add(const int64_t* code, const Tensor& d, int64_t state) {
    TopDownLevel level{};
    STD_TORCH_CHECK(code[0] >= 0 && code[0] < static_cast<int64_t>(LevelMode::count), "levels: no such mode");
    level.mode = static_cast<LevelMode>(code[0]);
    level.scale = code[1];
    level.state = state;
    level.features = d.size(1);
    level.d = matrix_of(d);
    take(state + level.features + line);  // a weight's gradient reads whole lines of the features alone
    level.prior = network(code + 2, state, true);
    level.posterior = network(code + 5, level.mode == LevelMode::ladder ? level.features : state + level.features, true);
    level.latents = outputs_of(level.prior) / 2;
    STD_TORCH_CHECK(outputs_of(level.prior) == 2 * level.latents && outputs_of(level.posterior) == 2 * level.latents,
                    "params: prior and posterior of a level do not fit");
    level.joined = take(state + level.latents);
    level.noise = take(level.latents);
    level.merge = network(code + 8, state + level.latents, false);
    level.z = latents * job.batch;
    latents += level.latents;
    job.latents = std::max(job.latents, level.latents);
    job.seen = std::max(job.seen, state + std::max(level.features + line, level.latents));
    levels.push_back(level);
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> top_down_fwd(
    const Tensor& h, std::vector<Tensor> features, std::vector<Tensor> eps, const optional<Tensor>& seed,
    int64_t seed_value, int64_t offset, std::vector<Tensor> params, std::vector<int64_t> code, bool save) {
  Work work(h, features, params, code, save);
  TopDownJob& job = work.job;
  STD_TORCH_CHECK(eps.empty() || eps.size() == features.size(), "eps: expected one for each level");
  job.seed = static_cast<uint64_t>(seed ? *static_cast<const int64_t*>(seed->data_ptr()) : seed_value);
  for (size_t l = 0; l < work.levels.size(); ++l) {
    TopDownLevel& level = work.levels[l];
    if (!eps.empty()) {
      STD_TORCH_CHECK(eps[l].dim() == 2 && eps[l].size(0) == job.batch && eps[l].size(1) == level.latents &&
                          eps[l].scalar_type() == h.scalar_type(),
                      "eps: expected (B, D) of h's dtype");
      level.eps = matrix_of(eps[l]);
    }
    level.offset = static_cast<uint64_t>(offset);
    offset += (job.batch * level.latents + 3) / 4;  // four normals come of one counter
  }
  const ScalarType dtype = h.scalar_type();
  Tensor next = empty({job.batch, job.out}, dtype, h);
  Tensor z = empty({job.batch * work.latents}, dtype, h);
  Tensor kl = empty({job.count, job.batch}, dtype, h), log_q = empty({job.count, job.batch}, dtype, h),
         log_p = empty({job.count, job.batch}, dtype, h);
  Tensor saved = save ? empty({job.tiles() * job.rows * TopDownJob::tile}, dtype, h) : nothing(h);
  job.next = next.mutable_data_ptr();
  job.z = z.mutable_data_ptr();
  job.kl = kl.mutable_data_ptr();
  job.log_q = log_q.mutable_data_ptr();
  job.log_p = log_p.mutable_data_ptr();
  if (save) job.saved = saved.mutable_data_ptr();
  work.run(job.tiles(), false, [&](void* scratch, int64_t begin, int64_t end) {
    FASTFLOW_ISA_CALL(top_down_forward, job, scratch, begin, end);
  });
  return {next, z, kl, log_q, log_p, saved};
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> top_down_bwd(
    const optional<Tensor>& grad_next, const optional<Tensor>& grad_z, const optional<Tensor>& grad_kl,
    const optional<Tensor>& grad_log_q, const optional<Tensor>& grad_log_p, const Tensor& h,
    std::vector<Tensor> features, const Tensor& saved, std::vector<Tensor> params, std::vector<int64_t> code,
    bool need_h, bool need_features, bool need_params) {
  Work work(h, features, params, code, true);
  TopDownJob& job = work.job;
  const ScalarType dtype = h.scalar_type();
  STD_TORCH_CHECK(saved.numel() == job.tiles() * job.rows * TopDownJob::tile, "saved: not of these operands");
  job.saved = saved.data_ptr();
  if (grad_next) job.grad_next = matrix_of(*grad_next);
  optional<Tensor> whole;
  if (grad_z) whole = torch::stable::contiguous(*grad_z);
  job.grad_z = whole ? whole->data_ptr() : nullptr;
  if (grad_kl) job.grad_kl = matrix_of(*grad_kl);
  if (grad_log_q) job.grad_log_q = matrix_of(*grad_log_q);
  if (grad_log_p) job.grad_log_p = matrix_of(*grad_log_p);
  Tensor grad_h = need_h ? empty(sizes_of(h), dtype, h) : nothing(h);
  job.grad_h = need_h ? grad_h.mutable_data_ptr() : nullptr;
  std::vector<Tensor> grad_features, grads;
  for (size_t l = 0; need_features && l < features.size(); ++l) {
    grad_features.push_back(empty(sizes_of(features[l]), dtype, h));
    work.levels[l].grad_d = grad_features.back().mutable_data_ptr();
  }
  std::vector<void*> pointers;
  for (size_t p = 0; need_params && p < params.size(); ++p) {
    grads.push_back(empty(sizes_of(params[p]), dtype, h));
    pointers.push_back(grads.back().mutable_data_ptr());
  }
  if (need_params) job.gradients = pointers.data();
  const bool summed = need_params && !job.at_once();
  const Tensor partial = empty({summed ? job.groups * job.partials : 0}, dtype, h);
  job.partial = summed ? partial.mutable_data_ptr() : nullptr;
  // With no sample at all the gradients are zero, which the sums below write.
  work.run(job.groups, true, [&](void* scratch, int64_t begin, int64_t end) {
    FASTFLOW_ISA_CALL(top_down_backward, job, scratch, begin, end);
  });
  if (!summed) return {grad_h, grad_features, grads};
  std::vector<FlowGradient> gradients;
  for (size_t l = 0; l < work.linears.size(); ++l) {
    const FlowLinear& linear = work.linears[l];
    gradients.push_back({pointers[2 * l], linear.out, linear.in, linear.grad_weight, linear.grad_ld});
    gradients.push_back({pointers[2 * l + 1], 1, linear.out, linear.grad_bias, 0});
  }
  parallel_for(0, static_cast<int64_t>(gradients.size()), gradients_of_a_thread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) FASTFLOW_ISA_CALL(mlp_flow_reduce, job, gradients[i]);
  });
  return {grad_h, grad_features, grads};
}

}  // namespace fastflow
