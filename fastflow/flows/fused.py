"""Runs of tabular layers that go through one kernel: couplings with small fully connected conditioners, and ActNorms.

:class:`fastflow.flows.Compose` asks for the runs at every call, so that whatever changes between calls (a hook, a layer
put in another's place, autocast) counts. What no run takes is called layer by layer.
"""

import torch
from torch import nn

from fastflow import backends, functional, gpus, reference
from fastflow.autograd.mlp_flow import SAVE_ACTIVATIONS, SAVE_OVERWRITTEN, run_steps
from fastflow.flows import plan
from fastflow.nn import MLP, ActNorm, AffineCoupling
from fastflow.nn.hooks import is_hooked

__all__ = ["MAX_FEATURES", "MAX_HIDDEN", "explain", "runs"]

MAX_FEATURES, MAX_HIDDEN = 64, 128  # beyond them a layer's own matrix products fill the machine
HOOKED = "it has a hook or a method of its own"
ACTIVATIONS = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Tanh: "tanh"}


class Run:
    """Several transforms in a row, as one that one kernel computes."""

    saves_memory = True  # asked to, its backward has z of each layer and computes the hidden activations again

    def __init__(self, steps, save):
        self.steps, self.save = steps, save

    def __call__(self, x, context=None):
        return run_steps(x, self.steps, context, False, self.save)

    def inverse(self, z, context=None):
        return run_steps(z, self.steps, context, True, self.save)


def runs(transforms, x, context=None, save_memory=False):
    """The transforms in their order, with a :class:`Run` in place of those that it takes.

    With ``save_memory`` the runs keep z of each layer for backward and no activation.
    """
    if len(transforms) < 1 or _refusal(x, context) is not None:
        return transforms
    save = SAVE_OVERWRITTEN if save_memory else SAVE_ACTIVATIONS
    lasting = type(transforms) is nn.ModuleList and not torch.compiler.is_compiling()
    if lasting and (found := plan.kept(transforms, x, context, save)) is not None:
        return [found]
    pieces = []
    for steps, members in _grouped(transforms, [_step(t, x, context) for t in transforms]):
        pieces += [*members] if steps is None else [Run(steps, save)]
    if lasting and len(pieces) == 1 and isinstance(pieces[0], Run):
        plan.keep(transforms, pieces[0].steps, x, context, save)
    return pieces


def explain(transform, x, context=None):
    """One line: which layers a call with x and context runs as one kernel, and why not the others.

    Args:
        transform: a Compose, or any transform (which is one layer then).
        x, context: what it would be called with.
    """
    transforms = list(getattr(transform, "transforms", [transform]))
    reason = _refusal(x, context)
    if reason is not None:
        return f"layer by layer: {reason}"
    found = [_step(t, x, context) for t in transforms]
    groups = [steps for steps, _ in _grouped(transforms, found) if steps is not None]
    reasons = {}
    for index, step in enumerate(found):
        if isinstance(step, str):
            reasons.setdefault(step, []).append(index)
        elif not any(step is other for steps in groups for other in steps):
            reasons.setdefault("no coupling beside it to go with", []).append(index)
    backend = backends.prefers("mlp_flow", x, context)[0]
    kernels = f"{len(groups)} kernel{'' if len(groups) == 1 else 's'} on {backend}" if groups else "no kernel"
    text = f"{sum(map(len, groups))} of {len(transforms)} layers in {kernels}"
    return "; ".join([text, *(f"not {', '.join(map(str, where))}: {why}" for why, where in reasons.items())])


def _grouped(transforms, found):
    """(steps, transforms) of each run, and (None, transforms) of those that stay by themselves."""
    start = 0
    for end in range(len(found) + 1):
        if end < len(found) and not isinstance(found[end], str):
            continue
        steps = found[start:end]
        whole = any(isinstance(step, functional.MLPCoupling) for step in steps)
        if steps:
            yield (steps if whole else None), transforms[start:end]
        if end < len(found):
            yield None, transforms[end:end + 1]
        start = end + 1


def _refusal(x, context):
    """Why nothing about a call with these operands goes through one kernel, or None."""
    if not isinstance(x, torch.Tensor) or x.dim() != 2:
        return "the data are not (B, D)"
    if x.dtype not in (torch.float32, torch.float64):
        return f"the data are {x.dtype}"
    if x.shape[1] > MAX_FEATURES:
        return f"more than {MAX_FEATURES} features"
    if context is not None and (not isinstance(context, torch.Tensor) or context.dim() != 2
                                or context.dtype != x.dtype or context.shape[0] != x.shape[0]):
        return f"the context is not (B, K) in {x.dtype}"
    if reference.autocasts(x.device.type):
        return "autocast is on"
    if nn.modules.module._has_any_global_hook():
        return "a hook on all modules is registered"
    backend, reason = backends.prefers("mlp_flow", x, context)
    return reason if backend == "reference" else None


