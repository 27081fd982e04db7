// How the items (elements or vectors) of many rows (samples) are spread over blocks, and sums over a row.
//
// A row belongs to a group of threads: part of a warp, a warp or a whole block, as many as it has items; a long row is
// split into chunks, a block each, whose sums a second launch adds up. Which items a thread gets, and so the order of
// every sum, depends on the shapes alone. Sums are kept in double.
#pragma once

#include "elements.cuh"

#include <algorithm>

namespace fastflow {

constexpr int kBlock = 256;
constexpr int64_t kRowElements = 16384;  // a longer row is split
constexpr int64_t kLeastChunk = 4096, kEnoughBlocks = 1024;

struct Tiles {
  int64_t rows, items;
  int64_t chunks, chunk_items;
  int group, block;  // threads of a row (a power of two), threads of a block (another)
  int group_log2 = 0;
  int64_t grid() const {
    const int64_t rows_per_block = block / group;
    return (rows + rows_per_block - 1) / rows_per_block * chunks;
  }
};

// `sums`: whether a row is summed, so that a split costs a second launch.
inline Tiles tile_rows(int64_t rows, int64_t items, int64_t item_elements, bool sums = true) {
  Tiles tiles{rows, items, 1, std::max<int64_t>(kRowElements / item_elements, 1), 1, kBlock};
  while (tiles.group < kBlock && tiles.group < items) tiles.group *= 2;
  auto chunks = [&] { return std::max<int64_t>((items + tiles.chunk_items - 1) / tiles.chunk_items, 1); };
  if (!sums)
    while (tiles.chunk_items > tiles.group && rows * chunks() < kEnoughBlocks) tiles.chunk_items /= 2;
  else if (chunks() > 1)
    while (tiles.chunk_items * item_elements > kLeastChunk && rows * chunks() < kEnoughBlocks) tiles.chunk_items /= 2;
  tiles.chunks = chunks();
  while (tiles.block > 64 && tiles.block > tiles.group && tiles.grid() < 128) tiles.block /= 2;  // use more processors
  while (1 << tiles.group_log2 < tiles.group) ++tiles.group_log2;
  return tiles;
}

// This thread's place: items first, first + step, ... below last of `row` (none where row is past the end).
struct Place {
  int64_t row, chunk, first, last;
  int step;
  bool inside, leads;  // leads: writes the row's sum
};

__device__ __forceinline__ Place place_of(const Tiles& tiles) {
  Place place;
  const int64_t block = static_cast<int64_t>(blockIdx.x);
  const int64_t row_block = tiles.chunks == 1 ? block : block / tiles.chunks;
  const int member = static_cast<int>(threadIdx.x) & (tiles.group - 1);
  place.row = row_block * (tiles.block >> tiles.group_log2) + (static_cast<int>(threadIdx.x) >> tiles.group_log2);
  place.chunk = block - row_block * tiles.chunks;
  place.step = tiles.group;
  place.inside = place.row < tiles.rows;
  place.leads = place.inside && member == 0;
  const int64_t begin = place.chunk * tiles.chunk_items;
  place.first = begin + member;
  place.last = place.inside ? (begin + tiles.chunk_items < tiles.items ? begin + tiles.chunk_items : tiles.items) : 0;
  return place;
}

// Sum over the threads of this thread's group; every thread of the block must call.
__device__ __forceinline__ double group_sum(double value, int group) {
  const int width = group < 32 ? group : 32;
  for (int flip = width / 2; flip > 0; flip /= 2) value += __shfl_xor_sync(0xffffffffu, value, flip);
  if (group > 32) {
    FASTFLOW_SHARED(double, partial, kBlock / 32);
    __syncthreads();  // an earlier sum has been read
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    const int first = static_cast<int>(threadIdx.x) / group * (group / 32);
    value = partial[first];
    for (int w = 1; w < group / 32; ++w) value += partial[first + w];
  }
  return value;
}

// Sums of `count` consecutive partial sums each, a warp to a result.
struct PartialSums {
  const double* partial = nullptr;
  int64_t results = 0, count = 1;
};

__device__ __forceinline__ double finish_sum(const PartialSums& sums, int64_t result) {
  double total = 0;
  if (result < sums.results)
    for (int64_t i = threadIdx.x % 32; i < sums.count; i += 32) total += sums.partial[result * sums.count + i];
  for (int flip = 16; flip > 0; flip /= 2) total += __shfl_xor_sync(0xffffffffu, total, flip);
  return total;
}

inline int64_t finish_grid(const PartialSums& sums) { return (sums.results + kBlock / 32 - 1) / (kBlock / 32); }

// The log-determinants of rows that were split: their partial sums and what they ran up to before.
template <class T>
__global__ void __launch_bounds__(kBlock) finish_logdet(PartialSums sums, Operand running, T* logdet) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kBlock / 32) + threadIdx.x / 32;
  const double total = finish_sum(sums, row);
  if (row < sums.results && threadIdx.x % 32 == 0)
    logdet[row] = static_cast<T>(running.data ? load<T>(running, row * running.batch) + total : total);
}

}  // namespace fastflow
