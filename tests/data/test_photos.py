import numpy as np
import pytest
import torch

from fastflow import data
from fastflow.data import photos


@pytest.fixture(scope="module")
def pictures():
    return {name: photos.picture(name) for name in photos.PHOTOS}


def painted(shape, corners):
    """bool (H, W): the pixels that the crops at those corners cover."""
    covered = np.zeros(shape, bool)
    for top, left in corners:
        covered[top:top + 32, left:left + 32] = True
    return covered


def test_the_pictures_are_colour_photographs(pictures):
    for image in pictures.values():
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        assert image.reshape(-1, 3).std(0).min() > 10
        assert (image[..., 0] != image[..., 2]).mean() > 0.5  # not grey


def test_no_pixel_is_in_both_parts(pictures):
    for name, image in pictures.items():
        train, test = photos.regions(name, *image.shape[:2])
        assert len(train)
        for part in (train, test):
            assert (part >= 0).all() and (part + 32 <= image.shape[:2]).all()
        assert not (painted(image.shape[:2], train) & painted(image.shape[:2], test)).any()


def test_both_halves_of_the_stereo_pair_are_on_one_side(pictures):
    sides = [tuple(len(part) > 0 for part in photos.regions(name, *pictures[name].shape[:2]))
             for name in ("motorcycle_left", "motorcycle_right")]
    assert sides == [(True, False), (True, False)]
    assert all(len(photos.regions(name, *image.shape[:2])[1]) > 30
               for name, image in pictures.items() if not name.startswith("motorcycle"))


def test_the_tensors_are_the_crops_of_those_regions(pictures):
    loaded = data.load("photos")
    for index, part in enumerate((loaded.train, loaded.test)):
        assert part.dtype == torch.uint8 and part.shape[1:] == (3, 32, 32) and part.is_contiguous()
        row = 0
        for name, image in pictures.items():
            corners = photos.regions(name, *image.shape[:2])[index]
            for i in range(0, len(corners), max(1, len(corners) // 7)):
                top, left = corners[i]
                crop = image[top:top + 32, left:left + 32].transpose(2, 0, 1)
                assert np.array_equal(part[row + i].numpy(), crop)
            row += len(corners)
        assert row == len(part)


def test_no_test_crop_occurs_in_the_training_set_with_detail():
    """Beyond the regions: no crop with any texture is found again byte for byte."""
    loaded = data.load("photos")
    textured = loaded.test[loaded.test.float().flatten(1).std(1) > 4]
    train = {t.numpy().tobytes() for t in loaded.train}
    assert len(textured) > 300 and not any(t.numpy().tobytes() in train for t in textured)


def test_the_same_at_every_load():
    first, second = data.load("photos"), data.load("photos")
    assert first.fingerprint() == second.fingerprint()
    assert torch.equal(first.train, second.train) and torch.equal(first.test, second.test)


def test_a_missing_picture_is_named(monkeypatch):
    monkeypatch.setitem(photos.PHOTOS, "coffee", ("skimage", "data/no_such.png", True))
    with pytest.raises(FileNotFoundError, match=r"scikit-image lacks the picture .*no_such\.png"):
        photos.picture("coffee")
    monkeypatch.setitem(photos.PHOTOS, "coffee", ("no_such_library", "data/coffee.png", True))
    monkeypatch.setitem(photos.DISTRIBUTIONS, "no_such_library", "no-such-library")
    with pytest.raises(ModuleNotFoundError, match="no-such-library"):
        photos.picture("coffee")
