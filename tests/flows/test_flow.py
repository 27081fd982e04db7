"""Flow: densities, samples, contexts, scalar bijections, images."""

import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from fastflow import flows
from fastflow.nn import MLP, ActNorm, AffineCoupling


def scattered(module, size=0.5):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return module


def integral(flow, half_width, n, context=None):
    """The integral of the density over a grid of n points a side."""
    axis = torch.linspace(-half_width, half_width, n, dtype=torch.float64)
    points = torch.cartesian_prod(*[axis] * flow.features).reshape(-1, flow.features)
    with torch.no_grad():
        values = flow.log_prob(points, None if context is None else context.expand(len(points), -1))
    return values.exp().sum() * (axis[1] - axis[0]) ** flow.features


@pytest.mark.parametrize(("features", "n"), [(1, 4001), (2, 601)])
def test_density_integrates_to_one(features, n):
    flow = scattered(flows.RealNVP(features, n_layers=4, hidden=(8,), activation=nn.Tanh).double(), 0.2)
    assert abs(integral(flow, 24, n) - 1) < 1e-6


def test_realnvp_starts_as_the_identity():
    x = torch.randn(5, 3)
    expected = torch.distributions.Normal(0, 1).log_prob(x).sum(1)
    torch.testing.assert_close(flows.RealNVP(3)(x), expected)


def test_samples_follow_the_density():
    """The mean of -log p over the flow's own samples is its entropy, also found by quadrature."""
    flow = scattered(flows.RealNVP(1, n_layers=2, hidden=(4,)).double())
    x, log_prob = flow.sample_and_log_prob(20000)
    torch.testing.assert_close(log_prob, flow.log_prob(x))
    axis = torch.linspace(-30, 30, 6001, dtype=torch.float64)[:, None]
    with torch.no_grad():
        values = flow.log_prob(axis)
        entropy = -(values.exp() * values).sum() * 0.01
    assert abs(-log_prob.mean() - entropy) < 4 * log_prob.std() / math.sqrt(20000)


@pytest.mark.parametrize("name", ["sample", "rsample", "sample_and_log_prob"])
def test_shapes_gradients_and_generators(name):
    flow = scattered(flows.RealNVP(3, n_layers=2, hidden=(4,), context_features=2))
    context = torch.randn(5, 2, requires_grad=True)
    draw = getattr(flow, name)

    def both(*args, **kwargs):
        out = draw(*args, **kwargs)
        return out if isinstance(out, tuple) else (out, None)

    x, log_prob = both(4, context)
    assert x.shape == (4, 5, 3) and x.requires_grad == (name != "sample")
    if log_prob is not None:
        assert log_prob.shape == (4, 5)
        repeated = context.repeat(4, 1)
        torch.testing.assert_close(log_prob.flatten(), flow.log_prob(x.flatten(0, 1), repeated))
    if x.requires_grad:
        x.sum().backward()
        assert all(p.grad is not None for p in flow.transform.parameters()) and context.grad is not None
    first, _ = both(2, context, generator=torch.Generator().manual_seed(3))
    state = torch.get_rng_state()
    second, _ = both(2, context, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, second) and torch.equal(state, torch.get_rng_state())
    assert both(0, context)[0].shape == (0, 5, 3)


def test_temperature():
    flow = flows.Flow(ActNorm(2), flows.StandardNormal((2,)))
    z = flow.sample(1000, generator=torch.Generator().manual_seed(0))
    cold = flow.sample(1000, generator=torch.Generator().manual_seed(0), temperature=0.5)
    torch.testing.assert_close(cold, 0.5 * z)
    assert flow.sample(2, temperature=0.0).abs().sum() == 0
    x, log_prob = flow.sample_and_log_prob(3, temperature=2.0)
    torch.testing.assert_close(log_prob, torch.distributions.Normal(0, 2.0).log_prob(x).sum(1))
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature"):
            flow.sample(1, temperature=bad)
    with pytest.raises(ValueError, match="temperature"):
        flow.sample_and_log_prob(1, temperature=0)


