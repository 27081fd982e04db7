// What the host code of wide_mlp hands to its kernels: the passes between matrix products.
#pragma once

#include <cstdint>

#include "each_isa.h"

namespace fastflow {

enum class LayerActivation : int64_t { none, relu, silu };

// silu of values in place, and its slopes if they are wanted.
struct WideMlpSilu {
  bool is_double;
  void *values, *slopes;  // slopes or null
};

// grad (rows, columns), plus `added` if there is one, times the activation's slope, in place, and its sums over the
// rows.
struct WideMlpBackward {
  int64_t rows, columns;
  LayerActivation activation;
  bool is_double;
  void* grad;
  const void *values, *slopes;  // of the activation; values of relu, slopes of silu
  const void* added;            // like grad, or null
  void* sums;                   // or null
  static constexpr int64_t block = 64;  // columns that are taken together
  int64_t blocks() const { return (columns + block - 1) / block; }
};

FASTFLOW_EACH_ISA(void wide_mlp_silu(const WideMlpSilu& job, int64_t begin, int64_t end);          // elements
                  void wide_mlp_backward(const WideMlpBackward& job, int64_t begin, int64_t end);)  // blocks

}  // namespace fastflow
