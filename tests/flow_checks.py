"""What every exact bijection is held to, shared by the tests of the families of flows."""

import torch

from fastflow import flows
from fastflow.flows.jacobian import jacobian


def scattered(module, size=0.3):
    """The module with every parameter moved off its start."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return module


def check_bijection(transform, x, context=None, *, tolerance=1e-9):
    """Inverse, both log-determinants against autograd's Jacobian in float64 of that direction, and their sum."""
    assert x.dtype == torch.float64 and isinstance(transform, flows.Transform)
    report = flows.check_invertible(transform, x, context, tolerance=tolerance)
    assert report.ok, str(report)
    with torch.no_grad():
        z, logdet = transform(x, context)
        _, matrix = jacobian(lambda t: transform.inverse(t, context)[0], z)
    assert logdet.shape == (len(x),) and logdet.dtype == z.dtype == torch.float64
    torch.testing.assert_close(torch.linalg.slogdet(matrix)[1], -logdet, rtol=tolerance, atol=tolerance)


class _Both(torch.nn.Module):
    def __init__(self, transform, direction):
        super().__init__()
        self.transform, self.direction = transform, direction

    def forward(self, x, context):
        return (self.transform if self.direction == "forward" else self.transform.inverse)(x, context)


def check_gradients(transform, x, context=None, *, directions=("forward", "inverse"), **options):
    """gradcheck of z and log-determinant in x, the context and every parameter, in both directions."""
    names = [name for name, _ in transform.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in transform.parameters()]
    x = x.detach().clone().requires_grad_()
    context = None if context is None else context.detach().clone().requires_grad_()
    for direction in directions:
        module = _Both(transform, direction)

        def call(x, context, *parameters, module=module):
            state = {f"transform.{n}": p for n, p in zip(names, parameters, strict=True)}
            return torch.func.functional_call(module, state, (x, context))

        assert torch.autograd.gradcheck(call, (x, context, *values), fast_mode=True, **options), direction


def integral(flow, half_width, n, features, context=None):
    """The integral of the density over a grid of n points a side, for one context (C,) or none."""
    axis = torch.linspace(-half_width, half_width, n, dtype=torch.float64)
    points = torch.cartesian_prod(*[axis] * features).reshape(-1, features)
    with torch.no_grad():
        values = flow.log_prob(points, None if context is None else context.expand(len(points), -1))
    return (values.exp().sum() * (axis[1] - axis[0]) ** features).item()
