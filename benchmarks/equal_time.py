"""Held-out bits/dim after equal wall time: fastflow's Glow beside the same Glow in normflows and in nflows.

    python -m benchmarks.equal_time [--seconds 120] [--threads 2] [--results FOLDER]

Two pairs are trained on the built-in photographs: fastflow and normflows; fastflow with nflows' coupling and nflows.
The two of a pair start from equal weights and compute the same likelihood; they see the same batches with the same
dequantisation noise in the same order, with the same fused Adam, learning rate, warm-up and clipping. fastflow goes
through engine.TrainStep, a peer through the loop that its users write, in the fastest of its settings. All four take
turns of a few seconds, so that a drifting machine hits them alike, until each has had its seconds; evaluations on
held-out images, with one noise for all, don't count.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from benchmarks import contest, glow, peers, run
from fastflow import data, engine
from fastflow.flows import bits_per_dim, dequantize

PEERS = ("normflows", "nflows")
MARKS = (0.25, 0.5, 0.75, 1.0)  # of the time, at which bits/dim are taken
WARM_UP = 50  # steps to the full learning rate
CLIP = 50.0  # norm of the gradients


class Batches:
    """Dequantised batches of the training images, the same sequence for everybody."""

    def __init__(self, images, batch_size, memory_format, seed=0):
        self.images, self.batch_size, self.memory_format = images, batch_size, memory_format
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self):
        rows = torch.randint(len(self.images), (self.batch_size,), generator=self.generator)
        x = dequantize(self.images[rows], generator=self.generator)
        return x.contiguous(memory_format=self.memory_format)


class Contender:
    """A model in training: ``turn(seconds)`` trains it, ``evaluate()`` takes its bits/dim."""

    def __init__(self, name, setting, model, take_step, optimizer, batches, held_out, learning_rate):
        self.name, self.setting, self.model, self.take_step = name, setting, model, take_step
        self.optimizer, self.batches, self.held_out = optimizer, batches, held_out
        self.learning_rate = learning_rate
        self.seconds, self.steps, self.curve = 0.0, 0, []
        self.evaluate()

    def turn(self, seconds):
        start = time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            self.steps += 1
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate * min(1.0, self.steps / WARM_UP)
            self.take_step(self.batches())
        self.seconds += elapsed

    def evaluate(self):
        """Append (seconds, steps, mean bits/dim of the held-out images) to the curve."""
        bits = held_out_bits(self.model, self.held_out, self.batches.memory_format)
        self.curve.append({"seconds": round(self.seconds, 2), "steps": self.steps, "bits_per_dim": round(bits, 4)})

    def record(self):
        return {"name": self.name, "setting": self.setting, "parameters": peers.parameters(self.model),
                "curve": self.curve}


def own_step(model, optimizer):
    return engine.TrainStep(model, optimizer, clip_grad_norm=CLIP, check_finite=False)


def peer_step(model, optimizer):
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def step(x):
        optimizer.zero_grad(set_to_none=True)
        loss = -model(x).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        return loss.detach()
    return step


def held_out_images(images, n):
    """About n of the test images, spread over them all, dequantised with one noise for everybody."""
    chosen = images[:: max(1, len(images) // n)][:n]
    return dequantize(chosen, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def held_out_bits(model, images, memory_format=torch.contiguous_format):
    """Mean bits/dim of dequantised images."""
    bits = [bits_per_dim(model(x.contiguous(memory_format=memory_format)), x[0].numel()) for x in images.split(64)]
    return torch.cat(bits).double().mean().item()


def equal_models(name, sizes, setting, images, seed=0):
    """(fastflow's Glow in the dialect of a peer, the peer's): equal weights, actnorms set from dequantised images."""
    own = glow.fastflow_glow(**sizes, seed=seed, dialect=name if name == "nflows" else "fastflow", perturb=False)
    peer = glow.peer_glow(name, **sizes, seed=seed, **setting)
    load = peers.module(name).load_glow
    load(peer, own)  # may turn rows of own's rotations; what is set from data comes after
    own.initialize(images)
    load(peer, own)
    return own, peer


def pair(name, sizes, photos, held_out, batch_size, learning_rate):
    """The two contenders of a pair."""
    first = dequantize(photos.train[:256], generator=torch.Generator().manual_seed(1))
    x = first[:batch_size]
    setting = glow.fastest(contest.training_step, name,
                           lambda **options: glow.peer_glow(name, **sizes, **options), x).setting
    options, memory_format = glow.settings(name)[setting]
    own, peer = equal_models(name, sizes, options, first)
    peer.to(memory_format=memory_format)
    contenders = []
    for label, model, make, its_setting, its_format in (
            (f"fastflow (as {name})", own, own_step, "", torch.channels_last),
            (name, peer, peer_step, setting, memory_format)):
        optimizer = contest.fused_adam(model, learning_rate)
        contenders.append(Contender(label, its_setting, model, make(model, optimizer), optimizer,
                                    Batches(photos.train, batch_size, its_format), held_out, learning_rate))
    return contenders


def race(contenders, seconds, turn):
    """Train in turns until each contender has had its seconds, evaluating at MARKS."""
    marks = [mark * seconds for mark in MARKS]
    while any(c.seconds < seconds for c in contenders):
        for contender in contenders:
            if contender.seconds >= seconds:
                continue
            contender.turn(min(turn, marks[len(contender.curve) - 1] - contender.seconds))
            while len(contender.curve) <= len(marks) and contender.seconds >= marks[len(contender.curve) - 1]:
                contender.evaluate()  # a point for each mark, also where one long step passes two
                latest = contender.curve[-1]
                print(f"{contender.name:<24} {latest['seconds']:7.1f} s {latest['steps']:6d} steps "
                      f"{latest['bits_per_dim']:.4f} bits/dim", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="of training for each of the four (120)")
    parser.add_argument("--turn", type=float, default=5.0, help="seconds of a turn (5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--n-steps", type=int, default=8)
    parser.add_argument("--hidden-channels", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--held-out", type=int, default=512, help="test images evaluated (512)")
    parser.add_argument("--results", type=Path, help="folder for the JSON; none is written without it")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    photos = data.load("photos")
    held_out = held_out_images(photos.test, args.held_out)
    sizes = {"n_steps": args.n_steps, "hidden_channels": args.hidden_channels}
    pairs = [pair(name, sizes, photos, held_out, args.batch_size, args.learning_rate) for name in PEERS]
    race([contender for both in pairs for contender in both], args.seconds, args.turn)
    settings = {key: value for key, value in vars(args).items() if key != "results"}
    rows = [{"peer": peer.name, "fastflow": own.record(), "of_peer": peer.record(),
             "gain_bits_per_dim": round(peer.curve[-1]["bits_per_dim"] - own.curve[-1]["bits_per_dim"], 4)}
            for own, peer in pairs]
    for row in rows:
        print(f"{row['peer']}: fastflow is {row['gain_bits_per_dim']:+.4f} bits/dim ahead")
    if args.results:
        run.save(args.results, "cpu-equal-time", {"machine": run.machine("cpu"), "arguments": settings,
                                                 "marks": MARKS, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
