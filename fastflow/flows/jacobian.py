"""Any callable as a transform through its Jacobian, and a check of any transform against its Jacobian."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from fastflow import checks
from fastflow.autograd.differentiable import detached, leaf_of, outside_inference_mode

__all__ = ["InvertibilityReport", "Lambda", "check_invertible", "jacobian"]


def jacobian(function, x):
    """(z, J) of a function of batches whose samples don't depend on each other: J (B, D, D) with J[b, i, j] =
    dz[b, i]/dx[b, j] of the flattened events; differentiable itself if grad mode is on.

    Args:
        function: maps x (B, *event) to z of as many elements.
        x: (B, *event).

    Raises:
        ValueError: z has another number of elements.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        x = leaf_of(x)
        z = function(x)
        if z.numel() != x.numel():
            raise ValueError(f"function: expected as many elements per sample as x has, {tuple(x.shape)}, got "
                             f"{tuple(z.shape)}")
        flat = z.reshape(len(x), math.prod(x.shape[1:]))
        rows = [torch.autograd.grad(column.sum(), x, create_graph=create_graph, retain_graph=True,
                                    materialize_grads=True)[0].reshape(flat.shape) if column.requires_grad
                else torch.zeros_like(flat) for column in flat.unbind(1)]
    matrix = torch.stack(rows, 1) if rows else x.new_zeros(len(x), 0, 0)
    return (z, matrix) if create_graph else (detached(z), matrix)


