"""The commands driven as a user would, one of each in a process of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastflow import cli
from fastflow.engine.export import load_exported
from fastflow.engine.run import load_trained

TINY = {
    "glow-digits": ["model.n_levels=1", "model.n_steps=2", "model.hidden_channels=8", "train.batch_size=100"],
    "glow-photos": ["model.n_levels=2", "model.n_steps=1", "model.hidden_channels=4", "train.batch_size=8"],
    "vae-digits": ["model.hidden_features=16", "model.latent_features=4", "train.batch_size=100"],
}
FIGURES = {"glow-digits": ["bits/dim"], "glow-photos": ["bits/dim"], "vae-digits": ["ELBO", "rate", "distortion"]}


def process(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "fastflow.cli", *map(str, arguments)], capture_output=True, text=True,
                          timeout=300, check=False, **options)


@pytest.fixture
def fastflow(capsys, threads):
    """fastflow(*arguments) runs one command in this process and returns what a process of its own would."""
    threads(torch.get_num_threads())  # commands set it; the fixture puts it back

    def run(*arguments):
        capsys.readouterr()
        try:
            cli.main([str(argument) for argument in arguments])
            status = 0
        except SystemExit as leaving:
            status = leaving.code
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, status, out, err)
    return run


def tiny(recipe, steps):
    settings = [*TINY[recipe], f"train.steps={steps}", "train.threads=1", "train.device=cpu", "train.eval_every=0",
                "train.checkpoint_every=0", "train.log_every=1", "sample.count=6"]
    return [part for setting in settings for part in ("--set", setting)]


def picture(path):
    image = np.asarray(Image.open(path))
    assert image.std() > 1
    return image


@pytest.mark.parametrize("recipe", TINY)
def test_train_resume_evaluate_sample(recipe, tmp_path, fastflow, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Path("runs") / recipe  # where it goes by default
    first = fastflow("train", recipe, *tiny(recipe, 3))
    assert first.returncode == 0 and not first.stderr, first.stderr
    checkpoint = run / "checkpoints" / "step-000003"
    assert sorted(p.name for p in checkpoint.glob("*.safetensors")) == ["ema.safetensors", "model.safetensors",
                                                                         "training.safetensors"]
    picture(run / "samples" / "step-000003.png")
    assert (run / "samples" / "reconstructions-step-000003.png").exists() == (recipe == "vae-digits")
    for word in (*FIGURES[recipe], "step-000003.png", "checkpoints/step-000003"):
        assert word in first.stdout

    more = fastflow("train", recipe, *tiny(recipe, 5), "--resume", "auto")
    assert more.returncode == 0 and "continuing after step 3" in more.stdout, more.stderr
    assert (run / "checkpoints" / "step-000005").is_dir() and not (tmp_path / "runs" / f"{recipe}-2").exists()

    evaluated = fastflow("evaluate", run)
    assert evaluated.returncode == 0, evaluated.stderr
    results, evaluation = (json.loads((run / f"{name}.json").read_text()) for name in ("results", "evaluation"))
    assert evaluation["step"] == results["step"] == 5
    for figure in ("bits_per_dim", "elbo", "rate", "distortion"):
        assert evaluation.get(figure) == results.get(figure)
    assert f"bits/dim {evaluation['bits_per_dim']:.4f}" in evaluated.stdout

    pictures = []
    for seed, count in ((3, 4), (3, 4), (4, 4)):
        sampled = fastflow("sample", run, "--seed", seed, "-n", count, "--step", 3)
        assert sampled.returncode == 0, sampled.stderr
        path = Path(sampled.stdout.strip())
        assert path == run / "samples" / f"step-000003-seed-{seed}.png"
        pictures.append(picture(path))
    assert np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[0], pictures[2])
    unknown = fastflow("sample", run, "--step", 4)
    assert unknown.returncode == 1 and "no checkpoint of step 4, only of 3, 5" in unknown.stderr
    (run / "checkpoints" / "step-000005" / "state.json").write_text("{")
    bad = fastflow("sample", run)
    assert bad.returncode == 1 and "state.json: truncated" in bad.stderr and "of steps 3" in bad.stderr


@pytest.mark.parametrize("n", [pytest.param(7, marks=pytest.mark.slow), 1])
def test_a_vae_of_few_held_out_images(n, tmp_path, fastflow):
    """Pictures of those there are; of one image what several are needed for is left out, and said to be."""
    for part, count in (("train", 80), ("test", n)):
        (tmp_path / part).mkdir()
        for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (count, 8, 8), np.uint8)):
            Image.fromarray(image).save(tmp_path / part / f"{i}.png")
    run, data = tmp_path / "run", ["--set", f"data.path={tmp_path}", "--set", "data.shape=[]", "--set",
                                   "train.batch_size=40", "--set", "train.sample_every=1"]
    trained = fastflow("train", "vae-digits", *tiny("vae-digits", 2), *data, "--out", run)
    assert trained.returncode == 0, trained.stderr
    for step in (1, 2):
        picture(run / "samples" / f"reconstructions-step-00000{step}.png")
    evaluated = fastflow("evaluate", run)
    assert evaluated.returncode == 0 and f"{n} images, step 2" in evaluated.stdout, evaluated.stderr
    assert ("left out" in evaluated.stdout) == (n == 1) == ("active units" not in evaluated.stdout)
    assert "nan" not in evaluated.stdout
    reported = fastflow("report", run)
    assert reported.returncode == 0 and (run / "report.html").exists(), reported.stderr


@pytest.mark.parametrize("format, function, samples", [
    ("torch_export", "decode", 1), pytest.param("torch_export", "elbo", 3, marks=pytest.mark.slow),
    pytest.param("aoti", "decode", 1, marks=pytest.mark.slow)])  # compiles for a minute
def test_export_a_function(format, function, samples, tmp_path, fastflow):
    assert fastflow("train", "vae-digits", *tiny("vae-digits", 1), "--out", tmp_path).returncode == 0
    written = fastflow("export", tmp_path, "--format", format, "--function", function, "--samples", samples)
    assert written.returncode == 0, written.stderr
    path = Path(written.stdout.strip())
    assert path.parent == tmp_path / "export" and path.stem == f"step-000001-{format}-{function}"
    about = json.loads(path.with_name(f"{path.name}.json").read_text())
    assert (about["format"], about["function"]) == (format, function)
    model = load_trained(tmp_path, "cpu").model.eval()
    x, z = torch.rand(2, 1, 8, 8), torch.randn(samples, 2, 4)
    with torch.no_grad():
        if function == "elbo":
            found, want = load_exported(path)(x, z)["elbo"], model.elbo(x, n_samples=samples, eps=z).elbo
        else:
            found, want = load_exported(path)(z[0]), model.likelihood.mean(model.decoder(z[0]))
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_a_second_run_gets_a_directory_of_its_own(tmp_path, fastflow, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expected in ("glow-digits", "glow-digits-2"):
        done = fastflow("train", "glow-digits", *tiny("glow-digits", 0))
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "runs" / expected / "checkpoints" / "step-000000").is_dir()
    again = fastflow("train", "glow-digits", *tiny("glow-digits", 1), "--resume", "auto")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "runs" / "glow-digits-2" / "checkpoints" / "step-000001").is_dir()


def test_a_damaged_checkpoint_is_named_and_a_resume_goes_back_aloud(tmp_path, fastflow):
    for steps in (1, 2):
        fastflow("train", "glow-digits", *tiny("glow-digits", steps), "--out", tmp_path, "--resume", "auto")
    damaged = tmp_path / "checkpoints" / "step-000002" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-9] ^= 4
    damaged.write_bytes(content)
    for command in ("evaluate", "sample"):
        refused = fastflow(command, tmp_path)
        assert refused.returncode == 1 and f"{damaged}: corrupt" in refused.stderr and refused.stderr.count("\n") == 1
    again = fastflow("train", "glow-digits", *tiny("glow-digits", 3), "--set", "train.checkpoint_every=1",
                     "--out", tmp_path, "--resume", "auto")
    assert again.returncode == 0 and "continuing after step 1" in again.stdout
    assert again.stderr.count("\n") == 1 and f"WARNING: passing over a bad checkpoint: {damaged}" in again.stderr
    assert fastflow("evaluate", tmp_path, "--step", 2).returncode == 0  # written anew on the way


def test_the_commands_as_processes(tmp_path):
    """SIGTERM saves and says how to go on; the checkpoint serves another process, and the run is not begun again."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "fastflow.cli", "train", "glow-digits", "--out", str(out),
               *tiny("glow-digits", 1_000_000), "--set", "train.max_seconds=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONUNBUFFERED": "1"}) as training:
        log = out / "metrics.jsonl"
        while training.poll() is None and not (log.exists() and log.stat().st_size):
            time.sleep(0.05)
        training.send_signal(signal.SIGTERM)
        _, err = training.communicate(timeout=120)
    assert training.returncode == 143 and err.count("\n") == 1, err
    step = int(re.search(r"SIGTERM: stopped after step (\d+), saved as", err).group(1))
    assert (out / "checkpoints" / f"step-{step:06d}" / "manifest.json").is_file()
    sampled = process("sample", out)
    assert sampled.returncode == 0 and not sampled.stderr and f"step-{step:06d}-seed-0.png" in sampled.stdout
    refused = process("train", "glow-digits", "--out", out)
    assert refused.returncode == 1 and "already holds a run" in refused.stderr and refused.stderr.count("\n") == 1
    assert not refused.stdout


def test_a_directory_that_cannot_be_written_is_named(tmp_path, fastflow):
    if os.geteuid() == 0:
        target = Path("/proc/no-such-run")  # root may write anywhere else
    else:
        target = tmp_path / "locked" / "run"
        target.parent.mkdir(mode=0o500)
    refused = fastflow("train", "glow-digits", *tiny("glow-digits", 1), "--out", target)
    assert refused.returncode == 1 and str(target) in refused.stderr and refused.stderr.count("\n") == 1
