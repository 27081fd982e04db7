// Working memory of one thread, aligned for any vector; host code only.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace fastflow {

struct FreeScratch {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};

using Scratch = std::unique_ptr<void, FreeScratch>;

inline Scratch make_scratch(int64_t bytes) {
  return Scratch(::operator new(static_cast<size_t>(bytes), std::align_val_t(64)));
}

}  // namespace fastflow
