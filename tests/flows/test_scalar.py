"""Scalar bijections: inverse, log|f'|, both log-dets, gradients, domain and codomain; densities that integrate to 1."""

import math

import pytest
import torch
from torch import distributions as D

from fastflow import flows

TRANSFORMS = {
    "affine": lambda: flows.Affine(0.3, -1.7),
    "affine of tensors": lambda: flows.Affine(torch.tensor([0.5, -1.0]), torch.tensor(-0.25)),
    "exp": flows.Exp, "log": flows.Log, "softplus": flows.Softplus, "sigmoid": flows.Sigmoid,
    "logit": flows.Logit, "logit 0.05": lambda: flows.Logit(0.05), "tanh": flows.Tanh, "atan": flows.Atan,
    "square": lambda: flows.Power(2), "root": lambda: flows.Power(0.5), "reciprocal": lambda: flows.Power(-1),
    "leaky relu": lambda: flows.LeakyReLU(0.2), "leaky relu above 1": lambda: flows.LeakyReLU(3.0),
    "cdf of a normal": lambda: flows.CDF(D.Normal(torch.tensor(0.5).double(), torch.tensor(1.3).double())),
    "cdf of a gamma": lambda: flows.CDF(D.Gamma(torch.tensor(2.5).double(), torch.tensor(1.5).double())),
    "quantile of a normal": lambda: flows.Quantile(D.Normal(torch.tensor(0.5).double(), torch.tensor(1.3).double())),
    "quantile of a laplace": lambda: flows.Quantile(D.Laplace(torch.zeros(()).double(), torch.ones(()).double())),
}
SIZES = ((1, 1), (5, 2), (3, 4, 2))
every_transform = pytest.mark.parametrize("name", TRANSFORMS)


def inside(transform, shape, seed):
    """Points of the domain, spread over it."""
    u = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 0.98 + 0.01
    low, high = domain(transform)
    if math.isinf(low) and math.isinf(high):
        return D.Normal(0.0, 2.0).icdf(u)
    return low - torch.log(u) * 1.5 if math.isinf(high) else low + (high - low) * u


def domain(transform):
    if isinstance(transform, flows.Quantile):
        return 0.0, 1.0
    if isinstance(transform, flows.CDF):
        return (0.0, math.inf) if isinstance(transform.distribution, D.Gamma) else (-math.inf, math.inf)
    return transform.domain


@every_transform
def test_inverse_and_log_determinants_at_sizes_and_seeds(name):
    transform = TRANSFORMS[name]().double()
    for shape in SIZES[1:] if "tensors" in name else SIZES:
        for seed in range(20):
            x = inside(transform, shape, seed).requires_grad_()
            z, logdet = transform(x)
            back, opposite = transform.inverse(z)
            torch.testing.assert_close(back, x, rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(opposite, -logdet, rtol=1e-7, atol=1e-7)
            assert logdet.shape == shape[:1]
            (slope,) = torch.autograd.grad(z.sum(), x, retain_graph=True)  # a diagonal Jacobian
            torch.testing.assert_close(slope.abs().log().flatten(1).sum(1), logdet, rtol=1e-9, atol=1e-9)


@every_transform
def test_gradcheck_both_ways(name):
    transform = TRANSFORMS[name]().double()
    x = inside(transform, (2, 2), 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: transform(t), x)
    z = transform(x)[0].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: transform.inverse(t), z)


@every_transform
def test_outside_is_minus_infinity_and_never_nan(name):
    transform = TRANSFORMS[name]()
    low, high = domain(transform)
    for edge, step in ((low, -1.0), (high, 1.0)):
        if math.isinf(edge):
            continue
        x = torch.full((3, 2), edge + step, dtype=torch.float64)
        x[2] = inside(transform, (2,), 0)
        x.requires_grad_()
        z, logdet = transform(x)
        assert torch.isneginf(logdet[:2]).all() and torch.isfinite(logdet[2]) and torch.isfinite(z).all()
        (grad,) = torch.autograd.grad(logdet[2] + z.sum() + torch.where(logdet > -math.inf, logdet, 0.0).sum(), x)
        assert torch.isfinite(grad).all() and not grad[:2].any()
    x = inside(transform, (2, 2), 0)
    x[0, 1] = math.nan
    z, logdet = transform(x)
    total = logdet + z.sum(1)  # a constant slope needs no look at x
    assert z[0, 1].isnan() and total[0].isnan() and not total[1].isnan()


