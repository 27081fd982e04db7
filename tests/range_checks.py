"""Scales, their logarithms and derivatives over the whole range of the raw values, element by element: the checks of
tests/unit, and of tests/interpreter for Triton's kernels where there is no GPU."""

import torch
from tolerances import GRADIENT_FACTOR, VALUE_FACTOR, assert_elementwise

from fastflow import reference
from fastflow.functional import ScaleMap, affine_coupling, gaussian_sample_kl

MAPS = {**{name: ScaleMap(name) for name in ("exp", "sigmoid", "tanh", "atan", "softplus", "rational")},
        "sigmoid_eps": ScaleMap("sigmoid", offset=2.0, eps=1e-3), "exp_eps": ScaleMap("exp", eps=0.5)}
EDGES = (0.0, 1e-30, 1e-6, 1e-3, 0.1, 0.5, 1.0, 2.0, 5.0, 9.0, 11.0, 16.6, 20.0, 30.0, 50.0, 80.0, 86.0, 87.3, 88.7,
         89.0, 95.0, 103.0, 104.0, 200.0, 1e4, 1e30)
GAUSSIAN_EDGES = (0.0, 40.0, 80.0, 88.0, 89.0, 170.0, 178.0, 1e3, 1e6)


def _sweep(edges, limit, smallest, largest, count):
    """The edges of both signs, ``count`` values in [-limit, limit] and magnitudes from 10^smallest to 10^largest."""
    edges, small = torch.tensor(edges), torch.logspace(smallest, largest, max(count // 8, 12))
    return torch.cat([edges, -edges, torch.linspace(-limit, limit, count), small, -small]).double()


def _compare(got, eager, truth, relative_to, label):
    for name, out in got.items():
        gradient = name.startswith("d ")
        assert_elementwise(out.detach(), eager[name].detach(), truth[name].detach(), what=f"{label} {name}",
                           factor=GRADIENT_FACTOR if gradient else VALUE_FACTOR, roundings=8.0 if gradient else 4.0,
                           scale=relative_to[name])


def check_scale_map(scale, dtype, device="cpu", count=4001):
    """With x = 1 and t = 0, y is s and the log-det log s, element by element; so are the two parts of the gradient. s
    within a few roundings of itself, however small; log s and its derivative of themselves or 1, s's derivative of
    s."""
    raw = _sweep(EDGES, 30.0, -8, 2, count).to(device, dtype)[:, None].requires_grad_()
    wide = raw.detach().double().requires_grad_()

    def run(function, r, inverse):
        one = torch.ones_like(r)
        y, logdet = function(one, (r, torch.zeros_like(one)), scale=scale, inverse=inverse)
        by_logdet, by_y = (torch.autograd.grad(o.sum(), r, retain_graph=True)[0] for o in (logdet, y))
        return {"y": y[:, 0], "logdet": logdet, "d logdet": by_logdet[:, 0], "d y": by_y[:, 0]}

    for inverse in (False, True):
        got, eager = run(affine_coupling, raw, inverse), run(reference.affine_coupling, raw, inverse)
        truth = run(reference.affine_coupling, wide, inverse)
        _compare(got, eager, truth, {"y": 0.0, "logdet": 1.0, "d logdet": 1.0, "d y": truth["y"].detach().abs()}, scale)


def check_gaussian(scale, dtype, device="cpu", count=2001):
    """One element per sample: each sigma (z at mean 0 and eps 1), KL and derivative by itself, non-finite places
    included."""
    grid = _sweep(GAUSSIAN_EDGES, 20.0, -6, 1, count)
    grid = grid.abs() + 1e-7 if scale == "std" else grid
    raw = grid.to(device, dtype)[:, None].requires_grad_()
    wide = raw.detach().double().requires_grad_()

    def run(function, r):
        zero = torch.zeros_like(r)
        z, kl, logq = function((zero, r), scale=scale, eps=torch.ones_like(r), return_logq=True)
        out = {"z": z[:, 0], "kl": kl, "logq": logq}
        return out | {f"d {n}": torch.autograd.grad(t.sum(), r, retain_graph=True)[0][:, 0] for n, t in out.items()}

    got, eager, truth = run(gaussian_sample_kl, raw), run(reference.gaussian_sample_kl, raw), run(
        reference.gaussian_sample_kl, wide)
    sigma, log_sigma = (t.detach()[:, 0] for t in reference.sigma_and_log(wide, scale))
    size = (2 * log_sigma).abs().clamp(1.0)  # a rounding of log sigma, in roundings of sigma^2
    # What a rounding of each is relative to, where that is more than the result itself. log q is the sum of
    # -log(2 pi)/2, -1/2 and -log sigma, which may cancel.
    relative_to = {"z": sigma * size if scale == "soft_tanh" else 0.0, "kl": torch.expm1(2 * log_sigma).abs() * size,
                   "logq": log_sigma.abs() + 1.5, "d z": sigma * size, "d logq": 1.0,
                   "d kl": torch.maximum(sigma**2 * size, torch.expm1(2 * log_sigma).abs())}
    _compare(got, eager, truth, relative_to, scale)
