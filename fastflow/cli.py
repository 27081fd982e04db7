"""The command line: ``fastflow train | sample | evaluate | report | export | bench | doctor``.

Everything heavy is imported by the command that needs it. What is refused is named on one line of stderr, status 1.
"""

import argparse
import contextlib
import functools
import importlib
import os
import sys
import traceback
from pathlib import Path

from fastflow import doctor

__all__ = ["main"]

BUNDLED = ("scikit-learn", "scikit-image")  # libraries that hold data; who asks for those hears if they are missing


class Parser(argparse.ArgumentParser):
    """Refuses in one line, with exit status 1."""

    def error(self, message):
        fail(f"{message} (see {self.prog} --help)")


def fail(message, status=1):
    """Says why on stderr, on one line, and exits; one of several processes says which it is."""
    who = f" process {os.environ['RANK']}:" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    print(f"fastflow:{who} {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    raise SystemExit(status)


def warn(message):
    """Says it on stderr; of several processes, which all have the same to say, the first does."""
    if os.environ.get("RANK", "0") == "0":
        print(f"fastflow: WARNING: {message}", file=sys.stderr)


def warn_of_broken(count):
    if count:
        warn(f"{count} samples hold values that are not finite; NaN is drawn black")


def main(argv=None):
    """Runs one command; ``argv`` as in sys.argv[1:], or None for that itself, with which one of several processes ends
    in here."""
    if argv is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        end_with(functools.partial(run, argv))
    run(argv)


def end_with(function):
    """Runs it and ends the process with its exit status, past the interpreter's own end: a group of processes whose
    threads something still holds, as FSDP2's tensors do, would call terminate there and change the status."""
    status = 1
    try:
        function()
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader left
            stream.flush()
    os._exit(status)


def run(argv):
    """Runs one command in this process."""
    arguments, rest = parser().parse_known_args(argv)
    if rest and arguments.command is not run_bench:
        fail(f"unrecognized arguments: {' '.join(rest)} (see fastflow --help)")
    arguments.rest = rest
    if arguments.command is None:
        fail("expected a command: train, sample, evaluate, report, export, bench or doctor (see fastflow --help)")
    if arguments.needs_extras:
        check_extras()
        # Read once, when torch loads OpenMP: threads that wait without spinning leave the cores of a busy machine to
        # the thread that they wait for (2 threads on 2 cores under a load of 8: a step took 1.5 s instead of 10 s).
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        arguments.command(arguments)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of our output left: not an error
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error)
    except ValueError as error:
        from fastflow.data import DataFileError

        if not isinstance(error, DataFileError):
            raise
        fail(error)
    except RuntimeError as error:
        from fastflow.engine import RunError

        if not isinstance(error, RunError):
            raise
        status = getattr(error, "exit_status", 1)
        if status != 1 and os.environ.get("RANK", "0") != "0":
            raise SystemExit(status) from None  # a signal stopped all processes alike: the first says so
        fail(error, status)


def check_extras():
    """Fails, before anything is loaded, if a library that every run needs is missing."""
    missing = {name: extra for name, extra in doctor.missing_extras().items() if name not in BUNDLED}
    if missing:
        names, extras = ", ".join(missing), ",".join(sorted(set(missing.values())))
        fail(f"this command needs {names}, not installed: pip install 'fastflow[{extras}]'")


