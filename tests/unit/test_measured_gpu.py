"""What is tried on a GPU: both ways are timed, and the faster one serves."""

import pytest
import torch

from fastflow import backends, measured, nn
from fastflow.engine import TrainStep
from fastflow.flows import Glow

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def tf32(full_precision, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(measured, "_found", {})


@pytest.mark.parametrize("queued", [False, True])
def test_both_ways_are_timed(queued):
    net, x = nn.ConvNet(6, 12, 128).cuda(), torch.randn(4, 6, 16, 16, device="cuda")
    torch.nn.init.normal_(net.conv3.weight, std=0.1)
    with measured.trying(queued):
        y = net(x)
    (name, seconds), = measured._found.values()
    assert set(seconds) == {"triton", "reference"} and all(1e-6 < s < 1.0 for s in seconds.values())
    assert name == min(seconds, key=seconds.get)
    with backends.use_backend(name):
        torch.testing.assert_close(y, net(x), rtol=0, atol=0)


@pytest.mark.parametrize("capture", [False, True])
def test_a_training_step_tries_and_says_so(capture, monkeypatch):
    model = Glow((3, 16, 16), 2, 2, 128).cuda()
    x = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8, device="cuda")
    model.initialize(x / 256.0 - 0.5)
    step = TrainStep(model, torch.optim.Adam(model.parameters(), fused=True), capture=capture)
    losses = [step(x).item() for _ in range(6)]
    assert losses[-1] < losses[0]
    assert step.explain().count("conv_net of (8, ") == 2  # a level each
    measured._found.clear()
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    TrainStep(model, torch.optim.Adam(model.parameters(), fused=True))(x)
    assert not measured._found
