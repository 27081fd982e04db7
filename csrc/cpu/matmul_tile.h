// The register-tiled matrix product of small networks on a tile of samples. Compiled once per instruction set:
// everything is in namespace FASTFLOW_ISA.
//
// Activations lie feature by feature, samples side by side in the lanes of vectors, so that a layer of one or two
// features wastes no lane; weights are read one by one and broadcast, with any strides, so that neither a layout nor a
// transposition of theirs needs a copy.
#pragma once

#include "slogdet_gemm.h"

namespace fastflow::FASTFLOW_ISA {

#if defined(__AVX512F__)
constexpr int matmul_vectors = 4;  // 6 x 4 accumulators of 32 registers
#else
constexpr int matmul_vectors = 2;  // 6 x 2 of 16
#endif
#if defined(__AVX512F__) || defined(__AVX2__)
constexpr int matmul_rows = 6;
#else
constexpr int matmul_rows = 4;  // leaves room for the product that lacks a fused add
#endif

// Element (i, p) at data[i * row + p * column].
template <class T>
struct Strided {
  const T* data;
  int64_t row, column;
};

// The same where one stride is 1, known to the compiler, whose loop then keeps fewer addresses.
template <class T>
struct ByRow {
  const T* data;
  int64_t row;
  static constexpr int64_t column = 1;
};
template <class T>
struct ByColumn {
  const T* data;
  int64_t column;
  static constexpr int64_t row = 1;
};

struct Nothing {
  template <class... Args>
  inline void operator()(Args...) const {}
};

// A function of its own: inlined into a large one, its sums do not all stay in registers. meanwhile(i, j, p) is called
// before the p-th terms of the block at (i, j) are added: what it does takes no time while multiplications fill it.
template <class T, int M, int N, class A, class Start, class Finish, class Meanwhile = Nothing>
[[gnu::noinline]] static void matmul_block(int64_t i, int64_t j, int64_t k, const A& a, const T* b, int64_t ldb,
                                           const Start& start, const Finish& finish,
                                           const Meanwhile& meanwhile = {}) {
  constexpr int W = Simd<T>::lanes;
  Vec<T> sum[M][N];
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < N; ++c) sum[r][c] = start(i + r, j + c * W);
  const T* factors = a.data + i * a.row;
  const T* row = b + j;
#pragma GCC unroll 1
  for (int64_t p = 0; p < k; ++p, factors += a.column, row += ldb) {
    meanwhile(i, j, p);
    Vec<T> values[N];
#pragma GCC unroll 4
    for (int c = 0; c < N; ++c) values[c] = vec(row + c * W);
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      const Vec<T> factor = splat(factors[r * a.row]);
#pragma GCC unroll 4
      for (int c = 0; c < N; ++c) sum[r][c] += factor * values[c];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < N; ++c) finish(i + r, j + c * W, sum[r][c]);
}

template <class T, int N, class... Args>
static inline void matmul_columns(int64_t m, int64_t j, const Args&... args) {
  int64_t i = 0;
  for (; i + matmul_rows <= m; i += matmul_rows) matmul_block<T, matmul_rows, N>(i, j, args...);
  if constexpr (matmul_rows > 4) {
    if (i + 4 <= m) {
      matmul_block<T, 4, N>(i, j, args...);
      i += 4;
    }
  }
  if (i + 2 <= m) {
    matmul_block<T, 2, N>(i, j, args...);
    i += 2;
  }
  if (i < m) matmul_block<T, 1, N>(i, j, args...);
}

// start(i, j) + A B, handed vector by vector to finish(i, j, value): A (m, k) of any strides, B (k, n) in rows of ldb
// elements, aligned and n a whole number of vectors. The terms of a sum are added in order.
template <class T, class A, class Start, class Finish, class... Meanwhile>
static inline void matmul(int64_t m, int64_t n, int64_t k, const A& a, const T* b, int64_t ldb, const Start& start,
                          const Finish& finish, const Meanwhile&... meanwhile) {
  constexpr int W = Simd<T>::lanes;
  int64_t j = 0;
  for (; j + matmul_vectors * W <= n; j += matmul_vectors * W)
    matmul_columns<T, matmul_vectors>(m, j, k, a, b, ldb, start, finish, meanwhile...);
  if constexpr (matmul_vectors > 2) {
    if (j + 2 * W <= n) {
      matmul_columns<T, 2>(m, j, k, a, b, ldb, start, finish, meanwhile...);
      j += 2 * W;
    }
  }
  if (j < n) matmul_columns<T, 1>(m, j, k, a, b, ldb, start, finish, meanwhile...);
}

// to (n, m) = the transpose of from (m, n); both in whole squares of vectors, in rows of ldf and ldt elements.
template <class T>
static inline void transpose_tile(int64_t m, int64_t n, const T* from, int64_t ldf, T* to, int64_t ldt) {
  constexpr int W = Simd<T>::lanes;
  for (int64_t i = 0; i < m; i += W)
    for (int64_t j = 0; j < n; j += W) {
      Vec<T> x[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) x[r] = vec(from + (i + r) * ldf + j);
      transpose<T>(x);
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) vec(to + (j + r) * ldt + i) = x[r];
    }
}

// to, in rows of ld elements, = from (rows, columns), zeros behind.
template <class T>
static inline void copy_padded(Strided<T> from, int64_t rows, int64_t columns, T* to, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i, from.data += from.row, to += ld) {
    if (from.column == 1)
      for (int64_t j = 0; j < columns; ++j) to[j] = from.data[j];
    else
      for (int64_t j = 0; j < columns; ++j) to[j] = from.data[j * from.column];
    for (int64_t j = columns; j < ld; ++j) to[j] = T(0);
  }
}

// to, in rows of ld elements, = the transpose of from (rows, columns), zeros behind.
template <class T>
static inline void copy_transposed(const Strided<T>& from, int64_t rows, int64_t columns, T* to, int64_t ld) {
  constexpr int W = Simd<T>::lanes;
  const int64_t squares = from.column == 1 ? columns / W * W : 0;
  int64_t i = 0;
  for (; i + W <= rows; i += W)
    for (int64_t j = 0; j < squares; j += W) {
      Vec<T> x[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) x[r] = load(from.data + (i + r) * from.row + j);
      transpose<T>(x);
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) vec(to + (j + r) * ld + i) = x[r];
    }
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t k = j < squares ? i : 0; k < rows; ++k) to[j * ld + k] = from.data[k * from.row + j * from.column];
    for (int64_t k = rows; k < ld; ++k) to[j * ld + k] = T(0);
  }
}

}  // namespace fastflow::FASTFLOW_ISA
