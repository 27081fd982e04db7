// Matrix products of mlp_flow on a tile of samples, and the stream of weights that feeds them.
//
// A thread computes up to four features of four samples, which lie together in shared memory: reading the factors takes
// no longer than multiplying them.
#pragma once

#include "mlp_flow.cuh"

namespace fastflow {

// N elements of shared memory, moved 16 bytes at a time.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Elements {
  T value[N];
};

template <int N, class T>
__device__ __forceinline__ Elements<T, N> elements_at(const T* at) {
  return *reinterpret_cast<const Elements<T, N>*>(at);
}

template <class T, int N>
__device__ __forceinline__ void set_elements(T* at, const Elements<T, N>& values) {
  *reinterpret_cast<Elements<T, N>*>(at) = values;
}

// The pieces of all weights in the order of their use, copied to shared memory while earlier ones are in use. Forward
// uses the linears of every coupling in their order. Backward goes through the couplings from the last to the first,
// `passes` times, and uses the linears of each in their order and then, without the biases, from the last to the first.
template <bool Backward, class T>
class Weights {
 public:
  // Begins to copy; the tables must be there.
  __device__ __forceinline__ Weights(const FlowProgram<T>& program, const FlowTables<T>& tables, T* slots,
                                     int64_t passes)
      : tables_(tables), slots_(slots), size_(program.slot), slot_count_(program.slots), steps_(program.count),
        passes_(passes), step_(Backward ? program.count : -1) {
    if (passes_ > 0) next_step();
    for (int n = 1; n < slot_count_; ++n) fetch();
  }

  // The next piece. A barrier: what was written before the call can be read after it, the last piece can't any more.
  __device__ __forceinline__ const T* next() {
    if (slot_count_ == 4) wait_for_copies<2>();
    else if (slot_count_ == 3) wait_for_copies<1>();
    else wait_for_copies<0>();
    __syncthreads();
    fetch();
    const T* const piece = slots_ + used_ * size_;
    used_ = used_ + 1 == slot_count_ ? 0 : used_ + 1;
    return piece;
  }

 private:
  __device__ __forceinline__ void next_step() {
    down_ = false;
    linear_ = 0;
    do {
      step_ += Backward ? -1 : 1;
      if (Backward ? step_ < 0 : step_ >= steps_) {
        if (steps_ == 0 || --passes_ == 0) {
          passes_ = 0;
          return;
        }
        step_ = Backward ? steps_ - 1 : 0;
      }
    } while (!tables_.steps[step_].coupling);
  }

  __device__ __forceinline__ void advance(const FlowLinear<T>& linear) {
    row_ += linear.piece;
    if (row_ < linear.out) return;
    row_ = 0;
    if (down_) {
      if (--linear_ < 0) next_step();
    } else if (++linear_ == tables_.steps[step_].count) {
      if constexpr (Backward) {
        down_ = true;
        --linear_;
      } else {
        next_step();
      }
    }
  }

  __device__ __forceinline__ void fetch() {
    if (passes_ > 0) {
      const FlowLinear<T>& linear = tables_.linears[tables_.steps[step_].first + linear_];
      copy(linear, slots_ + filled_ * size_);
      advance(linear);
    }
    commit_copies();
    filled_ = filled_ + 1 == slot_count_ ? 0 : filled_ + 1;
  }

  // N elements at a time: 16 threads to a row.
  template <int N>
  static __device__ __forceinline__ void copy_rows(const T* from, int in, int rows, T* to, int line) {
    constexpr int across = 16, high = kThreads / across;
    const int first = static_cast<int>(threadIdx.x) / across;
#pragma unroll 1
    for (int c = static_cast<int>(threadIdx.x) % across * N; c < in; c += across * N) {
      const T* source = from + first * in + c;
      T* target = to + first * line + c;
#pragma unroll 4
      for (int r = first; r < rows; r += high) {
        copy_async<N * sizeof(T)>(target, source);
        source += high * in;
        target += high * line;
      }
    }
  }

  __device__ __forceinline__ void copy(const FlowLinear<T>& linear, T* to) {
    constexpr int vector = 16 / static_cast<int>(sizeof(T));
    const int in = linear.in, line = linear.line, left = linear.out - row_;
    const int rows = left < linear.piece ? left : linear.piece;
    const T* const from = linear.weight + static_cast<int64_t>(row_) * in;
    if (in % vector == 0 && reinterpret_cast<uintptr_t>(linear.weight) % 16 == 0)
      copy_rows<vector>(from, in, rows, to, line);
    else
      copy_rows<1>(from, in, rows, to, line);
    if (down_) return;
#pragma unroll 1
    for (int r = static_cast<int>(threadIdx.x); r < rows; r += kThreads)
      copy_async<sizeof(T)>(to + r * line + in, linear.bias + row_ + r);
  }

