"""One training step of a flow or a VAE."""

import contextlib

import torch

from fastflow import checks
from fastflow.engine import capture as capturing
from fastflow.engine import explain
from fastflow.engine.batch import Batch
from fastflow.engine.buffers import Buffers
from fastflow.engine.distributed import is_sharded, mean_over, replicas, synchronized, synchronizes, unwrap
from fastflow.engine.ema import EMA
from fastflow.engine.errors import NonFiniteError
from fastflow.engine.layout import Benchmarked, convolutions_to_channels_last
from fastflow.engine.memory import DRIFT_BOUND, Memory
from fastflow.engine.nonfinite import Replay, diagnose
from fastflow.engine.objectives import objective_for, record_latent_shape
from fastflow.engine.precision import Conditioners, own_copy
from fastflow.engine.update import Update, can_skip, check_gradient, clear_gradients
from fastflow.vae import Schedule

__all__ = ["TrainStep"]

UNCHANGED = contextlib.nullcontext()
ADVICE = "(try a lower learning rate, warm-up or clipping)"


def _parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def _at_least_float32(dtype):
    return torch.promote_types(dtype, torch.float32)


def _loss_of(objective, model, *batch):
    return objective(model, *batch)


class TrainStep:
    """``step(x, context=None, targets=None)`` runs one training step on a batch and returns its loss.

    The loss is the mean over the batch, in nats, of the negative log-likelihood of a Flow or of the negative ELBO of a
    VAE: anything with ``log_prob`` or ``elbo`` as its ``forward``, wrapped by torch.compile, DistributedDataParallel or
    FSDP2 or not. On a GPU, cuDNN tries its algorithms at the first convolution of each shape, and Glow's conditioners
    their own kernels beside it, unless determinism is asked for. Integer images are dequantised inside,
    x/n_bins - 0.5 + U/n_bins with fresh U in [0, 1), and the loss is that of the integers (D*log(n_bins) included, so
    that loss / (D log 2) is bits/dim); for a VAE with a Bernoulli likelihood they become x/(n_bins - 1) instead. A VAE
    whose likelihood has ``takes_integers`` (counts, classes, levels) and a CodePrior take them as they are, the VAE's
    encoder as floats unless it embeds them; where a likelihood of your own lacks the attribute, integers other than
    bytes and images (B, C, H, W) are refused. Floating x is taken as it is.

    ``context`` is what x is conditioned on, in conditional flows and VAEs: in a SemiSupervisedVAE labels, -1 where they
    are unknown. ``targets`` are what the tasks of a VAE's objective predict (vae.Task). Both come one for each x.

    Args:
        model: a Flow or a VAE.
        optimizer: a torch optimizer over its parameters.
        memory: what is kept for backward. "none": every activation. "save_z": the input of each step of a flow, whose
            conditioner runs once more in backward; gradients are the same. "invert": next to nothing; z is recovered by
            inverting the steps, in models without dropout and without normalisations that keep running statistics.
            "auto": "none", or "save_z" where activations would take more than a quarter of free memory, as estimated at
            the first batch; under ``capture``, "none".
        keep_every: under "invert", keep z after every so many couplings; None keeps the flow's output alone.
        drift_bound: under "invert", the largest error of a recovered z, relative to its largest element, that the
            first step may show. Gradients err about as much.
        compile: run the loss through torch.compile as one graph for all batch sizes of 2 and more; True or the name of
            a backend. The first call compiles, which takes minutes for a deep flow. "conditioners" compiles those
            alone, one graph for all of one shape, which takes seconds and fuses what is between their convolutions.
            DistributedDataParallel and FSDP2 cut the graph of the loss where they exchange gradients or parameters.
        capture: record the whole step as one CUDA graph per batch shape (up to four, further ones run eagerly) and
            replay it, with fresh noise each time. The first two calls of a shape (three at the very start) run eagerly
            and the next is recorded; all are training steps. The learning rate becomes a tensor on the device, which
            schedulers may change; other hyperparameters may change too, at the price of a new recording. Refused are
            continuous flows, whose solver the host follows, and residual ones of estimated log-determinants.
        clip_grad_norm: gradients of a larger total norm are scaled down to it; None leaves them.
        check_finite: True looks at the loss and the gradients' norm before the optimizer changes anything, at the cost
            of one synchronisation per update on an accelerator. "late" leaves the decision to the device, where a fused
            optimizer skips the update, and raises at the next call (or at :meth:`check`); with ``capture`` True means
            that. False does not look.
        conditioner_dtype: torch.bfloat16 runs conditioners (encoder and decoder of a VAE) under autocast to it;
            parameters, z, log-determinants and factorisations stay in float32. None leaves all as it is.
        accumulate: N calls make one update, that of the N batches as one, whatever their sizes; what is taken over a
            batch (its statistics, the gates of free bits, MMD) is each batch's own.
        ema_decay: average the parameters with this decay after every update, see ``ema``; None does not.
        ema_warmup: let the average forget faster early on, see :class:`~fastflow.engine.ema.EMA`; 0 does not.
        channels_last: keep the weights of convolutions channels-last, as the flows for images keep their data. None: in
            flows, if the optimizer has no state yet.
        n_bins: levels of integer images.
        n_samples, beta: of the ELBO; flows ignore them. beta may be a vae.Schedule, or a 0-d tensor on the model's
            device, whose value at the time of a step counts, compiled and captured too. The schedule's step and epoch
            are the caller's to call.

    Attributes:
        parts: of the last call, detached and 0-d: for a VAE ``rate`` and ``distortion``, and after an update
            ``grad_norm`` where it was needed.
        ema: the :class:`~fastflow.engine.ema.EMA` or None.
        memory: what is kept for backward: ``mode``, and after the first step ``saved`` (bytes) and ``drift``.

    Raises:
        ValueError, TypeError: an argument that can't be, by name.
        NonFiniteError: at a step whose loss or gradients are not finite; neither parameters nor buffers nor optimizer
            nor average changed, what was accumulated is dropped, and the message names the first module whose output
            was not finite. With "late" the call after it raises before it does anything: the same call again goes on.
            Batches must not be overwritten until then.
        DriftError: at the first step, where "invert" drifts above the bound; nothing changed either.
    """

    def __init__(self, model, optimizer, *, memory="auto", keep_every=None, drift_bound=DRIFT_BOUND, compile=False,
                 capture=False, clip_grad_norm=None, check_finite=True, conditioner_dtype=None, accumulate=1,
                 ema_decay=None, ema_warmup=0, channels_last=None, n_bins=256, n_samples=1, beta=1.0):
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("optimizer: LBFGS evaluates the loss several times in a step, which this one does once")
        if clip_grad_norm is not None:
            checks.number("clip_grad_norm", clip_grad_norm)
        if clip_grad_norm is not None and not clip_grad_norm > 0:
            raise ValueError(f"clip_grad_norm: expected a positive number or None, got {clip_grad_norm!r}")
        if check_finite not in (True, False, "late"):
            raise ValueError(f"check_finite: expected True, False or 'late', got {check_finite!r}")
        accumulate = checks.count("accumulate", accumulate, 1)
        if ema_decay is None and ema_warmup:
            raise ValueError(f"ema_warmup: expected 0, because it belongs to ema_decay, got {ema_warmup!r}")
        if conditioner_dtype not in (None, torch.bfloat16):
            raise ValueError(f"conditioner_dtype: expected torch.bfloat16 or None, got {conditioner_dtype!r}")
        if channels_last not in (None, True, False):
            raise ValueError(f"channels_last: expected True, False or None, got {channels_last!r}")
        if not isinstance(compile, (bool, str)):
            raise TypeError(f"compile: expected a bool or the name of a backend, got {type(compile).__name__}")
        if isinstance(beta, Schedule) and (compile or capture):  # which would take its value for a constant
            parameter = optimizer.param_groups[0]["params"][0]
            beta = beta.tensor(parameter.device, _at_least_float32(parameter.dtype))
        self.objective = objective_for(model, n_bins=n_bins, n_samples=n_samples, beta=beta)
        own = {id(p) for p in model.parameters()}
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(f"optimizer: expected one over the parameters of the {type(unwrap(model)).__name__}, got "
                             f"one that holds none of them")
        self.model, self.optimizer = model, optimizer
        self.compile, self.capture = compile, bool(capture)
        if capture and memory in ("save_z", "invert"):
            raise ValueError(f"memory: {memory!r} can't be combined with capture; use 'none'")
        self.memory = Memory(model, self.objective, "none" if capture and memory == "auto" else memory, keep_every,
                             drift_bound, compiled=bool(compile) and compile != "conditioners")
        self.clip_grad_norm, self.accumulate, self.conditioner_dtype = clip_grad_norm, accumulate, conditioner_dtype
        self.check_finite = "late" if capture and check_finite else check_finite
        self._parameters = _parameters_of(optimizer)
        self._device = self._parameters[0].device
        recorder = capturing.recorder_for(self._device) if capture else None
        if capture:
            capturing.prepare(model, optimizer, self._device, self.check_finite)
        if self.check_finite == "late":
            self._refuse_late()
        self.layout = convolutions_to_channels_last(model, optimizer, channels_last)
        parts = compile == "conditioners"
        self._lowered = self._probed = contextlib.nullcontext
        if conditioner_dtype is not None:
            self._lowered = self._probed = Conditioners(unwrap(model), conditioner_dtype)
        if parts:
            self._lowered = Conditioners(unwrap(model), conditioner_dtype, True)
        self._convolutions = Benchmarked(model, self._device, self.capture)
        self._synchronizes = synchronizes(model)
        self._loss = self._compiled() if compile and not parts else self.objective
        self.ema = None if ema_decay is None else EMA(unwrap(model), ema_decay, ema_warmup)
        self._buffers = Buffers(unwrap(model))
        self._update = Update(model, optimizer, self._parameters, clip_grad_norm, bool(self.check_finite), self.ema)
        self.parts = {}
        self._calls, self._examples, self._updates = 0, 0, 0  # calls and examples since the last update; updates
        self._watch = self._total = None  # of an accumulated update: its losses, and how many examples
        self._replays, self._pending = [], None
        self._keeps_gradients = self.capture and accumulate > 1  # graphs that add to gradients need them where they are
        self._steps = None
        if capture:
            optimizer.zero_grad(set_to_none=True)
            self._steps = capturing.CapturedSteps(self._device_step, optimizer, self._parameters, recorder,
                                                  self._keeps_gradients)

    def __call__(self, x, context=None, targets=None):
        """The step's loss, a detached 0-d tensor. x (B, *event), integer or floating; context (B, ...) as the model
        takes it; targets (B, ...), or {name: (B, ...)} for several tasks."""
        batch = Batch(x, context, targets)
        batch.check()
        self.check()
        if sum(len(group["params"]) for group in self.optimizer.param_groups) != len(self._parameters):
            self._parameters[:] = _parameters_of(self.optimizer)  # a group was added; the list is the update's, too
        last = self._calls + 1 == self.accumulate
        if self.check_finite:
            self._replays.append(Replay(batch, self._device))
        if self._calls == 0:
            self._buffers.keep()
            self._make_totals()
        self._examples += len(x)
        if self._total is not None:
            self._total.fill_(self._examples)
        # The first update makes the optimizer's state, which a skipped one would leave half made: the host checks it.
        late = self.check_finite == "late" and self._updates > 0
        try:
            with self._convolutions():
                if self._steps is None or (self.check_finite and not late):
                    loss, parts, flag = self._step(batch, last, late)
                else:
                    loss, parts, flag = self._steps(batch, last)
        except BaseException:
            self._drop()
            raise
        self._calls += 1
        if last:
            self._calls, self._examples, self._updates = 0, 0, self._updates + 1
            if late:
                self._pending = flag, self._replays
            self._replays = []
        self.parts = parts
        return loss

    def _make_totals(self):
        """What an accumulated update adds up, in the dtype that the model has now."""
        if self.accumulate == 1:
            return
        dtype = _at_least_float32(self._parameters[0].dtype)
        if self._total is None or self._total.dtype != dtype:
            self._watch, self._total = (torch.zeros((), dtype=dtype, device=self._device) for _ in range(2))

    def __getstate__(self):
        """With what an update has accumulated so far: copies of parameters come without their gradients."""
        return {**self.__dict__, "_gradients": [p.grad if self._calls else None for p in self._parameters]}

    def __setstate__(self, state):
        gradients = state.pop("_gradients")
        self.__dict__.update(state)
        if self._calls:
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient

    def check(self):
        """Waits for the last update and raises if it was skipped; only with check_finite "late" there is one to ask.

        Raises:
            NonFiniteError: its loss or gradients were not finite. Asked again, it says nothing.
        """
        if self._pending is None:
            return
        (flag, replays), self._pending = self._pending, None
        if flag.item():
            self._updates -= 1
            raise self._error("the loss or a gradient is not finite; the update was skipped", replays)

    def explain(self, x=None, context=None, targets=None):
        """What a step does and why, one line per choice. With a batch ``x`` also the kernels that fastflow's operators
        launch in its forward and backward (see :mod:`fastflow.launches`) in the memory mode in force; nothing is
        changed by that. One process of several may ask; under FSDP2 with ``x`` all must, together.

        Raises:
            ValueError, TypeError: a batch that can't be, or no parameter to train, by name.
        """
        text = explain.choices(self)
        if x is None:
            return text
        batch = Batch(x, context, targets)
        batch.check()
        return text + "\n" + explain.launched(self, batch)

    def _device_step(self, batch, last):
        """What is recorded: one call without a word to the host."""
        return self._step(batch, last, bool(self.check_finite))

    def _step(self, batch, last, late):
        """(loss, parts, flag) of one call; ``late`` leaves a flag for later instead of raising."""
        if self._calls == 0 and not self._keeps_gradients:
            clear_gradients(self.optimizer)
        if self.compile == "conditioners":
            with self._probed():
                self.memory.choose(batch)  # its probe needs no graphs for its own batch sizes
        with synchronized(self.model, last) if self._synchronizes else UNCHANGED, self._lowered():
            with self.memory.applied(batch):
                loss, parts = self._loss(self.model, *batch)
            check_gradient(loss)
            (loss if self.accumulate == 1 else loss * len(batch.x)).backward()
        loss, scale, watched = loss.detach(), None, loss.detach()
        if self.accumulate > 1:
            watched = self._watch.add_(watched)
            scale = 1.0 / (mean_over(self.model, self._total) if last else self._total)
        if not last:
            return loss, parts, None
        norm, flag = self._update.measure(watched, scale)
        if self.check_finite and not late:
            self._refuse_non_finite(watched, norm, flag)
        self.memory.check()
        self._update.apply(norm, flag if late else None)
        if late:
            self._buffers.put_back(flag)
        if self.accumulate > 1:
            self._watch.zero_()
            if self._keeps_gradients:
                torch._foreach_zero_([p.grad for p in self._parameters if p.grad is not None])
        return loss, parts if norm is None else {**parts, "grad_norm": norm}, flag

    def _refuse_non_finite(self, loss, norm, flag):
        """Raises before anything is changed."""
        if not flag:
            return
        if not torch.isfinite(loss):
            what = f"the loss is {loss.item()}"
        else:
            self.memory.refuse_drift()  # which gradients that are not finite may come of
            what = "the loss of another process is not finite"
            if not torch.isfinite(norm):
                what = f"the gradients' norm is {norm.item()}"
        replays = self._replays
        self._drop()
        raise self._error(f"{what}; the step was not taken", replays)

    def _error(self, what, replays):
        with self._lowered():
            where, module = diagnose(self.model, self.objective, replays)
        return NonFiniteError(f"{what}{': ' if where else ''}{where} {ADVICE}", module)

    def _drop(self):
        """Forgets what was accumulated, in gradients and buffers."""
        self._buffers.put_back()
        self.optimizer.zero_grad(set_to_none=True)
        self._calls, self._examples, self._replays = 0, 0, []
        if self._watch is not None:
            self._watch.zero_()

    def _refuse_late(self):
        if is_sharded(self.model):
            raise ValueError("check_finite: 'late' is not available under FSDP2; use True or False")
        if not can_skip(self.optimizer):
            raise ValueError(f"check_finite: 'late' needs an optimizer that can skip an update on the device's word; "
                             f"make the {type(self.optimizer).__name__} with fused=True")

    def _compiled(self):
        """The loss as one compiled graph; torch.compile cuts it at the gradient buckets of DistributedDataParallel, and
        at the hooks of FSDP2."""
        options = {} if self.compile is True else {"backend": self.compile}
        whole = replicas(self.model) is None and not is_sharded(self.model)
        compiled = torch.compile(own_copy(_loss_of), fullgraph=whole, **options)

        def loss(model, *batch):
            self.objective.look(model, *batch[:2])
            record_latent_shape(model, self.objective, *batch[:2])
            for _, tensor in Batch(*batch).named():
                if len(tensor) > 1:
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
            return compiled(self.objective, model, *batch)
        return loss
