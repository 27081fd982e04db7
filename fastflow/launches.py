"""How many device kernels fastflow's operators launch in a piece of code, counted without a GPU.

    with fastflow.launches.count() as counted:
        flow(images).mean().neg().backward()
    print(counted)          # launches and calls of every operator
    counted.total, counted.by_stem["affine_coupling"]

The code runs on whatever backend is here. Every call of an operator is put to the launches that its kernels declare for
those arguments: ``LAUNCHES`` in kernels/<stem>.py for Triton (held against the launches themselves in tests/interpreter
and tests/unit/test_launches.py), :data:`CUDA` here for csrc/cuda (held against the emulation in tests/simt).
"""

import collections
import contextlib
import math
import threading

from fastflow import backends, extension

__all__ = ["CUDA", "Counted", "count", "declared"]

ROW_ELEMENTS = 16384  # csrc/cuda/tiles.cuh, kRowElements: a longer row is split over blocks
SPLINE_WEIGHT = 4  # csrc/cuda/spline.cuh, kSplineWeight: of a row of splines that much earlier
PRIOR_SAMPLES = 64  # csrc/cuda/gaussian_bwd.cu, kPriorSamples: of a prior shared by the batch, samples of a block
FLOW_STEPS, FLOW_LINEARS, FLOW_MAPS = 32, 64, 4  # csrc/cuda/mlp_flow.cuh, kMostSteps and so on: of a launch
FLOW_PARAMETERS = 192  # csrc/cuda/mlp_flow_bwd.cu, kMostParameters
SAMPLE, CHANNEL, NONE = range(3)  # reduce, as the operators take it
_OPS = {"gaussian": "gaussian_sample_kl", "philox4x32": "gaussian_sample_kl"}  # stems under another name in backends


def _affine_coupling_fwd(x, params, shift, logdet, passive, kept, *scalars):
    return 0 if x.shape[0] == 0 else 1 + ((x.shape[1] - abs(kept)) * math.prod(x.shape[2:]) > ROW_ELEMENTS)


def _affine_coupling_bwd(grad_y, grad_logdet, x, params, shift, kept, need_x, need_params, need_shift,
                         *scalars):
    positions = x.shape[0] * math.prod(x.shape[2:])
    active = (x.shape[1] - abs(kept)) * positions > 0 and (need_x or need_params or need_shift)
    return int(active or (need_x and kept * positions != 0))


def _slogdet_fwd(weight, want_inverse):
    return int(math.prod(weight.shape[:-2]) > 0)


def _plu_weight(weight, *others):
    return int(weight.numel() > 0)


