// A small fully connected network on a tile of samples, forward and backward. For mlp_flow_kernel.cpp alone.
#pragma once

#include "matmul_tile.h"
#include "mlp_flow_kernel.h"
#include "silu.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

constexpr int64_t tile = FlowJob::tile;  // row length of every buffer of activations
constexpr int64_t lines = 16;  // features that buffers are rounded up to: whole squares of vectors to transpose
constexpr int64_t thin_in = 4, thin_out = 4;  // up to here the gradient of a weight is summed lane by lane

constexpr int64_t padded(int64_t features) { return (features + lines - 1) / lines * lines; }

bool is_thin(const FlowLinear& linear) { return linear.in <= thin_in || linear.out <= thin_out; }

// Hands out parts of the scratch memory, each aligned to 64 bytes; without memory it counts.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    const int64_t at = used;
    used = round_up(used + count * static_cast<int64_t>(sizeof(T)), 64);
    return base == nullptr ? nullptr : reinterpret_cast<T*>(base + at);
  }
};

template <class T>
Strided<T> weights_of(const FlowLinear& linear) {
  return {static_cast<const T*>(linear.weight.data), linear.weight.row, linear.weight.column};
}

template <class T>
Strided<T> transposed(const Strided<T>& a) {
  return {a.data, a.column, a.row};
}

// NaN stays in both.
template <class T>
Vec<T> relu(Vec<T> x) {
  return x < Vec<T>{} ? Vec<T>{} : x;
}

template <class T>
Vec<T> relu_gradient(Vec<T> y, Vec<T> grad) {
  return y <= Vec<T>{} ? Vec<T>{} : grad;
}

// slopes: of silu alone, where they are wanted; the other activations have theirs from their value.
template <class T>
void activate(Activation activation, int64_t features, int64_t n, T* values, T* slopes) {
  for (int64_t f = 0; f < features; ++f, values += tile) {
    if (activation == Activation::tanh) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) values[i] = math::tanh(values[i]);
    } else {
      silu(n, values, values, slopes);
      slopes = slopes == nullptr ? slopes : slopes + tile;
    }
  }
}

// W x + b of n samples, handed vector by vector to finish(i, j, value). Of a few features there is no more to do than
// to write the results, which the blocks of a product would do in many small calls. In a longer sum the bias comes
// last, which rounds less.
template <class T, class Finish>
void linear_rows(const FlowLinear& linear, int64_t n, const T* x, const Finish& finish) {
  const T* bias = static_cast<const T*>(linear.bias.data);
  const Strided<T> weights = weights_of<T>(linear);
  if (linear.in > thin_in || linear.in == 0)
    return matmul(linear.out, n, linear.in, weights, x, tile, [](int64_t, int64_t) { return Vec<T>{}; },
                  [&](int64_t i, int64_t j, Vec<T> sum) { finish(i, j, sum + splat(bias[i * linear.bias.row])); },
                  [&](int64_t i, int64_t, int64_t p) {  // the weights of the next rows
                    __builtin_prefetch(weights.data + (i + matmul_rows) * weights.row + p * matmul_rows);
                  });
  const int64_t out = linear.out, next = linear.bias.row;
  with_count<thin_in>(linear.in, [&](auto in) {
    for (int64_t j = 0; j < n; j += Simd<T>::lanes) {
      Vec<T> values[in.value];
      for (int p = 0; p < in.value; ++p) values[p] = vec(x + p * tile + j);
      const T *w = weights.data, *b = bias;
      for (int64_t i = 0; i < out; ++i, w += weights.row, b += next) {
        Vec<T> sum = splat(*b);
        for (int p = 0; p < in.value; ++p) sum += splat(w[p * weights.column]) * values[p];
        finish(i, j, sum);
      }
    }
  });
}

// y = activation(W x + b) of n samples; a linear layer where it is the last.
template <class T>
void linear_forward(const FlowLinear& linear, bool last, Activation activation, int64_t n, const T* x, T* y,
                    T* slopes) {
  if (!last && activation == Activation::relu)
    return linear_rows(linear, n, x, [&](int64_t i, int64_t j, Vec<T> sum) { vec(y + i * tile + j) = relu<T>(sum); });
  linear_rows(linear, n, x, [&](int64_t i, int64_t j, Vec<T> sum) { vec(y + i * tile + j) = sum; });
  if (!last) activate(activation, linear.out, n, y, slopes);
}

// Asks for the lines of transposed weights, whose rows lie side by side, that later blocks of a product read.
template <class T>
struct NextLines {
  Strided<T> weights;
  void operator()(int64_t i, int64_t, int64_t p) const {
    __builtin_prefetch(weights.data + (i + 64 / static_cast<int64_t>(sizeof(T))) * weights.row + p * weights.column);
  }
};

