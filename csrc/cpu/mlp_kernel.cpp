// A small fully connected network, forward and backward. A tile of samples goes through all layers while its
// activations and the weights lie in the caches. Samples are rows and features the lanes of vectors: what a layer
// gives is what the next reads, and both gradients of a product take their operands as they lie.
#include "mlp_kernel.h"

#include "matmul_tile.h"
#include "silu.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

constexpr int64_t tile = MlpShape::tile;

int64_t padded(int64_t features) { return MlpShape::padded(features); }

template <class T>
int64_t vectors_of(int64_t features) {  // in elements
  constexpr int64_t W = Simd<T>::lanes;
  return (features + W - 1) / W * W;
}

template <class T>
Strided<T> strided(const MlpMatrix& matrix) {
  return {static_cast<const T*>(matrix.data), matrix.row, matrix.column};
}

template <class T>
void pack(const MlpShape& shape, bool transposed, T* to) {
  for (const MlpLayer* layer = shape.layers; layer != shape.layers + shape.count; ++layer) {
    T* const weight = to + layer->packed;
    if (!transposed) {
      copy_padded(strided<T>(layer->weight), layer->out, layer->in, weight, padded(layer->in));
      continue;
    }
    const int64_t ld = padded(layer->out);
    copy_transposed(strided<T>(layer->weight), layer->out, layer->in, weight, ld);
    copy_padded(strided<T>({layer->bias, 0, layer->bias_step}), 1, layer->out, weight + layer->in * ld, ld);
  }
}

// Rows of results: whole vectors where they fit, the last one's elements one by one.
template <class T>
void store_row(T* row, int64_t j, int64_t columns, Vec<T> value) {
  constexpr int W = Simd<T>::lanes;
  if (j + W <= columns) return store(row + j, value);
  for (int l = 0; j + l < columns; ++l) row[j + l] = value[l];
}

// NaN stays in both.
template <class T>
Vec<T> rectified(Vec<T> x) {
  return x < Vec<T>{} ? Vec<T>{} : x;
}

// y = activation(x) of whole rows, and the slopes of silu where they are wanted; the others' follow from y.
template <class T>
void activate(int64_t activation, int64_t count, const T* x, T* y, T* slopes) {
  if (activation == MlpShape::tanh) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) y[i] = math::tanh(x[i]);
  } else {
    silu(count, x, y, slopes);
  }
}

template <class T>
struct Network {
  const MlpShape& shape;
  T *rows[3], *features;  // tiles as wide as the widest layer; `features` holds the first layer's inputs

  Network(const MlpShape& shape, void* scratch) : shape(shape) {
    const int64_t size = tile * padded(shape.widest);
    T* at = static_cast<T*>(scratch);
    for (T*& row : rows) {
      row = at;
      at += size;
    }
    features = at;
  }

  static int64_t scratch(const MlpShape& shape) {
    return 4 * tile * padded(shape.widest) * static_cast<int64_t>(sizeof(T));
  }

  int64_t samples(int64_t first) const { return shape.batch - first < tile ? shape.batch - first : tile; }

  // The kept input of a layer from sample `first` on, and its slopes.
  template <class U>
  U* kept(U* base, int64_t l, int64_t first) const {
    const MlpLayer& layer = shape.layers[l];
    return base + layer.kept * shape.batch + first * padded(layer.in);
  }
  template <class U>
  U* slopes(U* base, int64_t l, int64_t first) const {
    if (!shape.keeps_slopes(l)) return nullptr;
    return kept(base, l, first) + shape.batch * padded(shape.layers[l].in);
  }

  void forward(const MlpForward& job, int64_t first) const {
    const int64_t n = samples(first), last = shape.count - 1;
    T* const keep = static_cast<T*>(job.kept);
    T* const sum = rows[2];  // of a residual network
    Strided<T> in{static_cast<const T*>(job.x.data) + first * job.x.row, job.x.row, job.x.column};
    for (int64_t l = 0; l <= last; ++l) {
      const MlpLayer& layer = shape.layers[l];
      const T* const weight = static_cast<const T*>(job.packed) + layer.packed;
      const int64_t ld = padded(layer.out), columns = vectors_of<T>(layer.out);
      const T* const bias = weight + layer.in * ld;
      auto from_zero = [](int64_t, int64_t) { return Vec<T>{}; };  // the bias comes last, which rounds less
      if (l == last) {
        T* const y = static_cast<T*>(job.y) + first * layer.out;
        matmul(n, columns, layer.in, in, weight, ld, from_zero, [&](int64_t i, int64_t j, Vec<T> v) {
          store_row(y + i * layer.out, j, layer.out, v + vec(bias + j));
        });
        return;
      }
      T* const to = keep != nullptr ? kept(keep, l + 1, first) : rows[l % 2];
      T* const slope = keep != nullptr ? slopes(keep, l + 1, first) : nullptr;
      const bool acts = shape.activated(l + 1), fused = acts && shape.activation == MlpShape::relu;
      // The sum that later layers add to, where it is not what this layer hands on itself.
      T* const target = shape.residual && l % 2 == 0 && acts ? sum : to;
      auto finish = [&](int64_t i, int64_t j, Vec<T> v) {
        v += vec(bias + j);
        if (shape.adds(l)) v += vec(sum + i * ld + j);
        vec(target + i * ld + j) = v;
        if (fused) vec(to + i * ld + j) = rectified<T>(v);
      };
      matmul(n, columns, layer.in, in, weight, ld, from_zero, finish);
      if (acts && !fused)
        for (int64_t i = 0; i < n; ++i)
          activate(shape.activation, columns, target + i * ld, to + i * ld,
                   slope == nullptr ? nullptr : slope + i * ld);
      in = {to, ld, 1};
    }
  }

