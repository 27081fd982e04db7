// The top-down pass of a hierarchy of latents, forward and backward. A tile of samples goes through one level after the
// other; what backward needs is written where it is computed.
#include "top_down_kernel.h"

#include "gaussian_noise.h"
#include "mlp_flow_net.h"
#include "top_down_gaussian.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

static_assert(samples == tile);

template <class T>
struct TopDown {
  const TopDownJob& job;
  T* own;  // the blocks, where none are saved
  float* drawn;
  // Backward: gradients of the state that comes out, of a level's state and features, of its state and latents.
  T *grad_next, *grad_seen, *grad_joined, *grad_prior, *grad_posterior, *grad_hidden[2], *transposed_input;
  T *rows_of_terms, *sums_of_linear;
  LaneSums<T> sums;
  T* blocks = nullptr;
  int64_t first = 0, count = 0;  // samples of the tile

  TopDown(const TopDownJob& job, Arena& arena, bool backward) : job(job) {
    const int64_t wide = padded(job.widest), seen = padded(job.seen);
    own = arena.take<T>(job.saved == nullptr ? job.rows * tile : 0);
    drawn = arena.take<float>(backward ? 0 : job.latents * tile + noise_size - gaussian::chunk);
    if (!backward) return;
    grad_next = arena.take<T>(tile * seen);
    grad_seen = arena.take<T>(tile * seen);
    grad_joined = arena.take<T>(tile * seen);
    transposed_input = arena.take<T>(tile * seen);
    grad_prior = arena.take<T>(tile * wide);
    grad_posterior = arena.take<T>(tile * wide);
    for (T*& buffer : grad_hidden) buffer = arena.take<T>(tile * wide);
    rows_of_terms = arena.take<T>(3 * tile);
    sums_of_linear = arena.take<T>(job.at_once() ? job.largest : 0);
    sums.bias = arena.take<T>(wide * Simd<T>::lanes);
    sums.weight = arena.take<T>(job.lane_sums * Simd<T>::lanes);
  }

  void begin_tile(int64_t index) {
    first = index * tile;
    count = at_most(tile, job.batch - first);
    blocks = job.saved == nullptr ? own : static_cast<T*>(job.saved) + index * job.rows * tile;
  }

  int64_t lanes_used() const { return round_up(count, Simd<T>::lanes); }
  T* block_of(const TopDownLevel& level) const { return blocks + level.block * tile; }

  // Sums over lanes must not see what lies past the last sample: zero times infinity.
  void clear_tail(int64_t features, T* values) const {
    const int64_t from = count, to = lanes_used();
    if (from == to) return;
    for (int64_t f = 0; f < features; ++f)
      for (int64_t i = from; i < to; ++i) values[f * tile + i] = T(0);
  }

  // The tile of a matrix (batch, features), zero past the last sample.
  void load(const FlowParameter& from, int64_t features, T* to) const {
    const T* data = static_cast<const T*>(from.data) + first * from.row;
    for (int64_t f = 0; f < features; ++f)
      for (int64_t i = 0; i < count; ++i) to[f * tile + i] = data[i * from.row + f * from.column];
    clear_tail(features, to);
  }

