// Kernels that are wrong on purpose, each beside its right twin: what the emulation must catch (test_simt.py).
// Every entry point returns a message, null where the launch went through.
#include "../../csrc/cuda/launch.h"

#include <exception>

namespace {

constexpr int kThreads = 64;

struct Nowhere {};

// out[i] = in[n - 1 - i] through shared memory, with or without the barrier between.
__global__ void reverse(const float* in, float* out, bool with_barrier) {
  FASTFLOW_SHARED(float, tile, kThreads);
  tile[threadIdx.x] = in[threadIdx.x];
  if (with_barrier) __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

__global__ void some_skip_the_barrier(int* out, bool skip) {
  if (!skip || threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = __any_sync(0xffffffffu, skip ? 1 : 0);
  if (skip && threadIdx.x >= 32) __syncthreads();
}

__global__ void write_past(float* out, int extra) { out[static_cast<int>(threadIdx.x) + extra] = 1.f; }

__global__ void dynamic_past(float* out, int extra) {
  FASTFLOW_DYNAMIC_SHARED(float, tile);
  tile[static_cast<int>(threadIdx.x) + extra] = 1.f;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void static_past(float* out, int extra) {
  FASTFLOW_SHARED(float, tile, kThreads);
  tile[static_cast<int>(threadIdx.x) + extra] = 1.f;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void misaligned(const float* in, float* out, int shift) {
  const uint4 bits = *reinterpret_cast<const uint4*>(in + 4 * threadIdx.x + shift);
  out[threadIdx.x] = static_cast<float>(bits.x);
}

// A vote whose mask names lanes that don't come; a shuffle from outside its mask; a mask beyond the block.
__global__ void collective(unsigned* out, int fault) {
  const unsigned lane = threadIdx.x % 32;
  unsigned value = 0;
  if (fault == 1) {
    if (lane < 16) value = __ballot_sync(0xffffffffu, 1);
  } else if (fault == 2) {
    value = lane < 16 ? __shfl_sync(0x0000ffffu, lane, 20) : 0;
  } else {
    value = __shfl_sync(0xffffffffu, lane, 31 - static_cast<int>(lane));
  }
  out[threadIdx.x] = value;
}

// out[i] = in[n - 1 - i] by asynchronous copies: right, not waited for, from a misaligned address, from past the end.
__global__ void copied(const float* in, float* out, int fault) {
  FASTFLOW_SHARED(float, tile, kThreads);
  const int i = 4 * static_cast<int>(threadIdx.x);
  if (i < kThreads) fastflow::copy_async<16>(tile + i, in + i + (fault == 2 ? 1 : fault == 3 ? kThreads : 0));
  fastflow::commit_copies();
  if (fault == 1) fastflow::wait_for_copies<1>();
  else fastflow::wait_for_copies<0>();
  __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

__global__ void never_written(float* out) {
  FASTFLOW_SHARED(float, tile, kThreads);
  out[threadIdx.x] = tile[threadIdx.x];
}

template <class Launch>
const char* report(Launch launch) {
  static std::string message;
  try {
    launch();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

#define TOOTH(name, parameters, kernel, grid, block, bytes, ...)                                                      \
  extern "C" __attribute__((visibility("default"))) const char* name parameters {                                     \
    return report([&] { FASTFLOW_LAUNCH(kernel, grid, block, bytes, fastflow::Stream(Nowhere{}), __VA_ARGS__); }); \
  }

TOOTH(tooth_reverse, (const float* in, float* out, int right), reverse, 1, kThreads, 0, in, out, right != 0)
TOOTH(tooth_skip, (int* out, int wrong), some_skip_the_barrier, 1, kThreads, 0, out, wrong != 0)
TOOTH(tooth_global, (float* out, int extra), write_past, 1, kThreads, 0, out, extra)
TOOTH(tooth_dynamic, (float* out, int extra), dynamic_past, 1, kThreads, kThreads * 4, out, extra)
TOOTH(tooth_static, (float* out, int extra), static_past, 1, kThreads, 0, out, extra)
TOOTH(tooth_misaligned, (const float* in, float* out, int shift), misaligned, 1, 8, 0, in, out, shift)
TOOTH(tooth_copied, (const float* in, float* out, int fault), copied, 1, kThreads, 0, in, out, fault)
TOOTH(tooth_collective, (unsigned* out, int fault, int block), collective, 1, block, 0, out, fault)
TOOTH(tooth_unwritten, (float* out), never_written, 1, kThreads, 0, out)
TOOTH(tooth_block, (float* out, int block), write_past, 1, block, 0, out, 0)
TOOTH(tooth_shared, (float* out, int bytes), dynamic_past, 1, kThreads, bytes, out, 0)
