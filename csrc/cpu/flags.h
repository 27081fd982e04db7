// Flags of samples or groups; host code only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

namespace fastflow {

// Which samples or groups the plain form is to compute.
using Flags = std::unique_ptr<bool[]>;

inline Flags flags(int64_t count, bool value) {
  Flags result(new bool[count]);
  std::fill_n(result.get(), count, value);
  return result;
}

inline bool any(const Flags& flags, int64_t count) {
  return std::any_of(flags.get(), flags.get() + count, [](bool flag) { return flag; });
}

// f(begin, end) of every run of set flags.
template <class F>
inline void for_each_run(const Flags& flags, int64_t begin, int64_t end, const F& f) {
  for (int64_t i = begin; i < end;) {
    const int64_t from = i++;
    if (!flags[from]) continue;
    while (i < end && flags[i]) ++i;
    f(from, i);
  }
}

}  // namespace fastflow
