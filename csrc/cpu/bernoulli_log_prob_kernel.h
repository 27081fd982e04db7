// What the host code of bernoulli_log_prob hands to its kernels.
#pragma once

#include "each_isa.h"
#include "operand.h"

namespace fastflow {

// Rows of `row` elements, one per result. Long ones are cut into chunks, short ones grouped, so that the order of every
// sum depends on the shape alone.
struct BernoulliShape {
  static constexpr int64_t chunk = 2048;  // elements of a tile at most
  int64_t rows, row;
  bool is_double;

  int64_t group() const { return row < chunk ? chunk / row : 1; }  // rows in a tile
  int64_t chunks() const { return (row + chunk - 1) / chunk; }      // tiles in a row
  int64_t tiles() const { return row < chunk ? (rows + group() - 1) / group() : rows * chunks(); }
};

struct BernoulliJob {
  BernoulliShape shape;
  Operand x, logits;  // both over all rows in one order of traversal; x repeats
};

struct BernoulliForward : BernoulliJob {
  double* partials;  // [rows][chunks]
};

struct BernoulliBackward : BernoulliJob {
  Operand grad, grad_logits;  // grad: one element per row
  bool streamed;              // grad_logits goes past the caches where it can
};

FASTFLOW_EACH_ISA(void bernoulli_forward(const BernoulliForward& job, int64_t begin, int64_t end);
                  void bernoulli_backward(const BernoulliBackward& job, int64_t begin, int64_t end);)

}  // namespace fastflow
