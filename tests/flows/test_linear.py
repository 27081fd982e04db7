"""Linear maps: log-determinant and inverse against the matrix, the covariance of a linear map of a Gaussian."""

import copy

import pytest
import torch

from fastflow import flows

MAPS = {
    "dense": flows.Dense, "plu": flows.PLU, "qr": flows.QR, "householder": flows.Householder,
    "two reflections": lambda c, **k: flows.Householder(c, n_reflections=min(2, c), **k),
    "cayley": flows.Orthogonal, "matrix exponential": lambda c, **k: flows.Orthogonal(c, method="exp", **k),
    "lower": flows.Triangular, "upper": lambda c, **k: flows.Triangular(c, upper=True, **k),
    "low rank": lambda c, **k: flows.LowRank(c, rank=min(2, c), **k),
}
every_map = pytest.mark.parametrize("name", MAPS)


def build(name, channels, seed=0, **options):
    """A map away from its first values."""
    torch.manual_seed(seed)
    layer = MAPS[name](channels, **options).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return layer


@every_map
@pytest.mark.parametrize("channels", [1, 3, 6])
def test_against_the_matrix(name, channels):
    for seed in range(20):
        layer = build(name, channels, seed)
        matrix = layer.matrix().detach()
        exact = torch.linalg.slogdet(matrix)[1]
        torch.testing.assert_close(layer.log_abs_det().detach(), exact, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(layer.inverse_matrix().detach(), torch.linalg.inv(matrix), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(layer.covariance().detach(), matrix @ matrix.mT)
        for shape in ((4, channels), (2, channels, 5), (2, channels, 3, 2)):
            x = torch.randn(shape, dtype=torch.float64)
            z, logdet = layer(x)
            expected = torch.einsum("ij,bj...->bi...", matrix, x) + layer.bias.view(-1, *(1,) * (x.dim() - 2))
            torch.testing.assert_close(z, expected, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(logdet, x[0, 0].numel() * exact.expand(len(x)))
            back, opposite = layer.inverse(z)
            torch.testing.assert_close(back, x, rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(opposite, -logdet)


@every_map
def test_gradients_both_ways(name):
    layer = build(name, 3)
    parameters = dict(layer.named_parameters())

    def run(direction):
        def call(x, *values):
            state = dict(zip(parameters, values, strict=True))
            module = layer if direction == "forward" else _Inverse(layer)
            prefix = "" if direction == "forward" else "layer."
            return torch.func.functional_call(module, {prefix + n: v for n, v in state.items()}, (x,))
        return call

    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    for direction in ("forward", "inverse"):
        assert torch.autograd.gradcheck(run(direction), (x, *parameters.values()))


class _Inverse(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, z):
        return self.layer.inverse(z)


@every_map
def test_check_invertible_agrees(name):
    report = flows.check_invertible(build(name, 4), torch.randn(3, 4, dtype=torch.float64), tolerance=1e-8)
    assert report.ok, str(report)


def test_orthogonal_maps_are_orthogonal():
    for name in ("householder", "two reflections", "cayley", "matrix exponential"):
        torch.testing.assert_close(build(name, 5).covariance().detach(), torch.eye(5, dtype=torch.float64),
                                   rtol=1e-10, atol=1e-10)
    assert torch.linalg.det(build("two reflections", 4).matrix()) > 0


def test_a_linear_map_of_a_gaussian_has_covariance_a_a_transposed():
    """x = A z + b with z ~ N(0, I) is N(b, A A'): log_prob, and the covariance of samples."""
    layer = build("dense", 3)
    flow = flows.Flow(flows.Inverse(layer), flows.StandardNormal(3)).double()
    x = torch.randn(10, 3, dtype=torch.float64)
    law = torch.distributions.MultivariateNormal(layer.bias.detach(), layer.covariance().detach())
    torch.testing.assert_close(flow.log_prob(x).detach(), law.log_prob(x), rtol=1e-9, atol=1e-9)
    samples = flow.sample(200_000, generator=torch.Generator().manual_seed(0))
    error = (torch.cov(samples.T) - law.covariance_matrix).abs().max() / law.covariance_matrix.abs().max()
    assert error < 0.02


def test_without_bias_in_float32_and_under_autocast():
    layer = flows.LowRank(4, bias=False, rank=2)
    assert layer.bias is None and len(list(layer.parameters())) == 3
    x = torch.randn(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, logdet = layer(x)
    assert z.dtype == logdet.dtype == torch.float32
    torch.testing.assert_close(z, copy.deepcopy(layer).double()(x.double())[0].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("call", "error", "match"), [
    (lambda: flows.Dense(0), ValueError, "channels"), (lambda: flows.LowRank(3, rank=4), ValueError, "rank"),
    (lambda: flows.Householder(3, n_reflections=0), ValueError, "n_reflections"),
    (lambda: flows.Orthogonal(3, method="qr"), ValueError, "method"),
    (lambda: flows.QR(3)(torch.zeros(2, 4)), ValueError, "x"), (lambda: flows.QR(3)(torch.zeros(3)), ValueError, "x"),
    (lambda: flows.QR(3)(torch.zeros(2, 3).double()), TypeError, "A|x"),
    (lambda: flows.QR(3).inverse(torch.zeros(2, 4)), ValueError, "z")])
def test_refusals(call, error, match):
    with pytest.raises(error, match=match):
        call()
