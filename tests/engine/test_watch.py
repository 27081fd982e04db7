"""Learning rates, early stopping, divergence, bounds, logs and curves of a training run."""

import io
import json
import math
import signal

import pytest
import torch
from rich.console import Console

from fastflow.engine import SettingsError, charts, checkpoint, load_settings, trainer
from fastflow.engine.files import read_log
from fastflow.engine.log import RunLog
from fastflow.engine.rate import LearningRate
from fastflow.engine.signals import Interrupted
from fastflow.engine.watch import Watch, score

TINY = ["model.n_levels=1", "model.n_steps=1", "model.hidden_channels=2", "train.batch_size=300", "sample.count=1",
        "train.log_every=1", "train.eval_every=0", "train.checkpoint_every=0", "train.max_seconds=0",
        "train.device=cpu", "train.threads=1", "train.warmup_steps=2"]


@pytest.fixture
def make(tmp_path, threads, monkeypatch):
    """make(name, *overrides, scores=...): a trainer of a tiny Glow; with scores evaluations take theirs from there."""
    threads(torch.get_num_threads())
    monkeypatch.setattr(trainer, "draw_curves", lambda *_: None)

    def build(name, *overrides, scores=None):
        made = trainer.Trainer(load_settings("glow-digits", [*TINY, *overrides]), tmp_path / name,
                               Console(file=io.StringIO(), width=200), "test")
        if scores is not None:
            monkeypatch.setattr(trainer, "draw", lambda *_: {"broken_samples": 0})
            monkeypatch.setattr(trainer, "evaluate",
                                lambda *_, poll, labels: poll() or {"bits_per_dim": scores[made.step]})
        return made
    return build


def resumed(made):
    made.resume(checkpoint.newest(made.out / "checkpoints", pytest.fail))
    return made


def train_settings(*overrides):
    return load_settings("glow-digits", overrides).train


