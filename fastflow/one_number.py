"""Parameters of one number, of shape (1,): FSDP2 takes none of shape ()."""

import torch
from torch import nn

__all__ = ["OneNumber", "fitted", "one_number"]


def one_number(value):
    """A parameter that starts at ``value``."""
    return nn.Parameter(torch.full((1,), float(value)))


def fitted(stored, parameter):
    """``stored`` in shape (1,) where it is a tensor of shape (), as such a parameter once had, for one of these."""
    former = isinstance(stored, torch.Tensor) and stored.dim() == 0 and parameter.shape == (1,)
    return stored.view(1) if former else stored


class OneNumber(nn.Module):
    """A module with such parameters; state dicts in which they have shape () load too."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name, parameter in self._parameters.items():
            if parameter is not None and prefix + name in state_dict:
                state_dict[prefix + name] = fitted(state_dict[prefix + name], parameter)
        super()._load_from_state_dict(state_dict, prefix, *args)
