// Host side of conv_net on the CPU: weights in the kernels' order, results, threads.
#include "conv_net_kernel.h"

#include <algorithm>

#include "../fastflow.h"
#include "flags.h"
#include "gradients.h"
#include "operands.h"
#include "runtime.h"
#include "slogdet_scratch.h"

namespace fastflow {

namespace {

ConvShape shape_of(const Tensor& x, const Tensor& w1, const Tensor& w3, double slope) {
  return {x.size(0), x.size(1), w1.size(0), w3.size(0), x.size(2), x.size(3),
          x.scalar_type() == ScalarType::Double, slope};
}

// How a weight (O, I, 3, 3) or (O, I) lies in a kernel's array: outer and hidden channel, and the taps.
struct Order {
  int64_t channels, hidden, taps;
  int64_t channel, inner;          // strides of the weight
  int64_t tap_row, tap_column;
  bool tap_first, flipped;

  int64_t size() const { return channels * hidden * taps; }

  // f(offset in the weight, offset in the array, count) of runs of hidden channels, a cache line of the array each, in
  // an order in which the lines of the weight are read while they are at hand.
  template <class F>
  void for_each_run(const F& f) const {
    for (int64_t j = 0; j < hidden; j += 16)
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t t = 0; t < taps; ++t) {
          const int64_t at = flipped ? taps - 1 - t : t;
          f(c * channel + at / 3 * tap_row + at % 3 * tap_column + j * inner,
            (tap_first ? t * channels + c : c * taps + t) * hidden + j, std::min<int64_t>(16, hidden - j));
        }
  }
};

// hidden_dim: the dimension of w that holds the hidden channels.
Order order_of(const Tensor& w, int hidden_dim, bool tap_first, bool flipped) {
  const Dims sizes = sizes_of(w), strides = strides_of(w);
  const int other = 1 - hidden_dim;
  const bool window = sizes[2] == 3;
  return {sizes[other], sizes[hidden_dim], window ? 9 : 1, strides[other], strides[hidden_dim],
          strides[2], strides[3], tap_first, flipped};
}

// Hands a tap's place in the weight and in the array to `rows`, where both hold the same rows, or to `turned`, where one
// holds the other's transpose, as of a channels-last weight; returns whether there are such places.
template <class T, class Rows, class Turned>
bool tap_by_tap(const Order& order, const Rows& rows, const Turned& turned) {
  const bool same = order.inner == 1, transpose = std::is_same_v<T, float> && order.channel == 1;
  if (!(order.tap_first || order.taps == 1) || !(same || transpose)) return false;
  for (int64_t t = 0; t < order.taps; ++t) {
    const int64_t tap = order.flipped ? order.taps - 1 - t : t;
    const int64_t at = tap / 3 * order.tap_row + tap % 3 * order.tap_column, place = t * order.channels * order.hidden;
    same ? rows(at, place) : turned(at, place);
  }
  return true;
}

template <class T>
void pack(const Tensor& w, const Order& order, T* to) {
  const T* const from = static_cast<const T*>(w.data_ptr());
  const auto rows = [&](int64_t at, int64_t place) {
    for (int64_t c = 0; c < order.channels; ++c)
      std::copy_n(from + at + c * order.channel, order.hidden, to + place + c * order.hidden);
  };
  const auto turned = [&](int64_t at, int64_t place) {
    if constexpr (std::is_same_v<T, float>)
      FASTFLOW_ISA_CALL(turn, order.hidden, order.channels, from + at, order.inner, to + place);
  };
  if (tap_by_tap<T>(order, rows, turned)) return;
  order.for_each_run([&](int64_t source, int64_t target, int64_t count) {
    for (int64_t j = 0; j < count; ++j) to[target + j] = from[source + j * order.inner];
  });
}

template <class T>
void unpack(const T* from, const Order& order, Tensor& w) {
  T* const to = static_cast<T*>(w.mutable_data_ptr());
  const auto rows = [&](int64_t at, int64_t place) {
    for (int64_t c = 0; c < order.channels; ++c)
      std::copy_n(from + place + c * order.hidden, order.hidden, to + at + c * order.channel);
  };
  const auto turned = [&](int64_t at, int64_t place) {
    if constexpr (std::is_same_v<T, float>)
      FASTFLOW_ISA_CALL(turn_back, order.hidden, order.channels, from + place, to + at, order.inner);
  };
  if (tap_by_tap<T>(order, rows, turned)) return;
  order.for_each_run([&](int64_t target, int64_t source, int64_t count) {
    for (int64_t j = 0; j < count; ++j) to[target + j * order.inner] = from[source + j];
  });
}

// Arrays for the kernels in one allocation, each on a cache line.
class Packed {
 public:
  Packed(int64_t values, bool is_double)  // of six arrays at most
      : is_double_(is_double), scratch_(make_scratch((values + 6 * 16) * (is_double ? 8 : 4))) {}

