"""Base distributions: densities against torch.distributions and integrals, samples against densities, gradients."""

import math

import pytest
import torch
from torch import distributions as D
from torch import nn

from fastflow import flows
from fastflow.diagnostics import inversion_error
from fastflow.engine import TrainStep
from fastflow.nn import AffineCoupling


def scattered(base, seed=0, size=0.4):
    torch.manual_seed(seed)
    base = base.double()
    with torch.no_grad():
        for p in base.parameters():
            p.add_(size * torch.randn_like(p))
    return base


def mixture():
    return flows.Mixture([flows.DiagonalNormal(2), flows.FullNormal(2), D.Laplace(torch.zeros(2).double(), 1.0)])


BASES = {"diagonal": lambda: flows.DiagonalNormal(2), "full": lambda: flows.FullNormal(2), "mixture": mixture,
         "uniform": lambda: flows.Uniform(torch.tensor([-1.0, 0.5]), torch.tensor([2.0, 0.75])),
         "truncated": lambda: flows.TruncatedNormal(-1.0, 2.5, (2,)), "student": lambda: flows.StudentT(2, df=6.0),
         "half truncated": lambda: flows.TruncatedNormal(0.3, math.inf, (2,))}
every_base = pytest.mark.parametrize("name", BASES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logistic_samples_are_symmetric_up_to_the_ends_of_torch_rand(dtype, monkeypatch):
    """torch.rand takes the values k/n, 0 <= k < n, of which the outermost would have infinite logits."""
    n = 2 / torch.finfo(dtype).eps
    u = torch.tensor([0.0, 1.0 / n, 0.25, 0.75, (n - 2) / n, (n - 1) / n], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda shape, **_: u.to(dtype).view(shape))
    z = flows.StandardLogistic(2).to(dtype).sample(3).flatten()
    assert z.isfinite().all() and torch.equal(z[:2], -z.flip(0)[:2])
    torch.testing.assert_close(z[2:4], torch.tensor([-math.log(3.0), math.log(3.0)], dtype=dtype))


def test_densities_against_torch_distributions():
    z = torch.randn(7, 3, dtype=torch.float64)
    base = scattered(flows.DiagonalNormal(3))
    want = D.Normal(base.loc, 0.7 * base.log_scale.exp()).log_prob(z).sum(1)
    torch.testing.assert_close(base.log_prob(z, 0.7), want)
    base = scattered(flows.FullNormal(3))
    want = D.MultivariateNormal(base.loc, scale_tril=0.7 * base.scale_tril).log_prob(z)
    torch.testing.assert_close(base.log_prob(z, 0.7), want)
    torch.testing.assert_close(base.covariance(), base.scale_tril @ base.scale_tril.T)
    base = scattered(flows.StudentT((3,), df=3.0))
    want = D.StudentT(base.log_df.exp(), base.loc, base.log_scale.exp()).log_prob(z).sum(1)
    torch.testing.assert_close(base.log_prob(z), want)
    base = flows.Uniform(-1.0, 3.0, (3,)).double()
    inside = torch.rand(4, 3, dtype=torch.float64)
    torch.testing.assert_close(base.log_prob(inside), torch.full((4,), -3 * math.log(4.0), dtype=torch.float64))
    assert torch.isneginf(base.log_prob(torch.tensor([[0.0, 3.0, 0.0]]).double())).all()
    parts = [scattered(flows.DiagonalNormal(3), seed) for seed in (1, 2)]
    base = scattered(flows.Mixture(parts))
    weights = torch.softmax(base.logits, 0)
    want = torch.log(sum(w * p.log_prob(z).exp() for w, p in zip(weights, parts, strict=True)))
    torch.testing.assert_close(base.log_prob(z), want)


@every_base
def test_densities_integrate_to_one_and_samples_follow_them(name):
    """On a grid, and by the mean of log p over samples, which is minus the entropy found on the grid."""
    base = scattered(BASES[name]())
    low, high, n = (-40.0, 40.0, 1601) if name in ("student", "mixture") else (-9.0, 9.0, 1201)
    step = (high - low) / n
    axis = low + step * (torch.arange(n, dtype=torch.float64) + 0.5)
    with torch.no_grad():
        log_p = base.log_prob(torch.cartesian_prod(axis, axis))
        p = log_p.exp() * step * step
        assert abs(p.sum() - 1.0) < (2e-3 if name in ("diagonal", "full", "mixture", "student") else 0.02)  # edges
        entropy = -torch.where(p > 0, p * log_p, 0.0).sum() / p.sum()
        drawn = base.log_prob(base.sample(20_000, generator=torch.Generator().manual_seed(1)))
    assert torch.isfinite(drawn).all()
    assert abs(-drawn.mean() - entropy) < 4 * drawn.std() / math.sqrt(len(drawn)) + 0.02


def test_a_full_normal_has_no_mass_at_infinity():
    base, inf = scattered(flows.FullNormal(3)), math.inf
    z = torch.tensor([[inf, 0, 0], [0, -inf, 1], [0, 0, inf], [0, 0, 0]], dtype=torch.float64, requires_grad=True)
    value = base.log_prob(z)
    assert value[:3].isneginf().all() and value[3].isfinite()
    value.sum().backward()
    assert all(t.grad.isfinite().all() for t in (z, *base.parameters()))
    assert base.log_prob(torch.tensor([[inf, math.nan, 0]], dtype=torch.float64)).isnan()


@every_base
def test_generators_shapes_and_dtypes(name):
    base = BASES[name]()
    first, second = (base.sample(5, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (5, 2)
    assert not torch.equal(base.sample(5), base.sample(5))
    if name != "mixture":
        assert first.dtype == torch.float32 and base.log_prob(first).dtype == torch.float32
    assert base.double().sample(3).dtype == torch.float64
    assert base.sample(0).shape == (0, 2)


@pytest.mark.parametrize("name", ["diagonal", "full", "truncated", "half truncated", "student"])
def test_gradients_of_the_density(name):
    base = scattered(BASES[name]())
    z = base.sample(3).detach().requires_grad_()
    values = dict(base.named_parameters())

    def log_prob(z, *parameters):
        return torch.func.functional_call(base, dict(zip(values, parameters, strict=True)), (z,))

    assert torch.autograd.gradcheck(log_prob, (z, *values.values()))


@pytest.mark.parametrize("name", ["diagonal", "full", "student"])
def test_gradients_through_samples(name):
    """d E[sum z]/d loc = 1, through the reparameterisation."""
    base = scattered(BASES[name]())
    (grad,) = torch.autograd.grad(base.sample(6).sum(0).sum(), base.loc)
    torch.testing.assert_close(grad, torch.full((2,), 6.0, dtype=torch.float64))


def test_truncation_far_in_the_tails():
    """Both tails alike: the mass of an interval ten deviations out is not 1 - 1."""
    for low, high in ((10.0, 11.0), (-11.0, -10.0)):
        base = flows.TruncatedNormal(low, high, (1,)).double()
        torch.nn.init.zeros_(base.loc)
        axis = torch.linspace(low, high, 20001, dtype=torch.float64)
        assert torch.trapezoid(base.log_prob(axis[:, None]).exp(), axis).item() == pytest.approx(1.0, abs=1e-6)
        z = base.sample(1000)
        assert ((z >= low) & (z <= high)).all() and abs(abs(z.mean().item()) - 10.098) < 0.02


@pytest.mark.parametrize("log_df", [0.0, 4.8, 4.9, 8.0, 15.0, 30.0, 100.0])
def test_student_in_float32_whatever_its_degrees_of_freedom(log_df):
    """They grow without bound on data with Gaussian tails, where the two log-gammas agree in all their digits."""
    z, found = torch.linspace(-6.0, 6.0, 41)[:, None], []
    for dtype in (torch.float32, torch.float64):
        base = flows.StudentT(1).to(dtype)
        torch.nn.init.constant_(base.log_df, log_df)
        value = base.log_prob(z.to(dtype))
        found.append((value, *torch.autograd.grad(value.sum(), [base.log_df, base.log_scale])))
        sample = base.sample(5, generator=torch.Generator().manual_seed(0))
        assert torch.isfinite(sample).all()
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-5)
    want = D.StudentT(math.exp(log_df)) if log_df < 10 else D.Normal(0.0, 1.0)
    torch.testing.assert_close(found[1][0], want.log_prob(z.double())[:, 0], rtol=1e-4, atol=1e-5)
    assert torch.isneginf(base.log_prob(torch.full((1, 1), math.inf).double())).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wide_truncated_normal_is_uniform(dtype):
    z = torch.linspace(-1.0, 3.0, 9, dtype=dtype)[:, None]
    for log_scale in (4.0, 12.0, 20.0, 60.0):
        base = flows.TruncatedNormal(-1.0, 3.0, (1,)).to(dtype)
        torch.nn.init.constant_(base.log_scale, log_scale)
        log_prob = base.log_prob(z)
        torch.testing.assert_close(log_prob, torch.full_like(log_prob, -math.log(4.0)), rtol=1e-3, atol=0)
        grads = torch.autograd.grad(log_prob.sum(), list(base.parameters()))
        assert all(torch.isfinite(g).all() and g.abs() < 0.1 for g in grads)


def test_the_wide_and_the_narrow_formula_agree():
    z, values = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)[:, None], []
    for log_scale in (math.log(10.0) - 1e-9, math.log(10.0) + 1e-9):  # h = 0.05
        base = flows.TruncatedNormal(0.0, 1.0, (1,)).double()
        torch.nn.init.constant_(base.log_scale, log_scale)
        torch.nn.init.constant_(base.loc, 0.7)
        value = base.log_prob(z)
        values.append((value, *torch.autograd.grad(value.sum(), list(base.parameters()))))
    torch.testing.assert_close(*values, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, math.inf)])
