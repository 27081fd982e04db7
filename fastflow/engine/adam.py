"""torch's fused Adam on a CPU without what its Python costs for every parameter."""

import operator

import torch

__all__ = ["FusedAdam"]

_PLAIN = (torch.Tensor, torch.nn.Parameter)


class FusedAdam:
    """The step of a torch.optim.Adam or AdamW with fused=True, by the same kernel on the same tensors, bit for bit.

    torch adds 1 to each parameter's step count in an operation of its own, which takes as long as the update of a small
    parameter. Here the counts lie in one tensor, of which each state's "step" is an element, and one addition serves
    all. The optimizer's groups and states are read anew at every call, so that schedules, loaded states and new groups
    count at once.
    """

    def __init__(self):
        self._counts, self._steps = None, ()

    def __getstate__(self):  # in a copy the states' steps may be no elements of the counts any more: they join anew
        return {"_counts": None, "_steps": ()}

    def step(self, optimizer):
        """Whether it updated the parameters; what it does not cover, it leaves as it is. Hooks and the profiler are
        the caller's to look for."""
        if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or hasattr(optimizer, "grad_scale"):
            return False
        groups = [(group, [p.grad for p in group["params"]], [optimizer.state.get(p) for p in group["params"]])
                  for group in optimizer.param_groups if group["params"]]
        if not all(_covers(*group) for group in groups):
            return False
        states = [state for _, _, states in groups for state in states]
        steps = [state["step"] for state in states]
        if len(steps) != len(self._steps) or not all(map(operator.is_, steps, self._steps)):
            if not all(step.ndim == 0 and step.dtype == torch.float32 and step.device.type == "cpu" for step in steps):
                return False
            self._counts = torch.stack(steps)
            self._steps = steps = [self._counts[i] for i in range(len(steps))]
            for state, step in zip(states, steps, strict=True):
                state["step"] = step
        self._counts.add_(1)
        for group, grads, states in groups:
            kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
            beta1, beta2 = group["betas"]
            kernel(group["params"], grads, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], [],
                   [s["step"] for s in states], lr=group["lr"], beta1=beta1, beta2=beta2,
                   weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=group["maximize"])
        return True


def _covers(group, grads, states):
    """Whether the kernel takes this group as it is: initialised, dense, of one dtype, on the CPU, of plain numbers."""
    if not group["fused"] or group["amsgrad"] or group["capturable"] or group["differentiable"]:
        return False
    if isinstance(group["lr"], torch.Tensor) or any(isinstance(beta, torch.Tensor) for beta in group["betas"]):
        return False
    dtype = group["params"][0].dtype
    return all(states) and dtype.is_floating_point and all(
        type(p) in _PLAIN and p.is_cpu and p.dtype is dtype
        and type(g) is torch.Tensor and g.dtype is dtype and g.layout is torch.strided
        for p, g in zip(group["params"], grads, strict=True))
