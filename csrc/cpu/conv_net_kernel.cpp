// conv_net, sample by sample: the maps of one sample stay in the second-level cache between its convolutions.
#include "conv_net_kernel.h"

#include <cmath>
#include <cstring>

#include "conv_tiles.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

// One sample of `image` with channels innermost and a column of zeros on either side.
template <class T>
void pad(const Image& image, int64_t b, int64_t channels, int64_t height, int64_t width, T* to) {
  const T* const from = static_cast<const T*>(image.data) + b * image.sample;
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t c = 0; c < channels; ++c) to[c] = to[(width + 1) * channels + c] = 0;
    const T* const row = from + y * image.row;
    if (image.channel == 1) {
      for (int64_t x = 0; x < width; ++x)
        for (int64_t c = 0; c < channels; ++c) to[(x + 1) * channels + c] = row[x * image.column + c];
    } else {
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t x = 0; x < width; ++x) to[(x + 1) * channels + c] = row[x * image.column + c * image.channel];
    }
    to += (width + 2) * channels;
  }
}

// The rows of a 3x3 window around row y that lie inside the image: taps [first, last).
struct Window {
  int64_t first, last;
  Window(int64_t y, int64_t height) : first(y == 0), last(3 - (y == height - 1)) {}
  int64_t rows() const { return last - first; }
};

// 3x3 convolution of a padded sample to the hidden channels of row y.
template <class T>
void expand3x3(const ConvShape& shape, int64_t channels, const T* padded, int64_t y, const T* w,
               const Finish<T>& finish, T* out) {
  const Window window(y, shape.height);
  const int64_t row = (shape.width + 2) * channels;
  expand({window.rows(), 3 * channels, row}, shape.width, padded + (y - 1 + window.first) * row, channels,
         w + window.first * 3 * channels * shape.hidden, shape.hidden, finish, out);
}

template <class T>
void expand1x1(const ConvShape& shape, int64_t pixels, const T* in, const T* w, const Finish<T>& finish, T* out) {
  expand({1, shape.hidden, 0}, pixels, in, shape.hidden, w, shape.hidden, finish, out);
}

// 3x3 convolution of hidden channels to the few of `image`, row y of sample b, plus `base` if there is one. bias may be
// null.
template <class T>
void reduce3x3(const ConvShape& shape, int64_t channels, const T* in, int64_t y, const T* w, const T* bias,
               const T* zeros, const Image& image, const Image& base, int64_t b) {
  const Window window(y, shape.height);
  const int64_t row = shape.width * shape.hidden;
  const TapRows<T> taps{in + (y - 1 + window.first) * row, window.rows(), row, 3, 1, shape.width, shape.hidden, zeros};
  T* const out = static_cast<T*>(image.data) + b * image.sample + y * image.row;
  const T* const under = base.data ? static_cast<const T*>(base.data) + b * base.sample + y * base.row : nullptr;
  reduce(taps, shape.width, w + window.first * 3 * shape.hidden, 9 * shape.hidden, channels,
         [&](int64_t x, int64_t c, T value) {
           if (bias) value += bias[c];
           if (under) value += under[x * base.column + c * base.channel];
           out[x * image.column + c * image.channel] = value;
         });
}

template <class T>
void forward(const ConvForward& job, void* scratch, int64_t begin, int64_t end) {
  const ConvShape& shape = job.shape;
  Arena<T> arena{static_cast<T*>(scratch)};
  T* const padded = arena.take(shape.height * (shape.width + 2) * shape.in);
  T* const zeros = arena.take(shape.hidden);
  for (int64_t j = 0; j < shape.hidden; ++j) zeros[j] = 0;
  const int64_t map = shape.pixels() * shape.hidden;
  T* const own1 = job.h1 ? nullptr : arena.take(map);
  T* const own2 = job.h2 ? nullptr : arena.take(map);
  Finish<T> first, second;
  first.bias = static_cast<const T*>(job.b1);
  second.bias = static_cast<const T*>(job.b2);
  first.slope = second.slope = static_cast<T>(shape.slope);
  for (int64_t b = begin; b < end; ++b) {
    T* const h1 = own1 ? own1 : static_cast<T*>(job.h1) + b * map;
    T* const h2 = own2 ? own2 : static_cast<T*>(job.h2) + b * map;
    pad(job.x, b, shape.in, shape.height, shape.width, padded);
    for (int64_t y = 0; y < shape.height; ++y)
      expand3x3(shape, shape.in, padded, y, static_cast<const T*>(job.w1), first, h1 + y * shape.width * shape.hidden);
    expand1x1(shape, shape.pixels(), h1, static_cast<const T*>(job.w2), second, h2);
    for (int64_t y = 0; y < shape.height; ++y)
      reduce3x3(shape, shape.out, h2, y, static_cast<const T*>(job.w3), static_cast<const T*>(job.b3), zeros, job.out,
                {}, b);
  }
}

