"""docs/inversion.md, how the error of an inverse grows with depth:  python -m benchmarks.inversion [--measure]

The page states bounds, which the tests hold the code to; ``--measure`` prints the bounds that this machine would state.
"""

import argparse
import contextlib
import math
import sys
from pathlib import Path

import torch
from torch import nn

from fastflow import flows
from fastflow.engine.precision import Conditioners
from fastflow.functional import ScaleMap
from fastflow.nn import MLP, AffineCoupling, SplineCoupling

PAGE = Path(__file__).resolve().parents[1] / "docs" / "inversion.md"
DEPTHS, GAINS = (8, 16, 32, 64), (0.5, 1.0)
FEATURES, HIDDEN, BATCH, SEEDS = 64, 64, 128, 2
SCALES = {
    "additive": "additive", "sigmoid": "sigmoid", "atan": "atan", "rational": "rational", "tanh": "tanh",
    "softplus": "softplus", "1/2 + sigmoid/2": ScaleMap("sigmoid", out_gain=0.5, eps=0.5), "exp": "exp",
}
LOST = math.inf  # an error above 1: nothing is promised

# {(gain, precision): {scale map or "rq spline": the bound at each of DEPTHS}}
BOUNDS = {
    (0.5, "float32"): {
        "additive": (1e-5, 1e-5, 1e-5, 1e-4),
        "sigmoid": (1e-5, 1e-5, 1e-4, 1e-4),
        "atan": (1e-5, 1e-5, 1e-4, 1e-4),
        "rational": (1e-5, 1e-5, 1e-4, 1e-3),
        "tanh": (1e-5, 1e-4, 1e-4, 1e-2),
        "softplus": (1e-5, 1e-5, 1e-4, 1e-3),
        "1/2 + sigmoid/2": (1e-5, 1e-5, 1e-4, 1e-4),
        "exp": (1e-5, 1e-4, 1e-3, 1e-1),
        "rq spline": (1e-4, 1e-3, 1e-2, 1.0),
    },
    (0.5, "bfloat16"): {
        "additive": (1e-2, 1e-1, 1e-1, 1e-1),
        "sigmoid": (1e-2, 1e-1, 1e-1, 1.0),
        "atan": (1e-2, 1e-2, 1e-1, 1.0),
        "rational": (1e-2, 1e-2, 1e-1, 1.0),
        "tanh": (1e-2, 1e-2, 1e-1, LOST),
        "softplus": (1e-1, 1e-1, 1e-1, 1.0),
        "1/2 + sigmoid/2": (1e-1, 1e-1, 1e-1, 1.0),
        "exp": (1e-2, 1e-2, 1.0, LOST),
    },
    (1.0, "float32"): {
        "additive": (1e-5, 1e-4, 1e-4, 1e-3),
        "sigmoid": (1e-4, 1e-3, 1e-2, LOST),
        "atan": (1e-4, 1e-3, 1e-2, LOST),
        "rational": (1e-4, 1e-3, 1e-1, LOST),
        "tanh": (1e-4, 1e-2, LOST, LOST),
        "softplus": (1e-4, 1e-2, LOST, LOST),
        "1/2 + sigmoid/2": (1e-4, 1e-3, 1.0, LOST),
        "exp": (1e-3, 1.0, LOST, LOST),
    },
    (1.0, "bfloat16"): {
        "additive": (1e-2, 1e-1, 1.0, 1.0),
        "sigmoid": (1e-1, 1.0, LOST, LOST),
        "atan": (1.0, 1.0, LOST, LOST),
        "rational": (1.0, 1.0, LOST, LOST),
        "tanh": (1.0, LOST, LOST, LOST),
        "softplus": (1e-1, 1.0, LOST, LOST),
        "1/2 + sigmoid/2": (1e-2, 1.0, LOST, LOST),
        "exp": (1e-1, LOST, LOST, LOST),
    },
}

HEAD = """\
# How exactly a flow inverts

Written by `python -m benchmarks.inversion`; the tests hold the code to these bounds.
`fastflow.diagnostics.inversion_error(flow, x)` measures a flow of yours, layer by layer.

Each figure bounds max |x - inverse(forward(x))| over {batch} draws of N(0, I) in {features} dimensions and {seeds}
random flows of couplings, whose conditioners have one hidden layer of {hidden} units (tanh) and weights
N(0, gain^2 / inputs): what couplings do to each other when nothing keeps them tame. Training begins at the identity,
gain 0. "lost" is an error that may pass 1. z is float32 throughout; "bfloat16" is the conditioner alone
(`engine.TrainStep(conditioner_dtype=torch.bfloat16)`).
"""

