"""Surjections: contributions against probabilities computed by quadrature and enumeration."""

import math

import pytest
import torch
from flow_checks import scattered
from torch import nn

from fastflow import flows
from fastflow.engine import TrainStep
from fastflow.nn import MLP

BINS = 4


def normal(loc, scale):
    return torch.distributions.Normal(torch.tensor(loc, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64))


def noise_flow(features=1):
    """q(u | x): logit, then an affine map that depends on x."""
    net = scattered(MLP(0, 2 * features, (8,), context_features=features), 0.4)
    layers = flows.Compose(flows.Logit(), Conditional(net))
    return flows.Flow(layers, flows.StandardNormal(features)).double()


class Conditional(nn.Module):
    """z = x*exp(s(context)) + t(context)."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, context=None):
        s, t = self.net(x[:, :0], context).chunk(2, 1)
        return x * s.exp() + t, s.sum(1)

    def inverse(self, z, context=None):
        s, t = self.net(z[:, :0], context).chunk(2, 1)
        return (z - t) * (-s).exp(), -s.sum(1)


class Posterior:
    """The law of u given x under a normal density of the dequantised value: what makes the bound tight."""

    def __init__(self, density):
        self.density = density

    def _mass(self, context):
        low, high = (self.density.cdf(context + side * 0.5 / BINS) for side in (-1, 1))
        return low, high - low

    def sample_and_log_prob(self, n, context, generator=None):
        low, mass = self._mass(context)
        value = self.density.icdf(low + mass * torch.rand(n, *context.shape, dtype=torch.float64))
        u = (value - context + 0.5 / BINS) * BINS
        return u, self.log_prob(u[0], context)[None]

    def log_prob(self, u, context=None):
        value = context - 0.5 / BINS + u / BINS
        return (self.density.log_prob(value) - math.log(BINS) - self._mass(context)[1].log()).sum(1)


def probabilities(density):
    """P(x) of the integers 0..BINS-1: the density's integral over their cells."""
    edges = torch.arange(BINS + 1, dtype=torch.float64) / BINS - 0.5
    return density.cdf(edges[1:]) - density.cdf(edges[:-1])


def expected_bound(surjection, density, x, n=20001):
    """E over q(u | x) of log p(z) + contribution, by the midpoint rule in u; that of its exponential is P(x)."""
    u = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]
    z = (x + u) / BINS - 0.5
    integer, opposite = surjection.inverse(z)
    assert (integer == x).all()
    log_q = opposite - math.log(BINS)  # log q(u | x) alone
    assert abs(log_q.exp().mean() - 1) < 1e-5
    value = density.log_prob(z).sum(1) - opposite
    torch.testing.assert_close((log_q + value).exp().mean(), probabilities(density)[x], rtol=1e-6, atol=0)
    return (log_q.exp() * value).mean().item()


@pytest.mark.parametrize("kind", ["uniform", "variational"])
def test_expected_bound_is_below_the_probability(kind):
    density = normal(0.1, 0.15)
    surjection = (flows.UniformDequantization(BINS) if kind == "uniform"
                  else flows.VariationalDequantization(noise_flow(), n_bins=BINS))
    exact = probabilities(density).log()
    for x in range(BINS):
        bound = expected_bound(surjection, density, x)
        assert bound < exact[x] - 1e-4
        with torch.no_grad():
            z, contribution = surjection(torch.full((20000, 1), x), dtype=torch.float64)
        draws = density.log_prob(z).sum(1) + contribution
        assert abs(draws.mean() - bound) < 4 * draws.std() / math.sqrt(20000)


def test_contributions_are_tensors_of_their_own():
    surjection, x = flows.UniformDequantization(BINS), torch.zeros(4, 2, dtype=torch.int64)
    for layer in (surjection, flows.Compose(surjection, flows.Reverse())):
        z, contribution = layer(x)
        for value in (contribution, layer.inverse(z)[1]):
            assert value.is_contiguous() and torch.equal(value + 1.0, value.add_(torch.ones(4)))


def test_the_posterior_makes_the_bound_exact():
    density = normal(0.1, 0.15)
    surjection = flows.VariationalDequantization(Posterior(density), n_bins=BINS)
    x = torch.arange(BINS).repeat(5)[:, None]
    z, contribution = surjection(x, dtype=torch.float64)
    value = density.log_prob(z).sum(1) + contribution
    torch.testing.assert_close(value, probabilities(density).log().repeat(5))


