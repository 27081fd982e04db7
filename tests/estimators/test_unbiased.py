"""Estimators against a sum over every state: expectation to rounding, variance, and which are biased."""

import copy
import itertools
import math

import pytest
import torch
from discrete_problems import PROBLEMS, SIZES, C, assert_variance, bits, coupled, moments, quadratic, tuples

from fastflow import estimators
from fastflow.estimators import (
    ARM,
    NVIL,
    RLOO,
    VIMCO,
    DisARM,
    MovingAverage,
    NeuralBaseline,
    UnorderedSet,
    baseline_network,
    exact,
    measure,
)
from fastflow.estimators.unordered import _log_weights

BIASED = ("gumbel-softmax", "straight-through", "straight-through-gumbel")
UNBIASED = tuple(name for name in estimators.ESTIMATORS if name not in (*BIASED, "enumeration"))


def one_row(problem):
    make, f = SIZES[problem]
    q = make()
    return type(q)(q.logits[:1]), f


def truth(q, f, **options):
    q = q.detached()
    return torch.autograd.grad(exact(q, f, **options).sum(), q.logits)[0]


def create(name, q):
    return estimators.create(name, q.event_shape).double()


def test_enumeration_is_the_closed_form():
    p = bits().probs[0]
    torch.testing.assert_close(exact(bits(), quadratic), torch.tensor([0.5025], dtype=torch.float64))
    torch.testing.assert_close(truth(bits(), quadratic)[0], p * (1 - p) * (1 - 2 * C), rtol=0, atol=1e-15)


def settled(estimator):
    """The estimator with averages of calls past; it stays in training mode, in which it goes on averaging."""
    if isinstance(estimator, (MovingAverage, NVIL)):
        estimator.average.fill_(0.7)
    if isinstance(estimator, MovingAverage):
        estimator.weight.fill_(1.0)
    if isinstance(estimator, NVIL):
        estimator.variance.fill_(0.6)  # below 1, where nothing is divided yet
    return estimator


def row_by_row(estimator, q, f, samples):
    """value (N,) and gradient (N, *event) of samples (K, N, *event), each row a call of its own from the averages that
    the estimator has now."""
    found = []
    for row in range(samples.shape[1]):
        one = type(q)(q.logits[row:row + 1].detach().requires_grad_())
        value = copy.deepcopy(estimator).at(one, f, samples[:, row:row + 1]).value
        found.append((value.detach(), torch.autograd.grad(value.sum(), one.logits)[0]))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


@pytest.mark.parametrize(("name", "k"), [("reinforce", 1), ("reinforce", 2), ("moving-average", 1),
                                         ("moving-average", 2), ("nvil", 1), ("nvil", 2), ("rloo", 2), ("rloo", 3),
                                         ("neural-baseline", 2), ("vimco", 2), ("vimco", 3)])
@pytest.mark.parametrize("problem", SIZES)
def test_score_functions_are_unbiased_to_rounding(problem, name, k):
    """The estimator runs on every k-tuple of states; their weighted mean is its expectation, without sampling, and
    their weighted variance the one that sampling shows."""
    q, f = one_row(problem)
    estimator = settled(create(name, q))
    alone = name in ("moving-average", "nvil")
    q_all, samples, probabilities = tuples(q, k)
    if alone:
        values, gradients = row_by_row(estimator, q_all, f, samples)
    else:
        values = estimator.at(q_all, f, samples).value
        gradients, = torch.autograd.grad(values.sum(), q_all.logits)
    mean, variance, fourth = moments(gradients, probabilities)
    objective = {"objective": estimator.objective, "n_samples": k}
    torch.testing.assert_close(mean, truth(q, f, **objective)[0], rtol=0, atol=1e-13)
    torch.testing.assert_close((probabilities * values).sum(), exact(q, f, **objective)[0])
    if not alone or problem in PROBLEMS:
        # In eval mode the averages stay what they were for the enumeration.
        measured = measure(estimator.eval(), q, f, k, 500 if alone else 20_000, n_warmup=0)
        assert_variance(measured, variance, fourth)


