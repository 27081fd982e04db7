"""Captured steps in CUDA graphs on a GPU; test_capture.py shows the same things on a CPU with a stand-in."""

import pytest
import torch
from captured_steps import adam, glow, pair

from fastflow.engine import NonFiniteError, TrainStep
from fastflow.vae import VAE, mlp_decoder, mlp_encoder

pytestmark = pytest.mark.gpu


def same_losses(captured, eager, n_steps):
    for i in range(n_steps):
        x = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8, device="cuda")
        losses = []
        for step in (captured, eager):
            torch.manual_seed(i)
            losses.append(step(x))
        torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-2)


@pytest.fixture
def on_gpu():
    return glow().cuda()


@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 0.5, "ema_decay": 0.9}, {"accumulate": 2},
                                     {"conditioner_dtype": torch.bfloat16}])
def test_on_a_gpu_twenty_steps_equal_twenty_eager_ones(options):
    captured, eager = pair(options, lambda: glow().cuda())
    same_losses(captured, eager, 20)
    assert captured._steps.recorded == (2 if "accumulate" in options else 1)
    for a, b in zip(captured.model.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_on_a_gpu_every_replay_draws_fresh_noise(on_gpu):
    optimizer = torch.optim.SGD(on_gpu.parameters(), 0.0, fused=True)
    step = TrainStep(on_gpu, optimizer, capture=True)
    x = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8, device="cuda")
    assert len({step(x).item() for _ in range(12)}) == 12
    vae = VAE(mlp_encoder((1, 4, 4), 3, (8,)), mlp_decoder(3, (1, 4, 4), (8,))).cuda()
    step = TrainStep(vae, torch.optim.SGD(vae.parameters(), 0.0, fused=True), capture=True)
    x = torch.rand(4, 1, 4, 4, device="cuda")
    assert len({step(x).item() for _ in range(12)}) == 12


def test_on_a_gpu_a_batch_that_is_not_finite_is_skipped(on_gpu):
    step = TrainStep(on_gpu, adam(on_gpu), capture=True, ema_decay=0.9)
    x = torch.rand(4, 3, 8, 8, device="cuda") - 0.5
    for _ in range(5):
        step(x)
    before = [p.detach().clone() for p in (*on_gpu.parameters(), *step.ema.parameters.values())]
    steps = [s["step"].item() for s in step.optimizer.state.values()]
    step(x * float("nan"))
    with pytest.raises(NonFiniteError, match="the batch's x is not finite"):
        step(x)
    after = [*on_gpu.parameters(), *step.ema.parameters.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert steps == [s["step"].item() for s in step.optimizer.state.values()]
    assert torch.isfinite(step(x))


def test_on_a_gpu_the_schedule_is_seen(on_gpu):
    step = TrainStep(on_gpu, torch.optim.SGD(on_gpu.parameters(), 1e-3, fused=True), capture=True)
    x = torch.rand(4, 3, 8, 8, device="cuda") - 0.5
    for _ in range(5):
        step(x)
    step.optimizer.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in on_gpu.parameters()]
    step(x)
    assert all(torch.equal(a, b) for a, b in zip(before, on_gpu.parameters(), strict=True))
    step.optimizer.param_groups[0]["lr"] = 1e-3
    step(x)
    assert not all(torch.equal(a, b) for a, b in zip(before, on_gpu.parameters(), strict=True))
    assert step._steps.recorded == 1


def test_on_a_gpu_a_replay_does_not_wait(on_gpu):
    step = TrainStep(on_gpu, adam(on_gpu), capture=True, check_finite=False, clip_grad_norm=1.0, ema_decay=0.9)
    x = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8, device="cuda")
    for _ in range(4):
        step(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", [{"compile": "conditioners"},
                                     {"compile": "conditioners", "conditioner_dtype": torch.bfloat16}])
def test_on_a_gpu_compiled_conditioners_are_captured(options):
    captured, eager = pair(options, lambda: glow().cuda())
    eager = TrainStep(eager.model, eager.optimizer, conditioner_dtype=options.get("conditioner_dtype"))
    same_losses(captured, eager, 6)
    assert captured._steps.recorded == 1


def test_on_a_gpu_a_model_that_ran_before_is_captured(on_gpu):
    x = torch.rand(4, 3, 8, 8, device="cuda") - 0.5
    eager = TrainStep(on_gpu, adam(on_gpu))
    for _ in range(2):
        eager(x)
    step = TrainStep(on_gpu, adam(on_gpu), capture=True)
    for _ in range(5):
        step(x)
    assert step._steps.recorded == 1


def test_on_a_gpu_the_weight_of_the_rate_is_seen():
    """With nothing learnt the loss is distortion + beta * rate of the same batch and posterior at every replay."""
    vae = VAE(mlp_encoder((1, 4, 4), 3, (8,)), mlp_decoder(3, (1, 4, 4), (8,))).cuda()
    beta = torch.ones((), device="cuda")
    step = TrainStep(vae, torch.optim.SGD(vae.parameters(), 0.0, fused=True), capture=True, beta=beta)
    x = torch.rand(4, 1, 4, 4, device="cuda")
    for value in (1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 5.0):
        beta.fill_(value)
        loss = step(x)
        torch.testing.assert_close(loss, step.parts["distortion"] + value * step.parts["rate"])
    assert step._steps.recorded == 1
