"""What recipes say of a VAE's objective and of the rise of its rate's weight."""

import io
import json
import math

import pytest
import torch
from rich.console import Console

from fastflow import cli, flows, vae
from fastflow.engine import SettingsError, build_model, load_settings
from fastflow.engine import trainer as trainer_module
from fastflow.engine.datasets import load_data
from fastflow.engine.objectives import NegativeELBO
from fastflow.engine.plan import plan
from fastflow.engine.rate import kl_weight
from fastflow.engine.trainer import Trainer

SMALL = {"vae-digits": ["model.hidden_features=8", "model.latent_features=3"],
         "vdvae-digits": ["model.channels=4", "model.latent_channels=2", "model.groups=[1,1]",
                          "model.kl_balance=false"]}
BOUNDS = {"iwae": (), "miwae": ("bound_groups=2",), "ciwae": ("bound_beta=0.3",), "renyi": ("bound_alpha=-0.5",),
          "stl": (), "dreg": (), "piwae": ("bound_groups=4",)}


def settings(recipe, *overrides):
    return load_settings(recipe, [*SMALL.get(recipe, ()), *overrides])


@pytest.mark.parametrize("recipe", SMALL)
@pytest.mark.parametrize("name", BOUNDS)
def test_a_bound_is_chosen_by_name(recipe, name):
    """It is the BoundObjective of that name, and a step of it can be planned."""
    chosen = settings(recipe, f"model.objective={name}", "model.n_samples=4", *(f"model.{o}" for o in BOUNDS[name]))
    objective = build_model(chosen).objective
    assert isinstance(objective, vae.BoundObjective) and objective.name == name and objective.n_samples == 4
    assert list(objective.options.values()) == [float(o.split("=")[1]) for o in BOUNDS[name]]
    if recipe == "vae-digits" or name == "dreg":  # one of the other is enough
        assert plan(chosen)["parameters"] > 0


@pytest.mark.parametrize(("recipe", "overrides", "kind", "least", "per"), [
    ("vae-digits", ("model.free_bits=0.2", "model.prior=normal"), vae.FreeBits, 0.2, "dim"),
    ("vae-digits", ("model.free_bits=2", "model.free_bits_per=group", "model.network=conv"), vae.FreeBits, 2, "group"),
    ("vdvae-digits", ("model.free_bits=0.5",), vae.FreeBits, 0.5, "group"),
    ("vdvae-digits", ("model.free_bits=0.01", "model.free_bits_per=channel"), vae.FreeBits, 0.01, "channel"),
    ("vdvae-digits", ("model.kl_balance=true", "model.beta=0.5"), vae.KLBalance, None, None),
])
def test_what_stands_in_the_place_of_the_rate(recipe, overrides, kind, least, per):
    objective = build_model(settings(recipe, *overrides)).objective
    (penalty,) = objective.penalties
    assert type(penalty) is kind and objective.beta == 1.0
    assert (getattr(penalty, "least", None), getattr(penalty, "per", None)) == (least, per)
    assert kind is vae.FreeBits or penalty.until == 0.5


