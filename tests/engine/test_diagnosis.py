"""The diagnosis as files."""

import numpy as np
import torch

from fastflow import diagnostics, vae
from fastflow.engine.diagnosis import BAR, FAINT, write_diagnosis


def test_pictures_show_the_diagnosis(tmp_path):
    from PIL import Image

    torch.manual_seed(0)
    model = vae.MLPVAE((1, 8, 8), 4, (16,))
    with torch.no_grad():
        last = [m for m in model.encoder.modules() if isinstance(m, torch.nn.Linear)][-1]
        last.weight[1:4] = 0.0  # three means that do not depend on x
        last.weight[0] *= 20.0
    x = torch.randint(0, 2, (50, 1, 8, 8)).float()
    found = diagnostics.diagnose(model, x, n_dims=3)
    paths = write_diagnosis(tmp_path / "page", found, model, 2)
    assert set(paths) == {"summary", "rate_distortion", "latent_kl", "traversal"}
    assert "active units 1 of 4" in paths["summary"].read_text()
    bars = np.asarray(Image.open(paths["latent_kl"]))
    base = bars[302]  # a line just above the axis crosses the bars of a KL that shows
    assert (base == BAR).all(1).any()
    assert not (bars[60] == FAINT).all(1).any()  # no inactive unit reaches the top
    grid = np.asarray(Image.open(paths["traversal"]))
    assert grid.ndim == 2 and grid.shape[1] > 2 * grid.shape[0]  # 7 columns, 3 rows
    assert Image.open(paths["rate_distortion"]).size == (640, 360)


def test_what_was_not_measured_is_left_out(tmp_path):
    model = vae.MLPVAE((6,), 2, (8,), posterior="full")
    found = diagnostics.diagnose(model, torch.randint(0, 2, (10, 6)).float())
    assert set(write_diagnosis(tmp_path, found, model, 2)) == {"summary", "rate_distortion"}
