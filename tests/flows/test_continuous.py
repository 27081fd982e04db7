"""Continuous flows against closed forms and their Jacobians, to the solver's tolerance; flow matching."""

import builtins
import math

import pytest
import torch
from flow_checks import check_bijection, check_gradients, integral, scattered
from torch import nn

pytest.importorskip("torchdiffeq")

from fastflow import flows  # noqa: E402

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


class Linear(nn.Module):
    """dx/dt = A x + b: x(1) = expm(A) x(0) + ..., log|det| = tr A."""

    def __init__(self, features):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(features, features) / features**0.5)
        self.bias = nn.Parameter(torch.randn(features))

    def forward(self, t, x):
        return x @ self.matrix.mT + self.bias


class Straight(nn.Module):
    """What flow matching finds for data N(m, s^2 I) and noise N(0, I), drawn independently: E[x - noise | x_t]. It
    moves the noise z along m t + z sqrt((1 - t)^2 + s^2 t^2) to m + s z."""

    def __init__(self, mean, scale):
        super().__init__()
        self.mean, self.scale = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(scale))

    def forward(self, t, x):
        t = t.reshape(-1, 1)
        variance = (1 - t)**2 + (self.scale * t)**2
        return self.mean + (self.scale**2 * t - (1 - t)) / variance * (x - t * self.mean)


def nonlinear(features, seed=0, context_features=None, size=0.3, **options):
    torch.manual_seed(seed)
    field = flows.VelocityMLP(features, (6,), context_features=context_features)
    return scattered(flows.ContinuousTransform(field, **options).double(), size).eval()


