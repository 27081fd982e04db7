// Gradients of mlp_flow's parameters over a tile of samples, in a block's partial sums; and how these are added up.
#pragma once

#include "mlp_flow_product.cuh"

namespace fastflow {

constexpr int kMostParameters = 192;  // of a launch of add_partials

// to = value, or to += value after a block's first tile.
template <class T>
__device__ __forceinline__ void put(bool fresh, T* to, T value) {
  *to = fresh ? value : *to + value;
}

// Sum over the tile's samples of g[r] x[r], or of g[r] where x is null: R / 4 lanes to a sum, all of which get it.
template <int R, class T>
__device__ __forceinline__ T sample_sum(const T* g, const T* x, int rows) {
  const int r = static_cast<int>(threadIdx.x) % (R / 4) * 4;
  T sum = 0;
#pragma unroll
  for (int e = 0; e < 4; ++e)
    if (r + e < rows) sum = x == nullptr ? sum + g[r + e] : math::fma(g[r + e], x[r + e], sum);
#pragma unroll
  for (int flip = R / 8; flip > 0; flip /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, flip);
  return sum;
}

// A thread sums S x S elements of a weight's gradient; its rows are 4 apart, its columns 8, so that the lanes of a warp
// read samples of consecutive features. Bits 0 and 4 of a lane tell rows apart (mlp_flow_product.cuh, LaneOf).
template <int R, int S, class T>
__device__ __forceinline__ void weight_gradient(int out, int in, int rows, const T* x, const T* grad, bool fresh,
                                                T* partial) {
  constexpr int high = 4 * S, wide = 8 * S;  // of a warp's rectangle
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int across = (in + wide - 1) / wide, rectangles = (out + high - 1) / high * across;
#pragma unroll 1
  for (int rectangle = warp; rectangle < rectangles; rectangle += kWarps) {
    const int j0 = rectangle / across * high + lane % 2 + lane / 16 * 2, k0 = rectangle % across * wide + lane / 2 % 8;
    const T *g[S], *value[S];
#pragma unroll
    for (int e = 0; e < S; ++e) {
      g[e] = grad + (j0 + 4 * e < out ? j0 + 4 * e : 0) * kLine<R>;
      value[e] = x + (k0 + 8 * e < in ? k0 + 8 * e : 0) * kLine<R>;
    }
    T* const to = partial + static_cast<int64_t>(j0) * in + k0;
    auto inside = [&](int a, int b) { return j0 + 4 * a < out && k0 + 8 * b < in; };
    T before[S][S] = {}, sum[S][S] = {};
    if (!fresh) {
#pragma unroll
      for (int a = 0; a < S; ++a)
#pragma unroll
        for (int b = 0; b < S; ++b)
          if (inside(a, b)) before[a][b] = to[4 * a * in + 8 * b];
    }
    int r = 0;
    [[maybe_unused]] constexpr int ahead = sizeof(T) == 4 ? 2 : 1;  // as far as the registers go
#pragma unroll ahead
    for (; r + 4 <= rows; r += 4) {
      Elements<T, 4> left[S];
#pragma unroll
      for (int a = 0; a < S; ++a) left[a] = elements_at<4>(g[a] + r);
#pragma unroll
      for (int b = 0; b < S; ++b) {
        const Elements<T, 4> right = elements_at<4>(value[b] + r);
#pragma unroll
        for (int e = 0; e < 4; ++e)
#pragma unroll
          for (int a = 0; a < S; ++a) sum[a][b] = math::fma(left[a].value[e], right.value[e], sum[a][b]);
      }
    }
#pragma unroll 1
    for (; r < rows; ++r)
#pragma unroll
      for (int a = 0; a < S; ++a)
#pragma unroll
        for (int b = 0; b < S; ++b) sum[a][b] = math::fma(g[a][r], value[b][r], sum[a][b]);
#pragma unroll
    for (int a = 0; a < S; ++a)
#pragma unroll
      for (int b = 0; b < S; ++b)
        if (inside(a, b)) to[4 * a * in + 8 * b] = fresh ? sum[a][b] : before[a][b] + sum[a][b];
  }
}

// The gradients of a linear's weight and bias from those of its outputs. The whole block must call.
template <int R, class T>
__device__ __forceinline__ void parameter_gradient(const FlowLinear<T>& linear, int rows, const T* x, const T* grad,
                                                   bool fresh, T* partial) {
  constexpr int lanes = R / 4, sums = kThreads / lanes;
  const int out = linear.out, in = linear.in, own = static_cast<int>(threadIdx.x) / lanes;
  const bool leads = static_cast<int>(threadIdx.x) % lanes == 0;
  T* const weight = partial + linear.grad;
#pragma unroll 1
  for (int base = 0; base < out; base += sums) {
    const int j = base + own;
    const T sum = sample_sum<R>(grad + (j < out ? j : 0) * kLine<R>, static_cast<const T*>(nullptr), rows);
    if (leads && j < out) put(fresh, weight + static_cast<int64_t>(out) * in + j, sum);
  }
  if (out * in <= 4 * sums) {
#pragma unroll 1
    for (int base = 0; base < out * in; base += sums) {
      const int element = base + own, j = element < out * in ? element / in : 0, k = element - j * in;
      const T sum = sample_sum<R>(grad + j * kLine<R>, x + (element < out * in ? k : 0) * kLine<R>, rows);
      if (leads && element < out * in) put(fresh, weight + element, sum);
    }
  } else if ((out + 15) / 16 * ((in + 31) / 32) < kWarps) {
    weight_gradient<R, 2>(out, in, rows, x, grad, fresh, weight);
  } else {
    weight_gradient<R, 4>(out, in, rows, x, grad, fresh, weight);
  }
}

template <class T>
struct Reduction {
  T* to[kMostParameters];
  int64_t begin[kMostParameters + 1];  // in a block's partial sums
  int count;
  const T* partial;
  int64_t partials, blocks;
};

static_assert(sizeof(Reduction<double>) <= 4096);  // of a kernel's parameters

// A warp's lanes take neighbouring elements, the warps of a block shares of the partial sums.
template <class T>
__global__ void __launch_bounds__(kThreads) add_partials(const __grid_constant__ Reduction<T> job) {
  FASTFLOW_SHARED(double, sums, kThreads);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t at = job.begin[0] + static_cast<int64_t>(blockIdx.x) * 32 + lane;
  const bool inside = at < job.begin[job.count];
  double sum = 0;
#pragma unroll 8
  for (int64_t b = warp; b < job.blocks; b += kWarps)
    if (inside) sum += static_cast<double>(job.partial[b * job.partials + at]);
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || !inside) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w * 32 + lane];
  int low = 0, high = job.count - 1;  // the last parameter that begins at or before `at`
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (job.begin[middle] <= at) low = middle;
    else high = middle - 1;
  }
  job.to[low][at - job.begin[low]] = static_cast<T>(sum);
}

template <class T>
void reduce(const std::vector<Tensor>& grads, const Tensor& partial, int64_t partials, int64_t blocks,
            const Stream& stream) {
  int64_t begin = 0;
  for (size_t p = 0; p < grads.size();) {
    Reduction<T> job{};
    job.partial = static_cast<const T*>(partial.data_ptr());
    job.partials = partials;
    job.blocks = blocks;
    for (; p < grads.size() && job.count < kMostParameters; ++p) {
      job.to[job.count] = static_cast<T*>(grads[p].data_ptr());
      job.begin[job.count++] = begin;
      begin += grads[p].numel();
    }
    job.begin[job.count] = begin;
    FASTFLOW_LAUNCH(add_partials<T>, (begin - job.begin[0] + 31) / 32, kThreads, 0, stream, job);
  }
}

}  // namespace fastflow