def parser():
    """The argument parser with all commands."""
    top = Parser(prog="fastflow", description="Normalizing flows and VAEs on fused kernels.")
    top.add_argument("--version", action="version", version=f"fastflow {doctor.version('fastflow')}")
    top.set_defaults(command=None, needs_extras=True)
    commands = top.add_subparsers(title="commands", parser_class=Parser)

    train = commands.add_parser("train", help="train a recipe", description="Train a recipe.")
    train.add_argument("recipe", nargs="?", metavar="RECIPE", help="a recipe's name (see --list) or a .toml file")
    train.add_argument("--out", type=_path, metavar="DIR", help="where the run goes (default: runs/RECIPE, "
                       "RECIPE-2 where that is taken, and so on; with --resume the last that is there)")
    train.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides",
                       help="change one setting of the recipe; may be repeated")
    train.add_argument("--resume", choices=["auto"], help="continue from the newest checkpoint in DIR, if there is one")
    train.add_argument("--list", action="store_true", help="list the recipes and leave")
    train.add_argument("--settings", action="store_true", help="list every setting that a recipe may make, its default "
                       "and meaning, and leave")
    train.add_argument("--dry-run", action="store_true", help="say what a step would take, and leave")
    train.set_defaults(command=run_train)

    sample = commands.add_parser("sample", help="draw from a trained model",
                                 description="Draw images as one grid, or rows of a table as .csv, into DIR/samples "
                                 "and print the path.")
    sample.add_argument("directory", type=_path, metavar="DIR", help="a run's directory")
    sample.add_argument("-n", "--count", type=_positive, help="how many (default: the recipe's)")
    sample.add_argument("--temperature", type=float, help="of the base distribution (default: the recipe's)")
    sample.add_argument("--seed", type=_natural, default=0, help="of the draws (default: 0)")
    sample.add_argument("--step", type=_natural, help="which checkpoint (default: the newest)")
    sample.set_defaults(command=run_sample)

    evaluate = commands.add_parser("evaluate", help="held-out figures of a trained model",
                                   description="Print held-out figures, and write them to DIR/evaluation.json; of a "
                                   "VAE also the diagnosis, into DIR/diagnosis.")
    evaluate.add_argument("directory", type=_path, metavar="DIR", help="a run's directory")
    evaluate.add_argument("--seed", type=_natural, default=0, help="of the dequantisation and a VAE's draws "
                          "(default: 0)")
    evaluate.add_argument("--samples", type=_positive, metavar="K", help="of the latents per image, for the ELBO and "
                          "the importance-weighted bound of a VAE (default: as trained)")
    evaluate.add_argument("--step", type=_natural, help="which checkpoint (default: the newest)")
    evaluate.set_defaults(command=run_evaluate)

    export = commands.add_parser("export", help="write a trained model to a file for use elsewhere",
                                 description="Write a trained model's weights, or a function of it as a graph or "
                                 "compiled, and print the path.")
    export.add_argument("directory", type=_path, metavar="DIR", help="a run's directory")
    export.add_argument("--format", choices=["safetensors", "torch_export", "aoti"], default="safetensors",
                        help="weights, a graph, or that compiled (default: safetensors)")
    export.add_argument("--function", choices=["log_prob", "elbo", "encode", "decode"], help="what torch_export and "
                        "aoti hold (default: log_prob of a flow, elbo of a VAE, which takes its noise as an input)")
    export.add_argument("--samples", type=_positive, default=1, metavar="K", help="of the latents in an exported elbo "
                        "(default: 1)")
    export.add_argument("--out", type=_path, metavar="PATH", help="the file (default: in DIR/export)")
    export.add_argument("--step", type=_natural, help="which checkpoint (default: the newest)")
    export.set_defaults(command=run_export)

    report = commands.add_parser("report", help="one HTML page about a run", description="Write DIR/report.html, one "
                                 "self-contained page, and print its path.")
    report.add_argument("directory", type=_path, metavar="DIR", help="a run's directory")
    report.set_defaults(command=run_report)

    bench = commands.add_parser("bench", help="measure the operations (bench --help)", add_help=False)
    bench.set_defaults(command=run_bench, needs_extras=False)

    what_works = commands.add_parser("doctor", help="what works on this machine, and why", description="Print versions "
                                     "and which backends are available, and why.")
    what_works.set_defaults(command=run_doctor, needs_extras=False)
    return top


def _natural(text):
    value = int(text) if text.isdecimal() else -1
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 2**63 - 1, got {text}")
    return value


def _positive(text):
    value = int(text) if text.isdecimal() else 0
    if not 1 <= value <= 4096:
        raise argparse.ArgumentTypeError(f"expected an integer from 1 to 4096, got {text}")
    return value


def _path(text):
    if not text:  # a variable of the shell that is not set
        raise argparse.ArgumentTypeError("expected a path, got an empty one")
    return text


