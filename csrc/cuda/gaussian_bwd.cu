// gaussian_bwd: gradients of the params and the prior; eps is drawn again where it was not kept.
#include "gaussian.cuh"

namespace fastflow {
namespace {

constexpr int64_t kPriorSamples = 64, kPriorChunks = 256;  // of a broadcast prior: samples of a block, blocks at most

// Rows are samples; the layout is in logical order, since the noise follows it.
template <class T>
struct Backward {
  enum { kMean, kRaw, kPriorMean, kPriorRaw, kEps, kGradZ, kGradKl, kGradMean, kGradRaw, kGradPriorMean, kGradPriorRaw,
         kOperands };
  Tiles tiles;
  Operand operand[kOperands];
  Layout<kOperands> layout;
  int64_t eps_sample, grad_z_sample;  // elements along K
  int64_t samples, batch;
  bool kl_spread;  // one KL gradient serves the whole inner axis
  Operand grad_logq;
  int64_t grad_logq_sample;
  Noise noise;
  int scale;
};

template <class T>
struct ElementGradient {
  T mean, raw, prior_mean, prior_raw;
};

// The part of one element's gradients that comes through the KL.
template <int S, class T>
__device__ __forceinline__ ElementGradient<T> through_kl(T gkl, T mean, const gaussian::Sigma<T>& sigma, T prior_mean,
                                                         T prior_raw, bool has_prior) {
  if (!has_prior) {
    const auto slopes = gaussian::kl_standard_slopes(mean, sigma);
    return {gkl * slopes.mean, gkl * slopes.raw, T(0), T(0)};
  }
  const auto slopes = gaussian::kl_prior_slopes(mean, sigma, prior_mean, gaussian::sigma_of<S>(prior_raw));
  return {gkl * slopes.mean, gkl * slopes.raw, gkl * slopes.prior_mean, gkl * slopes.prior_raw};
}

template <class T, int V, int D>
__global__ void __launch_bounds__(kBlock, 2) gaussian_backward(const __grid_constant__ Backward<T> p) {
  using P = Backward<T>;
  const Place place = place_of(p.tiles);
  if (!place.inside) return;
  const bool has_prior = p.operand[P::kPriorMean].data, has_z = p.operand[P::kGradZ].data;
  const bool has_kl = p.operand[P::kGradKl].data, needs_eps = has_z && p.operand[P::kGradRaw].data;
  const uint64_t seed = p.noise.seed_of(place.row);
  T glogq = T(0);
  if (p.grad_logq.data)
    for (int64_t k = 0; k < p.samples; ++k)
      glogq += load<T>(p.grad_logq, k * p.grad_logq_sample + place.row * p.grad_logq.batch);
  for (int64_t item = place.first; item < place.last; item += place.step) {
    int64_t at[P::kOperands];
    locate_item<D != kMixed, V>(p.layout, item, at);
#pragma unroll
    for (int n = 0; n < P::kOperands; ++n) at[n] += place.row * p.operand[n].batch;
    T in[4][V], gkl[V], grad[4][V];  // on their way while the noise is drawn
#pragma unroll
    for (int n = 0; n < 4; ++n) load_values<T, D>(p.operand[n], at[n], in[n]);
    T gz_sum[V], gz_eps[V];
#pragma unroll
    for (int e = 0; e < V; ++e) gz_sum[e] = gz_eps[e] = T(0);
    for (int64_t k = 0; has_z && k < p.samples; ++k) {
      T gz[V], eps[V];
      load_values<T, D>(p.operand[P::kGradZ], at[P::kGradZ] + k * p.grad_z_sample, gz);
      if (needs_eps) {
        const int64_t index = (k * p.batch + place.row) * p.layout.elements + item * V;
        if (p.operand[P::kEps].data) load_values<T, D>(p.operand[P::kEps], at[P::kEps] + k * p.eps_sample, eps);
        else draw(static_cast<uint64_t>(index), p.noise.offset, seed, eps);
      }
#pragma unroll
      for (int e = 0; e < V; ++e) {
        gz_sum[e] += gz[e];
        if (needs_eps) gz_eps[e] += gz[e] * eps[e];
      }
    }
    if (has_kl && p.kl_spread) {
      const Operand& kl = p.operand[P::kGradKl];
      const T one = load<T>(kl, D == kMixed ? at[P::kGradKl] : place.row * kl.batch);
#pragma unroll
      for (int e = 0; e < V; ++e) gkl[e] = one;
    } else {
      load_values<T, D>(p.operand[P::kGradKl], at[P::kGradKl], gkl);
    }
    with_scale(p.scale, [&]<int S>() {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const auto sigma = gaussian::sigma_of<S>(in[1][e]);
        ElementGradient<T> g{T(0), T(0), T(0), T(0)};
        if (has_kl) g = through_kl<S>(gkl[e], in[0][e], sigma, in[2][e], in[3][e], has_prior);
        if (has_z) {
          g.mean += gz_sum[e];
          g.raw = math::fma(gz_eps[e], sigma.slope, g.raw);
        }
        if (p.grad_logq.data) g.raw -= glogq * sigma.log_slope;
        grad[0][e] = g.mean;
        grad[1][e] = g.raw;
        grad[2][e] = g.prior_mean;
        grad[3][e] = g.prior_raw;
      }
    });
#pragma unroll
    for (int n = 0; n < 4; ++n)
      if (p.operand[P::kGradMean + n].data)
        store_values<T, D>(p.operand[P::kGradMean + n], at[P::kGradMean + n], grad[n]);
  }
}

template <class T>
__device__ __forceinline__ void store_prior(const Backward<T>& p, const int64_t (&at)[Backward<T>::kOperands],
                                            double mean, double raw) {
  using P = Backward<T>;
  const Operand &to_mean = p.operand[P::kGradPriorMean], &to_raw = p.operand[P::kGradPriorRaw];
  if (to_mean.data) store<T>(to_mean, at[P::kGradPriorMean], static_cast<T>(mean));
  if (to_raw.data) store<T>(to_raw, at[P::kGradPriorRaw], static_cast<T>(raw));
}

// A prior shared by the batch: an element to a thread, a run of samples to a block. Partial sums are (chunks, 2, n).
template <class T>
__global__ void __launch_bounds__(kBlock, 1)
    prior_backward(const __grid_constant__ Backward<T> p, int64_t chunks, int64_t chunk_samples, double* partial) {
  using P = Backward<T>;
  const int64_t tile = blockIdx.x / chunks, chunk = blockIdx.x - tile * chunks;
  const int64_t element = tile * kBlock + threadIdx.x;
  if (element >= p.layout.elements) return;
  int64_t at[P::kOperands];
  locate(p.layout, element, at);
  const T prior_mean = load<T>(p.operand[P::kPriorMean], at[P::kPriorMean]);
  const T prior_raw = load<T>(p.operand[P::kPriorRaw], at[P::kPriorRaw]);
  const int64_t end = (chunk + 1) * chunk_samples < p.batch ? (chunk + 1) * chunk_samples : p.batch;
  double mean_total = 0, raw_total = 0;
  with_scale(p.scale, [&]<int S>() {
    for (int64_t b = chunk * chunk_samples; b < end; ++b) {
      const auto value = [&](int n) { return load<T>(p.operand[n], at[n] + b * p.operand[n].batch); };
      const auto g = through_kl<S>(value(P::kGradKl), value(P::kMean), gaussian::sigma_of<S>(value(P::kRaw)),
                                   prior_mean, prior_raw, true);
      mean_total += g.prior_mean;
      raw_total += g.prior_raw;
    }
  });
  if (partial) {
    partial[(chunk * 2) * p.layout.elements + element] = mean_total;
    partial[(chunk * 2 + 1) * p.layout.elements + element] = raw_total;
    return;
  }
  store_prior(p, at, mean_total, raw_total);
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    finish_prior(const __grid_constant__ Backward<T> p, int64_t chunks, const double* partial) {
  using P = Backward<T>;
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (element >= p.layout.elements) return;
  int64_t at[P::kOperands];
  locate(p.layout, element, at);
  double mean_total = 0, raw_total = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    mean_total += partial[(chunk * 2) * p.layout.elements + element];
    raw_total += partial[(chunk * 2 + 1) * p.layout.elements + element];
  }
  store_prior(p, at, mean_total, raw_total);
}

// grad_kl as an operand of shape (B, D, *S), with stride 0 along the axes that were summed.
View kl_view_of(const optional<Tensor>& grad_kl, size_t axes) {
  View view;
  if (!grad_kl) return view;
  view.operand = {grad_kl->data_ptr(), grad_kl->stride(0), dtype_of(*grad_kl)};
  view.strides.assign(axes, 0);
  for (int64_t d = 1; d < grad_kl->dim(); ++d) view.strides[d - 1] = grad_kl->stride(d);
  return view;
}

struct Wanted {
  optional<Tensor> params, raw, prior_mean, prior_raw;
};

template <class T>
void backward(const Wanted& to, const optional<Tensor>& grad_z, const optional<Tensor>& grad_kl,
              const optional<Tensor>& grad_logq, const Tensor& params, const optional<Tensor>& raw,
              const optional<Tensor>& prior_mean, const optional<Tensor>& prior_raw, const optional<Tensor>& eps,
              const Noise& noise, int64_t samples, bool has_samples, int64_t scale, int64_t flags, int64_t reduce) {
  using P = Backward<T>;
  const bool packed = !raw;
  const Dims event = event_sizes(params, packed);
  const int64_t batch = params.size(0);
  const bool shared_prior = prior_mean && prior_mean->size(0) == 1 && batch != 1;
  MeanAndRaw own = mean_and_raw(params, raw, packed, flags), grads = mean_and_raw(to.params, to.raw, packed, flags);
  View prior[2] = {prior_view_of(prior_mean), prior_view_of(prior_raw)};
  View grad_prior[2] = {prior_view_of(to.prior_mean), prior_view_of(to.prior_raw)};
  SampleView noise_view = sample_view_of(eps, has_samples), gz = sample_view_of(grad_z, has_samples);
  View kl = kl_view_of(grad_kl, event.size());
  const View none;
  using Views = std::array<const View*, P::kOperands>;
  Views views{&own.mean, &own.raw, &prior[0], &prior[1], &noise_view.view, &gz.view, &kl, &grads.mean, &grads.raw,
              shared_prior ? &none : &grad_prior[0], shared_prior ? &none : &grad_prior[1]};
  P p{};
  p.samples = samples;
  p.batch = batch;
  p.eps_sample = noise_view.sample;
  p.grad_z_sample = gz.sample;
  p.noise = noise;
  p.scale = static_cast<int>(scale);
  if (grad_logq) {
    const int64_t rank = grad_logq->dim();
    p.grad_logq = {grad_logq->data_ptr(), grad_logq->stride(rank - 1), dtype_of(*grad_logq)};
    p.grad_logq_sample = rank == 2 ? grad_logq->stride(0) : 0;
  }
  const Stream stream(params);
  const auto wants = [&](int n) { return views[n]->operand.data != nullptr; };
  if (wants(P::kGradMean) || wants(P::kGradRaw) || wants(P::kGradPriorMean) || wants(P::kGradPriorRaw)) {
    p.layout = layout_of<P::kOperands>(event, views, true);
    p.kl_spread = reduce < 2;
    Views dense = views;
    if (p.kl_spread) dense[P::kGradKl] = &none;  // read one by one
    const auto aligned = [](const SampleView& s) { return s.sample * bytes_of(s.view.operand.dtype) % 16 == 0; };
    const int last = p.layout.rank > 0 ? p.layout.rank - 1 : 0;
    const bool vector = sizeof(T) == 4 && aligned(noise_view) && aligned(gz) &&
                        (!p.kl_spread || p.layout.stride[P::kGradKl][last] == 0) &&
                        vectorise<P::kOperands>(p.layout, dense, {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, kVector);
    for (int n = 0; n < P::kOperands; ++n) p.operand[n] = views[n]->operand;
    const int width = vector ? kVector : 1;
    p.tiles = tile_rows(batch, p.layout.elements / width, width, false);
    if (p.layout.elements > 0) {
      std::array<Operand, P::kOperands> operands;
      std::copy(p.operand, p.operand + P::kOperands, operands.begin());
      if (p.kl_spread) operands[P::kGradKl] = {};
      const bool dense_all = vector && is_dense<P::kOperands>(p.layout, dense);
      with_access<T>(vector, dense_all, common_dtype(operands), [&]<int V, int D>() {
        const auto gaussian_bwd_kernel = gaussian_backward<T, V, D>;
        FASTFLOW_LAUNCH(gaussian_bwd_kernel, p.tiles.grid(), p.tiles.block, 0, stream, p);
      });
    }
  }
  if (!shared_prior || (!to.prior_mean && !to.prior_raw)) return;
  views = {&own.mean, &own.raw, &prior[0], &prior[1], &none, &none, &kl, &none, &none, &grad_prior[0], &grad_prior[1]};
  p.layout = layout_of<P::kOperands>(event, views, true);
  for (int n = 0; n < P::kOperands; ++n) p.operand[n] = views[n]->operand;
  const int64_t samples_of_kl = grad_kl ? batch : 0;  // no gradient comes: zeros
  const int64_t chunks = std::clamp<int64_t>((samples_of_kl + kPriorSamples - 1) / kPriorSamples, 1, kPriorChunks);
  const int64_t chunk_samples = (samples_of_kl + chunks - 1) / chunks;
  p.batch = samples_of_kl;
  const int64_t tiles = (p.layout.elements + kBlock - 1) / kBlock;
  optional<Tensor> partial;
  if (chunks > 1) partial = empty({chunks, 2, p.layout.elements}, ScalarType::Double, params);
  double* const sums = partial ? static_cast<double*>(partial->data_ptr()) : nullptr;
  FASTFLOW_LAUNCH(prior_backward<T>, tiles * chunks, kBlock, 0, stream, p, chunks, chunk_samples, sums);
  if (partial) FASTFLOW_LAUNCH(finish_prior<T>, tiles, kBlock, 0, stream, p, chunks, sums);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_bwd(
    const optional<Tensor>& grad_z, const optional<Tensor>& grad_kl, const optional<Tensor>& grad_logq,
    const Tensor& params, const optional<Tensor>& raw, const optional<Tensor>& prior_mean,
    const optional<Tensor>& prior_raw, const optional<Tensor>& eps, const optional<Tensor>& seed, int64_t seed_value,
    int64_t offset, optional<int64_t> n_samples, int64_t scale, int64_t flags, int64_t reduce, bool need_params,
    bool need_raw, bool need_prior_mean, bool need_prior_raw) {
  Wanted to;
  if (need_params) to.params = gradient_of(params);
  if (need_raw && raw) to.raw = gradient_of(*raw);
  if (need_prior_mean && prior_mean) to.prior_mean = gradient_of(*prior_mean);
  if (need_prior_raw && prior_raw) to.prior_raw = gradient_of(*prior_raw);
  auto run = [&]<class T>(T) {
    backward<T>(to, grad_z, grad_kl, grad_logq, params, raw, prior_mean, prior_raw, eps,
                noise_of(seed, seed_value, offset), n_samples.value_or(1), n_samples.has_value(), scale, flags, reduce);
  };
  compute_type(params.scalar_type()) == ScalarType::Double ? run(double()) : run(float());
  auto result = [&](const optional<Tensor>& grad) { return grad ? *grad : nothing(params); };
  return {result(to.params), result(to.raw), result(to.prior_mean), result(to.prior_raw)};
}

}  // namespace fastflow
