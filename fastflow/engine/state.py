"""An optimizer's and the generators' state as named tensors and plain JSON, and back, bit for bit."""

import random

import numpy
import torch

from fastflow.engine.distributed import gathered, placed_like
from fastflow.one_number import fitted

__all__ = ["host_random_state", "optimizer_state", "random_state", "restore_host_random", "restore_optimizer",
           "restore_random", "seed_host_random"]

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


def optimizer_state(optimizer, keep=True):
    """(tensors, plain): {"index.key": tensor on the CPU} and {"index.key": number} of every parameter's state; all
    processes together gather what is sharded, and have no tensors if not ``keep``."""
    tensors, plain = {}, {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                plain[f"{index}.{key}"] = value
    return gathered(tensors, keep), plain


def restore_optimizer(optimizer, tensors, plain):
    """Puts that state into an optimizer of the same kind over the same parameters, keeping its own hyperparameters.

    Raises:
        ValueError: the state is of other parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for name, value in {**tensors, **plain}.items():
        index, _, key = name.partition(".")
        if not index.isdigit() or int(index) >= len(parameters):
            raise ValueError(f"optimizer state {name!r} belongs to no parameter")
        parameter = parameters[int(index)]
        if key in MOMENTS:
            value = fitted(value, parameter)
        if isinstance(value, torch.Tensor) and value.ndim:
            if value.shape != parameter.shape:
                raise ValueError(f"optimizer state {name!r}: shape {tuple(value.shape)}, the parameter has "
                                 f"{tuple(parameter.shape)}")
            # An empty tensor like it has the parameter's memory format.
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(placed_like(parameter, value))
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def random_state(device):
    """{name: uint8 tensor}: torch's generators, the CPU's and the device's own."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random(state, device):
    """Puts the generators back to where they were; a device that the saving run did not have keeps its own state."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_host_random(seed):
    """Seeds the generators of Python and NumPy."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


def host_random_state():
    """{name: tensor}: the generators of Python and NumPy that data pipelines draw from."""
    version, words, gauss = random.getstate()
    _, key, position, has_gauss, cached = numpy.random.get_state()
    gauss = torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64)
    return {"python": torch.tensor([version, *words]), "python_gauss": gauss,
            "numpy": torch.tensor([*key.tolist(), position, has_gauss]),
            "numpy_gauss": torch.tensor([cached], dtype=torch.float64)}


def restore_host_random(state):
    """Puts them back to where they were."""
    version, *words = state["python"].tolist()
    has_gauss, gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss if has_gauss else None))
    *key, position, has_gauss = state["numpy"].tolist()
    numpy.random.set_state(("MT19937", numpy.array(key, dtype=numpy.uint32), position, has_gauss,
                            state["numpy_gauss"].item()))
