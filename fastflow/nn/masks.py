"""Which places of a tensor a masked coupling leaves alone."""

import torch

__all__ = ["checkerboard", "partition"]


def checkerboard(shape, device=None):
    """Bool tensor of ``shape``, true where the sum of the indices is even."""
    total = torch.zeros(shape, dtype=torch.int64, device=device)
    for dim, size in enumerate(shape):
        total = total + torch.arange(size, device=device).view([-1 if d == dim else 1 for d in range(len(shape))])
    return total % 2 == 0


def partition(passive):
    """Indices that bring the true places of the flattened mask to the front, order kept, and those that undo it."""
    order = torch.argsort((~passive).flatten().to(torch.uint8), stable=True)
    return order, torch.argsort(order)
