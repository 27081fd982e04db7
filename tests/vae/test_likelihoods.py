"""Likelihoods are normalised, keep every constant, and agree with torch.distributions where it has them."""

import itertools
import math

import mpmath
import pytest
import torch
from torch import distributions

from fastflow.vae import (
    BernoulliLikelihood,
    CategoricalLikelihood,
    ContinuousBernoulliLikelihood,
    DiscretizedLogisticLikelihood,
    GaussianLikelihood,
    LaplaceLikelihood,
    LogisticMixtureLikelihood,
    NegativeBinomialLikelihood,
    PoissonLikelihood,
)


def normal(*shape, scale=1.0, seed=0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fitted(mean_square=0.7):
    likelihood = GaussianLikelihood("optimal").double().eval()
    likelihood.mean_square.fill_(mean_square)
    return likelihood


def learned(kind):
    likelihood = kind().double()
    with torch.no_grad():
        likelihood.log_sigma.fill_(0.4)
    return likelihood


COUNTS = torch.arange(4000.0, dtype=torch.float64)[:, None]
GRID = torch.linspace(-40, 40, 400_001, dtype=torch.float64)[:, None]
UNIT = (torch.arange(200_000, dtype=torch.float64)[:, None] + 0.5) / 200_000


@pytest.mark.parametrize(("likelihood", "grid", "step", "output"), [
    (BernoulliLikelihood(), torch.tensor([[0], [1]]), 1.0, [-3.2]),
    (CategoricalLikelihood(5), torch.arange(5)[:, None], 1.0, [0.3, -1.0, 2.0, 4.0, -9.0]),
    (PoissonLikelihood(), COUNTS, 1.0, [2.3]),
    (NegativeBinomialLikelihood(), COUNTS, 1.0, [2.1, 0.3]),
    (NegativeBinomialLikelihood(), COUNTS, 1.0, [1.0, -1.2]),
    (DiscretizedLogisticLikelihood(), torch.arange(256)[:, None], 1.0, [0.2, -3.0]),
    (DiscretizedLogisticLikelihood(), torch.arange(256)[:, None], 1.0, [1.4, -9.0]),  # far narrower than a bin
    (DiscretizedLogisticLikelihood(2), torch.arange(2)[:, None], 1.0, [-0.5, 3.0]),
    (ContinuousBernoulliLikelihood(), UNIT, 1 / 200_000, [-6.0]),
    (ContinuousBernoulliLikelihood(), UNIT, 1 / 200_000, [0.05]),
    (GaussianLikelihood(0.3), GRID, 2e-4, [0.7]),
    (GaussianLikelihood("decoder"), GRID, 2e-4, [0.7, -1.0]),
    (learned(GaussianLikelihood), GRID, 2e-4, [0.7]),
    (fitted(), GRID, 2e-4, [0.7]),
    (LaplaceLikelihood(0.6), GRID, 2e-4, [0.7]),
    (LaplaceLikelihood("decoder"), GRID, 2e-4, [0.7, -0.3]),
    (learned(LaplaceLikelihood), GRID, 2e-4, [0.7]),
])
def test_sums_to_one(likelihood, grid, step, output):
    output = torch.tensor([output], dtype=torch.float64).expand(len(grid), -1)
    log_prob = likelihood.log_prob(grid, output)
    assert log_prob.dtype == torch.float64 and log_prob.shape == (len(grid),)
    assert abs(log_prob.exp().sum() * step - 1) < 2e-8  # the rectangle rule's own error at Laplace's kink is 1e-8


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_mixture_of_logistics_sums_to_one(channels):
    """Over every value of a pixel with its channels together, and not over a wrong number of levels."""
    likelihood = LogisticMixtureLikelihood(channels, n_components=3, n_bins=5)
    x = torch.tensor(list(itertools.product(range(5), repeat=channels)))[:, :, None, None]
    output = normal(1, *likelihood.output_shape((channels, 1, 1)), scale=1.5)
    assert output.shape[1] == 3 * (1 + 2 * channels + channels * (channels - 1) // 2)
    log_prob = likelihood.log_prob(x, output.expand(len(x), -1, -1, -1))
    assert abs(log_prob.exp().sum() - 1) < 1e-12
    assert likelihood.log_prob(x[:1] - 1, output).item() == -math.inf


def test_mixture_of_one_logistic_is_the_logistic():
    x, params = torch.randint(0, 256, (4, 1, 3, 3)), normal(2, 4, 2, 3, 3)
    logits = normal(2, 4, 1, 3, 3, seed=1)
    one = LogisticMixtureLikelihood(1, n_components=1).log_prob(x, torch.cat([logits, params], 2))
    torch.testing.assert_close(one, DiscretizedLogisticLikelihood().log_prob(x, params), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("likelihood", "make", "x"), [
    (BernoulliLikelihood(), lambda a: distributions.Bernoulli(logits=a), torch.randint(0, 2, (3, 4)).double()),
    (ContinuousBernoulliLikelihood(), lambda a: distributions.ContinuousBernoulli(logits=a), torch.rand(3, 4).double()),
    (GaussianLikelihood(0.3), lambda a: distributions.Normal(a, 0.3), normal(3, 4)),
    (LaplaceLikelihood(0.3), lambda a: distributions.Laplace(a, 0.3), normal(3, 4)),
    (PoissonLikelihood(), lambda a: distributions.Poisson(a.exp()), torch.randint(0, 9, (3, 4)).double()),
    (NegativeBinomialLikelihood(), lambda a, b: distributions.NegativeBinomial(b.exp(), logits=a - b),
     torch.randint(0, 30, (3, 4)).double()),
    (GaussianLikelihood("decoder"), lambda a, b: distributions.Normal(a, torch.exp(5 * torch.tanh(b / 5))),
     normal(3, 4)),
    (CategoricalLikelihood(3), lambda *a: distributions.Categorical(logits=torch.stack(a, -1)),
     torch.randint(0, 3, (3, 4))),
])
def test_agrees_with_torch(likelihood, make, x):
    p = likelihood.params_per_element
    output = normal(2, 3, 4 * p, seed=1).requires_grad_()
    expected = make(*output.chunk(p, 2)).log_prob(x).sum(2)
    got = likelihood.log_prob(x, output)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    cotangent = normal(2, 3, seed=2)
    gradient, = torch.autograd.grad(got, output, cotangent, retain_graph=True)
    torch.testing.assert_close(gradient, *torch.autograd.grad(expected, output, cotangent), rtol=1e-7, atol=1e-8)
    if not isinstance(likelihood, CategoricalLikelihood):
        torch.testing.assert_close(likelihood.mean(output[0]), make(*output[0].chunk(p, 1)).mean, rtol=1e-7, atol=1e-8)


def test_laplace_samples_are_finite_at_the_ends_of_torch_rand(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.tensor([0.0, 0.5, 1.0 - 2.0**-24]).expand(shape))
    x = LaplaceLikelihood(1.0).sample(torch.zeros(1, 3))
    assert x.isfinite().all() and torch.equal(x[0, 0], -x[0, 2])


def test_labels_are_one_column():
    likelihood, labels, logits = CategoricalLikelihood(3), torch.tensor([0, 2]), normal(5, 2, 3)
    assert likelihood.output_shape(()) == (3,)
    expected = torch.log_softmax(logits, 2)[:, [0, 1], labels]
    torch.testing.assert_close(likelihood.log_prob(labels, logits), expected)
    assert likelihood.log_prob(torch.tensor([0, 3]), logits[0]).tolist()[1] == -math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logit", [0.0, 1e-8, -1e-5, 1e-3, 0.05, 0.199, -0.2, 0.201, 1.0, -7.0, 60.0, -500.0, 1e6,
                                   -1e30])
