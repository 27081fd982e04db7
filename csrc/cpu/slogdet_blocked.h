// LU with partial pivoting and inverse of one matrix at a time, vectorised along rows, recursive so that nearly all
// work is in gemm at every level of the cache. P A = L U, A^-1 = U^-1 (L^-1 P).
#pragma once

#include "slogdet_gemm.h"
#include "slogdet_load.h"

namespace fastflow::FASTFLOW_ISA {

template <class T>
struct Blocked {
  using uint = typename math::Bits<T>::uint;
  using Integer = typename Simd<T>::Integer;
  using Lane = typename Simd<T>::Lane;
  static constexpr int W = Simd<T>::lanes;
  static constexpr int base_rows = 8;

  int64_t n, ld;
  T *a, *inverse;         // n rows of ld: A, then its factors; the inverse but for the order of its columns
  T *diagonal, *scale;    // u_ii; 1/u_ii, or u_ii itself where `divide`
  T* panel;               // columns being factorised, transposed
  int64_t* row;           // row i of P A is row row[i] of A
  bool odd, singular, nan, divide;

  static int64_t scratch(int64_t n) {
    const int64_t ld = leading_dimension<T>(n), line = round_up(ld * sizeof(T), 64);
    const int64_t panel = W * round_up(n, W) * static_cast<int64_t>(sizeof(T));
    return 2 * n * line + 2 * line + panel + round_up(n * static_cast<int64_t>(sizeof(int64_t)), 64);
  }

  Blocked(int64_t n, void* scratch) : n(n), ld(leading_dimension<T>(n)) {
    char* p = static_cast<char*>(scratch);
    auto take = [&](int64_t bytes) {
      char* start = p;
      p += round_up(bytes, 64);
      return start;
    };
    a = reinterpret_cast<T*>(take(n * ld * sizeof(T)));
    inverse = reinterpret_cast<T*>(take(n * ld * sizeof(T)));
    diagonal = reinterpret_cast<T*>(take(ld * sizeof(T)));
    scale = reinterpret_cast<T*>(take(ld * sizeof(T)));
    panel = reinterpret_cast<T*>(take(W * round_up(n, W) * sizeof(T)));
    row = reinterpret_cast<int64_t*>(take(n * sizeof(int64_t)));
  }

  template <class In>
  void load(const In* in, int64_t row_stride, int64_t column_stride) {
    Lane bad{};
    for (int64_t i = 0; i < n; ++i) {
      T* out = a + i * ld;
      const In* from = in + i * row_stride;
      if (column_stride == 1) {
        for (int64_t j = 0; j < n; ++j) out[j] = convert(from[j], static_cast<T*>(nullptr));
      } else {
        for (int64_t j = 0; j < n; ++j) out[j] = convert(from[j * column_stride], static_cast<T*>(nullptr));
      }
      for (int64_t j = n; j < ld; ++j) out[j] = 0;
      for (int64_t j = 0; j < ld; j += W) bad |= vec(out + j) != vec(out + j);
      row[i] = i;
    }
    nan = false;
    for (int l = 0; l < W; ++l) nan |= bad[l] != 0;
    odd = singular = divide = false;
  }

  void swap_rows(int64_t i, int64_t j) {
    for (int64_t v = 0; v < ld; v += W) {
      const Vec<T> x = vec(a + i * ld + v);
      vec(a + i * ld + v) = vec(a + j * ld + v);
      vec(a + j * ld + v) = x;
    }
    const int64_t r = row[i];
    row[i] = row[j];
    row[j] = r;
    odd = !odd;
  }

  // Columns [begin, end) of one vector's width, all rows below, in a transposed copy: there the pivot search and the
  // elimination run along vectors.
  void factorise_base(int64_t begin, int64_t end) {
    const int64_t rows = n - begin, vectors = round_up(rows, W) / W, width = end - begin;
    const auto column = [&](int64_t j) { return panel + j * vectors * W; };
    for (int64_t v = 0; v < vectors; ++v) {
      Vec<T> x[W];
      for (int i = 0; i < W; ++i) x[i] = v * W + i < rows ? vec(a + (begin + v * W + i) * ld + begin) : Vec<T>{};
      transpose<T>(x);
      for (int j = 0; j < W; ++j) vec(column(j) + v * W) = x[j];
    }
    Lane lane;
    for (int l = 0; l < W; ++l) lane[l] = l;

    for (int64_t k = 0; k < width; ++k) {
      T* const at = column(k);
      const Lane below = lane > Lane{} + static_cast<Integer>(k);
      const int64_t p = find_pivot(at, k, vectors, lane);
      if (p != k) {
        swap_rows(begin + k, begin + p);
        for (int64_t j = 0; j < width; ++j) {
          T* const c = column(j);
          const T x = c[k];
          c[k] = c[p];
          c[p] = x;
        }
      }
      const T pivot = at[k];
      diagonal[begin + k] = pivot;
      if (pivot == 0) {  // nothing to eliminate; the multipliers are the zeros that stand there
        singular = true;
        continue;
      }
      divide |= math::abs(pivot) < math::Bits<T>::tiny;
      // A quotient, so that two equal rows cancel exactly and the matrix is found singular.
      const Vec<T> first = below ? vec(at) / pivot : Vec<T>{};  // the only vector with rows above the pivot
      vec(at) = below ? first : vec(at);
      for (int64_t v = 1; v < vectors; ++v) vec(at + v * W) /= splat(pivot);
      for (int64_t j = k + 1; j < width; ++j) {
        T* const c = column(j);
        const Vec<T> factor = splat(c[k]);
        vec(c) -= first * factor;
        for (int64_t v = 1; v < vectors; ++v) vec(c + v * W) -= vec(at + v * W) * factor;
      }
    }
    for (int64_t v = 0; v < vectors; ++v) {
      Vec<T> x[W];
      for (int j = 0; j < W; ++j) x[j] = vec(column(j) + v * W);
      transpose<T>(x);
      for (int i = 0; i < W && v * W + i < rows; ++i) vec(a + (begin + v * W + i) * ld + begin) = x[i];
    }
  }

