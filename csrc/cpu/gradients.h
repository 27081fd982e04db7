// Backward passes that write into another operator's result. For host code.
#pragma once

#include "../fastflow.h"
#include "conv_image.h"

namespace fastflow {

// affine_coupling_bwd, but unless `passes` the gradient of x is left unwritten at the channels that pass.
std::tuple<Tensor, Tensor, Tensor> affine_coupling_gradients(
    const optional<Tensor>& grad_y, const optional<Tensor>& grad_logdet, const Tensor& x, const Tensor& params,
    const optional<Tensor>& shift, int64_t kept, bool need_x, bool need_params, bool need_shift, bool passes,
    int64_t flags, int64_t kind, double gain, double offset, double out_gain, double clamp, double eps,
    double hard_min, double hard_max, double shift_gain);

// The gradients of conv_net's weights and biases, each after the other; into `grad_x`, where there is one, that of x,
// to which `base` (of the same sizes), where there is one, is added.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_net_gradients(
    const Tensor& grad, const Tensor& x, const Tensor& w1, const Tensor& w2, const Tensor& w3, const Tensor& h1,
    const Tensor& h2, double slope, const Image& grad_x, const Image& base, bool need_weights);

}  // namespace fastflow
