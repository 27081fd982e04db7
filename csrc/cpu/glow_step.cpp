// Host side of Glow's step on the CPU: the 1x1 convolution, the network and the coupling in one call.
#include "../fastflow.h"
#include "channel_mix_kernel.h"
#include "gradients.h"
#include "operands.h"
#include "runtime.h"
#include "slogdet_scratch.h"

#include <algorithm>

namespace fastflow {

namespace {

constexpr int64_t grain = 32768;  // elements that are worth a thread

MixShape shape_of(const Tensor& x) {
  return {x.size(0), x.size(1), x.size(2), x.size(3), x.scalar_type() == ScalarType::Double};
}

Tensor channels_last_like(const Tensor& x) {
  return empty_strided(sizes_of(x), channels_last_strides(sizes_of(x)), x.scalar_type(), x);
}

// x with adjacent channels.
Tensor adjacent(const Tensor& x) {
  if (x.stride(1) == 1 || x.size(1) == 1) return x;
  Tensor result = channels_last_like(x);
  torch::stable::copy_(result, x);
  return result;
}

// to[i][j] = matrix(i, j) in rows of `step`, or of its transpose.
template <class T>
void pack(const MixShape& shape, const Tensor& matrix, bool transposed, T* to) {
  const T* const from = static_cast<const T*>(matrix.data_ptr());
  const int64_t outer = matrix.stride(transposed ? 1 : 0), inner = matrix.stride(transposed ? 0 : 1);
  for (int64_t i = 0; i < shape.channels; ++i)
    for (int64_t j = 0; j < shape.step(); ++j)
      to[i * shape.step() + j] = j < shape.channels ? from[i * outer + j * inner] : T(0);
}

template <class T>
void pack(const MixShape& shape, const Tensor& vector, T* to) {
  const T* const from = static_cast<const T*>(vector.data_ptr());
  for (int64_t j = 0; j < shape.step(); ++j) to[j] = j < shape.channels ? from[j * vector.stride(0)] : T(0);
}

template <class F>
void with_type(bool is_double, const F& f) {
  is_double ? f(double()) : f(float());
}

Tensor mix(const Tensor& x, const Tensor& matrix, const optional<Tensor>& offset) {
  MixForward job{};
  job.shape = shape_of(x);
  const MixShape& shape = job.shape;
  Tensor y = channels_last_like(x);
  if (x.numel() == 0) return y;
  const Scratch packed = make_scratch((shape.matrix_values() + shape.step()) * (shape.is_double ? 8 : 4));
  with_type(shape.is_double, [&](auto type) {
    auto* const at = static_cast<decltype(type)*>(packed.get());
    pack(shape, matrix, true, at);
    if (offset) pack(shape, *offset, at + shape.matrix_values());
    job.offset = offset ? at + shape.matrix_values() : nullptr;
  });
  job.matrix = packed.get();
  job.x = image_of(x);
  job.y = image_of(y);
  const int64_t samples = std::max<int64_t>(1, grain / (shape.pixels() * shape.channels));
  parallel_for(0, shape.batch, samples,
               [&](int64_t begin, int64_t end) { FASTFLOW_ISA_CALL(mix_forward, job, begin, end); });
  return y;
}

// The gradients of x, of the matrix and of its offset.
std::tuple<Tensor, Tensor, Tensor> mix_gradients(const Tensor& grad, const Tensor& x, const Tensor& matrix, bool need_x,
                                                 bool need_matrix) {
  MixBackward job{};
  job.shape = shape_of(x);
  const MixShape& shape = job.shape;
  const int64_t width = shape.is_double ? 8 : 4, channels = shape.channels;
  Tensor grad_x = need_x ? channels_last_like(x) : nothing(x);
  Tensor grad_matrix = need_matrix ? empty({channels, channels}, x.scalar_type(), x) : nothing(x);
  Tensor grad_offset = need_matrix ? empty({channels}, x.scalar_type(), x) : nothing(x);
  job.need_x = need_x;
  job.need_matrix = need_matrix;
  const Scratch packed = make_scratch(shape.matrix_values() * width);
  const Scratch partials = make_scratch(need_matrix ? job.groups() * job.partial_values() * width : 0);
  job.matrix = packed.get();
  job.partials = partials.get();
  with_type(shape.is_double, [&](auto type) {
    using T = decltype(type);
    T* const sums = static_cast<T*>(partials.get());
    if (x.numel() > 0) {
      pack(shape, matrix, false, static_cast<T*>(packed.get()));
      job.grad = image_of(grad);
      job.x = image_of(x);
      if (need_x) job.grad_x = image_of(grad_x);
      const int64_t values = shape.batch * shape.pixels() * channels / job.groups();
      parallel_for(0, job.groups(), values >= grain ? 1 : grain / values,
                   [&](int64_t begin, int64_t end) { FASTFLOW_ISA_CALL(mix_backward, job, begin, end); });
    } else if (need_matrix) {
      std::fill_n(sums, job.groups() * job.partial_values(), T(0));
    }
    if (!need_matrix) return;
    for (int64_t group = 1; group < job.groups(); ++group)
      for (int64_t i = 0; i < job.partial_values(); ++i) sums[i] += sums[group * job.partial_values() + i];
    T* const to = static_cast<T*>(grad_matrix.mutable_data_ptr());
    for (int64_t i = 0; i < channels; ++i) std::copy_n(sums + i * shape.step(), channels, to + i * channels);
    std::copy_n(sums + shape.matrix_values(), channels, static_cast<T*>(grad_offset.mutable_data_ptr()));
  });
  return {grad_x, grad_matrix, grad_offset};
}

Tensor first_channels(Tensor x, int64_t count) { return torch::stable::narrow(x, 1, 0, count); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> glow_step_fwd(
    const Tensor& x, const Tensor& matrix, const optional<Tensor>& offset, const Tensor& w1, const Tensor& b1,
    const Tensor& w2, const Tensor& b2, const Tensor& w3, const Tensor& b3, const optional<Tensor>& logdet,
    int64_t kept, bool keep, int64_t flags, int64_t kind, double gain, double scale_offset, double out_gain,
    double clamp, double eps, double hard_min, double hard_max, double shift_gain) {
  const Tensor mixed = mix(adjacent(x), matrix, offset);
  auto [params, h1, h2] = conv_net_fwd(first_channels(mixed, kept), w1, b1, w2, b2, w3, b3, 0, keep);
  auto [y, total] =
      affine_coupling_fwd(mixed, params, std::nullopt, logdet, std::nullopt, kept, flags, kind, gain, scale_offset,
                          out_gain, clamp, eps, hard_min, hard_max, shift_gain);
  return {y, total, keep ? mixed : nothing(x), keep ? params : nothing(x), h1, h2};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> glow_step_bwd(
    const optional<Tensor>& grad_y, const optional<Tensor>& grad_logdet, const Tensor& x, const Tensor& matrix,
    const Tensor& w1, const Tensor& w2, const Tensor& w3, const Tensor& mixed, const Tensor& params, const Tensor& h1,
    const Tensor& h2, int64_t kept, bool need_x, bool need_matrix, bool need_weights, int64_t flags, int64_t kind,
    double gain, double scale_offset, double out_gain, double clamp, double eps, double hard_min, double hard_max,
    double shift_gain) {
  const bool through = need_x || need_matrix;
  auto [grad_mixed, grad_params, none] = affine_coupling_gradients(
      grad_y, grad_logdet, mixed, params, std::nullopt, kept, through, true, false, false, flags, kind, gain,
      scale_offset, out_gain, clamp, eps, hard_min, hard_max, shift_gain);
  const Image into = through ? image_of(grad_mixed) : Image{}, base = grad_y ? image_of(*grad_y) : Image{};
  auto grads = conv_net_gradients(grad_params, first_channels(mixed, kept), w1, w2, w3, h1, h2, 0, into, base,
                                  need_weights);
  auto first = through ? mix_gradients(adjacent(grad_mixed), adjacent(x), matrix, need_x, need_matrix)
                       : std::tuple{nothing(x), nothing(x), nothing(x)};
  return std::tuple_cat(first, grads);
}

}  // namespace fastflow
