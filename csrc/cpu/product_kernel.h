// What the host code of a matrix product hands to its kernel.
#pragma once

#include <cstdint>

#include "each_isa.h"

namespace fastflow {

// out (m, n), row by row, = A B + bias, and no less than 0 with `relu`: element (i, p) of A (m, k) at a[i * lda + p],
// transposed at a[i + p * lda]; (p, j) of B (k, n) at b[p * b_row + j * b_column].
struct Product {
  int64_t m, n, k;
  bool is_double, a_transposed;
  const void* a;
  int64_t lda;
  const void* b;
  int64_t b_row, b_column;
  const void* bias;  // (n,) or null
  bool relu;
  void* out;

  // A unit of work is one of `chunks` parts of the rows of a panel of the result's columns, four lines of a cache wide
  // or little less: panels alone are too few to share out evenly among threads.
  int64_t chunks;
  static constexpr int64_t line = 64, together = 4;
  int64_t granule() const { return line / (is_double ? 8 : 4); }
  int64_t granules() const { return (n + granule() - 1) / granule(); }
  int64_t panels() const { return (granules() + together - 1) / together; }
  int64_t first_column(int64_t panel) const { return granules() * panel / panels() * granule(); }
  int64_t units() const { return panels() * chunks; }
};

FASTFLOW_EACH_ISA(void product(const Product& job, int64_t begin, int64_t end);)  // units

}  // namespace fastflow
