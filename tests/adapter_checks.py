"""A model beside its accelerated copy: the same outputs, gradients, training steps and saved forms."""

import copy
import itertools
import pickle
import warnings
from unittest import mock

import torch

import fastflow
from fastflow.adapters import layers as adapter_layers
from fastflow.adapters.swap import swap_of

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def close(got, want, tolerance):
    """The largest difference is within ``tolerance`` of 1 + the largest value."""
    got, want = torch.as_tensor(got), torch.as_tensor(want)
    assert got.shape == want.shape and got.dtype == want.dtype
    error = (got.detach() - want.detach()).abs().max() if want.numel() else torch.zeros(())
    limit = tolerance * (1 + want.detach().abs().max()) if want.numel() else tolerance
    assert error <= limit, f"{error:.1e} over {limit:.1e}"


def close_or_truer(got, want, truth, tolerance):
    """Close to ``want``, or no further from the float64 ``truth`` than the tolerance and twice what ``want`` is: the
    host's own rounding in float32 is about the tolerance, or more, where a spline is steep or a sum cancels."""
    try:
        close(got, want, tolerance)
    except AssertionError:
        own, error = ((t.detach().double() - truth.detach()).abs().max() for t in (want, got))
        limit = 2 * own + tolerance * (1 + truth.detach().abs().max())
        assert error <= limit, f"{error:.1e} from the truth, the original {own:.1e}"


def scattered(model, size=0.2):
    """No parameter is zero: a layer that starts as the identity would prove nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
    return model


def accelerated(model, **options):
    """A copy of the model, accelerated, and the report. Verification that puts a layer back is an error."""
    fused = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        return fused, fastflow.accelerate(fused, **options)


def flat(value):
    """The tensors and numbers in nested tuples and lists."""
    return [t for item in value for t in flat(item)] if isinstance(value, (tuple, list)) else [value]


def gradients(model, call, inputs):
    """Outputs of call(model, *inputs) and gradients of inputs and parameters."""
    inputs = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    outputs = flat(call(model, *inputs))
    loss = sum((torch.as_tensor(t) * torch.linspace(0.5, 1.5, torch.as_tensor(t).numel(), dtype=inputs[0].dtype)
                .view(torch.as_tensor(t).shape)).sum() for t in outputs)
    leaves = [t for t in (*inputs, *model.parameters()) if t.requires_grad]
    return outputs, torch.autograd.grad(loss, leaves, allow_unused=True)


def same(model, calls, inputs, layers):
    """Every call of the accelerated copy gives the original's outputs and gradients, in the first round, which verifies
    and takes kernels however small the data, and in the second; ``layers`` of its layers are swapped, and restore gives
    back the classes.

    Args:
        calls: functions (model, *inputs) -> tensors or numbers, possibly nested.
    """
    fused, report = accelerated(model)
    double = copy.deepcopy(model).double()
    assert len(report.swapped) == layers, str(report)
    tolerance = TOLERANCE[inputs[0].dtype]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for small, call in itertools.product((0, adapter_layers.SMALL), calls):
            with mock.patch.object(adapter_layers, "SMALL", small):
                found = [gradients(m, call, inputs) for m in (model, fused)]
            truth = gradients(double, call, [t.double() for t in inputs])
            (want, want_grads), (got, got_grads) = found
            for g, w, t in zip((*got, *got_grads), (*want, *want_grads), (*truth[0], *truth[1]), strict=True):
                assert (g is None) == (w is None)
                if w is not None:
                    close_or_truer(g, w, t, tolerance)
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert list(fused.state_dict()) == list(model.state_dict())
    names = [name for name, module in fused.named_modules() if swap_of(module) is not None]
    assert fastflow.restore(fused) == names and len(names) == layers
    assert [type(m) for m in fused.modules()] == [type(m) for m in model.modules()]
    return report


def same_training(model, loss, steps=3, tolerance=1e-9):
    """Three steps of Adam in float64 give the same parameters, in a copy that was pickled on the way."""
    fused, _ = accelerated(model.double())
    fused = pickle.loads(pickle.dumps(fused))
    for m in (model, fused):
        optimizer = torch.optim.Adam(m.parameters(), 1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(m).backward()
            optimizer.step()
    for got, want in zip(fused.parameters(), model.parameters(), strict=True):
        close(got, want, tolerance)
