// What the host code and the per-instruction-set code of top_down agree on.
#pragma once

#include "mlp_flow_kernel.h"

namespace fastflow {

// A fully connected network of a level. The values of its linears, and their slopes, lie one after the other in the
// level's block, each rounded up to whole lines, from the rows `values` and `slopes` on.
struct LevelNetwork {
  const FlowLinear* linears;
  int64_t count;
  Activation activation;
  bool residual;  // adds the first inputs to the outputs
  int64_t values, slopes;
};

// What a posterior's outputs are, in the order of reference.LEVEL_MODES.
enum class LevelMode : int { residual, absolute, ladder, count };

// One level of latents. Its block has rows of a tile's samples: the state and the features beside it, from `joined` on
// the state and the latents beside it, from `noise` on the noise, then what its networks compute. The last layer of
// `merge` writes into the next block.
struct TopDownLevel {
  LevelMode mode;
  int64_t scale;
  int64_t state, features, latents;
  LevelNetwork prior, posterior, merge;
  int64_t block, joined, noise;  // rows; the last two count from the block's first
  FlowParameter d, eps;          // (batch, features), (batch, latents); eps.data may be null: it is drawn then
  void* grad_d;                  // contiguous, or null
  int64_t z;                     // where its latents begin in TopDownJob::z
  uint64_t offset;               // the first counter of its noise
};

struct TopDownJob : PartialSums {
  static constexpr int64_t tile = FlowJob::tile;

  const TopDownLevel* levels;
  int64_t count, batch;
  int64_t out, last;  // features of the last state, and the row where it lies
  int64_t rows;       // of a tile's blocks together
  int64_t widest, seen, latents, lane_sums;  // the most of: outputs, inputs, latents, sums over lanes of a linear
  uint64_t seed;
  FlowParameter h;  // (batch, state)
  const FlowLinear* linears;  // of all levels, in the order of the parameters
  int64_t largest;            // the most elements of a linear's bias, and of a thin one's weight, in whole lines
  void* saved;      // rows of every tile, or null: its blocks are of two levels then, in turn
  void *next, *z;   // (batch, out); latents (batch, D) of level after level
  void *kl, *log_q, *log_p;  // (count, batch)

  // Backward; z is that of forward.
  FlowParameter grad_next, grad_kl, grad_log_q, grad_log_p;  // data may be null
  const void* grad_z;                                        // like z, or null
  void* grad_h;                                              // contiguous, or null
  // Of each linear the gradients of weight and bias, contiguous, or null. Where one tile is all, they are written at
  // once and there are no partial sums: a pass over all parameters less.
  void* const* gradients;

  bool at_once() const { return gradients != nullptr && tiles() == 1; }
  int64_t tiles() const { return (batch + tile - 1) / tile; }
};

FASTFLOW_EACH_ISA(int64_t top_down_scratch(const TopDownJob& job, bool backward);
                  void top_down_forward(const TopDownJob& job, void* scratch, int64_t begin, int64_t end);
                  void top_down_backward(const TopDownJob& job, void* scratch, int64_t begin, int64_t end);)

}  // namespace fastflow
