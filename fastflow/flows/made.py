"""MADE: a fully connected network whose outputs for a feature see only the features before it."""

import torch
import torch.nn.functional as F
from torch import nn

from fastflow import backends, checks
from fastflow.nn.hooks import is_hooked
from fastflow.nn.precision import taken

__all__ = ["MADE", "Sweep"]


class MaskedLinear(nn.Linear):
    """A linear layer whose weight is multiplied by a fixed mask."""

    def __init__(self, mask):
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask)

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


class MADE(nn.Module):
    """Masked MLP: the ``params_per_feature`` outputs of a feature depend on the features before it in ``order`` alone.

    A hidden unit of degree m sees the first m features and units of the layer below of degrees up to m; the outputs of
    the feature at place k (from 0) see units of degrees up to k. Degrees are spread evenly over a layer and ascend in
    it, which loses no generality; with a context there are units of degree 0, which see nothing else, so that the first
    feature is conditioned as well. The last layer starts at zero.

    Args:
        features: D >= 1.
        params_per_feature: P, outputs for each feature.
        hidden: sizes of the hidden layers; () for a masked linear map.
        order: the features from first to last, a permutation of 0..D-1; None for 0..D-1. Kept as a buffer, as are the
            masks, so that a state dict brings its own.
        context_features: size of a context (B, context_features) that every unit may see, or None.
        layout: "chunk": output p of feature i is column p*D + i; "interleave": it is column i*P + p.
        activation: constructor of the activation module, which must act on each element alone.

    Raises:
        ValueError, TypeError: a size, the order or the layout is not as above.

    References:
        Germain et al., "MADE: masked autoencoder for distribution estimation", 2015, arXiv:1502.03509.
    """

    def __init__(self, features, params_per_feature=1, hidden=(64, 64), *, order=None, context_features=None,
                 layout="chunk", activation=nn.ReLU):
        super().__init__()
        for name, value in (("features", features), ("params_per_feature", params_per_feature),
                            *(() if context_features is None else (("context_features", context_features),))):
            checks.count(name, value, 1)
        hidden = checks.counts("hidden", hidden, 1)
        checks.choice("layout", layout, ("chunk", "interleave"))
        # Masks are worked out on the CPU whatever the default device, which may be the meta device.
        order = range(features) if order is None else order
        order = order.cpu() if isinstance(order, torch.Tensor) else torch.tensor(order, device="cpu")
        order = order.to(torch.int64)
        if order.dim() != 1 or not torch.equal(order.sort().values, torch.arange(features, device="cpu")):
            raise ValueError(f"order: expected each of 0..{features - 1} once, got {order.tolist()}")
        self.features, self.params_per_feature = features, params_per_feature
        self.context_features, self.takes_context = context_features, context_features is not None
        self.layout = layout
        self.register_buffer("order", order.to(torch.get_default_device()))

        lowest = 0 if context_features is not None or features == 1 else 1
        degrees = [_spread(size, lowest, max(features - 1, lowest)) for size in hidden]
        place = torch.argsort(order)
        outputs = place.repeat(params_per_feature) if layout == "chunk" else place.repeat_interleave(params_per_feature)
        masks, below = [], place + 1  # a unit of degree m sees places 0..m-1, which is degree <= m of places from 1
        for degree in (*degrees, outputs):
            masks.append(degree[:, None] >= below[None, :])
            below = degree
        self.layers = nn.ModuleList(MaskedLinear(mask.to(torch.get_default_device())) for mask in masks)
        self.activations = nn.ModuleList(activation() for _ in hidden)
        self.context_layer = None
        if context_features is not None:
            self.context_layer = nn.Linear(context_features, len(masks[0]), bias=False)
        for last in (self.layers[-1], *([] if hidden or context_features is None else [self.context_layer])):
            nn.init.zeros_(last.weight)
        nn.init.zeros_(self.layers[-1].bias)
        # ends[layer][k]: how many units of the layer have degrees up to k
        self.ends = [[int((degree <= k).sum()) for k in range(features)] for degree in degrees]

    def forward(self, x, context=None):
        """Params (B, P*D) of x (B, D), given the context (B, context_features) if the network was built for one."""
        checks.tensor("x", x)
        checks.events("x", x, (self.features,))
        checks.goes_with("x", x, "weight", self.layers[0].weight)
        h = self.layers[0](taken(x, self.layers[0].weight))
        shift = self.context_shift(x.shape[0], context)
        h = h if shift is None else h + shift
        for activation, layer in zip(self.activations, self.layers[1:], strict=True):
            h = layer(activation(h))
        return h

    def sweep(self, batch, context=None):
        """A :class:`Sweep` over the features of a batch of that size, for when they become known one by one; where the
        network or a layer runs more than its class does, as with a hook, one that calls them whole each time."""
        plain = (type(self).forward is MADE.forward and not is_hooked(self)
                 and all(type(layer) is MaskedLinear and not is_hooked(layer) for layer in self.layers))
        return (Sweep if plain else _WholePasses)(self, batch, context)

    def context_shift(self, batch, context):
        """What the context adds to the first layer's pre-activations, (B, units) or None."""
        if self.context_layer is None:
            if context is not None:
                raise ValueError(f"context: expected None, because the network was built without context_features, "
                                 f"got shape {tuple(context.shape)}")
            return None
        expected = (batch, self.context_features)
        if context is None or tuple(context.shape) != expected:
            got = None if context is None else tuple(context.shape)
            raise ValueError(f"context: expected shape {expected}, got {got}")
        checks.goes_with("context", context, "weight", self.context_layer.weight)
        return self.context_layer(context.to(self.context_layer.weight.dtype))

    def extra_repr(self):
        return f"features={self.features}, params_per_feature={self.params_per_feature}"


