import numpy as np
import pytest
import torch
from PIL import Image

from fastflow.engine.pictures import levels, save_grid


@pytest.mark.parametrize("n_bins", [17, 256])
def test_levels_undo_the_dequantisation(n_bins):
    image = torch.arange(n_bins, dtype=torch.uint8).reshape(1, 1, 1, n_bins)
    for u in (0.01, 0.5, 0.99):
        assert torch.equal(levels(image / n_bins - 0.5 + u / n_bins, n_bins), image)
    outside = torch.tensor([float("nan"), float("inf"), -float("inf"), 7.0, -7.0])
    assert levels(outside, n_bins).tolist() == [0, n_bins - 1, 0, n_bins - 1, 0]


def test_a_grid_shows_every_image_in_its_place(tmp_path):
    images = torch.arange(6, dtype=torch.uint8).reshape(6, 1, 1, 1).expand(6, 3, 4, 5) * 3
    path = save_grid(tmp_path / "new" / "grid.png", images, 17, n_columns=3)
    grid = np.asarray(Image.open(path))
    zoom = 768 // (3 * (5 + 2))
    assert grid.shape == (2 * (4 + 2) * zoom + 2 * zoom, 3 * (5 + 2) * zoom + 2 * zoom, 3)
    for i in range(6):
        row, column = divmod(i, 3)
        top, left = (2 + row * 6) * zoom, (2 + column * 7) * zoom
        assert (grid[top:top + 4 * zoom, left:left + 5 * zoom] == i * 3 * 255 // 16).all()
        assert (grid[top - 1] == 32).all() and (grid[:, left - 1] == 32).all()
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]


def test_one_grey_image(tmp_path):
    grid = np.asarray(Image.open(save_grid(tmp_path / "one.png", torch.full((1, 1, 8, 8), 16, dtype=torch.uint8), 17)))
    assert grid.ndim == 2 and grid.max() == 255
