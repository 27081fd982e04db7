// z = mean + exp(logvar / 2) eps with torch's own noise, and KL(q || N(0, I)): gaussian_loops.h over flat arrays.
#include "latent_head_kernel.h"

#include "gaussian_loops.h"
#include "mersenne.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

// Elements of tile number `tile`.
int64_t size_of(int64_t count, int64_t tile) {
  const int64_t left = count - tile * head_tile;
  return left < head_tile ? left : head_tile;
}

}  // namespace

void torch_words(char* state, int64_t count, float* eps, float* tail) {
  Mersenne generator(state);
  generator.draw(reinterpret_cast<uint32_t*>(eps), count);
  if (count % 16 != 0) {
    generator.draw(reinterpret_cast<uint32_t*>(tail), 16);
    normals_in_place(tail, 1);
  }
  generator.store(state);
}

void latent_head_forward(const LatentHeadForward& f, const float* tail, int64_t begin, int64_t end) {
  const int64_t whole = f.count % 16 == 0 ? f.count : f.count - 16;  // behind them stand those of `tail`
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * head_tile, size = size_of(f.count, tile);
    float* const eps = f.eps + first;
    normals_in_place(eps, size / 16);
    for (int64_t i = whole > first ? whole : first; i < first + size; ++i) f.eps[i] = tail[i - whole];
    alignas(64) float kl[head_tile];
    posterior<gaussian::logvar, false, false, float>({f.mean + first, f.logvar + first, nullptr, nullptr}, eps, size,
                                                     {f.z + first, kl, nullptr, nullptr});
    f.kl[tile] = sum(kl, size);
  }
}

void latent_head_backward(const LatentHeadBackward& b, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * head_tile;
    Incoming<float> grad{};
    grad.z = b.grad_z + first;
    grad.eps = b.eps + first;
    grad.kl_each = b.grad_kl;
    grad.plain = true;
    gradients<gaussian::logvar, false, true, float>({b.mean + first, b.logvar + first, nullptr, nullptr}, grad,
                                                    size_of(b.count, tile),
                                                    {b.to_mean + first, b.to_logvar + first, nullptr, nullptr});
  }
}

}  // namespace fastflow::FASTFLOW_ISA
