// Stands in for a CUDA device, so that csrc/cuda/*.cu compile as plain C++ and run on the CPU.
//
//   g++ -x c++ -DFASTFLOW_SIMT -include tests/simt/simt.h csrc/cuda/<stem>.cu tests/simt/runtime.cpp ...
//
// Blocks run one after the other, the threads of a block as fibers in an order shuffled by a seed: a thread runs until
// its next barrier, shuffle or vote. Shared memory is filled with NaN before every block and, under AddressSanitizer,
// guarded at both ends. A barrier that some threads don't reach, a vote over lanes that don't take part and a shuffle
// from a lane outside the mask end the launch with an error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

#define FASTFLOW_SHARED(T, name, count)                   \
  static ::simt::Shared<T[count]> name##_of_the_block;    \
  T(&name)[count] = name##_of_the_block.value
#define FASTFLOW_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::simt::dynamic_shared())

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct alignas(8) uint2 {
  unsigned x, y;
};

namespace simt {

struct Index {
  unsigned x, y = 0, z = 0;
};

enum class Collective { sync, shuffle, ballot };

// What the running thread sees of itself; set by the runtime before it is resumed.
extern Index thread_index, block_index, block_size, grid_size;

void barrier(const char* file, int line);
// A copy happens when its thread waits for it, as late as a device may make it.
void begin_copy(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_for_copies(size_t pending);
// Waits for the lanes of `mask` and returns what the collective gives this lane; `operand` is a shuffle's source lane.
uint64_t collective(Collective kind, unsigned mask, uint64_t value, int operand);
void* dynamic_shared();
void register_shared(void* storage, size_t bytes);
void run(const char* name, int64_t grid, int block, int64_t shared_bytes, const std::function<void()>& kernel);
int64_t shared_limit();

template <class T>
struct alignas(16) Shared {
  Shared() { register_shared(&value, sizeof(value)); }
  T value;
};

template <class T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = collective(Collective::shuffle, mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline int lane() { return static_cast<int>(thread_index.x % 32); }

}  // namespace simt

#define threadIdx (::simt::thread_index)
#define blockIdx (::simt::block_index)
#define blockDim (::simt::block_size)
#define gridDim (::simt::grid_size)
#define __syncthreads() ::simt::barrier(__FILE__, __LINE__)

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return simt::shuffle(mask, value, (simt::lane() & ~(width - 1)) | (source & (width - 1)));
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32) {
  const int source = simt::lane() ^ flip;
  return simt::shuffle(mask, value, source / width == simt::lane() / width ? source : simt::lane());
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int step, int width = 32) {
  const bool inside = simt::lane() % width + step < width;
  return simt::shuffle(mask, value, inside ? simt::lane() + step : simt::lane());
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int step, int width = 32) {
  return simt::shuffle(mask, value, simt::lane() % width >= step ? simt::lane() - step : simt::lane());
}

inline void __syncwarp(unsigned mask = 0xffffffffu) { simt::collective(simt::Collective::sync, mask, 0, 0); }

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(simt::collective(simt::Collective::ballot, mask, predicate != 0, 0));
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

template <class T>
void __stwb(T* to, T value) {
  *to = value;
}

inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

namespace fastflow {

// Same interface as in csrc/cuda/launch.h.
struct Stream {
  template <class Tensor>
  explicit Stream(const Tensor&) {}
  int64_t shared_limit() const { return simt::shared_limit(); }
};

template <int Bytes>
void copy_async(void* to, const void* from) {
  simt::begin_copy(to, from, Bytes);
}

inline void commit_copies() { simt::commit_copies(); }

template <int Pending>
void wait_for_copies() {
  simt::wait_for_copies(Pending);
}

inline void load_parameter(const void* from, void* to) { std::memcpy(to, from, 8); }

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t grid, int block, int64_t shared_bytes,
            const Stream&, const Arguments&... arguments) {
  if (grid != 0) simt::run(name, grid, block, shared_bytes, [&] { kernel(arguments...); });
}

}  // namespace fastflow