def run_train(arguments):
    from fastflow.engine import settings as settings_module

    if arguments.list or arguments.settings:
        from fastflow.engine.listing import list_recipes, list_settings

        list_recipes() if arguments.list else list_settings()
        return
    if arguments.recipe is None:
        fail(f"train: expected a recipe, one of {', '.join(settings_module.recipes())} or a .toml file")
    settings = settings_module.load_settings(arguments.recipe, arguments.overrides)
    title = Path(arguments.recipe).stem
    if arguments.dry_run:
        from fastflow.engine.plan import plan

        for name, value in plan(settings).items():
            print(f"{name:18}{value:>15,}")
        return

    from fastflow.engine.run import default_directory

    resume = arguments.resume == "auto"
    place = contextlib.nullcontext(Path(arguments.out)) if arguments.out else default_directory(title, resume)
    with place as out:
        (train if settings.sweep is None else sweep)(settings, out, title, resume)


def train(settings, out, title, resume):
    """Trains one model in the directory ``out``, from its newest checkpoint if there is one and ``resume``."""
    from rich.console import Console

    from fastflow.engine.evaluate import describe
    from fastflow.engine.run import check_directory
    from fastflow.engine.signals import Interrupted
    from fastflow.engine.trainer import Trainer

    check_directory(out, resume)
    trainer = Trainer(settings, out, Console(), title)
    try:
        with trainer.claimed():  # not before: nothing is left of a run that was refused
            results = run_in(out, trainer, title, resume)
    except Interrupted:
        trainer.close()  # all processes stop together; one that fails may leave others waiting, and just ends
        raise
    trainer.close()
    if trainer.processes.rank:
        return
    print(f"held-out {describe(results)}\n{'':16}{len(trainer.data.test)} {trainer.unit}, step {results['step']}")
    warn_of_broken(results["broken_samples"])
    for name in ("samples", "reconstructions", "diagnosis", "curves", "checkpoint"):
        if name in results:
            print(f"{name:16}{results[name]}")


def run_in(out, trainer, title, resume):
    """Trains from the newest checkpoint in ``out`` if there is one and ``resume``; returns the results."""
    from fastflow.engine.run import checkpoint_to_resume

    loaded = checkpoint_to_resume(out, resume, warn)
    examples, leads = trainer.data, trainer.processes.rank == 0
    if leads:
        shape = "x".join(map(str, examples.event_shape))
        validation = "" if examples.validation is None else f", {len(examples.validation)} validation"
        print(f"{title}: {len(examples.train)} training{validation} and {len(examples.test)} held-out {trainer.unit} "
              f"of {shape}, {trainer.n_parameters:,} parameters, {trainer.device}\n{'run':16}{out}", flush=True)
    if loaded is None:
        trainer.start()
    else:
        trainer.resume(loaded)
        if leads:
            print(f"continuing after step {loaded.step}", flush=True)
    return trainer.run()


def sweep(settings, out, title, resume):
    """Trains a model for each beta in a directory of its own inside ``out``, and shows how they compare."""
    from rich.console import Console
    from rich.table import Table

    from fastflow.engine.devices import choose_device
    from fastflow.engine.sweep import COLUMNS, run_sweep

    rows, path, picture = run_sweep(settings, out, lambda one, directory: train(
        one, directory, f"{title} {directory.name}", resume), choose_device(settings.train.device))
    table = Table(*(column.replace("_", " ") for column in COLUMNS), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(f"{row[column]:.4f}" if isinstance(row[column], float) and column != "beta" else
                        f"{row[column]}" for column in COLUMNS))
    Console(width=None if sys.stdout.isatty() else 120).print(table, highlight=False)
    print(f"{'table':16}{path}\n{'picture':16}{picture}")


