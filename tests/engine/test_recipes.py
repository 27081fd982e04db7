"""Every shipped recipe: its model can be built, makes a step, evaluates and draws."""

import json

import pytest
import torch

from fastflow import data
from fastflow.engine import SettingsError, TrainStep, build_model, load_settings
from fastflow.engine.evaluate import evaluate, is_vae, reconstructions, samples
from fastflow.engine.settings import from_dict, recipes


@pytest.mark.parametrize("recipe", recipes())
def test_every_recipe_trains_evaluates_and_draws(recipe):
    settings = load_settings(recipe)
    assert from_dict(json.loads(json.dumps(settings.model_dump()))) == settings  # as a checkpoint keeps them
    images = data.load(settings.data.name)
    torch.manual_seed(0)
    model, device = build_model(settings), torch.device("cpu")
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.train.learning_rate / settings.train.warmup_steps)
    step = TrainStep(model, optimizer, n_bins=images.n_bins, n_samples=getattr(settings.model, "n_samples", 1))
    before = [p.detach().clone() for p in model.parameters()]
    if hasattr(model, "initialize"):
        model.initialize(step.objective.prepare(model, images.train[::len(images.train) // 64])[0])
    assert torch.isfinite(step(images.train[:8]))
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    figures = evaluate(model, step.objective, images.test[:4], device)
    assert 0 < figures["bits_per_dim"] < 100
    drawn, _ = samples(model, 2, images.n_bins, device)
    assert drawn.shape == (2, *images.image_shape) and drawn.dtype == torch.uint8
    if is_vae(model):
        assert reconstructions(model, step.objective, images.test[:2], device).shape == drawn.shape


@pytest.mark.parametrize("recipe, override, message", [
    ("vqvae-digits", "model.channels=[8,8,8,8]", "model.channels: 4 halvings don't divide 8x8 images"),
    ("vqvae-digits", "model.n_codes=1", "model.n_codes: "),
    ("dvae-digits", "model.estimator=magic", "model.estimator: "),
    ("iwae-digits", "model.n_samples=3", "model.n_samples: unknown setting"),
    ("vdvae-digits", "model.groups=[1,1,1,1]", "model: image_shape: "),
])
def test_what_cannot_be_built_is_named(recipe, override, message):
    with pytest.raises(SettingsError) as caught:
        build_model(load_settings(recipe, [override]))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
