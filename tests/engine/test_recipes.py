"""Every shipped recipe: it can be planned without its data, and at a reduced size it trains, evaluates and draws."""

import json
import math

import numpy as np
import pytest
import torch
from data_files import extracted, imagenet
from sweeps import rest_slow

from fastflow import cli, flows
from fastflow.engine import SettingsError, build_model, load_settings
from fastflow.engine.datasets import load_data
from fastflow.engine.plan import parameter_count, plan
from fastflow.engine.run import load_trained
from fastflow.engine.settings import from_dict, recipes

REDUCED = {
    "glow": ["model.n_steps=1", "model.hidden_channels=4"],
    "jet": ["model.channels=8", "model.heads=2", "model.couplings=5", "model.depth=1", "model.patch_size=8"],
    "tarflow": ["model.channels=8", "model.head_dim=4", "model.blocks=2", "model.layers_per_block=1",
                "model.patch_size=16"],
    "realnvp": ["model.n_layers=2", "model.hidden=[8,8]"], "maf": ["model.n_layers=2", "model.hidden=[8,8]"],
    "nsf": ["model.n_layers=2", "model.hidden=[8,8]"], "vae": ["model.hidden_features=16"],
    "iwae": ["model.n_importance=2"], "vqvae": ["model.channels=[8]"], "discrete_vae": ["model.hidden_features=16"],
    "vdvae": ["model.channels=8", "model.latent_channels=2"], "conditional_vae": ["model.hidden_features=16"],
    "semi_supervised_vae": ["model.hidden_features=16"], "task_vae": ["model.hidden_features=16"],
}
SHORT = ["train.steps=2", "train.batch_size=4", "train.accumulate=1", "train.threads=1", "train.device=cpu",
         "train.eval_every=0", "train.patience=0", "train.checkpoint_every=0", "train.max_seconds=0", "sample.count=2"]
# one of each kind of model and data
PLANNED = ("vae-digits", "vqvae-digits", "realnvp-patches", "maf-power", "iwae-digits", "dvae-digits",
           "cvae-digits", "m2-digits", "task-digits")


def reduced(settings):
    sweep = ["sweep.beta=[0.5,2.0]"] if settings.sweep else []
    return [part for setting in (*REDUCED[settings.model.kind], *SHORT, *sweep) for part in ("--set", setting)]


def there(root, settings):
    """Small files of the recipe's format; overrides that say where they are."""
    made = settings.data.format
    if made == "cifar10":
        return ["--set", f"data.path={extracted(root, '')}", "--set", "data.verify=false"]
    if made.startswith("imagenet"):
        imagenet(root / "images", int(made.removeprefix("imagenet")))
        return ["--set", f"data.path={root / 'images'}"]
    rng = np.random.default_rng(0)
    for part, n in (("train", 40), ("val", 10), ("test", 10)):
        np.save(root / f"{part}.npy", 3.0 + rng.normal(size=(n, *settings.data.shape)))
    return ["--set", f"data.path={root}"]


@pytest.fixture
def fastflow(threads, capsys):
    threads(torch.get_num_threads())  # commands set it; the fixture puts it back

    def run(*arguments):
        cli.main([str(a) for a in arguments])
        return capsys.readouterr().out
    return run


