"""The trainer in several processes under torchrun, on the CPU: they equal one, survive the death of one, and change in
number."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastflow.engine import checkpoint

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
WORKER = Path(__file__).with_name("trained_by_processes.py")


def launch(out, count, *overrides, restarts=0, check=True, **environment):
    """Runs the worker in ``count`` processes; its exit status and output."""
    command = [sys.executable, str(WORKER), str(out), *overrides]
    if count > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}",
                   f"--max-restarts={restarts}", "--monitor-interval=0.1", *command[1:]]
    result = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, timeout=240,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert not check or result.returncode == 0, result.stdout
    return result


def newest(out):
    return checkpoint.newest(out / "checkpoints", pytest.fail)


def assert_close(first, second):
    for stem in ("model", "ema"):
        assert first.tensors[stem].keys() == second.tensors[stem].keys()
        for name, tensor in first.tensors[stem].items():
            torch.testing.assert_close(tensor, second.tensors[stem][name], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The last checkpoint of one process, six steps."""
    out = tmp_path_factory.mktemp("one")
    launch(out, 1, "train.steps=6")
    return newest(out)


@pytest.mark.slow
def test_two_replicas_equal_one_process_and_outlive_a_killed_one(tmp_path, one):
    """Process 1 is killed with -9 in its third step; torchrun ends the other and starts both again, which go on
    from the second: the parameters at the end are those of one undisturbed process."""
    result = launch(tmp_path / "run", 2, "train.steps=6", "train.checkpoint_every=2", restarts=1, VICTIM="1")
    # torchrun names the one that it sees ended first, which the other, refusing to go on alone, may be.
    assert result.stdout.count("is done, at step 6") == 2 and re.search(r"exitcode *: *(-9|1)\b", result.stdout)
    found = newest(tmp_path / "run")
    assert_close(one, found)
    assert found.state["processes"] == 2 and found.tensors["training"]["random.cpu"].shape[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize("count, strategy, parts", [(2, "ddp", 1), (2, "fsdp", 2), (4, "ddp", 2), (4, "fsdp", 1)])
def test_more_processes_and_shards_equal_one(tmp_path, one, count, strategy, parts):
    launch(tmp_path / "run", count, "train.steps=6", f"train.strategy={strategy}", f"train.accumulate={parts}")
    assert_close(one, newest(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [((4, "ddp"), (2, "ddp")), ((4, "fsdp"), (2, "fsdp")),
                                         ((2, "fsdp"), (1, "ddp"))])
def test_the_number_of_processes_may_change(tmp_path, one, first, then):
    out = tmp_path / "run"
    launch(out, first[0], "train.steps=3", f"train.strategy={first[1]}")
    result = launch(out, then[0], "train.steps=6", f"train.strategy={then[1]}")
    assert f"saved by {first[0]} processes, continued by {then[0]}" in result.stdout
    assert_close(one, newest(out))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_with_the_same_number_noise_and_all_comes_back_bit_for_bit(tmp_path, strategy):
    options = (f"train.strategy={strategy}",)
    launch(tmp_path / "whole", 2, "train.steps=5", *options, NOISE="1")
    launch(tmp_path / "parts", 2, "train.steps=3", *options, NOISE="1")
    launch(tmp_path / "parts", 2, "train.steps=5", *options, NOISE="1")
    whole, parts = newest(tmp_path / "whole"), newest(tmp_path / "parts")
    for stem, named in whole.tensors.items():
        assert all(torch.equal(t, parts.tensors[stem][name]) for name, t in named.items())
    assert not torch.equal(*whole.tensors["training"]["random.cpu"])  # each process has its own noise


@pytest.mark.slow
@pytest.mark.parametrize("number, strategy", [(signal.SIGTERM, "ddp"), (signal.SIGTERM, "fsdp"),
                                              (signal.SIGUSR1, "ddp")])
def test_a_signal_to_one_process_saves_and_stops_all(tmp_path, number, strategy):
    begin = time.monotonic()
    result = launch(tmp_path / "run", 2, "train.steps=500", f"train.strategy={strategy}", check=False, VICTIM="1",
                    SIGNAL=str(int(number)))
    assert result.returncode == 1 and time.monotonic() - begin < 60
    assert result.stdout.count(f"refused: {number.name}: stopped after step 3, saved as") == 2
    assert newest(tmp_path / "run").step == 3
    # torchrun's own status is 1; it tells that of the process that ended first, and ends the others with SIGTERM.
    assert "terminate called" not in result.stdout
    first = re.search(r"Root Cause.*?exitcode *: *(-?\d+)", result.stdout, re.DOTALL)
    assert first and int(first[1]) == 128 + number, result.stdout
    assert {int(s) for s in re.findall(r"exitcode *: *(-?\d+)", result.stdout)} <= {128 + number, -signal.SIGTERM}
