"""The kernel launches of a Glow training step (forward and backward), by operator, counted without a GPU.

    python -m benchmarks.launches [triton | cuda]     default: each operator on the backend preferred on a GPU
"""

import sys

import torch

from fastflow import flows, launches


def of_glow_step(backend=None, n_levels=3, n_steps=8, image_shape=(3, 32, 32), batch=2, parametrization="plain"):
    """The launches.Counted of one forward and backward. They don't depend on the conditioners, which are tiny here."""
    flow = flows.Glow(image_shape, n_levels, n_steps, hidden_channels=4, parametrization=parametrization)
    x = torch.rand(batch, *image_shape) - 0.5
    with launches.count(backend) as counted:
        flow(x).mean().neg().backward()
    return counted


def main(backend=None):
    for n_steps in (8, 32):
        for parametrization in ("plain", "plu"):
            print(f"Glow 3x32x32, 3 levels x {n_steps} steps, 1x1 weights {parametrization}")
            print(of_glow_step(backend, n_steps=n_steps, parametrization=parametrization), end="\n\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
