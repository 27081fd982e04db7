"""A worker of torchrun: one process of a training run on digits in double precision, without noise."""

import os
import signal
import sys
import time

import torch
from rich.console import Console

from fastflow import cli
from fastflow.engine import load_settings, trainer
from fastflow.engine.objectives import Objective
from fastflow.engine.run import checkpoint_to_resume

OVERRIDES = ["model.n_levels=1", "model.n_steps=2", "model.hidden_channels=4", "train.batch_size=16",
             "train.warmup_steps=2", "sample.count=2", "train.log_every=1", "train.eval_every=0", "train.max_seconds=0",
             "train.device=cpu", "train.threads=1", "train.ema_decay=0.9", "train.clip_grad_norm=50.0",
             "train.process_timeout=60"]


def without_noise(self, model, x):
    """Each level becomes the middle of its interval, so that how images are shared out changes nothing."""
    if x.is_floating_point():
        return x, 0.0
    return (x.double() + 0.5) / self.n_bins - 0.5, 0.0


def main(out, *overrides):
    build, prepare = trainer.build_model, Objective.prepare
    trainer.build_model = lambda settings: build(settings).double()
    Objective.prepare = without_noise if "NOISE" not in os.environ else prepare
    trainer.draw_curves = lambda *_: None
    trainer.evaluate = lambda *_, poll, **__: poll() or {"bits_per_dim": 3.0}
    settings = load_settings("glow-digits", [*OVERRIDES, *overrides])
    loaded = checkpoint_to_resume(out, True, print)
    made = trainer.Trainer(settings, out, Console(), "test")
    made.start() if loaded is None else made.resume(loaded)
    if "VICTIM" in os.environ and loaded is None or "SIGNAL" in os.environ:
        batch = made.batch

        def interrupted(step):
            if made.processes.rank == int(os.environ["VICTIM"]) and step == 2:
                os.kill(os.getpid(), int(os.environ.get("SIGNAL", signal.SIGKILL)))
                time.sleep(0.1)
            return batch(step)

        made.batch = interrupted
    try:
        made.run()
    finally:
        made.close()
    assert not torch.distributed.is_initialized()
    print(f"process {made.processes.rank} is done, at step {made.step}, {time.time()}", flush=True)


def command():
    try:
        main(*sys.argv[1:])
    except trainer.RunError as error:
        print(f"refused: {error}", flush=True)
        sys.exit(getattr(error, "exit_status", 1))


if __name__ == "__main__":
    cli.end_with(command)
