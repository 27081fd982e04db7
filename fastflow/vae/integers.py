"""Which encoders read integers as they are: words, codes and other indices, of which an embedding makes vectors."""

import torch
from torch import nn
from torch.func import functional_call

__all__ = ["embeds"]

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
INDICES = (torch.int64, torch.int32)  # the dtypes that embeddings take


@torch.no_grad()
def embeds(network, x, dtype, context=None):
    """Whether the network takes x (B, *event) of integers, and not the same numbers in the floating ``dtype``.

    One without an embedding does not; one of torch's own layers and this library's does if its first is an embedding.
    Others are asked: they run without data, on the meta device, on floats and then on integers. Where neither works
    there, the first layer tells.
    """
    network = getattr(network, "_orig_mod", network)  # of torch.compile
    modules = list(network.modules()) if isinstance(network, nn.Module) else []
    if not any(isinstance(m, EMBEDDINGS) for m in modules):
        return False
    first = isinstance(next(m for m in modules if not list(m.children())), EMBEDDINGS)
    if all(type(m).__module__.startswith(("torch.nn.modules.", "fastflow.")) for m in modules):
        return first
    if _runs(network, x, dtype, context):
        return False
    return first or _runs(network, x, torch.int64, context)


def _refuse_floats(embedding, args):
    if args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
        raise TypeError("an embedding takes integers")


def _runs(network, x, dtype, context):
    """Whether the network runs on the meta device on an x of that dtype; nothing of it changes."""
    # Not every version of torch has embeddings look at their indices there.
    hooks = [m.register_forward_pre_hook(_refuse_floats) for m in network.modules() if isinstance(m, EMBEDDINGS)]
    tensors = {name: t.to("meta") for name, t in (*network.named_parameters(), *network.named_buffers())}
    inputs = (torch.empty_like(x, dtype=dtype, device="meta"), *(() if context is None else (context.to("meta"),)))
    try:
        functional_call(network, tensors, inputs)
    except Exception:  # of whatever kind, it is the answer
        return False
    finally:
        for hook in hooks:
            hook.remove()
    return True
