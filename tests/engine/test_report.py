"""The report of a run: complete in itself, its diagnosis equal to the model's own terms."""

import pytest
import torch

from fastflow import cli
from fastflow.engine import build_model, load_settings
from fastflow.engine.report import curve, kl_per_latent


@pytest.mark.parametrize("recipe", ["vae-digits", "iwae-digits", "dvae-digits"])
def test_kl_per_latent_sums_to_the_models_rate(recipe):
    torch.manual_seed(0)
    model = build_model(load_settings(recipe)).double()
    x = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        kl, rate = kl_per_latent(model, x), model.elbo(x).rate.mean()
    assert kl.dim() == 1 and (kl >= 0).all()
    torch.testing.assert_close(kl.sum(), rate.to(kl.dtype), rtol=1e-6, atol=1e-9)


def test_a_trained_run_stops_resumes_and_is_reported(tmp_path, capsys, threads):
    threads(torch.get_num_threads())
    small = ["model.hidden_features=16", "model.latent_features=4", "train.log_every=1", "sample.count=4"]
    for steps in (2, 4):
        cli.main(["train", "vae-digits", "--out", str(tmp_path), "--resume", "auto", "--set", f"train.steps={steps}",
                  *(part for setting in small for part in ("--set", setting))])
    assert "continuing after step 2" in capsys.readouterr().out
    cli.main(["report", str(tmp_path)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3  # samples, reconstructions, traversals
    for word in ("elbo", "rate", "distortion", "polyline", "KL per latent", "median images/s", "train.learning_rate"):
        assert word in page
    assert 'src="http' not in page and "<script" not in page


def test_a_directory_without_a_run_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["report", str(tmp_path)])
    assert "holds no checkpoints" in capsys.readouterr().err


def test_a_curve_leaves_out_what_is_not_finite():
    drawn = curve("loss", [(1, 2.0), (2, float("nan")), (3, 1.0), (4, float("inf"))])
    assert "nan" not in drawn and "inf" not in drawn and "step 3" in drawn
    assert not curve("loss", [(1, 2.0)])


def test_a_dry_run_says_what_a_step_takes_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(["train", "vae-digits", "--dry-run"])
    found = dict(line.split() for line in capsys.readouterr().out.splitlines())
    expected = sum(p.numel() for p in build_model(load_settings("vae-digits")).parameters())
    assert int(found["parameters"].replace(",", "")) == expected and int(found["activation_bytes"].replace(",", "")) > 0
    assert not list(tmp_path.iterdir())