def test_variance_of_reinforce_is_the_published_one():
    q, samples, probabilities = tuples(bits(), 1)
    for shift, expected in ((0.0, (0.128641, 0.09192656, 0.12288656)), (0.5025, (0.030352, 0.0288, 0.042273))):
        value = estimators.REINFORCE().at(q, lambda b, shift=shift: quadratic(b) - shift, samples).value
        _, variance, _ = moments(torch.autograd.grad(value.sum(), q.logits)[0], probabilities)
        torch.testing.assert_close(variance, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-7)


def test_leave_one_out_is_the_pairwise_formula():
    """(f1 - f2)(score1 - score2)/2 for two samples."""
    q, samples, _ = tuples(bits(), 2)
    gradients, = torch.autograd.grad(RLOO().at(q, coupled, samples).value.sum(), q.logits)
    f = coupled(samples)
    torch.testing.assert_close(gradients, ((f[0] - f[1])[:, None] * (samples[0] - samples[1]) / 2).detach())


def antithetic_cells(q):
    """Uniform u at the nodes of a quadrature that is exact for polynomials of degree 3 on each interval where the pair
    of bits does not change: (N, *event) with weights (N,)."""
    offset = math.sqrt(1 / 12)
    axes = []
    for p in torch.sigmoid(q.logits.detach()).flatten().tolist():
        ends = sorted({0.0, min(p, 1 - p), max(p, 1 - p), 1.0})
        axes.append([(0.5 * (a + b) + s * (b - a) * offset, 0.5 * (b - a))
                     for a, b in zip(ends, ends[1:], strict=False) for s in (-1, 1)])
    nodes = list(itertools.product(*axes))
    u = torch.tensor([[node[0] for node in row] for row in nodes], dtype=torch.float64)
    return u, torch.tensor([math.prod(node[1] for node in row) for row in nodes], dtype=torch.float64)


@pytest.mark.parametrize("estimator", [ARM(), DisARM()])
@pytest.mark.parametrize("problem", SIZES)
def test_antithetic_pairs_by_quadrature(problem, estimator):
    """Expectation to rounding, and the variance that sampling shows."""
    q, f = one_row(problem)
    sticks = q
    if isinstance(q, estimators.Categorical):
        probs = q.probs
        sticks = estimators.Bernoulli(torch.logit((probs / probs.flip(-1).cumsum(-1).flip(-1))[..., :-1]))
    u, weights = antithetic_cells(sticks)
    q_all = type(q)(q.logits.detach().repeat(len(u), *[1] * (q.logits.dim() - 1)).requires_grad_())
    estimate = estimator.at(q_all, f, u.reshape(1, len(u), *sticks.event_shape))
    mean, variance, fourth = moments(torch.autograd.grad(estimate.value.sum(), q_all.logits)[0], weights)
    torch.testing.assert_close(mean, truth(q, f)[0], rtol=0, atol=1e-13)
    measured = measure(estimator, q, f, n_repeats=20_000)
    assert measured.is_unbiased()
    assert_variance(measured, variance, fourth)


def to_the_ends(low, high):
    """Nodes and weights on (low, high) for functions with singular ends, by the double exponential rule."""
    t = 0.15 * torch.arange(-20, 21, dtype=torch.float64)
    s = torch.sigmoid(math.pi * torch.sinh(t))
    weights = 0.15 * math.pi * torch.cosh(t) * s * (1 - s)
    return low + (high - low) * s, (high - low) * weights


