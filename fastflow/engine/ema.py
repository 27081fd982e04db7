"""The exponential average of a model's parameters."""

import contextlib

import torch

from fastflow.engine.distributed import local

__all__ = ["EMA"]


class EMA:
    """average <- decay*average + (1 - decay)*parameter after every update, in a few launches for all parameters.

    Args:
        model: the module whose trained parameters are averaged; sharded ones stay sharded.
        decay: a number in [0, 1).

    Attributes:
        parameters: {name in the model: average}.
    """

    def __init__(self, model, decay):
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema_decay: expected a number in [0, 1) or None, got {decay!r}")
        self.decay = decay
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._sources = [p for _, p in named]
        self.parameters = {name: p.detach().clone() for name, p in named}

    def _tensors(self):
        """(averages, parameters): the tensors of this process."""
        return list(map(local, self.parameters.values())), [local(p.detach()) for p in self._sources]

    @torch.no_grad()
    def update(self, skip=None):
        """Takes the current parameters in; not where the 0-d device tensor ``skip`` is 1."""
        averages, sources = self._tensors()
        if skip is None:
            torch._foreach_lerp_(averages, sources, 1.0 - self.decay)
            return
        steps = torch._foreach_sub(sources, averages)
        torch._foreach_mul_(steps, (1.0 - self.decay) * (1.0 - skip))
        torch._foreach_add_(averages, steps)

    @contextlib.contextmanager
    def swapped_in(self):
        """Inside, the model has the averages for parameters; afterwards its own again. Buffers stay as they are."""
        averages, sources = self._tensors()
        kept = [t.clone() for t in sources]
        with torch.no_grad():
            torch._foreach_copy_(sources, averages)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._tensors()[1], kept)

    @torch.no_grad()
    def reset(self):
        """Starts again from the parameters as they are, after an initialisation or a loaded checkpoint."""
        torch._foreach_copy_(*self._tensors())

    def state_dict(self):
        """{name in the model: average}; the averages themselves, not copies."""
        return dict(self.parameters)

    @torch.no_grad()
    def load_state_dict(self, state):
        """Copies what :meth:`state_dict` gave into the averages.

        Raises:
            ValueError: a name is missing or unknown, or a shape differs.
        """
        if wrong := sorted(self.parameters.keys() ^ state.keys()):
            raise ValueError(f"state: expected the names of the model's parameters, differs in {', '.join(wrong[:3])}")
        for name, average in self.parameters.items():
            if average.shape != state[name].shape:
                raise ValueError(f"state: {name}: expected shape {tuple(average.shape)}, "
                                 f"got {tuple(state[name].shape)}")
            average.copy_(state[name])
