"""Pairs of equal models for tests of captured steps, one to capture and one to run eagerly."""

import copy

import torch
from stand_in_models import Affine

from fastflow import flows
from fastflow.engine import TrainStep


def adam(model, **options):
    return torch.optim.Adam(model.parameters(), 0.05, fused=True, **options)


def pair(options=None, make=Affine, optimizer=adam):
    """(captured, eager) steps of equal models."""
    model = make()
    twin = copy.deepcopy(model)
    return (TrainStep(model, optimizer(model), capture=True, **(options or {})),
            TrainStep(twin, optimizer(twin), **(options or {})))


def glow():
    model = flows.Glow((3, 8, 8), n_levels=2, n_steps=2, hidden_channels=8)
    model.initialize(torch.rand(8, 3, 8, 8) - 0.5)
    return model
