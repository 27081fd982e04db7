// What the host code of latent_head hands to its kernels: contiguous float32 arrays of `count` elements.
#pragma once

#include <cstdint>

#include "each_isa.h"

namespace fastflow {

struct LatentHeadForward {
  const float *mean, *logvar;
  float *z, *eps, *kl;  // kl: of every tile
  int64_t count;
};

struct LatentHeadBackward {
  const float *mean, *logvar, *eps, *grad_z;
  float grad_kl;  // by the KL divergence of every element
  float *to_mean, *to_logvar;
  int64_t count;
};

constexpr int64_t head_tile = 1024;

// torch_words: the random words of `count` normals into eps, from the generator's state, whose bytes it moves on; those
// of the last ones, where there is no whole block of sixteen, into `tail` as normals. latent_head_forward makes the
// others normals, in tiles [begin, end), and samples.
FASTFLOW_EACH_ISA(void torch_words(char* state, int64_t count, float* eps, float* tail);
                  void latent_head_forward(const LatentHeadForward& f, const float* tail, int64_t begin, int64_t end);
                  void latent_head_backward(const LatentHeadBackward& b, int64_t begin, int64_t end);)

}  // namespace fastflow
