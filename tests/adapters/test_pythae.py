"""pythae's VAEs under accelerate: loss, sample and gradients of the latent head."""

import pytest
import torch
from adapter_checks import close, same, same_training

models = pytest.importorskip("pythae.models")

KINDS = {"VAE": models.VAEConfig, "BetaVAE": models.BetaVAEConfig, "VAE_LinNF": models.VAE_LinNF_Config,
         "VAE_IAF": models.VAE_IAF_Config, "IWAE": models.IWAEConfig}


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
    model = build(kind, "bce" if kind in ("VAE", "IWAE") else "mse").to(dtype)
    same(model.eval(), (run,), [x], 1)


@pytest.mark.parametrize("kind", ["BetaVAE", "VAE_IAF", "IWAE"])
def test_training(kind):
    x = torch.rand(8, 1, 3, 3, dtype=torch.float64)
    torch.manual_seed(0)
    same_training(build(kind), lambda m: run(m, x)[0])


def test_published_example(tmp_path):
    """The README's training pipeline, unchanged but for one line; a trained model is saved and loads as the host's."""
    from pythae import trainers
    from pythae.pipelines import TrainingPipeline

    import fastflow

    data, found = torch.rand(60, 1, 3, 3, generator=torch.Generator().manual_seed(1)), []
    for one_line in (lambda model: None, fastflow.accelerate):
        torch.manual_seed(0)
        config = trainers.BaseTrainerConfig(output_dir=str(tmp_path), num_epochs=3, learning_rate=1e-3,
                                            per_device_train_batch_size=20, per_device_eval_batch_size=20,
                                            optimizer_cls="Adam", no_cuda=True, keep_best_on_train=True)
        model = build("VAE")
        one_line(model)
        TrainingPipeline(training_config=config, model=model)(train_data=data, eval_data=data[:20])
        found.append(model)
    last = max(tmp_path.glob("VAE_training_*"))
    loaded = models.AutoModel.load_from_folder(str(last / "final_model"))
    assert type(loaded) is models.VAE and type(found[1]).__module__ == "fastflow.adapters.pythae"
    for got, want, again in zip(found[1].parameters(), found[0].parameters(), loaded.parameters(), strict=True):
        close(got, want, 1e-4)
        close(again, got, 1e-6)
