// What the host code of affine_coupling hands to its kernels.
#pragma once

#include "each_isa.h"
#include "operand.h"

namespace fastflow {

// The elements of a batch are traversed sample by sample in y's memory order. Samples longer than a tile are cut into
// blocks of a fixed size, shorter ones are grouped, so that the work of a unit and the order of every sum depend on
// the shape alone.
struct AffineShape {
  int64_t batch, sample;  // sample: elements of x in one sample
  int64_t passive;        // elements of the passive part of one sample
  bool is_double;
  bool inverse, shift_first;

  static constexpr int64_t tile = 512, block = 32 * tile;
  bool split() const { return sample > tile; }
  int64_t blocks() const { return (sample + block - 1) / block; }
  int64_t group() const { return sample > 0 ? block / sample : block; }  // samples in a unit
  int64_t units() const { return split() ? batch * blocks() : (batch + group() - 1) / group(); }
  int64_t partials() const { return split() ? batch * blocks() : batch; }
};

struct AffineMap {
  int64_t kind;
  double gain, offset, out_gain, clamp, eps, hard_min, hard_max, shift_gain;
};

struct AffineForward {
  AffineShape shape;
  AffineMap map;
  Operand x, raw, shift, y, passive, passive_y;
  double* partials;  // sums of log s
  Operand running, logdet;  // one element per sample; logdet = running +- sum
  bool streamed;            // y goes past the caches where it can
};

struct AffineBackward {
  AffineShape shape;
  AffineMap map;
  Operand grad_y, grad_logdet, x, raw, shift;  // grad_logdet: one element per sample
  Operand grad_x, grad_raw, grad_shift;
  Operand passive_grad_y, passive_grad_x;  // of x's own passive channels; zeros without the former
  bool streamed;  // the gradients go past the caches where they can
};

FASTFLOW_EACH_ISA(void affine_forward(const AffineForward& job, int64_t begin, int64_t end);
                  void affine_logdet(const AffineForward& job);
                  void affine_backward(const AffineBackward& job, int64_t begin, int64_t end);)

}  // namespace fastflow
