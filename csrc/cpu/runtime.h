// Threads and instruction sets of the CPU library.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace fastflow {

enum class Isa { baseline, avx2, avx512 };

// The widest instruction set that this processor and system run and this library was compiled for; the environment
// variable FASTFLOW_ISA (baseline, avx2, avx512) lowers it, read once.
Isa isa();

// Whether torch's matrix products beat this library's: on Intel's processors, for which its BLAS is written, and without
// AVX-512, which that BLAS does not use on others' processors. Not where FASTFLOW_ISA is set, which asks for this
// library's own.
bool blas_is_faster();

// The opposite, for fastflow/extension.py.
extern "C" int fastflow_own_products();

// A forked child has none of its parent's OpenMP threads, and waiting for them would hang.
bool in_forked_child();

// Asks for huge pages under a result that an allocator maps afresh every time (glibc: from 32 MiB): taking its 4 KiB
// pages one by one costs more than computing it. Not under smaller ones: the advice would stay with their heap.
void advise_huge_pages(void* data, int64_t bytes);

// f(begin, end) over [begin, end) on torch's threads (torch.set_num_threads), serially in a forked child.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (end <= begin) return;
  if (end - begin <= grain || in_forked_child()) return f(begin, end);
  torch::stable::parallel_for(begin, end, grain, f);
}

}  // namespace fastflow

// Calls FUNCTION of the namespace that the running processor wants: FASTFLOW_ISA_CALL(affine_forward, args...).
#if defined(__x86_64__)
#define FASTFLOW_ISA_CALL(FUNCTION, ...)                                                    \
  (::fastflow::isa() == ::fastflow::Isa::avx512   ? ::fastflow::avx512::FUNCTION(__VA_ARGS__) \
   : ::fastflow::isa() == ::fastflow::Isa::avx2   ? ::fastflow::avx2::FUNCTION(__VA_ARGS__)   \
                                                  : ::fastflow::baseline::FUNCTION(__VA_ARGS__))
#else
#define FASTFLOW_ISA_CALL(FUNCTION, ...) ::fastflow::baseline::FUNCTION(__VA_ARGS__)
#endif
