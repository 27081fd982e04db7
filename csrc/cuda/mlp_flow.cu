// mlp_flow_fwd: every step of a flow in one launch (one for 32 steps, 64 layers, 4 scale maps).
#include "mlp_flow.cuh"

namespace fastflow {
namespace {

template <class T>
struct Forward {
  FlowProgram<T> program;
  FlowMatrix<T> x, context;
  T *z, *logdet, *saved;  // saved may be null
  bool adds;              // to the log-determinants that are there
};

// Features of shared memory: the state, the context, what a network sees, two layers' activations.
template <class T>
__host__ __device__ int lines_of(const FlowProgram<T>& p) {
  const int seen = p.context_features == 0 ? 0 : p.features + 2 * p.context_features;
  return p.features + seen + 2 * p.widest;
}

template <class T>
__device__ __forceinline__ double channel_forward(const FlowProgram<T>& p, const FlowLinear<T>& channel, T* state) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int f = warp; f < p.features; f += kWarps) {
    const T scale = math::exp(p.inverse ? -channel.weight[f] : channel.weight[f]), bias = channel.bias[f];
    T& x = state[f * kLine + lane];
    x = p.inverse ? x * scale - bias : (x + bias) * scale;
  }
  double total = 0;
  for (int f = 0; f < p.features; ++f) total += static_cast<double>(channel.weight[f]);
  __syncthreads();
  return p.inverse ? -total : total;
}

// The active features of the state become y; returns this thread's part of the sample's sum of log s.
template <class T>
__device__ __forceinline__ T couple_tile(const FlowStep& step, const Map<T>& map, const FlowSplit& split,
                                         const T* params, T* state) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const bool additive = map.kind == Kind::additive;
  T sum = 0;
  for (int f = warp; f < split.active; f += kWarps) {
    const ParamRows rows = param_rows(step, additive, split.active, f);
    const T raw[1] = {additive ? T(0) : params[rows.raw * kLine + lane]};
    Scale<T> scale[1];
    with_kind(map.kind, [&]<Kind K>() { scale[0] = scale_of<K, false, false>(map.constants, raw[0]); });
    limit(map, scale);
    T& x = state[(split.active_begin + f) * kLine + lane];
    x = coupled(map.constants, scale[0].s, x, params[rows.shift * kLine + lane], map.inverse, map.shift_first);
    sum += scale[0].log_s;
  }
  return map.inverse ? -sum : sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) flow_forward(const __grid_constant__ Forward<T> job) {
  FASTFLOW_DYNAMIC_SHARED(T, shared);
  FASTFLOW_SHARED(T, sums, kWarps * kRows);
  const FlowProgram<T>& p = job.program;
  T* const stage = shared;
  T* const state = stage + kStage * kStageLine;
  T* const context = state + p.features * kLine;
  T* const input = context + p.context_features * kLine;
  T* const hidden = input + (p.context_features == 0 ? 0 : p.features + p.context_features) * kLine;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows;
  const int rows = p.batch - first < kRows ? static_cast<int>(p.batch - first) : kRows;
  load_tile(job.x, first, rows, p.features, state);
  load_tile(job.context, first, rows, p.context_features, context);
  double logdet = job.adds && warp == 0 && lane < rows ? static_cast<double>(job.logdet[first + lane]) : 0.;
  __syncthreads();
  for (int s = 0; s < p.count; ++s) {
    const FlowStep& step = p.steps[s];
    const FlowSplit split = split_of(step, p.features);
    for (int f = warp; job.saved != nullptr && f < split.active; f += kWarps)
      if (lane < rows)
        job.saved[(step.saved + f) * p.batch + first + lane] = state[(split.active_begin + f) * kLine + lane];
    const FlowLinear<T>* linears = p.linears + step.first;
    if (!step.coupling) {
      __syncthreads();
      logdet += channel_forward(p, linears[0], state);
      continue;
    }
    const T* x = input_of(split, p.context_features, state, context, input);
    for (int l = 0; l < step.count; ++l) {
      const FlowLinear<T>& linear = linears[l];
      T* const y = hidden + (l % 2) * p.widest * kLine;
      const bool last = l == step.count - 1;
      product<false>(linear.out, linear.in, linear.weight, linear.in, x, stage, [&](int j, T sum) {
        const T value = sum + linear.bias[j];
        y[j * kLine + lane] = last ? value : activate(step.activation, value);
      });
      x = y;
    }
    sums[warp * kRows + lane] = couple_tile(step, p.maps[step.map], split, x, state);
    __syncthreads();
    T total = 0;
    for (int w = 0; w < kWarps; ++w) total += sums[w * kRows + lane];
    logdet += static_cast<double>(total);
    __syncthreads();
  }
  store_tile(state, first, rows, p.features, job.z);
  if (warp == 0 && lane < rows) job.logdet[first + lane] = static_cast<T>(logdet);
}

static_assert(sizeof(Forward<double>) <= 4096);  // of a kernel's parameters

template <class T>
void forward(const Program& program, const Tensor& x, const optional<Tensor>& context, const std::vector<Tensor>& params,
             bool inverse, const Tensor& z, const Tensor& logdet, const Tensor* saved, const Stream& stream) {
  std::vector<FlowProgram<T>> pieces = flow_programs<T>(program, params, inverse);
  if (pieces.empty()) pieces.push_back({.features = static_cast<int>(program.features), .batch = program.batch});
  for (size_t i = 0; i < pieces.size(); ++i) {
    Forward<T> job{pieces[i],
                   matrix_of<T>(i == 0 ? x : z),
                   matrix_of<T>(context),
                   static_cast<T*>(z.data_ptr()),
                   static_cast<T*>(logdet.data_ptr()),
                   saved == nullptr ? nullptr : static_cast<T*>(saved->data_ptr()),
                   i > 0};
    const int64_t bytes = (kStage * kStageLine + lines_of(job.program) * kLine) * static_cast<int64_t>(sizeof(T));
    check_shared(bytes, stream);
    FASTFLOW_LAUNCH(flow_forward<T>, tiles_of(program.batch), kThreads, bytes, stream, job);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> mlp_flow_fwd(const Tensor& x, const optional<Tensor>& context,
                                                std::vector<Tensor> params, std::vector<int64_t> steps,
                                                std::vector<double> constants, bool inverse, int64_t save) {
  const std::vector<Tensor> dense = contiguous_params(params);
  const Program program(x, context, dense, steps, constants);
  const Tensor z = empty({program.batch, program.features}, x.scalar_type(), x);
  const Tensor logdet = empty({program.batch}, x.scalar_type(), x);
  // Activations are not kept: computing them again in the tile is faster than memory.
  const bool saves = save != Program::nothing;
  const Tensor saved = saves ? empty({program.saved_rows, program.batch}, x.scalar_type(), x) : nothing(x);
  const Stream stream(x);
  auto run = [&]<class T>(T) {
    forward<T>(program, x, context, dense, inverse, z, logdet, saves ? &saved : nullptr, stream);
  };
  if (x.scalar_type() == ScalarType::Double) run(double());
  else run(float());
  return {z, logdet, saved};
}

}  // namespace fastflow
