// conv_net with its 3x3 convolutions in Winograd's form, chunk by chunk of samples, whose maps stay in the second-level
// cache. float32 only.
#include "conv_net_kernel.h"

#include <cmath>
#include <cstring>
#include <initializer_list>

#include "conv_segments.h"
#include "conv_tiles.h"
#include "winograd.h"
#include "winograd_pairs.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

using T = float;
constexpr int W = Simd<T>::lanes;

inline int64_t whole(int64_t n) { return (n + W - 1) / W * W; }

inline Simd<T>::Lane not_finite(Vec<T> x) { return x - x != Vec<T>{}; }

// All bits of the first `count` lanes.
inline Simd<T>::Lane present(int64_t count) {
  Simd<T>::Lane lane;
  for (int l = 0; l < W; ++l) lane[l] = l;
  return lane < static_cast<int32_t>(count < W ? count : W);
}

inline bool any(Simd<T>::Lane lanes) {
  bool result = false;
  for (int l = 0; l < W; ++l) result |= lanes[l] != 0;
  return result;
}

// One side's few channels: where the images lie, with channels innermost in whole vectors and a border of zeros.
class Border {
 public:
  Border(const ConvShape& shape, int64_t channels, int64_t samples, Arena<T>& arena)
      : shape_(shape), channels_(channels), row_((shape.width + 2) * whole(channels)),
        data_(arena.take(samples * rows() * row_)) {
    std::memset(data_, 0, samples * rows() * row_ * sizeof(T));
  }

  int64_t step() const { return whole(channels_); }
  const T* data() const { return data_; }

  void read(const Image& image, int64_t b, int64_t count) {
    // Whole vectors may be read where what follows a pixel in memory is the image's next pixels.
    const bool dense = image.channel == 1 && image.column >= channels_ && image.row >= shape_.width * image.column;
    const int64_t behind = (shape_.width - 1) * image.column + channels_;  // of the values of the next row
    for (int64_t s = 0; s < count; ++s)
      for (int64_t y = 0; y < shape_.height; ++y) {
        const T* const from = static_cast<const T*>(image.data) + (b + s) * image.sample + y * image.row;
        T* const to = data_ + (s * rows() + y + 1) * row_ + step();
        if (dense && y + 1 < shape_.height && behind >= step()) {
          for (int64_t x = 0; x < shape_.width; ++x)
            for (int64_t c = 0; c < channels_; c += W)
              store(to + x * step() + c, masked<T>(load(from + x * image.column + c), present(channels_ - c)));
        } else {
          for (int64_t x = 0; x < shape_.width; ++x)
            for (int64_t c = 0; c < channels_; ++c) to[x * step() + c] = from[x * image.column + c * image.channel];
        }
      }
  }

  // to[c] += sum over all pixels, in whole vectors of channels.
  void add_pixels_to(int64_t count, T* to) const {
    for (int64_t y = 0; y < count * rows(); ++y) add_pixels(shape_.width + 2, data_ + y * row_, step(), to);
  }

 private:
  int64_t rows() const { return shape_.height + 2; }

  const ConvShape& shape_;
  int64_t channels_, row_;
  T* data_;
};

// What both directions share: the chunk's tiles, and the step from many channels to few.
class Chunk {
 public:
  Chunk(const ConvShape& shape, int64_t few, int64_t most_few, Arena<T>& arena)
      : shape_(shape), all_{conv_chunk(shape), shape.height / 2, shape.width / 2}, few_(few) {
    const int64_t tiles = all_.count(), padded = whole(tiles);
    at_ = reinterpret_cast<int64_t*>(arena.take(2 * tiles));
    for_each_tile(all_, 0, tiles, [&](int64_t t, int64_t pixel) { at_[t] = pixel * shape.hidden; });
    for (auto* mask : {&near_.above, &near_.below, &near_.left, &near_.right})
      *mask = reinterpret_cast<Neighbours<T>::Integer*>(arena.take(padded));
    near_.fill(all_, padded);
    zeros_ = arena.take(shape.hidden);
    std::memset(zeros_, 0, shape.hidden * sizeof(T));
    input_step_ = point_step<T>(tiles * whole(most_few));
    inputs_ = arena.take(points * input_step_);
    output_step_ = point_step<T>(few * padded);
    outputs_ = arena.take(points * output_step_);
    result_ = arena.take(4 * few * padded);
    grid_ = arena.take(points * point_step<T>(padded + 2 * ((all_.columns + W) / W * W)));
  }

