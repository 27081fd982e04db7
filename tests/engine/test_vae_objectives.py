"""The training step minimises what each kind of VAE maximises, over data as its likelihood takes them."""

import copy
import math
import types

import pytest
import torch

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
