// What the host code and the per-instruction-set code of the Gaussian operators agree on.
#pragma once

#include <cstdint>

namespace fastflow::gaussian {

enum class Storage { half, bfloat16, float32, float64 };

constexpr int64_t max_rank = 64;  // torch's own limit

// One operand over the logical shape (batch, channels, *S), row-major, with the dims that one stride steps through
// merged: element i of sample k starts k*sample_stride elements into data. Absent operands have no data.
struct Operand {
  char* data;
  Storage storage;
  int64_t rank;  // at least 1
  const int64_t *sizes, *strides;
  int64_t sample_stride;
};

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
  Operand z, eps;     // eps: where to save drawn noise, may be absent
  void* elementwise;  // KL of every element, or null
  void* kl;           // partial sums, [pieces], or null
  void* logq;         // partial sums of -log q, [samples][pieces], or null
};

// Samples of the batch whose prior gradients one task adds up, and tasks of a whole batch at most.
struct PriorSum {
  int64_t block, blocks;
  double *mean, *raw;  // [blocks][length], where wanted
};

struct Backward {
  Problem problem;
  Operand grad_z, grad_kl, grad_logq;                    // may be absent
  Operand to_mean, to_raw, to_prior_mean, to_prior_raw;  // may be absent
  PriorSum prior;                                        // for a prior that the batch shares
};

#if defined(__x86_64__)
#define FASTFLOW_GAUSSIAN_ISA(...)  \
  namespace avx512 { __VA_ARGS__ }  \
  namespace avx2 { __VA_ARGS__ }    \
  namespace baseline { __VA_ARGS__ }
#else
#define FASTFLOW_GAUSSIAN_ISA(...) namespace baseline { __VA_ARGS__ }
#endif

}  // namespace fastflow::gaussian

namespace fastflow {

// Tiles [begin, end); with a shared prior that needs a gradient, the tasks of backward are (block, tile of a sample).
FASTFLOW_GAUSSIAN_ISA(void gaussian_forward(const gaussian::Forward& f, int64_t begin, int64_t end);
                      void gaussian_backward(const gaussian::Backward& b, int64_t begin, int64_t end);)

}  // namespace fastflow
