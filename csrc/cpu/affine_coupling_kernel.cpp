// affine_coupling forward and backward over tiles that stay in the first-level cache.
#include "affine_coupling_kernel.h"

#include "../common/scale_map.h"
#include "cursor.h"
#include "sum.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

constexpr int64_t tile = AffineShape::tile;
constexpr int lanes = 16;

template <class T>
struct alignas(64) Tile {
  T values[tile];
};

template <class T>
T add_tree(T* values, int n) {
  for (int width = n / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) values[i] += values[i + width];
  return values[0];
}

// Sum of n <= tile values: 32 running sums, whatever the width of the vectors, then a tree.
template <class T>
T sum_tile(const T* values, int64_t n) {
  if (n == 1) return values[0];
  alignas(64) T sums[2 * lanes] = {};
  typedef T Vector __attribute__((vector_size(lanes * sizeof(T))));
  Vector low = {}, high = {};
  int64_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    Vector a, b;
    __builtin_memcpy(&a, values + i, sizeof a);
    __builtin_memcpy(&b, values + i + lanes, sizeof b);
    low += a;
    high += b;
  }
  __builtin_memcpy(sums, &low, sizeof low);
  __builtin_memcpy(sums + lanes, &high, sizeof high);
  for (int j = 0; i < n; ++i, ++j) sums[j] += values[i];
  return add_tree(sums, 2 * lanes);
}

template <class T>
using ForwardTile = void (*)(const ScaleMap<T>&, int64_t, const T*, const T*, const T*, T*, T*);

template <Kind K, bool Extended, bool Inverse, bool ShiftFirst, class T>
void forward_tile(const ScaleMap<T>& constants, int64_t n, const T* x, const T* raw, const T* shift, T* y, T* log_s) {
  const ScaleMap<T> map = constants;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T r = K == Kind::additive ? T(0) : raw[i];
    const Coupled<T> out = couple<K, Extended, Extended, Inverse, ShiftFirst>(map, x[i], r, shift[i]);
    y[i] = out.y;
    log_s[i] = out.log_s;
  }
}

template <class T>
using BackwardTile = void (*)(const ScaleMap<T>&, int64_t, const T*, const T*, const T*, const T*, const T*, T*, T*, T*);

template <Kind K, bool Extended, bool Inverse, bool ShiftFirst, class T>
void backward_tile(const ScaleMap<T>& constants, int64_t n, const T* grad_y, const T* grad_logdet, const T* x,
                   const T* raw, const T* shift, T* grad_x, T* grad_raw, T* grad_shift) {
  const ScaleMap<T> map = constants;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T r = K == Kind::additive ? T(0) : raw[i];
    const T t = gradient_reads_shift<Inverse, ShiftFirst> ? shift[i] : T(0);
    const CoupledGradient<T> out =
        couple_gradient<K, Extended, Extended, Inverse, ShiftFirst>(map, grad_y[i], grad_logdet[i], x[i], r, t);
    grad_x[i] = out.x;
    if (K != Kind::additive) grad_raw[i] = out.raw;
    grad_shift[i] = out.shift;
  }
}

// Without a gradient in y only log s depends on the raw values, and x must not bring its infinities in.
template <class T>
using LogTile = void (*)(const ScaleMap<T>&, int64_t, T, const T*, const T*, T*);

template <Kind K, bool Extended, class T>
void log_tile(const ScaleMap<T>& constants, int64_t n, T sign, const T* grad_logdet, const T* raw, T* grad_raw) {
  const ScaleMap<T> map = constants;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    grad_raw[i] = sign * grad_logdet[i] * scale_slope<K, Extended, Extended>(map, raw[i]).dlog;
}

// Eps and bounds share one instance: the constants of whichever is absent change nothing.
template <class F>
auto with_kind(const AffineMap& map, const F& f) {
  const bool extended = map.eps != 0. || has_bounds(map.hard_min, map.hard_max);
  auto choose = [&](auto kind) {
    return extended ? f(kind, std_true{}) : f(kind, std_false{});
  };
  switch (static_cast<Kind>(map.kind)) {
    case Kind::exp: return choose(KindIs<Kind::exp>{});
    case Kind::sigmoid: return choose(KindIs<Kind::sigmoid>{});
    case Kind::tanh: return choose(KindIs<Kind::tanh>{});
    case Kind::atan: return choose(KindIs<Kind::atan>{});
    case Kind::softplus: return choose(KindIs<Kind::softplus>{});
    case Kind::rational: return choose(KindIs<Kind::rational>{});
    default: return choose(KindIs<Kind::additive>{});
  }
}

}  // namespace
}  // namespace fastflow::FASTFLOW_ISA
