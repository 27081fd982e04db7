"""Objects of torch.distributions as bases: precision and temperature."""

import pytest
import torch
from torch import distributions as D
from torch._subclasses import FakeTensorMode

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


@pytest.mark.parametrize("through", ["base", "CDF", "Quantile"])
@pytest.mark.parametrize("name", LAWS)
def test_the_host_waits_for_no_value(name, through):
    """Else a CUDA graph could not hold it. The arguments of torch's laws are checked by default."""
    law = LAWS[name](torch.zeros(2))
    if law.event_shape and through != "base":
        pytest.skip("no law of numbers")
    base = law if through == "base" else flows.StandardNormal(2)
    inner = [] if through == "base" else [getattr(flows, through)(law)]
    flow = flows.Flow(flows.Compose(flows.Planar(2), *inner), base)
    with FakeTensorMode(allow_non_fake_inputs=True):
        flow(torch.empty(3, 2)).sum().backward()  # a fake value that is asked for raises


class Untold(D.Distribution):
    """A law that does not tell its support."""

    arg_constraints = {}
    has_rsample = True

    def __init__(self, law):
        super().__init__(law.batch_shape, law.event_shape, validate_args=False)
        self.rsample, self.log_prob = law.rsample, law.log_prob


@pytest.mark.parametrize("name", ["normal", "independent", "multivariate", "flow"])
def test_a_law_without_a_support_is_one_over_all_real_numbers(name):
    law = flows.Mixture([flows.DiagonalNormal(2)] * 2)
    law = flows.Flow(flows.Reverse(), law).as_distribution() if name == "flow" else LAWS[name](torch.zeros(2))
    z = torch.tensor([[0.3, -0.4], [1.0, torch.nan], [-torch.inf, 2.0]])
    told, untold = (as_base(each).log_prob(z) for each in (law, Untold(law)))
    torch.testing.assert_close(untold, told, rtol=0, atol=0, equal_nan=True)
    assert torch.isneginf(untold).tolist() == [False, False, True]
    flow = flows.Flow(flows.Affine(0.0, 2.0), Untold(law))
    x, log_prob = flow.sample_and_log_prob(4)
    torch.testing.assert_close(flow.log_prob(x), log_prob)


def test_a_mixture_and_a_flow_of_zuko_as_bases():
    zuko = pytest.importorskip("zuko", reason="zuko is not installed")
    components = D.Independent(D.Normal(torch.tensor([[-1.0, 0.0], [1.0, 2.0]]), 1.0), 1)
    x = torch.randn(4, 2)
    for law in (zuko.distributions.Mixture(components, torch.zeros(2)), zuko.flows.NSF(2, transforms=1)()):
        torch.testing.assert_close(flows.Flow(flows.Reverse(), law).log_prob(x), law.log_prob(x.flip(1)))
