"""From gradients to new parameters, without a word to the host: clipping, the check, the optimizer, the average."""

import inspect

import torch
from torch.optim import optimizer as optim

from fastflow.engine.adam import FusedAdam
from fastflow.engine.distributed import agree, whole

__all__ = ["Update", "can_skip", "check_gradient", "clear_gradients", "is_fused", "take_step"]


def is_fused(optimizer):
    """Whether every parameter group is updated by a fused kernel."""
    return all(group.get("fused") for group in optimizer.param_groups)


def can_skip(optimizer):
    """Whether the optimizer leaves everything, its step count included, as it was where a device flag says so."""
    return is_fused(optimizer) and getattr(optimizer, "_step_supports_amp_scaling", False)


def check_gradient(loss):
    """Raises ValueError, and says what it may come of, at a loss that depends on no parameter."""
    if not loss.requires_grad:
        raise ValueError("model: the loss has no gradient; are all parameters frozen, or is torch.no_grad() in force?")


def clear_gradients(optimizer):
    """optimizer.zero_grad(set_to_none=True), without the profiler's record of torch's own."""
    if type(optimizer).zero_grad is not torch.optim.Optimizer.zero_grad or "zero_grad" in vars(optimizer):
        return optimizer.zero_grad(set_to_none=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def take_step(optimizer, fused_adam):
    """optimizer.step(), without the bookkeeping around torch's own that has nothing to do: hooks, where there are none,
    a record for the profiler, where none runs, gradients through the update, where they are not asked for. It costs as
    much as the update of a small model. ``fused_adam``, a FusedAdam, is asked first."""
    kind = type(optimizer)
    if (not kind.__module__.startswith("torch.optim.") or "step" in vars(optimizer) or _watched(optimizer)
            or any(group.get("differentiable") for group in optimizer.param_groups)):
        optimizer.step()
        return
    with torch.no_grad():
        if not fused_adam.step(optimizer):
            inspect.unwrap(kind.step)(optimizer)


def _watched(optimizer):
    return (torch.autograd._profiler_enabled() or optimizer._optimizer_step_pre_hooks
            or optimizer._optimizer_step_post_hooks or optim._global_optimizer_pre_hooks
            or optim._global_optimizer_post_hooks)


class Update:
    """One call of the optimizer on the gradients that are there.

    Args:
        model, optimizer: as TrainStep has them.
        parameters: those of the optimizer.
        clip_grad_norm: bound of the gradients' total norm or None.
        check: whether to look for values that are not finite.
        ema: an EMA or None.
    """

    def __init__(self, model, optimizer, parameters, clip_grad_norm, check, ema):
        self.model, self.optimizer, self.parameters = model, optimizer, parameters
        self.clip_grad_norm, self.check, self.ema = clip_grad_norm, check, ema
        self._fused_adam = FusedAdam()

    def measure(self, loss, scale):
        """(norm, flag): the gradients multiplied by ``scale`` (None for 1) in place, their total norm, and a 0-d float
        that is 1 if the norm or ``loss`` is not finite in any process, else 0. None where nobody asks for them."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if scale is not None and gradients:
            torch._foreach_mul_(gradients, scale)
        if self.clip_grad_norm is None and not self.check:
            return None, None
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        if not self.check:
            return norm, None
        # x - x is 0 for a finite x, else NaN.
        watched = loss + norm
        return norm, agree(self.model, (watched - watched).ne(0).to(torch.float32))

    def apply(self, norm, skip=None):
        """Clips, steps and averages; nothing of the three happens where the 0-d device tensor ``skip`` is 1."""
        if self.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_grad_norm, norm)
        if skip is None:
            take_step(self.optimizer, self._fused_adam)
        else:
            self.optimizer.found_inf, self.optimizer.grad_scale = skip, None
            try:
                self.optimizer.step()
            finally:
                del self.optimizer.found_inf, self.optimizer.grad_scale
        if self.ema is not None:
            self.ema.update(skip)