def test_a_cosine_is_that_of_torch_after_a_linear_warm_up():
    rate = LearningRate(train_settings("train.steps=50", "train.warmup_steps=10", "train.learning_rate=0.2",
                                       "train.schedule=cosine", "train.end_learning_rate=0.02"))
    assert [rate(step) for step in range(10)] == pytest.approx([0.02 * (step + 1) for step in range(10)])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40, eta_min=0.02)
    for step in range(10, 51):
        assert rate(step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        scheduler.step()
    assert rate(80) == 0.02


def test_other_schedules():
    linear = LearningRate(train_settings("train.warmup_steps=0", "train.learning_rate=1.0", "train.schedule=linear",
                                         "train.decay_steps=4"))
    assert [linear(step) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    constant = LearningRate(train_settings("train.warmup_steps=2", "train.learning_rate=1.0"))
    assert [constant(step) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("overrides, message", [
    (["train.patience=2", "train.eval_every=0"], "^train.patience: counts evaluations"),
    (["train.decay_steps=5"], "^train.end_learning_rate, train.decay_steps: "),
    (["train.schedule=cosine", "train.end_learning_rate=1.0"], "^train.end_learning_rate: 1 is more than"),
    (["train.schedule=step"], "^train.schedule: "),
    (["train.batch_size=64", "train.accumulate=3"], "^train.batch_size: 64 is not a multiple of train.accumulate=3"),
    (["train.capture=true", "train.memory=save_z"], "^train.memory: save_z can't be combined with train.capture"),
])
def test_settings_that_contradict_each_other_are_refused(overrides, message):
    with pytest.raises(SettingsError, match=message):
        load_settings("glow-digits", overrides)


def test_a_run_with_a_decay_may_grow(make):
    made = make("run", "train.steps=3", "train.schedule=cosine", scores={3: 1.0, 5: 1.0})
    made.start()
    made.run()
    longer = make("run", "train.steps=5", "train.schedule=cosine", scores={3: 1.0, 5: 1.0})
    longer.console = Console(file=io.StringIO(), width=200)
    again = resumed(longer)
    assert "train.steps: 3 before, 5 now, and the learning rate decays until then" in longer.console.file.getvalue()
    again.run()
    rates = {e["step"]: e["learning_rate"] for e in read_log(again.out / "metrics.jsonl") if "learning_rate" in e}
    assert rates[4] == again._rate(3) > rates[5] == again._rate(4) > 0  # it goes on to the new end


def test_a_decay_of_its_own_length_does_not_change(make):
    made = make("other", "train.steps=2", "train.schedule=cosine", "train.decay_steps=5", "train.warmup_steps=1",
                scores={2: 1.0, 3: 1.0})
    made.start()
    made.run()
    again = resumed(make("other", "train.steps=3", "train.schedule=cosine", "train.decay_steps=5",
                         "train.warmup_steps=1", scores={2: 1.0, 3: 1.0}))
    again.run()
    rates = {e["step"]: e["learning_rate"] for e in read_log(again.out / "metrics.jsonl") if "learning_rate" in e}
    assert rates == {step: again._rate(step - 1) for step in (1, 2, 3)} and rates[3] < rates[2]


def test_patience_ends_a_run_and_the_best_checkpoint_stays(make):
    scores = {1: 3.0, 2: 2.0, 3: 2.5, 4: float("nan"), 5: 2.2, 6: 1.0}
    options = ("train.steps=9", "train.eval_every=1", "train.checkpoint_every=1", "train.keep_checkpoints=1",
               "train.patience=3")
    made = make("run", *options, scores=scores)
    made.start()
    results = made.run()
    assert results["step"] == 5 and results["best_step"] == 2
    assert [step for step, _ in checkpoint.find(made.out / "checkpoints")] == [2, 5]
    assert "3 evaluations in a row were not better than that of step 2" in made.console.file.getvalue()
    again = resumed(make("run", *options, scores=scores))
    assert again.watch.state_dict() == made.watch.state_dict()
    assert again.run()["step"] == 5  # it is over already
    more = resumed(make("run", *options, "train.patience=5", scores=scores | {7: 2.0, 8: 3.0, 9: 3.0}))
    assert more.run()["step"] == 9 and more.watch.best_step == 6


def test_an_evaluation_that_was_cut_is_made_again(make):
    scores = {2: 3.0, 4: 2.5, 5: 2.5}
    options = ("train.steps=5", "train.eval_every=2", "train.patience=9")
    whole = make("whole", *options, scores=scores)
    whole.start()
    whole.run()
    made = make("run", *options, scores=scores)
    made.start()

    def interrupted(*arguments):
        made._stop.received = signal.SIGTERM
        made._check_stop()

    made._look = interrupted
    with pytest.raises(Interrupted, match="after step 2"):
        made.run()
    again = resumed(make("run", *options, scores=scores))
    assert again.watch.seen is None
    again.run()
    assert again.watch.state_dict() == whole.watch.state_dict()


def test_divergence_is_said_aloud(make):
    made = make("run", "train.steps=4", "train.eval_every=2", scores={2: 1.9e9, 4: float("nan")})
    made.start()
    results = made.run()
    said = made.console.file.getvalue()
    assert "WARNING: step 2: held-out bits/dim 1.9e+09, the first training step had" in said
    assert "training has diverged (try a lower train.learning_rate" in said
    assert "WARNING: step 4: held-out bits/dim nan" in said and results["diverged"]


def test_a_real_divergence_is_seen(make, monkeypatch):
    """A Glow driven apart by a learning rate a thousand times too high."""
    made = make("run", "train.steps=12", "train.learning_rate=3.0", "train.warmup_steps=0", "train.clip_grad_norm=0",
                "train.eval_every=4", "train.skip_non_finite=100", "train.ema_decay=0")
    made.start()
    made.run()
    assert "training has diverged" in made.console.file.getvalue()


def test_watch():
    watch = Watch(patience=2)
    watch.started(float("inf"))
    watch.started(4.0)
    watch.started(3.0)
    assert watch.first == 4.0 and watch.warning(1, 4.9) is None and not watch.diverged
    assert watch.warning(2, 5.1).startswith("step 2: held-out bits/dim 5.1, the first") and watch.diverged
    for step, value in ((1, 4.9), (2, 5.1), (3, 4.9)):
        assert not watch.over
        watch.see(step, value)
    assert watch.over and (watch.best, watch.best_step, watch.seen) == (4.9, 1, 3)
    other = Watch(2)
    other.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert other.state_dict() == watch.state_dict() and other.over
    with pytest.raises(ValueError, match="watch: expected finite numbers"):
        other.load_state_dict({**watch.state_dict(), "best": "low"})
    assert score({"log_prob": -3.0}, 2) == pytest.approx(1.5 / math.log(2)) and score({"bits_per_dim": 2.0}, 2) == 2.0


def test_what_is_asked_for_is_done(make):
    made = make("run", "train.steps=4", "train.sample_every=2", "train.precision=bfloat16", "train.memory=save_z")
    made.start()
    made.run()
    assert {p.name for p in (made.out / "samples").iterdir()} == {"step-000002.png", "step-000004.png"}
    assert made.train_step.conditioner_dtype == torch.bfloat16 and made.train_step.memory.mode == "save_z"


def test_a_vae_ends_with_the_bound_of_many_samples(tmp_path, threads, monkeypatch):
    threads(torch.get_num_threads())
    monkeypatch.setattr(trainer, "draw", lambda *_: {"broken_samples": 0})
    options = [o for o in TINY if not o.startswith("model")] + ["model.hidden_features=8", "train.steps=2"]
    made = trainer.Trainer(load_settings("vae-digits", [*options, "train.bound_samples=5"]), tmp_path,
                           Console(file=io.StringIO()), "test")
    made.start()
    results = made.run()
    assert results["elbo"] <= results["iwae_5"] == read_log(tmp_path / "metrics.jsonl")[-1]["test_iwae_5"]
    with pytest.raises(SettingsError, match="^train.bound_samples: a model of kind 'glow' has no latents"):
        trainer.Trainer(load_settings("glow-digits", ["train.bound_samples=5"]), tmp_path, Console(), "test")


def test_tensorboard_holds_what_the_log_holds(make):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    made = make("run", "train.steps=3", "train.tensorboard=true", "train.checkpoint_every=2")
    made.start()
    made.run()
    checkpoint._remove(made.out / "checkpoints" / "step-000003")
    again = resumed(make("run", "train.steps=5", "train.tensorboard=true"))
    again.run()
    events = accumulator.EventAccumulator(str(again.out / "tensorboard"))
    events.Reload()
    entries = read_log(again.out / "metrics.jsonl")
    for name, tag in (("loss", "train/loss"), ("grad_norm", "train/grad_norm"), ("test_bits_per_dim",
                                                                                   "test/bits_per_dim")):
        assert [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars(tag)] == \
            [(e["step"], e[name]) for e in entries if name in e]
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    assert [e.step for e in events.Images("samples")] == [5]


def test_tensorboard_that_is_missing_is_said_before_anything_is_done(make, monkeypatch):
    from fastflow.engine import log

    monkeypatch.setattr(log.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"train.tensorboard: .*pip install 'fastflow\[tensorboard\]'"):
        make("run", "train.tensorboard=true")


def test_a_log_goes_on_after_the_step_that_it_is_resumed_from(tmp_path):
    with RunLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    with RunLog(tmp_path, step=2) as log:
        log.write(3, {"loss": 30.0})
    assert [(e["step"], e["loss"]) for e in read_log(tmp_path / "metrics.jsonl")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    with RunLog(None) as silent:
        silent.write(1, {"loss": 1.0})
    assert read_log(tmp_path / "none.jsonl") == []


def test_curves_of_tables_and_validation_are_drawn():
    pytest.importorskip("matplotlib")
    entries = [{"step": step, "log_prob": float(step), "learning_rate": 0.1} for step in range(1, 60)]
    entries += [{"step": step, "validation_log_prob": step - 1.0} for step in (20, 40)]
    entries += [{"step": 59, "test_log_prob": 50.0}]
    drawn = charts.curves(entries)
    titles = [at.get_title(loc="left") for at in drawn.axes if at.get_title(loc="left")]
    assert titles == ["log-likelihood", "learning rate"]
    assert [line.get_label() for line in drawn.axes[0].lines] == ["training", "validation", "held out"]
    assert drawn.axes[0].lines[1].get_xdata().tolist() == [20, 40]
