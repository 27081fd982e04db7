from pathlib import Path

import pytest
import torch
from data_files import pictures, table, write

from fastflow import data


def test_digits():
    digits = data.load("digits")
    assert digits.train.shape == (1500, 1, 8, 8) and digits.test.shape == (297, 1, 8, 8)
    assert digits.train.dtype == digits.test.dtype == torch.uint8
    assert (digits.n_bins, int(digits.train.max()), int(digits.train.min())) == (17, 16, 0)
    from sklearn.datasets import load_digits
    together = torch.cat([digits.train, digits.test])[:, 0]
    assert torch.equal(together, torch.from_numpy(load_digits().images).to(torch.uint8))
    assert digits.fingerprint() == data.load("digits").fingerprint()


@pytest.mark.parametrize("name", data.DATASETS)
def test_what_is_loaded_is_what_is_announced(name):
    images = data.load(name)
    assert (images.image_shape, images.n_bins) == data.DATASETS[name]
    assert int(images.train.max()) < images.n_bins and int(images.test.max()) < images.n_bins


def test_the_fingerprint_sees_one_value():
    digits = data.load("digits")
    other = digits.train.clone()
    other[700, 0, 3, 3] ^= 1
    assert data.ImageData("digits", other, digits.test, 17).fingerprint() != digits.fingerprint()


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="name: expected one of digits, photos, .* or a path, got 'cats'"):
        data.load("cats")
    with pytest.raises(FileNotFoundError, match="there are no data"):
        data.load(Path("cats"))


def test_a_path_is_not_taken_for_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "photos", map(str, range(20)))
    found = data.load(Path("photos"), validation_fraction=0.2)
    assert found.image_shape == (3, 4, 6) and found.n_bins == 256 and len(found.validation) == 4
    (tmp_path / "patches").mkdir()
    for part in ("train", "test"):
        write(tmp_path / "patches" / f"{part}.npy", table())
    assert data.load(Path("patches"), validation_fraction=0.2).event_shape == (3,)
