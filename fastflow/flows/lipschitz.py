"""Networks with a bounded Lipschitz constant in the 2-norm."""

import torch
import torch.nn.functional as F
from torch import nn

from fastflow import checks
from fastflow.one_number import OneNumber, one_number

__all__ = ["LipSwish", "LipschitzMLP", "SpectralLinear", "spectral_bound"]


class LipSwish(OneNumber):
    """x sigmoid(softplus(beta) x) / 1.1 with a learned beta; its slope stays within (-0.1, 1).

    References:
        Chen et al., "Residual flows for invertible generative modeling", 2019, arXiv:1906.02735, section 3.3.
    """

    def __init__(self):
        super().__init__()
        self.beta = one_number(0.5)

    def forward(self, x):
        return x * torch.sigmoid(F.softplus(self.beta) * x) / 1.1  # the steepest slope of x sigmoid(x) is 1.09984


def spectral_bound(weight):
    """An upper bound of the largest singular value of a matrix, or of any of several (..., M, N), real or complex: 0-d,
    differentiable, above it by less than 1 %.

    Power iteration on the whole Gram matrix G = W'W: with k = 8 squarings it gives (tr G^(2^(k+1)))^(1/2^(k+2)), the
    Schatten norm of order 1024, at most rank^(1/1024) times the 2-norm. Iterating a vector instead would come from
    below, and lag behind a weight that moves.

    References:
        Delattre et al., "Efficient bound of Lipschitz constant for convolutional layers by Gram iteration", 2023,
        arXiv:2305.16173.
    """
    gram = weight.mH @ weight if weight.shape[-2] >= weight.shape[-1] else weight @ weight.mH
    log, share, tiny = 0.0, 1.0, torch.finfo(weight.dtype).tiny
    for _ in range(8):
        size = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True).clamp_min(tiny)
        log = log + share * torch.log(size)
        gram, share = gram / size, 0.5 * share
        gram = gram @ gram
    last = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True).clamp_min(tiny)
    return torch.exp(0.5 * (log + share * torch.log(last))).amax()


class SpectralLinear(nn.Linear):
    """A linear layer of induced 2-norm up to ``bound``: its weight is W min(1, bound / |W|), with |W| from above by
    :func:`spectral_bound`.

    Args:
        in_features, out_features: sizes.
        bound: positive.
    """

    def __init__(self, in_features, out_features, bound=1.0):
        super().__init__(in_features, out_features)
        if not bound > 0:
            raise ValueError(f"bound: expected a positive number, got {bound!r}")
        self.bound = bound

    def bounded_weight(self):
        """The weight whose norm is up to ``bound``."""
        return self.weight * (self.bound / torch.clamp(spectral_bound(self.weight), min=self.bound))

    def forward(self, x):
        return F.linear(x, self.bounded_weight(), self.bias)


class LipschitzMLP(nn.Module):
    """Fully connected network (B, features) to (B, features) with |g(x) - g(y)| <= bound |x - y| in the 2-norm.

    Each linear layer has norm up to bound^(1/n_layers); activations must have slopes within [-1, 1]. A context enters
    before the first activation without a bound, which the constant in x doesn't need.

    Args:
        features: D.
        hidden: sizes of the hidden layers.
        bound: the Lipschitz constant, also an attribute.
        context_features: size of the context (B, context_features), or None.
        activation: constructor of the activation module: :class:`LipSwish`, nn.ELU, nn.Tanh, ...
    """

    def __init__(self, features, hidden=(64, 64), *, bound=0.97, context_features=None, activation=LipSwish):
        super().__init__()
        hidden = checks.counts("hidden", hidden, 1)
        for name, value in (("features", features),
                            *(() if context_features is None else (("context_features", context_features),))):
            checks.count(name, value, 1)
        if not bound > 0:
            raise ValueError(f"bound: expected a positive number, got {bound!r}")
        self.event_shape, self.bound = (features,), bound
        self.context_features, self.takes_context = context_features, context_features is not None
        sizes = (features, *hidden, features)
        each = bound ** (1.0 / (len(sizes) - 1))
        self.layers = nn.ModuleList(SpectralLinear(a, b, each) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        self.activations = nn.ModuleList(activation() for _ in hidden)
        self.context_layer = None
        if context_features is not None:
            self.context_layer = nn.Linear(context_features, sizes[1], bias=False)

    def forward(self, x, context=None):
        return self.bind(context)(x)

    def bind(self, context=None):
        """The network of one context as a function of x (B, D), with the weights' norms taken once."""
        weights = [layer.bounded_weight() for layer in self.layers]
        biases = [layer.bias for layer in self.layers]
        if self.context_layer is None:
            if context is not None:
                raise ValueError(f"context: expected None, because the network was built without context_features, "
                                 f"got shape {tuple(context.shape)}")
            shift = None
        else:
            if context is None or context.dim() != 2 or context.shape[1] != self.context_features:
                got = None if context is None else tuple(context.shape)
                raise ValueError(f"context: expected shape (B, {self.context_features}), got {got}")
            checks.goes_with("context", context, "weight", self.context_layer.weight)
            shift = self.context_layer(context.to(self.context_layer.weight.dtype))

        def function(x):
            h = F.linear(x, weights[0], biases[0])
            if shift is not None:
                if len(shift) != len(x):
                    raise ValueError(f"context: expected shape {(len(x), self.context_features)}, got "
                                     f"{tuple(context.shape)}")
                h = h + shift
            for activation, weight, bias in zip(self.activations, weights[1:], biases[1:], strict=True):
                h = F.linear(activation(h), weight, bias)
            return h

        return function
