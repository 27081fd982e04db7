"""diffusers' autoencoders under accelerate: the posterior's sample, divergence and gradients; images and video."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from adapter_checks import TOLERANCE, accelerated, close

import fastflow
from fastflow.adapters import layers as adapter_layers

autoencoders = pytest.importorskip("diffusers.models.autoencoders")
import diffusers  # noqa: E402
from diffusers.models.autoencoders import vae as vaes  # noqa: E402

from fastflow.adapters import diffusers as adapter  # noqa: E402

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def images():
    return autoencoders.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2, sample_size=8)


def video():
    return autoencoders.AutoencoderKLWan(base_dim=4, z_dim=2, dim_mult=[1, 1], num_res_blocks=1,
                                         temperal_downsample=[False])


MODELS = {"AutoencoderKL": (images, (3, 3, 8, 8)), "AutoencoderKLWan": (video, (2, 3, 5, 8, 16))}
BY_MODEL = pytest.mark.parametrize("kind", MODELS)


@pytest.fixture(autouse=True)
def every_call_goes_to_the_kernel(monkeypatch):
    monkeypatch.setattr(adapter_layers, "SMALL", 0)


def results(model, x, generator=None, tuples=True):
    """Sample, divergences, likelihood of a posterior and gradients of its moments and of the encoder."""
    posterior = model.encode(x).latent_dist
    other = model.encode(x.flip(0), **({"return_dict": False} if tuples else {}))[0]
    torch.manual_seed(3)
    z = posterior.sample(generator() if generator else None)
    found = [z, posterior.kl(), posterior.kl(other), posterior.nll(z.detach()), posterior.mode()]
    loss = z.square().sum() + 0.3 * posterior.kl().sum() + 0.2 * posterior.kl(other).sum()
    leaves = [posterior.parameters, *model.encoder.parameters()]
    return found + [g for g in torch.autograd.grad(loss, leaves) if g is not None]


@DTYPES
@BY_MODEL
def test_posteriors(kind, dtype):
    torch.manual_seed(0)
    make, shape = MODELS[kind]
    model, x = make().to(dtype).eval(), torch.randn(*shape, dtype=dtype)
    fused, report = accelerated(model)
    for generator in (None, lambda: torch.Generator().manual_seed(4),
                      lambda: [torch.Generator().manual_seed(seed) for seed in range(shape[0])]):
        for got, want in zip(results(fused, x, generator), results(model, x, generator), strict=True):
            close(got, want, TOLERANCE[dtype])
    assert report.swapped == {"": f"diffusers {kind}"} and report.verified == {""} and not report.skipped
    assert isinstance(fused.encode(x).latent_dist, vaes.DiagonalGaussianDistribution)
    assert fastflow.restore(fused) == [""] and type(fused) is type(model)
    assert type(fused.encode(x).latent_dist) is vaes.DiagonalGaussianDistribution


class Moments(torch.nn.Module):
    """An encoder that hands its input on, as every autoencoder calls its own."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def make_cache(self):
        return None

    def forward(self, x, *cache, **options):
        return x * self.weight


def bare(kind, **attributes):
    """An autoencoder of the class without its networks."""
    model = kind.__new__(kind)
    torch.nn.Module.__init__(model)
    model._internal_dict = {}
    model.encoder, model.quant_conv = Moments(), torch.nn.Identity()
    for name, value in ({"use_slicing": False, "use_tiling": False, "_encode": model.encoder} | attributes).items():
        object.__setattr__(model, name, value)
    return model


@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (2, 4, 3, 5, 6)], ids=["images", "video"])
@pytest.mark.parametrize("name", adapter.NAMES)
def test_the_posterior_of_every_autoencoder(name, shape):
    kind = getattr(autoencoders, name, None)
    if kind is None:
        pytest.skip(f"not in diffusers {diffusers.__version__}")
    model, x = bare(kind, regularizer="kl"), torch.randn(*shape, dtype=torch.float64)
    fused = bare(kind, regularizer="kl")
    report = fastflow.accelerate(fused)
    found = [results(m.double(), x, tuples=name != "AutoencoderVidTok") for m in (fused, model)]
    for got, want in zip(*found, strict=True):
        close(got, want, 1e-10)
    assert report.verified == {""} and isinstance(fused.encode(x).latent_dist, adapter.Posterior)


def test_codes_are_left_alone():
    report = fastflow.accelerate(bare(autoencoders.AutoencoderVidTok, regularizer="fsq"))
    assert "codes, not Gaussian" in report.skipped[""] and not report.swapped


def test_moments_beyond_the_clamp_pass_no_gradient():
    model, x = images().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model.quant_conv.weight.mul_(3000.0)
    fused, _ = accelerated(model)
    moments = model.encode(x).latent_dist.parameters
    raw = moments.chunk(2, 1)[1]
    assert (raw > 20).any() and (raw < -30).any()
    grads = []
    for m in (fused, model):
        posterior = m.encode(x).latent_dist
        torch.manual_seed(1)
        loss = posterior.sample().sum() + posterior.kl().sum()
        grads.append(torch.autograd.grad(loss, posterior.parameters)[0])
    close(*grads, 1e-5)
    outside = (raw > 20) | (raw < -30)
    assert not grads[0].chunk(2, 1)[1][outside].any()


