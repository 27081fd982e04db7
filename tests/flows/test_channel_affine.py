"""Weight gradients that a size class computes together equal those that each layer computes for itself."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from fastflow.nn import ActNorm, InvertibleConv1x1, WeightBank
from fastflow.nn import channel_affine as channel_affine_module
from fastflow.nn.channel_affine import channel_affine
from fastflow.nn.factors import Factors, factorize, total_logabsdet


@pytest.fixture(autouse=True)
def deferred(monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(channel_affine_module, "DEFERRED_ON", {"cpu", "cuda"})


def layers(n=3, channels=4, actnorm=True):
    made = nn.ModuleList(InvertibleConv1x1(channels, "plu" if i == 1 else "plain",
                                           actnorm=ActNorm(channels) if actnorm else None) for i in range(n)).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def batch(*shape):
    x = torch.randn(*shape, dtype=torch.float64)
    return x.to(memory_format=torch.channels_last) if len(shape) == 4 else x


def apart(factors):
    """The factors without the ledger: each layer's gradients by its own products."""
    return [Factors(*factor[:3]) for factor in factors]


def through(factors, x, order):
    for index in order:
        x = torch.tanh(factors[index].apply(x))
    return (x * x).sum() + total_logabsdet(factors)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2), (1, 1, 0), (2, 0, 1), ()])
@pytest.mark.parametrize("shape", [(3, 4, 2, 2), (5, 4), (0, 4, 2, 2)])
@pytest.mark.parametrize("actnorm", [True, False])
@pytest.mark.parametrize("inverse", [False, True])
def test_equal_gradients_whichever_layers_run(order, shape, actnorm, inverse):
    model, x = layers(actnorm=actnorm), batch(*shape).requires_grad_()
    inputs = [x, *model.parameters()]
    grads = []
    for prepare in (list, apart):
        value = through(prepare(factorize(model, inverse)), x, order)
        grads.append(torch.autograd.grad(value, inputs, materialize_grads=True, allow_unused=True))
    assert all(torch.count_nonzero(g) for g in grads[0][1:]) or not actnorm or len(set(order)) < 3 or not x.numel()
    torch.testing.assert_close(*grads)


def test_layers_of_one_size_at_two_resolutions():
    model = layers(2)
    a, b = batch(2, 4, 4, 4), batch(3, 4, 2, 2)
    grads = []
    for prepare in (list, apart):
        first, second, _ = (*prepare(factorize(model)), None)
        value = first.apply(a).pow(3).sum() + second.apply(b).pow(3).sum() + second.apply(a).sum()
        grads.append(torch.autograd.grad(value, list(model.parameters()), allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(*grads)


def test_passes_that_want_no_weights_leave_nothing_behind():
    model, x = layers(), batch(3, 4, 2, 2).requires_grad_()
    factors = factorize(model)
    value = through(factors, x, (0, 1, 2))
    torch.autograd.grad(value, x, retain_graph=True)
    torch.autograd.grad(value, x, retain_graph=True)
    found = [torch.autograd.grad(value, list(model.parameters()), retain_graph=True) for _ in range(2)]
    assert factors[0].group.ledger.entries == []
    torch.testing.assert_close(*found)
    expected = torch.autograd.grad(through(apart(factorize(model)), x, (0, 1, 2)), list(model.parameters()))
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("inverse", [False, True])
def test_first_and_second_derivatives(inverse):
    model = layers(2, 3)
    parameters = tuple(p for p in model.parameters())
    x = batch(2, 3, 2, 1).requires_grad_()

    def function(x, *_):
        return through(factorize(model, inverse), x, (0, 1))

    assert gradcheck(function, (x, *parameters)) and gradgradcheck(function, (x, *parameters))


def test_batched_gradients():
    model, x = layers(2), batch(2, 4, 2, 2)
    y = factorize(model)[0].apply(x)
    cotangents = torch.randn(3, *y.shape, dtype=torch.float64)
    batched = torch.autograd.grad(y, model[0].weight, cotangents, is_grads_batched=True, retain_graph=True)[0]
    one = torch.stack([torch.autograd.grad(y, model[0].weight, c, retain_graph=True)[0] for c in cotangents])
    torch.testing.assert_close(batched, one)


def test_torch_func_takes_the_plain_way():
    model, x = layers(2), batch(2, 4, 2, 2)
    parameters = dict(model.named_parameters())

    def value(parameters):
        with torch.nn.utils.stateless._reparametrize_module(model, parameters):
            return through(factorize(model), x, (0, 1))

    expected = torch.autograd.grad(through(factorize(model), x, (0, 1)), list(parameters.values()))
    torch.testing.assert_close(list(torch.func.grad(value)(parameters).values()), list(expected))


@pytest.mark.parametrize("trainable", ["weight", "bias", "neither"])
def test_frozen_parameters(trainable):
    model, x = layers(3), batch(2, 4, 2, 2).requires_grad_()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable in name)
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    grads = [torch.autograd.grad(through(prepare(factorize(model)), x, (0, 1, 2)), inputs) for prepare in (list, apart)]
    torch.testing.assert_close(*grads)


def test_checkpointed_layers():
    model, x = layers(3), batch(2, 4, 2, 2).requires_grad_()
    factors = factorize(model)
    value = x
    for factor in factors:
        value = checkpoint(lambda v, f=factor: torch.tanh(f.apply(v)), value, use_reentrant=False)
    found = torch.autograd.grad((value * value).sum() + total_logabsdet(factors), [x, *model.parameters()])
    expected = torch.autograd.grad(through(apart(factorize(model)), x, (0, 1, 2)), [x, *model.parameters()])
    torch.testing.assert_close(found, expected)


def test_two_products_for_all_layers():
    """Backward multiplies once per layer, for the input; the weights' gradients come from one product."""
    model, x = layers(3, actnorm=False), batch(2, 4, 2, 2).requires_grad_()
    value = through(factorize(model), x, (0, 1, 2))
    with torch.profiler.profile() as profile:
        value.backward()
    names = [event.name for event in profile.events()]
    assert names.count("aten::mm") == 3 and names.count("aten::bmm") == 1
    assert not any("sum" in name for name in names if name.startswith("aten::")) or names.count("aten::sum") <= 2


def test_other_layouts_and_the_bank():
    model = layers(2)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    with WeightBank(model).factorized():
        first = model[0](x)[0]
        second = model[0](x.to(memory_format=torch.channels_last))[0]
    torch.testing.assert_close(first, second)
    assert second.is_contiguous(memory_format=torch.channels_last) and first.is_contiguous()
    torch.testing.assert_close(channel_affine(x, torch.eye(4).double(), None), x)
