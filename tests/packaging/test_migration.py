"""docs/migration.md is run: what each dialect becomes gives the outputs and gradients of what it was."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import nn

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "migration.md").read_text()
SETUP, *SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
TITLES = re.findall(r"^## (.*)$", PAGE, re.M)


def linear(inputs, outputs):
    return lambda: nn.Linear(inputs, outputs)


def conv(inputs, outputs, convolution=nn.Conv2d):
    return lambda: convolution(inputs, outputs, 3, padding=1)


# For every "before": the input's shape and the conditioner.
CASES = [((3, 4, 5, 6), linear(3, 6)), ((3, 6, 4, 5), conv(3, 6)), ((3, 6, 4, 5), conv(3, 6)),
         ((3, 6, 4, 5), linear(6, 6)), ((3, 8, 20), conv(4, 8, nn.Conv1d)), ((9, 7), linear(7, 14)),
         ((3, 5, 6), linear(3, 6)), ((3, 5, 6), linear(6, 12)), ((3, 8, 4, 5), conv(8, 8)), ((3, 8, 4, 5), conv(8, 8))]


def pairs():
    """(case, before, after) of every rewritten snippet."""
    before, index = None, -1
    for snippet in SNIPPETS:
        kind = snippet.partition("\n")[0]
        if kind == "# before":
            before, index = snippet, index + 1
        else:
            assert kind in ("# functional", "# nn")
            yield CASES[index], before, snippet


def run(snippet, net, x):
    """Outputs and the gradients of the input and of the conditioner."""
    names = {}
    exec(SETUP + snippet, names)
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    outputs = names["step"](x, net)
    loss = sum((torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape) * y).sum() for y in outputs)
    return [*outputs, *torch.autograd.grad(loss, [x, *net.parameters()], allow_unused=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("case", "before", "after"), [*pairs()])
def test_before_and_after_agree(case, before, after, dtype):
    shape, make_net = case
    torch.manual_seed(0)
    net, x = make_net().to(dtype), torch.randn(shape, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    for old, new in zip(run(before, net, x), run(after, net, x), strict=True):
        assert (old is None) == (new is None)
        if old is not None:
            # Terms that cancel leave an element the rounding of the largest.
            atol = tolerance * max(1.0, old.abs().max().item())
            torch.testing.assert_close(new, old, rtol=tolerance, atol=atol)


def test_every_dialect_is_shown():
    for name in ("openai/glow", "rosinality", "y0ast", "WaveGlow", "RealNVP", "Jet", "TarFlow", "NVAE", "VDVAE"):
        assert any(title.startswith(name) for title in TITLES)
    kinds = [snippet.partition("\n")[0] for snippet in SNIPPETS]
    assert ("# before", "# before") not in itertools.pairwise([*kinds, "# before"])  # each is rewritten
    assert kinds.count("# before") == len(CASES) == len(TITLES) + 1  # rosinality has two
