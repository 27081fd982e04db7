import errno
import io
import json
import math
import os
import signal

import pytest
import torch
from rich.console import Console

from fastflow.data import files
from fastflow.engine import CheckpointError, NonFiniteError, RunError, SettingsError, checkpoint, load_settings
from fastflow.engine import files as files_of_runs
from fastflow.engine import trainer as trainer_module
from fastflow.engine.log import RunLog
from fastflow.engine.signals import Interrupted
from fastflow.engine.trainer import Trainer

SMALL = ["model.n_levels=1", "model.n_steps=2", "model.hidden_channels=8", "train.batch_size=500",
         "train.warmup_steps=4", "sample.count=4", "train.log_every=1", "train.eval_every=0",
         "train.checkpoint_every=0", "train.max_seconds=0", "train.device=cpu", "train.threads=1"]


@pytest.fixture
def trainer(tmp_path, threads, monkeypatch, request):
    """trainer(directory, steps, *overrides) makes one for a very small Glow on digits; an epoch has 3 steps."""
    before = torch.get_num_threads()
    threads(before)  # recipes set it; the fixture puts it back
    if not request.node.name.startswith("test_training_learns"):
        monkeypatch.setattr(trainer_module, "draw_curves", lambda *_: None)

    def make(name, steps, *overrides):
        settings = load_settings("glow-digits", [*SMALL, f"train.steps={steps}", *overrides])
        return Trainer(settings, tmp_path / name, Console(file=io.StringIO()), "test")
    return make


def trained(trainer, *arguments):
    made = trainer(*arguments)
    made.start()
    made.run()
    return made


def resumed(trainer, name, steps, *overrides):
    made = trainer(name, steps, *overrides)
    made.resume(checkpoint.newest(made.out / "checkpoints", pytest.fail))
    return made


def newest(made):
    return checkpoint.newest(made.out / "checkpoints", pytest.fail)


def assert_same(first, second):
    """Two checkpoints hold the same bits."""
    assert first.step == second.step and first.tensors.keys() == second.tensors.keys()
    for stem, named in first.tensors.items():
        assert named.keys() == second.tensors[stem].keys()
        for name, tensor in named.items():
            assert torch.equal(tensor, second.tensors[stem][name]), f"{stem}: {name}"


def lines(made):
    """The log without its times."""
    records = [json.loads(line) for line in (made.out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "images_per_second"} for record in records]


@pytest.mark.parametrize("stop_at", [0, 1, 3, 5])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(trainer, stop_at):
    whole = trained(trainer, "whole", 7)
    trained(trainer, "parts", stop_at)
    torch.rand(100)  # what other code does to the generator must not matter
    again = resumed(trainer, "parts", 7, "train.eval_every=2")  # nor how often it evaluates
    results = again.run()
    assert_same(newest(whole), newest(again))
    assert results["bits_per_dim"] == json.loads((whole.out / "results.json").read_text())["bits_per_dim"]
    steps = [line for line in lines(again) if "loss" in line]
    assert steps == [line for line in lines(whole) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 8))


def test_training_learns_and_writes_what_it_says(trainer):
    made = trainer("run", 60, "train.learning_rate=5e-3", "train.checkpoint_every=25")
    made.start()
    results = made.run()
    losses = [line["bits_per_dim"] for line in lines(made) if "loss" in line]
    assert losses[-1] < losses[0] - 0.5 and abs(results["bits_per_dim"] - losses[-1]) < 0.5
    assert sorted(p.name for p in (made.out / "checkpoints").iterdir()) == ["step-000025", "step-000050", "step-000060"]
    assert {p.name for p in made.out.iterdir()} == {".lock", "checkpoints", "samples", "curves.png",
                                                     "metrics.jsonl", "results.json"}
    assert results["samples"] == str(made.out / "samples" / "step-000060.png")
    assert results["checkpoint"] == str(made.out / "checkpoints" / "step-000060")


def test_every_epoch_shows_every_image_once_in_an_order_of_its_own(trainer):
    made = trainer("run", 6)
    key = {image.numpy().tobytes(): i for i, image in enumerate(made.data.train)}
    epochs = []
    for epoch in range(2):
        seen = [key[image.numpy().tobytes()] for step in range(3) for image in made.batch(3 * epoch + step)]
        assert len(seen) == 1500 and len(set(seen)) == len(key)
        epochs.append(seen)
    assert epochs[0] != epochs[1] != sorted(epochs[1])
    assert torch.equal(made.batch(1), trainer("other", 6).batch(1))
    assert not torch.equal(made.batch(1), trainer("other", 6, "train.seed=1").batch(1))


