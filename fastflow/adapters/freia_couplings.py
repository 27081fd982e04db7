"""FrEIA's coupling blocks, and what AllInOneBlock shares with them."""

import functools

import torch
from FrEIA.modules import coupling_layers
from torch import nn

from fastflow import functional
from fastflow.adapters.layers import fusable, worthwhile
from fastflow.adapters.networks import covered, evaluate, fits_one_kernel, weights_of
from fastflow.adapters.swap import PREFIX, swap
from fastflow.autograd import chain, mlp_affine
from fastflow.autograd.mlp_flow import run_steps
from fastflow.functional import ScaleMap

# FrEIA's soft clamps as (function, gain, factor): factor * function(gain * u).
CLAMPS = {"atan": ("atan", 1.0, 0.636), "tanh": ("tanh", 1.0, 1.0), "sigmoid": ("tanh", 0.5, 1.0)}
ADDITIVE, EXP = ScaleMap("additive"), ScaleMap("exp")
FUNCTION = PREFIX + "function"  # a block's clamp when it was swapped


def reverse(method, args, kwargs, result):
    """The call that undoes forward(x, c, rev, jac)."""
    names = ("x", "c", "rev", "jac")
    call = dict(zip(names, args, strict=False)) | kwargs
    return method, (), call | {"x": result[0], "rev": not call.get("rev", False)}


@functools.lru_cache(256)
def _scale(kind, clamp):
    return ScaleMap.freia(clamp, kind)


def _clamp_of(module, fix):
    """Which of FrEIA's own soft clamps a block has."""
    if not isinstance(module.clamp, (int, float)):
        return "its clamp is not a number"
    function = module.f_clamp
    if function is not torch.tanh and getattr(function, "__module__", None) != coupling_layers.__name__:
        return "its clamp_activation is not one of FrEIA's own"
    probe = torch.linspace(-4.0, 4.0, 33, dtype=torch.float64)
    value = function(probe)
    for kind, (known, gain, factor) in CLAMPS.items():
        if torch.allclose(value, factor * getattr(torch, known)(gain * probe), rtol=0.0, atol=1e-12):
            return {PREFIX + "clamp": kind, FUNCTION: function}
    return "its clamp_activation is not one of FrEIA's own"


def _clamps(block):
    """Whether a block's clamp, where it uses one, is a number and its function that of when it was swapped."""
    own = block.__dict__
    return isinstance(block, coupling_layers.NICECouplingBlock) or (
        isinstance(block.clamp, (int, float)) and FUNCTION in own and own[FUNCTION] is own.get("f_clamp"))


def small_networks(module, x, c, subnets):
    """What weights_of tells of each of the subnets, None where one of them does not go into the kernel with x and c."""
    context = c[0] if module.conditional else None
    if len(c) > 1 or any(type(net) is not nn.Sequential for net in subnets) or not fits_one_kernel(x, context):
        return None
    found = [weights_of(net) for net in subnets]
    if None in found or not fusable(x, *(t for weights, biases, _ in found for t in (*weights, *biases))):
        return None
    return None if context is not None and not fusable(x, context) else found


def _two_steps(module, x, c, first, second, scale):
    """Steps of one kernel: the first part by ``first`` of the second one, then the second by ``second`` of the first.
    None where the networks don't go into it."""
    if x.dim() != 2 or module.split_len1 != x.shape[1] // 2:
        return None
    found = small_networks(module, x, c, (first, second))
    return None if found is None else [
        functional.MLPCoupling(weights, biases, flip=index == 0, activation=activation, scale=scale)
        for index, (weights, biases, activation) in enumerate(found)]


class TwoSided:
    """y1 from x1 given x2, then y2 from x2 given y1; ``rev`` undoes them in the other order."""

    def forward(self, x, c=(), rev=False, jac=True):
        if not fusable(x[0]) or not _clamps(self):
            return super().forward(x, c, rev, jac)
        steps = self._fastflow_steps(x[0], c)
        if steps is not None:
            y, logdet = run_steps(x[0], steps, c[0] if self.conditional else None, bool(rev))
            return (y,), logdet
        steps = self._fastflow_chain(x[0], rev)
        if steps is not None:
            y, logdet = chain.run(x[0], steps)
            return (y,), logdet
        if not worthwhile(x[0]):
            return super().forward(x, c, rev, jac)
        x1, x2 = torch.split(x[0], [self.split_len1, self.split_len2], dim=1)
        first, second, scale, *_ = self._fastflow_sides()
        if rev:
            y2, logdet = couple(x2, self._fastflow_params(second, x1, c), scale, True, None, None)
            y1, logdet = couple(x1, self._fastflow_params(first, y2, c), scale, True, logdet, None)
            return (torch.cat((y1, y2), 1),), logdet
        y1, logdet = couple(x1, self._fastflow_params(first, x2, c), scale, False, None, None)
        y, logdet = couple(x2, self._fastflow_params(second, y1, c), scale, False, logdet, y1)
        return (y,), logdet

    def _fastflow_sides(self):
        """(networks for x1, networks for x2, scale), and mlp_affine.step's ``centred`` where there is one."""
        raise NotImplementedError

    def _fastflow_params(self, subnets, x, c):
        """What networks make of one part, as functional.affine_coupling takes it."""
        made = [evaluate(net, torch.cat([x, *c], 1) if self.conditional else x) for net in subnets]
        return tuple(made) if len(made) > 1 else made[0]

    def _fastflow_steps(self, x, c):
        """The two couplings as steps of one kernel, or None."""
        if not _clamps(self):
            return None
        (first, *more), (second, *_), scale, *centred = self._fastflow_sides()
        return None if more or centred else _two_steps(self, x, c, first, second, scale)

    def _fastflow_chain(self, x, rev):
        """The two couplings as steps of one node of autograd, or None."""
        if self.conditional or not _clamps(self):
            return None
        first, second, *how = self._fastflow_sides()
        steps = [_step(x, -self.split_len2, first, rev, *how), _step(x, self.split_len1, second, rev, *how)]
        return None if None in steps else steps[::-1] if rev else steps


