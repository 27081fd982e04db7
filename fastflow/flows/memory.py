"""What a flow keeps for backward: every activation, the z of each step, or next to nothing.

- "save_z": each step's input is kept and the step runs once more in backward, with the same operations on the same
  numbers, so that gradients are those of a plain pass.
- "invert": not even that. Backward goes from the output to the input and recovers each z by inverting the step that
  came after it. A coupling's parameters depend on what it passes on unchanged, so one run of its conditioner serves
  the inversion and the gradient. Recovered values drift by rounding; z kept every few steps bounds the drift.

The graph is that of the plain pass in both: torch's non-reentrant checkpointing drops what a step has saved and asks
for it again in backward. So parameters may live anywhere, and the hooks of DDP and FSDP2 fire where they always do.

References:
    Chen et al., "Training deep nets with sublinear memory cost", 2016, arXiv:1604.06174.
    Gomez et al., "The reversible residual network", 2017, arXiv:1707.04585.
"""

import contextlib
import threading

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from fastflow import backends

__all__ = ["Mode", "kept", "path", "saving"]

NAMES = ("none", "save_z", "invert")
_state = threading.local()


class Mode:
    """One of the modes, for one model.

    Args:
        name: "save_z" or "invert".
        model: the nn.Module that will run in it; "invert" refuses what makes a second run differ from the first.
        keep_every: for "invert", keep z after every so many couplings; None keeps the flow's output alone.

    Attributes:
        drifts: None, or a list that backward under "invert" fills with 0-d tensors, one per stretch between kept z:
            the largest error of the recovered z relative to the largest true element.
        random: whether a pass has been seen to draw random numbers.

    Raises:
        ValueError: an unknown name, a keep_every that is no positive int or comes with another mode, or for "invert" a
            model that holds dropout or batch normalisation; the message names the module.
    """

    def __init__(self, name, model, keep_every=None):
        if name not in NAMES[1:]:
            raise ValueError(f"memory: expected one of {', '.join(map(repr, NAMES[1:]))}, got {name!r}")
        if keep_every is not None and name != "invert":
            raise ValueError(f"keep_every: expected None, because it belongs to memory='invert', got {keep_every!r}")
        if keep_every is not None and (isinstance(keep_every, bool) or not isinstance(keep_every, int)
                                       or keep_every < 1):
            raise ValueError(f"keep_every: expected a positive int or None, got {keep_every!r}")
        self.name, self.keep_every = name, keep_every
        self.norms = tuple(m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        self.random = False
        self.drifts = None
        if name == "invert":
            _refuse_uninvertible(model)


def _refuse_uninvertible(model):
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(f"memory: 'invert' can't run {name} ({kind}): batch statistics of recovered values are "
                             f"not those of the pass; use 'save_z'")
        p = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "dropout", 0.0)
        if isinstance(p, float) and p > 0 or isinstance(module, nn.RReLU):
            raise ValueError(f"memory: 'invert' can't run {name} ({kind}): its random numbers would be drawn anew in "
                             f"backward; use 'save_z'")


@contextlib.contextmanager
def saving(mode):
    """Flows called inside (with gradients) run in ``mode``, a :class:`Mode`, or plainly with None. Their backward may
    run outside."""
    previous = getattr(_state, "mode", None)
    _state.mode = mode
    try:
        yield
    finally:
        _state.mode = previous


def active():
    """The mode in force here, or None."""
    return getattr(_state, "mode", None) if torch.is_grad_enabled() else None


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


def kept(function, *args):
    """``function(*args)``; in a memory mode its arguments are kept and it runs once more in backward."""
    mode = active()
    return function(*args) if mode is None else _checkpoint(mode, function, *args)


def _checkpoint(mode, function, *args, early_stop=True):
    if torch.compiler.is_compiling():
        return checkpoint(function, *args, use_reentrant=False)
    # The states of random generators can't be read while a CUDA graph is captured.
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if capturing and mode.random:
        raise ValueError(f"memory: {mode.name!r} can't be captured in a CUDA graph with a model that draws random "
                         f"numbers inside the flow")
    backend = backends.requested()
    context_fn = noop_context_fn
    if mode.norms or backend is not None:
        def context_fn():
            return contextlib.nullcontext(), _again(mode.norms, backend)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=not capturing, context_fn=context_fn,
                      early_stop=early_stop)


@contextlib.contextmanager
def _again(norms, backend):
    """The second run: on the backend of the first, and without a second update of running statistics."""
    held = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        with backends.use_backend(backend):
            yield
    finally:
        for norm, momentum, count in held:
            norm.momentum, norm.num_batches_tracked = momentum, count


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
        self.mode = mode
        self.generators = None if torch.compiler.is_compiling() else _generators()

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
        return _checkpoint(self.mode, run, x, logdet, *(t for link in links for t in link.tensors))

    def end(self, z, logdet, unpack=None):
        _watch(self.mode, self.generators)
        return z, logdet


class _InvertPath:
    """Link i maps state i to state i + 1. ``states`` and ``sides`` (what left at link i) are filled in backward, from
    the end to the beginning, each state until it has been used."""

    inverts = True  # needs ConvLink.factors.undo

    def __init__(self, mode):
        self.mode = mode
        self.links, self.states, self.sides, self.truth = [], {}, {}, {}
        self.couplings = 0  # since z was last kept, at state ``kept_at``
        self.kept_at = None
        self.generators = _generators()

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
        _watch(self.mode, self.generators)
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
        return _checkpoint(self.mode, _Region(self, index, x, logdet), *link.tensors, early_stop=False)

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
            scale = true.abs().amax().clamp(min=torch.finfo(true.dtype).tiny)
            self.mode.drifts.append(((x - true).abs().amax() / scale).float())


class _Region:
    """What a checkpoint of :class:`_InvertPath` runs: the link, and in backward its reconstruction from its output."""

    def __init__(self, owner, index, x, logdet):
        self.owner, self.index = owner, index
        self.inputs = x, logdet
        self.needs, self.dtype = x.requires_grad, x.dtype

    def __call__(self, *tensors):
        owner, index = self.owner, self.index
        link = owner.links[index]
        if self.inputs is not None:
            inputs, self.inputs = self.inputs, None
            return link.forward(*inputs, *tensors)
        z = owner.take(index + 1)
        x = link.rerun(z, owner.sides.pop(index, None), self.needs, self.dtype, *tensors)
        owner.found(index, x)


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


def _generators():
    """The states of torch's generators, where they may be read."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        if torch.cuda.is_current_stream_capturing():
            return None
        return torch.get_rng_state(), torch.cuda.get_rng_state()
    return (torch.get_rng_state(),)


def _watch(mode, before):
    if before is not None and not mode.random:
        after = _generators()
        mode.random = len(after) != len(before) or not all(map(torch.equal, before, after))