  // The first row from k on with the largest magnitude; as integers, magnitudes are ordered with NaN above all.
  static int64_t find_pivot(const T* column, int64_t k, int64_t vectors, Lane lane) {
    const Lane sign = Lane{} + static_cast<Integer>(uint(1) << (8 * sizeof(T) - 1));
    Lane best = reinterpret_cast<Lane>(vec(column)) & ~sign, at = Lane{};
    best = lane < Lane{} + static_cast<Integer>(k) ? Lane{} - 1 : best;
    for (int64_t v = 1; v < vectors; ++v) {
      const Lane x = reinterpret_cast<Lane>(vec(column + v * W)) & ~sign, more = x > best;
      best = more ? x : best;
      at = more ? Lane{} + static_cast<Integer>(v) : at;
    }
    return first_largest<W / 2>(best, at * W + lane);
  }

  template <int Half>
  static int64_t first_largest(Lane best, Lane row) {
    if constexpr (Half == 0) {
      return row[0];
    } else {
      const auto other = [](int l) { return l ^ Half; };
      const Lane b = shuffle<T>(best, best, other), r = shuffle<T>(row, row, other);
      const Lane better = (b > best) | ((b == best) & (r < row));
      return first_largest<Half / 2>(better ? b : best, better ? r : row);
    }
  }

  void factorise(int64_t begin, int64_t end) {
    if (end - begin <= W) return factorise_base(begin, end);
    const int64_t middle = begin + round_up((end - begin) / 2, W), right = (ld_used(end) - middle) / W;
    factorise(begin, middle);
    solve_lower(begin, middle, a + middle, right);
    subtract<Update::subtract_terms>(middle, n, begin, middle, a + middle, right);
    factorise(middle, end);
  }

  static int64_t ld_used(int64_t end) { return round_up(end, W); }

  // rows [begin, end) of b -= A[begin:end, from:to] times rows [from, to) of b.
  template <Update Kind>
  void subtract(int64_t begin, int64_t end, int64_t from, int64_t to, T* b, int64_t nv) {
    gemm<T, Kind>(end - begin, nv, a + begin * ld + from, ld, b + from * ld, ld, b + begin * ld, ld,
                  [=](int64_t, int64_t, int64_t, int64_t) { return Terms{0, to - from}; });
  }

  template <int M, int N>
  static void lower_tile(const T* l, int64_t ld, T* b) {
    Vec<T> x[M][N];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < N; ++j) x[i][j] = vec(b + i * ld + j * W);
#pragma GCC unroll 8
    for (int k = 0; k < M; ++k)
#pragma GCC unroll 8
      for (int i = k + 1; i < M; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < N; ++j) x[i][j] -= l[i * ld + k] * x[k][j];
#pragma GCC unroll 8
    for (int i = 1; i < M; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < N; ++j) vec(b + i * ld + j * W) = x[i][j];
  }