def test_samples_of_a_truncation_far_in_the_tail(low, high):
    """148 deviations from loc: nearly an exponential law of rate -loc / scale^2."""
    base = flows.TruncatedNormal(low, high, (1,)).double()
    torch.nn.init.constant_(base.loc, -20.0)
    torch.nn.init.constant_(base.log_scale, -2.0)
    x = base.sample(20_000, generator=torch.Generator().manual_seed(0))
    mean = math.exp(-4.0) / 20.0
    assert abs(x.mean() / mean - 1.0) < 0.03 and abs(x.std() / mean - 1.0) < 0.05 and (x >= low).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(x.sum(), list(base.parameters())))


def test_uniform_samples_stay_below_the_end(monkeypatch):
    base = flows.Uniform(1.0, 2.0, (2,))
    monkeypatch.setattr(base, "_noise", lambda *args: torch.full((3, 2), 1.0 - 2.0**-24))  # the largest of torch.rand
    assert torch.isfinite(base.log_prob(base.sample(3))).all()


def test_conditional_bases_get_the_flows_context():
    network = nn.Linear(3, 4)
    base = flows.ConditionalNormal(2, network)
    flow = flows.Flow(flows.Affine(0.0, 2.0), base)
    context, x = torch.randn(5, 3), torch.randn(5, 2)
    mean, raw = network(context).chunk(2, 1)
    law = D.Normal(mean / 2.0, torch.exp(5.0 * torch.tanh(raw / 5.0)) / 2.0)
    torch.testing.assert_close(flow.log_prob(x, context), law.log_prob(x).sum(1))
    samples, log_prob = flow.sample_and_log_prob(4, context)
    assert samples.shape == (4, 5, 2)
    torch.testing.assert_close(log_prob[2], flow.log_prob(samples[2], context))
    assert flow.as_distribution(context).sample((2,)).shape == (2, 5, 2)
    with pytest.raises(ValueError, match="context"):
        flow.log_prob(x)