def test_continuous_bernoulli_near_one_half_and_far_from_it(logit, dtype):
    """Value, slope and mean against 50 digits."""
    mpmath.mp.dps = 50
    h, x = torch.tensor([[logit]], dtype=dtype, requires_grad=True), torch.tensor([[0.3]], dtype=dtype)
    exact, at = mpmath.mpf(h.item()), mpmath.mpf(x.item())
    log_norm = (mpmath.log(mpmath.expm1(exact) / exact) if exact else mpmath.mpf(0))
    mean = 1 / (1 - mpmath.exp(-exact)) - 1 / exact if exact else mpmath.mpf(1) / 2
    likelihood = ContinuousBernoulliLikelihood()
    value = likelihood.log_prob(x, h)
    value.sum().backward()
    eps = torch.finfo(dtype).eps
    assert abs(value.item() - float(exact * at - log_norm)) <= 30 * eps * (1 + 0.1 * abs(logit))
    assert abs(h.grad.item() - float(at - mean)) <= 30 * eps
    assert abs(likelihood.mean(h).item() - float(mean)) <= 30 * eps
    slope, = torch.autograd.grad(likelihood.mean(h).sum(), h)
    variance = 1 / exact**2 - 1 / (4 * mpmath.sinh(exact / 2) ** 2) if exact else mpmath.mpf(1) / 12
    assert abs(slope.item() - float(variance)) <= 300 * eps


