"""Two-dimensional densities known exactly, to hold a model's density against: KL in nats, not pictures.

Each has ``event_shape`` (2,), ``log_prob(x)`` (B,) in nats, normalised, in x's dtype, -inf outside the support, and
``sample(n, generator=None, dtype=torch.float32)`` (n, 2), independent draws. Mean and spread are about 0 and 1, the
range that flows are built for. ``TARGETS`` names one of each.
"""

import math

import torch

from fastflow import checks

__all__ = ["TARGETS", "Checkerboard", "GaussianMixture", "Moons", "Ring", "kl_divergence"]

LOG_TWO_PI = math.log(2.0 * math.pi)


class _Target:
    event_shape = torch.Size([2])

    def __repr__(self):
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in vars(self).items() if k[0] != '_')})"


def _checked(x):
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() != 2 or x.shape[1] != 2:
        raise ValueError(f"x: expected shape (B, 2), got {tuple(x.shape)}")
    return x.double()


def _positive(**values):
    for name, value in values.items():
        checks.number(name, value)
        if not 0.0 < value < math.inf:
            raise ValueError(f"{name}: expected a finite positive number, got {value!r}")


def _rand(n, columns, generator):
    return torch.rand(n, columns, generator=generator, dtype=torch.float64)


def _randn(n, generator):
    return torch.randn(n, 2, generator=generator, dtype=torch.float64)


class GaussianMixture(_Target):
    """``n_components`` equally likely N(m_k, sigma^2 I), the means evenly spread on a circle around the origin."""

    def __init__(self, n_components=8, radius=2.0, sigma=0.2):
        n_components = checks.count("n_components", n_components, 1)
        _positive(radius=radius, sigma=sigma)
        self.n_components, self.radius, self.sigma = n_components, radius, sigma
        angles = torch.arange(n_components, dtype=torch.float64) * (2.0 * math.pi / n_components)
        self._means = radius * torch.stack([angles.cos(), angles.sin()], 1)

    def log_prob(self, x):
        square = (_checked(x)[:, None] - self._means).square().sum(2) / self.sigma**2
        constant = LOG_TWO_PI + 2.0 * math.log(self.sigma) + math.log(self.n_components)
        return (torch.logsumexp(-0.5 * square, 1) - constant).to(x.dtype)

    def sample(self, n, *, generator=None, dtype=torch.float32):
        rows = torch.randint(self.n_components, (n,), generator=generator)
        return (self._means[rows] + self.sigma * _randn(n, generator)).to(dtype)


class Ring(_Target):
    """p(x) = exp(-(|x| - radius)^2 / (2 sigma^2)) / Z around the origin.

    In polar coordinates Z = 2 pi (sigma^2 e^(-a^2/2) + radius sigma sqrt(2 pi) Phi(a)) with a = radius/sigma. Samples
    invert the cumulative distribution of |x|, which has the same closed form, by bisection.
    """

    def __init__(self, radius=2.0, sigma=0.2):
        _positive(radius=radius, sigma=sigma)
        self.radius, self.sigma = radius, sigma
        self._log_z = math.log(2.0 * math.pi * self._mass(torch.tensor(math.inf, dtype=torch.float64)).item())

    def _mass(self, r):
        """The integral of s exp(-(s - radius)^2 / (2 sigma^2)) over s from 0 to r."""
        start, end = -self.radius / self.sigma, (r - self.radius) / self.sigma
        bell = math.exp(-0.5 * start**2) - torch.exp(-0.5 * end.square())
        normal = torch.special.ndtr(end) - 0.5 * math.erfc(-start / math.sqrt(2.0))
        return self.sigma**2 * bell + self.radius * self.sigma * math.sqrt(2.0 * math.pi) * normal

    def log_prob(self, x):
        distance = (_checked(x).norm(dim=1) - self.radius) / self.sigma
        return (-0.5 * distance.square() - self._log_z).to(x.dtype)

    def sample(self, n, *, generator=None, dtype=torch.float32):
        u = _rand(n, 2, generator)
        goal = u[:, 0] * math.exp(self._log_z) / (2.0 * math.pi)
        low, high = torch.zeros_like(goal), torch.full_like(goal, self.radius + 12.0 * self.sigma)
        for _ in range(60):
            middle = 0.5 * (low + high)
            below = self._mass(middle) < goal
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        angle = 2.0 * math.pi * u[:, 1]
        return (low[:, None] * torch.stack([angle.cos(), angle.sin()], 1)).to(dtype)


