"""A training step of Glow against the same model in plain eager PyTorch, equal weights and the same fused Adam."""

import torch

from benchmarks.cases import Case
from benchmarks.neutral_glow import NeutralGlow, load_weights
from fastflow import flows


def models(n_levels=3, n_steps=8, hidden_channels=64, image_shape=(3, 32, 32), device="cpu", seed=0):
    """(fastflow's Glow, the neutral one), initialised on noise, equal weights, none of them zero."""
    torch.manual_seed(seed)
    fused = flows.Glow(image_shape, n_levels, n_steps, hidden_channels).to(device)
    fused.initialize(torch.rand(32, *image_shape, device=device) - 0.5)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    neutral = NeutralGlow(image_shape, n_levels, n_steps, hidden_channels).to(device)
    load_weights(neutral, fused)
    return fused, neutral


def _training_step(model, x):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5, fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = -model(x).mean()
        loss.backward()
        optimizer.step()
    return step


def _glow(n_steps, hidden_channels, batch):
    def build(device):
        fused, neutral = models(n_steps=n_steps, hidden_channels=hidden_channels, device=device)
        x = torch.rand(batch, 3, 32, 32, device=device) - 0.5
        return {"fastflow": _training_step(fused, x), "eager": _training_step(neutral, x)}
    name = f"Glow training step, 3 levels x {n_steps} steps, {hidden_channels} hidden channels, batch {batch}, 3x32x32"
    return Case(name, "glow", build, ("fastflow", "eager"))


CASES = (_glow(8, 64, 32), _glow(8, 128, 32))
