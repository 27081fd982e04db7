"""pythae's VAEs under accelerate: loss, sample and gradients of the latent head and of its own networks."""

import copy
import threading

import pytest
import torch
from adapter_checks import close, same, same_training
from cases import kernels_run
from torch import nn

import fastflow
from fastflow import backends

models = pytest.importorskip("pythae.models")

KINDS = {"VAE": models.VAEConfig, "BetaVAE": models.BetaVAEConfig, "VAE_LinNF": models.VAE_LinNF_Config,
         "VAE_IAF": models.VAE_IAF_Config, "IWAE": models.IWAEConfig}


@pytest.fixture(autouse=True)
def own_products(monkeypatch):
    """Networks are swapped whatever the processor is that the tests run on."""
    monkeypatch.setattr(backends, "own_products", lambda: True)


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
    same(model.eval(), (run,), [x], 3)


def test_threads_call_one_model_in_half_precision():
    """A decoder that waits for the other thread's, in every call, with the encoder of neither put into the model."""
    torch.manual_seed(0)
    model = build("VAE").eval().to(torch.bfloat16)
    data = [torch.full((4, 1, 3, 3), float(i), dtype=torch.bfloat16) for i in range(2)]
    want, found, barrier = [model({"data": x}).reg_loss for x in data], [None, None], threading.Barrier(2, timeout=30)
    fastflow.accelerate(model, verify=False)
    encoder = model.encoder

    def meet(*call):
        barrier.wait()

    model.encoder.register_forward_hook(meet)
    model.decoder.register_forward_pre_hook(meet)

    def work(i):
        found[i] = model({"data": data[i]}).reg_loss

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert model.encoder is encoder
    for got, expected in zip(found, want, strict=True):
        close(got, expected, 1e-2)


@pytest.mark.parametrize("kind", ["BetaVAE", "VAE_IAF", "IWAE"])
def test_training(kind):
    x = torch.rand(8, 1, 3, 3, dtype=torch.float64)
    torch.manual_seed(0)
    same_training(build(kind), lambda m: run(m, x)[0])


def test_published_example(tmp_path):
    """The README's training pipeline, unchanged but for one line; a trained model is saved and loads as the host's."""
    from pythae import trainers
    from pythae.pipelines import TrainingPipeline

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


ROWS = 20  # enough for the networks' kernel


def batch():
    return torch.rand(ROWS, 1, 3, 3, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", ["VAE", "AE"])
def test_networks(kind):
    from pythae.models.nn import default_architectures as networks

    torch.manual_seed(0)
    model = models.AE(models.AEConfig(input_dim=(1, 3, 3), latent_dim=4)) if kind == "AE" else build(kind)
    x, z = batch(), torch.randn(ROWS, 4)

    def ends(model, x, z):
        encoded = model.encoder(x)
        return *encoded.values(), model.decoder(z)["reconstruction"]

    same(model, (ends,), [x, z], 2 + (kind != "AE"))
    assert type(model.encoder) in (networks.Encoder_AE_MLP, networks.Encoder_VAE_MLP)


def test_networks_run_in_the_kernel_from_some_rows_on():
    model = build("VAE").requires_grad_(False)
    fastflow.accelerate(model, verify=False)
    for rows, expected in ((ROWS, {"fastflow_cpu::wide_mlp_fwd"}), (15, set())):
        x = batch()[:rows]
        assert kernels_run(lambda x=x: model.encoder(x)) == expected
        assert kernels_run(lambda rows=rows: model.decoder(torch.randn(rows, 4))) == expected


def spoilt(change):
    model = build("VAE")
    change(model.encoder)
    return model


CHANGES = {"hook": lambda encoder: encoder.layers[0][0].register_forward_hook(lambda m, args, out: out + 1),
           "hook on a stage": lambda encoder: encoder.layers[0].register_forward_hook(lambda m, args, out: out + 1),
           "another activation": lambda encoder: encoder.layers[0].__setitem__(1, nn.Tanh()),
           "another layer": lambda encoder: setattr(encoder, "embedding", nn.Sequential(nn.Linear(512, 4), nn.Tanh())),
           "a stage more": lambda encoder: (encoder.layers.append(nn.Sequential(nn.Linear(512, 512), nn.ReLU())),
                                            setattr(encoder, "depth", 2)),
           "a bias less": lambda encoder: encoder.embedding.register_parameter("bias", None),
           "weight norm": lambda encoder: nn.utils.parametrizations.weight_norm(encoder.layers[0][0])}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changed_networks_are_called_as_they_are(change):
    torch.manual_seed(0)
    model = spoilt(change)
    fused = copy.deepcopy(model)
    fastflow.accelerate(fused, verify=False)
    assert not kernels_run(lambda: fused.encoder(batch()))
    for got, want in zip(fused.encoder(batch()).values(), model.encoder(batch()).values(), strict=True):
        close(got, want, 1e-6)


def test_layers_on_the_way_are_the_hosts():
    model = build("VAE")
    fused = copy.deepcopy(model)
    fastflow.accelerate(fused)
    for levels in ([1], [-1], [1, 2]):
        got, want = (m.decoder(torch.ones(ROWS, 4), output_layer_levels=levels) for m in (fused, model))
        assert list(got) == list(want) and all(torch.equal(got[key], want[key]) for key in want)
    with pytest.raises(AssertionError, match="Cannot output layer deeper"):
        fused.encoder(batch(), output_layer_levels=[5])


def test_networks_given_by_the_user_are_saved_and_loaded(tmp_path):
    from pythae.models.nn import default_architectures as networks

    config = models.VAEConfig(input_dim=(1, 3, 3), latent_dim=4)
    torch.manual_seed(0)
    model = models.VAE(config, encoder=networks.Encoder_VAE_MLP(config), decoder=networks.Decoder_AE_MLP(config))
    want = model.encoder(batch()).embedding
    fastflow.accelerate(model)
    run(model, batch())
    model.save(str(tmp_path))
    loaded = models.AutoModel.load_from_folder(str(tmp_path))
    assert type(loaded.encoder) is type(model.encoder) and isinstance(loaded.decoder, networks.Decoder_AE_MLP)
    close(loaded.encoder(batch()).embedding, want, 1e-6)


def test_networks_stay_where_products_are_torchs(monkeypatch):
    monkeypatch.setattr(backends, "own_products", lambda: False)
    report = fastflow.accelerate(build("VAE"))
    assert list(report.swapped) == [""] and len(report.skipped) == 2
    assert all("matrix products" in reason for reason in report.skipped.values())