  const void* add(const Tensor& w, const Order& order) {
    return place(order.size(), [&](auto* to) { pack(w, order, to); });
  }

  // The 16 points of a weight's 9 taps, of a convolution that `expands` or reduces.
  const void* add_points(const Tensor& w, const Order& order, bool expands) {
    const int64_t count = order.channels * order.hidden;
    const Scratch taps = make_scratch(order.size() * 4);
    pack(w, order, static_cast<float*>(taps.get()));
    return place(16 * count, [&](auto* to) {
      if constexpr (std::is_same_v<decltype(to), float*>)
        FASTFLOW_ISA_CALL(winograd_taps, order.channels, order.hidden, expands,
                          static_cast<const float*>(taps.get()), to);
    });
  }

  const void* add(const Tensor& vector) {
    const int64_t stride = strides_of(vector)[0], count = vector.size(0);
    return place(count, [&](auto* to) {
      using T = std::remove_pointer_t<decltype(to)>;
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<const T*>(vector.data_ptr())[i * stride];
    });
  }

 private:
  template <class F>
  const void* place(int64_t count, const F& fill) {
    const int64_t width = is_double_ ? 8 : 4;
    char* const at = static_cast<char*>(scratch_.get()) + used_;
    is_double_ ? fill(reinterpret_cast<double*>(at)) : fill(reinterpret_cast<float*>(at));
    used_ += (count * width + 63) / 64 * 64;
    return at;
  }

