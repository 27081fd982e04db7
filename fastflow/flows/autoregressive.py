"""Masked autoregressive flows: each feature is transformed by parameters that a MADE makes of those before it."""

import torch
from torch import nn

from fastflow import checks, functional
from fastflow.flows.base import StandardNormal
from fastflow.flows.flow import Flow
from fastflow.flows.made import MADE
from fastflow.flows.tabular import masked_configs
from fastflow.flows.transform import Compose, Inverse
from fastflow.functional import ScaleMap
from fastflow.nn import ActNorm

__all__ = ["CONFIGS", "IAF", "MAF", "AffineTransformer", "MaskedAutoregressive"]

_GAS = {name: {**config, "activation": nn.Tanh} for name, config in masked_configs().items() if "gas" in name}

CONFIGS = {**masked_configs(), **_GAS}
"""The models of the MAF paper by name, for :meth:`MAF.from_config`: those of :func:`tabular.masked_configs`. Where the
paper normalises by batch statistics, ours has ActNorm."""

IAF_CONFIGS = {f"mnist-depth{depth}-width{width}": {"features": 32, "n_layers": depth, "hidden": (width, width),
                                                    "actnorm": False}
               for depth, width in ((2, 320), (2, 1920), (4, 1920), (8, 1920))}
"""The posteriors over 32 latents of Kingma et al. 2016, section 6.1, by name, for :meth:`IAF.from_config`."""


class AffineTransformer:
    """z = x*s + t, log|dz/dx| = log s, through ``functional.affine_coupling``.

    A transformer is any object with ``params_per_feature``, ``layout`` ("chunk" or "interleave", see :class:`MADE`),
    ``transformer(x, params) -> (z, logdet)`` and ``transformer.inverse(z, params) -> (x, logdet)`` for x (B, C), params
    (B, C*params_per_feature) and logdet (B,), where C is any number of features; an increasing map of each for
    every params. One whose map of zeros is no good start has ``start_params()`` (params_per_feature,), with which the
    layer begins.

    Args:
        scale: ScaleMap or its name; "additive" has one parameter per feature, the rest two.
    """

    layout = "chunk"

    def __init__(self, scale="tanh"):
        self.scale = ScaleMap.of(scale)
        self.params_per_feature = 1 if self.scale.kind == "additive" else 2

    def __call__(self, x, params):
        return functional.affine_coupling(x, params, scale=self.scale)

    def inverse(self, z, params):
        return functional.affine_coupling(z, params, scale=self.scale, inverse=True)

    def __repr__(self):
        return f"AffineTransformer({self.scale})"


class MaskedAutoregressive(nn.Module):
    """z_i = f(x_i; params_i) with params_i = MADE(x, context)_i of the features before i: one pass from x to z.

    The inverse goes feature by feature, since params_i need x up to i - 1; it evaluates every hidden unit once (see
    :class:`Sweep`), so that it costs the multiplications of one pass, in D times as many launches. The Jacobian is
    triangular in the order, and log|det| the sum of the transformer's. It starts as the transformer's map of zeros, or
    of its ``start_params``.

    Args:
        features: D >= 1.
        hidden, order, context_features, activation: of the :class:`MADE`.
        transformer: the map of one feature, see :class:`AffineTransformer`, which is the default. One that is a module
            becomes a submodule.

    References:
        Papamakarios et al., "Masked autoregressive flow for density estimation", 2017, arXiv:1705.07057.
    """

    def __init__(self, features, hidden=(64, 64), *, order=None, context_features=None, transformer=None,
                 activation=nn.ReLU):
        super().__init__()
        transformer = AffineTransformer() if transformer is None else transformer
        for name in ("params_per_feature", "layout", "inverse", "__call__"):
            if not hasattr(transformer, name):
                raise TypeError(f"transformer: expected an object with {name}, got {type(transformer).__name__}")
        self.transformer = transformer
        self.network = MADE(features, transformer.params_per_feature, hidden, order=order, layout=transformer.layout,
                            context_features=context_features, activation=activation)
        if hasattr(transformer, "start_params"):
            start = transformer.start_params()
            along = start.repeat if transformer.layout == "interleave" else start.repeat_interleave
            with torch.no_grad():
                self.network.layers[-1].bias.copy_(along(features))

    def forward(self, x, context=None):
        """(z, logdet) of x (B, D), in one pass."""
        return self.transformer(x, self.network(x, context))

    def inverse(self, z, context=None):
        """(x, logdet) of z (B, D), feature by feature."""
        network = self.network
        checks.tensor("z", z)
        checks.events("z", z, (network.features,))
        checks.goes_with("z", z, "weight", network.layers[0].weight)
        sweep = network.sweep(z.shape[0], context)
        found, total = [], None
        for column in z.index_select(1, network.order).split(1, 1):
            x, logdet = self.transformer.inverse(column, sweep.params())
            sweep.push(x)
            found.append(x)
            total = logdet if total is None else total + logdet
        return torch.cat(found, 1).index_select(1, torch.argsort(network.order)), total


