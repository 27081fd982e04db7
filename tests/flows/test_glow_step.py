"""A step of Glow as one node of autograd: the same numbers as its two parts, and what it leaves to them."""

import copy

import pytest
import torch
from tolerances import GRADIENT_FACTOR, assert_by_ratio
from torch import nn

from fastflow import backends, flows
from fastflow.flows import glow as module
from fastflow.flows.links import ConvLink, CouplingLink
from fastflow.functional import ScaleMap
from fastflow.nn import ConvNet

OPTIONS = ({}, {"parametrization": "plu"}, {"scale": "additive"}, {"scale": "tanh", "layout": "interleave"},
           {"scale": ScaleMap.glow(), "order": "scale_shift", "shift_first": False})


def glow(dtype=torch.float32, shape=(3, 8, 8), **options):
    model = flows.Glow(shape, 2, 2, 16, **options).to(dtype)
    x = torch.rand(5, *shape, dtype=dtype) - 0.5
    model.initialize(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, x


def in_parts(step, factors, x, context, inverts):
    return ConvLink(step.conv, factors, with_logdet=False), CouplingLink(step.coupling, context)


def results(model, x, memory=None, keep=None):
    """log p(x) and the gradients of x and of all parameters that have one."""
    x = x.detach().requires_grad_(keep is None)
    with module.memory.saving(None if memory is None else module.memory.Mode(memory, model)):
        log_prob = model(x)
    (log_prob * torch.linspace(0.5, 2.0, len(log_prob), dtype=log_prob.dtype)).sum().backward()
    found = [log_prob.detach(), x.grad, *(p.grad for p in model.parameters())]
    model.zero_grad()
    return found


def nodes(tensor):
    """How many chains the graph of a tensor holds."""
    seen, stack = set(), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [after for after, _ in node.next_functions]
    return sum(node.name().startswith("ChainFunction") for node in seen)


def assert_as_accurate_as_the_parts(model, x, monkeypatch, memory=None):
    found = results(model, x, memory)
    with backends.use_backend("reference"):
        truth = results(copy.deepcopy(model).double(), x.double())
    monkeypatch.setattr(module, "links", in_parts)
    assert nodes(model(x)) == 0
    for values in zip(found, results(model, x, memory), truth, strict=True):
        assert_by_ratio(*values, factor=GRADIENT_FACTOR)


@pytest.mark.parametrize("memory", [None, "save_z"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_same_numbers_as_the_parts(options, dtype, memory, monkeypatch):
    model, x = glow(dtype, **options)
    assert nodes(model(x)) == 4
    assert_as_accurate_as_the_parts(model, x, monkeypatch, memory)


def test_gradients_asked_singly(monkeypatch):
    model, x = glow()
    wanted = results(model, x)
    wanted = dict(zip(["x", *(name for name, _ in model.named_parameters())], wanted[1:], strict=True))
    for alone in ("x", "transform.levels.0.steps.0.conv.weight", "transform.levels.0.steps.1.conv.actnorm.bias",
                  "transform.levels.1.steps.0.coupling.conditioner.conv2.bias",
                  "transform.levels.0.steps.0.coupling.conditioner.conv1.weight"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name == alone)
        found = results(model, x, keep=None if alone == "x" else False)
        got = dict(zip(["x", *(name for name, _ in model.named_parameters())], found[1:], strict=True))
        assert [name for name, grad in got.items() if grad is not None] == [alone]
        torch.testing.assert_close(got[alone], wanted[alone], rtol=2e-5, atol=2e-5)


def test_against_the_reference():
    model, x = glow(torch.float64)
    fused = results(model, x)
    with backends.use_backend("reference"):
        expected = results(model, x)
    for a, b in zip(fused, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_second_derivatives_and_batches_of_gradients():
    model, x = glow(torch.float64)
    step, x = model.transform.levels[0].steps[0], torch.randn(2, 12, 4, 4, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    factors = module.factorize([step.conv])[0]
    link, = module.links(step, factors, x, None, False)
    running = torch.randn(2, dtype=torch.float64, requires_grad=True)
    net = step.coupling.conditioner
    inputs = (x, running, *link.tensors, net.conv1.weight, net.conv3.bias)
    inputs = tuple(t.detach().requires_grad_() for t in inputs)

    def run(x, running, matrix, offset, weight, bias):
        link.network[0], link.network[-1] = weight, bias
        return link.forward(x, running, matrix, offset)

    assert torch.autograd.gradcheck(run, inputs, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def hooked(model):
    model.transform.levels[0].steps[0].coupling.register_forward_hook(lambda *_: None)


def hooked_convolution(model):
    model.transform.levels[0].steps[0].coupling.conditioner.conv2.register_forward_hook(lambda *_: None)


def subclassed(model):
    class Own(ConvNet):
        pass
    model.transform.levels[0].steps[0].coupling.conditioner.__class__ = Own


def other_method(model):
    conv = model.transform.levels[0].steps[0].conv
    conv.apply_factors = lambda x, factors: type(conv).apply_factors(conv, x, factors)


def other_dtype(model):
    model.transform.levels[0].steps[0].coupling.conditioner.double()


def other_bias(size):
    def change(model):
        model.transform.levels[0].steps[0].coupling.conditioner.conv3.bias = nn.Parameter(torch.zeros(size))
    return change


def other_device(model):
    model.transform.levels[0].steps[0].coupling.conditioner.to("meta")


@pytest.mark.parametrize(("change", "message"), [
    (other_dtype, "w1: expected torch.float32 like x|x: expected|params"), (other_bias(3), "b3: expected shape"),
    (other_bias(300), "b3: expected shape"), (other_device, "w1: expected device")])
def test_operands_that_do_not_fit_are_named_by_the_parts(change, message):
    model, x = glow()
    change(model)
    assert "1 not: its operands do not go together" in model.transform.explain(x)
    with pytest.raises((TypeError, ValueError), match=message):
        model(x)


class Wrapped(torch.Tensor):
    """A tensor of one's own, of which a kernel can't know what it means."""


def test_a_weight_of_a_class_of_its_own_reaches_the_parts():
    model, x = glow()
    expected = model(x).detach()
    conv = model.transform.levels[0].steps[0].conv
    conv.weight = nn.Parameter(conv.weight.detach().as_subclass(Wrapped))
    found = model(x)
    assert nodes(found) <= 2
    torch.testing.assert_close(found.detach().as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize(("change", "why"), [
    (hooked, "hooked or replaced"), (hooked_convolution, "hooked or replaced"), (subclassed, "no affine coupling with"),
    (other_method, "method of its own")])
def test_what_is_left_to_the_parts(change, why):
    model, x = glow()
    change(model)
    text = model.transform.explain(x)
    assert text.startswith("3 of 4 steps as one node of autograd; 1 not: ") and why in text
    assert nodes(model(x)) == 3


def test_requests_and_transforms_reach_the_parts():
    model, x = glow(torch.float64)
    with backends.use_backend("reference"):
        assert nodes(model(x)) == 0 and "0 of 4" in model.transform.explain(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert nodes(model(x)) == 0
    found = torch.func.grad(lambda x: model(x).sum())(x)
    expected, = torch.autograd.grad(model(x.requires_grad_()).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    context = flows.Glow((3, 8, 8), 1, 1, 16, context_features=2)
    assert "it has a context" in context.transform.explain(x.float(), torch.zeros(5, 2))


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch, monkeypatch):
    model, x = glow()
    assert_as_accurate_as_the_parts(model, x[:batch], monkeypatch)
