"""Models trained on their own samples: how fast the data's variance goes, and what share of fresh data keeps it.

    python -m benchmarks.self_consuming [--generations 40] [--chains 4] [--results FOLDER]

Gaussians have the answer in closed form (diagnostics.GaussianChain). Chains of VAEs, each generation trained by
TrainStep from the weights of the one before, are measured beside them: the total variance of a model's samples over
that of the data, and of the closed form at the same number of examples.
"""

import argparse
import copy
import math
import sys
from pathlib import Path

import torch
from torch import nn

from benchmarks import run
from fastflow import vae
from fastflow.diagnostics import GaussianChain, self_consuming_chain
from fastflow.engine import TrainStep

SIZES, TEMPERATURES, TOLERANCE = (100, 1000, 10_000), (1.0, 1.02, 1.1), 0.05
N, SHARES, LATENT_TEMPERATURES = 50, (0.0, 0.1, 0.3), (1.0, 1.3)
SCALES = torch.tensor([2.0, 1.5, 0.5, 0.5])  # standard deviations of the data, a Gaussian in four dimensions
STEPS, LEARNING_RATE, MEASURED = 200, 2e-2, 20_000
GENERATIONS, CHAINS = 40, 4


def gaussians():
    """A row per number of examples and temperature, all exact."""
    rows = []
    for n in SIZES:
        for temperature in TEMPERATURES:
            alone = GaussianChain(n, temperature=temperature)
            rows.append({
                "n": n, "temperature": temperature, "factor_a_generation": alone.decay,
                "generations_to_half_or_double": math.ceil(math.log(2.0) / abs(math.log(alone.decay))),
                "least_fresh_share": GaussianChain.least_fresh_fraction(n, TOLERANCE, temperature=temperature)})
    return rows


def chain(share, temperature, generations, seed):
    """The total variance of the samples of each generation's VAE, over that of the data."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model, steps = vae.VAE(nn.Linear(4, 4), nn.Linear(2, 4), likelihood=vae.GaussianLikelihood()), 3 * STEPS

    def fresh(m):
        return SCALES * torch.randn(m, 4, generator=generator)

    def fit(x):
        nonlocal model, steps  # the first generation starts from random weights and trains for longer
        model = copy.deepcopy(model)
        step = TrainStep(model, torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True))
        for i in range(steps):
            step.optimizer.param_groups[0]["lr"] = 0.5 * LEARNING_RATE * (1.0 + math.cos(math.pi * i / steps))
            step(x)
        steps = STEPS
        return model

    def sample(model, m):
        with torch.no_grad():
            return model.sample(m, generator=generator, temperature=temperature)

    def measure(model):
        with torch.no_grad():
            drawn = model.sample(MEASURED, generator=generator)
        return (drawn.var(0).sum() / SCALES.square().sum()).item()

    return self_consuming_chain(fit, sample, fresh, N, generations, fresh_fraction=share, measure=measure).figures


def vaes(generations=GENERATIONS, chains=CHAINS):
    """A row per share of fresh data and temperature of the latents: variances, the mean over the chains."""
    rows = []
    for temperature in LATENT_TEMPERATURES:
        for share in SHARES:
            figures = torch.tensor([chain(share, temperature, generations, seed) for seed in range(chains)])
            exact = GaussianChain(N, fresh_fraction=share).expected(generations)[:, 0]
            half = generations // 2
            rows.append({"n": N, "fresh_share": share, "latent_temperature": temperature, "generations": generations,
                         "variance": {str(g): round(figures[:, g].mean().item(), 3) for g in (0, half, generations)},
                         "gaussian": {str(g): round(exact[g].item(), 3) for g in (0, half, generations)}
                         if temperature == 1.0 else None})
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", type=int, default=GENERATIONS)
    parser.add_argument("--chains", type=int, default=CHAINS)
    parser.add_argument("--results", type=Path, help="folder for the JSON; none is written without it")
    args = parser.parse_args(argv)
    exact, trained = gaussians(), vaes(args.generations, args.chains)
    for row in (*exact, *trained):
        print(row, flush=True)
    if args.results:
        settings = {"generations": args.generations, "chains": args.chains, "steps": STEPS, "n": N}
        run.save(args.results, "cpu-self-consuming",
                 {"machine": run.machine("cpu"), "arguments": settings, "gaussians": exact, "vaes": trained})
    return 0


if __name__ == "__main__":
    sys.exit(main())
