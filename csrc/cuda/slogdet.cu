// slogdet: sign, log|det| and inverse of many small matrices in one launch, by Gauss-Jordan elimination with partial
// pivoting. The pivots are those of LU; each step turns one column of the matrix into one of the inverse, in place.
//
// Up to 32x32 a matrix belongs to part of a warp, a row to a thread, in registers; beyond to a block, with the matrix
// in shared memory where it fits (on sm_90 up to 238x238 floats), else in device memory.
#include "../common/math.h"
#include "elements.cuh"

#include <algorithm>

namespace fastflow {
namespace {

constexpr int64_t kFloat64UpTo = 48;  // reference.FLOAT64_UP_TO
constexpr unsigned kAll = 0xffffffffu;

struct Matrices {
  Operand weight;
  int64_t count, size;
  int64_t row_stride, column_stride;
  void *sign, *logabsdet, *inverse;  // in the compute type; inverse may be null
};

template <class T>
__device__ __forceinline__ T weight_at(const Matrices& m, int64_t matrix, int64_t i, int64_t j) {
  return load<T>(m.weight, matrix * m.weight.batch + i * m.row_stride + j * m.column_stride);
}

// In the order of the magnitudes, NaN above infinity.
template <class T>
__device__ __forceinline__ uint64_t magnitude_key(T x) {
  return math::to_bits(math::abs(x));
}

struct Verdict {
  bool negative, singular, nan;
};

// Writes sign and log|det|, C being their type; returns whether the inverse is all NaN.
template <class C, class T>
__device__ __forceinline__ bool conclude(const Matrices& m, int64_t matrix, Verdict v, T log_sum, bool writes) {
  const T log = v.nan ? math::quiet_nan<T>() : v.singular ? -math::infinity<T>() : log_sum;
  if (writes) {
    static_cast<C*>(m.sign)[matrix] = v.nan ? math::quiet_nan<C>() : v.singular ? C(0) : v.negative ? C(-1) : C(1);
    static_cast<C*>(m.logabsdet)[matrix] = static_cast<C>(log);
  }
  return !(math::abs(log) < math::infinity<T>());
}

// The largest or the least value of the Group lanes that are the members.
template <int Group, bool Largest>
__device__ __forceinline__ unsigned extreme(unsigned members, unsigned value) {
#if __CUDA_ARCH__ >= 800
  return Largest ? __reduce_max_sync(members, value) : __reduce_min_sync(members, value);
#else
#pragma unroll
  for (int flip = Group / 2; flip > 0; flip /= 2) {
    const unsigned other = __shfl_xor_sync(members, value, flip);
    value = (other > value) == Largest ? other : value;
  }
  return value;
#endif
}

// A matrix of at most Rows rows to a group of lanes, padded by the identity; lane r of it holds row r. Rows stay where
// they are: `position` is where the swaps of LU would have put this lane's row. C: the type of the results.
template <int Rows, class C>
__global__ void __launch_bounds__(128, 2) slogdet_warp(const __grid_constant__ Matrices m) {
  constexpr int kGroup = Rows <= 4 ? 4 : Rows <= 8 ? 8 : Rows <= 16 ? 16 : 32;
  const int lane = static_cast<int>(threadIdx.x) % 32, row = lane % kGroup, first = lane - row;
  const unsigned members = (kAll >> (32 - kGroup)) << first;
  const int64_t matrix = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kGroup;
  const bool mine = matrix < m.count && row < m.size;
  double a[Rows];
  bool has_nan = false;
#pragma unroll
  for (int j = 0; j < Rows; ++j) {
    a[j] = mine && j < m.size ? static_cast<double>(weight_at<C>(m, matrix, row, j)) : row == j ? 1. : 0.;
    has_nan |= math::isnan(a[j]);
  }
  unsigned position = row < Rows ? row : kAll;
  double my_pivot = 1.;  // of step `row`,
  int my_holder = 0;     // and the lane of the group that held it
  bool odd_swaps = false;
  for (unsigned step = 0; step < static_cast<unsigned>(Rows); ++step) {
    // The padding waits for its own steps, so that a NaN among it never sends a row of W beyond the matrix.
    const bool waits = position >= step && position != kAll && (row < m.size || step >= m.size);
    const uint64_t key = magnitude_key(a[0]);
    const unsigned high = static_cast<unsigned>(key >> 32), low = static_cast<unsigned>(key);
    const unsigned most_high = extreme<kGroup, true>(members, waits ? high : 0u);
    const bool top = waits && high == most_high;
    const unsigned most_low = extreme<kGroup, true>(members, top ? low : 0u);
    const bool best = top && low == most_low;
    const unsigned from = extreme<kGroup, false>(members, best ? position : kAll);  // of equals the lowest
    const int holder = __ffs(__ballot_sync(members, position == from) & members) - 1;
    const double pivot = __shfl_sync(members, a[0], holder);
    odd_swaps ^= from != step;
    if (row == static_cast<int>(step)) {
      my_pivot = pivot;
      my_holder = holder - first;
    }
    const bool holds = lane == holder;
    position = holds ? step : position == step ? from : position;
    // The pivot's row is divided by it, the others lose their multiple of it. The registers turn by one, so that the
    // next column is a[0] again; the column of the inverse enters at the end.
    const double factor = (holds ? -1. : a[0]) / pivot;
#pragma unroll
    for (int j = 1; j < Rows; ++j) {
      const double across = __shfl_sync(members, a[j], holder);
      a[j - 1] = math::fma(-factor, across, holds ? 0. : a[j]);
    }
    a[Rows - 1] = -factor;
  }
  double log_sum = math::log(math::abs(my_pivot));
#pragma unroll
  for (int flip = kGroup / 2; flip > 0; flip /= 2) log_sum += __shfl_xor_sync(members, log_sum, flip);
  const unsigned negative = __ballot_sync(members, my_pivot < 0.) & members;
  const unsigned zeros = __ballot_sync(members, my_pivot == 0.) & members;
  const unsigned nans = __ballot_sync(members, math::isnan(my_pivot)) & members;
  const unsigned nan_inputs = __ballot_sync(members, has_nan) & members;
  // Behind a zero pivot everything is NaN: the first bad step tells.
  const unsigned first_bad = (zeros | nans) & (0u - (zeros | nans));
  const Verdict verdict{(__popc(negative) % 2 != 0) != odd_swaps, (zeros & first_bad) != 0,
                        (nans & first_bad) != 0 || nan_inputs != 0};
  const bool broken = conclude<C>(m, matrix, verdict, log_sum, matrix < m.count && row == 0);
  if (!m.inverse) return;
#pragma unroll
  for (int k = 0; k < Rows; ++k) {
    const int column = __shfl_sync(members, my_holder, first + k);
    if (mine && k < m.size)
      static_cast<C*>(m.inverse)[(matrix * m.size + position) * m.size + column] =
          broken ? math::quiet_nan<C>() : static_cast<C>(a[k]);
  }
}

// Threads of a block at most: what the registers suffice for.
template <class T>
inline constexpr int most_threads = sizeof(T) == 8 ? 512 : 1024;

// A matrix to a block, in shared memory or in the workspace. T: the type inside, C: that of the results. The threads
// form rows of `width`, a multiple of 32.
template <class T, class C, bool kShared>
__global__ void __launch_bounds__(most_threads<T>)
    slogdet_block(const __grid_constant__ Matrices m, T* workspace, int width) {
  FASTFLOW_DYNAMIC_SHARED(T, lines);
  FASTFLOW_SHARED(T, best_value, 32);
  FASTFLOW_SHARED(int, best_row, 32);
  const int size = static_cast<int>(m.size), thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x), warps = threads / 32, height = threads / width;
  const int x = thread % width, y = thread / width;
  const int64_t matrix = static_cast<int64_t>(blockIdx.x);
  T *pivot_row = lines, *factor = lines + size, *pivots = lines + 2 * size;
  T* a = kShared ? lines + 3 * size : workspace + matrix * size * size;
  int* origin = reinterpret_cast<int*>(lines + 3 * size + (kShared ? size * size : 0));  // of the row in each place
  const auto at = [size](int i, int j) { return i * size + j; };
  bool has_nan = false;
  for (int i = y; i < size; i += height)
    for (int j = x; j < size; j += width) {
      const T value = static_cast<T>(weight_at<C>(m, matrix, i, j));
      a[at(i, j)] = value;
      has_nan |= math::isnan(value);
    }
  for (int i = thread; i < size; i += threads) origin[i] = i;
  const bool warp_has_nan = __any_sync(kAll, has_nan);
  if (thread % 32 == 0) best_row[thread / 32] = warp_has_nan;
  __syncthreads();
  Verdict verdict{false, false, false};
  for (int w = 0; w < warps; ++w) verdict.nan |= best_row[w] != 0;
  __syncthreads();
  for (int step = 0; step < size && !verdict.nan && !verdict.singular; ++step) {
    // The largest magnitude of the column, of equals at the lowest row.
    T pivot = T(0);
    int row = size;
    for (int i = step + thread; i < size; i += threads) {
      const T candidate = a[at(i, step)];
      if (row == size || magnitude_key(candidate) > magnitude_key(pivot)) {
        pivot = candidate;
        row = i;
      }
    }
    const auto take_better = [&](T other, int other_row) {
      const uint64_t theirs = magnitude_key(other), ours = magnitude_key(pivot);
      if (theirs > ours || (theirs == ours && other_row < row)) {
        pivot = other;
        row = other_row;
      }
    };
    for (int flip = 16; flip > 0; flip /= 2) {
      const T other = __shfl_xor_sync(kAll, pivot, flip);
      take_better(other, __shfl_xor_sync(kAll, row, flip));
    }
    if (thread % 32 == 0) {
      best_value[thread / 32] = pivot;
      best_row[thread / 32] = row;
    }
    __syncthreads();
    for (int w = 0; w < warps && w * 32 < size - step; ++w) take_better(best_value[w], best_row[w]);
    verdict.negative ^= (pivot < T(0)) != (row != step);
    verdict.singular = pivot == T(0);
    verdict.nan = math::isnan(pivot);
    // The rows change places; the pivot's, divided by it, is kept apart too.
    for (int j = thread; j < size; j += threads) {
      const T across = a[at(row, j)], displaced = a[at(step, j)];
      factor[j] = (j == step ? T(-1) : j == row ? a[at(step, step)] : a[at(j, step)]) / pivot;
      pivot_row[j] = across;
      if (row != step) a[at(row, j)] = displaced;
    }
    if (thread == 0) {
      pivots[step] = pivot;
      const int moved = origin[step];
      origin[step] = origin[row];
      origin[row] = moved;
    }
    __syncthreads();
    const int start = m.inverse ? 0 : step + 1;
    for (int j = start + x; j < size; j += width) {
      const T across = pivot_row[j];
#pragma unroll 4
      for (int i = start + y; i < size; i += height) {
        const T by = factor[i];
        a[at(i, j)] = j == step ? -by : math::fma(-by, across, i == step ? T(0) : a[at(i, j)]);
      }
    }
    __syncthreads();
  }
  T log_sum = T(0);
  if (!verdict.nan && !verdict.singular)
    for (int k = thread % 32; k < size; k += 32) log_sum += math::log(math::abs(pivots[k]));
  for (int flip = 16; flip > 0; flip /= 2) log_sum += __shfl_xor_sync(kAll, log_sum, flip);
  const bool broken = conclude<C>(m, matrix, verdict, log_sum, thread == 0);
  if (!m.inverse) return;
  C* inverse = static_cast<C*>(m.inverse) + matrix * size * size;
  for (int i = y; i < size; i += height)
    for (int j = x; j < size; j += width)
      inverse[at(i, origin[j])] = broken ? math::quiet_nan<C>() : static_cast<C>(a[at(i, j)]);
}

// The one stride that spans all the leading axes, if there is one.
optional<int64_t> common_stride(const Dims& batch, const Dims& strides) {
  int64_t stride = 0, span = 0;
  for (size_t d = batch.size(); d-- > 0;) {
    if (batch[d] == 1) continue;
    if (span == 0) stride = strides[d];
    else if (strides[d] != span) return {};
    span = strides[d] * batch[d];
    if (span == 0 && d > 0) return {};
  }
  return stride;
}

template <int Rows, class C>
void launch_warp(const Matrices& m, const Stream& stream) {
  constexpr int kGroup = Rows <= 4 ? 4 : Rows <= 8 ? 8 : Rows <= 16 ? 16 : 32;
  const int block = m.count * kGroup <= 4096 ? 32 : 128;  // few matrices: spread over the processors
  FASTFLOW_LAUNCH((slogdet_warp<Rows, C>), (m.count * kGroup + block - 1) / block, block, 0, stream, m);
}

template <class T, class C>
void launch_block(const Matrices& m, const Tensor& weight, ScalarType inside, const Stream& stream) {
  const int64_t size = m.size;
  const int width = static_cast<int>(std::min<int64_t>((size + 31) / 32 * 32, most_threads<T>));
  const int block = width * std::max(1, (size <= 64 ? 512 : most_threads<T>) / width);
  const int64_t lines = 3 * size * static_cast<int64_t>(sizeof(T)) + size * static_cast<int64_t>(sizeof(int));
  const int64_t bytes = lines + size * size * static_cast<int64_t>(sizeof(T));
  constexpr int64_t kStatic = 512;  // best_value, best_row and their alignment
  if (bytes + kStatic <= stream.shared_limit()) {
    FASTFLOW_LAUNCH((slogdet_block<T, C, true>), m.count, block, bytes, stream, m, nullptr, width);
    return;
  }
  STD_TORCH_CHECK(lines + kStatic <= stream.shared_limit(), "fastflow: slogdet: a matrix too large for one block");
  const Tensor workspace = empty({m.count, size, size}, inside, weight);
  FASTFLOW_LAUNCH((slogdet_block<T, C, false>), m.count, block, lines, stream, m,
                  static_cast<T*>(workspace.data_ptr()), width);
}

template <class C>
void factorise(const Matrices& m, const Tensor& weight, const Stream& stream) {
  constexpr ScalarType own = sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float;
  if (m.size <= 4) launch_warp<4, C>(m, stream);
  else if (m.size <= 8) launch_warp<8, C>(m, stream);
  else if (m.size <= 12) launch_warp<12, C>(m, stream);
  else if (m.size <= 16) launch_warp<16, C>(m, stream);
  else if (m.size <= 24) launch_warp<24, C>(m, stream);
  else if (m.size <= 32) launch_warp<32, C>(m, stream);
  else if (m.size <= kFloat64UpTo) launch_block<double, C>(m, weight, ScalarType::Double, stream);
  else launch_block<C, C>(m, weight, own, stream);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> slogdet_fwd(const Tensor& weight, bool want_inverse) {
  const Dims sizes = sizes_of(weight), batch(sizes.begin(), sizes.end() - 2);
  const ScalarType dtype = compute_type(weight.scalar_type());
  const Tensor sign = empty(batch, dtype, weight), logabsdet = empty(batch, dtype, weight);
  const Tensor inverse = empty(want_inverse ? sizes : Dims{0}, dtype, weight);
  const int64_t rank = static_cast<int64_t>(sizes.size());
  Matrices m{};
  m.size = sizes.back();
  m.count = sign.numel();
  m.row_stride = weight.stride(rank - 2);
  m.column_stride = weight.stride(rank - 1);
  m.sign = sign.data_ptr();
  m.logabsdet = logabsdet.data_ptr();
  m.inverse = want_inverse ? inverse.data_ptr() : nullptr;
  // Leading axes that one stride doesn't span are copied together first.
  const optional<int64_t> stride = common_stride(batch, strides_of(weight));
  const Tensor dense = stride ? weight : torch::stable::contiguous(weight);
  m.weight = {dense.data_ptr(), stride ? *stride : m.size * m.size, dtype_of(weight)};
  if (!stride) {
    m.row_stride = m.size;
    m.column_stride = 1;
  }
  const Stream stream(weight);
  if (dtype == ScalarType::Double) factorise<double>(m, dense, stream);
  else factorise<float>(m, dense, stream);
  return {sign, logabsdet, inverse};
}

}  // namespace fastflow