def test_a_uniform_q_is_uniform_dequantisation():
    class FlatQ:
        def sample_and_log_prob(self, n, context, generator=None):
            return torch.rand(n, *context.shape, dtype=context.dtype, generator=generator), context.new_zeros(
                n, len(context))

        def log_prob(self, u, context=None):
            return u.new_zeros(len(u))

    x = torch.randint(0, 256, (5, 3, 2, 2), dtype=torch.uint8)
    variational, uniform = flows.VariationalDequantization(FlatQ()), flows.UniformDequantization()
    a, b = (layer(x, generator=torch.Generator().manual_seed(3)) for layer in (variational, uniform))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert torch.equal(variational.inverse(a[0])[0], x.long())
    torch.testing.assert_close(a[1], torch.full((5,), -12 * math.log(256)))
    torch.testing.assert_close(variational.inverse(a[0])[1], uniform.inverse(b[0])[1])


def test_two_contributions_are_opposite_and_gradients_reach_q():
    surjection = flows.VariationalDequantization(noise_flow(2), nn.Linear(2, 2).double(), n_bins=BINS)
    x = torch.randint(0, BINS, (50, 2))
    z, contribution = surjection(x, dtype=torch.float64)
    integers, opposite = surjection.inverse(z)
    assert torch.equal(integers, x) and integers.dtype == torch.int64
    torch.testing.assert_close(opposite, -contribution)
    contribution.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in surjection.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_value_leaves_the_interval(dtype):
    class Edge:
        def sample_and_log_prob(self, n, context, generator=None):
            return torch.ones(n, *context.shape, dtype=dtype), context.new_zeros(n, len(context))

        log_prob = None

    z, _ = flows.VariationalDequantization(Edge())(torch.full((2, 3), 255), dtype=dtype)
    assert (z < 0.5).all()


def grid(n=401, half_width=10.0):
    axis = torch.linspace(-half_width, half_width, n, dtype=torch.float64)
    return axis, axis[1] - axis[0]


def test_slice_is_exact():
    """A flow over x1 and p(x2 | x1) give a density over both, which integrates to 1 and is the product."""
    decoder = flows.ConditionalNormal((1,), scattered(MLP(1, 2, (4,)), 0.3))
    inner = scattered(flows.RealNVP(1, n_layers=2, hidden=(4,)), 0.3)
    flow = flows.Flow(flows.Compose(flows.Slice(1, decoder), inner.transform), inner.base).double()
    axis, step = grid(201, 14.0)
    x = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        log_prob = flow.log_prob(x)
    torch.testing.assert_close(log_prob, inner.log_prob(x[:, :1]) + decoder.log_prob(x[:, 1:], context=x[:, :1]))
    assert abs(log_prob.exp().sum() * step**2 - 1) < 1e-6
    draws, density = flow.sample_and_log_prob(7)
    torch.testing.assert_close(density, flow.log_prob(draws))
    assert flows.transform.noise_shape(flow.transform, (2,)) == (1,)


def test_augmenting_bounds_the_marginal():
    """E_q[log p(x, u) - log q(u | x)] by quadrature is below log of the integral of p(x, u) over u, and what forward
    draws has that mean."""
    encoder = flows.ConditionalNormal((1,), scattered(MLP(1, 2, (4,)), 0.3))
    inner = scattered(flows.RealNVP(2, n_layers=4, hidden=(6,), activation=nn.Tanh), 0.4)
    surjection = flows.Augment(1, 1, encoder).double()
    inner = inner.double()
    flow = flows.Flow(flows.Compose(surjection, inner.transform), inner.base)
    axis, step = grid(4001, 20.0)
    for value in (-1.0, 0.3, 2.0):
        x = torch.full((len(axis), 1), value, dtype=torch.float64)
        z = torch.cat([x, axis[:, None]], 1)
        with torch.no_grad():
            back, log_q = surjection.inverse(z)
            joint = inner.log_prob(z)
            draws = flow.log_prob(x.new_full((20000, 1), value))
        assert torch.equal(back, x) and abs(log_q.exp().sum() * step - 1) < 1e-6
        bound = (log_q.exp() * (joint - log_q)).sum() * step
        exact = (joint.exp().sum() * step).log()
        assert bound < exact and abs(draws.mean() - bound) < 4 * draws.std() / math.sqrt(20000)
    assert flow.sample(3).shape == (3, 1) and flows.transform.noise_shape(surjection, (1, 4)) == (2, 4)


