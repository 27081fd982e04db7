// What the kernels of mlp_flow_fwd and mlp_flow_bwd share: the program, and products on a tile of samples.
//
// A block takes 32 samples, one to a lane, through every step. Activations lie in shared memory feature by feature;
// weights come through it piece by piece, read by a whole warp at once. A processor is given one block at a time, so
// that no register spills.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "../mlp_flow_program.h"
#include "affine_coupling.cuh"

namespace fastflow {

constexpr int kRows = 32, kWarps = 8, kThreads = 32 * kWarps;
constexpr int kLine = kRows + 1;  // from one feature to the next, so that no column of a tile falls on one bank
constexpr int kMostSteps = 32, kMostLinears = 64, kMostMaps = 4;  // of a launch
constexpr int kStage = 16;                                        // columns of a weight that are staged at once
constexpr int kStageLine = 8 * kWarps + 4;

enum class Activation : int { relu, silu, tanh };

template <class T>
struct FlowLinear {
  const T *weight, *bias;  // contiguous
  int in, out;
  int64_t grad;  // where its gradients begin in a block's partial sums: the weight's, then the bias's
};

struct FlowStep {
  int first, count;  // its linears; of a per-channel map one whose weight is log_scale
  int map, activation;
  bool coupling, flip, interleaved, shift_in_front;
  int64_t saved;
};

template <class T>
struct FlowProgram {
  FlowStep steps[kMostSteps];  // in the order of execution
  FlowLinear<T> linears[kMostLinears];
  Map<T> maps[kMostMaps];
  int count, features, context_features, widest, deepest;  // deepest: the most outputs that a step's linears have together
  bool inverse;
  int64_t batch;
};

// (batch, features) of any strides; null where it is absent.
template <class T>
struct FlowMatrix {
  const T* data;
  int64_t row, column;
};

struct FlowSplit {
  int passive_begin, passive, active_begin, active;
};

__device__ __forceinline__ FlowSplit split_of(const FlowStep& step, int features) {
  const int half = features / 2;
  if (!step.coupling) return {0, 0, 0, features};
  return step.flip ? FlowSplit{half, features - half, 0, half} : FlowSplit{0, half, half, features - half};
}

// Which rows of the params belong to active feature f.
struct ParamRows {
  int raw, shift;
};

__device__ __forceinline__ ParamRows param_rows(const FlowStep& step, bool additive, int active, int f) {
  if (additive) return {f, f};
  const int first = step.interleaved ? 2 * f : f, second = step.interleaved ? 2 * f + 1 : active + f;
  return step.shift_in_front ? ParamRows{second, first} : ParamRows{first, second};
}

// NaN stays.
template <class T>
__device__ __forceinline__ T activate(int activation, T p) {
  switch (static_cast<Activation>(activation)) {
    case Activation::relu: return p < T(0) ? T(0) : p;
    case Activation::silu: return p * math::sigmoid(p);
    default: return math::tanh(p);
  }
}

// The gradient of p from that of its activation.
template <class T>
__device__ __forceinline__ T activation_gradient(int activation, T p, T grad) {
  switch (static_cast<Activation>(activation)) {
    case Activation::relu: return p <= T(0) ? T(0) : grad;
    case Activation::silu: {
      const T s = math::sigmoid(p);
      return grad * math::fma(p * s, T(1) - s, s);
    }
    default: {
      const T y = math::tanh(p);
      return grad * (T(1) - y * y);
    }
  }
}

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T value[4];
};

// store(j, sum over k of w(j, k) x[k]) for every j < out and this thread's sample, F features to a warp at a time.
// w(j, k) is weight[j * ld + k], or weight[k * ld + j] if Transposed. The whole block must call; ends with a barrier.
template <int F, bool Transposed, class T, class Store>
__device__ __forceinline__ void product_of(int out, int in, const T* weight, int ld, const T* x, T* stage,
                                           const Store& store) {
  constexpr int block = kWarps * F;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int j0 = 0; j0 < out; j0 += block) {
    T sum[F] = {};
    for (int k0 = 0; k0 < in; k0 += kStage) {
      __syncthreads();  // x is there, and the last piece has been read
      for (int i = static_cast<int>(threadIdx.x); i < kStage * block; i += kThreads) {
        const int j = Transposed ? i % block : i / kStage, k = Transposed ? i / block : i % kStage;
        const bool there = j0 + j < out && k0 + k < in;
        const int64_t at = Transposed ? static_cast<int64_t>(k0 + k) * ld + j0 + j
                                      : static_cast<int64_t>(j0 + j) * ld + k0 + k;
        stage[k * kStageLine + j] = there ? weight[at] : T(0);
      }
      __syncthreads();
      const int n = in - k0 < kStage ? in - k0 : kStage;
      for (int k = 0; k < n; ++k) {
        const T value = x[(k0 + k) * kLine + lane];
        const T* row = stage + k * kStageLine + warp * F;
        if constexpr (F % 4 == 0) {
#pragma unroll
          for (int f = 0; f < F; f += 4) {
            const Four<T> four = *reinterpret_cast<const Four<T>*>(row + f);
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[f + e] = math::fma(four.value[e], value, sum[f + e]);
          }
        } else {
#pragma unroll
          for (int f = 0; f < F; ++f) sum[f] = math::fma(row[f], value, sum[f]);
        }
      }
    }
#pragma unroll
    for (int f = 0; f < F; ++f)
      if (j0 + warp * F + f < out) store(j0 + warp * F + f, sum[f]);
  }
  __syncthreads();
}

template <bool Transposed, class T, class Store>
__device__ __forceinline__ void product(int out, int in, const T* weight, int ld, const T* x, T* stage,
                                        const Store& store) {
  if (out <= kWarps) product_of<1, Transposed>(out, in, weight, ld, x, stage, store);
  else if (out <= 4 * kWarps) product_of<4, Transposed>(out, in, weight, ld, x, stage, store);
  else product_of<8, Transposed>(out, in, weight, ld, x, stage, store);
}

