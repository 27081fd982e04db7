// Reading and writing pieces of strided tensors of any type, as contiguous arrays of the compute type.
#pragma once

#include "../common/math.h"
#include "gaussian_kernel.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

using gaussian::Operand;
using gaussian::Storage;

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

FASTFLOW_HD float widen(Half x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  // The product moves the exponent's bias, subnormals included; Inf and NaN need an exponent of all ones.
  const uint32_t finite = math::to_bits(math::from_bits(magnitude) * 0x1p112f);
  const uint32_t value = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite;
  return math::from_bits(value | static_cast<uint32_t>(x.bits & 0x8000) << 16);
}
FASTFLOW_HD float widen(Bfloat16 x) { return math::from_bits(static_cast<uint32_t>(x.bits) << 16); }
FASTFLOW_HD float widen(float x) { return x; }
FASTFLOW_HD double widen(double x) { return x; }

// To nearest, ties to even.
FASTFLOW_HD void narrow(float x, Half& out) {
  const uint32_t bits = math::to_bits(x), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves a subnormal half, rounded, in the low bits.
  const uint32_t small = math::to_bits(math::from_bits(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? small : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  out.bits = static_cast<uint16_t>(half | (bits & 0x80000000u) >> 16);
}
FASTFLOW_HD void narrow(float x, Bfloat16& out) {
  const uint32_t bits = math::to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40u : rounded);
}
FASTFLOW_HD void narrow(float x, float& out) { out = x; }
FASTFLOW_HD void narrow(double x, float& out) { out = static_cast<float>(x); }
FASTFLOW_HD void narrow(float x, double& out) { out = x; }
FASTFLOW_HD void narrow(double x, double& out) { out = x; }
template <class Stored>
FASTFLOW_HD void narrow(double x, Stored& out) {
  narrow(static_cast<float>(x), out);
}

FASTFLOW_HD int64_t bytes_of(Storage storage) {
  return storage == Storage::float64 ? 8 : storage == Storage::float32 ? 4 : 2;
}

template <class T>
constexpr Storage storage_of = sizeof(T) == 8 ? Storage::float64 : Storage::float32;

template <class F>
void with_storage(Storage storage, const F& f) {
  switch (storage) {
    case Storage::half: return f(Half());
    case Storage::bfloat16: return f(Bfloat16());
    case Storage::float32: return f(float());
    case Storage::float64: return f(double());
  }
}

template <class T, class Stored>
void load_run(T* __restrict out, const Stored* __restrict in, int64_t stride, int64_t count) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(widen(in[i]));
  } else if (stride == 2) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(widen(in[2 * i]));
  } else if (stride == 0) {
    const T value = static_cast<T>(widen(in[0]));
    for (int64_t i = 0; i < count; ++i) out[i] = value;
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(widen(in[i * stride]));
  }
}

template <class T, class Stored>
void store_run(const T* __restrict in, Stored* __restrict out, int64_t stride, int64_t count) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) narrow(in[i], out[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) narrow(in[i], out[i * stride]);
  }
}

// f(offset in elements, how many were done before, run length) for each run along the innermost dim of `count`
// elements from logical index `first`.
template <class F>
void for_runs(const Operand& op, int64_t first, int64_t count, const F& f) {
  const int64_t last = op.rank - 1, inner = op.sizes[last];
  int64_t index[gaussian::max_rank];
  int64_t outer = static_cast<int64_t>(static_cast<uint64_t>(first) / static_cast<uint64_t>(inner));
  int64_t at = first - outer * inner, offset = 0, done = 0;
  for (int64_t d = last; d-- > 0;) {
    index[d] = outer % op.sizes[d];
    outer /= op.sizes[d];
    offset += index[d] * op.strides[d];
  }
  for (;;) {
    const int64_t left = count - done, run = inner - at < left ? inner - at : left;
    f(offset + at * op.strides[last], done, run);
    done += run;
    at = 0;
    if (done == count) return;
    for (int64_t d = last; d-- > 0;) {
      offset += op.strides[d];
      if (++index[d] < op.sizes[d]) break;
      offset -= op.sizes[d] * op.strides[d];
      index[d] = 0;
    }
  }
}

// Where elements [first, first + count) of sample k lie as one array of T, or null.
template <class T>
T* direct(const Operand& op, int64_t k, int64_t first, int64_t count) {
  const int64_t last = op.rank - 1;
  if (op.storage != storage_of<T> || op.strides[last] != 1 || op.rank > 2) return nullptr;
  T* const base = reinterpret_cast<T*>(op.data) + k * op.sample_stride;
  if (op.rank == 1) return base + first;
  const uint64_t inner = static_cast<uint64_t>(op.sizes[1]), outer = static_cast<uint64_t>(first) / inner;
  const int64_t at = first - static_cast<int64_t>(outer * inner);
  return at + count > op.sizes[1] ? nullptr : base + static_cast<int64_t>(outer) * op.strides[0] + at;
}

// Elements [first, first + count) of sample k, where they lie if they lie as T, else copied into scratch.
template <class T>
const T* fetch(const Operand& op, int64_t k, int64_t first, int64_t count, T* scratch) {
  if (const T* found = direct<T>(op, k, first, count)) return found;
  with_storage(op.storage, [&](auto stored) {
    using Stored = decltype(stored);
    const Stored* base = reinterpret_cast<const Stored*>(op.data) + k * op.sample_stride;
    const int64_t stride = op.strides[op.rank - 1];
    for_runs(op, first, count, [&](int64_t offset, int64_t done, int64_t run) {
      load_run(scratch + done, base + offset, stride, run);
    });
  });
  return scratch;
}

// Where to write elements [first, first + count): in place if they lie as T, else in scratch. `commit` moves them on.
template <class T>
T* place(const Operand& op, int64_t k, int64_t first, int64_t count, T* scratch) {
  T* const found = op.data == nullptr ? nullptr : direct<T>(op, k, first, count);
  return found == nullptr ? scratch : found;
}

template <class T>
void commit(const Operand& op, int64_t k, int64_t first, int64_t count, const T* written, const T* scratch) {
  if (written != scratch || op.data == nullptr) return;
  with_storage(op.storage, [&](auto stored) {
    using Stored = decltype(stored);
    Stored* base = reinterpret_cast<Stored*>(op.data) + k * op.sample_stride;
    const int64_t stride = op.strides[op.rank - 1];
    for_runs(op, first, count, [&](int64_t offset, int64_t done, int64_t run) {
      store_run(written + done, base + offset, stride, run);
    });
  });
}

}  // namespace
}  // namespace fastflow::FASTFLOW_ISA
