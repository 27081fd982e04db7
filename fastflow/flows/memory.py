"""What a flow keeps for backward: every activation, the z of each step, or next to nothing.

- "save_z": each step's input is kept and the step runs once more in backward, with the same operations on the same
  numbers, so that gradients are those of a plain pass.
- "invert": not even that. Backward goes from the output to the input and recovers each z by inverting the step that
  came after it. A coupling's parameters depend on what it passes on unchanged, so one run of its conditioner serves
  the inversion and the gradient. Recovered values drift by rounding; z kept every few steps bounds the drift.

The graph is that of the plain pass in both; what a step has saved in it is dropped, and asked for again in backward. So
parameters may live anywhere, and the hooks of DDP and FSDP2 fire where they always do.

References:
    Chen et al., "Training deep nets with sublinear memory cost", 2016, arXiv:1604.06174.
    Gomez et al., "The reversible residual network", 2017, arXiv:1707.04585.
"""

import contextlib
import threading

import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.utils.checkpoint import checkpoint

from fastflow import backends, checks
from fastflow.flows.moving import MovingBuffers
from fastflow.flows.recompute import recomputed

__all__ = ["Mode", "kept", "path", "saving"]

NAMES = ("none", "save_z", "invert")
# Whose running statistics no momentum leaves as they are; they are not read in training.
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)


class _State(threading.local):
    def __init__(self):
        self.mode = None  # of each object, for Dynamo to guard on


_state = _State()


class Mode:
    """One of the modes, for one model.

    Args:
        name: "save_z" or "invert".
        model: the nn.Module that will run in it; "invert" refuses what makes a second run differ from the first.
        keep_every: for "invert", keep z after every so many couplings; None keeps the flow's output alone.

    Attributes:
        moving: the :class:`~fastflow.flows.moving.MovingBuffers` of the model.
        drifts: None, or a list that backward under "invert" fills with 0-d tensors, one per stretch between kept z:
            the largest error of the recovered z relative to the largest true element.
        random: whether a pass has been seen to draw random numbers.

    Raises:
        ValueError: an unknown name, a keep_every that is no positive int or comes with another mode, or for "invert" a
            model that holds dropout, batch normalisation, an estimated log-determinant or a solver of adaptive steps,
            or (said by the first pass) whose steps move buffers of floating-point numbers; the message names the
            module.
    """

    def __init__(self, name, model, keep_every=None):
        if name not in NAMES[1:]:
            raise ValueError(f"memory: expected one of {', '.join(map(repr, NAMES[1:]))}, got {name!r}")
        if keep_every is not None and name != "invert":
            raise ValueError(f"keep_every: expected None, because it belongs to memory='invert', got {keep_every!r}")
        self.name, self.keep_every = name, None if keep_every is None else checks.count("keep_every", keep_every, 1)
        self.norms = tuple(m for m in model.modules() if type(m).forward in BATCH_NORMS)
        self.iterating = tuple(filter(_iterated, model.modules()))
        apart = {(id(m), buffer) for m in self.norms for buffer in m._buffers}
        apart |= {(id(m), buffer) for m in self.iterating for buffer in _iterated(m)}
        self.moving = MovingBuffers(model, apart, flags=name != "invert")
        self.random = False
        self.drifts = None
        if name == "invert":
            _refuse_uninvertible(model)


    def refuse_moved(self, places):
        """Raises, under "invert", where such a place of ``moving`` holds floating-point numbers."""
        for place in self.moving.floating(places) if self.name == "invert" else ():
            where, module, buffer = self.moving.named(place)
            raise ValueError(f"memory: 'invert' can't run {where} ({type(module).__name__}): a pass moves its buffer "
                             f"{buffer!r}, and recovered values would not give what those of the pass have given; use "
                             f"'save_z'")


def _iterated(module):
    """The buffers of a spectral norm, of torch's parametrization or of its older hook, that a call in training moves by
    a step of power iteration, which a second run must not do again."""
    names = ["_u", "_v"] if isinstance(module, parametrizations._SpectralNorm) else []
    return names + [hook.name + end for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)
                    for end in ("_u", "_v")]


def _refuse_uninvertible(model):
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(f"memory: 'invert' can't run {name} ({kind}): batch statistics of recovered values are "
                             f"not those of the pass; use 'save_z'")
        if getattr(module, "estimates", False):
            raise ValueError(f"memory: 'invert' can't run {name} ({kind}): its estimate of the log-determinant would "
                             f"be drawn anew in backward; use 'save_z'")
        if getattr(module, "adaptive", False):
            raise ValueError(f"memory: 'invert' can't run {name} ({kind}): its solver would choose other steps for "
                             f"recovered values; use 'save_z' or a method of fixed steps")
        p = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "dropout", 0.0)
        if isinstance(p, float) and p > 0 or isinstance(module, nn.RReLU):
            raise ValueError(f"memory: 'invert' can't run {name} ({kind}): its random numbers would be drawn anew in "
                             f"backward; use 'save_z'")


