"""Held-out bits/dim after equally many steps from equal weights: fastflow's Glow beside the same Glow elsewhere.

    python -m benchmarks.equal_steps [--steps 200] [--results FOLDER]

The pairs of benchmarks.equal_time, in step: both see one batch with one noise, take one step of Adam at one rate (a
warm-up, then a cosine down to zero), and are evaluated on the same held-out photographs. Adam sees coordinates, so each
pair has the same: normflows' are fastflow's up to signs; for nflows, fastflow's Glow is written in nflows' (see
benchmarks.coordinates), and the bias of nflows' 1x1 convolution, which its actnorm has already, rests. In float64, so
that what is left is not the growth of rounding along two chaotic paths; --dtype float32 shows that.
"""

import argparse
import math
import os
import sys
from pathlib import Path

import torch

from benchmarks import contest, coordinates, equal_time, peers, run
from fastflow import data
from fastflow.flows import dequantize

SETTINGS = {"normflows": {"use_lu": False}, "nflows": {}}  # of the peers' Glow
WITHIN = 0.01  # bits/dim of held-out images
MARKS = 4  # evaluations, evenly spread


class Pair:
    """fastflow's Glow and a peer's, equal weights, which ``step()`` trains on the same batch."""

    def __init__(self, name, sizes, train, batch_size, learning_rate, n_steps, dtype=torch.float64):
        first = dequantize(train[:256], generator=torch.Generator().manual_seed(1))
        models = [model.to(dtype) for model in equal_time.equal_models(name, sizes, SETTINGS[name], first)]
        peers.module(name).load_glow(models[1], models[0])  # anew: the first time rounded to float32
        if name == "nflows":
            coordinates.as_nflows(*models)
        optimizers = [contest.fused_adam(model, learning_rate) for model in models]
        steps = [make(model, optimizer) for make, model, optimizer in
                 zip((equal_time.own_step, equal_time.peer_step), models, optimizers, strict=True)]
        self.name, self.models, self.optimizers, self._steps = name, models, optimizers, steps
        self.batches = equal_time.Batches(train, batch_size, torch.channels_last)
        self.learning_rate, self.n_steps, self.dtype, self.losses = learning_rate, n_steps, dtype, []

    def step(self):
        """One step of both; appends their losses, in bits/dim up to a common constant."""
        taken = len(self.losses)
        rate = 0.5 * self.learning_rate * (1.0 + math.cos(math.pi * taken / self.n_steps))
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = rate * min(1.0, (taken + 1) / equal_time.WARM_UP)
        x = self.batches().to(self.dtype)
        unit = x[0].numel() * math.log(2.0)
        self.losses.append([step(x).item() / unit for step in self._steps])

    def bits_per_dim(self, held_out):
        """Of both, on dequantised images."""
        return [equal_time.held_out_bits(model, held_out.to(self.dtype)) for model in self.models]


def compare(pair, held_out):
    """Take the pair's steps, evaluate at MARKS: the pair's record."""
    curve = []
    for mark in range(MARKS + 1):
        while len(pair.losses) < mark * pair.n_steps // MARKS:
            pair.step()
        own, peer = pair.bits_per_dim(held_out)
        curve.append({"steps": len(pair.losses), "fastflow": round(own, 5), "peer": round(peer, 5),
                      "difference": round(own - peer, 5)})
        print(f"{pair.name:<10} {len(pair.losses):5d} steps  fastflow {own:.4f}  {pair.name} {peer:.4f}  "
              f"difference {own - peer:+.5f} bits/dim", flush=True)
    return {"peer": pair.name, "curve": curve,
            "largest_loss_gap": round(max(abs(a - b) for a, b in pair.losses), 6)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--n-steps", type=int, default=2, help="of the flow, in each of its three levels (2)")
    parser.add_argument("--hidden-channels", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--held-out", type=int, default=256, help="test images evaluated (256)")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    parser.add_argument("--results", type=Path, help="folder for the JSON; none is written without it")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    photos = data.load("photos")
    held_out = equal_time.held_out_images(photos.test, args.held_out)
    sizes = {"n_steps": args.n_steps, "hidden_channels": args.hidden_channels}
    rows = [compare(Pair(name, sizes, photos.train, args.batch_size, args.learning_rate, args.steps,
                         getattr(torch, args.dtype)), held_out)
            for name in SETTINGS]
    if args.results:
        settings = {key: value for key, value in vars(args).items() if key != "results"}
        run.save(args.results, "cpu-equal-steps", {"machine": run.machine("cpu"), "arguments": settings,
                                                  "within": WITHIN, "rows": rows})
    return int(any(abs(row["curve"][-1]["difference"]) > WITHIN for row in rows))


if __name__ == "__main__":
    sys.exit(main())
