"""Glow and RealNVP in nflows (PyPI ``nflows``), from its own ActNorm, OneByOneConvolution, couplings and multi-scale
composite.

Its 1x1 convolution is L U P, with a bias of its own; what leaves at a split is the first half of the channels, so the
couplings here transform the first half. The learned prior of a split is an nflows coupling, inverted.
"""

import torch
from nflows import distributions, flows, transforms
from torch import nn

from benchmarks.peers import common

GLOW_SETTINGS = {"": {}}
REALNVP_SETTINGS = {"": {}}


class WithoutContext(nn.Module):
    """A network in the form in which nflows calls it."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, inputs, context=None):
        return self.net(inputs)


class PriorCoupling(transforms.AffineCouplingTransform):
    """z * sigma + mean with log sigma = 5 tanh(r / 5): noise to data, of the prior of a split."""

    def _scale_and_shift(self, transform_params):
        shift, raw = transform_params.chunk(2, 1)
        return torch.exp(5.0 * torch.tanh(raw / 5.0)), shift


class Glow(nn.Module):
    """log p(x) (B,) of images (B, C, H, W); ``sample(n)``."""

    def __init__(self, image_shape, n_levels, n_steps, hidden_channels):
        super().__init__()
        channels, height, width = image_shape
        multiscale = transforms.MultiscaleCompositeTransform(n_levels)
        for level in range(n_levels):
            channels, height, width = 4 * channels, height // 2, width // 2
            half = channels // 2
            mask = [1] * half + [0] * half
            parts = [transforms.SqueezeTransform()]
            for _ in range(n_steps):
                parts += [transforms.ActNorm(channels), transforms.OneByOneConvolution(channels),
                          transforms.AffineCouplingTransform(mask, lambda i, o: WithoutContext(
                              common.conv_net(i, o, hidden_channels)))]
            if level < n_levels - 1:
                parts.append(transforms.InverseTransform(PriorCoupling(
                    mask, lambda i, o: WithoutContext(common.zero_conv(i, o)))))
            multiscale.add_transform(transforms.CompositeTransform(parts), (channels, height, width))
            channels = half
        size = image_shape[0] * image_shape[1] * image_shape[2]
        self.flow = flows.Flow(multiscale, distributions.StandardNormal([size]))

    def forward(self, x):
        return self.flow.log_prob(x)

    def sample(self, n):
        return self.flow.sample(n)

    @torch.no_grad()
    def initialize(self, x):
        """The data-dependent initialisation: nflows does it in the first pass in training mode."""
        self.train()(x)

    @property
    def levels(self):
        """(steps, prior or None) of every level; a step is (actnorm, convolution, coupling)."""
        for composite in self.flow._transform._transforms:
            parts = list(composite._transforms)[1:]
            prior = parts.pop()._transform if len(parts) % 3 else None
            yield list(zip(parts[0::3], parts[1::3], parts[2::3], strict=True)), prior


def load_glow(peer, glow):
    """Give it the weights of a fastflow Glow in nflows' dialect, realised as L U P with a positive diagonal.

    Such a form exists up to the signs of the rows of a 1x1 weight: where they don't fit, the rows of the fastflow
    Glow's weight change sign first (a rotation stays one), so that both are the same model afterwards.
    """
    for (steps, prior), level in zip(peer.levels, glow.transform.levels, strict=True):
        order = torch.arange(level.steps[0].conv.channels)  # of the channels at a step's input, then swapped
        for (actnorm, conv, coupling), step in zip(steps, level.steps, strict=True):
            own, swapped = step.conv, common.swapped(step.conv.channels)
            with torch.no_grad():
                actnorm.log_scale.copy_(own.actnorm.log_scale[order])
                actnorm.shift.copy_((own.actnorm.bias * own.actnorm.log_scale.exp())[order])
                actnorm.initialized.fill_(True)
                signs = _set_weight(conv, own.weight[swapped][:, order])
                own.weight.mul_(signs[swapped, None])
            common.copy_layers(coupling.transform_net, step.coupling.conditioner)
            order = swapped
        if prior is not None:
            common.copy_layers(prior.transform_net, level.split.prior)


def _set_weight(conv, weight):
    """Make conv's weight diag(signs) @ weight and return the signs."""
    # W^T = P' L' U' pivots the columns of W = U'^T L'^T P'^T; nflows wants a unit L and a positive diagonal in U.
    permutation, lower, upper = torch.linalg.lu(weight.double().t())
    pivots = upper.diagonal()
    if pivots.abs().min() <= 2 * conv.eps:
        raise ValueError(f"weight: nflows can't express a pivot of {pivots.abs().min():.1e}")
    signs = pivots.sign()
    unit = signs[:, None] * (upper / pivots[:, None]).t() * signs
    conv.lower_entries.copy_(unit[conv.lower_indices])
    conv.upper_entries.copy_((pivots.abs()[:, None] * lower.t())[conv.upper_indices])
    conv.unconstrained_upper_diag.copy_(torch.log(torch.expm1(pivots.abs() - conv.eps)))
    conv.bias.zero_()
    conv.permutation._permutation.copy_(permutation.t().argmax(1))
    return signs.to(weight.dtype)


class RealNVP(nn.Module):
    """log p(x) (B,) of x (B, 2); ``sample(n)``."""

    def __init__(self, n_layers, hidden):
        super().__init__()
        parts = [transforms.ActNorm(2)]
        for index in range(n_layers):
            mask = [1, 0] if index % 2 else [0, 1]
            parts.append(transforms.AffineCouplingTransform(
                mask, lambda i, o: WithoutContext(common.mlp(i, o, hidden))))
        self.flow = flows.Flow(transforms.CompositeTransform(parts), distributions.StandardNormal([2]))

    def forward(self, x):
        return self.flow.log_prob(x)

    def sample(self, n):
        return self.flow.sample(n)


def load_realnvp(peer, flow):
    """Give it the weights of realnvp.fastflow_realnvp(dialect="nflows")."""
    actnorm, *couplings = peer.flow._transform._transforms
    own, *layers = flow.transform.transforms
    with torch.no_grad():
        actnorm.log_scale.copy_(own.log_scale)
        actnorm.shift.copy_(own.bias * own.log_scale.exp())
        actnorm.initialized.fill_(True)
    for coupling, layer in zip(couplings, layers, strict=True):
        common.copy_layers(coupling.transform_net, layer.conditioner, torch.tensor([1, 0]))