@pytest.mark.parametrize(("recipe", "overrides", "message"), [
    ("vae-digits", ("model.free_bits=0.2", "model.prior=flow"), "model.free_bits: no dimension has a KL of its own to"),
    ("vae-digits", ("model.objective=elbow",), "model.objective: input should be 'elbo', 'iwae'"),
    ("vae-digits", ("model.objective=iwae",), "model.n_samples: model.objective=iwae needs at least 2, got 1"),
    ("dvae-digits", ("model.estimator=rloo", "model.n_samples=1"), "model.n_samples: model.estimator=rloo needs at "),
    ("dvae-digits", ("model.estimator=vimco", "model.n_samples=1"), "model.n_samples: model.estimator=vimco needs "),
    ("beta-sweep-digits", ("sweep.beta=[0.5,0.5]",), "sweep.beta: expected different values, got 0.5 twice"),
    ("beta-sweep-digits", ("sweep.beta=[1.0,0.5,1.0000001]",), "sweep.beta: expected different values, got 1 twice"),
    ("vae-digits", ("model.objective=miwae", "model.n_samples=4"), "model.bound_groups: needed by "),
    ("vae-digits", ("model.objective=ciwae", "model.n_samples=4", "model.bound_beta=2"), "model.bound_beta: input"),
    ("vdvae-digits", ("model.bound_alpha=0.5",), "model.bound_alpha: does not belong to model.objective=elbo"),
    ("vdvae-digits", ("model.objective=piwae", "model.n_samples=4", "model.bound_groups=3"),
     "model.bound_groups: 3 does not divide model.n_samples=4"),
    ("vae-digits", ("model.objective=stl", "model.free_bits=1"), "model.free_bits: belongs to model.objective=elbo"),
    ("vae-digits", ("model.free_bits_per=group",), "model.free_bits_per: needs model.free_bits"),
    ("vdvae-digits", ("model.free_bits_per=dim",), "model.free_bits_per: needs model.free_bits"),
    ("vdvae-digits", ("model.kl_balance=true", "model.free_bits=1"), "model.kl_balance: belongs to "),
    ("vdvae-digits", ("model.kl_balance=true", "train.kl_warmup_steps=0"), "model.kl_balance: balances while "),
    ("vae-digits", ("model.penalty=wasserstein",), "model.penalty: input should be 'none', 'tc'"),
    ("vae-digits", ("model.penalty=mmd", "model.objective=stl"), "model.penalty: belongs to model.objective=elbo"),
    ("vae-digits", ("model.penalty_weight=2",), "model.penalty_weight: needs model.penalty"),
    ("vae-digits", ("model.penalty=tc",), "model.dataset_size: needed by model.penalty=tc"),
    ("vae-digits", ("model.penalty=mmd", "model.dataset_size=1500"), "model.dataset_size: does not belong to "),
    ("vae-digits", ("model.penalty=mmd", "train.accumulate=64"), "model.penalty: mmd compares images, and "),
    ("vdvae-digits", ("model.penalty=mmd",), "model.penalty: unknown setting"),
    ("vae-digits", ("train.kl_warmup_epochs=2",), "train.kl_warmup_epochs: can't be combined with "),
    ("vae-digits", ("train.kl_schedule=stairs",), "train.kl_schedule: input should be 'linear', 'cosine'"),
    ("vae-digits", ("train.kl_ratio=0.3",), "train.kl_ratio: belongs to train.kl_schedule=cyclical, got linear"),
    ("vae-digits", ("train.kl_schedule=cosine", "train.kl_steepness=3"), "train.kl_steepness: belongs to "),
    ("vae-digits", ("train.kl_schedule=cosine", "train.kl_warmup_steps=0"), "train.kl_schedule: shapes the rise "),
    ("vae-digits", ("train.kl_schedule=cyclical", "train.kl_ratio=0"), "train.kl_ratio: input should be greater"),
])
def test_what_does_not_go_together_is_named(recipe, overrides, message):
    with pytest.raises(SettingsError) as caught:
        settings(recipe, *overrides)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