  // The gradient of a layer's weight and bias, added to the group's sums.
  void parameters(const MlpLayer& layer, int64_t n, const T* grad, const T* below, T* sums) const {
    const int64_t ld = padded(layer.out), to_ld = padded(layer.in);
    T* const weight = sums + layer.grad_weight;
    matmul(layer.out, vectors_of<T>(layer.in), n, Strided<T>{grad, 1, ld}, below, to_ld,
           [&](int64_t i, int64_t j) { return vec(weight + i * to_ld + j); },
           [&](int64_t i, int64_t j, Vec<T> v) { vec(weight + i * to_ld + j) = v; });
    for (int64_t j = 0; j < layer.out; j += Simd<T>::lanes) {
      Vec<T> sum = vec(sums + layer.grad_bias + j);
      for (int64_t i = 0; i < n; ++i) sum += vec(grad + i * ld + j);
      vec(sums + layer.grad_bias + j) = sum;
    }
  }

  void backward(const MlpBackward& job, int64_t first, T* sums) const {
    const int64_t n = samples(first), last = shape.count - 1;
    const T* const keep = static_cast<const T*>(job.kept);
    // Of a residual network rows[0] holds the gradient of the sum all the way, rows[1] that within a pair of layers.
    T* grad = rows[last % 2];
    copy_padded<T>({static_cast<const T*>(job.grad.data) + first * job.grad.row, job.grad.row, job.grad.column}, n,
                   shape.layers[last].out, grad, padded(shape.layers[last].out));
    if (sums != nullptr)
      copy_padded<T>({static_cast<const T*>(job.x.data) + first * job.x.row, job.x.row, job.x.column}, n,
                     shape.layers[0].in, features, padded(shape.layers[0].in));
    for (int64_t l = last; l >= 0; --l) {
      const MlpLayer& layer = shape.layers[l];
      const T* const below = l == 0 ? features : kept(keep, l, first);
      const T* const slope = l == 0 ? nullptr : slopes(keep, l, first);
      const T* const weight = static_cast<const T*>(job.packed) + layer.packed;
      if (sums != nullptr) parameters(layer, n, grad, below, sums);
      if (l == 0 && job.grad_x == nullptr) return;
      T* const to = l == 0 ? static_cast<T*>(job.grad_x) + first * layer.in : rows[(l + 1) % 2];
      const int64_t ld = padded(layer.in), columns = vectors_of<T>(layer.in);
      const Strided<T> from{grad, padded(layer.out), 1};
      auto product = [&](const auto& finish) {
        matmul(n, columns, layer.out, from, weight, ld, [](int64_t, int64_t) { return Vec<T>{}; }, finish);
      };
      if (l == 0) {
        product([&](int64_t i, int64_t j, Vec<T> v) { store_row(to + i * layer.in, j, layer.in, v); });
        return;
      }
      const bool adds = shape.residual && l < last && l % 2 == 1;  // joins the gradient that went past the pair
      auto chained = [&](const auto& slope_at) {
        product([&](int64_t i, int64_t j, Vec<T> v) {
          v = slope_at(i * ld + j, v);
          vec(to + i * ld + j) = adds ? vec(to + i * ld + j) + v : v;
        });
      };
      if (!shape.activated(l))
        chained([](int64_t, Vec<T> v) { return v; });
      else if (shape.activation == MlpShape::relu)
        chained([&](int64_t at, Vec<T> v) { return vec(below + at) <= Vec<T>{} ? Vec<T>{} : v; });
      else if (shape.activation == MlpShape::tanh)
        chained([&](int64_t at, Vec<T> v) { return v * (T(1) - vec(below + at) * vec(below + at)); });
      else
        chained([&](int64_t at, Vec<T> v) { return v * vec(slope + at); });
      grad = to;
    }
  }
};

template <class T>
void run_backward(const MlpBackward& job, void* scratch, int64_t begin, int64_t end) {
  const Network<T> network(job.shape, scratch);
  for (int64_t group = begin; group < end; ++group) {
    T* const sums = job.partials == nullptr ? nullptr : static_cast<T*>(job.partials) + group * job.sums;
    for (int64_t i = 0; sums != nullptr && i < job.sums; ++i) sums[i] = T(0);
    const int64_t to = (group + 1) * job.shape.tiles() / job.groups();
    for (int64_t t = group * job.shape.tiles() / job.groups(); t < to; ++t) network.backward(job, t * tile, sums);
  }
}

template <class T>
void run_forward(const MlpForward& job, void* scratch, int64_t begin, int64_t end) {
  const Network<T> network(job.shape, scratch);
  for (int64_t t = begin; t < end; ++t) network.forward(job, t * tile);
}

}  // namespace

void mlp_pack(const MlpShape& shape, bool transposed, void* to) {
  shape.is_double ? pack(shape, transposed, static_cast<double*>(to)) : pack(shape, transposed, static_cast<float*>(to));
}

int64_t mlp_scratch(const MlpShape& shape) {
  return shape.is_double ? Network<double>::scratch(shape) : Network<float>::scratch(shape);
}

void mlp_forward(const MlpForward& job, void* scratch, int64_t begin, int64_t end) {
  job.shape.is_double ? run_forward<double>(job, scratch, begin, end) : run_forward<float>(job, scratch, begin, end);
}

void mlp_backward(const MlpBackward& job, void* scratch, int64_t begin, int64_t end) {
  job.shape.is_double ? run_backward<double>(job, scratch, begin, end) : run_backward<float>(job, scratch, begin, end);
}

}  // namespace fastflow::FASTFLOW_ISA
