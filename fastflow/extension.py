"""The compiled and generated kernels as operators of torch: their schemas and their loading.

Every backend has a namespace of its own with the same schemas (``fastflow_cpu``, ``fastflow_triton``,
``fastflow_cuda``, and ``fastflow_simt``, which tests fill with the CUDA sources compiled for the CPU). One call is one
dispatcher boundary. C++ registers its implementations under these schemas; Triton's launchers are registered here.
Nothing is loaded before :func:`load` is called.
"""

import ctypes
import functools
import importlib.util
import os
import threading
from pathlib import Path

import torch

from fastflow import fakes

SCALE_MAP_ARGS = ("int kind, float gain, float offset, float out_gain, float clamp, float eps, float hard_min, "
                  "float hard_max, float shift_gain")
SPLINE_ARGS = ("int kind, bool inverse, float bound, float min_width, float min_height, float min_derivative, "
               "float gain, float clamp, float end_derivative")
# kind and scale are indices into reference.KINDS and reference.SCALES. flags of affine_coupling: 1 interleaved layout,
# 2 shift first in the params, 4 shift_first, 8 inverse; of gaussian: 1 interleaved layout, 2 scale first in the params.
# kept: how many channels of x itself pass, the first ones, or the last ones if negative; 0 with a tensor `passive`.
# reduce: 0 sample, 1 channel, 2 none. spline's kind is an index into reference.SPLINES, its clamp 0 for none. A result
# that was not asked for is an empty tensor of shape (0,). Those of CPU_ALONE are of the CPU library alone: on a GPU,
# the layers of activated_conv, mlp and wide_mlp are torch's, and the rest is the reference's.
# Of the numbers that vary from call to call torch.compile makes symbols, of others a graph for each. Tried with torch
# 2.13; whether kernels behind the stable ABI of torch 2.10 take them is not known.
NUMBER = "SymInt" if torch.__version__ >= "2.13" else "int"
SCHEMAS = (
    f"affine_coupling_fwd(Tensor x, Tensor params, Tensor? shift, Tensor? logdet, Tensor? passive, {NUMBER} kept, "
    f"int flags, {SCALE_MAP_ARGS}) -> (Tensor, Tensor)",
    f"affine_coupling_bwd(Tensor? grad_y, Tensor? grad_logdet, Tensor x, Tensor params, Tensor? shift, "
    f"{NUMBER} kept, bool need_x, bool need_params, bool need_shift, int flags, {SCALE_MAP_ARGS})"
    f" -> (Tensor, Tensor, Tensor)",
    "slogdet_fwd(Tensor weight, bool want_inverse) -> (Tensor, Tensor, Tensor)",
    "plu_weight_fwd(Tensor lower, Tensor upper, Tensor log_s, Tensor sign_s, Tensor perm) -> Tensor",
    "plu_weight_bwd(Tensor grad_weight, Tensor lower, Tensor upper, Tensor log_s, Tensor sign_s, Tensor perm)"
    " -> (Tensor, Tensor, Tensor)",
    "gaussian_fwd(Tensor params, Tensor? raw, Tensor? prior_mean, Tensor? prior_raw, Tensor? eps, Tensor? seed, "
    f"{NUMBER} seed_value, {NUMBER} offset, {NUMBER}? n_samples, int scale, int flags, int reduce, bool want_logq, "
    "bool save_eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "gaussian_bwd(Tensor? grad_z, Tensor? grad_kl, Tensor? grad_logq, Tensor params, Tensor? raw, Tensor? prior_mean, "
    f"Tensor? prior_raw, Tensor? eps, Tensor? seed, {NUMBER} seed_value, {NUMBER} offset, {NUMBER}? n_samples, "
    "int scale, int flags, "
    "int reduce, bool need_params, bool need_raw, bool need_prior_mean, bool need_prior_raw)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    # Of contiguous float32 tensors, with torch's own noise: state is torch.Generator.get_state(), which moves on.
    # Results: z, the mean over the batch of KL(q || N(0, I)), and the noise.
    "latent_head_fwd(Tensor mean, Tensor logvar, Tensor(a!) state) -> (Tensor, Tensor, Tensor)",
    "latent_head_bwd(Tensor grad_z, Tensor grad_kl, Tensor mean, Tensor logvar, Tensor eps) -> (Tensor, Tensor)",
    "philox4x32(Tensor counter, Tensor key) -> Tensor",
    "conv_net_fwd(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor w3, Tensor b3, float slope, bool keep)"
    " -> (Tensor, Tensor, Tensor)",
    "conv_net_bwd(Tensor grad, Tensor x, Tensor w1, Tensor w2, Tensor w3, Tensor h1, Tensor h2, float slope, "
    "bool need_x, bool need_weights) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # Glow's step: x times matrix along the channels, plus bias; conv_net of the first `kept` channels of that, whose
    # answer is affine_coupling's params for the others. Results: y, logdet and, with `keep`, what backward needs.
    "glow_step_fwd(Tensor x, Tensor matrix, Tensor? bias, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor w3, "
    f"Tensor b3, Tensor? logdet, int kept, bool keep, int flags, {SCALE_MAP_ARGS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "glow_step_bwd(Tensor? grad_y, Tensor? grad_logdet, Tensor x, Tensor matrix, Tensor w1, Tensor w2, Tensor w3, "
    "Tensor mixed, Tensor params, Tensor h1, Tensor h2, int kept, bool need_x, bool need_matrix, bool need_weights, "
    f"int flags, {SCALE_MAP_ARGS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
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
    # kept: of each hidden layer its activations and, of silu, their slopes. grads_hidden: by each hidden layer's
    # activations, or nothing. grads: of each layer weight and bias.
    "wide_mlp_fwd(Tensor x, Tensor[] weights, Tensor[] biases, int activation, bool keep) -> (Tensor, Tensor[])",
    "wide_mlp_bwd(Tensor grad, Tensor[] grads_hidden, Tensor x, Tensor[] weights, Tensor[] kept, int activation, "
    "bool need_x, bool need_params) -> (Tensor, Tensor[])",
    # x (B, *event), logits (N, *event) with N a multiple of B; results (N,) and like logits.
    "bernoulli_log_prob_fwd(Tensor x, Tensor logits) -> Tensor",
    "bernoulli_log_prob_bwd(Tensor grad, Tensor x, Tensor logits) -> Tensor",
    # levels: see csrc/cpu/top_down.cpp. Results: next h, latents of all levels in one vector, kl, log q and log p
    # (L, B), and with `save` what backward needs.
    f"top_down_fwd(Tensor h, Tensor[] features, Tensor[] eps, Tensor? seed, {NUMBER} seed_value, {NUMBER} offset, "
    "Tensor[] params, int[] levels, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "top_down_bwd(Tensor? grad_next, Tensor? grad_z, Tensor? grad_kl, Tensor? grad_log_q, Tensor? grad_log_p, "
    "Tensor h, Tensor[] features, Tensor saved, Tensor[] params, int[] levels, bool need_h, bool need_features, "
    "bool need_params) -> (Tensor, Tensor[], Tensor[])",
)
NAMES = tuple(schema.partition("(")[0] for schema in SCHEMAS)
CPU_ALONE = ("activated_conv_fwd", "activated_conv_bwd", "mlp_fwd", "mlp_bwd", "wide_mlp_fwd", "wide_mlp_bwd",
             "bernoulli_log_prob_fwd", "bernoulli_log_prob_bwd", "top_down_fwd", "top_down_bwd", "latent_head_fwd",
             "latent_head_bwd", "glow_step_fwd", "glow_step_bwd")
WITHOUT_TRITON = ("mlp_flow_fwd", "mlp_flow_bwd")
WITHOUT_CUDA = ("conv_net_fwd", "conv_net_bwd")
LIBRARIES = {"cpu": "_C_cpu.so", "cuda": "_C_cuda.so"}
COMPILERS = {"cpu": "a C++ compiler", "cuda": "nvcc"}
observers = ()  # functions of (name, arguments), told of every eager call before it runs; see fastflow.launches
_LAUNCHABLE = frozenset((torch.Tensor, torch.nn.Parameter, type(None), int, float, bool))
_loading = threading.RLock()
_libraries = {}  # keeps torch.library.Library objects, and with them the registrations, alive


def constant_under_compile(function):
    """Dynamo runs ``function`` at trace time instead of tracing it (torch.compiler.assume_constant_result, whose use
    here would import Dynamo)."""
    function._dynamo_marked_constant = True
    return function


def _once(function):
    """functools.cache, but of several threads that call at once one runs the function and the others wait for it."""
    found = {}

    @functools.cache
    @functools.wraps(function)
    def call(argument):
        with _loading:
            if argument not in found:
                found[argument] = function(argument)
            return found[argument]
    return call


def library_path(backend):
    """Path of the compiled library of "cpu" or "cuda", or None where it was not built."""
    path = Path(__file__).parent / LIBRARIES[backend]
    return path if path.exists() else None


@_once
def define(namespace):
    """Define every schema and its fake implementation, of fastflow/fakes.py, under ``namespace`` (once); returns the
    torch.ops namespace."""
    library = torch.library.Library(namespace, "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    for name in NAMES:
        torch.library.register_fake(f"{namespace}::{name}", getattr(fakes, name), lib=library)
    _libraries[namespace] = library
    return getattr(torch.ops, namespace)


@_once
def load(backend):
    """The operators of ``backend`` as {name: OpOverload}.

    Raises:
        RuntimeError: the compiled library or Triton is not there, or it does not load; the message says why.
    """
    ops = define(f"fastflow_{backend}")
    if backend in LIBRARIES:
        path = library_path(backend)
        if path is None:
            raise RuntimeError(f"{LIBRARIES[backend]} was not built; where torch, ninja and {COMPILERS[backend]} are, "
                               "`pip install . --no-build-isolation` builds it")
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


@functools.cache
def own_products():
    """Whether the CPU library multiplies matrices itself here and faster than torch; on Intel's processors and on
    x86 without AVX-512 it has torch do it.

    Raises:
        RuntimeError: as of :func:`load`.
    """
    load("cpu")
    return bool(ctypes.CDLL(str(library_path("cpu"))).fastflow_own_products())


def cuda_refusal(device):
    """Why the CUDA library's kernels can't run on this GPU, as CUDA says it, or None: mostly that there is no code for
    its compute capability.

    Raises:
        RuntimeError: as of :func:`load`.
    """
    load("cuda")
    refusal = ctypes.CDLL(str(library_path("cuda"))).fastflow_cuda_refusal
    refusal.restype = ctypes.c_char_p
    with torch.cuda.device(device):
        reason = refusal()
    return None if reason is None else reason.decode()


def convolutions_in_tf32():
    """Whether torch lets float32 convolutions on a GPU run in TF32, and Triton's products for them with it."""
    from fastflow.kernels import layout

    return layout.convolutions_in_tf32()


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
    from fastflow.kernels import affine_coupling, conv_net, gaussian, plu_weight, slogdet, spline

    return affine_coupling, conv_net, gaussian, plu_weight, slogdet, spline


@functools.cache
def launchers():
    """Triton's launchers as {name: function}, the same arguments and results as the operators."""
    return {name: getattr(m, name) for m in triton_modules() for name in NAMES if hasattr(m, name)}


def kernel(backend, name):
    """What runs op ``name`` on ``backend``: for Triton in eager mode its launcher, where the operands have memory of
    their own, else the operator, in eager mode as torch's C++ sees it, without OpOverload's own frame of Python."""
    if torch.compiler.is_compiling():
        _load_while_tracing(backend)
        return getattr(getattr(torch.ops, f"fastflow_{backend}"), name).default
    found = _launcher_or_operator(name) if backend == "triton" else load(backend)[name]._op
    return _observed(name, found) if observers else found


@functools.cache
def _launcher_or_operator(name):
    """Triton's launcher, past the dispatcher and its cost; but the operator where a dispatch mode is active or an
    argument is of another type than those that a launch takes, as a FakeTensor, which names a GPU and has no memory
    there, or does not say by its memory alone what it holds, as the imaginary part of a conjugate."""
    launcher, operator = launchers()[name], load("triton")[name]

    def call(*args):
        plain = (_LAUNCHABLE.issuperset(map(type, args)) and not torch._C._len_torch_dispatch_stack()
                 and not any(isinstance(t, torch.Tensor) and (t.is_neg() or t._is_zerotensor()) for t in args))
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
