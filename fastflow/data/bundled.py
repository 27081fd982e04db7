"""Tables that ship inside well-kept libraries."""

import numpy as np

from fastflow.data import photos
from fastflow.data.files import optional, split

__all__ = ["read"]

PATCH = 8
STRIDES = {"train": 4, "test": 4}
BREAST_CANCER_TEST = 0.2


def read(name):
    """{"train", "test": float32 (N, D), "columns": D names} of a key of sources.TABLES."""
    return {"patches": _patches, "breast-cancer": _breast_cancer}[name]()


def _patches():
    """8x8 patches of the photographs in grey, 63 numbers each, made as those of BSDS300 are: noise of one level added,
    scaled to [0, 1], the patch's mean subtracted, and the last pixel, which then follows from the others, left out.

    Test patches lie wholly inside the test blocks of :mod:`fastflow.data.photos`, training ones wholly outside. The
    recipe is that of Zoran and Weiss 2011 and Uria et al. 2013.
    """
    from PIL import Image

    parts = {"train": [], "test": []}
    for name in photos.PHOTOS:
        grey = np.asarray(Image.fromarray(photos.picture(name)).convert("L"))
        windows = np.lib.stride_tricks.sliding_window_view(grey, (PATCH, PATCH))
        corners = photos.regions(name, *grey.shape, PATCH, tuple(STRIDES.values()))
        for part, where in zip(parts.values(), corners, strict=True):
            part.append(windows[where[:, 0], where[:, 1]])
    found = {}
    for seed, (part, pieces) in enumerate(parts.items()):
        rows = np.concatenate(pieces).reshape(-1, PATCH * PATCH)
        rows = (rows + np.random.RandomState(seed).random_sample(rows.shape)) / 256.0
        rows -= rows.mean(1, keepdims=True)
        found[part] = rows[:, :-1].astype(np.float32)
    return found | {"columns": tuple(f"pixel_{i // PATCH}_{i % PATCH}" for i in range(PATCH * PATCH - 1))}


def _breast_cancer():
    """The 30 measurements of cell nuclei in scikit-learn's Wisconsin data set (Wolberg et al. 1995)."""
    found = optional("sklearn.datasets", "data", "breast-cancer").load_breast_cancer()
    rows = found.data.astype(np.float32)
    columns = tuple(name.replace(" ", "_") for name in found.feature_names)
    train, test = split(len(rows), BREAST_CANCER_TEST, "breast-cancer")
    return {"train": rows[train], "test": rows[test], "columns": columns}
