// activated_conv, sample by sample: a padded copy of its maps, activated on the way, stays in the cache.
#include "activated_conv_kernel.h"

#include "activated_conv_maps.h"
#include "conv_tiles.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

constexpr int64_t longest_piece = 64;  // of a sum's terms

template <class T>
Finish<T> biased(const T* bias) {
  Finish<T> finish;
  finish.bias = bias;
  finish.slope = T(1);
  return finish;
}

// out, adjacent pixels of the coarse map, from a padded fine one.
template <class T>
void gather(const ActivatedConv& shape, const T* padded, const T* w, const T* bias, T* out) {
  const int64_t row = shape.fine_columns() * shape.fine;
  const Runs runs{shape.kernel_height, shape.kernel_width * shape.fine, row};
  const Grid<const T> from{padded, shape.coarse_width, shape.stride * shape.fine, shape.stride * row};
  expand(runs, shape.coarse_pixels(), from, w, shape.coarse, biased(bias),
         Grid<T>{out, shape.coarse_pixels(), shape.coarse, 0}, longest_piece);
}

// out, adjacent pixels of the fine map, from a padded coarse one: a dense convolution for each pair of residues.
template <class T>
void scatter(const ActivatedConv& shape, const T* padded, const T* w, const T* bias, T* out) {
  const int64_t stride = shape.stride, row = shape.coarse_columns() * shape.coarse;
  const auto first = [&](int64_t residue) { return ((residue - shape.padding) % stride + stride) % stride; };
  for (int64_t ry = 0; ry < stride; ++ry)
    for (int64_t rx = 0; rx < stride; ++rx) {
      const int64_t rows = shape.taps(ry, shape.kernel_height), columns = shape.taps(rx, shape.kernel_width);
      const int64_t y = first(ry), height = (shape.fine_height - y + stride - 1) / stride;
      const int64_t x = first(rx), width = (shape.fine_width - x + stride - 1) / stride;
      if (height > 0 && width > 0) {
        const T* const corner = padded + ((y + shape.padding) / stride - rows + 1 + shape.margin_rows()) * row +
                                ((x + shape.padding) / stride - columns + 1 + shape.margin_columns()) * shape.coarse;
        const Grid<T> to{out + (y * shape.fine_width + x) * shape.fine, width, stride * shape.fine,
                         stride * shape.fine_width * shape.fine};
        if (shape.wide()) {
          expand({rows, columns * shape.coarse, row}, height * width, Grid<const T>{corner, width, shape.coarse, row},
                 w, shape.fine, biased(bias), to, longest_piece);
        } else {
          for (int64_t i = 0; i < height; ++i) {
            const TapRows<T> taps{corner + i * row, rows, row, columns, 0, shape.coarse_columns(), shape.coarse, nullptr};
            T* const line = to.first + i * to.row;
            reduce(taps, width, w, rows * columns * shape.coarse, shape.fine, [&](int64_t p, int64_t o, T value) {
              line[p * to.step + o] = bias ? value + bias[o] : value;
            });
          }
        }
      }
      w += rows * columns * shape.coarse * shape.fine;
    }
}

template <class T>
void forward(const ActivatedConvForward& job, void* scratch, int64_t begin, int64_t end) {
  const ActivatedConv& shape = job.shape;
  Arena<T> arena{static_cast<T*>(scratch)};
  const int64_t values = shape.transposed ? shape.coarse_values() : shape.fine_values();
  T* const padded = arena.take(values);
  clear(padded, values);
  const Map<T> x = shape.transposed ? coarse_map(shape, padded) : fine_map(shape, padded);
  const int64_t height = shape.transposed ? shape.fine_height : shape.coarse_height;
  const int64_t width = shape.transposed ? shape.fine_width : shape.coarse_width;
  const int64_t channels = shape.transposed ? shape.fine : shape.coarse;
  const bool direct = lies_like(job.out, height, width, channels);
  T* const own = arena.take(direct ? 0 : height * width * channels);
  const T *const w = static_cast<const T*>(job.weight), *const bias = static_cast<const T*>(job.bias);
  for (int64_t b = begin; b < end; ++b) {
    read(job.x, b, x);
    activate<T>(shape.activation, x, nullptr);
    T* const out = direct ? static_cast<T*>(job.out.data) + b * job.out.sample : own;
    shape.transposed ? scatter(shape, padded, w, bias, out) : gather(shape, padded, w, bias, out);
    if (!direct) write(Map<T>{own, height, width, channels, width * channels}, job.out, b);
  }
}

