"""Which part of a model brought the first value that is not finite, found by running a batch again."""

import contextlib

import torch

from fastflow.engine.alone import alone
from fastflow.engine.distributed import is_sharded, local, replicas, unwrap
from fastflow.engine.state import random_state, restore_random

__all__ = ["Replay", "diagnose"]

class Replay:
    """A :class:`~fastflow.engine.batch.Batch`, and the generators' state as it was when the batch came. Tensors are
    kept, not copied."""

    def __init__(self, batch, device):
        self.batch, self.device = batch, device
        self.random = random_state(device)

    @contextlib.contextmanager
    def generators(self):
        """The generators of that time inside, those of now afterwards."""
        now = random_state(self.device)
        restore_random(self.random, self.device)
        try:
            yield
        finally:
            restore_random(now, self.device)


def diagnose(model, objective, replays):
    """(what, module): a phrase for what was not finite first when the batches run again, eagerly and with the noise of
    their time, and the name of the module whose output it was, None if it was no module's. ("", None) if all is finite
    now, or the model is sharded and can't run in one process. Parameters, buffers, gradients and generators are left as
    they are, and no other process is waited for."""
    inner = unwrap(model)
    for name, parameter in inner.named_parameters():
        if not _finite(local(parameter)):
            return f"the parameter {name} is not finite", None
    for replay in replays:
        for name, value in replay.batch.named():
            if not _finite(value):
                return f"the batch's {name} is not finite", None
        if is_sharded(model):
            continue  # a forward would wait for the processes whose batch told them enough
        batch = replay.batch.map(lambda tensor, device=replay.device: tensor.to(device))
        with replay.generators(), alone(inner), _watched(inner) as found, torch.enable_grad():
            loss = objective(inner, *batch)[0]
            if found:
                name = found[0]
                what = f"module {name!r}" if name else "the model"
                return f"{what} was the first with an output that is not finite", name
            if not _finite(loss):
                return "the model's output is finite, its mean is not", None
            if replicas(model) is not None:
                continue  # what reached the optimizer is the mean of all processes
            named = [(n, p) for n, p in inner.named_parameters() if p.requires_grad]
            gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        # Backward runs from the last module to the first.
        for (name, _), gradient in zip(reversed(named), reversed(gradients), strict=True):
            if gradient is not None and not _finite(gradient):
                return f"outputs are finite, the gradient of {name} is not", None
    return "", None


@contextlib.contextmanager
def _watched(model):
    """Collects the names of the modules with outputs that are not finite, as they return."""
    found, handles, patched = [], [], []

    def note(name, output):
        if any(not _finite(t) for t in _tensors(output)):
            found.append(name)

    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(lambda _, __, output, name=name: note(name, output)))
        apply = getattr(module, "apply_factors", None)  # how flows call a 1x1 convolution, past its forward
        if apply is not None:
            def noted(*args, apply=apply, name=name):
                output = apply(*args)
                note(name, output)
                return output
            module.apply_factors = noted
            patched.append(module)
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        for module in patched:
            del module.apply_factors


def _tensors(output):
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    return [t for part in output for t in _tensors(part)] if isinstance(output, (tuple, list)) else []


def _finite(tensor):
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach()).all())
