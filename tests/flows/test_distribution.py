"""Flows as torch.distributions objects: shapes, contexts, expansions, supports."""

import math
import pickle

import pytest
import torch
from flow_checks import scattered
from torch import nn

from fastflow import flows
from fastflow.nn import ActNorm, AffineCoupling


def test_as_distribution():
    flow = scattered(flows.RealNVP(3, n_layers=2, hidden=(4,), context_features=2))
    context = torch.randn(4, 2)
    distribution = flow.as_distribution(context)
    assert isinstance(distribution, torch.distributions.Distribution)
    assert distribution.batch_shape == (4,) and distribution.event_shape == (3,)
    x = distribution.rsample((2, 5))
    assert x.shape == (2, 5, 4, 3) and x.requires_grad and not distribution.sample().requires_grad
    log_prob = distribution.log_prob(x)
    assert log_prob.shape == (2, 5, 4) and distribution.log_prob(x[0, 0, 0]).shape == (4,)
    torch.testing.assert_close(log_prob[1, 2], flow.log_prob(x[1, 2], context))
    plain = flows.Flow(flows.Squeeze(), flows.StandardNormal((4, 2, 2))).as_distribution()
    assert plain.event_shape == (1, 4, 4) and plain.sample((3,)).shape == (3, 1, 4, 4)
    assert plain.log_prob(plain.sample()).shape == ()


@pytest.mark.parametrize("base", [torch.distributions.Normal(0.0, 1.0), flows.StandardNormal(())], ids=["torch", "own"])
def test_as_distribution_of_numbers(base):
    distribution, law = flows.Flow(flows.Log(), base).as_distribution(), torch.distributions.LogNormal(0.0, 1.0)
    assert distribution.support.check(torch.tensor(0.5)) and not distribution.support.check(torch.tensor(-0.5))
    assert distribution.batch_shape == distribution.event_shape == ()
    for shape in ((), (4,), (2, 3)):
        x = distribution.sample(shape)
        assert x.shape == shape
        torch.testing.assert_close(distribution.log_prob(x), law.log_prob(x))
    assert distribution.expand((3,)).sample((2,)).shape == (2, 3)


@pytest.mark.parametrize(("transform", "inside", "outside"), [
    (flows.Log(), 3.0, 0.0), (flows.Inverse(flows.Exp()), 3.0, -1.0), (flows.Logit(), 0.4, 1.2),
    (flows.Compose(flows.Compose(flows.Logit()), ActNorm(2)), 0.4, -0.2), (flows.Exp(), -3.0, math.nan),
    (flows.Inverse(flows.Compose(flows.RealNVP(2).transform, flows.Exp())), 3.0, -1.0),
    (flows.Compose(flows.Inverse(flows.Inverse(flows.Compose(flows.Logit(), flows.Exp())))), 0.4, -0.2),
    (flows.RealNVP(2).transform, -3.0, math.nan)])
def test_the_support_is_the_domain_of_what_comes_first(transform, inside, outside):
    law = flows.Flow(transform, flows.StandardNormal((2,))).as_distribution()
    assert law.support.event_dim == 1 and law.support.check(law.sample((50,))).all()
    for value, wanted in ((inside, True), (outside, False)):
        assert law.support.check(torch.full((2,), value)) == wanted
    u = torch.randn(2)
    x = torch.distributions.biject_to(law.support)(u)
    assert law.support.check(x) and law.log_prob(x).isfinite()


class Strict(flows.StandardNormal):
    """A base that takes no generator, and counts its draws."""

    draws = 0

    def sample(self, n):
        self.draws += 1
        return super().sample(n)


