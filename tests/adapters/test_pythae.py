"""pythae's VAEs under accelerate: loss, sample and gradients of the latent head."""

import pytest
import torch
from adapter_checks import same, same_training

models = pytest.importorskip("pythae.models")

KINDS = {"VAE": models.VAEConfig, "BetaVAE": models.BetaVAEConfig, "VAE_LinNF": models.VAE_LinNF_Config,
         "VAE_IAF": models.VAE_IAF_Config}


def build(kind, loss="mse"):
    return getattr(models, kind)(KINDS[kind](input_dim=(1, 3, 3), latent_dim=4, reconstruction_loss=loss))


def run(model, x):
    torch.manual_seed(5)
    out = model({"data": x})
    return out.loss, out.recon_loss, out.reg_loss, out.recon_x, out.z


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients(kind, dtype):
    torch.manual_seed(0)
    x = torch.rand(6, 1, 3, 3, dtype=dtype)
    model = build(kind, "bce" if kind == "VAE" else "mse").to(dtype)
    same(model.eval(), (run,), [x], 1)


@pytest.mark.parametrize("kind", ["BetaVAE", "VAE_IAF"])
def test_training(kind):
    x = torch.rand(8, 1, 3, 3, dtype=torch.float64)
    torch.manual_seed(0)
    same_training(build(kind), lambda m: run(m, x)[0])
