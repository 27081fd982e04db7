// What convolution kernels and their host code share.
#pragma once

#include <cstdint>

namespace fastflow {

// A tensor (B, C, H, W), strides in elements.
struct Image {
  void* data = nullptr;
  int64_t sample, channel, row, column;
};

}  // namespace fastflow