def _event_of(params, raw):
    """mean's shape (B, D, *S)."""
    return (params.shape[0], params.shape[1] // (2 if raw is None else 1), *params.shape[2:])


def _gaussian_fwd(params, raw, prior_mean, prior_raw, eps, seed, seed_value, offset, n_samples, scale, flags, reduce,
                  want_logq, save_eps):
    batch, channels, *spatial = _event_of(params, raw)
    samples, positions = 1 if n_samples is None else n_samples, math.prod(spatial)
    want_logq = want_logq and samples > 0
    if reduce == CHANNEL and positions == 1:
        reduce = NONE
    per_sample, elements = (channels, positions) if reduce == CHANNEL else (1, channels * positions)
    split = elements > ROW_ELEMENTS
    kl_sums = batch * per_sample if split and reduce != NONE else 0
    logq_sums = samples * batch if want_logq and (split or per_sample != 1) else 0
    return (batch * per_sample > 0) + (kl_sums + logq_sums > 0)


def _gaussian_bwd(grad_z, grad_kl, grad_logq, params, raw, prior_mean, prior_raw, eps, seed, seed_value, offset,
                  n_samples, scale, flags, reduce, need_params, need_raw, need_prior_mean, need_prior_raw):
    batch, *event = _event_of(params, raw)
    if not math.prod(event):
        return 0
    of_prior = need_prior_mean or need_prior_raw
    shared = prior_mean is not None and prior_mean.shape[0] == 1 and batch != 1
    launches = int(batch > 0 and (need_params or need_raw or (of_prior and not shared)))
    if of_prior and shared:
        launches += 1 if grad_kl is None or batch <= PRIOR_SAMPLES else 2
    return launches


def _mlp_flow_pieces(code, constants, inverse):
    """Pieces that a flow is cut into for its launches: csrc/cuda/mlp_flow.cuh, flow_programs."""
    steps, maps = [tuple(code[at:at + 6]) for at in range(0, len(code), 6)], iter(constants)
    described = [(count if coupling else 1,
                  (kind, flags & 4, *(next(maps) for _ in range(8))) if coupling else None)
                 for coupling, count, _, _, flags, kind in steps]
    pieces, length, linears, known = 1, 0, 0, set()
    for count, scale in reversed(described) if inverse else described:
        if length == FLOW_STEPS or linears + count > FLOW_LINEARS or (
                scale is not None and scale not in known and len(known) == FLOW_MAPS):
            pieces, length, linears, known = pieces + 1, 0, 0, set()
        length, linears, known = length + 1, linears + count, known | ({scale} if scale is not None else set())
    return pieces


def _mlp_flow_fwd(x, context, params, steps, constants, inverse, save):
    return _mlp_flow_pieces(steps, constants, inverse) if x.shape[0] > 0 else 0


def _mlp_flow_bwd(grad_z, grad_logdet, z, saved, context, params, steps, constants, inverse, need_x, need_context,
                  need_params):
    sizes = [p.numel() for p in params] if need_params else []
    sums = sum(any(sizes[at:at + FLOW_PARAMETERS]) for at in range(0, len(sizes), FLOW_PARAMETERS))
    return sums + (_mlp_flow_pieces(steps, constants, inverse) if z.shape[0] > 0 else 0)


def _spline_fwd(x, params, logdet, *scalars):
    return 0 if x.shape[0] == 0 else 1 + (math.prod(x.shape[1:]) > ROW_ELEMENTS // SPLINE_WEIGHT)


def _spline_bwd(grad_y, grad_logdet, x, params, need_x, need_params, *scalars):
    return int(x.numel() > 0 and (need_x or need_params))


# Launches of csrc/cuda, from the operator's arguments; an empty grid is not launched.
CUDA = {"affine_coupling_fwd": _affine_coupling_fwd, "affine_coupling_bwd": _affine_coupling_bwd,
        "slogdet_fwd": _slogdet_fwd, "plu_weight_fwd": _plu_weight, "plu_weight_bwd": _plu_weight,
        "gaussian_fwd": _gaussian_fwd, "gaussian_bwd": _gaussian_bwd,
        "philox4x32": lambda counter, key: int(counter.shape[0] > 0),
        "mlp_flow_fwd": _mlp_flow_fwd, "mlp_flow_bwd": _mlp_flow_bwd,
        "spline_fwd": _spline_fwd, "spline_bwd": _spline_bwd}


def declared(backend):
    """{operator: function of its arguments that gives its launches} of "triton" or "cuda".

    Raises:
        ValueError: another backend. RuntimeError: Triton's kernels are asked for, and Triton is not installed.
    """
    if backend == "cuda":
        return CUDA
    if backend != "triton":
        raise ValueError(f"backend: expected 'triton' or 'cuda', got {backend!r}")
    return {name: launches for module in extension.triton_modules() for name, launches in module.LAUNCHES.items()}


class Counted:
    """What was counted.

    Attributes:
        by_operator: {operator: kernel launches}, forward and backward ("affine_coupling_fwd", ...) apart.
        calls: {operator: calls}.
    """

    def __init__(self):
        self.by_operator, self.calls = collections.Counter(), collections.Counter()

    @property
    def by_stem(self):
        """{"affine_coupling", "slogdet", "plu_weight", "gaussian", "mlp_flow", "spline": kernel launches}, of those
        called."""
        stems = collections.Counter()
        for name, launches in self.by_operator.items():
            stems[_stem_of(name)] += launches
        return stems

    @property
    def total(self):
        return sum(self.by_operator.values())

    def __str__(self):
        rows = [(name, self.by_operator[name], self.calls[name]) for name in sorted(self.calls)]
        rows.append(("total", self.total, sum(self.calls.values())))
        return "\n".join(f"{name:<20} {launches:>6} launches {calls:>6} calls" for name, launches, calls in rows)


@contextlib.contextmanager
def count(backend=None):
    """Count the kernels that fastflow's operators launch inside: on "triton", on "cuda", or with None on the backend
    that the table of :mod:`fastflow.backends` prefers for each on CUDA tensors.

    Yields a :class:`Counted`, complete when the block ends. Calls of every thread count, for autograd runs backward in
    threads of its own. Not counted: what runs in eager PyTorch (the reference; torch's own copies and fills around a
    kernel), code compiled by torch.compile, and the noise that a double backward on a GPU draws once more.

    Raises:
        ValueError: ``backend`` is none of these; inside, a call that it would refuse (a matrix beyond Triton's limit).
        RuntimeError: no native backend works here, so that no operator would be called; or Triton is not installed.
    """
    names = ("triton", "cuda") if backend is None else (backend,)
    tables = {name: declared(name) for name in names}
    if not any(works for name, works in backends.available().items() if name != "reference"):
        raise RuntimeError("launches can't be counted: no native backend is available here (see `fastflow doctor`)")
    counted, lock = Counted(), threading.Lock()

    def observe(name, args):
        chosen = _preferred(name, args) if backend is None else backend
        if name in extension.CPU_ALONE:  # a GPU runs it in eager PyTorch
            chosen = None
        if chosen is not None and name not in tables[chosen]:
            raise ValueError(f"{name} has no {chosen} kernel to count the launches of")
        launches = 0 if chosen is None else tables[chosen][name](*args)
        with lock:
            counted.by_operator[name] += launches
            counted.calls[name] += 1

    extension.observers = (*extension.observers, observe)
    try:
        yield counted
    finally:
        extension.observers = tuple(other for other in extension.observers if other is not observe)


def _stem_of(name):
    return name.removesuffix("_fwd").removesuffix("_bwd")


def _preferred(name, args):
    """The backend that backends.PREFERENCE gives CUDA tensors in a call of this operator; None: the reference."""
    stem = _stem_of(name)
    if stem == "conv_net":
        x, w1, w3 = (args[at] for at in ((0, 1, 5) if name.endswith("_fwd") else (1, 2, 4)))
        if backends.leaves_convolutions(x, w1, w3) is not None:
            return None
    for backend in backends.PREFERENCE.get((_OPS.get(stem, stem), "cuda"), ()):
        if stem != "slogdet" or args[0].shape[-1] <= backends.SLOGDET_LIMIT[backend]:
            return backend
    return None
