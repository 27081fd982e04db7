"""A swapped layer held against its original: same call, on copies, outputs and gradients compared."""

import contextlib
import copy as copylib
import functools
import threading
import types
import warnings

import torch

from fastflow import backends

__all__ = ["NO_TEST", "difference", "is_plain", "modes", "recorded", "running", "tensors", "warn"]

# A call that proves nothing: it raises, not all of its numbers are finite, or operations are recorded.
NO_TEST = object()
# Largest error, relative to 1 + the largest value of the tensor.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Where it is larger, what rounding does to the original is the measure: how far it is from its own result in float64,
# and how far it goes when arguments and parameters move by some units in the last place, be it badly conditioned or a
# value at the kink of a ReLU, whose gradient jumps. So many times are they moved, by so many units, and the error may
# be so many times the largest of the changes.
TRIALS, UNITS, MARGIN = 8, 4.0, 4.0
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs",
         "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


class _State(threading.local):
    running = False


_state = _State()


def running():
    """Whether a layer is being verified now, so that it takes its fused form however small the call is."""
    return _state.running


def recorded():
    """Whether saved tensors or single operations are recorded now, as activation checkpointing does."""
    return not torch.compiler.is_compiling() and bool(
        modes() or torch._C._autograd._top_saved_tensors_default_hooks(False))


def modes():
    """How many dispatch modes see single operations, as those of make_fx and of FLOP counters do."""
    return torch._C._len_torch_dispatch_stack()


def tensors(value):
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    return [t for item in value for t in tensors(item)] if isinstance(value, (tuple, list, type({}.values()))) else []


def warn(host, reason):
    """Tell that a layer became its original again."""
    warnings.warn(f"a {host.__module__}.{host.__name__} keeps its original form: {reason}", RuntimeWarning,
                  stacklevel=4)


def difference(module, known, method, args, kwargs):
    """In what ``module`` differs from its original in this call, None if it does not, or NO_TEST.

    Both directions run where there are two, each with the gradients of all arguments and parameters. They agree to 1e-5
    in float32 and 1e-10 in float64, relative to 1 + the largest value of a tensor, or to a small multiple of what
    rounding changes in the original. Where the original is not finite anything goes.
    Neither the layer nor the random generators notice.
    """
    operands = [*tensors(args), *tensors(kwargs), *module.parameters(), *module.buffers()]
    if (not operands or modes() or torch.jit.is_tracing() or backends.needs_reference(operands) is not None
            or any(isinstance(t, torch._subclasses.FakeTensor) or t.is_meta for t in operands)):
        return NO_TEST
    trial = _Trial(module, known)
    with _isolated(operands[0].device):
        try:
            result, _ = trial.run(True, method, args, kwargs)
        except Exception:  # the real call will raise it
            return NO_TEST
        if _blank((args, kwargs)) or _blank(result):
            return NO_TEST
        reason = trial.compare(method, args, kwargs)
        other = known.opposite(method, args, kwargs, result)
        if reason is None and other is not None:
            reason = trial.compare(*other)
    return reason


class _Trial:
    def __init__(self, module, known):
        self.module, self.known = module, known
        device = next(iter([*module.parameters(), *module.buffers()]), torch.empty(0)).device
        self.device = device
        self.random = self.generators()

    def generators(self):
        """The states of the random generators."""
        return torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None

    def draws(self):
        """Whether the call that ran last drew random numbers."""
        return not all(now is was or torch.equal(now, was)
                       for now, was in zip(self.generators(), self.random, strict=True))

    def run(self, original, method, args, kwargs, change=lambda t, leaf: t):
        """(result, tensors to judge it by) of a call on a copy, the latter with gradients of all that goes in.
        change(t, leaf) is put for every floating tensor that goes in, leaf: whether it has a gradient."""
        torch.set_rng_state(self.random[0])
        if self.random[1] is not None:
            torch.cuda.set_rng_state(self.random[1], self.device)
        copy, leaves = _replica(self.module, original, change, {}), []
        args, kwargs = _inputs(args, change, leaves), _inputs(kwargs, change, leaves)
        result = getattr(type(copy), method)(copy, *args, **kwargs)  # an attribute may wrap that of the layer itself
        given = (*args, *kwargs.values())
        outputs = [t for t in self.known.observe(copy, result, given) if t.is_floating_point()]
        leaves += [p for p in copy.parameters() if p.requires_grad]
        losses = [(t * _weights(t)).sum() for t in outputs if t.requires_grad]
        grads = torch.autograd.grad(sum(losses), leaves, allow_unused=True) if losses and leaves else ()
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads, strict=False)]
        return _map(result, torch.Tensor.detach), [t.detach() for t in (*outputs, *grads)]

    def compare(self, method, args, kwargs):
        try:
            _, want = self.run(True, method, args, kwargs)
            draws = self.draws()
        except Exception:  # the host can't do this
            return None
        try:
            _, got = self.run(False, method, args, kwargs)
        except Exception as error:
            return f"{method} raises {type(error).__name__}: {error}"
        if len(got) != len(want) or any(g.shape != w.shape or g.dtype != w.dtype
                                        for g, w in zip(got, want, strict=True)):
            return f"{method} returns other shapes or dtypes"
        errors = [_error(g, w) for g, w in zip(got, want, strict=True)]
        allowed, random = [TOLERANCE[w.dtype] for w in want], torch.Generator().manual_seed(0)
        for trial in range(int(draws), 1 + TRIALS):  # other numbers are drawn in float64
            if all(e <= a for e, a in zip(errors, allowed, strict=True)):
                return None
            try:
                _, other = self.run(True, method, args, kwargs, functools.partial(_moved, random) if trial else _double)
            except Exception:  # a layer of float32 alone, or moved out of where it is defined
                continue
            changes = [MARGIN * _error(o, w.to(o.dtype)) for o, w in zip(other, want, strict=True)]
            allowed = [max(a, TOLERANCE[w.dtype] + c) if c < float("inf") else a
                       for a, c, w in zip(allowed, changes, want, strict=True)]
        worst = max((e for e, a in zip(errors, allowed, strict=True) if not e <= a), default=None)
        return None if worst is None else f"{method} differs by {worst:.1e}"


