// mlp_flow_bwd: the gradients from what every step overwrote, the networks' activations computed again in the tile; the
// parameters' as partial sums of each block, which a second kernel adds up.
#include "mlp_flow_gradient.cuh"

namespace fastflow {
namespace {

constexpr int kMostBlocks = 128;                     // that keep partial sums
constexpr int64_t kMostPartials = int64_t(1) << 24;  // elements of all of them, unless that leaves too few blocks
constexpr int64_t kLeastBlocks = 16;
constexpr int kHeld = 4;                             // saved features that a thread reads ahead

template <class T>
struct Backward {
  FlowProgram<T> program;
  FlowMatrix<T> z, context, grad_z, grad_context_in;
  FlowMatrix<T> grad_logdet;
  const T* saved;
  T *state, *grad_x, *grad_context;  // or null: the state before these steps, and the gradients
  T* partial;                        // or null
  int64_t partials, tiles;
};

// Features of shared memory: state, gradient and context, twice, what a network sees, its hidden layers' activations,
// their slopes where silu needs them, the gradients of two layers' outputs, that of the log-determinant.
template <class T>
__host__ __device__ int lines_of(const FlowProgram<T>& p) {
  const int seen = p.context_features == 0 ? 0 : p.features + 3 * p.context_features;
  return 2 * p.features + seen + p.deepest + p.sloped + 2 * p.widest + 1;
}

// partial holds the gradient of bias, then that of log_scale. A barrier comes first and last.
template <int R, class T>
__device__ __forceinline__ void channel_backward(const FlowProgram<T>& p, const FlowLinear<T>& channel, int rows,
                                                 const T* saved, const T* grad_logdet, bool fresh, T* state, T* grad,
                                                 T* partial) {
  const int r = static_cast<int>(threadIdx.x) % R;
  __syncthreads();
  each_feature<R>(p.features, [&](int f) {
    if (r < rows) state[f * kLine<R> + r] = saved[f * p.batch + r];
  });
  __syncthreads();
  for (int f = static_cast<int>(threadIdx.x); partial != nullptr && f < p.features; f += kThreads) {
    // In double throughout: the two parts of log_scale's gradient may cancel.
    const double scale = math::exp(static_cast<double>(p.inverse ? -channel.weight[f] : channel.weight[f]));
    const double bias = p.inverse ? 0. : static_cast<double>(channel.bias[f]);
    double to_bias = 0, to_scale = 0, through_logdet = 0;
    for (int i = 0; i < rows; ++i) {
      const double g = static_cast<double>(grad[f * kLine<R> + i]), x = static_cast<double>(state[f * kLine<R> + i]);
      to_bias += g;
      to_scale += g * (x + bias);
      through_logdet += static_cast<double>(grad_logdet[i]);
    }
    if (!p.inverse) to_bias *= scale;
    const double total = to_scale * scale + through_logdet;
    put(fresh, partial + channel.grad + f, static_cast<T>(p.inverse ? -to_bias : to_bias));
    put(fresh, partial + channel.grad + p.features + f, static_cast<T>(p.inverse ? -total : total));
  }
  __syncthreads();
  each_feature<R>(p.features, [&](int f) {
    grad[f * kLine<R> + r] *= math::exp(p.inverse ? -channel.weight[f] : channel.weight[f]);
  });
  __syncthreads();
}

// What a step overwrote: read before it is needed.
template <int R, class T>
struct Held {
  T value[kHeld];

  __device__ __forceinline__ Held(const FlowProgram<T>& p, const FlowSplit& split, int rows, const T* saved) {
    const int r = static_cast<int>(threadIdx.x) % R, f = static_cast<int>(threadIdx.x) / R;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const bool there = f < kGroups && r < rows && f + i * kGroups < split.active;
      value[i] = there ? saved[(f + i * kGroups) * p.batch + r] : T(0);
    }
  }

