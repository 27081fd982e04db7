"""Flows near densities known exactly, and in step with the same Glow elsewhere: short forms of the benchmarks."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import equal_steps, page, self_consuming, table, toy2d  # noqa: E402
from fastflow.data.toy2d import TARGETS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_nsf_comes_near_the_moons_in_a_few_steps():
    """Its KL, four standard errors added, is below 0.08 nats; a Gaussian fitted to the moons is left at 0.5."""
    kl, error = toy2d.kl(toy2d.train("moons", "NSF", steps=250, batch_size=256, learning_rate=5e-3), "moons", 10_000)
    x = TARGETS["moons"].sample(10_000, dtype=torch.float64)
    gaussian = torch.distributions.MultivariateNormal(x.mean(0), x.mT.cov())
    assert (TARGETS["moons"].log_prob(x) - gaussian.log_prob(x)).mean() > 0.5
    assert -4 * error < kl < 0.08 - 4 * error


@pytest.mark.slow
@pytest.mark.parametrize("model", toy2d.MODELS)
@pytest.mark.parametrize("target", TARGETS)
def test_the_stated_divergences_are_reached(target, model):
    row = toy2d.row(target, model)
    assert -0.01 < row["mean_kl_nats"] < toy2d.STATED[target, model], row


def test_the_records_keep_what_is_stated():
    record = page.records("cpu-toy2d-*.json")[0]
    assert {(row["target"], row["model"]) for row in record["rows"]} == set(toy2d.STATED)
    for row in record["rows"]:
        assert row["mean_kl_nats"] < toy2d.STATED[row["target"], row["model"]]
    for row in page.records("cpu-equal-steps-*.json")[0]["rows"]:
        assert abs(row["curve"][-1]["difference"]) < equal_steps.WITHIN
        assert row["curve"][0]["fastflow"] - row["curve"][-1]["fastflow"] > 1.0  # it learned something


@pytest.mark.parametrize("name", equal_steps.SETTINGS)
def test_losses_agree_step_by_step(name):
    images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)
    sizes = {"n_steps": 1, "hidden_channels": 8, "image_shape": (3, 16, 16)}
    pair = equal_steps.Pair(name, sizes, images, 8, 1e-2, 12)
    for _ in range(12):
        pair.step()
    own, peer = torch.tensor(pair.losses).T
    torch.testing.assert_close(own, peer, rtol=0, atol=1e-6)
    assert own[0] - own[-1] > 0.02
    bits = pair.bits_per_dim(torch.rand(8, 3, 16, 16) - 0.5)
    assert bits[0] == pytest.approx(bits[1], abs=1e-6)


def test_the_commands_write_their_records(tmp_path, threads):
    threads(1)
    small = "--steps 4 --threads 1 --n-steps 1 --batch-size 4 --hidden-channels 4 --held-out 4"
    assert equal_steps.main([*small.split(), "--results", str(tmp_path)]) == 0
    record = json.loads(next(tmp_path.glob("cpu-equal-steps-*.json")).read_text())
    assert len(table.equal_steps(record)) == 2 + 2 * len(equal_steps.SETTINGS)
    assert toy2d.main(["--steps", "3", "--seeds", "2", "--targets", "ring", "--models", "MAF", "--results",
                       str(tmp_path)]) == 0
    record = json.loads(next(tmp_path.glob("cpu-toy2d-*.json")).read_text())
    (row,) = record["rows"]
    assert row["mean_kl_nats"] == pytest.approx(sum(row["kl_nats"]) / 2, abs=1e-4) and math.isfinite(row["kl_nats"][1])
    assert len(table.toy2d(record, toy2d.STATED)) == 3


def test_the_record_of_self_consuming_chains_is_the_closed_form_and_shows_the_loss():
    record = page.records("cpu-self-consuming-*.json")[0]
    assert record["gaussians"] == self_consuming.gaussians()
    variance = {(row["latent_temperature"], row["fresh_share"]): list(row["variance"].values())
                for row in record["vaes"]}
    assert variance.keys() == {(t, s) for t in self_consuming.LATENT_TEMPERATURES for s in self_consuming.SHARES}
    first, _, last = variance[1.0, 0.0]
    assert last < 0.5 * first and all(variance[1.0, share][2] > 0.5 * variance[1.0, share][0] for share in (0.1, 0.3))
    assert variance[1.3, 0.0][2] > 5.0 * variance[1.3, 0.0][0]


def test_a_self_consuming_chain_runs(tmp_path, threads, monkeypatch):
    threads(1)
    monkeypatch.setattr(self_consuming, "STEPS", 10)
    assert self_consuming.main(["--generations", "2", "--chains", "1", "--results", str(tmp_path)]) == 0
    record = json.loads(next(tmp_path.glob("cpu-self-consuming-*.json")).read_text())
    assert len(record["vaes"]) == 6
    assert all(math.isfinite(v) for row in record["vaes"] for v in row["variance"].values())


@pytest.fixture
def recipes():
    for name in ("rich", "pydantic", "safetensors", "matplotlib", "sklearn"):
        pytest.importorskip(name)
    from benchmarks import recipes

    return recipes


def test_the_page_says_what_the_records_of_the_recipes_do(recipes):
    """Each was trained to the last step of the recipe as it is."""
    from fastflow.engine import load_settings

    lines = (ROOT / "docs/diagnosis.md").read_text().splitlines()
    for name in recipes.RECIPES:
        figures = page.records(f"cpu-recipe-{name}-*.json")[0]["figures"]
        assert recipes.row(name, figures) in lines and figures["step"] == load_settings(name).train.steps
        assert math.isclose(figures["elbo"], -figures["rate"] - figures["distortion"], rel_tol=1e-4)


@pytest.mark.slow
def test_a_recipe_is_measured(recipes, tmp_path, threads, capsys):
    threads(1)
    assert recipes.main(["vdvae-digits", "--steps", "2", "--results", str(tmp_path)]) == 0
    record = json.loads(next(tmp_path.glob("cpu-recipe-vdvae-digits-*.json")).read_text())
    assert recipes.row("vdvae-digits", record["figures"]) in capsys.readouterr().out.splitlines()
    assert record["figures"]["step"] == 2 and len(record["figures"]["diagnosis"]) == 2
