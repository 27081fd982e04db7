// Host side of activated_conv on the CPU: weights in the kernels' order, results, threads.
#include "activated_conv_kernel.h"

#include <algorithm>

#include "../fastflow.h"
#include "operands.h"
#include "runtime.h"
#include "slogdet_scratch.h"

namespace fastflow {

namespace {

ActivatedConv shape_of(const Tensor& x, const Tensor& weight, const Dims& out, int64_t stride, int64_t padding,
                       bool transposed, int64_t activation) {
  ActivatedConv shape{};
  const Dims in = sizes_of(x), kernel = sizes_of(weight);
  const Dims &fine = transposed ? out : in, &coarse = transposed ? in : out;
  shape.batch = in[0];
  shape.coarse = kernel[0];
  shape.fine = kernel[1];
  shape.kernel_height = kernel[2];
  shape.kernel_width = kernel[3];
  shape.fine_height = fine[2];
  shape.fine_width = fine[3];
  shape.coarse_height = coarse[2];
  shape.coarse_width = coarse[3];
  shape.stride = stride;
  shape.padding = padding;
  shape.transposed = transposed;
  shape.activation = static_cast<ConvActivation>(activation);
  shape.is_double = x.scalar_type() == ScalarType::Double;
  return shape;
}

// f(offset of coarse channel 0 in a weight, how far its channels are apart, offset in the array, how far there) for
// every tap and fine channel, in gather's order.
template <class F>
void for_gather(const ActivatedConv& shape, const Dims& strides, const F& f) {
  int64_t to = 0;
  for (int64_t ky = 0; ky < shape.kernel_height; ++ky)
    for (int64_t kx = 0; kx < shape.kernel_width; ++kx)
      for (int64_t c = 0; c < shape.fine; ++c, to += shape.coarse)
        f(ky * strides[2] + kx * strides[3] + c * strides[1], strides[0], to, int64_t(1));
}

// The same in scatter's order.
template <class F>
void for_scatter(const ActivatedConv& shape, const Dims& strides, const F& f) {
  int64_t first = 0;
  for (int64_t ry = 0; ry < shape.stride; ++ry)
    for (int64_t rx = 0; rx < shape.stride; ++rx) {
      const int64_t rows = shape.taps(ry, shape.kernel_height), columns = shape.taps(rx, shape.kernel_width);
      const int64_t taps = rows * columns;
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t ky = ry + (rows - 1 - t / columns) * shape.stride;
        const int64_t kx = rx + (columns - 1 - t % columns) * shape.stride;
        for (int64_t c = 0; c < shape.fine; ++c)
          f(ky * strides[2] + kx * strides[3] + c * strides[1], strides[0],
            first + (shape.wide() ? t * shape.coarse * shape.fine + c : (c * taps + t) * shape.coarse),
            shape.wide() ? shape.fine : int64_t(1));
      }
      first += taps * shape.coarse * shape.fine;
    }
}

template <class T>
void pack(const ActivatedConv& shape, const Tensor& weight, bool gathers, void* to) {
  const T* const from = static_cast<const T*>(weight.data_ptr());
  const auto move = [&](int64_t source, int64_t step, int64_t target, int64_t target_step) {
    T* const out = static_cast<T*>(to) + target;
    for (int64_t j = 0; j < shape.coarse; ++j) out[j * target_step] = from[source + j * step];
  };
  gathers ? for_gather(shape, strides_of(weight), move) : for_scatter(shape, strides_of(weight), move);
}

Scratch packed(const ActivatedConv& shape, const Tensor& weight, bool gathers) {
  Scratch result = make_scratch(shape.weight_values() * (shape.is_double ? 8 : 4));
  shape.is_double ? pack<double>(shape, weight, gathers, result.get())
                  : pack<float>(shape, weight, gathers, result.get());
  return result;
}

Tensor like(const Tensor& t) {
  return empty_strided(sizes_of(t), strides_like(sizes_of(t), t), t.scalar_type(), t);
}

// Adds the groups' rows in order and hands the gradients out.
template <class T>
void finish(const ActivatedConvBackward& job, T* sums, Tensor& weight, Tensor& bias) {
  const int64_t count = job.partial_values();
  parallel_for(0, count, 16384, [&](int64_t begin, int64_t end) {
    for (int64_t group = 1; group < job.groups(); ++group) {
      const T* const row = sums + group * count;
      for (int64_t i = begin; i < end; ++i) sums[i] += row[i];
    }
  });
  T* const to = static_cast<T*>(weight.mutable_data_ptr());
  for_gather(job.shape, strides_of(weight), [&](int64_t target, int64_t step, int64_t source, int64_t) {
    for (int64_t j = 0; j < job.shape.coarse; ++j) to[target + j * step] = sums[source + j];
  });
  std::copy_n(sums + job.shape.weight_values(), bias.numel(), static_cast<T*>(bias.mutable_data_ptr()));
}

}  // namespace

