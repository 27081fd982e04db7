// Declarations of kernels, once for every instruction set that they are compiled for.
#pragma once

#if defined(__x86_64__)
#define FASTFLOW_EACH_ISA(...)      \
  namespace avx512 { __VA_ARGS__ }  \
  namespace avx2 { __VA_ARGS__ }    \
  namespace baseline { __VA_ARGS__ }
#else
#define FASTFLOW_EACH_ISA(...) namespace baseline { __VA_ARGS__ }
#endif
