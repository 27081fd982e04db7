"""Models refuse data of another shape than theirs, and speak of the data that they were given."""

import re

import pytest
import torch

from fastflow import flows
from fastflow.engine import TrainStep

FLOWPP = {"n_checkerboard": 1, "n_channel": 1, "n_final": 1, "n_components": 2, "hidden_channels": 4, "n_blocks": 1,
          "n_heads": 1, "dequantization_couplings": 1, "dequantization_blocks": 1}
TABULAR = (flows.RealNVP, flows.NICE, flows.MAF, flows.IAF, flows.NSF, flows.ResidualFlow, flows.FFJORD)
IMAGES = {
    "realnvp": lambda: flows.RealNVPImage((1, 4, 4), 2, 1, 4, 1), "flow++": lambda: flows.FlowPP((1, 4, 4), **FLOWPP),
    "flow++ uniform": lambda: flows.FlowPP((1, 4, 4), **FLOWPP, dequantization="uniform"),
    "residual": lambda: flows.ResidualFlowImage((1, 4, 4), 2, 1, 4, n_fc_blocks=0, squeeze_first=True),
    "ffjord": lambda: flows.FFJORDImage((1, 4, 4), 2, 1, (4,)), "glow": lambda: flows.Glow((1, 4, 4), 1, 1, 4),
    "jet": lambda: flows.Jet((1, 4, 4), patch_size=2, channels=8, couplings=1, depth=1, heads=2)}


def speaks_of(x, event_shape):
    return pytest.raises(ValueError, match=re.escape(f"x: expected shape {(2, *event_shape)}, got {tuple(x.shape)}"))


@pytest.mark.parametrize("shape", [(2, 4), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("kind", TABULAR, ids=lambda kind: kind.__name__)
def test_models_speak_of_the_x_that_they_were_given(kind, shape):
    flow, x = kind(3).eval(), torch.randn(shape)
    for call in (flow.log_prob, flow.initialize):
        with speaks_of(x, (3,)):
            call(x)
    memory = "none" if kind is flows.FFJORD else "save_z"  # which has one step
    step = TrainStep(flow, torch.optim.SGD(flow.parameters(), 0.1), memory=memory)
    with speaks_of(x, (3,)):
        step(x)


@pytest.mark.parametrize("shape", [(2, 1, 4, 6), (2, 3, 4, 4)], ids=str)
@pytest.mark.parametrize("name", IMAGES)
def test_image_models_speak_of_the_images_that_they_were_given(name, shape):
    flow, x = IMAGES[name]().eval(), torch.rand(shape) - 0.5
    pixels = torch.zeros(shape, dtype=torch.uint8)
    for call, given in ((flow.log_prob, x), (flow.initialize, x), (flow.bits_per_dim, pixels)):
        with speaks_of(x, (1, 4, 4)):
            call(given)
    if flow.dequantization is not None:
        for call in (flow.log_prob, flow.initialize):
            with speaks_of(x, (1, 4, 4)):
                call(pixels)
