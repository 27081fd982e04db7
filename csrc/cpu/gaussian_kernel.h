// What the host code and the per-instruction-set code of the Gaussian operators agree on.
#pragma once

#include "each_isa.h"
#include "operand.h"

namespace fastflow::gaussian {

// How elements are dealt out. A row is what one sum runs over: a sample of the batch or one of its channels. Long rows
// are cut into chunks of `chunk` elements, short ones are taken `group` at a time; each such piece is a tile. Nothing
// here depends on the number of threads, and each tile writes its own partial sums.
constexpr int64_t chunk = 1024;
constexpr int64_t short_row = 64, grouped = 512;

struct Tiling {
  int64_t row, rows;              // elements of a row, number of rows
  int64_t group, chunks, pieces;  // rows of a tile (1 if rows are long), tiles of a row, partial sums in all
  int64_t tiles;
};

// Noise that is given, or Philox's, keyed by seeds[b * seed_stride].
struct Noise {
  Operand given;
  const int64_t* seeds;
  int64_t seed_stride;
  uint64_t offset;
};

// Operands have the logical shape (batch, channels, *S), those of samples (K, batch, channels, *S), row-major.
struct Problem {
  bool wide;   // computes in double
  int64_t scale;
  int64_t length, total;  // elements of a sample of the batch, and of the batch
  int64_t samples;        // K, 1 if there is no such dimension
  Tiling tiling;
  Noise noise;
  Operand mean, raw, prior_mean, prior_raw;
};

struct Forward {
  Problem problem;
  bool z_streamed;  // written past the caches
  Operand z;
  void* eps;          // where to save the noise drawn, [samples][total], or null
  void* elementwise;  // KL of every element, or null
  void* kl;           // partial sums, [pieces], or null
  void* logq;         // partial sums of -log q, [samples][pieces], or null
};

// Gradients of a prior that the whole batch shares: summed over blocks of samples first, then over the blocks.
struct PriorSum {
  int64_t block, blocks;
  double *mean, *raw;  // [blocks][length], null where not wanted
};

struct Backward {
  Problem problem;
  bool streamed;                                         // the gradients are written past the caches
  Operand grad_z, grad_kl, grad_logq;                    // may be absent
  Operand to_mean, to_raw, to_prior_mean, to_prior_raw;  // may be absent
  PriorSum prior;
};

}  // namespace fastflow::gaussian

namespace fastflow {

// gaussian_forward and gaussian_backward work on tiles [begin, end). For a shared prior, backward takes two steps:
// gaussian_prior_blocks on tasks (block, tile of a sample) and gaussian_prior_sums on tiles of a sample.
FASTFLOW_EACH_ISA(void gaussian_forward(const gaussian::Forward& f, int64_t begin, int64_t end);
                  void gaussian_backward(const gaussian::Backward& b, int64_t begin, int64_t end);
                  void gaussian_prior_blocks(const gaussian::Backward& b, int64_t begin, int64_t end);
                  void gaussian_prior_sums(const gaussian::Backward& b, int64_t begin, int64_t end);)

}  // namespace fastflow
