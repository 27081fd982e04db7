"""The interface of the estimators: values, gradients of parameters, learning, latents, measuring, errors."""

import math

import pytest
import torch
from discrete_problems import PROBLEMS, bits, classes, coupled, coupled_classes
from torch import nn

from fastflow import estimators
from fastflow.estimators import (
    NVIL,
    REBAR,
    REINFORCE,
    RELAX,
    RLOO,
    VIMCO,
    Bernoulli,
    Categorical,
    DisARM,
    Enumeration,
    MovingAverage,
    NeuralBaseline,
    baseline_network,
    exact,
    measure,
)

NAMES = tuple(estimators.ESTIMATORS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_estimator_by_name(problem, name):
    """One interface: the value is near the objective, gradients reach logits and parameters, float32 stays float32."""
    make, f = PROBLEMS[problem]
    q = make()
    q = type(q)(q.logits.float()).detached()
    weight = torch.tensor(1.5, requires_grad=True)
    estimate = estimators.create(name, q.event_shape)(q, lambda b: weight * f(b.double()).float(), 3)
    assert estimate.value.shape == (q.logits.shape[0],) and estimate.value.dtype == torch.float32
    assert estimate.samples.shape[1:] == q.logits.shape and estimate.values.shape == estimate.samples.shape[:2]
    assert estimate.auxiliary.shape == ()
    (estimate.value.sum() + estimate.auxiliary).backward()
    assert q.logits.grad.shape == q.logits.shape and q.logits.grad.isfinite().all() and weight.grad.isfinite()


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("gumbel-softmax", "vimco")])
def test_values_average_to_the_objective(name):
    logits = bits().logits.expand(20_000, 3)
    with torch.no_grad():
        value = estimators.create(name, (3,)).double()(Bernoulli(logits[:2000] if name == "unordered-set" else logits),
                                                      coupled, 2).value
    error = value.std() / math.sqrt(len(value))
    assert (value.mean() - exact(bits(), coupled)[0]).abs() <= 4 * error + 1e-12


@pytest.mark.parametrize("name", ["reinforce", "rloo", "rebar", "disarm", "unordered-set", "vimco", "nvil"])
def test_gradients_of_parameters_and_of_logits_inside_f(name):
    """f has a weight, and depends on the logits directly too, as a log-weight does."""
    q = bits().detached()
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def f(b):
        return weight * coupled(b) - 0.3 * q.log_prob(b)

    found = measure(estimators.create(name, (3,)).double(), q, f, 2, 700, parameters=[weight])
    assert found.is_unbiased(), found.largest_deviation
    assert found.parameters[0].exact.shape == () and found.parameters[0].variance > 0
    whole = exact(q, f, objective="iwae" if name == "vimco" else "mean", n_samples=2)
    torch.testing.assert_close(found.exact, torch.autograd.grad(whole.sum(), q.logits)[0])


def test_parameters_of_f_alone_are_not_the_estimators_business():
    """RELAX and REBAR use f in their control variate; the auxiliary loss trains them, not f."""
    q = bits().detached()
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    for estimator in (REBAR(), RELAX(baseline_network((3,)).double())):
        estimate = estimator(q, lambda b: weight * coupled(b), 2)
        estimate.auxiliary.backward(retain_graph=True)
        assert weight.grad is None and q.logits.grad is None
        assert all(p.grad is not None for p in estimator.parameters())
        estimator.zero_grad()
        estimate.value.sum().backward()
        assert all(p.grad is None for p in estimator.parameters()) and weight.grad is not None
        weight.grad = q.logits.grad = None


