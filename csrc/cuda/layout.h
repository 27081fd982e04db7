// Where the elements of several operands of one shape lie: any strides, axes merged where all operands allow it.
#pragma once

#include "elements.cuh"

#include <algorithm>
#include <array>
#include <numeric>

namespace fastflow {

constexpr int kMaxRank = 16;

// One operand of shape (B, C, *S) on the host: `strides` are those of (C, *S).
struct View {
  Operand operand;
  Dims strides;
};

inline View no_view() { return {}; }

// Channels offset, offset + step, ... of t.
inline View view_of(const Tensor& t, int64_t offset = 0, int64_t step = 1) {
  View view;
  view.operand.dtype = dtype_of(t);
  view.operand.batch = t.stride(0);
  view.operand.data = static_cast<char*>(t.data_ptr()) + offset * t.stride(1) * bytes_of(view.operand.dtype);
  view.strides.assign(t.strides().begin() + 1, t.strides().end());
  view.strides[0] *= step;
  return view;
}

inline View view_of(const optional<Tensor>& t, int64_t offset = 0) { return t ? view_of(*t, offset) : no_view(); }

// (C, *S) of some channels of a tensor (B, C, *S).
inline Dims sample_sizes(const Tensor& t, int64_t channels) {
  const Dims sizes = sizes_of(t);
  Dims result(sizes.begin() + 1, sizes.end());
  result[0] = channels;
  return result;
}

inline Dims sample_sizes(const Tensor& t) { return sample_sizes(t, t.size(1)); }

// Uninitialised, with t's shape and dtype and the memory format that t suggests.
inline Tensor gradient_of(const Tensor& t) {
  const Dims sizes = sizes_of(t);
  return empty_strided(sizes, strides_like(sizes, t), t.scalar_type(), t);
}

// The two halves of packed params (B, 2C, *S).
struct Halves {
  View first, second;
};

inline Halves halves_of(const Tensor& packed, bool interleaved) {
  if (interleaved) return {view_of(packed, 0, 2), view_of(packed, 1, 2)};
  return {view_of(packed), view_of(packed, packed.size(1) / 2)};
}

// Axes of one sample, outermost first, and the strides of N operands along them.
template <int N>
struct Layout {
  int rank = 0;
  int64_t elements = 1;
  int64_t size[kMaxRank] = {};
  int64_t stride[N][kMaxRank] = {};
};

// The layout of a sample of shape `sizes`; axes keep their order if `logical`, else follow the first operand's memory.
template <int N>
Layout<N> layout_of(const Dims& sizes, const std::array<const View*, N>& views, bool logical = false) {
  Layout<N> layout;
  std::vector<size_t> axes;
  for (size_t d = 0; d < sizes.size(); ++d) {
    layout.elements *= sizes[d];
    if (sizes[d] != 1) axes.push_back(d);
  }
  if (layout.elements == 0) return layout;
  if (!logical)
    std::stable_sort(axes.begin(), axes.end(), [&](size_t a, size_t b) {
      return views[0]->strides[a] > views[0]->strides[b];
    });
  for (size_t d : axes) {
    const int last = layout.rank - 1;
    bool merges = last >= 0;
    for (int n = 0; n < N && merges; ++n)
      merges = !views[n]->operand.data || layout.stride[n][last] == views[n]->strides[d] * sizes[d];
    const int at = merges ? last : layout.rank++;
    STD_TORCH_CHECK(at < kMaxRank, "fastflow: operands of more than 16 axes that can't be merged");
    layout.size[at] = merges ? layout.size[at] * sizes[d] : sizes[d];
    for (int n = 0; n < N; ++n) layout.stride[n][at] = views[n]->operand.data ? views[n]->strides[d] : 0;
  }
  return layout;
}

// Whether vector accesses serve: at most an outer and an inner axis, the inner one a whole number of vectors and dense
// (`inner` elements apart: 2 for the halves of interleaved params, read as pairs), everything aligned to an access.
// Then the layout gets exactly two axes.
template <int N>
bool vectorise(Layout<N>& layout, const std::array<const View*, N>& views, const std::array<int, N>& inner,
               int64_t width) {
  if (layout.elements == 0 || layout.rank < 1 || layout.rank > 2) return false;
  const int last = layout.rank - 1;
  if (layout.size[last] % width != 0) return false;
  for (int n = 0; n < N; ++n) {
    const Operand& operand = views[n]->operand;
    if (!operand.data) continue;
    const int64_t bytes = bytes_of(operand.dtype);
    const int64_t outer = layout.rank == 2 ? layout.stride[n][0] : 0;
    const int64_t access = std::min<int64_t>(16, width * bytes);
    if (layout.stride[n][last] != inner[n] || operand.batch * bytes % access != 0 || outer * bytes % access != 0 ||
        reinterpret_cast<uintptr_t>(operand.data) % static_cast<uintptr_t>(access) != 0)
      return false;
  }
  if (layout.rank == 1) {
    layout.size[1] = layout.size[0];
    layout.size[0] = 1;
    for (int n = 0; n < N; ++n) {
      layout.stride[n][1] = layout.stride[n][0];
      layout.stride[n][0] = 0;
    }
    layout.rank = 2;
  }
  return true;
}

// Offsets within a sample of element i of the layout's row-major order.
template <int N>
__device__ __forceinline__ void locate(const Layout<N>& layout, int64_t i, int64_t (&offsets)[N]) {
#pragma unroll
  for (int n = 0; n < N; ++n) offsets[n] = 0;
  auto step = [&](int axis, int64_t index) {
#pragma unroll
    for (int n = 0; n < N; ++n) offsets[n] += index * layout.stride[n][axis];
  };
  if (layout.elements <= 0x7fffffff) {  // 32-bit division is several times faster
    uint32_t rest = static_cast<uint32_t>(i);
    for (int d = layout.rank - 1; d > 0; --d) {
      const uint32_t size = static_cast<uint32_t>(layout.size[d]), next = rest / size;
      step(d, rest - next * size);
      rest = next;
    }
    step(0, rest);
  } else {
    int64_t rest = i;
    for (int d = layout.rank - 1; d > 0; --d) {
      const int64_t next = rest / layout.size[d];
      step(d, rest - next * layout.size[d]);
      rest = next;
    }
    step(0, rest);
  }
}

// The same of vector `item` of V elements. Dense: see is_dense.
template <bool Dense, int V, int N>
__device__ __forceinline__ void locate_item(const Layout<N>& layout, int64_t item, int64_t (&offsets)[N]) {
  if constexpr (Dense) {
#pragma unroll
    for (int n = 0; n < N; ++n) offsets[n] = item * V;
  } else {
    locate(layout, item * V, offsets);
  }
}

// Whether a layout that `vectorise` made is one axis along which the elements of all operands are neighbours.
template <int N>
bool is_dense(const Layout<N>& layout, const std::array<const View*, N>& views) {
  bool dense = layout.elements == 0 || layout.size[0] == 1;
  for (int n = 0; n < N; ++n) dense = dense && (!views[n]->operand.data || layout.stride[n][1] == 1);
  return dense;
}

}  // namespace fastflow
