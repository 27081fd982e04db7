"""Which backend runs which operation, and why.

========== ============================================== =======================================================
reference  anything                                       eager PyTorch: truth, torch.func, forward AD, double backward
cpu        CPU tensors                                    C++, vectorised and threaded
triton     CUDA tensors                                   Triton 3.6 or newer
cuda       CUDA tensors                                   CUDA C++
========== ============================================== =======================================================

The choice reads only metadata: device, dtype, shape class.
"""

import contextlib
import importlib.metadata
import importlib.util
import math
import os
import shutil
import threading

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from fastflow import extension, gpus

NAMES = ("reference", "cpu", "triton", "cuda")
OPS = ("affine_coupling", "slogdet", "slogdet_inverse", "gaussian_sample_kl", "plu_weight", "conv_net", "mlp",
       "mlp_flow", "spline", "bernoulli_log_prob", "activated_conv", "wide_mlp", "top_down")

# The table. For each op and device the backends in order of preference; a rule may refuse by shape class.
PREFERENCE = {
    ("affine_coupling", "cpu"): ("cpu",),
    ("gaussian_sample_kl", "cpu"): ("cpu",),
    ("slogdet", "cpu"): ("cpu",),
    ("slogdet_inverse", "cpu"): ("cpu",),
    ("plu_weight", "cpu"): ("cpu",),
    ("conv_net", "cpu"): ("cpu",),
    ("conv_net", "cuda"): ("triton",),
    ("mlp", "cpu"): ("cpu",),
    ("mlp_flow", "cpu"): ("cpu",),
    ("spline", "cpu"): ("cpu",),
    ("activated_conv", "cpu"): ("cpu",),
    ("wide_mlp", "cpu"): ("cpu",),
    ("bernoulli_log_prob", "cpu"): ("cpu",),  # no GPU kernel yet: on CUDA tensors the reference runs
    ("top_down", "cpu"): ("cpu",),  # nor one for this
    # A call of the cuda backend costs its caller less than Triton's launcher does; its kernels take 4 to 26 % longer on
    # an H200 in float32.
    ("affine_coupling", "cuda"): ("cuda", "triton"),
    ("gaussian_sample_kl", "cuda"): ("cuda", "triton"),
    ("slogdet", "cuda"): ("cuda", "triton"),
    ("slogdet_inverse", "cuda"): ("cuda", "triton"),
    ("plu_weight", "cuda"): ("cuda", "triton"),
    ("mlp_flow", "cuda"): ("cuda",),
    # cuda brings the parameters of an element, side by side in memory, through shared memory; triton reads them in
    # place, and compiles anew for every number of bins.
    ("spline", "cuda"): ("cuda", "triton"),
}
# Largest matrix for which each backend is preferred to torch.linalg. cpu: faster at every size measured, which ends at
# 1024. triton: what fits in registers. cuda: what fits in shared memory.
SLOGDET_LIMIT = {"cpu": math.inf, "triton": 32, "cuda": 192}
CONV_NET_CHANNELS = 16  # the vectors of every instruction set and dtype divide it
# On a GPU: the fewest hidden channels that fill its products, the most others beside which the taps' columns are small.
CONV_NET_HIDDEN, CONV_NET_OTHERS = 128, 64
ACTIVATED_CONV_WEIGHTS = 9 * 128**2
TRITON_MAX = 32  # beyond it a tile spills, so the kernel refuses
LINEAR_TAILS = "the kernels' splines have linear tails"
_NETWORKS = ("conv_net", "activated_conv", "mlp", "wide_mlp")
_FACTORISATIONS = ("slogdet", "slogdet_inverse")
_FIRST = {device: f"first in the table for {device}" for _, device in PREFERENCE}

_PLAIN = (torch.Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)
_PLAIN_OR_NONE = frozenset((*_PLAIN, type(None)))


class _State(threading.local):
    def __init__(self):
        self.requested = None  # of each object, for Dynamo to guard on
        self.status, self.within_reach = None, {}


_state = _State()


def status():
    """{backend: reason}: "available" and what serves it, or "not available" and why."""
    def probe(loader, detail):
        try:
            loader()
        except RuntimeError as error:
            return f"not available: {error}"
        return f"available: {detail}"

    report = {"reference": "available: eager PyTorch, every device and dtype",
              "cpu": probe(lambda: extension.load("cpu"), "C++ kernels for CPU tensors")}
    if importlib.util.find_spec("triton") is None:
        report["triton"] = "not available: Triton is not installed"
    elif extension.triton_interprets():
        report["triton"] = "available: in Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors"
    elif not torch.cuda.is_available():
        report["triton"] = "not available: no GPU is visible to torch"
    else:
        report["triton"] = f"available: Triton {importlib.metadata.version('triton')}"
    if not torch.cuda.is_available() and extension.library_path("cuda") is not None:
        report["cuda"] = "not available: the library is built, but no GPU is visible to torch"
    elif not torch.cuda.is_available():
        report["cuda"] = f"not available: no GPU, and {_why_no_cuda_library()}"
    else:
        report["cuda"] = probe(lambda: extension.load("cuda"), "CUDA C++ kernels")
    return report