def _step(x, kept, subnets, rev, scale, centred=None):
    """The coupling with these networks of the features that pass as a step of autograd.chain, or None."""
    if x.dim() != 2 or not 0 < abs(kept) < x.shape[1] or torch.compiler.is_compiling():
        return None
    if any(type(net) is not nn.Sequential for net in subnets):
        return None
    networks = [covered(net, x) for net in subnets]
    return None if None in networks else mlp_affine.step(kept, networks, scale, bool(rev), centred)


def couple(x, params, scale, inverse, logdet, passive):
    return functional.affine_coupling(x, params, scale=scale, inverse=inverse, logdet=logdet, passive=passive)


@swap(coupling_layers.GLOWCouplingBlock, methods=("forward",), fit=_clamp_of, opposite=reverse)
class GLOWCouplingBlock(TwoSided, coupling_layers.GLOWCouplingBlock):
    """Two affine couplings, each with one network."""

    def _fastflow_sides(self):
        return (self.subnet2,), (self.subnet1,), _scale(self._fastflow_clamp, self.clamp)


@swap(coupling_layers.RNVPCouplingBlock, methods=("forward",), fit=_clamp_of, opposite=reverse)
class RNVPCouplingBlock(TwoSided, coupling_layers.RNVPCouplingBlock):
    """Two affine couplings, each with two networks."""

    def _fastflow_sides(self):
        return ((self.subnet_s2, self.subnet_t2), (self.subnet_s1, self.subnet_t1),
                _scale(self._fastflow_clamp, self.clamp))


@swap(coupling_layers.GINCouplingBlock, methods=("forward",), fit=_clamp_of, opposite=reverse)
class GINCouplingBlock(TwoSided, coupling_layers.GINCouplingBlock):
    """Two affine couplings of volume 1: the mean over the channels is taken from the log-scales."""

    def forward(self, x, c=(), rev=False, jac=True):
        out, _ = super().forward(x, c, rev, jac)
        return out, 0.0

    def _fastflow_sides(self):
        function, gain, factor = CLAMPS[self._fastflow_clamp]
        return (self.subnet2,), (self.subnet1,), EXP, (function, gain, factor * self.clamp)

    def _fastflow_params(self, subnets, x, c):
        raw, shift = super()._fastflow_params(subnets, x, c).chunk(2, 1)
        log_scale = self.clamp * self.f_clamp(raw)
        return log_scale - log_scale.mean(1, keepdim=True), shift


@swap(coupling_layers.NICECouplingBlock, methods=("forward",), opposite=reverse)
class NICECouplingBlock(TwoSided, coupling_layers.NICECouplingBlock):
    """Two additive couplings."""

    def forward(self, x, c=(), rev=False, jac=True):
        out, _ = super().forward(x, c, rev, jac)
        return out, 0.0

    def _fastflow_sides(self):
        return (self.F,), (self.G,), ADDITIVE


@swap(coupling_layers.AffineCouplingOneSided, methods=("forward",), fit=_clamp_of, opposite=reverse)
class AffineCouplingOneSided(coupling_layers.AffineCouplingOneSided):
    """One affine coupling."""

    def forward(self, x, c=(), rev=False, jac=True):
        if not fusable(x[0]) or not _clamps(self):
            return super().forward(x, c, rev, jac)
        step = None if self.conditional else _step(x[0], self.split_len1, (self.subnet,), rev,
                                                   _scale(self._fastflow_clamp, self.clamp))
        if step is not None:
            y, logdet = chain.run(x[0], (step,))
            return (y,), logdet
        if not worthwhile(x[0]):
            return super().forward(x, c, rev, jac)
        x1, x2 = torch.split(x[0], [self.split_len1, self.split_len2], dim=1)
        params = evaluate(self.subnet, torch.cat([x1, *c], 1) if self.conditional else x1)
        y, logdet = couple(x2, params, _scale(self._fastflow_clamp, self.clamp), rev, None, x1)
        return (y,), logdet