class Sweep:
    """The outputs of a :class:`MADE` feature by feature, every hidden unit evaluated once.

    At place k only the units of degree k are new: all that they see is known by then, and nothing later changes the
    others. A whole sweep thus costs the multiplications of one pass, where evaluating the network anew at each place
    costs D passes; the numbers are the same up to the order of summation.
    """

    def __init__(self, network, batch, context=None):
        weight = network.layers[0].weight
        shift = network.context_shift(batch, context)
        order, d, p = network.order, network.features, network.params_per_feature
        self.network, self.place = network, 0
        # Columns and rows of features are taken in the order of the sweep, so that what is known is always a prefix.
        weights = [layer.weight for layer in network.layers]
        weights[0] = weights[0].index_select(1, order)
        bias = network.layers[-1].bias
        last = weights[-1]
        if network.layout == "chunk":
            last, bias = last.unflatten(0, (p, d)).transpose(0, 1), bias.view(p, d).t()
        else:
            last, bias = last.unflatten(0, (d, p)), bias.view(d, p)
        self.out_weight, self.out_bias = last.index_select(0, order), bias.index_select(0, order)
        self.out_shift = None
        if shift is not None and not network.ends:
            shift = (shift.unflatten(1, (p, d)).transpose(1, 2) if network.layout == "chunk"
                     else shift.unflatten(1, (d, p)))
            self.out_shift = shift.index_select(1, order)
        self.weights, self.shift = weights[:-1], shift
        # Writing into a buffer is cheaper, but autograd's saved tensors and functional transforms don't allow it.
        self.store = _Joined if torch.is_grad_enabled() or backends.needs_reference(()) else _Buffer
        self.inputs = self.store(batch, d, weight)
        self.hidden = [self.store(batch, len(w), weight) for w in self.weights]

    def params(self):
        """Params (B, P) of the feature at the present place."""
        k, network = self.place, self.network
        known = self.inputs.value
        for index, (weight, store) in enumerate(zip(self.weights, self.hidden, strict=True)):
            start, end = store.value.shape[1], network.ends[index][k]
            if end > start:
                h = F.linear(known, weight[start:end, :known.shape[1]], network.layers[index].bias[start:end])
                if index == 0 and self.shift is not None:
                    h = h + self.shift[:, start:end]
                store.append(network.activations[index](h))
            known = store.value
        params = F.linear(known, self.out_weight[k, :, :known.shape[1]], self.out_bias[k])
        return params if self.out_shift is None else params + self.out_shift[:, k]

    def push(self, x):
        """The feature at the present place is x (B, 1); go on to the next."""
        self.inputs.append(taken(x, self.network.layers[0].weight))
        self.place += 1


class _WholePasses:
    """The same from a pass of the whole network at each place, in which the features to come are zero."""

    def __init__(self, network, batch, context=None):
        weight = network.layers[0].weight
        self.network, self.context = network, context
        self.found, self.rest = [weight.new_zeros(batch, 1)] * network.features, network.order.tolist()

    def params(self):
        network = self.network
        params, size = network(torch.cat(self.found, 1), self.context), network.params_per_feature
        whole = params.unflatten(1, (size, -1) if network.layout == "chunk" else (-1, size))
        return whole.select(2 if network.layout == "chunk" else 1, self.rest[0])

    def push(self, x):
        self.found[self.rest.pop(0)] = x


class _Joined:
    """Columns that grow, as a tensor of their own each time."""

    def __init__(self, batch, width, like):
        self.value = like.new_empty(batch, 0)

    def append(self, columns):
        self.value = torch.cat([self.value, columns], 1) if self.value.shape[1] else columns


class _Buffer:
    """Columns that grow in memory taken once."""

    def __init__(self, batch, width, like):
        self.batch, self.width, self.memory = batch, width, None
        self.value = like.new_empty(batch, 0)

    def append(self, columns):
        if self.memory is None:
            self.memory = columns.new_empty(self.batch, self.width)
        start = self.value.shape[1]
        self.memory[:, start:start + columns.shape[1]] = columns
        self.value = self.memory[:, :start + columns.shape[1]]


def _spread(size, low, high):
    """``size`` degrees from low to high, ascending, each as often as any other; both ends occur if they can."""
    count, index = high - low + 1, torch.arange(size, device="cpu")
    if size >= count:
        return low + index * count // size
    return low + torch.round(index * (count - 1) / max(size - 1, 1)).long()
