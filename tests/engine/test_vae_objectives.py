"""The training step minimises what each kind of VAE maximises, over data as its likelihood takes them."""

import copy
import math
import types

import pytest
import torch
from sweeps import rest_slow
from torch import nn

from fastflow import vae
from fastflow.engine import TrainStep, capture
from fastflow.engine.evaluate import evaluate
from fastflow.engine.objectives import NegativeELBO, levels_of

SHAPE = (1, 4, 4)
X = torch.randint(0, 8, (6, *SHAPE), generator=torch.Generator().manual_seed(0))


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.0)


@pytest.mark.parametrize("make", [
    lambda: vae.BetaTCVAE(SHAPE, 2, 100, sizes=(8,)), lambda: vae.AdversarialAutoencoder(SHAPE, 2, sizes=(8,)),
    lambda: vae.IWAE(SHAPE, 2, n_samples=4, sizes=(8,)), lambda: vae.HVAE(SHAPE, (2, 2), 8),
    lambda: vae.VQVAE(SHAPE, 4, 2, (4,)),
], ids=["beta-tc", "adversarial", "iwae", "hvae", "vq"])
def test_loss_is_minus_the_objective(make):
    torch.manual_seed(0)
    model = make().eval()
    x = X / 7.0
    torch.manual_seed(1)
    result = model(x, beta=0.5)
    step = TrainStep(model, sgd(model), beta=0.5)
    torch.manual_seed(1)
    torch.testing.assert_close(step(x), -result.value.mean().detach())
    assert {"rate", "distortion", *result.parts} <= set(step.parts)
    torch.testing.assert_close(step.parts["rate"], result.rate.mean().detach())


def test_a_schedule_is_a_tensor_of_a_recorded_step(monkeypatch):
    """For which a number would be a constant."""
    monkeypatch.setattr(capture, "recorder_for", lambda device: types.SimpleNamespace(device=device))
    model, schedule = vae.MLPVAE((4,), 2, (8,)), vae.LinearSchedule(0.0, 1.0, 4)
    adam = torch.optim.Adam(model.parameters(), fused=True)
    beta = TrainStep(model, adam, capture=True, beta=schedule).objective.beta
    schedule.step(3)
    assert beta is schedule.tensor(torch.device("cpu")) and beta.item() == 0.75


@pytest.mark.parametrize(("objective", "words"), [
    (None, "negative ELBO of HVAE"), (vae.BoundObjective("dreg", 4), "minus BoundObjective(dreg) of HVAE"),
    (vae.PenalizedELBO(vae.KLBalance()), "minus PenalizedELBO(KLBalance) of HVAE"),
])
def test_what_is_trained_is_said(objective, words):
    model = vae.HVAE(SHAPE, (2, 2), 8, objective=objective)
    assert f"objective: {words}, mean over the batch" in TrainStep(model, sgd(model)).explain()


def test_labels_are_the_context():
    torch.manual_seed(0)
    model = vae.ConditionalVAE(SHAPE, 2, 3, (8,))
    labels, x = torch.arange(6) % 3, X / 7.0
    torch.manual_seed(1)
    expected = -model.elbo(x, context=labels).elbo.mean()
    torch.manual_seed(1)
    torch.testing.assert_close(TrainStep(model, sgd(model))(x, context=labels), expected.detach())


@pytest.mark.parametrize(("likelihood", "scale", "constant"), [
    (vae.DiscretizedLogisticLikelihood(8), 1.0, 0.0), (vae.BernoulliLikelihood(), 1 / 7, 0.0),
    (vae.ContinuousBernoulliLikelihood(), None, 16 * math.log(8)),
    (vae.GaussianLikelihood(0.1), None, 16 * math.log(8)),
])
def test_integers_go_to_the_likelihood_and_come_back(likelihood, scale, constant):
    model, objective = vae.MLPVAE(SHAPE, 2, (8,), likelihood=likelihood), NegativeELBO(8)
    x, counted = objective.prepare(model, X)
    assert counted == constant
    if scale is not None:
        torch.testing.assert_close(x, X * scale)
    else:
        low = 0.0 if isinstance(likelihood, vae.ContinuousBernoulliLikelihood) else -0.5
        assert ((x - low) * 8 >= X).all() and ((x - low) * 8 <= X + 1).all()
    assert torch.equal(levels_of(model, x, 8), X.to(torch.uint8))
    torch.manual_seed(0)
    report = objective.report(model, X)
    torch.testing.assert_close(report["bits_per_dim"], (report["rate"] + report["distortion"]) / (16 * math.log(2)))


