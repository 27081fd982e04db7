// Vectors of one instruction set. Compiled once per instruction set: everything is in namespace FASTFLOW_ISA.
#pragma once

#include <cstdint>

namespace fastflow::FASTFLOW_ISA {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <int N>
struct Count {
  static constexpr int value = N;
};

template <class T>
struct IntegerLike;
template <>
struct IntegerLike<float> {
  using type = int32_t;
};
template <>
struct IntegerLike<double> {
  using type = int64_t;
};
template <class T>
struct IntegerLike<const T> : IntegerLike<T> {};

template <class T>
struct Simd {
  using Integer = typename IntegerLike<T>::type;
  typedef T Vec __attribute__((vector_size(vector_bytes), may_alias));
  typedef Integer Lane __attribute__((vector_size(vector_bytes), may_alias));  // comparisons of Vec, row numbers
  static constexpr int lanes = vector_bytes / sizeof(T);
};

template <class T>
using Vec = typename Simd<T>::Vec;

template <class T>
static inline Vec<T>& vec(T* p) {
  return *reinterpret_cast<Vec<T>*>(p);
}

template <class T>
static inline const Vec<T>& vec(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}

template <class T>
static inline Vec<T> splat(T x) {
  return x - Vec<T>{};  // not 0 + x, which would make 0 of -0
}

// Lanes [index(0), index(1), ...] of a, and of b from Simd<T>::lanes on.
template <class T, class V, class Index>
static inline V shuffle(V a, V b, const Index& index) {
  constexpr int W = Simd<T>::lanes;
#if defined(__clang__)
  V result;
#pragma clang loop unroll(full)
  for (int l = 0; l < W; ++l) result[l] = index(l) < W ? a[index(l)] : b[index(l) - W];
  return result;
#else
  typename Simd<T>::Lane lanes{};
#pragma GCC unroll 16
  for (int l = 0; l < W; ++l) lanes[l] = index(l);
  return __builtin_shuffle(a, b, lanes);
#endif
}

// Transposes a square of vectors: blocks of 1, 2, 4, ... change places across the diagonal.
template <class T, int Block = 1>
static inline void transpose(Vec<T> (&x)[Simd<T>::lanes]) {
  constexpr int W = Simd<T>::lanes;
  if constexpr (Block < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (i & Block) continue;
      const Vec<T> a = x[i], b = x[i + Block];
      x[i] = shuffle<T>(a, b, [](int l) { return l & Block ? W + l - Block : l; });
      x[i + Block] = shuffle<T>(a, b, [](int l) { return l & Block ? W + l : l + Block; });
    }
    transpose<T, 2 * Block>(x);
  }
}

// Sum of the lanes, halves first.
template <class T, int Half = Simd<T>::lanes / 2>
static inline T sum_lanes(Vec<T> x) {
  constexpr int W = Simd<T>::lanes;
  x += shuffle<T>(x, x, [](int l) { return (l + Half) % W; });
  if constexpr (Half > 1)
    return sum_lanes<T, Half / 2>(x);
  else
    return x[0];
}

// A vector at an address of any alignment.
template <class T>
static inline Vec<T> load(const T* p) {
  Vec<T> x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

template <class T>
static inline void store(T* p, Vec<T> x) {
  __builtin_memcpy(p, &x, sizeof x);
}

// f with n as a constant, 1 <= n <= Max.
template <int Max, class F>
static inline void with_count(int64_t n, const F& f) {
  if constexpr (Max > 1) {
    if (n < Max) return with_count<Max - 1>(n, f);
  }
  f(Count<Max>{});
}

}  // namespace fastflow::FASTFLOW_ISA
