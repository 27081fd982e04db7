"""A model's densities with its parameters as constants."""

import contextlib

__all__ = ["fixed"]


@contextlib.contextmanager
def fixed(module):
    """Inside, the module's parameters are constants to the gradient: what it computes is differentiable in the inputs
    alone. As in torch.func.functional_call, which calls forwards only."""
    kept = [(owner, name, parameter) for owner in module.modules() for name, parameter in owner._parameters.items()
            if parameter is not None]
    for owner, name, parameter in kept:
        owner._parameters[name] = parameter.detach()
    try:
        yield
    finally:
        for owner, name, parameter in kept:
            owner._parameters[name] = parameter
