// The operators of fastflow and the few tensor helpers that their host code shares. LibTorch stable ABI only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace fastflow {

using std::optional;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Dims = std::vector<int64_t>;

inline Dims sizes_of(const Tensor& t) { return Dims(t.sizes().begin(), t.sizes().end()); }
inline Dims strides_of(const Tensor& t) { return Dims(t.strides().begin(), t.strides().end()); }

inline Dims contiguous_strides(const Dims& sizes) {
  Dims strides(sizes.size());
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = step;
    step *= sizes[d] > 1 ? sizes[d] : 1;
  }
  return strides;
}

// Whether strides look like channels_last (4-D) or channels_last_3d (5-D): the test behind
// Tensor.suggest_memory_format, which asks nothing of density and prefers contiguous where both fit.
inline bool suggests_channels_last(const Dims& sizes, const Dims& strides) {
  const size_t rank = sizes.size();
  if ((rank != 4 && rank != 5) || strides[1] == 0) return false;
  int64_t least = 0;
  auto grows = [&](size_t d) {
    if (sizes[d] == 0 || strides[d] < least || (d == 0 && least == strides[1])) return false;
    least = strides[d] * (sizes[d] > 1 ? sizes[d] : 1);
    return true;
  };
  if (!grows(1)) return false;
  for (size_t d = rank - 1; d >= 2; --d)
    if (!grows(d)) return false;
  return grows(0);
}

inline Dims channels_last_strides(const Dims& sizes) {
  Dims strides(sizes.size());
  int64_t step = 1;
  auto place = [&](size_t d) {
    strides[d] = step;
    step *= sizes[d] > 1 ? sizes[d] : 1;
  };
  place(1);
  for (size_t d = sizes.size() - 1; d >= 2; --d) place(d);
  place(0);
  return strides;
}

// Dense strides for `sizes` in the memory format that `like` suggests.
inline Dims strides_like(const Dims& sizes, const Tensor& like) {
  return suggests_channels_last(sizes_of(like), strides_of(like)) ? channels_last_strides(sizes)
                                                                  : contiguous_strides(sizes);
}

// Uninitialised tensor on like's device.
inline Tensor empty_strided(const Dims& sizes, const Dims& strides, ScalarType dtype, const Tensor& like) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type, like.get_device_index(),
      &result));
  return Tensor(result);
}

inline Tensor empty(const Dims& sizes, ScalarType dtype, const Tensor& like) {
  return empty_strided(sizes, contiguous_strides(sizes), dtype, like);
}

// A result that was not asked for.
inline Tensor nothing(const Tensor& like) { return empty({0}, like.scalar_type(), like); }

inline ScalarType compute_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// dtype of y or z: like's, widened to float32 if any operand is float32.
template <class... Operands>
ScalarType result_type(const Tensor& like, const Operands&... operands) {
  ScalarType result = like.scalar_type();
  auto widen = [&](const optional<Tensor>& t) {
    if (t && t->scalar_type() == ScalarType::Float && result != ScalarType::Double) result = ScalarType::Float;
  };
  (widen(operands), ...);
  return result;
}

// Channels first, first + step, ... of a tensor (B, C, *S); count -1: all.
struct Channels {
  int64_t first = 0, step = 1, count = -1;
};

// Which channels of a whole tensor of affine_coupling are transformed and which pass. Of `channels`, the first `kept`
// pass, or the last -kept.
struct CouplingParts {
  Channels active, passive;

  CouplingParts(int64_t channels, int64_t kept) {
    const int64_t passing = kept < 0 ? -kept : kept, transformed = channels - passing;
    active = {kept > 0 ? kept : 0, 1, transformed};
    passive = {kept < 0 ? transformed : 0, 1, passing};
  }
};

std::tuple<Tensor, Tensor> affine_coupling_fwd(
    const Tensor& x, const Tensor& params, const optional<Tensor>& shift, const optional<Tensor>& logdet,
    const optional<Tensor>& passive, int64_t kept, int64_t flags, int64_t kind, double gain, double offset,
    double out_gain, double clamp, double eps, double hard_min, double hard_max, double shift_gain);

std::tuple<Tensor, Tensor, Tensor> affine_coupling_bwd(
    const optional<Tensor>& grad_y, const optional<Tensor>& grad_logdet, const Tensor& x, const Tensor& params,
    const optional<Tensor>& shift, int64_t kept, bool need_x, bool need_params, bool need_shift,
    int64_t flags, int64_t kind, double gain, double offset, double out_gain, double clamp, double eps,
    double hard_min, double hard_max, double shift_gain);

std::tuple<Tensor, Tensor, Tensor> conv_net_fwd(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2,
                                                const Tensor& b2, const Tensor& w3, const Tensor& b3, double slope,
                                                bool keep);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_net_bwd(
    const Tensor& grad, const Tensor& x, const Tensor& w1, const Tensor& w2, const Tensor& w3, const Tensor& h1,
    const Tensor& h2, double slope, bool need_x, bool need_weights);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> glow_step_fwd(
    const Tensor& x, const Tensor& matrix, const optional<Tensor>& offset, const Tensor& w1, const Tensor& b1,
    const Tensor& w2, const Tensor& b2, const Tensor& w3, const Tensor& b3, const optional<Tensor>& logdet,
    int64_t kept, bool keep, int64_t flags, int64_t kind, double gain, double scale_offset, double out_gain,
    double clamp, double eps, double hard_min, double hard_max, double shift_gain);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> glow_step_bwd(
    const optional<Tensor>& grad_y, const optional<Tensor>& grad_logdet, const Tensor& x, const Tensor& matrix,
    const Tensor& w1, const Tensor& w2, const Tensor& w3, const Tensor& mixed, const Tensor& params, const Tensor& h1,
    const Tensor& h2, int64_t kept, bool need_x, bool need_matrix, bool need_weights, int64_t flags, int64_t kind,
    double gain, double scale_offset, double out_gain, double clamp, double eps, double hard_min, double hard_max,
    double shift_gain);

