"""Calls that try their ways once for each shape and keep to the fastest; the timing itself is a GPU's."""

import itertools
import threading

import pytest
import torch
from sweeps import rest_slow

from fastflow import backends, flows, measured, nn
from fastflow.flows import memory

KERNELS = 8  # forward and backward, but for the gradient of x
HIDDEN = 16  # fewer than Triton is worth on a GPU, for the interpreter's sake


@pytest.fixture
def timed(monkeypatch):
    """Conditioners go to Triton first, here in its interpreter; {way: seconds} to be set, and the calls made."""
    class Timed:
        seconds, calls, queued = {"triton": 1.0, "reference": 2.0}, [], None

    def seconds_of(calls, device, queued):
        for call in calls.values():
            call()
        Timed.calls.append(set(calls))
        Timed.queued = queued
        return {name: Timed.seconds[name] for name in calls}

    Timed.calls = []
    monkeypatch.setitem(backends.PREFERENCE, ("conv_net", "cpu"), ("triton",))
    monkeypatch.setattr(backends._state, "within_reach", {})
    monkeypatch.setattr(backends, "CONV_NET_HIDDEN", HIDDEN)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(measured, "_on_a_gpu", lambda x: True)
    monkeypatch.setattr(measured, "_capturing", lambda: False)
    monkeypatch.setattr(measured, "_found", {})
    monkeypatch.setattr(measured, "seconds_of", seconds_of)
    return Timed


def call(net, x):
    y = net(x)
    return y.detach(), torch.autograd.grad(y.square().sum(), list(net.parameters()))


def network():
    net = nn.ConvNet(2, 4, HIDDEN)
    torch.nn.init.normal_(net.conv3.weight, std=0.1)
    return net


@pytest.mark.parametrize("faster", ["triton", "reference"])
def test_the_faster_way_serves_a_shape_from_then_on(timed, launches, faster):
    timed.seconds = {"triton": 2.0, "reference": 2.0, faster: 1.0}
    net, x = network(), torch.randn(2, 2, 3, 3)
    with backends.use_backend("reference"):
        expected = call(net, x)
    with measured.trying(True):
        for _ in range(3):
            torch.testing.assert_close(call(net, x), expected, rtol=1e-4, atol=1e-4)
            assert timed.calls == [{"triton", "reference"}] and timed.queued is True
    assert len(launches) == (measured.WARM_UP + 1 + 3 * (faster == "triton")) * KERNELS
    line, = measured.report(torch.device("cpu"))
    assert line.startswith(f"conv_net of (2, 2, 3, 3) torch.float32 on {faster} (triton ") and "1000.000 ms" in line
    with measured.trying(True):
        call(net, torch.randn(3, 2, 3, 3))
    assert len(timed.calls) == 2
    with measured.trying(False):
        call(net, x)
    assert len(timed.calls) == 3 and timed.queued is False


def test_nothing_is_tried_elsewhere(timed, launches, monkeypatch):
    timed.seconds = {"triton": 2.0, "reference": 1.0}
    net, x = network(), torch.randn(2, 2, 3, 3)
    call(net, x)
    with measured.trying(False):
        with torch.no_grad():
            net(x)
        with backends.use_backend("triton"):
            call(net, x)
        monkeypatch.setattr(measured, "_capturing", lambda: True)
        call(net, x)
        monkeypatch.setattr(measured, "_capturing", lambda: False)
        with measured.paused():
            call(net, x)
    assert not timed.calls and launches.count("product_kernel") == 5 + 3 + 5 + 5 + 5
    with measured.trying(False):
        call(net, x)
        launches.clear()
        with torch.no_grad():  # which what was found serves too, if all else is equal
            net(x)
        monkeypatch.setattr(measured, "_capturing", lambda: True)
        call(net, x)
        call(net, x.as_strided(x.shape, (x[0].numel(), 1, 6, 2)).requires_grad_())  # as a run in backward may have it
    assert len(timed.calls) == 1 and not launches


def test_trying_leaves_the_pass_alone(timed):
    """Its gradients, and what hooks see of the tensors that it saves."""
    net, x = network(), torch.randn(2, 2, 3, 3)
    kinds = []
    for _ in range(2):
        saved = []
        with measured.trying(True), torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: saved.append((t.shape, t.dtype)) or t, lambda t: t):
            y = net(x)
        kinds.append(saved)
        y.sum().backward()
    assert kinds[0] == kinds[1] and len(timed.calls) == 1
    first = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    net(x).sum().backward()
    torch.testing.assert_close([2.0 * p.grad for p in net.parameters()], first)


@pytest.mark.parametrize(("mode", "faster"), rest_slow(
    itertools.product(("save_z", "invert"), ("triton", "reference")), [("invert", "reference")]))
def test_what_runs_again_in_backward_runs_as_it_did_in_forward(timed, mode, faster):
    """On a GPU in a thread of autograd's own, which knows of no context."""
    timed.seconds = {"triton": 2.0, "reference": 2.0, faster: 1.0}
    torch.manual_seed(0)
    flow, x = flows.Glow((2, 4, 4), 2, 1, HIDDEN), torch.rand(2, 2, 4, 4) - 0.5
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.01 * torch.randn_like(p))
    loss = flow.log_prob(x).sum()
    expected = torch.autograd.grad(loss, list(flow.parameters()))
    with measured.trying(False), memory.saving(memory.Mode(mode, flow)):
        loss, errors = flow.log_prob(x).sum(), []

        def backward():
            try:
                loss.backward()
            except RuntimeError as error:
                errors.append(error)

        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
    assert not errors and len(timed.calls) == 2
    torch.testing.assert_close([p.grad for p in flow.parameters()], list(expected), rtol=1e-3, atol=1e-3)


def test_a_way_that_triton_can_not_compile_is_left_out(timed):
    class Lacking(Exception):
        pass

    Lacking.__module__ = "triton.runtime.errors"

    def broken(x):
        raise Lacking("out of resource: shared memory")

    x = torch.ones(2, requires_grad=True)
    with measured.trying(False):
        with pytest.warns(RuntimeWarning, match="a call: triton does not run on this GPU and is left out .out of res"):
            assert measured.fastest("triton", (x,), {"triton": broken, "reference": torch.sin}, "a call") == "reference"
        assert timed.calls == [{"reference"}]
        with pytest.raises(ZeroDivisionError):
            measured.fastest("one", (x,), {"one": lambda x: 1 / 0, "other": torch.sin}, "another")
