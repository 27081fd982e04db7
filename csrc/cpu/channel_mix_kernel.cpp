// A matrix along adjacent channels, and its gradients, in one pass over the pixels.
#include "channel_mix_kernel.h"

#include <algorithm>
#include <cstring>

#include "conv_tiles.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastflow::FASTFLOW_ISA {
namespace {

// Vectors and rows of a tile of sums. On AVX-512 eight rows hide a fused multiply-add's four cycles where there is a
// single vector, and three vectors with their factors fill the 32 registers.
#if defined(__AVX512F__)
constexpr int sums = 24, most_rows = 8, most_vectors = 4;
#elif defined(__AVX2__)
constexpr int sums = 12, most_rows = 8, most_vectors = 3;
#else
constexpr int sums = 8, most_rows = 6, most_vectors = 2;
#endif
template <int N>
constexpr int tile_rows = sums / N < most_rows ? sums / N : most_rows;

constexpr int64_t piece = 64;  // pixels whose rows stay in the first-level cache, and whose terms are one sum

template <class T>
struct Lanes {
  Lanes(int64_t present) : count(present) {
#if defined(__AVX512F__)
    mask = static_cast<uint16_t>((1u << present) - 1);
#elif defined(__AVX2__)
    for (int i = 0; i < Simd<T>::lanes; ++i) mask[i] = i < present ? -1 : 0;
#endif
  }

  // The present lanes alone are read and written.
  Vec<T> load(const T* from) const {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
      return (Vec<T>)_mm512_maskz_loadu_ps(mask, from);
    else
      return (Vec<T>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), from);
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4)
      return (Vec<T>)_mm256_maskload_ps(from, (__m256i)mask);
    else
      return (Vec<T>)_mm256_maskload_pd(from, (__m256i)mask);
#else
    Vec<T> x{};
    std::memcpy(&x, from, count * sizeof(T));
    return x;
#endif
  }

  void store(T* to, Vec<T> x) const {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
      _mm512_mask_storeu_ps(to, mask, (__m512)x);
    else
      _mm512_mask_storeu_pd(to, static_cast<__mmask8>(mask), (__m512d)x);
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4)
      _mm256_maskstore_ps(to, (__m256i)mask, (__m256)x);
    else
      _mm256_maskstore_pd(to, (__m256i)mask, (__m256d)x);
#else
    std::memcpy(to, &x, count * sizeof(T));
#endif
  }

  int64_t count;
#if defined(__AVX512F__)
  uint16_t mask = 0;
#elif defined(__AVX2__)
  typename Simd<T>::Lane mask{};
#endif
};

// Some of the channels, in N vectors of which the last may be cut short.
template <class T>
struct Panel {
  int64_t from;
  Lanes<T> last;
};

// f(panel, number of its vectors as a constant) for all channels.
template <class T, class F>
inline void each_panel(int64_t channels, const F& f) {
  constexpr int64_t W = Simd<T>::lanes;
  for (int64_t from = 0; from < channels; from += most_vectors * W) {
    const int64_t left = std::min<int64_t>(channels - from, most_vectors * W), vectors = (left + W - 1) / W;
    const Panel<T> panel{from, Lanes<T>(left - (vectors - 1) * W)};
    with_count<most_vectors>(vectors, [&](auto n) { f(panel, n); });
  }
}

// out[r][j] = sum over k of in[r][k] w[k][j], plus offset[j] if there is one.
template <int R, int N, class T>
[[gnu::noinline]] void mix_tile(int64_t terms, const T* in, int64_t in_step, const T* w, int64_t w_step,
                                const T* offset, T* out, int64_t out_step, const Lanes<T>& last) {
  constexpr int W = Simd<T>::lanes;
  Vec<T> sum[R][N] = {};
  const T* at[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) at[r] = in + r * in_step;
  add_terms<R, N>({1, terms, 0}, at, w, w_step, sum);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const Vec<T> value = offset ? sum[r][n] + load(offset + n * W) : sum[r][n];
      if (n + 1 < N)
        store(out + r * out_step + n * W, value);
      else
        last.store(out + r * out_step + n * W, value);
    }
}

template <class T>
void mix(const MixShape& shape, int64_t count, const T* in, int64_t in_step, const T* w, const T* offset, T* out,
         int64_t out_step) {
  each_panel<T>(shape.channels, [&](const Panel<T>& panel, auto n) {
    constexpr int N = decltype(n)::value, most = tile_rows<N>;
    const int64_t tiles = (count + most - 1) / most;
    for (int64_t t = 0, p = 0; t < tiles; ++t) {
      const int64_t rows = count / tiles + (t < count % tiles);
      with_count<most>(rows, [&](auto r) {
        mix_tile<decltype(r)::value, N>(shape.channels, in + p * in_step, in_step, w + panel.from, shape.step(),
                                        offset ? offset + panel.from : nullptr, out + p * out_step + panel.from,
                                        out_step, panel.last);
      });
      p += rows;
    }
  });
}

