"""The pytest plugin: a suite runs on fused layers, which the summary counts, and constructors are put back."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from fastflow.adapters import swap
from fastflow.adapters.pytest_plugin import Plugin

pytest.importorskip("nflows")
from nflows import transforms  # noqa: E402
from nflows.nn import nets  # noqa: E402

SUITE = '''
import unittest

import pytest
import torch
from nflows import transforms
from nflows.nn import nets


class Own(transforms.ActNorm):
    pass


@pytest.fixture
def coupling():
    return transforms.AffineCouplingTransform([1, 0, 1, 0], lambda i, o: nets.ResidualNet(i, o, 8))


def test_fixture(coupling):
    assert type(coupling) is not transforms.AffineCouplingTransform
    assert isinstance(coupling, transforms.AffineCouplingTransform)
    x = torch.randn(256, 4)
    z, logdet = coupling(x)
    torch.testing.assert_close(coupling.inverse(z)[0], x, rtol=0.0, atol=1e-4)


class Test(unittest.TestCase):
    def setUp(self):
        self.layer = transforms.OneByOneConvolution(4)

    def test_method(self):
        x = torch.randn(8, 4, 8, 8)
        torch.testing.assert_close(self.layer.inverse(self.layer(x)[0])[0], x, rtol=0.0, atol=1e-4)

    def test_subclass(self):
        assert type(Own(3)) is Own


def test_option_without_fused_form():
    coupling = transforms.PiecewiseCubicCouplingTransform([1, 0], lambda i, o: nets.ResidualNet(i, o, 8), 4)
    assert type(coupling) is transforms.PiecewiseCubicCouplingTransform


def test_that_fails():
    assert transforms.ActNorm(2) is None
'''


def test_suite_runs_accelerated(tmp_path):
    (tmp_path / "test_suite.py").write_text(SUITE)
    run = subprocess.run([sys.executable, "-m", "pytest", "-p", "fastflow.adapters.pytest_plugin",
                          "-p", "no:cacheprovider",
                          str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False)
    lines = run.stdout.splitlines()
    assert "4 layers swapped, 2 of them verified" in lines, run.stdout
    for line in ("  1 x nflows AffineCouplingTransform", "  2 x nflows OneByOneConvolution", "  1 x nflows ActNorm"):
        assert line in lines
    assert lines[-1].startswith("FAILED") or "1 failed, 4 passed" in lines[-1], run.stdout


@pytest.fixture
def plugin():
    plugin = Plugin()
    plugin.install()
    yield plugin
    plugin.uninstall()


def test_a_layer_that_differs_is_put_back(plugin):
    class Wrong(transforms.ActNorm):
        pass

    class Fused(Wrong):
        def forward(self, x, context=None):
            z, logdet = super().forward(x, context)
            return z + 1.0, logdet

    swap.swap(Wrong)(Fused)
    try:
        plugin.install()
        layer = Wrong(3).eval()
        with pytest.warns(RuntimeWarning, match="keeps its original form"):
            z, _ = layer(torch.ones(4, 3))
        torch.testing.assert_close(z, torch.ones(4, 3))
        assert type(layer) is Wrong and not plugin.report.swapped and len(plugin.report.skipped) == 1
    finally:
        plugin.uninstall()
        del swap.SWAPS[Wrong]


def test_layers_on_the_meta_device_are_left_alone(plugin):
    with torch.device("meta"):
        layer = transforms.ActNorm(3)
    assert type(layer) is transforms.ActNorm
    assert plugin.report.skipped == {0: "nflows ActNorm: it is on the meta device"}


def test_constructors_are_put_back(plugin):
    host, inherits = transforms.AffineCouplingTransform, transforms.AdditiveCouplingTransform
    assert swap.swap_of(inherits([1, 0], lambda i, o: nets.ResidualNet(i, o, 8))) is not None
    plugin.uninstall()
    assert "__init__" not in inherits.__dict__ and not hasattr(host.__init__, "__wrapped__")
    assert swap.swap_of(inherits([1, 0], lambda i, o: nn.Linear(i, o))) is None