def run_sample(arguments):
    from fastflow.engine.datasets import is_table, levels_of_values
    from fastflow.engine.devices import choose_device, set_threads
    from fastflow.engine.evaluate import sample_rows, samples
    from fastflow.engine.files import write_rows
    from fastflow.engine.labels import classes_of
    from fastflow.engine.pictures import save_grid
    from fastflow.engine.run import load_trained

    device = choose_device("auto")
    trained = load_trained(arguments.directory, device, arguments.step)
    set_threads(trained.settings)
    options = trained.settings.sample
    count = options.count if arguments.count is None else arguments.count
    temperature = options.temperature if arguments.temperature is None else arguments.temperature
    if not 0 < temperature < float("inf"):
        fail(f"--temperature: expected a positive number, got {temperature}")
    path = Path(arguments.directory) / "samples" / f"step-{trained.step:06d}-seed-{arguments.seed}"
    if is_table(trained.settings):
        rows, n_broken = sample_rows(trained.model, count, device, temperature, arguments.seed)
        path = write_rows(path.with_suffix(".csv"), rows, trained.settings.data.columns)
    else:
        n_bins = levels_of_values(trained.settings)
        images, n_broken = samples(trained.model, count, n_bins, device, temperature, arguments.seed)
        path = save_grid(path.with_suffix(".png"), images, n_bins, classes_of(trained.model) or None)
    warn_of_broken(n_broken)
    print(path)


def run_evaluate(arguments):
    from fastflow.engine.datasets import levels_of_values, load_data
    from fastflow.engine.devices import choose_device, set_threads
    from fastflow.engine.evaluate import describe, evaluate, is_vae
    from fastflow.engine.files import to_json, write_text
    from fastflow.engine.gallery import diagnosed
    from fastflow.engine.objectives import objective_for
    from fastflow.engine.run import load_trained

    device = choose_device("auto")
    trained = load_trained(arguments.directory, device, arguments.step)
    set_threads(trained.settings)
    if arguments.samples and not is_vae(trained.model):
        fail(f"--samples: a model of kind {trained.settings.model.kind!r} has no latents to draw; leave it out")
    n_samples = arguments.samples or getattr(trained.settings.model, "n_samples", 1)  # as in training
    examples = load_data(trained.settings)
    test = examples.test
    unit = "rows" if test.is_floating_point() else "images"
    if doubt := trained.doubt(examples, unit):
        warn(doubt)
    objective = objective_for(trained.model, n_bins=levels_of_values(trained.settings), n_samples=n_samples)
    labels = getattr(examples, "test_labels", None)
    figures = evaluate(trained.model, objective, test, device, arguments.seed, labels=labels)
    path = Path(arguments.directory) / "evaluation.json"
    record = {"step": trained.step, "seed": arguments.seed, f"test_{unit}": len(test), "other_data": bool(doubt),
              **figures}
    write_text(path, to_json(record, indent=1) + "\n")
    print(f"held-out {describe(figures)}\n{'':16}{len(test)} {unit}, step {trained.step}")
    print(f"{'figures':16}{path}")
    if is_vae(trained.model):
        out = Path(arguments.directory)
        found, pages = diagnosed(out, trained.model, objective, trained.settings, examples, device, trained.step,
                                 out.resolve().name)
        print(f"{'diagnosis':16}{pages['page']}\n")
        print(found.summary())


def run_export(arguments):
    from fastflow.engine.export import export
    from fastflow.engine.run import load_trained

    function = arguments.function
    if function and arguments.format == "safetensors":
        fail(f"--function: weights hold no function; choose --format torch_export or aoti for {function}")
    trained = load_trained(arguments.directory, "cpu", arguments.step)
    name = "-".join(filter(None, (f"step-{trained.step:06d}", arguments.format, function)))
    out = arguments.out or Path(arguments.directory) / "export" / name
    try:
        print(export(trained.model, out, arguments.format, function=function, n_samples=arguments.samples,
                     settings=trained.settings.model_dump(mode="json")))
    except ValueError as error:
        fail(error)


def run_report(arguments):
    from fastflow.engine.devices import choose_device
    from fastflow.engine.report import write_report

    print(write_report(arguments.directory, choose_device("auto")))


def run_bench(arguments):
    here = Path.cwd()
    if not (here / "benchmarks" / "run.py").is_file():
        fail("bench: the benchmarks are in the repository, not in the installed package; run this where benchmarks/ is")
    sys.path.insert(0, str(here))
    status = importlib.import_module("benchmarks.run").main(arguments.rest)
    if status:
        raise SystemExit(status)


def run_doctor(arguments):
    doctor.show()


if __name__ == "__main__":
    main()
