// affine_coupling_bwd: the gradients of x and the params in one pass.
#include "affine_coupling.cuh"

namespace fastflow {
namespace {

// Separate: the map has bounds, or is softplus.
template <bool Separate, class T, int V>
__device__ __forceinline__ void slopes(const Map<T>& map, const T (&raw)[V], ScaleSlope<T> (&scale)[V]) {
  with_kind(map.kind, [&]<Kind K>() {
    if constexpr (Separate || K != Kind::softplus) {
#pragma unroll
      for (int e = 0; e < V; ++e) scale[e] = scale_slope<K, false, false>(map.constants, raw[e]);
    }
  });
  if constexpr (Separate) {
    limit(map, scale);
  } else if (map.eps) {
#pragma unroll
    for (int e = 0; e < V; ++e) scale[e] = with_eps(map.constants, scale[e]);
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

template <class T>
struct Backward {
  enum { kX, kRaw, kShift, kGradY, kGradX, kGradRaw, kGradShift, kOperands };
  Map<T> map;
  Tiles tiles;
  Pairing pairing;
  Operand operand[kOperands];
  Layout<kOperands> layout;
  Operand grad_logdet;
  Passive passive;
};

template <class T, int V, int D>
__global__ void __launch_bounds__(kBlock, D == kMixed ? 2 : 3)
    coupling_backward(const __grid_constant__ Backward<T> p) {
  using P = Backward<T>;
  const Place place = place_of(p.tiles);
  if (!place.inside) return;
  copy_passive<T, V, D>(p.passive, p.tiles, place);  // before the loop below: after it sm_100 spills
  const bool separate_slope = p.map.bounds || p.map.kind == Kind::softplus;
  const T gl = p.grad_logdet.data ? load<T>(p.grad_logdet, place.row * p.grad_logdet.batch) : T(0);
  for (int64_t item = place.first; item < place.last; item += place.step) {
    int64_t at[P::kOperands];
    locate_item<D != kMixed, V>(p.layout, item, at);
#pragma unroll
    for (int n = 0; n < P::kOperands; ++n) at[n] += place.row * p.operand[n].batch;
    if (D == kMixed && p.pairing.paired) {
      at[P::kShift] += V;
      at[P::kGradShift] += V;
    }
    T in[4][V], grad[3][V];
    load_all<T, V, D>({&p.operand[P::kX], &p.operand[P::kRaw], &p.operand[P::kShift], &p.operand[P::kGradY]},
                      {at[P::kX], at[P::kRaw], at[P::kShift], at[P::kGradY]}, in);
    if constexpr (D == kMixed) separate(p.pairing, in[1], in[2]);
    auto through_map = [&]<bool Separate>() {
      ScaleSlope<T> scale[V];
      slopes<Separate>(p.map, in[1], scale);
      if (!p.operand[P::kGradY].data) {  // y is not used: exact zeros
#pragma unroll
        for (int e = 0; e < V; ++e) {
          grad[0][e] = grad[2][e] = T(0);
          grad[1][e] = log_gradient(scale[e], gl, p.map.inverse);
        }
        return;
      }
      with_order(p.map.inverse, p.map.shift_first, [&]<bool Inverse, bool ShiftFirst>() {
#pragma unroll
        for (int e = 0; e < V; ++e) {
          const CoupledGradient<T> g = coupled_gradient(p.map.constants, scale[e], in[3][e], gl, in[0][e], in[2][e],
                                                        Inverse, ShiftFirst, Separate);
          grad[0][e] = g.x;
          grad[1][e] = g.raw;
          grad[2][e] = g.shift;
        }
      });
    };
    if (separate_slope) through_map.template operator()<true>();
    else through_map.template operator()<false>();
    if constexpr (D == kMixed) alternate(p.pairing, grad[1], grad[2]);
#pragma unroll
    for (int n = 0; n < 3; ++n)
      if (p.operand[P::kGradX + n].data) store_one<T, V, D>(p.operand[P::kGradX + n], at[P::kGradX + n], grad[n]);
  }
}

template <class T>
void backward(const optional<Tensor>& grad_y, const optional<Tensor>& grad_logdet, const Tensor& x,
              const Tensor& params, const optional<Tensor>& shift, int64_t kept,
              const optional<Tensor>& grad_x, const optional<Tensor>& grad_params, const optional<Tensor>& grad_shift,
              int64_t flags, const Map<T>& map) {
  using P = Backward<T>;
  const CouplingParts of_x(x.size(1), kept);
  // Where x keeps no channels of its own, those that grad_y has more than x belong to a tensor in front.
  const CouplingParts of_y =
      grad_y && kept == 0 ? CouplingParts(grad_y->size(1), grad_y->size(1) - x.size(1)) : of_x;
  const bool passes = grad_x && of_x.passive.count > 0;
  View from = view_of(x, of_x.active.first), gx = view_of(grad_x, of_x.active.first);
  View gy = view_of(grad_y, of_y.active.first);
  Params halves = params_of(params, shift, map.kind, !shift, flags);
  Params grads = params_of(grad_params, grad_shift, map.kind, !shift, flags);
  const std::array<const View*, 7> views{&from, &halves.raw, &halves.shift, &gy, &gx, &grads.raw, &grads.shift};
  P p{};
  p.map = map;
  p.layout = layout_of<7>(sample_sizes(x, of_x.active.count), views);
  if (x.numel() == 0 || (p.layout.elements == 0 && !passes)) return;
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
  bool vector = sizeof(T) == 4 && vectorise<7>(p.layout, views, {1, step, step, 1, 1, step, step}, kVector);
  if (passes)
    p.passive = passive_of(view_of(grad_y, of_y.passive.first), view_of(grad_x, of_x.passive.first),
                           sample_sizes(x, of_x.passive.count), vector);
  if (!vector && p.pairing.paired) {
    p.pairing.paired = false;
    halves = apart;
    grads = grads_apart;
  }
  for (int n = 0; n < P::kOperands; ++n) p.operand[n] = views[n]->operand;
  if (!p.pairing.paired && map.inverse == map.shift_first) p.operand[P::kShift] = {};  // these gradients don't read it
  if (grad_logdet) p.grad_logdet = {grad_logdet->data_ptr(), grad_logdet->stride(0), dtype_of(*grad_logdet)};
  const int width = vector ? kVector : 1;
  p.tiles = tile_rows(x.size(0), std::max(p.layout.elements / width, passes ? int64_t{1} : int64_t{0}), width, false);
  p.tiles.items = p.layout.elements / width;
  const Stream stream(x);
  std::array<Operand, P::kOperands + 2> operands;
  std::copy(p.operand, p.operand + P::kOperands, operands.begin());
  operands[P::kOperands] = p.passive.to;
  operands[P::kOperands + 1] = p.passive.from;
  const bool dense = vector && is_dense<7>(p.layout, views) && p.passive.dense;
  with_access<T>(vector, dense, common_dtype(operands), [&]<int V, int D>() {
    const auto affine_coupling_bwd_kernel = coupling_backward<T, V, D>;
    FASTFLOW_LAUNCH(affine_coupling_bwd_kernel, p.tiles.grid(), p.tiles.block, 0, stream, p);
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> affine_coupling_bwd(
    const optional<Tensor>& grad_y, const optional<Tensor>& grad_logdet, const Tensor& x, const Tensor& params,
    const optional<Tensor>& shift, int64_t kept, bool need_x, bool need_params, bool need_shift,
    int64_t flags, int64_t kind, double gain, double offset, double out_gain, double clamp, double eps,
    double hard_min, double hard_max, double shift_gain) {
  optional<Tensor> grad_x, grad_params, grad_shift;
  if (need_x) grad_x = gradient_of(x);
  if (need_params) grad_params = gradient_of(params);
  if (need_shift && shift) grad_shift = gradient_of(*shift);
  auto run = [&]<class T>(T) {
    backward<T>(grad_y, grad_logdet, x, params, shift, kept, grad_x, grad_params, grad_shift, flags,
                make_map<T>(flags, kind, gain, offset, out_gain, clamp, eps, hard_min, hard_max, shift_gain));
  };
  if (need_x || need_params || need_shift) x.scalar_type() == ScalarType::Double ? run(double()) : run(float());
  auto result = [&](const optional<Tensor>& grad) { return grad ? *grad : nothing(x); };
  return {result(grad_x), result(grad_params), result(grad_shift)};
}

}  // namespace fastflow
