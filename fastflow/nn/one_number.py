"""Parameters of one number, of shape (1,): FSDP2 takes none of shape ()."""

import torch
from torch import nn

__all__ = ["OneNumber", "one_number"]


def one_number(value):
    """A parameter that starts at ``value``."""
    return nn.Parameter(torch.full((1,), float(value)))


class OneNumber(nn.Module):
    """A module with such parameters; state dicts in which they have shape (), as they once had, load too."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name, parameter in self._parameters.items():
            stored = state_dict.get(prefix + name)
            if parameter is not None and parameter.shape == (1,) and isinstance(stored, torch.Tensor) \
                    and stored.dim() == 0:
                state_dict[prefix + name] = stored.view(1)
        super()._load_from_state_dict(state_dict, prefix, *args)
