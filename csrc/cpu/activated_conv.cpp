// Host side of activated_conv on the CPU: weights in the kernels' order, results, threads.
#include "activated_conv_kernel.h"

#include <algorithm>

#include "../fastflow.h"
#include "flags.h"
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

// f(offset of the first of `count` channels in a weight, offset in the array, count) for every tap and every run of 16
// channels with the other channels [begin, end), in an order in which the lines of the weight are read while they are
// at hand. The array holds tap by tap (fine, coarse), in runs of coarse channels, or (coarse, fine), in runs of fine
// ones.
template <class F>
void for_runs(const ActivatedConv& shape, const Dims& strides, bool of_coarse, int64_t begin, int64_t end,
              const F& f) {
  const int64_t run = of_coarse ? shape.coarse : shape.fine, other = of_coarse ? shape.fine : shape.coarse;
  const int64_t run_step = strides[of_coarse ? 0 : 1], other_step = strides[of_coarse ? 1 : 0];
  for (int64_t i = 0; i < run; i += 16)
    for (int64_t c = begin; c < end; ++c)
      for (int64_t ky = 0; ky < shape.kernel_height; ++ky)
        for (int64_t kx = 0; kx < shape.kernel_width; ++kx)
          f(ky * strides[2] + kx * strides[3] + c * other_step + i * run_step,
            ((ky * shape.kernel_width + kx) * other + c) * run + i, std::min<int64_t>(16, run - i));
}

template <class T>
void pack_runs(const ActivatedConv& shape, const Tensor& weight, bool of_coarse, int64_t begin, int64_t end, T* to) {
  const T* const from = static_cast<const T*>(weight.data_ptr());
  const int64_t step = strides_of(weight)[of_coarse ? 0 : 1];
  for_runs(shape, strides_of(weight), of_coarse, begin, end, [&](int64_t source, int64_t target, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[target + i] = from[source + i * step];
  });
}

// f(offset of coarse channel 0 in a weight, how far its channels are apart, offset in the array, how far there) for
// every tap and fine channel, in scatter's order.
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
  if (gathers) return pack_runs(shape, weight, true, 0, shape.fine, static_cast<T*>(to));
  const T* const from = static_cast<const T*>(weight.data_ptr());
  for_scatter(shape, strides_of(weight), [&](int64_t source, int64_t step, int64_t target, int64_t target_step) {
    T* const out = static_cast<T*>(to) + target;
    for (int64_t j = 0; j < shape.coarse; ++j) out[j * target_step] = from[source + j * step];
  });
}

Scratch packed(const ActivatedConv& shape, const Tensor& weight, bool gathers) {
  Scratch result = make_scratch(shape.weight_values() * (shape.is_double ? 8 : 4));
  shape.is_double ? pack<double>(shape, weight, gathers, result.get())
                  : pack<float>(shape, weight, gathers, result.get());
  return result;
}

// The points of Winograd's form.
Scratch packed_points(const ActivatedConv& shape, const Tensor& weight, bool gathers) {
  const Scratch taps = make_scratch(shape.weight_values() * 4);
  Scratch result = make_scratch(16 * shape.depth() * shape.coarse * 4);
  parallel_for(0, gathers ? shape.fine : shape.coarse, 16, [&](int64_t begin, int64_t end) {
    float* const to = static_cast<float*>(taps.get());
    pack_runs(shape, weight, gathers, begin, end, to);
    FASTFLOW_ISA_CALL(winograd_conv_weights, shape, to, gathers, begin, end, static_cast<float*>(result.get()));
  });
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
  const int64_t step = strides_of(weight)[0];
  parallel_for(0, job.shape.fine, 16, [&](int64_t begin, int64_t end) {
    for_runs(job.shape, strides_of(weight), true, begin, end, [&](int64_t target, int64_t source, int64_t runs) {
      for (int64_t i = 0; i < runs; ++i) to[target + i * step] = sums[source + i];
    });
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
  const Tensor biases = bias ? torch::stable::contiguous(*bias) : out;
  job.x = image_of(x);
  job.out = image_of(out);
  job.bias = bias ? biases.data_ptr() : nullptr;
  Flags spoilt = flags(job.shape.batch, !job.shape.winograd());
  if (job.shape.winograd()) {
    const Scratch points = packed_points(job.shape, weight, !transposed);
    job.weight = points.get();
    parallel_for(0, job.shape.batch, 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch = make_scratch(FASTFLOW_ISA_CALL(winograd_conv_scratch, job.shape, false) * 4);
      FASTFLOW_ISA_CALL(winograd_conv_forward, job, scratch.get(), begin, end, spoilt.get());
    });
  }
  if (!any(spoilt, job.shape.batch)) return out;
  const Scratch weights = packed(job.shape, weight, !transposed);
  job.weight = weights.get();
  parallel_for(0, job.shape.batch, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch = make_scratch(job.scratch_values() * (job.shape.is_double ? 8 : 4));
    for_each_run(spoilt, begin, end, [&](int64_t from, int64_t to) {
      FASTFLOW_ISA_CALL(activated_conv_forward, job, scratch.get(), from, to);
    });
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
    job.grad = image_of(grad);
    job.x = image_of(x);
    if (need_x) job.grad_x = image_of(grad_x);
    Flags spoilt = flags(job.groups(), !shape.winograd());
    if (shape.winograd()) {
      const Scratch points = need_x ? packed_points(shape, weight, transposed) : Scratch();
      job.weight = points.get();
      parallel_for(0, job.groups(), 1, [&](int64_t begin, int64_t end) {
        const Scratch scratch = make_scratch(FASTFLOW_ISA_CALL(winograd_conv_scratch, shape, true) * 4);
        FASTFLOW_ISA_CALL(winograd_conv_backward, job, scratch.get(), begin, end, spoilt.get());
      });
    }
    if (any(spoilt, job.groups())) {
      const Scratch weights = need_x ? packed(shape, weight, transposed) : Scratch();
      job.weight = weights.get();
      parallel_for(0, job.groups(), 1, [&](int64_t begin, int64_t end) {
        const Scratch scratch = make_scratch(job.scratch_values() * width);
        for_each_run(spoilt, begin, end, [&](int64_t from, int64_t to) {
          if (need_weights)
            std::fill_n(static_cast<char*>(partials.get()) + from * job.partial_values() * width,
                        (to - from) * job.partial_values() * width, 0);
          FASTFLOW_ISA_CALL(activated_conv_backward, job, scratch.get(), from, to);
        });
      });
    }
  }
  if (need_weights)
    shape.is_double ? finish(job, static_cast<double*>(partials.get()), grad_weight, grad_bias)
                    : finish(job, static_cast<float*>(partials.get()), grad_weight, grad_bias);
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace fastflow
