"""A linear Gaussian hierarchy in float64: its evidence, and the model whose posterior is the true one."""

import math

import torch
from gaussian_models import linear, randn
from torch import nn
from torch.distributions import MultivariateNormal

from fastflow import vae

# z2 ~ N(0, 1), z1 | z2 ~ N(A z2 + c, diag(S1)), x | z1 ~ N(W z1 + b, s2 I), the columns of W orthogonal, so that both
# conditionals of the posterior are diagonal.
W = torch.linalg.qr(randn(4, 2, seed=0)).Q * torch.tensor([1.5, 0.7], dtype=torch.float64)
B, A, C = randn(4, seed=1), randn(2, 1, seed=2), randn(2, seed=3)
S1, S2 = torch.tensor([0.6, 1.7], dtype=torch.float64), 0.5
X = B + 1.5 * randn(5, 4, seed=4)

COVARIANCE = W @ (A @ A.T + torch.diag(S1)) @ W.T + S2 * torch.eye(4, dtype=torch.float64)
EVIDENCE = MultivariateNormal(B + W @ C, COVARIANCE).log_prob(X)


class Pick(nn.Module):
    """Some columns."""

    def __init__(self, *columns):
        super().__init__()
        self.columns = columns

    def forward(self, x):
        return x[:, list(self.columns)]


class Twice(nn.Module):
    def forward(self, x):
        return [x, x]


def true_posterior():
    """(weights, bias) of the mean and log-variance of q(z2 | x), and of q(z1 | z2, x)."""
    # z2 given x: x = W (A z2 + c) + b + noise of covariance W S1 W' + s2.
    noise = W @ torch.diag(S1) @ W.T + S2 * torch.eye(4, dtype=torch.float64)
    wa = W @ A
    precision2 = 1.0 + (wa.T @ torch.linalg.solve(noise, wa))
    gain2 = torch.linalg.solve(noise, wa).T / precision2
    top = torch.cat([gain2, torch.zeros(1, 4, dtype=torch.float64)]), torch.cat(
        [-gain2 @ (B + W @ C), -precision2.log()[0]])
    # z1 given z2 and x.
    precision1 = 1.0 / S1 + (W.T @ W).diagonal() / S2
    on_z2, on_x = (A / S1[:, None]) / precision1[:, None], (W.T / S2) / precision1[:, None]
    offset = (C / S1 - W.T @ B / S2) / precision1
    low = torch.cat([torch.cat([on_z2, on_x], 1), torch.zeros(2, 5, dtype=torch.float64)]), torch.cat(
        [offset, -precision1.log()])
    return top, low


def hierarchy(mode, shift=0.0):
    """The model with the true posterior, whose log-variances are moved by ``shift``."""
    (top_weight, top_bias), (low_weight, low_bias) = true_posterior()
    zeros = torch.zeros
    prior_top = linear(zeros(2, 1), zeros(2))
    prior_low = linear(torch.cat([A, zeros(2, 1, dtype=torch.float64)]), torch.cat([C, S1.log()]))
    top_bias, low_bias = top_bias.clone(), low_bias.clone()
    top_bias[1:] += shift
    low_bias[2:] += shift
    if mode == "residual":  # what is added to the prior's
        low_weight, low_bias = low_weight.clone(), low_bias.clone()
        low_weight[:, :1] -= prior_low.weight.detach()
        low_bias -= prior_low.bias.detach()
    pad = zeros(2, 1, dtype=torch.float64)
    posterior_top = linear(torch.cat([pad, top_weight], 1), top_bias)  # sees the state, then x
    posterior_low = linear(low_weight, low_bias)
    if mode == "ladder":
        # The likelihood of each z: x's own evidence alone. For z1 it is N(W^+ (x - b), s2 / (W'W)).
        gram = (W.T @ W).diagonal()
        posterior_low = linear(torch.cat([W.T / gram[:, None], zeros(2, 4, dtype=torch.float64)]),
                               torch.cat([-(W.T @ B) / gram, (S2 / gram).log()]))
        variance = 1.0 / (top_bias[1].exp().reciprocal() - 1.0)
        factor = variance / top_bias[1].exp()
        posterior_top = linear(torch.cat([top_weight[:1] * factor, top_weight[1:]]),
                               torch.stack([top_bias[0] * factor, variance.log()]))
    levels = [vae.Level(prior_top, posterior_top, Pick(1), mode=mode, scale="logvar"),
              vae.Level(prior_low, posterior_low, Pick(1, 2), mode=mode, scale="logvar")]
    return vae.HierarchicalVAE(Twice(), levels, linear(W, B), vae.GaussianLikelihood(math.sqrt(S2)), (1,)).double()