class Counts:
    """A likelihood of a user's own, by the three methods that one needs."""

    def log_prob(self, x, output):
        return torch.distributions.Poisson(output.exp(), validate_args=False).log_prob(x).sum(-1)

    def mean(self, output):
        return output.exp()

    def sample(self, output, generator=None):
        return torch.poisson(output.exp(), generator=generator)


def test_a_likelihood_that_says_nothing_of_integers_is_asked():
    """Counts that were dequantised would be no counts."""
    likelihood = Counts()
    model = vae.VAE(vae.mlp_encoder((5,), 2, (8,)), vae.mlp_decoder(2, (5,), (8,)), likelihood=likelihood)
    x, step = X.flatten(1)[:, :5].long(), TrainStep(model, sgd(model))
    with pytest.raises(TypeError, match="^x: expected a floating dtype for a Counts.*takes_integers = True"):
        step(x)
    assert "refused, because the Counts has no takes_integers" in step.explain()
    for images in (x.to(torch.uint8), x[:, :4].reshape(-1, 1, 2, 2)):  # are dequantised
        assert -0.5 < step.objective.prepare(model, images)[0].min() < 0.5
    losses = []
    for takes, batch in ((None, x.float()), (True, x), (True, x.float())):
        if takes is not None:
            likelihood.takes_integers = takes
        torch.manual_seed(0)
        losses.append(step(batch))
    assert losses[0] == losses[1] == losses[2]
    likelihood.takes_integers = False
    assert 0.0 < (TrainStep(model, sgd(model), n_bins=8).objective.prepare(model, x)[0] + 0.5).max() < 1.0


class Words(nn.Module):
    """A network that embeds words behind the parameters of another layer, and a context where it is given one."""

    def __init__(self, n_classes=None):
        super().__init__()
        self.label = None if n_classes is None else nn.Embedding(n_classes, 2)
        self.out = nn.Linear(12 if n_classes is None else 14, 4)
        self.embedding = nn.Embedding(7, 4)

    def forward(self, x, context=None):
        h = self.embedding(x).flatten(1)
        return self.out(h if context is None else torch.cat([h, self.label(context)], 1))


class Levels(Words):
    """The same of a network that embeds the context alone."""

    def forward(self, x, context):
        return self.out(torch.cat([x.repeat(1, 4), self.label(context)], 1))


@pytest.mark.parametrize("encoder, labelled", [
    (nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 4)), False), (Words(), False), (Words(2), True),
    (Levels(2), True),
], ids=["sequential", "module", "conditional", "label"])
@pytest.mark.parametrize("dtype", rest_slow([torch.int64, torch.uint8], [torch.uint8]))
def test_an_encoder_that_embeds_gets_the_integers_themselves(encoder, labelled, dtype):
    decoder = nn.Linear(4, 21) if labelled else vae.mlp_decoder(2, (21,), (8,))
    x, context = X[:4, 0, 0, :3] % 7, torch.tensor([0, 1, 1, 0])

    def conditional(z, context):
        return decoder(torch.cat([z, context[:, None].expand(-1, 2).float()], 1))

    model = vae.VAE(encoder, conditional if labelled else decoder, likelihood=vae.CategoricalLikelihood(7))
    given = context if labelled else None
    by_hand = x if not isinstance(encoder, Levels) else x.float()
    torch.manual_seed(0)
    expected = -model.elbo(by_hand, context=given).elbo.mean().detach()
    for compile in (False, "eager"):
        step = TrainStep(model, sgd(model), compile=compile)
        torch.manual_seed(0)
        torch.testing.assert_close(step(x.to(dtype), given), expected)