def test_bernoulli_is_stable():
    logits = torch.tensor([[-200.0], [200.0], [-200.0]], requires_grad=True)
    log_prob = BernoulliLikelihood().log_prob(torch.tensor([[1.0], [1.0], [0.0]]), logits)
    torch.testing.assert_close(log_prob, torch.tensor([-200.0, 0.0, 0.0]))
    log_prob.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[1.0], [0.0], [0.0]]))


def test_logistic_gradients_stay_finite():
    output = torch.tensor([[3.0, -20.0], [-50.0, -3.0], [0.0, 30.0], [0.0, 500.0]], requires_grad=True)
    log_prob = DiscretizedLogisticLikelihood().log_prob(torch.tensor([[0], [255], [128], [128]]), output)
    log_prob.sum().backward()
    assert log_prob.isfinite().all() and output.grad.isfinite().all()
    torch.testing.assert_close(log_prob[3], torch.tensor(math.log(2 / 255) - math.log(4.0) - 500.0))


@pytest.mark.parametrize("log_r", [-100.0, -5.0, 0.0, 3.0, 4.15, 4.17, 8.0, 12.0, 20.0, 88.0, 800.0])
def test_negative_binomial_in_float32_whatever_its_r(log_r):
    """lgamma(x + r) - lgamma(r) has no digits left for a large r, where the law is nearly Poisson's."""
    likelihood, x = NegativeBinomialLikelihood(), torch.arange(200.0)[:, None]
    found = []
    for dtype in (torch.float32, torch.float64):
        output = torch.tensor([[math.log(20.0), log_r]], dtype=dtype).expand(200, -1).clone().requires_grad_()
        log_prob = likelihood.log_prob(x, output)
        found.append((log_prob, *torch.autograd.grad(log_prob.sum(), output)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=2e-4)
    log_prob = found[1][0]
    if log_r >= 3.0:
        assert abs(torch.logsumexp(log_prob, 0)) < 1e-12
    if -5.0 <= log_r <= 8.0:  # where torch's formula has the digits
        r = torch.tensor(log_r, dtype=torch.float64).exp()
        reference = distributions.NegativeBinomial(r, logits=math.log(20.0) - log_r).log_prob(x.double())[:, 0]
        torch.testing.assert_close(log_prob, reference, rtol=1e-10, atol=1e-9)
    if log_r >= 20.0:
        poisson = distributions.Poisson(torch.tensor(20.0, dtype=torch.float64)).log_prob(x.double())[:, 0]
        torch.testing.assert_close(log_prob, poisson, rtol=1e-6, atol=1e-4)
        draws = likelihood.sample(torch.tensor([[math.log(20.0), log_r]]).expand(20_000, -1),
                                  generator=torch.Generator().manual_seed(0))
        assert abs(draws.mean() - 20.0) < 0.2 and abs(draws.var() - 20.0) < 1.0


@pytest.mark.parametrize("make", [
    BernoulliLikelihood, ContinuousBernoulliLikelihood, lambda: CategoricalLikelihood(3), PoissonLikelihood,
    NegativeBinomialLikelihood, lambda: DiscretizedLogisticLikelihood(4), lambda: LogisticMixtureLikelihood(2, 2, 4),
    lambda: GaussianLikelihood(0.5)])
def test_not_a_number_stays_so_and_does_not_spread(make):
    """NaN in x is NaN in log p and in the gradient of its own example alone; infinity is outside of what is bounded."""
    likelihood, x = make(), torch.tensor([[1.0, 0.0], [1.0, math.nan]])
    output = normal(2, *likelihood.output_shape((2,))).requires_grad_()
    log_prob = likelihood.log_prob(x.double(), output)
    assert log_prob.isnan().tolist() == [False, True]
    gradient, = torch.autograd.grad(log_prob.sum(), output)
    assert gradient[0].isfinite().all() and gradient[1].isnan().any()
    if likelihood.takes_integers:
        for outside in (-1.0, 0.5, math.inf, -math.inf):
            x = torch.tensor([[1.0, 0.0], [1.0, outside]]).double()
            found = likelihood.log_prob(x, output)
            assert found[1] == -math.inf
            assert torch.autograd.grad(found[0], output)[0][0].isfinite().all()


def test_outside_the_support():
    for likelihood, x, output in [(PoissonLikelihood(), [[-1.0], [0.5]], [[0.0]]),
                                  (NegativeBinomialLikelihood(), [[-1.0], [0.5]], [[0.0, 0.0]]),
                                  (ContinuousBernoulliLikelihood(), [[-0.1], [1.1]], [[0.0]]),
                                  (DiscretizedLogisticLikelihood(), [[-1.0], [256.0]], [[0.0, 0.0]])]:
        log_prob = likelihood.log_prob(torch.tensor(x), torch.tensor(output).expand(2, -1))
        assert torch.equal(log_prob, torch.full((2,), -math.inf))


@pytest.mark.parametrize("kind", [GaussianLikelihood, LaplaceLikelihood])
def test_learned_scale_has_its_closed_optimum(kind):
    """sigma^2 = mean square error, b = mean absolute error."""
    likelihood, x, mean = kind().double(), normal(50, 3), normal(50, 3, seed=1)
    best = 0.5 * math.log(((x - mean) ** 2).mean()) if kind is GaussianLikelihood else math.log((x - mean).abs().mean())
    with torch.no_grad():
        likelihood.log_sigma.fill_(best)
    likelihood.log_prob(x, mean).sum().backward()
    assert abs(likelihood.log_sigma.grad) < 1e-10


def test_optimal_sigma():
    """In training the likelihood is the largest of any sigma; its average serves in eval."""
    likelihood, x, mean = GaussianLikelihood("optimal").double(), normal(20, 3), normal(20, 3, seed=1).requires_grad_()
    square = ((x - mean) ** 2).mean()
    log_prob = likelihood.log_prob(x, mean)
    fixed = GaussianLikelihood(square.sqrt().item())
    torch.testing.assert_close(log_prob, fixed.log_prob(x, mean))
    assert all(log_prob.sum() > GaussianLikelihood(s * square.sqrt().item()).log_prob(x, mean).sum()
               for s in (0.97, 1.03))
    # At the optimum the gradient through sigma vanishes.
    gradient, = torch.autograd.grad(log_prob.sum(), mean)
    torch.testing.assert_close(gradient, *torch.autograd.grad(fixed.log_prob(x, mean).sum(), mean))
    torch.testing.assert_close(likelihood.mean_square, 0.9 + 0.1 * square.detach())
    before = likelihood.mean_square.clone()
    assert likelihood.log_prob(x, torch.full_like(mean, float("nan"))).isnan().all()
    assert torch.equal(likelihood.mean_square, before)  # a batch that is not finite leaves no trace
    likelihood.eval()
    torch.testing.assert_close(likelihood.log_prob(x, mean),
                               GaussianLikelihood(likelihood.mean_square.sqrt().item()).log_prob(x, mean))


LIKELIHOODS = [BernoulliLikelihood(), ContinuousBernoulliLikelihood(), GaussianLikelihood(0.5), GaussianLikelihood(),
               GaussianLikelihood("decoder"), LaplaceLikelihood(0.5), PoissonLikelihood(),
               NegativeBinomialLikelihood(), DiscretizedLogisticLikelihood(9), CategoricalLikelihood(2),
               LogisticMixtureLikelihood(2, 3, 9)]


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda each: type(each).__name__)
def test_samples_and_leading_dimensions(likelihood):
    x = torch.randint(0, 2, (3, 2, 4))
    output = torch.randn(5, 3, *likelihood.output_shape((2, 4)), generator=torch.Generator().manual_seed(1))
    log_prob = likelihood.log_prob(x, output)
    assert log_prob.shape == (5, 3)
    torch.testing.assert_close(log_prob[1], likelihood.log_prob(x, output[1]))
    generator = torch.Generator()
    one = likelihood.sample(output[0], generator=generator.manual_seed(0))
    assert one.shape == x.shape
    assert torch.equal(one, likelihood.sample(output[0], generator=generator.manual_seed(0)))
    assert likelihood.log_prob(one, output[0]).isfinite().all()
    assert likelihood.log_prob(x, output.bfloat16()).dtype == torch.float32
    many = likelihood.sample(output[0, :1].expand(20000, *output.shape[2:]), generator=generator).double()
    mean = likelihood.mean(output[0, :1])[0]
    if isinstance(likelihood, CategoricalLikelihood):
        mean = likelihood.probs(output[0, :1])[0, ..., 1].double()
    error = 4 * many.std(0) / math.sqrt(20000)
    if isinstance(likelihood, (DiscretizedLogisticLikelihood, LogisticMixtureLikelihood)):
        return  # their means are those before clipping; the histogram below is what proves their samples
    assert ((many.mean(0) - mean).abs() <= error + 1e-6).all()