  // As each_feature shares the features out.
  __device__ __forceinline__ void restore(const FlowProgram<T>& p, const FlowSplit& split, int rows, const T* saved,
                                          T* state) const {
    const int r = static_cast<int>(threadIdx.x) % R, f = static_cast<int>(threadIdx.x) / R;
    if (f >= kGroups || r >= rows) return;
    T* const to = state + split.active_begin * kLine<R> + r;
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (f + i * kGroups < split.active) to[(f + i * kGroups) * kLine<R>] = value[i];
#pragma unroll 1
    for (int i = f + kHeld * kGroups; i < split.active; i += kGroups) to[i * kLine<R>] = saved[i * p.batch + r];
  }
};

// The params become their gradients, the gradient of y that of x.
template <int R, class T>
__device__ __forceinline__ void uncouple_tile(const FlowStep& step, const Map<T>& map, const FlowSplit& split,
                                              const T* state, const T* grad_logdet, T* params, T* grad) {
  const int r = static_cast<int>(threadIdx.x) % R;
  const bool additive = map.kind == Kind::additive;
  const bool separate = map.bounds || map.kind == Kind::softplus;
  each_feature<R>(split.active, [&](int f) {
    const ParamRows of = param_rows(step, additive, split.active, f);
    T& raw = params[of.raw * kLine<R> + r];
    T& shift = params[of.shift * kLine<R> + r];
    const int at = (split.active_begin + f) * kLine<R> + r;
    ScaleSlope<T> scale[1];
    with_kind(map.kind, [&]<Kind K>() {
      scale[0] = scale_slope<K, false, false>(map.constants, additive ? T(0) : raw);
    });
    limit(map, scale);
    const CoupledGradient<T> out = coupled_gradient(map.constants, scale[0], grad[at], grad_logdet[r], state[at], shift,
                                                    map.inverse, map.shift_first, separate);
    grad[at] = out.x;
    if (!additive) raw = out.raw;
    shift = out.shift;
  });
}

template <int R, class T>
__global__ void __launch_bounds__(kThreads, 1) flow_backward(const __grid_constant__ Backward<T> job) {
  FASTFLOW_DYNAMIC_SHARED(unsigned char, shared);
  const FlowProgram<T>& p = job.program;
  const FlowTables<T>& tables = shared_tables(p.tables, shared);
  T* const slots = reinterpret_cast<T*>(shared + sizeof(FlowTables<T>));
  T* const state = slots + p.slots * p.slot;
  T* const grad = state + p.features * kLine<R>;
  T* const context = grad + p.features * kLine<R>;
  T* const grad_context = context + p.context_features * kLine<R>;
  T* const input = grad_context + p.context_features * kLine<R>;
  T* const hidden = input + (p.context_features == 0 ? 0 : p.features + p.context_features) * kLine<R>;
  T* const slopes = hidden + p.deepest * kLine<R>;
  T* const outputs = slopes + p.sloped * kLine<R>;  // their gradients; those of the layer below behind them
  T* const grad_logdet = outputs + 2 * p.widest * kLine<R>;
  T* const partial = job.partial == nullptr ? nullptr : job.partial + static_cast<int64_t>(blockIdx.x) * job.partials;
  __syncthreads();
  Weights<true, T> weights(p, tables, slots, (job.tiles - blockIdx.x + gridDim.x - 1) / gridDim.x);
#pragma unroll 1
  for (int64_t tile = blockIdx.x; tile < job.tiles; tile += gridDim.x) {
    const bool fresh = tile == static_cast<int64_t>(blockIdx.x);
    const int64_t first = tile * R;
    const int rows = p.batch - first < R ? static_cast<int>(p.batch - first) : R;
    load_tile<R>(job.z, first, rows, p.features, state);
    load_tile<R>(job.grad_z, first, rows, p.features, grad);
    load_tile<R>(job.context, first, rows, p.context_features, context);
    load_tile<R>(job.grad_context_in, first, rows, p.context_features, grad_context);
    load_tile<R>(job.grad_logdet, first, rows, 1, grad_logdet);
#pragma unroll 1
    for (int s = p.count - 1; s >= 0; --s) {
      const FlowStep& step = tables.steps[s];
      const FlowSplit split = split_of(step, p.features);
      const FlowLinear<T>* linears = tables.linears + step.first;
      const T* const saved = job.saved + step.saved * p.batch + first;
      if (!step.coupling) {
        channel_backward<R>(p, linears[0], rows, saved, grad_logdet, fresh, state, grad, partial);
        continue;
      }
      const Held<R, T> held(p, split, rows, saved);
      const T* const x = input_of<R>(split, p.context_features, state, context, input);
      const bool silu = static_cast<Activation>(step.activation) == Activation::silu;
      int depth = 0;  // lines of the hidden layers below
#pragma unroll 1
      for (int l = 0; l < step.count; ++l) {
        const FlowLinear<T>& linear = linears[l];
        const bool last = l + 1 == step.count;
        const T* const from = l == 0 ? x : hidden + (depth - linear.in) * kLine<R>;
        T* const to = last ? outputs : hidden + depth * kLine<R>;
        T* const slope = silu ? slopes + depth * kLine<R> : nullptr;
        int row = 0;
        do {
          linear_forward<R>(linear, row, weights.next(), from, step.activation, last, slope, to);
        } while ((row += linear.piece) < linear.out);
        if (!last) depth += linear.out;
      }
      held.restore(p, split, rows, saved, state);
      __syncthreads();
      uncouple_tile<R>(step, tables.maps[step.map], split, state, grad_logdet, outputs, grad);
      T* above = outputs;
      T* below = outputs + p.widest * kLine<R>;
#pragma unroll 1
      for (int l = step.count - 1; l >= 0; --l) {
        const FlowLinear<T>& linear = linears[l];
        if (l > 0) depth -= linear.in;
        const T* const from = l == 0 ? x : hidden + depth * kLine<R>;
        const T* const kept = (silu ? slopes : hidden) + depth * kLine<R>;
        int row = 0;
        do {
          const T* const weight = weights.next();
          if (row == 0 && partial != nullptr) parameter_gradient<R>(linear, rows, from, above, fresh, partial);
          const int out = linear.out - row < linear.piece ? linear.out - row : linear.piece;
          const bool last = row + linear.piece >= linear.out;
          product<R, true>(
              linear.in, out, weight, linear.line, above + row * kLine<R>, l == 0 || row > 0,
              [&](int j) {
                if (l > 0) return below + j * kLine<R>;
                return j < split.passive ? grad + (split.passive_begin + j) * kLine<R>
                                         : grad_context + (j - split.passive) * kLine<R>;
              },
              [&]<int N>(int j, int r, T(&values)[N]) {
                if (l > 0 && last) activation_gradient(step.activation, kept + j * kLine<R> + r, values);
              },
              false, [](auto&&...) {});
        } while ((row += linear.piece) < linear.out);
        T* const done = above;
        above = below;
        below = done;
      }
    }
    __syncthreads();
    if (job.grad_x != nullptr) store_tile<R>(grad, first, rows, p.features, job.grad_x);
    if (job.state != nullptr) store_tile<R>(state, first, rows, p.features, job.state);
    if (job.grad_context != nullptr) store_tile<R>(grad_context, first, rows, p.context_features, job.grad_context);
    __syncthreads();
  }
}

static_assert(sizeof(Backward<double>) <= 4096);  // of a kernel's parameters

template <class T>
void backward(const Program& program, const optional<Tensor>& grad_z, const optional<Tensor>& grad_logdet,
              const Tensor& z, const Tensor& saved, const optional<Tensor>& context, const std::vector<Tensor>& params,
              bool inverse, const Tensor* grad_x, const Tensor* grad_context, const std::vector<Tensor>& grads,
              const Stream& stream) {
  std::vector<FlowProgram<T>> pieces = flow_programs<T>(program, params, inverse);
  if (pieces.empty()) pieces.push_back({.features = static_cast<int>(program.features), .batch = program.batch});
  int64_t partials = 0;
  for (const Tensor& t : grads) partials += t.numel();
  std::vector<FlowPlan> plans;
  for (FlowProgram<T>& piece : pieces) plans.push_back(plan_of(piece, lines_of(piece), 0, stream.shared_limit()));
  // Every piece of the flow adds to the partial sums of all blocks, so that they have the same number of them.
  int64_t blocks = tiles_of(program.batch, plans.front().rows);
  for (const FlowPlan& plan : plans) blocks = std::min(blocks, tiles_of(program.batch, plan.rows));
  if (!grads.empty())
    blocks = std::min(blocks, std::clamp<int64_t>(kMostPartials / std::max<int64_t>(partials, 1), kLeastBlocks,
                                                  kMostBlocks));
  const Tensor partial = empty({grads.empty() ? 0 : blocks * partials}, z.scalar_type(), z);
  optional<Tensor> state, carried;  // from one piece to the one before it
  auto data_of = [](const Tensor* t) { return t == nullptr ? nullptr : static_cast<T*>(t->data_ptr()); };
  if (pieces.size() > 1) {
    state = empty(sizes_of(z), z.scalar_type(), z);
    carried = grad_x != nullptr ? *grad_x : empty(sizes_of(z), z.scalar_type(), z);
  }
  for (size_t i = pieces.size(); i-- > 0;) {
    const bool last = i == pieces.size() - 1;
    Backward<T> job{};
    job.program = pieces[i];
    job.z = matrix_of<T>(last ? z : *state);
    job.context = matrix_of<T>(context);
    job.grad_z = matrix_of<T>(last ? grad_z : carried);
    if (!last && grad_context != nullptr) job.grad_context_in = matrix_of<T>(*grad_context);
    job.grad_logdet = matrix_of<T>(grad_logdet);
    job.saved = static_cast<const T*>(saved.data_ptr());
    job.state = state ? data_of(&*state) : nullptr;
    job.grad_x = carried ? data_of(&*carried) : data_of(grad_x);
    job.grad_context = data_of(grad_context);
    job.partial = grads.empty() ? nullptr : static_cast<T*>(partial.data_ptr());
    job.partials = partials;
    job.tiles = tiles_of(program.batch, plans[i].rows);
    if (plans[i].rows == 16) FASTFLOW_LAUNCH((flow_backward<16, T>), blocks, kThreads, plans[i].bytes, stream, job);
    else FASTFLOW_LAUNCH((flow_backward<32, T>), blocks, kThreads, plans[i].bytes, stream, job);
  }
  reduce<T>(grads, partial, partials, blocks, stream);
}

}  // namespace

