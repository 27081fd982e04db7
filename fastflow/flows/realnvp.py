"""RealNVP for tabular data."""

from torch import nn

from fastflow.flows.base import StandardNormal
from fastflow.flows.flow import Flow
from fastflow.flows.tabular import halves, masked_configs
from fastflow.flows.transform import Compose
from fastflow.functional import ScaleMap
from fastflow.nn import MLP, ActNorm, AffineCoupling

__all__ = ["CONFIGS", "RealNVP"]

CONFIGS = masked_configs()
"""The tabular models by name, for :meth:`RealNVP.from_config`: those of :func:`tabular.masked_configs`. One network
gives scale and shift, where the original has one for each."""


class RealNVP(Flow):
    """Affine couplings with fully connected conditioners that take turns on the two halves of the features.

    x (B, features) passes one ActNorm, which ``initialize`` sets from data, and then the couplings; the base is
    N(0, I). It starts as the identity.

    Args:
        features: D >= 1. With a single feature every coupling transforms it, given the context alone.
        n_layers: number of couplings.
        hidden: sizes of each conditioner's hidden layers.
        context_features: size of the context (B, context_features) that conditions the density, or None.
        scale: ScaleMap of the couplings or its name; "tanh" keeps each scale between 1/e and e.
        activation: constructor of the activation module.

    References:
        Dinh et al., "Density estimation using Real NVP", 2017, arXiv:1605.08803.
    """

    configs = CONFIGS

    def __init__(self, features, *, n_layers=8, hidden=(64, 64), context_features=None, scale="tanh",
                 activation=nn.ReLU):
        scale, layers = ScaleMap.of(scale), []
        per_feature = 1 if scale.kind == "additive" else 2  # the shift alone
        for passive, active, flip in halves(features, n_layers):
            conditioner = MLP(passive, per_feature * active, hidden, context_features=context_features,
                              activation=activation)
            layers.append(AffineCoupling(conditioner, flip=flip, scale=scale))
        super().__init__(Compose(ActNorm(features), *layers, event_shape=(features,)), StandardNormal((features,)))
        self.features = features
