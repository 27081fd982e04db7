// What the host code of activated_conv hands to its kernels.
#pragma once

#include "conv_image.h"
#include "each_isa.h"

namespace fastflow {

enum class ConvActivation : int64_t { none, relu, silu };

// A convolution relates a fine map and a coarse one, of which the lanes of vectors hold the channels:
//   gather   coarse[p] = sum over taps t of w[t] fine[stride p + t]: conv2d forward, the transposed one's grad_x
//   scatter  the transpose of it: conv_transpose2d forward, conv2d's grad_x
// Both kinds of layer have a weight (coarse channels, fine channels, kernel height, kernel width).
struct ActivatedConv {
  int64_t batch, fine, coarse;  // channels of either map
  int64_t fine_height, fine_width, coarse_height, coarse_width, kernel_height, kernel_width, stride, padding;
  ConvActivation activation;
  bool transposed, is_double;

  int64_t weight_values() const { return kernel_height * kernel_width * fine * coarse; }

  // Whether scatter has vectors along the fine channels, too; else along those that it sums over.
  bool wide() const { return fine % 16 == 0; }

  // Seen as a map of stride^2 times as many channels, a fine map meets these taps in each dimension with stride 1.
  int64_t dense_taps() const {
    return kernel_height == kernel_width && kernel_height % stride == 0 ? kernel_height / stride : 0;
  }
  int64_t depth() const { return stride * stride * fine; }

  // Whether it runs in Winograd's form (conv_segments.h). float64 keeps the plain sums, whose error is smaller; the
  // fewer channels a product sums over, the more of its time the transforms are.
  bool winograd() const {
    return !is_double && (dense_taps() == 2 || dense_taps() == 3) && wide() && coarse >= 32 && depth() >= 32 &&
           coarse_height > 1 && coarse_width > 1;
  }

  // Taps of a kernel's length that meet fine positions of one residue modulo the stride.
  int64_t taps(int64_t residue, int64_t kernel) const {
    return residue < kernel ? (kernel - residue + stride - 1) / stride : 0;
  }

  // A padded fine map holds what gather reads, a padded coarse one what scatter reads, with `margin` zeros in front.
  int64_t fine_rows() const { return coarse_height > 0 ? (coarse_height - 1) * stride + kernel_height : 0; }
  int64_t fine_columns() const { return coarse_width > 0 ? (coarse_width - 1) * stride + kernel_width : 0; }
  int64_t margin_rows() const { return (kernel_height - 1) / stride; }
  int64_t margin_columns() const { return (kernel_width - 1) / stride; }
  int64_t coarse_rows() const { return margin_rows() + span(coarse_height, fine_height); }
  int64_t coarse_columns() const { return margin_columns() + span(coarse_width, fine_width); }

  int64_t fine_values() const { return fine_rows() * fine_columns() * fine; }
  int64_t coarse_values() const { return coarse_rows() * coarse_columns() * coarse; }
  int64_t fine_pixels() const { return fine_height * fine_width; }
  int64_t coarse_pixels() const { return coarse_height * coarse_width; }

 private:
  int64_t span(int64_t coarse_size, int64_t fine_size) const {
    const int64_t last = (fine_size - 1 + padding) / stride + 1;
    return last > coarse_size ? last : coarse_size;
  }
};

// Weights as the kernels read them: gather (taps, fine, coarse); scatter, for each pair of residues the taps that meet
// it from the last on, (taps, coarse, fine) if wide, else (fine, taps, coarse).
struct ActivatedConvForward {
  ActivatedConv shape;
  Image x, out;
  const void *weight, *bias;  // bias or null
  int64_t scratch_values() const {  // per thread
    const int64_t maps = shape.transposed ? shape.coarse_values() + shape.fine_pixels() * shape.fine
                                          : shape.fine_values() + shape.coarse_pixels() * shape.coarse;
    return maps + 4 * 16;
  }
};

// Samples are dealt to groups, each with sums of its own, in a way that depends on the shape alone, not on threads.
struct ActivatedConvBackward {
  ActivatedConv shape;
  Image grad, x, grad_x;
  const void* weight;
  bool need_x, need_weights;
  void* partials;  // groups() rows of partial_values(), zeros
  static constexpr int64_t most_groups = 16, chunk_pixels = 64;
  static constexpr int64_t winograd_chunks = 4;  // in a group, at least: it clears and transforms all weights' points

  int64_t chunk() const {
    const int64_t samples = shape.coarse_pixels() > 0 ? (chunk_pixels - 1) / shape.coarse_pixels() + 1 : 1;
    return samples < shape.batch ? samples : shape.batch > 0 ? shape.batch : 1;
  }
  int64_t groups() const {
    const int64_t size = shape.winograd() ? winograd_chunks * chunk() : chunk();
    const int64_t count = (shape.batch + size - 1) / size;
    return count < most_groups ? count : most_groups;
  }
  int64_t partial_values() const {  // gradients of the weight (taps, fine, coarse), and of the bias
    const int64_t bias = shape.transposed ? shape.fine : shape.coarse;
    return shape.weight_values() + (bias + 15) / 16 * 16;
  }
  int64_t scratch_values() const {  // per thread
    const int64_t x_values = shape.transposed ? shape.coarse_pixels() * shape.coarse : shape.fine_pixels() * shape.fine;
    return chunk() * (shape.fine_values() + shape.coarse_values()) + 2 * x_values + 6 * 16;
  }
};

// winograd_conv: the same in Winograd's form, with the points of the weights, (16, residues, fine, coarse) where it
// gathers, (16, coarse, residues, fine) where it scatters, made from taps (fine, coarse) or (coarse, fine). Samples, and
// in backward groups, whose results are not all finite are spoilt: plain sums may be finite there, or NaN in fewer
// places.
FASTFLOW_EACH_ISA(void activated_conv_forward(const ActivatedConvForward& job, void* scratch, int64_t begin,
                                              int64_t end);
                  void activated_conv_backward(const ActivatedConvBackward& job, void* scratch, int64_t begin,
                                               int64_t end);
                  int64_t winograd_conv_scratch(const ActivatedConv& shape, bool backward);
                  void winograd_conv_weights(const ActivatedConv& shape, const float* taps, bool gathers, int64_t begin,
                                             int64_t end, float* to);
                  void winograd_conv_forward(const ActivatedConvForward& job, void* scratch, int64_t begin,
                                             int64_t end, bool* spoilt);
                  void winograd_conv_backward(const ActivatedConvBackward& job, void* scratch, int64_t begin,
                                              int64_t end, bool* spoilt);)

}  // namespace fastflow