  template <int M, int N>
  static void upper_tile(const T* u, int64_t ld, const T* scale, bool divide, T* b) {
    Vec<T> x[M][N];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < N; ++j) x[i][j] = vec(b + i * ld + j * W);
#pragma GCC unroll 8
    for (int k = M - 1; k >= 0; --k) {
#pragma GCC unroll 2
      for (int j = 0; j < N; ++j) x[k][j] = divide ? x[k][j] / scale[k] : x[k][j] * scale[k];
#pragma GCC unroll 8
      for (int i = 0; i < k; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < N; ++j) x[i][j] -= u[i * ld + k] * x[k][j];
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < N; ++j) vec(b + i * ld + j * W) = x[i][j];
  }

  template <bool Lower, int M = 1>
  void solve_base(int64_t begin, int64_t end, T* b, int64_t nv) const {
    if constexpr (M < base_rows) {
      if (end - begin > M) return solve_base<Lower, M + 1>(begin, end, b, nv);
    }
    const T* factor = a + begin * ld + begin;
    T* at = b + begin * ld;
    int64_t v = 0;
    for (; v + 2 <= nv; v += 2) {
      if constexpr (Lower)
        lower_tile<M, 2>(factor, ld, at + v * W);
      else
        upper_tile<M, 2>(factor, ld, scale + begin, divide, at + v * W);
    }
    if (v < nv) {
      if constexpr (Lower)
        lower_tile<M, 1>(factor, ld, at + v * W);
      else
        upper_tile<M, 1>(factor, ld, scale + begin, divide, at + v * W);
    }
  }

  static int64_t halfway(int64_t begin, int64_t end) { return begin + round_up((end - begin) / 2, base_rows); }

  // rows [begin, end) of b become L[begin:end, begin:end]^-1 times them.
  void solve_lower(int64_t begin, int64_t end, T* b, int64_t nv) {
    if (end - begin <= base_rows) return solve_base<true>(begin, end, b, nv);
    const int64_t middle = halfway(begin, end);
    solve_lower(begin, middle, b, nv);
    subtract<Update::subtract_terms>(middle, end, begin, middle, b, nv);
    solve_lower(middle, end, b, nv);
  }

  void solve_upper(int64_t begin, int64_t end, T* b, int64_t nv) {
    if (end - begin <= base_rows) return solve_base<false>(begin, end, b, nv);
    const int64_t middle = halfway(begin, end);
    solve_upper(middle, end, b, nv);
    subtract<Update::subtract_sum>(begin, middle, middle, end, b, nv);
    solve_upper(begin, middle, b, nv);
  }

  // Rows [begin, end) of L^-1 in `inverse`, which starts as the identity: column j is zero above row j.
  void invert_lower(int64_t begin, int64_t end) {
    if (end - begin <= base_rows) return solve_base<true>(begin, end, inverse, ld_used(end) / W);
    const int64_t middle = halfway(begin, end);
    invert_lower(begin, middle);
    const auto below_diagonal = [=](int64_t, int64_t, int64_t j, int64_t) {
      return Terms{at_most(middle - begin, at_least(0, j - begin)), middle - begin};
    };
    gemm<T, Update::subtract_sum>(end - middle, ld_used(middle) / W, a + middle * ld + begin, ld, inverse + begin * ld,
                                  ld, inverse + middle * ld, ld, below_diagonal);
    invert_lower(middle, end);
  }

  void invert() {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < ld; ++j) inverse[i * ld + j] = 0;
      inverse[i * ld + i] = 1;
      scale[i] = divide ? diagonal[i] : T(1) / diagonal[i];
    }
    invert_lower(0, n);
    solve_upper(0, n, inverse, ld_used(n) / W);
  }

  template <class Out>
  void write(const SlogdetBatch& batch, int64_t b) {
    double sign = odd ? -1.0 : 1.0;
    double total = 0, lost = 0;  // lost: what rounding took from total
    for (int64_t i = 0; i < n; ++i) {
      nan |= diagonal[i] != diagonal[i];
      if (diagonal[i] < 0) sign = -sign;
    }
    constexpr int64_t group = 32;
    for (int64_t i = 0; i < n; i += group) {
      double part[group];
      const int64_t size = at_most(group, n - i);
      for (int64_t j = 0; j < size; ++j) part[j] = math::abs(static_cast<double>(diagonal[i + j]));
      for (int64_t j = size; j < group; ++j) part[j] = 1;
#pragma omp simd
      for (int64_t j = 0; j < group; ++j) part[j] = math::log(part[j]);
      for (int64_t j = 0; j < size; ++j) {
        const double sum = total + part[j], added = sum - total;
        lost += (total - (sum - added)) + (part[j] - added);
        total = sum;
      }
    }
    if (lost == lost) total += lost;  // Inf - Inf must not hide an infinite sum
    write_result<Out>(batch, b, singular ? 0.0 : sign, total, nan);
    if (batch.inverse == nullptr) return;
    Out* out = static_cast<Out*>(batch.inverse) + b * n * n;
    if (nan || singular || math::abs(total) == math::infinity<double>()) {
      for (int64_t i = 0; i < n * n; ++i) out[i] = math::quiet_nan<Out>();
      return;
    }
    invert();
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) out[i * n + row[j]] = static_cast<Out>(inverse[i * ld + j]);
  }
};

template <class T, class Out>
static void slogdet_blocked(const SlogdetBatch& batch) {
  Blocked<T> matrix(batch.n, batch.scratch);
  for (int64_t b = 0; b < batch.count; ++b) {
    with_element(batch.type, [&]<class In>(In*) {
      matrix.load(static_cast<const In*>(batch.weight) + batch.offset[b], batch.row_stride, batch.column_stride);
    });
    matrix.factorise(0, batch.n);
    matrix.template write<Out>(batch, b);
  }
}

}  // namespace fastflow::FASTFLOW_ISA