def _step(transform, x, context):
    """The step that the transform makes, or why it can't be one of a run."""
    kind = type(transform)
    if kind is AffineCoupling:
        return _coupling(transform, x, context)
    if kind is not ActNorm:
        return f"{kind.__name__} is no affine coupling or ActNorm"
    if is_hooked(transform):
        return HOOKED
    bias, log_scale = own_parameters(transform, "bias", "log_scale")
    if bias is None or log_scale is None or bias.dtype is not x.dtype or log_scale.dtype is not x.dtype:
        return f"its parameters are not {x.dtype}"
    if transform.channels != x.shape[1]:
        return f"it takes {transform.channels} features"
    return functional.ChannelAffine(bias, log_scale)


def _coupling(transform, x, context):
    if is_hooked(transform):
        return HOOKED
    if transform.split != "channel":
        return f"its split is {transform.split!r}"
    network = transform._modules.get("conditioner")
    kind = type(network)
    if kind is MLP:
        if (network.context_features is None) != (context is None):
            return "its conditioner takes " + ("no context" if network.context_features is None else "a context")
        if is_hooked(network):
            return HOOKED
        network = network._modules.get("layers")
    elif kind is nn.Sequential and context is not None:
        return "its conditioner is a Sequential, which takes no context"
    if type(network) is not nn.Sequential:
        return f"its conditioner is of {kind.__name__}, not MLP or Sequential"
    if is_hooked(network):
        return HOOKED
    return _linears(network, transform, x, 0 if context is None else context.shape[1])


def _linears(network, transform, x, context_features):
    """The coupling over a Sequential of Linear layers with one kind of activation between, or what is in the way."""
    stack = linear_stack(network._modules.values(), x.dtype, "its conditioner")
    if isinstance(stack, str):
        return stack
    weights, biases, activation = stack
    activation = activation or nn.ReLU
    if any(bias.shape[0] > MAX_HIDDEN for bias in biases[:-1]):
        return f"its conditioner has a layer of more than {MAX_HIDDEN}"
    if x.is_cuda and _shared_bytes(x, context_features, biases, activation) > gpus.shared_bytes(x.device):
        return "its layers together need more shared memory than a block has"
    passive = (x.shape[1] + 1) // 2 if transform.flip else x.shape[1] // 2
    if weights[0].shape[1] != passive + context_features:
        return "its conditioner takes another number of features"
    active = x.shape[1] - passive
    if biases[-1].shape[0] != (active if transform.scale.kind == "additive" else 2 * active):
        return "its conditioner gives another number of outputs"
    return functional.MLPCoupling(tuple(weights), tuple(biases), transform.flip, ACTIVATIONS[activation],
                                  transform.scale, transform.layout, transform.order, transform.shift_first)


def _shared_bytes(x, context_features, biases, activation):
    """The least that the backward kernel needs in a block: csrc/cuda/mlp_flow.cuh, plan_of."""
    outputs = [bias.shape[0] for bias in biases]
    seen = x.shape[1] + 3 * context_features if context_features else 0
    kept = 2 if activation is nn.SiLU else 1  # of a hidden layer: its activations, their slopes
    lines = 2 * x.shape[1] + seen + kept * sum(outputs[:-1]) + 2 * max(outputs) + 1
    return 4096 + 2 * 4224 + 20 * lines * x.element_size()


def linear_stack(layers, dtype, owner):
    """(weights, biases, class of the activations or None) of Linear layers with one kind of activation between, or
    what is in the way, said of ``owner``."""
    weights, biases, activation, is_linear = [], [], None, False
    for layer in layers:
        kind, is_linear = type(layer), not is_linear
        if is_hooked(layer):
            return HOOKED
        if not is_linear:
            if kind is not activation:
                if kind not in ACTIVATIONS or activation is not None:
                    return f"{owner}'s activation {kind.__name__} is none of one kind among ReLU, SiLU, Tanh"
                activation = kind
            continue
        own = layer._parameters
        weight, bias = own.get("weight"), own.get("bias")
        if kind is not nn.Linear or weight is None or bias is None:
            return f"{owner} is not Linear layers, each with a bias, with activations between"
        if weight.dtype is not dtype or bias.dtype is not dtype:
            return f"its parameters are not {dtype}"
        weights.append(weight)
        biases.append(bias)
    if len(layers) % 2 == 0:
        return f"{owner} does not end with a Linear layer"
    return weights, biases, activation


def own_parameters(module, *names):
    """The parameters of these names, whatever functional_call has put there; None where it is no parameter."""
    return map(module._parameters.get, names)
