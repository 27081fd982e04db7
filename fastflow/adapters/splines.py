"""Rational-quadratic splines as nflows and normflows, which took them from the same paper's code, both lay them out."""

import torch

from fastflow import functional
from fastflow.adapters.layers import fusable, order, overridden, reorder
from fastflow.adapters.networks import Autoregressive, covered, evaluate
from fastflow.autograd import chain, mlp_spline

__all__ = ["SplineAutoregressive", "SplineCDF", "SplineCoupling", "fit", "fit_coupling"]

OWN = ("_piecewise_cdf", "_coupling_transform", "_coupling_transform_forward", "_coupling_transform_inverse",
       "_elementwise", "_elementwise_forward", "_elementwise_inverse", "_spline")  # what a kernel computes of a layer


def fit(module, fix):
    """Why the kernel has no such spline, or None."""
    reason = overridden(module, *OWN)
    if reason is not None:
        return reason
    if not isinstance(module.tails, str) or module.tails != "linear":
        return f"the kernel has linear tails, not {module.tails!r}"
    if isinstance(module.tail_bound, torch.Tensor):
        return "its tail_bound is a tensor"
    bins = module.num_bins if hasattr(module, "num_bins") else module.unnormalized_widths.shape[-1]
    for name in ("min_bin_width", "min_bin_height"):
        if getattr(module, name) * bins > 1.0:
            return f"its {name} is too large for {bins} bins"
    return None


def fit_coupling(module, fix):
    """As :func:`fit`, of a coupling; finds out the order of its channels."""
    return fit(module, fix) or order(module, module.identity_features, module.transform_features) and None


def transform(module, x, params, inverse, gain=1.0, logdet=None):
    """functional.spline with the module's options."""
    return functional.spline(x, params, tail_bound=module.tail_bound, min_width=module.min_bin_width,
                             min_height=module.min_bin_height, min_derivative=module.min_derivative, gain=gain,
                             inverse=inverse, logdet=logdet)


def _gain(net, *names):
    """Raw widths and heights are divided by the root of the network's width, where it tells it under such a name."""
    for name in names:
        if hasattr(net, name):
            return getattr(net, name) ** -0.5
    return 1.0


def _constants(module, net):
    """mlp_spline's constants of a module with this network, one of vectors."""
    return (module.tail_bound, module.min_bin_width, module.min_bin_height, module.min_derivative,
            _gain(net, "hidden_features"), None)


class SplineCoupling:
    """A coupling whose active channels go through a spline, and the passive ones through one of their own or none."""

    def forward(self, inputs, context=None):
        return self._fastflow_couple(inputs, context, False)

    def inverse(self, inputs, context=None):
        return self._fastflow_couple(inputs, context, True)

    def _fastflow_step(self, inputs, context):
        """The forward pass as a step of autograd.chain for data like ``inputs``, or None."""
        if (self.unconditional_transform is not None or inputs.dim() != 2 or inputs.shape[1] != self.features
                or fit(self, False) is not None):
            return None
        kept, indices, back = order(self, self.identity_features, self.transform_features)
        network = covered(self.transform_net, inputs, context) if kept else None
        if network is None:
            return None
        return mlp_spline.step(indices, back, kept, network, _constants(self, self.transform_net))

    def _fastflow_couple(self, inputs, context, inverse):
        if (inputs.dim() not in (2, 4) or inputs.shape[1] != self.features or not fusable(inputs)
                or fit(self, False) is not None):
            return (super().inverse if inverse else super().forward)(inputs, context)
        kept, indices, back = order(self, self.identity_features, self.transform_features)
        network = None
        if self.unconditional_transform is None and kept:  # without a passive part mlp_spline is of another kind
            network = covered(self.transform_net, inputs, context)
        if network is not None:
            return mlp_spline.run(inputs, indices, back, kept, network, _constants(self, self.transform_net), inverse)
        x = inputs if indices is None else reorder(inputs, indices, back)
        sizes = [kept, self.features - kept] if kept >= 0 else [self.features + kept, -kept]
        passive, active = x.split(sizes, 1) if kept >= 0 else x.split(sizes, 1)[::-1]
        logdet, own = None, self.unconditional_transform
        if own is not None and inverse:
            passive, logdet = own.inverse(passive, context)
        params = evaluate(self.transform_net, passive, context)
        if own is not None and not inverse:
            passive, logdet = own(passive, context)
        gain = _gain(self.transform_net, "hidden_features", "hidden_channels")
        y, logdet = transform(self, active, params.to(active.dtype), inverse, gain, logdet)
        y = torch.cat([passive, y] if kept >= 0 else [y, passive], 1)
        return (y if indices is None else reorder(y, back, indices)), logdet


class SplineCDF:
    """A spline per element with parameters that all samples share."""

    def _spline(self, inputs, inverse=False):
        raw = torch.cat([self.unnormalized_widths, self.unnormalized_heights, self.unnormalized_derivatives], -1)
        if not fusable(inputs, raw) or inputs.shape[1:] != raw.shape[:-1] or fit(self, False) is not None:
            return super()._spline(inputs, inverse)
        params = raw.movedim(-1, 1).flatten(0, 1)
        return transform(self, inputs, params.expand(inputs.shape[0], *params.shape), inverse)


class SplineAutoregressive(Autoregressive):
    """A spline per feature with parameters from a masked network."""

    def forward(self, inputs, context=None):
        step = self._fastflow_step(inputs, context)
        return super().forward(inputs, context) if step is None else chain.run(inputs, (step,))

    def _fastflow_step(self, inputs, context):
        """The forward pass as a step of autograd.chain for data like ``inputs``, or None."""
        network = covered(self.autoregressive_net, inputs, context) if fit(self, False) is None else None
        return None if network is None else mlp_spline.step(None, None, 0, network,
                                                            _constants(self, self.autoregressive_net))

    def _elementwise(self, inputs, autoregressive_params, inverse=False):
        if not fusable(inputs, autoregressive_params) or fit(self, False) is not None:
            return super()._elementwise(inputs, autoregressive_params, inverse)
        gain = _gain(self.autoregressive_net, "hidden_features")
        return transform(self, inputs, autoregressive_params, inverse, gain)
