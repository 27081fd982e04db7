// The operands of mlp_flow as a list of steps. For host code of every device.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "fastflow.h"

namespace fastflow {

struct ProgramLinear {
  const Tensor *weight, *bias;  // (out, in) and (out,)
  int64_t in, out;
  bool kept;  // whether forward may keep its activations
};

// Six integers to a step: 0 for a per-channel affine map, 1 for a coupling, 2 for a permutation; the number of linears;
// whether the second part is passive; the activation; the flags of affine_coupling; the kind of scale map. The constants
// of a coupling's map are eight numbers in the order of the operator affine_coupling_fwd. Parameters: bias and log_scale
// of a map, weight and bias of every linear, or a permutation's order, int64.
struct ProgramStep {
  bool coupling;
  std::vector<ProgramLinear> linears;
  const Tensor *bias, *log_scale;  // of a per-channel map
  bool flip;
  int64_t activation, flags, kind;
  const double* constants;
  int64_t passive_begin, passive, active_begin, active;
  size_t parameter;  // the first of its parameters
  const Tensor* order = nullptr;  // of a permutation
};

struct Program {
  static constexpr int64_t permutation = 2;
  enum Flags : int64_t { interleaved = 1, shift_in_front = 2, shift_first = 4 };
  static constexpr size_t integers = 6, numbers = 8;
  enum Saved : int64_t { nothing = 0, overwritten = 1, activations = 2 };  // the operator's argument `save`
  // Inputs from which on computing an activation again takes longer than reading it.
  static constexpr int64_t costly_inputs = 64, whole_lines = 16;

  std::vector<ProgramStep> steps;
  int64_t batch, features, context_features;
  int64_t saved_rows = 0;  // features that the steps overwrite
  int64_t kept_rows = 0;   // activations that forward may keep

  Program(const Tensor& x, const optional<Tensor>& context, const std::vector<Tensor>& params,
          const std::vector<int64_t>& code, const std::vector<double>& constants)
      : batch(x.size(0)), features(x.size(1)), context_features(context ? context->size(1) : 0) {
    for (const Tensor& t : params)
      STD_TORCH_CHECK((t.scalar_type() == x.scalar_type() || t.scalar_type() == ScalarType::Long) && t.is_cuda() == x.is_cuda() &&
                          t.get_device_index() == x.get_device_index(),
                      "params: expected the dtype and device of x");
    size_t parameter = 0, constant = 0;
    STD_TORCH_CHECK(code.size() % integers == 0, "steps: expected six integers to a step, got ", code.size());
    for (size_t at = 0; at < code.size(); at += integers) {
      ProgramStep step{code[at] == 1};
      step.parameter = parameter;
      if (code[at] == permutation) {
        STD_TORCH_CHECK(parameter < params.size(), "params: too few for the steps");
        step.order = &params[parameter++];
        STD_TORCH_CHECK(step.order->scalar_type() == ScalarType::Long && step.order->is_contiguous() &&
                            step.order->numel() == features,
                        "params: expected the order of ", features, " features, int64");
        step.active_begin = step.passive_begin = step.passive = step.active = 0;
        steps.push_back(std::move(step));
        continue;
      }
      const size_t count = static_cast<size_t>(step.coupling ? code[at + 1] : 1);
      STD_TORCH_CHECK(count > 0 && parameter + 2 * count <= params.size(), "params: too few for the steps");
      if (step.coupling) {
        const int64_t half = features / 2;
        const bool flip = step.flip = code[at + 2] != 0;
        step.activation = code[at + 3];
        step.flags = code[at + 4];
        step.kind = code[at + 5];
        step.passive_begin = flip ? half : 0;
        step.passive = flip ? features - half : half;
        step.active_begin = flip ? 0 : half;
        step.active = features - step.passive;
        STD_TORCH_CHECK(constant + numbers <= constants.size(), "constants: too few for the steps");
        step.constants = constants.data() + constant;
        constant += numbers;
        add_linears(step, params, count);
      } else {
        step.bias = &params[parameter];
        step.log_scale = &params[parameter + 1];
        step.active_begin = step.passive_begin = step.passive = 0;
        step.active = features;
        STD_TORCH_CHECK(step.bias->numel() == features && step.log_scale->numel() == features,
                        "params: expected bias and log_scale of ", features, " channels");
      }
      parameter += 2 * count;
      saved_rows += step.active;
      steps.push_back(std::move(step));
    }
    STD_TORCH_CHECK(parameter == params.size(), "params: more than the steps have");
  }

 private:
  void add_linears(ProgramStep& step, const std::vector<Tensor>& params, size_t count) {
    int64_t width = step.passive + context_features;
    for (size_t l = 0; l < count; ++l) {
      const Tensor &weight = params[step.parameter + 2 * l], &bias = params[step.parameter + 2 * l + 1];
      STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == width && bias.numel() == weight.size(0),
                      "params: a weight or bias does not fit the layer below it");
      const int64_t out = weight.size(0);
      constexpr int64_t silu = 1;  // whose slope is not to be had from its value
      const bool has_slopes = l + 1 < count && step.activation == silu;
      const bool kept = !has_slopes && width >= costly_inputs && out % whole_lines == 0;
      step.linears.push_back({&weight, &bias, width, out, kept});
      kept_rows += kept ? out : 0;
      width = out;
    }
    constexpr int64_t additive = 6;  // scale_map.h, Kind
    STD_TORCH_CHECK(width == (step.kind == additive ? 1 : 2) * step.active,
                    "params: the last layer of a coupling has ", width, " outputs for ", step.active, " features");
  }
};

}  // namespace fastflow
