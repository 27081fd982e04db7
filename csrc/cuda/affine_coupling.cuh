// What the kernels of affine_coupling_fwd and affine_coupling_bwd share: the map, the params, the loads.
#pragma once

#include "../common/scale_map.h"
#include "layout.h"
#include "tiles.cuh"

namespace fastflow {

enum Flag : int64_t { kInterleaved = 1, kShiftInFront = 2, kShiftFirst = 4, kInverse = 8 };

// What the maps need besides their constants; the kernels choose among them at run time, uniformly over the grid.
template <class T>
struct Map {
  ScaleMap<T> constants;
  Kind kind;
  bool eps, bounds, inverse, shift_first;
};

template <class T>
Map<T> make_map(int64_t flags, int64_t kind, double gain, double offset, double out_gain, double clamp, double eps,
                double hard_min, double hard_max, double shift_gain) {
  return {make_scale_map<T>(kind, gain, offset, out_gain, clamp, eps, hard_min, hard_max, shift_gain),
          static_cast<Kind>(kind), eps != 0., has_bounds(hard_min, hard_max), (flags & kInverse) != 0,
          (flags & kShiftFirst) != 0};
}

template <class F>
__device__ __forceinline__ void with_kind(Kind kind, F&& f) {
  switch (kind) {
    case Kind::exp: return f.template operator()<Kind::exp>();
    case Kind::sigmoid: return f.template operator()<Kind::sigmoid>();
    case Kind::tanh: return f.template operator()<Kind::tanh>();
    case Kind::atan: return f.template operator()<Kind::atan>();
    case Kind::softplus: return f.template operator()<Kind::softplus>();
    case Kind::rational: return f.template operator()<Kind::rational>();
    case Kind::additive: return f.template operator()<Kind::additive>();
  }
}

// f<inverse, shift_first>(), chosen once for all elements of a thread.
template <class F>
__device__ __forceinline__ void with_order(bool inverse, bool shift_first, F&& f) {
  if (inverse) return shift_first ? f.template operator()<true, true>() : f.template operator()<true, false>();
  return shift_first ? f.template operator()<false, true>() : f.template operator()<false, false>();
}

// The eps and bounds of a map, on the scales or on their slopes.
template <class T, class S, int V>
__device__ __forceinline__ void limit(const Map<T>& map, S (&scale)[V]) {
  if (map.eps) {
#pragma unroll
    for (int e = 0; e < V; ++e) scale[e] = with_eps(map.constants, scale[e]);
  }
  if (map.bounds) {
#pragma unroll
    for (int e = 0; e < V; ++e) scale[e] = with_bounds(map.constants, scale[e]);
  }
}

// How the kernels address raw scale and shift. `paired`: they alternate in memory (interleaved params whose channels
// are the dense axis) and are read 2V elements at a time, the raw first unless shift_in_front.
struct Pairing {
  bool paired = false, shift_in_front = false;
};

template <class T, int V>
__device__ __forceinline__ void separate(const Pairing& pairing, T (&raw)[V], T (&shift)[V]) {
  if (!pairing.paired) return;
  T all[2 * V];
#pragma unroll
  for (int e = 0; e < V; ++e) {
    all[e] = raw[e];
    all[V + e] = shift[e];
  }
#pragma unroll
  for (int e = 0; e < V; ++e) {
    raw[e] = pairing.shift_in_front ? all[2 * e + 1] : all[2 * e];
    shift[e] = pairing.shift_in_front ? all[2 * e] : all[2 * e + 1];
  }
}

// Loads element or vector `at` of every operand that is there, zeros for the others.
template <class T, int V, int D, int N>
__device__ __forceinline__ void load_all(const Operand* const (&from)[N], const int64_t (&at)[N], T (&values)[N][V]) {
  if constexpr (V > 1) {
    Packet<V> packets[N];
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (from[n]->data) packets[n] = fetch<V, D>(*from[n], at[n]);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (from[n]->data) {
        decode<V, D>(packets[n], from[n]->dtype, values[n]);
      } else {
#pragma unroll
        for (int e = 0; e < V; ++e) values[n][e] = T(0);
      }
    }
  } else {
#pragma unroll
    for (int n = 0; n < N; ++n) values[n][0] = from[n]->data ? load<T>(*from[n], at[n]) : T(0);
  }
}

template <class T, int V, int D>
__device__ __forceinline__ void store_one(const Operand& to, int64_t at, const T (&values)[V]) {
  if constexpr (V > 1) store_vector<V, D>(to, at, values);
  else store<T>(to, at, values[0]);
}

// Views of the raw scale and the shift, in packed params, as a pair, or the shift alone.
struct Params {
  View raw, shift;
};

inline Params params_of(const optional<Tensor>& params, const optional<Tensor>& shift, Kind kind, bool packed,
                        int64_t flags) {
  if (kind == Kind::additive) return {no_view(), view_of(params)};
  if (!packed) return {view_of(params), view_of(shift)};
  if (!params) return {};
  Halves halves = halves_of(*params, flags & kInterleaved);
  return flags & kShiftInFront ? Params{halves.second, halves.first} : Params{halves.first, halves.second};
}

// The channels that pass, beside those that are transformed: a copy, or zeros where `from` is absent.
struct Passive {
  Operand to, from;
  Layout<2> layout;
  int64_t items = 0;
  bool dense = true;
};

// `vector`: whether the transformed part is accessed in vectors; false afterwards if the passive part can't be.
inline Passive passive_of(const View& from, const View& to, const Dims& sizes, bool& vector) {
  Passive passive{to.operand, from.operand};
  const std::array<const View*, 2> pair{&to, &from};
  passive.layout = layout_of<2>(sizes, pair);
  Layout<2> dense = passive.layout;
  vector = vector && (passive.layout.elements == 0 || vectorise<2>(dense, pair, {1, 1}, kVector));
  if (vector) {
    passive.layout = dense;
    passive.dense = is_dense<2>(dense, pair);
  }
  passive.items = passive.layout.elements / (vector ? kVector : 1);
  return passive;
}

// This thread's share; chunks of a row take equal parts.
template <class T, int V, int D>
__device__ __forceinline__ void copy_passive(const Passive& passive, const Tiles& tiles, const Place& place) {
  if (!place.inside) return;
  const int64_t share = (passive.items + tiles.chunks - 1) / tiles.chunks, begin = place.chunk * share;
  const int64_t end = begin + share < passive.items ? begin + share : passive.items;
  for (int64_t item = begin + (place.first - place.chunk * tiles.chunk_items); item < end; item += place.step) {
    int64_t at[2];
    locate_item<D != kMixed, V>(passive.layout, item, at);
    T value[1][V];
    load_all<T, V, D>({&passive.from}, {at[1] + place.row * passive.from.batch}, value);
    store_one<T, V, D>(passive.to, at[0] + place.row * passive.to.batch, value[0]);
  }
}

// Whether the halves alternate in memory along the layout's dense axis.
inline bool alternate_in_memory(const Params& params, int64_t raw_stride, int64_t shift_stride) {
  const auto raw = reinterpret_cast<intptr_t>(params.raw.operand.data);
  const auto shift = reinterpret_cast<intptr_t>(params.shift.operand.data);
  const int64_t bytes = bytes_of(params.raw.operand.dtype);
  return raw && shift && raw_stride == 2 && shift_stride == 2 && (raw - shift == bytes || shift - raw == bytes);
}

inline void point_at_pairs(Params& params) {
  void*& raw = params.raw.operand.data;
  void*& shift = params.shift.operand.data;
  raw = shift = std::min(raw, shift);
}

}  // namespace fastflow