@pytest.mark.parametrize("recipe", rest_slow(recipes(), recipes().keys() - {"vqvae-photos", "vae-photos"}))
def test_every_recipe_trains_evaluates_and_draws(recipe, tmp_path, fastflow):
    settings, out = load_settings(recipe), tmp_path / "run"
    assert from_dict(json.loads(json.dumps(settings.model_dump()))) == settings  # as a checkpoint keeps them
    data = there(tmp_path, settings) if settings.data.path else []
    if data:
        data += ["--set", "train.eval_every=1"]
    said = fastflow("train", recipe, "--out", out, *reduced(settings), *data)
    if settings.sweep is not None:
        assert len((out / "rate-distortion.csv").read_text().splitlines()) == 3 and "rate-distortion.csv" in said
        out = out / "beta-0.5"
    results = json.loads((out / "results.json").read_text())
    table = settings.model.kind in ("maf", "nsf", "realnvp")
    assert results["step"] == 2 and np.isfinite(results["log_prob" if table else "bits_per_dim"])
    assert results["samples"].endswith(".csv" if table else ".png") and ("rows" if table else "images") in said
    assert ("reconstructions" in results) == ("elbo" in results)
    if "elbo" in results:  # a VAE of any kind
        assert (out / "diagnosis" / "diagnosis.png").read_bytes().startswith(b"\x89PNG")
    trained = load_trained(out, "cpu")  # without the data, from the shape that the run has found
    assert trained.settings.data.shape == settings.data.known_shape()
    assert fastflow("sample", out, "-n", 3).strip().endswith("-seed-0.csv" if table else "-seed-0.png")
    figure = "log_prob" if table else "bits_per_dim"
    if data or settings.model.kind == "discrete_vae":  # one whose figures depend on the number of samples
        assert "held-out" in fastflow("evaluate", out)
        assert json.loads((out / "evaluation.json").read_text())[figure] == results[figure]
    if data:
        part = "validation" if settings.data.format == "table" else "test"
        log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in log if f"{part}_{figure}" in line][0] == 1


def test_bits_of_images_at_a_path_count_every_constant(tmp_path, fastflow):
    """What a run reports of uint8 files is the flow's own bits/dim: -log2 p of x/256 - 0.5 + U/256, plus 8 bits."""
    settings = load_settings("glow-cifar10")
    fastflow("train", "glow-cifar10", "--out", tmp_path / "run", *reduced(settings), *there(tmp_path, settings))
    trained = load_trained(tmp_path / "run", "cpu")
    test = load_data(trained.settings).test
    torch.manual_seed(0)
    noisy = (test + torch.rand(test.shape)) / 256 - 0.5
    with torch.no_grad():
        bits = 8.0 - trained.model.eval().log_prob(noisy) / (3072 * math.log(2.0))
    reported = json.loads((tmp_path / "run" / "results.json").read_text())["bits_per_dim"]
    assert abs(bits.mean().item() - reported) < 1e-4


@pytest.mark.parametrize("recipe", rest_slow(recipes(), PLANNED))
def test_a_dry_run_needs_no_data(recipe, tmp_path, monkeypatch, fastflow):
    monkeypatch.chdir(tmp_path)
    found = dict(line.split() for line in fastflow("train", recipe, "--dry-run").splitlines())
    found = {name: int(value.replace(",", "")) for name, value in found.items()}
    assert found["parameters"] == parameter_count(load_settings(recipe)) > 10_000
    assert found["weights_bytes"] >= 16 * found["parameters"] and found["activation_bytes"] > 0
    assert not list(tmp_path.iterdir())


MODELS = {
    "glow-cifar10": (flows.Glow, "cifar10"), "glow-imagenet32": (flows.Glow, "imagenet32"),
    "glow-imagenet64": (flows.Glow, "imagenet64"), "jet": (flows.Jet, "imagenet64-207m"),
    "tarflow": (flows.TarFlow, "imagenet64-2-768-8-8"), "maf-power": (flows.MAF, "power-10"),
    "maf-gas": (flows.MAF, "gas-10"), "realnvp-hepmass": (flows.RealNVP, "hepmass-10"),
    "nsf-miniboone": (flows.NSF, "miniboone"), "nsf-bsds300": (flows.NSF, "bsds300"),
}


@pytest.mark.parametrize("recipe", rest_slow(MODELS, MODELS.keys() - {"glow-imagenet32", "glow-imagenet64"}))
def test_the_models_are_the_papers(recipe):
    model, config = MODELS[recipe]
    with torch.device("meta"):
        ours, theirs = build_model(load_settings(recipe)), model.from_config(config)
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    layers = [[str(m) for m in flow.modules() if not list(m.children())] for flow in (ours, theirs)]
    assert layers[0][layers[0].index(layers[1][0]):] == layers[1]  # but for what standardises a table