class Lambda(nn.Module):
    """z = function(x), with the log-determinant of its Jacobian: for trying out a layer before its own is derived.

    "exact" takes the Jacobian and its LU factorisation in float64, D backward passes per call. "estimated" needs only
    products with the Jacobian: log|det J| = tr(log(J'J))/2 by stochastic Lanczos quadrature with Gaussian probes; its
    gradient is estimated without bias as v' J^-1 dJ v, J'^-1 v from conjugate gradients on J'J. With ``n_steps`` >= D
    the quadrature is exact for each probe, and the estimate without bias; below, it has the bias of the quadrature.

    Args:
        function: maps x (B, *event) to z (B, *event'), as many elements, sample by sample. A module becomes a
            submodule and runs in float64 with its parameters cast.
        inverse: maps z to x; None solves function(x) = z by Newton's method.
        mode: "exact" or "estimated".
        n_probes, n_steps: of the estimate.

    Raises:
        ValueError: an unknown mode, or on a call a z of another size.
        RuntimeError: on an inverse call, Newton's method does not converge.

    References:
        Ubaru, Chen and Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", 2017.
    """

    MAX_NEWTON = 50

    def __init__(self, function, inverse=None, *, mode="exact", n_probes=8, n_steps=20):
        super().__init__()
        for name, value in (("function", function), ("inverse", inverse)):
            if not callable(value) and not (name == "inverse" and value is None):
                raise TypeError(f"{name}: expected a callable, got {type(value).__name__}")
        checks.choice("mode", mode, ("exact", "estimated"))
        for name, value in (("n_probes", n_probes), ("n_steps", n_steps)):
            if value < 1:
                raise ValueError(f"{name}: expected a positive int, got {value!r}")
        self.function, self.inverse_function, self.mode = function, inverse, mode
        self.n_probes, self.n_steps = n_probes, n_steps

    @outside_inference_mode
    def forward(self, x, context=None):
        """(z, logdet) of x (B, *event), logdet (B,) in nats, in float32 at least; ``context`` is ignored."""
        checks.tensor("x", x)
        if self.mode == "exact":
            z, matrix = jacobian(self._in_double, x.double())
            return z.to(x.dtype), torch.linalg.slogdet(matrix)[1].to(torch.promote_types(x.dtype, torch.float32))
        return self._estimate(x)

    @outside_inference_mode
    def inverse(self, z, context=None):
        """(x, logdet) of z."""
        checks.tensor("z", z)
        x = self._solve(z) if self.inverse_function is None else self.inverse_function(z)
        return x, -self(x)[1]

    def _in_double(self, x):
        if not isinstance(self.function, nn.Module):
            return self.function(x)
        state = {**dict(self.function.named_parameters()), **dict(self.function.named_buffers())}
        cast = {name: t.double() if t.is_floating_point() else t for name, t in state.items()}
        return torch.func.functional_call(self.function, cast, (x,))

    def _solve(self, z):
        target = z.detach().double()
        x = target.clone()
        with torch.no_grad():
            for _ in range(self.MAX_NEWTON):
                value, matrix = jacobian(self._in_double, x)
                residual = (value - target).flatten(1)
                if (residual.abs() <= 1e-12 * (1.0 + target.flatten(1).abs().amax(1, keepdim=True))).all():
                    break
                step, info = torch.linalg.solve_ex(matrix, residual[..., None])
                if info.any() or not torch.isfinite(step).all():
                    raise RuntimeError("inverse: Newton's method did not converge (it met a singular Jacobian); give "
                                       "Lambda an inverse")
                step = step[..., 0].view_as(x)
                size = torch.ones(len(x), *(1,) * (x.dim() - 1), dtype=x.dtype, device=x.device)
                for _ in range(30):  # halve each sample's step until its residual shrinks
                    worse = (self._in_double(x - size * step) - target).flatten(1).norm(dim=1) >= residual.norm(dim=1)
                    if not worse.any():
                        break
                    size = torch.where(worse.view_as(size), 0.5 * size, size)
                x = x - size * step
            else:
                raise RuntimeError(f"inverse: Newton's method did not converge in {self.MAX_NEWTON} steps (largest "
                                   f"residual {residual.abs().max().item():.1e}); give Lambda an inverse")
        if not torch.is_grad_enabled():
            return x.to(z.dtype)
        # Further steps don't move x, but each makes one more order of its derivatives, in z and in the function's
        # parameters, those of the implicit function.
        for _ in range(2):
            value, matrix = jacobian(self._in_double, x)
            residual = (value - z.double()).flatten(1)
            x = x - torch.linalg.solve(matrix, residual[..., None])[..., 0].view_as(x)
        return x.to(z.dtype)

    def _estimate(self, x):
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            leaf = leaf_of(x)
            z = self.function(leaf)
            if z.numel() != x.numel():
                raise ValueError(f"function: expected as many elements as x {tuple(x.shape)} has, got {tuple(z.shape)}")
            dummy = torch.zeros_like(z, requires_grad=True)
            (pulled,) = torch.autograd.grad(z, leaf, dummy, create_graph=True)

        def transposed(u):
            return torch.autograd.grad(z, leaf, u.view_as(z), retain_graph=True)[0].flatten(1)

        def direct(v, create_graph=False):
            (out,) = torch.autograd.grad(pulled, dummy, v.view_as(leaf), retain_graph=True, create_graph=create_graph)
            return out.flatten(1)

        total, surrogate = 0.0, 0.0
        for _ in range(self.n_probes):
            v = torch.randn_like(x).flatten(1)
            total = total + 0.5 * _lanczos_log(lambda u: transposed(direct(u)), v, self.n_steps)
            if differentiable:
                w = _conjugate_gradients(lambda u: transposed(direct(u)), v, 4 * self.n_steps)
                surrogate = surrogate + (direct(w).detach() * direct(v, create_graph=True)).sum(1)
        total, surrogate = total / self.n_probes, surrogate / self.n_probes
        if not differentiable:
            return z.detach(), total
        # v' J^-1 dJ v = (J w)' dJ v with J'J w = v, for J w = J'^-1 v.
        return z, total.detach() + surrogate - surrogate.detach()


