"""Runs of a hierarchy's levels that go through one kernel: those whose networks are small fully connected ones.

:class:`fastflow.vae.HierarchicalVAE` asks for the runs at every call, so that whatever changes between calls (a hook, a
network put in another's place, autocast) counts. What no run takes is called level by level.
"""

import torch
from torch import nn

from fastflow import backends, extension, functional
from fastflow.flows.fused import ACTIVATIONS, HOOKED, linear_stack
from fastflow.nn.hooks import is_hooked
from fastflow.vae.generation import autocasts
from fastflow.vae.level import Level

__all__ = ["MAX_WIDTH", "ResidualMerge", "explain", "runs"]

MAX_WIDTH = 256  # beyond it a layer's own matrix products fill the machine


class ResidualMerge(nn.Module):
    """x[:, :C] + network(x): a state and what is beside it, to the next state."""

    def __init__(self, network, channels):
        super().__init__()
        self.network, self.channels = network, channels

    def forward(self, x):
        return x[:, :self.channels] + self.network(x)


def runs(levels, h, features):
    """[(first, last + 1, LatentLevels or None)] of all levels: the runs that one kernel takes, and those between."""
    if _refusal(h, features) is not None:
        return [(0, len(levels), None)]
    found, width = [], h.shape[1]
    for level, d in zip(levels, features, strict=True):
        step = None if width is None else _step(level, width, d, h.dtype)
        fits = isinstance(step, functional.LatentLevel)
        width = step.merge.biases[-1].shape[0] if fits else None
        found.append(step if fits else None)
        if width is None:
            width = _state_of(level)
    groups, start = [], 0
    for end in range(1, len(found) + 1):
        if end == len(found) or (found[end] is None) != (found[start] is None):
            groups.append((start, end, None if found[start] is None else found[start:end]))
            start = end
    return groups


def explain(levels, h, features):
    """One line: which levels a call with these operands runs as one kernel, and why not the others."""
    reason = _refusal(h, features)
    if reason is not None:
        return f"level by level: {reason}"
    whole = [steps for _, _, steps in runs(levels, h, features) if steps is not None]
    reasons, width = {}, h.shape[1]
    for index, (level, d) in enumerate(zip(levels, features, strict=True)):
        step = "the state above it is unknown" if width is None else _step(level, width, d, h.dtype)
        if isinstance(step, str):
            reasons.setdefault(step, []).append(index)
            width = _state_of(level)
        else:
            width = step.merge.biases[-1].shape[0]
    kernels = f"{len(whole)} kernel{'' if len(whole) == 1 else 's'} on cpu" if whole else "no kernel"
    text = f"{sum(map(len, whole))} of {len(levels)} levels in {kernels}"
    return "; ".join([text, *(f"not {', '.join(map(str, where))}: {why}" for why, where in reasons.items())])


def _refusal(h, features):
    """Why nothing about a call with these operands goes through one kernel, or None."""
    if any(t.dim() != 2 for t in (h, *features)):
        return "the state or the features are not (B, H)"
    if h.dtype not in (torch.float32, torch.float64) or any(d.dtype is not h.dtype for d in features):
        return f"state and features are not float32 or float64 alike, but {h.dtype} and {features[0].dtype}"
    if autocasts(h.device):
        return "autocast is on"
    if nn.modules.module._has_any_global_hook():
        return "a hook on all modules is registered"
    if extension.observers:
        return "launches are counted, and a GPU has no kernel for them"
    backend, reason = backends.prefers("top_down", h, *features)
    return reason if backend == "reference" else None


def _step(level, width, d, dtype):
    """The LatentLevel that a level under a state of ``width`` features makes, or why it can't be one of a run."""
    own = level.__dict__
    if type(level) is not Level or "infer" in own or "gaussians" in own or "down" in own:
        return f"{type(level).__name__} is a class with an infer of its own"
    seen = d.shape[1] + (0 if level.mode == "ladder" else width)
    prior, posterior = _network(level.prior, width, dtype), _network(level.posterior, seen, dtype)
    for network in (prior, posterior):
        if isinstance(network, str):
            return network
    outputs = prior.biases[-1].shape[0]
    if outputs % 2 or posterior.biases[-1].shape[0] != outputs:
        return "its prior and posterior do not give the same number of outputs"
    merge = _network(level.merge, width + outputs // 2, dtype)
    return merge if isinstance(merge, str) else functional.LatentLevel(prior, posterior, merge, level.mode, level.scale)


def _network(network, width, dtype):
    """The MLPBlock of a network on ``width`` inputs, or what is in the way."""
    residual, channels = type(network) is ResidualMerge, None
    if residual:
        if is_hooked(network):
            return HOOKED
        network, channels = network._modules["network"], network.channels
    kind = type(network)
    if kind is not nn.Sequential and kind is not nn.Linear:
        return f"a network of it is of {kind.__name__}, not Linear or a Sequential of Linear layers"
    if is_hooked(network):
        return HOOKED
    layers = (network,) if kind is nn.Linear else network._modules.values()
    stack = linear_stack(layers, dtype, "a network")
    if isinstance(stack, str):
        return stack
    weights, biases, activation = stack
    last = width
    for weight in weights:
        outputs, inputs = weight.shape
        if inputs != last:
            return "a network of it takes another number of features"
        if inputs > 2 * MAX_WIDTH or outputs > MAX_WIDTH:
            return f"a network of it has a layer of more than {MAX_WIDTH}"
        last = outputs
    if residual and (channels != last or last > width):
        return "its merge adds another number of features than its network gives"
    return functional.MLPBlock(tuple(weights), tuple(biases), ACTIVATIONS.get(activation, "silu"), residual)


def _state_of(level):
    """How many features the state has below a level that no run takes, where its last Linear layer says so."""
    linears = [m for m in level.merge.modules() if isinstance(m, nn.Linear)]
    return linears[-1].out_features if linears else None