@every_transform
def test_the_codomain_is_where_the_inverse_lives(name):
    transform = TRANSFORMS[name]()
    of_cdf = (0.0, 1.0) if isinstance(transform, flows.CDF) else (-math.inf, math.inf)
    low, high = getattr(transform, "codomain", of_cdf)
    z = transform(inside(transform, (4, 2), 1))[0]
    assert ((z > low) & (z < high)).all()
    for edge, step in ((low, -0.5), (high, 0.5)):
        if not math.isinf(edge):
            assert torch.isneginf(transform.inverse(torch.full((1, 2), edge + step, dtype=torch.float64))[1])


def integral(flow, low, high, n=400_001):
    x = torch.linspace(low, high, n, dtype=torch.float64)
    return torch.trapezoid(flow.log_prob(x[:, None]).exp(), x).item()


N01, U01 = flows.StandardNormal(1), D.Uniform(torch.zeros(1).double(), torch.ones(1).double())
DENSITIES = {
    "log-normal": (flows.Log(), N01, (1e-9, 3000.0)), "logit-normal": (flows.Logit(), N01, (1e-9, 1 - 1e-9)),
    "softplus of a normal": (flows.Inverse(flows.Softplus()), N01, (1e-12, 12.0)),
    "tanh of a normal": (flows.Inverse(flows.Tanh()), N01, (-1 + 1e-9, 1 - 1e-9)),
    "atan of a normal": (flows.Inverse(flows.Atan()), N01, (-math.pi / 2 + 1e-9, math.pi / 2 - 1e-9)),
    "log of an exponential": (flows.Exp(), D.Exponential(torch.ones(1).double()), (-40.0, 5.0)),
    "cube root of a gamma": (flows.Power(3), D.Gamma(torch.full((1,), 2.0).double(), torch.ones(1).double()),
                             (1e-9, 5.0)),
    "leaky normal": (flows.LeakyReLU(0.3), N01, (-40.0, 10.0)),
    "affine uniform": (flows.Affine(1.0, -2.0), U01, (-1.0, 2.0)),
    "normal through its cdf": (flows.CDF(D.Normal(torch.ones(1).double(), 2.0)), U01, (-15.0, 17.0)),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_densities_integrate_to_one(name):
    transform, base, (low, high) = DENSITIES[name]
    assert integral(flows.Flow(transform, base).double(), low, high) == pytest.approx(1.0, abs=2e-4)


def test_exp_of_a_uniform():
    """z ~ U(0, 2) through exp has density 1/(2x) on [1, e^2] and -inf outside."""
    flow = flows.Flow(flows.Log(), D.Uniform(torch.zeros(1).double(), torch.full((1,), 2.0).double()))
    x = torch.linspace(1.001, math.exp(2) - 0.001, 50, dtype=torch.float64)[:, None]
    torch.testing.assert_close(flow.log_prob(x), -torch.log(2 * x[:, 0]), rtol=1e-12, atol=1e-12)
    outside = torch.tensor([[-1.0], [0.0], [0.5], [0.999], [7.4], [100.0]], dtype=torch.float64)
    assert torch.isneginf(flow.log_prob(outside)).all()
    assert integral(flow, 0.5, 8.0, 2_000_001) == pytest.approx(1.0, abs=1e-5)


def test_scaling_a_normal():
    flow = flows.Flow(flows.Affine(0.0, 0.5), N01).double()
    x = torch.randn(20, 1, dtype=torch.float64)
    torch.testing.assert_close(flow.log_prob(x), D.Normal(0.0, 2.0).log_prob(x)[:, 0])


@pytest.mark.parametrize("transform", [flows.Tanh(), flows.Sigmoid(), flows.Softplus(), flows.Atan()], ids=repr)
def test_log_slopes_far_out_do_not_underflow(transform):
    """The log-determinant comes from x, never from the logarithm of a slope that has rounded to zero."""
    x = torch.tensor([[-200.0], [-30.0], [30.0], [200.0]])
    got, want = transform(x)[1], transform(x.double())[1]
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    assert torch.isfinite(flows.Atan()(torch.tensor([[1e30]]))[1]).all()


def test_log_one_plus_square_keeps_small_arguments():
    x = torch.tensor([[1e-4], [1e-3], [0.5], [2.0]])
    torch.testing.assert_close(flows.Atan()(x)[1].double(), -torch.log1p(x.double() ** 2)[:, 0], rtol=3e-7, atol=0)


def test_a_quantile_without_icdf_has_the_implicit_gradient():
    """dx/dz = 1/p(x), and dx/dparameter = -(dF/dparameter)/p(x), against finite differences."""
    z = torch.tensor([[0.1], [0.5], [0.93]], dtype=torch.float64)
    rate = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def x_of(z, rate):
        return flows.Quantile(D.Gamma(torch.tensor(2.5, dtype=torch.float64), rate))(z)[0]

    assert torch.autograd.gradcheck(x_of, (z.requires_grad_(), rate))
    assert torch.autograd.gradgradcheck(x_of, (z, rate))
    torch.testing.assert_close(D.Gamma(2.5, 1.5).cdf(x_of(z, rate).detach()), z.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("call", "error", "match"), [
    (lambda: flows.Power(0), ValueError, "exponent"), (lambda: flows.Power("2"), TypeError, "exponent"),
    (lambda: flows.LeakyReLU(-1.0), ValueError, "negative_slope"), (lambda: flows.Logit(0.5), ValueError, "alpha"),
    (lambda: flows.Affine(0.0, 0.0), ValueError, "scale"),
    (lambda: flows.Affine(torch.zeros(3))(torch.zeros(2, 1)), ValueError, "x"),
    (lambda: flows.CDF(D.Poisson(1.0)), TypeError, "distribution"),
    (lambda: flows.CDF(D.Beta(1.0, 2.0)), TypeError, "cdf"), (lambda: flows.CDF(3), TypeError, "distribution"),
    (lambda: flows.Exp()(torch.tensor(1.0)), ValueError, "x"), (lambda: flows.Log()([1.0]), TypeError, "x")])
def test_refusals(call, error, match):
    with pytest.raises(error, match=match):
        call()


SATURATING = {"sigmoid": (flows.Sigmoid(), 0.0, 1.0), "tanh": (flows.Tanh(), -1.0, 1.0),
              "atan": (flows.Atan(), -math.pi / 2, math.pi / 2), "logit": (flows.Inverse(flows.Logit()), 0.0, 1.0),
              "logit 0.05": (flows.Inverse(flows.Logit(0.05)), -0.05 / 0.9, 0.95 / 0.9),
              "cdf": (flows.CDF(D.Exponential(torch.tensor(1.0))), 0.0, 1.0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", SATURATING)
def test_images_that_round_to_an_end_stay_inside(name, dtype):
    """A sigmoid of 50 is 1 in any dtype, where the inverse would have no value and the density be zero."""
    transform, low, high = SATURATING[name]
    x = torch.tensor([50.0, 1e30] if name == "cdf" else [-1e30, 50.0, 1e30], dtype=dtype)[:, None]
    z, logdet = transform(x)
    assert ((z > low) & (z < high)).all() and torch.isfinite(logdet).all()
    back, opposite = transform.inverse(z)
    assert torch.isfinite(back).all() and torch.isfinite(opposite).all()
    assert (torch.sign(back) == torch.sign(x)).all()
    if dtype != torch.bfloat16:
        uniform = D.Uniform(torch.tensor([low], dtype=dtype), torch.tensor([high], dtype=dtype), validate_args=False)
        torch.testing.assert_close(flows.Flow(transform, uniform).log_prob(x), logdet - math.log(high - low))


def test_samples_of_a_saturated_flow_have_a_density():
    flow = flows.Flow(flows.Compose(flows.Logit(), flows.Affine(0.0, 0.02)), flows.StandardNormal(2))
    x = flow.sample(200, generator=torch.Generator().manual_seed(0))
    assert ((x > 0) & (x < 1)).all() and torch.isfinite(flow.log_prob(x)).all()


def test_quantiles_near_the_ends():
    flow = flows.Flow(flows.Quantile(D.Normal(torch.tensor(0.0), torch.tensor(1.0))), flows.StandardNormal(1))
    x = torch.tensor([[1e-9], [1e-12], [1e-30], [0.5]], requires_grad=True)
    log_prob = flow.log_prob(x)  # of a uniform law, as far as torch's icdf goes
    torch.testing.assert_close(log_prob[[0, 1, 3]], torch.zeros(3), rtol=0, atol=1e-4)
    assert torch.isneginf(log_prob[2])
    assert torch.isfinite(torch.autograd.grad(log_prob[[0, 3]].sum(), x)[0]).all()


def test_infinite_values_have_no_density():
    x = torch.tensor([[math.inf], [-math.inf]])
    for transform, base in ((flows.Exp(), D.Exponential(torch.ones(1))), (flows.Compose(), flows.StandardNormal(1)),
                            (flows.Compose(), D.Gamma(torch.full((1,), 2.0), torch.ones(1)))):
        assert torch.isneginf(flows.Flow(transform, base).log_prob(x)).all()


@pytest.mark.parametrize("way", ["forward", "inverse"])
@every_transform
def test_outside_is_minus_infinity_under_a_base_with_poles(name, way):
    """A density that is infinite at 0 and 1: what stands in for a point outside must not be carried there."""
    transform = TRANSFORMS[name]() if way == "forward" else flows.Inverse(TRANSFORMS[name]())
    for base in (D.Beta(torch.tensor(0.5).double(), torch.tensor(0.5).double()),
                 D.Gamma(torch.tensor(0.5).double(), torch.tensor(1.0).double())):
        flow = flows.Flow(transform, base.expand((2,)))
        x = torch.tensor([-math.inf, -1e30, -1.0, 1.5, 1e30, math.inf], dtype=torch.float64)
        values = flow.log_prob(x[:, None].expand(-1, 2))
        assert not values.isnan().any() and values[[0, 5]].eq(-math.inf).all()


@pytest.mark.parametrize("base", [
    D.Gamma(torch.tensor([0.5, 0.5]), 1.0), D.Independent(D.Gamma(torch.tensor([0.5, 0.5]), 1.0), 1),
    flows.Mixture([D.Gamma(torch.tensor([0.5, 0.5]), 1.0), D.Gamma(torch.tensor([0.5, 0.7]), 1.0)])],
                         ids=lambda base: type(base).__name__)
def test_outside_is_minus_infinity_beside_a_pole_of_the_base(base):
    nan = float("nan")
    flow = flows.Flow(flows.Log(), base)  # log 1 = 0, where the density is infinite
    found = flow.log_prob(torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, 2.0], [nan, -1.0], [1.0, nan]]))
    assert found[:3].tolist() == [-math.inf, -math.inf, math.inf] and found[3:].isnan().all()
    law = D.Gamma(0.5, 1.0)
    flow = flows.Flow(flows.CDF(law), D.Uniform(torch.zeros(2), 1.0))
    found = flow.log_prob(torch.tensor([[0.0, -1.0], [0.0, 1.0], [2.0, 1.0], [nan, -1.0]]))
    assert found[:2].tolist() == [-math.inf, math.inf] and found[3].isnan()
    torch.testing.assert_close(found[2], law.log_prob(torch.tensor([2.0, 1.0])).sum())
