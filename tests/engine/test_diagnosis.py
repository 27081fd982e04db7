"""The diagnosis as a page and as text, and the watch for collapse during a training."""

import numpy as np
import pytest
import torch

from fastflow import diagnostics, vae
from fastflow.engine.collapse import CollapseWatch
from fastflow.engine.diagnosis import diagnose_images, write_diagnosis
from fastflow.engine.objectives import objective_for

BAR, FAINT, ACCENT = (60, 110, 180), (196, 196, 196), (200, 70, 50)


def collapsed(n_latents=4, kept=1):
    """An MLP VAE of which only the first latents depend on x."""
    torch.manual_seed(0)
    model = vae.MLPVAE((1, 8, 8), n_latents, (16,))
    with torch.no_grad():
        last = [m for m in model.encoder.modules() if isinstance(m, torch.nn.Linear)][-1]
        last.weight[kept:n_latents] = 0.0
        last.bias[kept:n_latents] = 0.0
        last.weight[n_latents + kept:] = 0.0
        last.bias[n_latents + kept:] = 0.0
        last.weight[:kept] *= 20.0
    return model


def pixels(path):
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def count(image, color):
    return int((np.abs(image - color).max(2) <= 2).sum())


def test_the_page_shows_bars_of_active_latents_and_the_traversal(tmp_path):
    model, x = collapsed(), torch.randint(0, 2, (50, 1, 8, 8)).float()
    found = diagnostics.diagnose(model, x, n_dims=3)
    paths = write_diagnosis(tmp_path / "page", found, model, 2)
    assert paths == {"summary": tmp_path / "page" / "diagnosis.txt", "page": tmp_path / "page" / "diagnosis.png"}
    assert "active units 1 of 4" in paths["summary"].read_text()
    with_traversal = pixels(paths["page"])
    assert count(with_traversal, BAR) > 3000  # the one bar stands tall
    unused = diagnostics.diagnose(collapsed(kept=0), x, n_dims=3)
    assert "posterior collapse" in unused.summary()
    page = pixels(write_diagnosis(tmp_path / "unused", unused, model, 2)["page"])
    assert count(page, BAR) < 500  # no bar is left but the mark of the mutual information


@pytest.mark.parametrize("make, panel", [
    (lambda: vae.VDVAE((1, 8, 8), (1, 1), channels=8, latent_channels=2), "level"),
    (lambda: vae.VQVAE((1, 8, 8), 8, 4, (8,)), "codes in use"),
    (lambda: vae.DiscreteVAE(vae.mlp_encoder((1, 8, 8), 5, (8,), n_params=5), vae.mlp_decoder(5, (1, 8, 8), (8,)), 5),
     "bit"),
    (lambda: vae.MLPVAE((1, 8, 8), 2, (8,), posterior="full"), "ELBO"),
])
def test_every_kind_of_model_has_a_page(tmp_path, make, panel):
    torch.manual_seed(1)
    model = make()
    images = torch.randint(0, 2, (40, 1, 8, 8), dtype=torch.uint8)
    objective, device = objective_for(model, n_bins=2), torch.device("cpu")
    state, weights = torch.get_rng_state(), {name: t.clone() for name, t in model.state_dict().items()}
    found = diagnose_images(model, objective, images, device)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    assert panel in found.summary()
    page = pixels(write_diagnosis(tmp_path, found, model, 2)["page"])
    assert page.shape[1] == 1100 and (count(page, BAR) > 50) == (found.kl is not None) and count(page, ACCENT) > 20


def test_figures_of_a_page_are_those_of_the_integers():
    """The dequantisation's constant is counted: ELBO and bits/dim are an evaluation's."""
    torch.manual_seed(0)
    model = vae.MLPVAE((1, 8, 8), 4, (16,), likelihood="gaussian")
    images = torch.randint(0, 17, (30, 1, 8, 8), dtype=torch.uint8)
    objective = objective_for(model, n_bins=17)
    found = diagnose_images(model, objective, images, torch.device("cpu"), seed=3)
    torch.manual_seed(3)
    with torch.no_grad():
        want = {name: values.double().mean().item() for name, values in objective.report(model.eval(), images).items()}
    assert found.point.distortion == pytest.approx(want["distortion"], rel=1e-6)
    assert found.bits_per_dim == pytest.approx(want["bits_per_dim"], rel=1e-6)


def test_the_watch_warns_of_collapse_and_leaves_no_trace():
    images, said = torch.randint(0, 2, (20, 1, 8, 8), dtype=torch.uint8), []
    model = collapsed(20, kept=1)
    objective = objective_for(model, n_bins=2)
    watch = CollapseWatch(10, images, torch.device("cpu"), said.append)
    state = torch.get_rng_state()
    for step in range(1, 61):
        watch(model, objective, step)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert len(said) == 1 and "posterior collapse: 1 of 20 latents" in said[0] and "after 30 steps" in said[0]
    healthy = collapsed(20, kept=20)
    for made, every in ((healthy, 10), (model, 0)):
        watch = CollapseWatch(every, images, torch.device("cpu"), said.append)
        for step in range(1, 61):
            watch(made, objective, step)
    assert len(said) == 1


def test_the_watch_counts_the_codes_of_quantised_models():
    torch.manual_seed(0)
    model, said = vae.VQVAE((1, 8, 8), 32, 4, (8,)), []
    with torch.no_grad():
        model.quantizer.codebook[1:] += 100.0
    objective = objective_for(model, n_bins=2)
    watch = CollapseWatch(1, torch.randint(0, 2, (20, 1, 8, 8), dtype=torch.uint8), torch.device("cpu"), said.append)
    before = model.quantizer.codebook.clone()
    for step in range(1, 5):
        watch(model, objective, step)
    assert len(said) == 1 and "codebook collapse: 1 of 32 codes" in said[0]
    assert torch.equal(model.quantizer.codebook, before)