Tensor activated_conv_fwd(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias, int64_t stride,
                          int64_t padding, bool transposed, int64_t activation, bool channels_last) {
  const Dims in = sizes_of(x), kernel = sizes_of(weight);
  const auto length = [&](int64_t size, int64_t taps) {
    return transposed ? (size - 1) * stride - 2 * padding + taps : (size + 2 * padding - taps) / stride + 1;
  };
  const Dims sizes{in[0], kernel[transposed ? 1 : 0], length(in[2], kernel[2]), length(in[3], kernel[3])};
  Tensor out = empty_strided(sizes, channels_last ? channels_last_strides(sizes) : contiguous_strides(sizes),
                             x.scalar_type(), x);
  if (out.numel() == 0) return out;
  ActivatedConvForward job{};
  job.shape = shape_of(x, weight, sizes, stride, padding, transposed, activation);
  const Scratch weights = packed(job.shape, weight, !transposed);
  const Tensor biases = bias ? torch::stable::contiguous(*bias) : out;
  job.x = image_of(x);
  job.out = image_of(out);
  job.weight = weights.get();
  job.bias = bias ? biases.data_ptr() : nullptr;
  parallel_for(0, job.shape.batch, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch = make_scratch(job.scratch_values() * (job.shape.is_double ? 8 : 4));
    FASTFLOW_ISA_CALL(activated_conv_forward, job, scratch.get(), begin, end);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> activated_conv_bwd(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                      int64_t stride, int64_t padding, bool transposed,
                                                      int64_t activation, bool need_x, bool need_weights) {
  ActivatedConvBackward job{};
  job.shape = shape_of(x, weight, sizes_of(grad), stride, padding, transposed, activation);
  const ActivatedConv& shape = job.shape;
  job.need_x = need_x;
  job.need_weights = need_weights;
  Tensor grad_x = need_x ? like(x) : nothing(x), grad_weight = need_weights ? like(weight) : nothing(x);
  Tensor grad_bias = need_weights ? empty({grad.size(1)}, x.scalar_type(), x) : nothing(x);
  const int64_t width = shape.is_double ? 8 : 4;
  const int64_t values = need_weights ? job.partial_values() * std::max<int64_t>(1, job.groups()) : 0;
  const Scratch partials = make_scratch(values * width);
  std::fill_n(static_cast<char*>(partials.get()), values * width, 0);
  job.partials = partials.get();
  if (grad.numel() > 0) {
    const Scratch weights = need_x ? packed(shape, weight, transposed) : Scratch();
    job.grad = image_of(grad);
    job.x = image_of(x);
    if (need_x) job.grad_x = image_of(grad_x);
    job.weight = weights.get();
    parallel_for(0, job.groups(), 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch = make_scratch(job.scratch_values() * width);
      FASTFLOW_ISA_CALL(activated_conv_backward, job, scratch.get(), begin, end);
    });
  }
  if (need_weights)
    shape.is_double ? finish(job, static_cast<double*>(partials.get()), grad_weight, grad_bias)
                    : finish(job, static_cast<float*>(partials.get()), grad_weight, grad_bias);
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace fastflow