def test_a_flow_with_its_own_dequantisation():
    inner = scattered(flows.RealNVP(2, n_layers=2, hidden=(4,)), 0.1)
    flow = flows.Flow(inner.transform, inner.base, flows.VariationalDequantization(noise_flow(2).float(), n_bins=BINS))
    x = torch.randint(0, BINS, (6, 2))
    torch.manual_seed(1)
    bound = flow.log_prob(x)
    torch.manual_seed(1)
    values, contribution = flow.dequantization(x)
    torch.testing.assert_close(bound, inner.log_prob(values) + contribution)
    bits = flow.bits_per_dim(x, BINS, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(bits, flow.bits_per_dim(x.float(), BINS, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(flow.log_prob(values), inner.log_prob(values))
    plain = flows.Flow(inner.transform, inner.base)
    uniform = flows.Flow(inner.transform, inner.base, flows.UniformDequantization(BINS))
    torch.testing.assert_close(*(f.bits_per_dim(x, BINS, generator=torch.Generator().manual_seed(1))
                                 for f in (plain, uniform)))
    with pytest.raises(ValueError, match="^n_bins: expected 4"):
        flow.bits_per_dim(x)


@pytest.mark.parametrize("kind", ["uniform", "variational"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dequantisation_inside_the_transform_counts_as_the_flows_own(kind, dtype):
    """The same figures, gradients and precision as with ``dequantization=``, nothing dequantised twice."""
    surjection = (flows.UniformDequantization(BINS) if kind == "uniform"
                  else flows.VariationalDequantization(noise_flow(2), n_bins=BINS))
    inner = scattered(flows.RealNVP(2, n_layers=2, hidden=(4,)), 0.1)
    layers = flows.Compose(flows.Compose(surjection, flows.Affine(0.5, 2.0)), inner.transform)
    inside = flows.Flow(layers, inner.base).to(dtype)
    beside = flows.Flow(flows.Compose(flows.Affine(0.5, 2.0), inner.transform), inner.base, surjection).to(dtype)
    assert inside.dequantizer is beside.dequantizer is surjection and inner.dequantizer is None
    x = torch.randint(0, BINS, (6, 2))
    bits, losses = [], []
    for flow in (inside, beside):
        torch.manual_seed(1)
        bits.append(flow.bits_per_dim(x, BINS))
        for memory in ("none", "save_z", "invert"):
            step = TrainStep(flow, torch.optim.SGD(flow.parameters(), lr=0.0), memory=memory, n_bins=BINS)
            torch.manual_seed(1)
            losses.append(step(x))
    assert bits[0].dtype == dtype
    torch.testing.assert_close(*bits)
    torch.testing.assert_close(torch.stack(losses), (bits[0].mean() * 2 * math.log(2)).detach().expand(6))
    with pytest.raises(ValueError, match="^n_bins: expected 4"):
        inside.bits_per_dim(x)


def test_a_generator_reaches_what_surjections_draw():
    def twice(function):
        states = torch.get_rng_state()
        found = [function(torch.Generator().manual_seed(2)) for _ in range(2)]
        assert torch.equal(torch.get_rng_state(), states)
        return found

    conditional = flows.ConditionalNormal((1,), MLP(1, 2, (4,)))
    cut = flows.Flow(flows.Compose(flows.Slice(1, conditional)), flows.StandardNormal(1))
    assert torch.equal(*twice(lambda g: cut.sample(5, generator=g)))
    assert torch.equal(*twice(lambda g: cut.sample_and_log_prob(5, generator=g)[1]))
    wide = flows.Flow(flows.Compose(flows.Augment(1, 1, conditional)), flows.StandardNormal(2))
    x = torch.randint(0, BINS, (6, 1))
    assert torch.equal(*twice(lambda g: wide.bits_per_dim(x, BINS, generator=g)))


@pytest.mark.parametrize(("error", "make", "message"), [
    (ValueError, lambda: flows.UniformDequantization(0), "n_bins"),
    (TypeError, lambda: flows.VariationalDequantization(flows.StandardNormal(2)), "noise"),
    (TypeError, lambda: flows.Slice(1, nn.Linear(1, 1)), "decoder"),
    (ValueError, lambda: flows.Slice(0, flows.NICE(2)), "keep"),
    (ValueError, lambda: flows.Slice(2, flows.NICE(2))(torch.zeros(1, 2)), "x"),
    (ValueError, lambda: flows.Slice(2, flows.NICE(2)).inverse(torch.zeros(1, 3)), "z"),
    (ValueError, lambda: flows.Augment(1, 0, flows.NICE(2)), "extra"),
    (ValueError, lambda: flows.Augment(1, 1, flows.NICE(2))(torch.zeros(1, 2)), "x"),
    (ValueError, lambda: flows.Augment(1, 1, flows.NICE(2)).inverse(torch.zeros(1, 3)), "z"),
    (TypeError, lambda: flows.Flow(flows.Reverse(), flows.StandardNormal(2), 256), "dequantization"),
])
def test_errors_name_the_argument(error, make, message):
    with pytest.raises(error, match=f"^{message}: expected"):
        make()
