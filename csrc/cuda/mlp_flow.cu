// mlp_flow_fwd: every step of a flow in one launch (one for 32 steps, 64 layers, 4 scale maps).
#include "mlp_flow_product.cuh"

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

// This and the next return this thread's part of the sample's log-determinant. saved: null, or where the overwritten
// features of the first sample go.
template <int R, class T>
__device__ __forceinline__ double channel_tile(const FlowProgram<T>& p, const FlowLinear<T>& channel, int rows,
                                               T* saved, T* state) {
  const int r = static_cast<int>(threadIdx.x) % R;
  double logdet = 0;
  each_feature<R>(p.features, [&](int f) {
    const T log_scale = p.inverse ? -channel.weight[f] : channel.weight[f], bias = channel.bias[f];
    const T scale = math::exp(log_scale);
    T& x = state[f * kLine<R> + r];
    if (saved != nullptr && r < rows) saved[f * p.batch + r] = x;
    x = p.inverse ? x * scale - bias : (x + bias) * scale;
    logdet += static_cast<double>(log_scale);
  });
  return logdet;
}

// The active features of the state become y.
template <int R, class T>
__device__ __forceinline__ double couple_tile(const FlowProgram<T>& p, const FlowStep& step, const Map<T>& map,
                                              const FlowSplit& split, const T* params, int rows, T* saved, T* state) {
  const int r = static_cast<int>(threadIdx.x) % R;
  const bool additive = map.kind == Kind::additive;
  double sum = 0;
  each_feature<R>(split.active, [&](int f) {
    const ParamRows of = param_rows(step, additive, split.active, f);
    const T raw[1] = {additive ? T(0) : params[of.raw * kLine<R> + r]};
    Scale<T> scale[1];
    with_kind(map.kind, [&]<Kind K>() { scale[0] = scale_of<K, false, false>(map.constants, raw[0]); });
    limit(map, scale);
    T& x = state[(split.active_begin + f) * kLine<R> + r];
    if (saved != nullptr && r < rows) saved[f * p.batch + r] = x;
    x = coupled(map.constants, scale[0].s, x, params[of.shift * kLine<R> + r], map.inverse, map.shift_first);
    sum += static_cast<double>(scale[0].log_s);
  });
  return map.inverse ? -sum : sum;
}

template <int R, class T>
__global__ void __launch_bounds__(kThreads, 1) flow_forward(const __grid_constant__ Forward<T> job) {
  FASTFLOW_DYNAMIC_SHARED(unsigned char, shared);
  const FlowProgram<T>& p = job.program;
  const FlowTables<T>& tables = shared_tables(p.tables, shared);
  double* const sums = reinterpret_cast<double*>(shared + sizeof(FlowTables<T>));
  T* const slots = reinterpret_cast<T*>(sums + kGroups * R);
  T* const state = slots + p.slots * p.slot;
  T* const context = state + p.features * kLine<R>;
  T* const input = context + p.context_features * kLine<R>;
  T* const hidden = input + (p.context_features == 0 ? 0 : p.features + p.context_features) * kLine<R>;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * R;
  const int rows = p.batch - first < R ? static_cast<int>(p.batch - first) : R;
  load_tile<R>(job.x, first, rows, p.features, state);
  load_tile<R>(job.context, first, rows, p.context_features, context);
  __syncthreads();
  Weights<false, T> weights(p, tables, slots, 1);
  double logdet = 0;
#pragma unroll 1
  for (int s = 0; s < p.count; ++s) {
    const FlowStep& step = tables.steps[s];
    const FlowSplit split = split_of(step, p.features);
    const FlowLinear<T>* linears = tables.linears + step.first;
    T* const saved = job.saved == nullptr ? nullptr : job.saved + step.saved * p.batch + first;
    if (!step.coupling) {
      __syncthreads();
      logdet += channel_tile<R>(p, linears[0], rows, saved, state);
      continue;
    }
    const T* x = input_of<R>(split, p.context_features, state, context, input);
#pragma unroll 1
    for (int l = 0; l < step.count; ++l) {
      const FlowLinear<T>& linear = linears[l];
      T* const y = hidden + (l % 2) * p.widest * kLine<R>;
      int row = 0;
      do {
        linear_forward<R>(linear, row, weights.next(), x, step.activation, l + 1 == step.count,
                          static_cast<T*>(nullptr), y);
      } while ((row += linear.piece) < linear.out);
      x = y;
    }
    __syncthreads();
    logdet += couple_tile<R>(p, step, tables.maps[step.map], split, x, rows, saved, state);
  }
  if (static_cast<int>(threadIdx.x) < kGroups * R) sums[threadIdx.x] = logdet;
  __syncthreads();
  store_tile<R>(state, first, rows, p.features, job.z);
  if (static_cast<int>(threadIdx.x) >= rows) return;
  logdet = job.adds ? static_cast<double>(job.logdet[first + threadIdx.x]) : 0.;
  for (int group = 0; group < kGroups; ++group) logdet += sums[group * R + static_cast<int>(threadIdx.x)];
  job.logdet[first + threadIdx.x] = static_cast<T>(logdet);
}

static_assert(sizeof(Forward<double>) <= 4096);  // of a kernel's parameters

template <class T>
void forward(const Program& program, const Tensor& x, const optional<Tensor>& context,
             const std::vector<Tensor>& params, bool inverse, const Tensor& z, const Tensor& logdet,
             const Tensor* saved, const Stream& stream) {
  std::vector<FlowProgram<T>> pieces = flow_programs<T>(program, params, inverse);
  if (pieces.empty()) pieces.push_back({.features = static_cast<int>(program.features), .batch = program.batch});
  for (size_t i = 0; i < pieces.size(); ++i) {
    const FlowPlan plan = plan_of(pieces[i], lines_of(pieces[i]), kGroups, stream.shared_limit());
    Forward<T> job{pieces[i],
                   matrix_of<T>(i == 0 ? x : z),
                   matrix_of<T>(context),
                   static_cast<T*>(z.data_ptr()),
                   static_cast<T*>(logdet.data_ptr()),
                   saved == nullptr ? nullptr : static_cast<T*>(saved->data_ptr()),
                   i > 0};
    const int64_t tiles = tiles_of(program.batch, plan.rows);
    if (plan.rows == 16) FASTFLOW_LAUNCH((flow_forward<16, T>), tiles, kThreads, plan.bytes, stream, job);
    else FASTFLOW_LAUNCH((flow_forward<32, T>), tiles, kThreads, plan.bytes, stream, job);
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
