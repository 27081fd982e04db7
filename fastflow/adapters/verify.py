"""A swapped layer held against its original: same call, on copies, outputs and gradients compared."""

import contextlib
import copy as copylib
import threading
import types
import warnings

import torch

from fastflow import backends

__all__ = ["NO_TEST", "difference", "running", "tensors", "warn"]

NO_TEST = object()  # a call that proves nothing: it raises, or its tensors hold no values
# Largest error, relative to 1 + the largest value of the tensor, that needs no arbitration in float64: rounding that
# carries a value over the kink of a ReLU or the knot of a spline changes single gradients by more.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
EXACT, COARSE = 1e-8, 2e-2  # then: largest error of float64, and of the own dtype in the 2-norm
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs",
         "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


class _State(threading.local):
    running = False


_state = _State()


def running():
    """Whether a layer is being verified now, so that it takes its fused form however small the call is."""
    return _state.running


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

    Both directions run where there are two, each with the gradients of all arguments and parameters. Where float32
    results differ by more than 1e-5, float64 copies of both decide: they agree to 1e-8, and the float32 ones to 2%.
    Where the original is not finite anything goes. Neither the layer nor the random generators notice.
    """
    operands = [*tensors(args), *tensors(kwargs), *module.parameters(), *module.buffers()]
    if (not operands or backends.needs_reference(operands) is not None
            or any(isinstance(t, torch._subclasses.FakeTensor) or t.is_meta for t in operands)):
        return NO_TEST
    trial = _Trial(module, known)
    with _isolated(operands[0].device):
        try:
            result, _ = trial.run(True, method, args, kwargs)
        except Exception:  # the real call will raise it
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
        self.random = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self.device = device

    def run(self, original, method, args, kwargs, double=False):
        """(result, tensors to judge it by) of a call on a copy, the latter with gradients of all that goes in."""
        torch.set_rng_state(self.random[0])
        if self.random[1] is not None:
            torch.cuda.set_rng_state(self.random[1], self.device)
        copy, leaves = _replica(self.module, original, double, {}), []
        args, kwargs = _inputs(args, double, leaves), _inputs(kwargs, double, leaves)
        result = getattr(copy, method)(*args, **kwargs)
        outputs = [t for t in self.known.observe(copy, result, args) if t.is_floating_point()]
        leaves += [p for p in copy.parameters() if p.requires_grad]
        losses = [(t * _weights(t)).sum() for t in outputs if t.requires_grad]
        grads = torch.autograd.grad(sum(losses), leaves, allow_unused=True) if losses and leaves else ()
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads, strict=False)]
        return _map(result, torch.Tensor.detach), [t.detach() for t in (*outputs, *grads)]

    def compare(self, method, args, kwargs):
        try:
            _, want = self.run(True, method, args, kwargs)
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
        if all(e <= TOLERANCE[w.dtype] for e, w in zip(errors, want, strict=True)):
            return None
        try:
            _, exact = self.run(True, method, args, kwargs, double=True)
            _, double = self.run(False, method, args, kwargs, double=True)
        except Exception:  # a layer of float32 alone
            return f"{method} differs by {max(errors):.1e}"
        for g, w, d, e in zip(got, want, double, exact, strict=True):
            error = _error(d, e)
            if not error <= EXACT:
                return f"{method} differs by {error:.1e} in float64"
            coarse = _error(g.double(), e, torch.linalg.vector_norm)
            if not coarse <= COARSE + 4.0 * _error(w.double(), e, torch.linalg.vector_norm):
                return f"{method} differs by {coarse:.1e} in {w.dtype}"
        return None


def _largest(t):
    return t.abs().max()


def _error(got, want, norm=_largest):
    """The norm of the difference where ``want`` is finite, relative to 1 + the norm of ``want``."""
    finite = torch.isfinite(want)
    if not finite.any():
        return 0.0
    want = torch.where(finite, want, 0.0)
    error = norm(torch.where(finite, got, 0.0) - want) / (1.0 + norm(want))
    return float(torch.nan_to_num(error, nan=torch.inf))


def _weights(output):
    """Numbers that a sum of outputs is weighted by, so that no two elements are exchangeable."""
    steps = torch.arange(output.numel(), dtype=torch.float64, device=output.device)
    return torch.cos(0.7 * steps + 0.3).to(output.dtype).view(output.shape)


def _inputs(value, double, leaves):
    """A copy of the arguments, whose floating tensors are functions of new leaves."""
    def copy(t):
        t = t.detach().clone()
        if not t.is_floating_point():
            return t
        leaves.append((t.double() if double else t).requires_grad_())
        return leaves[-1].clone()
    return _map(value, copy)


def _map(value, function):
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(item, function) for key, item in value.items()}
    return type(value)(_map(item, function) for item in value) if type(value) in (tuple, list) else value


def _replica(module, original, double, memo):
    """A copy of the module with tensors of its own and without hooks; swapped layers in it are all their originals, or
    all fused."""
    if id(module) in memo:
        return memo[id(module)]
    known = getattr(type(module), "_fastflow_swap", None)
    kind = type(module) if known is None else known.host if original else known.fused
    memo[id(module)] = copy = kind.__new__(kind)
    copy.__dict__.update((key, _shallow(value, module, copy)) for key, value in module.__dict__.items())

    def own(t):
        if t is None:
            return None
        if id(t) not in memo:
            new = t.detach().clone()
            new = new.double() if double and t.is_floating_point() else new
            memo[id(t)] = torch.nn.Parameter(new, t.requires_grad) if isinstance(t, torch.nn.Parameter) else new
        return memo[id(t)]

    copy.__dict__["_parameters"] = {name: own(t) for name, t in module._parameters.items()}
    copy.__dict__["_buffers"] = {name: own(t) for name, t in module._buffers.items()}
    copy.__dict__["_modules"] = {name: None if m is None else _replica(m, original, double, memo)
                                 for name, m in module._modules.items()}
    for name in HOOKS:
        copy.__dict__[name] = type(module.__dict__[name])()
    return copy


def _shallow(value, module, copy):
    """A copy of a plain object that a layer keeps, a cache or a list, into which the copied layer may write; a method
    of the layer itself becomes the copy's."""
    if isinstance(value, types.MethodType) and value.__self__ is module:
        return types.MethodType(value.__func__, copy)
    plain = hasattr(value, "__dict__") and not isinstance(value, (torch.Tensor, torch.nn.Module, type)) \
        and not callable(value)
    return copylib.copy(value) if plain or type(value) in (list, dict) else value


@contextlib.contextmanager
def _isolated(device):
    """Gradients on, autocast off, the state of the random generators put back at the end."""
    devices = [device] if device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in {"cpu", device.type}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        _state.running = True
        try:
            yield
        finally:
            _state.running = False
