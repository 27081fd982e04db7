"""A whole run as a user drives it: train, stop, resume, evaluate, sample, export, report."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sweeps import rest_slow

from fastflow import cli
from fastflow.engine.export import load_exported
from fastflow.engine.run import load_trained

TINY = {
    "glow-digits": ["model.n_levels=1", "model.n_steps=2", "model.hidden_channels=8"],
    "vae-digits": ["model.hidden_features=16", "model.latent_features=4", "train.collapse_every=2"],
}
COMMON = ["train.batch_size=50", "train.threads=1", "train.device=cpu", "train.log_every=1", "train.eval_every=0",
          "train.checkpoint_every=0", "train.max_seconds=0", "sample.count=6"]
PAGE = {"glow-digits": ["bits/dim", "largest error of inverse(forward(x))"],
        "vae-digits": ["ELBO", "rate", "distortion", "below each its reconstruction"]}


class Processes:
    """Every command in a process of its own."""

    def command(self, arguments):
        return [sys.executable, "-m", "fastflow.cli", *map(str, arguments)]

    def __call__(self, *arguments):
        return subprocess.run(self.command(arguments), capture_output=True, text=True, timeout=300, check=False)

    def stopped(self, log, *arguments):
        with subprocess.Popen(self.command(arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True) as process:
            while process.poll() is None and not begun(log):
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)


class InProcess:
    """Every command in this process."""

    def __init__(self, capsys):
        self.capsys = capsys

    def __call__(self, *arguments):
        self.capsys.readouterr()
        try:
            cli.main([str(argument) for argument in arguments])
            status = 0
        except SystemExit as leaving:
            status = leaving.code
        return subprocess.CompletedProcess(arguments, status, *self.capsys.readouterr())

    def stopped(self, log, *arguments):
        def stop():
            while not begun(log):
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGTERM)  # a line in the log: the trainer handles signals by now

        watcher = threading.Thread(target=stop, daemon=True)
        watcher.start()
        done = self(*arguments)
        watcher.join(10.0)
        return done


def begun(log):
    return log.exists() and log.stat().st_size > 0


@pytest.fixture
def drive(request, capsys, threads):
    threads(torch.get_num_threads())  # commands set it; the fixture puts it back
    return Processes() if request.param == "processes" else InProcess(capsys)


def tiny(recipe, steps):
    return [part for setting in [*TINY[recipe], *COMMON, f"train.steps={steps}"] for part in ("--set", setting)]


def passed(done, *said):
    assert done.returncode == 0 and not done.stderr, done.stderr
    for word in said:
        assert word in done.stdout
    return done.stdout


def picture(path):
    image = np.asarray(Image.open(path))
    assert image.std() > 1, path
    return image


class Page(HTMLParser):
    """A page's text and what it refers to; open tags must be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.words, self.sources, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.mark.parametrize("recipe", rest_slow(TINY, ["glow-digits"]))
@pytest.mark.parametrize("drive", ["in one process", pytest.param("processes", marks=pytest.mark.slow)], indirect=True)
def test_train_stop_resume_evaluate_sample_export_report(drive, recipe, tmp_path):
    vae, run, whole = recipe == "vae-digits", tmp_path / "run", tmp_path / "whole"
    stopped = drive.stopped(run / "metrics.jsonl", "train", recipe, "--out", run, *tiny(recipe, 1_000_000))
    assert stopped.returncode == 143 and stopped.stderr.count("\n") == 1, stopped.stderr
    step = int(re.search(r"SIGTERM: stopped after step (\d+), saved as", stopped.stderr).group(1))
    assert (run / "checkpoints" / f"step-{step:06d}" / "manifest.json").is_file()
    assert not (run / "results.json").exists()

    steps = step + 5
    said = [f"continuing after step {step}", "held-out bits/dim", f"step {steps}", "samples", "checkpoint"]
    passed(drive("train", recipe, "--out", run, "--resume", "auto", *tiny(recipe, steps)), *said,
           *(["ELBO", "reconstructions", "diagnosis.png"] if vae else []))
    passed(drive("train", recipe, "--out", whole, *tiny(recipe, steps)))
    name = Path("checkpoints") / f"step-{steps:06d}"
    for part in ("model", "ema", "training"):
        first, second = (load_file(out / name / f"{part}.safetensors") for out in (run, whole))
        assert first.keys() == second.keys()
        for key, tensor in first.items():  # Python's and NumPy's own generators begin anew in every process
            assert key.startswith("host_random") or torch.equal(tensor, second[key]), (part, key)
    results, uninterrupted = (json.loads((out / "results.json").read_text()) for out in (run, whole))
    figures = ["bits_per_dim", *(["elbo", "rate", "distortion"] if vae else [])]
    assert [results[name] for name in figures] == [uninterrupted[name] for name in figures]
    logs = [[json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
            for out in (run, whole)]
    assert logs[0] == logs[1] == [*range(1, steps + 1), steps]

    passed(drive("evaluate", run), f"bits/dim {results['bits_per_dim']:.4f}", *(["active units"] if vae else []))
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["step"] == steps and all(evaluation[name] == results[name] for name in figures)
    if vae:
        assert -results["elbo"] == pytest.approx(results["rate"] + results["distortion"], rel=1e-6)
        assert re.search(r"active units \d of 4", (run / "diagnosis" / "diagnosis.txt").read_text())
        picture(run / "diagnosis" / "diagnosis.png")
        picture(run / "samples" / f"reconstructions-step-{steps:06d}.png")

    sampled = Path(passed(drive("sample", run, "-n", 4, "--seed", 1)).strip())
    assert sampled == run / "samples" / f"step-{steps:06d}-seed-1.png"
    picture(sampled)

    exported = passed(drive("export", run)).strip()
    graph = passed(drive("export", run, "--format", "torch_export")).strip()
    trained = load_trained(run, torch.device("cpu")).model.eval()
    for key, tensor in load_exported(exported).state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[key]), key
    x, eps = torch.rand(3, 1, 8, 8) - 0.5, torch.randn(1, 3, 4)
    with torch.no_grad():
        want = trained.elbo(x, eps=eps).elbo if vae else trained.log_prob(x)
        found = load_exported(graph)(x, eps)["elbo"] if vae else load_exported(graph)(x)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)

    assert passed(drive("report", run)).strip() == str(run / "report.html")
    page = Page((run / "report.html").read_text())
    text = " ".join(page.words)
    assert not page.open and page.sources and all(s.startswith("data:image/png;base64,") for s in page.sources)
    assert len(page.sources) == (4 if vae else 2)  # curves, samples; reconstructions, diagnosis
    for word in ("Curves", "Diagnosis", "Throughput", "train.learning_rate", "Environment", "bits/dim",
                 f"{results['bits_per_dim']:.4f}", *PAGE[recipe]):
        assert word in text
    picture(run / "curves.png")
