// What the host code of conv_net hands to its kernels.
#pragma once

#include "conv_image.h"
#include "each_isa.h"

namespace fastflow {

struct ConvShape {
  int64_t batch, in, hidden, out, height, width;
  bool is_double;
  double slope;

  int64_t pixels() const { return height * width; }
  int64_t size1() const { return 9 * in * hidden; }
  int64_t size2() const { return hidden * hidden; }
  int64_t size3() const { return 9 * out * hidden; }
};

// Convolution weights as the kernels read them, the hidden channel innermost, all aligned to 64 bytes. The first and
// the last are (9 taps, channel, hidden) where a kernel expands, (channel, 9 taps, hidden) where it reduces; for a
// gradient with respect to an input the taps are in reverse order.
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
// group takes its samples in chunks of about chunk_pixels, so that sums over small images stay in registers long.
struct ConvBackward {
  ConvShape shape;
  Image grad, x, grad_x;
  const void *w1, *w2, *w3;  // reduce, (hidden out, hidden in), expand
  const void *h1, *h2;
  bool need_x, need_weights;
  void* partials;  // groups() rows of partial_values(), zeros
  static constexpr int64_t most_groups = 16, chunk_pixels = 256;

  int64_t chunk() const {
    const int64_t samples = shape.pixels() > 0 ? chunk_pixels / shape.pixels() : 1;
    const int64_t present = samples > shape.batch ? shape.batch : samples;
    return present < 1 ? 1 : present;
  }
  int64_t groups() const {
    const int64_t chunks = (shape.batch + chunk() - 1) / chunk();
    return chunks < most_groups ? chunks : most_groups;
  }
  int64_t partial_values() const {  // gradients of w1, w2, w3 (9 taps or hidden, channel, hidden), b1, b2; b3 last
    return shape.size1() + shape.size2() + shape.size3() + 2 * shape.hidden + (shape.out + 15) / 16 * 16;
  }
  int64_t scratch_values() const {  // per thread
    return chunk() * (shape.height * (shape.width + 2) * (shape.in + shape.out) + 2 * shape.pixels() * shape.hidden) +
           shape.hidden + 5 * 16;
  }
};

FASTFLOW_EACH_ISA(void conv_net_forward(const ConvForward& job, void* scratch, int64_t begin, int64_t end);
                  void conv_net_backward(const ConvBackward& job, void* scratch, int64_t begin, int64_t end);)

}  // namespace fastflow
