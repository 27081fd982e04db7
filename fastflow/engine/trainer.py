"""The trainer: a train step in a loop, with evaluation, pictures, checkpoints that resume bit for bit, and a log."""

import contextlib
import json
import math
import os
import time
from pathlib import Path

import torch

from fastflow import data
from fastflow.engine import checkpoint
from fastflow.engine import settings as settings_module
from fastflow.engine import state as state_module
from fastflow.engine.collapse import CollapseWatch
from fastflow.engine.distributed import Processes, is_sharded, whole, wrapped
from fastflow.engine.errors import CheckpointError, NonFiniteError, RunError, SettingsError
from fastflow.engine.evaluate import describe, evaluate, is_vae
from fastflow.engine.files import write_text
from fastflow.engine.gallery import draw, draw_curves
from fastflow.engine.layout import convolutions_to_channels_last
from fastflow.engine.models import build_model, load_weights
from fastflow.engine.objectives import objective_for
from fastflow.engine.progress import TrainProgress
from fastflow.engine.signals import Interrupted, StopSignals
from fastflow.engine.train_step import TrainStep
from fastflow.vae import LinearSchedule

__all__ = ["Trainer", "choose_device", "set_threads"]

INITIAL_BATCH = 256  # images that the data-dependent layers are initialised with
EMA_WARMUP = 10  # early on the average forgets faster: decay min(ema_decay, (1 + n)/(EMA_WARMUP + n)) after n updates


def choose_device(name):
    """The torch.device that the setting "auto", "cpu" or "cuda" means here."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError("train.device: cuda was asked for, and torch sees no GPU")
    if name != "cpu" and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:  # torchrun: a GPU for each process
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device("cuda", torch.cuda.current_device()) if name != "cpu" and torch.cuda.is_available() \
        else torch.device("cpu")


@contextlib.contextmanager
def out_of_memory_explained(settings):
    """Turns running out of memory into a :class:`RunError` that says what to turn on."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        train = settings.train
        reason = " ".join(str(error).split())[:120]
        raise RunError(f"out of memory with batches of {train.batch_size} in {train.accumulate} parts: raise "
                       f"train.accumulate, or lower train.batch_size or the model's size; under torchrun, "
                       f"train.strategy=fsdp spreads the model over the processes ({reason})") from error


def set_threads(settings):
    """Gives this process the CPU threads that the settings ask for, if they do."""
    if settings.train.threads:
        torch.set_num_threads(settings.train.threads)


