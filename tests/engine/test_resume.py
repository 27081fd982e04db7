"""A run that was cut goes on bit for bit, wherever it was saved and wherever it was killed; and the faults of a run."""

import io
import json
import random
import resource
import shutil

import numpy
import pytest
import torch
from rich.console import Console
from sweeps import rest_slow

from fastflow.engine import NonFiniteError, RunError, SettingsError, checkpoint, load_settings, state, trainer
from fastflow.engine.distributed import gathered
from fastflow.engine.trainer import Trainer

STEPS = 9
TINY = ["model.n_levels=1", "model.n_steps=1", "model.hidden_channels=2", f"train.steps={STEPS}", "sample.count=1",
        "train.batch_size=300", "train.warmup_steps=4", "train.log_every=1", "train.eval_every=0",
        "train.max_seconds=0", "train.device=cpu", "train.threads=1", "train.ema_decay=0.9", "train.keep_checkpoints=0",
        "train.checkpoint_every=1", "train.accumulate=2"]


class Killed(BaseException):
    """As abrupt as a kill can be inside one process: nothing of the trainer catches it."""


@pytest.fixture
def make(tmp_path, threads, monkeypatch):
    """make(name, *overrides): a trainer of a tiny Glow that neither evaluates nor draws; an epoch has 5 steps."""
    threads(torch.get_num_threads())
    monkeypatch.setattr(Trainer, "evaluate", lambda self, log, **_: {"bits_per_dim": 3.0})
    monkeypatch.setattr(Trainer, "draw", lambda self, log, page=True: {})
    monkeypatch.setattr(trainer, "draw_curves", lambda *_: None)

    def build(name, *overrides):
        made = Trainer(load_settings("glow-digits", [*TINY, *overrides]), tmp_path / name,
                       Console(file=io.StringIO()), "test")
        batch = made.batch

        def augmented(step):  # a pipeline that draws from the generators of Python and NumPy
            x = batch(step)
            return x.roll((random.randrange(3), int(numpy.random.normal() > 0)), (2, 3)) + (random.gauss(0, 1) > 2)

        made.batch = augmented
        return made
    return build


