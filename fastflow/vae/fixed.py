"""A model's methods with its parameters as constants."""

from torch import nn
from torch.func import functional_call

__all__ = ["Fixed"]


class Fixed:
    """``fixed(name, *args)``: what the module's method of that name gives, differentiable in ``args`` alone.

    Made along with the module, for torch.compile traces no module that is made in its graph; as an attribute of the
    module it is none of its children.
    """

    def __init__(self, module):
        self._call = _Call(module)

    def __call__(self, name, *args):
        constants = {key: parameter.detach() for key, parameter in self._call.named_parameters()}
        return functional_call(self._call, constants, (name, *args))


class _Call(nn.Module):
    """Any method as forward, which is what functional_call calls."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, name, *args):
        return getattr(self.module, name)(*args)
