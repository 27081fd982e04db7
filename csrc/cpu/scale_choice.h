// From a scale map as data to the template instance that computes it.
#pragma once

#include "../common/scale_map.h"
#include "affine_coupling_kernel.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

template <auto V>
struct Constant {
  static constexpr auto value = V;
};

template <class F>
auto with_flag(bool flag, const F& f) {
  return flag ? f(Constant<true>{}) : f(Constant<false>{});
}

template <class F>
auto with_kind(int64_t kind, const F& f) {
  switch (static_cast<Kind>(kind)) {
    case Kind::exp: return f(Constant<Kind::exp>{});
    case Kind::sigmoid: return f(Constant<Kind::sigmoid>{});
    case Kind::tanh: return f(Constant<Kind::tanh>{});
    case Kind::atan: return f(Constant<Kind::atan>{});
    case Kind::softplus: return f(Constant<Kind::softplus>{});
    case Kind::rational: return f(Constant<Kind::rational>{});
    default: return f(Constant<Kind::additive>{});
  }
}

template <class T>
ScaleMap<T> constants_of(const AffineMap& m) {
  return make_scale_map<T>(m.kind, m.gain, m.offset, m.out_gain, m.clamp, m.eps, m.hard_min, m.hard_max, m.shift_gain);
}

template <class T>
bool needs_extended(const AffineMap& map) {
  return map.eps != 0. || has_bounds(map.hard_min, map.hard_max) || !log_scale_is_moderate(constants_of<T>(map));
}

// The plain instance does without eps, without bounds and without the far ends of exp where log s is soft-clamped; the
// other does it all, and double has no other: the constants of whatever is absent change nothing.
template <class T, class F>
auto with_map(const AffineMap& map, const F& f) {
  return with_kind(map.kind, [&](auto kind) {
    if constexpr (sizeof(T) == 8)
      return f(kind, Constant<true>{});
    else
      return with_flag(needs_extended<T>(map), [&](auto extended) { return f(kind, extended); });
  });
}

}  // namespace
}  // namespace fastflow::FASTFLOW_ISA
