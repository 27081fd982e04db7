// The register-tiled matrix product that LU, inverse and PLU assembly are made of. Compiled once per instruction set:
// everything is in namespace FASTFLOW_ISA.
#pragma once

#include <cstdint>

#include "vectors.h"

namespace fastflow::FASTFLOW_ISA {

#if defined(__AVX512F__)
constexpr int tile_rows = 8, tile_vectors = 3;  // 24 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int tile_rows = 4, tile_vectors = 3;  // 12 of 16
#else
constexpr int tile_rows = 4, tile_vectors = 2;  // 8 of 16, room for the product that lacks a fused add
#endif

static inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Row length of a scratch matrix: whole vectors, and rows that do not fall on the same cache sets.
template <class T>
static inline int64_t leading_dimension(int64_t n) {
  const int64_t ld = round_up(n, Simd<T>::lanes);
  return ld * static_cast<int64_t>(sizeof(T)) % 512 == 0 ? ld + 64 / static_cast<int64_t>(sizeof(T)) : ld;
}

// How A B meets C. Taken from C term by term, it errs least where C shrinks on the way, as in the elimination of an
// ill-conditioned matrix; summed by itself first, where it is small beside C.
enum class Update { assign, subtract_terms, subtract_sum };

// C (M rows, N vectors) = A B, or C -= A B, the terms in order.
template <class T, Update Kind, int M, int N>
static void gemm_tile(int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc) {
  constexpr int W = Simd<T>::lanes;
  Vec<T> sum[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j)
      sum[i][j] = Kind == Update::subtract_terms ? vec(c + i * ldc + j * W) : Vec<T>{};
#pragma GCC unroll 1
  for (int64_t p = 0; p < k; ++p) {
    Vec<T> row[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) row[j] = vec(b + p * ldb + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Vec<T> factor = splat(a[i * lda + p]);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        if constexpr (Kind == Update::subtract_terms)
          sum[i][j] -= factor * row[j];
        else
          sum[i][j] += factor * row[j];
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      Vec<T>& to = vec(c + i * ldc + j * W);
      to = Kind == Update::subtract_sum ? to - sum[i][j] : sum[i][j];
    }
}

template <class T, Update Kind, int M = 1, class... Args>
static inline void gemm_rows(int64_t m, int64_t n, Args... args) {
  if constexpr (M < tile_rows) {
    if (m > M) return gemm_rows<T, Kind, M + 1>(m, n, args...);
  }
  if (n == 1) return gemm_tile<T, Kind, M, 1>(args...);
  if constexpr (tile_vectors > 2) {
    if (n == 3) return gemm_tile<T, Kind, M, 3>(args...);
  }
  gemm_tile<T, Kind, M, 2>(args...);
}

struct Terms {
  int64_t begin, end;
};

// C (m rows, nv vectors) = A B, or C -= A B. terms(i, rows, j, columns) says which of B's rows a tile of C needs, so
// that blocks of zeros in triangular operands are skipped.
template <class T, Update Kind, class Range>
static inline void gemm(int64_t m, int64_t nv, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc,
                        const Range& terms) {
  constexpr int W = Simd<T>::lanes;
  for (int64_t j = 0, n = 0; j < nv; j += n) {
    n = nv - j == 4 ? 2 : at_most(tile_vectors, nv - j);
    for (int64_t i = 0; i < m; i += tile_rows) {
      const int64_t rows = at_most(tile_rows, m - i);
      const Terms k = terms(i, rows, j * W, n * W);
      gemm_rows<T, Kind>(rows, n, k.end - k.begin, a + i * lda + k.begin, lda, b + k.begin * ldb + j * W, ldb,
                             c + i * ldc + j * W, ldc);
    }
  }
}

}  // namespace fastflow::FASTFLOW_ISA
