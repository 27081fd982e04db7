// What the host code of conv_net hands to its kernels.
#pragma once

#include "conv_image.h"
#include "each_isa.h"

namespace fastflow {

struct ConvShape {
  int64_t batch, in, hidden, out, height, width;
  bool is_double;
  double slope;

  // Whether the 3x3 convolutions run in Winograd's form: float32 images of even height and width, from where it was
  // measured to be faster: with fewer channels, or fewer tiles, its transforms cost what they save. float64 keeps the
  // plain sums, whose error is smaller.
  bool winograd() const {
    return !is_double && height % 2 == 0 && width % 2 == 0 && height > 2 && width > 2 && in > 0 && out > 0 &&
           in + out >= 12;
  }
  int64_t pixels() const { return height * width; }
  int64_t size1() const { return 9 * in * hidden; }
  int64_t size2() const { return hidden * hidden; }
  int64_t size3() const { return 9 * out * hidden; }
};

// The size of the chunks in which samples are worked on, of about 256 pixels, so that sums over small images stay in
// registers long.
inline int64_t conv_chunk(const ConvShape& shape) {
  const int64_t samples = shape.pixels() > 0 ? 256 / shape.pixels() : 1;
  const int64_t present = samples > shape.batch ? shape.batch : samples;
  return present < 1 ? 1 : present;
}

// Convolution weights as the kernels read them, the hidden channel innermost, all aligned to 64 bytes. The first and
// the last are (9 taps, channel, hidden) where a kernel expands, (channel, 9 taps, hidden) where it reduces; for a
// gradient with respect to an input the taps are in reverse order. Winograd's form takes 16 points for the 9 taps, and
// (16, hidden, channel) where it reduces; there the taps of the last convolution are in reverse order before the
// points are taken, those of the first are not.
struct ConvForward {
  ConvShape shape;
  Image x, out;
  const void *w1, *b1, *w2, *b2, *w3, *b3;  // expand, (hidden in, hidden out), reduce
  void *h1, *h2;                            // (B, H, W, hidden), or null: not kept
  int64_t scratch_values() const {          // per thread
    return shape.height * (shape.width + 2) * shape.in + (h1 ? 1 : 1 + 2 * shape.pixels()) * shape.hidden + 64;
  }
};

// Samples are dealt to groups, each with sums of its own, in a way that depends on the shape alone, not on threads. A
// group takes its samples in chunks.
struct ConvBackward {
  ConvShape shape;
  Image grad, x, grad_x;
  Image base;                // what is added to the gradient of x, or nothing
  const void *w1, *w2, *w3;  // reduce, (hidden out, hidden in), expand
  const void *h1, *h2;
  bool need_x, need_weights;
  bool mend;       // leave a sample's gradient of x alone that is there and finite
  void* partials;  // groups() rows of partial_values()
  static constexpr int64_t most_groups = 16;

  int64_t chunk() const { return conv_chunk(shape); }
  int64_t groups() const {
    const int64_t chunks = (shape.batch + chunk() - 1) / chunk();
    return chunks < most_groups ? chunks : most_groups;
  }
  int64_t first(int64_t group) const { return group * shape.batch / groups(); }  // sample of a group
  int64_t partial_values() const {  // gradients of w1, w2, w3 (9 taps or hidden, channel, hidden), b1, b2; b3 last
    return shape.size1() + shape.size2() + shape.size3() + 2 * shape.hidden + (shape.out + 15) / 16 * 16;
  }
  int64_t scratch_values() const {  // per thread
    return chunk() * (shape.height * (shape.width + 2) * (shape.in + shape.out) + 2 * shape.pixels() * shape.hidden) +
           shape.hidden + 5 * 16;
  }
};

// Values of working memory per thread of Winograd's form, enough for any instruction set.
inline int64_t winograd_scratch_values(const ConvShape& shape, bool backward, bool own_maps) {
  constexpr int64_t points = 16, line = 16;
  const auto lines = [](int64_t values) { return (values + line - 1) / line * line; };
  const int64_t samples = conv_chunk(shape), pixels = samples * shape.pixels(), tiles = pixels / 4;
  const int64_t small = backward ? shape.in : shape.out, widest = shape.in > shape.out ? shape.in : shape.out;
  const int64_t bordered = samples * (shape.height + 2) * (shape.width + 2);
  return bordered * (lines(shape.in) + (backward ? lines(shape.out) : 0)) +         // inputs
         points * (tiles * lines(backward ? widest : shape.in) + 2 * line) +        // their points
         points * (small * lines(tiles) + 2 * line) + 4 * small * lines(tiles) +    // points of outputs, outputs
         points * (lines(tiles) + 2 * lines(shape.width / 2 + line) + 2 * line) +   // overlapping tiles
         6 * lines(tiles) + shape.hidden + (own_maps ? 2 * pixels * shape.hidden : 0) +
         (backward ? points * (shape.in + shape.out) * shape.hidden : 0) + 24 * line;
}

// The forward passes of samples [begin, end), the backward ones of groups [begin, end). Winograd's form adds and
// subtracts pixels that the convolution never adds, and so makes NaN where infinities should be: it sets `spoilt`, per
// sample or per group, where a result is not finite, and those are for the plain form to compute.
FASTFLOW_EACH_ISA(void conv_net_forward(const ConvForward& job, void* scratch, int64_t begin, int64_t end);
                  void conv_net_backward(const ConvBackward& job, void* scratch, int64_t begin, int64_t end);
                  void winograd_forward(const ConvForward& job, void* scratch, int64_t begin, int64_t end,
                                        bool* spoilt);
                  void winograd_backward(const ConvBackward& job, void* scratch, int64_t begin, int64_t end,
                                         bool* spoilt);
                  // to[c * rows + r] = from[r * step + c], c < columns.
                  void turn(int64_t rows, int64_t columns, const float* from, int64_t step, float* to);
                  // to[r * step + c] = from[c * rows + r], c < columns.
                  void turn_back(int64_t rows, int64_t columns, const float* from, float* to, int64_t step);
                  // The 16 points of taps[9][outer][inner], in all a multiple of 16 values; of a convolution that
                  // expands, whose inner are its hidden channels, in the order that it reads them in.
                  void winograd_taps(int64_t outer, int64_t inner, bool expands, const float* taps, float* points);)

}  // namespace fastflow