  void store(const T* from, int64_t features, void* matrix) const {
    T* to = static_cast<T*>(matrix) + first * features;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t f = 0; f < features; ++f) to[i * features + f] = from[f * tile + i];
  }

  static void copy(int64_t features, const T* from, T* to) {
    for (int64_t i = 0; i < features * tile; ++i) to[i] = from[i];
  }

  static void add(int64_t features, const T* from, T* to) {
    for (int64_t i = 0; i < features * tile; ++i) to[i] += from[i];
  }

  // The network on x; its last layer writes to `out` and nothing else of it is kept there.
  void network_forward(const LevelNetwork& net, T* block, const T* x, T* out) const {
    const T* below = x;
    T *values = block + net.values * tile, *slopes = block + net.slopes * tile;
    for (int64_t l = 0; l < net.count; ++l) {
      const FlowLinear& linear = net.linears[l];
      const bool last = l == net.count - 1;
      T* const y = last ? out : values;
      linear_forward<T>(linear, last, net.activation, lanes_used(), below, y, job.saved == nullptr ? nullptr : slopes);
      clear_tail(linear.out, y);
      below = y;
      values += padded(linear.out) * tile;
      slopes += padded(linear.out) * tile;
    }
    if (net.residual) add(net.linears[net.count - 1].out, x, out);
  }

  static T* outputs_of(const LevelNetwork& net, T* block) {
    T* at = block + net.values * tile;
    for (int64_t l = 0; l < net.count - 1; ++l) at += padded(net.linears[l].out) * tile;
    return at;
  }

  void noise(const TopDownLevel& level, T* to) const {
    if (level.eps.data != nullptr) return load(level.eps, level.latents, to);
    const float* eps = draw(drawn, first * level.latents, count * level.latents, level.offset, job.seed);
    for (int64_t j = 0; j < level.latents; ++j)
      for (int64_t i = 0; i < count; ++i) to[j * tile + i] = static_cast<T>(eps[i * level.latents + j]);
    clear_tail(level.latents, to);
  }

  LatentRows<T> latent(const TopDownLevel& level, T* block, int64_t j) const {
    const T *prior = outputs_of(level.prior, block) + j * tile, *posterior = outputs_of(level.posterior, block) + j * tile;
    const int64_t raw = level.latents * tile;
    return {prior, prior + raw, posterior, posterior + raw, block + (level.noise + j) * tile};
  }

  static const T* seen_by_posterior(const TopDownLevel& level, const T* block) {
    return block + (level.mode == LevelMode::ladder ? level.state * tile : 0);
  }

  void level_forward(int64_t index) const {
    const TopDownLevel& level = job.levels[index];
    T* const block = block_of(level);
    T* const joined = block + level.joined * tile;
    T* const z = joined + level.state * tile;
    load(level.d, level.features, block + level.state * tile);
    noise(level, block + level.noise * tile);
    network_forward(level.prior, block, block, outputs_of(level.prior, block));
    network_forward(level.posterior, block, seen_by_posterior(level, block), outputs_of(level.posterior, block));
    copy(level.state, block, joined);
    double terms[3][samples] = {};
    const LatentFunctions<T> functions = latent_functions<T>(level.scale, level.mode);
    for (int64_t j = 0; j < level.latents; ++j)
      functions.sample(lanes_used(), latent(level, block, j), z + j * tile, {terms[0], terms[1], terms[2]});
    clear_tail(level.latents, z);
    store(z, level.latents, static_cast<T*>(job.z) + level.z);
    void* const to[] = {job.kl, job.log_q, job.log_p};
    for (int k = 0; k < 3; ++k)
      for (int64_t i = 0; i < count; ++i)
        static_cast<T*>(to[k])[index * job.batch + first + i] = static_cast<T>(terms[k][i]);
    T* const next = index + 1 < job.count ? block_of(job.levels[index + 1]) : blocks + job.last * tile;
    network_forward(level.merge, block, joined, next);
  }

  void forward(int64_t index) {
    begin_tile(index);
    load(job.h, job.levels[0].state, block_of(job.levels[0]));
    for (int64_t l = 0; l < job.count; ++l) level_forward(l);
    store(blocks + job.last * tile, job.out, job.next);
  }

  void add_gradients(const FlowLinear& linear, const T* x, const T* grad, T* partial) const {
    sums.begin(linear);
    sums.add(linear, lanes_used(), x, grad);
    sums.finish(linear, partial);
    if (!is_thin(linear)) weight_gradient(linear, count, x, grad, transposed_input, partial);
  }

  void write_gradients(const FlowLinear& linear, const T* x, const T* grad) const {
    void* const* to = job.gradients + 2 * (&linear - job.linears);
    T *weight = static_cast<T*>(to[0]), *bias = static_cast<T*>(to[1]);
    FlowLinear alone = linear;
    alone.grad_bias = 0;
    alone.grad_weight = padded(linear.out);
    const int64_t used = alone.grad_weight + (is_thin(linear) ? linear.out * linear.grad_ld : 0);
    for (int64_t i = 0; i < used; ++i) sums_of_linear[i] = T(0);
    sums.begin(alone);
    sums.add(alone, lanes_used(), x, grad);
    sums.finish(alone, sums_of_linear);
    for (int64_t i = 0; i < linear.out; ++i) bias[i] = sums_of_linear[i];
    if (!is_thin(linear)) {
      weight_product(linear, count, x, grad, transposed_input, [&](int64_t i, int64_t j, Vec<T> value) {
        T* const at = weight + i * linear.in + j;
        const int64_t left = linear.in - j;
        if (left >= Simd<T>::lanes) return ::fastflow::FASTFLOW_ISA::store(at, value);
        for (int64_t k = 0; k < left; ++k) at[k] = value[k];
      });
      return;
    }
    const T* from = sums_of_linear + alone.grad_weight;
    for (int64_t i = 0; i < linear.out; ++i, from += linear.grad_ld, weight += linear.in)
      for (int64_t j = 0; j < linear.in; ++j) weight[j] = from[j];
  }

  // Adds to `to` the gradient of the network's input x from that of its outputs, and to `partial` its parameters'.
  void network_backward(const LevelNetwork& net, T* block, const T* x, const T* grad, T* to, T* partial) const {
    const int64_t n = lanes_used(), last = net.count - 1;
    const T *values = outputs_of(net, block), *slopes = values + (net.slopes - net.values) * tile;
    if (net.residual) add(net.linears[last].out, grad, to);
    for (int64_t l = last; l >= 0; --l) {
      const FlowLinear& linear = net.linears[l];
      const int64_t below_rows = l == 0 ? 0 : padded(linear.in) * tile;
      values -= below_rows;
      slopes -= below_rows;
      const T* const below = l == 0 ? x : values;
      if (partial != nullptr) add_gradients(linear, below, grad, partial);
      if (job.at_once()) write_gradients(linear, below, grad);
      if (l == 0) {
        input_backward(linear, 0, linear.in, n, grad, to);
        break;
      }
      T* const next = grad_hidden[l % 2];
      linear_backward<T>(linear, net.activation, n, grad, below, slopes, next);
      clear_tail(linear.in, next);
      grad = next;
    }
  }

  // The gradient of a level's term, one number to a sample, or null.
  const T* term(const FlowParameter& grad, int64_t level, T* to) const {
    if (grad.data == nullptr) return nullptr;
    const T* from = static_cast<const T*>(grad.data) + level * grad.row + first * grad.column;
    for (int64_t i = 0; i < count; ++i) to[i] = from[i * grad.column];
    clear_tail(1, to);
    return to;
  }

  // From the gradient of the state below the level, in grad_next, to that of its own state, there too.
  void level_backward(int64_t index, T* partial) const {
    const TopDownLevel& level = job.levels[index];
    T* const block = block_of(level);
    const T* const joined = block + level.joined * tile;
    const int64_t together = level.state + level.latents, raw = level.latents * tile;
    T* const grad_z = grad_joined + level.state * tile;
    for (int64_t i = 0; i < level.state * tile; ++i) grad_joined[i] = T(0);
    if (job.grad_z != nullptr)
      load({static_cast<const T*>(job.grad_z) + level.z, level.latents, 1}, level.latents, grad_z);
    else
      for (int64_t i = 0; i < level.latents * tile; ++i) grad_z[i] = T(0);
    network_backward(level.merge, block, joined, grad_next, grad_joined, partial);
    clear_tail(together, grad_joined);

    const LatentFunctions<T> functions = latent_functions<T>(level.scale, level.mode);
    const T* kl = term(job.grad_kl, index, rows_of_terms);
    const T* log_q = term(job.grad_log_q, index, rows_of_terms + tile);
    const T* log_p = term(job.grad_log_p, index, rows_of_terms + 2 * tile);
    for (int64_t j = 0; j < level.latents; ++j) {
      const int64_t at = j * tile;
      functions.gradient(lanes_used(), latent(level, block, j), joined + level.state * tile + at,
                         {grad_z + at, kl, log_q, log_p},
                         {grad_prior + at, grad_prior + raw + at, grad_posterior + at, grad_posterior + raw + at});
    }
    clear_tail(2 * level.latents, grad_prior);
    clear_tail(2 * level.latents, grad_posterior);

    copy(level.state, grad_joined, grad_seen);
    for (int64_t i = 0; i < level.features * tile; ++i) grad_seen[level.state * tile + i] = T(0);
    network_backward(level.posterior, block, seen_by_posterior(level, block), grad_posterior,
                     grad_seen + (level.mode == LevelMode::ladder ? level.state * tile : 0), partial);
    network_backward(level.prior, block, block, grad_prior, grad_seen, partial);
    clear_tail(level.state, grad_seen);
    if (level.grad_d != nullptr) store(grad_seen + level.state * tile, level.features, level.grad_d);
    copy(level.state, grad_seen, grad_next);
  }

  void backward(int64_t index, T* partial) {
    begin_tile(index);
    if (job.grad_next.data != nullptr)
      load(job.grad_next, job.out, grad_next);
    else
      for (int64_t i = 0; i < job.out * tile; ++i) grad_next[i] = T(0);
    for (int64_t l = job.count; l-- > 0;) level_backward(l, partial);
    if (job.grad_h != nullptr) store(grad_next, job.levels[0].state, job.grad_h);
  }
};

