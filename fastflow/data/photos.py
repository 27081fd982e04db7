"""32x32 crops of the colour photographs inside the scikit-learn and scikit-image wheels.

A picture is split by region: it is divided into blocks of 64x64 pixels, and every fifth block, spread like a knight's
moves, is a test block. Test crops lie wholly inside test blocks, training crops wholly outside them, so no pixel is
seen by both. The two views of the stereo pair show the same scene and belong to training alone.
"""

import importlib.util
from pathlib import Path

import numpy as np

__all__ = ["PHOTOS", "read", "regions"]

CROP = 32
BLOCK = 64
TRAIN_STRIDE = 8
TEST_STRIDE = 16

# (file inside the library, does it have test blocks?); only everyday photographs in colour, no drawings, no microscopy
PHOTOS = {
    "astronaut": ("skimage", "data/astronaut.png", True),
    "chelsea": ("skimage", "data/chelsea.png", True),
    "coffee": ("skimage", "data/coffee.png", True),
    "rocket": ("skimage", "data/rocket.jpg", True),
    "china": ("sklearn", "datasets/images/china.jpg", True),
    "flower": ("sklearn", "datasets/images/flower.jpg", True),
    "motorcycle_left": ("skimage", "data/motorcycle_left.png", False),
    "motorcycle_right": ("skimage", "data/motorcycle_right.png", False),
}
DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


def picture(name):
    """One photograph, uint8 (H, W, 3), read from the installed library without importing it: nothing is fetched."""
    from PIL import Image

    library, path, _ = PHOTOS[name]
    spec = importlib.util.find_spec(library)
    if spec is None:
        message = (f"the photos are inside {DISTRIBUTIONS[library]}, which is not installed: pip install "
                   "'fastflow[data]'")
        raise ModuleNotFoundError(message, name=library)
    file = Path(spec.origin).parent / path
    if not file.is_file():
        raise FileNotFoundError(f"{DISTRIBUTIONS[library]} lacks the picture {file}")
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def held_out(name, height, width):
    """bool (height, width): the pixels that belong to the test blocks of that picture."""
    if not PHOTOS[name][2]:
        return np.zeros((height, width), bool)
    row, column = np.arange(height)[:, None] // BLOCK, np.arange(width)[None, :] // BLOCK
    return (row + 2 * column) % 5 == 2


def corners(mask, stride, size=CROP):
    """(row, column) of the top left corner of every crop of size x size on a grid of ``stride`` that lies wholly inside
    ``mask``."""
    inside = np.lib.stride_tricks.sliding_window_view(mask, (size, size))[::stride, ::stride].all((2, 3))
    return np.argwhere(inside) * stride


def regions(name, height, width, size=CROP, strides=(TRAIN_STRIDE, TEST_STRIDE)):
    """(train, test): the corners (N, 2) of the picture's training and test crops of size x size."""
    mask = held_out(name, height, width)
    return corners(~mask, strides[0], size), corners(mask, strides[1], size)


def read():
    """(train, test): uint8 arrays (N, 3, 32, 32) in the order of ``PHOTOS``, row by row."""
    parts = ([], [])
    for name in PHOTOS:
        image = picture(name)
        crops = np.lib.stride_tricks.sliding_window_view(image, (CROP, CROP), axis=(0, 1))  # (H', W', 3, 32, 32)
        for part, where in zip(parts, regions(name, *image.shape[:2]), strict=True):
            part.append(crops[where[:, 0], where[:, 1]])
    return tuple(np.ascontiguousarray(np.concatenate(part)) for part in parts)
