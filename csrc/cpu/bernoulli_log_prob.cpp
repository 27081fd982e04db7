// Host side of bernoulli_log_prob on the CPU: operands, results, threads.
#include "bernoulli_log_prob_kernel.h"

#include "traversal.h"

#include <algorithm>

namespace fastflow {

namespace {

constexpr int64_t grain = 4096;  // elements that are worth a thread
constexpr int64_t streamed_bytes = int64_t(8) << 20;  // of a gradient that no cache is to hold

// x (B, *event) as an operand over the rows of logits (K*B, *event), in the order in which logits are traversed.
class Repeated {
 public:
  Repeated(const Tensor& x, const Tensor& logits) : x_(x) {
    const bool channels_last = suggests_channels_last(sizes_of(logits), strides_of(logits));
    const int64_t repeats = logits.size(0) / x.size(0);
    if (!describe(repeats, channels_last)) {
      x_ = torch::stable::contiguous(x);
      describe(repeats, channels_last);
    }
  }

  const Operand& operand() const { return operand_; }

 private:
  // False if the strides leave more dimensions than a kernel takes.
  bool describe(int64_t repeats, bool channels_last) {
    const Dims sizes = sizes_of(x_), strides = strides_of(x_);
    operand_ = operand_at(x_, 0);
    if (!append_dimension(operand_, repeats, 0)) return false;
    for (size_t i = 0; i < sizes.size(); ++i) {
      const size_t d = !channels_last || i == 0 ? i : i == sizes.size() - 1 ? 1 : i + 1;
      if (!append_dimension(operand_, sizes[d], strides[d])) return false;
    }
    return true;
  }

  Tensor x_;
  Operand operand_;
};

BernoulliShape shape_of(const Tensor& logits) {
  BernoulliShape shape{};
  shape.rows = logits.size(0);
  shape.row = shape.rows > 0 ? logits.numel() / shape.rows : 0;
  shape.is_double = logits.scalar_type() == ScalarType::Double;
  return shape;
}

int64_t tiles_per_thread(const BernoulliShape& shape) {
  const int64_t work = shape.row < shape.chunk ? shape.group() * shape.row : shape.chunk;
  return std::max<int64_t>(1, grain / work);
}

template <class T>
void add_up(const std::vector<double>& partials, const BernoulliShape& shape, T* out) {
  const int64_t chunks = shape.chunks();
  for (int64_t r = 0; r < shape.rows; ++r) {
    double total = 0.;
    for (int64_t c = 0; c < chunks; ++c) total += partials[static_cast<size_t>(r * chunks + c)];
    out[r] = static_cast<T>(total);
  }
}

}  // namespace

Tensor bernoulli_log_prob_fwd(const Tensor& x, const Tensor& logits) {
  Tensor result = empty({logits.size(0)}, compute_type(logits.scalar_type()), logits);
  BernoulliForward job{};
  job.shape = shape_of(logits);
  std::vector<double> partials(static_cast<size_t>(job.shape.rows * job.shape.chunks()));
  if (logits.numel() > 0) {
    Operands operands(logits);
    const Repeated repeated(x, logits);
    job.x = repeated.operand();
    job.logits = operands.of(logits);
    job.partials = partials.data();
    parallel_for(0, job.shape.tiles(), tiles_per_thread(job.shape),
                 [&](int64_t begin, int64_t end) { FASTFLOW_ISA_CALL(bernoulli_forward, job, begin, end); });
  }
  if (job.shape.is_double)
    add_up(partials, job.shape, static_cast<double*>(result.mutable_data_ptr()));
  else
    add_up(partials, job.shape, static_cast<float*>(result.mutable_data_ptr()));
  return result;
}

Tensor bernoulli_log_prob_bwd(const Tensor& grad, const Tensor& x, const Tensor& logits) {
  Tensor result = result_like(sizes_of(logits), logits, logits.scalar_type());
  if (logits.numel() == 0) return result;
  BernoulliBackward job{};
  job.shape = shape_of(logits);
  Operands operands(logits);
  const Repeated repeated(x, logits);
  job.x = repeated.operand();
  job.logits = operands.of(logits);
  job.grad = operands.of(grad);
  job.grad_logits = operands.of(result);
  job.streamed = bytes_of(result) >= streamed_bytes;
  parallel_for(0, job.shape.tiles(), tiles_per_thread(job.shape),
               [&](int64_t begin, int64_t end) { FASTFLOW_ISA_CALL(bernoulli_backward, job, begin, end); });
  return result;
}

}  // namespace fastflow
