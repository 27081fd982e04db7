"""`fastflow train` in two processes: the first speaks, errors of each are seen, both leave their group."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from fastflow.engine import checkpoint

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
TINY = ["model.n_levels=1", "model.n_steps=1", "model.hidden_channels=2", "train.batch_size=100", "train.threads=1",
        "train.device=cpu", "train.eval_every=0", "train.max_seconds=0", "train.log_every=1", "sample.count=4"]


def start(out, *overrides, prepare="", count=2):
    """The processes, as a launcher without torchrun's agent would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = [part for setting in (*TINY, *overrides) for part in ("--set", setting)]
    command = [sys.executable, "-c", f"{prepare}\nfrom fastflow import cli\ncli.main()", "train", "glow-digits",
               "--out", str(out), *settings]
    return [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={
        **os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONUNBUFFERED": "1"}) for rank in range(count)]


def finish(processes):
    """[(status, stdout, stderr)]"""
    found = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, found, strict=True)]


def test_the_first_of_two_replicas_speaks_and_both_leave_in_order(tmp_path):
    """What is printed, and what is written, is as of one process."""
    first, second = finish(start(tmp_path / "run", "train.steps=3"))
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert second[1] == "" and "held-out bits/dim" in first[1] and "step-000003" in first[1]
    for _, _, err in (first, second):
        assert "destroy_process_group" not in err and "Traceback" not in err
    loaded = checkpoint.newest(tmp_path / "run" / "checkpoints", pytest.fail)
    assert loaded.step == 3 and loaded.state["processes"] == 2
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4  # three steps and an evaluation


@pytest.mark.slow
def test_the_error_of_any_process_is_seen(tmp_path):
    """Process 1 gets a batch of NaN: it names the module, the other says that it was not its own loss."""
    poisoned = ("import os\nfrom fastflow.engine.objectives import Objective\nprepare = Objective.prepare\n"
                "def poisoned(self, model, x):\n    x, constant = prepare(self, model, x)\n"
                "    bad = os.environ['RANK'] == '1' and len(x) == 50\n"
                "    return (x * float('nan') if bad else x), constant\nObjective.prepare = poisoned")
    first, second = finish(start(tmp_path / "run", "train.steps=3", prepare=poisoned))
    assert first[0] == second[0] == 1
    for rank, (_, _, err) in enumerate((first, second)):
        assert re.search(rf"^fastflow: process {rank}: step 1 \(epoch 1, batch 1, process {rank}\): ", err, re.M), err
    assert "was the first with an output" not in first[2]
    assert "was the first with an output that is not finite" in second[2]
    assert checkpoint.newest(tmp_path / "run" / "checkpoints", pytest.fail) is None


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other_which_says_so(tmp_path):
    processes = start(tmp_path / "run", "train.steps=100000", "train.checkpoint_every=2", "train.process_timeout=20")
    log = tmp_path / "run" / "metrics.jsonl"
    while all(process.poll() is None for process in processes) \
            and not (log.exists() and '"step": 4' in log.read_text()):
        time.sleep(0.05)
    processes[1].kill()
    begin = time.monotonic()
    (status, _, err), (killed, _, _) = finish(processes)
    assert killed == -signal.SIGKILL and time.monotonic() - begin < 60
    assert status == 1 and "fastflow: process 0: another process has ended or does not answer (" in err, err
    assert checkpoint.newest(tmp_path / "run" / "checkpoints", lambda message: None).step >= 0


@pytest.mark.slow
def test_a_setting_that_can_not_be_is_refused_by_all(tmp_path):
    for rank, (status, _, err) in enumerate(finish(start(tmp_path / "run", "train.steps=3", "train.batch_size=99"))):
        assert status == 1 and f"fastflow: process {rank}: train.batch_size: 99 is not a multiple of 2 processes" in err
        assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_of_two_ends_both_with_its_status(tmp_path, strategy, number):
    processes = start(tmp_path / "run", "train.steps=100000", f"train.strategy={strategy}")
    log = tmp_path / "run" / "metrics.jsonl"
    while all(process.poll() is None for process in processes) and not (log.exists() and log.stat().st_size):
        time.sleep(0.05)
    processes[1].send_signal(number)
    (first, _, err), (second, _, silent) = finish(processes)
    assert first == second == 128 + number, err + silent
    assert err.count(f"{number.name}: stopped after step") == 1 and "stopped" not in silent  # the first says so
    assert "terminate called" not in err + silent and "Traceback" not in err + silent
    assert checkpoint.newest(tmp_path / "run" / "checkpoints", pytest.fail).step