class Trainer:
    """Trains one model, in one process or in all that torchrun started, in a directory of its own that all of them see.

    ``out`` gets checkpoints/step-NNNNNN/, samples/*.png, metrics.jsonl and, at the end, results.json; the first process
    writes them. A batch is that of all processes together, each takes its share of it, in ``train.accumulate`` parts.

    Args:
        settings: a :class:`~fastflow.engine.settings.Settings`.
        out: the directory; it may exist.
        console: a rich Console for progress.
        title: the name shown there.

    Attributes:
        processes: the :class:`~fastflow.engine.distributed.Processes`.
        train_step: the :class:`~fastflow.engine.train_step.TrainStep`, None before :meth:`start` or :meth:`resume`.
        step: training steps done; ``skipped`` of them changed nothing because they were not finite.

    Raises:
        SettingsError: settings that can't be combined.
    """

    def __init__(self, settings, out, console, title="train"):
        self.settings, self.out, self.console, self.title = settings, Path(out), console, title
        train = settings.train
        self.device = choose_device(train.device)
        set_threads(settings)
        self.processes = Processes(self.device, train.process_timeout)
        if self.processes.rank:
            self.console.quiet = True
        self.data = data.load(settings.data.name)
        if train.batch_size > len(self.data.train):
            raise SettingsError(f"train.batch_size: {train.batch_size} is more than the "
                                f"{len(self.data.train)} training images")
        if train.batch_size % (self.processes.count * train.accumulate):
            raise SettingsError(f"train.batch_size: {train.batch_size} is not a multiple of {self.processes.count} "
                                f"processes times train.accumulate={train.accumulate}")
        torch.manual_seed(train.seed)
        self.model = build_model(settings).to(self.device)
        if train.kl_warmup_steps and not is_vae(self.model):
            raise SettingsError(f"train.kl_warmup_steps: a model of kind {settings.model.kind!r} has no rate to weigh")
        self.train_step = self.optimizer = None
        self.step = self.skipped = 0
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
        self._agree_on_start(-1)
        first = self.data.train[torch.randperm(len(self.data.train))[:INITIAL_BATCH]].to(self.device)
        if hasattr(self.model, "initialize"):
            objective = objective_for(self.model, n_bins=self.data.n_bins)
            self.model.initialize(objective.prepare(self.model, first)[0])
        self._prepare()
        if self.processes.rank:  # the noise of each process is its own
            torch.manual_seed(torch.initial_seed() + self.processes.rank)

    def _agree_on_start(self, step):
        steps = {int(t) for t in self.processes.gather(torch.tensor(step))}
        if len(steps) > 1:
            raise RunError(f"the processes would begin at different steps, {sorted(steps)}: {self.out} must be a "
                           f"directory that all of them share")

    def _prepare(self):
        """The optimizer and the train step for a model whose weights are in place."""
        train, options, model = self.settings.train, self.settings.model, self.model
        sharded = self.processes.count > 1 and train.strategy == "fsdp"
        if sharded:
            model = wrapped(model, "fsdp", self.device)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=train.learning_rate, fused=not sharded)
        if self.processes.count > 1 and not sharded:
            convolutions_to_channels_last(model, self.optimizer, None)
            model = wrapped(model, "ddp", self.device)
        self.train_step = TrainStep(
            model, self.optimizer, clip_grad_norm=train.clip_grad_norm or None, accumulate=train.accumulate,
            ema_decay=train.ema_decay or None, ema_warmup=EMA_WARMUP, n_bins=self.data.n_bins,
            n_samples=getattr(options, "n_samples", 1), beta=getattr(options, "beta", 1.0))

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
        self._agree_on_start(loaded.step)
        load_weights(self.model, loaded, "model")
        self._prepare()
        training = _grouped(loaded.tensors.get("training", {}))
        try:
            self.skipped, count = int(loaded.state["skipped"]), int(loaded.state["processes"])
            state_module.restore_optimizer(self.optimizer, training.get("optimizer", {}), loaded.state["optimizer"])
            if self.train_step.ema is not None:
                if "ema" not in loaded.tensors:
                    raise CheckpointError(f"{loaded.path}: has no ema.safetensors")
                averages = {name: loaded.tensors["ema"][name] for name in self.train_step.ema.parameters}
                self.train_step.ema.load_state_dict(averages, loaded.step - self.skipped)
            if count == self.processes.count:
                state_module.restore_random(_row(training["random"], self.processes.rank), self.device)
                state_module.restore_host_random(_row(training["host_random"], self.processes.rank))
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{loaded.path}: does not fit this run ({error})") from error
        if count != self.processes.count:
            torch.manual_seed((self.settings.train.seed + loaded.step * 1_000_003 + self.processes.rank) % 2**63)
            self.console.print(f"saved by {count} processes, continued by {self.processes.count}: the same images "
                               f"in the same order, with other noise", highlight=False, soft_wrap=True)
        self.step, self._saved = loaded.step, loaded.path
        if self.processes.rank == 0:
            self._trim_log()

    def run(self):
        """Trains to ``train.steps`` or ``train.max_seconds``, saves, evaluates and draws.

        Returns:
            {name: value}: the held-out figures, the step, and the paths of checkpoint and pictures.

        Raises:
            Interrupted: SIGTERM, SIGUSR1 or SIGINT came to one of the processes; the step in hand was finished and
                saved.
            NonFiniteError: a loss or gradient is not finite, for more than ``train.skip_non_finite`` times; nothing was
                changed by that step.
            CheckpointError: one could not be written; the earlier ones are intact.
            RunError: out of memory; the message says what to turn on.
        """
        train, first = self.settings.train, self.processes.rank == 0
        if first:
            self.out.mkdir(parents=True, exist_ok=True)
            checkpoint.clean(self._checkpoints)
        self.model.train()
        progress = TrainProgress(self.console, self.title, train.steps, self.step)
        log_path = self.out / "metrics.jsonl" if first else os.devnull
        with self._stop, open(log_path, "a", buffering=1) as log, progress, out_of_memory_explained(self.settings):
            try:
                results = self._train(progress, log)
            except _Stop as stop:
                self.save()
                raise Interrupted(stop.number, f"stopped after step {self.step}, saved as {self._saved}") from None
        if first:
            write_text(self.out / "results.json", json.dumps(results, indent=1) + "\n")
        return results

    def _train(self, progress, log):
        """The loop; returns the results."""
        train, first = self.settings.train, self.processes.rank == 0
        watch = CollapseWatch(train.collapse_every if first else 0, self.data.train, self.device, progress.say)
        deadline = time.monotonic() + (train.max_seconds or float("inf"))
        over = self.processes.most(time.monotonic() >= deadline)
        while self.step < train.steps and not over:
            figures, over = self._advance(progress, deadline)
            if figures and (self.step % train.log_every == 0 or self.step == train.steps):
                log.write(json.dumps({"step": self.step, **figures}) + "\n")
            watch(self.model, self.train_step.objective, self.step)
            if train.checkpoint_every and self.step % train.checkpoint_every == 0:
                self.save()
            self._check_stop()
            if train.eval_every and self.step % train.eval_every == 0 and self.step < train.steps:
                progress.say(f"step {self.step}: held-out " + describe(self.evaluate(log)))
        if self.step < train.steps:
            progress.say(f"step {self.step}: {train.max_seconds:g} seconds are over (train.max_seconds)")
        self.save()
        return {"step": self.step, **self.evaluate(log), "test_images": len(self.data.test),
                "checkpoint": str(self._saved), **self.draw()}

    def _advance(self, progress, deadline):
        """One training step; returns its figures, None for one that was left out, and whether the time is over."""
        train = self.settings.train
        begin = time.perf_counter()
        batch = self.batch(self.step)
        mine = batch.chunk(self.processes.count)[self.processes.rank]
        if train.warmup_steps:
            for group in self.optimizer.param_groups:
                group["lr"] = train.learning_rate * min(1.0, (self.step + 1) / train.warmup_steps)
        if train.kl_warmup_steps:
            rise = LinearSchedule(0.0, getattr(self.settings.model, "beta", 1.0), train.kl_warmup_steps)
            self.train_step.objective.beta = rise.at(self.step + 1)
        sums = {}
        try:
            for x in mine.chunk(train.accumulate):
                loss = self.train_step(x.to(self.device))
                for name, value in {"loss": loss, **self.train_step.parts}.items():
                    if name != "grad_norm":
                        sums[name] = sums.get(name, 0.0) + value.detach() / train.accumulate
        except NonFiniteError as error:
            epoch, index = divmod(self.step, len(self.data.train) // train.batch_size)
            where = f"step {self.step + 1} (epoch {epoch + 1}, batch {index + 1}, process {self.processes.rank})"
            if self.skipped >= train.skip_non_finite:
                raise NonFiniteError(f"{where}: {error}", error.module) from None
            self.skipped += 1
            self.step += 1
            progress.say(f"{where}: left out, {self.skipped} of at most {train.skip_non_finite}: {error}")
            return None, self.processes.most(time.monotonic() >= deadline)
        self.step += 1
        values = torch.tensor([float(time.monotonic() >= deadline), *(float(v) for v in sums.values())],
                              dtype=torch.float64)
        over, *means = torch.stack(self.processes.gather(values)).mean(0).tolist()
        means = dict(zip(sums, means, strict=True))
        figures = {"bits/dim": means["loss"] / (batch[0].numel() * math.log(2))}
        if "rate" in means:
            figures = {"elbo": -means["rate"] - means["distortion"], "rate": means["rate"],
                       "distortion": means["distortion"]}
        speed = len(batch) / (time.perf_counter() - begin)
        progress.update(self.step, figures, speed)
        return {"loss": means["loss"], **{k.replace("/", "_per_"): v for k, v in figures.items()},
                "grad_norm": self.train_step.parts["grad_norm"].item(), "images_per_second": speed}, over

    def batch(self, step):
        """The images (batch_size, C, H, W) of that step: every epoch in an order of its own, its remainder left out."""
        n, size = len(self.data.train), self.settings.train.batch_size
        epoch, index = divmod(step, n // size)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed((self.settings.train.seed * 1_000_003 + epoch) % 2**63)
            self._order = epoch, torch.randperm(n, generator=generator)
        return self.data.train[self._order[1][index * size:(index + 1) * size]]

    def _check_stop(self):
        """Stops if a signal came to one of the processes; called after every step and between the batches of an
        evaluation, by all of them."""
        if number := int(self.processes.most(self._stop.received or 0)):
            raise _Stop(number)

    def _averaged(self):
        """Inside, the model has the averaged weights, where there is an average."""
        return contextlib.nullcontext() if self.train_step.ema is None else self.train_step.ema.swapped_in()

    def evaluate(self, log):
        """Held-out figures of the averaged weights, or of the weights where there is no average; a line in the log."""
        with self._averaged():
            figures = evaluate(self.model, self.train_step.objective, self.data.test, self.device,
                               poll=self._check_stop)
        log.write(json.dumps({"step": self.step, **{f"test_{name}": value for name, value in figures.items()}}) + "\n")
        return figures

    def draw(self):
        """Writes the run's pictures; returns what gallery.draw does."""
        with self._averaged():
            model = self.model
            if is_sharded(model):  # sampling goes past the forward that would gather the shards
                weights = self._weights()
                model = build_model(self.settings).to(self.device)
                model.load_state_dict(weights)
            if self.processes.rank:
                return {}
            draw_curves(self.out)
            return draw(self.out, model, self.train_step.objective, self.settings, self.data, self.device, self.step,
                        self.title)

    def _weights(self):
        """The whole model's state; all processes gather it together."""
        return {name: whole(t.detach()) for name, t in self.model.state_dict().items()}

    def save(self):
        """Writes a checkpoint of this moment, unless there is one already; all processes call it together.

        Raises:
            CheckpointError: it could not be written; earlier ones are intact.
        """
        if self._saved is not None and checkpoint.step_of(self._saved) == self.step:
            return
        tensors, state = self._snapshot()
        failure = None
        if self.processes.rank == 0:
            try:
                checkpoint.save(self._checkpoints, self.step, tensors, state, self.settings.train.keep_checkpoints)
            except CheckpointError as error:
                failure = error
        path = checkpoint.path_of(self._checkpoints, self.step)
        if self.processes.most(failure is not None):
            raise failure or CheckpointError(f"{path}: process 0 could not write it")
        self._saved = path

    def _snapshot(self):
        """(tensors, state) of everything that the next step depends on."""
        optimizer, plain = state_module.optimizer_state(self.optimizer)
        training = {f"optimizer.{name}": t for name, t in optimizer.items()}
        for group, generators in (("random", state_module.random_state(self.device)),
                                  ("host_random", state_module.host_random_state())):
            training |= {f"{group}.{name}": torch.stack(self.processes.gather(t)) for name, t in generators.items()}
        tensors = {"model": self._weights(), "training": training}
        ema = self.train_step.ema
        if ema is not None:
            tensors["ema"] = tensors["model"] | {name: whole(t) for name, t in ema.state_dict().items()}
        return tensors, {"settings": self.settings.model_dump(), "optimizer": plain, "data": self.data.fingerprint(),
                         "title": self.title, "torch": torch.__version__, "skipped": self.skipped,
                         "processes": self.processes.count}

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


def _row(generators, rank):
    """One process's {name: state} of all processes' {name: (processes, ...)}."""
    # torch.set_rng_state reads from the beginning of the storage: a row must be a tensor of its own.
    return {name: states[rank].clone() for name, states in generators.items()}


class _Stop(Exception):
    """A signal of that number came to one of the processes."""

    def __init__(self, number):
        super().__init__(number)
        self.number = number