def test_the_average_is_the_exponential_average_of_the_weights(trainer):
    made = trainer("run", 4, "train.ema_decay=0.3")
    made.start()
    expected = [p.detach().clone() for p in made.model.parameters()]
    step_optimizer, n_updates = made.optimizer.step, 0

    def follow():
        nonlocal n_updates
        step_optimizer()
        n_updates += 1
        for average, p in zip(expected, made.model.parameters(), strict=True):
            average.lerp_(p.detach(), 1 - min(0.3, (1 + n_updates) / (10 + n_updates)))

    made.optimizer.step = follow
    made.run()
    saved, parameters = newest(made).tensors, dict(made.model.named_parameters())
    assert n_updates == 4 and saved["ema"].keys() == saved["model"].keys()
    for average, (name, p) in zip(expected, parameters.items(), strict=True):
        assert torch.allclose(average, saved["ema"][name], atol=1e-7) and torch.equal(p, saved["model"][name])
    assert any(not torch.equal(saved["ema"][name], p) for name, p in parameters.items())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_at_the_next_step_and_the_run_goes_on_from_there(trainer, number):
    whole = trained(trainer, "whole", 5)
    made = trainer("cut", 5)
    made.start()
    batch = made.batch

    def kill_in_the_third(step):
        if step == 2:
            os.kill(os.getpid(), number)
        return batch(step)

    made.batch = kill_in_the_third
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="stopped after step 3, saved as .*step-000003") as caught:
        made.run()
    assert caught.value.exit_status == 128 + number and signal.getsignal(number) is before
    again = resumed(trainer, "cut", 5)
    again.run()
    assert_same(newest(whole), newest(again))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_during_an_evaluation_is_heard(trainer, number):
    made = trainer("run", 2)
    made.start()
    report = made.train_step.objective.report

    def kill(*arguments):
        os.kill(os.getpid(), number)
        return report(*arguments)

    made.train_step.objective.report = kill
    with pytest.raises(Interrupted):
        made.run()
    assert newest(made).step == 2


def test_a_non_finite_loss_names_the_step_and_leaves_the_last_checkpoint(trainer):
    made = trainer("run", 9, "train.checkpoint_every=1")
    made.start()
    step = made.train_step
    original = step.objective.prepare

    def poisoned(model, x):
        x, constant = original(model, x)
        return (x * float("nan") if made.step == 3 else x), constant

    step.objective.prepare = poisoned
    with pytest.raises(NonFiniteError, match=r"^step 4 \(epoch 2, batch 1, process 0\): the loss is nan"):
        made.run()
    loaded = newest(made)
    assert loaded.step == 3
    assert all(torch.equal(t, loaded.tensors["model"][name]) for name, t in made.model.state_dict().items())


def test_what_may_not_change_on_resume_is_named(trainer):
    made = trained(trainer, "run", 3)
    for overrides, message in ((["train.learning_rate=1e-5"], "train.learning_rate: may not change on resume"),
                               (["model.n_steps=1"], "model.n_steps: may not change on resume"),
                               (["model.n_steps=1", "train.learning_rate=1e-5", "train.ema_decay=0.5"],
                                "^model.n_steps, train.ema_decay, train.learning_rate: may not change"),
                               (["train.steps=2"], "train.steps: 2 is less than the 3 steps done")):
        with pytest.raises(SettingsError, match=message):
            trainer("run", 3, *overrides).resume(newest(made))


def test_other_images_or_weights_are_refused(trainer):
    made = trained(trainer, "run", 1)
    good = newest(made)

    def altered(tensors=None, **state):
        return checkpoint.Checkpoint(good.path, good.step, tensors or good.tensors, {**good.state, **state})

    def with_training(**changes):
        return altered({**good.tensors, "training": {**good.tensors["training"], **changes}})

    training = {name: t for name, t in good.tensors["training"].items() if not name.startswith("random.")}
    for bad, message in ((altered(data="0" * 64), "other images"),
                         (altered({**good.tensors, "model": {}}), "model.safetensors: is of another model"),
                         (altered({k: v for k, v in good.tensors.items() if k != "ema"}), "has no ema.safetensors"),
                         (altered({**good.tensors, "training": training}), "does not fit this run"),
                         (with_training(**{"optimizer.0.exp_avg": torch.zeros(3)}), "does not fit"),
                         (with_training(**{"optimizer.999.step": torch.zeros(())}), "no parameter")):
        with pytest.raises(CheckpointError, match=message):
            trainer("run", 2).resume(bad)