# What a recipe's words make, and what a step of it says beyond rate and distortion.
PENALTIES = {
    "tc": (vae.TotalCorrelation, {"beta": 2.0, "alpha": 0.0, "gamma": 0.0, "dataset_size": 1500},
           {"mutual_information", "total_correlation", "dimension_kl"}),
    "factor": (vae.FactorTC, {"weight": 2.0}, {"total_correlation", "discriminator_loss"}),
    "dip_i": (vae.DIP, {"kind": "i", "diagonal": 4.0, "off_diagonal": 2.0}, {"dip"}),
    "dip_ii": (vae.DIP, {"kind": "ii", "diagonal": 4.0, "off_diagonal": 2.0}, {"dip"}),
    "mmd": (vae.MMD, {"weight": 2.0, "kernel": "imq"}, {"mmd"}),
    "adversarial": (vae.DensityRatio, {"weight": 2.0}, {"density_ratio", "discriminator_loss"}),
    "info_nce": (vae.MutualInformation, {"weight": 2.0, "bound": "info_nce"}, {"information"}),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_the_command_trains_a_penalty_by_name(name, tmp_path, threads, monkeypatch):
    """The loss of a step is distortion + beta rate + the penalty, which the log tells."""
    threads(torch.get_num_threads())
    monkeypatch.setattr(trainer_module, "draw_curves", lambda *_: None)
    monkeypatch.setattr(trainer_module, "draw", lambda *_, **__: {"broken_samples": 0})
    kind, attributes, parts = PENALTIES[name]
    words = [*SMALL["vae-digits"], f"model.penalty={name}", "model.penalty_weight=2", "model.beta=0.5", "train.steps=2",
             "train.batch_size=100", "train.log_every=1", "train.kl_warmup_steps=0", "train.eval_every=0",
             "train.checkpoint_every=0", "train.device=cpu", *(["model.dataset_size=1500"] if name == "tc" else [])]
    (penalty,) = build_model(load_settings("vae-digits", words)).objective.penalties
    assert type(penalty) is kind and attributes.items() <= vars(penalty).items()
    cli.main(["train", "vae-digits", "--out", str(tmp_path), *(w for word in words for w in ("--set", word))])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 2 and all(parts <= line.keys() for line in steps)
    for line in steps:
        weight, rest = (-2.0, 0.0) if name == "info_nce" else (
            1.0 if kind is vae.DIP else 2.0, line.get("discriminator_loss", 0.0))
        own = {"tc": "total_correlation", "factor": "total_correlation", "dip_i": "dip", "dip_ii": "dip", "mmd": "mmd",
               "adversarial": "density_ratio", "info_nce": "information"}[name]
        expected = line["distortion"] + 0.5 * line["rate"] + weight * line[own] + rest
        assert math.isclose(line["loss"], expected, rel_tol=1e-5)


def test_the_size_of_the_data_is_theirs():
    with pytest.raises(SettingsError, match="^model.dataset_size: 99, and digits has 1500 training images"):
        load_data(settings("vae-digits", "model.penalty=tc", "model.dataset_size=99"))


def test_a_dry_run_refuses_them_in_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "vae-digits", "--dry-run", "--set", "model.objective=elbow"])
    assert caught.value.code and "model.objective: input should be 'elbo'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "dvae-digits", "--dry-run", "--set", "model.estimator=rloo", "--set", "model.n_samples=1"])
    error = capsys.readouterr().err
    assert caught.value.code == 1 and "model.n_samples: model.estimator=rloo" in error and error.count("\n") == 1


# The weight in the updates after 0, 1, ... steps, with 4 steps of rise to beta = 2.
@pytest.mark.parametrize(("overrides", "expected"), [
    ((), [0.5, 1.0, 1.5, 2.0, 2.0]),
    (("train.kl_begin=2", "train.kl_start=1.0"), [1.0, 1.0, 1.25, 1.5, 1.75, 2.0, 2.0]),
    (("train.kl_schedule=cosine",), [1.0 - math.cos(math.pi * t / 4) for t in (1, 2, 3, 4)] + [2.0]),
    (("train.kl_schedule=sigmoid", "train.kl_steepness=6"),
     [1.0 + math.tanh(3.0 * (t / 4 - 0.5)) / math.tanh(1.5) for t in (1, 2, 3, 4)] + [2.0]),
    (("train.kl_schedule=cyclical", "train.kl_cycles=2"), [1.0, 2.0, 2.0, 0.0, 1.0, 2.0, 2.0, 2.0, 2.0]),
    (("train.kl_schedule=cyclical", "train.kl_cycles=0", "train.kl_ratio=1"), [0.5, 1.0, 1.5, 0.0] * 3),
])
def test_the_weight_of_the_rate_rises_as_the_schedule_says(overrides, expected):
    for unit in ("step", "epoch"):
        words = ["train.kl_warmup_steps=0", f"train.kl_warmup_{unit}s=4", "model.beta=2.0", *overrides]
        weight, found = kl_weight(settings("vae-digits", *words)), []
        for passed in range(1, len(expected) + 1):
            weight.seek(*((passed, 0) if unit == "step" else (1000, passed)))
            found.append(weight.value)
        torch.testing.assert_close(found, expected)
    assert kl_weight(settings("vae-digits", "train.kl_warmup_steps=0", "model.beta=0.3")) == 0.3


