"""How near RealNVP, NSF and MAF come to densities known exactly: KL(target || flow) in nats, averaged over seeds.

    python -m benchmarks.toy2d [--steps 1000] [--seeds 3] [--targets ...] [--models ...] [--results FOLDER]

Every flow is trained by maximum likelihood on fresh draws of a target of fastflow.data.toy2d, with Adam and a cosine
schedule down to zero; the KL is the mean of log p - log q over draws that training never saw, with its standard error.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch

from benchmarks import run
from fastflow import flows
from fastflow.data import toy2d

MODELS = {
    "RealNVP": lambda: flows.RealNVP(2, n_layers=12, hidden=(64, 64)),
    "NSF": lambda: flows.NSF(2, n_layers=4, hidden=(64, 64), n_bins=16, tail_bound=4.0),
    "MAF": lambda: flows.MAF(2, n_layers=6, hidden=(64, 64)),
}
# What the mean over three seeds stays below with the default arguments, in nats. Affine flows bend one mass, which
# leaves bridges between modes; splines cut them.
STATED = {
    ("gaussians", "RealNVP"): 0.25, ("gaussians", "NSF"): 0.02, ("gaussians", "MAF"): 0.35,
    ("ring", "RealNVP"): 0.03, ("ring", "NSF"): 0.01, ("ring", "MAF"): 0.08,
    ("checkerboard", "RealNVP"): 0.25, ("checkerboard", "NSF"): 0.1, ("checkerboard", "MAF"): 0.4,
    ("moons", "RealNVP"): 0.05, ("moons", "NSF"): 0.02, ("moons", "MAF"): 0.08,
}
STEPS, SEEDS, BATCH, LEARNING_RATE = 1000, 3, 512, 3e-3
CLIP = 5.0  # norm of the gradients
EVALUATED = 50_000  # draws


def train(target, model, *, steps=STEPS, seed=0, batch_size=BATCH, learning_rate=LEARNING_RATE):
    """A flow of MODELS trained on a target of toy2d.TARGETS."""
    torch.manual_seed(seed)
    target, flow = toy2d.TARGETS[target], MODELS[model]()
    generator = torch.Generator().manual_seed(seed)
    flow.initialize(target.sample(1024, generator=generator))
    parameters = list(flow.parameters())
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, fused=True)
    batches = ()
    for step in range(steps):
        if step % 100 == 0:
            batches = target.sample(100 * batch_size, generator=generator).split(batch_size)
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * learning_rate * (1.0 + math.cos(math.pi * step / steps))
        optimizer.zero_grad(set_to_none=True)
        (-flow(batches[step % 100]).mean()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
    return flow


def kl(flow, target, n=EVALUATED):
    """(KL in nats, standard error) over draws that training has not seen."""
    return toy2d.kl_divergence(toy2d.TARGETS[target], flow, n, generator=torch.Generator().manual_seed(10_000))


def row(target, model, *, steps=STEPS, seeds=SEEDS):
    """The record of one flow on one target."""
    start, found = time.process_time(), [kl(train(target, model, steps=steps, seed=seed), target)
                                         for seed in range(seeds)]
    values, errors = zip(*found, strict=True)
    return {"target": target, "model": model, "kl_nats": [round(v, 5) for v in values],
            "standard_errors": [round(e, 5) for e in errors], "mean_kl_nats": round(sum(values) / seeds, 5),
            "cpu_seconds": round(time.process_time() - start, 1)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--targets", nargs="+", choices=toy2d.TARGETS, default=list(toy2d.TARGETS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--results", type=Path, help="folder for the JSON; none is written without it")
    args = parser.parse_args(argv)
    rows = []
    for target in args.targets:
        for model in args.models:
            rows.append(row(target, model, steps=args.steps, seeds=args.seeds))
            print(f"{target:<13} {model:<8} KL {rows[-1]['mean_kl_nats']:.4f} nats, seeds "
                  f"{', '.join(f'{v:.4f}' for v in rows[-1]['kl_nats'])}, {rows[-1]['cpu_seconds']} s", flush=True)
    if args.results:
        settings = {"steps": args.steps, "seeds": args.seeds, "batch_size": BATCH, "learning_rate": LEARNING_RATE,
                    "evaluated": EVALUATED}
        run.save(args.results, "cpu-toy2d", {"machine": run.machine("cpu"), "arguments": settings, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
