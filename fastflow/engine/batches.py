"""The batches of a run: which examples belong to a step, and a process's share of them."""

import torch

from fastflow.engine.labels import training_labels

__all__ = ["Batches"]


class Batches:
    """Batches of the training examples, every epoch in an order of its own, its remainder left out.

    Args:
        settings: a :class:`~fastflow.engine.settings.Settings`.
        data: its data.
        processes: the :class:`~fastflow.engine.distributed.Processes`.
        device: where shares go.
    """

    def __init__(self, settings, data, processes, device):
        self.train, self.processes, self.device = settings.train, processes, device
        self.examples, self.labels = data.train, training_labels(settings, data)
        self._order = None, None

    def images(self, step):
        """The images (batch_size, C, H, W), or rows, of that step."""
        return self.examples.index_select(0, self._indices(step))

    def labels_of(self, step):
        """The labels (batch_size,) that belong to them, -1 for unknown ones; None where the model takes none."""
        return None if self.labels is None else self.labels[self._indices(step)]

    def parts(self, batch):
        """This process's share of a batch, or of None, in ``train.accumulate`` parts, on the device."""
        if batch is None:
            return (None,) * self.train.accumulate
        mine = batch if self.processes.count == 1 else batch.chunk(self.processes.count)[self.processes.rank]
        return [part.to(self.device) for part in mine.chunk(self.train.accumulate)]

    def place(self, step):
        """(epoch, batch of it), from 0, of that step."""
        return divmod(step, len(self.examples) // self.train.batch_size)

    def _indices(self, step):
        n, size = len(self.examples), self.train.batch_size
        epoch, index = self.place(step)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed((self.train.seed * 1_000_003 + epoch) % 2**63)
            self._order = epoch, torch.randperm(n, generator=generator)
        return self._order[1][index * size:(index + 1) * size]
