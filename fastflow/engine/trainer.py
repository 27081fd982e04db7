"""The trainer: a train step in a loop, with evaluation, pictures, checkpoints that resume bit for bit, and a log."""

import json
import math
import time
from pathlib import Path

import torch

from fastflow import data
from fastflow.engine import checkpoint
from fastflow.engine import settings as settings_module
from fastflow.engine import state as state_module
from fastflow.engine.errors import CheckpointError, NonFiniteError, SettingsError
from fastflow.engine.evaluate import describe, evaluate, is_vae, reconstructions, samples
from fastflow.engine.files import write_text
from fastflow.engine.models import build_model, load_weights
from fastflow.engine.pictures import save_grid
from fastflow.engine.progress import TrainProgress
from fastflow.engine.signals import Interrupted, StopSignals
from fastflow.engine.train_step import TrainStep

__all__ = ["Trainer", "choose_device", "set_threads"]

INITIAL_BATCH = 256  # images that the data-dependent layers are initialised with
EMA_HORIZON = 10  # early on the average forgets faster: decay min(ema_decay, (1 + step)/(EMA_HORIZON + step))


def choose_device(name):
    """The torch.device that the setting "auto", "cpu" or "cuda" means here."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError("train.device: cuda was asked for, and torch sees no GPU")
    return torch.device("cuda", torch.cuda.current_device()) if name != "cpu" and torch.cuda.is_available() \
        else torch.device("cpu")


def set_threads(settings):
    """Gives this process the CPU threads that the settings ask for, if they do."""
    if settings.train.threads:
        torch.set_num_threads(settings.train.threads)


class Trainer:
    """Trains one model in one process, in a directory of its own.

    ``out`` gets checkpoints/step-NNNNNN/, samples/*.png, metrics.jsonl and, at the end, results.json.

    Args:
        settings: a :class:`~fastflow.engine.settings.Settings`.
        out: the directory; it may exist.
        console: a rich Console for progress.
        title: the name shown there.

    Raises:
        SettingsError: settings that can't be combined.
    """

    def __init__(self, settings, out, console, title="train"):
        self.settings, self.out, self.console, self.title = settings, Path(out), console, title
        self.device = choose_device(settings.train.device)
        set_threads(settings)
        self.data = data.load(settings.data.name)
        if settings.train.batch_size > len(self.data.train):
            raise SettingsError(f"train.batch_size: {settings.train.batch_size} is more than the "
                                f"{len(self.data.train)} training images")
        torch.manual_seed(settings.train.seed)
        self.model = build_model(settings).to(self.device)
        self.ema = build_model(settings).to(self.device).requires_grad_(False) if settings.train.ema_decay else None
        train, options = settings.train, settings.model
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=train.learning_rate, fused=True)
        self.train_step = TrainStep(
            self.model, self.optimizer, clip_grad_norm=train.clip_grad_norm or None, n_bins=self.data.n_bins,
            n_samples=getattr(options, "n_samples", 1), beta=getattr(options, "beta", 1.0))
        self.step = 0
        self._order = (None, None)
        self._stop = StopSignals()
        self._saved = None
        self._checkpoints = self.out / "checkpoints"

    @property
    def n_parameters(self):
        """How many numbers are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def start(self):
        """A fresh run: initialises data-dependent layers from training images."""
        first = self.data.train[torch.randperm(len(self.data.train))[:INITIAL_BATCH]].to(self.device)
        if hasattr(self.model, "initialize"):
            self.model.initialize(self.train_step.objective.prepare(self.model, first)[0])
        if self.ema is not None:
            self.ema.load_state_dict(self.model.state_dict())

    def resume(self, loaded):
        """Continues from a :class:`~fastflow.engine.checkpoint.Checkpoint` exactly where it was saved.

        Raises:
            SettingsError: the settings differ in what a continuation may not change.
            CheckpointError: it does not fit this model or these images.
        """
        old = settings_module.from_dict(loaded.state.get("settings"))
        if changed := settings_module.differences(old, self.settings):
            raise SettingsError(f"{', '.join(changed)}: may not change on resume")
        if self.settings.train.steps < loaded.step:
            raise SettingsError(f"train.steps: {self.settings.train.steps} is less than the {loaded.step} steps done")
        if loaded.state.get("data") != self.data.fingerprint():
            raise CheckpointError(f"{loaded.path}: was trained on other images than the installed libraries hold")
        load_weights(self.model, loaded, "model")
        if self.ema is not None:
            load_weights(self.ema, loaded, "ema")
        training = _grouped(loaded.tensors.get("training", {}))
        try:
            state_module.restore_optimizer(self.optimizer, training.get("optimizer", {}), loaded.state["optimizer"])
            state_module.restore_random(training["random"], self.device)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{loaded.path}: does not fit this run ({error})") from error
        self.step, self._saved = loaded.step, loaded.path
        self._trim_log()

    def run(self):
        """Trains to ``train.steps`` or ``train.max_seconds``, saves, evaluates and draws.

        Returns:
            {name: value}: the held-out figures, the step, and the paths of checkpoint and pictures.

        Raises:
            Interrupted: SIGTERM or SIGINT came; the step in hand was finished and saved.
            NonFiniteError: a loss or gradient is not finite; nothing was changed by that step.
        """
        train = self.settings.train
        self.out.mkdir(parents=True, exist_ok=True)
        checkpoint.clean(self._checkpoints)
        self.model.train()
        deadline = time.monotonic() + (train.max_seconds or float("inf"))
        progress = TrainProgress(self.console, self.title, train.steps, self.step)
        with self._stop, open(self.out / "metrics.jsonl", "a", buffering=1) as log, progress:
            while self.step < train.steps and time.monotonic() < deadline:
                figures = self._advance(progress)
                if self.step % train.log_every == 0 or self.step == train.steps:
                    log.write(json.dumps({"step": self.step, **figures}) + "\n")
                if train.checkpoint_every and self.step % train.checkpoint_every == 0:
                    self.save()
                self._check_stop()
                if train.eval_every and self.step % train.eval_every == 0 and self.step < train.steps:
                    progress.say(f"step {self.step}: held-out " + describe(self.evaluate(log)))
            if self.step < train.steps:
                progress.say(f"step {self.step}: {train.max_seconds:g} seconds are over (train.max_seconds)")
            self.save()
            results = {"step": self.step, **self.evaluate(log), "test_images": len(self.data.test),
                       "checkpoint": str(self._saved), **self.draw()}
        write_text(self.out / "results.json", json.dumps(results, indent=1) + "\n")
        return results

    def _advance(self, progress):
        """One training step; returns its figures."""
        train = self.settings.train
        begin = time.perf_counter()
        x = self.batch(self.step).to(self.device)
        if train.warmup_steps:
            for group in self.optimizer.param_groups:
                group["lr"] = train.learning_rate * min(1.0, (self.step + 1) / train.warmup_steps)
        try:
            loss = self.train_step(x).item()
        except NonFiniteError as error:
            raise NonFiniteError(f"step {self.step + 1}: {error}", error.module) from None
        self.step += 1
        if self.ema is not None:
            self._average()
        figures = {"bits/dim": loss / (x[0].numel() * math.log(2))}
        if "rate" in self.train_step.parts:
            rate, distortion = (self.train_step.parts[name].item() for name in ("rate", "distortion"))
            figures = {"elbo": -rate - distortion, "rate": rate, "distortion": distortion}
        speed = len(x) / (time.perf_counter() - begin)
        progress.update(self.step, figures, speed)
        return {"loss": loss, **{k.replace("/", "_per_"): v for k, v in figures.items()},
                "grad_norm": self.train_step.parts["grad_norm"].item(), "images_per_second": speed}

    def batch(self, step):
        """The images (batch_size, C, H, W) of that step: every epoch in an order of its own, its remainder left out."""
        n, size = len(self.data.train), self.settings.train.batch_size
        epoch, index = divmod(step, n // size)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed((self.settings.train.seed * 1_000_003 + epoch) % 2**63)
            self._order = epoch, torch.randperm(n, generator=generator)
        return self.data.train[self._order[1][index * size:(index + 1) * size]]

    @torch.no_grad()
    def _average(self):
        decay = min(self.settings.train.ema_decay, (1 + self.step) / (EMA_HORIZON + self.step))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        for average, current in zip(self.ema.buffers(), self.model.buffers(), strict=True):
            average.copy_(current)

    def _check_stop(self):
        """Saves and stops if a signal came; called after every step and between the batches of an evaluation."""
        if self._stop.received:
            self.save()
            raise Interrupted(self._stop.received, f"stopped after step {self.step}, saved as {self._saved}")

    def evaluate(self, log):
        """Held-out figures of the averaged weights, or of the weights where there is no average; a line in the log."""
        figures = evaluate(self.ema or self.model, self.train_step.objective, self.data.test, self.device,
                           poll=self._check_stop)
        log.write(json.dumps({"step": self.step, **{f"test_{name}": value for name, value in figures.items()}}) + "\n")
        return figures

    def draw(self):
        """Writes the sample grid and, for a VAE, originals above their reconstructions; returns the paths, and how many
        samples are not finite, by name."""
        model, n_bins, options = self.ema or self.model, self.data.n_bins, self.settings.sample
        name = f"step-{self.step:06d}.png"
        drawn, n_broken = samples(model, options.count, n_bins, self.device, options.temperature)
        pictures = {"samples": str(save_grid(self.out / "samples" / name, drawn, n_bins)), "broken_samples": n_broken}
        if is_vae(model):
            original = self.data.test[:32]
            made = reconstructions(model, self.train_step.objective, original, self.device).cpu()
            pairs = torch.stack([original.unflatten(0, (-1, 8)), made.unflatten(0, (-1, 8))], 1).flatten(0, 2)
            path = self.out / "samples" / f"reconstructions-{name}"
            pictures["reconstructions"] = str(save_grid(path, pairs, n_bins, n_columns=8))
        return pictures

    def save(self):
        """Writes a checkpoint of this moment, unless there is one already."""
        if self._saved is not None and checkpoint.step_of(self._saved) == self.step:
            return
        optimizer, plain = state_module.optimizer_state(self.optimizer)
        tensors = {"model": self.model.state_dict(), "training": {
            **{f"optimizer.{name}": t for name, t in optimizer.items()},
            **{f"random.{name}": t for name, t in state_module.random_state(self.device).items()}}}
        if self.ema is not None:
            tensors["ema"] = self.ema.state_dict()
        state = {"settings": self.settings.model_dump(), "optimizer": plain, "data": self.data.fingerprint(),
                 "title": self.title, "torch": torch.__version__}
        keep = self.settings.train.keep_checkpoints
        self._saved = checkpoint.save(self._checkpoints, self.step, tensors, state, keep)

    def _trim_log(self):
        """Drops the log's lines after the step that is resumed from: they will be written again."""
        path = self.out / "metrics.jsonl"
        if path.is_file():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= self.step]
            write_text(path, "".join(line + "\n" for line in kept))


def _step_of(line):
    """The step of one line of the log; infinity for a line that a kill cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _grouped(tensors):
    """{"a.b": t} as {"a": {"b": t}}."""
    groups = {}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        groups.setdefault(group, {})[rest] = tensor
    return groups
