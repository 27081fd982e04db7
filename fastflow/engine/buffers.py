"""What a forward changes besides gradients: the buffers in which modules keep averages over batches."""

import torch
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["Buffers"]


class Buffers:
    """The buffers of a model, which a refused step puts back: running statistics, moving averages, codebooks.

    Those that have ever changed, which torch's version counters tell, are copied at every :meth:`keep`, in a few
    launches for all, and so are running statistics of torch's normalisations; masks and permutations are copied once.
    The copies stay where they are, as a recorded graph needs it.

    Args:
        model: the module, unwrapped.
    """

    def __init__(self, model):
        self._places = [(module, name) for module in model.modules()
                        for name, buffer in module._buffers.items() if buffer is not None]
        self._sources = self._read()
        self._copies = [b.detach().clone() for b in self._sources]
        self._versions = [b._version for b in self._sources]
        # torch's normalisations change their statistics past the version counters.
        self._changing = {i for i, (module, _) in enumerate(self._places) if isinstance(module, _NormBase)}

    def _read(self):
        return [module._buffers[name] for module, name in self._places]

    def _changed(self):
        """The indices of the buffers that have changed since they were first seen, in order."""
        for i, (now, source, version) in enumerate(zip(self._read(), self._sources, self._versions, strict=True)):
            if now is not source or now._version != version:
                self._changing.add(i)
        return sorted(self._changing)

    @torch.no_grad()
    def keep(self):
        """Takes the buffers as they are now for those to come back to."""
        changed = self._changed()
        if not changed:
            return
        now = self._read()
        for i in changed:
            if now[i] is not self._sources[i]:  # model.to(), or a module that does not change its buffer in place
                self._sources[i] = now[i]
                if self._copies[i].shape != now[i].shape or self._copies[i].device != now[i].device \
                        or self._copies[i].dtype != now[i].dtype:
                    self._copies[i] = torch.empty_like(now[i])
        torch._foreach_copy_([self._copies[i] for i in changed], [now[i] for i in changed])
        for i in changed:
            self._versions[i] = now[i]._version

    @torch.no_grad()
    def put_back(self, where=None):
        """The buffers become what they were at :meth:`keep`; only where the 0-d device tensor ``where`` is not 0."""
        changed = self._changed()
        if not changed:
            return
        for i in changed:
            module, name = self._places[i]
            source, copy, now = self._sources[i], self._copies[i], module._buffers[name]
            if where is None:
                source.copy_(copy)
                module._buffers[name] = source
            else:
                now.copy_(torch.where(where.ne(0), copy, now))
