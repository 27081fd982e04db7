// spline_bwd: the gradients of x and the params in one pass.
#include "spline.cuh"

namespace fastflow {
namespace {

template <class T>
struct Backward {
  enum { kX, kParams, kGradY, kGradX, kGradParams, kOperands };
  Spline<T> spline;
  Staging staging;
  Tiles tiles;
  int64_t grad_step;  // from one parameter's gradient to the next
  Operand operand[kOperands];  // those of params as of the first parameter of each element
  Layout<kOperands> layout;
  Operand grad_logdet;
};

template <class T>
__device__ __forceinline__ spline::BinGradient<T> gradient_of_bin(const Spline<T>& s, const spline::Bin<T>& bin,
                                                                  T value, T grad, T grad_log) {
  if (s.linear) {
    const T theta = s.inverse ? (value - bin.bottom) / bin.height : (value - bin.left) / bin.width;
    return s.inverse ? spline::linear_gradient<true>(bin, theta, grad, grad_log)
                     : spline::linear_gradient<false>(bin, theta, grad, grad_log);
  }
  const spline::Point<T> p = s.inverse ? spline::point_of_y(bin, value) : spline::point_of_x(bin, value);
  return s.inverse ? spline::rational_quadratic_gradient<true>(bin, p, grad, grad_log)
                   : spline::rational_quadratic_gradient<false>(bin, p, grad, grad_log);
}

// put(k, gradient) of the raw sizes from parameter `first` on: softmax's, times the span. start: the gradient of what
// lies below the bin chosen, size: that of its size.
template <class T, class Raw, class Put>
__device__ __forceinline__ void size_gradients(const Spline<T>& s, const Raw& raw, const Axis<T>& axis, int first,
                                               int number, T span, T start, T size, const Put& put) {
  const T mean = math::fma(start, axis.before, size * axis.own) * axis.inverse_sum, factor = span * axis.inverse_sum;
  for (int k = 0; k < s.bins; ++k) {
    const T value = raw(first + k), share = spline::exp_share(size_of(s, value) - axis.peak);
    const T part = k == number ? size : k < number ? start : T(0);
    const T slope = s.soft ? spline::bounded_size_slope<true>(value, s.map)
                           : spline::bounded_size_slope<false>(value, s.map);
    put(first + k, share * factor * (part - mean) * slope);
  }
}

template <class T, bool kStaged>
__global__ void __launch_bounds__(kBlock, 1) spline_backward(const __grid_constant__ Backward<T> p) {
  using P = Backward<T>;
  FASTFLOW_DYNAMIC_SHARED(T, shared);
  const Spline<T>& s = p.spline;
  const Operand &params = p.operand[P::kParams], &grads = p.operand[P::kGradParams];
  const Place place = place_of(p.tiles);
  const Rounds rounds = rounds_of(p.tiles, place);
  const int own = static_cast<int>(threadIdx.x), warp = own / 32 * 32;
  T* mine = kStaged ? shared + own * p.staging.pitch : nullptr;
  T grad_log = place.inside && p.grad_logdet.data ? load<T>(p.grad_logdet, place.row * p.grad_logdet.batch) : T(0);
  if (s.inverse) grad_log = -grad_log;
  for (int64_t round = rounds.begin; round < rounds.end; round += place.step) {
    const int64_t item = round + (place.first - rounds.begin);
    const bool active = place.inside && item < rounds.end;
    int64_t at[P::kOperands] = {};
    T x = 0, grad_y = 0;
    if (active) {
      locate(p.layout, item, at);
#pragma unroll
      for (int n = 0; n < P::kOperands; ++n) at[n] += place.row * p.operand[n].batch;
      x = load<T>(p.operand[P::kX], at[P::kX]);
      if (p.operand[P::kGradY].data) grad_y = load<T>(p.operand[P::kGradY], at[P::kGradY]);
    }
    const bool outside = math::abs(x) > s.map.bound;
    if constexpr (kStaged) {
      __syncwarp();  // what the last round staged has been read
      each_parameter(s.params, active && !outside ? at[P::kParams] : -1, [&](int element, int param, int64_t begin) {
        shared[(warp + element) * p.staging.pitch + param] = load<T>(params, begin + param * p.staging.step);
      });
      __syncwarp();
    }
    if (active) {
      auto put = [&](int j, T value) {
        if constexpr (kStaged) mine[j] = value;
        else store<T>(grads, at[P::kGradParams] + j * p.grad_step, value);
      };
      T grad_x = grad_y;
      if (outside) {
        if (grads.data)
          for (int j = 0; j < s.params; ++j) put(j, T(0));
      } else {
        const RawParameters<T, kStaged> raw{params, mine, at[P::kParams], p.staging.step};
        const Located<T> found = locate_bin(s, raw, x);
        const spline::BinGradient<T> g = gradient_of_bin(s, bin_of(s, found), x, grad_y, grad_log);
        grad_x = g.operand;
        if (grads.data) {
          if (!s.linear)
            size_gradients(s, raw, found.width, 0, found.number, s.map.width_span, g.left, g.width, put);
          size_gradients(s, raw, found.height, s.linear ? 0 : s.bins, found.number, s.map.height_span, g.bottom,
                         g.height, put);
          if (!s.linear) {
            auto slope = [&](T value) {
              return s.soft ? spline::derivative_slope<true>(value, s.map)
                            : spline::derivative_slope<false>(value, s.map);
            };
            const T first = g.d0 * slope(found.raw0), second = g.d1 * slope(found.raw1);
            for (int k = 0; k < s.bins - 1; ++k)  // of the slope between bins k and k + 1
              put(2 * s.bins + k, k == found.number ? second : k + 1 == found.number ? first : T(0));
          }
        }
      }
      if (p.operand[P::kGradX].data) store<T>(p.operand[P::kGradX], at[P::kGradX], grad_x);
    }
    if constexpr (kStaged) {
      if (!grads.data) continue;
      __syncwarp();
      each_parameter(s.params, active ? at[P::kGradParams] : -1, [&](int element, int param, int64_t begin) {
        store<T>(grads, begin + param * p.grad_step, shared[(warp + element) * p.staging.pitch + param]);
      });
    }
  }
}

template <class T>
void backward(const optional<Tensor>& grad_y, const optional<Tensor>& grad_logdet, const Tensor& x,
              const Tensor& params, const optional<Tensor>& grad_x, const optional<Tensor>& grad_params,
              const Spline<T>& spline) {
  using P = Backward<T>;
  const View from = view_of(x), packed = view_of(params, 0, spline.params), gy = view_of(grad_y), gx = view_of(grad_x);
  const View grads = grad_params ? view_of(*grad_params, 0, spline.params) : no_view();
  const std::array<const View*, 5> views{&from, &packed, &gy, &gx, &grads};
  P p{};
  p.spline = spline;
  p.layout = layout_of<5>(sample_sizes(x), views);
  for (int n = 0; n < P::kOperands; ++n) p.operand[n] = views[n]->operand;
  if (grad_params) p.grad_step = grad_params->stride(1);
  if (grad_logdet) p.grad_logdet = {grad_logdet->data_ptr(), grad_logdet->stride(0), dtype_of(*grad_logdet)};
  p.tiles = tile_rows(x.size(0), p.layout.elements, kSplineWeight);
  const Stream stream(x);
  p.staging = staging_of(spline, p.layout, P::kParams, packed.operand.batch, params.stride(1), p.tiles.block, stream);
  const auto spline_bwd_kernel = p.staging.pitch ? spline_backward<T, true> : spline_backward<T, false>;
  FASTFLOW_LAUNCH(spline_bwd_kernel, p.tiles.grid(), p.tiles.block, shared_bytes<T>(p.staging, p.tiles.block), stream,
                  p);
}

}  // namespace

std::tuple<Tensor, Tensor> spline_bwd(const optional<Tensor>& grad_y, const optional<Tensor>& grad_logdet,
                                      const Tensor& x, const Tensor& params, bool need_x, bool need_params,
                                      int64_t kind, bool inverse, double bound, double min_width, double min_height,
                                      double min_derivative, double gain, double clamp, double end_derivative) {
  optional<Tensor> grad_x, grad_params;
  if (need_x) grad_x = gradient_of(x);
  if (need_params) grad_params = gradient_of(params);
  auto run = [&]<class T>(T) {
    backward<T>(grad_y, grad_logdet, x, params, grad_x, grad_params,
                make_spline<T>(x, params, kind, inverse, bound, min_width, min_height, min_derivative, gain, clamp,
                               end_derivative));
  };
  if (x.numel() > 0 && (need_x || need_params)) x.scalar_type() == ScalarType::Double ? run(double()) : run(float());
  auto result = [&](const optional<Tensor>& grad) { return grad ? *grad : nothing(x); };
  return {result(grad_x), result(grad_params)};
}

}  // namespace fastflow
