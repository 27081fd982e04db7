"""Where NaN and infinities come out, beside eager PyTorch: the checks of tests/unit, and of tests/interpreter for
Triton's kernels where there is no GPU."""

import math

import torch
from cases import Case, cotangents_of, evaluate
from tolerances import assert_bitwise, assert_same_nonfinite

from fastflow import reference
from fastflow.functional import ScaleMap, affine_coupling

POISONS = (math.nan, math.inf, -math.inf)
# Samples of 37 elements: full vectors of 16 and a tail.
WIDE = (
    *(Case(f"{scale}{'_inverse' * inverse}", "affine_coupling",
           {"x": (3, 37), "params": (3, 37 if scale == "additive" else 74), "logdet": (3,), "passive": (3, 5)},
           {"scale": scale, "inverse": inverse, "shift_first": inverse})
      for scale in ("exp", "sigmoid", "tanh", "atan", "softplus", "rational", "additive") for inverse in (False, True)),
    *(Case(f"{kind}_bounds{'_inverse' * inverse}", "affine_coupling",
           {"x": (3, 37), "raw": (3, 37), "shift": (3, 37)},
           {"scale": ScaleMap(kind, eps=1e-3, hard_min=0.5, hard_max=2.0), "inverse": inverse})
      for kind in ("softplus", "exp") for inverse in (False, True)),
    *(Case(f"gaussian_{scale}", "gaussian_sample_kl",
           {"mean": (3, 37), "raw": (3, 37), "prior_mean": (3, 37), "prior_raw": (3, 37), "eps": (3, 37)},
           {"scale": scale, "return_logq": True}) for scale in reference.SCALES),
    Case("gaussian_packed", "gaussian_sample_kl", {"params": (3, 2, 37)},
         {"seed": 1, "reduce": "channel", "layout": "interleave"}),
    *(Case(f"spline_{kind}{'_inverse' * inverse}{'_soft' * (clamp is not None)}", "spline",
           {"x": (3, 37), "params": (3, 37 * 5), "logdet": (3,)}, {"kind": kind, "inverse": inverse, "clamp": clamp})
      for kind, clamp in (("rq", None), ("rq", 6.9), ("linear", None)) for inverse in (False, True)),
)


def _places(n):
    """The first, a middle and the last of n elements, and one of the tail."""
    return 0, n // 2, n - 1, max(n - 3, 0)


def _poisoned(t, bad):
    """``t`` with sample 2i + 1 holding the poison of ``bad``[i], a list of (poison, which of _places)."""
    flat = t.clone().reshape(len(t), -1)
    for i, (poison, place) in enumerate(bad):
        flat[2 * i + 1, _places(flat.shape[1])[place]] = poison
    return flat.reshape(t.shape)


def check_poison_in_operands(case, device="cpu", places=range(4)):
    """One bad number in one operand of every other sample, at each of these _places: the same non-finite places in
    every result and gradient as eager's, and the samples between keep their bits."""
    bad = [(poison, place) for poison in POISONS for place in places]
    tensors = case.tensors(torch.float32, device, batch=2 * len(bad) + 1)
    cotangents = cotangents_of(case, tensors)
    clean = evaluate(case, tensors, cotangents=cotangents)
    for name, t in tensors.items():
        poisoned = {**tensors, name: _poisoned(t, bad)}
        got = evaluate(case, poisoned, cotangents=cotangents)
        eager = evaluate(case, poisoned, cotangents=cotangents, module=reference)
        for part in (0, 1):
            for result, out in got[part].items():
                if out is not None:
                    _check_one(out, eager[part][result], clean[part][result],
                               f"{case}: {name} -> {'gradient of ' * part}{result}", part == 1)


def check_poison_in_incoming_gradients(case, device="cpu"):
    bad = [(poison, 2) for poison in POISONS]
    tensors = case.tensors(torch.float32, device, batch=2 * len(bad) + 1)
    cotangents = cotangents_of(case, tensors)
    clean = evaluate(case, tensors, cotangents=cotangents)[1]
    for name, t in cotangents.items():
        poisoned = {**cotangents, name: _poisoned(t, bad)}
        got = evaluate(case, tensors, cotangents=poisoned)[1]
        eager = evaluate(case, tensors, cotangents=poisoned, module=reference)[1]
        for operand, grad in got.items():
            _check_one(grad, eager[operand], clean[operand], f"{case}: gradient of {name} -> of {operand}", True)


def _check_one(out, eager, clean, label, gradient):
    assert_same_nonfinite(out, torch.zeros_like(out) if eager is None else eager, label, gradient=gradient)
    assert_bitwise(out[::2], clean[::2], label)


# Not from 87 to 104, where eager itself loses subnormal scales.
EXTREMES = (0.0, 1e-6, 5.0, 11.0, 50.0, 80.0, 120.0, 200.0, 1e4, 1e38, math.inf, math.nan)


def check_extremes(case, device="cpu", extremes=EXTREMES):
    """Every pair of extreme x and extreme raw: overflow, underflow, 0 * inf and inf - inf as eager has them."""
    grid = torch.tensor([*extremes, *(-v for v in extremes)])
    raw, x = (t.flatten()[:, None].to(device) for t in torch.meshgrid(grid, grid, indexing="ij"))
    scale = ScaleMap.of(case.options["scale"])
    found = []
    for function in (affine_coupling, reference.affine_coupling):
        params = raw if scale.kind == "additive" else (raw, torch.zeros_like(x))
        found.append(function(x, params, scale=scale, inverse=case.options.get("inverse", False),
                              shift_first=case.options.get("shift_first", False)))
    for got, want, name in zip(*found, ("y", "logdet"), strict=True):
        assert_same_nonfinite(got, want, name)


def check_a_batch_of_one_value(case, size, device="cpu"):
    """A whole batch of NaN, and one of zeros."""
    for value in (math.nan, 0.0):
        tensors = {n: torch.full_like(t, value) for n, t in case.tensors(torch.float32, device, batch=size).items()}
        got, want = evaluate(case, tensors)[0], evaluate(case, tensors, module=reference)[0]
        for name, t in got.items():
            assert_same_nonfinite(t, want[name], f"{case} {value} {name}")
