"""What a run will take, found without training: its parameters, memory and kernel launches."""

import torch

from fastflow import backends, launches
from fastflow.data import DATASETS
from fastflow.engine.memory import per_image
from fastflow.engine.models import build_model
from fastflow.engine.objectives import objective_for

__all__ = ["plan"]


def plan(settings):
    """{name: int} of one training step of these settings, from a few random images on the CPU.

    Returns:
        parameters; weights_bytes, of weights, gradients, Adam's two moments and the average if there is one;
        activation_bytes, kept for backward at this batch size; launches, of fastflow's kernels on a GPU in forward and
        backward, left out where no native backend works here.
    """
    torch.manual_seed(settings.train.seed)
    model, (shape, n_bins) = build_model(settings), DATASETS[settings.data.name]
    objective = objective_for(model, n_bins=n_bins, n_samples=getattr(settings.model, "n_samples", 1))
    x = torch.randint(0, n_bins, (4, *shape), dtype=torch.uint8)
    if hasattr(model, "initialize"):
        model.initialize(objective.prepare(model, x)[0])
    each, fixed = per_image(lambda x, context: objective(model, x)[0], model, x)
    copies = 5 if settings.train.ema_decay else 4
    found = {"parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
             "weights_bytes": copies * sum(p.numel() * p.element_size() for p in model.parameters()),
             "activation_bytes": int(each * settings.train.batch_size + fixed)}
    if any(works for name, works in backends.available().items() if name != "reference"):
        with launches.count() as counted:
            objective(model, x)[0].backward()
        found["launches"] = counted.total
    return found
