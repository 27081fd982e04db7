// affine_coupling_fwd: y and log-det in one pass over x and the params.
#include "affine_coupling.cuh"

namespace fastflow {
namespace {

template <class T, int V>
__device__ __forceinline__ void scales(const Map<T>& map, const T (&raw)[V], Scale<T> (&scale)[V]) {
  with_kind(map.kind, [&]<Kind K>() {
#pragma unroll
    for (int e = 0; e < V; ++e) scale[e] = scale_of<K, false, false>(map.constants, raw[e]);
  });
  limit(map, scale);
}

template <class T>
struct Forward {
  enum { kX, kRaw, kShift, kY, kOperands };
  Map<T> map;
  Tiles tiles;
  Pairing pairing;
  Operand operand[kOperands];
  Layout<kOperands> layout;
  Passive passive;
  Operand running;  // log-det so far
  T* logdet;
  double* partial;  // (rows, chunks), null where a row is one chunk
};

template <class T, int V, int D>
__global__ void __launch_bounds__(kBlock, D == kMixed ? 2 : 3) coupling_forward(const __grid_constant__ Forward<T> p) {
  using P = Forward<T>;
  const Place place = place_of(p.tiles);
  double total = 0;
  for (int64_t item = place.first; item < place.last; item += place.step) {
    int64_t at[P::kOperands];
    locate_item<D != kMixed, V>(p.layout, item, at);
#pragma unroll
    for (int n = 0; n < P::kOperands; ++n) at[n] += place.row * p.operand[n].batch;
    if (D == kMixed && p.pairing.paired) at[P::kShift] += V;
    T in[3][V], y[V];
    load_all<T, V, D>({&p.operand[P::kX], &p.operand[P::kRaw], &p.operand[P::kShift]},
                      {at[P::kX], at[P::kRaw], at[P::kShift]}, in);
    if constexpr (D == kMixed) separate(p.pairing, in[1], in[2]);
    Scale<T> scale[V];
    scales(p.map, in[1], scale);
    with_order(p.map.inverse, p.map.shift_first, [&]<bool Inverse, bool ShiftFirst>() {
#pragma unroll
      for (int e = 0; e < V; ++e)
        y[e] = coupled(p.map.constants, scale[e].s, in[0][e], in[2][e], Inverse, ShiftFirst);
    });
    store_one<T, V, D>(p.operand[P::kY], at[P::kY], y);
#pragma unroll
    for (int e = 0; e < V; ++e) total += scale[e].log_s;
  }
  total = group_sum(p.map.inverse ? -total : total, p.tiles.group);
  if (place.leads) {
    if (p.partial) p.partial[place.row * p.tiles.chunks + place.chunk] = total;
    else p.logdet[place.row] =
        static_cast<T>(p.running.data ? load<T>(p.running, place.row * p.running.batch) + total : total);
  }
  copy_passive<T, V, D>(p.passive, p.tiles, place);
}

template <class T>
void forward(const Tensor& x, const Tensor& params, const optional<Tensor>& shift, const optional<Tensor>& logdet,
             const optional<Tensor>& passive, int64_t kept, const Tensor& y, const Tensor& total, int64_t flags,
             const Map<T>& map) {
  using P = Forward<T>;
  const int64_t rows = x.size(0);
  const CouplingParts of_x(x.size(1), kept), of_y(y.size(1), passive ? passive->size(1) : kept);
  const bool passes = of_y.passive.count > 0;
  View from = view_of(x, of_x.active.first), to = view_of(y, of_y.active.first);
  Params halves = params_of(params, shift, map.kind, !shift, flags);
  const std::array<const View*, 4> views{&from, &halves.raw, &halves.shift, &to};
  P p{};
  p.map = map;
  p.layout = layout_of<4>(sample_sizes(x, of_x.active.count), views);
  const int last = std::max(p.layout.rank - 1, 0);
  p.pairing = {alternate_in_memory(halves, p.layout.stride[P::kRaw][last], p.layout.stride[P::kShift][last]),
               (flags & kShiftInFront) != 0};
  const Params apart = halves;
  if (p.pairing.paired) point_at_pairs(halves);
  const int step = p.pairing.paired ? 2 : 1;
  bool vector = sizeof(T) == 4 && vectorise<4>(p.layout, views, {1, step, step, 1}, kVector);
  if (passes)
    p.passive = passive_of(passive ? view_of(*passive) : view_of(x, of_x.passive.first),
                           view_of(y, of_y.passive.first), sample_sizes(y, of_y.passive.count), vector);
  if (!vector && p.pairing.paired) {
    p.pairing.paired = false;
    halves = apart;
  }
  const int width = vector ? kVector : 1;
  for (int n = 0; n < P::kOperands; ++n) p.operand[n] = views[n]->operand;
  p.tiles = tile_rows(rows, std::max(p.layout.elements / width, passes ? int64_t{1} : int64_t{0}), width);
  p.tiles.items = p.layout.elements / width;
  if (logdet) p.running = {logdet->data_ptr(), logdet->stride(0), dtype_of(*logdet)};
  p.logdet = static_cast<T*>(total.data_ptr());
  const Stream stream(x);
  optional<Tensor> partial;
  if (p.tiles.chunks > 1) {
    partial = empty({rows, p.tiles.chunks}, ScalarType::Double, x);
    p.partial = static_cast<double*>(partial->data_ptr());
  }
  const std::array<Operand, 6> operands{p.operand[P::kX], p.operand[P::kRaw], p.operand[P::kShift], p.operand[P::kY],
                                        p.passive.to, p.passive.from};
  const bool dense = vector && is_dense<4>(p.layout, views) && p.passive.dense;
  with_access<T>(vector, dense, common_dtype(operands), [&]<int V, int D>() {
    const auto affine_coupling_fwd_kernel = coupling_forward<T, V, D>;
    FASTFLOW_LAUNCH(affine_coupling_fwd_kernel, p.tiles.grid(), p.tiles.block, 0, stream, p);
  });
  if (!partial) return;
  const PartialSums sums{p.partial, rows, p.tiles.chunks};
  FASTFLOW_LAUNCH(finish_logdet<T>, finish_grid(sums), kBlock, 0, stream, sums, p.running, p.logdet);
}

}  // namespace

std::tuple<Tensor, Tensor> affine_coupling_fwd(
    const Tensor& x, const Tensor& params, const optional<Tensor>& shift, const optional<Tensor>& logdet,
    const optional<Tensor>& passive, int64_t kept, int64_t flags, int64_t kind, double gain, double offset,
    double out_gain, double clamp, double eps, double hard_min, double hard_max, double shift_gain) {
  Dims sizes = sizes_of(x);
  if (passive) sizes[1] += passive->size(1);
  const ScalarType dtype = result_type(x, optional<Tensor>(params), shift, passive);
  const Tensor y = empty_strided(sizes, strides_like(sizes, x), dtype, x);
  const Tensor total = empty({x.size(0)}, compute_type(x.scalar_type()), x);
  auto run = [&]<class T>(T) {
    forward<T>(x, params, shift, logdet, passive, kept, y, total, flags,
               make_map<T>(flags, kind, gain, offset, out_gain, clamp, eps, hard_min, hard_max, shift_gain));
  };
  x.scalar_type() == ScalarType::Double ? run(double()) : run(float());
  return {y, total};
}

}  // namespace fastflow