@pytest.mark.parametrize(("recipe", "overrides"), [
    ("vae-digits", ("model.objective=miwae", "model.n_samples=6", "model.bound_groups=3", "train.bound_samples=7")),
    ("vdvae-digits", ("model.objective=dreg", "model.n_samples=2", "train.kl_schedule=cosine")),
    ("vdvae-digits", ("model.free_bits=0.01", "model.free_bits_per=dim")),
    ("vdvae-digits", ("model.kl_balance=true", "train.kl_schedule=cyclical", "train.kl_cycles=1")),
])
def test_runs_train_and_report_the_bound(recipe, overrides, tmp_path, threads, monkeypatch):
    """The held-out figures are the ELBO's own, at as many samples as were asked for."""
    threads(torch.get_num_threads())
    monkeypatch.setattr(trainer_module, "draw_curves", lambda *_: None)
    monkeypatch.setattr(trainer_module, "draw", lambda *_, **__: {})
    made = Trainer(settings(recipe, *overrides, "train.steps=3", "train.kl_warmup_steps=2", "train.batch_size=500",
                            "train.device=cpu", "train.eval_every=0", "train.checkpoint_every=0", "train.log_every=1"),
                   tmp_path, Console(file=io.StringIO()))
    made.start()
    before = [p.detach().clone() for p in made.model.parameters()]
    results = made.run()
    assert any(not torch.equal(a, b) for a, b in zip(before, made.model.parameters(), strict=True))
    assert math.isclose(results["elbo"], -results["rate"] - results["distortion"], rel_tol=1e-5)
    assert ("iwae_7" in results) == ("train.bound_samples=7" in overrides) and results["rate"] > 0


@pytest.mark.parametrize("make", [
    lambda objective: vae.MLPVAE((1, 4, 4), 2, (8,), objective=objective),
    lambda objective: vae.HVAE((1, 4, 4), (2, 2), 8, objective=objective),
])
def test_a_report_is_of_the_elbo_whatever_is_trained(make):
    """Also with a number of samples that the objective would refuse."""
    x = torch.randint(0, 2, (5, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    found = []
    for objective in (None, vae.BoundObjective("piwae", 4, groups=4), vae.PenalizedELBO(vae.Capacity(3.0, 2.0))):
        torch.manual_seed(0)
        model = make(objective).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            found.append(NegativeELBO(2, 3).report(model, x))
    assert found[0].keys() >= {"elbo", "rate", "distortion", "bits_per_dim", "iwae_3"}
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


@pytest.mark.parametrize(("recipe", "overrides"), [
    ("vae-digits", ()), ("vae-digits", ("model.network=conv",)), ("iwae-digits", ()), ("dvae-digits", ()),
    ("vdvae-digits", ()), ("cvae-digits", ()), ("m2-digits", ()), ("task-digits", ()),
])
def test_priors_and_sigmas_by_name(recipe, overrides):
    """A flow over z or an autoregressive law of bits, and the likelihood's sigma from twice the decoder's outputs."""
    for sigma, mode, outputs in (("shared", "optimal", 1), ("pixel", "decoder", 2)):
        model = build_model(load_settings(recipe, [*overrides, f"model.sigma={sigma}"]))
        assert model.likelihood.mode == mode and model.likelihood.output_shape((1, 8, 8)) == (outputs, 8, 8)
        assert model.sample(2, **({"context": torch.arange(1)} if recipe in ("cvae-digits", "m2-digits") else {})) \
            .numel() == 2 * 64
    if recipe in ("vae-digits", "iwae-digits", "task-digits"):
        for prior, kind in (("normal", type(None)), ("flow", flows.RealNVP)):
            assert type(build_model(load_settings(recipe, [*overrides, f"model.prior={prior}"])).prior) is kind
    if recipe == "dvae-digits":
        for prior, kind in (("uniform", type(None)), ("autoregressive", vae.BitPrior)):
            assert type(build_model(load_settings(recipe, [f"model.prior={prior}"])).bit_prior) is kind