def test_the_reduction_of_video_is_the_hosts_or_mended():
    model, x = video().double().eval(), torch.randn(2, 3, 5, 8, 16, dtype=torch.float64)
    found = {}
    for fix in (False, True):
        fused, report = accelerated(model, fix=fix)
        posterior = fused.encode(x).latent_dist
        before = posterior.kl()
        torch.manual_seed(1)
        z = posterior.sample()
        found[fix] = posterior.kl(), posterior.kl(fused.encode(x.flip(0)).latent_dist), posterior.nll(z.detach())
        close(before, found[fix][0], 1e-10)
        close(posterior.nll(z.detach(), dims=[2, 4]).sum((1, 2)), found[fix][2].reshape(2, -1).sum(1), 1e-10)
        assert report.verified == {""}
    width = model.encode(x).latent_dist.mean.shape[-1]
    for host, mended in zip(*found.values(), strict=True):
        assert host.shape == (2, width) and mended.shape == (2,)
        close(mended, host.sum(1), 1e-10)
    moments = fused.encode(x).latent_dist
    q = torch.distributions.Normal(moments.mean, moments.std)
    exact = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
    close(moments.kl(), exact.flatten(1).sum(1), 1e-10)


@pytest.mark.parametrize("moment", ["mean", "var", "logvar"])
def test_a_moment_set_after_the_sample_counts_in_the_divergence(moment):
    model, x = images().eval(), torch.randn(2, 3, 8, 8)
    fused, _ = accelerated(model)
    found = []
    for m in (model, fused):
        posterior = m.encode(x).latent_dist
        posterior.sample()
        before = posterior.kl()
        setattr(posterior, moment, getattr(posterior, moment) + 3.0)
        found.append(posterior.kl())
        assert (found[-1] - before).abs().min() > 1.0
    close(*found, 1e-5)


def test_a_divergence_without_gradients_has_no_graph():
    fused, _ = accelerated(images().eval())
    posterior = fused.encode(torch.randn(2, 3, 8, 8)).latent_dist
    posterior.sample()
    with torch.no_grad():
        assert not posterior.kl().requires_grad
    assert posterior.kl().requires_grad


def test_deterministic_posteriors_and_half_precision_are_the_hosts():
    model, x = images().eval(), torch.randn(2, 3, 8, 8)
    fused, _ = accelerated(model)
    posterior = fused.encode(x).latent_dist
    fixed = copy.copy(posterior)
    fixed.__init__(posterior.parameters, deterministic=True)
    assert torch.equal(fixed.sample(), posterior.mean) and torch.equal(fixed.kl(), torch.zeros(1))
    for m in (model.bfloat16(), fused.bfloat16()):
        torch.manual_seed(1)
        m.drawn = m.encode(x.bfloat16()).latent_dist.sample()
    assert torch.equal(fused.drawn, model.drawn)


def test_a_posterior_that_differs_is_put_back(monkeypatch):
    monkeypatch.setattr(adapter.Posterior, "sample", lambda self, generator=None: self.mean + 1e-3)
    model = images().eval()
    report = fastflow.accelerate(model)
    with pytest.warns(RuntimeWarning, match="keeps its original form"):
        posterior = model.encode(torch.randn(2, 3, 8, 8)).latent_dist
    assert type(model) is autoencoders.AutoencoderKL and type(posterior) is vaes.DiagonalGaussianDistribution
    assert "differs by" in report.skipped[""]


@BY_MODEL
def test_training_gives_the_same_parameters(kind):
    """Three steps of a beta-VAE on the library's own encode, sample, decode, in a copy that was pickled on the way."""
    torch.manual_seed(0)
    make, shape = MODELS[kind]
    model, x = make().double().train(), torch.randn(*shape, dtype=torch.float64)
    fused, _ = accelerated(model)
    fused = pickle.loads(pickle.dumps(copy.deepcopy(fused)))
    for m in (model, fused):
        optimizer = torch.optim.Adam(m.parameters(), 1e-2)
        torch.manual_seed(2)
        for _ in range(3):
            optimizer.zero_grad()
            posterior = m.encode(x).latent_dist
            reconstruction = m.decode(posterior.sample()).sample
            ((reconstruction - x).square().mean() + 1e-2 * posterior.kl().mean()).backward()
            optimizer.step()
    assert type(fused) is getattr(adapter, kind) and type(fused).__module__ == "fastflow.adapters.diffusers"
    for got, want in zip(fused.parameters(), model.parameters(), strict=True):
        close(got, want, 1e-9)


def test_saved_models_know_their_class(tmp_path):
    """save_pretrained and from_pretrained, with the line between them."""
    model = images().eval()
    fastflow.accelerate(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "AutoencoderKL"
    loaded = autoencoders.AutoencoderKL.from_pretrained(tmp_path)
    x = torch.randn(2, 3, 8, 8)
    close(loaded.encode(x).latent_dist.mean, model.encode(x).latent_dist.mean, 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model(x, sample_posterior=True)
        for made in (type(model).from_pretrained(tmp_path), type(model).from_config(model.config)):
            made.load_state_dict(model.state_dict())
            close(made.encode(x).latent_dist.mean, model.encode(x).latent_dist.mean, 1e-6)


@pytest.mark.parametrize("called", [False, True])
def test_a_saved_pipeline_names_the_hosts_class(tmp_path, called):
    model, x = images().eval(), torch.randn(2, 3, 8, 8)
    fastflow.accelerate(model)
    if called:
        model.encode(x)
    unet = diffusers.UNet2DModel(sample_size=4, in_channels=2, out_channels=2, block_out_channels=(4,),
                                 norm_num_groups=2, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    diffusers.LDMPipeline(model, unet, diffusers.DDIMScheduler()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["vqvae"] == ["diffusers", "AutoencoderKL"]
    loaded = diffusers.LDMPipeline.from_pretrained(tmp_path).vqvae
    assert type(loaded) is autoencoders.AutoencoderKL
    close(loaded.encode(x).latent_dist.mean, model.encode(x).latent_dist.mean, 1e-6)
