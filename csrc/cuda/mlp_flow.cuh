// What the kernels of mlp_flow_fwd and mlp_flow_bwd share: the program, the plan of a block's shared memory, tiles of
// samples.
//
// A block takes R samples through every step. Activations lie in shared memory feature by feature; the weights stream
// through it piece by piece, several pieces ahead of their use (mlp_flow_product.cuh).
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "../mlp_flow_program.h"
#include "affine_coupling.cuh"

namespace fastflow {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kGroups = 8;  // of threads that share a sample's features; the same for every R, and so are the results
constexpr int kMostSteps = 32, kMostLinears = 64, kMostMaps = 4;  // of a launch
constexpr int64_t kSlotBytes = 64 * 132 * 4, kLeastSlotBytes = kSlotBytes / 8;  // of a piece of a weight
constexpr int kMostSlots = 4;                                                   // 2 at least
constexpr int64_t kSmallBatch = 2048;  // up to which tiles of 16 samples occupy more processors than tiles of 32

// From one feature to the next. Eight features in a row, four samples of each, fall on all 32 banks.
template <int R>
constexpr int kLine = R + 4;

// From one row of a weight to the next in shared memory; its bias lies behind it. An odd multiple of four, so that
// consecutive rows fall on different banks.
inline int64_t weight_line(int64_t in) { return (in + 4) / 4 % 2 == 1 ? (in + 4) / 4 * 4 : (in + 8) / 4 * 4; }

enum class Activation : int { relu, silu, tanh };

// Widths fit 16 bits, since a sample's activations fit shared memory.
template <class T>
struct FlowLinear {
  const T *weight, *bias;  // contiguous
  int64_t grad;            // where its gradients begin in a block's partial sums: the weight's, then the bias's
  uint16_t in, out;
  uint16_t line, piece;  // of the weight in shared memory: from row to row, and the rows of a piece
};

struct FlowStep {
  int first, count;  // its linears; of a per-channel map one whose weight is log_scale
  int map, activation;
  bool coupling, flip, interleaved, shift_in_front;
  int64_t saved;
};

// In the order of execution.
template <class T>
struct FlowTables {
  FlowStep steps[kMostSteps];
  FlowLinear<T> linears[kMostLinears];
  Map<T> maps[kMostMaps];
};

template <class T>
struct FlowProgram {
  FlowTables<T> tables;
  int count, features, context_features;
  int widest, deepest, sloped;  // the most outputs: of a linear; of a step's hidden layers together; of those with silu
  int slot, slots;              // elements of a piece's place in shared memory, and how many there are
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

// The tables in shared memory, since the constant bank is slow at what it is asked for the first time. The block must
// wait at a barrier before it reads them.
template <class T>
__device__ __forceinline__ const FlowTables<T>& shared_tables(const FlowTables<T>& from, unsigned char* shared) {
  static_assert(sizeof(FlowTables<T>) % 16 == 0 && alignof(FlowTables<T>) == 8);
  constexpr int words = static_cast<int>(sizeof(FlowTables<T>) / 8);
  for (int i = static_cast<int>(threadIdx.x); i < words; i += kThreads)
    load_parameter(reinterpret_cast<const unsigned char*>(&from) + 8 * i, shared + 8 * i);
  return *reinterpret_cast<const FlowTables<T>*>(shared);
}

// Calls f(feature) for this thread's share of `features` of sample threadIdx.x % R, kGroups threads to a sample.
template <int R, class F>
__device__ __forceinline__ void each_feature(int features, const F& f) {
  static_assert(kGroups * R <= kThreads);
  if (static_cast<int>(threadIdx.x) >= kGroups * R) return;
#pragma unroll 1
  for (int feature = static_cast<int>(threadIdx.x) / R; feature < features; feature += kGroups) f(feature);
}

// to[f] of this block's samples from a matrix; zeros past the end, or where there is none.
template <int R, class T>
__device__ __forceinline__ void load_tile(const FlowMatrix<T>& from, int64_t first, int rows, int features, T* to) {
  const int r = static_cast<int>(threadIdx.x) % R;
  for (int f = static_cast<int>(threadIdx.x) / R; f < features; f += kThreads / R)
    to[f * kLine<R> + r] = r < rows && from.data ? from.data[(first + r) * from.row + f * from.column] : T(0);
}

// to (batch, features), contiguous.
template <int R, class T>
__device__ __forceinline__ void store_tile(const T* from, int64_t first, int rows, int features, T* to) {
  for (int i = static_cast<int>(threadIdx.x); i < rows * features; i += kThreads)
    to[first * features + i] = from[i % features * kLine<R> + i / features];
}

// What the network of a step sees: the passive features, and behind them, in `input`, the context. With a context the
// whole block must call; what it sees is there after the next barrier.
template <int R, class T>
__device__ __forceinline__ const T* input_of(const FlowSplit& split, int context_features, const T* state,
                                             const T* context, T* input) {
  if (context_features == 0) return state + split.passive_begin * kLine<R>;
  __syncthreads();
  const int r = static_cast<int>(threadIdx.x) % R;
  for (int f = static_cast<int>(threadIdx.x) / R; f < split.passive + context_features; f += kThreads / R)
    input[f * kLine<R> + r] = f < split.passive ? state[(split.passive_begin + f) * kLine<R> + r]
                                                : context[(f - split.passive) * kLine<R> + r];
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
    FlowStep& step = piece.tables.steps[piece.count++];
    step.first = linears;
    step.count = count;
    step.coupling = from.coupling;
    step.saved = saved;
    saved += from.active;
    if (!from.coupling) {
      piece.tables.linears[linears++] = {data_of(from.log_scale), data_of(from.bias), offset[from.parameter]};
      continue;
    }
    if (known() == maps.end()) {
      const double* c = from.constants;
      piece.tables.maps[maps.size()] =
          make_map<T>((inverse ? kInverse : 0) | (from.flags & Program::shift_first), from.kind, c[0], c[1], c[2], c[3],
                      c[4], c[5], c[6], c[7]);
      maps.push_back(map);
    }
    step.map = static_cast<int>(known() - maps.begin());
    step.activation = static_cast<int>(from.activation);
    step.flip = from.flip;
    step.interleaved = from.flags & Program::interleaved;
    step.shift_in_front = from.flags & Program::shift_in_front;
    int hidden = 0;
    for (size_t l = 0; l < from.linears.size(); ++l) {
      const ProgramLinear& linear = from.linears[l];
      piece.tables.linears[linears++] = {data_of(linear.weight), data_of(linear.bias), offset[from.parameter + 2 * l],
                                         static_cast<uint16_t>(linear.in), static_cast<uint16_t>(linear.out),
                                         static_cast<uint16_t>(weight_line(linear.in))};
      piece.widest = std::max(piece.widest, static_cast<int>(linear.out));
      if (l + 1 < from.linears.size()) hidden += static_cast<int>(linear.out);
    }
    piece.deepest = std::max(piece.deepest, hidden);
    if (static_cast<Activation>(step.activation) == Activation::silu) piece.sloped = std::max(piece.sloped, hidden);
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

inline int64_t tiles_of(int64_t batch, int rows) { return (batch + rows - 1) / rows; }

// How a block is laid out: its samples, its bytes of shared memory.
struct FlowPlan {
  int rows;
  int64_t bytes;
};

// Chooses the pieces of the weights, the number of their slots and the samples of a tile. lines: features of shared
// memory; sums: doubles of it to a sample. What a sample's sums are made of, and so its result, depends on the pieces:
// these are chosen by the program alone.
template <class T>
FlowPlan plan_of(FlowProgram<T>& program, int64_t lines, int64_t sums, int64_t limit) {
  FlowTables<T>& tables = program.tables;
  constexpr int64_t element = sizeof(T);
  auto cut = [&](int64_t slot_bytes) {
    program.slot = 0;
    for (int s = 0; s < program.count; ++s)
      for (int l = 0; tables.steps[s].coupling && l < tables.steps[s].count; ++l) {
        FlowLinear<T>& linear = tables.linears[tables.steps[s].first + l];
        const int64_t most = std::max<int64_t>(slot_bytes / element / linear.line, 1);
        const int64_t piece = most < linear.out ? most / 4 * 4 : linear.out;
        linear.piece = static_cast<uint16_t>(std::max<int64_t>(piece, 1));
        program.slot = std::max(program.slot, linear.piece * linear.line);
      }
  };
  auto bytes_of = [&](int64_t rows, int64_t slots) {
    return static_cast<int64_t>(sizeof(tables)) + sums * rows * 8 +
           (lines * (rows + 4) + slots * program.slot) * element;
  };
  int64_t slot_bytes = kSlotBytes;
  cut(slot_bytes);
  while (bytes_of(16, 2) > limit && slot_bytes > kLeastSlotBytes) cut(slot_bytes /= 2);
  const int rows = program.batch <= kSmallBatch || bytes_of(32, 2) > limit ? 16 : 32;
  program.slots = kMostSlots;
  while (program.slots > 2 && bytes_of(rows, program.slots) > limit) --program.slots;
  const int64_t bytes = bytes_of(rows, program.slots);
  STD_TORCH_CHECK(bytes <= limit, "mlp_flow: the widths need ", bytes,
                  " bytes of shared memory in a block, the device has ", limit);
  return {rows, bytes};
}

}  // namespace fastflow