@pytest.mark.parametrize("name", ["rebar", "relax"])
@pytest.mark.parametrize("logit", [-1.2, 0.1, 0.8])
def test_reparameterised_controls_by_quadrature(logit, name):
    """Of one bit, over the noise of z and of z~: each gradient against the published formula written out, their mean
    against enumeration, their variance against sampling."""
    q, f = estimators.Bernoulli(torch.tensor([[logit]], dtype=torch.float64)), SIZES["1 bit"][1]
    p = q.probs.item()
    pieces = [to_the_ends(low, high) for low, high in ((0.0, 1 - p), (1 - p, 1.0))]
    (u, u_weights), (v, v_weights) = [torch.cat(parts) for parts in zip(*pieces, strict=True)], to_the_ends(0.0, 1.0)
    weights = (u_weights[:, None] * v_weights).flatten()
    u, v = (t.flatten() for t in torch.meshgrid(u, v, indexing="ij"))
    estimator = create(name, q)
    q_all = estimators.Bernoulli(q.logits.repeat(len(u), 1).requires_grad_())
    value = estimator.at(q_all, f, u[None, :, None], v[None, :, None]).value
    gradients, = torch.autograd.grad(value.sum(), q_all.logits)

    b = (u > 1 - p).double()
    one, odds = b == 1, math.exp(logit)
    free = logit + torch.log(u) - torch.log1p(-u)
    given = torch.where(one, torch.log((1 + odds * v) / (1 - v)), torch.log(v / (1 + (1 - v) / odds)))
    # Of z~ by the logit: b = 1 has odds v / (1 + odds v), b = 0 has its mirror image.
    moves = torch.where(one, odds * v / (1 + odds * v), (1 - v) / odds / (1 + (1 - v) / odds))
    control, slope = [], []
    for z in (free, given):
        z = z.clone().requires_grad_()
        c = estimator.eta * f(torch.sigmoid(z / 0.5)[None, :, None])[0]
        if name == "relax":
            c = c + estimator.network(z[:, None])
        control.append(c.detach())
        slope.append(torch.autograd.grad(c.sum(), z)[0])
    want = (f(b[None, :, None])[0] - control[1]) * (b - p) + slope[0] - slope[1] * moves
    torch.testing.assert_close(gradients[:, 0], want, rtol=1e-6, atol=1e-8)
    mean, variance, fourth = moments(gradients, weights)
    torch.testing.assert_close(mean, truth(q, f)[0], rtol=0, atol=1e-9)
    assert_variance(measure(estimator, q, f, n_repeats=20_000), variance, fourth)


def test_disarm_is_arm_with_noise_removed():
    pair = [measure(e, bits(), coupled, n_repeats=20_000).variance for e in (ARM(), DisARM())]
    assert (pair[1] < pair[0]).all()


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("problem", [name for name in SIZES if name != "1 bit"])
def test_unordered_set_sums_over_every_set(problem, k):
    """P(set) from its orders; the estimate of each set, so weighed, sums to the gradient to rounding."""
    q, f = one_row(problem)
    states = q.states()
    probs = q.log_prob(states[:, None])[:, 0].exp()
    sets = torch.tensor(list(itertools.combinations(range(len(states)), k)))
    weights = torch.zeros(len(sets), dtype=torch.float64)
    for order in itertools.permutations(range(k)):
        left, chance = torch.ones(len(sets), dtype=torch.float64), 1.0
        for place in order:
            chance = chance * probs[sets[:, place]] / left
            left = left - probs[sets[:, place]]
        weights += chance
    assert abs(weights.sum() - 1) < 1e-12
    q_all = type(q)(q.logits.detach().repeat(len(sets), *[1] * (q.logits.dim() - 1)).requires_grad_())
    estimate = UnorderedSet().at(q_all, f, states[sets].transpose(0, 1))
    mean, variance, fourth = moments(torch.autograd.grad(estimate.value.sum(), q_all.logits)[0], weights)
    torch.testing.assert_close(mean, truth(q, f)[0], rtol=0, atol=1e-12)
    torch.testing.assert_close((weights * estimate.value).sum(), exact(q, f)[0])
    assert_variance(measure(UnorderedSet(), q, f, k, 2000), variance, fourth)


def test_unordered_set_of_all_states_is_exact():
    q = bits().detached()
    estimate = UnorderedSet()(q, coupled, 20)
    assert len({tuple(b) for b in estimate.samples[:, 0].tolist()}) == len(estimate.samples) == 8
    gradient, = torch.autograd.grad(estimate.value.sum(), q.logits)
    torch.testing.assert_close(gradient, truth(q, coupled), rtol=0, atol=1e-12)
    torch.testing.assert_close(estimate.value, exact(q, coupled))


@pytest.mark.parametrize("k", [24, 100])
def test_unordered_set_of_many_samples(k):
    """Of states that are all equally likely each weighs 1/k, and so each of the others once one is known."""
    log_weights, log_inner = _log_weights(torch.full((k, 1), -math.log(4096.0), dtype=torch.float64))
    torch.testing.assert_close(log_weights.exp(), torch.full((k, 1), 1 / k, dtype=torch.float64), rtol=1e-11, atol=0)
    own = torch.eye(k, dtype=torch.float64)
    expected = own / 4096 + (1 - own) * (1 - 1 / 4096) / (k - 1)
    torch.testing.assert_close(log_inner.exp()[..., 0], expected, rtol=1e-10, atol=0)