  void begin(int64_t samples) { tiles_ = {samples, all_.rows, all_.columns}; }

  void points_of(const Border& images) { input_points(tiles_, images.step(), images.data(), inputs_, input_step_); }

  void expand3x3(const Border& images, int64_t channels, const void* taps, const Finish<T>& finish, T* out) {
    const auto run = [&](const auto& expand) {
      expand(tiles_, at_, channels, inputs_, input_step_, images.step(), static_cast<const T*>(taps), shape_.hidden,
             finish, out);
    };
    if constexpr (expands_in_pairs)
      run([](const auto&... args) { expand_pairs(args...); });
    else
      run([](const auto&... args) { expand_points(args...); });
  }

  void outer3x3(const Border& images, int64_t channels, const T* maps, bool fresh, T* to) {
    outer_points(tiles_, at_, channels, inputs_, input_step_, images.step(), maps, shape_.hidden,
                 fresh, to);
  }

  // Writes sample b and those after it to `image`, added to `base` if there is one; whether they are finite. bias may be
  // null.
  bool reduce3x3(const T* maps, const void* taps, const void* bias, const Image& image, const Image& base, int64_t b) {
    const int64_t padded = whole(tiles_.count());
    reduce_points(tiles_, at_, padded, maps, shape_.hidden, static_cast<const T*>(taps), few_, zeros_, outputs_,
                  output_step_);
    Simd<T>::Lane bad{};
    overlap_points(tiles_, padded, few_, outputs_, output_step_, near_, grid_,
                   [&](int64_t c, int pixel, int64_t t, Vec<T> value) {
                     if (bias) value += static_cast<const T*>(bias)[c];
                     bad |= not_finite(value);
                     store(result_ + (pixel * few_ + c) * padded + t, value);
                   });
    write(image, base, b, padded);
    return !any(bad);
  }

  // Of sample number s of those that reduce3x3 wrote last.
  bool finite(int64_t s) const {
    const int64_t padded = whole(tiles_.count()), count = tiles_.of_sample();
    for (int64_t i = 0; i < 4 * few_; ++i)
      for (int64_t t = s * count; t < (s + 1) * count; ++t)
        if (!std::isfinite(result_[i * padded + t])) return false;
    return true;
  }

