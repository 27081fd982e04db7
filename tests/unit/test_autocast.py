"""Autocast and gradient scaling on the CPU and GPU: the conditioner runs in half precision, z and log-det stay
float32."""

import pytest
import torch
from cases import no_kernel

from fastflow import functional, reference

HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)


class Layer(torch.nn.Module):
    """conv -> params -> coupling, a 1x1 weight, and a Gaussian head."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 6, 1))
        self.head = torch.nn.Linear(3, 8)
        self.weight = torch.nn.Parameter(torch.linalg.qr(torch.randn(3, 3))[0])

    def forward(self, x, module=functional):
        params = self.net(x)
        carried = module.slogdet(self.weight)[1].expand(len(x))
        y, logdet = module.affine_coupling(x, params, scale="sigmoid", logdet=carried)
        stats = self.head(y.mean((2, 3)))
        z, kl = module.gaussian_sample_kl(stats, seed=5)
        self.seen = {"params": params.dtype, "y": y.dtype, "logdet": logdet.dtype, "z": z.dtype, "kl": kl.dtype,
                     "stats": stats.dtype}
        return y.square().mean() - logdet.mean() * 0.01 + z.float().square().mean() + kl.mean()


@HALVES
def test_dtypes_and_gradients_under_autocast(half, backend, device):
    """Half-precision params, float32 y, log-det and KL; the backward runs outside autocast and gives float32
    parameters' gradients equal to those of the reference under the same autocast."""
    layer, x = Layer().to(device), torch.randn(4, 3, 6, 6, device=device)
    grads = []
    for module in (functional, reference):
        with torch.autocast(device, dtype=half):
            loss = layer(x, module)
        assert layer.seen == {"params": half, "y": torch.float32, "logdet": torch.float32, "stats": half, "z": half,
                              "kl": torch.float32}
        grads.append(torch.autograd.grad(loss, list(layer.parameters())))
    for got, want in zip(*grads, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=5e-2, atol=torch.finfo(half).eps)


@HALVES
def test_autocast_casts_no_operand(half, backend, device):
    """The ops are exact under autocast: the same bits as outside, in values and gradients, backward inside or out."""
    x, params = torch.randn(3, 4, 5, device=device), torch.randn(3, 8, 5, device=device)
    weight = torch.randn(2, 5, 5, device=device)

    def run():
        leaves = [t.clone().requires_grad_() for t in (x, params, weight)]
        y, logdet = functional.affine_coupling(*leaves[:2], scale="tanh")
        sign, logabsdet, inverse = functional.slogdet_inverse(leaves[2])
        z, kl = functional.gaussian_sample_kl(leaves[1], seed=1)
        results = [y, logdet, sign, logabsdet, inverse, z, kl]
        grads = torch.autograd.grad([t.sum() for t in results if t.requires_grad], leaves)
        return [*results, *grads]

    plain = run()
    with torch.autocast(device, dtype=half):
        inside = run()
    for got, want in zip(inside, plain, strict=True):
        assert got.dtype == want.dtype == torch.float32
        if backend == "reference":  # eager matmuls inside an inverse's backward are autocast's to cast
            torch.testing.assert_close(got, want, rtol=5e-2, atol=5e-2)
        else:
            assert torch.equal(got, want)


@HALVES
def test_gradient_scaler_steps_and_skips(half, backend, device):
    """Scaled losses give unscaled steps; an infinite gradient skips the step and halves the scale."""
    layer, x = Layer().to(device), torch.randn(4, 3, 6, 6, device=device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**8)
    with torch.autocast(device, dtype=half):
        loss = layer(x)
    plain = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for parameter, grad in zip(layer.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=5e-2, atol=2e-2)
    before = [p.detach().clone() for p in layer.parameters()]
    scaler.step(optimizer)
    scaler.update()
    assert all(not torch.equal(b, p) for b, p in zip(before, layer.parameters(), strict=True))
    optimizer.zero_grad()
    with torch.autocast(device, dtype=half):
        loss = layer(x * float("inf"))
    scaler.scale(loss).backward()
    before = [p.detach().clone() for p in layer.parameters()]
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(b, p) for b, p in zip(before, layer.parameters(), strict=True))
    assert scaler.get_scale() == 2.0**7


@pytest.mark.parametrize("through", ["autograd", "create_graph", "torch.func"])
@pytest.mark.parametrize("size", [6, 64])
@HALVES
def test_gradients_of_inverses_keep_their_precision(size, through, half, backend, device):
    """Asked for inside autocast, whose products on the way back are lowered too."""
    if through == "torch.func" and backend != "reference":
        pytest.skip("the reference runs under torch.func")
    if reason := no_kernel(backend, "slogdet_inverse", size):
        pytest.skip(reason)
    torch.manual_seed(0)
    weight = torch.eye(size, device=device) + 0.2 * torch.randn(size, size, device=device) / size**0.5

    def loss(w):
        return functional.slogdet_inverse(w)[2].sin().sum()

    double = weight.double().requires_grad_()
    truth, = torch.autograd.grad(torch.linalg.inv(double).sin().sum(), double)
    with torch.autocast(torch.device(device).type, dtype=half):
        if through == "torch.func":
            grad = torch.func.grad(loss)(weight)
        else:
            leaf = weight.requires_grad_()
            grad, = torch.autograd.grad(loss(leaf), leaf, create_graph=through == "create_graph")
    assert grad.dtype == torch.float32
    assert (grad - truth).abs().max() < 1e-5 * truth.abs().max()


def test_float16_does_not_overflow_inside(backend, device):
    """exp(12) and 300^2 overflow float16, not the float32 that they are computed in."""
    x = torch.full((2, 3), 1e-4, dtype=torch.float16, device=device)
    raw = torch.full_like(x, 12.0)
    y, logdet = functional.affine_coupling(x, (raw, torch.zeros_like(x)))
    assert torch.isfinite(y).all() and logdet.tolist() == [36.0, 36.0]
    assert y[0, 0].item() == pytest.approx(x[0, 0].item() * 162754.79, rel=1e-3)
    kl = functional.gaussian_sample_kl((torch.full_like(x, 300.0), torch.zeros_like(x)), seed=1)[1]
    assert kl.tolist() == [135000.0, 135000.0]