class Checkerboard(_Target):
    """Uniform on every second square of a board of ``squares`` x ``squares`` on [-half_width, half_width]^2; the one
    at the lower left is among them."""

    def __init__(self, squares=4, half_width=2.0):
        if isinstance(squares, bool) or not isinstance(squares, int) or squares < 2 or squares % 2:
            raise ValueError(f"squares: expected a positive even int, got {squares!r}")
        _positive(half_width=half_width)
        self.squares, self.half_width = squares, half_width

    @property
    def side(self):
        return 2.0 * self.half_width / self.squares

    def log_prob(self, x):
        cell = torch.floor((_checked(x) + self.half_width) / self.side)
        inside = ((cell >= 0) & (cell < self.squares)).all(1) & (cell.sum(1) % 2 == 0)
        value = -math.log(0.5 * (2.0 * self.half_width) ** 2)
        out = torch.where(inside, value, -math.inf)
        return torch.where(x.isnan().any(1), math.nan, out).to(x.dtype)

    def sample(self, n, *, generator=None, dtype=torch.float32):
        row = torch.randint(self.squares, (n,), generator=generator)
        column = 2 * torch.randint(self.squares // 2, (n,), generator=generator) + row % 2
        return (torch.stack([column, row], 1) * self.side - self.half_width
                + self.side * _rand(n, 2, generator)).to(dtype)


class Moons(_Target):
    """Two interleaved half circles of radius 1 blurred by N(0, sigma^2 I), centred and multiplied by ``scale``.

    With c(t) = (cos t - 1/2, sin t - 1/4) the density at scale 1 is the mean over the two moons, c and -c, of the
    integral of N(x; c(t), sigma^2 I) dt / pi over [0, pi]. Gauss-Legendre's rule with ``n_nodes`` nodes is exact to
    rounding for sigma >= 0.05.
    """

    def __init__(self, sigma=0.1, scale=1.5, n_nodes=192):
        _positive(sigma=sigma, scale=scale)
        n_nodes = checks.count("n_nodes", n_nodes, 1)
        self.sigma, self.scale, self.n_nodes = sigma, scale, n_nodes
        nodes, weights = _gauss_legendre(n_nodes)
        upper = _arc(0.5 * math.pi * (nodes + 1.0))
        self._points = torch.cat([upper, -upper])
        self._log_weights = torch.log(0.25 * weights).repeat(2)  # half for the moon, half for the rule's interval

    def log_prob(self, x):
        out = []
        for part in (_checked(x) / self.scale).split(4096):  # (part, nodes) stays in the cache's reach
            square = torch.cdist(part, self._points, compute_mode="donot_use_mm_for_euclid_dist").square()
            out.append(torch.logsumexp(self._log_weights - 0.5 * square / self.sigma**2, 1))
        total = torch.cat(out) if out else x.new_zeros(0)
        return (total - LOG_TWO_PI - 2.0 * math.log(self.sigma * self.scale)).to(x.dtype)

    def sample(self, n, *, generator=None, dtype=torch.float32):
        u = _rand(n, 2, generator)
        sign = torch.where(u[:, 1] < 0.5, 1.0, -1.0)[:, None]
        points = sign * _arc(math.pi * u[:, 0]) + self.sigma * _randn(n, generator)
        return (self.scale * points).to(dtype)


def _arc(angle):
    """The upper moon; the lower one is its reflection at the origin."""
    return torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], 1)


def _gauss_legendre(n):
    """Nodes and weights on [-1, 1] as eigenvalues of the Jacobi matrix (Golub and Welsch, 1969)."""
    k = torch.arange(1, n, dtype=torch.float64)
    beta = k / torch.sqrt(4.0 * k.square() - 1.0)
    nodes, vectors = torch.linalg.eigh(torch.diag(beta, 1) + torch.diag(beta, -1))
    return nodes, 2.0 * vectors[0].square()


TARGETS = {"gaussians": GaussianMixture(), "ring": Ring(), "checkerboard": Checkerboard(), "moons": Moons()}


@torch.no_grad()
def kl_divergence(target, log_prob, n=50_000, *, generator=None, dtype=torch.float32):
    """KL(target || model) = E[log p(x) - log q(x)] over n draws of the target, and its standard error, both in nats.

    Args:
        target: one of the densities here, or anything with their ``log_prob`` and ``sample``.
        log_prob: the model's, from (B, 2) to (B,).
        n: number of draws.
        generator: torch.Generator of the draws.
        dtype: of the draws.

    Returns:
        (estimate, standard error), floats.
    """
    if n < 2:
        raise ValueError(f"n: expected at least 2, got {n}")
    x = target.sample(n, generator=generator, dtype=dtype)
    ratios = torch.cat([target.log_prob(part).double() - log_prob(part).double() for part in x.split(8192)])
    return ratios.mean().item(), (ratios.std() / math.sqrt(n)).item()
