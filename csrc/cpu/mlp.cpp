// Host side of mlp on the CPU: layers, results, threads.
#include "mlp_kernel.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "../fastflow.h"
#include "runtime.h"
#include "slogdet_scratch.h"

namespace fastflow {

namespace {

MlpMatrix matrix_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1)}; }

// A network as its parameters, weight and bias of every layer in turn, describe it.
struct Network {
  std::vector<MlpLayer> layers;
  MlpShape shape{};
  int64_t sums = 0;

  // transposed: how the kernel's copies of the weights lie; a gradient needs no biases.
  Network(const Tensor& x, const std::vector<Tensor>& params, int64_t activation, bool residual, bool transposed) {
    STD_TORCH_CHECK(x.dim() == 2 && !params.empty() && params.size() % 2 == 0,
                    "params: expected weight and bias of every layer, and x (B, I)");
    STD_TORCH_CHECK(!residual || params.size() % 4 == 0, "params: a residual network has an even number of layers");
    shape.count = static_cast<int64_t>(params.size() / 2);
    shape.activation = activation;
    shape.residual = residual;
    shape.is_double = x.scalar_type() == ScalarType::Double;
    shape.batch = x.size(0);
    int64_t width = x.size(1);
    for (int64_t l = 0; l < shape.count; ++l) {
      const Tensor &weight = params[static_cast<size_t>(2 * l)], &bias = params[static_cast<size_t>(2 * l + 1)];
      STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() && bias.scalar_type() == x.scalar_type() &&
                          weight.dim() == 2 && weight.size(1) == width && bias.numel() == weight.size(0),
                      "params: a weight or bias does not fit x or the layer below it");
      const int64_t out = weight.size(0), in_padded = MlpShape::padded(width), out_padded = MlpShape::padded(out);
      STD_TORCH_CHECK(!residual || l == 0 || l == shape.count - 1 || out == layers[0].out,
                      "params: the hidden layers of a residual network are of one width");
      MlpLayer layer{matrix_of(weight), bias.data_ptr(), bias.stride(0), width, out, shape.packed, shape.kept, 0, 0};
      shape.packed += transposed ? (width + 1) * out_padded : out * in_padded;
      if (l > 0) shape.kept += (shape.keeps_slopes(l) ? 2 : 1) * in_padded;
      layer.grad_weight = sums;
      layer.grad_bias = sums + out * in_padded;
      sums = layer.grad_bias + out_padded;
      shape.widest = std::max({shape.widest, width, out});
      layers.push_back(layer);
      width = out;
    }
    shape.layers = layers.data();
  }

  int64_t bytes(int64_t elements) const { return elements * (shape.is_double ? 8 : 4); }

  Scratch packed(bool transposed) const {
    Scratch scratch = make_scratch(bytes(shape.packed));
    FASTFLOW_ISA_CALL(mlp_pack, shape, transposed, scratch.get());
    return scratch;
  }

  // f(scratch, begin, end) over `count` pieces of work on torch's threads.
  template <class F>
  void run(int64_t count, const F& f) const {
    const int64_t size = FASTFLOW_ISA_CALL(mlp_scratch, shape);
    parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch = make_scratch(size);
      f(scratch.get(), begin, end);
    });
  }

  // The gradients, contiguous, from the groups' sums.
  template <class T>
  std::vector<Tensor> gradients(const std::vector<Tensor>& params, const T* partials, int64_t groups) const {
    std::vector<Tensor> grads;
    std::vector<double> row(static_cast<size_t>(shape.widest));
    auto add = [&](const Tensor& of, int64_t rows, int64_t columns, int64_t at, int64_t ld) {
      grads.push_back(empty(sizes_of(of), of.scalar_type(), of));
      T* to = static_cast<T*>(grads.back().mutable_data_ptr());
      for (int64_t r = 0; r < rows; ++r, at += ld, to += columns) {
        std::fill_n(row.begin(), columns, 0.);
        for (int64_t g = 0; g < groups; ++g)
          for (int64_t i = 0; i < columns; ++i)
            row[static_cast<size_t>(i)] += static_cast<double>(partials[g * sums + at + i]);
        for (int64_t i = 0; i < columns; ++i) to[i] = static_cast<T>(row[static_cast<size_t>(i)]);
      }
    };
    for (size_t l = 0; l < layers.size(); ++l) {
      const MlpLayer& layer = layers[l];
      add(params[2 * l], layer.out, layer.in, layer.grad_weight, MlpShape::padded(layer.in));
      add(params[2 * l + 1], 1, layer.out, layer.grad_bias, 0);
    }
    return grads;
  }
};

}  // namespace

std::tuple<Tensor, Tensor> mlp_fwd(const Tensor& x, std::vector<Tensor> params, int64_t activation, bool residual,
                                   bool keep) {
  const Network network(x, params, activation, residual, true);
  const MlpShape& shape = network.shape;
  Tensor y = empty({shape.batch, network.layers.back().out}, x.scalar_type(), x);
  Tensor kept = keep ? empty({shape.batch, shape.kept}, x.scalar_type(), x) : nothing(x);
  const Scratch packed = network.packed(true);
  const MlpForward job{shape, packed.get(), matrix_of(x), y.mutable_data_ptr(),
                       keep ? kept.mutable_data_ptr() : nullptr};
  network.run(shape.tiles(), [&](void* scratch, int64_t begin, int64_t end) {
    FASTFLOW_ISA_CALL(mlp_forward, job, scratch, begin, end);
  });
  return {y, kept};
}

std::tuple<Tensor, std::vector<Tensor>> mlp_bwd(const Tensor& grad, const Tensor& x, const Tensor& kept,
                                                std::vector<Tensor> params, int64_t activation, bool residual,
                                                bool need_x, bool need_params) {
  const Network network(x, params, activation, residual, false);
  const MlpShape& shape = network.shape;
  STD_TORCH_CHECK(kept.numel() == shape.batch * shape.kept, "kept: not what the forward pass of these params keeps");
  Tensor grad_x = need_x ? empty(sizes_of(x), x.scalar_type(), x) : nothing(x);
  const Scratch packed = network.packed(false);
  MlpBackward job{shape, packed.get(), matrix_of(x), matrix_of(grad), kept.data_ptr(),
                  need_x ? grad_x.mutable_data_ptr() : nullptr, nullptr, network.sums};
  const Scratch partials = make_scratch(network.bytes(need_params ? job.groups() * network.sums : 0));
  if (need_params) job.partials = partials.get();
  network.run(job.groups(), [&](void* scratch, int64_t begin, int64_t end) {
    FASTFLOW_ISA_CALL(mlp_backward, job, scratch, begin, end);
  });
  std::vector<Tensor> grads;
  if (need_params)
    grads = shape.is_double ? network.gradients(params, static_cast<const double*>(partials.get()), job.groups())
                            : network.gradients(params, static_cast<const float*>(partials.get()), job.groups());
  return {grad_x, grads};
}

}  // namespace fastflow