  bool is_double_;
  Scratch scratch_;
  int64_t used_ = 0;
};

Tensor result_like(const Tensor& like, const Dims& sizes) {
  return empty_strided(sizes, strides_like(sizes, like), like.scalar_type(), like);
}

// Values of the weights and biases that a kernel reads.
int64_t packed_values(const ConvShape& shape) {
  return (shape.winograd() ? 16 * (shape.in + shape.out) * shape.hidden : 0) + shape.size2() + 2 * shape.hidden +
         shape.out;
}

// Adds the groups' rows in order and hands the gradients out.
template <class T>
void finish(const ConvBackward& job, T* sums, std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>& grads) {
  const int64_t count = job.partial_values();
  parallel_for(0, count, 16384, [&](int64_t begin, int64_t end) {
    for (int64_t group = 1; group < job.groups(); ++group) {
      const T* const row = sums + group * count;
      for (int64_t i = begin; i < end; ++i) sums[i] += row[i];
    }
  });
  auto& [w1, b1, w2, b2, w3, b3] = grads;
  const ConvShape& shape = job.shape;
  unpack(sums, order_of(w1, 0, true, false), w1);
  unpack(sums + shape.size1(), order_of(w2, 1, true, false), w2);
  unpack(sums + shape.size1() + shape.size2(), order_of(w3, 1, true, true), w3);
  const T* const biases = sums + shape.size1() + shape.size2() + shape.size3();
  std::copy_n(biases, shape.hidden, static_cast<T*>(b1.mutable_data_ptr()));
  std::copy_n(biases + shape.hidden, shape.hidden, static_cast<T*>(b2.mutable_data_ptr()));
  std::copy_n(biases + 2 * shape.hidden, shape.out, static_cast<T*>(b3.mutable_data_ptr()));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> conv_net_fwd(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2,
                                                const Tensor& b2, const Tensor& w3, const Tensor& b3, double slope,
                                                bool keep) {
  ConvForward job{};
  job.shape = shape_of(x, w1, w3, slope);
  const ConvShape& shape = job.shape;
  Tensor out = result_like(x, {shape.batch, shape.out, shape.height, shape.width});
  const Dims maps{shape.batch * shape.pixels(), shape.hidden};
  Tensor h1 = keep ? empty(maps, x.scalar_type(), x) : nothing(x);
  Tensor h2 = keep ? empty(maps, x.scalar_type(), x) : nothing(x);
  if (out.numel() == 0) return {out, h1, h2};
  job.x = image_of(x);
  job.out = image_of(out);
  job.h1 = keep ? h1.mutable_data_ptr() : nullptr;
  job.h2 = keep ? h2.mutable_data_ptr() : nullptr;
  Packed packed(packed_values(shape), shape.is_double);
  job.w2 = packed.add(w2, order_of(w2, 0, true, false));
  job.b1 = packed.add(b1);
  job.b2 = packed.add(b2);
  job.b3 = packed.add(b3);
  Flags spoilt = flags(shape.batch, !shape.winograd());
  if (shape.winograd()) {
    job.w1 = packed.add_points(w1, order_of(w1, 0, true, false), true);
    job.w3 = packed.add_points(w3, order_of(w3, 0, true, true), false);
    parallel_for(0, shape.batch, 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch = make_scratch(winograd_scratch_values(shape, false, !keep) * 4);
      FASTFLOW_ISA_CALL(winograd_forward, job, scratch.get(), begin, end, spoilt.get());
    });
  }
  if (!any(spoilt, shape.batch)) return {out, h1, h2};
  Packed plain(shape.size1() + shape.size3(), shape.is_double);
  job.w1 = plain.add(w1, order_of(w1, 0, true, false));
  job.w3 = plain.add(w3, order_of(w3, 1, false, false));
  parallel_for(0, shape.batch, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch = make_scratch(job.scratch_values() * (shape.is_double ? 8 : 4));
    for_each_run(spoilt, begin, end, [&](int64_t from, int64_t to) {
      FASTFLOW_ISA_CALL(conv_net_forward, job, scratch.get(), from, to);
    });
  });
  return {out, h1, h2};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_net_gradients(
    const Tensor& grad, const Tensor& x, const Tensor& w1, const Tensor& w2, const Tensor& w3, const Tensor& h1,
    const Tensor& h2, double slope, const Image& grad_x, const Image& base, bool need_weights) {
  ConvBackward job{};
  job.shape = shape_of(x, w1, w3, slope);
  const ConvShape& shape = job.shape;
  job.grad_x = grad_x;
  job.base = base;
  job.need_x = grad_x.data != nullptr;
  job.need_weights = need_weights;
  auto weight_like = [&](const Tensor& w) { return need_weights ? result_like(w, sizes_of(w)) : nothing(x); };
  auto bias_of = [&](int64_t count) { return need_weights ? empty({count}, x.scalar_type(), x) : nothing(x); };
  std::tuple grads{weight_like(w1), bias_of(shape.hidden), weight_like(w2), bias_of(shape.hidden), weight_like(w3),
                   bias_of(shape.out)};
  const int64_t width = shape.is_double ? 8 : 4;
  const int64_t rows = need_weights ? std::max<int64_t>(1, job.groups()) : 0;
  const Scratch partials = make_scratch(rows * job.partial_values() * width);
  if (shape.batch * shape.pixels() == 0)
    std::fill_n(static_cast<char*>(partials.get()), rows * job.partial_values() * width, 0);
  job.partials = partials.get();
  if (shape.batch * shape.pixels() > 0) {
    job.grad = image_of(grad);
    job.x = image_of(x);
    job.h1 = h1.data_ptr();
    job.h2 = h2.data_ptr();
    Packed packed(packed_values(shape), shape.is_double);
    job.w2 = packed.add(w2, order_of(w2, 1, true, false));
    Flags spoilt = flags(job.groups(), !shape.winograd());
    if (shape.winograd()) {
      job.w1 = packed.add_points(w1, order_of(w1, 1, true, false), false);
      job.w3 = packed.add_points(w3, order_of(w3, 1, true, true), true);
      parallel_for(0, job.groups(), 1, [&](int64_t begin, int64_t end) {
        const Scratch scratch = make_scratch(winograd_scratch_values(shape, true, true) * 4);
        FASTFLOW_ISA_CALL(winograd_backward, job, scratch.get(), begin, end, spoilt.get());
      });
      job.mend = true;
    }
    if (any(spoilt, job.groups())) {
      Packed plain(shape.size1() + shape.size3(), shape.is_double);
      job.w1 = plain.add(w1, order_of(w1, 0, false, true));
      job.w3 = plain.add(w3, order_of(w3, 1, true, true));
      parallel_for(0, job.groups(), 1, [&](int64_t begin, int64_t end) {
        const Scratch scratch = make_scratch(job.scratch_values() * width);
        for_each_run(spoilt, begin, end, [&](int64_t from, int64_t to) {
          FASTFLOW_ISA_CALL(conv_net_backward, job, scratch.get(), from, to);
        });
      });
    }
  }
  if (need_weights)
    shape.is_double ? finish(job, static_cast<double*>(partials.get()), grads)
                    : finish(job, static_cast<float*>(partials.get()), grads);
  return grads;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_net_bwd(
    const Tensor& grad, const Tensor& x, const Tensor& w1, const Tensor& w2, const Tensor& w3, const Tensor& h1,
    const Tensor& h2, double slope, bool need_x, bool need_weights) {
  Tensor grad_x = need_x ? result_like(x, sizes_of(x)) : nothing(x);
  return std::tuple_cat(std::tuple{grad_x}, conv_net_gradients(grad, x, w1, w2, w3, h1, h2, slope,
                                                               need_x ? image_of(grad_x) : Image{}, {}, need_weights));
}

}  // namespace fastflow
