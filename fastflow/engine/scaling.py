"""How many bytes the processes of one training step exchange, from the sizes of the parameters alone.

With n processes, P bytes of gradients, and the usual ring algorithms (Patarasuk and Yuan 2009), each process sends

    all-reduce         2 (n - 1) / n * P        DistributedDataParallel, once per update
    all-gather           (n - 1) / n * P'       FSDP2, in forward, and again in backward for what was freed
    reduce-scatter       (n - 1) / n * P'       FSDP2, once per backward

and receives as much; DistributedDataParallel also broadcasts buffers at every forward, unless told not to. FSDP2 splits
every parameter along its first dimension into n equal parts, the last ones padded: P' counts ceil(d0 / n) * n rows
where P counts d0, which matters once n passes the sizes of biases and small kernels.
"""

import math
from dataclasses import dataclass

from torch import nn

from fastflow import checks

__all__ = ["Traffic", "traffic"]


@dataclass(frozen=True)
class Traffic:
    """Bytes of one training step.

    Attributes:
        all_reduce, all_gather, reduce_scatter, broadcast: the whole tensors that the collectives of a process work on.
            What TrainStep adds to agree on a flag or a norm is a few bytes and not counted.
        n_processes: n.
        parameters: bytes of parameters that a process holds between steps.
        gathered: bytes of the largest group that it holds whole at once beside them.
    """

    all_reduce: int
    all_gather: int
    reduce_scatter: int
    broadcast: int
    n_processes: int
    parameters: int
    gathered: int

    @property
    def sent(self):
        """Bytes that each process sends on average, by ring algorithms."""
        share = (self.n_processes - 1) / self.n_processes
        return round(share * (2 * self.all_reduce + self.all_gather + self.reduce_scatter + self.broadcast))


def traffic(model, n_processes, strategy="ddp", groups=(), *, dtype=None):
    """The :class:`Traffic` of one update of the model, on the meta device or any other.

    Args:
        model: a module, not yet wrapped.
        n_processes: data-parallel processes.
        strategy: "ddp" (DistributedDataParallel), or "fsdp2", also "fsdp" as in train.strategy (fully_shard on each of
            ``groups`` and then on the model).
        groups: disjoint submodules that are freed after their forward and gathered again for their backward; the rest
            of the model makes one group more, which stays whole in between, as fully_shard does by default.
        dtype: of parameters and gradients in transit, as in FSDP2's MixedPrecisionPolicy; None for the parameters' own.

    Raises:
        TypeError: the model is not a module.
        ValueError: an unknown strategy, no processes, groups under ddp, or a parameter in two groups.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if strategy not in ("ddp", "fsdp", "fsdp2"):
        raise ValueError(f"strategy: expected 'ddp', 'fsdp' or 'fsdp2', got {strategy!r}")
    n_processes = checks.count("n_processes", n_processes, 1)
    parameters = {p for p in model.parameters() if p.requires_grad}

    def size(p, n=1):
        rows = p.shape[0] if p.dim() else 1
        wide = (p.dtype if dtype is None else dtype).itemsize
        return math.ceil(rows / n) * n * math.prod(p.shape[1:]) * wide

    if strategy == "ddp":
        if groups:
            raise ValueError("groups: only fsdp2 has them")
        whole = sum(map(size, parameters))
        buffers = sum(b.numel() * b.element_size() for b in model.buffers())
        return Traffic(whole, 0, 0, buffers, n_processes, sum(p.numel() * p.element_size() for p in parameters), 0)
    named = [{p for p in group.parameters() if p.requires_grad} for group in groups]
    rest = parameters.difference(*named)
    if sum(map(len, named)) + len(rest) != len(parameters):
        raise ValueError("groups: a parameter is in two of them or not in the model")
    padded = [sum(size(p, n_processes) for p in group) for group in (*named, rest)]
    kept = sum(math.ceil((p.shape[0] if p.dim() else 1) / n_processes) * math.prod(p.shape[1:]) * p.element_size()
               for p in parameters)
    freed = sum(padded[:-1])
    return Traffic(0, padded[-1] + 2 * freed, sum(padded), 0, n_processes, kept,
                   padded[-1] + max(padded[:-1], default=0))