def test_context_changes_the_density():
    flow = scattered(flows.RealNVP(2, n_layers=3, hidden=(6,), context_features=1, activation=nn.Tanh).double(), 0.2)
    contexts = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    assert all(abs(integral(flow, 24, 601, context) - 1) < 1e-6 for context in contexts)
    points = torch.zeros(2, 2, dtype=torch.float64)
    assert flow(points, contexts).unique().numel() == 2
    with pytest.raises(ValueError, match="context"):
        flow(points)
    with pytest.raises(ValueError, match="context"):
        flows.RealNVP(2)(torch.zeros(3, 2), torch.zeros(3, 1))


def test_log_of_a_uniform():
    """x = exp(z) with z uniform on [0, 2] has density 1/(2x) on [1, e^2], and none outside."""
    flow = flows.Flow(flows.Log(), torch.distributions.Uniform(0.0, 2.0))
    x = torch.tensor([1.5, 4.0, 7.0, 7.5, 0.5, 0.0, -3.0, torch.nan], requires_grad=True)
    expected = torch.tensor([-math.log(3), -math.log(8), -math.log(14), *[-math.inf] * 4, math.nan])
    for shape in ((8,), (8, 1)):
        log_prob = flow.log_prob(x.reshape(shape))
        torch.testing.assert_close(log_prob, expected, equal_nan=True)
    log_prob[:3].sum().backward()
    torch.testing.assert_close(x.grad[:3], -1 / x.detach()[:3])
    assert (x.grad[3:7] == 0).all()
    draws = flow.sample(1000)
    assert draws.shape == (1000,) and draws.min() >= 1 and draws.max() <= math.exp(2)
    axis = torch.linspace(1, math.exp(2), 100001)[:-1]
    assert abs(flow.log_prob(axis + (axis[1] - 1) / 2).exp().sum() * (axis[1] - 1) - 1) < 1e-3


def test_exp_of_a_gamma():
    flow = flows.Flow(flows.Exp(), torch.distributions.Gamma(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 0.5])))
    x = flow.sample(7, generator=torch.Generator().manual_seed(1))
    assert torch.equal(x, flow.sample(7, generator=torch.Generator().manual_seed(1)))
    expected = (flow.base.log_prob(x.exp()) + x).sum(1)
    torch.testing.assert_close(flow.log_prob(x), expected)
    with pytest.raises(ValueError, match="temperature"):
        flow.sample(2, temperature=0.5)


def test_event_distribution_as_base():
    base = torch.distributions.MultivariateNormal(torch.zeros(2), torch.tensor([[2.0, 0.5], [0.5, 1.0]]))
    flow = flows.Flow(flows.Reverse(), base)
    x = flow.sample(5)
    torch.testing.assert_close(flow.log_prob(x), base.log_prob(x.flip(1)))


@pytest.mark.parametrize(("components", "below"), [
    (torch.distributions.Normal(torch.tensor([-1.0, 1.0]), 1.0), False),
    (torch.distributions.Uniform(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])), True),
    (torch.distributions.Independent(torch.distributions.Gamma(torch.ones(2, 3), 1.0), 1), True)],
    ids=["real", "an interval each", "positive vectors"])
def test_mixtures_as_bases(components, below):
    """``below``: whether they have no mass below 0."""
    law = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.tensor([0.3, 0.7])), components)
    flow = flows.Flow(flows.Affine(torch.tensor(1.0), torch.tensor(2.0)), law)
    # Of its samples those in every component's support, where alone torch says that it has a density.
    x = flow.sample(20)
    z, logdet = flow.transform(x)
    inside = law.support.check(z)
    torch.testing.assert_close(flow.log_prob(x)[inside], law.log_prob(z[inside]) + logdet[inside])
    assert inside.any()
    if below:
        outside = torch.full_like(x, -9.0).requires_grad_()
        log_prob = flow.log_prob(outside)
        assert (log_prob == -math.inf).all()
        if log_prob.requires_grad:  # a uniform density doesn't depend on where
            assert torch.autograd.grad(log_prob.sum(), outside)[0].isfinite().all()


