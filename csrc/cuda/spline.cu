// spline_fwd: y and log-det in one pass over x and the params.
#include "spline.cuh"

namespace fastflow {
namespace {

template <class T>
struct Forward {
  enum { kX, kParams, kY, kOperands };
  Spline<T> spline;
  Staging staging;
  Tiles tiles;
  Operand operand[kOperands];  // kParams: as of the first parameter of each element
  Layout<kOperands> layout;
  Operand running;  // log-det so far
  T* logdet;
  double* partial;  // (rows, chunks), null where a row is one chunk
};

// f or its inverse at a value of the interval, and the logarithm of f's slope there.
template <class T>
struct Image {
  T value, log_slope;
};

template <class T>
__device__ __forceinline__ Image<T> image_of(const Spline<T>& s, const spline::Bin<T>& bin, T value) {
  if (s.linear) {
    const T slope = bin.height / bin.width;
    const T result = s.inverse ? bin.left + (value - bin.bottom) / slope
                               : math::fma(value - bin.left, slope, bin.bottom);
    return {spline::confined(result, s.map.bound), math::log(slope)};
  }
  const spline::Point<T> p = s.inverse ? spline::point_of_y(bin, value) : spline::point_of_x(bin, value);
  const T result = s.inverse ? math::fma(p.theta, bin.width, bin.left)
                             : math::fma(bin.height, spline::share_at(bin, p), bin.bottom);
  return {spline::confined(result, s.map.bound), math::log(p.slope)};
}

template <class T, bool kStaged>
__global__ void __launch_bounds__(kBlock, 2) spline_forward(const __grid_constant__ Forward<T> p) {
  using P = Forward<T>;
  FASTFLOW_DYNAMIC_SHARED(T, shared);
  const Spline<T>& s = p.spline;
  const Operand& params = p.operand[P::kParams];
  const Place place = place_of(p.tiles);
  const Rounds rounds = rounds_of(p.tiles, place);
  const int own = static_cast<int>(threadIdx.x), warp = own / 32 * 32;
  double total = 0;
  for (int64_t round = rounds.begin; round < rounds.end; round += place.step) {
    const int64_t item = round + (place.first - rounds.begin);
    const bool active = place.inside && item < rounds.end;
    int64_t at[P::kOperands] = {};
    T x = 0;
    if (active) {
      locate(p.layout, item, at);
#pragma unroll
      for (int n = 0; n < P::kOperands; ++n) at[n] += place.row * p.operand[n].batch;
      x = load<T>(p.operand[P::kX], at[P::kX]);
    }
    const bool outside = math::abs(x) > s.map.bound;
    if constexpr (kStaged) {
      __syncwarp();  // what the last round staged has been read
      each_parameter(s.params, active && !outside ? at[P::kParams] : -1, [&](int element, int param, int64_t begin) {
        shared[(warp + element) * p.staging.pitch + param] = load<T>(params, begin + param * p.staging.step);
      });
      __syncwarp();
    }
    if (!active) continue;
    T y = x;
    if (!outside) {
      const RawParameters<T, kStaged> raw{params, kStaged ? shared + own * p.staging.pitch : nullptr, at[P::kParams],
                                          p.staging.step};
      const Image<T> image = image_of(s, bin_of(s, locate_bin(s, raw, x)), x);
      y = image.value;
      total += image.log_slope;
    }
    store<T>(p.operand[P::kY], at[P::kY], y);
  }
  total = group_sum(s.inverse ? -total : total, p.tiles.group);
  if (!place.leads) return;
  if (p.partial) p.partial[place.row * p.tiles.chunks + place.chunk] = total;
  else p.logdet[place.row] =
      static_cast<T>(p.running.data ? load<T>(p.running, place.row * p.running.batch) + total : total);
}

template <class T>
void forward(const Tensor& x, const Tensor& params, const optional<Tensor>& logdet, const Tensor& y,
             const Tensor& total, const Spline<T>& spline) {
  using P = Forward<T>;
  const int64_t rows = x.size(0);
  const View from = view_of(x), packed = view_of(params, 0, spline.params), to = view_of(y);
  const std::array<const View*, 3> views{&from, &packed, &to};
  P p{};
  p.spline = spline;
  p.layout = layout_of<3>(sample_sizes(x), views);
  for (int n = 0; n < P::kOperands; ++n) p.operand[n] = views[n]->operand;
  p.tiles = tile_rows(rows, p.layout.elements, kSplineWeight);
  if (logdet) p.running = {logdet->data_ptr(), logdet->stride(0), dtype_of(*logdet)};
  p.logdet = static_cast<T*>(total.data_ptr());
  const Stream stream(x);
  p.staging = staging_of(spline, p.layout, P::kParams, packed.operand.batch, params.stride(1), p.tiles.block, stream);
  optional<Tensor> partial;
  if (p.tiles.chunks > 1) {
    partial = empty({rows, p.tiles.chunks}, ScalarType::Double, x);
    p.partial = static_cast<double*>(partial->data_ptr());
  }
  const auto spline_fwd_kernel = p.staging.pitch ? spline_forward<T, true> : spline_forward<T, false>;
  FASTFLOW_LAUNCH(spline_fwd_kernel, p.tiles.grid(), p.tiles.block, shared_bytes<T>(p.staging, p.tiles.block), stream,
                  p);
  if (!partial) return;
  const PartialSums sums{p.partial, rows, p.tiles.chunks};
  FASTFLOW_LAUNCH(finish_logdet<T>, finish_grid(sums), kBlock, 0, stream, sums, p.running, p.logdet);
}

}  // namespace

std::tuple<Tensor, Tensor> spline_fwd(const Tensor& x, const Tensor& params, const optional<Tensor>& logdet,
                                      int64_t kind, bool inverse, double bound, double min_width, double min_height,
                                      double min_derivative, double gain, double clamp, double end_derivative) {
  const Dims sizes = sizes_of(x);
  const Tensor y = empty_strided(sizes, strides_like(sizes, x), result_type(x, optional<Tensor>(params)), x);
  const Tensor total = empty({x.size(0)}, compute_type(x.scalar_type()), x);
  auto run = [&]<class T>(T) {
    forward<T>(x, params, logdet, y, total, make_spline<T>(x, params, kind, inverse, bound, min_width, min_height,
                                                           min_derivative, gain, clamp, end_derivative));
  };
  x.scalar_type() == ScalarType::Double ? run(double()) : run(float());
  return {y, total};
}

}  // namespace fastflow