class _AutoregressiveFlow(Flow):
    """What MAF and IAF have in common: layers that take turns in order, with an ActNorm in front of each."""

    def __init__(self, features, n_layers, hidden, context_features, scale, transformer, order, actnorm, activation,
                 wrap):
        features = checks.count("features", features, 1)
        n_layers = checks.count("n_layers", n_layers)
        checks.choice("order", order, ("reverse", "random"))
        layers = []
        for index in range(n_layers):
            if order == "random":
                sequence = torch.randperm(features, device="cpu")
            else:
                sequence = torch.arange(features, device="cpu")
                sequence = sequence if index % 2 == 0 else sequence.flip(0)
            layer = MaskedAutoregressive(
                features, hidden, order=sequence, context_features=context_features, activation=activation,
                transformer=AffineTransformer(scale) if transformer is None else transformer())
            layers += [*([ActNorm(features)] if actnorm else []), wrap(layer)]
        super().__init__(Compose(*layers, event_shape=(features,)), StandardNormal((features,)))
        self.features = features


class MAF(_AutoregressiveFlow):
    """Masked autoregressive flow: densities in one pass per layer, samples feature by feature.

    x (B, features) passes ``n_layers`` :class:`MaskedAutoregressive`, each behind an ActNorm, which ``initialize`` sets
    from data; the base is N(0, I). With the default scale it starts as the identity.

    Args:
        features: D >= 1.
        n_layers: number of autoregressive layers.
        hidden: sizes of each MADE's hidden layers.
        context_features: size of the context (B, context_features) that conditions the density, or None.
        scale: ScaleMap of the affine transformers or its name; "tanh" keeps each scale between 1/e and e.
        transformer: constructor of another transformer for each layer, in place of an affine one.
        order: "reverse", every second layer takes the features from last to first; "random", each layer draws an
            order of its own.
        actnorm: whether an ActNorm stands in front of each layer.
        activation: constructor of the activation module.

    References:
        Papamakarios et al., "Masked autoregressive flow for density estimation", 2017, arXiv:1705.07057.
    """

    configs = CONFIGS

    def __init__(self, features, *, n_layers=5, hidden=(64, 64), context_features=None, scale="tanh", transformer=None,
                 order="reverse", actnorm=True, activation=nn.ReLU):
        super().__init__(features, n_layers, hidden, context_features, scale, transformer, order, actnorm, activation,
                         lambda layer: layer)


class IAF(_AutoregressiveFlow):
    """Inverse autoregressive flow: samples and their densities in one pass per layer, the density of given x feature
    by feature.

    The layers of :class:`MAF` the other way round: each makes its data from its noise by one MADE. The arguments are
    MAF's.

    References:
        Kingma et al., "Improving variational inference with inverse autoregressive flow", 2016, arXiv:1606.04934.
    """

    configs = IAF_CONFIGS

    def __init__(self, features, *, n_layers=5, hidden=(64, 64), context_features=None, scale="tanh", transformer=None,
                 order="reverse", actnorm=True, activation=nn.ReLU):
        super().__init__(features, n_layers, hidden, context_features, scale, transformer, order, actnorm, activation,
                         Inverse)
