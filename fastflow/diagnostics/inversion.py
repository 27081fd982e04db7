"""How far inverse(forward(x)) is from x, and after how many layers it began to be."""

import math
from dataclasses import dataclass

import torch

from fastflow import checks
from fastflow.flows import Flow
from fastflow.flows.sequence import flatten
from fastflow.flows.transform import Compose, Inverse, check_transform

__all__ = ["InversionError", "inversion_error"]


@dataclass(frozen=True)
class InversionError:
    """Largest errors over a batch; what is not finite counts as infinite.

    Attributes:
        absolute: of inverse(forward(x)) against x.
        relative: the same over 1 + |x|, element by element.
        logdet: of the sum of the two log-determinants, which should be 0, in nats.
        by_depth: for a composition, ``absolute`` at the input of each layer, first to last from data to noise: the
            inverse starts at the last, so that the error grows from right to left.
        worst: index of the sample with the largest absolute error, None for an empty batch.
    """

    absolute: float
    relative: float
    logdet: float
    by_depth: tuple
    worst: int | None

    def __str__(self):
        return (f"inverse error {self.absolute:.1e} (relative {self.relative:.1e}), log-det {self.logdet:.1e} nats, "
                f"{len(self.by_depth)} layer{'' if len(self.by_depth) == 1 else 's'}")


@torch.no_grad()
def inversion_error(flow, x, context=None):
    """Run x through a flow and back, in the precision in force, autocast included; then again layer by layer.

    An inverse that drifts breaks sampling, densities of samples, and training that recovers activations by inversion
    (``memory="invert"``), without a sign in the likelihood of the data.

    Args:
        flow: a Flow or a Transform.
        x: (B, *event).
        context: handed to every layer.

    Returns:
        an :class:`InversionError`.

    References:
        Behrmann et al., "Understanding and mitigating exploding inverses in invertible neural networks", 2021,
        arXiv:2006.09347.
    """
    transform = flow
    if isinstance(flow, Flow):
        transform, context = flow.transform, flow.context_of_transform(context)
    check_transform("flow", transform)
    checks.tensor("x", x)
    # An ordinary composition, taken apart; anything else, multi-scale transforms among them, is one layer.
    layers = flatten([transform]) if isinstance(transform, (Compose, Inverse)) else [transform]
    z, logdet = transform(x, context)
    back, opposite = transform.inverse(z, context)
    difference = (back.double() - x.double()).abs()
    per_sample = difference.flatten(1).amax(1) if difference.numel() else difference.new_zeros(0)
    per_sample = torch.where(per_sample.isnan(), math.inf, per_sample)
    absolute = _largest(difference)
    return InversionError(absolute, _largest(difference / (1.0 + x.double().abs())),
                          _largest(logdet.double() + opposite.double()),
                          _by_depth(layers, x, context) if len(layers) > 1 else (absolute,),
                          per_sample.argmax().item() if len(per_sample) else None)


def _by_depth(layers, value, context):
    inputs, errors = [], []
    for layer in layers:
        inputs.append(value)
        value, _ = layer(value, context)
    for layer, before in zip(reversed(layers), reversed(inputs), strict=True):
        value, _ = layer.inverse(value, context)
        errors.append(_largest(value.double() - before.double()))
    return tuple(reversed(errors))


def _largest(error):
    value = error.abs().max().item() if error.numel() else 0.0
    return math.inf if math.isnan(value) else value
