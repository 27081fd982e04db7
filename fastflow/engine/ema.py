"""The exponential average of a model's parameters."""

import contextlib

import torch

from fastflow import checks
from fastflow.engine.distributed import local, placed_like
from fastflow.one_number import fitted

__all__ = ["EMA"]


class EMA:
    """average <- d*average + (1 - d)*parameter after every update, in a few launches for all parameters.

    d is ``decay``, or with a ``warmup`` w after n updates min(decay, (1 + n)/(w + n)): it forgets faster at first.

    Args:
        model: the module whose trained parameters are averaged, those that are unfrozen later from then on; sharded
            ones stay sharded.
        decay: a number in [0, 1).
        warmup: 0 for none, or a number of 1 or more.

    Attributes:
        parameters: {name in the model: average}.
        n_updates: 0-d tensor on the parameters' device.
    """

    def __init__(self, model, decay, warmup=0):
        checks.number("ema_decay", decay)
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema_decay: expected a number in [0, 1) or None, got {decay!r}")
        checks.number("ema_warmup", warmup)
        if warmup and not warmup >= 1:
            raise ValueError(f"ema_warmup: expected 0 or a number of 1 or more, got {warmup!r}")
        self.decay, self.warmup = decay, warmup
        self._sources, self.parameters = [], {}
        self._frozen = dict(model.named_parameters())
        self._join()
        device = self._sources[0].device if self._sources else None
        self.n_updates = torch.zeros((), dtype=torch.float64, device=device)

    def _join(self):
        """Parameters that are trained from now on begin with what they are."""
        for name, p in list(self._frozen.items()):
            if p.requires_grad:
                self._sources.append(self._frozen.pop(name))
                self.parameters[name] = p.detach().clone()

    def _follow(self):
        """Averages go where the model went, if it was moved to another device or dtype since."""
        for (name, average), p in zip(self.parameters.items(), self._sources, strict=True):
            if average.dtype == p.dtype and average.device == p.device:
                return  # all are moved together
            self.parameters[name] = average.to(p)
        self.n_updates = self.n_updates.to(self._sources[0].device)

    def _tensors(self):
        """(averages, parameters): the tensors of this process."""
        return list(map(local, self.parameters.values())), [local(p.detach()) for p in self._sources]

    @torch.no_grad()
    def update(self, skip=None):
        """Takes the current parameters in; not where the 0-d device tensor ``skip`` is 1."""
        if self._frozen:
            self._join()
        self._follow()
        averages, sources = self._tensors()
        self.n_updates += 1 if skip is None else 1 - skip
        if skip is None and not self.warmup:
            torch._foreach_lerp_(averages, sources, 1.0 - self.decay)
            return
        weight = 1.0 - self.decay
        if self.warmup:
            weight = 1.0 - ((1.0 + self.n_updates) / (self.warmup + self.n_updates)).clamp(max=self.decay)
        steps = torch._foreach_sub(sources, averages)
        torch._foreach_mul_(steps, weight if skip is None else weight * (1.0 - skip))
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
        self.n_updates.zero_()

    def state_dict(self):
        """{name in the model: average}; the averages themselves, not copies."""
        return dict(self.parameters)

    @torch.no_grad()
    def load_state_dict(self, state, n_updates=0):
        """Copies what :meth:`state_dict` gave, after that many updates, into the averages, shards too.

        Raises:
            ValueError: a name is missing or unknown, or a shape differs.
        """
        if wrong := sorted(self.parameters.keys() ^ state.keys()):
            raise ValueError(f"state: expected the names of the model's parameters, differs in {', '.join(wrong[:3])}")
        for name, average in self.parameters.items():
            stored = fitted(state[name], average)
            if average.shape != stored.shape:
                raise ValueError(f"state: {name}: expected shape {tuple(average.shape)}, got {tuple(stored.shape)}")
            average.copy_(placed_like(average, stored))
        self.n_updates.fill_(n_updates)
