// What the host code of spline hands to its kernels.
#pragma once

#include "each_isa.h"
#include "operand.h"

namespace fastflow {

// The elements of a batch are traversed sample by sample in y's memory order. Long samples are cut into blocks of a
// fixed size, short ones are grouped, so that the work of a unit and the order of every sum depend on the shape alone.
struct SplineShape {
  int64_t batch, sample;  // sample: elements of x in one sample
  int64_t bins, params;   // params: raw parameters of one element
  bool is_double, linear, inverse;

  static constexpr int64_t tile = 64, block = 32 * tile;
  bool split() const { return sample > block; }
  int64_t blocks() const { return (sample + block - 1) / block; }
  int64_t group() const { return sample > 0 ? block / sample : block; }  // samples in a unit
  int64_t units() const { return split() ? batch * blocks() : (batch + group() - 1) / group(); }
  int64_t partials() const { return split() ? batch * blocks() : batch; }
  int64_t tile_bytes() const { return params * tile * (is_double ? 8 : 4); }  // of a tile's raw parameters
  // Bytes of working memory: those, and the exponentials of what softmax takes.
  int64_t scratch() const { return tile_bytes() + (linear ? 1 : 2) * bins * tile * (is_double ? 8 : 4); }
};

struct SplineJob {
  SplineShape shape;
  double bound, min_width, min_height, min_derivative, gain, clamp, end_derivative;  // clamp 0: none
  Operand x, params;      // params: the first of each element
  int64_t param_stride;   // from one parameter of an element to the next, in elements
};

struct SplineForward : SplineJob {
  Operand y;
  double* partials;         // sums of the log-slopes
  Operand running, logdet;  // one element per sample; logdet = running + sum
};

struct SplineBackward : SplineJob {
  Operand grad_y, grad_logdet;  // grad_logdet: one element per sample
  Operand grad_x, grad_params;  // grad_params: as params
  int64_t grad_param_stride;
  bool streamed;  // grad_params goes past the caches where it can; scratch has room for another tile of parameters
};

FASTFLOW_EACH_ISA(void spline_forward(const SplineForward& job, int64_t begin, int64_t end, void* scratch);
                  void spline_logdet(const SplineForward& job);
                  void spline_backward(const SplineBackward& job, int64_t begin, int64_t end, void* scratch);)

}  // namespace fastflow
