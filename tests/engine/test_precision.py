"""Conditioners in bfloat16, everything else in float32."""

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastflow import flows, nn
from fastflow.engine import TrainStep
from fastflow.engine.precision import Conditioners, conditioners
from fastflow.vae import VAE, mlp_decoder, mlp_encoder


def glow(n_levels=2, n_steps=2):
    model = flows.Glow((3, 8, 8), n_levels, n_steps, hidden_channels=8)
    model.initialize(torch.rand(8, 3, 8, 8) - 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_z_and_logdet_stay_in_float32_and_close():
    model, x = glow(), torch.rand(4, 3, 8, 8) - 0.5
    z, logdet = model.transform(x)
    seen = []
    for module in conditioners(model):
        module.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    with Conditioners(model, torch.bfloat16)():
        low_z, low_logdet = model.transform(x)
    assert seen == [(torch.float32, torch.bfloat16)] * 5  # four couplings, one prior
    assert low_z.dtype == low_logdet.dtype == torch.float32
    assert 0 < (low_z - z).abs().max() < 0.05 and ((low_logdet - logdet) / 192).abs().max() < 5e-3
    again = model.transform(x)
    assert torch.equal(again[0], z) and torch.equal(again[1], logdet) and seen[-1][1] == torch.float32
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(("make", "count"), [
    (lambda: flows.NSF(4, n_layers=2, hidden=(8,)), 2), (lambda: nn.MixtureCoupling(nn.MLP(2, 52, (8,))), 1)])
def test_couplings_of_every_kind_have_conditioners(make, count):
    model = make()
    assert len(conditioners(model)) == count
    seen = []
    for module in conditioners(model):
        module.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    x = torch.randn(8, 4)
    expected = model(x)
    with Conditioners(model, torch.bfloat16)():
        low = model(x)
    assert seen == [torch.float32] * count + [torch.bfloat16] * count
    for a, b in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (low, expected)), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_only_conditioners_compute_in_bfloat16():
    class Products(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.dtypes = {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func._schema.name in ("aten::addmm", "aten::mm", "aten::bmm", "aten::convolution",
                                     "aten::convolution_backward", "fastflow_cpu::slogdet_fwd"):
                first = result[1] if isinstance(result, tuple) else result
                self.dtypes.setdefault(func._schema.name, set()).add(first.dtype)
            return result

    model = glow()
    step = TrainStep(model, torch.optim.Adam(model.parameters(), fused=True), conditioner_dtype=torch.bfloat16)
    with Products() as products:
        step(torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8))
    assert products.dtypes == {
        "aten::addmm": {torch.float32}, "aten::mm": {torch.float32}, "aten::bmm": {torch.float32},
        "fastflow_cpu::slogdet_fwd": {torch.float32}, "aten::convolution": {torch.bfloat16},
        "aten::convolution_backward": {torch.bfloat16}}


def test_training_stays_close_and_parameters_in_float32():
    model = glow()
    plain = copy.deepcopy(model)
    low = TrainStep(model, torch.optim.Adam(model.parameters(), 1e-3, fused=True), conditioner_dtype=torch.bfloat16)
    full = TrainStep(plain, torch.optim.Adam(plain.parameters(), 1e-3, fused=True))
    assert "5 conditioners under autocast to torch.bfloat16; parameters, z" in low.explain()
    assert "precision: torch.float32 throughout" in full.explain()
    x = torch.rand(8, 3, 8, 8) - 0.5
    for _ in range(10):
        a, b = low(x), full(x)
        assert a.dtype == torch.float32 and abs(a - b) / 192 < 0.02
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


def test_encoder_and_decoder_of_a_vae():
    model = VAE(mlp_encoder((1, 4, 4), 3, (8,)), mlp_decoder(3, (1, 4, 4), (8,)))
    step = TrainStep(model, torch.optim.Adam(model.parameters()), conditioner_dtype=torch.bfloat16)
    seen = []
    model.decoder.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    loss = step(torch.rand(5, 1, 4, 4))
    assert seen == [(torch.float32, torch.bfloat16)] and loss.dtype == torch.float32
    assert step.parts["rate"].dtype == torch.float32


def test_a_copy_made_during_training_is_a_model_of_its_own():
    model = glow()
    step = TrainStep(model, torch.optim.Adam(model.parameters()), conditioner_dtype=torch.bfloat16)
    step(torch.rand(4, 3, 8, 8))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not torch.equal(twin.transform.levels[0].steps[0].coupling.conditioner(torch.ones(1, 6, 4, 4)),
                           model.transform.levels[0].steps[0].coupling.conditioner(torch.ones(1, 6, 4, 4)))


@pytest.mark.parametrize("options", [{"conditioner_dtype": torch.bfloat16},
                                     pytest.param({"compile": "conditioners"}, marks=pytest.mark.slow)])
def test_a_copy_of_the_step_trains_a_model_of_its_own(options):
    model, x = glow(1, 1), torch.rand(4, 3, 8, 8)
    step = TrainStep(model, torch.optim.SGD(model.parameters(), 1e-3), **options)
    step(x)
    twin = copy.deepcopy(step)
    before = [p.detach().clone() for p in model.parameters()]
    loss = twin(x)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    torch.testing.assert_close(step(x), loss, rtol=0, atol=0)
    for p, q in zip(model.parameters(), twin.model.parameters(), strict=True):
        assert p is not q and torch.equal(p, q) and torch.equal(p.grad, q.grad)


def test_a_step_can_be_pickled():
    model, x = glow(), torch.rand(4, 3, 8, 8)
    step = TrainStep(model, torch.optim.SGD(model.parameters(), 1e-3), conditioner_dtype=torch.bfloat16)
    step(x)
    again = pickle.loads(pickle.dumps(step))
    torch.testing.assert_close(again(x), step(x), rtol=0, atol=0)


def test_a_forward_of_a_conditioner_s_own_stays():
    model, x, calls = glow(), torch.rand(4, 3, 8, 8), []
    conditioner = model.transform.levels[0].steps[0].coupling.conditioner
    usual = conditioner.forward

    def own(*args):
        calls.append(args[0].dtype)
        return usual(*args)

    early = TrainStep(model, torch.optim.SGD(model.parameters(), 1e-3), conditioner_dtype=torch.bfloat16)
    conditioner.forward = own
    for step in (early, TrainStep(model, torch.optim.SGD(model.parameters(), 1e-3), conditioner_dtype=torch.bfloat16)):
        calls.clear()
        step(x)
        assert calls and conditioner.forward is own
    calls.clear()
    model.log_prob(x)
    assert len(calls) == 1


def test_autocast_leaves_float64_as_it_is_and_explain_says_so():
    model = glow().double()
    step = TrainStep(model, torch.optim.SGD(model.parameters(), 1e-3), conditioner_dtype=torch.bfloat16)
    assert "precision: torch.float64 throughout, which autocast leaves" in step.explain()


@pytest.mark.gpu
def test_on_a_gpu():
    model = glow().cuda()
    step = TrainStep(model, torch.optim.Adam(model.parameters(), fused=True), conditioner_dtype=torch.bfloat16)
    x = torch.rand(4, 3, 8, 8, device="cuda") - 0.5
    loss = step(x)
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert all(p.dtype == torch.float32 for p in model.parameters())
