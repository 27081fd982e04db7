"""Neural spline flows for tabular data."""

import torch
from torch import nn

from fastflow import checks, functional
from fastflow.flows.autoregressive import MaskedAutoregressive
from fastflow.flows.base import StandardNormal
from fastflow.flows.bases import Uniform
from fastflow.flows.circular import PeriodicShift
from fastflow.flows.flow import Flow
from fastflow.flows.logdets import sum_event, zero_logdet
from fastflow.flows.permutation import Permute
from fastflow.flows.tabular import FEATURES, halves
from fastflow.flows.transform import Compose
from fastflow.nn import MLP, ActNorm, SplineCoupling

__all__ = ["CONFIGS", "NSF", "SplineTransformer"]


def _configs():
    coupling = {"power": (10, 256, 8), "gas": (10, 256, 8), "hepmass": (20, 128, 8), "miniboone": (10, 32, 4),
                "bsds300": (20, 128, 8)}
    autoregressive = {"power": (10, 256, 8), "gas": (10, 256, 8), "hepmass": (10, 256, 8), "miniboone": (10, 64, 4),
                      "bsds300": (10, 512, 8)}
    return {name + suffix: {"features": FEATURES[name], "n_layers": n_layers, "hidden": (width,) * 4, "n_bins": n_bins,
                            "permutation": "random", "autoregressive": suffix == "-ar"}
            for suffix, sizes in (("", coupling), ("-ar", autoregressive))
            for name, (n_layers, width, n_bins) in sizes.items()}


CONFIGS = _configs()
"""The tabular models of the paper by name, for :meth:`NSF.from_config`, "power" with couplings, "power-ar"
autoregressive, and so on. Networks have four hidden layers where the paper's have two residual blocks of two, and
between layers stand permutations without its LU factors."""


class SplineTransformer:
    """z = f(x; params) of every feature by ``functional.spline``, for autoregressive layers.

    Such a transformer has ``params_per_feature``, the ``layout`` of params (B, C*params_per_feature) ("interleave":
    those of a feature lie side by side), and both directions.

    Args:
        n_bins: K, bins of each spline.
        kind, **options: as of functional.spline.
    """

    layout = "interleave"

    def __init__(self, n_bins=8, *, kind="rq", **options):
        self.params_per_feature = functional.spline_params(kind, n_bins, options.get("tails", "linear"))
        self.n_bins = n_bins
        self.options = {"kind": kind, **options}

    def __call__(self, x, params):
        """(z, logdet) of x (B, C)."""
        return functional.spline(x, params, **self.options)

    def inverse(self, z, params):
        """(x, logdet) of z (B, C)."""
        return functional.spline(z, params, inverse=True, **self.options)

    def __repr__(self):
        return f"SplineTransformer({self.n_bins}, {', '.join(f'{k}={v!r}' for k, v in self.options.items())})"


class _Box(nn.Module):
    """The identity on [-bound, bound]^D; an element outside becomes 0, with log-determinant -inf."""

    def __init__(self, bound):
        super().__init__()
        self.bound = bound

    def forward(self, x, context=None):
        checks.tensor("x", x)
        outside = x.abs() > self.bound
        return torch.where(outside, 0.0, x), sum_event(torch.where(outside, -torch.inf, zero_logdet(x)[:, None]))

    def inverse(self, z, context=None):
        return self(z)


