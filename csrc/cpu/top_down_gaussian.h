// The two Gaussians of a level, for one latent of a tile of samples: sample, KL divergence and both log-densities,
// forward and backward. For top_down_kernel.cpp alone.
#pragma once

#include "../common/gaussian_map.h"
#include "top_down_kernel.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

constexpr int64_t samples = TopDownJob::tile;

// What the networks say of one latent, and the noise.
template <class T>
struct LatentRows {
  const T *prior_mean, *prior_raw, *mean, *raw, *eps;
};

// q = N(mean, sigma^2) and p; `away` is the mean minus p's, without a rounding where the network says it ("residual").
// Of "ladder": the likelihood's d(log sigma)/d(raw), and the shares that it and the prior have in q's precision.
template <class T>
struct Gaussians {
  gaussian::Sigma<T> p, q;
  T mean, away, likelihood_slope, share, prior_share;
};

template <int scale, LevelMode mode, class T>
FASTFLOW_HD Gaussians<T> gaussians_of(T prior_mean, T prior_raw, T mean, T raw) {
  Gaussians<T> g{};
  g.p = gaussian::sigma_of<scale>(prior_raw);
  if constexpr (mode == LevelMode::residual) {
    g.q = gaussian::sigma_of<scale>(prior_raw + raw);
    g.mean = prior_mean + mean;
    g.away = mean + (prior_mean - prior_mean);  // NaN where the prior's mean is not finite
  } else if constexpr (mode == LevelMode::absolute) {
    g.q = gaussian::sigma_of<scale>(raw);
    g.mean = mean;
    g.away = mean - prior_mean;
  } else {
    const gaussian::Sigma<T> likelihood = gaussian::sigma_of<scale>(raw);
    const T apart = T(2) * (likelihood.log - g.p.log);
    g.share = math::sigmoid(-apart);
    g.prior_share = math::sigmoid(apart);
    g.likelihood_slope = likelihood.log_slope;
    const T lower = apart < T(0) ? likelihood.log : g.p.log;
    g.q = gaussian::sigma_of<gaussian::logstd>(math::fma(T(-0.5), math::softplus(-math::abs(apart)), lower));
    g.mean = mean * g.share + prior_mean * g.prior_share;
    g.away = g.mean - prior_mean;
  }
  return g;
}

// Sums over latents, in double so that their number leaves the error alone.
struct TermRows {
  double *kl, *log_q, *log_p;
};

template <int scale, LevelMode mode, class T>
void sample_row(int64_t n, const LatentRows<T>& in, T* to, const TermRows& terms) {
  const T *prior_mean = in.prior_mean, *prior_raw = in.prior_raw, *mean = in.mean, *raw = in.raw, *eps = in.eps;
  alignas(64) T kl[samples], log_q[samples], log_p[samples];
  FASTFLOW_NO_OVERLAP
  for (int64_t i = 0; i < n; ++i) {
    const Gaussians<T> g = gaussians_of<scale, mode>(prior_mean[i], prior_raw[i], mean[i], raw[i]);
    const T z = math::fma(g.q.value, eps[i], g.mean);
    const T t = (z - prior_mean[i]) / g.p.value;
    to[i] = z;
    kl[i] = gaussian::kl_prior(g.away, g.q.log, T(0), g.p);
    log_q[i] = -math::fma(T(0.5) * eps[i], eps[i], T(gaussian::half_log_two_pi) + g.q.log);
    log_p[i] = -math::fma(T(0.5) * t, t, T(gaussian::half_log_two_pi) + g.p.log);
  }
  for (int64_t i = 0; i < n; ++i) {
    terms.kl[i] += static_cast<double>(kl[i]);
    terms.log_q[i] += static_cast<double>(log_q[i]);
    terms.log_p[i] += static_cast<double>(log_p[i]);
  }
}

// Gradients that come in, by z and by the three terms; the last three null where there is none: their terms are left
// out, since 0 * inf is NaN.
template <class T>
struct IncomingRows {
  const T *z, *kl, *log_q, *log_p;
};

template <class T>
struct OutgoingRows {
  T *prior_mean, *prior_raw, *mean, *raw;
};

// Whether a term is there, by element: gcc makes no loop of vectors with a condition that is the same for all of them.
template <class T>
struct Presence {
  alignas(64) T yes[samples], no[samples] = {};
  constexpr Presence() : yes{} {
    for (T& value : yes) value = T(1);
  }
};
template <class T>
constexpr Presence<T> presence;