 private:
  // result_ plus `base` to `image`, a square of W tiles and W channels at a time.
  void write(const Image& image, const Image& base, int64_t b, int64_t padded) const {
    const auto place = [](const Image& at, int64_t sample, int64_t row, int64_t column) {
      return sample * at.sample + 2 * row * at.row + 2 * column * at.column;
    };
    int64_t places[W], under[W], sample = b, row = 0, column = 0;
    for (int64_t t = 0; t < tiles_.count(); t += W) {
      const int64_t tiles = tiles_.count() - t < W ? tiles_.count() - t : W;
      for (int64_t i = 0; i < tiles; ++i) {
        places[i] = place(image, sample, row, column);
        under[i] = base.data ? place(base, sample, row, column) : 0;
        if (++column < tiles_.columns) continue;
        column = 0;
        if (++row < tiles_.rows) continue;
        row = 0;
        ++sample;
      }
      for (int pixel = 0; pixel < 4; ++pixel)
        for (int64_t c = 0; c < few_; c += W) {
          const int64_t channels = few_ - c < W ? few_ - c : W;
          alignas(64) T square[W * W];
          Vec<T> x[W];
#pragma GCC unroll 16
          for (int64_t i = 0; i < W; ++i)
            x[i] = i < channels ? load(result_ + (pixel * few_ + c + i) * padded + t) : Vec<T>{};
          transpose<T>(x);
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) store(square + i * W, x[i]);
          if (base.data) {
            const T* const from = static_cast<const T*>(base.data) + pixel / 2 * base.row + pixel % 2 * base.column;
            for (int64_t i = 0; i < tiles; ++i)
              for (int64_t k = 0; k < channels; ++k) square[i * W + k] += from[under[i] + (c + k) * base.channel];
          }
          T* const to = static_cast<T*>(image.data) + pixel / 2 * image.row + pixel % 2 * image.column;
          for (int64_t i = 0; i < tiles; ++i) {
            int64_t k = 0;
            if (image.channel == 1)
              for (; k + 4 <= channels; k += 4) std::memcpy(to + places[i] + c + k, square + i * W + k, 4 * sizeof(T));
            for (; k < channels; ++k) to[places[i] + (c + k) * image.channel] = square[i * W + k];
          }
        }
    }
  }

  const ConvShape& shape_;
  const Tiles all_;
  const int64_t few_;
  Tiles tiles_{};
  Neighbours<T> near_{};
  int64_t *at_, input_step_, output_step_;
  T *zeros_, *inputs_, *outputs_, *result_, *grid_;
};

// to[9][n] from points[16][n].
void put_taps(int64_t n, const T* points, T* to) { taps_of_points<3>(points, n, n, to, 3 * n, n); }

class WinogradBackward {
 public:
  WinogradBackward(const ConvBackward& job, void* scratch)
      : job_(job), shape_(job.shape), map_(shape_.pixels() * shape_.hidden), arena_{static_cast<T*>(scratch)},
        chunk_(shape_, shape_.in, shape_.in > shape_.out ? shape_.in : shape_.out, arena_),
        x_(shape_, shape_.in, job.chunk(), arena_), grad_(shape_, shape_.out, job.chunk(), arena_),
        grad1_(arena_.take(job.chunk() * map_)), grad2_(arena_.take(job.chunk() * map_)),
        taps1_(arena_.take(points * shape_.in * shape_.hidden)),
        taps3_(arena_.take(points * shape_.out * shape_.hidden)) {}

  // Whether all that came out is finite.
  bool group(int64_t group) {
    T* const sums = static_cast<T*>(job_.partials) + group * job_.partial_values();
    T* const sums2 = sums + shape_.size1();
    T* const sums3 = sums2 + shape_.size2();
    T* const biases = sums3 + shape_.size3();
    if (job_.need_weights) {
      std::memset(sums2, 0, shape_.size2() * sizeof(T));
      std::memset(biases, 0, (job_.partial_values() - (biases - sums)) * sizeof(T));
    }
    fresh_ = true;
    bool finite = true;
    const int64_t end = job_.first(group + 1);
    for (int64_t b = job_.first(group); b < end; b += job_.chunk())
      finite &= samples(b, end - b < job_.chunk() ? end - b : job_.chunk(), sums2, biases);
    if (!job_.need_weights) return finite;
    put_taps(shape_.in * shape_.hidden, taps1_, sums);
    put_taps(shape_.out * shape_.hidden, taps3_, sums3);
    Simd<T>::Lane bad{};
    for (int64_t i = 0; i < job_.partial_values(); i += W) bad |= not_finite(load(sums + i));
    return finite && !any(bad);
  }