def test_unordered_set_of_improbable_states():
    """A thousand bits: each state's probability is far below what a float holds."""
    q = estimators.Bernoulli(torch.randn(2, 1000, requires_grad=True))
    estimate = UnorderedSet()(q, lambda b: b.mean(-1), 4)
    estimate.value.sum().backward()
    assert estimate.value.isfinite().all() and abs(estimate.value - q.probs.mean(1)).max() < 0.1


def test_samples_without_replacement_have_their_chances():
    q = estimators.Categorical(torch.tensor([[0.0, 1.0, -0.5, 0.3]], dtype=torch.float64).expand(20_000, 4))
    pairs = UnorderedSet()(q, lambda b: b[..., 0], 2).samples.sum(0)
    p = q.probs[0]
    expected = torch.stack([p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(4) if j != i) for i in range(4)])
    error = (expected * (1 - expected) / 20_000).sqrt()
    assert ((pairs.mean(0) - expected).abs() < 4 * error).all()


@pytest.mark.parametrize("name", UNBIASED)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_unbiased_by_sampling(problem, name):
    make, f = PROBLEMS[problem]
    q = make()
    estimator = NVIL(baseline_network(q.event_shape), normalise=False).double() if name == "nvil" else create(name, q)
    n_repeats = {"unordered-set": 2000, "moving-average": 1000, "nvil": 1000}.get(name, 6000)
    found = measure(estimator, q, f, n_samples=3, n_repeats=n_repeats)
    assert found.is_unbiased(), (name, found.largest_deviation)
    assert (found.variance > 0).any()


@pytest.mark.parametrize("name", BIASED)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_biased_ones_are_caught(problem, name):
    make, f = PROBLEMS[problem]
    q = make()
    assert measure(create(name, q), q, f, n_samples=3, n_repeats=6000).largest_deviation > 20


class UpdatedFirst(MovingAverage):
    """A moving average that has taken in the very samples it is subtracted from."""

    def signal(self, q, values):
        super().signal(q, values)
        return values - self.average / self.weight, torch.zeros(())


class UpdatedFirstNVIL(NVIL):
    def signal(self, q, values):
        auxiliary = super().signal(q, values)[1]
        return NeuralBaseline.signal(self, q, values)[0] - self.average, auxiliary


class SummedVIMCO(VIMCO):
    """VIMCO whose score is averaged over the samples, not summed."""

    def at(self, q, f, samples):
        estimate = super().at(q, f, samples)
        return estimate._replace(value=estimate.value / len(samples))


@pytest.mark.parametrize(("make", "k"), [(UpdatedFirst, 1), (lambda: UpdatedFirstNVIL(baseline_network((3,))), 1),
                                         (SummedVIMCO, 2)])
def test_wrong_estimators_are_rejected(make, k):
    q, samples, probabilities = tuples(bits(), k)
    estimator = settled(make().double())
    mean, *_ = moments(row_by_row(estimator, q, coupled, samples)[1], probabilities)
    assert (mean - truth(bits(), coupled, objective=estimator.objective, n_samples=k)[0]).abs().max() > 1e-3


def test_gumbel_softmax_loses_its_bias_with_the_temperature():
    biases, variances = [], []
    for temperature in (1.0, 0.3, 0.1):
        found = measure(estimators.GumbelSoftmax(temperature), bits(), coupled, n_repeats=100_000)
        biases.append(found.bias.norm())
        variances.append(found.variance.mean())
    assert biases[0] > 2 * biases[1] > 4 * biases[2] and variances[2] > variances[0]


def test_straight_through_is_unbiased_where_f_is_linear():
    found = measure(estimators.StraightThrough(), bits(), lambda b: (b * C).sum(-1), n_repeats=2)
    assert found.bias.abs().max() < 1e-14


def test_nvil_only_rescales():
    """Its mean is the gradient over the standard deviation that it had."""
    q = bits()
    estimator = create("nvil", q).eval()
    estimator.variance.fill_(4.0)
    found = measure(estimator, q, coupled, n_samples=2, n_repeats=2000)
    assert not found.is_unbiased()
    assert ((found.mean - found.exact / 2).abs() < 4 * found.standard_error).all()
