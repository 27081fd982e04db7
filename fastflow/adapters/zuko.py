"""zuko: affine and spline transforms of couplings, autoregressive and element-wise layers, and LU linear maps.

zuko's layers are lazy: they make a transform when they are called with a context. The layer is what is swapped; the
transforms that it makes are then fused ones. Data to noise; the log-determinant sums over the features.
"""

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from zuko import lazy, transforms
from zuko.flows import autoregressive, coupling, gaussianization
from zuko.nn import MLP, Linear, MaskedLinear, MaskedMLP
from zuko.utils import broadcast, unpack

from fastflow import functional
from fastflow.adapters.layers import fusable, remembered, reorder
from fastflow.adapters.networks import NETWORKS, covered, evaluate, fits_one_kernel, masks_of, weights_of
from fastflow.adapters.swap import PREFIX, swap
from fastflow.autograd import mlp_spline
from fastflow.autograd.mlp_flow import run_steps
from fastflow.functional import ScaleMap

EXAMPLES = {lazy.Flow: lambda flow, x, c=None: flow(c).log_prob(x)}


def _mlp(network, context):
    found = weights_of(network, Linear, widest=math.inf)
    return None if found is None else (*found, False, ())


def _masked_mlp(network, context):
    found = weights_of(network, MaskedLinear, widest=math.inf)
    return None if found is None else (*found, False, masks_of(tuple(network)[::2]))


NETWORKS |= {MLP: _mlp, MaskedMLP: _masked_mlp}


def _fit(module, fix):
    """What univariate transform a layer has, and of which (kind, slope, bound) that is."""
    function, options = module.univariate, {}
    if isinstance(function, functools.partial) and not function.args:
        function, options = function.func, function.keywords
    shapes = tuple(tuple(shape) for shape in module.shapes)
    slope, bound = options.get("slope", 1e-3), options.get("bound", 5.0)
    numbers = all(isinstance(value, (int, float)) for value in options.values()) and 0 < slope < 1
    if function is transforms.MonotonicAffineTransform and shapes == ((), ()) and options.keys() <= {"slope"}:
        kind = "affine"
    elif function is transforms.AdditiveTransform and shapes == ((),) and not options:
        kind = "additive"
    elif (function is transforms.MonotonicRQSTransform and options.keys() <= {"slope", "bound"} and len(shapes) == 3
            and len(shapes[0]) == 1 and shapes == (shapes[0], shapes[0], (shapes[0][0] - 1,)) and shapes[2] > (0,)):
        kind = "rqs"
    else:
        name = getattr(function, "__name__", type(function).__name__)
        return f"{name} with parameters of shapes {shapes} has no kernel"
    if not numbers:
        return "its options are not numbers"
    return {PREFIX + "kind": (kind, slope, bound), PREFIX + "univariate": module.univariate}


def _own(layer):
    """Whether the layer's univariate transform is still that which it had when it was swapped."""
    return layer.__dict__.get(PREFIX + "univariate") is layer.univariate


@functools.lru_cache(64)
def _scale(kind, slope):
    return ScaleMap("additive") if kind == "additive" else ScaleMap.zuko(slope)


class OneCall:
    """What follows from call_and_ladj and inv."""

    def _call(self, x):
        return self.call_and_ladj(x)[0]

    def _inverse(self, y):
        return self.inv.call_and_ladj(y)[0]

    def log_abs_det_jacobian(self, x, y):
        return self.call_and_ladj(x)[1]


class Fused(OneCall, transforms.DependentTransform):
    """A univariate transform of every feature, with parameters (*, D P) from a network, in one kernel."""

    def __init__(self, phi, layer, inverted=False):
        transforms.Transform.__init__(self)
        self.phi, self.layer, self.inverted, self.reinterpreted = phi, layer, inverted, 1

    @property
    def base(self):
        """zuko's own transform."""
        layer = self.layer
        base = layer.univariate(*unpack(self.phi.unflatten(-1, (-1, layer.total)), layer.shapes))
        return base.inv if self.inverted else base

    @property
    def inv(self):
        return Fused(self.phi, self.layer, not self.inverted)

    def call_and_ladj(self, x):
        phi, (kind, slope, bound) = self.phi, self.layer._fastflow_kind
        if not fusable(x, phi):
            return transforms.DependentTransform(self.base, 1).call_and_ladj(x)
        shape = given = x.shape
        if x.dim() != 2 or phi.dim() != 2 or len(phi) != len(x):
            batch = torch.broadcast_shapes(shape[:-1], phi.shape[:-1])
            shape = (*batch, shape[-1])
            phi, x = (t.expand(*batch, t.shape[-1]).reshape(-1, t.shape[-1]) for t in (phi, x))
        if kind == "rqs":
            y, ladj = functional.spline(x, phi, tail_bound=bound, min_width=0.0, min_height=0.0, min_derivative=0.0,
                                        clamp=-math.log(slope), inverse=self.inverted)
        else:
            y, ladj = functional.affine_coupling(x, phi, scale=_scale(kind, slope), layout="interleave",
                                                 order="shift_scale", inverse=self.inverted)
        if len(shape) != 2:
            y, ladj = y.view(shape), ladj.view(shape[:-1])
        if kind == "additive" and not self.inverted and given != shape:  # zuko's zeros are shaped like x, not like y
            ladj = x.new_zeros(given[:-1])
        return y, ladj