std::tuple<Tensor, Tensor, std::vector<Tensor>> mlp_flow_bwd(
    const optional<Tensor>& grad_z, const optional<Tensor>& grad_logdet, const Tensor& z, const Tensor& saved,
    const optional<Tensor>& context, std::vector<Tensor> params, std::vector<int64_t> steps,
    std::vector<double> constants, bool inverse, bool need_x, bool need_context, bool need_params) {
  const std::vector<Tensor> dense = contiguous_params(params);
  const Program program(z, context, dense, steps, constants);
  const ScalarType dtype = z.scalar_type();
  need_context = need_context && context;
  const Tensor grad_x = need_x ? empty(sizes_of(z), dtype, z) : nothing(z);
  const Tensor grad_context = need_context ? empty(sizes_of(*context), dtype, z) : nothing(z);
  std::vector<Tensor> grads;
  for (size_t p = 0; need_params && p < params.size(); ++p) grads.push_back(empty(sizes_of(params[p]), dtype, z));
  const Stream stream(z);
  auto run = [&]<class T>(T) {
    backward<T>(program, grad_z, grad_logdet, z, saved, context, dense, inverse, need_x ? &grad_x : nullptr,
                need_context ? &grad_context : nullptr, grads, stream);
  };
  if (dtype == ScalarType::Double) run(double());
  else run(float());
  return {grad_x, grad_context, grads};
}

}  // namespace fastflow