template <class T>
void run_forward(const TopDownJob& job, void* scratch, int64_t begin, int64_t end) {
  Arena arena{static_cast<char*>(scratch)};
  TopDown<T> pass(job, arena, false);
  for (int64_t index = begin; index < end; ++index) pass.forward(index);
}

template <class T>
void run_backward(const TopDownJob& job, void* scratch, int64_t begin, int64_t end) {
  Arena arena{static_cast<char*>(scratch)};
  TopDown<T> pass(job, arena, true);
  for (int64_t group = begin; group < end; ++group) {
    T* const partial = job.partial == nullptr ? nullptr : static_cast<T*>(job.partial) + group * job.partials;
    for (int64_t i = 0; partial != nullptr && i < job.partials; ++i) partial[i] = T(0);
    const int64_t from = group * job.tiles() / job.groups, to = (group + 1) * job.tiles() / job.groups;
    for (int64_t index = from; index < to; ++index) pass.backward(index, partial);
  }
}

template <class T>
int64_t scratch_bytes(const TopDownJob& job, bool backward) {
  Arena arena{nullptr};
  TopDown<T>(job, arena, backward);
  return arena.used;
}

}  // namespace

int64_t top_down_scratch(const TopDownJob& job, bool backward) {
  return job.is_double ? scratch_bytes<double>(job, backward) : scratch_bytes<float>(job, backward);
}

void top_down_forward(const TopDownJob& job, void* scratch, int64_t begin, int64_t end) {
  job.is_double ? run_forward<double>(job, scratch, begin, end) : run_forward<float>(job, scratch, begin, end);
}

void top_down_backward(const TopDownJob& job, void* scratch, int64_t begin, int64_t end) {
  job.is_double ? run_backward<double>(job, scratch, begin, end) : run_backward<float>(job, scratch, begin, end);
}

}  // namespace fastflow::FASTFLOW_ISA
