// LU with partial pivoting and inverse of small matrices, a vector's worth of them at a time: lane l of every vector
// belongs to matrix l, and pivoting picks rows lane by lane. Always in double.
#pragma once

#include "slogdet_gemm.h"
#include "slogdet_load.h"

namespace fastflow::FASTFLOW_ISA {

struct Lanes {
  static constexpr int W = Simd<double>::lanes;
  static constexpr int inverse_columns = 4;  // solved together, so that a factor is loaded once for all
  using V = Vec<double>;
  using I = Simd<double>::Lane;

  int64_t n;
  V *a, *reciprocal, *factor, *column;   // a: element (i, j) at a[j*n + i]
  V* row;                                // row i of P A is row row[i] of A
  I nan, odd, singular, tiny, infinite;  // lane masks

  static int64_t scratch(int64_t n) {
    return (n * n + (3 + inverse_columns) * n) * static_cast<int64_t>(sizeof(V));
  }

  Lanes(int64_t n, void* scratch) : n(n) {
    a = static_cast<V*>(scratch);
    reciprocal = a + n * n;
    factor = reciprocal + n;
    column = factor + n;
    row = column + n * inverse_columns;
  }

  static I bits(V x) { return reinterpret_cast<I>(x); }
  static V select(I mask, V yes, V no) { return mask ? yes : no; }
  static V magnitude(V x) { return reinterpret_cast<V>(bits(x) & INT64_MAX); }

  // W neighbouring elements.
  static V read(const double* p) {
    V x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
  }
  static V read(const float* p) {
    typedef float Narrow __attribute__((vector_size(vector_bytes / 2)));
    Narrow x;
    __builtin_memcpy(&x, p, sizeof x);
    return __builtin_convertvector(x, V);
  }

  template <class In>
  void load(const In* const* in, int64_t row_stride, int64_t column_stride) {
    nan = I{};
    int64_t element = 0, i = 0, j = 0;
    const auto put = [&](V x) {
      nan |= x != x;
      a[j * n + i] = x;
      if (++j == n) j = 0, ++i;
    };
    if constexpr (sizeof(In) >= sizeof(float)) {
      if (column_stride == 1 && row_stride == n) {
        for (; element + W <= n * n; element += W) {
          V x[W];
          for (int l = 0; l < W; ++l) x[l] = read(in[l] + element);
          transpose<double>(x);
          for (int e = 0; e < W; ++e) put(x[e]);
        }
      }
    }
    for (; element < n * n; ++element) {
      const int64_t at = i * row_stride + j * column_stride;
      V x;
      for (int l = 0; l < W; ++l) x[l] = convert(in[l][at], static_cast<double*>(nullptr));
      put(x);
    }
  }

  void factorise(bool want_inverse) {
    odd = singular = tiny = I{};
    for (int64_t i = 0; i < n; ++i) row[i] = V{} + static_cast<double>(i);
    for (int64_t k = 0; k < n; ++k) {
      V* at = a + k * n;
      // |x| compares as an integer, which puts NaN above all.
      I best = bits(at[k]) & INT64_MAX, p = I{} + k;
      for (int64_t i = k + 1; i < n; ++i) {
        const I key = bits(at[i]) & INT64_MAX, more = key > best;
        best = more ? key : best;
        p = more ? I{} + i : p;
      }
      odd ^= p != k;
      int64_t where[W];
      for (int l = 0; l < W; ++l) where[l] = p[l] * W + l;
      if (want_inverse) {
        swap(row, k, where);
        for (int64_t j = 0; j < k; ++j) swap(a + j * n, k, where);
      }
      const V top = at[k], pivot = take(at, k, where);
      const I zero = pivot == 0;
      singular |= zero;
      tiny |= (magnitude(pivot) < math::Bits<double>::tiny) & ~zero;
      reciprocal[k] = 1.0 / pivot;
      // A quotient, so that two equal rows cancel exactly and the matrix is found singular.
      for (int64_t i = k + 1; i < n; ++i) at[i] = factor[i] = select(zero, V{}, select(p == i, top, at[i]) / pivot);
      int64_t j = k + 1;
      for (; j + 1 < n; j += 2) {
        V *left = a + j * n, *right = left + n;
        const V left_top = left[k], right_top = right[k];
        const V left_row = take(left, k, where), right_row = take(right, k, where);
        for (int64_t i = k + 1; i < n; ++i) {
          const I here = p == i;
          left[i] = select(here, left_top, left[i]) - factor[i] * left_row;
          right[i] = select(here, right_top, right[i]) - factor[i] * right_row;
        }
      }
      if (j < n) {
        V* left = a + j * n;
        const V left_top = left[k], left_row = take(left, k, where);
        for (int64_t i = k + 1; i < n; ++i) left[i] = select(p == i, left_top, left[i]) - factor[i] * left_row;
      }
    }
  }

