"""NICE for tabular data."""

import torch
from torch import nn

from fastflow import checks
from fastflow.flows.base import StandardLogistic, StandardNormal
from fastflow.flows.flow import Flow
from fastflow.flows.tabular import halves
from fastflow.flows.transform import Compose
from fastflow.nn import MLP, AffineCoupling
from fastflow.nn.outputs import in_format_of, over_positions

__all__ = ["CONFIGS", "NICE", "DiagonalScale"]

CONFIGS = {
    "mnist": {"features": 784, "n_layers": 4, "hidden": (1000,) * 5, "prior": "logistic"},
    "tfd": {"features": 2304, "n_layers": 4, "hidden": (5000,) * 4},
    "svhn": {"features": 3072, "n_layers": 4, "hidden": (2000,) * 4, "prior": "logistic"},
    "cifar10": {"features": 3072, "n_layers": 4, "hidden": (2000,) * 4, "prior": "logistic"},
}
"""The paper's models by name, for :meth:`NICE.from_config` (Dinh et al. 2015, section 5.1). The paper splits odd from
even features, which a permutation of the data makes halves."""


class DiagonalScale(nn.Module):
    """z = x * exp(log_scale) per feature of x (B, features), log|det| = sum(log_scale); the identity at first."""

    def __init__(self, features):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(checks.count("features", features, 1)))

    def forward(self, x, context=None):
        self._check("x", x)
        return in_format_of(x, x * torch.exp(self.log_scale)), over_positions(self.log_scale.sum(), x)

    def inverse(self, z, context=None):
        self._check("z", z)
        return in_format_of(z, z * torch.exp(-self.log_scale)), over_positions(-self.log_scale.sum(), z)

    def _check(self, name, x):
        checks.tensor(name, x)
        checks.events(name, x, (len(self.log_scale),))
        checks.goes_with(name, x, "log_scale", self.log_scale)


class NICE(Flow):
    """Additive couplings that take turns on the two halves of the features, and a diagonal scaling at the end.

    The couplings keep volume; the density's scale comes from the diagonal alone. The base is N(0, I) unless
    ``prior`` says otherwise, and the flow starts as the identity.

    Args:
        features: D >= 1. With a single feature every coupling shifts it, given the context alone.
        n_layers: number of couplings.
        hidden: sizes of each conditioner's hidden layers.
        context_features: size of the context (B, context_features) that conditions the density, or None.
        activation: constructor of the activation module.
        prior: the base, "normal" or "logistic".

    References:
        Dinh et al., "NICE: non-linear independent components estimation", 2015, arXiv:1410.8516.
    """

    configs = CONFIGS

    def __init__(self, features, *, n_layers=4, hidden=(64, 64), context_features=None, activation=nn.ReLU,
                 prior="normal"):
        checks.choice("prior", prior, ("normal", "logistic"))
        layers = []
        for passive, active, flip in halves(features, n_layers):
            conditioner = MLP(passive, active, hidden, context_features=context_features, activation=activation)
            layers.append(AffineCoupling(conditioner, flip=flip, scale="additive"))
        base = StandardNormal if prior == "normal" else StandardLogistic
        super().__init__(Compose(*layers, DiagonalScale(features), event_shape=(features,)), base((features,)))
        self.features = features