@pytest.mark.parametrize("likelihood", [DiscretizedLogisticLikelihood(4), LogisticMixtureLikelihood(2, 2, 3)],
                         ids=lambda each: type(each).__name__)
def test_level_samples_have_their_probabilities(likelihood):
    channels, n = getattr(likelihood, "channels", 1), 40_000
    output = normal(1, *likelihood.output_shape((channels,)))
    states = torch.tensor(list(itertools.product(range(likelihood.n_bins), repeat=channels)))
    p = likelihood.log_prob(states, output.expand(len(states), -1)).exp()
    x = likelihood.sample(output.expand(n, -1), generator=torch.Generator().manual_seed(3))
    frequency = (x[:, None] == states).all(2).double().mean(0)
    assert ((frequency - p).abs() <= 4 * (p * (1 - p) / n).sqrt()).all()


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda each: type(each).__name__)
def test_double_is_not_mixed(likelihood):
    """But for integers, which every dtype holds."""
    shape = (getattr(likelihood, "channels", 1),)
    x, output = torch.zeros(2, *shape), torch.zeros(2, *likelihood.output_shape(shape))
    assert likelihood.log_prob(x.long(), output.double()).dtype == torch.float64
    with pytest.raises(TypeError, match="^x: expected a torch.Tensor"):
        likelihood.log_prob(x.tolist(), output)
    with pytest.raises(TypeError, match="^output: expected a dtype among"):
        likelihood.log_prob(x, output.long())
    with pytest.raises(ValueError, match="^output: expected device cpu like x, got meta"):
        likelihood.log_prob(x, output.to("meta"))
    for call in (likelihood.mean, likelihood.sample, lambda output: likelihood.log_prob(x, output)):
        with pytest.raises(TypeError, match="^output: expected a torch.Tensor, got int"):
            call(3)
    with pytest.raises(TypeError, match="^generator: expected a torch.Generator, got int"):
        likelihood.sample(output, generator=3)
    if likelihood.takes_integers:
        torch.testing.assert_close(likelihood.log_prob(x.double(), output), likelihood.log_prob(x, output))
        return
    with pytest.raises(TypeError, match="^output: expected float64 like x"):
        likelihood.log_prob(x.double(), output)
    with pytest.raises(TypeError, match="^x: expected float64 like output"):
        likelihood.log_prob(x, output.double())


@pytest.mark.parametrize(("error", "make", "message"), [
    (ValueError, lambda: GaussianLikelihood("variance"), "sigma"),
    (ValueError, lambda: LaplaceLikelihood(-1.0), "scale"),
    (TypeError, lambda: GaussianLikelihood([1]), "^sigma: expected a number, got list"),
    (TypeError, lambda: GaussianLikelihood(True), "^sigma: expected a number, got bool"),
    (ValueError, lambda: CategoricalLikelihood(1), "n_classes"),
    (ValueError, lambda: DiscretizedLogisticLikelihood(1), "n_bins"),
    (ValueError, lambda: LogisticMixtureLikelihood(0), "channels"),
    (ValueError, lambda: NegativeBinomialLikelihood().log_prob(torch.zeros(2, 3), torch.zeros(2, 3)), "output"),
    (ValueError, lambda: LogisticMixtureLikelihood(3).output_shape((1, 4, 4)), "x"),
    (ValueError, lambda: LogisticMixtureLikelihood(1, 2).log_prob(torch.zeros(2, 1), torch.zeros(2, 5)), "output"),
])
def test_errors_name_the_argument(error, make, message):
    with pytest.raises(error, match=message):
        make()
