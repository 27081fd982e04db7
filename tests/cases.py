"""Calls of every operation, as data: what generic tests (layouts, masks, poison, compile, threads) run over."""

import contextlib
import itertools
from dataclasses import dataclass, field
from unittest import mock

import pytest
import torch
from tolerances import GRADIENT_FACTOR, VALUE_FACTOR, assert_by_ratio

from fastflow import backends, functional, reference
from fastflow.functional import ScaleMap

# Ops whose kernels take no half precision.
FULL_PRECISION = ("plu_weight", "conv_net", "activated_conv", "mlp", "wide_mlp", "mlp_flow")
NETWORKS = ("mlp", "wide_mlp", "mlp_flow")  # ops on x and the parameters of layers
NOT_DIFFERENTIABLE = ("eps", "seed", "sign_s", "perm")


@dataclass(frozen=True)
class Case:
    """One way to call ``op``: the shape of each operand by name, the options, and how the results are called."""

    name: str
    op: str
    shapes: dict
    options: dict = field(default_factory=dict)

    def __str__(self):
        return self.name

    @property
    def differentiable(self):
        return tuple(name for name in self.shapes if name not in NOT_DIFFERENTIABLE)

    @property
    def outputs(self):
        if self.options.get("hidden"):
            return ("y", *(f"h{layer}" for layer in range(len(self.shapes) // 2 - 1)))
        return {"affine_coupling": ("y", "logdet"), "mlp_flow": ("z", "logdet"), "conv_net": ("y",),
                "activated_conv": ("y",), "mlp": ("y",), "wide_mlp": ("y",),
                "spline": ("y", "logdet"), "bernoulli_log_prob": ("log_prob",),
                "slogdet": ("sign", "logabsdet"), "plu_weight": ("weight",),
                "slogdet_inverse": ("sign", "logabsdet", "inverse"),
                "gaussian_sample_kl": ("z", "kl", "logq") if self.options.get("return_logq") else ("z", "kl"),
                }[self.op]

    def tensors(self, dtype=torch.float64, device="cpu", seed=0, batch=None):
        """Random operands in ``dtype``; ``batch`` replaces the leading size 3 that every case has."""
        generator = torch.Generator().manual_seed(seed)
        shapes = self.shapes if batch is None else {
            name: tuple(batch if n == 3 and d == self.batch_dim(name) else n for d, n in enumerate(shape))
            for name, shape in self.shapes.items()}
        return {name: self._operand(name, shape, generator).to(device, torch.int64 if name == "perm" else dtype)
                for name, shape in shapes.items()}

    def batch_dim(self, name):
        """The dim of the operand that is the batch; None: it has none."""
        if self.op in NETWORKS and name not in ("x", "context"):
            return None
        if self.op == "bernoulli_log_prob":
            return len(self.shapes[name]) - len(self.shapes["x"])
        return 1 if name == "eps" and "n_samples" in self.options else 0

    def _operand(self, name, shape, generator):
        if name == "perm":
            return torch.argsort(torch.rand(shape, generator=generator), -1)
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name == "sign_s":
            return value.sign()
        if name == "weight" and self.op != "activated_conv":
            return value + 2.0 * torch.eye(shape[-1], dtype=torch.float64)
        if self.op in NETWORKS and len(shape) == 2 and name not in ("x", "context"):
            return value / max(shape[1], 1) ** 0.5
        if self.op == "spline" and name == "params":
            return 0.4 * value  # sharp splines are ill-conditioned: the largest of their errors says little
        if self.options.get("scale") == "std":
            return value.abs() + 0.4
        return value

    def call(self, tensors, module=functional):
        """``module``'s namesake of the op on these operands: a tuple of results."""
        t, options = dict(tensors), dict(self.options)
        if self.op == "affine_coupling":
            params = (t.pop("raw"), t.pop("shift")) if "raw" in t else t.pop("params")
            return module.affine_coupling(t.pop("x"), params, **t, **options)
        if self.op == "gaussian_sample_kl":
            params = (t.pop("mean"), t.pop("raw")) if "raw" in t else t.pop("params")
            if "prior_mean" in t:
                options["prior"] = t.pop("prior_mean"), t.pop("prior_raw")
            return module.gaussian_sample_kl(params, **t, **options)
        if self.op in ("plu_weight", "conv_net", "activated_conv", "bernoulli_log_prob"):
            return (getattr(module, self.op)(**t, **options),)
        if self.op in ("mlp", "wide_mlp"):
            weights, biases = (tuple(t[f"{kind}{i}"] for i in range(len(t) // 2)) for kind in "wb")
            result = getattr(module, self.op)(t["x"], weights, biases, **options)
            return (result[0], *result[1]) if options.get("hidden") else (result,)
        if self.op == "mlp_flow":
            return self._call_mlp_flow(t, module)
        return getattr(module, self.op)(**t, **options)

    def _call_mlp_flow(self, t, module):
        """Operands are named "<step>.bias", "<step>.log_scale", "<step>.w<layer>" and "<step>.b<layer>"."""
        x, context, options = t.pop("x"), t.pop("context", None), dict(self.options)
        inverse, steps = options.pop("inverse", False), []
        for index in sorted({int(name.split(".")[0]) for name in t}):
            own = {name.split(".")[1]: value for name, value in t.items() if name.startswith(f"{index}.")}
            if "log_scale" in own:
                steps.append(functional.ChannelAffine(**own))
                continue
            layers = range(len(own) // 2)
            weights, biases = (tuple(own[f"{kind}{i}"] for i in layers) for kind in "wb")
            steps.append(functional.MLPCoupling(weights, biases, flip=bool(index % 2), **options))
        return module.mlp_flow(x, steps, context=context, inverse=inverse)


def flow_case(name, features, hidden, couplings, *, batch=3, context=None, actnorm=True, **options):
    """A flow of couplings that take turns, behind an ActNorm's step or without one."""
    shapes, additive = {"x": (batch, features)}, options.get("scale") == "additive"
    if context is not None:
        shapes["context"] = (batch, context)
    if actnorm:
        shapes |= {"0.bias": (features,), "0.log_scale": (features,)}
    for index in range(1, couplings + 1):
        active = features // 2 if index % 2 else features - features // 2
        sizes = [features - active + (context or 0), *hidden, (1 if additive else 2) * active]
        for layer, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
            shapes |= {f"{index}.w{layer}": (outputs, inputs), f"{index}.b{layer}": (outputs,)}
    return Case(name, "mlp_flow", shapes, options)


AFFINE_CASES = (
    Case("exp_packed", "affine_coupling", {"x": (3, 4, 2, 5), "params": (3, 8, 2, 5)}),
    Case("glow_inverse", "affine_coupling", {"x": (3, 3, 7), "params": (3, 6, 7), "logdet": (3,)},
         {"scale": "sigmoid", "layout": "interleave", "order": "shift_scale", "shift_first": True, "inverse": True}),
    Case("tanh_pair_passive", "affine_coupling",
         {"x": (3, 5), "raw": (3, 5), "shift": (3, 5), "logdet": (3,), "passive": (3, 4)},
         {"scale": ScaleMap("tanh", clamp=1.5, eps=0.1, shift_gain=0.5)}),
    Case("softplus_passive_inverse", "affine_coupling",
         {"x": (3, 2, 3, 3), "params": (3, 4, 3, 3), "passive": (3, 5, 3, 3)}, {"scale": "softplus", "inverse": True}),
    Case("sigmoid_kept", "affine_coupling", {"x": (3, 5, 2, 5), "params": (3, 6, 2, 5), "logdet": (3,)},
         {"scale": "sigmoid", "shift_first": True, "passive": 2}),
    Case("tanh_pair_kept_behind", "affine_coupling", {"x": (3, 7), "raw": (3, 4), "shift": (3, 4)},
         {"scale": "tanh", "inverse": True, "passive": -3}),
    Case("additive", "affine_coupling", {"x": (3, 4, 3, 3), "params": (3, 4, 3, 3), "logdet": (3,)},
         {"scale": "additive"}),
)
SLOGDET_CASES = (
    Case("slogdet", "slogdet", {"weight": (3, 4, 4)}),
    Case("slogdet_inverse", "slogdet_inverse", {"weight": (3, 5, 5)}),
    Case("plu_weight", "plu_weight", {"lower": (3, 5, 5), "upper": (3, 5, 5), "log_s": (3, 5), "sign_s": (3, 5),
                                      "perm": (3, 5)}),
)
GAUSSIAN_CASES = (
    Case("logvar_eps", "gaussian_sample_kl", {"params": (3, 6, 2, 4), "eps": (3, 3, 2, 4)}),
    Case("soft_tanh_prior", "gaussian_sample_kl", {"mean": (3, 7), "raw": (3, 7), "prior_mean": (1, 7),
                                                   "prior_raw": (1, 7)},
         {"scale": "soft_tanh", "seed": 11, "n_samples": 4, "reduce": "channel", "return_logq": True}),
    Case("softplus_interleaved", "gaussian_sample_kl", {"params": (3, 8, 5)},
         {"scale": "softplus", "layout": "interleave", "order": "scale_mean", "seed": 5, "offset": 3, "reduce": "none",
          "return_logq": True}),
    Case("std_prior_eps", "gaussian_sample_kl", {"params": (3, 4, 3), "prior_mean": (3, 2, 3), "prior_raw": (3, 2, 3),
                                                 "eps": (2, 3, 2, 3)}, {"scale": "std", "n_samples": 2}),
)
FLOW_CASES = (
    flow_case("flow_tanh_context", 5, (6,), 1, context=2, scale="tanh", activation="tanh"),
    flow_case("flow_glow_inverse", 4, (), 2, actnorm=False, inverse=True,
              scale=ScaleMap("sigmoid", offset=2.0, eps=0.1), layout="interleave", order="shift_scale",
              shift_first=True),
    flow_case("flow_additive", 2, (5,), 1, scale="additive", activation="silu"),
)
SPLINE_CASES = (
    Case("rq", "spline", {"x": (3, 4, 2, 5), "params": (3, 32, 2, 5), "logdet": (3,)}, {"tail_bound": 1.5}),
    Case("rq_inverse", "spline", {"x": (3, 7), "params": (3, 77)},
         {"inverse": True, "gain": 0.4, "min_width": 0.05, "min_height": 0.05, "min_derivative": 0.1,
          "end_derivative": 0.4}),
    Case("rq_soft_inverse", "spline", {"x": (3, 2, 6), "params": (3, 10, 6), "logdet": (3,)},
         {"inverse": True, "clamp": 6.9, "min_width": 0.0, "min_height": 0.0, "min_derivative": 0.0}),
    Case("rq_soft", "spline", {"x": (3, 5), "params": (3, 55)}, {"clamp": 3.0, "tail_bound": 5.0, "gain": 1.5,
                                                                    "end_derivative": 2.0}),
    Case("linear_spline", "spline", {"x": (3, 6, 3, 3), "params": (3, 30, 3, 3)}, {"kind": "linear"}),
    Case("linear_spline_inverse", "spline", {"x": (3, 6), "params": (3, 24), "logdet": (3,)},
         {"kind": "linear", "inverse": True, "tail_bound": 1.0}),
)
CASES = AFFINE_CASES + SLOGDET_CASES + GAUSSIAN_CASES + SPLINE_CASES + FLOW_CASES


def conv_case(name, x, hidden, out, **options):
    """A call of conv_net on x (B, I, H, W)."""
    return Case(name, "conv_net", {"x": x, "w1": (hidden, x[1], 3, 3), "b1": (hidden,), "w2": (hidden, hidden, 1, 1),
                                   "b2": (hidden,), "w3": (out, hidden, 3, 3), "b3": (out,)}, options)


CONV_CASES = (conv_case("relu", (3, 5, 6, 7), 16, 4), conv_case("leaky", (3, 2, 4, 4), 48, 7, negative_slope=0.2))
TRITON_CASES = AFFINE_CASES + SLOGDET_CASES + GAUSSIAN_CASES + SPLINE_CASES + CONV_CASES


def activated_conv_case(name, x, out, kernel, **options):
    """A call of activated_conv on x (B, I, H, W) for ``out`` channels."""
    channels = (x[1], out) if options.get("transposed") else (out, x[1])
    return Case(name, "activated_conv", {"x": x, "weight": (*channels, *kernel), "bias": (out,)}, options)


ACTIVATED_CASES = (
    activated_conv_case("down", (3, 2, 6, 8), 16, (4, 4), stride=2, padding=1, activation="silu"),
    activated_conv_case("up_wide", (3, 16, 3, 4), 32, (4, 4), stride=2, padding=1, transposed=True, activation="silu"),
    activated_conv_case("up_narrow", (3, 16, 3, 4), 2, (4, 3), stride=2, padding=1, transposed=True,
                        activation="relu"),
)


BERNOULLI_CASES = (
    Case("bernoulli_image", "bernoulli_log_prob", {"x": (3, 4, 2, 5), "logits": (3, 4, 2, 5)}),
    Case("bernoulli_samples", "bernoulli_log_prob", {"x": (3, 7), "logits": (2, 3, 7)}),
)


def mlp_case(name, sizes, *, op="mlp", batch=3, **options):
    """A network of layers between these sizes; parameters are named "w<layer>" and "b<layer>"."""
    shapes = {"x": (batch, sizes[0])}
    for layer, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
        shapes |= {f"w{layer}": (outputs, inputs), f"b{layer}": (outputs,)}
    return Case(name, op, shapes, options)


MLP_CASES = (mlp_case("mlp", (5, 19, 8, 7), activation="tanh"),
             mlp_case("mlp_residual", (4, 17, 17, 17, 6), residual=True),
             mlp_case("wide_silu", (5, 7, 4), op="wide_mlp", activation="silu"),
             mlp_case("wide_relu", (4, 6, 5, 2), op="wide_mlp", activation="relu"),
             mlp_case("wide_silu_hidden", (4, 6, 5, 2), op="wide_mlp", activation="silu", hidden=True),
             mlp_case("wide_relu_hidden", (4, 6, 2), op="wide_mlp", activation="relu", hidden=True))
# With the operations that have no kernel on a GPU.
CPU_CASES = CASES + CONV_CASES + ACTIVATED_CASES + BERNOULLI_CASES + MLP_CASES


def one_of_each_op(cases):
    """The cases, all but the first of each operator for the slow suite."""
    seen = set()
    for case in cases:
        yield pytest.param(case, marks=pytest.mark.slow) if case.op in seen else case
        seen.add(case.op)


def no_kernel(backend, op, size=0):
    """Why ``backend`` has no kernel of ``op`` on a GPU (for slogdet: of matrices of this size), or None."""
    if backend not in ("triton", "cuda"):
        return None
    served = backends.PREFERENCE.get((op, "cuda"), ())
    if backend not in served:
        return f"{op} has no {backend} kernel" if served else f"{op} has no kernel on a GPU"
    if backend == "triton" and op.startswith("slogdet") and size > backends.TRITON_MAX:
        return f"the Triton kernel refuses {size}x{size} matrices, which do not fit in registers"
    return None


@contextlib.contextmanager
def noise_of_the_backend(case, tensors):
    """The reference draws, inside, the very normals of the backend in use (which may differ from its own by 2e-6), so
    that everything else can be compared to the last rounding."""
    if case.op != "gaussian_sample_kl" or "eps" in tensors:
        yield
        return
    like = tensors["mean"] if "mean" in tensors else tensors["params"][:, ::2]
    zeros, ones = torch.zeros(like.shape, device=like.device), torch.ones(like.shape, device=like.device)
    options = {name: case.options[name] for name in ("seed", "offset", "n_samples") if name in case.options}
    drawn, _ = functional.gaussian_sample_kl((zeros, ones), scale="std", **options)
    exact = reference.philox_normal

    def philox_normal(*args, **kwargs):
        normals = exact(*args, **kwargs)
        assert normals.shape == drawn.shape and not ((normals - drawn).abs() >= 2e-6).any()
        return drawn

    with mock.patch.object(reference, "philox_normal", philox_normal):
        yield


def evaluate(case, tensors, *, needs=None, cotangents=None, module=functional):
    """Results of a call and the gradients of sum_i <cotangents[i], results[i]>.

    Args:
        needs: operands that require a gradient; default all differentiable ones.
        cotangents: {result name: tensor}; default none, and then no backward is run.

    Returns:
        ({result name: tensor}, {operand name: gradient or None})
    """
    needs = case.differentiable if needs is None else needs
    leaves = {name: t.detach().requires_grad_(name in needs) for name, t in tensors.items()}
    with noise_of_the_backend(case, tensors) if module is reference else contextlib.nullcontext():
        results = dict(zip(case.outputs, case.call(leaves, module), strict=True))
    grads = {}
    if cotangents and needs:
        used = [name for name in case.outputs if name in cotangents and results[name].requires_grad]
        found = torch.autograd.grad([results[n] for n in used], [leaves[n] for n in needs],
                                    [cotangents[n] for n in used], allow_unused=True) if used else [None] * len(needs)
        grads = dict(zip(needs, found, strict=True))
    return {name: t.detach() for name, t in results.items()}, grads


def cotangents_of(case, tensors, seed=1):
    """Random incoming gradients for every differentiable result, in its dtype."""
    generator = torch.Generator().manual_seed(seed)
    results, _ = evaluate(case, tensors, needs=(), module=reference)
    return {name: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device, t.dtype)
            for name, t in results.items() if name != "sign"}


def upcast(tensors):
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


def check_by_ratio(case, tensors, *, needs=None, cotangents=None, value_factor=VALUE_FACTOR, what=""):
    """Every result and gradient of functional's call obeys the error-ratio rule; returns what functional gave."""
    got = evaluate(case, tensors, needs=needs, cotangents=cotangents)
    eager = evaluate(case, tensors, needs=needs, cotangents=cotangents, module=reference)
    truth = evaluate(case, upcast(tensors), needs=needs, cotangents=cotangents and upcast(cotangents), module=reference)
    largest = max((t.numel() for t in tensors.values()), default=1)
    for part, factor, kind in ((0, value_factor, ""), (1, GRADIENT_FACTOR, "gradient of ")):
        for name, out in got[part].items():
            label = f"{what} {case} {kind}{name}"
            if out is None or eager[part][name] is None:
                # None and zeros are the same gradient.
                for other in (out, eager[part][name]):
                    assert other is None or not other.any(), f"{label}: None against a gradient that is not zero"
                continue
            # A sum of n terms of size about 1 may cancel: its floor is one rounding of sqrt(n).
            terms = (largest / max(out.numel(), 1)) ** 0.5 if out.numel() < largest else 0.0
            assert_by_ratio(out, eager[part][name], truth[part][name], factor=factor, magnitude=terms, what=label)
    return got


def check_together(case, dtype, device="cpu", size=0.5):
    """Results and gradients by the error-ratio rule, over all results and over all gradients, each relative to its
    magnitude: a rounding early in a flow goes into everything behind it, and the largest error of one small tensor
    says little about either side. Nor does that of one draw of operands: where it misses the bound, two others must
    hold it.

    size: of the parameters, small enough for steps that do not stretch.
    """
    missed = _missed(case, dtype, device, size, 0)
    if missed:
        again = [_missed(case, dtype, device, size, seed) for seed in (1, 2)]
        assert not any(again), (missed, again)


def _missed(case, dtype, device, size, seed):
    """What misses the bound, in words; empty: nothing."""
    tensors = {name: t if name in ("x", "context") else size * t
               for name, t in case.tensors(dtype, device, seed).items()}
    # With few samples eager may happen to hit a result, and a GPU's eager sums are often nearly exact.
    lucky = next(iter(tensors.values())).shape[0] < 64 or device == "cuda"
    floor = (64 if dtype == torch.float64 else 16 if lucky else 4) * torch.finfo(dtype).eps
    return [f"{case} {dtype} part {part}: {errors}"
            for part, errors in enumerate(_errors_together(case, tensors, dtype))
            if not errors["fused"] <= (VALUE_FACTOR, GRADIENT_FACTOR)[part] * errors["eager"] + floor]


def _errors_together(case, tensors, dtype):
    """{"fused", "eager": the largest error} of the results, then of the gradients."""
    cotangents = cotangents_of(case, tensors)
    got = evaluate(case, tensors, cotangents=cotangents)
    eager = evaluate(case, tensors, cotangents=cotangents, module=reference)
    truth = evaluate(case, upcast(tensors), cotangents=upcast(cotangents), module=reference)
    for part in (0, 1):
        errors = {}
        for which, results in (("fused", got), ("eager", eager)):
            pairs = [(t, truth[part][name]) for name, t in results[part].items()]
            assert all(t.dtype == dtype and t.shape == exact.shape for t, exact in pairs)
            errors[which] = torch.stack([(t.double() - exact).abs().max() / exact.abs().max().clamp(min=1)
                                         for t, exact in pairs if t.numel()]).max().item()  # NaN stays
        yield errors


def subsets(names, at_least=0):
    """All subsets of ``names`` with at least that many members, as tuples."""
    return [c for k in range(at_least, len(names) + 1) for c in itertools.combinations(names, k)]


def kernels_run(function):
    """Names "namespace::op" of fastflow's operators that torch's dispatcher ran during ``function``."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.key for event in profile.key_averages() if event.key.startswith("fastflow")}
