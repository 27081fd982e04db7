"""Checks of the values of labels and of integer images, where a look at them costs nothing: elsewhere than on a CPU it
would be a synchronisation, or no look at all."""

import torch
from torch._subclasses.fake_tensor import FakeTensor

from fastflow import backends

__all__ = ["check_labels", "check_levels"]


def check_labels(name, labels, n_classes, counted, least=None):
    """The labels lie below ``n_classes``, which the message calls ``counted``, and from ``least`` on, if that is given.

    Raises:
        ValueError: one does not.
    """
    if not _readable(labels):
        return
    if bool((labels >= n_classes).any()):
        raise ValueError(f"{name}: expected labels below {counted} = {n_classes}, got {int(labels.max())}")
    if least is not None and bool((labels < least).any()):
        raise ValueError(f"{name}: expected labels from {least} on, got {int(labels.min())}")


def check_levels(name, x, n_bins):
    """The values of x are integers 0..n_bins-1, or NaN.

    Raises:
        ValueError: one is not.
    """
    if not _readable(x):
        return
    if x.dtype not in (torch.uint8, torch.int64) and not x.is_floating_point():
        x = x.to(torch.int64)  # torch compares no wider unsigned ones, and in a narrow one n_bins - 1 wraps
    wrong = (x < 0) | (x > n_bins - 1)
    if x.is_floating_point():
        wrong |= (x != x.round()) & ~x.isnan()
    if bool(wrong.any()):
        raise ValueError(f"{name}: expected integers 0..{n_bins - 1}, got {x[wrong][0].item()}")


def _readable(values):
    return (values.device.type == "cpu" and not torch.compiler.is_compiling()
            and not isinstance(values, FakeTensor) and backends.needs_reference([values]) is None)
