"""The one form in which all images come."""

import functools
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["ImageData"]


@dataclass(frozen=True)
class ImageData:
    """Integer-valued images with a fixed split.

    Attributes:
        name: the dataset's name.
        train, test: (N, C, H, W) uint8, values 0 to ``n_bins - 1``.
        n_bins: how many levels a value can take.
        train_labels, test_labels: (N,) int64 classes, or None.
        validation, validation_labels: images of neither part, to choose a model by, and their classes, or None.
    """

    name: str
    train: "torch.Tensor"
    test: "torch.Tensor"
    n_bins: int
    train_labels: "torch.Tensor | None" = None
    test_labels: "torch.Tensor | None" = None
    validation: "torch.Tensor | None" = None
    validation_labels: "torch.Tensor | None" = None

    @property
    def image_shape(self):
        """(C, H, W)"""
        return tuple(self.train.shape[1:])

    @property
    def event_shape(self):
        """(C, H, W), as a table's (D,)."""
        return self.image_shape

    def fingerprint(self):
        """SHA-256 over all parts: two datasets with the same fingerprint hold the same images in the same order.

        Labels count where there are any.
        """
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self):
        digest = hashlib.sha256(f"{tuple(self.train.shape)}{tuple(self.test.shape)}{self.n_bins}".encode())
        for part in (self.train, self.test, self.train_labels, self.test_labels, self.validation,
                     self.validation_labels):
            if part is not None:
                digest.update(part.contiguous().numpy())
        return digest.hexdigest()
