#include "runtime.h"

#include <cstdlib>
#include <cstring>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastflow {

namespace {

bool forked = false;

#if defined(__unix__) || defined(__APPLE__)
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  Isa best = Isa::baseline;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    best = Isa::avx2;
  if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    best = Isa::avx512;
  const char* wanted = std::getenv("FASTFLOW_ISA");
  if (wanted != nullptr) {
    if (std::strcmp(wanted, "baseline") == 0) best = Isa::baseline;
    if (std::strcmp(wanted, "avx2") == 0 && best == Isa::avx512) best = Isa::avx2;
  }
  return best;
#else
  return Isa::baseline;
#endif
}

}  // namespace

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

bool blas_is_faster() {
#if defined(__x86_64__)
  static const bool chosen =
      std::getenv("FASTFLOW_ISA") == nullptr && (__builtin_cpu_is("intel") || isa() != Isa::avx512);
  return chosen && !in_forked_child();
#else
  return false;
#endif
}

bool in_forked_child() { return forked; }

extern "C" __attribute__((visibility("default"))) int fastflow_own_products() { return !blas_is_faster(); }

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096, least = uintptr_t(32) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
  // Only a hint: where it is refused, nothing is lost.
  if (static_cast<uintptr_t>(bytes) >= least) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace fastflow