// to[f] of this block's samples from a matrix; zeros past the end, or where there is none.
template <class T>
__device__ __forceinline__ void load_tile(const FlowMatrix<T>& from, int64_t first, int rows, int features, T* to) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int f = warp; f < features; f += kWarps)
    to[f * kLine + lane] = lane < rows && from.data ? from.data[(first + lane) * from.row + f * from.column] : T(0);
}

// to (batch, features), contiguous.
template <class T>
__device__ __forceinline__ void store_tile(const T* from, int64_t first, int rows, int features, T* to) {
  for (int i = static_cast<int>(threadIdx.x); i < rows * features; i += kThreads)
    to[first * features + i] = from[i % features * kLine + i / features];
}

// What the network of a step sees: the passive features, and behind them, in `input`, the context.
template <class T>
__device__ __forceinline__ const T* input_of(const FlowSplit& split, int context_features, const T* state,
                                             const T* context, T* input) {
  if (context_features == 0) return state + split.passive_begin * kLine;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int f = warp; f < split.passive + context_features; f += kWarps)
    input[f * kLine + lane] = f < split.passive ? state[(split.passive_begin + f) * kLine + lane]
                                                : context[(f - split.passive) * kLine + lane];
  __syncthreads();
  return input;
}

// A flow in pieces that fit a launch.
template <class T>
std::vector<FlowProgram<T>> flow_programs(const Program& program, const std::vector<Tensor>& params, bool inverse) {
  std::vector<FlowProgram<T>> pieces;
  std::vector<std::vector<double>> maps;
  std::vector<int64_t> offset(params.size() + 1, 0);
  for (size_t p = 0; p < params.size(); ++p) offset[p + 1] = offset[p] + params[p].numel();
  auto data_of = [](const Tensor* t) { return static_cast<const T*>(t->data_ptr()); };
  int linears = 0;
  int64_t saved = 0;
  for (size_t s = 0; s < program.steps.size(); ++s) {
    const ProgramStep& from = program.steps[inverse ? program.steps.size() - 1 - s : s];
    STD_TORCH_CHECK(from.order == nullptr, "steps: this kernel has no permutations");
    const int count = from.coupling ? static_cast<int>(from.linears.size()) : 1;
    STD_TORCH_CHECK(count <= kMostLinears, "params: a coupling of more than ", kMostLinears, " layers");
    std::vector<double> map;
    if (from.coupling) {
      map.assign(from.constants, from.constants + Program::numbers);
      map.push_back(static_cast<double>(from.kind));
      map.push_back(static_cast<double>(from.flags & Program::shift_first));
    }
    const auto known = [&] { return std::find(maps.begin(), maps.end(), map); };
    const bool new_map = from.coupling && known() == maps.end();
    if (pieces.empty() || pieces.back().count == kMostSteps || linears + count > kMostLinears ||
        (new_map && maps.size() == kMostMaps)) {
      pieces.push_back({});
      maps.clear();
      linears = 0;
      FlowProgram<T>& piece = pieces.back();
      piece.features = static_cast<int>(program.features);
      piece.context_features = static_cast<int>(program.context_features);
      piece.inverse = inverse;
      piece.batch = program.batch;
    }
    FlowProgram<T>& piece = pieces.back();
    FlowStep& step = piece.steps[piece.count++];
    step.first = linears;
    step.count = count;
    step.coupling = from.coupling;
    step.saved = saved;
    saved += from.active;
    if (!from.coupling) {
      piece.linears[linears++] = {data_of(from.log_scale), data_of(from.bias), 1, static_cast<int>(from.active),
                                  offset[from.parameter]};
      continue;
    }
    if (known() == maps.end()) {
      const double* c = from.constants;
      piece.maps[maps.size()] = make_map<T>((inverse ? kInverse : 0) | (from.flags & Program::shift_first), from.kind,
                                            c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]);
      maps.push_back(map);
    }
    step.map = static_cast<int>(known() - maps.begin());
    step.activation = static_cast<int>(from.activation);
    step.flip = from.flip;
    step.interleaved = from.flags & Program::interleaved;
    step.shift_in_front = from.flags & Program::shift_in_front;
    int outputs = 0;
    for (size_t l = 0; l < from.linears.size(); ++l) {
      const ProgramLinear& linear = from.linears[l];
      piece.linears[linears++] = {data_of(linear.weight), data_of(linear.bias), static_cast<int>(linear.in),
                                  static_cast<int>(linear.out), offset[from.parameter + 2 * l]};
      piece.widest = std::max(piece.widest, static_cast<int>(linear.out));
      outputs += static_cast<int>(linear.out);
    }
    piece.deepest = std::max(piece.deepest, outputs);
  }
  return pieces;
}

inline std::vector<Tensor> contiguous_params(const std::vector<Tensor>& params) {
  std::vector<Tensor> result;
  for (const Tensor& t : params) result.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
  return result;
}

template <class T>
FlowMatrix<T> matrix_of(const optional<Tensor>& t) {
  if (!t) return {nullptr, 0, 0};
  return {static_cast<const T*>(t->data_ptr()), t->stride(0), t->dim() > 1 ? t->stride(1) : 0};
}

inline int64_t tiles_of(int64_t batch) { return (batch + kRows - 1) / kRows; }

inline void check_shared(int64_t bytes, const Stream& stream) {
  STD_TORCH_CHECK(bytes <= stream.shared_limit(), "mlp_flow: the widths need ", bytes,
                  " bytes of shared memory in a block, the device has ", stream.shared_limit());
}

}  // namespace fastflow
