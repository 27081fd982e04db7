"""Spline couplings and neural spline flows: densities, contexts, the start, transformers, training."""

import math

import layouts
import pytest
import torch
from torch import nn

from fastflow import flows, functional
from fastflow.nn import MLP, SplineCoupling


def scattered(module, size=0.3):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("kind", ["rq", "linear"])
@pytest.mark.parametrize(("features", "n"), [(1, 6001), (2, 701)])
def test_density_integrates_to_one(features, n, kind):
    """By the midpoint rule, to what its own error is where the density jumps (linear) or bends (rq)."""
    torch.manual_seed(1)
    flow = scattered(flows.NSF(features, n_layers=4, n_bins=5, hidden=(8,), kind=kind, activation=nn.Tanh).double())
    axis = torch.linspace(-14, 14, n, dtype=torch.float64)
    points = torch.cartesian_prod(*[axis] * features).reshape(-1, features)
    with torch.no_grad():
        total = flow.log_prob(points).exp().sum() * (axis[1] - axis[0]) ** features
    assert abs(total - 1) < (2e-4 if kind == "rq" else 2e-2)


@pytest.mark.parametrize("permutation", ["flip", "random"])
def test_it_starts_as_the_identity(permutation):
    x = torch.randn(50, 4)
    flow = flows.NSF(4, n_layers=3, permutation=permutation)
    expected = torch.distributions.Normal(0, 1).log_prob(x).sum(1)
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"clamp": 6.9}, {"clamp": 6.9, "min_derivative": 0.3}, {"kind": "linear"},
                                     {"min_derivative": 0.5, "tail_bound": 2.0}], ids=str)
def test_identity_params(options):
    coupling = SplineCoupling(nn.Identity(), n_bins=5, **options)
    x = torch.randn(100, 1, dtype=torch.float64)
    y, logdet = functional.spline(x, coupling.identity_params().double().expand(100, -1), **coupling.options)
    torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logdet, torch.zeros(100, dtype=torch.float64), rtol=0, atol=1e-6)


def test_no_identity_where_slopes_are_above_one():
    with pytest.raises(ValueError, match="^min_derivative"):
        SplineCoupling(nn.Identity(), min_derivative=1.0).identity_params()


def test_context_is_respected():
    flow = scattered(flows.NSF(2, n_layers=3, n_bins=4, hidden=(8,), context_features=2).double())
    x, context = torch.randn(6, 2).double(), torch.randn(6, 2).double()
    one, other = flow.log_prob(x, context), flow.log_prob(x, context.flip(0))
    assert not torch.allclose(one, other)
    torch.testing.assert_close(flow.log_prob(x.flip(0), context.flip(0)), one.flip(0))
    z, logdet = flow.transform(x, context)
    back, opposite = flow.transform.inverse(z, context)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(opposite, -logdet)
    assert flow.sample(7, context).shape == (7, 6, 2)
    with pytest.raises(ValueError, match="^context"):
        flow.log_prob(x)
    with pytest.raises(ValueError, match="^context"):
        flows.NSF(2).log_prob(x.float(), context.float())


class Constant(nn.Module):
    def __init__(self, params):
        super().__init__()
        self.params = params

    def forward(self, x, context=None):
        self.seen = x
        return self.params


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("split", ["checkerboard", "channel", "full"])
def test_masked_formula(split, flip):
    """Each active element goes through the spline of its own params; passive ones stay and give no log-slope."""
    x, params = torch.randn(2, 3, 3, 4), torch.randn(2, 15, 3, 4)
    mask = {"checkerboard": torch.tensor([[(i + j) % 2 == 0 for j in range(4)] for i in range(3)]),
            "channel": torch.tensor([True, False, True])[:, None, None], "full": torch.rand(3, 3, 4) > 0.5}[split]
    layer = SplineCoupling(Constant(params), split=split if split == "checkerboard" else mask, flip=flip, n_bins=2)
    passive = (~mask if flip else mask).expand(3, 3, 4)
    for source in (x, layouts.channels_last(x)):
        z, logdet = layer(source)
        y = functional.spline(x, params)[0]
        torch.testing.assert_close(z, torch.where(passive, x, y))
        slopes = torch.stack([functional.spline(x[:, c, i, j, None], params[:, 5 * c:5 * c + 5, i, j])[1]
                              for c, i, j in (~passive).nonzero().tolist()]).sum(0)
        torch.testing.assert_close(logdet, slopes)
        assert torch.equal(layer.conditioner.seen, torch.where(passive, x, torch.zeros_like(x)))