class NSF(Flow):
    """Spline couplings with fully connected conditioners that take turns on the two halves of the features, or
    autoregressive spline layers.

    x (B, features) passes one ActNorm, which ``initialize`` sets from data, and then the layers; the base is
    N(0, I). It starts as the identity. An element outside [-tail_bound, tail_bound] passes a coupling unchanged, so
    standardise the data or ``initialize``.

    For data on the box [-tail_bound, tail_bound]^D, ``tails`` None has no ActNorm and a uniform base on the box: it can
    learn whatever density there is at the edges, and outside the density is 0. For angles of period 2*tail_bound,
    "circular" tails have that base, too, and in the ActNorm's place in front of each layer a :class:`PeriodicShift`:
    log_prob(x) = log_prob(x + 2*tail_bound), samples lie in [-tail_bound, tail_bound). Conditioners of couplings see
    cos and sin of the angles, so that the density has no seam; networks of autoregressive layers see the angles, and
    so it may jump at theirs.

    Args:
        features: D >= 1. With a single feature every coupling transforms it, given the context alone.
        n_layers: number of couplings or autoregressive layers.
        n_bins: bins of each spline.
        hidden: sizes of each conditioner's hidden layers.
        tail_bound: where the tails begin; half the period of angles.
        context_features: size of the context (B, context_features) that conditions the density, or None.
        autoregressive: layers are :class:`MaskedAutoregressive`: densities in one pass, samples feature by feature.
        permutation: "flip", couplings take turns on the two halves, autoregressive layers in the two directions;
            "random", each goes by a random permutation of the features, drawn at construction from torch's generator.
        kind: "rq" or "linear" splines.
        activation: constructor of the activation module.
        tails: "linear", "circular" or None, see above; the last two for "rq" splines.
        base: another base distribution in the place of the one above, or None.

    Raises:
        ValueError: an argument does not fit; the message names it.

    References:
        Durkan et al., "Neural spline flows", 2019, arXiv:1906.04032.
        Rezende et al., "Normalizing flows on tori and spheres", 2020, arXiv:2002.02428.
    """

    configs = CONFIGS

    def __init__(self, features, *, n_layers=8, n_bins=8, hidden=(64, 64), tail_bound=3.0, context_features=None,
                 autoregressive=False, permutation="flip", kind="rq", activation=nn.ReLU, tails="linear", base=None):
        checks.count("features", features, 1)
        checks.count("n_layers", n_layers)
        checks.choice("permutation", permutation, ("flip", "random"))
        options = {"n_bins": n_bins, "tail_bound": tail_bound, "kind": kind, "tails": tails}
        build = _autoregressive_layers if autoregressive else _coupling_layers
        layers = build(features, n_layers, options, permutation, hidden, context_features, activation)
        if tails == "circular":
            layers = [part for layer in layers for part in (
                [layer] if isinstance(layer, Permute) else [PeriodicShift(features, tail_bound), layer])]
        else:  # no conditioner sees what is outside of a box
            layers = [_Box(tail_bound) if tails is None else ActNorm(features), *layers]
        if base is None:
            base = StandardNormal((features,)) if tails == "linear" else Uniform(-tail_bound, tail_bound, (features,))
        super().__init__(Compose(*layers, event_shape=(features,)), base)
        self.features = features


def _coupling_layers(features, n_layers, options, permutation, hidden, context_features, activation):
    per_feature, layers = functional.spline_params(options["kind"], options["n_bins"], options["tails"]), []
    periodic = options["tails"] == "circular"
    for index, (passive, active, flip) in enumerate(halves(features, n_layers, permutation == "flip")):
        conditioner = MLP((1 + periodic) * passive, active * per_feature, hidden, context_features=context_features,
                          activation=activation)
        coupling = SplineCoupling(conditioner, flip=flip, periodic=periodic, **options)
        with torch.no_grad():
            conditioner.layers[-1].bias.copy_(coupling.identity_params().repeat(active))
        if permutation == "random" and index > 0:
            layers.append(Permute(torch.randperm(features, device="cpu").tolist()))
        layers.append(coupling)
    return layers


def _autoregressive_layers(features, n_layers, options, permutation, hidden, context_features, activation):
    identity, layers = SplineCoupling(nn.Identity(), **options).identity_params(), []
    for index in range(n_layers):
        order = (torch.randperm if permutation == "random" else torch.arange)(features, device="cpu")
        layer = MaskedAutoregressive(features, hidden, order=order.flip(0) if index % 2 else order,
                                     context_features=context_features, transformer=SplineTransformer(**options),
                                     activation=activation)
        with torch.no_grad():
            layer.network.layers[-1].bias.copy_(identity.repeat(features))
        layers.append(layer)
    return layers