template <class T>
class Backward {
 public:
  Backward(const ActivatedConvBackward& job, void* scratch)
      : job_(job), shape_(job.shape), fine_values_(shape_.fine_values()), coarse_values_(shape_.coarse_values()) {
    Arena<T> arena{static_cast<T*>(scratch)};
    fine_ = arena.take(job.chunk() * fine_values_);
    coarse_ = arena.take(job.chunk() * coarse_values_);
    clear(fine_, job.chunk() * fine_values_);
    clear(coarse_, job.chunk() * coarse_values_);
    x_height_ = shape_.transposed ? shape_.coarse_height : shape_.fine_height;
    x_width_ = shape_.transposed ? shape_.coarse_width : shape_.fine_width;
    x_channels_ = shape_.transposed ? shape_.coarse : shape_.fine;
    const int64_t values = x_height_ * x_width_ * x_channels_;
    slopes_ = arena.take(values);
    grad_x_ = arena.take(values);
    direct_ = job.need_x && lies_like(job.grad_x, x_height_, x_width_, x_channels_);
  }

  void group(int64_t group) {
    const int64_t end = (group + 1) * shape_.batch / job_.groups();
    for (int64_t b = group * shape_.batch / job_.groups(); b < end; b += job_.chunk()) {
      const int64_t count = end - b < job_.chunk() ? end - b : job_.chunk();
      for (int64_t i = 0; i < count; ++i) maps(b + i, fine_ + i * fine_values_, coarse_ + i * coarse_values_);
      if (job_.need_weights) weights(count, static_cast<T*>(job_.partials) + group * job_.partial_values());
    }
  }

 private:
  // The padded maps of sample b, and the gradient of its x.
  void maps(int64_t b, T* fine, T* coarse) {
    const Map<T> of_fine = fine_map(shape_, fine), of_coarse = coarse_map(shape_, coarse);
    const Map<T>&x = shape_.transposed ? of_coarse : of_fine, &grad = shape_.transposed ? of_fine : of_coarse;
    read(job_.x, b, x);
    read(job_.grad, b, grad);
    activate(shape_.activation, x, job_.need_x ? slopes_ : nullptr);
    if (!job_.need_x) return;
    const T* const w = static_cast<const T*>(job_.weight);
    T* const to = direct_ ? static_cast<T*>(job_.grad_x.data) + b * job_.grad_x.sample : grad_x_;
    shape_.transposed ? gather<T>(shape_, fine, w, nullptr, to) : scatter<T>(shape_, coarse, w, nullptr, to);
    chain_rows(shape_.activation, x, slopes_, x_width_, to);
    if (!direct_) write(Map<T>{to, x_height_, x_width_, x_channels_, x_width_ * x_channels_}, job_.grad_x, b);
  }

  void weights(int64_t count, T* to) {
    const Map<T> fine = fine_map(shape_, fine_), coarse = coarse_map(shape_, coarse_);
    const int64_t row = shape_.fine_columns() * shape_.fine, length = shape_.kernel_width * shape_.fine;
    for (int64_t ky = 0; ky < shape_.kernel_height; ++ky, to += length * shape_.coarse)
      outer({count, shape_.coarse_height, shape_.coarse_width},
            Pixels<T>{fine_ + ky * row, fine_values_, shape_.stride * row, shape_.stride * shape_.fine}, length,
            Pixels<T>{coarse.first, coarse_values_, coarse.row, shape_.coarse}, shape_.coarse, to);
    for (int64_t i = 0; i < count; ++i)
      shape_.transposed ? add_up(fine, i * fine_values_, to) : add_up(coarse, i * coarse_values_, to);
  }

  // to[c] += the sum over a map's pixels.
  void add_up(const Map<T>& map, int64_t offset, T* to) {
    for (int64_t y = 0; y < map.height; ++y) {
      const T* const line = map.first + offset + y * map.row;
      if (map.channels % Simd<T>::lanes == 0) {
        add_pixels(map.width, line, map.channels, to);
        continue;
      }
      for (int64_t c = 0; c < map.channels; ++c) {
        T sum = 0;
        for (int64_t x = 0; x < map.width; ++x) sum += line[x * map.channels + c];
        to[c] += sum;
      }
    }
  }

  const ActivatedConvBackward& job_;
  const ActivatedConv& shape_;
  int64_t fine_values_, coarse_values_, x_height_, x_width_, x_channels_;
  T *fine_, *coarse_, *slopes_, *grad_x_;
  bool direct_;
};

}  // namespace

void activated_conv_forward(const ActivatedConvForward& job, void* scratch, int64_t begin, int64_t end) {
  job.shape.is_double ? forward<double>(job, scratch, begin, end) : forward<float>(job, scratch, begin, end);
}

void activated_conv_backward(const ActivatedConvBackward& job, void* scratch, int64_t begin, int64_t end) {
  const auto run = [&](auto backward) {
    for (int64_t group = begin; group < end; ++group) backward.group(group);
  };
  job.shape.is_double ? run(Backward<double>(job, scratch)) : run(Backward<float>(job, scratch));
}

}  // namespace fastflow::FASTFLOW_ISA
