"""How convolutions are run: the memory format of their weights, the choice of algorithms."""

import contextlib

import torch

from fastflow import measured
from fastflow.engine.distributed import is_sharded, replicas, unwrap
from fastflow.flows import Flow

__all__ = ["Benchmarked", "convolutions_to_channels_last"]

UNCHANGED = contextlib.nullcontext()


class Benchmarked:
    """A context in which cuDNN tries its algorithms for each new shape of convolution and keeps the fastest
    (torch.backends.cudnn.benchmark), and conditioners their kernels beside it: a flow repeats few shapes many times.
    Nothing where the model has no 2-D convolution on a GPU, or where determinism is asked for.

    Args:
        model, device: of the step.
        captured: whether it is recorded as a CUDA graph.
    """

    def __init__(self, model, device, captured):
        self.device, self.captured = device, captured
        self.serves = device.type == "cuda" and any(isinstance(m, torch.nn.Conv2d) for m in unwrap(model).modules())

    def __call__(self):
        return _benchmarking(self.captured) if self.serves and not _deterministic() else UNCHANGED

    def explain(self):
        if not self.serves:
            return "convolutions: none on a GPU"
        if _deterministic():
            return "convolutions: deterministic algorithms, as asked for"
        return "; ".join(["convolutions: the fastest of cuDNN's algorithms, found at each shape's first call",
                          *measured.report(self.device)])


def _deterministic():
    return torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()


@contextlib.contextmanager
def _benchmarking(captured):
    cudnn = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, True
    try:
        with measured.trying(captured):
            yield
    finally:
        cudnn.benchmark = before


def convolutions_to_channels_last(model, optimizer, wanted):
    """Converts the weights of 2-D convolutions in place, so that neither they nor their gradients are copied from one
    format to the other at every step; returns a phrase that says what was done and why.

    Args:
        wanted: True, False, or None for where it helps and can be done.

    Raises:
        ValueError: it is wanted and can't be done.
    """
    inner = unwrap(model)
    # Of a parametrized one the weight is computed: to look at it may move buffers, as a spectral norm's.
    own = [m._parameters.get("weight") for m in inner.modules() if isinstance(m, torch.nn.Conv2d)]
    weights = [weight for weight in own if weight is not None]
    if wanted is False:
        return "as it was (channels_last=False)"
    if not weights:
        return "as it was (there are no 2-D convolutions with weights of their own)"
    if wanted is None and not isinstance(inner, Flow):
        return "as it was (channels_last=True would convert the convolutions' weights)"
    if not all(map(_converted, weights)) and (reason := _obstacle(model, optimizer, weights)):
        if wanted:
            raise ValueError(f"channels_last: can't be done, {reason}; use None or False")
        return f"as it was ({reason})"
    for weight in weights:
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return f"channels-last, the weights of {len(weights)} convolutions too"


def _obstacle(model, optimizer, weights):
    """Why weights can't be converted any more, or None."""
    if is_sharded(model):
        return "parameters are sharded"
    if replicas(model) is not None:
        return "DistributedDataParallel has laid out its buckets; convert the model before it is wrapped"
    if any(weight in optimizer.state for weight in weights):
        return "the optimizer has state in the other format"
    return None


def _converted(weight):
    return weight.is_contiguous(memory_format=torch.channels_last)
