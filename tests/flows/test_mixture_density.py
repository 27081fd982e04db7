"""Mixtures of conditional bases, whose weights may come from the context."""

import math

import pytest
import torch
from flow_checks import scattered
from torch import distributions as D
from torch import nn

from fastflow import flows


@pytest.mark.parametrize("weighted", [False, True])
def test_a_mixture_density_network(weighted):
    """Against the mixture written out, component by component and context by context."""
    torch.manual_seed(2)
    networks, weights = [nn.Linear(3, 4).double() for _ in range(2)], nn.Linear(3, 3).double() if weighted else None
    fixed = D.Laplace(torch.zeros(2).double(), 1.0)
    base = scattered(flows.Mixture([*(flows.ConditionalNormal(2, n) for n in networks), fixed], weights))
    flow = flows.Flow(flows.Affine(0.0, 2.0), base)
    x, context = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)

    def laws(one, temperature=1.0):
        for network in networks:
            mean, raw = network(one).chunk(2)
            yield D.Independent(D.Normal(mean, temperature * torch.exp(5.0 * torch.tanh(raw / 5.0))), 1)
        yield D.Independent(fixed, 1)

    def log_shares(one):
        return torch.log_softmax(weights(one) if weighted else base.logits, 0)

    want = torch.stack([torch.logsumexp(torch.stack([
        share + law.log_prob(2.0 * value) for share, law in zip(log_shares(one), laws(one), strict=True)]), 0)
        for value, one in zip(x, context, strict=True)]) + 2.0 * math.log(2.0)
    torch.testing.assert_close(flow.log_prob(x, context), want)
    gradients = [torch.autograd.grad(value.sum(), list(base.parameters())) for value in
                 (flow.log_prob(x, context), want)]
    torch.testing.assert_close(*gradients)

    samples, log_prob = flow.sample_and_log_prob(20_000, context)
    torch.testing.assert_close(log_prob[5], flow.log_prob(samples[5], context))
    for index, one in enumerate(context):
        shares, parts = log_shares(one).exp(), list(laws(one))
        mean = sum(share * law.mean for share, law in zip(shares, parts, strict=True))
        square = sum(share * (law.variance + law.mean**2) for share, law in zip(shares, parts, strict=True))
        drawn = 2.0 * samples[:, index]
        error = (square - mean**2).sqrt() / 20_000**0.5
        assert ((drawn.mean(0) - mean).abs() < 4.5 * error).all()
        torch.testing.assert_close(drawn.square().mean(0), square, rtol=0.1, atol=0.0)
    assert torch.equal(flow.sample(2, context, generator=torch.Generator().manual_seed(3)),
                       flow.sample(2, context, generator=torch.Generator().manual_seed(3)))
    assert flow.as_distribution(context).sample((2,)).shape == (2, 4, 2)


def test_a_mixture_density_network_s_temperature_and_dtype():
    base = flows.Mixture([flows.ConditionalNormal(2, nn.Linear(3, 4)) for _ in range(2)], nn.Linear(3, 2))
    context, z = torch.randn(5, 3), torch.randn(5, 2)
    means = torch.stack([b.network(context)[:, :2] for b in base.components])
    still = base.sample(5, context=context, temperature=0.0)
    assert torch.isclose(still, means).all(-1).any(0).all()
    shares = torch.log_softmax(base.weights(context), 1).T
    each = torch.stack([b.log_prob(z, 0.7, context=context) for b in base.components])
    torch.testing.assert_close(base.log_prob(z, 0.7, context=context), torch.logsumexp(shares + each, 0))
    assert base.double().sample(5, context=context.double()).dtype == torch.float64
    assert base.sample(0, context=context[:0].double()).shape == (0, 2)
