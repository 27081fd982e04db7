// Whether this library has code for the current GPU.
#include "launch.h"

#if !defined(FASTFLOW_SIMT)
namespace {
__global__ void nothing() {}
}  // namespace

// Null, or why its kernels can't be launched there.
extern "C" __attribute__((visibility("default"))) const char* fastflow_cuda_refusal() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, nothing);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // which the next launch's check would find
  return cudaGetErrorString(error);
}
#endif
