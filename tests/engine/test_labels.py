"""Runs on labelled images: which labels training knows, what is refused, accuracy and samples by class."""

import json

import pytest
import torch

from fastflow import cli, data
from fastflow.engine import SettingsError, load_settings
from fastflow.engine.evaluate import evaluate, reconstructions, samples
from fastflow.engine.labels import check_labels, classes_of, training_labels
from fastflow.engine.models import build_model
from fastflow.engine.objectives import objective_for

RECIPES = ("cvae-digits", "m2-digits", "task-digits")
CPU = torch.device("cpu")


def model_of(recipe, *overrides):
    torch.manual_seed(0)
    return build_model(load_settings(recipe, ["model.hidden_features=8", "model.latent_features=2", *overrides]))


def test_digits_bring_their_labels():
    digits = data.load("digits", validation_fraction=0.1)
    from sklearn.datasets import load_digits
    assert digits.train_labels.dtype == torch.int64 and len(digits.validation_labels) == len(digits.validation) == 150
    assert torch.equal(digits.test_labels, torch.from_numpy(load_digits().target[-297:]))


def test_so_many_labels_are_known_evenly_over_the_classes():
    digits = data.load("digits")
    assert training_labels(load_settings("vae-digits"), digits) is None
    assert training_labels(load_settings("cvae-digits"), digits) is digits.train_labels
    for count, least in ((100, 10), (57, 5), (1500, 146)):
        settings = load_settings("m2-digits", [f"model.n_labelled={count}"])
        found = training_labels(settings, digits)
        known = found >= 0
        assert int(known.sum()) == count and torch.equal(found[known], digits.train_labels[known])
        assert int(found[known].bincount().min()) >= least
        assert torch.equal(found, training_labels(settings, digits))


def test_data_without_the_labels_are_refused():
    photos = data.ImageData("pictures", torch.zeros(4, 1, 8, 8).byte(), torch.zeros(4, 1, 8, 8).byte(), 17)
    check_labels(load_settings("vae-digits"), photos)
    with pytest.raises(SettingsError, match="model.kind: conditional_vae needs labels, and the train part of"):
        check_labels(load_settings("cvae-digits"), photos)
    with pytest.raises(SettingsError, match="model.n_classes: digits has labels from 0 to 9, got 9"):
        check_labels(load_settings("task-digits", ["model.n_classes=9"]), data.load("digits"))
    with pytest.raises(SettingsError, match="model.n_labelled: 1501, and digits has 1500 training images"):
        check_labels(load_settings("m2-digits", ["model.n_labelled=1501"]), data.load("digits"))
    with pytest.raises(SettingsError, match="sweep.beta: a model of kind task_vae takes labels"):
        load_settings("task-digits", ["sweep.beta=[1.0,2.0]"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_figures_given_labels(recipe):
    """Accuracy from a classifier that is made to know; the ELBO is the model's own."""
    model, x = model_of(recipe), data.load("digits").test[:20]
    labels, objective = torch.full((20,), 3), objective_for(model, n_bins=17)
    head = {"m2-digits": lambda: model.classifier[-1], "task-digits": lambda: model.objective.penalties[0].head,
            "cvae-digits": lambda: None}[recipe]()
    if head is not None:
        torch.nn.init.zeros_(head.weight)
        head.bias.data = torch.nn.functional.one_hot(torch.tensor(3), 10).float()
    found = evaluate(model, objective, x, CPU, labels=labels.where(torch.arange(20) < 15, 4))
    assert found.get("accuracy") == (None if head is None else 0.75)
    torch.manual_seed(0)
    given = {"cvae-digits": {"context": labels}, "task-digits": {"targets": labels}}.get(recipe, {})
    expected = objective.report(model.eval(), x, **given)["elbo"].mean()
    if recipe != "cvae-digits":  # there the ELBO depends on the labels
        torch.testing.assert_close(torch.tensor(found["elbo"]), expected.detach(), rtol=1e-5, atol=0)
    assert reconstructions(model, objective, x, CPU, labels=labels).shape == x.shape


def test_samples_go_class_by_class():
    """As many of each, one class beside the other: the grid has a column for each."""
    for recipe in RECIPES[:2]:
        model = model_of(recipe)
        assert classes_of(model) == 10
        torch.nn.init.zeros_(model.decoder.network[0].weight)
        model.decoder.network[0].weight.data[0, 2:] = torch.arange(10.0)  # behind z: the label's one-hot
        drawn, n_broken = samples(model, 25, 17, CPU)
        assert drawn.shape == (30, 1, 8, 8) and n_broken == 0
        for row in drawn.view(3, 10, 64)[1:]:
            assert torch.equal(row, drawn[:10].flatten(1))
    assert classes_of(model_of("task-digits")) == 0


def test_accuracy_is_reported(tmp_path, capsys, threads):
    threads(torch.get_num_threads())
    out = tmp_path / "run"
    cli.main(["train", "m2-digits", "--out", str(out), *(part for setting in (
        "model.hidden_features=8", "train.steps=2", "train.batch_size=8", "train.accumulate=2", "train.device=cpu",
        "train.eval_every=1", "train.checkpoint_every=0", "sample.count=10") for part in ("--set", setting))])
    assert "  accuracy " in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    cli.main(["evaluate", str(out)])
    capsys.readouterr()
    assert 0.0 <= results["accuracy"] == json.loads((out / "evaluation.json").read_text())["accuracy"] <= 1.0