def test_class_conditional_base():
    base = scattered(flows.ClassConditionalNormal(2, 3))
    flow = flows.Flow(flows.Affine(), base)
    labels = torch.tensor([2, 0, 1, 1])
    x = torch.randn(4, 2, dtype=torch.float64)
    want = D.Normal(base.loc[labels], base.log_scale[labels].exp()).log_prob(x).sum(1)
    torch.testing.assert_close(flow.log_prob(x, labels), want)
    assert flow.sample(3, labels).shape == (3, 4, 2)
    for wrong in (None, labels.float(), labels[:, None]):
        with pytest.raises(ValueError, match="context"):
            base.log_prob(x, context=wrong)
    for wrong, message in ((3, "below n_classes = 3, got 3"), (-1, "from 0 on, got -1")):
        with pytest.raises(ValueError, match=f"context: expected labels {message}"):
            flow.log_prob(x, torch.tensor([0, wrong, 1, 2]))


UNCONDITIONAL = {
    "realnvp": (lambda: flows.RealNVP(4, n_layers=2, hidden=(4,)), (4,)),
    "maf": (lambda: flows.MAF(4, n_layers=1), (4,)),
    "nsf": (lambda: flows.NSF(4, n_layers=2, hidden=(4,)), (4,)), "jet": (
        lambda: flows.Jet((1, 4, 4), patch_size=2, channels=8, couplings=2, depth=1, heads=2), (1, 4, 4)),
    "glow": (lambda: flows.Glow((1, 4, 4), 2, 1, 4), (1, 4, 4)), "residual": (
        lambda: flows.ResidualFlow(4, n_layers=1, hidden=(4,)).eval(), (4,)),
    "realnvp-image": (lambda: flows.RealNVPImage((1, 4, 4), 2, 1, 4, 1), (1, 4, 4)),
    "slice": (lambda: flows.Flow(flows.Compose(
        flows.Slice(2, flows.ConditionalNormal(2, nn.Linear(2, 4))), flows.RealNVP(2, n_layers=2).transform),
        flows.StandardNormal(2)), (4,)),
    "one input": (lambda: flows.Flow(coupled(nn.Sequential(nn.Linear(2, 4))), flows.StandardNormal(4)), (4,)),
}


