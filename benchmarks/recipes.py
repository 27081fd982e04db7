"""What the recipes of VAEs reach: each trained in full with one thread, measured on its held-out images.

    python -m benchmarks.recipes [NAME ...] [--steps N] [--results FOLDER]

Prints the rows of the table in docs/diagnosis.md, and writes a record of each recipe.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks import run
from fastflow.engine import load_settings
from fastflow.engine.trainer import Trainer

RECIPES = ("vae-digits", "iwae-digits", "vqvae-digits", "dvae-digits", "vdvae-digits", "vae-photos", "vqvae-photos",
           "cvae-digits", "m2-digits", "task-digits")
FIGURES = ("step", "elbo", "rate", "distortion", "bits_per_dim")
SAID = ("active units ", "codes in use ", "KL of each level ")  # how the lines of a diagnosis begin that are told


def reached(name, steps=None):
    """{name: number} of a run to its last step, however long it takes, and "diagnosis", the lines that are told."""
    overrides = ["train.max_seconds=0", "train.threads=1", "train.device=cpu", "train.eval_every=0",
                 "train.checkpoint_every=0"]
    settings = load_settings(name, overrides if steps is None else [*overrides, f"train.steps={steps}"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(settings, folder, Console(quiet=True))
        trainer.start()
        results = trainer.run()
        lines = (Path(folder) / "diagnosis/diagnosis.txt").read_text().splitlines()
    bounds = [key for key in results if key.startswith("iwae_") or key == "accuracy"]
    return {key: results[key] for key in (*FIGURES, *bounds)} | {
        "diagnosis": [line for line in lines if line.startswith(SAID)]}


def row(name, figures):
    """The recipe's row of the table."""
    told = [f"bound of {key.removeprefix('iwae_')} samples {figures[key]:.2f}" for key in figures
            if key.startswith("iwae_")] + figures["diagnosis"]
    told += [f"accuracy {100 * figures['accuracy']:.1f} %"] if "accuracy" in figures else []
    return (f"| {name} | {figures['step']} | {figures['elbo']:.2f} | {figures['rate']:.2f} | "
            f"{figures['distortion']:.2f} | {figures['bits_per_dim']:.3f} | {'; '.join(told)} |")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=RECIPES, metavar="NAME", help="recipes; all of VAEs by default")
    parser.add_argument("--steps", type=int, help="train for fewer steps than the recipe says")
    parser.add_argument("--results", type=Path, help="folder for the JSON; none is written without it")
    args = parser.parse_args(argv)
    for name in args.names:
        figures = reached(name, args.steps)
        print(row(name, figures), flush=True)
        if args.results:
            run.save(args.results, f"cpu-recipe-{name}",
                     {"machine": run.machine("cpu"), "recipe": name, "figures": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