@pytest.mark.parametrize("features", [1, 2, 4])
def test_a_linear_field_is_the_matrix_exponential(features):
    for seed in range(20):
        torch.manual_seed(seed)
        transform = flows.ContinuousTransform(Linear(features).double(), trace="exact", rtol=1e-6, atol=1e-6)
        a, b = transform.field.matrix.detach(), transform.field.bias.detach()
        system = torch.zeros(features + 1, features + 1, dtype=torch.float64)
        system[:features, :features], system[:features, features] = a, b
        solution = torch.linalg.matrix_exp(system)[:features]
        z = torch.randn(3, features, dtype=torch.float64)
        with torch.no_grad():
            x, logdet = transform.inverse(z)
            back, opposite = transform(x)
        torch.testing.assert_close(x, z @ solution[:, :features].mT + solution[:, features], rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(logdet, a.trace().expand(3), rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(back, z, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(opposite, -logdet, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("features", [1, 2, 3])
@pytest.mark.parametrize("context_features", [None, 2])
def test_bijection(features, context_features):
    transform = nonlinear(features, features, context_features, rtol=1e-8, atol=1e-8)
    x = torch.randn(2, features, dtype=torch.float64)
    context = None if context_features is None else torch.randn(2, context_features, dtype=torch.float64)
    check_bijection(transform, x, context, tolerance=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("features", [1, 2, 4])
def test_bijection_over_many_seeds(features):
    for seed in range(20):
        transform = nonlinear(features, seed, 2, 0.5, **TIGHT)
        x, context = torch.randn(3, features, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
        check_bijection(transform, x, context, tolerance=1e-7)


def test_the_error_follows_the_tolerance():
    transform = flows.ContinuousTransform(Straight([1.0, -2.0], 0.3).double(), trace="exact")
    z = torch.randn(50, 2, dtype=torch.float64)
    errors = []
    for tolerance in (1e-4, 1e-6, 1e-8):
        transform.rtol = transform.atol = tolerance
        with torch.no_grad():
            x, logdet = transform.inverse(z)
        exact = transform.field.mean + transform.field.scale * z
        errors.append(max((x - exact).abs().max().item(), (logdet - 2 * math.log(0.3)).abs().max().item()))
        assert errors[-1] < 100 * tolerance
    assert errors[0] > errors[1] > errors[2]
    law = torch.distributions.Normal(transform.field.mean.detach(), transform.field.scale.detach())
    flow = flows.Flow(transform, flows.StandardNormal(2)).double()
    with torch.no_grad():
        torch.testing.assert_close(flow.log_prob(x), law.log_prob(x).sum(1), rtol=1e-6, atol=1e-6)


def test_hutchinson_is_unbiased():
    """The mean of 4000 probes within 4 standard errors of the exact log-determinant; z doesn't depend on them."""
    transform = nonlinear(3, trace="exact", rtol=1e-7, atol=1e-7, size=1.0)
    x = torch.randn(1, 3, dtype=torch.float64)
    with torch.no_grad():
        z, exact = transform(x)
        transform.trace = "hutchinson"
        repeated, estimates = transform(x.expand(4000, 3))
    torch.testing.assert_close(repeated, z.expand(4000, 3), rtol=1e-5, atol=1e-5)
    standard = (estimates.std() / math.sqrt(4000)).item()
    assert standard > 0 and abs(estimates.mean() - exact) < 4 * standard


def test_auto_is_exact_but_for_large_events_in_training():
    for features, exact in ((8, True), (9, False)):
        transform, x = nonlinear(features, trace="auto"), torch.randn(3, features, dtype=torch.float64)
        want = transform(x)[1]
        state = torch.get_rng_state()
        got = transform.train()(x)[1]
        assert torch.equal(got, want) == torch.equal(torch.get_rng_state(), state) == exact != transform.estimates
        if exact:
            torch.testing.assert_close(transform.inverse(transform(x)[0])[1], -want, rtol=1e-3, atol=1e-3)


def test_gradients():
    """Of the solver's own steps, which a fixed step size keeps in their places."""
    fixed = {"method": "rk4", "options": {"step_size": 0.5}, "trace": "exact"}
    check_gradients(nonlinear(2, size=0.5, **fixed), torch.randn(2, 2, dtype=torch.float64))
    check_gradients(nonlinear(1, context_features=2, **fixed), torch.randn(2, 1, dtype=torch.float64),
                    torch.randn(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_the_adjoint_s_gradients(trace):
    gradients = []
    for adjoint in (False, True):
        transform = nonlinear(2, context_features=1, trace=trace, adjoint=adjoint, **TIGHT)
        torch.manual_seed(1)
        x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
        raw = torch.randn(3, 1, dtype=torch.float64, requires_grad=True)
        for direction in (transform, transform.inverse):
            z, logdet = direction(x, raw.sin())  # the context is no leaf
            loss = (z.square().sum() + 0.7 * logdet.sum())
            gradients.append(torch.autograd.grad(loss, (x, raw, *transform.parameters())))
    for direct, adjoint in zip(gradients[:2], gradients[2:], strict=True):
        for a, b in zip(direct, adjoint, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("features", "n"), [(1, 1001), (2, 101)])
def test_density_integrates_to_one(features, n):
    flow = flows.FFJORD(features, hidden=(8,), context_features=1, rtol=1e-7, atol=1e-7).double().eval()
    scattered(flow, 0.3)
    for context in (torch.tensor([-1.0]), torch.tensor([1.0])):
        assert abs(integral(flow, 10, n, features, context.double()) - 1) < 1e-5


def test_model_samples_context_and_start():
    flow = flows.FFJORD(3, hidden=(8,), context_features=2, n_layers=2).eval()
    x, context = torch.randn(4, 3), torch.randn(4, 2, requires_grad=True)
    torch.testing.assert_close(flow(x, context), torch.distributions.Normal(0, 1).log_prob(x).sum(1))
    scattered(flow)
    x, log_prob = flow.sample_and_log_prob(2, context)
    assert x.shape == (2, 4, 3) and log_prob.shape == (2, 4)
    torch.testing.assert_close(flow.log_prob(x.flatten(0, 1), context.repeat(2, 1)), log_prob.flatten(),
                               rtol=1e-3, atol=1e-3)
    (x.sum() + log_prob.sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in flow.parameters()) and context.grad.abs().sum() > 0
    contexts = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    assert flow(torch.zeros(2, 3), contexts).unique().numel() == 2
    assert flow(torch.zeros(0, 3), contexts[:0]).shape == (0,)
    with torch.inference_mode(False), torch.no_grad():
        assert not flow.sample(2, contexts).requires_grad


def test_an_empty_batch_has_a_graph():
    flow = flows.FFJORD(3, hidden=(4,), context_features=2)
    log_prob = flow.log_prob(torch.randn(0, 3), torch.randn(0, 2))
    log_prob.sum().backward()
    assert log_prob.shape == (0,) and all((p.grad == 0).all() for p in flow.parameters())


def test_what_is_not_finite_stays_in_its_sample():
    transform = nonlinear(2)
    x = torch.randn(3, 2, dtype=torch.float64)
    expected, logdet = transform(x)
    x[1, 0], x[2, 1] = math.nan, math.inf
    z, total = transform(x)
    torch.testing.assert_close(z[0], expected[0], rtol=1e-3, atol=1e-3)
    assert z[1:].isnan().all() and total[1:].isnan().all() and total[0].isfinite()


def test_flow_matching_has_its_minimum_at_the_closed_form():
    """Loss and gradient at the field E[x - noise | x_t] of a Gaussian within 4 standard errors of their expectations:
    the conditional variance s^2 + 1 - (t s^2 - (1 - t))^2 / ((1 - t)^2 + t^2 s^2), averaged over t, and 0."""
    mean, scale, n = 1.5, 0.5, 100_000
    transform = flows.ContinuousTransform(Straight([mean], scale).double())
    x = mean + scale * torch.randn(n, 1, dtype=torch.float64)
    loss = flows.flow_matching_loss(transform, x)
    assert loss.shape == (n,)
    t = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    expected = scale**2 + 1 - (t * scale**2 - (1 - t))**2 / ((1 - t)**2 + t**2 * scale**2)
    assert abs(loss.mean() - torch.trapezoid(expected, t)) < 4 * loss.std() / math.sqrt(n)
    for parameter in transform.parameters():
        per_chunk = torch.stack([torch.autograd.grad(chunk.mean(), parameter, retain_graph=True)[0].flatten()
                                 for chunk in loss.split(n // 50)])
        assert (per_chunk.mean(0).abs() < 4 * per_chunk.std(0) / math.sqrt(50)).all()


@pytest.mark.parametrize("given", [False, True])
def test_flow_matching_draws_from_a_conditional_base(given):
    base, n = flows.ConditionalNormal(2, nn.Linear(3, 4)), 5
    transform = scattered(flows.FFJORD(2, context_features=3 if given else None)).transform
    x, context, t = torch.randn(n, 2), torch.randn(n, 3), torch.rand(n)
    noise = base.sample(n, generator=torch.Generator().manual_seed(1), context=context)
    want = flows.flow_matching_loss(transform, x, context if given else None, noise=noise, t=t)
    loss = flows.flow_matching_loss(flows.Flow(transform, base), x, context, t=t,
                                    generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loss, want)


@pytest.mark.parametrize(("field", "takes"), [
    (lambda t, x: -x, False), (lambda t, x, c: c * x, True), (flows.VelocityMLP(2), False),
    (flows.VelocityMLP(2, context_features=2), True)])
def test_a_continuous_transform_takes_the_context_that_its_field_takes(field, takes):
    assert flows.ContinuousTransform(field).takes_context == takes

    class Field(nn.Module):
        def forward(self, t, x, *c):
            return field(t, x, *c)

    class FieldOfTwo(nn.Module):
        def forward(self, t, x):
            return x

    assert flows.ContinuousTransform(Field()).takes_context
    assert not flows.ContinuousTransform(FieldOfTwo()).takes_context


def test_flow_matching_training_finds_the_density():
    """A mixture of two Gaussians in one dimension: KL to the truth under 0.05 nats after 600 steps."""
    flow = flows.FFJORD(1, hidden=(32, 32), activation=nn.SiLU, rtol=1e-4, atol=1e-4)
    law = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.tensor([0.3, 0.7])),
        torch.distributions.Normal(torch.tensor([-2.0, 1.0]), torch.tensor([0.5, 0.7])))
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 600)
        optimizer.zero_grad()
        flows.flow_matching_loss(flow, law.sample((512, 1))).mean().backward()
        optimizer.step()
    x = law.sample((4000, 1))
    with torch.no_grad():
        difference = law.log_prob(x[:, 0]) - flow.eval()(x)
    assert difference.mean() < 0.05


def test_flow_matching_arguments():
    flow = scattered(flows.FFJORD(2, context_features=1))
    x, context = torch.randn(5, 2), torch.randn(5, 1)
    first, second = (flows.flow_matching_loss(flow, x, context, generator=torch.Generator().manual_seed(0))
                     for _ in range(2))
    assert torch.equal(first, second)
    noise, t = torch.randn(5, 2), torch.rand(5)
    loss = flows.flow_matching_loss(flow, x, context, noise=noise, t=t, sigma_min=0.1)
    at = (1 - 0.9 * t[:, None]) * noise + t[:, None] * x
    expected = (flow.transform.field(t, at, context) - (x - 0.9 * noise)).square().sum(1)
    torch.testing.assert_close(loss, expected)
    for bad in ({"noise": noise[:2]}, {"t": t[:2]}, {"sigma_min": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            flows.flow_matching_loss(flow, x, context, **bad)
    with pytest.raises(TypeError, match="flow"):
        flows.flow_matching_loss(flows.RealNVP(2), x)


def test_without_torchdiffeq(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "torchdiffeq":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"fastflow\[continuous\]"):
        flows.FFJORD(2)


@pytest.mark.parametrize(("call", "error", "match"), [
    (lambda: flows.FFJORD(0), ValueError, "features"), (lambda: flows.FFJORD(2, n_layers=0), ValueError, "n_layers"),
    (lambda: flows.FFJORD(2, trace="sum"), ValueError, "trace"), (lambda: flows.FFJORD(2, rtol=0), ValueError, "rtol"),
    (lambda: flows.ContinuousTransform(3), TypeError, "field"),
    (lambda: flows.ContinuousTransform(lambda t, x: x[:, :1])(torch.zeros(1, 2)), ValueError, "field"),
    (lambda: flows.FFJORD(2)(torch.zeros(1, 3)), ValueError, "x"),
    (lambda: flows.FFJORD(2).transform.inverse(torch.zeros(3)), ValueError, "z"),
    (lambda: flows.FFJORD(2)(torch.zeros(1, 2).double()), TypeError, "weight|x"),
    (lambda: flows.FFJORD(2, context_features=1)(torch.zeros(1, 2)), ValueError, "context"),
    (lambda: flows.FFJORD(2)(torch.zeros(1, 2), torch.zeros(1, 1)), ValueError, "context")])
def test_refusals(call, error, match):
    with pytest.raises(error, match=match):
        call()
