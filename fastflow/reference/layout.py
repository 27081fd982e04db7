"""Memory formats, which torch.func.vmap knows nothing of but the contiguous one."""

import torch

__all__ = ["channels_last", "memory_format_of"]


def memory_format_of(x):
    """The memory format that ``x``'s strides suggest (Tensor.suggest_memory_format); under vmap the contiguous one."""
    return torch.contiguous_format if _vmapped() else torch._prims_common.suggest_memory_format(x)


def channels_last(x):
    """``x`` (B, C, H, W) with channels-last strides; under vmap as it is."""
    return x if _vmapped() else x.contiguous(memory_format=torch.channels_last)


def _vmapped():
    kinds = [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]
    return torch._C._functorch.TransformType.Vmap in kinds


_vmapped._dynamo_marked_constant = True  # Dynamo has the transforms that it traces active then, and guards on them