def _observe(module, result, args):
    """What a layer's transform makes of some x, both ways, and its gradient."""
    features = _features(module)
    tensors = itertools.chain(module.parameters(), module.buffers())
    like = next(t for t in tensors if t.is_floating_point())
    batch = args[0].shape[:-1] if args and args[0] is not None else (16,)
    count = math.prod(batch) * features
    x = 2.0 * torch.cos(1.3 * torch.arange(count, dtype=torch.float64, device=like.device))
    x = x.to(like.dtype).view(*batch, features).requires_grad_()
    y, ladj = result.call_and_ladj(x)
    back, back_ladj = result.inv.call_and_ladj(x)
    grads = torch.autograd.grad((y * x.detach()).sum() + ladj.sum() + back.sum() + back_ladj.sum(), x,
                                retain_graph=True)
    return [y, ladj, result(x), result.log_abs_det_jacobian(x, y), back, back_ladj, result.inv(x), *grads]


def _features(module):
    if hasattr(module, "hyper"):
        features = module.hyper.out_features // module.total
        return len(module.mask) if hasattr(module, "mask") else features
    return module.phi[0].shape[0] if hasattr(module, "phi") else _matrix(module).shape[-1]


def _once(method, args, kwargs, result):
    """No other call: what is observed goes both ways."""


def _lazy(host, fit=_fit):
    return swap(host, methods=("forward",), fit=fit, opposite=_once, observe=_observe)


def _network_of_spline(layer, x, c):
    """mlp_spline.run's ``network`` and ``spline`` where one node takes the layer's network of x and its splines, else
    None."""
    kind, slope, bound = layer._fastflow_kind
    if kind != "rqs" or c is not None or not fusable(x):
        return None
    network = covered(layer.hyper, x)
    return None if network is None else (network, (bound, 0.0, 0.0, 0.0, 1.0, -math.log(slope)))


class FusedAutoregressive(transforms.AutoregressiveTransform):
    """The transform of a layer under a context: forward, splines and their network as one node of autograd."""

    def __init__(self, layer, c):
        super().__init__(functools.partial(layer.meta, c), layer.passes)
        self.layer, self.c = layer, c

    def call_and_ladj(self, x):
        found = _network_of_spline(self.layer, x, self.c)
        return super().call_and_ladj(x) if found is None else mlp_spline.run(x, None, None, 0, *found)


def _phi(module, c, x):
    if c is not None:
        x = torch.cat(broadcast(x, c, ignore=1), dim=-1)
    return evaluate(module.hyper, x)


@_lazy(autoregressive.MaskedAutoregressiveTransform)
class MaskedAutoregressiveTransform(autoregressive.MaskedAutoregressiveTransform):
    """A univariate transform per feature, given the features before it."""

    def meta(self, c, x):
        return Fused(_phi(self, c, x), self) if _own(self) else super().meta(c, x)

    def forward(self, c=None):
        return FusedAutoregressive(self, c) if _own(self) else super().forward(c)


def _arrangement(mask):
    """(whether the passive features come last, how many come first, order, its inverse) for a mask of those that pass:
    the smaller part comes first, as the kernel for whole couplings has it. The order is None where none is needed."""
    passive, active = mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]
    flip = len(passive) > len(active)
    order = torch.cat([active, passive] if flip else [passive, active])
    back = torch.argsort(order)
    moves = not torch.equal(order, back) or not torch.equal(order, torch.arange(len(order), device=order.device))
    return flip, len(active) if flip else len(passive), *((order, back) if moves else (None, None))