def _lanczos_log(product, v, n_steps):
    """v' log(A) v of symmetric positive A, given by its product, for each row of v (B, D)."""
    norm = v.norm(dim=1, keepdim=True)
    basis, alphas, betas = [v / norm], [], []
    for step in range(min(n_steps, v.shape[1])):
        u = product(basis[-1])
        alphas.append((u * basis[-1]).sum(1))
        for _ in range(2):  # full orthogonalisation, twice: the recurrence alone loses it
            for q in basis:
                u = u - (u * q).sum(1, keepdim=True) * q
        beta = u.norm(dim=1, keepdim=True)
        if step + 1 == min(n_steps, v.shape[1]):
            break
        betas.append(beta[:, 0])
        basis.append(torch.where(beta > 1e-12, u / beta, torch.zeros_like(u)))
    matrix = torch.diag_embed(torch.stack(alphas, 1))
    if betas:
        off = torch.stack(betas, 1)
        matrix = matrix + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    values, vectors = torch.linalg.eigh(matrix)
    weights = vectors[:, 0].square()
    logs = torch.log(values.clamp_min(torch.finfo(v.dtype).tiny))
    return norm[:, 0].square() * torch.where(weights > 0, weights * logs, 0.0).sum(1)


def _conjugate_gradients(product, b, n_steps):
    """A^-1 b of symmetric positive A, for each row of b."""
    x, r = torch.zeros_like(b), b
    p, square = r, (r * r).sum(1, keepdim=True)
    for _ in range(n_steps):
        q = product(p)
        step = torch.where(square > 0, square / (p * q).sum(1, keepdim=True).clamp_min(1e-300), 0.0)
        x, r = x + step * p, r - step * q
        new = (r * r).sum(1, keepdim=True)
        if bool((new <= 1e-28 * (b * b).sum(1, keepdim=True)).all()):
            break
        p, square = r + torch.where(square > 0, new / square, 0.0) * p, new
    return x


@dataclass(frozen=True)
class InvertibilityReport:
    """What :func:`check_invertible` found: largest absolute errors over the batch.

    Attributes:
        inverse_error: of inverse(forward(x)) against x.
        logdet_error: of the forward log-determinant against the float64 Jacobian's, in nats.
        opposite_error: of the sum of the two log-determinants, which should be 0.
        sign_flipped: whether the log-determinant is right but for its sign: that of the other direction.
        tolerance: what the errors are held to.
    """

    inverse_error: float
    logdet_error: float
    opposite_error: float
    sign_flipped: bool
    tolerance: float

    @property
    def ok(self):
        return max(self.inverse_error, self.logdet_error, self.opposite_error) <= self.tolerance

    def __str__(self):
        lines = [f"inverse error {self.inverse_error:.2e}", f"log-det error {self.logdet_error:.2e} nats",
                 f"forward + inverse log-det {self.opposite_error:.2e} nats"]
        if self.sign_flipped:
            lines.append("the log-det has the other direction's sign")
        return f"{'ok' if self.ok else 'NOT ok'} (tolerance {self.tolerance:g}): " + "; ".join(lines)


@outside_inference_mode
def check_invertible(transform, x, context=None, *, tolerance=1e-6):
    """Hold a transform's inverse and log-determinants against its Jacobian, taken by autograd on x as it is.

    Use float64 x and parameters for a verdict on the mathematics, lower precision to see rounding.

    Args:
        transform: a Transform.
        x: (B, *event).
        context: handed to the transform.
        tolerance: for ``ok``; errors that are not finite are errors.

    Returns:
        an :class:`InvertibilityReport`.
    """
    checks.tensor("x", x)
    with torch.no_grad():
        _, matrix = jacobian(lambda t: transform(t, context)[0], x)
        truth = torch.linalg.slogdet(matrix.double())[1]
        z, logdet = transform(x, context)
        back, opposite = transform.inverse(z, context)

    def largest(error):
        error = error.abs().max().item() if error.numel() else 0.0
        return math.inf if math.isnan(error) else error

    logdet_error = largest(logdet.double() - truth)
    flipped = logdet_error > tolerance and largest(logdet.double() + truth) <= tolerance
    return InvertibilityReport(largest(back - x), logdet_error, largest(logdet + opposite), flipped, tolerance)
