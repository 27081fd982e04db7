"""What one call of a training step is given."""

from typing import NamedTuple

import torch

__all__ = ["Batch", "mapped"]


class Batch(NamedTuple):
    """x (B, *event) and what belongs to each x: the context that it is conditioned on, and the targets of tasks.

    ``targets`` are a tensor (B, ...), {name: tensor} for several tasks, or None.
    """

    x: torch.Tensor
    context: torch.Tensor | None = None
    targets: "torch.Tensor | dict[str, torch.Tensor] | None" = None

    def check(self):
        """Raises TypeError or ValueError, by name, at what can't be a batch."""
        if not isinstance(self.x, torch.Tensor):
            raise TypeError(f"x: expected a torch.Tensor, got {type(self.x).__name__}")
        if self.x.ndim < 1 or len(self.x) == 0:
            raise ValueError(f"x: expected a batch (B, *event) with B > 0, got shape {tuple(self.x.shape)}")
        for name, value in self.named()[1:]:
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
            if value.ndim == 0 or len(value) != len(self.x):
                raise ValueError(f"{name}: expected {len(self.x)}, one for each x, got shape {tuple(value.shape)}")

    def named(self):
        """[(name, tensor)] of what there is, in the same order whatever the order of a dict."""
        return [pair for name, value in zip(self._fields, self, strict=True) for pair in _named(name, value)]

    def map(self, function):
        """The batch of function(tensor) for each tensor."""
        return Batch(*(mapped(value, function) for value in self))


def _named(name, value):
    if isinstance(value, dict):
        return [(f"{name}[{key!r}]", value[key]) for key in sorted(value)]
    return [] if value is None else [(name, value)]


def mapped(value, function):
    """function(tensor) for a tensor or each of a dict of them; anything else as it is."""
    if isinstance(value, dict):
        return {key: mapped(inner, function) for key, inner in value.items()}
    return function(value) if isinstance(value, torch.Tensor) else value