 private:
  bool samples(int64_t b, int64_t count, T* sums2, T* biases) {
    const T* const h1 = static_cast<const T*>(job_.h1) + b * map_;
    const T* const h2 = static_cast<const T*>(job_.h2) + b * map_;
    const int64_t pixels = count * shape_.pixels(), hidden = shape_.hidden;
    Finish<T> gate;
    gate.gate_step = hidden;
    gate.slope = static_cast<T>(shape_.slope);
    chunk_.begin(count);
    grad_.read(job_.grad, b, count);
    chunk_.points_of(grad_);
    gate.gate = h2;
    chunk_.expand3x3(grad_, shape_.out, job_.w3, gate, grad2_);
    if (job_.need_weights) {
      chunk_.outer3x3(grad_, shape_.out, h2, fresh_, taps3_);
      grad_.add_pixels_to(count, biases + 2 * hidden);
      add_pixels(pixels, grad2_, hidden, biases + hidden);
    }
    gate.gate = h1;
    expand({1, hidden, 0}, pixels, grad2_, hidden, static_cast<const T*>(job_.w2), hidden, gate, grad1_);
    if (job_.need_weights) {
      outer({1, 1, pixels}, Pixels<T>{grad2_, 0, 0, hidden}, hidden, Pixels<T>{h1, 0, 0, hidden}, hidden, sums2);
      add_pixels(pixels, grad1_, hidden, biases);
      x_.read(job_.x, b, count);
      chunk_.points_of(x_);
      chunk_.outer3x3(x_, shape_.in, grad1_, fresh_, taps1_);
      fresh_ = false;
    }
    return !job_.need_x || chunk_.reduce3x3(grad1_, job_.w1, nullptr, job_.grad_x, job_.base, b);
  }

  const ConvBackward& job_;
  const ConvShape& shape_;
  const int64_t map_;
  Arena<T> arena_;
  Chunk chunk_;
  Border x_, grad_;
  T *grad1_, *grad2_, *taps1_, *taps3_;
  bool fresh_ = true;  // the sums of taps have no terms yet
};

}  // namespace

void winograd_forward(const ConvForward& job, void* scratch, int64_t begin, int64_t end, bool* spoilt) {
  const ConvShape& shape = job.shape;
  const int64_t most = conv_chunk(shape), hidden = shape.hidden, map = shape.pixels() * hidden;
  Arena<T> arena{static_cast<T*>(scratch)};
  Chunk chunk(shape, shape.out, shape.in, arena);
  Border x(shape, shape.in, most, arena);
  T* const own1 = job.h1 ? nullptr : arena.take(most * map);
  T* const own2 = job.h2 ? nullptr : arena.take(most * map);
  Finish<T> first, second;
  first.bias = static_cast<const T*>(job.b1);
  second.bias = static_cast<const T*>(job.b2);
  first.slope = second.slope = static_cast<T>(shape.slope);
  for (int64_t b = begin; b < end; b += most) {
    const int64_t count = end - b < most ? end - b : most;
    T* const h1 = own1 ? own1 : static_cast<T*>(job.h1) + b * map;
    T* const h2 = own2 ? own2 : static_cast<T*>(job.h2) + b * map;
    chunk.begin(count);
    x.read(job.x, b, count);
    chunk.points_of(x);
    chunk.expand3x3(x, shape.in, job.w1, first, h1);
    expand({1, hidden, 0}, count * shape.pixels(), h1, hidden, static_cast<const T*>(job.w2), hidden, second, h2);
    if (!chunk.reduce3x3(h2, job.w3, job.b3, job.out, {}, b))
      for (int64_t s = 0; s < count; ++s) spoilt[b + s] = !chunk.finite(s);
  }
}

void winograd_backward(const ConvBackward& job, void* scratch, int64_t begin, int64_t end, bool* spoilt) {
  WinogradBackward backward(job, scratch);
  for (int64_t group = begin; group < end; ++group) spoilt[group] = !backward.group(group);
}

void winograd_taps(int64_t outer, int64_t inner, bool expands, const float* taps, float* to) {
  const int64_t count = outer * inner;
  if (expands && expands_in_pairs)
    pair_taps(outer, inner, taps, to);
  else if (expands)
    panel_taps(outer, inner, taps, to);
  else
    tap_points<3>(taps, 3 * count, count, count, to, count);
}

}  // namespace fastflow::FASTFLOW_ISA
