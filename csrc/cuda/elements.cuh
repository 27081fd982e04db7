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

// A kernel is compiled for operands of any layout and dtypes (kMixed), and for such as are dense and all of one dtype,
// which then takes neither registers nor instructions.
constexpr int kMixed = -1;

template <int D>
__device__ __forceinline__ Dtype known_dtype(Dtype dtype) {
  return D == kMixed ? dtype : static_cast<Dtype>(D);
}

// The dtype of all operands that are there, or kMixed.
template <class Operands>
int common_dtype(const Operands& operands) {
  int common = kMixed;
  for (const Operand& operand : operands) {
    if (operand.data == nullptr) continue;
    if (common != kMixed && common != static_cast<int>(operand.dtype)) return kMixed;
    common = static_cast<int>(operand.dtype);
  }
  return common;
}

// Elements of a vector access: 16 bytes of float32, which a warp then reads in one run, and one block of the generator.
constexpr int kVector = 4;

// f<V, D>(): one element at a time, or vectors of operands that are dense and all float32 or all bfloat16, or of other
// ones.
template <class T, class F>
void with_access(bool vector, bool dense, int dtype, F&& f) {
  if constexpr (sizeof(T) == 4) {
    constexpr int float32 = static_cast<int>(Dtype::float32), bfloat16 = static_cast<int>(Dtype::bfloat16);
    if (vector && dense && dtype == float32) return f.template operator()<kVector, float32>();
    if (vector && dense && dtype == bfloat16) return f.template operator()<kVector, bfloat16>();
    if (vector) return f.template operator()<kVector, kMixed>();
  }
  f.template operator()<1, kMixed>();
}

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

// What a vector access of V elements moves, not yet converted, so that several loads are under way before the first is
// used: 16 bytes at a time, 8 where V elements of 16 bits fill no more. Vector accesses are for the compute type float.
template <int V>
struct Packet {
  uint4 bits[V / 4];
};

template <int V, int D = kMixed>
__device__ __forceinline__ Packet<V> fetch(const Operand& from, int64_t i) {
  Packet<V> packet;
  if (known_dtype<D>(from.dtype) == Dtype::float32) {
    const uint4* at = reinterpret_cast<const uint4*>(static_cast<const float*>(from.data) + i);
#pragma unroll
    for (int part = 0; part < V / 4; ++part) packet.bits[part] = at[part];
  } else {
    const Half* at = static_cast<const Half*>(from.data) + i;
    if constexpr (V == 8) {
      packet.bits[0] = *reinterpret_cast<const uint4*>(at);
    } else {
      const uint2 two = *reinterpret_cast<const uint2*>(at);
      packet.bits[0].x = two.x;
      packet.bits[0].y = two.y;
    }
  }
  return packet;
}

template <int V, int D = kMixed>
__device__ __forceinline__ void decode(const Packet<V>& packet, Dtype of, float (&values)[V]) {
  const Dtype dtype = known_dtype<D>(of);
  if (dtype == Dtype::float32) {
    __builtin_memcpy(values, packet.bits, sizeof(values));
    return;
  }
  uint16_t halves[V];
  __builtin_memcpy(halves, packet.bits, sizeof(halves));
#pragma unroll
  for (int e = 0; e < V; ++e)
    values[e] = dtype == Dtype::float16 ? static_cast<float>(Half(halves[e], Half::from_bits()))
                                        : static_cast<float>(BFloat16(halves[e], BFloat16::from_bits()));
}

// Through the intrinsic __stwb, since nvcc takes some plain stores of vectors apart.
template <int V, int D = kMixed>
__device__ __forceinline__ void store_vector(const Operand& to, int64_t i, const float (&values)[V]) {
  Packet<V> packet;
  const Dtype dtype = known_dtype<D>(to.dtype);
  if (dtype == Dtype::float32) {
    __builtin_memcpy(packet.bits, values, sizeof(values));
    uint4* at = reinterpret_cast<uint4*>(static_cast<float*>(to.data) + i);
#pragma unroll
    for (int part = 0; part < V / 4; ++part) __stwb(at + part, packet.bits[part]);
  } else {
    uint16_t halves[V];
#pragma unroll
    for (int e = 0; e < V; ++e) halves[e] = dtype == Dtype::float16 ? Half(values[e]).x : BFloat16(values[e]).x;
    __builtin_memcpy(packet.bits, halves, sizeof(halves));
    Half* at = static_cast<Half*>(to.data) + i;
    if constexpr (V == 8) __stwb(reinterpret_cast<uint4*>(at), packet.bits[0]);
    else __stwb(reinterpret_cast<uint2*>(at), uint2{packet.bits[0].x, packet.bits[0].y});
  }
}

}  // namespace fastflow