def _why_no_cuda_library():
    return "the library was not built" + ("" if find_nvcc() else " (nvcc not found)")


def find_nvcc():
    """The nvcc that a build uses, or None: under CUDA_HOME, if that is set, else on PATH or in /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else f"{os.environ.get('PATH')}:/usr/local/cuda/bin")


def available():
    """{backend: bool} for reference, cpu, triton and cuda."""
    return {name: reason.startswith("available") for name, reason in _status().items()}


def _status():
    if _state.status is None:
        _state.status = status()
    return _state.status


@extension.constant_under_compile
def _status_of(backend):
    return _status()[backend]


@extension.constant_under_compile
def own_products():
    """Whether the matrix products of wide networks gain on torch's by themselves: where the cpu backend has its own."""
    return _status_of("cpu").startswith("available") and extension.own_products()


@extension.constant_under_compile
def _triton_interprets():
    return extension.triton_interprets()


def requested():
    """The backend that use_backend asks for here, or None."""
    return _state.requested


@contextlib.contextmanager
def use_backend(name):
    """Run every operation inside on ``name``; one that can't raises RuntimeError and says why. None: choose freely.

    The request is of the thread that makes it. What autograd computes again on a GPU in a thread of its own, as
    reentrant activation checkpointing does, chooses freely unless the function computed again makes the request itself.

    Raises:
        ValueError: ``name`` is not a backend.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"name: expected one of {', '.join(NAMES)} or None, got {name!r}")
    previous = requested()
    _state.requested = name
    try:
        yield
    finally:
        _state.requested = previous


@extension.constant_under_compile  # Dynamo has the transforms that it traces active then, and guards on their stack
def _transform_active():
    return torch._C._are_functorch_transforms_active()


def transformed():
    """Why no operands at all can reach a raw kernel now, or None."""
    if _transform_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode AD is active"
    return None


def needs_reference(tensors):
    """Why these operands can't reach a raw kernel now, or None."""
    reason = transformed()
    if reason is not None:
        return reason
    if not torch.compiler.is_compiling() and _PLAIN_OR_NONE.issuperset(map(type, tensors)):
        return None
    for t in tensors:
        if t is not None and type(t) not in _PLAIN:
            return f"{type(t).__name__} is a tensor subclass"
    return None


def refusal(backend, op, tensors):
    """Why ``backend`` can't run ``op`` on these tensors, or None."""
    return _out_of_reach(backend, op, tensors[0].device) or _misfit(backend, op, tensors)


def _out_of_reach(backend, op, device):
    """Why ``backend`` runs ``op`` on no tensors of this device, or None."""
    kind = device.type
    if backend == "reference":
        return None
    if backend == "cpu" and kind != "cpu":
        return f"the cpu backend takes CPU tensors, these are on {kind}"
    if backend in ("triton", "cuda") and kind != "cuda" and not (backend == "triton" and kind == "cpu"
                                                                 and _triton_interprets()):
        return f"the {backend} backend takes CUDA tensors, these are on {kind}"
    reason = _status_of(backend)
    if not reason.startswith("available"):
        return reason
    if backend == "triton" and f"{op}_fwd" in extension.WITHOUT_TRITON:
        return f"{op} has no Triton kernel"
    if backend == "cuda" and f"{op}_fwd" in extension.WITHOUT_CUDA:
        return f"{op} has no CUDA kernel"
    if backend != "cpu" and f"{op}_fwd" in extension.CPU_ALONE:
        return f"{op} has no {backend} kernel"
    return gpus.refusal(backend, device) if kind == "cuda" else None


def _misfit(backend, op, tensors):
    """Why these operands do not fit a backend within whose reach the op is, or None."""
    if backend == "reference":
        return None
    if op in _NETWORKS:
        return (_network_misfit if backend == "cpu" else _triton_misfit)(op, tensors[0], tensors[1:])
    size = tensors[0].shape[-1] if op in _FACTORISATIONS else 0
    if backend == "triton" and size > TRITON_MAX:
        return f"a {size}x{size} matrix does not fit in registers (limit {TRITON_MAX})"
    return None


def _network_misfit(op, x, weights):
    if x.dtype not in (torch.float32, torch.float64):
        return f"the cpu kernel takes float32 and float64, not {x.dtype}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast chooses the dtype of networks"
    if "conv" in op and weights and (weights[0].shape[0] % CONV_NET_CHANNELS or weights[0].shape[0] == 0):
        return f"the cpu kernel takes channels in multiples of {CONV_NET_CHANNELS}, not {weights[0].shape[0]}"
    if op == "activated_conv" and weights and weights[0].numel() > ACTIVATED_CONV_WEIGHTS:
        return f"a weight of {weights[0].numel()} elements does not stay in the cache (limit {ACTIVATED_CONV_WEIGHTS})"
    return None


def _triton_misfit(op, x, weights):
    if any(0 in w.shape for w in weights):
        return "the triton kernel takes no empty weights"
    if any(w.dtype != x.dtype for w in weights):
        return "the operands are of different dtypes"
    return None