def test_a_log_cut_short_by_a_kill_is_mended(trainer):
    made = trained(trainer, "run", 4)
    (made.out / "checkpoints" / "step-000004").rename(made.out / "aside")
    checkpoint_2 = trained(trainer, "two", 2)
    (checkpoint_2.out / "checkpoints" / "step-000002").rename(made.out / "checkpoints" / "step-000002")
    with open(made.out / "metrics.jsonl", "a") as log:
        log.write('{"step": 5, "lo')
    again = resumed(trainer, "run", 4)
    again.run()
    assert [line["step"] for line in lines(again) if "loss" in line] == [1, 2, 3, 4]


def test_one_run_at_a_time_writes_in_a_directory(trainer):
    """Whether the other one is inside run() or looks for its checkpoint; it may go on once the first has ended."""
    first, second = trainer("run", 1), trainer("run", 2)
    first.start()
    temporary = first.out / "checkpoints" / ".step-000001.tmp-0"  # as of a checkpoint that is being written
    batch = first.batch

    def meanwhile(step):
        temporary.mkdir(parents=True)
        second.start()
        for enter in (second.run, second.claimed().__enter__):
            with pytest.raises(RunError, match="run: another run is writing here"):
                enter()
        assert temporary.is_dir()
        return batch(step)

    first.batch = meanwhile
    first.run()
    with second.claimed():
        again = resumed(trainer, "run", 2)
    again.run()
    assert newest(again).step == 2 and not temporary.exists()


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_written_without(trainer, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    assert newest(trained(trainer, "run", 0)).step == 0
    monkeypatch.setattr(files, "fcntl", None)  # as on Windows
    assert newest(trained(trainer, "other", 0)).step == 0


def test_figures_that_are_not_finite_are_null(trainer, monkeypatch):
    monkeypatch.setattr(trainer_module, "evaluate", lambda *_, **__: {"bits_per_dim": math.nan})
    made = trained(trainer, "run", 0)
    for name in ("results.json", "metrics.jsonl"):
        found = json.loads((made.out / name).read_text(), parse_constant=pytest.fail)
        assert found.get("bits_per_dim", found.get("test_bits_per_dim")) is None
    assert math.isnan(files_of_runs.read_log(made.out / "metrics.jsonl")[0]["test_bits_per_dim"])


def test_samples_that_are_not_finite_are_counted(trainer):
    made = trained(trainer, "run", 0)
    assert json.loads((made.out / "results.json").read_text())["broken_samples"] == 0
    draw = made.model.sample

    def broken(n, **options):
        x = draw(n, **options)
        x[1, 0, 2, 2], x[3, 0, 0, 0] = float("nan"), float("inf")
        return x

    made.model.sample = broken
    assert made.draw(RunLog(None))["broken_samples"] == 2


def test_a_batch_larger_than_the_data_is_refused(trainer):
    with pytest.raises(SettingsError, match="train.batch_size: 1501 is more than the 1500 training images"):
        trainer("run", 1, "train.batch_size=1501")


def test_sizes_that_do_not_fit_are_refused(trainer):
    with pytest.raises(SettingsError, match="^model: image_shape: .*divisible"):
        trainer("run", 1, "model.n_levels=4")


@pytest.mark.parametrize(("rise", "expected"), [
    ("train.kl_warmup_epochs=4", [0.5, 0.5, 0.5, 1.0, 1.0, 1.0]),  # of 3 steps
    pytest.param("train.kl_warmup_steps=4", [0.5, 1.0, 1.5, 2.0, 2.0, 2.0], marks=pytest.mark.slow),
])
def test_the_rate_is_weighed_up_to_beta(rise, expected, tmp_path, threads):
    threads(torch.get_num_threads())
    small = ["model.hidden_features=8", "model.latent_features=2", "model.beta=2.0", "train.batch_size=500",
             "train.kl_warmup_steps=0", rise, "train.device=cpu", "train.eval_every=0", "train.checkpoint_every=0"]
    weights = []
    for steps in (3, 6):  # the second goes on from the first
        made = Trainer(load_settings("vae-digits", [*small, f"train.steps={steps}"]), tmp_path, Console(quiet=True))
        found = checkpoint.newest(made.out / "checkpoints", pytest.fail)
        made.start() if found is None else made.resume(found)
        step = made.train_step.__class__.__call__

        def noted(self, x, step=step):
            weights.append(float(self.objective.beta))
            return step(self, x)

        made.train_step.__class__ = type("Noted", (made.train_step.__class__,), {"__call__": noted})
        made.run()
    assert weights == expected
    name = rise.partition("=")[0]
    with pytest.raises(SettingsError, match=f"^{name}: a model of kind 'glow' has no latents"):
        Trainer(load_settings("glow-digits", [rise]), tmp_path, Console(quiet=True))