// to[(tap, channel)][j] += sum over pixels p of padded[p + tap][channel] v[p][j], over several samples.
template <class T>
void outer3x3(const ConvShape& shape, int64_t samples, int64_t channels, const T* padded, const T* v, T* to) {
  const int64_t row = (shape.width + 2) * channels, v_row = shape.width * shape.hidden;
  for (int64_t ky = 0; ky < 3; ++ky) {
    const int64_t first = ky == 0, rows = shape.height - (ky != 1);  // output rows whose tap lies inside
    if (rows <= 0) continue;
    outer({samples, rows, shape.width},
          Pixels<T>{padded + (first + ky - 1) * row, shape.height * row, row, channels}, 3 * channels,
          Pixels<T>{v + first * v_row, shape.height * v_row, v_row, shape.hidden}, shape.hidden,
          to + ky * 3 * channels * shape.hidden);
  }
}

// to[c] += sum over the pixels of one padded sample.
template <class T>
void add_channels(const ConvShape& shape, const T* padded, T* to) {
  const int64_t channels = shape.out;
  for (int64_t c = 0; c < channels; ++c) {
    T sum = 0;
    for (int64_t y = 0; y < shape.height; ++y) {
      const T* const row = padded + (y * (shape.width + 2) + 1) * channels + c;
      T part = 0;
      for (int64_t x = 0; x < shape.width; ++x) part += row[x * channels];
      sum += part;
    }
    to[c] += sum;
  }
}

template <class T>
class Backward {
 public:
  Backward(const ConvBackward& job, void* scratch)
      : job_(job), shape_(job.shape), map_(shape_.pixels() * shape_.hidden),
        padded_(shape_.height * (shape_.width + 2)) {
    Arena<T> arena{static_cast<T*>(scratch)};
    x_ = arena.take(job.chunk() * padded_ * shape_.in);
    grad_ = arena.take(job.chunk() * padded_ * shape_.out);
    zeros_ = arena.take(shape_.hidden);
    grad1_ = arena.take(job.chunk() * map_);
    grad2_ = arena.take(job.chunk() * map_);
    for (int64_t j = 0; j < shape_.hidden; ++j) zeros_[j] = 0;
  }

  void group(int64_t group) {
    const int64_t end = job_.first(group + 1);
    T* const sums = static_cast<T*>(job_.partials) + group * job_.partial_values();
    if (job_.need_weights) std::memset(sums, 0, job_.partial_values() * sizeof(T));
    for (int64_t b = job_.first(group); b < end; b += job_.chunk()) {
      const int64_t count = end - b < job_.chunk() ? end - b : job_.chunk();
      for (int64_t i = 0; i < count; ++i) maps(b, i);
      if (job_.need_weights) weights(b, count, sums);
    }
  }

 private:
  // The gradients of sample b + i's hidden maps and of its x.
  void maps(int64_t b, int64_t i) {
    T* const grad = grad_ + i * padded_ * shape_.out;
    T *const grad1 = grad1_ + i * map_, *const grad2 = grad2_ + i * map_;
    Finish<T> gate;
    gate.gate_step = shape_.hidden;
    gate.slope = static_cast<T>(shape_.slope);
    pad(job_.grad, b + i, shape_.out, shape_.height, shape_.width, grad);
    for (int64_t y = 0; y < shape_.height; ++y) {
      const int64_t at = y * shape_.width * shape_.hidden;
      gate.gate = static_cast<const T*>(job_.h2) + (b + i) * map_ + at;
      expand3x3(shape_, shape_.out, grad, y, static_cast<const T*>(job_.w3), gate, grad2 + at);
    }
    gate.gate = static_cast<const T*>(job_.h1) + (b + i) * map_;
    expand1x1(shape_, shape_.pixels(), grad2, static_cast<const T*>(job_.w2), gate, grad1);
    if (!job_.need_x || (job_.mend && finite(b + i))) return;
    for (int64_t y = 0; y < shape_.height; ++y)
      reduce3x3(shape_, shape_.in, grad1, y, static_cast<const T*>(job_.w1), static_cast<const T*>(nullptr), zeros_,
                job_.grad_x, job_.base, b + i);
  }

