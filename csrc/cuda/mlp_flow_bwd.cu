// mlp_flow_bwd: the gradients from what every step overwrote, the networks' activations computed again in the tile; the
// parameters' as partial sums of each block, which a second kernel adds up.
#include "mlp_flow.cuh"

namespace fastflow {
namespace {

constexpr int kMostBlocks = 128;                        // that keep partial sums
constexpr int64_t kMostPartials = int64_t(1) << 24;     // elements of all of them, unless that leaves too few blocks
constexpr int64_t kLeastBlocks = 16;
constexpr int kMostParameters = 192;  // of a launch of the second kernel

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

// Features of shared memory: state, gradient and context, twice, what a network sees, its layers' values before their
// activations, one layer's after it.
template <class T>
__host__ __device__ int lines_of(const FlowProgram<T>& p) {
  const int seen = p.context_features == 0 ? 0 : p.features + 3 * p.context_features;
  return 2 * p.features + seen + p.deepest + p.widest;
}

// to = value, or to += value after a block's first tile.
template <class T>
__device__ __forceinline__ void put(bool fresh, T* to, T value) {
  *to = fresh ? value : *to + value;
}

// The gradients of a layer's weight and bias over the tile's samples: a square of 4 x 4 elements to a thread.
template <class T>
__device__ __forceinline__ void parameter_gradient(const FlowLinear<T>& linear, int rows, const T* x, const T* grad,
                                                   bool fresh, T* partial) {
  const int across = (linear.in + 3) / 4, squares = (linear.out + 3) / 4 * across;
  for (int square = static_cast<int>(threadIdx.x); square < squares; square += kThreads) {
    const int j0 = square / across * 4, k0 = square % across * 4;
    T sum[4][4] = {};
    for (int r = 0; r < rows; ++r) {
      T g[4], value[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        g[e] = grad[(j0 + e < linear.out ? j0 + e : j0) * kLine + r];
        value[e] = x[(k0 + e < linear.in ? k0 + e : k0) * kLine + r];
      }
#pragma unroll
      for (int a = 0; a < 4; ++a)
#pragma unroll
        for (int b = 0; b < 4; ++b) sum[a][b] = math::fma(g[a], value[b], sum[a][b]);
    }
#pragma unroll
    for (int a = 0; a < 4; ++a)
#pragma unroll
      for (int b = 0; b < 4; ++b)
        if (j0 + a < linear.out && k0 + b < linear.in)
          put(fresh, partial + linear.grad + static_cast<int64_t>(j0 + a) * linear.in + k0 + b, sum[a][b]);
  }
  T* const bias = partial + linear.grad + static_cast<int64_t>(linear.out) * linear.in;
  for (int j = static_cast<int>(threadIdx.x); j < linear.out; j += kThreads) {
    T sum = 0;
    for (int r = 0; r < rows; ++r) sum += grad[j * kLine + r];
    put(fresh, bias + j, sum);
  }
}

// partial holds the gradient of bias, then that of log_scale.
template <class T>
__device__ __forceinline__ void channel_backward(const FlowProgram<T>& p, const FlowLinear<T>& channel, int rows,
                                                 const T* grad_logdet, const T* state, bool fresh, T* grad, T* partial) {
  __syncthreads();
  for (int f = static_cast<int>(threadIdx.x); partial != nullptr && f < p.features; f += kThreads) {
    const T scale = math::exp(p.inverse ? -channel.weight[f] : channel.weight[f]), bias = channel.bias[f];
    double to_bias = 0, to_scale = 0, through_logdet = 0;
    for (int r = 0; r < rows; ++r) {
      const T g = grad[f * kLine + r], x = state[f * kLine + r];
      to_bias += static_cast<double>(p.inverse ? g : g * scale);
      to_scale += static_cast<double>(g * (p.inverse ? x : x + bias));
      through_logdet += static_cast<double>(grad_logdet[r]);
    }
    const double total = to_scale * static_cast<double>(scale) + through_logdet;
    put(fresh, partial + channel.grad + f, static_cast<T>(p.inverse ? -to_bias : to_bias));
    put(fresh, partial + channel.grad + p.features + f, static_cast<T>(p.inverse ? -total : total));
  }
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int f = warp; f < p.features; f += kWarps)
    grad[f * kLine + lane] *= math::exp(p.inverse ? -channel.weight[f] : channel.weight[f]);
  __syncthreads();
}

// The params become their gradients, the gradient of y that of x.
template <class T>
__device__ __forceinline__ void uncouple_tile(const FlowStep& step, const Map<T>& map, const FlowSplit& split,
                                              const T* state, const T* grad_logdet, T* params, T* grad) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const bool additive = map.kind == Kind::additive;
  const bool separate = map.bounds || map.kind == Kind::softplus;
  for (int f = warp; f < split.active; f += kWarps) {
    const ParamRows rows = param_rows(step, additive, split.active, f);
    T& raw = params[rows.raw * kLine + lane];
    T& shift = params[rows.shift * kLine + lane];
    T& g = grad[(split.active_begin + f) * kLine + lane];
    ScaleSlope<T> scale[1];
    with_kind(map.kind, [&]<Kind K>() {
      scale[0] = scale_slope<K, false, false>(map.constants, additive ? T(0) : raw);
    });
    limit(map, scale);
    const CoupledGradient<T> out =
        coupled_gradient(map.constants, scale[0], g, grad_logdet[lane], state[(split.active_begin + f) * kLine + lane],
                         shift, map.inverse, map.shift_first, separate);
    g = out.x;
    if (!additive) raw = out.raw;
    shift = out.shift;
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) flow_backward(const __grid_constant__ Backward<T> job) {
  FASTFLOW_DYNAMIC_SHARED(T, shared);
  FASTFLOW_SHARED(T, grad_logdet, kRows);
  const FlowProgram<T>& p = job.program;
  T* const stage = shared;
  T* const state = stage + kStage * kStageLine;
  T* const grad = state + p.features * kLine;
  T* const context = grad + p.features * kLine;
  T* const grad_context = context + p.context_features * kLine;
  T* const input = grad_context + p.context_features * kLine;
  T* const values = input + (p.context_features == 0 ? 0 : p.features + p.context_features) * kLine;
  T* const active = values + p.deepest * kLine;  // a layer's activations
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  T* const partial = job.partial == nullptr ? nullptr : job.partial + static_cast<int64_t>(blockIdx.x) * job.partials;
  for (int64_t tile = blockIdx.x; tile < job.tiles; tile += gridDim.x) {
    const bool fresh = tile == static_cast<int64_t>(blockIdx.x);
    const int64_t first = tile * kRows;
    const int rows = p.batch - first < kRows ? static_cast<int>(p.batch - first) : kRows;
    load_tile(job.z, first, rows, p.features, state);
    load_tile(job.grad_z, first, rows, p.features, grad);
    load_tile(job.context, first, rows, p.context_features, context);
    load_tile(job.grad_context_in, first, rows, p.context_features, grad_context);
    load_tile(job.grad_logdet, first, rows, 1, grad_logdet);
    for (int s = p.count - 1; s >= 0; --s) {
      const FlowStep& step = p.steps[s];
      const FlowSplit split = split_of(step, p.features);
      const FlowLinear<T>* linears = p.linears + step.first;
      __syncthreads();
      for (int f = warp; f < split.active; f += kWarps)
        if (lane < rows)
          state[(split.active_begin + f) * kLine + lane] = job.saved[(step.saved + f) * p.batch + first + lane];
      if (!step.coupling) {
        channel_backward(p, linears[0], rows, grad_logdet, state, fresh, grad, partial);
        continue;
      }
      const T* const x = input_of(split, p.context_features, state, context, input);
      T* value = values;  // of the layer at hand
      for (int l = 0; l < step.count; ++l) {
        const FlowLinear<T>& linear = linears[l];
        const bool last = l == step.count - 1;
        product<false>(linear.out, linear.in, linear.weight, linear.in, l == 0 ? x : active, stage, [&](int j, T sum) {
          value[j * kLine + lane] = sum + linear.bias[j];
        });
        if (last) break;
        for (int j = warp; j < linear.out; j += kWarps)
          active[j * kLine + lane] = activate(step.activation, value[j * kLine + lane]);
        value += linear.out * kLine;
      }
      uncouple_tile(step, p.maps[step.map], split, state, grad_logdet, value, grad);
      for (int l = step.count - 1; l >= 0; --l) {
        const FlowLinear<T>& linear = linears[l];
        T* const below = l == 0 ? nullptr : value - linear.in * kLine;
        for (int j = warp; l > 0 && j < linear.in; j += kWarps)
          active[j * kLine + lane] = activate(step.activation, below[j * kLine + lane]);
        __syncthreads();
        if (partial != nullptr)
          parameter_gradient(linear, rows, l == 0 ? x : active, value, fresh, partial);
        if (l > 0)
          product<true>(linear.in, linear.out, linear.weight, linear.in, value, stage, [&](int j, T sum) {
            T& at = below[j * kLine + lane];
            at = activation_gradient(step.activation, at, sum);
          });
        else
          product<true>(linear.in, linear.out, linear.weight, linear.in, value, stage, [&](int j, T sum) {
            T& at = j < split.passive ? grad[(split.passive_begin + j) * kLine + lane]
                                      : grad_context[(j - split.passive) * kLine + lane];
            at += sum;
          });
        value = below;
      }
    }
    __syncthreads();
    if (job.grad_x != nullptr) store_tile(grad, first, rows, p.features, job.grad_x);
    if (job.state != nullptr) store_tile(state, first, rows, p.features, job.state);
    if (job.grad_context != nullptr) store_tile(grad_context, first, rows, p.context_features, job.grad_context);
    __syncthreads();
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

template <class T>
__global__ void __launch_bounds__(kThreads) add_partials(const __grid_constant__ Reduction<T> job) {
  const int64_t at = job.begin[0] + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= job.begin[job.count]) return;
  int low = 0, high = job.count - 1;  // the last parameter that begins at or before `at`
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (job.begin[middle] <= at) low = middle;
    else high = middle - 1;
  }
  double sum = 0;
  for (int64_t b = 0; b < job.blocks; ++b) sum += static_cast<double>(job.partial[b * job.partials + at]);
  job.to[low][at - job.begin[low]] = static_cast<T>(sum);
}

static_assert(sizeof(Backward<double>) <= 4096 && sizeof(Reduction<double>) <= 4096);  // of a kernel's parameters

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
    FASTFLOW_LAUNCH(add_partials<T>, (begin - job.begin[0] + kThreads - 1) / kThreads, kThreads, 0, stream, job);
  }
}

template <class T>
void backward(const Program& program, const optional<Tensor>& grad_z, const optional<Tensor>& grad_logdet,
              const Tensor& z, const Tensor& saved, const optional<Tensor>& context, const std::vector<Tensor>& params,
              bool inverse, const Tensor* grad_x, const Tensor* grad_context, const std::vector<Tensor>& grads,
              const Stream& stream) {
  std::vector<FlowProgram<T>> pieces = flow_programs<T>(program, params, inverse);
  if (pieces.empty()) pieces.push_back({.features = static_cast<int>(program.features), .batch = program.batch});
  int64_t partials = 0;
  for (const Tensor& t : grads) partials += t.numel();
  const int64_t tiles = tiles_of(program.batch);
  int64_t blocks = tiles;
  if (!grads.empty())
    blocks = std::min(tiles, std::clamp<int64_t>(kMostPartials / std::max<int64_t>(partials, 1), kLeastBlocks,
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
    job.tiles = tiles;
    const int64_t bytes = (kStage * kStageLine + lines_of(job.program) * kLine) * static_cast<int64_t>(sizeof(T));
    check_shared(bytes, stream);
    FASTFLOW_LAUNCH(flow_backward<T>, blocks, kThreads, bytes, stream, job);
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