class FusedCoupling(OneCall, transforms.CouplingTransform):
    """The coupling of a layer under a context: where its network is small, network and coupling in one kernel."""

    def __init__(self, layer, c, inverted=False):
        transforms.Transform.__init__(self)
        self.layer, self.c, self.inverted = layer, c, inverted
        self.meta = functools.partial(layer.meta, c)

    @property
    def idx_a(self):
        return self.layer.mask.nonzero().squeeze(-1)

    @property
    def idx_b(self):
        return (~self.layer.mask).nonzero().squeeze(-1)

    @property
    def inv(self):
        return FusedCoupling(self.layer, self.c, not self.inverted)

    def call_and_ladj(self, x):
        layer, c = self.layer, self.c
        if c is not None and c.shape[:-1] != x.shape[:-1]:
            x, c = broadcast(x, c, ignore=1)
        flip, first, order, back = remembered(layer, f"arrangement_{x.device}", _arrangement, layer.mask)
        batch = x.shape[:-1]
        x = x.reshape(-1, x.shape[-1])
        c = c if c is None else c.reshape(-1, c.shape[-1])
        kept = first - x.shape[1] if flip else first
        found = _network_of_spline(layer, x, c) if kept else None
        if found is not None:
            y, ladj = mlp_spline.run(x, order, back, kept, *found, self.inverted)
        else:
            y, ladj = self._couple(x if order is None else reorder(x, order, back), c, flip, first)
            y = y if order is None else reorder(y, back, order)
        return (y, ladj) if len(batch) == 1 else (y.view(*batch, y.shape[-1]), ladj.view(batch))

    def _couple(self, x, c, flip, first):
        step = self._step(x, c, flip, first)
        if step is not None:
            return run_steps(x, (step,), c, self.inverted)
        parts = x.split([first, x.shape[1] - first], 1)
        passive, active = parts[::-1] if flip else parts
        phi = evaluate(self.layer.hyper, passive if c is None else torch.cat([passive, c], 1))
        y, ladj = Fused(phi, self.layer, self.inverted).call_and_ladj(active)
        return torch.cat([y, passive] if flip else [passive, y], 1), ladj

    def _step(self, x, c, flip, first):
        """The coupling with its network as the step of one kernel, or None."""
        layer = self.layer
        kind, slope, _ = layer._fastflow_kind
        if kind == "rqs" or first != x.shape[1] // 2 or type(layer.hyper) is not MLP or not fits_one_kernel(x, c):
            return None
        found = weights_of(layer.hyper, Linear)
        if found is None or not fusable(x, *found[0], *found[1]) or c is not None and not fusable(x, c):
            return None
        weights, biases, activation = found
        return functional.MLPCoupling(weights, biases, flip=flip, activation=activation, scale=_scale(kind, slope),
                                      layout="interleave", order="shift_scale")


@_lazy(coupling.GeneralCouplingTransform)
class GeneralCouplingTransform(coupling.GeneralCouplingTransform):
    """A univariate transform of the features where its mask is False, given those where it is True."""

    def meta(self, c, x):
        return Fused(_phi(self, c, x), self) if _own(self) else super().meta(c, x)

    def forward(self, c=None):
        return FusedCoupling(self, c) if _own(self) else super().forward(c)


@_lazy(gaussianization.ElementWiseTransform)
class ElementWiseTransform(gaussianization.ElementWiseTransform):
    """A univariate transform per feature, given the context alone or nothing."""

    def forward(self, c=None):
        if not _own(self):
            return super().forward(c)
        if c is None:
            parts = [phi[:, None] if phi.dim() == 1 else phi for phi in self.phi]
            return Fused(torch.cat(parts, 1).flatten(), self)
        return Fused(evaluate(self.hyper, c), self)


class LULinear(transforms.LULinearTransform):
    """y = L U x with one matrix for all samples, solved for all of them at once."""

    def _call(self, x):
        return F.linear(x, self.L @ self.U)

    def _inverse(self, y):
        rows = y.reshape(-1, y.shape[-1]).mT
        rows = torch.linalg.solve_triangular(self.L, rows, upper=False)
        return torch.linalg.solve_triangular(self.U, rows, upper=True, unitriangular=True).mT.reshape(y.shape)


def _matrix(module):
    """The one argument of LULinearTransform."""
    (matrix,) = (*module.args, *module.kwargs.values())
    return matrix


def _fit_unconditional(module, fix):
    if module.f is not transforms.LULinearTransform:
        return f"{getattr(module.f, '__name__', module.f)} has no fused form"
    return None if module._nargs + len(module._keys) == 1 else "LULinearTransform has other options than LU"


@_lazy(lazy.UnconditionalTransform, _fit_unconditional)
class UnconditionalTransform(lazy.UnconditionalTransform):
    """LULinearTransform as a layer."""

    def forward(self, c=None):
        matrix = _matrix(self)
        return LULinear(matrix) if matrix.dim() == 2 else super().forward(c)
