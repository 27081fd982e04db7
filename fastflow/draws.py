"""Random numbers of a torch.Generator that may live on another device than the model."""

import torch


def drawn(draw, shape, like, generator, dtype=None):
    """``draw`` (torch.randn, torch.rand) of ``shape``, in like's dtype or ``dtype``: on the generator's device where
    there is one, then moved to like's."""
    dtype = like.dtype if dtype is None else dtype
    if generator is None:  # named, even None wants the numbers of a shape: a graph for all batch sizes has symbols
        return draw(shape, dtype=dtype, device=like.device)
    return draw(shape, generator=generator, dtype=dtype, device=generator.device).to(like.device)


def choose(weights, n, generator):
    """n indices (n,) drawn with the weights (C,), or (B, n) with those of every row (B, C)."""
    if n == 0:
        return torch.zeros(0, dtype=torch.int64, device=weights.device)
    device = weights.device if generator is None else generator.device
    return torch.multinomial(weights.detach().to(device), n, replacement=True, generator=generator).to(weights.device)
