// The Gaussian operators' loops over contiguous arrays, compiled once per instruction set.
//
// The structs that functions return by value are taken by value too, and each_element's loops say that nothing overlaps:
// GCC vectorises them all then, which it does not with references to those structs or under `omp simd`.
#pragma once

#include "floats.h"
#include "../common/gaussian_map.h"
#include "gaussian_kernel.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

using gaussian::Problem;

template <class T>
struct Sixteen;
template <>
struct Sixteen<float> {
  using Vector = float __attribute__((vector_size(64)));
};
template <>
struct Sixteen<double> {
  using Vector = double __attribute__((vector_size(128)));
};

// The sum of an array in an order that depends on nothing but its length: 32 running sums, then a tree.
template <class T>
T sum(const T* values, int64_t count) {
  constexpr int width = 16;
  using Vector = typename Sixteen<T>::Vector;
  Vector a{}, b{}, next;
  int64_t i = 0;
  for (; i + 2 * width <= count; i += 2 * width) {
    __builtin_memcpy(&next, values + i, sizeof next);
    a += next;
    __builtin_memcpy(&next, values + i + width, sizeof next);
    b += next;
  }
  if (i < count) {
    T rest[2 * width] = {};
    for (int64_t j = 0; i + j < count; ++j) rest[j] = values[i + j];
    __builtin_memcpy(&next, rest, sizeof next);
    a += next;
    __builtin_memcpy(&next, rest + width, sizeof next);
    b += next;
  }
  a += b;
  T lane[width];
  __builtin_memcpy(lane, &a, sizeof a);
  for (int half = width / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
  return lane[0];
}

// The scales whose loops run in Floats.
template <int scale, class T>
inline constexpr bool by_floats = (scale == gaussian::logvar || scale == gaussian::logstd) && has_floats<T>;

#if defined(__AVX512F__)
// gaussian::exp_parts, in as few instructions as AVX-512 needs.
FASTFLOW_HD gaussian::ExpParts<Floats> exp_parts(Floats x) {
  using B = math::Bits<float>;
  const Floats in_range = larger(B::exp_low, smaller(B::exp_high, x));
  const Floats n = nearest_integer(in_range * Floats(B::log2e)), r = less_multiple_of_ln2(in_range, n);
  const Floats beyond = r * r * math::exp_tail(r), p = r + beyond;
  const Floats half = times_power(Floats(0.5), n);  // 2^n itself overflows before the result does
  const Floats expm1 = Floats(2) * fma(half, p, half - Floats(0.5));
  return {times_power(p + Floats(1), n), expm1, select(n == Floats(0), beyond, expm1 - x)};
}
#endif

template <class T>
struct Params {
  const T *mean, *raw, *prior_mean, *prior_raw;
};

template <class T>
struct Sampled {
  T *z, *kl, *sigma, *log_sigma;
};

// KL, and either z for the noise `eps` or, where it serves more than one sample or log q too, sigma and log sigma.
template <int scale, bool prior, bool keep, class T>
void posterior(const Params<T>& in, const T* eps, int64_t count, const Sampled<T>& out) {
  const T *mean = in.mean, *raw = in.raw, *prior_mean = in.prior_mean, *prior_raw = in.prior_raw;
  T *z = out.z, *kl = out.kl, *sigma = out.sigma, *log_sigma = out.log_sigma;
  each_element<by_floats<scale, T>>(count, [&](int64_t i, auto part) __attribute__((always_inline)) {
    const auto m = part.load(mean + i);
    const auto q = gaussian::sigma_of<scale>(part.load(raw + i));
    if constexpr (prior)
      part.store(kl + i, gaussian::kl_prior(m, q.log, part.load(prior_mean + i),
                                            gaussian::sigma_of<scale>(part.load(prior_raw + i))));
    else
      part.store(kl + i, gaussian::kl_standard(m, q.log));
    if constexpr (keep) {
      part.store(sigma + i, q.value);
      part.store(log_sigma + i, q.log);
    } else {
      part.store(z + i, math::fma(q.value, part.load(eps + i), m));
    }
  });
}

// Gradients that come in: by z, summed over the samples, without and with the noise as a factor, by the KL and by
// log q; null where there is none. `plain` is the common case of one sample, one kl_each for the whole tile and no log
// q: then eps and kl_each stand in place of z_eps and kl.
template <class T>
struct Incoming {
  const T *z, *z_eps, *kl, *logq;
  const T* eps;
  T kl_each;
  bool plain;
};

template <class T>
struct Outgoing {
  T *mean, *raw, *prior_mean, *prior_raw;
};

template <int scale, bool prior, class T>
FASTFLOW_HD gaussian::KlSlopes<T> kl_slopes(T mean, gaussian::Sigma<T> q, T prior_mean, T prior_raw) {
  if constexpr (prior)
    return gaussian::kl_prior_slopes(mean, q, prior_mean, gaussian::sigma_of<scale>(prior_raw));
  else
    return gaussian::kl_standard_slopes(mean, q);
}

template <int scale, bool prior, bool plain, class T>
void gradients(const Params<T>& in, const Incoming<T>& grad, int64_t count, const Outgoing<T>& out) {
  const T *mean = in.mean, *raw = in.raw;
  const T *prior_mean = prior ? in.prior_mean : mean, *prior_raw = prior ? in.prior_raw : raw;
  T *to_mean = out.mean, *to_raw = out.raw, *to_prior_mean = out.prior_mean, *to_prior_raw = out.prior_raw;
  // A gradient that is absent must not meet an infinite slope, since 0 * inf is NaN: its terms are left out. Something
  // is read in its place all the same, so that the loop has no branches.
  const bool has_z = plain || grad.z != nullptr, has_z_eps = plain || grad.z_eps != nullptr;
  const bool has_kl = plain || grad.kl != nullptr, has_logq = !plain && grad.logq != nullptr;
  const T *z = has_z ? grad.z : raw, *z_eps = has_z_eps ? grad.z_eps : raw, *eps = grad.eps;
  const T *kl = has_kl ? grad.kl : raw, *logq = has_logq ? grad.logq : raw;
  const T kl_each = grad.kl_each;
  each_element<by_floats<scale, T>>(count, [&](int64_t i, auto part) __attribute__((always_inline)) {
    using V = decltype(part.load(raw));
    const gaussian::Sigma<V> q = gaussian::sigma_of<scale>(part.load(raw + i));
    const gaussian::KlSlopes<V> slope =
        kl_slopes<scale, prior>(part.load(mean + i), q, part.load(prior_mean + i), part.load(prior_raw + i));
    const V by_z = part.load(z + i), by_z_eps = plain ? by_z * part.load(eps + i) : part.load(z_eps + i);
    const V by_kl = plain ? V(kl_each) : part.load(kl + i);
    const V by_logq = plain ? V(0) : part.load(logq + i) * q.log_slope;
    part.store(to_mean + i, (has_z ? by_z : V(0)) + (has_kl ? by_kl * slope.mean : V(0)));
    part.store(to_raw + i, (has_z_eps ? by_z_eps * q.slope : V(0)) - (has_logq ? by_logq : V(0)) +
                               (has_kl ? by_kl * slope.raw : V(0)));
    if constexpr (prior) {
      part.store(to_prior_mean + i, has_kl ? by_kl * slope.prior_mean : V(0));
      part.store(to_prior_raw + i, has_kl ? by_kl * slope.prior_raw : V(0));
    }
  });
}

// The loops of one scale, with or without a prior. Double, which nobody trains in, goes without the quicker ones.
template <class T>
constexpr bool has_quick_loops = sizeof(T) == sizeof(float);

template <class T>
struct Loops {
  decltype(&posterior<0, false, false, T>) sample, keep;
  decltype(&gradients<0, false, false, T>) gradients, plain_gradients;
};

template <int scale, bool prior, class T>
constexpr Loops<T> loops_for() {
  if constexpr (has_quick_loops<T>)
    return {posterior<scale, prior, false, T>, posterior<scale, prior, true, T>, gradients<scale, prior, false, T>,
            gradients<scale, prior, true, T>};
  else
    return {nullptr, posterior<scale, prior, true, T>, gradients<scale, prior, false, T>, nullptr};
}

template <class T, bool prior>
Loops<T> loops_of(int64_t scale) {
  static constexpr Loops<T> table[gaussian::scale_count] = {loops_for<0, prior, T>(), loops_for<1, prior, T>(),
                                                            loops_for<2, prior, T>(), loops_for<3, prior, T>(),
                                                            loops_for<4, prior, T>()};
  return table[scale];
}

template <class T>
Loops<T> loops_of(const Problem& p) {
  return p.prior_mean.data != nullptr ? loops_of<T, true>(p.scale) : loops_of<T, false>(p.scale);
}

template <class T>
void reparametrise(const T* __restrict mean, const T* __restrict sigma, const T* __restrict eps, int64_t count,
                   T* __restrict z) {
  for (int64_t i = 0; i < count; ++i) z[i] = math::fma(sigma[i], eps[i], mean[i]);
}

template <class T>
void surprise(const T* __restrict log_sigma, const T* __restrict eps, int64_t count, T* __restrict out) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = math::fma(T(0.5) * eps[i], eps[i], T(gaussian::half_log_two_pi) + log_sigma[i]);
}

// Sums over the samples in two levels, so that the error does not grow with their number.
template <class T>
class SampleSum {
 public:
  void add(const T* __restrict a, const T* __restrict b, int64_t k, int64_t count) {
    constexpr int64_t run = 32;
    if (k % run == 0) {
      for (int64_t i = 0; i < count; ++i) {
        total_[i] = k == 0 ? T(0) : total_[i] + recent_[i];
        recent_[i] = b == nullptr ? a[i] : a[i] * b[i];
      }
    } else {
      for (int64_t i = 0; i < count; ++i) recent_[i] += b == nullptr ? a[i] : a[i] * b[i];
    }
  }

  const T* finish(int64_t count) {
    for (int64_t i = 0; i < count; ++i) total_[i] += recent_[i];
    return total_;
  }

 private:
  alignas(64) T recent_[gaussian::chunk], total_[gaussian::chunk];
};

}  // namespace
}  // namespace fastflow::FASTFLOW_ISA
