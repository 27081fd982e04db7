// activated_conv in Winograd's form, some samples at a time.
#include "activated_conv_square.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

bool finite(const T* values, int64_t count) {
  Vec<T> sum{};
  for (int64_t i = 0; i < count; i += Simd<T>::lanes) {
    const Vec<T> x = load(values + i);
    sum += x - x;
  }
  return sum_lanes<T>(sum) == 0;
}

Map<T> plain_coarse_map(const ActivatedConv& shape, T* values) {
  return {values, shape.coarse_height, shape.coarse_width, shape.coarse, shape.coarse_width * shape.coarse};
}

// lines, adjacent pixels of the whole fine map, = a padded one's + bias; zeros where no tap meets them.
void take_fine(const ActivatedConv& shape, T* padded, const T* bias, T* lines) {
  const Map<T> inside = fine_map(shape, padded);
  for (int64_t y = 0; y < shape.fine_height; ++y)
    for (int64_t x = 0; x < shape.fine_width; ++x, lines += shape.fine) {
      const bool met = y < inside.height && x < inside.width;
      const T* const from = inside.first + y * inside.row + x * shape.fine;
      for (int64_t c = 0; c < shape.fine; c += Simd<T>::lanes) {
        Vec<T> value = met ? load(from + c) : Vec<T>{};
        if (bias) value += load(bias + c);
        store(lines + c, value);
      }
    }
}

template <int Taps>
void forward(const ActivatedConvForward& job, void* scratch, int64_t begin, int64_t end, bool* spoilt) {
  const ActivatedConv& shape = job.shape;
  const Plan plan(shape);
  const Square<Taps> square(shape, plan);
  const int64_t most = plan.samples, fine_values = shape.fine_values();
  const int64_t coarse_values = shape.coarse_pixels() * shape.coarse;
  const int64_t out_values = shape.transposed ? shape.fine_pixels() * shape.fine : coarse_values;
  Arena<T> arena{static_cast<T*>(scratch)};
  T* const fine = arena.take(most * fine_values);
  T* const coarse = arena.take(most * coarse_values);
  T* const fine_points = arena.take(plan.points() * plan.fine_step);
  T* const coarse_points = arena.take(plan.points() * plan.coarse_step);
  T* const lines = arena.take(out_values);
  const T *const w = static_cast<const T*>(job.weight), *const bias = static_cast<const T*>(job.bias);
  const Map<T> out = shape.transposed
      ? Map<T>{lines, shape.fine_height, shape.fine_width, shape.fine, shape.fine_width * shape.fine}
      : plain_coarse_map(shape, lines);
  const bool direct = lies_like(job.out, out.height, out.width, out.channels);
  clear(fine, most * fine_values);
  for (int64_t b = begin; b < end; b += most) {
    const int64_t count = end - b < most ? end - b : most;
    if (shape.transposed && b > begin) clear(fine, count * fine_values);
    for (int64_t i = 0; i < count; ++i) {
      const Map<T> x = shape.transposed ? plain_coarse_map(shape, coarse + i * coarse_values)
                                        : fine_map(shape, fine + i * fine_values);
      read(job.x, b + i, x);
      activate<T>(shape.activation, x, nullptr);
    }
    square.for_each_band(count, [&](const auto& band) {
      if (shape.transposed) {
        square.points_of_coarse(band, coarse, coarse_points);
        square.to_fine(band, coarse_points, w, fine_points);
        square.add_to_fine(band, fine_points, fine);
      } else {
        square.points_of_fine(band, fine, fine_points);
        square.to_coarse(band, fine_points, w, coarse_points);
        square.put_coarse(band, coarse_points, bias, coarse);
      }
    });
    for (int64_t i = 0; i < count; ++i) {
      T* const to = direct ? static_cast<T*>(job.out.data) + (b + i) * job.out.sample : lines;
      if (shape.transposed)
        take_fine(shape, fine + i * fine_values, bias, to);
      else
        __builtin_memcpy(to, coarse + i * coarse_values, coarse_values * sizeof(T));
      spoilt[b + i] = !finite(to, out_values);
      if (!direct) write(out, job.out, b + i);
    }
  }
}