class Doubled(nn.Module):
    """A transform that has more noise than data, and does not say so."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x, context=None):
        return torch.cat([x, x], 1), x.new_zeros(len(x))

    def inverse(self, z, context=None):
        return self.norm(z[:, :2]), z.new_zeros(len(z))


def normed():
    return AffineCoupling(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)))


SHAPES = {"normed": (normed, 4, 0), "undeclared": (Doubled, 4, 1), "both ways": (
              lambda: flows.Inverse(flows.Inverse(flows.Compose(flows.Squeeze()))), (4, 1, 1), 0),
          "drawn": (lambda: flows.Slice(2, flows.ConditionalNormal(3, nn.Linear(2, 6))), 2, 1),
          "sliced": (lambda: flows.Inverse(flows.Slice(2, flows.ConditionalNormal(3, nn.Linear(2, 6)))), 5, 0),
          "augmented": (lambda: flows.Augment(2, 3, flows.ConditionalNormal(3, nn.Linear(2, 6))), 5, 0)}


@pytest.mark.parametrize("name", SHAPES)
def test_the_shape_of_the_data_costs_a_draw_only_where_nothing_tells_it(name):
    make, shape, draws = SHAPES[name]
    flow = flows.Flow(make(), Strict(shape)).train()
    frozen = [m for m in flow.modules() if isinstance(m, nn.Linear)]
    for module in frozen:
        module.eval()
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in flow.state_dict().items()}
    law = flow.as_distribution()
    assert torch.equal(torch.get_rng_state(), before) and flow.base.draws == draws
    assert all(torch.equal(v, state[k]) for k, v in flow.state_dict().items())
    assert all(module.training != (module in frozen) for module in flow.modules())
    assert law.event_shape == flow.eval().sample(1).shape[1:]


@pytest.mark.parametrize("conditional", [False, True])
def test_expanded_distributions(conditional):
    """Further batch dimensions: each of them draws its own, under its context."""
    flow = scattered(flows.RealNVP(3, n_layers=2, hidden=(4,), context_features=2 if conditional else None)).double()
    context = torch.randn(4, 2, dtype=torch.float64) if conditional else None
    wide = flow.as_distribution(context).expand((5, 4)).expand((2, 5, 4))
    assert wide.batch_shape == (2, 5, 4) and wide.event_shape == (3,)
    x = wide.sample((6,))
    assert x.shape == (6, 2, 5, 4, 3) and len(x.view(-1, 3).unique(dim=0)) == 240
    log_prob = wide.log_prob(x)
    assert log_prob.shape == (6, 2, 5, 4)
    torch.testing.assert_close(log_prob[3, 1, 2], flow.log_prob(x[3, 1, 2], context))
    torch.testing.assert_close(wide.log_prob(x[0, 0, 0]), log_prob[0, 0, 0].expand(2, 5, 4))
    assert torch.distributions.Independent(wide, 2).log_prob(x).shape == (6, 2)
    if conditional:
        with pytest.raises(RuntimeError):
            flow.as_distribution(context).expand((5,))
        with pytest.raises(ValueError, match="^value: expected a shape that broadcasts"):
            flow.as_distribution(context).log_prob(torch.zeros(5, 3, dtype=torch.float64))


def test_it_can_be_pickled_where_pyro_is_imported_too():
    pytest.importorskip("pyro", reason="Pyro is not installed")
    given = flows.RealNVP(3, n_layers=2, hidden=(4,), context_features=2).as_distribution(torch.randn(5, 2))
    again, x = pickle.loads(pickle.dumps(given)), torch.randn(5, 3)
    assert type(again) is type(given) and again.batch_shape == (5,) and again.event_shape == (3,)
    torch.testing.assert_close(again.log_prob(x), given.log_prob(x))


def test_pyros_plates_expand():
    pyro = pytest.importorskip("pyro", reason="Pyro is not installed")
    flow, x = scattered(flows.RealNVP(2, n_layers=2, hidden=(4,))), torch.randn(7, 2)

    def model(seen=None):
        with pyro.plate("data", 7):
            return pyro.sample("x", flow.as_distribution(), obs=seen)

    total = pyro.poutine.trace(model).get_trace(x).log_prob_sum()
    torch.testing.assert_close(total, flow.log_prob(x).sum())
    assert model().shape == (7, 2)