def test_running_log_det_and_shapes_of_params():
    layer = scattered(SplineCoupling(MLP(2, 2 * 23, (4,))))
    x, carried = torch.randn(3, 4), torch.randn(3)
    z, logdet = layer(x, logdet=carried)
    torch.testing.assert_close(logdet, carried + layer(x)[1])
    torch.testing.assert_close(layer.inverse(z, logdet=logdet)[1], carried, rtol=1e-4, atol=1e-4)
    for split in ("channel", "checkerboard"):
        with pytest.raises(ValueError, match="^conditioner output"):
            SplineCoupling(Constant(torch.zeros(3, 46)), split=split, n_bins=9)(x)


def test_what_it_refuses():
    for call, name in ((lambda: flows.NSF(0), "features"),
                       (lambda: flows.NSF(2, autoregressive=True, n_bins=0), "n_bins"),
                       (lambda: flows.NSF(2, n_layers=-1), "n_layers"),
                       (lambda: flows.NSF(2, n_bins=0), "n_bins"),
                       (lambda: flows.NSF(2, tail_bound=-1.0), "tail_bound"),
                       (lambda: flows.NSF(2, n_bins=1000), "min_width"), (lambda: flows.NSF(2, kind="cubic"), "kind"),
                       (lambda: flows.NSF(2, permutation="sorted"), "permutation"),
                       (lambda: SplineCoupling(nn.Identity(), split="half"), "split")):
        with pytest.raises(ValueError, match=f"^{name}"):
            call()


def test_the_transformer_of_autoregressive_layers():
    """Its params are interleaved, those of a feature side by side, and it does what the operation does."""
    transformer = flows.SplineTransformer(4, tail_bound=2.0)
    assert transformer.params_per_feature == 11 and transformer.layout == "interleave"
    x, params = torch.randn(5, 3).double(), torch.randn(5, 33).double()
    z, logdet = transformer(x, params)
    parts = [functional.spline(x[:, c:c + 1], params[:, 11 * c:11 * c + 11], tail_bound=2.0) for c in range(3)]
    torch.testing.assert_close(z, torch.cat([p[0] for p in parts], 1))
    torch.testing.assert_close(logdet, sum(p[1] for p in parts))
    back, opposite = transformer.inverse(z, params)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(opposite, -logdet)
    assert repr(transformer) == "SplineTransformer(4, kind='rq', tail_bound=2.0)"


@pytest.mark.parametrize("permutation", ["flip", "random"])
@pytest.mark.parametrize("features", [1, 2, 4])
def test_autoregressive(features, permutation):
    """Identity at first; then both directions, log-determinants against the Jacobian, the context, and gradients."""
    torch.manual_seed(0)
    flow = flows.NSF(features, n_layers=3, n_bins=5, hidden=(12,), context_features=2, autoregressive=True,
                     permutation=permutation).double()
    x = 1.5 * torch.randn(6, features, dtype=torch.float64)
    context = torch.randn(6, 2, dtype=torch.float64)
    z, logdet = flow.transform(x, context)
    torch.testing.assert_close(z, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logdet, torch.zeros(6, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    scattered(flow)
    assert flows.check_invertible(flow.transform, x, context, tolerance=1e-7).ok
    assert not torch.allclose(flow.log_prob(x, context), flow.log_prob(x, -context))
    samples, log_prob = flow.sample_and_log_prob(3, context)
    torch.testing.assert_close(log_prob[1], flow.log_prob(samples[1], context))
    assert torch.autograd.gradcheck(lambda t: flow.log_prob(t, context[:2]), x[:2].requires_grad_())


def test_it_learns_a_mixture_on_a_ring():
    """Eight Gaussians around a circle: after 300 short steps the KL divergence is below 0.08 nats."""
    torch.manual_seed(0)
    angles = torch.arange(8) * (math.pi / 4)
    centres = 2.0 * torch.stack([angles.cos(), angles.sin()], 1)
    target = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(8)),
        torch.distributions.Independent(torch.distributions.Normal(centres, 0.3), 1))
    flow = flows.NSF(2, n_layers=4, n_bins=8, hidden=(32, 32), tail_bound=4.0)
    flow.initialize(target.sample((1024,)))
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        loss = -flow.log_prob(target.sample((256,))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    x = target.sample((5000,))
    with torch.no_grad():
        kl = (target.log_prob(x) - flow.log_prob(x)).mean()
    assert 0 <= kl < 0.08, kl