TAIL = """\
- A log-scale bounded from both sides keeps the inverse; a free exp loses it first. Additive couplings drift least.
- Beyond 32 layers invert in float64 (`flow.double()`) where samples must return to their noise.
- A bfloat16 conditioner rounds its input: a last bit of z that flips moves the parameters by 1/256 of their size. It is
  for training and densities. Sample, and train with `memory="invert"`, with float32 conditioners.
- Splines are as steep as their sharpest bin; `min_derivative`, `min_width` and `min_height` bound that.
"""


def build(scale, depth, gain, seed):
    """A composition of couplings that take turns."""
    generator = torch.Generator().manual_seed(seed)
    half, layers = FEATURES // 2, []
    for index in range(depth):
        per_channel = 23 if scale == "rq spline" else 1 if scale == "additive" else 2
        net = MLP(half, per_channel * half, (HIDDEN,), activation=nn.Tanh)
        with torch.no_grad():
            for linear in net.layers[::2]:
                linear.bias.zero_()
                spread = gain / math.sqrt(linear.in_features)
                linear.weight.copy_(spread * torch.randn(linear.weight.shape, generator=generator))
        layers.append(SplineCoupling(net, flip=index % 2 == 1) if scale == "rq spline" else
                      AffineCoupling(net, flip=index % 2 == 1, scale=SCALES[scale]))
    return flows.Compose(*layers)


def measure(scale, depth, gain, lowered=False):
    """The largest error over the seeds."""
    worst = 0.0
    for seed in range(SEEDS):
        flow = build(scale, depth, gain, seed)
        x = torch.randn(BATCH, FEATURES, generator=torch.Generator().manual_seed(100 + seed))
        with Conditioners(flow, torch.bfloat16)() if lowered else contextlib.nullcontext():
            z = flow(x)[0]
            worst = max(worst, (flow.inverse(z)[0] - x).abs().nan_to_num(math.inf).max().item())
    return worst


def cases(gain):
    """(precision, scale map) of every row."""
    yield from ((precision, scale) for precision in ("float32", "bfloat16") for scale in SCALES)
    if gain == min(GAINS):
        yield "float32", "rq spline"


def stated(errors, lowered=False):
    """The bounds that the errors found at DEPTHS lead to: powers of ten, five times above the largest so far. In
    bfloat16, where an error is a matter of whether a bit flips, at least 1e-2."""
    bounds = []
    for depth in range(len(errors)):
        worst = max(*errors[:depth + 1], 2e-3 if lowered else 1e-7)
        bound = 10.0 ** math.ceil(math.log10(5.0 * worst) - 1e-9)
        bounds.append(bound if bound <= 1.0 else LOST)
    return bounds


def render():
    """The page as a string."""
    lines = [HEAD.format(batch=BATCH, features=FEATURES, seeds=SEEDS, hidden=HIDDEN)]
    for gain in GAINS:
        head = " | ".join(f"{depth} layers" for depth in DEPTHS)
        lines += [f"## Gain {gain:g}", "", f"| conditioner | scale map | {head} |", "|---" * (2 + len(DEPTHS)) + "|"]
        for precision, scale in cases(gain):
            cells = ("lost" if bound == LOST else f"{bound:.0e}" for bound in BOUNDS[gain, precision][scale])
            lines.append(f"| {precision} | {scale} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join([*lines, "## What follows", "", TAIL])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    if parser.parse_args(argv).measure:
        for gain in GAINS:
            for precision, scale in cases(gain):
                with torch.no_grad():
                    errors = [measure(scale, depth, gain, precision == "bfloat16") for depth in DEPTHS]
                bounds = ", ".join("LOST" if b == LOST else f"{b:.0e}" for b in stated(errors, precision == "bfloat16"))
                print(f"{gain}, {precision}, {scale}: ({bounds})", flush=True)
        return 0
    PAGE.write_text(render())
    print(f"written to {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
