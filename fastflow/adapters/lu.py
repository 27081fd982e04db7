"""Linear maps y = L U x + b as nflows and normflows, which took them from the same paper's code, both lay them out."""

import torch

from fastflow import backends
from fastflow.adapters.layers import fusable
from fastflow.adapters.swap import PREFIX
from fastflow.autograd import lu_linear

__all__ = ["LULinear", "fit", "remember", "solve", "weight"]

PLACES = PREFIX + "places"


def fit(module, fix):
    """Finds out the places of the entries."""
    remember(module)


def remember(module):
    """lu_linear's Places of the module's entries."""
    bias, places = module.bias, module.__dict__.get(PLACES)
    if places is None or places.zeros.dtype is not bias.dtype or places.zeros.device != bias.device:
        if torch.compiler.is_compiling() or backends.transformed() is not None:
            return lu_linear.places_of(len(bias), bias.device, bias.dtype)
        with torch.inference_mode(False):  # the next call may be one of training
            module.__dict__[PLACES] = places = lu_linear.places_of(len(bias), bias.device, bias.dtype)
    return places


def _factors(module):
    return lu_linear.factors(module.lower_entries, module.upper_entries, module.unconstrained_upper_diag, module.eps,
                             remember(module))


def weight(module):
    """(L U, log|det|)."""
    matrix, diagonal = _factors(module)
    upper = torch.triu(matrix)
    return torch.addmm(upper, torch.tril(matrix, -1), upper), torch.log(diagonal).sum()


def solve(module, rows):
    """(x with L U x = rows - bias along the last dim, log|det L U|)."""
    matrix, diagonal = _factors(module)
    half = torch.linalg.solve_triangular(matrix, (rows - module.bias).mT, upper=False, unitriangular=True)
    return torch.linalg.solve_triangular(matrix, half, upper=True).mT, torch.log(diagonal).sum()


class LULinear:
    """The two factors as one matrix."""

    def forward(self, inputs, context=None):
        if not self._fastflow_fits(inputs):
            return super().forward(inputs, context)
        return lu_linear.run(inputs, *self._fastflow_operands())

    def inverse(self, inputs, context=None):
        if not self._fastflow_fits(inputs):
            return super().inverse(inputs, context)
        outputs, logabsdet = solve(self, inputs)
        return outputs, (-logabsdet).repeat(inputs.shape[0])

    def _fastflow_operands(self):
        return (self.lower_entries, self.upper_entries, self.unconstrained_upper_diag, self.bias, self.eps,
                remember(self))

    def _fastflow_step(self, inputs, context):
        """The forward pass as a step of autograd.chain for data like ``inputs``, or None."""
        if not self._fastflow_fits(inputs) or backends.needs_reference(tuple(self._parameters.values())) is not None:
            return None
        return lu_linear.step(inputs, *self._fastflow_operands())

    def _fastflow_fits(self, inputs):
        return inputs.dim() == 2 and not (self.using_cache and not self.training) and fusable(inputs, self.bias)