  const FlowTables<T>& tables_;
  T* const slots_;
  const int size_, slot_count_, steps_;
  int64_t passes_;
  int step_, linear_ = 0, row_ = 0;  // of the piece to be copied next
  bool down_ = false;
  int filled_ = 0, used_ = 0;  // slots: where that piece goes, and from where the next is used
};

// What a lane of a warp has to do: four samples from r, feature `own` of `across` or F of them, part of the inputs.
// Bit 0 tells features apart, the next ones samples, the highest parts: whatever they read, of the lanes i, i ^ 1 and
// i ^ 2 two read the same address, so that half-warps and not quarters of a warp are what a vector load is split into.
template <int R, int Parts>
struct LaneOf {
  static constexpr int quads = R / 4, across = 32 / (quads * Parts), pair = across > 1 ? 2 : 1, pairs = across / pair;
  static_assert(across > 0);
  int r, own, part;

  __device__ __forceinline__ LaneOf() {
    const int lane = static_cast<int>(threadIdx.x) % 32, high = lane / (pair * quads);
    r = lane / pair % quads * 4;
    own = lane % pair + high % pairs * pair;
    part = high / pairs;
  }
};

// Sums of four samples over the parts of the inputs; this lane is left with N = 4 / Parts of them, from N * part.
template <int Parts, class T>
__device__ __forceinline__ void add_parts(int part, const T (&sum)[4], T (&total)[4 / Parts]) {
  if constexpr (Parts == 1) {
#pragma unroll
    for (int s = 0; s < 4; ++s) total[s] = sum[s];
  } else {
    const bool high = part >= Parts / 2;
    T two[2];
#pragma unroll
    for (int s = 0; s < 2; ++s)
      two[s] = (high ? sum[2 + s] : sum[s]) + __shfl_xor_sync(0xffffffffu, high ? sum[s] : sum[2 + s], 16);
    if constexpr (Parts == 2) {
      total[0] = two[0];
      total[1] = two[1];
    } else {
      const bool odd = part % 2 == 1;
      total[0] = (odd ? two[1] : two[0]) + __shfl_xor_sync(0xffffffffu, odd ? two[0] : two[1], 8);
    }
  }
}

// For every j < out and sample r: to(j)[r] = sum over k of w(j, k) x[k * kLine + r], plus w(j, in), the bias, unless
// Transposed, plus what is there if `add`; what finish(j, r, values) makes of these for one, two or four samples from
// r; if `again`, what costly, whose code is there once and not for each feature of a thread, makes of that.
// w(j, k) is weight[j * line + k], or weight[k * line + j] if Transposed. F features to a thread; the inputs are summed
// in Parts, each in a lane of its own.
template <int R, int F, int Parts, bool Transposed, class T, class To, class Finish, class Costly>
__device__ __forceinline__ void product_of(int out, int in, const T* weight, int line, const T* x, bool add,
                                           const To& to, const Finish& finish, bool again, const Costly& costly) {
  using Lane = LaneOf<R, Parts>;
  constexpr int across = Lane::across, features = across * F, N = 4 / Parts;
  // A thread's features lie side by side where a vector of the weight holds them, else the lanes' features do.
  constexpr int stride = Transposed ? 1 : across;
  const Lane lane;
  const int part = lane.part, r = lane.r + N * part;
  const T* const samples = x + lane.r;
#pragma unroll 1
  for (int begin = static_cast<int>(threadIdx.x) / 32 * features; begin < out; begin += kWarps * features) {
    const int first = begin + lane.own * (Transposed ? F : 1);
    T sum[F][4] = {};
    const T* w[F];
#pragma unroll
    for (int f = 0; f < F; ++f) {
      const int j = first + f * stride;
      w[f] = Transposed ? weight + (first < out ? first : 0) : weight + (j < out ? j : 0) * line;
    }
#pragma unroll 2
    for (int k = 4 * part; k + 4 <= in; k += 4 * Parts) {
      Elements<T, 4> value[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) value[e] = elements_at<4>(samples + (k + e) * kLine<R>);
      if constexpr (Transposed) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const Elements<T, F> row = elements_at<F>(w[0] + (k + e) * line);
#pragma unroll
          for (int f = 0; f < F; ++f)
#pragma unroll
            for (int s = 0; s < 4; ++s) sum[f][s] = math::fma(row.value[f], value[e].value[s], sum[f][s]);
        }
      } else {
#pragma unroll
        for (int f = 0; f < F; ++f) {
          const Elements<T, 4> row = elements_at<4>(w[f] + k);
#pragma unroll
          for (int e = 0; e < 4; ++e)
#pragma unroll
            for (int s = 0; s < 4; ++s) sum[f][s] = math::fma(row.value[e], value[e].value[s], sum[f][s]);
        }
      }
    }
