// The types that tensors are stored in.
#pragma once

namespace fastflow {

enum class Element : int { float16, bfloat16, float32, float64 };

}  // namespace fastflow
