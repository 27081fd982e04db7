"""The same seed gives the same training curve on the fused kernels and in eager PyTorch, over 200 steps."""

import itertools

import pytest
import torch
from cases import kernels_run

from benchmarks import neutral_vae
from fastflow import backends, engine, vae

IMAGE, STEPS = (1, 8, 8), 200
MODELS = {"mlp": lambda: vae.MLPVAE(IMAGE, 4, (32,)),
          "conv": lambda: vae.ConvVAE(IMAGE, 4, (8, 16)),
          "ladder": lambda: vae.HVAE(IMAGE, (3, 5), 24),
          "hierarchical": lambda: vae.HVAE(IMAGE, (3, 5), 24, mode="residual")}
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 2e-2}  # relative, of the loss in nats


def images(n=256):
    """Bits that are easy to compress: disks."""
    generator = torch.Generator().manual_seed(1)
    centre, radius = 2.0 + 4.0 * torch.rand(n, 2, 1, 1, generator=generator), 1.0 + 2.0 * torch.rand(
        n, 1, 1, generator=generator)
    rows, columns = torch.arange(8.0)[:, None], torch.arange(8.0)
    inside = (rows - centre[:, 0]).square() + (columns - centre[:, 1]).square() < radius.square()
    return inside.float()[:, None]


def curve(build, backend, dtype):
    """Losses (STEPS,) of a run from one seed on a backend, the networks' matrix products in ``dtype``."""
    data = images()
    torch.manual_seed(0)
    model = build()
    step = engine.TrainStep(model, torch.optim.Adam(model.parameters(), lr=2e-3),
                            conditioner_dtype=None if dtype == torch.float32 else dtype)
    losses, order = [], torch.Generator().manual_seed(2)
    with backends.use_backend(backend):
        for _ in range(STEPS):
            losses.append(step(data[torch.randint(len(data), (32,), generator=order)]))
    return torch.stack(losses)


SLOW = (("ladder", torch.float32), ("ladder", torch.bfloat16), ("hierarchical", torch.bfloat16),
        ("conv", torch.bfloat16))


@pytest.mark.parametrize(("name", "dtype"), [
    pytest.param(*case, marks=pytest.mark.slow if case in SLOW else ())
    for case in itertools.product(MODELS, TOLERANCES)], ids=str)
def test_the_same_seed_gives_the_same_curve(name, dtype):
    fused, eager = (curve(MODELS[name], backend, dtype) for backend in (None, "reference"))
    gap = ((fused - eager) / eager).abs().max().item()
    assert gap <= TOLERANCES[dtype], gap
    assert eager[-20:].mean() < 0.7 * eager[:5].mean(), "nothing was learned: equal curves would say little"
    other = torch.roll(eager, 1)
    assert ((other - eager) / eager)[1:].abs().max() > TOLERANCES[dtype], "the tolerance would pass any curve"


def test_a_step_runs_on_the_kernels_and_the_reference_on_none():
    x = images(16)
    model = MODELS["hierarchical"]()
    ran = kernels_run(lambda: (-model(x).value.mean()).backward())
    assert ran == {f"fastflow_cpu::{op}_{way}" for op in ("wide_mlp", "top_down", "bernoulli_log_prob")
                   for way in ("fwd", "bwd")}
    model.levels[1].prior.register_forward_hook(lambda *call: None)  # this level runs by itself
    ran = kernels_run(lambda: (-model(x).value.mean()).backward())
    assert ran == {f"fastflow_cpu::{op}_{way}" for op in ("wide_mlp", "gaussian", "top_down", "bernoulli_log_prob")
                   for way in ("fwd", "bwd")}
    with backends.use_backend("reference"):
        assert not kernels_run(lambda: (-model(x).value.mean()).backward())


@pytest.mark.parametrize("name", ["mlp", "hierarchical", "iwae"])
def test_plain_pytorch_computes_the_same_bound_and_gradients(name):
    """The baseline of benchmarks.vae_speed, with equal weights and noise, in float64."""
    torch.manual_seed(0)
    model = vae.IWAE(IMAGE, 4, n_samples=5, sizes=(16,)) if name == "iwae" else MODELS[name]()
    model, x = model.double(), images(6).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if name == "hierarchical":
        eps = [torch.randn(1, 6, len(level.posterior[-1].bias) // 2, dtype=torch.float64) for level in model.levels]
        neutral, noise = neutral_vae.NeutralHierarchicalVAE(model), [e[0] for e in eps]
    else:
        eps = torch.randn(5 if name == "iwae" else 1, 6, 4, dtype=torch.float64)
        neutral = neutral_vae.NeutralVAE(model, 5 if name == "iwae" else None)
        noise = eps if name == "iwae" else eps[0]
    value, plain = model(x, eps=eps) if name != "iwae" else model(x, n_samples=5, eps=eps), neutral(x, eps=noise)
    torch.testing.assert_close(value.value, plain, rtol=1e-10, atol=1e-10)
    value.value.sum().backward()
    plain.sum().backward()
    norms = [torch.stack([p.grad.norm() for p in m.parameters() if p.grad is not None]).sort()[0]
             for m in (model, neutral)]
    torch.testing.assert_close(*norms, rtol=1e-9, atol=1e-9)
