"""What the trainer's loop costs beside the train step inside it, per recipe.

    python -m benchmarks.trainer_overhead [--recipes NAME ...] [--rounds 15] [--results FOLDER]

"trainer" is a round of the loop of `fastflow train`: the batch, the learning rate, the step, its figures, the bar as a
terminal shows it, the log every `train.log_every` steps. "bare" is a TrainStep with the recipe's options on a batch
that is there already. Evaluations and checkpoints are left out. One thread, process CPU time, interleaved.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import run, timing
from fastflow.engine import load_settings
from fastflow.engine.log import RunLog
from fastflow.engine.progress import TrainProgress
from fastflow.engine.trainer import Trainer

# Recipes of milliseconds a step whose data ship inside a dependency.
BUNDLED = ("maf-breast-cancer", "vae-digits", "dvae-digits", "glow-digits")
GOAL = 1.1  # at the smallest recipe
BLOCK = 10  # steps that are timed at once
OVERRIDES = ("train.device=cpu", "train.threads=1", "train.eval_every=0", "train.checkpoint_every=0",
             "train.max_seconds=0", "train.steps=2000000000")


def started(recipe, folder, console):
    """A trainer of the recipe before its first step, and one more that lends its train step."""
    made = []
    for name in ("trainer", "bare"):
        trainer = Trainer(load_settings(recipe, OVERRIDES), Path(folder) / name, console)
        trainer.out.mkdir()
        trainer.start()
        trainer.model.train()
        made.append(trainer)
    return made


def measure(recipe, rounds=15):
    """{"recipe", "seconds": {name: median}, "ratio"}: trainer over bare, the median over the rounds' ratios."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        console = Console(file=nowhere, force_terminal=True, width=120)
        trainer, other = started(recipe, folder, console)
        batch, step = other.batch(0), other.train_step
        progress = TrainProgress(console, recipe, trainer.settings.train.steps)
        with RunLog(trainer.out) as log, progress:
            samples, failed = timing.interleave({
                "trainer": lambda: [trainer._round(progress, log, float("inf")) for _ in range(BLOCK)],
                "bare": lambda: [step(batch) for _ in range(BLOCK)]}, "cpu", rounds)
    if failed:
        raise RuntimeError(f"{recipe}: {failed}")
    ratios = [a / b for a, b in zip(samples["trainer"], samples["bare"], strict=True)]
    seconds = {name: statistics.median(values) / BLOCK for name, values in samples.items()}
    return {"recipe": recipe, "seconds": seconds, "ratio": round(statistics.median(ratios), 4)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", default=BUNDLED, help=f"default: {' '.join(BUNDLED)}")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--results", type=Path, help="folder for the JSON; none is written without it")
    args = parser.parse_args(argv)
    rows = [measure(recipe, args.rounds) for recipe in args.recipes]
    for row in rows:
        bare, whole = (1e3 * row["seconds"][name] for name in ("bare", "trainer"))
        print(f"{row['recipe']:<24} bare {bare:7.3f} ms  trainer {whole:7.3f} ms  {row['ratio']:.3f}x")
    smallest = min(rows, key=lambda row: row["seconds"]["bare"])
    print(f"{'met' if smallest['ratio'] <= GOAL else 'missed'}: {smallest['ratio']:.3f}, at most {GOAL} wanted, at the "
          f"smallest, {smallest['recipe']}")
    if args.results:
        run.save(args.results, "cpu-trainer-overhead", {"machine": run.machine("cpu"), "goal": GOAL, "rows": rows})
    return int(smallest["ratio"] > GOAL)


if __name__ == "__main__":
    sys.exit(main())