def coupled(conditioner):
    return flows.Compose(AffineCoupling(conditioner), flows.Sylvester(4))


@pytest.mark.parametrize("name", UNCONDITIONAL)
def test_classes_of_the_base_alone(name):
    """A transform that was built without a context is not handed that of the base."""
    make, shape = UNCONDITIONAL[name]
    plain = scattered(make(), seed=1, size=0.05)
    base = scattered(flows.ClassConditionalNormal(plain.base.event_shape, 3), size=0.05)
    flow, labels = flows.Flow(plain.transform, base), torch.tensor([2, 0, 1])
    x = torch.rand(3, *shape, dtype=torch.float64) - 0.5
    flow.initialize(x, labels)
    z, logdet = plain.transform(x)
    log_prob = flow.log_prob(x, labels)
    torch.testing.assert_close(log_prob, base.log_prob(z, context=labels) + logdet)
    draws, density = flow.sample_and_log_prob(2, labels)
    assert draws.shape == (2, 3, *shape)
    torch.testing.assert_close(density[1], flow.log_prob(draws[1], labels), rtol=1e-4, atol=1e-5)
    assert name == "slice" or inversion_error(flow, x, labels).absolute < 1e-4
    for memory in ("none", "save_z"):
        step = TrainStep(flow, torch.optim.SGD(flow.parameters(), lr=0.0), memory=memory)
        if name != "residual":
            torch.testing.assert_close(step(x, labels), -log_prob.mean().detach())


