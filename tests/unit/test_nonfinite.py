"""NaN and infinities come out where eager PyTorch has them, and nowhere else."""

import math

import pytest
import torch
from cases import CASES, Case, cotangents_of, evaluate
from tolerances import assert_bitwise, assert_same_nonfinite

from fastflow import reference
from fastflow.functional import ScaleMap, affine_coupling

POISONS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
# 3 samples of 37 elements: full vectors of 16 and a tail. First, middle, last of a sample, inside the tail.
WIDE = (
    *(Case(f"{scale}{'_inverse' * inverse}", "affine_coupling",
           {"x": (3, 37), "params": (3, 37 if scale == "additive" else 74), "logdet": (3,), "passive": (3, 5)},
           {"scale": scale, "inverse": inverse, "shift_first": inverse})
      for scale in ("exp", "sigmoid", "tanh", "atan", "softplus", "rational", "additive") for inverse in (False, True)),
    Case("bounds", "affine_coupling", {"x": (3, 37), "raw": (3, 37), "shift": (3, 37)},
         {"scale": ScaleMap("softplus", eps=1e-3, hard_min=0.5, hard_max=2.0)}),
    *(Case(f"gaussian_{scale}", "gaussian_sample_kl",
           {"mean": (3, 37), "raw": (3, 37), "prior_mean": (3, 37), "prior_raw": (3, 37), "eps": (3, 37)},
           {"scale": scale, "return_logq": True}) for scale in reference.SCALES),
    Case("gaussian_packed", "gaussian_sample_kl", {"params": (3, 2, 37)},
         {"seed": 1, "reduce": "channel", "layout": "interleave"}),
    *(Case(f"spline_{kind}{'_inverse' * inverse}{'_soft' * (clamp is not None)}", "spline",
           {"x": (3, 37), "params": (3, 37 * 5), "logdet": (3,)}, {"kind": kind, "inverse": inverse, "clamp": clamp})
      for kind, clamp in (("rq", None), ("rq", 6.9), ("linear", None)) for inverse in (False, True)),
)


def poisoned(tensors, name, index, value):
    out = {n: t.clone() for n, t in tensors.items()}
    out[name][index] = value
    return out


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_poison_comes_out_where_eager_has_it(case, poison, fused, device):
    """One bad number in one operand, at the first, a middle, the last element of a sample and in its tail: the same
    non-finite places in every result and gradient as eager's, and the other samples keep their bits."""
    tensors = case.tensors(torch.float32, device)
    cotangents = cotangents_of(case, tensors)
    clean = evaluate(case, tensors, cotangents=cotangents)
    for name, t in tensors.items():
        for place in {0, t[1].numel() // 2, t[1].numel() - 1, max(t[1].numel() - 3, 0)}:
            index = (1, *[i.item() for i in torch.unravel_index(torch.tensor(place), t.shape[1:])])
            bad = poisoned(tensors, name, index, POISONS[poison])
            got = evaluate(case, bad, cotangents=cotangents)
            eager = evaluate(case, bad, cotangents=cotangents, module=reference)
            for part in (0, 1):
                for result, out in got[part].items():
                    if out is None:
                        continue
                    label = f"{case} {poison} in {name}[{index}] -> {'gradient of ' * part}{result}"
                    want = torch.zeros_like(out) if eager[part][result] is None else eager[part][result]
                    assert_same_nonfinite(out, want, label, gradient=part == 1)
                    assert_bitwise(out[[0, 2]], clean[part][result][[0, 2]], label)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_poison_in_an_incoming_gradient(case, poison, fused, device):
    tensors = case.tensors(torch.float32, device)
    cotangents = cotangents_of(case, tensors)
    clean = evaluate(case, tensors, cotangents=cotangents)[1]
    for name, t in cotangents.items():
        index = (1, *[n - 1 for n in t.shape[1:]])
        bad = poisoned(cotangents, name, index, POISONS[poison])
        got = evaluate(case, tensors, cotangents=bad)[1]
        eager = evaluate(case, tensors, cotangents=bad, module=reference)[1]
        for operand, grad in got.items():
            label = f"{case} {poison} in the gradient of {name} -> gradient of {operand}"
            want = torch.zeros_like(grad) if eager[operand] is None else eager[operand]
            assert_same_nonfinite(grad, want, label, gradient=True)
            assert_bitwise(grad[[0, 2]], clean[operand][[0, 2]], label)


# Not from 87 to 104, where eager itself loses subnormal scales.
EXTREMES = [0.0, 1e-6, 5.0, 11.0, 50.0, 80.0, 120.0, 200.0, 1e4, 1e38, math.inf, math.nan]


@pytest.mark.parametrize("case", [c for c in WIDE if c.op == "affine_coupling"], ids=str)
def test_extreme_raw_scales_meet_extreme_x(case, fused, device):
    """Every pair of extreme x and extreme raw: overflow, underflow, 0 * inf and inf - inf as eager has them."""
    grid = torch.tensor(EXTREMES + [-v for v in EXTREMES])
    raw, x = (t.flatten()[:, None].to(device) for t in torch.meshgrid(grid, grid, indexing="ij"))
    scale = ScaleMap.of(case.options["scale"])
    found = []
    for function in (affine_coupling, reference.affine_coupling):
        leaves = [x.clone().requires_grad_(), raw.clone().requires_grad_()]
        params = leaves[1] if scale.kind == "additive" else (leaves[1], torch.zeros_like(x))
        y, logdet = function(leaves[0], params, scale=scale, inverse=case.options.get("inverse", False),
                             shift_first=case.options.get("shift_first", False))
        found.append((y.detach(), logdet.detach()))
    for got, want, name in zip(*found, ("y", "logdet"), strict=True):
        assert_same_nonfinite(got, want, name)


@pytest.mark.parametrize("size", [4, 16, 17, 33])
def test_a_whole_batch_of_nan_and_of_zeros(size, fused, device):
    for value in (math.nan, 0.0):
        for case in CASES:
            if case.op.startswith(("slogdet", "plu")):
                continue
            tensors = {n: torch.full_like(t, value) for n, t in case.tensors(torch.float32, device, batch=size).items()}
            got, want = evaluate(case, tensors)[0], evaluate(case, tensors, module=reference)[0]
            for name, t in got.items():
                assert_same_nonfinite(t, want[name], f"{case} {value} {name}")
