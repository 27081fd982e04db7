"""Linear Gaussian models, in which everything about a VAE is known: random instances in float64."""

import math

import torch
from torch import nn
from torch.distributions import MultivariateNormal

SIZES = ((3, 2), (5, 3), (9, 4))  # of x and z


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def perturb(module, scale=0.3, seed=0):
    """The module with every parameter moved, so that nothing in it is an identity any more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module


def linear(weight, bias):
    layer = nn.Linear(weight.shape[1], weight.shape[0]).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def sigma_points(d, batch):
    """Noise (2 D, B, D) whose mean of any quadratic function is its expectation."""
    points = math.sqrt(d) * torch.cat([torch.eye(d, dtype=torch.float64), -torch.eye(d, dtype=torch.float64)])
    return points[:, None].expand(2 * d, batch, d)


class PPCA:
    """z ~ N(0, I), x | z ~ N(W z + b, s2 I): probabilistic PCA, with a batch x of its own."""

    def __init__(self, size=3, latent=2, seed=0, batch=4):
        self.w, self.b = randn(size, latent, seed=seed), randn(size, seed=seed + 1)
        self.s2 = 0.2 + 0.1 * seed
        self.x = self.b + randn(batch, size, seed=seed + 2) * 1.3
        eye = torch.eye(latent, dtype=torch.float64)
        self.precision = eye + self.w.T @ self.w / self.s2
        self.covariance = torch.linalg.inv(self.precision)
        self.gain = torch.linalg.solve(self.precision, self.w.T / self.s2)
        self.latent = latent
        self.name = f"{size}-{latent}"

    def __str__(self):
        return self.name

    def log_p(self):
        """log p(x), (B,)."""
        covariance = self.w @ self.w.T + self.s2 * torch.eye(len(self.b), dtype=torch.float64)
        return MultivariateNormal(self.b, covariance).log_prob(self.x)

    def posterior(self):
        return MultivariateNormal((self.x - self.b) @ self.gain.T, self.covariance)

    def decoder(self):
        return linear(self.w, self.b)

    def encoder(self, constant):
        """x to the posterior's mean, followed by constants."""
        weight = torch.cat([self.gain, torch.zeros(len(constant), self.gain.shape[1], dtype=torch.float64)])
        return linear(weight, torch.cat([-self.gain @ self.b, constant]))

    def full_constants(self):
        """What FullGaussianPosterior needs behind the mean for the true posterior."""
        lower = torch.linalg.cholesky(self.covariance)
        rows, columns = torch.tril_indices(self.latent, self.latent, -1)
        return torch.cat([lower.diagonal().log(), lower[rows, columns]])
