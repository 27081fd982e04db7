// What the kernels of gaussian_fwd and gaussian_bwd share: the scales, the noise, the operands.
#pragma once

#include "../common/gaussian_map.h"
#include "../common/philox.h"
#include "layout.h"
#include "tiles.cuh"

namespace fastflow {

enum GaussianFlag : int64_t { kInterleaved = 1, kScaleInFront = 2 };
enum class Reduce : int64_t { sample, channel, none };

template <class F>
__device__ __forceinline__ void with_scale(int scale, F&& f) {
  switch (scale) {
    case gaussian::logvar: return f.template operator()<gaussian::logvar>();
    case gaussian::logstd: return f.template operator()<gaussian::logstd>();
    case gaussian::std_dev: return f.template operator()<gaussian::std_dev>();
    case gaussian::softplus: return f.template operator()<gaussian::softplus>();
    case gaussian::soft_tanh: return f.template operator()<gaussian::soft_tanh>();
  }
}

// The source of eps: a seed in device memory (one for all or one per sample) or a number.
struct Noise {
  const int64_t* seeds = nullptr;
  int64_t seed_stride = 0;
  uint64_t seed = 0, offset = 0;

  __device__ __forceinline__ uint64_t seed_of(int64_t sample) const {
    return seeds ? static_cast<uint64_t>(seeds[sample * seed_stride]) : seed;
  }
};

inline Noise noise_of(const optional<Tensor>& seed, int64_t seed_value, int64_t offset) {
  Noise noise;
  if (seed) {
    noise.seeds = static_cast<const int64_t*>(seed->data_ptr());
    noise.seed_stride = seed->dim() == 0 ? 0 : seed->stride(0);
  }
  noise.seed = static_cast<uint64_t>(seed_value);
  noise.offset = static_cast<uint64_t>(offset);
  return noise;
}

// Normal `index` of a stream, or the four of one block, index being a multiple of 4.
template <class T, int V>
__device__ __forceinline__ void draw(uint64_t index, uint64_t offset, uint64_t seed, T (&eps)[V]) {
  const auto words = philox::block((index >> 2) + offset, seed);
  if constexpr (V == 1) {
    eps[0] = static_cast<T>(philox::normal(words, static_cast<int>(index & 3)));
  } else {
    const auto one = philox::normals(static_cast<uint32_t>(words.w0), static_cast<uint32_t>(words.w1));
    const auto two = philox::normals(static_cast<uint32_t>(words.w2), static_cast<uint32_t>(words.w3));
    eps[0] = one.first;
    eps[1] = one.second;
    eps[2] = two.first;
    eps[3] = two.second;
  }
}

// Loads element or vector `at`; zeros where the operand is not there.
template <class T, int D, int V>
__device__ __forceinline__ void load_values(const Operand& from, int64_t at, T (&values)[V]) {
  if (!from.data) {
#pragma unroll
    for (int e = 0; e < V; ++e) values[e] = T(0);
  } else if constexpr (V > 1) {
    decode<V, D>(fetch<V, D>(from, at), from.dtype, values);
  } else {
    values[0] = load<T>(from, at);
  }
}

template <class T, int D, int V>
__device__ __forceinline__ void store_values(const Operand& to, int64_t at, const T (&values)[V]) {
  if constexpr (V > 1) store_vector<V, D>(to, at, values);
  else store<T>(to, at, values[0]);
}

// A host view of a tensor (K, B, D, *S) or, without a sample axis, (B, D, *S), and its stride along K.
struct SampleView {
  View view;
  int64_t sample = 0;
};

inline SampleView sample_view_of(const optional<Tensor>& t, bool has_samples) {
  SampleView result;
  if (!t) return result;
  if (!has_samples) return {view_of(*t), 0};
  const Dims strides = strides_of(*t);
  result.view.operand = {t->data_ptr(), strides[1], dtype_of(*t)};
  result.view.strides.assign(strides.begin() + 2, strides.end());
  result.sample = strides[0];
  return result;
}

struct MeanAndRaw {
  View mean, raw;
};

inline MeanAndRaw mean_and_raw(const optional<Tensor>& params, const optional<Tensor>& raw, bool packed,
                               int64_t flags) {
  if (!packed) return {view_of(params), view_of(raw)};
  if (!params) return {};
  const Halves halves = halves_of(*params, flags & kInterleaved);
  return flags & kScaleInFront ? MeanAndRaw{halves.second, halves.first} : MeanAndRaw{halves.first, halves.second};
}

// A prior of batch 1 serves every sample.
inline View prior_view_of(const optional<Tensor>& t) {
  View view = view_of(t);
  if (t && t->size(0) == 1) view.operand.batch = 0;
  return view;
}

// (D, *S) of the params.
inline Dims event_sizes(const Tensor& params, bool packed) {
  Dims sizes = sample_sizes(params);
  if (packed) sizes[0] /= 2;
  return sizes;
}

}  // namespace fastflow
