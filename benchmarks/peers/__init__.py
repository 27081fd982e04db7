"""The same models in other people's libraries, one file per library, each written as its users write it.

A module has ``Glow(image_shape, n_levels, n_steps, hidden_channels, **setting)`` or ``RealNVP(n_layers, hidden,
**setting)``, or both: nn.Modules whose call is log p(x) (B,). GLOW_SETTINGS and REALNVP_SETTINGS name the ways in which
a library offers the same thing; a benchmark tries them all and takes the fastest. GLOW_DIFFERENCE and
REALNVP_DIFFERENCE say in what the model differs from fastflow's. ``load_glow`` and ``load_realnvp`` give a peer the
weights of a fastflow model in that library's dialect: both then compute the same likelihood.
"""

import importlib

# name: module. What is "fastest" in the tables is the fastest of FASTEST_*; FrEIA's Glow does less work.
GLOW = {"nflows": "nflows", "normflows": "normflows", "rosinality": "rosinality", "FrEIA": "freia"}
REALNVP = {"nflows": "nflows", "normflows": "normflows", "FrEIA": "freia", "zuko": "zuko", "torchflows": "torchflows"}
FASTEST_GLOW = ("nflows", "normflows", "rosinality")
FASTEST_REALNVP = tuple(REALNVP)


def module(name):
    """The module of a peer by its name in GLOW or REALNVP; ImportError where its library is not installed."""
    return importlib.import_module(f"benchmarks.peers.{(GLOW | REALNVP)[name]}")


def parameters(model):
    """Number of learned parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
