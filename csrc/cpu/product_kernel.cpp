// A matrix product for one instruction set, by register tiles. A few vectors of B's columns are
// copied, a block of its rows at a time, to where they stay in a cache while all rows of A pass; A is read in place.
#include "product_kernel.h"

#include "matmul_tile.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

// Terms that are summed at a time: a panel of 34 KiB, most of a first-level cache; longer sums would round more. Of one
// row or two BLAS sums far fewer in one go.
constexpr int64_t longest = 136, longest_of_few = 32;
// Rows of A whose `longest` elements, 220 KiB, stay in a cache of the core's own while panel after panel passes.
template <class T>
constexpr int64_t rows_together = 420 * 4 / sizeof(T);

// panel (count, width), rows of `width` elements, = B's rows [p, p + count) in columns [j, j + n), zeros behind them.
template <class T>
void pack(const Product& job, int64_t p, int64_t count, int64_t j, int64_t n, int64_t width, T* panel) {
  const T* const from = static_cast<const T*>(job.b) + p * job.b_row + j * job.b_column;
  job.b_row == 1 ? copy_transposed(Strided<T>{from, job.b_column, job.b_row}, n, count, panel, width)
                 : copy_padded(Strided<T>{from, job.b_row, job.b_column}, count, n, panel, width);
}

// Lines of B that the next panel is copied from, asked for one by one while this one is multiplied: they lie in short
// runs that no prefetcher of the processor's follows.
struct Ahead {
  const char* row = nullptr;
  int64_t stride = 0, rows = 0, lines = 0, line = 0;

  void one() {
    if (rows == 0) return;
    __builtin_prefetch(row + Product::line * line, 0, 2);
    if (++line == lines) {
      line = 0;
      row += stride;
      --rows;
    }
  }
};

// Of B's rows [p, p + count) in columns [j, j + n).
template <class T>
Ahead ahead_of(const Product& job, int64_t p, int64_t count, int64_t j, int64_t n) {
  constexpr int64_t size = sizeof(T);
  if (count == 0 || n == 0) return {};
  const char* const from = static_cast<const char*>(job.b) + (p * job.b_row + j * job.b_column) * size;
  if (job.b_row == 1) return {from, job.b_column * size, n, (count * size + Product::line - 1) / Product::line};
  if (job.b_column == 1) return {from, job.b_row * size, count, (n * size + Product::line - 1) / Product::line};
  return {};
}

// *to = value, or += value, and in the end the bias is added and the sum no less than 0 if that is wanted: the first
// `left` lanes, where there are no more.
template <class T>
static inline void put(T* to, int64_t left, Vec<T> value, bool add, const Vec<T>* bias, bool relu) {
  constexpr int W = Simd<T>::lanes;
  if (left >= W) {
    if (add) value += load(to);
    if (bias != nullptr) value += *bias;
    store(to, relu ? (value <= Vec<T>{} ? Vec<T>{} : value) : value);  // NaN stays
  } else {
    for (int64_t l = 0; l < left; ++l) {
      T sum = add ? to[l] + value[l] : value[l];
      if (bias != nullptr) sum += (*bias)[l];
      to[l] = relu && sum <= T(0) ? T(0) : sum;
    }
  }
}

// The panel's columns of rows [first, last): the terms of block `block` of `blocks`, which are added to those of the
// blocks before it. next: the panel that follows. A is ByRow or ByColumn.
template <class T, class A>
void block_of(const Product& job, int64_t index, int64_t next, int64_t first, int64_t last, int64_t block,
              int64_t blocks) {
  constexpr int W = Simd<T>::lanes;
  constexpr int64_t widest = Product::together * Product::line / sizeof(T);
  alignas(64) T panel[longest * widest], bias[widest] = {};
  const int64_t j = job.first_column(index), n = at_most(job.first_column(index + 1), job.n) - j;
  const int64_t next_j = job.first_column(next), next_n = at_most(job.first_column(next + 1), job.n) - next_j;
  const int64_t width = round_up(n, job.granule()), rows = last - first;
  const int64_t p = job.k * block / blocks, count = job.k * (block + 1) / blocks - p;
  pack(job, p, count, j, n, width, panel);
  Ahead ahead = ahead_of<T>(job, p, count, next_j, next_n);
  A a{static_cast<const T*>(job.a), job.lda};
  a.data += first * a.row + p * a.column;
  T* const out = static_cast<T*>(job.out) + first * job.n + j;
  const bool add = block > 0, last_one = block == blocks - 1, relu = job.relu && last_one;
  const bool biased = job.bias != nullptr && last_one;
  if (biased)
    for (int64_t c = 0; c < n; ++c) bias[c] = static_cast<const T*>(job.bias)[j + c];
  auto start = [](int64_t, int64_t) { return Vec<T>{}; };
  auto meanwhile = [&](int64_t i, int64_t, int64_t p) {
    if (p < matmul_rows * matmul_vectors)
      __builtin_prefetch(out + (i + p / matmul_vectors) * job.n + p % matmul_vectors * W, 1);
    else
      ahead.one();
  };
  auto finish = [&](int64_t i, int64_t c, Vec<T> value) {
    put(out + i * job.n + c, n - c, value, add, biased ? &vec(bias + c) : nullptr, relu);
  };
  const T* const b = panel;
  if (matmul_vectors > 3 && width == 3 * W)
    matmul_columns<T, 3>(rows, int64_t(0), count, a, b, width, start, finish, meanwhile);
  else
    matmul(rows, width, count, a, b, width, start, finish, meanwhile);
}

// Of as many rows as are worth a copy of B, all panels pass over a block of A's columns before the next block does: of
// larger parts of A every panel would read each element from a cache that is further away.
template <class T>
void units(const Product& job, int64_t begin, int64_t end) {
  const int64_t most = job.m > 2 ? longest : longest_of_few, blocks = at_least(1, (job.k + most - 1) / most);
  const int64_t first_panel = begin / job.chunks, last_panel = (end - 1) / job.chunks;
  const int64_t together = at_least(1, rows_together<T> * job.chunks / job.m);
  for (int64_t group = 0; group < job.chunks; group += together)
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t panel = first_panel; panel <= last_panel; ++panel) {
        const int64_t from = at_least(group, begin - panel * job.chunks);
        const int64_t to = at_most(at_most(group + together, job.chunks), end - panel * job.chunks);
        if (from >= to) continue;
        const int64_t first = job.m * from / job.chunks, last = job.m * to / job.chunks;
        const int64_t next = panel < last_panel ? panel + 1 : first_panel;
        job.a_transposed ? block_of<T, ByColumn<T>>(job, panel, next, first, last, block, blocks)
                         : block_of<T, ByRow<T>>(job, panel, next, first, last, block, blocks);
      }
}

}  // namespace

void product(const Product& job, int64_t begin, int64_t end) {
  job.is_double ? units<double>(job, begin, end) : units<float>(job, begin, end);
}

}  // namespace fastflow::FASTFLOW_ISA
