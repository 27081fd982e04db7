"""One training step of a flow or a VAE."""

import torch

from fastflow.engine.errors import NonFiniteError
from fastflow.engine.objectives import objective_for, unwrap

__all__ = ["TrainStep"]

MEMORY = ("auto", "none")
LATER = ("save_z", "invert")


class TrainStep:
    """``step(x, context=None)`` runs one training step on a batch and returns its loss.

    The loss is the mean over the batch, in nats, of the negative log-likelihood of a Flow or of the negative ELBO of a
    VAE: anything with ``log_prob`` or ``elbo`` as its ``forward``, wrapped by torch.compile or DistributedDataParallel
    or not. Integer images are dequantised inside, x/n_bins - 0.5 + U/n_bins with fresh U in [0, 1), and the loss is
    that of the integers (D*log(n_bins) included, so that loss / (D log 2) is bits/dim); for a VAE with a Bernoulli
    likelihood they become x/(n_bins - 1) instead. Floating x is taken as it is.

    Args:
        model: a Flow or a VAE.
        optimizer: a torch optimizer over its parameters.
        memory: "none" keeps every activation; "auto" is "none" here.
        compile: run the loss through torch.compile, which takes the first calls to warm up.
        capture: must be False.
        clip_grad_norm: gradients of a larger total norm are scaled down to it; None leaves them.
        check_finite: look at the loss and the gradients' norm before the optimizer changes anything. Costs one
            synchronisation per step on an accelerator.
        n_bins: levels of integer images.
        n_samples, beta: of the ELBO; flows ignore them.

    Attributes:
        parts: after a step, its detached 0-d ``grad_norm`` and, for a VAE, ``rate`` and ``distortion``.

    Raises:
        ValueError, TypeError: an argument that can't be, by name.
        NonFiniteError: at a step whose loss or gradients are not finite; neither parameters nor optimizer changed.
    """

    def __init__(self, model, optimizer, *, memory="auto", compile=False, capture=False, clip_grad_norm=None,
                 check_finite=True, n_bins=256, n_samples=1, beta=1.0):
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if memory in LATER:
            raise ValueError(f"memory: {memory!r} is not available in this version; use 'auto' or 'none'")
        if memory not in MEMORY:
            raise ValueError(f"memory: expected one of {', '.join(map(repr, MEMORY))}, got {memory!r}")
        if capture:
            raise ValueError("capture: capturing a step in a CUDA graph is not available in this version; use False")
        if clip_grad_norm is not None and not clip_grad_norm > 0:
            raise ValueError(f"clip_grad_norm: expected a positive number or None, got {clip_grad_norm!r}")
        self.model, self.optimizer = model, optimizer
        self.memory, self.compile = memory, bool(compile)
        self.clip_grad_norm, self.check_finite = clip_grad_norm, bool(check_finite)
        self.objective = objective_for(model, n_bins=n_bins, n_samples=n_samples, beta=beta)
        self.parts = {}
        self._loss = torch.compile(self.objective) if compile else self.objective
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def __call__(self, x, context=None):
        """The step's loss, a detached 0-d tensor. x (B, *event), integer or floating; context as the model takes it."""
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
        if x.ndim < 2 or len(x) == 0:
            raise ValueError(f"x: expected a batch (B, *event) with B > 0, got shape {tuple(x.shape)}")
        self.optimizer.zero_grad(set_to_none=True)
        loss, parts = self._loss(self.model, x, context)
        loss.backward()
        loss = loss.detach()
        if self.check_finite or self.clip_grad_norm is not None:
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            parts = {**parts, "grad_norm": norm}
            if self.check_finite:
                self._refuse_non_finite(loss, norm)
            if self.clip_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self._parameters, self.clip_grad_norm, norm)
        self.optimizer.step()
        self.parts = parts
        return loss

    def _refuse_non_finite(self, loss, norm):
        if torch.isfinite(loss + norm):
            return
        self.optimizer.zero_grad(set_to_none=True)
        what = f"the gradients' norm is {norm.item()}" if torch.isfinite(loss) else f"the loss is {loss.item()}"
        raise NonFiniteError(f"{what}; the step was not taken (try a lower learning rate, warm-up or clipping)")

    def explain(self):
        """What a step does and why, one line per choice."""
        clip = self.clip_grad_norm
        clip = "off" if clip is None else f"gradients of norm above {clip:g} are scaled down"
        memory = "none: every activation is kept for backward"
        if self.memory == "auto":
            memory += " ('auto' knows no other mode in this version)"
        return "\n".join([
            f"objective: {self.objective.name} of {type(unwrap(self.model)).__name__}, mean over the batch, in nats",
            f"integer images: dequantised with {self.objective.n_bins} levels, floating x taken as it is",
            f"optimizer: {type(self.optimizer).__name__}, {sum(p.numel() for p in self._parameters):,} parameters",
            f"memory: {memory}",
            f"compile: {'torch.compile on the loss' if self.compile else 'off'}",
            f"clipping: {clip}",
            f"non-finite loss: {'refused before the optimizer runs' if self.check_finite else 'not looked for'}",
        ])
