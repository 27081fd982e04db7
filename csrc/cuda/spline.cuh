// What the kernels of spline_fwd and spline_bwd share: how an element reads its parameters, and its bin.
//
// A thread has an element and reads its parameters one after the other, several times. Where they lie side by side in
// memory (features or channels as the dense axis) a warp brings those of its 32 elements into shared memory in whole
// lines; where those of neighbouring elements lie side by side, it reads them in place.
#pragma once

#include "../common/spline_map.h"
#include "layout.h"
#include "tiles.cuh"

namespace fastflow {

constexpr int64_t kSplineWeight = 4;         // an element costs as much as so many of a coupling
constexpr int64_t kMostStaged = 100 * 1024;  // bytes of a block; with more, few blocks share a multiprocessor
constexpr int64_t kStatic = 512;             // more than what a kernel declares beside it
constexpr unsigned kWholeWarp = 0xffffffffu;

template <class T>
struct Spline {
  spline::Map<T> map;
  int bins, params;
  bool linear, soft, inverse;
};

template <class T>
Spline<T> make_spline(const Tensor& x, const Tensor& params, int64_t kind, bool inverse, double bound,
                      double min_width, double min_height, double min_derivative, double gain, double clamp,
                      double end_derivative) {
  Spline<T> s{};
  s.params = x.size(1) > 0 ? static_cast<int>(params.size(1) / x.size(1)) : 1;
  s.linear = kind == spline::linear;
  s.bins = s.linear ? s.params : (s.params + 1) / 3;
  s.map = spline::make_map<T>(s.bins, bound, min_width, min_height, min_derivative, gain, clamp, end_derivative);
  s.soft = clamp != 0.;
  s.inverse = inverse;
  return s;
}

// Where the parameters of a block's elements are. pitch: of an element in shared memory, odd, so that a warp's elements
// lie in different banks; 0: they stay in device memory.
struct Staging {
  int64_t step;  // from one parameter of an element to the next, in elements
  int pitch;
};

// n: which operand of the layout the params are, batch: its step from one sample to the next.
template <class T, int N>
Staging staging_of(const Spline<T>& s, const Layout<N>& layout, int n, int64_t batch, int64_t step, int block,
                   const Stream& stream) {
  const int64_t dense = layout.rank > 0 ? layout.stride[n][layout.rank - 1] : batch;  // to a warp's next element
  const int64_t bytes = int64_t{s.params | 1} * block * static_cast<int64_t>(sizeof(T)) + kStatic;
  return {step, step < dense && bytes <= std::min(kMostStaged, stream.shared_limit()) ? s.params | 1 : 0};
}

template <class T>
int64_t shared_bytes(const Staging& staging, int block) {
  return int64_t{staging.pitch} * block * static_cast<int64_t>(sizeof(T));
}

// f(element of the warp, parameter, where its element's parameters begin) for all parameters of the warp's elements,
// 32 neighbours at a time. at: where this thread's begin, or -1 if it has none. Every thread of the warp must call.
template <class F>
__device__ __forceinline__ void each_parameter(int params, int64_t at, const F& f) {
  const int lane = static_cast<int>(threadIdx.x) % 32, elements = 32 / params, rest = 32 - elements * params;
  int element = lane / params, param = lane - element * params;
  for (int i = 0; i < params; ++i) {
    const int64_t begin = __shfl_sync(kWholeWarp, at, element);
    if (begin >= 0) f(element, param, begin);
    element += elements;
    param += rest;
    if (param >= params) {
      param -= params;
      ++element;
    }
  }
}

// The raw parameters of an element; those of one outside the interval are never read.
template <class T, bool kStaged>
struct RawParameters {
  const Operand& from;
  const T* staged;
  int64_t at, step;

