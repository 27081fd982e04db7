"""The same models in other people's libraries, one file per library, each written as its users write it.

A module has ``Glow(image_shape, n_levels, n_steps, hidden_channels, **setting)`` or ``RealNVP(n_layers, hidden,
**setting)``, or both: nn.Modules whose call is log p(x) (B,); all but one have ``sample(n)``. GLOW_SETTINGS and
REALNVP_SETTINGS name the ways in which a library offers the same thing; a benchmark tries them all and takes the
fastest. ``load_glow`` and ``load_realnvp`` give a peer the weights of a fastflow model in that library's dialect: both
then compute the same likelihood.
"""

import importlib

# name: module. What is "fastest" in the tables is the fastest of FASTEST_*; FrEIA's Glow does less work.
GLOW = {"nflows": "nflows", "normflows": "normflows", "rosinality": "rosinality", "FrEIA": "freia"}
REALNVP = {"nflows": "nflows", "normflows": "normflows", "FrEIA": "freia", "zuko": "zuko", "torchflows": "torchflows"}
FASTEST_GLOW = ("nflows", "normflows", "rosinality")
SAMPLING_GLOW = ("nflows", "normflows", "FrEIA")  # rosinality's way back is not written here
FASTEST_REALNVP = tuple(REALNVP)

_FULL_LU = "where the LU form of the 1x1 weights is faster, L and U are stored as full matrices"
# In what a peer's model differs from fastflow's, which has z = (x + t) sigmoid(r + 2) in Glow, x exp(tanh(r)) + t else.
GLOW_DIFFERENCES = {
    "nflows": "coupling x (sigmoid(r + 2) + 0.001) + t; 1x1 weights as L U P, with a bias of their own",
    "normflows": f"(x - t) for (x + t); {_FULL_LU}",
    "rosinality": "not on PyPI, written for this benchmark in the manner of github.com/rosinality/glow-pytorch; a "
                  "learned scale on each last convolution, a convolution as the last level's prior, borders padded "
                  f"with ones; {_FULL_LU}",
    "FrEIA": "does less work: AllInOneBlock has a fixed rotation for the learned 1x1 weight and no log-determinant of "
             "one; coupling x exp(2 tanh(r / 10)) + t / 10, before the actnorm, which is not set from data",
}
REALNVP_DIFFERENCES = {
    "nflows": "x (sigmoid(r + 2) + 0.001) + t",
    "normflows": "(x - t) exp(-r)",
    "FrEIA": "none; where its AllInOneBlock is faster, an affine map and a rotation per layer are added",
    "zuko": "x exp(r / (1 + abs(r / log 0.001))) + t",
    "torchflows": "x exp(r / 2) + t; composed from its layers without the actnorm that its ready RealNVP adds to each",
}


def module(name):
    """The module of a peer by its name in GLOW or REALNVP; ImportError where its library is not installed."""
    return importlib.import_module(f"benchmarks.peers.{(GLOW | REALNVP)[name]}")


def parameters(model):
    """Number of learned parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
