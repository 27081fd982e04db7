"""Samples of truncated normals: second derivatives in the tail, temperature 0; bases in half precision."""

import copy
import math

import pytest
import torch
from torch import nn

from fastflow import flows
from fastflow.flows.special import log_ndtri


@pytest.mark.parametrize("log_p", [-601.0, -800.0, -1e5])
def test_derivatives_of_the_quantile_where_p_underflows(log_p):
    """dx/dl = Phi/phi = 1/s for l = log Phi(x), and as s' = -s (x + s): d2x/dl2 = (x + s) / s^2."""
    log_p = torch.tensor(log_p, dtype=torch.float64, requires_grad=True)
    x = log_ndtri(log_p)
    first, = torch.autograd.grad(x, log_p, create_graph=True)
    second, = torch.autograd.grad(first, log_p)
    at = x.detach()
    slope = math.sqrt(2.0 / math.pi) / torch.special.erfcx(-at / math.sqrt(2.0))
    torch.testing.assert_close(torch.special.log_ndtr(at), log_p.detach(), rtol=1e-14, atol=0)
    torch.testing.assert_close(first.detach(), 1.0 / slope, rtol=1e-9, atol=0)
    # s + x is about -1/x: what is left of two numbers of x's size has lost digits.
    torch.testing.assert_close(second, (at + slope) / slope**2, rtol=1e-4, atol=0)


def test_second_derivatives_of_samples_far_in_the_tail():
    """By finite differences of the first ones."""
    base = flows.TruncatedNormal(40.0, 41.0, 1).double()
    nn.init.zeros_(base.loc)

    def gradient(shift=(0.0, 0.0), **options):
        moved = copy.deepcopy(base)
        with torch.no_grad():
            for p, s in zip(moved.parameters(), shift, strict=True):
                p += s
        own = list(moved.parameters())
        z = moved.sample(1, generator=torch.Generator().manual_seed(3))
        first = torch.cat(torch.autograd.grad(z.sum(), own, create_graph=bool(options)))
        return (first, own) if options else first

    first, own = gradient(second=True)
    for row, entry in enumerate(first):
        got = torch.stack(torch.autograd.grad(entry, own, retain_graph=True))[:, 0]
        step = [1e-4 * (i == row) for i in range(2)]
        want = (gradient(step) - gradient([-s for s in step])) / 2e-4
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("low", "high", "loc"), [(0.0, 1.0, None), (0.0, math.inf, None), (0.5, 2.0, None),
                                                  (-math.inf, -0.5, None), (-1.0, 1.0, None), (-1.0, 1.0, 0.3),
                                                  (-1.0, 1.0, 7.0), (-math.inf, 1.0, -3.0)])
def test_at_temperature_0_samples_are_the_point_of_the_interval_next_to_loc(low, high, loc):
    base = flows.TruncatedNormal(low, high, (2, 3))
    if loc is not None:
        nn.init.constant_(base.loc, loc)
    want = base.loc.detach().clamp(low, high).expand(4, 2, 3)
    torch.testing.assert_close(base.sample(4, temperature=0.0), want, rtol=0, atol=0)
    torch.testing.assert_close(base.sample(4, temperature=1e-6), want, rtol=0, atol=1e-4)


BASES = {"diagonal": flows.DiagonalNormal, "full": flows.FullNormal, "student": flows.StudentT,
         "truncated": lambda n: flows.TruncatedNormal(-1.0, 2.5, n), "uniform": lambda n: flows.Uniform(-3.1, 1.3, n)}


@pytest.mark.parametrize("name", BASES)
def test_bases_in_half_precision(name):
    """z and the density are in float32, near those of the rounded parameters in float32."""
    base = BASES[name](3)
    with torch.no_grad():
        for p in base.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    base = base.bfloat16()
    z = base.sample(6, generator=torch.Generator().manual_seed(1))
    value = base.log_prob(z)
    assert z.dtype == value.dtype == torch.float32
    whole = copy.deepcopy(base).float()
    torch.testing.assert_close(z, whole.sample(6, generator=torch.Generator().manual_seed(1)), rtol=0.02, atol=0.02)
    torch.testing.assert_close(value, whole.log_prob(z), rtol=0.01, atol=0.02)