  __device__ __forceinline__ T operator()(int j) const {
    if constexpr (kStaged) return staged[j];
    else return load<T>(from, at + j * step);
  }
};

template <class T>
__device__ __forceinline__ T size_of(const Spline<T>& s, T raw) {
  return s.soft ? spline::bounded_size<true>(raw, s.map) : spline::bounded_size<false>(raw, s.map);
}

// A softmax along one axis: its largest size, one over the sum of its exponentials; of the bin chosen its exponential
// and the sum of those before it.
template <class T>
struct Axis {
  T peak, inverse_sum, own, before;
};

template <class T, class Raw>
__device__ __forceinline__ Axis<T> softmax_of(const Spline<T>& s, const Raw& raw, int first) {
  T peak = -math::infinity<T>();
  for (int k = 0; k < s.bins; ++k) {
    const T size = size_of(s, raw(first + k));
    peak = size > peak ? size : peak;
  }
  T sum = 0;
  for (int k = 0; k < s.bins; ++k) sum += spline::exp_share(size_of(s, raw(first + k)) - peak);
  return {peak, T(1) / sum, T(0), T(0)};
}

template <class T>
struct Located {
  int number;
  Axis<T> width, height;
  T raw0, raw1;  // raw slopes at both ends; 0 at the ends of the interval
};

// The bin [left, right) of a value; the first one of NaN.
template <class T, class Raw>
__device__ __forceinline__ Located<T> locate_bin(const Spline<T>& s, const Raw& raw, T value) {
  const spline::Map<T>& map = s.map;
  const int heights = s.linear ? 0 : s.bins;
  Located<T> found{};
  found.height = softmax_of(s, raw, heights);
  if (!s.linear) found.width = softmax_of(s, raw, 0);
  const bool along_height = s.inverse;
  const T start = -map.bound, width = T(2) * map.bound / static_cast<T>(s.bins);
  const T base = along_height ? map.height_base : s.linear ? width : map.width_base;
  const T scale = along_height ? map.height_span * found.height.inverse_sum : map.width_span * found.width.inverse_sum;
  T width_sum = 0, height_sum = 0;
  for (int k = 0; k < s.bins; ++k) {
    const T edge = math::fma(static_cast<T>(k), base, start);
    const T knot = s.linear && !along_height ? edge : math::fma(scale, along_height ? height_sum : width_sum, edge);
    const bool beyond = k == 0 || value >= knot;
    const T height = spline::exp_share(size_of(s, raw(heights + k)) - found.height.peak);
    if (beyond) {
      found.number = k;
      found.height.own = height;
      found.height.before = height_sum;
    }
    height_sum += height;
    if (!s.linear) {
      const T own = spline::exp_share(size_of(s, raw(k)) - found.width.peak);
      if (beyond) {
        found.width.own = own;
        found.width.before = width_sum;
      }
      width_sum += own;
    }
  }
  if (!s.linear) {
    if (found.number > 0) found.raw0 = raw(2 * s.bins + found.number - 1);
    if (found.number < s.bins - 1) found.raw1 = raw(2 * s.bins + found.number);
  }
  return found;
}

template <class T>
__device__ __forceinline__ spline::Bin<T> bin_of(const Spline<T>& s, const Located<T>& at) {
  const spline::Map<T>& map = s.map;
  const T number = static_cast<T>(at.number), height_scale = map.height_span * at.height.inverse_sum;
  spline::Bin<T> bin;
  bin.height = math::fma(height_scale, at.height.own, map.height_base);
  bin.bottom = math::fma(height_scale, at.height.before, math::fma(number, map.height_base, -map.bound));
  bin.d0 = bin.d1 = s.linear ? T(1) : map.end_derivative;
  if (s.linear) {
    bin.width = T(2) * map.bound / static_cast<T>(s.bins);
    bin.left = math::fma(number, bin.width, -map.bound);
    return bin;
  }
  const T width_scale = map.width_span * at.width.inverse_sum;
  bin.width = math::fma(width_scale, at.width.own, map.width_base);
  bin.left = math::fma(width_scale, at.width.before, math::fma(number, map.width_base, -map.bound));
  auto slope = [&](T raw) {
    return s.soft ? spline::derivative_of<true>(raw, map) : spline::derivative_of<false>(raw, map);
  };
  if (at.number > 0) bin.d0 = slope(at.raw0);
  if (at.number < s.bins - 1) bin.d1 = slope(at.raw1);
  return bin;
}

// This thread's elements, round by round, all threads of a block together.
struct Rounds {
  int64_t begin, end;
};

__device__ __forceinline__ Rounds rounds_of(const Tiles& tiles, const Place& place) {
  const int64_t begin = place.chunk * tiles.chunk_items, end = begin + tiles.chunk_items;
  return {begin, end < tiles.items ? end : tiles.items};
}

}  // namespace fastflow