def test_a_prior_of_codes_trains_by_itself():
    prior, codes = vae.CodePrior(5, 8, 2), X[:, 0, 0] % 5
    step = TrainStep(prior, torch.optim.Adam(prior.parameters(), 0.01))
    loss = step(codes)
    torch.testing.assert_close(loss, torch.tensor(4 * math.log(5)))  # it starts uniform
    assert step(codes) < loss and "integer images: taken as they are by the CodePrior" in step.explain()
    report = step.objective.report(prior, codes)
    torch.testing.assert_close(report["bits_per_dim"], -prior.log_prob(codes) / (4 * math.log(2)))


@pytest.mark.parametrize("make, n_samples, expected", [
    (lambda: vae.MLPVAE(SHAPE, 2, (8,), likelihood="gaussian"), 3, 3),
    (lambda: vae.IWAE(SHAPE, 2, n_samples=5, sizes=(8,), likelihood="gaussian"), 1, 5),
    (lambda: vae.MLPVAE(SHAPE, 2, (8,), likelihood="gaussian"), 1, None),
])
def test_an_evaluation_reports_the_bound_of_its_samples(make, n_samples, expected):
    torch.manual_seed(0)
    model = make().eval()
    torch.manual_seed(1)
    report = NegativeELBO(8, n_samples).report(model, X)
    names = [name for name in report if name.startswith("iwae_")]
    assert names == ([] if expected is None else [f"iwae_{expected}"])
    if expected:
        torch.manual_seed(1)
        x, constant = NegativeELBO(8).prepare(model, X)
        log_w = model.elbo(x, expected).log_w
        torch.testing.assert_close(report[names[0]], torch.logsumexp(log_w, 0) - math.log(expected) - constant)
        assert (report[names[0]] >= report["elbo"] - 1.0).all()


def test_an_evaluation_of_many_samples_takes_small_batches(monkeypatch):
    """Whether the caller asks for them or the model's objective does."""
    sizes, report = [], NegativeELBO.report
    monkeypatch.setattr(NegativeELBO, "report", lambda self, model, x, **given: (
        sizes.append(len(x)), report(self, model, x, **given))[1])
    model, plain = vae.IWAE(SHAPE, 2, n_samples=2048, sizes=(8,)), vae.MLPVAE(SHAPE, 2, (8,))
    for one, n_samples, size in ((model, 1, 2), (plain, 2048, 2), (plain, 1, 6)):
        sizes.clear()
        found = evaluate(one, NegativeELBO(8, n_samples), X, torch.device("cpu"))
        assert sizes == [size] * (6 // size) and ("iwae_2048" in found) == (size == 2)


@pytest.mark.parametrize("make", [lambda: vae.NVAE((1, 8, 8), (1, 1), channels=4, latent_channels=2),
                                  lambda: vae.VQVAE((1, 8, 8), 4, 2, (4,))], ids=["nvae", "vq"])
def test_networks_of_hierarchies_and_quantisers_run_in_bfloat16(make):
    torch.manual_seed(0)
    model = make()
    x = torch.rand(4, 1, 8, 8).round()
    full = TrainStep(model, sgd(model))(x)
    low = TrainStep(model, sgd(model), conditioner_dtype=torch.bfloat16)(x)
    assert low.dtype == torch.float32 and abs(low - full) < 0.15 * abs(full)


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: vae.HVAE(SHAPE, (2, 2), 8), lambda: vae.VQVAE(SHAPE, 4, 2, (4,))],
                         ids=["hvae", "vq"])
def test_hierarchies_and_quantisers_compile(make):
    torch.manual_seed(0)
    model = make()
    losses = []
    for compile in (False, True):
        own = copy.deepcopy(model)
        step = TrainStep(own, sgd(own), compile=compile)
        torch.manual_seed(1)
        losses.append(step(X / 7.0))
    torch.testing.assert_close(*losses)
