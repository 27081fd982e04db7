// How every CUDA kernel is launched: on the tensor's device and torch's current stream, with the launch checked.
//
// Launches of each operator (an empty grid is not launched and not counted; tests/simt asserts these numbers):
//   affine_coupling_fwd  1, or 2 where a sample is split over blocks (beyond 16384 elements)
//   affine_coupling_bwd  1
//   slogdet_fwd          1, after a copy of a weight whose leading axes no single stride spans
//   plu_weight_fwd       1
//   plu_weight_bwd       1
//   gaussian_fwd         1, or 2 where partial sums are left over: a sample split over blocks (beyond 16384 elements),
//                        or log q wanted together with a KL per channel
//   gaussian_bwd         1, or 0 where only the gradient of a prior of batch 1 is wanted; that takes 1 more, or 2 where
//                        the batch is split over blocks (beyond 64 samples)
//   philox4x32           1
//   mlp_flow_fwd         1 for every 32 steps, 64 layers and 4 different scale maps
//   mlp_flow_bwd         as many, and 1 for every 192 parameters if their gradients are wanted
//   spline_fwd           1, or 2 where a sample is split over blocks (beyond 4096 elements)
//   spline_bwd           1
//
// tests/simt compiles the same sources as plain C++ (FASTFLOW_SIMT), where simt.h stands in for the device.
#pragma once

#include "../fastflow.h"

#include <torch/headeronly/util/Exception.h>

#include <string>

#if !defined(FASTFLOW_SIMT)
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

// Shared memory of a block: an array of fixed size, and the bytes given at launch.
#define FASTFLOW_SHARED(T, name, count) __shared__ T name[count]
#define FASTFLOW_DYNAMIC_SHARED(T, name)                          \
  extern __shared__ __align__(16) unsigned char fastflow_shared[]; \
  T* name = reinterpret_cast<T*>(fastflow_shared)

namespace fastflow {

// Begins to copy 4, 8 or 16 bytes, aligned to as many, from device memory to shared memory. They are there once this
// thread has waited for their group, and for other threads after a barrier. Before sm_80 they are there at once.
template <int Bytes>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (Bytes == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(Bytes) : "memory");
#else
  if constexpr (Bytes == 16) *static_cast<int4*>(to) = *static_cast<const int4*>(from);
  else if constexpr (Bytes == 8) *static_cast<int2*>(to) = *static_cast<const int2*>(from);
  else *static_cast<int*>(to) = *static_cast<const int*>(from);
#endif
}

// Ends a group: the copies since the last call, maybe none.
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all groups of this thread but the last Pending.
template <int Pending>
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

// Copies 8 bytes of a kernel's __grid_constant__ parameter as from device memory: any thread any address.
__device__ __forceinline__ void load_parameter(const void* from, void* to) {
  unsigned long long bits;
  asm volatile("ld.u64 %0, [%1];" : "=l"(bits) : "l"(from) : "memory");
  *static_cast<unsigned long long*>(to) = bits;
}

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "fastflow: ", what, ": ", cudaGetErrorString(error));
}

// The tensor's device, current until the end of the scope, and torch's current stream there.
struct Stream {
  explicit Stream(const Tensor& tensor) : device(tensor.get_device_index()), guard(device) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
    handle = static_cast<cudaStream_t>(current);
  }

  // Largest dynamic shared memory of a block, in bytes.
  int64_t shared_limit() const {
    int bytes = 0;
    check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "device attribute");
    return bytes;
  }

  int32_t device;
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t handle;
};

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t grid, int block, int64_t shared_bytes,
            const Stream& stream, const Arguments&... arguments) {
  if (grid == 0) return;
  STD_TORCH_CHECK(grid <= 0x7fffffff, "fastflow: ", name, ": too many blocks: ", std::to_string(grid));
  if (shared_bytes > 48 * 1024)
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)), name);
  kernel<<<static_cast<unsigned>(grid), block, shared_bytes, stream.handle>>>(arguments...);
  check_cuda(cudaGetLastError(), name);
}

}  // namespace fastflow
#endif

// FASTFLOW_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...); a kernel with template arguments in
// parentheses. Blocks and threads lie along axis 0 alone.
#define FASTFLOW_LAUNCH(kernel, ...) ::fastflow::launch(#kernel, kernel, __VA_ARGS__)
