"""What TrainStep.explain says is what a step does."""

import pytest
import torch

from fastflow import flows, launches, vae
from fastflow.engine import TrainStep


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.01)


def line(text, name):
    return next(line for line in text.splitlines() if line.startswith(f"{name}: "))


def of_likelihood(likelihood, output=(1, 4, 4)):
    return vae.VAE(vae.mlp_encoder((1, 4, 4), 3, (8,)), vae.mlp_decoder(3, output, (8,)), likelihood=likelihood)


@pytest.mark.parametrize("model, words, values", [
    (of_likelihood("gaussian"), "dequantised with 16 levels", (-0.5, 0.5)),
    (of_likelihood("continuous_bernoulli"), "dequantised with 16 levels to [0, 1]", (0.0, 1.0)),
    (of_likelihood("bernoulli"), "scaled to x/15 for the BernoulliLikelihood", None),
    (of_likelihood("poisson"), "taken as they are by the PoissonLikelihood", None),
], ids=["gaussian", "continuous", "bernoulli", "poisson"])
def test_what_becomes_of_integer_images(model, words, values):
    step = TrainStep(model, sgd(model), n_bins=16)
    assert line(step.explain(), "integer images") == f"integer images: {words}, floating x taken as it is"
    x = torch.randint(16, (9, 1, 4, 4))
    found = step.objective.prepare(model, x)[0]
    if values is None:
        assert torch.equal(found, x / 15 if "x/15" in words else x.float())
    else:
        assert values[0] <= found.min() < found.max() <= values[1] and not torch.equal(found * 16, (found * 16).round())


@pytest.mark.parametrize("mode", ["none", "save_z", "invert"])
@pytest.mark.parametrize("make, x", [
    (lambda: flows.Glow((3, 8, 8), 2, 2, hidden_channels=4), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)),
    (lambda: flows.RealNVP(4, n_layers=3, hidden=(8,)), torch.zeros(4, 4))], ids=["glow", "realnvp"])
def test_launches_are_those_of_a_step_in_its_memory_mode(make, x, mode):
    model = make()
    step = TrainStep(model, sgd(model), memory=mode)
    saved = step.memory.saved, step.memory.drift
    text = step.explain(x)
    assert (step.memory.saved, step.memory.drift) == saved
    with launches.count() as counted:
        step(x)
    assert text.endswith(str(counted)) and step.explain(x).endswith(str(counted))
    if x.ndim == 2:
        assert line(text, "whole flow").startswith(
            "whole flow: layer by layer: memory='invert'" if mode == "invert" else "whole flow: 4 of 4 layers")


def test_the_drift_of_a_first_update_is_that_of_its_own_batches():
    model = flows.RealNVP(4, n_layers=3, hidden=(8,))
    step = TrainStep(model, sgd(model), memory="invert", accumulate=2)
    x = torch.randn(8, 4)
    step(x)
    before = len(step.memory._flow_mode.drifts)
    step.explain(x)
    assert len(step.memory._flow_mode.drifts) == before > 0


def test_the_averages_warm_up():
    model = flows.RealNVP(2, n_layers=1)
    text = TrainStep(model, sgd(model), ema_decay=0.9, ema_warmup=10).explain()
    assert line(text, "average") == ("average: exponential, decay 0.9, after every update; (1 + n)/(10 + n) after n of "
                                     "them, while that is less")


def test_without_gradients_and_without_parameters_to_train():
    model, x = flows.RealNVP(4, n_layers=2), torch.randn(8, 4)
    step = TrainStep(model, sgd(model))
    text = step.explain(x)
    with torch.no_grad():
        assert step.explain(x) == text
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="model: the loss has no gradient; are all parameters frozen"):
        step.explain(x)