template <int scale, LevelMode mode, class T>
void gradient_row(int64_t n, const LatentRows<T>& in, const T* z, const IncomingRows<T>& grad,
                  const OutgoingRows<T>& out) {
  const T *prior_mean = in.prior_mean, *prior_raw = in.prior_raw, *mean = in.mean, *raw = in.raw, *eps = in.eps;
  T *to_prior_mean = out.prior_mean, *to_prior_raw = out.prior_raw, *to_mean = out.mean, *to_raw = out.raw;
  // Something is read in place of what is absent, so that the loop has no branches.
  const T *by_z = grad.z, *by_kl = grad.kl ? grad.kl : by_z;
  const T *by_q = grad.log_q ? grad.log_q : by_z, *by_p = grad.log_p ? grad.log_p : by_z;
  const auto present = [](const T* row) { return row ? presence<T>.yes : presence<T>.no; };
  const T *const kl_present = present(grad.kl), *const q_present = present(grad.log_q),
          *const p_present = present(grad.log_p);
  FASTFLOW_NO_OVERLAP
  for (int64_t i = 0; i < n; ++i) {
    const Gaussians<T> g = gaussians_of<scale, mode>(prior_mean[i], prior_raw[i], mean[i], raw[i]);
    const gaussian::KlSlopes<T> slope = gaussian::kl_prior_slopes(g.away, g.q, T(0), g.p);
    const bool has_kl = kl_present[i] != T(0), has_q = q_present[i] != T(0), has_p = p_present[i] != T(0);
    const T t = (z[i] - prior_mean[i]) / g.p.value, steep = t / g.p.value;
    const T along = by_z[i] - (has_p ? by_p[i] * steep : T(0));
    const T of_mean = along + (has_kl ? by_kl[i] * slope.mean : T(0));
    const T of_raw = along * eps[i] * g.q.slope + (has_kl ? by_kl[i] * slope.raw : T(0)) -
                     (has_q ? by_q[i] * g.q.log_slope : T(0));
    T of_prior_mean = (has_kl ? by_kl[i] * slope.prior_mean : T(0)) + (has_p ? by_p[i] * steep : T(0));
    T of_prior_raw = (has_kl ? by_kl[i] * slope.prior_raw : T(0)) +
                     (has_p ? by_p[i] * (t * steep * g.p.slope - g.p.log_slope) : T(0));
    if constexpr (mode == LevelMode::ladder) {
      const T across = T(2) * g.share * g.prior_share * (mean[i] - prior_mean[i]) * of_mean;
      to_mean[i] = g.share * of_mean;
      to_raw[i] = (of_raw * g.share - across) * g.likelihood_slope;
      of_prior_mean += g.prior_share * of_mean;
      of_prior_raw += (of_raw * g.prior_share + across) * g.p.log_slope;
    } else {
      to_mean[i] = of_mean;
      to_raw[i] = of_raw;
      if constexpr (mode == LevelMode::residual) {
        of_prior_mean += of_mean;
        of_prior_raw += of_raw;
      }
    }
    to_prior_mean[i] = of_prior_mean;
    to_prior_raw[i] = of_prior_raw;
  }
}

// The functions of a level's scale and mode.
template <class T>
struct LatentFunctions {
  decltype(&sample_row<0, LevelMode::residual, T>) sample;
  decltype(&gradient_row<0, LevelMode::residual, T>) gradient;
};

template <int scale, class T>
LatentFunctions<T> latent_functions_of(LevelMode mode) {
  static constexpr LatentFunctions<T> table[] = {
      {sample_row<scale, LevelMode::residual, T>, gradient_row<scale, LevelMode::residual, T>},
      {sample_row<scale, LevelMode::absolute, T>, gradient_row<scale, LevelMode::absolute, T>},
      {sample_row<scale, LevelMode::ladder, T>, gradient_row<scale, LevelMode::ladder, T>}};
  return table[static_cast<int>(mode)];
}

template <class T>
LatentFunctions<T> latent_functions(int64_t scale, LevelMode mode) {
  using F = decltype(&latent_functions_of<0, T>);
  static constexpr F table[gaussian::scale_count] = {latent_functions_of<0, T>, latent_functions_of<1, T>,
                                                     latent_functions_of<2, T>, latent_functions_of<3, T>,
                                                     latent_functions_of<4, T>};
  return table[scale](mode);
}

}  // namespace
}  // namespace fastflow::FASTFLOW_ISA