// The gradient of the activations y below a layer from that of its results: W^T grad times the activation's slope.
template <class T>
void linear_backward(const FlowLinear& linear, Activation activation, int64_t n, const T* grad, const T* y,
                     const T* slopes, T* to) {
  const Strided<T> weights = transposed(weights_of<T>(linear));
  auto start = [](int64_t, int64_t) { return Vec<T>{}; };
  auto run = [&](const auto& chain) {
    auto finish = [&](int64_t i, int64_t j, Vec<T> value) { vec(to + i * tile + j) = chain(i * tile + j, value); };
    matmul(linear.in, n, linear.out, weights, grad, tile, start, finish, NextLines<T>{weights});
  };
  if (activation == Activation::relu)
    run([&](int64_t at, Vec<T> value) { return relu_gradient<T>(vec(y + at), value); });
  else if (activation == Activation::tanh)
    run([&](int64_t at, Vec<T> value) { return value * (T(1) - vec(y + at) * vec(y + at)); });
  else
    run([&](int64_t at, Vec<T> value) { return value * vec(slopes + at); });
}

// to (rows of features first .. first + count of the layer's input) += W^T grad.
template <class T>
void input_backward(const FlowLinear& linear, int64_t first, int64_t count, int64_t n, const T* grad, T* to) {
  Strided<T> weights = transposed(weights_of<T>(linear));
  weights.data += first * weights.row;
  matmul(count, n, linear.out, weights, grad, tile, [](int64_t, int64_t) { return Vec<T>{}; },
         [&](int64_t i, int64_t j, Vec<T> value) { vec(to + i * tile + j) += value; }, NextLines<T>{weights});
}

// The sums of a layer's gradients over samples that are not yet sums over lanes: a vector to each bias and, of a thin
// layer, to each weight.
template <class T>
struct LaneSums {
  static constexpr int W = Simd<T>::lanes;
  T *bias, *weight;

  // Those of the next layer follow.
  LaneSums begin(const FlowLinear& linear) const {
    const int64_t biases = linear.out * W, weights = is_thin(linear) ? biases * linear.in : 0;
    for (int64_t i = 0; i < biases; ++i) bias[i] = T(0);
    for (int64_t i = 0; i < weights; ++i) weight[i] = T(0);
    return {bias + biases, weight + weights};
  }

  void add(const FlowLinear& linear, int64_t n, const T* x, const T* grad) const {
    n == tile ? add_lanes<tile / W>(linear, n, x, grad) : add_lanes<0>(linear, n, x, grad);
  }

  // N: how many vectors n is, 0 where that is not known.
  template <int N>
  void add_lanes(const FlowLinear& linear, int64_t n, const T* x, const T* grad) const {
    const int64_t inputs = is_thin(linear) ? linear.in : 0;
    for (int64_t i = 0; i < linear.out; ++i) {
      const T* g = grad + i * tile;
      vec(bias + i * W) += over_lanes<N>(n, [&](int64_t l) { return vec(g + l); });
      for (int64_t k = 0; k < inputs; ++k)
        vec(weight + (i * inputs + k) * W) +=
            over_lanes<N>(n, [&](int64_t l) { return vec(g + l) * vec(x + k * tile + l); });
    }
  }

  template <int N, class F>
  static Vec<T> over_lanes(int64_t n, const F& term) {
    Vec<T> sum = term(0);
    if constexpr (N > 0) {
#pragma GCC unroll 32
      for (int v = 1; v < N; ++v) sum += term(v * W);
    } else {
      for (int64_t l = W; l < n; l += W) sum += term(l);
    }
    return sum;
  }

  void finish(const FlowLinear& linear, T* partial) const {
    T* to = partial + linear.grad_bias;
    for (int64_t i = 0; i < linear.out; ++i) to[i] += sum_lanes<T>(vec(bias + i * W));
    if (!is_thin(linear)) return;
    to = partial + linear.grad_weight;
    for (int64_t i = 0; i < linear.out; ++i)
      for (int64_t k = 0; k < linear.in; ++k)
        to[i * linear.grad_ld + k] += sum_lanes<T>(vec(weight + (i * linear.in + k) * W));
  }
};

// finish(i, j, vector) of grad x^T over `count` samples, for a layer that is not thin; scratch holds x^T. Vectors reach
// past the layer's last input.
template <class T, class Finish>
void weight_product(const FlowLinear& linear, int64_t count, const T* x, const T* grad, T* scratch,
                    const Finish& finish) {
  const int64_t columns = padded(linear.in);
  transpose_tile(columns, padded(count), x, tile, scratch, columns);
  matmul(linear.out, columns, count, Strided<T>{grad, tile, 1}, scratch, columns,
         [](int64_t, int64_t) { return Vec<T>{}; }, finish);
}

// partial += grad x^T.
template <class T>
void weight_gradient(const FlowLinear& linear, int64_t count, const T* x, const T* grad, T* scratch, T* partial) {
  T* to = partial + linear.grad_weight;
  weight_product(linear, count, x, grad, scratch,
                 [&](int64_t i, int64_t j, Vec<T> value) { vec(to + i * linear.grad_ld + j) += value; });
}

}  // namespace
}  // namespace fastflow::FASTFLOW_ISA