// The gradients of matrix and offset from at most `piece` pixels, added to `to`.
template <class T>
void add_outer(const MixShape& shape, int64_t count, const T* grad, int64_t grad_step, const T* x, int64_t x_step,
               T* to) {
  constexpr int W = Simd<T>::lanes;
  alignas(64) T rows[piece * most_vectors * W];
  each_panel<T>(shape.channels, [&](const Panel<T>& panel, auto n) {
    constexpr int N = decltype(n)::value, most = tile_rows<N>;
    for (int64_t p = 0; p < count; ++p) {
      const T* const from = x + p * x_step + panel.from;
      for (int i = 0; i < N; ++i)
        store(rows + (p * N + i) * W, i + 1 < N ? load(from + i * W) : panel.last.load(from + i * W));
    }
    const int64_t tiles = (shape.channels + most - 1) / most;
    for (int64_t t = 0, c = 0; t < tiles; ++t) {
      const int64_t height = shape.channels / tiles + (t < shape.channels % tiles);
      with_count<most>(height, [&](auto r) {
        outer_tile<decltype(r)::value, N>(Extent{1, 1, count}, Piece{0, 1, 0, count},
                                          Pixels<T>{grad + c, 0, 0, grad_step}, rows,
                                          to + c * shape.step() + panel.from, shape.step());
      });
      c += height;
    }
    Vec<T> sum[N] = {};
    for (int64_t p = 0; p < count; ++p) {
      const T* const from = grad + p * grad_step + panel.from;
      for (int i = 0; i < N; ++i) sum[i] += i + 1 < N ? load(from + i * W) : panel.last.load(from + i * W);
    }
    T* const offset = to + shape.matrix_values() + panel.from;
    for (int i = 0; i < N; ++i) store(offset + i * W, load(offset + i * W) + sum[i]);
  });
}

// f(offset in the first image, in the second, number of adjacent pixels) over samples [begin, end) of two images: whole
// samples, or all of them, where neither image has gaps.
template <class F>
void each_run(const MixShape& shape, const Image& a, const Image& b, int64_t begin, int64_t end, const F& f) {
  const auto in_rows = [&](const Image& image) { return image.row == shape.width * image.column; };
  const auto in_samples = [&](const Image& image) { return image.sample == shape.pixels() * image.column; };
  const bool rows = in_rows(a) && in_rows(b);
  if (rows && in_samples(a) && in_samples(b))
    return f(begin * a.sample, begin * b.sample, (end - begin) * shape.pixels());
  for (int64_t s = begin; s < end; ++s)
    for (int64_t y = 0; y < (rows ? 1 : shape.height); ++y)
      f(s * a.sample + y * a.row, s * b.sample + y * b.row, rows ? shape.pixels() : shape.width);
}

template <class T>
void forward(const MixForward& job, int64_t begin, int64_t end) {
  const T *const x = static_cast<const T*>(job.x.data), *const matrix = static_cast<const T*>(job.matrix);
  T* const y = static_cast<T*>(job.y.data);
  each_run(job.shape, job.x, job.y, begin, end, [&](int64_t from, int64_t to, int64_t count) {
    mix(job.shape, count, x + from, job.x.column, matrix, static_cast<const T*>(job.offset), y + to, job.y.column);
  });
}

template <class T>
void backward(const MixBackward& job, int64_t group) {
  const int64_t begin = job.first(group), end = job.first(group + 1);
  const T* const grad = static_cast<const T*>(job.grad.data);
  if (job.need_x)
    each_run(job.shape, job.grad, job.grad_x, begin, end, [&](int64_t from, int64_t to, int64_t count) {
      mix(job.shape, count, grad + from, job.grad.column, static_cast<const T*>(job.matrix),
          static_cast<const T*>(nullptr), static_cast<T*>(job.grad_x.data) + to, job.grad_x.column);
    });
  if (!job.need_matrix) return;
  T* const partial = static_cast<T*>(job.partials) + group * job.partial_values();
  std::fill_n(partial, job.partial_values(), T(0));
  const T* const x = static_cast<const T*>(job.x.data);
  each_run(job.shape, job.grad, job.x, begin, end, [&](int64_t of_grad, int64_t of_x, int64_t count) {
    for (int64_t p = 0; p < count; p += piece)
      add_outer(job.shape, std::min(piece, count - p), grad + of_grad + p * job.grad.column, job.grad.column,
                x + of_x + p * job.x.column, job.x.column, partial);
  });
}

}  // namespace

void mix_forward(const MixForward& job, int64_t begin, int64_t end) {
  job.shape.is_double ? forward<double>(job, begin, end) : forward<float>(job, begin, end);
}

void mix_backward(const MixBackward& job, int64_t begin, int64_t end) {
  for (int64_t group = begin; group < end; ++group)
    job.shape.is_double ? backward<double>(job, group) : backward<float>(job, group);
}

}  // namespace fastflow::FASTFLOW_ISA
