"""Linear maps y = L U x + b as nflows and normflows, which took them from the same paper's code, both lay them out."""

import torch
import torch.nn.functional as F

from fastflow.adapters.layers import fusable, remembered

__all__ = ["LULinear", "fit", "remember", "solve", "weight"]


def fit(module, fix):
    """Finds out the order of the entries."""
    remember(module)


def remember(module):
    """Where each entry of a flat matrix stands among the entries below the diagonal, above it and on it."""
    device = module.bias.device
    return remembered(module, f"places_{device}", lambda: _places(module.features, device))


def _places(features, device):
    lower = torch.tril_indices(features, features, -1, device=device)
    upper = torch.triu_indices(features, features, 1, device=device)
    diagonal = torch.arange(features, device=device).expand(2, -1)
    rows, columns = torch.cat([lower, upper, diagonal], 1)
    return torch.argsort(rows * features + columns)


def _factors(module):
    """(a matrix with L below its diagonal and U on and above it, U's diagonal)."""
    diagonal = F.softplus(module.unconstrained_upper_diag) + module.eps
    entries = torch.cat([module.lower_entries, module.upper_entries, diagonal])
    return entries.index_select(0, remember(module)).view(module.features, module.features), diagonal


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
        matrix, logabsdet = weight(self)
        return F.linear(inputs, matrix, self.bias), logabsdet.repeat(inputs.shape[0])

    def inverse(self, inputs, context=None):
        if not self._fastflow_fits(inputs):
            return super().inverse(inputs, context)
        outputs, logabsdet = solve(self, inputs)
        return outputs, (-logabsdet).repeat(inputs.shape[0])

    def _fastflow_fits(self, inputs):
        return inputs.dim() == 2 and not (self.using_cache and not self.training) and fusable(inputs, self.bias)
