// gaussian_fwd: z = mean + sigma*eps, KL and log q in one pass, eps drawn in the kernel; and the raw generator.
#include "gaussian.cuh"

namespace fastflow {
namespace {

// A row is what one sum runs over: a sample, or a channel of one where the KL is wanted per channel. Rows follow the
// logical order of z, whose element `row * elements + i` is element i of the row.
template <class T>
struct Forward {
  enum { kMean, kRaw, kPriorMean, kPriorRaw, kEps, kOperands };
  Tiles tiles;
  Operand operand[kOperands];
  Layout<kOperands> layout;
  int64_t channel[kOperands];  // elements from one row of a sample to the next
  int64_t eps_sample;          // of eps, along K
  int64_t batch, rows_per_sample;
  Noise noise;
  int scale;
  Operand z, drawn, kl;  // null where not wanted; z with no samples, kl unless it is per element
  T *kl_sum, *logq;      // null where not wanted, or where partial sums are
  double *kl_partial, *logq_partial;
};

template <class T, int V, int D>
__global__ void __launch_bounds__(kBlock, 2) gaussian_forward(const __grid_constant__ Forward<T> p) {
  using P = Forward<T>;
  const Place place = place_of(p.tiles);
  const int64_t pair = p.rows_per_sample == 1 ? place.row : place.row / p.rows_per_sample;  // (k, b)
  const int64_t inner_row = place.row - pair * p.rows_per_sample, k = pair / p.batch, b = pair - k * p.batch;
  int64_t base[P::kOperands];
#pragma unroll
  for (int n = 0; n < P::kOperands; ++n) base[n] = b * p.operand[n].batch + inner_row * p.channel[n];
  base[P::kEps] += k * p.eps_sample;
  const uint64_t seed = place.inside ? p.noise.seed_of(b) : 0;
  const bool wants_kl = k == 0, wants_logq = p.logq || p.logq_partial, has_prior = p.operand[P::kPriorMean].data;
  double kl_total = 0, logq_total = 0;
  for (int64_t item = place.first; item < place.last; item += place.step) {
    int64_t at[P::kOperands];
    locate_item<D != kMixed, V>(p.layout, item, at);
    const int64_t index = place.row * p.layout.elements + item * V;
    T in[4][V], eps[V], z[V], kl[V] = {}, logq[V] = {};
#pragma unroll
    for (int n = 0; n < 2; ++n) load_values<T, D>(p.operand[n], base[n] + at[n], in[n]);
    if (p.operand[P::kEps].data) load_values<T, D>(p.operand[P::kEps], base[P::kEps] + at[P::kEps], eps);
    else draw(static_cast<uint64_t>(index), p.noise.offset, seed, eps);
#pragma unroll
    for (int n = 2; n < 4; ++n) load_values<T, D>(p.operand[n], base[n] + at[n], in[n]);
    with_scale(p.scale, [&]<int S>() {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const auto sigma = gaussian::sigma_of<S>(in[1][e]);
        z[e] = math::fma(sigma.value, eps[e], in[0][e]);
        if (wants_logq) logq[e] = -(T(gaussian::half_log_two_pi) + math::fma(T(0.5) * eps[e], eps[e], sigma.log));
        if (!wants_kl) continue;
        if (has_prior) kl[e] = gaussian::kl_prior(in[0][e], sigma.log, in[2][e], gaussian::sigma_of<S>(in[3][e]));
        else kl[e] = gaussian::kl_standard(in[0][e], sigma.log);
      }
    });
    if (p.z.data) store_values<T, D>(p.z, index, z);
    if (p.drawn.data) store_values<T, D>(p.drawn, index, eps);
    if (p.kl.data && wants_kl) store_values<T, D>(p.kl, index, kl);
    if (wants_kl) {
#pragma unroll
      for (int e = 0; e < V; ++e) kl_total += kl[e];
    }
    if (wants_logq) {
#pragma unroll
      for (int e = 0; e < V; ++e) logq_total += logq[e];
    }
  }
  if (p.kl_sum || p.kl_partial) {
    kl_total = group_sum(kl_total, p.tiles.group);
    if (place.leads && wants_kl) {
      if (p.kl_partial) p.kl_partial[place.row * p.tiles.chunks + place.chunk] = kl_total;
      else p.kl_sum[place.row] = static_cast<T>(kl_total);
    }
  }
  if (wants_logq) {
    logq_total = group_sum(logq_total, p.tiles.group);
    if (place.leads) {
      if (p.logq_partial) p.logq_partial[place.row * p.tiles.chunks + place.chunk] = logq_total;
      else p.logq[place.row] = static_cast<T>(logq_total);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock) finish_gaussian(PartialSums kl, T* kl_sum, PartialSums logq, T* logq_sum) {
  const int64_t result = static_cast<int64_t>(blockIdx.x) * (kBlock / 32) + threadIdx.x / 32;
  const bool is_kl = result < kl.results;
  const int64_t at = is_kl ? result : result - kl.results;
  const PartialSums sums{is_kl ? kl.partial : logq.partial, is_kl ? kl.results : logq.results,
                         is_kl ? kl.count : logq.count};
  const double total = finish_sum(sums, at);
  if (at < sums.results && threadIdx.x % 32 == 0) (is_kl ? kl_sum : logq_sum)[at] = static_cast<T>(total);
}

__global__ void __launch_bounds__(kBlock)
    philox_words(const int64_t* counter, int64_t counter_row, int64_t counter_word, const int64_t* key, int64_t key_row,
                 int64_t key_word, int64_t count, int64_t* words) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= count) return;
  const int64_t *c = counter + i * counter_row, *k = key + i * key_row;
  const auto word = [](int64_t value) { return static_cast<uint64_t>(static_cast<uint32_t>(value)); };
  const philox::Words<uint64_t> in{word(c[0]), word(c[counter_word]), word(c[2 * counter_word]),
                                   word(c[3 * counter_word])};
  const auto out = philox::generate(in, static_cast<uint32_t>(k[0]), static_cast<uint32_t>(k[key_word]));
  const uint64_t results[4] = {out.w0, out.w1, out.w2, out.w3};
#pragma unroll
  for (int w = 0; w < 4; ++w) words[4 * i + w] = static_cast<int64_t>(word(static_cast<int64_t>(results[w])));
}

struct Results {
  Tensor z, kl, logq, drawn;
};

template <class T>
void forward(const Results& to, const Tensor& params, const optional<Tensor>& raw, const optional<Tensor>& prior_mean,
             const optional<Tensor>& prior_raw, const optional<Tensor>& eps, const Noise& noise, int64_t samples,
             bool has_samples, int64_t scale, int64_t flags, Reduce reduce, bool want_logq, bool save_eps) {
  using P = Forward<T>;
  const bool packed = !raw;
  Dims event = event_sizes(params, packed);
  const int64_t batch = params.size(0), channels = event[0];
  int64_t positions = 1;
  for (size_t d = 1; d < event.size(); ++d) positions *= event[d];
  if (reduce == Reduce::channel && positions == 1) reduce = Reduce::none;  // the same numbers
  MeanAndRaw own = mean_and_raw(params, raw, packed, flags);
  View prior[2] = {prior_view_of(prior_mean), prior_view_of(prior_raw)};
  SampleView noise_view = sample_view_of(samples > 0 ? eps : optional<Tensor>(), has_samples);
  const std::array<View*, P::kOperands> all{&own.mean, &own.raw, &prior[0], &prior[1], &noise_view.view};
  P p{};
  p.batch = std::max<int64_t>(batch, 1);
  p.rows_per_sample = 1;
  bool aligned = noise_view.sample * bytes_of(noise_view.view.operand.dtype) % 16 == 0;
  if (reduce == Reduce::channel) {  // the channel leaves the layout and becomes part of the row
    p.rows_per_sample = channels;
    event[0] = 1;
    for (int n = 0; n < P::kOperands; ++n) {
      if (!all[n]->operand.data) continue;
      p.channel[n] = all[n]->strides[0];
      aligned = aligned && p.channel[n] * bytes_of(all[n]->operand.dtype) % 16 == 0;
    }
  }
  const std::array<const View*, P::kOperands> views{all[0], all[1], all[2], all[3], all[4]};
  p.layout = layout_of<P::kOperands>(event, views, true);
  const bool vector = sizeof(T) == 4 && aligned && vectorise<P::kOperands>(p.layout, views, {1, 1, 1, 1, 1}, kVector);
  for (int n = 0; n < P::kOperands; ++n) p.operand[n] = views[n]->operand;
  const int width = vector ? kVector : 1;
  const int64_t rows = std::max<int64_t>(samples, 1) * batch * p.rows_per_sample;  // no samples: the KL alone
  p.tiles = tile_rows(rows, p.layout.elements / width, width);
  p.eps_sample = noise_view.sample;
  p.noise = noise;
  p.scale = static_cast<int>(scale);
  if (samples > 0) p.z = {to.z.data_ptr(), 0, dtype_of(to.z)};
  if (samples > 0 && save_eps && !eps) p.drawn = {to.drawn.data_ptr(), 0, dtype_of(to.drawn)};
  if (reduce == Reduce::none) p.kl = {to.kl.data_ptr(), 0, dtype_of(to.kl)};
  else p.kl_sum = static_cast<T*>(to.kl.data_ptr());
  if (samples > 0 && want_logq) p.logq = static_cast<T*>(to.logq.data_ptr());
  T *const kl_sum = p.kl_sum, *const logq_sum = p.logq;

  PartialSums kl_sums{nullptr, batch * p.rows_per_sample, p.tiles.chunks};
  PartialSums logq_sums{nullptr, samples * batch, p.rows_per_sample * p.tiles.chunks};
  const Stream stream(params);
  optional<Tensor> partial;
  const bool split_kl = p.kl_sum && kl_sums.count != 1, split_logq = p.logq && logq_sums.count != 1;
  if (split_kl || split_logq) {
    partial = empty({rows * p.tiles.chunks * 2}, ScalarType::Double, params);
    double* const sums = static_cast<double*>(partial->data_ptr());
    if (split_kl) {
      kl_sums.partial = p.kl_partial = sums;
      p.kl_sum = nullptr;
    }
    if (split_logq) {
      logq_sums.partial = p.logq_partial = sums + rows * p.tiles.chunks;
      p.logq = nullptr;
    }
  }
  std::array<Operand, P::kOperands + 3> operands{p.z, p.drawn, p.kl};
  std::copy(p.operand, p.operand + P::kOperands, operands.begin() + 3);
  const bool dense = vector && is_dense<P::kOperands>(p.layout, views);
  with_access<T>(vector, dense, common_dtype(operands), [&]<int V, int D>() {
    const auto gaussian_fwd_kernel = gaussian_forward<T, V, D>;
    FASTFLOW_LAUNCH(gaussian_fwd_kernel, p.tiles.grid(), p.tiles.block, 0, stream, p);
  });
  if (!split_kl) kl_sums.results = 0;
  if (!split_logq) logq_sums.results = 0;
  const int64_t results = kl_sums.results + logq_sums.results;
  FASTFLOW_LAUNCH(finish_gaussian<T>, (results + kBlock / 32 - 1) / (kBlock / 32), kBlock, 0, stream, kl_sums, kl_sum,
                  logq_sums, logq_sum);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_fwd(
    const Tensor& params, const optional<Tensor>& raw, const optional<Tensor>& prior_mean,
    const optional<Tensor>& prior_raw, const optional<Tensor>& eps, const optional<Tensor>& seed, int64_t seed_value,
    int64_t offset, optional<int64_t> n_samples, int64_t scale, int64_t flags, int64_t reduce, bool want_logq,
    bool save_eps) {
  const ScalarType dtype = compute_type(params.scalar_type());
  Dims shape = event_sizes(params, !raw);
  shape.insert(shape.begin(), params.size(0));
  Dims z_shape = shape, logq_shape{params.size(0)};
  if (n_samples) {
    z_shape.insert(z_shape.begin(), *n_samples);
    logq_shape.insert(logq_shape.begin(), *n_samples);
  }
  const Reduce how = static_cast<Reduce>(reduce);
  Dims kl_shape = shape;
  if (how != Reduce::none) kl_shape.resize(how == Reduce::sample ? 1 : 2);
  const Results to{empty(z_shape, result_type(params, raw, prior_mean, prior_raw, eps), params),
                   empty(kl_shape, dtype, params), empty(want_logq ? logq_shape : Dims{0}, dtype, params),
                   empty(save_eps && !eps ? z_shape : Dims{0}, dtype, params)};
  auto run = [&]<class T>(T) {
    forward<T>(to, params, raw, prior_mean, prior_raw, eps, noise_of(seed, seed_value, offset), n_samples.value_or(1),
               n_samples.has_value(), scale, flags, how, want_logq, save_eps);
  };
  dtype == ScalarType::Double ? run(double()) : run(float());
  return {to.z, to.kl, to.logq, to.drawn};
}

Tensor philox4x32(const Tensor& counter, const Tensor& key) {
  const Tensor words = empty(sizes_of(counter), ScalarType::Long, counter);
  const int64_t count = counter.size(0);
  const Stream stream(counter);
  FASTFLOW_LAUNCH(philox_words, (count + kBlock - 1) / kBlock, kBlock, 0, stream,
                  static_cast<const int64_t*>(counter.data_ptr()), counter.stride(0), counter.stride(1),
                  static_cast<const int64_t*>(key.data_ptr()), key.stride(0), key.stride(1), count,
                  static_cast<int64_t*>(words.data_ptr()));
  return words;
}

}  // namespace fastflow