def test_a_mixture_s_cdf():
    law = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.tensor([0.3, 0.7])),
                                                torch.distributions.Normal(torch.tensor([-1.0, 1.0]).double(), 1.0))
    transform, x = flows.CDF(law), torch.randn(50, 2, dtype=torch.float64)
    z, logdet = transform(x)
    torch.testing.assert_close(z, law.cdf(x))
    back, inverse = transform.inverse(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse, -logdet)
    weights, low = torch.distributions.Categorical(torch.tensor([0.3, 0.7])), torch.tensor([1.0, 2.0])
    flows.CDF(torch.distributions.MixtureSameFamily(weights, torch.distributions.Gamma(low, 1.0)))
    with pytest.raises(TypeError, match="^distribution: expected a mixture whose components share one support"):
        flows.CDF(torch.distributions.MixtureSameFamily(weights, torch.distributions.Uniform(low, low + 2.0)))


@pytest.mark.parametrize("law", [
    torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), torch.ones(2)), 1),
    torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2)),
    torch.distributions.Normal(torch.zeros(2), 1.0)], ids=lambda law: type(law).__name__)
def test_an_empty_batch_under_a_law_of_torch(law):
    x = torch.zeros(0, 2, requires_grad=True)
    log_prob = flows.Flow(flows.Reverse(), law).log_prob(x)
    assert log_prob.shape == (0,) and torch.autograd.grad(log_prob.sum(), x)[0].shape == (0, 2)


@pytest.mark.parametrize("make", [
    lambda: flows.RealNVP(3, n_layers=2, hidden=(4,), scale="additive"),
    lambda: flows.RealNVPImage((2, 4, 4), 2, 1, 4, 1, alpha=None, scale="additive")], ids=["tabular", "images"])
def test_additive_couplings(make):
    flow = scattered(make().double().eval(), 0.3)
    x = torch.rand(2, *((3,) if isinstance(flow, flows.RealNVP) else (2, 4, 4)), dtype=torch.float64) - 0.5
    z, logdet = flow.transform(x)
    matrix = torch.autograd.functional.jacobian(lambda x: flow.transform(x[None])[0][0], x[0]).reshape(z.shape[1], -1)
    torch.testing.assert_close(logdet[0], torch.linalg.slogdet(matrix)[1])
    torch.testing.assert_close(flow.transform.inverse(z)[0], x)


def test_initialize():
    x = torch.randn(200, 2) * 3 + 5
    flow = flows.Flow(flows.Compose(ActNorm(2), AffineCoupling(MLP(1, 2)), flows.Inverse(ActNorm(2)), ActNorm(2)),
                      flows.StandardNormal((2,)))
    assert flow.initialize(x) is None
    z = flow.transform(x)[0]
    torch.testing.assert_close(z.mean(0), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(2), atol=1e-4, rtol=0)
    flows.Flow(flows.Reverse(), flows.StandardNormal((2,))).initialize(x)


class Uniform:
    """Uniform on [-1/2, 1/2), image by image."""

    def __init__(self, event_shape):
        self.event_shape = event_shape

    def log_prob(self, z, temperature=1.0):
        inside = ((z >= -0.5) & (z < 0.5)).flatten(1).all(1)
        return torch.where(inside, 0.0, -math.inf).to(z.dtype)

    def sample(self, n, *, generator=None, temperature=1.0):
        return torch.rand(n, *self.event_shape, generator=generator) - 0.5


CALLS = {"log_prob": lambda flow: flow.log_prob(torch.randn(3, 3)), "sample": lambda flow: flow.sample(3),
         "rsample": lambda flow: flow.rsample(3), "sample_and_log_prob": lambda flow: flow.sample_and_log_prob(3)}


@pytest.mark.parametrize("name", CALLS)
def test_a_log_determinant_of_another_shape_is_refused(name):
    class Elementwise(torch.nn.Module):
        def forward(self, x, context=None):
            return 2.0 * x, torch.full_like(x, math.log(2.0))

        def inverse(self, z, context=None):
            return 0.5 * z, torch.full_like(z, -math.log(2.0))

    with pytest.raises(ValueError, match=r"transform: expected a log-determinant of shape \(3,\), got \(3, 3\)"):
        CALLS[name](flows.Flow(Elementwise(), flows.StandardNormal(3)))


