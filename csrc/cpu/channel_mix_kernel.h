// What the host code of glow_step hands to its kernels of the 1x1 convolution.
#pragma once

#include "conv_image.h"
#include "each_isa.h"

namespace fastflow {

struct MixShape {
  int64_t batch, channels, height, width;
  bool is_double;

  int64_t pixels() const { return height * width; }
  int64_t step() const { return (channels + 15) / 16 * 16; }  // of a matrix's rows, padded with zeros
  int64_t matrix_values() const { return channels * step(); }
};

// y = matrix x + offset along the channels, which are adjacent in both images.
struct MixForward {
  MixShape shape;
  Image x, y;
  const void *matrix, *offset;  // (channel of x, of y), (channel of y) or null; in rows of step(), 64-byte aligned
};

// Samples are dealt to groups, each with sums of its own, in a way that depends on the shape alone, not on threads.
struct MixBackward {
  MixShape shape;
  Image grad, x, grad_x;
  const void* matrix;  // (channel of y, of x)
  bool need_x, need_matrix;
  void* partials;  // groups() rows of the gradients of matrix (channel of y, of x) and offset, in rows of step()
  static constexpr int64_t most_groups = 16, group_values = 8192;

  int64_t groups() const {
    const int64_t values = shape.batch * shape.pixels() * shape.channels, wanted = values / group_values;
    const int64_t most = shape.batch < most_groups ? shape.batch : most_groups;
    return wanted < 1 ? 1 : wanted < most ? wanted : most;
  }
  int64_t first(int64_t group) const { return group * shape.batch / groups(); }  // sample of a group
  int64_t partial_values() const { return shape.matrix_values() + shape.step(); }
};

// The forward pass of samples [begin, end), the backward one of groups [begin, end).
FASTFLOW_EACH_ISA(void mix_forward(const MixForward& job, int64_t begin, int64_t end);
                  void mix_backward(const MixBackward& job, int64_t begin, int64_t end);)

}  // namespace fastflow