@contextlib.contextmanager
def saving(mode):
    """Flows called inside (with gradients) run in ``mode``, a :class:`Mode`, or plainly with None. Their backward may
    run outside."""
    previous = _state.mode
    if previous is mode:  # what torch.compile traces inside a checkpoint may write nothing
        yield
        return
    _state.mode = mode
    found = ()
    try:
        yield
    finally:
        _state.mode = previous
        if mode is not None:
            found = mode.moving.close()
    if mode is not None:
        mode.refuse_moved(found)


def active():
    """The mode in force here, or None."""
    return _state.mode if torch.is_grad_enabled() else None


def path():
    """How a pass that begins here runs its links, an object to be called as ``path(x, logdet, *links)``.

    It returns what the last link returns: x, logdet and whatever else leaves there. ``path.end(z, logdet, unpack)``
    closes it, z being what the flow returns; ``unpack(z)`` lists the latents of a flow with splits, in the order in
    which they left, and last the x of the last link.
    """
    mode = active()
    if mode is None:
        return PLAIN
    if mode.name == "save_z":
        return _SavePath(mode)
    if torch.compiler.is_compiling():
        raise ValueError("memory: 'invert' can't be traced by torch.compile; use 'save_z'")
    return _InvertPath(mode)


def kept(function, x, *tensors):
    """``function(x, *tensors)``; in a memory mode they are kept and the function runs once more in backward."""
    mode = active()
    if mode is None:
        return function(x, *tensors)
    run = _Recomputing(mode)
    out = run(function, function, x, (x, *tensors))
    run.end()
    return out


class _Recomputing:
    """The recomputed runs of one pass, each of which finds in backward what it found at first: the backend, autocast,
    the states of random generators; and buffers that the first has moved, which the second leaves as they are."""

    def __init__(self, mode):
        self.mode, self.tracing = mode, torch.compiler.is_compiling()
        if self.tracing:
            return
        self.backend = backends.requested()
        self.autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
                         for kind in ("cpu", "cuda") if torch.amp.is_autocast_available(kind)]
        # The states of random generators can't be read while a CUDA graph is captured.
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if capturing and mode.random:
            raise ValueError(f"memory: {mode.name!r} can't be captured in a CUDA graph with a model that draws random "
                             f"numbers inside the flow")
        self.generators = None if capturing else []

    def __call__(self, first, second, x, tensors):
        if self.tracing:
            with saving(None):  # out here, because nothing may be written inside
                return checkpoint(first, *tensors, use_reentrant=False)
        index, step = -1, self.mode.moving.step()
        if self.generators is not None:
            index = len(self.generators)
            self.generators.append(_generators(x.device))
        out = recomputed(first, second, tensors, lambda: self._again(self.generators and self.generators[index], step))
        self.mode.refuse_moved(step.end())
        return out

    def end(self):
        if self.tracing or not self.generators:
            return
        device = self.generators[0][0]
        if all(map(torch.equal, self.generators[0][1:], _generators(device)[1:])):
            self.generators = None  # nothing has drawn from them
        else:
            self.mode.random = True

    @contextlib.contextmanager
    def _again(self, generators, step):
        norms = [(norm, norm.momentum, norm.num_batches_tracked) for norm in self.mode.norms]
        with contextlib.ExitStack() as stack:
            if self.backend != backends.requested():
                stack.enter_context(backends.use_backend(self.backend))
            for kind, enabled, dtype in self.autocast:
                if (enabled, dtype) != (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)):
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            now = None if generators is None else _generators(generators[0])
            if now is not None:
                _set_generators(generators)
            stack.enter_context(step.again())
            for norm in self.mode.norms:
                norm.momentum, norm.num_batches_tracked = 0.0, None
            iterating = [module for module in self.mode.iterating if module.training]
            for module in iterating:
                module.training = False
            try:
                yield
            finally:
                for module in iterating:
                    module.training = True
                for norm, momentum, count in norms:
                    norm.momentum, norm.num_batches_tracked = momentum, count
                if now is not None:
                    _set_generators(now)


def _generators(device):
    """(device, states of torch's generators that serve it)."""
    if device.type == "cuda":
        return device, torch.get_rng_state(), torch.cuda.get_rng_state(device)
    return device, torch.get_rng_state()