def test_a_transform_with_a_context_shares_it_with_the_base():
    class Own(nn.Module):
        def forward(self, x, context):
            return torch.cat([x + context, context], 1)

    for transform in (flows.RealNVP(2, n_layers=2, hidden=(4,), context_features=1).transform, AffineCoupling(Own())):
        flow = flows.Flow(transform, flows.ConditionalNormal(2, nn.Linear(1, 4))).double()
        context, x = torch.randn(3, 1, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
        z, logdet = transform(x, context)
        torch.testing.assert_close(flow.log_prob(x, context), flow.base.log_prob(z, context=context) + logdet)
    with pytest.raises(ValueError, match="^context"):  # nobody takes it
        flows.RealNVP(2)(torch.zeros(3, 2), torch.zeros(3, 1))


class Bare:
    """A base of the user's, with what a density and samples need and no more."""

    event_shape = torch.Size([2])

    def log_prob(self, z):
        return -z.abs().sum(1) - 2 * math.log(2.0)

    def sample(self, n):
        return torch.distributions.Laplace(0.0, 1.0).sample((n, 2))


def test_a_base_need_not_know_of_generators_and_temperatures():
    flow = flows.Flow(flows.Affine(0.5, 2.0), Bare())
    torch.manual_seed(0)
    x, log_prob = flow.sample_and_log_prob(500)
    torch.testing.assert_close(log_prob, flow.log_prob(x))
    assert flow.sample(3).shape == (3, 2)
    with pytest.raises(TypeError, match="temperature"):
        flow.sample(3, temperature=0.5)
    with pytest.raises(TypeError, match="generator"):
        flow.sample(3, generator=torch.Generator())


ANCHORED = {"normal": lambda: flows.NSF(2), "torch": lambda: flows.Flow(
                flows.RealNVP(2).transform, D.Normal(torch.zeros(2, device="cpu"), torch.ones(2, device="cpu"))),
            "dequantized": lambda: flows.Flow(flows.Compose(flows.UniformDequantization(4), flows.NSF(2).transform),
                                              flows.StandardLogistic(2))}


@pytest.mark.parametrize("name", ANCHORED)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_samples_follow_parameters_that_are_assigned(name, device):
    for dtype in (torch.float32, torch.float64):
        with torch.device(device):
            flow = ANCHORED[name]()
        flow.load_state_dict(ANCHORED[name]().to(dtype).state_dict(), assign=True)
        z = flow.sample(3) if name == "dequantized" else flow.sample_and_log_prob(3)[0]
        assert z.dtype == (torch.int64 if name == "dequantized" else dtype) and z.device.type == "cpu"
        assert flow.log_prob(z).dtype == dtype
        assert not flow.state_dict().keys() & {"base.anchor", "_anchor", "transform.transforms.0.anchor"}


def test_priors_that_positions_share():
    """Those of Glow: one mean and one deviation for each channel, and for each class."""
    base, classes = flows.DiagonalNormal((2, 3, 3), per_channel=True), flows.ClassConditionalNormal(
        (2, 3, 3), 4, per_channel=True)
    assert base.loc.shape == (2, 1, 1) and classes.loc.shape == (4, 2, 1, 1)
    base, classes = scattered(base), scattered(classes)
    z, labels = torch.randn(5, 2, 3, 3, dtype=torch.float64), torch.tensor([3, 0, 1, 1, 2])
    want = D.Normal(base.loc, 0.7 * base.log_scale.exp()).log_prob(z).flatten(1).sum(1)
    torch.testing.assert_close(base.log_prob(z, 0.7), want)
    want = D.Normal(classes.loc[labels], classes.log_scale[labels].exp()).log_prob(z).flatten(1).sum(1)
    torch.testing.assert_close(classes.log_prob(z, context=labels), want)
    draws = base.sample(4000)
    assert draws.shape == (4000, 2, 3, 3)
    assert ((draws.mean((0, 2, 3)) - base.loc.flatten()).abs() < 4 * base.log_scale.exp().flatten() / 36_000**0.5).all()
    assert classes.sample(5, context=labels).shape == (5, 2, 3, 3)


def test_mixtures_choose_components_by_weight():
    parts = [flows.Uniform(k, k + 1.0, (1,)) for k in range(3)]
    base = flows.Mixture(parts)
    with torch.no_grad():
        base.logits.copy_(torch.log(torch.tensor([0.2, 0.5, 0.3])))
    z = base.sample(20_000, generator=torch.Generator().manual_seed(0))[:, 0]
    share = torch.stack([((z >= k) & (z < k + 1)).float().mean() for k in range(3)])
    assert (share - torch.tensor([0.2, 0.5, 0.3])).abs().max() < 0.015
    assert z[:100].floor().unique().numel() == 3  # in mixed order


def test_a_mixture_outside_all_of_its_components_has_no_gradient_but_no_nan():
    base = flows.Mixture([flows.Uniform(torch.zeros(1), torch.ones(1)), flows.TruncatedNormal(0.0, 2.0, (1,))])
    density = base.log_prob(torch.tensor([[0.5], [1.5], [3.0]]))
    assert torch.isneginf(density).tolist() == [False, False, True]
    density[:2].mean().backward()
    assert torch.isfinite(base.logits.grad).all()


def test_a_torch_distribution_is_of_the_shape_of_z_or_of_each_element():
    transform, x = flows.RealNVP(3, n_layers=2).transform, torch.randn(2, 3)
    plain = flows.Flow(transform, flows.StandardNormal(3)).log_prob(x)
    for base in (D.Normal(torch.zeros(3), 1.0), D.Normal(0.0, 1.0), D.MultivariateNormal(torch.zeros(3), torch.eye(3))):
        torch.testing.assert_close(flows.Flow(transform, base).log_prob(x), plain)
    for shape in ((1,), (4,), (2, 3)):
        with pytest.raises(ValueError, match="z: expected shape"):
            flows.Flow(transform, D.Normal(torch.zeros(shape), 1.0)).log_prob(x)


@pytest.mark.parametrize(("call", "match"), [
    (lambda: flows.Mixture([]), "components"),
    (lambda: flows.Mixture([flows.DiagonalNormal(2), flows.DiagonalNormal(3)]), "components"),
    (lambda: flows.Mixture([flows.ClassConditionalNormal(2, 2)]).log_prob(torch.zeros(3, 2)), "^context: .* Mixture"),
    (lambda: flows.Mixture([flows.DiagonalNormal(2)], nn.Linear(3, 1)).sample(3), "^context: expected a tensor"),
    (lambda: flows.Mixture([flows.DiagonalNormal(2)]).sample(3, context=torch.zeros(3, 1)), "^context: expected None"),
    (lambda: flows.Mixture([flows.DiagonalNormal(2)], nn.Linear(1, 1)).sample(2, context=torch.zeros(3, 1)),
     "^context: expected 2 of them, one for each sample, got 3"),
    (lambda: flows.Mixture([flows.DiagonalNormal(2)], nn.Linear(1, 2)).sample(3, context=torch.zeros(3, 1)),
     r"^weights output: expected shape \(3, 1\), got \(3, 2\)"),
    (lambda: flows.Uniform(1.0, 0.0), "low"), (lambda: flows.TruncatedNormal(1.0, 1.0, (2,)), "low"),
    (lambda: flows.StudentT(2, df=0.0), "df"), (lambda: flows.ClassConditionalNormal(2, 0), "n_classes"),
    (lambda: flows.DiagonalNormal(2).log_prob(torch.zeros(3, 1)), "z"),
    (lambda: flows.Uniform(0.0, 1.0, (2,)).sample(3, temperature=0.5), "temperature"),
    (lambda: flows.FullNormal(0), "^features: expected an int >= 1, got 0")])
def test_refusals(call, match):
    with pytest.raises(ValueError, match=match):
        call()
