// Host side of latent_head on the CPU: results, noise, threads.
#include "latent_head_kernel.h"

#include "../fastflow.h"
#include "runtime.h"

namespace fastflow {

namespace {

constexpr int64_t grain = 16;  // tiles that are worth a thread
// Words are drawn one after the other, so many at a time, then worked on by all threads while they are in a cache.
constexpr int64_t drawn = 64 * head_tile;

const float* values_of(const Tensor& t) { return static_cast<const float*>(t.data_ptr()); }
float* results_of(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor> latent_head_fwd(const Tensor& mean, const Tensor& logvar, const Tensor& state) {
  const Dims sizes = sizes_of(mean), strides = contiguous_strides(sizes);
  Tensor z = empty_strided(sizes, strides, ScalarType::Float, mean);
  Tensor eps = empty_strided(sizes, strides, ScalarType::Float, mean);
  Tensor kl = empty({}, ScalarType::Float, mean);
  char* const generator = static_cast<char*>(state.mutable_data_ptr());
  const int64_t count = mean.numel();
  float partials[drawn / head_tile + 1];
  double total = 0.;
  for (int64_t first = 0; first < count;) {
    const int64_t left = count - first, now = left < drawn + head_tile ? left : drawn;  // the last ones are not alone
    const int64_t tiles = (now + head_tile - 1) / head_tile;
    const LatentHeadForward f{values_of(mean) + first, values_of(logvar) + first, results_of(z) + first,
                              results_of(eps) + first, partials, now};
    float tail[16];
    FASTFLOW_ISA_CALL(torch_words, generator, now, f.eps, tail);
    parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
      FASTFLOW_ISA_CALL(latent_head_forward, f, tail, begin, end);
    });
    for (int64_t tile = 0; tile < tiles; ++tile) total += static_cast<double>(partials[tile]);
    first += now;
  }
  *results_of(kl) = static_cast<float>(total / static_cast<double>(mean.size(0)));
  return {z, kl, eps};
}

std::tuple<Tensor, Tensor> latent_head_bwd(const Tensor& grad_z, const Tensor& grad_kl, const Tensor& mean,
                                           const Tensor& logvar, const Tensor& eps) {
  const Dims sizes = sizes_of(mean), strides = contiguous_strides(sizes);
  Tensor to_mean = empty_strided(sizes, strides, ScalarType::Float, mean);
  Tensor to_logvar = empty_strided(sizes, strides, ScalarType::Float, mean);
  const Tensor grad = grad_z.is_contiguous() ? grad_z : torch::stable::contiguous(grad_z);
  const int64_t count = mean.numel();
  const LatentHeadBackward b{values_of(mean), values_of(logvar), values_of(eps), values_of(grad),
                             *values_of(grad_kl) / static_cast<float>(mean.size(0)), results_of(to_mean),
                             results_of(to_logvar), count};
  parallel_for(0, (count + head_tile - 1) / head_tile, grain, [&](int64_t begin, int64_t end) {
    FASTFLOW_ISA_CALL(latent_head_backward, b, begin, end);
  });
  return {to_mean, to_logvar};
}

}  // namespace fastflow
