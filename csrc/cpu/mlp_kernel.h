// What the host code of mlp hands to its kernels.
#pragma once

#include <cstdint>

#include "each_isa.h"

namespace fastflow {

// Rows of samples or outputs, strides in elements.
struct MlpMatrix {
  const void* data;
  int64_t row, column;
};

// Fully connected layer `l` of a network: y = W x + b. What is in rows for the kernels has them rounded up to whole
// vectors of any instruction set, MlpShape::padded.
struct MlpLayer {
  MlpMatrix weight;  // (out, in)
  const void* bias;
  int64_t bias_step;
  int64_t in, out;
  int64_t packed;       // where the kernels' copy of its weight begins, and behind it of its bias
  int64_t kept;         // elements to a sample that come before its input in MlpShape::kept; of the first layer none
  int64_t grad_weight, grad_bias;  // where its gradients lie in a group's partial sums: (out, padded(in)), (out,)
};

// A network of `count` layers. Plain: an activation between any two. Residual: the layers between the first and the
// last come in pairs (A, B), h += B act(A act(h)), and the last takes h itself.
struct MlpShape {
  static constexpr int64_t tile = 96;  // samples that go through the network together
  enum Activation : int64_t { relu = 0, silu = 1, tanh = 2 };

  const MlpLayer* layers;
  int64_t count, activation;
  bool residual, is_double;
  int64_t batch, widest;   // samples; the most inputs or outputs of a layer
  int64_t packed;          // elements of all packed weights and biases
  int64_t kept;            // elements kept of a sample: the inputs of layers, each followed by its slopes under silu

  static int64_t padded(int64_t features) { return (features + 15) / 16 * 16; }
  int64_t tiles() const { return (batch + tile - 1) / tile; }
  // Whether what comes into a layer went through the activation.
  bool activated(int64_t layer) const { return layer > 0 && !(residual && layer == count - 1); }
  // Whether a layer's result is added to that of the layer two before it.
  bool adds(int64_t layer) const { return residual && layer > 0 && layer < count - 1 && layer % 2 == 0; }
  bool keeps_slopes(int64_t layer) const { return activation == silu && activated(layer); }
};

struct MlpForward {
  MlpShape shape;
  const void* packed;  // weights transposed, (in, padded(out))
  MlpMatrix x;
  void *y, *kept;      // (batch, out); kept may be null
};

// Tiles are dealt to groups, each with sums of its own, in a way that depends on the batch alone.
struct MlpBackward {
  MlpShape shape;
  const void* packed;  // weights, (out, padded(in))
  MlpMatrix x, grad;
  const void* kept;
  void *grad_x, *partials;  // either may be null
  int64_t sums;             // elements of a group's partial sums
  static constexpr int64_t most_groups = 16, tiles_of_a_group = 2;

  int64_t groups() const {
    const int64_t wanted = (shape.tiles() + tiles_of_a_group - 1) / tiles_of_a_group;
    return wanted < most_groups ? wanted : most_groups;
  }
};

FASTFLOW_EACH_ISA(void mlp_pack(const MlpShape& shape, bool transposed, void* to);
                  int64_t mlp_scratch(const MlpShape& shape);  // bytes of a thread
                  void mlp_forward(const MlpForward& job, void* scratch, int64_t begin, int64_t end);
                  void mlp_backward(const MlpBackward& job, void* scratch, int64_t begin, int64_t end);)

}  // namespace fastflow
