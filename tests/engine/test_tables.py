"""Training on tables: the split, the standardisation that the model keeps, and log-likelihoods in the data's units."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastflow import cli, data
from fastflow.engine import SettingsError, build_model, load_settings
from fastflow.engine.datasets import load_data
from fastflow.engine.models import standardize
from fastflow.engine.run import load_trained

UNITS = torch.tensor([1e-4, 1.0, 250.0])


def table(n=300, seed=0):
    """Rows (n, 3) that no Gaussian fits: a curved ridge."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3))
    x[:, 1] = x[:, 0]**2 + 0.2 * x[:, 1]
    return x


def parts(root, rows, columns=("a", "b", "c")):
    """Writes train.csv, val.csv and test.csv in a folder."""
    root.mkdir(exist_ok=True)
    for name, part in zip(("train", "val", "test"), np.split(rows, [len(rows) // 2, 3 * len(rows) // 4]), strict=True):
        header = ",".join(f'"{name}"' for name in columns)
        np.savetxt(root / f"{name}.csv", part, "%.9g", ",", header=header, comments="")
    return root


@pytest.fixture
def fastflow(threads, capsys):
    threads(torch.get_num_threads())

    def run(*arguments):
        cli.main([str(a) for a in arguments])
        return capsys.readouterr().out
    return run


def settings(path, recipe="maf-breast-cancer", *more):
    return load_settings(recipe, [f"data.path={path}", "data.validation_fraction=0", "model.n_layers=2",
                                  "model.hidden=[16]", *more])


@pytest.mark.parametrize("recipe", ["maf-breast-cancer", "realnvp-patches", "nsf-miniboone"])
def test_densities_are_in_the_units_of_the_data(tmp_path, recipe):
    """log p(x) of the model is that of a flow of standardised columns less the logarithms of the deviations; other
    units shift it by theirs."""
    rows = table()
    tables = [load_data(settings(parts(tmp_path / f"{i}", rows * unit.numpy() + i), recipe, "data.shape=[3]"))
              for i, unit in enumerate((torch.ones(3), UNITS))]
    models = []
    for each in tables:
        torch.manual_seed(0)
        model = build_model(settings(each.name, recipe, "data.shape=[3]"))
        standardize(model, each)
        model.initialize(each.train)
        models.append(model)
    with torch.no_grad():
        plain, scaled = (model.log_prob(each.test) for model, each in zip(models, tables, strict=True))
        # float32 has 24 bits for 1 + 1e-4 x, too: that column's noise is the tolerance
        assert torch.allclose(scaled + UNITS.log().sum(), plain, atol=2e-2)
        mean, deviation = tables[0].moments()
        inner = models[0].transform.transforms[1:]
        z, total = ((tables[0].test - mean) / deviation).float(), 0.0
        for layer in inner:
            z, logdet = layer(z)
            total = total + logdet
        expected = models[0].base.log_prob(z) + total - deviation.log().sum()
        assert torch.allclose(plain, expected.float(), atol=1e-4)
        back = models[0].sample(4000)
    assert torch.isfinite(back).all() and abs(back.mean(0) - mean).max() < 5 * deviation.max() / math.sqrt(len(back))


def test_nothing_of_the_other_parts_enters_the_standardisation(tmp_path):
    rows = table()
    other = rows.copy()
    other[len(rows) // 2:] *= 1000.0  # validation and test alone
    buffers = []
    for name, values in (("one", rows), ("two", other)):
        found = load_data(settings(parts(tmp_path / name, values)))
        model = build_model(settings(found.name, "maf-breast-cancer", "data.shape=[3]"))
        standardize(model, found)
        buffers.append([b.clone() for b in model.transform.transforms[0].buffers()])
        assert len(found.train) == 150 and len(found.validation) == 75 and len(found.test) == 75
    assert all(map(torch.equal, *buffers)) and torch.allclose(buffers[0][0], torch.tensor(rows[:150].mean(0)).float())


def test_the_parts_share_no_row(tmp_path):
    np.save(tmp_path / "t.npy", table())
    found = load_data(load_settings("maf-breast-cancer", [f"data.path={tmp_path / 't.npy'}", "data.test_fraction=0.2",
                                                          "data.validation_fraction=0.25"]))
    assert [len(part) for part in (found.train, found.validation, found.test)] == [180, 60, 60]
    together = torch.cat([found.train, found.validation, found.test])
    assert len(torch.unique(together, dim=0)) == 300
    again = data.load(tmp_path / "t.npy", test_fraction=0.2)  # validation rows come from the training part
    assert torch.equal(again.test, found.test) and found.fingerprint() != again.fingerprint()
    with pytest.raises(ValueError, match="validation_fraction: expected 0, because the training crops of patches"):
        data.load("patches", validation_fraction=0.1)


def test_held_out_rows_of_a_table_that_grew_are_doubted(tmp_path, threads, capsys):
    """A fresh split has put rows of the training into the held-out part."""
    threads(torch.get_num_threads())
    path, out = tmp_path / "t.npy", tmp_path / "run"
    np.save(path, table(200))
    cli.main(["train", "realnvp-patches", "--out", str(out), *(part for setting in (
        f"data.path={path}", "data.shape=[]", "data.validation_fraction=0", "model.n_layers=2", "model.hidden=[8]",
        "train.steps=1", "train.batch_size=32", "sample.count=4") for part in ("--set", setting))])
    for grown in (False, True):
        if grown:
            np.save(path, np.concatenate([table(200), table(20, seed=1)]))
        capsys.readouterr()
        cli.main(["evaluate", str(out)])
        said = capsys.readouterr()
        assert "held-out log-likelihood" in said.out
        assert said.err == (f"fastflow: WARNING: {path} holds other rows than in training, which may have seen some of "
                            f"those that are held out now\n" if grown else "")
        assert json.loads((out / "evaluation.json").read_text())["other_data"] is grown
        cli.main(["report", str(out)])
        assert ("holds other rows than in training" in (out / "report.html").read_text()) is grown


def test_a_run_keeps_what_it_needs_without_the_table(tmp_path, fastflow):
    rows = table()
    folder, out = parts(tmp_path / "rows", rows, ("a", "b, with a comma", "c")), tmp_path / "run"
    options = ("train", "maf-breast-cancer", "--out", out, "--set", f"data.path={folder}",
               "--set", "data.validation_fraction=0")
    said = fastflow(*options, "--set", "train.steps=60", "--set", "train.eval_every=20", "--set", "sample.count=5")
    assert "150 training, 75 validation and 75 held-out rows of 3" in said and "validation log-likelihood" in said
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"log_prob", "rows_per_second"} <= log[0].keys() and "bits_per_dim" not in log[0]
    assert [line["step"] for line in log if "validation_log_prob" in line] == [20, 40]
    results = json.loads((out / "results.json").read_text())
    samples = np.loadtxt(results["samples"], delimiter=",", skiprows=1)
    assert samples.shape == (5, 3) and results["test_rows"] == 75
    with open(results["samples"]) as file:
        assert file.readline() == 'a,"b, with a comma",c\n'
    fastflow("evaluate", out)
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert evaluation["log_prob"] == results["log_prob"] and evaluation["test_rows"] == 75
    page = Path(fastflow("report", out).strip()).read_text()
    assert f"<td>rows</td><td>75</td></tr><tr><td>log-likelihood</td><td>{results['log_prob']:.4f} nats per row" in page
    assert "64 rows</td>" in page and "rows/s" in page and "bits/dim" not in page
    more = fastflow(*options, "--resume", "auto", "--set", "train.steps=70")
    assert "continuing after step 60" in more
    trained = load_trained(out, "cpu")
    parts(folder, rows)
    with pytest.raises(SettingsError, match="data.columns: the settings have a, b, with a comma, c"):
        load_data(trained.settings)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    assert fastflow("sample", out, "-n", 2).strip().endswith("step-000070-seed-0.csv")
    with pytest.raises(SystemExit):
        fastflow("evaluate", out)


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main([str(a) for a in arguments])
    line = capsys.readouterr().err
    assert caught.value.code == 1 and line.count("\n") == 1
    return line.removeprefix("fastflow: ").rstrip("\n")


def test_what_is_missing_or_wrong_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = ("train", "--out", tmp_path / "run")
    line = refused(capsys, *run, "glow-cifar10")
    assert line == ("data.path: there is nothing at data/cifar-10-python.tar.gz; put cifar-10-python.tar.gz or "
                    "cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html there, or say where the "
                    "data are with --set data.path=PATH (nothing is downloaded)")
    assert "there is nothing at data/imagenet64; put the npz files of the 64x64 images" in refused(capsys, *run, "jet")
    line = refused(capsys, *run, "maf-power")
    assert "at data/power; put train.npy, val.npy and test.npy of POWER (https://zenodo.org/records/1161203" in line
    where = tmp_path / "rows"
    parts(where, table())
    at = ("--set", f"data.path={where}")
    assert refused(capsys, *run, "maf-power", *at) == f"data.shape: the settings have [6], the data at {where} [3]"
    assert "model.kind: glow is for images, and the data have shape [3]" in refused(capsys, *run, "glow-photos", *at)
    assert refused(capsys, *run, "maf-breast-cancer", *at, "--set", "data.verify=false",
                   "--set", "data.validation_fraction=0").startswith("data.verify: table has no such option")
    (where / "val.csv").write_text("a,b,c\n1,2,oops\n")
    assert refused(capsys, *run, "maf-breast-cancer", *at).startswith(f"{where / 'val.csv'}: can't be read")
    constant = table()
    constant[:, 1] = 7.0
    np.save(tmp_path / "constant.npy", constant)
    line = refused(capsys, *run, "maf-breast-cancer", "--set", f"data.path={tmp_path / 'constant.npy'}")
    assert line.startswith(f"data: column x1 of {tmp_path / 'constant.npy'} is constant over the training rows")
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(b"\x1f\x8b" + bytes(50))
    assert refused(capsys, *run, "glow-cifar10", "--set", f"data.path={archive}").startswith(f"{archive}: ")


def gaussian(found):
    """Mean log-density in nats of the test rows under the Gaussian of the training rows' mean and covariance."""
    rows = found.train.double()
    fit = torch.distributions.MultivariateNormal(rows.mean(0), torch.cov(rows.T, correction=0))
    return fit.log_prob(found.test.double()).mean().item()


def test_the_recipe_beats_a_gaussian(tmp_path, fastflow):
    """The recipe as it is, to its end, on rows that it has not seen."""
    fastflow("train", "maf-breast-cancer", "--out", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    found = load_data(load_settings("maf-breast-cancer"))
    assert results["step"] == load_settings("maf-breast-cancer").train.steps
    assert results["log_prob"] > gaussian(found) + 3.0


@pytest.mark.slow
def test_the_patches_recipe_beats_a_gaussian(tmp_path, fastflow):
    fastflow("train", "realnvp-patches", "--out", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["log_prob"] > gaussian(load_data(load_settings("realnvp-patches"))) + 50.0


def test_files_are_utf8_in_every_locale(tmp_path):
    script = ("import pathlib, sys, torch; from fastflow.engine.files import write_rows; "
              "write_rows(pathlib.Path(sys.argv[1]), torch.ones(1, 2), ['gr\\u00f6\\u00dfe', '\\u03bb'])")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # all is ASCII there
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "rows.csv")], check=True, env=environment)
    assert (tmp_path / "rows.csv").read_text("utf-8") == "größe,λ\n1,1\n"
