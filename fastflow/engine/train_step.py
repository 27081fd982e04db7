"""One training step of a flow or a VAE."""

import torch

from fastflow.engine.errors import DriftError, NonFiniteError
from fastflow.engine.memory import DRIFT_BOUND, Memory
from fastflow.engine.objectives import objective_for, unwrap

__all__ = ["TrainStep"]


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
        memory: what is kept for backward. "none": every activation. "save_z": the input of each step of a flow, whose
            conditioner runs once more in backward; gradients are the same. "invert": next to nothing; z is recovered by
            inverting the steps, in models without dropout and batch normalisation. "auto": "none", or "save_z" where
            activations would take more than a quarter of free memory, as estimated at the first batch.
        keep_every: under "invert", keep z after every so many couplings; None keeps the flow's output alone.
        drift_bound: under "invert", the largest error of a recovered z, relative to its largest element, that the
            first step may show. Gradients err about as much.
        compile: run the loss through torch.compile, which takes the first calls to warm up.
        capture: must be False.
        clip_grad_norm: gradients of a larger total norm are scaled down to it; None leaves them.
        check_finite: look at the loss and the gradients' norm before the optimizer changes anything. Costs one
            synchronisation per step on an accelerator.
        n_bins: levels of integer images.
        n_samples, beta: of the ELBO; flows ignore them.

    Attributes:
        parts: after a step, its detached 0-d ``grad_norm`` and, for a VAE, ``rate`` and ``distortion``.
        memory: what is kept for backward: ``mode``, and after the first step ``saved`` (bytes) and ``drift``.

    Raises:
        ValueError, TypeError: an argument that can't be, by name.
        NonFiniteError: at a step whose loss or gradients are not finite; neither parameters nor optimizer changed.
        DriftError: at the first step, where "invert" drifts above the bound; nothing changed either.
    """

    def __init__(self, model, optimizer, *, memory="auto", keep_every=None, drift_bound=DRIFT_BOUND, compile=False,
                 capture=False, clip_grad_norm=None, check_finite=True, n_bins=256, n_samples=1, beta=1.0):
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if capture:
            raise ValueError("capture: capturing a step in a CUDA graph is not available in this version; use False")
        if clip_grad_norm is not None and not clip_grad_norm > 0:
            raise ValueError(f"clip_grad_norm: expected a positive number or None, got {clip_grad_norm!r}")
        self.model, self.optimizer = model, optimizer
        self.compile = bool(compile)
        self.clip_grad_norm, self.check_finite = clip_grad_norm, bool(check_finite)
        self.objective = objective_for(model, n_bins=n_bins, n_samples=n_samples, beta=beta)
        self.memory = Memory(model, self.objective, memory, keep_every, drift_bound, compiled=self.compile)
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
        with self.memory.applied(x, context):
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
        self._refuse_drift()
        self.optimizer.step()
        self.parts = parts
        return loss

    def _refuse_non_finite(self, loss, norm):
        if torch.isfinite(loss + norm):
            return
        self.optimizer.zero_grad(set_to_none=True)
        what = f"the gradients' norm is {norm.item()}" if torch.isfinite(loss) else f"the loss is {loss.item()}"
        raise NonFiniteError(f"{what}; the step was not taken (try a lower learning rate, warm-up or clipping)")

    def _refuse_drift(self):
        try:
            self.memory.check()
        except DriftError:
            self.optimizer.zero_grad(set_to_none=True)
            raise

    def explain(self):
        """What a step does and why, one line per choice."""
        clip = self.clip_grad_norm
        clip = "off" if clip is None else f"gradients of norm above {clip:g} are scaled down"
        return "\n".join([
            f"objective: {self.objective.name} of {type(unwrap(self.model)).__name__}, mean over the batch, in nats",
            f"integer images: dequantised with {self.objective.n_bins} levels, floating x taken as it is",
            f"optimizer: {type(self.optimizer).__name__}, {sum(p.numel() for p in self._parameters):,} parameters",
            f"memory: {self.memory.explain()}",
            f"compile: {'torch.compile on the loss' if self.compile else 'off'}",
            f"clipping: {clip}",
            f"non-finite loss: {'refused before the optimizer runs' if self.check_finite else 'not looked for'}",
        ])
