// slogdet for one instruction set: small matrices across the lanes of a vector, larger ones blocked.
#include "slogdet_kernel.h"

#include "slogdet_blocked.h"
#include "slogdet_lanes.h"

namespace fastflow::FASTFLOW_ISA {

// Where the blocked code overtakes, by measurement.
constexpr int64_t lanes_up_to = vector_bytes == 64 ? 40 : vector_bytes == 32 ? 28 : 20;

int64_t slogdet_scratch(int64_t n) {
  if (n <= lanes_up_to) return Lanes::scratch(n);
  return at_least(Blocked<double>::scratch(n), Blocked<float>::scratch(n));
}

void slogdet(const SlogdetBatch& batch) {
  const bool wide = batch.type == Element::float64;
  if (batch.n <= lanes_up_to)
    wide ? slogdet_lanes<double>(batch) : slogdet_lanes<float>(batch);
  else if (wide)
    slogdet_blocked<double, double>(batch);
  else if (batch.n <= float64_up_to)
    slogdet_blocked<double, float>(batch);
  else
    slogdet_blocked<float, float>(batch);
}

}  // namespace fastflow::FASTFLOW_ISA