def leaves_convolutions(x, *weights):
    """Why conv_net's convolutions, 3x3 ones being its first and last weight, are rather left to the library than to
    Triton, or None."""
    if torch.compiler.is_compiling():
        return "torch.compile has convolutions of its own"
    if torch.version.hip:
        return "convolutions are left to MIOpen"
    if x.is_cuda and torch.cuda.is_available() and not gpus.has_tensor_cores(x.device):
        return "a GPU of compute capability below 8.0 is left to cuDNN"
    lowered = torch.is_autocast_enabled(x.device.type)
    if x.dtype == torch.float64 or (x.dtype == torch.float32 and not lowered and not extension.convolutions_in_tf32()):
        return f"{x.dtype} without TF32 is left to cuDNN"
    if len(weights) == 2 and (weights[0].shape[0] < CONV_NET_HIDDEN
                              or max(x.shape[1], weights[1].shape[0]) > CONV_NET_OTHERS):
        return f"fewer than {CONV_NET_HIDDEN} hidden channels or more than {CONV_NET_OTHERS} others are left to cuDNN"
    return None


def choose(op, *tensors, tails="linear"):
    """The backend of a call of ``op`` with these operands (None among them allowed), of a spline with these tails.

    Raises:
        RuntimeError: use_backend asks for one that can't run it.
    """
    wanted = requested()
    if wanted is None:
        return _choose(op, tensors)[0] if tails == "linear" else "reference"
    reason = _unmet(wanted, op, tensors) if tails == "linear" or wanted == "reference" else LINEAR_TAILS
    if reason is not None:
        raise RuntimeError(f"backend {wanted!r} was requested for {op}, but {reason}")
    return wanted


def serves(op, *tensors):
    """Whether a kernel would run this call; not where use_backend asks for the reference or for one that can't."""
    return prefers(op, *tensors)[0] != "reference"


def prefers(op, *tensors):
    """(backend, reason) as :func:`choose`, but the reference where a request of use_backend can't be met."""
    wanted = requested()
    if wanted is None:
        return _choose(op, tensors)
    reason = _unmet(wanted, op, tensors)
    return (wanted, "requested by use_backend") if reason is None else ("reference", reason)


def _unmet(wanted, op, tensors):
    """Why a request of use_backend can't be met, or None."""
    return None if wanted == "reference" else needs_reference(tensors) or refusal(wanted, op, tensors)


def _choose(op, tensors):
    reason = needs_reference(tensors)
    if reason is not None:
        return "reference", reason
    device = tensors[0].device
    backends, reason = _within_reach(op, device)
    for backend in backends:
        reason = _misfit(backend, op, tensors)
        if reason is None and op in _FACTORISATIONS and tensors[0].shape[-1] > SLOGDET_LIMIT[backend]:
            reason = f"torch.linalg is faster above {SLOGDET_LIMIT[backend]}x{SLOGDET_LIMIT[backend]}"
        if reason is None and op == "conv_net" and backend == "triton":
            reason = leaves_convolutions(tensors[0], *tensors[1:6:4])
        if reason is None:
            return backend, _FIRST[device.type]
    return "reference", reason


@extension.constant_under_compile
def _within_reach(op, device):
    """(the backends of the table that run ``op`` on this device, in its order, why not the last of the others), found
    once per thread."""
    found = _state.within_reach.get((op, device))
    if found is None:
        order = PREFERENCE.get((op, device.type), ())
        reasons = [_out_of_reach(backend, op, device) for backend in order]
        reason = reasons[-1] if order else f"there is no kernel for {device.type} tensors"
        found = _state.within_reach[op, device] = [b for b, r in zip(order, reasons, strict=True) if r is None], reason
    return found


def explain(op, *tensors, tails="linear"):
    """One line: the backend that ``op``, a spline with these ``tails``, would use on ``tensors``, then why. Its first
    word is the backend's name.

    Raises:
        ValueError: ``op`` is not an operation of fastflow, no tensor is given, or for a factorisation no matrix.
        TypeError: an operand is not a tensor, or the first is None.
    """
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {op!r}")
    if not tensors:
        raise ValueError("tensors: expected the operands of the call, got none")
    operands = [t for t in tensors for t in (t if isinstance(t, (tuple, list)) else (t,))]
    for t in operands:
        if t is not None and not isinstance(t, torch.Tensor):
            raise TypeError(f"tensors: expected tensors, pairs of them or None, got {type(t).__name__}")
    if operands[0] is None:
        raise TypeError("tensors: expected a tensor first, got None")
    if op in _FACTORISATIONS and operands[0].dim() < 2:
        raise ValueError(f"tensors: expected matrices (*, C, C) for {op}, got shape {tuple(operands[0].shape)}")
    wanted = requested()
    if wanted is None:
        backend, reason = _choose(op, operands) if tails == "linear" else ("reference", LINEAR_TAILS)
    else:
        backend, reason = choose(op, *operands, tails=tails), "requested by use_backend"
    return f"{backend} ({reason})"