def test_the_auxiliary_gradient_is_that_of_the_squared_gradient():
    """By central differences in eta and in the temperature, on fixed noise."""
    q, estimator = classes().detached(), REBAR().double()
    u, v = q.noise(4), q.noise(4)

    def squared():
        gradient, = torch.autograd.grad(estimator.at(q, coupled_classes, u, v).value.sum(), q.logits)
        return (gradient**2).sum() / len(gradient)

    estimate = estimator.at(q, coupled_classes, u, v)
    torch.testing.assert_close(estimate.auxiliary, squared())
    estimate.auxiliary.backward()
    for parameter in estimator.parameters():
        ends = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter += step
            ends.append(squared())
            with torch.no_grad():
                parameter -= step
        torch.testing.assert_close(parameter.grad, ((ends[0] - ends[1]) / 2e-5).view(1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("make", [
    lambda: NeuralBaseline(baseline_network((3,))), lambda: NVIL(baseline_network((3,)), normalise=False),
    lambda: REBAR(temperature=2.0), lambda: RELAX(baseline_network((3,)), eta=None),
], ids=["neural-baseline", "nvil", "rebar", "relax"])
def test_learning_lowers_the_variance(make):
    """Of two rows whose f are far apart, so that one average of both would not do."""
    estimator, q = make().double(), Bernoulli(torch.cat([bits().logits, -bits().logits]))
    f = lambda b: coupled(b) + torch.tensor([3.0, -3.0]).repeat(b.shape[1] // 2)  # noqa: E731
    n_repeats = 600 if isinstance(estimator, NVIL) else 10_000
    before = measure(estimator, q, f, n_repeats=n_repeats)
    optimizer = torch.optim.Adam(estimator.parameters(), 0.03)
    many = Bernoulli(q.logits.repeat(100, 1)).detached()
    for _ in range(60):
        optimizer.zero_grad()
        estimator(many, f).auxiliary.backward()
        optimizer.step()
    after = measure(estimator, q, f, n_repeats=n_repeats)
    assert after.variance.sum() < 0.7 * before.variance.sum()
    assert after.largest_deviation < 4


def test_moving_average_forgets_and_stays():
    estimator, q = MovingAverage(0.5), bits().detached()
    for _ in range(3):
        estimator(q, lambda b: 0 * b.sum(-1) + 2.0)
    gradient, = torch.autograd.grad(estimator(q, lambda b: 0 * b.sum(-1) + 2.0).value.sum(), q.logits)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)
    state = estimator.state_dict()
    estimator.eval()(q, coupled)
    assert all(torch.equal(state[name], value) for name, value in estimator.state_dict().items())


def test_vimco_leaves_out_the_right_sample():
    """At two equal log-weights every signal is zero; the value is the bound."""
    q = bits().detached()
    estimate = VIMCO()(q, lambda b: 0 * b.sum(-1) + 1.5, 4)
    torch.testing.assert_close(estimate.value, torch.tensor([1.5], dtype=torch.float64))
    assert torch.autograd.grad(estimate.value.sum(), q.logits)[0].abs().max() < 1e-15


@pytest.mark.parametrize("make", [bits, classes])
def test_latents_are_torchs_distributions(make):
    q = make()
    torch_q = (torch.distributions.Bernoulli(logits=q.logits) if isinstance(q, Bernoulli) else
               torch.distributions.OneHotCategorical(logits=q.logits))
    other = type(q)(torch.randn_like(q.logits))
    torch_other = type(torch_q)(logits=other.logits)
    b = q.sample(5)
    events = tuple(range(1, torch_q.entropy().dim()))
    torch.testing.assert_close(q.log_prob(b), torch_q.log_prob(b).sum(tuple(i + 1 for i in events)))
    torch.testing.assert_close(q.entropy(), torch_q.entropy().sum(events))
    torch.testing.assert_close(q.kl(other), torch.distributions.kl_divergence(torch_q, torch_other).sum(events))
    leaf = q.detached()
    score, = torch.autograd.grad(leaf.log_prob(b[:1]).sum(), leaf.logits)
    torch.testing.assert_close(leaf.score(b[:1])[0], score)
    torch.testing.assert_close(q.table().exp().sum(-1), torch.ones(q.table().shape[:-1], dtype=torch.float64))
    assert q.mode().shape == q.logits.shape
    torch.testing.assert_close(q.log_prob(q.states()[:, None]).exp().sum(0), torch.ones(len(q.logits)).double())


@pytest.mark.parametrize("family", [Bernoulli, Categorical])
@pytest.mark.parametrize(("distance", "logits"), [*((d, (0.3, -2.0, 1.1)) for d in (1e-4, 1e-2, 0.9, 30.0)),
                                                  (1e-3, (10.0, 9.0, 10.0))])
def test_kl_is_accurate_in_float32(family, distance, logits):
    """Near the prior too, where it is a difference of nearly equal numbers, those of likely bits among them; and its
    gradient."""
    logits = torch.tensor([[logits]])
    near = (logits + distance * torch.tensor([1.0, -0.5, 0.25])).requires_grad_()
    exact = near.detach().double().requires_grad_()
    value, truth = family(near).kl(family(logits)), family(exact).kl(family(logits.double()))
    torch.testing.assert_close(value.double(), truth, rtol=5e-3 if distance <= 1e-3 else 1e-4, atol=0)
    gradients = torch.autograd.grad(value.sum(), near)[0].double(), torch.autograd.grad(truth.sum(), exact)[0]
    torch.testing.assert_close(*gradients, rtol=2e-3, atol=2e-7)
    same = family(near).kl(family(near))
    assert same.abs().max() == 0


@pytest.mark.parametrize("make", [bits, classes])
def test_conditional_noise_hardens_to_its_sample_and_has_the_marginal(make):
    q = make()
    q = type(q)(q.logits[:1])
    n = 40_000
    u, v = q.noise(n), q.noise(n)
    z = q.perturb(u)
    b = q.harden(z)
    given = q.conditional(b, v)
    assert torch.equal(q.harden(given), b)
    frequency, error = b.mean(0), (q.probs * (1 - q.probs) / n).sqrt()
    assert ((frequency - q.probs).abs() < 4 * error).all()
    # Same law: quantiles of the free and of the conditional draws agree within their error.
    for level in (0.1, 0.5, 0.9):
        cut = torch.quantile(z, level, dim=0)
        share = (given <= cut).double().mean(0)
        assert ((share - level).abs() < 4.5 * math.sqrt(2 * level * (1 - level) / n)).all()


MASKED = {
    "2 of 3 classes": lambda: Categorical(torch.tensor([[0.0, -math.inf, 0.5]], dtype=torch.float64)),
    "certain classes": lambda: Categorical(torch.tensor([[[0.4, -math.inf, 0.0], [-math.inf, -math.inf, 1.0],
                                                          [2.0, -math.inf, -math.inf]]], dtype=torch.float64)),
    "certain bits": lambda: Bernoulli(torch.tensor([[math.inf, 0.3, -math.inf]], dtype=torch.float64)),
}


def uneven(b):
    return (b * torch.tensor([1.0, 2.0, 4.0], dtype=b.dtype)).flatten(2).sum(2) ** 2


def test_what_never_happens_counts_nothing():
    """E of a function over two of three classes, and of certain bits, with gradients; NaN is NaN."""
    for objective, k, value, slope in (("mean", 1, 8.5, 3.75), ("iwae", 2, None, None)):
        q = Categorical(torch.tensor([[0.0, -math.inf, 0.0]], dtype=torch.float64)).detached()
        for f in (uneven, lambda b, q=q: uneven(b) - q.log_prob(b).detach() - math.log(2.0)):
            found = exact(q, f, objective=objective, n_samples=k)
            gradient, = torch.autograd.grad(found.sum(), q.logits)
            two = Categorical(torch.zeros(1, 2, dtype=torch.float64)).detached()
            same = exact(two, lambda b: uneven(torch.stack([b[..., 0], 0.0 * b[..., 0], b[..., 1]], -1)),
                         objective=objective, n_samples=k)
            torch.testing.assert_close(found, same if value is None else torch.full_like(found, value))
            of_two, = torch.autograd.grad(same.sum(), two.logits)
            torch.testing.assert_close(gradient[:, [0, 2]], of_two)
            assert gradient[0, 1] == 0 and (slope is None or gradient[0, 2] == pytest.approx(slope))
    bits = MASKED["certain bits"]().detached()
    p = torch.sigmoid(bits.logits[0, 1]).detach()
    found = Enumeration()(bits, uneven).value
    torch.testing.assert_close(found, (1.0 - p + 9.0 * p)[None])
    gradient, = torch.autograd.grad(found.sum(), bits.logits)
    torch.testing.assert_close(gradient, torch.stack([0.0 * p, 8.0 * p * (1.0 - p), 0.0 * p])[None])
    for family in (Categorical, Bernoulli):
        for objective in ("mean", "iwae"):
            assert exact(family(torch.tensor([[0.0, math.nan, 0.0]])), uneven, objective=objective).isnan().all()


@pytest.mark.parametrize("name", MASKED)
def test_latents_that_are_certain(name):
    """log-probabilities, entropy and KL are those of what can happen, and finite gradients."""
    q = MASKED[name]().detached()
    small = type(q)(q.logits.detach().clamp(-800.0, 800.0))
    states = q.states()[:, None]
    log_prob = q.log_prob(states)
    torch.testing.assert_close(log_prob.exp(), small.log_prob(states).exp())
    assert log_prob.isinf().any() and not log_prob.isnan().any()
    other = type(q)(torch.zeros_like(q.logits))
    torch.testing.assert_close(q.entropy(), small.entropy())
    torch.testing.assert_close(q.kl(other), small.kl(other))
    torch.testing.assert_close(q.kl(type(q)(q.logits.detach())), torch.zeros(1).double())
    assert other.kl(q).item() == math.inf
    finite = torch.where(log_prob.isinf(), 0.0, log_prob).sum()
    for value in (finite, q.entropy().sum(), q.kl(other).sum()):
        assert torch.autograd.grad(value, q.logits, retain_graph=True)[0].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("problem", MASKED)
@pytest.mark.parametrize("k", [2, 5])
def test_every_estimator_of_latents_that_are_certain(problem, name, k):
    q = MASKED[problem]().detached()
    estimator = estimators.create(name, q.event_shape).double()
    for f in (uneven, lambda b: uneven(b) - q.log_prob(b)):
        estimate = estimator(q, f, k)
        (estimate.value.sum() + estimate.auxiliary).backward()
        wanted = [q.logits, *(p for p in estimator.parameters() if p.grad is not None)]
        assert estimate.value.isfinite().all() and all(t.grad.isfinite().all() for t in wanted)


@pytest.mark.parametrize("name", ["reinforce", "rloo", "disarm", "arm", "rebar", "unordered-set"])
def test_gradients_of_masked_classes_are_unbiased(name):
    found = measure(estimators.create(name, (3,)).double(), MASKED["2 of 3 classes"](), uneven, 2, 4000,
                    generator=torch.Generator().manual_seed(0))
    assert found.is_unbiased() and found.exact[0, 1] == 0 and found.exact[0, 0] < -3.0


@pytest.mark.parametrize("logit", [-60.0, 60.0])
def test_extreme_logits_stay_finite(logit):
    for q in (Bernoulli(torch.full((2, 3), logit)), Categorical(torch.tensor([[[logit, 0.0, 1.0]]]))):
        for name in NAMES:
            leaf = q.detached()
            estimate = estimators.create(name, q.event_shape)(leaf, lambda b: b.flatten(2).sum(2), 2)
            (estimate.value.sum() + estimate.auxiliary).backward()
            assert leaf.logits.grad.isfinite().all() and estimate.value.isfinite().all(), name


def test_generators_reproduce():
    generator = torch.Generator()
    for name in NAMES:
        estimator = estimators.create(name, (3,)).double()
        first, second = (estimator(bits(), coupled, 2, generator=generator.manual_seed(5)).samples for _ in range(2))
        assert torch.equal(first, second), name


def test_a_generator_of_another_device_serves(monkeypatch):
    """A GPU refuses to draw from a generator of the CPU; the meta device, here in its place, would not."""
    rand, logits = torch.rand, torch.zeros(2, 3, device="meta")

    def strict(shape, *, generator, dtype, device):
        assert torch.device(device) == generator.device
        return rand(shape, generator=generator, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "rand", strict)
    for name in ("rloo", "unordered-set"):
        drawn = estimators.create(name, (3,))(Bernoulli(logits), lambda b: b.sum(2), 2, generator=torch.Generator())
        assert drawn.samples.device == logits.device and drawn.samples.shape == (2, 2, 3)


def test_measuring_one_by_one_and_together_agree():
    """Reading the logits inside f turns the batch off; the result is the same in law."""
    q = bits().detached()
    together = measure(RLOO(), q, coupled, 2, 20_000)
    alone = measure(RLOO(), q, lambda b: coupled(b) + 0 * q.logits.sum(), 2, 1500)
    torch.testing.assert_close(together.exact, alone.exact)
    torch.testing.assert_close(together.variance, alone.variance, rtol=0.25, atol=0)
    assert alone.is_unbiased() and together.is_unbiased() and q.logits.grad is None


class CallsMean(REINFORCE):
    """The baseline is the mean of the call, own samples included: biased by 1/(K B) of the gradient."""

    def signal(self, q, values):
        return values - values.mean(), torch.zeros(())


def test_measuring_makes_calls_of_their_own_of_what_averages_over_a_call():
    """In one batch of all repeats the own sample would hardly count, and the bias be lost."""
    found = measure(CallsMean(), bits(), lambda b: coupled(b) + 3.0, 2, 1000)
    assert found.largest_deviation > 10
    torch.testing.assert_close(found.mean, found.exact / 2, rtol=0, atol=5 * found.standard_error.max().item())
    names = {name for name in NAMES if "independent_rows" not in vars(type(estimators.create(name, (3,))))}
    assert names == {"moving-average", "nvil"}


def test_measuring_a_moving_average_as_it_is_once_settled():
    """A far offset costs a fresh average as much variance as none at all; warmed up, only what it still wavers by."""
    f = lambda b: coupled(b) + 10.0  # noqa: E731
    plain = measure(REINFORCE(), bits(), f, 1, 4000).variance.sum()
    fresh = measure(MovingAverage(), bits(), f, 1, 2, n_warmup=0)
    settled = measure(MovingAverage(), bits(), f, 1, 1000)
    best = measure(REINFORCE(), bits(), lambda b: coupled(b) - exact(bits(), coupled), 1, 4000).variance.sum()
    assert fresh.variance.sum() > 10 * best
    assert 0.9 * best < settled.variance.sum() < 1.5 * best < 0.02 * plain and settled.is_unbiased()


def test_measuring_leaves_the_estimator_alone():
    estimator = MovingAverage()
    measure(estimator, bits(), coupled, n_repeats=10)
    assert estimator.weight == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [lambda n: Bernoulli(torch.zeros(n, 3)), lambda n: Categorical(torch.zeros(n, 2, 4)),
                                  lambda n: Bernoulli(torch.zeros(n))])
def test_empty_batches(name, make):
    """No values, and averages over calls that stay as they are."""
    q = make(0).detached()
    estimator = estimators.create(name, q.event_shape)
    estimate = estimator(q, lambda b: b.flatten(2).sum(2) if b.dim() > 2 else b, 3)
    assert estimate.value.shape == (0,) and estimate.samples.shape[1:] == q.logits.shape
    assert all(value.isfinite().all() for value in estimator.state_dict().values())


def test_scalar_events():
    q = Bernoulli(torch.tensor([0.3, -0.2], dtype=torch.float64))
    for name in ("reinforce", "rloo", "disarm", "arm", "rebar", "unordered-set", "vimco", "gumbel-softmax"):
        assert estimators.create(name, ())(q.detached(), lambda b: 2 * b, 2).value.shape == (2,)
    torch.testing.assert_close(exact(q, lambda b: 2 * b), 2 * q.probs)


@pytest.mark.parametrize(("error", "call", "message"), [
    (TypeError, lambda: RLOO()(torch.zeros(1, 2), coupled, 2), "q"),
    (ValueError, lambda: RLOO()(bits(), coupled, 1), "n_samples"),
    (ValueError, lambda: REINFORCE()(bits(), coupled, 0), "n_samples"),
    (ValueError, lambda: DisARM()(bits(), lambda b: b, 1), "f"),
    (ValueError, lambda: Enumeration()(Bernoulli(torch.zeros(1, 30)), coupled), "65536"),
    (ValueError, lambda: exact(bits(), coupled, objective="iwae", n_samples=9), "n_samples"),
    (ValueError, lambda: exact(bits(), coupled, objective="sum"), "objective"),
    (TypeError, lambda: Bernoulli(torch.zeros(1, 2, dtype=torch.long)), "logits"),
    (ValueError, lambda: Categorical(torch.zeros(3)), "logits"),
    (ValueError, lambda: estimators.GumbelSoftmax(0.0), "temperature"),
    (ValueError, lambda: REBAR(-1.0), "temperature"),
    (ValueError, lambda: MovingAverage(1.0), "decay"),
    (ValueError, lambda: NeuralBaseline(nn.Identity())(bits().detached(), lambda b: b.sum(-1).float()), "network"),
    (ValueError, lambda: RELAX(nn.Identity())(bits().detached(), coupled), "network"),
    (ValueError, lambda: estimators.create("reinforced", (3,)), "estimator"),
    (TypeError, lambda: estimators.create(None, (3,)), "estimator"),
    (ValueError, lambda: measure(RLOO(), bits(), coupled, 2, 1), "n_repeats"),
    (ValueError, lambda: measure(RLOO(), bits(), coupled, 2, 10, n_warmup=-1), "n_warmup"),
    (TypeError, lambda: measure(3, bits(), coupled), "^estimator"),
    (TypeError, lambda: exact(3, coupled), "^q"),
    (ValueError, lambda: exact(bits(), coupled, n_samples=0), "^n_samples"),
    (TypeError, lambda: REINFORCE()(bits(), lambda b: b.sum(-1).long()), "^f: .* floating dtype, got torch.int64"),
    (ValueError, lambda: Categorical(torch.zeros(3, 0)), "^logits"),
    (TypeError, lambda: bits().sample(generator=3), "^generator"),
    (ValueError, lambda: bits().sample(-1), "^n:"),
    (ValueError, lambda: bits().log_prob(bits().mode()), "^b: expected shape"),
    (ValueError, lambda: Bernoulli(torch.zeros(4, 3)).log_prob(torch.zeros(2, 4, 1)), r"^b: .*\(K, 4, 3\)"),
    (ValueError, lambda: Categorical(torch.zeros(4, 3)).log_prob(torch.zeros(2, 2, 3)), r"^b: .*\(K, 4, 3\)"),
    (ValueError, lambda: bits().kl(Bernoulli(torch.zeros(1, 1))), "^other: expected logits of shape"),
    (ValueError, lambda: Categorical(torch.zeros(4, 3)).kl(Categorical(torch.zeros(2, 3))), "^other"),
    (TypeError, lambda: bits().kl(classes()), "^other: expected a Bernoulli, got Categorical"),
])
def test_errors_name_the_argument(error, call, message):
    with pytest.raises(error, match=message):
        call()