template <int Taps>
class Backward {
 public:
  Backward(const ActivatedConvBackward& job, void* scratch)
      : job_(job), shape_(job.shape), plan_(shape_), square_(shape_, plan_),
        most_(plan_.samples), fine_values_(shape_.fine_values()),
        coarse_values_(shape_.coarse_pixels() * shape_.coarse) {
    Arena<T> arena{static_cast<T*>(scratch)};
    fine_ = arena.take(most_ * fine_values_);
    coarse_ = arena.take(most_ * coarse_values_);
    clear(fine_, most_ * fine_values_);
    const int64_t x_values = shape_.transposed ? coarse_values_ : fine_values_;
    slopes_ = arena.take(most_ * x_values);
    grads_ = arena.take(most_ * x_values);
    lines_ = arena.take(shape_.transposed ? coarse_values_ : shape_.fine_pixels() * shape_.fine);
    fine_points_ = arena.take(plan_.points() * plan_.fine_step);
    coarse_points_ = arena.take(plan_.points() * plan_.coarse_step);
    products_ = arena.take(plan_.points() * plan_.step());
    taps_ = arena.take(square_points * shape_.depth() * shape_.coarse);
  }

  // Whether all that came out is finite.
  bool group(int64_t group) {
    T* const sums = static_cast<T*>(job_.partials) + group * job_.partial_values();
    if (job_.need_weights) clear(taps_, square_points * shape_.depth() * shape_.coarse);
    const int64_t end = (group + 1) * shape_.batch / job_.groups();
    bool all = true;
    for (int64_t b = group * shape_.batch / job_.groups(); b < end; b += most_)
      all &= samples(b, end - b < most_ ? end - b : most_, sums);
    if (!job_.need_weights) return all;
    put_taps(sums);
    return all && finite(sums, job_.partial_values());
  }

 private:
  bool samples(int64_t b, int64_t count, T* sums) {
    const bool transposed = shape_.transposed;
    const int64_t x_values = transposed ? coarse_values_ : fine_values_;
    for (int64_t i = 0; i < count; ++i) {
      const Map<T> fine = fine_map(shape_, fine_ + i * fine_values_);
      const Map<T> coarse = plain_coarse_map(shape_, coarse_ + i * coarse_values_);
      const Map<T>&x = transposed ? coarse : fine, &grad = transposed ? fine : coarse;
      read(job_.x, b + i, x);
      read(job_.grad, b + i, grad);
      activate(shape_.activation, x, job_.need_x ? slopes_ + i * x_values : nullptr);
      if (!job_.need_weights) continue;
      for (int64_t y = 0; y < grad.height; ++y)
        add_pixels(grad.width, grad.first + y * grad.row, grad.channels, sums + shape_.weight_values());
    }
    if (job_.need_x && !transposed) clear(grads_, count * fine_values_);
    square_.for_each_band(count, [&](const auto& band) {
      if (job_.need_weights || transposed) square_.points_of_fine(band, fine_, fine_points_);
      if (job_.need_weights || !transposed) square_.points_of_coarse(band, coarse_, coarse_points_);
      if (job_.need_weights) square_.add_taps(band, fine_points_, coarse_points_, taps_);
      if (!job_.need_x) return;
      const T* const w = static_cast<const T*>(job_.weight);
      if (transposed) {
        square_.to_coarse(band, fine_points_, w, products_);
        square_.put_coarse(band, products_, nullptr, grads_);
      } else {
        square_.to_fine(band, coarse_points_, w, products_);
        square_.add_to_fine(band, products_, grads_);
      }
    });
    bool all = true;
    if (job_.need_x)
      for (int64_t i = 0; i < count; ++i) all &= put_grad(b + i, i, x_values);
    return all;
  }

  bool put_grad(int64_t b, int64_t i, int64_t x_values) {
    const bool transposed = shape_.transposed;
    const Map<T> x = transposed ? plain_coarse_map(shape_, coarse_ + i * coarse_values_)
                                : fine_map(shape_, fine_ + i * fine_values_);
    const int64_t height = transposed ? shape_.coarse_height : shape_.fine_height;
    const int64_t width = transposed ? shape_.coarse_width : shape_.fine_width;
    const Map<T> lines{lines_, height, width, x.channels, width * x.channels};
    const bool direct = lies_like(job_.grad_x, height, width, x.channels);
    T* const to = direct ? static_cast<T*>(job_.grad_x.data) + b * job_.grad_x.sample : lines_;
    if (transposed)
      __builtin_memcpy(to, grads_ + i * coarse_values_, coarse_values_ * sizeof(T));
    else
      take_fine(shape_, grads_ + i * fine_values_, nullptr, to);
    chain_rows(shape_.activation, x, slopes_ + i * x_values, width, to);
    const bool all = finite(to, height * width * x.channels);
    if (!direct) write(lines, job_.grad_x, b);
    return all;
  }

