// Elements of any dtype in memory, read into and written from the compute type T (float or double).
#pragma once

#include "launch.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace fastflow {

using c10::BFloat16;
using c10::Half;

enum class Dtype : int { float32, float64, float16, bfloat16 };

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    default: STD_TORCH_CHECK(false, "fastflow: expected float16, bfloat16, float32 or float64");
  }
}

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// An operand in device memory; null where there is none.
struct Operand {
  void* data = nullptr;
  int64_t batch = 0;  // elements from one sample to the next
  Dtype dtype = Dtype::float32;
};

// Element i. In double everything is float64: functional.py refuses mixtures.
template <class T>
__device__ __forceinline__ T load(const Operand& from, int64_t i) {
  if constexpr (sizeof(T) == 8) return static_cast<const double*>(from.data)[i];
  else if (from.dtype == Dtype::float32) return static_cast<const float*>(from.data)[i];
  else if (from.dtype == Dtype::float16) return static_cast<float>(static_cast<const Half*>(from.data)[i]);
  else return static_cast<float>(static_cast<const BFloat16*>(from.data)[i]);
}

template <class T>
__device__ __forceinline__ void store(const Operand& to, int64_t i, T value) {
  if constexpr (sizeof(T) == 8) static_cast<double*>(to.data)[i] = value;
  else if (to.dtype == Dtype::float32) static_cast<float*>(to.data)[i] = value;
  else if (to.dtype == Dtype::float16) static_cast<Half*>(to.data)[i] = Half(value);
  else static_cast<BFloat16*>(to.data)[i] = BFloat16(value);
}

// Elements of one vector access: one or (eight floats) two 16-byte loads or stores.
template <class T>
inline constexpr int vector_size = sizeof(T) == 8 ? 2 : 8;

// What a vector access moves, not yet converted, so that several loads are under way before the first is used.
template <class T>
struct Packet {
  uint4 bits[vector_size<T> * sizeof(T) / 16];
};

template <class T>
__device__ __forceinline__ Packet<T> fetch(const Operand& from, int64_t i) {
  Packet<T> packet;
  if constexpr (sizeof(T) == 8) {
    packet.bits[0] = *reinterpret_cast<const uint4*>(static_cast<const double*>(from.data) + i);
  } else if (from.dtype == Dtype::float32) {
    const uint4* at = reinterpret_cast<const uint4*>(static_cast<const float*>(from.data) + i);
    packet.bits[0] = at[0];
    packet.bits[1] = at[1];
  } else {
    packet.bits[0] = *reinterpret_cast<const uint4*>(static_cast<const Half*>(from.data) + i);
  }
  return packet;
}

template <class T>
__device__ __forceinline__ void decode(const Packet<T>& packet, Dtype dtype, T (&values)[vector_size<T>]) {
  if constexpr (sizeof(T) == 8) {
    __builtin_memcpy(values, packet.bits, 16);
  } else {
    if (dtype == Dtype::float32) {
      __builtin_memcpy(values, packet.bits, 32);
      return;
    }
    uint16_t halves[8];
    __builtin_memcpy(halves, packet.bits, 16);
#pragma unroll
    for (int e = 0; e < 8; ++e)
      values[e] = dtype == Dtype::float16 ? static_cast<float>(Half(halves[e], Half::from_bits()))
                                          : static_cast<float>(BFloat16(halves[e], BFloat16::from_bits()));
  }
}

template <class T>
__device__ __forceinline__ void store_vector(const Operand& to, int64_t i, const T (&values)[vector_size<T>]) {
  Packet<T> packet;
  if constexpr (sizeof(T) == 8) {
    __builtin_memcpy(packet.bits, values, 16);
    *reinterpret_cast<uint4*>(static_cast<double*>(to.data) + i) = packet.bits[0];
  } else if (to.dtype == Dtype::float32) {
    __builtin_memcpy(packet.bits, values, 32);
    uint4* at = reinterpret_cast<uint4*>(static_cast<float*>(to.data) + i);
    at[0] = packet.bits[0];
    at[1] = packet.bits[1];
  } else {
    uint16_t halves[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) halves[e] = to.dtype == Dtype::float16 ? Half(values[e]).x : BFloat16(values[e]).x;
    __builtin_memcpy(packet.bits, halves, 16);
    *reinterpret_cast<uint4*>(static_cast<Half*>(to.data) + i) = packet.bits[0];
  }
}

}  // namespace fastflow
