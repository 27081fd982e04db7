"""A whole flow of affine couplings with fully connected conditioners, in eager PyTorch."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastflow import reference

__all__ = ["ACTIVATIONS", "ChannelAffine", "MLPCoupling", "Permutation", "mlp_flow"]

ACTIVATIONS = ("relu", "silu", "tanh")
FUNCTIONS = {"relu": torch.relu, "silu": F.silu, "tanh": torch.tanh}


@dataclass(eq=False)
class ChannelAffine:
    """z = (x + bias) * exp(log_scale) per feature; both (D,). The step that an ActNorm makes."""

    bias: torch.Tensor
    log_scale: torch.Tensor

    @property
    def parameters(self):
        """(bias, log_scale)."""
        return self.bias, self.log_scale

    def __call__(self, x, context, inverse):
        """(z, log|det|) of x (B, D); ``context`` is ignored."""
        if inverse:
            return x * torch.exp(-self.log_scale) - self.bias, (-self.log_scale.sum()).expand(x.shape[0])
        return (x + self.bias) * torch.exp(self.log_scale), self.log_scale.sum().expand(x.shape[0])


@dataclass(eq=False)
class Permutation:
    """z[:, f] = x[:, order[f]]: the features in another order. ``order`` is (D,), int64, each of 0 ... D - 1 once."""

    order: torch.Tensor

    @property
    def parameters(self):
        """(order,)."""
        return (self.order,)

    def __call__(self, x, context, inverse):
        """(z, log|det| = 0) of x (B, D); ``context`` is ignored."""
        order = torch.argsort(self.order) if inverse else self.order
        return x.index_select(1, order), x.new_zeros(x.shape[0])


@dataclass(eq=False)
class MLPCoupling:
    """An affine coupling whose conditioner is a fully connected network.

    The first D // 2 features are passive and the others are transformed, with ``flip`` the other way round; features
    keep their places. The network sees the passive features, and the context after them, and returns params as
    :func:`affine_coupling` takes them.

    Args:
        weights: the network's (out, in) matrices, first to last.
        biases: its (out,) biases.
        activation: between the layers: "relu", "silu" or "tanh".
        flip, scale, layout, order, shift_first: as of nn.AffineCoupling.
    """

    weights: tuple
    biases: tuple
    flip: bool = False
    activation: str = "relu"
    scale: object = "exp"
    layout: str = "chunk"
    order: str = "scale_shift"
    shift_first: bool = False

    @property
    def parameters(self):
        """weight and bias of every layer, in turn."""
        return tuple(t for pair in zip(self.weights, self.biases, strict=True) for t in pair)

    def __call__(self, x, context, inverse):
        """(z, log|det|) of x (B, D) under the context (B, K), or None."""
        half = x.shape[1] // 2
        first, second = x[:, :half], x[:, half:]
        passive, active = (second, first) if self.flip else (first, second)
        h = passive if context is None else torch.cat([passive, context], 1)
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = F.linear(FUNCTIONS[self.activation](h) if index else h, weight, bias)
        y, logdet = reference.affine_coupling(active, h, scale=self.scale, layout=self.layout, order=self.order,
                                              shift_first=self.shift_first, inverse=inverse)
        return torch.cat([y, passive] if self.flip else [passive, y], 1), logdet


def mlp_flow(x, steps, *, context=None, inverse=False):
    """The steps one after the other, last to first for the inverse; see functional.mlp_flow."""
    total = x.new_zeros(x.shape[0])
    with reference.full_precision(x.device.type):
        for step in reversed(steps) if inverse else steps:
            x, logdet = step(x, context, inverse)
            total = total + logdet
    return x.contiguous(), total