std::tuple<Tensor, Tensor, Tensor> slogdet_fwd(const Tensor& weight, bool want_inverse);

Tensor plu_weight_fwd(const Tensor& lower, const Tensor& upper, const Tensor& log_s, const Tensor& sign_s,
                      const Tensor& perm);

std::tuple<Tensor, Tensor, Tensor> plu_weight_bwd(const Tensor& grad_weight, const Tensor& lower, const Tensor& upper,
                                                  const Tensor& log_s, const Tensor& sign_s, const Tensor& perm);

std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_fwd(
    const Tensor& params, const optional<Tensor>& raw, const optional<Tensor>& prior_mean,
    const optional<Tensor>& prior_raw, const optional<Tensor>& eps, const optional<Tensor>& seed, int64_t seed_value,
    int64_t offset, optional<int64_t> n_samples, int64_t scale, int64_t flags, int64_t reduce, bool want_logq,
    bool save_eps);

std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_bwd(
    const optional<Tensor>& grad_z, const optional<Tensor>& grad_kl, const optional<Tensor>& grad_logq,
    const Tensor& params, const optional<Tensor>& raw, const optional<Tensor>& prior_mean,
    const optional<Tensor>& prior_raw, const optional<Tensor>& eps, const optional<Tensor>& seed, int64_t seed_value,
    int64_t offset, optional<int64_t> n_samples, int64_t scale, int64_t flags, int64_t reduce, bool need_params,
    bool need_raw, bool need_prior_mean, bool need_prior_raw);

std::tuple<Tensor, Tensor, Tensor> latent_head_fwd(const Tensor& mean, const Tensor& logvar, const Tensor& state);

std::tuple<Tensor, Tensor> latent_head_bwd(const Tensor& grad_z, const Tensor& grad_kl, const Tensor& mean,
                                           const Tensor& logvar, const Tensor& eps);

std::tuple<Tensor, Tensor, Tensor> mlp_flow_fwd(const Tensor& x, const optional<Tensor>& context,
                                                std::vector<Tensor> params, std::vector<int64_t> steps,
                                                std::vector<double> constants, bool inverse, int64_t save);

std::tuple<Tensor, Tensor, std::vector<Tensor>> mlp_flow_bwd(
    const optional<Tensor>& grad_z, const optional<Tensor>& grad_logdet, const Tensor& z, const Tensor& saved,
    const optional<Tensor>& context, std::vector<Tensor> params, std::vector<int64_t> steps,
    std::vector<double> constants, bool inverse, bool need_x, bool need_context, bool need_params);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> top_down_fwd(
    const Tensor& h, std::vector<Tensor> features, std::vector<Tensor> eps, const optional<Tensor>& seed,
    int64_t seed_value, int64_t offset, std::vector<Tensor> params, std::vector<int64_t> levels, bool save);

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> top_down_bwd(
    const optional<Tensor>& grad_next, const optional<Tensor>& grad_z, const optional<Tensor>& grad_kl,
    const optional<Tensor>& grad_log_q, const optional<Tensor>& grad_log_p, const Tensor& h,
    std::vector<Tensor> features, const Tensor& saved, std::vector<Tensor> params, std::vector<int64_t> levels,
    bool need_h, bool need_features, bool need_params);

std::tuple<Tensor, Tensor> mlp_fwd(const Tensor& x, std::vector<Tensor> params, int64_t activation, bool residual,
                                   bool keep);

std::tuple<Tensor, std::vector<Tensor>> mlp_bwd(const Tensor& grad, const Tensor& x, const Tensor& kept,
                                                std::vector<Tensor> params, int64_t activation, bool residual,
                                                bool need_x, bool need_params);

std::tuple<Tensor, Tensor> spline_fwd(const Tensor& x, const Tensor& params, const optional<Tensor>& logdet,
                                      int64_t kind, bool inverse, double bound, double min_width, double min_height,
                                      double min_derivative, double gain, double clamp, double end_derivative);

std::tuple<Tensor, Tensor> spline_bwd(const optional<Tensor>& grad_y, const optional<Tensor>& grad_logdet,
                                      const Tensor& x, const Tensor& params, bool need_x, bool need_params,
                                      int64_t kind, bool inverse, double bound, double min_width, double min_height,
                                      double min_derivative, double gain, double clamp, double end_derivative);

Tensor activated_conv_fwd(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias, int64_t stride,
                          int64_t padding, bool transposed, int64_t activation, bool channels_last);

std::tuple<Tensor, Tensor, Tensor> activated_conv_bwd(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                      int64_t stride, int64_t padding, bool transposed,
                                                      int64_t activation, bool need_x, bool need_weights);

std::tuple<Tensor, std::vector<Tensor>> wide_mlp_fwd(const Tensor& x, std::vector<Tensor> weights,
                                                     std::vector<Tensor> biases, int64_t activation, bool keep);

std::tuple<Tensor, std::vector<Tensor>> wide_mlp_bwd(const Tensor& grad, std::vector<Tensor> grads_hidden,
                                                     const Tensor& x, std::vector<Tensor> weights,
                                                     std::vector<Tensor> kept, int64_t activation, bool need_x,
                                                     bool need_params);

Tensor bernoulli_log_prob_fwd(const Tensor& x, const Tensor& logits);

Tensor bernoulli_log_prob_bwd(const Tensor& grad, const Tensor& x, const Tensor& logits);

Tensor philox4x32(const Tensor& counter, const Tensor& key);

}  // namespace fastflow