  // Whether sample b's gradient of x, as it stands, is.
  bool finite(int64_t b) const {
    const Image& image = job_.grad_x;
    const T* const x = static_cast<const T*>(image.data) + b * image.sample;
    for (int64_t c = 0; c < shape_.in; ++c)
      for (int64_t p = 0; p < shape_.pixels(); ++p)
        if (!std::isfinite(x[c * image.channel + p / shape_.width * image.row + p % shape_.width * image.column]))
          return false;
    return true;
  }

  void weights(int64_t b, int64_t count, T* to) {
    const T* const h1 = static_cast<const T*>(job_.h1) + b * map_;
    const T* const h2 = static_cast<const T*>(job_.h2) + b * map_;
    for (int64_t i = 0; i < count; ++i)
      pad(job_.x, b + i, shape_.in, shape_.height, shape_.width, x_ + i * padded_ * shape_.in);
    outer3x3(shape_, count, shape_.in, x_, grad1_, to);
    to += shape_.size1();
    const int64_t row = shape_.width * shape_.hidden;
    outer({count, shape_.height, shape_.width}, Pixels<T>{grad2_, map_, row, shape_.hidden}, shape_.hidden,
          Pixels<T>{h1, map_, row, shape_.hidden}, shape_.hidden, to);
    to += shape_.size2();
    outer3x3(shape_, count, shape_.out, grad_, h2, to);
    to += shape_.size3();
    add_pixels(count * shape_.pixels(), grad1_, shape_.hidden, to);
    add_pixels(count * shape_.pixels(), grad2_, shape_.hidden, to + shape_.hidden);
    for (int64_t i = 0; i < count; ++i) add_channels(shape_, grad_ + i * padded_ * shape_.out, to + 2 * shape_.hidden);
  }

  const ConvBackward& job_;
  const ConvShape& shape_;
  int64_t map_, padded_;
  T *x_, *grad_, *zeros_, *grad1_, *grad2_;
};

}  // namespace

void turn(int64_t rows, int64_t columns, const float* from, int64_t step, float* to) {
  constexpr int W = Simd<float>::lanes;
  for (int64_t r = 0; r < rows; r += W) {
    const int64_t present = rows - r < W ? rows - r : W;
    int64_t c = 0;
    for (; c + W <= columns; c += W) {
      Vec<float> x[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) x[i] = i < present ? load(from + (r + i) * step + c) : Vec<float>{};
      transpose<float>(x);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        float* const at = to + (c + i) * rows + r;
        if (present == W) {
          store(at, x[i]);
        } else {
          alignas(64) float lanes[W];
          store(lanes, x[i]);
          int64_t k = 0;
          for (; k + 4 <= present; k += 4) std::memcpy(at + k, lanes + k, 4 * sizeof(float));
          for (; k < present; ++k) at[k] = lanes[k];
        }
      }
    }
    for (; c < columns; ++c)
      for (int64_t i = r; i < r + present; ++i) to[c * rows + i] = from[i * step + c];
  }
}

void turn_back(int64_t rows, int64_t columns, const float* from, float* to, int64_t step) {
  constexpr int W = Simd<float>::lanes;
  for (int64_t r = 0; r < rows; r += W) {
    const int64_t present = rows - r < W ? rows - r : W;
    int64_t c = 0;
    for (; present == W && c + W <= columns; c += W) {
      Vec<float> x[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) x[i] = load(from + (c + i) * rows + r);
      transpose<float>(x);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(to + (r + i) * step + c, x[i]);
    }
    for (; c < columns; ++c)
      for (int64_t i = r; i < r + present; ++i) to[i * step + c] = from[c * rows + i];
  }
}

void conv_net_forward(const ConvForward& job, void* scratch, int64_t begin, int64_t end) {
  job.shape.is_double ? forward<double>(job, scratch, begin, end) : forward<float>(job, scratch, begin, end);
}

void conv_net_backward(const ConvBackward& job, void* scratch, int64_t begin, int64_t end) {
  const auto run = [&](auto backward) {
    for (int64_t group = begin; group < end; ++group) backward.group(group);
  };
  job.shape.is_double ? run(Backward<double>(job, scratch)) : run(Backward<float>(job, scratch));
}

}  // namespace fastflow::FASTFLOW_ISA