def _error(got, want):
    """The largest difference where ``want`` is finite, relative to 1 + the largest of ``want``."""
    finite = torch.isfinite(want)
    if not finite.any():
        return 0.0
    want = torch.where(finite, want, 0.0)
    error = (torch.where(finite, got, 0.0) - want).abs().max() / (1.0 + want.abs().max())
    return float(torch.nan_to_num(error, nan=torch.inf))


def _blank(values):
    """Whether the values have numbers that are not finite, which a host may hide where the fused form propagates them,
    or none at all in their tensors."""
    numbers = [t for t in tensors(values) if t.is_floating_point()]
    return bool(numbers) and (not any(t.numel() for t in numbers)
                              or not all(torch.isfinite(t).all() for t in numbers))


def _itself(t):
    return t


def _double(t, leaf):
    return t.double()


def _moved(random, t, leaf):
    """Each element of a leaf moved by UNITS units in the last place, up or down as the generator says."""
    if not leaf:
        return t
    signs = torch.randint(2, t.shape, generator=random, dtype=torch.int8).to(t.device, t.dtype) * 2 - 1
    return t * (1 + UNITS * torch.finfo(t.dtype).eps * signs)


def _weights(output):
    """Numbers that a sum of outputs is weighted by, so that no two elements are exchangeable."""
    steps = torch.arange(output.numel(), dtype=torch.float64, device=output.device)
    return torch.cos(0.7 * steps + 0.3).to(output.dtype).view(output.shape)


def _inputs(value, change, leaves):
    """A copy of the arguments, whose floating tensors, changed, are functions of new leaves."""
    def copy(t):
        t = t.detach().clone()
        if not t.is_floating_point():
            return t
        leaves.append(change(t, True).requires_grad_())
        return leaves[-1].clone()
    return _map(value, copy)


def _map(value, function):
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(item, function) for key, item in value.items()}
    return type(value)(_map(item, function) for item in value) if type(value) in (tuple, list) else value


def _replica(module, original, change, memo):
    """A copy of the module with tensors of its own and without hooks; swapped layers in it are all their originals, or
    all fused."""
    if id(module) in memo:
        return memo[id(module)]
    kind, known = type(module), getattr(type(module), "_fastflow_swap", None)
    if known is not None:
        kind = known.within(kind, known.host if original else known.fused)
    memo[id(module)] = copy = object.__new__(kind)  # what torch puts above a class where it shards it has another way
    copy.__dict__.update((key, _shallow(value, module, copy)) for key, value in module.__dict__.items())

    def own(t):
        if t is None:
            return None
        if id(t) not in memo:
            new = t.detach().clone()
            new = change(new, t.requires_grad) if t.is_floating_point() else new
            memo[id(t)] = torch.nn.Parameter(new, t.requires_grad) if isinstance(t, torch.nn.Parameter) else new
        return memo[id(t)]

    copy.__dict__["_parameters"] = {name: own(t) for name, t in module._parameters.items()}
    copy.__dict__["_buffers"] = {name: own(t) for name, t in module._buffers.items()}
    copy.__dict__["_modules"] = {name: None if m is None else _replica(m, original, change, memo)
                                 for name, m in module._modules.items()}
    for name in HOOKS:
        copy.__dict__[name] = type(module.__dict__[name])()
    return copy


def _shallow(value, module, copy):
    """A copy of a plain object that a layer keeps, a cache or a list, into which the copied layer may write; a method
    of the layer itself becomes the copy's."""
    if isinstance(value, types.MethodType) and value.__self__ is module:
        return types.MethodType(value.__func__, copy)
    return copylib.copy(value) if is_plain(value) or type(value) in (list, dict) else value


def is_plain(value):
    """Whether it is an object with attributes and nothing special, such as a cache."""
    return (hasattr(value, "__dict__") and not callable(value)
            and not isinstance(value, (torch.Tensor, torch.nn.Module, types.ModuleType)))


@contextlib.contextmanager
def _isolated(device):
    """Gradients on, autocast and hooks on saved tensors off, the state of the random generators put back at the end."""
    devices = [device] if device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch._C._autograd._top_saved_tensors_default_hooks(False):  # activation checkpointing counts what is saved
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_itself, _itself))
        for kind in {"cpu", device.type}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        _state.running = True
        try:
            yield
        finally:
            _state.running = False