#pragma unroll 1
    for (int k = in / 4 * 4 + part; k < in; k += Parts) {
      const Elements<T, 4> value = elements_at<4>(samples + k * kLine<R>);
#pragma unroll
      for (int f = 0; f < F; ++f) {
        const T factor = Transposed ? w[0][k * line + f] : w[f][k];
#pragma unroll
        for (int s = 0; s < 4; ++s) sum[f][s] = math::fma(factor, value.value[s], sum[f][s]);
      }
    }
#pragma unroll
    for (int f = 0; f < F; ++f) {
      Elements<T, N> total;
      add_parts<Parts>(part, sum[f], total.value);
      const int j = first + f * stride;
      if (j >= out) continue;
      if constexpr (!Transposed) {
#pragma unroll
        for (int s = 0; s < N; ++s) total.value[s] += w[f][in];
      }
      if (add) {
        const Elements<T, N> there = elements_at<N>(to(j) + r);
#pragma unroll
        for (int s = 0; s < N; ++s) total.value[s] += there.value[s];
      }
      finish(j, r, total.value);
      set_elements(to(j) + r, total);
    }
    if (!again) continue;
#pragma unroll 1
    for (int f = 0, j = first; f < F && j < out; ++f, j += stride) {
      Elements<T, N> value = elements_at<N>(to(j) + r);
      costly(j, r, value.value);
      set_elements(to(j) + r, value);
    }
  }
}

// A feature's sum is made in the same order whatever R.
template <int R, bool Transposed, class T, class To, class Finish, class Costly>
__device__ __forceinline__ void product(int out, int in, const T* weight, int line, const T* x, bool add, const To& to,
                                        const Finish& finish, bool again, const Costly& costly) {
  constexpr int two = R / 16, four = R / 8;  // features to a thread, so that all warps have some
  auto run = [&]<int F, int Parts>() {
    product_of<R, F, Parts, Transposed>(out, in, weight, line, x, add, to, finish, again, costly);
  };
  if (out <= 8) run.template operator()<1, 4>();
  else if (out <= 32) run.template operator()<two, 2>();
  else if (out <= 64) run.template operator()<four, 2>();
  else run.template operator()<four, 1>();
}

// The values become their activations by silu or tanh. slopes: where it is not null, silu's derivatives.
template <class T, int N>
__device__ __forceinline__ void activate(int activation, T (&values)[N], T* slopes) {
  if (static_cast<Activation>(activation) == Activation::silu) {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const T p = values[e], s = math::sigmoid(p);
      values[e] = p * s;
      if (slopes != nullptr) slopes[e] = math::fma(values[e], T(1) - s, s);
    }
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) values[e] = math::tanh(values[e]);
  }
}

// The gradients of activations become those of what they were made of. kept: silu's slopes, else the activations.
template <class T, int N>
__device__ __forceinline__ void activation_gradient(int activation, const T* kept, T (&grads)[N]) {
  const bool relu = static_cast<Activation>(activation) == Activation::relu;
  const bool silu = static_cast<Activation>(activation) == Activation::silu;
  const Elements<T, N> at = elements_at<N>(kept);
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const T y = at.value[e], slope = silu ? y : T(1) - y * y;
    grads[e] = relu ? (y <= T(0) ? T(0) : grads[e]) : grads[e] * slope;
  }
}

// A linear's outputs for a piece of its rows from `row`, and their activations unless it is a network's last. slopes:
// where silu's derivatives go, or null.
template <int R, class T>
__device__ __forceinline__ void linear_forward(const FlowLinear<T>& linear, int row, const T* piece, const T* x,
                                               int activation, bool last, T* slopes, T* y) {
  const int out = linear.out - row < linear.piece ? linear.out - row : linear.piece;
  const bool relu = !last && static_cast<Activation>(activation) == Activation::relu;  // keeps NaN
  y += row * kLine<R>;
  product<R, false>(
      out, linear.in, piece, linear.line, x, false, [&](int j) { return y + j * kLine<R>; },
      [&]<int N>(int, int, T(&values)[N]) {
#pragma unroll
        for (int e = 0; e < N; ++e) values[e] = relu && values[e] < T(0) ? T(0) : values[e];
      },
      !last && !relu,
      [&]<int N>(int j, int r, T(&values)[N]) {
        activate(activation, values, slopes == nullptr ? nullptr : slopes + (row + j) * kLine<R> + r);
      });
}

}  // namespace fastflow
