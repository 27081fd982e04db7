"""The trainer: a train step in a loop, with evaluation, pictures, checkpoints that resume bit for bit, and a log."""

import contextlib
import math
import time
from pathlib import Path

import torch

from fastflow.data import TableData
from fastflow.engine import checkpoint
from fastflow.engine.assembly import assemble, check_model
from fastflow.engine.batches import Batches
from fastflow.engine.collapse import CollapseWatch
from fastflow.engine.datasets import completed, levels_of_values, load_data
from fastflow.engine.devices import choose_device, set_threads
from fastflow.engine.distributed import Processes
from fastflow.engine.errors import NonFiniteError, RunError, SettingsError
from fastflow.engine.evaluate import describe, evaluate
from fastflow.engine.faults import explained
from fastflow.engine.files import to_json, write_text
from fastflow.engine.gallery import draw, draw_curves
from fastflow.engine.labels import check_labels, given
from fastflow.engine.lock import claimed
from fastflow.engine.log import RunLog, check_tensorboard
from fastflow.engine.models import build_model, load_weights, standardize
from fastflow.engine.objectives import objective_for
from fastflow.engine.progress import TrainProgress
from fastflow.engine.rate import LearningRate, kl_weight
from fastflow.engine.signals import Interrupted, StopSignals
from fastflow.engine.snapshot import check_continuation, restore, save, whole_model
from fastflow.engine.state import seed_host_random
from fastflow.engine.watch import Watch, score
from fastflow.vae import Schedule

__all__ = ["Trainer"]

INITIAL_BATCH = 256  # images that the data-dependent layers are initialised with