  // The weights' points as taps, residues first in both dimensions.
  void put_taps(T* sums) const {
    const int64_t block = shape_.fine * shape_.coarse, row = shape_.kernel_width * block;
    const int64_t stride = shape_.stride;
    for (int64_t y = 0; y < stride; ++y)
      for (int64_t x = 0; x < stride; ++x)
        taps_of_points<Taps>(taps_ + (y * stride + x) * block, shape_.depth() * shape_.coarse, block,
                             sums + y * row + x * block, stride * row, stride * block);
  }

  const ActivatedConvBackward& job_;
  const ActivatedConv& shape_;
  const Plan plan_;
  const Square<Taps> square_;
  const int64_t most_, fine_values_, coarse_values_;
  T *fine_, *coarse_, *slopes_, *grads_, *lines_, *fine_points_, *coarse_points_, *products_, *taps_;
};

template <int Taps>
void weights(const ActivatedConv& shape, const T* taps, bool gathers, int64_t begin, int64_t end, T* to) {
  const int64_t block = shape.fine * shape.coarse, row = shape.kernel_width * block, stride = shape.stride;
  const int64_t step = shape.depth() * shape.coarse;
  for (int64_t y = 0; y < stride; ++y)
    for (int64_t x = 0; x < stride; ++x) {
      const T* const from = taps + y * row + x * block;
      const int64_t residue = y * stride + x;
      if (gathers)
        tap_points<Taps>(from + begin * shape.coarse, stride * row, stride * block, (end - begin) * shape.coarse,
                         to + residue * block + begin * shape.coarse, step);
      else
        for (int64_t j = begin; j < end; ++j)
          tap_points<Taps>(from + j * shape.fine, stride * row, stride * block, shape.fine,
                           to + j * shape.depth() + residue * shape.fine, step);
    }
}

}  // namespace

int64_t winograd_conv_scratch(const ActivatedConv& shape, bool backward) {
  const Plan plan(shape);
  const int64_t fine = shape.fine_values(), coarse = shape.coarse_pixels() * shape.coarse;
  const int64_t lines = shape.fine_pixels() * shape.fine > coarse ? shape.fine_pixels() * shape.fine : coarse;
  const int64_t points = plan.points() * (plan.fine_step + plan.coarse_step);
  const int64_t maps = plan.samples * (fine + coarse) + lines + points + 12 * 16;
  if (!backward) return maps;
  return maps + 2 * plan.samples * (shape.transposed ? coarse : fine) + plan.points() * plan.step() +
         square_points * shape.depth() * shape.coarse;
}

void winograd_conv_weights(const ActivatedConv& shape, const float* taps, bool gathers, int64_t begin, int64_t end,
                           float* to) {
  shape.dense_taps() == 2 ? weights<2>(shape, taps, gathers, begin, end, to)
                          : weights<3>(shape, taps, gathers, begin, end, to);
}

void winograd_conv_forward(const ActivatedConvForward& job, void* scratch, int64_t begin, int64_t end, bool* spoilt) {
  job.shape.dense_taps() == 2 ? forward<2>(job, scratch, begin, end, spoilt)
                              : forward<3>(job, scratch, begin, end, spoilt);
}

void winograd_conv_backward(const ActivatedConvBackward& job, void* scratch, int64_t begin, int64_t end,
                            bool* spoilt) {
  const auto run = [&](auto backward) {
    for (int64_t group = begin; group < end; ++group) spoilt[group] = !backward.group(group);
  };
  job.shape.dense_taps() == 2 ? run(Backward<2>(job, scratch)) : run(Backward<3>(job, scratch));
}

}  // namespace fastflow::FASTFLOW_ISA