  // Brings every lane's pivot row to row k of a column.
  static V take(V* at, int64_t k, const int64_t* where) {
    const double* flat = reinterpret_cast<const double*>(at);
    V x;
    for (int l = 0; l < W; ++l) x[l] = flat[where[l]];
    at[k] = x;
    return x;
  }

  // The same, and row k to where the pivot row was.
  static void swap(V* at, int64_t k, const int64_t* where) {
    double* flat = reinterpret_cast<double*>(at);
    const V old = at[k];
    take(at, k, where);
    for (int l = 0; l < W; ++l) flat[where[l]] = old[l];
  }

  static bool any(I mask) {
    int64_t sum = 0;
    for (int l = 0; l < W; ++l) sum |= mask[l];
    return sum != 0;
  }

  template <class Out>
  void write_determinants(const SlogdetBatch& batch, int64_t first, int64_t count) {
    V total{}, lost{};  // lost: what rounding took from total
    I negative = odd;
    infinite = I{};
    for (int64_t k = 0; k < n; ++k) {
      const V u = a[k * n + k];
      nan |= u != u;
      infinite |= magnitude(u) == math::infinity<double>();
      negative ^= u < 0;
      double value[W];
      for (int l = 0; l < W; ++l) value[l] = u[l];
#pragma omp simd
      for (int l = 0; l < W; ++l) value[l] = math::log(math::abs(value[l]));
      V log;
      for (int l = 0; l < W; ++l) log[l] = value[l];
      const V sum = total + log, added = sum - total;
      lost += (total - (sum - added)) + (log - added);
      total = sum;
    }
    // Inf - Inf in `lost` must not hide an infinite sum.
    total = select(lost == lost, total + lost, total);
    for (int64_t l = 0; l < count; ++l)
      write_result<Out>(batch, first + l, singular[l] ? 0.0 : negative[l] ? -1.0 : 1.0, total[l], nan[l] != 0);
  }

  // Columns [c, c + inverse_columns) of U^-1 L^-1, element (i, c + q) at column[i*inverse_columns + q].
  void solve(int64_t c) {
    constexpr int Q = inverse_columns;
    for (int64_t i = 0; i < c; ++i)
      for (int q = 0; q < Q; ++q) column[i * Q + q] = V{};
    for (int64_t i = c; i < n; ++i) {
      V x[Q];
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) x[q] = V{} + (i == c + q ? 1.0 : 0.0);
      for (int64_t k = c; k < i; ++k)
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) x[q] -= a[k * n + i] * column[k * Q + q];
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) column[i * Q + q] = x[q];
    }
    const bool any_tiny = any(tiny);
    for (int64_t i = n - 1; i >= 0; --i) {
      V x[Q];
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) x[q] = column[i * Q + q];
      for (int64_t k = i + 1; k < n; ++k)
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) x[q] -= a[k * n + i] * column[k * Q + q];
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) {
        V y = x[q] * reciprocal[i];
        if (any_tiny) y = select(tiny, x[q] / a[i * n + i], y);
        column[i * Q + q] = y;
      }
    }
  }

  template <class Out>
  void write_inverse(Out* const* out, int64_t count) {
    const I broken = nan | singular | infinite;
    for (int64_t c = 0; c < n; c += inverse_columns) {
      solve(c);
      const int64_t columns = at_most(inverse_columns, n - c);
      for (int64_t q = 0; q < columns; ++q) {
        int64_t to[W];
        for (int l = 0; l < W; ++l) to[l] = static_cast<int64_t>(row[c + q][l]);
        for (int64_t i = 0; i < n; ++i) {
          const V x = select(broken, V{} + math::quiet_nan<double>(), column[i * inverse_columns + q]);
          Out value[W];
          for (int l = 0; l < W; ++l) value[l] = static_cast<Out>(x[l]);
          if (count == W) {
            for (int l = 0; l < W; ++l) out[l][i * n + to[l]] = value[l];
          } else {
            for (int64_t l = 0; l < count; ++l) out[l][i * n + to[l]] = value[l];
          }
        }
      }
    }
  }
};

template <class Out>
static void slogdet_lanes(const SlogdetBatch& batch) {
  constexpr int W = Lanes::W;
  const int64_t n = batch.n;
  Lanes tile(n, batch.scratch);
  for (int64_t first = 0; first < batch.count; first += W) {
    const int64_t count = at_most(W, batch.count - first);
    with_element(batch.type, [&]<class In>(In*) {
      const In* in[W];
      for (int64_t l = 0; l < W; ++l)
        in[l] = static_cast<const In*>(batch.weight) + batch.offset[first + (l < count ? l : 0)];
      tile.load(in, batch.row_stride, batch.column_stride);
    });
    tile.factorise(batch.inverse != nullptr);
    tile.template write_determinants<Out>(batch, first, count);
    if (batch.inverse == nullptr) continue;
    Out* out[W];
    for (int64_t l = 0; l < count; ++l) out[l] = static_cast<Out*>(batch.inverse) + (first + l) * n * n;
    tile.write_inverse(out, count);
  }
}

}  // namespace fastflow::FASTFLOW_ISA
