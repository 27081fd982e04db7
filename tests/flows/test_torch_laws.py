"""Objects of torch.distributions as bases: precision and temperature."""

import pytest
import torch
from torch import distributions as D

from fastflow import flows
from fastflow.flows.base import as_base, seeded
from fastflow.nn import MLP, AffineCoupling

LAWS = {
    "normal": lambda zero: D.Normal(zero, 2.0 + zero), "gumbel": lambda zero: D.Gumbel(zero, 1.0 + zero),
    "independent": lambda zero: D.Independent(D.Normal(1.0 + zero, 2.0 + zero), 1),
    "multivariate": lambda zero: D.MultivariateNormal(1.0 + zero, torch.diag(zero + 4.0)),
    "gamma": lambda zero: D.Gamma(1.5 + zero, 1.0 + zero), "log-normal": lambda zero: D.LogNormal(zero, 1.0 + zero),
    "mixture": lambda zero: D.MixtureSameFamily(D.Categorical(0.5 + zero), D.Normal(zero, 1.0 + zero)),
}


@pytest.mark.parametrize("name", LAWS)
def test_a_law_of_torch_in_float64_is_the_law_with_parameters_in_float64(name):
    single, double = (LAWS[name](torch.zeros(2, dtype=dtype)) for dtype in (torch.float32, torch.float64))
    anchor = torch.zeros((), dtype=torch.float64)
    draws = as_base(single, anchor).sample(3, generator=torch.Generator().manual_seed(1))
    want = as_base(double).sample(3, generator=torch.Generator().manual_seed(1))
    assert draws.dtype == torch.float64 and (draws != draws.float()).any()
    torch.testing.assert_close(draws, want, rtol=1e-6, atol=1e-6)  # Gumbel's edges of a uniform law are float32's
    torch.testing.assert_close(as_base(single).log_prob(want), as_base(double).log_prob(want), rtol=1e-14, atol=0)
    for base in (as_base(single), as_base(single, anchor.float())):  # else as they were
        draws = base.sample(3, generator=torch.Generator().manual_seed(1))
        with seeded(torch.Generator().manual_seed(1)):
            assert torch.equal(draws, single.sample((3,))) and draws.dtype == torch.float32
        assert base.log_prob(draws).dtype == torch.float32
    if draws.dim() > 1:
        mixture = flows.Mixture([single, single])
        assert mixture.sample(2).dtype == torch.float32 and mixture.double().sample(2).dtype == torch.float64


def test_a_widened_law_has_the_gradients_of_its_parameters():
    scale = torch.tensor([1.0, 2.0], requires_grad=True)
    draws = as_base(D.LogNormal(torch.zeros(2), scale), torch.zeros((), dtype=torch.float64)).sample(3)
    assert (torch.autograd.grad(draws.sum(), scale)[0] != 0).all()


@pytest.mark.parametrize("name", ["normal", "independent", "multivariate"])
def test_temperature_of_gaussian_laws_of_torch(name):
    law = LAWS[name](torch.zeros(2))
    flow = flows.Flow(flows.Reverse(), law)
    hot, warm = (flow.sample(4, generator=torch.Generator().manual_seed(1), temperature=t) for t in (1.0, 0.5))
    torch.testing.assert_close(warm - law.mean, 0.5 * (hot - law.mean))
    assert torch.equal(flow.sample(4, temperature=0.0), law.mean.expand(4, 2))
    x, log_prob = flow.sample_and_log_prob(3, temperature=0.5)
    torch.testing.assert_close(log_prob, D.Normal(law.mean, 1.0).log_prob(x).sum(1))


@pytest.mark.parametrize("law", [D.Laplace(torch.zeros(2), 1.0), D.Independent(D.Gamma(torch.ones(2), 1.0), 1)],
                         ids=lambda law: type(law).__name__)
def test_other_laws_refuse_a_temperature_by_name(law):
    with pytest.raises(ValueError, match=f"temperature: expected 1 for a base of type {type(law).__name__}, got 0.5"):
        flows.Flow(flows.Exp(), law).sample(3, temperature=0.5)


@pytest.mark.parametrize("parameters", [True, False])
def test_a_flow_gives_float64_behind_double(parameters):
    transform = AffineCoupling(MLP(1, 2)) if parameters else flows.LeakyReLU(0.1)
    flow = flows.Flow(transform, D.Normal(torch.zeros(2), 2.0 * torch.ones(2)))
    single = flow.sample(3, generator=torch.Generator().manual_seed(1))
    assert single.dtype == torch.float32 and flow.log_prob(single).dtype == torch.float32
    assert flow.state_dict().keys() == transform.state_dict(prefix="transform.").keys()
    flow.double()
    x, log_prob = flow.sample_and_log_prob(3, generator=torch.Generator().manual_seed(1))
    assert x.dtype == log_prob.dtype == torch.float64
    torch.testing.assert_close(x.float(), single)
    torch.testing.assert_close(flow.log_prob(x), log_prob, rtol=1e-12, atol=1e-12)
    assert flow.float().sample(3).dtype == torch.float32