def _set_generators(states):
    torch.set_rng_state(states[1])
    if states[0].type == "cuda":
        torch.cuda.set_rng_state(states[2], states[0])


class _PlainPath:
    inverts = False

    def __call__(self, x, logdet, *links):
        out = (x, logdet)
        for link in links:
            out = link.forward(*out[:2], *link.tensors)
        return out

    def end(self, z, logdet, unpack=None):
        return z, logdet


PLAIN = _PlainPath()


class _SavePath:
    """Every call is one checkpoint: its x is kept."""

    inverts = False

    def __init__(self, mode):
        self.recomputing = _Recomputing(mode)

    def __call__(self, x, logdet, *links):
        if all(link.saves_nothing for link in links):
            return PLAIN(x, logdet, *links)

        def run(x, logdet, *tensors):
            out, begin = (x, logdet), 0
            for link in links:
                end = begin + len(link.tensors)
                out = link.forward(*out[:2], *tensors[begin:end])
                begin = end
            return out
        return self.recomputing(run, run, x, (x, logdet, *(t for link in links for t in link.tensors)))

    def end(self, z, logdet, unpack=None):
        self.recomputing.end()
        return z, logdet


class _InvertPath:
    """Link i maps state i to state i + 1. ``states`` and ``sides`` (what left at link i) are filled in backward, from
    the end to the beginning, each state until it has been used."""

    inverts = True  # needs ConvLink.factors.undo

    def __init__(self, mode):
        self.mode, self.recomputing = mode, _Recomputing(mode)
        self.links, self.states, self.sides, self.truth = [], {}, {}, {}
        self.couplings = 0  # since z was last kept, at state ``kept_at``
        self.kept_at = None

    def __call__(self, x, logdet, *links):
        if not self.links and self.mode.drifts is not None:
            self.truth[0] = x.detach()
        out = (x, logdet)
        for link in links:
            out = self._run(link, *out[:2])
        self.couplings += any(link.heavy for link in links)
        if self.couplings == self.mode.keep_every and len(out) == 2:
            index = len(self.links)
            out = self._keep(*out, lambda z: self.states.update({index: z}))
            if self.mode.drifts is not None:
                self.truth[index] = out[0].detach()
        return out

    def end(self, z, logdet, unpack=None):
        self.recomputing.end()
        if not self.links or (unpack is None and self.kept_at == len(self.links)):
            return z, logdet
        return self._keep(z, logdet, lambda z: self._put(z, unpack))

    def _run(self, link, x, logdet):
        index = len(self.links)
        self.links.append(link)
        if link.saves_nothing:
            out = link.forward(x, logdet, *link.tensors)
            if index in self.truth:
                del self.truth[index]
                self.truth[index + 1] = out[0].detach()
            return out
        needs, dtype = x.requires_grad, x.dtype  # x itself is not to be kept

        def again(*tensors):
            z = self.take(index + 1)
            self.found(index, link.rerun(z, self.sides.pop(index, None), needs, dtype, *tensors))
        return self.recomputing(lambda *tensors: link.forward(x, logdet, *tensors), again, x, link.tensors)

    def _keep(self, z, logdet, put):
        self.couplings, self.kept_at = 0, len(self.links)
        return _Kept.apply(z, logdet, put)

    def _put(self, z, unpack):
        latents = [z] if unpack is None else unpack(z)
        self.states[len(self.links)] = latents[-1]
        splits = [index for index, link in enumerate(self.links) if link.sided]
        self.sides.update(zip(splits, latents[:-1], strict=True))

    def take(self, index):
        """State ``index``. Where the link behind it kept nothing for backward, nothing has recovered it yet."""
        if index in self.states:
            return self.states.pop(index)
        if index >= len(self.links):
            raise RuntimeError("memory: 'invert' can't go back from an output that backward did not come through")
        with torch.no_grad():
            return self.links[index].undo(self.take(index + 1), self.sides.pop(index, None))

    def found(self, index, x):
        self.states[index] = x
        if index in self.truth and x.numel():
            true = self.truth.pop(index)
            true = true if true.is_floating_point() else true.float()  # what stands before a dequantisation
            scale = true.abs().amax().clamp(min=torch.finfo(true.dtype).tiny)
            self.mode.drifts.append(((x - true).abs().amax() / scale).float())


class _Kept(torch.autograd.Function):
    """z and logdet as they are; z is kept, and handed to ``put`` before backward goes on."""

    @staticmethod
    def forward(ctx, z, logdet, put):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z)
        ctx.put = put
        return z.view_as(z), logdet.view_as(logdet)

    @staticmethod
    def backward(ctx, grad_z, grad_logdet):
        ctx.put(ctx.saved_tensors[0].detach())
        return grad_z, grad_logdet, None
