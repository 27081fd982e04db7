// Accurate sums in a fixed order. Used by host code and, inlined, by the kernels of every instruction set.
#pragma once

namespace fastflow {
namespace {

// Running sum in double with Neumaier's compensation; infinities and NaN come through as in a plain sum.
struct CompensatedSum {
  double sum = 0., lost = 0.;

  inline __attribute__((always_inline)) void add(double value) {
    const double next = sum + value;
    const bool larger = (sum < 0. ? -sum : sum) >= (value < 0. ? -value : value);
    lost += larger ? (sum - next) + value : (value - next) + sum;
    sum = next;
  }

  inline __attribute__((always_inline)) double total() const {
    const double corrected = sum + lost;
    return corrected - corrected == 0. ? corrected : sum;
  }
};

}  // namespace
}  // namespace fastflow