class Trainer:
    """Trains one model, in one process or in all that torchrun started, in a directory of its own that all of them see.

    ``out`` gets checkpoints/step-NNNNNN/, samples/*.png, metrics.jsonl and, at the end, results.json and curves.png;
    the first process writes them. A batch is that of all processes together, each takes its share of it, in
    ``train.accumulate`` parts.

    Args:
        settings: a :class:`~fastflow.engine.settings.Settings`.
        out: the directory; it may exist.
        console: a rich Console for progress.
        title: the name shown there.

    Attributes:
        processes: the :class:`~fastflow.engine.distributed.Processes`.
        train_step: the :class:`~fastflow.engine.train_step.TrainStep`, None before :meth:`start` or :meth:`resume`.
        step: training steps done; ``skipped`` of them changed nothing because they were not finite.
        watch: the :class:`~fastflow.engine.watch.Watch` over the held-out figures.

    Raises:
        SettingsError: settings that can't be combined.
    """

    def __init__(self, settings, out, console, title="train"):
        self.out, self.console, self.title = Path(out), console, title
        train = settings.train
        self.device = choose_device(train.device)
        set_threads(settings)
        self.processes = Processes(self.device, train.process_timeout)
        if self.processes.rank:
            self.console.quiet = True
        self.data = load_data(settings)
        self.settings = settings = completed(settings, self.data)
        check_labels(settings, self.data)
        self.n_bins, self.unit = levels_of_values(settings), "rows" if isinstance(self.data, TableData) else "images"
        if train.batch_size > len(self.data.train):
            raise SettingsError(f"train.batch_size: {train.batch_size} is more than the "
                                f"{len(self.data.train)} training {self.unit}")
        if train.batch_size % (self.processes.count * train.accumulate):
            raise SettingsError(f"train.batch_size: {train.batch_size} is not a multiple of {self.processes.count} "
                                f"processes times train.accumulate={train.accumulate}")
        if train.tensorboard:
            check_tensorboard()
        torch.manual_seed(train.seed)
        self.model = build_model(settings).to(self.device)
        check_model(settings, self.model, self.device, self.processes.count)
        self.train_step = self.optimizer = None
        self.step = self.skipped = 0
        self.watch, self._rate, self._kl_weight = Watch(train.patience), LearningRate(train), kl_weight(settings)
        self._batches = Batches(settings, self.data, self.processes, self.device)
        looks = 0 if self.processes.rank else train.collapse_every
        self._collapse = CollapseWatch(looks, self.data.train, self.device, lambda message: self._say(message),
                                       self._batches.labels)
        self._stop = StopSignals()
        self._saved, self._signal, self._say = None, 0, console.print
        self._checkpoints, self._claimed = self.out / "checkpoints", False

    @property
    def n_parameters(self):
        """How many numbers are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @contextlib.contextmanager
    def claimed(self):
        """Inside, no other run writes in the directory, see :func:`fastflow.engine.lock.claimed`. :meth:`run` enters by
        itself; who looks there for a checkpoint to go on from enters before."""
        with claimed(self.out, self.processes):
            self._claimed = True
            try:
                yield
            finally:
                self._claimed = False

    def start(self):
        """A fresh run: initialises data-dependent layers from training images."""
        self._agree_on_start(-1)
        first = self.data.train[torch.randperm(len(self.data.train))[:INITIAL_BATCH]].to(self.device)
        if isinstance(self.data, TableData):
            standardize(self.model, self.data)
        if hasattr(self.model, "initialize"):
            objective = objective_for(self.model, n_bins=self.n_bins)
            self.model.initialize(objective.prepare(self.model, first)[0])
        self._assemble()
        # The noise of each process is its own.
        seed_host_random(self.settings.train.seed + self.processes.rank)
        if self.processes.rank:
            torch.manual_seed(torch.initial_seed() + self.processes.rank)

    def _assemble(self):
        self.optimizer, self.train_step = assemble(self.model, self.settings, self.processes, self.device, self.n_bins,
                                                   self._kl_weight)

    def _agree_on_start(self, step):
        steps = {int(t) for t in self.processes.gather(torch.tensor(step))}
        if len(steps) > 1:
            raise RunError(f"the processes would begin at different steps, {sorted(steps)}: {self.out} must be a "
                           f"directory that all of them share")

    def resume(self, loaded):
        """Continues from a :class:`~fastflow.engine.checkpoint.Checkpoint` exactly where it was saved.

        Raises:
            SettingsError: the settings differ in what a continuation may not change.
            CheckpointError: it does not fit this model or these data.
        """
        steps, train = check_continuation(self, loaded).train.steps, self.settings.train
        self._agree_on_start(loaded.step)
        if train.schedule != "constant" and not train.decay_steps and steps != train.steps:
            self.console.print(f"train.steps: {steps} before, {train.steps} now, and the learning rate decays until "
                               f"then (train.decay_steps sets that apart)", highlight=False, soft_wrap=True)
        load_weights(self.model, loaded, "model")
        self._assemble()
        count = restore(self, loaded)
        if count != self.processes.count:
            torch.manual_seed((self.settings.train.seed + loaded.step * 1_000_003 + self.processes.rank) % 2**63)
            self.console.print(f"saved by {count} processes, continued by {self.processes.count}: the same "
                               f"{self.unit} in the same order, with other noise", highlight=False, soft_wrap=True)
        self.step, self._saved = loaded.step, loaded.path

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
            RunError: out of memory, the message says what to turn on; the log can't be written; another process has
                ended; another run is writing in the directory.
        """
        with contextlib.nullcontext() if self._claimed else self.claimed():
            return self._run()

    def _run(self):
        train, first = self.settings.train, self.processes.rank == 0
        if first:
            checkpoint.clean(self._checkpoints)
        self.model.train()
        progress = TrainProgress(self.console, self.title, train.steps, self.step)
        self._say = progress.say
        log = RunLog(self.out if first else None, train.tensorboard, self.step)
        with self._stop, log, progress, explained(self.settings, self.processes.count):
            try:
                results = self._train(progress, log)
            except _Stop as stop:
                self._settle()
                self.save()
                raise Interrupted(stop.number, f"stopped after step {self.step}, saved as {self._saved}") from None
        if first:
            write_text(self.out / "results.json", to_json(results, indent=1) + "\n")
        return results

    def close(self):
        """Leaves the group of processes, after the last use, in every process of it."""
        self.processes.leave()

    def _train(self, progress, log):
        """The loop; returns the results."""
        train = self.settings.train
        deadline = time.monotonic() + (train.max_seconds or float("inf"))
        over = self._exchange(deadline, ())[0]
        self._evaluate_if_due(log)
        while self.step < train.steps and not over and not self.watch.over:
            over = self._round(progress, log, deadline)
        self._settle()
        if self.watch.over:
            self._say(f"step {self.step}: {self.watch.since} evaluations in a row were not better than that of step "
                      f"{self.watch.best_step} (train.patience)")
        elif self.step < train.steps:
            self._say(f"step {self.step}: {train.max_seconds:g} seconds are over (train.max_seconds)")
        self.save()
        return self._results(log)

    def _round(self, progress, log, deadline):
        """A training step and what is due after it; returns whether the time is over."""
        train = self.settings.train
        over = self._advance(progress, log, deadline)
        if self._signal:
            raise _Stop(self._signal)
        if self._due(train.eval_every) or self._due(train.checkpoint_every):
            self._settle()
        self._collapse(self.model, self.train_step.objective, self.step)
        self._evaluate_if_due(log)
        if self._due(train.checkpoint_every):
            self.save()
        if self._due(train.sample_every) and self.step < train.steps:
            self.draw(log, page=False)
        return over

    def _due(self, every):
        return every and self.step % every == 0

    def _evaluate_if_due(self, log):
        """The evaluation of this step, if there is one on the way and it was not seen before the run was cut."""
        train = self.settings.train
        if not self._due(train.eval_every) or not 0 < self.step < train.steps or self.watch.seen == self.step:
            return
        part = "test" if self.data.validation is None else "validation"
        figures = self.evaluate(log, part)
        self._say(f"step {self.step}: {'held-out' if part == 'test' else part} {describe(figures)}")
        self.watch.see(self.step, self._look(figures))
        if train.patience and self.watch.best_step == self.step:
            self.save()

    def _look(self, figures):
        """The score of the figures, the same in all processes; a warning if it says that training has diverged."""
        value, = self.processes.mean([score(figures, self.data.train[0].numel())])  # devices may differ in rounding
        if warning := self.watch.warning(self.step, value):
            self._say(f"WARNING: {warning}")
        return value

    def _results(self, log):
        """The figures, curves and pictures at the end, by name."""
        figures = self.evaluate(log, n_samples=self.settings.train.bound_samples)
        self._look(figures)
        results = {"step": self.step, **figures, f"test_{self.unit}": len(self.data.test),
                   "checkpoint": str(self._saved), "diverged": self.watch.diverged, **self.draw(log)}
        results |= {"best_step": self.watch.best_step} if self.watch.over else {}
        if self.processes.rank == 0 and (curves := draw_curves(self.out)) is not None:
            results["curves"] = str(curves)
        return results

    def _advance(self, progress, log, deadline):
        """One training step; returns whether the time is over."""
        train, begin = self.settings.train, time.perf_counter()
        self._settle()
        batch, labels = self.batch(self.step), self._batches.labels_of(self.step)
        rate = self._rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if isinstance(self._kl_weight, Schedule):
            self._kl_weight.seek(self.step + 1, self._batches.place(self.step)[0] + 1)
        sums = {}
        try:
            for x, y in zip(self._batches.parts(batch), self._batches.parts(labels), strict=True):
                loss = self.train_step(x, **given(self.model, y))
                for name, value in {"loss": loss, **self.train_step.parts}.items():
                    if name != "grad_norm":
                        sums[name] = value if train.accumulate == 1 else sums.get(name, 0.0) + value
        except NonFiniteError as error:
            self._leave_out(self.step, error)
            self.step += 1
            return self._exchange(deadline, ())[0]
        self.step += 1
        logged = self.step % train.log_every == 0 or self.step == train.steps
        if self.train_step.check_finite == "late" and not logged:  # the host does not wait for the device
            return self._exchange(deadline, ())[0]
        over, means = self._exchange(deadline, [value.item() / train.accumulate for value in sums.values()])
        means = dict(zip(sums, means, strict=True))
        figures = self._figures(means, batch[0].numel())
        speed = len(batch) / (time.perf_counter() - begin)
        progress.update(self.step, {k: v for k, v in figures.items() if k != "elbo"}, speed, self.unit)
        if logged:
            log.write(self.step, {**means, **{k.replace("/", "_per_"): v for k, v in figures.items()},
                                  "grad_norm": self.train_step.parts["grad_norm"].item(), "learning_rate": rate,
                                  "skipped": self.skipped, f"{self.unit}_per_second": speed})
        return over

    def _settle(self):
        """Hears whether the device skipped the last update, which a recorded step does not say before."""
        try:
            self.train_step.check()
        except NonFiniteError as error:
            self._leave_out(self.step - 1, error)

    def _leave_out(self, step, error):
        """Counts a step that changed nothing, the one after so many, or raises if there are too many."""
        train = self.settings.train
        epoch, index = self._batches.place(step)
        where = f"step {step + 1} (epoch {epoch + 1}, batch {index + 1}, process {self.processes.rank})"
        if self.skipped >= train.skip_non_finite:
            raise NonFiniteError(f"{where}: {error}", error.module) from None
        self.skipped += 1
        self._say(f"{where}: left out, {self.skipped} of at most {train.skip_non_finite}: {error}")

    def _figures(self, means, n_dims):
        """What is reported of a training step."""
        bits = means["loss"] / (n_dims * math.log(2))
        self.watch.started(bits)
        if isinstance(self.data, TableData):
            return {"log_prob": -means["loss"]}
        if "rate" not in means:
            return {"bits/dim": bits}
        elbo = -means["rate"] - means["distortion"]
        return {"bits/dim": -elbo / (n_dims * math.log(2)), "elbo": elbo, "rate": means["rate"],
                "distortion": means["distortion"]}

    def _exchange(self, deadline, values):
        """(over, means): whether the time is over, and the means of the numbers over all processes, which call this
        together once per step. ``_signal`` is set if one came to any of them."""
        over, self._signal = time.monotonic() >= deadline, self._stop.received or 0
        if self.processes.count > 1:
            every = self.processes.gather(torch.tensor([float(over), float(self._signal), *values],
                                                      dtype=torch.float64))
            over, self._signal = (int(max(row[i] for row in every)) for i in range(2))
            values = torch.stack(every).mean(0)[2:].tolist()
        return bool(over), values

    def batch(self, step):
        """The images (batch_size, C, H, W) of that step."""
        return self._batches.images(step)

    def _check_stop(self):
        """Stops if a signal came to one of the processes; called after every step and between the batches of an
        evaluation, by all of them."""
        if number := int(self.processes.most(self._stop.received or 0)):
            raise _Stop(number)

    def _averaged(self):
        """Inside, the model has the averaged weights, where there is an average."""
        return contextlib.nullcontext() if self.train_step.ema is None else self.train_step.ema.swapped_in()

    def evaluate(self, log, part="test", n_samples=0):
        """Figures of the averaged weights, or of the weights where there is no average, on that part of the data,
        "test" or "validation"; a line in the log. ``n_samples``: draws of a VAE's latents, 0 for as many as in
        training."""
        objective = self.train_step.objective
        if n_samples:
            objective = objective_for(self.model, n_bins=self.n_bins, n_samples=n_samples)
        with self._averaged():
            figures = evaluate(self.model, objective, getattr(self.data, part), self.device, poll=self._check_stop,
                               labels=getattr(self.data, f"{part}_labels", None))
        log.write(self.step, {f"{part}_{name}": value for name, value in figures.items()})
        return figures

    def draw(self, log, page=True):
        """Draws what the model generates, and with ``page`` the diagnosis of a VAE; see
        :func:`fastflow.engine.gallery.draw`. The first process returns what that does."""
        with self._averaged():
            model = whole_model(self)  # sampling goes past the forward that would gather shards
            if model is None:
                return {}
            found = draw(self.out, model, self.train_step.objective, self.settings, self.data, self.device, self.step,
                         self.title, page)
        for name in ("samples", "reconstructions"):
            if found.get(name, "").endswith(".png"):
                log.picture(self.step, name, found[name])
        return found

    def save(self):
        """Writes a checkpoint of this moment, unless there is one already; all processes call it together.

        Raises:
            CheckpointError: it could not be written; earlier ones are intact.
        """
        if self._saved is None or checkpoint.step_of(self._saved) != self.step:
            self._saved = save(self, self._checkpoints)


class _Stop(Exception):
    """A signal of that number came to one of the processes."""

    def __init__(self, number):
        super().__init__(number)
        self.number = number
