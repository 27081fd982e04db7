"""The compiled and generated kernels as operators of torch: their schemas, their fake implementations, their loading.

Every backend has a namespace of its own with the same schemas (``fastflow_cpu``, ``fastflow_triton``,
``fastflow_cuda``, and ``fastflow_simt``, which tests fill with the CUDA sources compiled for the CPU). One call is one
dispatcher boundary. C++ registers its implementations under these schemas; Triton's launchers are registered here.
Nothing is loaded before :func:`load` is called.
"""

import functools
import importlib.util
import os
from pathlib import Path

import torch

SCALE_MAP_ARGS = ("int kind, float gain, float offset, float out_gain, float clamp, float eps, float hard_min, "
                  "float hard_max, float shift_gain")
SPLINE_ARGS = ("int kind, bool inverse, float bound, float min_width, float min_height, float min_derivative, "
               "float gain, float clamp, float end_derivative")
# kind and scale are indices into reference.KINDS and reference.SCALES. flags of affine_coupling: 1 interleaved layout,
# 2 shift first in the params, 4 shift_first, 8 inverse; of gaussian: 1 interleaved layout, 2 scale first in the params.
# kept: how many channels of x itself pass, the first ones, or the last ones if negative; 0 with a tensor `passive`.
# reduce: 0 sample, 1 channel, 2 none. spline's kind is an index into reference.SPLINES, its clamp 0 for none. A result
# that was not asked for is an empty tensor of shape (0,). Those of CPU_ALONE are of the CPU library alone: on a GPU,
# the layers of conv_net, activated_conv, mlp and wide_mlp are torch's, and the rest is the reference's.
SCHEMAS = (
    f"affine_coupling_fwd(Tensor x, Tensor params, Tensor? shift, Tensor? logdet, Tensor? passive, int kept, "
    f"int flags, {SCALE_MAP_ARGS}) -> (Tensor, Tensor)",
    f"affine_coupling_bwd(Tensor? grad_y, Tensor? grad_logdet, Tensor x, Tensor params, Tensor? shift, "
    f"int kept, bool need_x, bool need_params, bool need_shift, int flags, {SCALE_MAP_ARGS})"
    f" -> (Tensor, Tensor, Tensor)",
    "slogdet_fwd(Tensor weight, bool want_inverse) -> (Tensor, Tensor, Tensor)",
    "plu_weight_fwd(Tensor lower, Tensor upper, Tensor log_s, Tensor sign_s, Tensor perm) -> Tensor",
    "plu_weight_bwd(Tensor grad_weight, Tensor lower, Tensor upper, Tensor log_s, Tensor sign_s, Tensor perm)"
    " -> (Tensor, Tensor, Tensor)",
    "gaussian_fwd(Tensor params, Tensor? raw, Tensor? prior_mean, Tensor? prior_raw, Tensor? eps, Tensor? seed, "
    "int seed_value, int offset, int? n_samples, int scale, int flags, int reduce, bool want_logq, bool save_eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "gaussian_bwd(Tensor? grad_z, Tensor? grad_kl, Tensor? grad_logq, Tensor params, Tensor? raw, Tensor? prior_mean, "
    "Tensor? prior_raw, Tensor? eps, Tensor? seed, int seed_value, int offset, int? n_samples, int scale, int flags, "
    "int reduce, bool need_params, bool need_raw, bool need_prior_mean, bool need_prior_raw)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "philox4x32(Tensor counter, Tensor key) -> Tensor",
    "conv_net_fwd(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor w3, Tensor b3, float slope, bool keep)"
    " -> (Tensor, Tensor, Tensor)",
    "conv_net_bwd(Tensor grad, Tensor x, Tensor w1, Tensor w2, Tensor w3, Tensor h1, Tensor h2, float slope, "
    "bool need_x, bool need_weights) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # params: weight and bias of every layer in turn. kept: the hidden activations, csrc/cpu/mlp_kernel.h.
    "mlp_fwd(Tensor x, Tensor[] params, int activation, bool residual, bool keep) -> (Tensor, Tensor)",
    "mlp_bwd(Tensor grad, Tensor x, Tensor kept, Tensor[] params, int activation, bool residual, bool need_x, "
    "bool need_params) -> (Tensor, Tensor[])",
    # steps and constants: see csrc/mlp_flow_program.h. save: 0 nothing, 1 what the steps overwrite, 2 on a CPU the
    # activations too that are costly to compute again. saved: (features and activations, B).
    "mlp_flow_fwd(Tensor x, Tensor? context, Tensor[] params, int[] steps, float[] constants, bool inverse, int save)"
    " -> (Tensor, Tensor, Tensor)",
    "mlp_flow_bwd(Tensor? grad_z, Tensor? grad_logdet, Tensor z, Tensor saved, Tensor? context, Tensor[] params, "
    "int[] steps, float[] constants, bool inverse, bool need_x, bool need_context, bool need_params)"
    " -> (Tensor, Tensor, Tensor[])",
    f"spline_fwd(Tensor x, Tensor params, Tensor? logdet, {SPLINE_ARGS}) -> (Tensor, Tensor)",
    f"spline_bwd(Tensor? grad_y, Tensor? grad_logdet, Tensor x, Tensor params, bool need_x, bool need_params, "
    f"{SPLINE_ARGS}) -> (Tensor, Tensor)",
    # activation: 0 none, 1 relu, 2 silu. channels_last: of the result.
    "activated_conv_fwd(Tensor x, Tensor weight, Tensor? bias, int stride, int padding, bool transposed, "
    "int activation, bool channels_last) -> Tensor",
    "activated_conv_bwd(Tensor grad, Tensor x, Tensor weight, int stride, int padding, bool transposed, "
    "int activation, bool need_x, bool need_weights) -> (Tensor, Tensor, Tensor)",
    # kept: of each hidden layer its activations and, of silu, their slopes. grads: of each layer weight and bias.
    "wide_mlp_fwd(Tensor x, Tensor[] weights, Tensor[] biases, int activation, bool keep) -> (Tensor, Tensor[])",
    "wide_mlp_bwd(Tensor grad, Tensor x, Tensor[] weights, Tensor[] kept, int activation, bool need_x, "
    "bool need_params) -> (Tensor, Tensor[])",
    # x (B, *event), logits (N, *event) with N a multiple of B; results (N,) and like logits.
    "bernoulli_log_prob_fwd(Tensor x, Tensor logits) -> Tensor",
    "bernoulli_log_prob_bwd(Tensor grad, Tensor x, Tensor logits) -> Tensor",
    # The taps of a 3x3 convolution: kernels/taps.py.
    "gather_taps(Tensor x, int sign, bool channel_major, int columns) -> Tensor",
    "sum_taps(Tensor z, Tensor? bias, int batch, int channels, int height, int width, int sign, bool channel_major)"
    " -> Tensor",
    "rectified_sum(Tensor grad, Tensor h) -> (Tensor, Tensor)",
    # levels: see csrc/cpu/top_down.cpp. Results: next h, latents of all levels in one vector, kl, log q and log p
    # (L, B), and with `save` what backward needs.
    "top_down_fwd(Tensor h, Tensor[] features, Tensor[] eps, Tensor? seed, int seed_value, int offset, "
    "Tensor[] params, int[] levels, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "top_down_bwd(Tensor? grad_next, Tensor? grad_z, Tensor? grad_kl, Tensor? grad_log_q, Tensor? grad_log_p, "
    "Tensor h, Tensor[] features, Tensor saved, Tensor[] params, int[] levels, bool need_h, bool need_features, "
    "bool need_params) -> (Tensor, Tensor[], Tensor[])",
)
NAMES = tuple(schema.partition("(")[0] for schema in SCHEMAS)
CPU_ALONE = ("conv_net_fwd", "conv_net_bwd", "activated_conv_fwd", "activated_conv_bwd", "mlp_fwd", "mlp_bwd",
             "wide_mlp_fwd", "wide_mlp_bwd", "bernoulli_log_prob_fwd", "bernoulli_log_prob_bwd", "top_down_fwd",
             "top_down_bwd")
WITHOUT_TRITON = ("mlp_flow_fwd", "mlp_flow_bwd")
TRITON_ALONE = ("gather_taps", "sum_taps", "rectified_sum")  # elsewhere reference/taps.py
LIBRARIES = {"cpu": "_C_cpu.so", "cuda": "_C_cuda.so"}
observers = ()  # functions of (name, arguments), told of every eager call before it runs; see fastflow.launches
_LAUNCHABLE = frozenset((torch.Tensor, torch.nn.Parameter, type(None), int, float, bool))
_libraries = {}  # keeps torch.library.Library objects, and with them the registrations, alive


def constant_under_compile(function):
    """Dynamo runs ``function`` at trace time instead of tracing it (torch.compiler.assume_constant_result, whose use
    here would import Dynamo)."""
    function._dynamo_marked_constant = True
    return function


def library_path(backend):
    """Path of the compiled library of "cpu" or "cuda", or None where it was not built."""
    path = Path(__file__).parent / LIBRARIES[backend]
    return path if path.exists() else None


@functools.cache
def define(namespace):
    """Define every schema and its fake implementation under ``namespace`` (once); returns the torch.ops namespace."""
    library = torch.library.Library(namespace, "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    for name in NAMES:
        torch.library.register_fake(f"{namespace}::{name}", globals()[f"_fake_{name}"], lib=library)
    _libraries[namespace] = library
    return getattr(torch.ops, namespace)


@functools.cache
def load(backend):
    """The operators of ``backend`` as {name: OpOverload}.

    Raises:
        RuntimeError: the compiled library or Triton is not there, or it does not load; the message says why.
    """
    ops = define(f"fastflow_{backend}")
    if backend in LIBRARIES:
        path = library_path(backend)
        if path is None:
            raise RuntimeError(f"{LIBRARIES[backend]} was not built (see `fastflow doctor`)")
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            raise RuntimeError(f"{path.name} does not load: {error}") from error
    elif backend == "triton":
        for name, launcher in launchers().items():
            _libraries["fastflow_triton"].impl(name, launcher, "CUDA")
            if triton_interprets():
                _libraries["fastflow_triton"].impl(name, launcher, "CPU")
    return {name: getattr(ops, name).default for name in NAMES}


def triton_interprets():
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def triton_modules():
    """The modules of the Triton kernels, each with its launchers and LAUNCHES.

    Raises:
        RuntimeError: Triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("Triton is not installed")
    from fastflow.kernels import affine_coupling, gaussian, plu_weight, slogdet, spline, taps

    return affine_coupling, gaussian, plu_weight, slogdet, spline, taps


@functools.cache
def launchers():
    """Triton's launchers as {name: function}, the same arguments and results as the operators."""
    return {name: getattr(m, name) for m in triton_modules() for name in NAMES if hasattr(m, name)}


def kernel(backend, name):
    """What runs op ``name`` on ``backend``: for Triton in eager mode its launcher, where the operands have memory of
    their own, else the operator."""
    if torch.compiler.is_compiling():
        _load_while_tracing(backend)
        return getattr(getattr(torch.ops, f"fastflow_{backend}"), name).default
    found = _launcher_or_operator(name) if backend == "triton" else load(backend)[name]
    return _observed(name, found) if observers else found


@functools.cache
def _launcher_or_operator(name):
    """Triton's launcher, past the dispatcher and its cost; but the operator where a dispatch mode is active or an
    argument is of another type than those that a launch takes, as a FakeTensor, which names a GPU and has no memory
    there."""
    launcher, operator = launchers()[name], load("triton")[name]

    def call(*args):
        plain = _LAUNCHABLE.issuperset(map(type, args)) and not torch._C._len_torch_dispatch_stack()
        return (launcher if plain else operator)(*args)
    return call


def _observed(name, found):
    def call(*args):
        for observe in observers:
            observe(name, args)
        return found(*args)
    return call


@constant_under_compile
def _load_while_tracing(backend):
    load(backend)


# Fake implementations: shapes, dtypes and strides of the results, from metadata alone.

def _compute_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _widen(like, *operands):
    dtypes = [t.dtype for t in (like, *operands) if t is not None]
    return torch.float32 if like.dtype != torch.float64 and torch.float32 in dtypes else like.dtype


def _nothing(like):
    return like.new_empty((0,))


def _empty_in_format_of(like, shape, dtype):
    memory_format = torch._prims_common.suggest_memory_format(like)
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=memory_format)


def _fake_affine_coupling_fwd(x, params, shift, logdet, passive, kept, flags, kind, gain, offset, out_gain, clamp,
                              eps, hard_min, hard_max, shift_gain):
    channels = x.shape[1] + (0 if passive is None else passive.shape[1])
    y = _empty_in_format_of(x, (x.shape[0], channels, *x.shape[2:]), _widen(x, params, shift, passive))
    return y, x.new_empty((x.shape[0],), dtype=_compute_dtype(x.dtype))


def _fake_affine_coupling_bwd(grad_y, grad_logdet, x, params, shift, kept, need_x, need_params, need_shift, flags,
                              kind, gain, offset, out_gain, clamp, eps, hard_min, hard_max, shift_gain):
    return tuple(_empty_in_format_of(t, t.shape, t.dtype) if need else _nothing(x)
                 for t, need in ((x, need_x), (params, need_params), (shift, need_shift)))


def _fake_slogdet_fwd(weight, want_inverse):
    dtype = _compute_dtype(weight.dtype)
    sign = weight.new_empty(weight.shape[:-2], dtype=dtype)
    return sign, torch.empty_like(sign), weight.new_empty(weight.shape if want_inverse else (0,), dtype=dtype)


def _fake_plu_weight_fwd(lower, upper, log_s, sign_s, perm):
    return lower.new_empty(lower.shape)


def _fake_plu_weight_bwd(grad_weight, lower, upper, log_s, sign_s, perm):
    return lower.new_empty(lower.shape), upper.new_empty(upper.shape), log_s.new_empty(log_s.shape)


def _fake_gaussian_fwd(params, raw, prior_mean, prior_raw, eps, seed, seed_value, offset, n_samples, scale, flags,
                       reduce, want_logq, save_eps):
    shape = list(params.shape)
    if raw is None:
        shape[1] //= 2
    lead = [] if n_samples is None else [n_samples]
    dtype = _compute_dtype(params.dtype)
    z = params.new_empty(lead + shape, dtype=_widen(params, raw, prior_mean, prior_raw, eps))
    kl = params.new_empty((shape[:1], shape[:2], shape)[reduce], dtype=dtype)
    logq = params.new_empty(lead + shape[:1] if want_logq else (0,), dtype=dtype)
    drawn = params.new_empty(lead + shape if save_eps and eps is None else (0,), dtype=dtype)
    return z, kl, logq, drawn


def _fake_gaussian_bwd(grad_z, grad_kl, grad_logq, params, raw, prior_mean, prior_raw, eps, seed, seed_value, offset,
                       n_samples, scale, flags, reduce, need_params, need_raw, need_prior_mean, need_prior_raw):
    return tuple(_empty_in_format_of(t, t.shape, t.dtype) if need else _nothing(params)
                 for t, need in ((params, need_params), (raw, need_raw), (prior_mean, need_prior_mean),
                                 (prior_raw, need_prior_raw)))


def _fake_philox4x32(counter, key):
    return counter.new_empty(counter.shape)


def _fake_conv_net_fwd(x, w1, b1, w2, b2, w3, b3, slope, keep):
    batch, _, *spatial = x.shape
    maps = [x.new_empty((x.shape[0] * x.shape[2] * x.shape[3], w1.shape[0])) if keep else _nothing(x) for _ in "12"]
    return _empty_in_format_of(x, (batch, w3.shape[0], *spatial), x.dtype), *maps


def _fake_conv_net_bwd(grad, x, w1, w2, w3, h1, h2, slope, need_x, need_weights):
    def like(t, need):
        return _empty_in_format_of(t, t.shape, t.dtype) if need else _nothing(x)

    def bias(t):
        return t.new_empty(t.shape[:1]) if need_weights else _nothing(x)
    return like(x, need_x), *(f(w) for w in (w1, w2, w3) for f in (lambda w: like(w, need_weights), bias))


def _fake_gather_taps(x, sign, channel_major, columns):
    return x.new_empty((x.shape[0] * x.shape[2] * x.shape[3], columns))


def _fake_sum_taps(z, bias, batch, channels, height, width, sign, channel_major):
    return z.new_empty((batch, height, width, channels)).permute(0, 3, 1, 2)


def _fake_rectified_sum(grad, h):
    return grad.new_empty(grad.shape), grad.new_empty(grad.shape[1:], dtype=_compute_dtype(grad.dtype))


def _fake_mlp_fwd(x, params, activation, residual, keep):
    hidden = params[2::2]  # each weight's columns are kept in rows of whole lines, under silu with their slopes
    sizes = [(w.shape[1] + 15) // 16 * 16 * (2 if activation == 1 and not (residual and w is hidden[-1]) else 1)
             for w in hidden]
    return x.new_empty((x.shape[0], params[-2].shape[0])), x.new_empty((x.shape[0], sum(sizes)) if keep else (0,))


def _fake_mlp_bwd(grad, x, kept, params, activation, residual, need_x, need_params):
    return (x.new_empty(x.shape) if need_x else _nothing(x),
            [p.new_empty(p.shape) for p in params] if need_params else [])


def _fake_mlp_flow_fwd(x, context, params, steps, constants, inverse, save):
    batch, features = x.shape
    rows = sum(_overwritten(features, *steps[at:at + 3]) for at in range(0, len(steps), 6))
    if save == 2 and x.device.type == "cpu":
        rows += _kept(params, steps)
    return x.new_empty(x.shape), x.new_empty((batch,)), x.new_empty((rows, batch) if save else (0,))


def _overwritten(features, coupling, linears, flip):
    """How many features a step overwrites: all, or the second part, or with flip the first; a permutation none."""
    if coupling == 2:
        return 0
    return features if not coupling else features // 2 if flip else features - features // 2


def _kept(params, steps):
    """How many activations forward keeps: csrc/mlp_flow_program.h, add_linears."""
    rows = at = 0
    for coupling, linears, _, activation, _, _ in zip(*[iter(steps)] * 6, strict=True):
        hidden = params[at:at + 2 * linears - 2:2] if coupling == 1 and activation != 1 else ()
        rows += sum(w.shape[0] for w in hidden if w.shape[1] >= 32 and w.shape[0] % 16 == 0)
        at += 1 if coupling == 2 else 2 * (linears if coupling else 1)
    return rows


def _fake_mlp_flow_bwd(grad_z, grad_logdet, z, saved, context, params, steps, constants, inverse, need_x, need_context,
                       need_params):
    grad_context = need_context and context is not None
    return (z.new_empty(z.shape) if need_x else _nothing(z), z.new_empty(context.shape if grad_context else (0,)),
            [p.new_empty(p.shape) if p.is_floating_point() else _nothing(z) for p in params] if need_params else [])


def _fake_spline_fwd(x, params, logdet, kind, inverse, *constants):
    y = _empty_in_format_of(x, x.shape, _widen(x, params))
    return y, x.new_empty((x.shape[0],), dtype=_compute_dtype(x.dtype))


def _fake_spline_bwd(grad_y, grad_logdet, x, params, need_x, need_params, kind, inverse, *constants):
    return tuple(_empty_in_format_of(t, t.shape, t.dtype) if need else _nothing(x)
                 for t, need in ((x, need_x), (params, need_params)))


def _fake_activated_conv_fwd(x, weight, bias, stride, padding, transposed, activation, channels_last):
    sizes = [(size - 1) * stride - 2 * padding + taps if transposed else (size + 2 * padding - taps) // stride + 1
             for size, taps in zip(x.shape[2:], weight.shape[2:], strict=True)]
    shape = (x.shape[0], weight.shape[1 if transposed else 0], *sizes)
    if channels_last:
        return x.new_empty((shape[0], *sizes, shape[1])).permute(0, 3, 1, 2)
    return x.new_empty(shape)


def _fake_activated_conv_bwd(grad, x, weight, stride, padding, transposed, activation, need_x, need_weights):
    return (_empty_in_format_of(x, x.shape, x.dtype) if need_x else _nothing(x),
            _empty_in_format_of(weight, weight.shape, weight.dtype) if need_weights else _nothing(x),
            x.new_empty((grad.shape[1],)) if need_weights else _nothing(x))


def _fake_wide_mlp_fwd(x, weights, biases, activation, keep):
    hidden = [x.new_empty((x.shape[0], w.shape[0])) for w in weights[:-1] for _ in range(activation)]
    return x.new_empty((x.shape[0], weights[-1].shape[0])), hidden if keep else []


def _fake_wide_mlp_bwd(grad, x, weights, kept, activation, need_x, need_params):
    grads = [x.new_empty(shape) for w in weights for shape in (w.shape, w.shape[:1])]
    return x.new_empty(x.shape) if need_x else _nothing(x), grads if need_params else []


def _fake_bernoulli_log_prob_fwd(x, logits):
    return logits.new_empty((logits.shape[0],), dtype=_compute_dtype(logits.dtype))


def _fake_bernoulli_log_prob_bwd(grad, x, logits):
    return _empty_in_format_of(logits, logits.shape, logits.dtype)


def _fake_top_down_fwd(h, features, eps, seed, seed_value, offset, params, levels, save):
    batch, out, latents, rows = h.shape[0], h.shape[1], 0, 0
    outputs = iter([bias.shape[0] for bias in params[1::2]])
    for at, d in zip(range(0, len(levels), 11), features, strict=True):
        prior, posterior, merge = ([next(outputs) for _ in range(levels[at + k])] for k in (2, 5, 8))
        width = prior[-1] // 2
        latents += width
        # csrc/cpu/top_down.cpp, Work::add: what the level's block holds.
        rows += sum(map(_in_lines, (out + d.shape[1] + 16, out + width, width)))
        rows += 2 * sum(map(_in_lines, (*prior, *posterior, *merge[:-1])))
        out = merge[-1]
    terms = [h.new_empty((len(features), batch)) for _ in range(3)]
    saved = h.new_empty(((batch + 63) // 64 * 64 * (rows + _in_lines(out)) if save else 0,))
    return h.new_empty((batch, out)), h.new_empty((batch * latents,)), *terms, saved


def _in_lines(rows):
    return (rows + 15) // 16 * 16


def _fake_top_down_bwd(grad_next, grad_z, grad_kl, grad_log_q, grad_log_p, h, features, saved, params, levels, need_h,
                       need_features, need_params):
    return (h.new_empty(h.shape) if need_h else _nothing(h),
            [d.new_empty(d.shape) for d in features] if need_features else [],
            [p.new_empty(p.shape) for p in params] if need_params else [])
