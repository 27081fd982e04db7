"""A function whose saved tensors are dropped and come back in backward, when a second run saves them again.

What torch.utils.checkpoint does in its non-reentrant form, for eager steps of a flow at a third of its cost: a flow has
a hundred of them per pass. Under torch.compile that is the one to use.
"""

import weakref

import torch
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["recomputed"]


def recomputed(first, second, tensors, around):
    """``first(*tensors)``, whose graph keeps ``tensors`` and nothing that was saved inside.

    Args:
        first: called now.
        second: called as second(*tensors), within ``around()``, when backward first needs what first has saved; it must
            save tensors of the same shapes and dtypes in the same order. Its result is ignored.
        tensors: sequence of tensors and of None.
        around: constructor of a context manager.
    """
    frame = _Frame(second, tensors, around)
    try:
        with saved_tensors_hooks(frame.pack, _unpack):
            return first(*tensors)
    finally:
        frame.close()


class _Saved:
    """The place of one saved tensor: empty but for the first run, in which the function may take gradients, and for the
    time between the second run and its use."""

    __slots__ = ("__weakref__", "frame", "task", "value")

    def __init__(self, frame, value):
        self.frame, self.task, self.value = frame, None, value


def _unpack(saved):
    if saved.frame.open:
        return saved.value
    task = torch._C._current_graph_task_id()
    if saved.value is None or saved.task != task:
        saved.frame.rerun(task)
    value, saved.value = saved.value, None
    return value


class _Frame:
    def __init__(self, second, tensors, around):
        self.second, self.around = second, around
        self.places, self.kinds, self.open = [], [], True
        # The output, not its node: without it, torch 2.11 lets what the node has saved go.
        self.kept = _Keeper.apply(torch.empty((), requires_grad=True), *tensors)

    def pack(self, tensor):
        saved = _Saved(self, tensor)
        self.places.append(weakref.ref(saved))
        self.kinds.append((tensor.shape, tensor.dtype))
        return saved

    def close(self):
        self.open = False
        for place in self.places:
            saved = place()
            if saved is not None:
                saved.value = None

    def rerun(self, task):
        count = 0

        def pack(tensor):
            nonlocal count
            before = self.kinds[count] if count < len(self.kinds) else None
            if before != (tensor.shape, tensor.dtype):
                was = "was none" if before is None else f"was {tuple(before[0])} {before[1]}"
                raise RuntimeError(self.differs(f"tensor {count} is {tuple(tensor.shape)} {tensor.dtype} and {was}"))
            saved = self.places[count]()
            if saved is not None:  # else its node is gone
                saved.value, saved.task = tensor.detach(), task
            count += 1
            return tensor.detach()  # for a step that takes gradients on its way

        with self.around(), torch.enable_grad(), saved_tensors_hooks(pack, _same):
            self.second(*self.kept.grad_fn.saved_tensors)
        if count < len(self.kinds):
            raise RuntimeError(self.differs(f"{count} tensors, and {len(self.kinds)} before"))

    def differs(self, how):
        return (f"memory: a step of the flow saved other tensors when it ran again in backward than before ({how}); "
                f"its operations must not depend on state that changes in between")


def _same(tensor):
    return tensor


class _Keeper(torch.autograd.Function):
    """Keeps tensors as a node of the graph does, so that hooks on saved tensors see them."""

    @staticmethod
    def forward(ctx, anchor, *tensors):
        ctx.save_for_backward(*tensors)
        return anchor.detach()

    @staticmethod
    def backward(ctx, *grads):
        raise AssertionError("nothing depends on it")
