"""Buffers that a forward changes, statistics and a codebook, are as untouched by a refused step as parameters."""

import copy

import pytest
import torch
from stand_in_models import Affine
from torch import nn

from fastflow import flows, vae
from fastflow.engine import NonFiniteError, TrainStep
from fastflow.engine.batch import Batch
from fastflow.engine.buffers import Buffers
from fastflow.engine.nonfinite import Replay, diagnose
from fastflow.vae import quantizers


class Normalized(Affine):
    """Batch normalisation in front of a flow, whose gradient is not finite where x has an element of exactly 7."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x, context=None):
        return super().forward(self.norm(x)) + ((x - 7 + self.shift * 0).abs().sqrt() * 0).flatten(1).sum(1)


class Rebinding(Affine):
    """Puts a new tensor in its buffer's place in every call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x, context=None):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return super().forward(x)


def quantized():
    flat = nn.Flatten()
    return vae.QuantizedVAE(nn.Sequential(flat, nn.Linear(4, 2)), vae.VectorQuantizer(3, 2, decay=0.9),
                            nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (1, 2, 2))),
                            vae.GaussianLikelihood("optimal"))


def levels(penalty):
    return vae.HVAE((1, 2, 2), (2, 2), 4, objective=vae.PenalizedELBO(penalty))


MODELS = {"batch norm": (Normalized, 7.0), "rebound": (Rebinding, float("nan")), "codebook": (quantized, float("inf")),
          "codebook, overflow": (quantized, 3e38)}


def good(n=4):
    return [torch.randn(6, 1, 2, 2) for _ in range(n)]


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("check", [True, "late"])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("at", [0, 2])
def test_training_goes_on_as_if_the_batch_had_not_been(name, check, parts, at):
    make, value = MODELS[name]
    model, batches, bad = make(), good(), torch.randn(6, 1, 2, 2)
    bad[1, 0, 1, 1] = value
    twin = copy.deepcopy(model)
    step, other = (TrainStep(m, torch.optim.Adam(m.parameters(), 0.01, fused=True), accumulate=parts,
                             check_finite=check) for m in (model, twin))
    for i, x in enumerate(batches):
        if i == at:
            before = state(model)
            with pytest.raises(NonFiniteError):
                for _ in range(parts):
                    step(bad)
                step.check()
            assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
        for part in x.chunk(parts):
            step(part)
            other(part)
        assert any(not torch.equal(t, before[key]) for key, t in model.state_dict().items()) if i >= at else True
    step.check()
    assert all(torch.equal(t, twin.state_dict()[key]) for key, t in model.state_dict().items())


def test_an_error_in_the_midst_of_a_step_changes_none(monkeypatch):
    model = Normalized()
    step = TrainStep(model, torch.optim.SGD(model.parameters(), 0.1), check_finite=False)
    step(good(1)[0])
    before = state(model)
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        step(good(1)[0])
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_masks_are_copied_once(monkeypatch):
    """What never changes costs a look at its version."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[1].register_buffer("mask", torch.ones(3, 3))
    buffers, copied = Buffers(model), []
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, source: copied.append(len(source)))
    for _ in range(3):
        buffers.keep()
        model(torch.randn(5, 3))
    assert copied == [3, 3, 3]


def test_a_diagnosis_changes_no_buffer_and_waits_for_no_process(monkeypatch):
    """The other processes may have found their batch at fault without a forward."""
    def refuse(*_, **__):
        raise AssertionError("a collective")

    monkeypatch.setattr(quantizers.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(quantizers.distributed, "all_reduce", refuse)
    for make in (quantized, Normalized, Rebinding, lambda: levels(vae.FreeBits(0.1)), lambda: levels(vae.KLBalance())):
        model = make()
        step = TrainStep(model, torch.optim.SGD(model.parameters(), 0.1))
        before = state(model)
        x = torch.full((6, 1, 2, 2), 3e38)
        what, _ = diagnose(model, step.objective, [Replay(Batch(x), torch.device("cpu"))])
        assert "not finite" in what
        assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
        assert all(module.training for module in model.modules())


def test_buffers_that_no_forward_changes_cost_nothing():
    """The probe of the first step included; each would be copied, and put back on the device's word, at every step."""
    model = flows.Glow((3, 16, 16), 2, 2, hidden_channels=8)
    step = TrainStep(model, torch.optim.Adam(model.parameters(), fused=True), check_finite="late")
    versions = [b._version for b in model.buffers()]
    for _ in range(3):
        step(torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8))
    assert versions == [b._version for b in model.buffers()] and not step._buffers._changed()
