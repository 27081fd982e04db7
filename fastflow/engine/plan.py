"""What a run will take, found without training and without its data: parameters, memory and kernel launches."""

import contextlib

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from fastflow import backends, launches
from fastflow.engine.assembly import check_model
from fastflow.engine.datasets import example_shape, is_table, levels_of_values
from fastflow.engine.labels import given
from fastflow.engine.memory import SavedBytes
from fastflow.engine.models import build_model
from fastflow.engine.objectives import objective_for

__all__ = ["parameter_count", "plan"]

PROBES = (2, 4)  # examples in the two batches that are traced
FILLS = {getattr(nn.init, name) for name in nn.init.__all__ if name.endswith("_")} | {
    torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.fill_, torch.Tensor.zero_}


class _Unfilled(TorchFunctionMode):
    """No tensor is initialised: on the meta device that takes a large part of building a model, for nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in FILLS:
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if func is torch.randn else func)(*args, **kwargs)


def _without_values(settings):
    """The model of these settings on the meta device."""
    with torch.device("meta"), _Unfilled():
        return build_model(settings)


def plan(settings):
    """{name: int} of one training step of these settings in one process.

    The model is built on the meta device, and a step is traced on fake CPU tensors, which have shapes and no values: a
    model of a billion parameters takes seconds and little memory.

    Returns:
        parameters; weights_bytes, of weights, gradients, Adam's two moments and the average if there is one;
        activation_bytes, kept for backward by one of ``train.accumulate`` parts of a batch if every activation is kept
        (TrainStep's memory mode "none"); launches, of fastflow's kernels on a GPU in forward and backward of one part,
        left out where no native backend works here.

    Raises:
        SettingsError: sizes or options that don't go together, or a shape that only the data can tell.
    """
    shape, n_bins, train = example_shape(settings), levels_of_values(settings), settings.train
    model = _without_values(settings)
    check_model(settings, model)
    objective = objective_for(model, n_bins=n_bins, n_samples=getattr(settings.model, "n_samples", 1))
    copies = 5 if train.ema_decay else 4
    countable = any(works for name, works in backends.available().items() if name != "reference")
    found = {"parameters": _trained(model),
             "weights_bytes": copies * sum(p.numel() * p.element_size() for p in model.parameters())}
    with FakeTensorMode():
        _to_fake_cpu(model)
        kept = []
        for n in PROBES:
            x = torch.zeros(n, *shape, dtype=torch.float32 if is_table(settings) else torch.uint8)
            with launches.count() if countable else contextlib.nullcontext() as counted:
                with SavedBytes(model) as saved:
                    loss = objective(model, x, **given(model, torch.zeros(n, dtype=torch.int64)))[0]
                kept.append(saved.total)
                if n == PROBES[-1] and countable:
                    loss.backward()
    each = (kept[1] - kept[0]) / (PROBES[1] - PROBES[0])  # exact where the bytes are linear in the batch
    found["activation_bytes"] = int(kept[0] + each * (train.batch_size / train.accumulate - PROBES[0]))
    return found | ({"launches": counted.total} if countable else {})


def parameter_count(settings):
    """How many numbers are trained, from a model on the meta device."""
    return _trained(_without_values(settings))


def _trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _to_fake_cpu(model):
    """Puts fake CPU tensors in the place of all parameters and buffers, inside a FakeTensorMode."""
    def like(tensor):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(like(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = like(buffer)
