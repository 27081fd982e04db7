// What the host code and the per-instruction-set code of mlp_flow agree on.
#pragma once

#include "affine_coupling_kernel.h"
#include "each_isa.h"

namespace fastflow {

// A vector or matrix of parameters, strides in elements.
struct FlowParameter {
  const void* data;
  int64_t row, column;
};

// One fully connected layer. Its gradients are summed up in a buffer of partial sums: that of the weight (out, in) at
// grad_weight, in rows of grad_ld elements, that of the bias at grad_bias.
struct FlowLinear {
  FlowParameter weight, bias;
  int64_t in, out;
  int64_t kept;  // the row of FlowJob::kept where its activations begin, or -1
  int64_t grad_weight, grad_bias, grad_ld;
};

enum class Activation : int { relu, silu, tanh };

// A per-channel affine map (no linears; weight = log_scale, bias = bias of `channel`), a coupling, or a permutation:
// feature f of its result is feature order[f] of what comes in.
struct FlowStep {
  bool coupling;
  const int64_t* order;
  FlowLinear channel;
  const FlowLinear* linears;
  int64_t count;
  Activation activation;
  bool interleaved, shift_in_front, shift_first;
  AffineMap map;
  int64_t passive_begin, passive, active_begin, active;  // what the step leaves alone, and what it overwrites
  int64_t saved;  // the row of FlowJob::saved where what it overwrites begins
};

// Where gradients of parameters are summed up over samples: `groups` buffers of `partials` elements each. A group is a
// fixed run of samples, so that no sum depends on the number of threads.
struct PartialSums {
  void* partial;  // null: no gradients of parameters
  int64_t partials, groups;
  bool is_double;
};

struct FlowJob : PartialSums {
  static constexpr int64_t tile = 64;  // samples that go through a network at once
  int64_t unit;                        // samples that go through a step together, so that its weights stay near

  const FlowStep* steps;  // in the order of execution
  int64_t count;
  bool inverse;
  int64_t batch, features, context_features;
  int64_t deepest;  // the most linears of a step
  int64_t widest;   // the most outputs of a linear
  int64_t hidden;   // the most outputs that a step's linears have together, each rounded up to 16
  int64_t weights;  // the most elements that a step's weights have together
  FlowParameter x, context;  // (batch, features), (batch, context_features)
  void *z, *logdet, *saved;  // contiguous; saved (rows, batch) may be null
  void* kept;                // activations, or null: of each tile kept_rows rows, as long as it has samples
  int64_t kept_rows;

  // Backward. x is the result of forward then, z the gradient of x, or null.
  FlowParameter grad_z, grad_logdet;  // data may be null
  void* grad_context;                 // or null

  int64_t units() const { return (batch + unit - 1) / unit; }
};

// The gradient of one parameter: rows of `columns` elements, in the partial sums in rows of ld.
struct FlowGradient {
  void* to;
  int64_t rows, columns, at, ld;
};

FASTFLOW_EACH_ISA(int64_t mlp_flow_scratch(const FlowJob& job, bool backward);
                  void mlp_flow_forward(const FlowJob& job, void* scratch, int64_t begin, int64_t end);
                  void mlp_flow_backward(const FlowJob& job, void* scratch, int64_t begin, int64_t end);
                  void mlp_flow_reduce(const PartialSums& sums, const FlowGradient& gradient);)

}  // namespace fastflow
