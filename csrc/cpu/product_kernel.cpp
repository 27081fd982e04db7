// A matrix product near the rate of the core's multiply-adds, for one instruction set. A few vectors of B's columns are
// copied, a block of its rows at a time, to where they stay in a cache while all rows of A pass; A is read in place.
#include "product_kernel.h"

#include "matmul_tile.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

constexpr int64_t longest = 112;  // terms that are summed at a time: a panel of 28 KiB, and longer sums would round more

// panel (count, width), rows of `width` elements, = B's rows [p, p + count) in columns [j, j + n), zeros behind them.
template <class T>
void pack(const Product& job, int64_t p, int64_t count, int64_t j, int64_t n, int64_t width, T* panel) {
  constexpr int W = Simd<T>::lanes;
  const T* const from = static_cast<const T*>(job.b) + p * job.b_row + j * job.b_column;
  int64_t done = 0;  // rows
  if (job.b_column == 1) {
    for (; done < count; ++done)
      for (int64_t c = 0; c < n; ++c) panel[done * width + c] = from[done * job.b_row + c];
  } else if (job.b_row == 1) {
    const int64_t whole = n / W * W;
    for (; done + W <= count; done += W) {
      for (int64_t c = 0; c < whole; c += W) {
        Vec<T> square[W];
#pragma GCC unroll 16
        for (int l = 0; l < W; ++l) square[l] = load(from + (c + l) * job.b_column + done);
        transpose<T>(square);
#pragma GCC unroll 16
        for (int l = 0; l < W; ++l) vec(panel + (done + l) * width + c) = square[l];
      }
      for (int64_t c = whole; c < n; ++c)
        for (int64_t l = 0; l < W; ++l) panel[(done + l) * width + c] = from[c * job.b_column + done + l];
    }
  }
  for (; done < count; ++done)
    for (int64_t c = 0; c < n; ++c) panel[done * width + c] = from[done * job.b_row + c * job.b_column];
  if (n < width)
    for (int64_t row = 0; row < count; ++row)
      for (int64_t c = n; c < width; ++c) panel[row * width + c] = T(0);
}

// *to = value, or += value, and then no less than 0 if that is wanted: the first `left` lanes, where there are no more.
template <class T>
static inline void put(T* to, int64_t left, Vec<T> value, bool add, bool relu) {
  constexpr int W = Simd<T>::lanes;
  if (left >= W) {
    if (add) value += load(to);
    store(to, relu ? (value <= Vec<T>{} ? Vec<T>{} : value) : value);  // NaN stays
  } else {
    for (int64_t l = 0; l < left; ++l) {
      const T sum = add ? to[l] + value[l] : value[l];
      to[l] = relu && sum <= T(0) ? T(0) : sum;
    }
  }
}

// The panel's columns of rows [first, last). A is ByRow or ByColumn.
template <class T, class A>
void panel_of(const Product& job, int64_t index, int64_t first, int64_t last) {
  constexpr int W = Simd<T>::lanes;
  constexpr int64_t widest = Product::together * Product::line / sizeof(T);
  alignas(64) T panel[longest * widest], bias[widest] = {};
  const int64_t j = job.first_column(index), n = at_most(job.first_column(index + 1), job.n) - j;
  const int64_t width = round_up(n, job.granule()), rows = last - first;
  const int64_t blocks = at_least(1, (job.k + longest - 1) / longest);
  if (job.bias != nullptr)
    for (int64_t c = 0; c < n; ++c) bias[c] = static_cast<const T*>(job.bias)[j + c];
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t p = job.k * block / blocks, count = job.k * (block + 1) / blocks - p;
    pack(job, p, count, j, n, width, panel);
    A a{static_cast<const T*>(job.a), job.lda};
    a.data += first * a.row + p * a.column;
    T* const out = static_cast<T*>(job.out) + first * job.n + j;
    const bool add = block > 0, relu = job.relu && block == blocks - 1;
    auto start = [&](int64_t, int64_t c) { return add ? Vec<T>{} : vec(bias + c); };
    auto finish = [&](int64_t i, int64_t c, Vec<T> value) { put(out + i * job.n + c, n - c, value, add, relu); };
    const T* const b = panel;
    if (matmul_vectors > 3 && width == 3 * W)
      matmul_columns<T, 3>(rows, int64_t(0), count, a, b, width, start, finish);
    else
      matmul(rows, width, count, a, b, width, start, finish);
  }
}

template <class T>
void units(const Product& job, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t chunk = unit % job.chunks, panel = unit / job.chunks;
    const int64_t first = job.m * chunk / job.chunks, last = job.m * (chunk + 1) / job.chunks;
    job.a_transposed ? panel_of<T, ByColumn<T>>(job, panel, first, last)
                     : panel_of<T, ByRow<T>>(job, panel, first, last);
  }
}

}  // namespace

void product(const Product& job, int64_t begin, int64_t end) {
  job.is_double ? units<double>(job, begin, end) : units<float>(job, begin, end);
}

}  // namespace fastflow::FASTFLOW_ISA
