"""Reading a state dict key by key, so that nothing in it is missed."""

import re

import torch

__all__ = ["State", "copy"]


class State:
    """The tensors of a state dict, each handed out once, in float64.

    Args:
        state_dict: {key: tensor or NumPy array}.
        prefix: left out of every key if all begin with it, as with "module." under DataParallel.

    Raises:
        TypeError: it is not a mapping.
        ValueError: it is empty.
    """

    def __init__(self, state_dict, prefix="module."):
        if not hasattr(state_dict, "items"):
            raise TypeError(f"state_dict: expected a mapping, got {type(state_dict).__name__}")
        self.prefix = prefix if state_dict and all(key.startswith(prefix) for key in state_dict) else ""
        self.left = {key[len(self.prefix):]: torch.as_tensor(value).detach() for key, value in state_dict.items()}
        floating = [value.dtype for value in self.left.values() if value.is_floating_point()]
        if not floating:
            raise ValueError("state_dict: expected weights, got none")
        self.dtype = torch.float64 if torch.float64 in floating else torch.float32

    def take(self, key, shape=None):
        """The tensor under ``key``, checked against ``shape`` in which None stands for any size."""
        if key not in self.left:
            raise ValueError(f"state_dict: missing key {self.prefix + key!r}")
        value = self.left.pop(key)
        if shape is not None and (value.dim() != len(shape) or any(
                size is not None and size != own for size, own in zip(shape, value.shape, strict=True))):
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"state_dict: expected shape ({expected}) of {self.prefix + key!r}, got "
                             f"{tuple(value.shape)}")
        return value.double() if value.is_floating_point() else value

    def size(self, key, dim):
        """One size of the tensor under ``key``, which stays."""
        if key not in self.left:
            raise ValueError(f"state_dict: missing key {self.prefix + key!r}")
        if self.left[key].dim() <= dim:
            raise ValueError(f"state_dict: expected more than {dim} dimensions of {self.prefix + key!r}, got "
                             f"{tuple(self.left[key].shape)}")
        return self.left[key].shape[dim]

    def count(self, pattern):
        """How many numbers 0, 1, ... the group of a regular expression takes at the start of keys."""
        numbers = {int(found[1]) for found in (re.match(pattern, key) for key in self.left) if found}
        return max(numbers, default=-1) + 1

    def discard(self, *keys):
        """Leave out constants that say nothing."""
        for key in keys:
            self.left.pop(key, None)

    def finish(self):
        """Every key was read."""
        if self.left:
            more = f" and {len(self.left) - 1} more" if len(self.left) > 1 else ""
            raise ValueError(f"state_dict: unexpected key {self.prefix + next(iter(self.left))!r}{more}")


@torch.no_grad()
def copy(target, value):
    """Write ``value`` into a parameter or buffer of the same number of elements."""
    target.copy_(value.reshape(target.shape))