def contents(path):
    return {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.mark.parametrize("saved", rest_slow(range(4), [0, 3]))
def test_30_pairs_of_save_and_kill_resume_bit_for_bit(saved, make, tmp_path):
    """Saved after one of the steps 0 to 3, killed in the midst of each later update: the tensors of the checkpoint at
    the end are the same file for file, byte for byte, and so are the losses in between."""
    random.seed(1)
    numpy.random.seed(1)
    whole = make("whole")
    whole.start()
    whole.save()
    whole.run()
    expected = contents(whole.out / "checkpoints" / f"step-{STEPS:06d}")
    losses = [json.loads(line)["loss"] for line in (whole.out / "metrics.jsonl").read_text().splitlines()
              if "loss" in line]
    assert len(losses) == STEPS
    for killed in range(saved, STEPS):  # the first epoch ends at step 5
        out = tmp_path / f"{saved}-{killed}"
        (out / "checkpoints").mkdir(parents=True)
        shutil.copytree(whole.out / "checkpoints" / f"step-{saved:06d}", out / "checkpoints" / f"step-{saved:06d}")
        shutil.copy(whole.out / "metrics.jsonl", out)
        random.seed(killed)
        cut = make(out.name, "train.checkpoint_every=0")
        cut.resume(checkpoint.newest(out / "checkpoints", pytest.fail))
        kill_at(cut, killed)
        with pytest.raises(Killed):
            cut.run()
        assert cut.step == killed
        again = make(out.name, "train.checkpoint_every=0")
        again.resume(checkpoint.newest(out / "checkpoints", pytest.fail))
        assert again.step == saved
        again.run()
        found = contents(out / "checkpoints" / f"step-{STEPS:06d}")
        assert found["model.safetensors"] == expected["model.safetensors"], (saved, killed)
        assert found["ema.safetensors"] == expected["ema.safetensors"]
        assert found["training.safetensors"] == expected["training.safetensors"]
        assert losses == [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()
                          if "loss" in line]


def kill_at(trainer, step):
    """Ends the run in the second part of the update after that step."""
    train_step, calls = trainer.train_step, 0

    class Deadly:
        def __call__(self, x):
            nonlocal calls
            calls += 1
            if trainer.step == step and calls % 2 == 0:
                raise Killed
            return train_step(x)

        def __getattr__(self, name):
            return getattr(train_step, name)

    trainer.train_step = Deadly()


def test_the_generators_of_python_and_numpy_come_back():
    random.gauss(0, 1), numpy.random.normal()  # both now hold the second of a pair
    saved = state.host_random_state()
    expected = [random.gauss(0, 1), random.random(), numpy.random.normal(), numpy.random.rand()]
    random.seed(5), numpy.random.seed(5)
    state.restore_host_random(saved)
    assert [random.gauss(0, 1), random.random(), numpy.random.normal(), numpy.random.rand()] == expected
    assert all(t.dtype in (torch.int64, torch.float64) for t in saved.values())


def poison(trainer, *steps):
    """Makes the loss of these steps NaN."""
    prepare = trainer.train_step.objective.prepare

    def prepared(model, x):
        x, constant = prepare(model, x)
        return (x * float("nan") if trainer.step + 1 in steps else x), constant

    trainer.train_step.objective.prepare = prepared


def test_steps_that_are_not_finite_are_left_out_counted_and_bounded(make):
    made = make("run", "train.skip_non_finite=2")
    made.start()
    poison(made, 2, 5, 8)
    with pytest.raises(NonFiniteError, match=r"^step 8 \(epoch 2, batch 3, process 0\)"):
        made.run()
    assert made.skipped == 2
    saved = {step: checkpoint.load(path) for step, path in checkpoint.find(made.out / "checkpoints")}
    for before, after in ((1, 2), (4, 5)):
        for stem in ("model", "ema"):
            assert all(torch.equal(t, saved[after].tensors[stem][n]) for n, t in saved[before].tensors[stem].items())
    assert saved[7].state["skipped"] == 2 and made.train_step.ema.n_updates == 5
    assert made.console.file.getvalue().count("left out") == 2
    again = make("run", "train.skip_non_finite=3")
    again.resume(saved[7])
    assert again.skipped == 2 and again.train_step.ema.n_updates == 5
    again.run()


def test_a_device_that_skips_by_itself_is_heard_one_step_later(make):
    """As a recorded step does it: the same steps are left out, and all else is the same bit for bit."""
    found = {}
    for name in ("at once", "late"):
        made = make(name, "train.skip_non_finite=3", "train.checkpoint_every=4")
        made.start()
        if name == "late":
            made.train_step.check_finite = "late"
        poison(made, 2, 4, STEPS)  # 4: just before a checkpoint; the last one: just before the end
        made.run()
        assert made.skipped == 3
        said = made.console.file.getvalue()
        assert [f"step {step} (epoch" in said for step in range(1, STEPS + 1)] == [s in (2, 4, STEPS) for s in
                                                                                 range(1, STEPS + 1)]
        found[name] = [contents(path) for _, path in checkpoint.find(made.out / "checkpoints")]
    assert len(found["late"]) == 3
    for first, second in zip(*found.values(), strict=True):
        assert all(first[file] == second[file] for file in first if file.endswith(".safetensors"))


def test_a_device_that_skips_by_itself_stops_the_run_naming_the_step(make):
    made = make("run")
    made.start()
    made.train_step.check_finite = "late"
    poison(made, 4)
    with pytest.raises(NonFiniteError, match=r"^step 4 \(epoch 1, batch 4, process 0\): "):
        made.run()
    assert checkpoint.newest(made.out / "checkpoints", pytest.fail).step == 3


def test_a_recorded_step_needs_a_gpu(make):
    with pytest.raises(SettingsError, match="^train.capture: expected a model on a CUDA device, this one is on cpu"):
        make("run", "train.capture=true").start()


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")])
def test_out_of_memory_says_what_to_turn_on(make, error):
    made = make("run")
    made.start()

    def fail(step):
        raise error

    made.batch = fail
    with pytest.raises(RunError, match="out of memory with batches of 300 in 2 parts: raise train.accumulate"):
        made.run()


@pytest.fixture
def full_disk():
    """full_disk(n): from now on the kernel lets no file grow beyond n bytes, which stands for a disk without room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill_before(trainer, step, full_disk, n_bytes):
    """The disk is full from that step on."""
    batch = trainer.batch

    def filling(now):
        if now + 1 == step:
            full_disk(n_bytes)
        return batch(now)

    trainer.batch = filling


@pytest.mark.parametrize("n_bytes, said", [(5_000, "could not be written .*earlier checkpoints are intact"),
                                           (100, "metrics.jsonl: could not be written .*the checkpoints are intact")])
def test_a_disk_that_is_full_stops_the_run_with_the_last_checkpoint_intact(make, full_disk, n_bytes, said):
    made = make("run")
    made.start()
    fill_before(made, 3, full_disk, n_bytes)
    with pytest.raises(RunError, match=said):
        made.run()
    full_disk(1 << 30)
    assert checkpoint.newest(made.out / "checkpoints", pytest.fail).step == 2
    assert not [p for p in (made.out / "checkpoints").iterdir() if p.name.startswith(".")]
    again = make("run")
    again.resume(checkpoint.newest(made.out / "checkpoints", pytest.fail))
    again.run()
    assert [json.loads(line)["step"] for line in (made.out / "metrics.jsonl").read_text().splitlines()
            if "loss" in line] == list(range(1, STEPS + 1))


class Shard:
    """A sharded tensor; ``alive`` counts the whole ones that are held on its device."""

    alive = most = 0

    def __init__(self, value):
        self.value = value

    def detach(self):
        return self

    def full_tensor(self):
        shard, value = Shard, self.value

        class Whole:
            def __init__(self):
                shard.alive += 1
                shard.most = max(shard.most, shard.alive)

            def __del__(self):
                shard.alive -= 1

            def to(self, device):
                return value.to(device)
        return Whole()


@pytest.mark.parametrize("keep", [True, False])
def test_shards_are_gathered_one_by_one_and_kept_by_one_process(keep):
    Shard.alive = Shard.most = 0
    found = gathered({str(i): Shard(torch.tensor(i)) for i in range(5)}, keep)
    assert found == ({str(i): torch.tensor(i) for i in range(5)} if keep else {})
    assert Shard.most == 1 and Shard.alive == 0
