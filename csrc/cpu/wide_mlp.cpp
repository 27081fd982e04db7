// A fully connected network on the CPU: matrix products that end in bias and ReLU, and at most one pass between two of
// them, where eager PyTorch takes one each for the bias, the activation, its slope and the bias's gradient.
#include "wide_mlp_kernel.h"

#include <algorithm>

#include "../fastflow.h"
#include "product.h"
#include "runtime.h"

namespace fastflow {

namespace {

constexpr int64_t grain = 16384;  // elements that are worth a thread

Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

// x W^T + b, activated, and silu's slopes where they are wanted.
Tensor layer(const Tensor& x, const Tensor& weight, const Tensor& bias, LayerActivation activation, Tensor* slopes) {
  const Tensor biases = torch::stable::contiguous(bias);
  Tensor out = product(x, transposed(weight), &biases, activation == LayerActivation::relu);
  if (activation != LayerActivation::silu) return out;
  if (slopes != nullptr) *slopes = empty({out.size(0), out.size(1)}, out.scalar_type(), out);
  const WideMlpSilu job{out.scalar_type() == ScalarType::Double, out.mutable_data_ptr(),
                        slopes != nullptr ? slopes->mutable_data_ptr() : nullptr};
  parallel_for(0, out.numel(), grain,
               [&](int64_t begin, int64_t end) { FASTFLOW_ISA_CALL(wide_mlp_silu, job, begin, end); });
  return out;
}

}  // namespace

std::tuple<Tensor, std::vector<Tensor>> wide_mlp_fwd(const Tensor& x, std::vector<Tensor> weights,
                                                     std::vector<Tensor> biases, int64_t activation, bool keep) {
  const auto kind = static_cast<LayerActivation>(activation);
  std::vector<Tensor> kept;
  Tensor h = x;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (i + 1 == weights.size()) return {layer(h, weights[i], biases[i], LayerActivation::none, nullptr), kept};
    Tensor slopes = x;
    const bool wanted = keep && kind == LayerActivation::silu;
    h = layer(h, weights[i], biases[i], kind, wanted ? &slopes : nullptr);
    if (keep) kept.push_back(h);
    if (wanted) kept.push_back(slopes);
  }
  return {h, kept};
}

std::tuple<Tensor, std::vector<Tensor>> wide_mlp_bwd(const Tensor& grad, std::vector<Tensor> grads_hidden,
                                                     const Tensor& x, std::vector<Tensor> weights,
                                                     std::vector<Tensor> kept, int64_t activation, bool need_x,
                                                     bool need_params) {
  const auto kind = static_cast<LayerActivation>(activation);
  const int64_t stride = kind == LayerActivation::silu ? 2 : 1, layers = static_cast<int64_t>(weights.size());
  std::vector<Tensor> grads(need_params ? 2 * weights.size() : 0, x);
  Tensor g = torch::stable::contiguous(grad), added = g;
  for (int64_t i = layers - 1; i >= 0; --i) {
    WideMlpBackward job{};
    job.rows = g.size(0);
    job.columns = g.size(1);
    job.is_double = g.scalar_type() == ScalarType::Double;
    job.activation = i == layers - 1 ? LayerActivation::none : kind;
    job.grad = g.data_ptr();
    if (i < layers - 1) {
      job.values = kept[i * stride].data_ptr();
      job.slopes = kind == LayerActivation::silu ? kept[i * stride + 1].data_ptr() : nullptr;
      if (!grads_hidden.empty()) {
        added = torch::stable::contiguous(grads_hidden[i]);
        job.added = added.data_ptr();
      }
    }
    Tensor sums = need_params ? empty({job.columns}, g.scalar_type(), g) : nothing(g);
    job.sums = need_params ? sums.mutable_data_ptr() : nullptr;
    if (need_params || job.activation != LayerActivation::none) {
      const int64_t block = std::max<int64_t>(1, job.rows * WideMlpBackward::block);
      parallel_for(0, job.blocks(), std::max<int64_t>(1, grain / block),
                   [&](int64_t begin, int64_t end) { FASTFLOW_ISA_CALL(wide_mlp_backward, job, begin, end); });
    }
    if (need_params) {
      grads[2 * i] = product(transposed(g), i == 0 ? x : kept[(i - 1) * stride]);
      grads[2 * i + 1] = sums;
    }
    if (i > 0 || need_x) g = product(g, weights[i]);
  }
  return {need_x ? g : nothing(x), grads};
}

}  // namespace fastflow