@pytest.mark.parametrize("name", ["log_prob", "sample_and_log_prob"])
@pytest.mark.parametrize("shape", [(3, 1), (), (1,)])
def test_a_log_density_of_another_shape_is_refused(name, shape):
    class Normal(flows.StandardNormal):
        def log_prob(self, z, temperature=1.0):
            return torch.zeros(shape)

    with pytest.raises(ValueError, match=rf"base: expected a log-density of shape \(3,\), got {re.escape(str(shape))}"):
        CALLS[name](flows.Flow(flows.Affine(0.0, 2.0), Normal(3)))


@pytest.mark.parametrize(("n_bins", "bits"), [(256, 8.0), (32, 5.0), (17, math.log2(17))])
def test_bits_per_dim_of_a_uniform_model(n_bins, bits):
    flow = flows.Flow(flows.Reverse(), Uniform((3, 8, 8)))
    x = torch.randint(0, n_bins, (64, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(flow.bits_per_dim(x, n_bins), torch.full((64,), bits))
    assert flow.bits_per_dim(torch.full_like(x, n_bins - 1), n_bins).isfinite().all()


@pytest.mark.parametrize(("x", "got"), [
    (torch.tensor([0, 32]), "32"), (torch.tensor([-1, 3]), "-1"), (torch.tensor([0.0, 0.5]), "0.5"),
    (torch.tensor([0.0, math.inf]), "inf")])
def test_bits_per_dim_takes_integers_of_so_many_levels(x, got):
    flow = flows.Flow(flows.Reverse(), flows.StandardNormal((1, 1, 2)))
    with pytest.raises(ValueError, match=rf"x: expected integers 0\.\.31, got {got}"):
        flow.bits_per_dim(x.view(1, 1, 1, 2), 32)
    assert flow.bits_per_dim(torch.tensor([[[[math.nan, 3.0]]]]), 32).isnan().all()
    for dtype, n_bins in ((torch.int8, 256), (torch.int16, 65536), (torch.uint16, 65536), (torch.uint32, 256)):
        assert flow.bits_per_dim(torch.tensor([[[[91, 3]]]]).to(dtype), n_bins).isfinite().all()


def test_bits_per_dim_accounting():
    flow = flows.Flow(flows.Reverse(), flows.StandardNormal((1, 2, 2)))
    x = torch.randint(0, 256, (5, 1, 2, 2))
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(2))
    log_prob = flow.log_prob(x / 256 - 0.5 + noise / 256)
    bits = flow.bits_per_dim(x, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(bits, -(log_prob - 4 * math.log(256)) / (4 * math.log(2)))


@pytest.mark.parametrize("layers", [[], [ActNorm(1)]])
def test_constants_of_a_transform_do_not_make_the_data_double(layers):
    """Affine keeps numbers in float64 for either precision; what data the flow takes, its parameters and base say."""
    flow = flows.Flow(flows.Compose(flows.Affine(0.5, 1.0), *layers), flows.StandardNormal((1, 2, 2)))
    x = torch.randint(0, 256, (3, 1, 2, 2))
    assert flow.bits_per_dim(x).dtype == torch.float32
    assert flow.double().bits_per_dim(x).dtype == torch.float64


def test_dequantize_stays_inside():
    for dtype in (torch.float32, torch.float64):
        values = flows.dequantize(torch.full((1 << 18,), 255, dtype=torch.uint8), dtype=dtype)
        assert values.dtype == dtype and values.max() < 0.5 and values.min() >= 255 / 256 - 0.5


@pytest.mark.parametrize(("error", "make", "message"), [
    (TypeError, lambda: flows.Flow(nn.ReLU(), flows.StandardNormal((2,))), "transform"),
    (TypeError, lambda: flows.Flow(flows.Reverse(), nn.ReLU()), "base"),
    (ValueError, lambda: flows.Flow(flows.Reverse(), flows.StandardNormal((2,)))(torch.zeros(1, 3)), "z: expected"),
    (ValueError, lambda: flows.RealNVP(0), "features"),
    (TypeError, lambda: flows.RealNVP("2"), "^features: expected an int, got str"),
    (TypeError, lambda: flows.NSF(2.5), "^features: expected an int, got float"),
    (TypeError, lambda: flows.MAF(2.5), "^features: expected an int, got float"),
    (TypeError, lambda: flows.Planar(True), "^features: expected an int, got bool"),
    (ValueError, lambda: flows.Dense(0), "^channels: expected an int >= 1, got 0"),
    (ValueError, lambda: flows.MAF(2**63), r"^features: expected an int below 2\^63, got 9223372036854775808"),
    (ValueError, lambda: flows.DiagonalScale(-1), "^features: expected an int >= 1, got -1"),
    (ValueError, lambda: flows.DiagonalScale(0), "^features: expected an int >= 1, got 0"),
    *((TypeError, lambda make=make, shape=shape: make(shape), f"^image_shape: expected {expected}")
      for make in (flows.Glow, flows.Jet, flows.TarFlow, flows.RealNVPImage, flows.FlowPP)
      for shape, expected in (((3, 4.0, 4), "an int, got float"), (4, "a sequence of ints, got int"))),
    (ValueError, lambda: flows.Glow((3, 0, 4), 1), "^image_shape: expected an int >= 1, got 0"),
    (ValueError, lambda: flows.RealNVP(2)(torch.zeros(1, 3)), "x: expected"),
    (ValueError, lambda: flows.dequantize(torch.zeros(1), 0), "n_bins"),
    (TypeError, lambda: flows.dequantize(torch.zeros(1), 2.5), "n_bins"),
    (ValueError, lambda: flows.RealNVP(2, hidden=(0,)), "hidden"),
    (ValueError, lambda: flows.NSF(2, context_features=0), "context_features"),
    (ValueError, lambda: flows.RealNVP(2).sample(-1), "n: expected"),
    (TypeError, lambda: flows.RealNVP(2).rsample(2.5), "n: expected"),
    (TypeError, lambda: flows.RealNVP(2).sample_and_log_prob((2, 3)), "n: expected"),
    (TypeError, lambda: flows.RealNVP(2, context_features=2).sample(1, [1.0, 2.0]), "context: expected"),
    (ValueError, lambda: flows.RealNVP(2, context_features=2).sample(1, torch.tensor(1.0)), "context: expected"),
    (ValueError, lambda: flows.NICE(2, context_features=2)(torch.zeros(3, 2), torch.zeros(1, 2)), "^context: expected"),
    (TypeError, lambda: flows.NICE(2, context_features=2)(torch.zeros(3, 2), "context"), "^context: expected"),
    (TypeError, lambda: flows.RealNVP(2).sample(2, generator=5), "^generator: expected"),
    (TypeError, lambda: flows.RealNVP(2).sample(2, temperature="1"), "^temperature: expected"),
    (ValueError, lambda: flows.Glow((1, 4, 4), 1, 1, 4)(torch.tensor(1.0)), "^x: expected"),
    (ValueError, lambda: flows.Planar(2)(torch.tensor(1.0)), "^x: expected"),
    (ValueError, lambda: flows.StandardNormal(2).log_prob(torch.tensor(1.0)), "^z: expected"),
    (ValueError, lambda: flows.StandardNormal(-1), "^event_shape: expected an int >= 0, got -1"),
    (TypeError, lambda: flows.StandardNormal((2, 2.5)), "^event_shape: expected an int, got float"),
    *((TypeError, lambda make=make: make()(torch.zeros(1, 2).double()), "^x: expected torch.float32 like")
      for make in (lambda: flows.NICE(2), lambda: flows.RealNVP(2), lambda: flows.MAF(2), lambda: flows.FFJORD(2))),
    *((TypeError, lambda make=make: make(2, context_features=2)(torch.zeros(1, 2), torch.zeros(1, 2).double()),
       "^context: expected torch.float32 like")
      for make in (flows.RealNVP, flows.MAF, flows.IAF, flows.NSF, flows.ResidualFlow, flows.FFJORD)),
    (TypeError, lambda: flows.RealNVP(2, context_features=2).double()(torch.zeros(1, 2).double(), torch.zeros(1, 2)),
     "^context: expected torch.float64 like"),
    (TypeError, lambda: flows.Glow((1, 4, 4), 1, 1, 4, context_features=2)(
        torch.zeros(1, 1, 4, 4), torch.zeros(1, 2).double()), "^context: expected torch.float32 like"),
    (ValueError, lambda: flows.NICE(2)(torch.zeros(1, 5)), "x: expected"),
    (ValueError, lambda: flows.RealNVP(2).as_distribution().log_prob(torch.zeros(2, 4)), r"expected shape \(\*, 2\)"),
    (ValueError, lambda: flows.RealNVP(2).as_distribution().log_prob(torch.tensor(1.0)), "value: expected"),
    (TypeError, lambda: flows.Jet((1, 4, 4), patch_size=2, channels=8, couplings=1, depth=1, heads=2)(
        torch.zeros(1, 1, 4, 4).double()), "^x: expected torch.float32 like weight"),
])
def test_errors_name_the_argument(error, make, message):
    with pytest.raises(error, match=message):
        make()


def test_sizes_may_be_integers_of_numpy():
    for make in (flows.MAF, flows.RealNVP, flows.ResidualFlow, flows.FFJORD):
        flow = make(np.int64(2), n_layers=np.int64(1), hidden=(np.int64(4),))
        assert flow.sample(3).shape == (3, 2)


def test_realnvp_compiles_to_one_graph():
    flow = scattered(flows.RealNVP(3, n_layers=2, hidden=(4,), context_features=2))
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (4, 7):
        x, context = torch.randn(batch, 3), torch.randn(batch, 2)
        flow.zero_grad()
        flow(x, context).sum().backward()
        expected = [p.grad.clone() for p in flow.parameters()]
        flow.zero_grad()
        value = compiled(x, context)
        value.sum().backward()
        torch.testing.assert_close(value, flow(x, context))
        torch.testing.assert_close([p.grad for p in flow.parameters()], expected)


@pytest.mark.parametrize("make", [
    lambda: flows.ResidualFlow(2, n_layers=1, hidden=(4,)), lambda: flows.ResidualFlow(9, n_layers=1, hidden=(4,)),
    lambda: flows.FFJORD(2, hidden=(4,)), lambda: flows.FFJORD(9, hidden=(4,))])
def test_flows_that_differentiate_inside_a_call_train_under_torch_compile(make, recwarn):
    flow = scattered(make(), 0.1)
    x, found = torch.randn(4, flow.features), []
    for call in (flow, torch.compile(flow, backend="aot_eager")):
        torch.manual_seed(0)
        value = call(x)
        found.append((value, *torch.autograd.grad(value.sum(), list(flow.parameters()), allow_unused=True)))
    for got, want in zip(*found, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want)
    assert not [warning for warning in recwarn if "Dynamo" in str(warning.message)]


SECOND = {  # flows that differentiate inside a call
    "residual": lambda: flows.ResidualFlow(2, n_layers=2, hidden=(4,), context_features=1).eval(),
    "residual by its series": lambda: flows.ResidualFlow(2, n_layers=2, hidden=(4,), context_features=1,
                                                         exact_features=1).eval(),
    "ffjord": lambda: flows.FFJORD(2, hidden=(4,), context_features=1).eval(),
    "lambda": lambda: flows.Flow(flows.Lambda(lambda x: x + 0.3 * torch.sin(x.flip(1))), flows.StandardNormal(2))}


@pytest.mark.parametrize("name", SECOND)
def test_inference_mode_gives_what_no_grad_gives(name):
    flow = scattered(SECOND[name]().double(), 0.3) if name != "lambda" else SECOND[name]().double()
    x, context = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64)
    found = []
    for mode in (torch.no_grad, torch.inference_mode):
        torch.manual_seed(0)
        with mode():
            log_prob = flow(x.clone(), context.clone())
            found.append([log_prob, *flow.transform.inverse(x.clone(), context.clone())])
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert torch.isfinite(found[1][0]).all() and not found[1][0].requires_grad