def test_a_plan_counts_what_a_step_keeps():
    """The bytes and launches found on fake tensors are those of real ones."""
    from fastflow import launches
    from fastflow.engine.memory import SavedBytes
    from fastflow.engine.objectives import objective_for

    settings = load_settings("glow-digits", ["model.n_steps=2", "train.batch_size=6", "train.accumulate=2"])
    found, model = plan(settings), build_model(settings)
    x = torch.randint(0, 17, (3, 1, 8, 8), dtype=torch.uint8)
    with SavedBytes(model) as saved, launches.count() as counted:
        loss = objective_for(model, n_bins=17)(model, x)[0]
    with launches.count() as backward:
        loss.backward()
    assert found["activation_bytes"] == saved.total and found["launches"] == counted.total + backward.total
    assert found["weights_bytes"] == 5 * sum(p.numel() * 4 for p in model.parameters())


def test_a_billion_parameters_are_planned_in_little_memory():
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert parameter_count(load_settings("jet", ["model.couplings=64", "model.depth=5"])) == 1_019_612_160
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kB; the weights take 4 GB


def test_the_list_is_a_table(fastflow):
    lines = fastflow("train", "--list").splitlines()
    assert lines[0].split() == ["recipe", "model", "data", "needs", "parameters", "minutes", "what"]
    rows = {line.split()[0]: line for line in lines[1:] if line.split()}
    assert rows.keys() >= set(recipes())
    assert "your data: data/cifar-10-python.tar.gz" in rows["glow-cifar10"] and "43,951,692" in rows["glow-cifar10"]
    assert "ships" in rows["glow-digits"] and "1x8x8" in rows["glow-digits"]


@pytest.mark.parametrize("recipe, override, message", [
    ("vqvae-digits", "model.channels=[8,8,8,8]", "model.channels: 4 halvings don't divide 8x8 images"),
    ("vqvae-digits", "model.n_codes=1", "model.n_codes: "),
    ("dvae-digits", "model.estimator=magic", "model.estimator: "),
    ("iwae-digits", "model.n_samples=3", "model.n_samples: unknown setting"),
    ("vdvae-digits", "model.groups=[1,1,1,1]", "model: image_shape: "),
    ("jet", "model.patch_size=7", "model: image_shape: expected height and width divisible by patch_size = 7"),
    ("tarflow", "model.head_dim=50", "model: channels: expected a multiple of head_dim"),
    ("glow-photos", "data.name=patches", "model.kind: glow is for images, and the data have shape [63]"),
    ("realnvp-patches", "data.name=digits", "model.kind: realnvp is for tables, and the data have shape [1, 8, 8]"),
    ("glow-photos", "data.size=16", "data.size: does not belong to photos data"),
    ("glow-digits", "data.shape=[1,8,9]", "data.shape: digits data have [1, 8, 8], got [1, 8, 9]"),
    ("glow-cifar10", "data.name=digits", "data.path: can't be combined with data.name=digits"),
    ("glow-cifar10", "data.format=tar", "data.format: input should be 'cifar10', "),
    ("maf-power", "data.shape=[3,4]", "data.shape: expected [C, H, W] or [D], got [3, 4]"),
    ("maf-power", "data.test_fraction=1", "data.test_fraction: input should be less than 1"),
    ("beta-sweep-digits", "sweep.beta=[1.0]", "sweep.beta: "),
    ("beta-sweep-digits", "sweep.beta=[1.0,-1.0]", "sweep.beta.1: input should be greater than 0"),
    ("glow-digits", "sweep.beta=[1.0,2.0]", "sweep.beta: a model of kind glow has no beta"),
    ("glow-photos", "data.path=x", "data.shape: can't be known without the data"),
])
def test_what_cannot_be_built_is_named(recipe, override, message):
    with pytest.raises(SettingsError) as caught:
        build_model(load_settings(recipe, [override]))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_sweep_of_several_processes_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        cli.main(["train", "beta-sweep-digits", "--out", str(tmp_path / "run")])
    assert "sweep: one process trains its models one after the other" in capsys.readouterr().err


@pytest.mark.parametrize(("recipe", "override", "message"), [
    ("glow-digits", "train.bound_samples=5", "^train.bound_samples: a model of kind 'glow' has no latents"),
    ("glow-digits", "train.kl_warmup_steps=5", "^train.kl_warmup_steps: a model of kind 'glow' has no latents"),
    ("vqvae-digits", "train.memory=invert", "^train.memory: 'invert' is for flows made of steps"),
])
def test_a_dry_run_refuses_what_training_would(recipe, override, message):
    with pytest.raises(SettingsError, match=message):
        plan(load_settings(recipe, [override]))
