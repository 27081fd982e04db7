"""Handwritten digits, 8x8, 17 levels of grey, and which digit each is, from scikit-learn."""

import numpy as np

from fastflow.data.files import optional

__all__ = ["N_TEST", "read"]

N_TEST = 297  # of 1797; the file goes writer by writer, so the last images come from other hands than the first


def read():
    """(train, test, train labels, test labels): uint8 arrays (1500, 1, 8, 8) and (297, 1, 8, 8) with values 0 to 16,
    and int64 (N,) of the digits 0 to 9."""
    found = optional("sklearn.datasets", "data", "digits").load_digits()
    images, labels = found.images.astype(np.uint8)[:, None], found.target.astype(np.int64)
    return images[:-N_TEST], images[-N_TEST:], labels[:-N_TEST], labels[-N_TEST:]
