// affine_coupling: y, log-det and their gradients in one pass over x and the params.
#include "../common/scale_map.h"
#include "layout.h"
#include "tiles.cuh"

namespace fastflow {
namespace {

constexpr int kVector = 8;  // elements of a vector access: 16 bytes of a 16-bit dtype, twice 16 of float32

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

template <class T, int V>
__device__ __forceinline__ void scales(const Map<T>& map, const T (&raw)[V], Scale<T> (&scale)[V]) {
  with_kind(map.kind, [&]<Kind K>() {
#pragma unroll
    for (int e = 0; e < V; ++e) scale[e] = scale_of<K, false, false>(map.constants, raw[e]);
  });
  if (map.eps) {
#pragma unroll
    for (int e = 0; e < V; ++e) scale[e] = with_eps(map.constants, scale[e]);
  }
  if (map.bounds) {
#pragma unroll
    for (int e = 0; e < V; ++e) scale[e] = with_bounds(map.constants, scale[e]);
  }
}

template <class T, int V>
__device__ __forceinline__ void slopes(const Map<T>& map, const T (&raw)[V], ScaleSlope<T> (&scale)[V]) {
  with_kind(map.kind, [&]<Kind K>() {
#pragma unroll
    for (int e = 0; e < V; ++e) scale[e] = scale_slope<K, false, false>(map.constants, raw[e]);
  });
  if (map.eps) {
#pragma unroll
    for (int e = 0; e < V; ++e) scale[e] = with_eps(map.constants, scale[e]);
  }
  if (map.bounds) {
#pragma unroll
    for (int e = 0; e < V; ++e) scale[e] = with_bounds(map.constants, scale[e]);
  }
}

// Raw scale and shift as the kernels address them. `paired`: they alternate in memory (interleaved params whose channels
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

template <class T, int V>
__device__ __forceinline__ void alternate(const Pairing& pairing, T (&raw)[V], T (&shift)[V]) {
  if (!pairing.paired) return;
  T all[2 * V];
#pragma unroll
  for (int e = 0; e < V; ++e) {
    all[2 * e] = pairing.shift_in_front ? shift[e] : raw[e];
    all[2 * e + 1] = pairing.shift_in_front ? raw[e] : shift[e];
  }
#pragma unroll
  for (int e = 0; e < V; ++e) {
    raw[e] = all[e];
    shift[e] = all[V + e];
  }
}

// Loads element or vector `at` of every operand that is there, zeros for the others.
template <class T, int V, int N>
__device__ __forceinline__ void load_all(const Operand* const (&from)[N], const int64_t (&at)[N], T (&values)[N][V]) {
  if constexpr (V > 1) {
    Packet<V> packets[N];
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (from[n]->data) packets[n] = fetch<V>(*from[n], at[n]);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (from[n]->data) {
        decode(packets[n], from[n]->dtype, values[n]);
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

template <class T, int V>
__device__ __forceinline__ void store_one(const Operand& to, int64_t at, const T (&values)[V]) {
  if constexpr (V > 1) store_vector(to, at, values);
  else store<T>(to, at, values[0]);
}

template <class T>
struct Forward {
  enum { kX, kRaw, kShift, kY, kOperands };
  Map<T> map;
  Tiles tiles;
  Pairing pairing;
  Operand operand[kOperands];
  Layout<kOperands> layout;
  Operand passive, passive_y;
  Layout<2> passive_layout;
  int64_t passive_items;
  Operand running;  // log-det so far
  T* logdet;
  double* partial;  // (rows, chunks), null where a row is one chunk
};

template <class T, int V>
__global__ void __launch_bounds__(kBlock, 2) coupling_forward(const __grid_constant__ Forward<T> p) {
  using P = Forward<T>;
  const Place place = place_of(p.tiles);
  double total = 0;
  for (int64_t item = place.first; item < place.last; item += place.step) {
    int64_t at[P::kOperands];
    locate(p.layout, item * V, at);
#pragma unroll
    for (int n = 0; n < P::kOperands; ++n) at[n] += place.row * p.operand[n].batch;
    if (p.pairing.paired) at[P::kShift] += V;
    T in[3][V], y[V];
    load_all<T, V>({&p.operand[P::kX], &p.operand[P::kRaw], &p.operand[P::kShift]},
                            {at[P::kX], at[P::kRaw], at[P::kShift]}, in);
    separate(p.pairing, in[1], in[2]);
    Scale<T> scale[V];
    scales(p.map, in[1], scale);
#pragma unroll
    for (int e = 0; e < V; ++e)
      y[e] = coupled(p.map.constants, scale[e].s, in[0][e], in[2][e], p.map.inverse, p.map.shift_first);
    store_one<T>(p.operand[P::kY], at[P::kY], y);
#pragma unroll
    for (int e = 0; e < V; ++e) total += scale[e].log_s;
  }
  total = group_sum(p.map.inverse ? -total : total, p.tiles.group);
  if (place.leads) {
    if (p.partial) p.partial[place.row * p.tiles.chunks + place.chunk] = total;
    else p.logdet[place.row] =
        static_cast<T>(p.running.data ? load<T>(p.running, place.row * p.running.batch) + total : total);
  }
  if (!p.passive.data || !place.inside) return;
  const int64_t share = (p.passive_items + p.tiles.chunks - 1) / p.tiles.chunks, begin = place.chunk * share;
  const int64_t end = begin + share < p.passive_items ? begin + share : p.passive_items;
  for (int64_t item = begin + (place.first - place.chunk * p.tiles.chunk_items); item < end; item += place.step) {
    int64_t at[2];
    locate(p.passive_layout, item * V, at);
    T value[1][V];
    load_all<T, V>({&p.passive}, {at[0] + place.row * p.passive.batch}, value);
    store_one<T>(p.passive_y, at[1] + place.row * p.passive_y.batch, value[0]);
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock) finish_logdet(PartialSums sums, Operand running, T* logdet) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kBlock / 32) + threadIdx.x / 32;
  const double total = finish_sum(sums, row);
  if (row < sums.results && threadIdx.x % 32 == 0)
    logdet[row] = static_cast<T>(running.data ? load<T>(running, row * running.batch) + total : total);
}

template <class T>
struct Backward {
  enum { kX, kRaw, kShift, kGradY, kGradX, kGradRaw, kGradShift, kOperands };
  Map<T> map;
  Tiles tiles;
  Pairing pairing;
  Operand operand[kOperands];
  Layout<kOperands> layout;
  Operand grad_logdet;
};

template <class T, int V>
__global__ void __launch_bounds__(kBlock, 2) coupling_backward(const __grid_constant__ Backward<T> p) {
  using P = Backward<T>;
  const Place place = place_of(p.tiles);
  if (!place.inside) return;
  const bool separate_slope = p.map.bounds || p.map.kind == Kind::softplus;
  const T gl = p.grad_logdet.data ? load<T>(p.grad_logdet, place.row * p.grad_logdet.batch) : T(0);
  for (int64_t item = place.first; item < place.last; item += place.step) {
    int64_t at[P::kOperands];
    locate(p.layout, item * V, at);
#pragma unroll
    for (int n = 0; n < P::kOperands; ++n) at[n] += place.row * p.operand[n].batch;
    if (p.pairing.paired) {
      at[P::kShift] += V;
      at[P::kGradShift] += V;
    }
    T in[4][V], grad[3][V];
    load_all<T, V>({&p.operand[P::kX], &p.operand[P::kRaw], &p.operand[P::kShift], &p.operand[P::kGradY]},
                            {at[P::kX], at[P::kRaw], at[P::kShift], at[P::kGradY]}, in);
    separate(p.pairing, in[1], in[2]);
    ScaleSlope<T> scale[V];
    slopes(p.map, in[1], scale);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      CoupledGradient<T> g;
      if (p.operand[P::kGradY].data)
        g = coupled_gradient(p.map.constants, scale[e], in[3][e], gl, in[0][e], in[2][e], p.map.inverse,
                             p.map.shift_first, separate_slope);
      else
        g = {T(0), log_gradient(scale[e], gl, p.map.inverse), T(0)};  // y is not used: exact zeros
      grad[0][e] = g.x;
      grad[1][e] = g.raw;
      grad[2][e] = g.shift;
    }
    alternate(p.pairing, grad[1], grad[2]);
#pragma unroll
    for (int n = 0; n < 3; ++n)
      if (p.operand[P::kGradX + n].data) store_one<T>(p.operand[P::kGradX + n], at[P::kGradX + n], grad[n]);
  }
}

// Views of the raw scale and the shift, in packed params, as a pair, or the shift alone.
struct Params {
  View raw, shift;
};

Params params_of(const optional<Tensor>& params, const optional<Tensor>& shift, Kind kind, bool packed, int64_t flags) {
  if (kind == Kind::additive) return {no_view(), view_of(params)};
  if (!packed) return {view_of(params), view_of(shift)};
  if (!params) return {};
  Halves halves = halves_of(*params, flags & kInterleaved);
  return flags & kShiftInFront ? Params{halves.second, halves.first} : Params{halves.first, halves.second};
}


// Whether the halves alternate in memory along the layout's dense axis.
bool alternate_in_memory(const Params& params, int64_t raw_stride, int64_t shift_stride) {
  const auto raw = reinterpret_cast<intptr_t>(params.raw.operand.data);
  const auto shift = reinterpret_cast<intptr_t>(params.shift.operand.data);
  const int64_t bytes = bytes_of(params.raw.operand.dtype);
  return raw && shift && raw_stride == 2 && shift_stride == 2 && (raw - shift == bytes || shift - raw == bytes);
}

void point_at_pairs(Params& params) {
  void*& raw = params.raw.operand.data;
  void*& shift = params.shift.operand.data;
  raw = shift = std::min(raw, shift);
}

template <class T>
void forward(const Tensor& x, const Tensor& params, const optional<Tensor>& shift, const optional<Tensor>& logdet,
             const optional<Tensor>& passive, const Tensor& y, const Tensor& total, int64_t flags, const Map<T>& map) {
  using P = Forward<T>;
  const int64_t rows = x.size(0), passive_channels = passive ? passive->size(1) : 0;
  View from = view_of(x), to = view_of(y, passive_channels);
  Params halves = params_of(params, shift, map.kind, !shift, flags);
  const std::array<const View*, 4> views{&from, &halves.raw, &halves.shift, &to};
  P p{};
  p.map = map;
  p.layout = layout_of<4>(sample_sizes(x), views);
  const int last = std::max(p.layout.rank - 1, 0);
  p.pairing = {alternate_in_memory(halves, p.layout.stride[P::kRaw][last], p.layout.stride[P::kShift][last]),
               (flags & kShiftInFront) != 0};
  const Params apart = halves;
  if (p.pairing.paired) point_at_pairs(halves);
  const int step = p.pairing.paired ? 2 : 1;
  bool vector = sizeof(T) == 4 && vectorise<4>(p.layout, views, {1, step, step, 1}, kVector);
  View passive_from = view_of(passive), passive_to = passive ? view_of(y) : no_view();
  if (passive) {
    const std::array<const View*, 2> pair{&passive_from, &passive_to};
    p.passive_layout = layout_of<2>(sample_sizes(*passive), pair);
    Layout<2> dense = p.passive_layout;
    const bool fits = p.passive_layout.elements == 0 || vectorise<2>(dense, pair, {1, 1}, kVector);
    vector = vector && fits;
    if (vector) p.passive_layout = dense;
  }
  if (!vector && p.pairing.paired) {
    p.pairing.paired = false;
    halves = apart;
  }
  const int width = vector ? kVector : 1;
  for (int n = 0; n < P::kOperands; ++n) p.operand[n] = views[n]->operand;
  p.passive = passive_from.operand;
  p.passive_y = passive_to.operand;
  p.passive_items = p.passive_layout.elements / width;
  p.tiles = tile_rows(rows, std::max(p.layout.elements / width, passive ? int64_t{1} : int64_t{0}), width);
  p.tiles.items = p.layout.elements / width;
  if (logdet) p.running = {logdet->data_ptr(), logdet->stride(0), dtype_of(*logdet)};
  p.logdet = static_cast<T*>(total.data_ptr());
  const Stream stream(x);
  optional<Tensor> partial;
  if (p.tiles.chunks > 1) {
    partial = empty({rows, p.tiles.chunks}, ScalarType::Double, x);
    p.partial = static_cast<double*>(partial->data_ptr());
  }
  const auto affine_coupling_fwd_kernel = vector ? coupling_forward<T, sizeof(T) == 4 ? kVector : 1> : coupling_forward<T, 1>;
  FASTFLOW_LAUNCH(affine_coupling_fwd_kernel, p.tiles.grid(), p.tiles.block, 0, stream, p);
  if (!partial) return;
  const PartialSums sums{p.partial, rows, p.tiles.chunks};
  FASTFLOW_LAUNCH(finish_logdet<T>, finish_grid(sums), kBlock, 0, stream, sums, p.running, p.logdet);
}

template <class T>
void backward(const optional<Tensor>& grad_y, const optional<Tensor>& grad_logdet, const Tensor& x,
              const Tensor& params, const optional<Tensor>& shift, int64_t passive_channels,
              const optional<Tensor>& grad_x, const optional<Tensor>& grad_params, const optional<Tensor>& grad_shift,
              int64_t flags, const Map<T>& map) {
  using P = Backward<T>;
  View from = view_of(x), gx = view_of(grad_x), gy = grad_y ? view_of(*grad_y, passive_channels) : no_view();
  Params halves = params_of(params, shift, map.kind, !shift, flags);
  Params grads = params_of(grad_params, grad_shift, map.kind, !shift, flags);
  const std::array<const View*, 7> views{&from, &halves.raw, &halves.shift, &gy, &gx, &grads.raw, &grads.shift};
  P p{};
  p.map = map;
  p.layout = layout_of<7>(sample_sizes(x), views);
  if (p.layout.elements == 0) return;
  const int last = std::max(p.layout.rank - 1, 0);
  auto paired = [&](const Params& of, int raw) {
    return alternate_in_memory(of, p.layout.stride[raw][last], p.layout.stride[raw + 1][last]);
  };
  p.pairing = {paired(halves, P::kRaw) && (!grad_params || paired(grads, P::kGradRaw)), (flags & kShiftInFront) != 0};
  const Params apart = halves, grads_apart = grads;
  if (p.pairing.paired) {
    point_at_pairs(halves);
    if (grad_params) point_at_pairs(grads);
  }
  const int step = p.pairing.paired ? 2 : 1;
  const bool vector = sizeof(T) == 4 && vectorise<7>(p.layout, views, {1, step, step, 1, 1, step, step}, kVector);
  if (!vector && p.pairing.paired) {
    p.pairing.paired = false;
    halves = apart;
    grads = grads_apart;
  }
  for (int n = 0; n < P::kOperands; ++n) p.operand[n] = views[n]->operand;
  if (!p.pairing.paired && map.inverse == map.shift_first) p.operand[P::kShift] = {};  // these gradients don't read it
  if (grad_logdet) p.grad_logdet = {grad_logdet->data_ptr(), grad_logdet->stride(0), dtype_of(*grad_logdet)};
  const int width = vector ? kVector : 1;
  p.tiles = tile_rows(x.size(0), p.layout.elements / width, width);
  const Stream stream(x);
  const auto affine_coupling_bwd_kernel = vector ? coupling_backward<T, sizeof(T) == 4 ? kVector : 1> : coupling_backward<T, 1>;
  FASTFLOW_LAUNCH(affine_coupling_bwd_kernel, p.tiles.grid(), p.tiles.block, 0, stream, p);
}

}  // namespace

std::tuple<Tensor, Tensor> affine_coupling_fwd(
    const Tensor& x, const Tensor& params, const optional<Tensor>& shift, const optional<Tensor>& logdet,
    const optional<Tensor>& passive, int64_t flags, int64_t kind, double gain, double offset, double out_gain,
    double clamp, double eps, double hard_min, double hard_max, double shift_gain) {
  Dims sizes = sizes_of(x);
  if (passive) sizes[1] += passive->size(1);
  const Tensor y = empty_strided(sizes, strides_like(sizes, x), result_type(x, optional<Tensor>(params), shift, passive),
                                 x);
  const Tensor total = empty({x.size(0)}, compute_type(x.scalar_type()), x);
  auto run = [&]<class T>(T) {
    forward<T>(x, params, shift, logdet, passive, y, total, flags,
               make_map<T>(flags, kind, gain, offset, out_gain, clamp, eps, hard_min, hard_max, shift_gain));
  };
  x.scalar_type() == ScalarType::Double ? run(double()) : run(float());
  return {y, total};
}

std::tuple<Tensor, Tensor, Tensor> affine_coupling_bwd(
    const optional<Tensor>& grad_y, const optional<Tensor>& grad_logdet, const Tensor& x, const Tensor& params,
    const optional<Tensor>& shift, int64_t passive_channels, bool need_x, bool need_params, bool need_shift,
    int64_t flags, int64_t kind, double gain, double offset, double out_gain, double clamp, double eps,
    double hard_min, double hard_max, double shift_gain) {
  optional<Tensor> grad_x, grad_params, grad_shift;
  if (need_x) grad_x = gradient_of(x);
  if (need_params) grad_params = gradient_of(params);
  if (need_shift && shift) grad_shift = gradient_of(*shift);
  auto run = [&]<class T>(T) {
    backward<T>(grad_y, grad_logdet, x, params, shift, passive_channels, grad_x, grad_params, grad_shift, flags,
                make_map<T>(flags, kind, gain, offset, out_gain, clamp, eps, hard_min, hard_max, shift_gain));
  };
  if (need_x || need_params || need_shift) x.scalar_type() == ScalarType::Double ? run(double()) : run(float());
  auto result = [&](const optional<Tensor>& grad) { return grad ? *grad : nothing(x); };
  return {result(grad_x), result(grad_params), result(grad_shift)};
}

}  // namespace fastflow
