"""A mixture of Gaussians as posterior, with gradients through its samples."""

import math

import torch
from torch import nn

from fastflow import backends, checks
from fastflow.vae.likelihoods.base import promoted
from fastflow.vae.posteriors.gaussian import check_params, check_z, log_normal, standard_noise

__all__ = ["MixturePosterior"]


class MixturePosterior(nn.Module):
    """sum_c w_c N(mean_c, diag(sigma_c^2)) over (D,), reparameterised implicitly.

    params are (B, C (1 + 2 D)): C logits, the means (C, D) and the log-variances (C, D). Samples are drawn from a
    component; their gradient is that of the map which holds the conditional distribution functions
    F_d(z_d | z_<d) fixed, dz = -(dF/dz)^-1 dF, so that it reaches the weights as well and is unbiased; so are second
    derivatives. The KL is left to Monte Carlo.

    Args:
        n_components: C, at least 1.

    References:
        Figurnov et al., "Implicit reparameterization gradients", 2018, arXiv:1805.08498.
        Graves, "Stochastic backpropagation through mixture density distributions", 2016, arXiv:1607.05690.
    """

    more_noise = 1  # numbers beside one for each feature

    def __init__(self, n_components=4):
        super().__init__()
        self.n_components = checks.count("n_components", n_components, 1)

    def forward(self, params, prior=None, n_samples=1, *, eps=None, seed=None, generator=None):
        """As the other posteriors; eps is (K, B, D + 1), whose last column chooses the component by its quantile."""
        log_weights, means, log_sigmas = self._split(params)
        d = means.shape[2]
        noise, _ = standard_noise(means.new_empty(means.shape[0], d + 1), n_samples, eps, seed, generator)
        with torch.no_grad():
            cumulative = torch.exp(log_weights).cumsum(1)
            u = torch.special.ndtr(noise[..., d:])
            chosen = (u > cumulative).sum(2).clamp_max(self.n_components - 1)
            index = chosen[:, :, None, None].expand(*chosen.shape, 1, d)
            mean, log_sigma = (t.expand(n_samples, *t.shape).gather(2, index)[:, :, 0] for t in (means, log_sigmas))
            z = mean + torch.exp(log_sigma) * noise[..., :d]
        if _differentiated(params):
            z = _attach(z.detach(), log_weights, means, log_sigmas)
        return z, self._log_prob(log_weights, means, log_sigmas, z), None

    def n_params(self, features):
        return self.n_components * (1 + 2 * features)

    def log_prob(self, params, z):
        """log q(z | x) (K, B) in nats of z (K, B, D)."""
        parts = self._split(params)
        check_z(z, parts[1][:, 0])
        return self._log_prob(*parts, z)

    def mean(self, params):
        """The mean (B, D) of the mixture."""
        log_weights, means, _ = self._split(params)
        return torch.einsum("bc,bcd->bd", torch.exp(log_weights), means)

    def _log_prob(self, log_weights, means, log_sigmas, z):
        return torch.logsumexp(log_weights + log_normal(z[:, :, None], means, log_sigmas).sum(3), 2)

    def _split(self, params):
        c = self.n_components
        checks.tensor("params", params)
        d = (params.shape[-1] // c - 1) // 2
        check_params(params, self.n_params(d))
        logits, means, log_variances = promoted(params).split([c, c * d, c * d], 1)
        return torch.log_softmax(logits, 1), means.unflatten(1, (c, d)), 0.5 * log_variances.unflatten(1, (c, d))


def _differentiated(params):
    return torch.is_grad_enabled() and params.requires_grad or backends.transformed() is not None


def _attach(z, log_weights, means, log_sigmas):
    """z (K, B, D), a constant, with the first and second derivatives of the implicit map."""
    standard, log_density, weights, below = _parts(z, log_weights, means, log_sigmas)
    level = below.sum(2)
    with torch.no_grad():
        slope = -standard * torch.exp(-log_sigmas)
        centre = torch.einsum("kbcd,kbcj->kbdj", weights, slope)
        jacobian = torch.einsum("kbcd,kbcj->kbdj", below, slope) - level[..., None] * centre
        jacobian = torch.tril(jacobian, -1) + torch.diag_embed((weights * torch.exp(log_density)).sum(2))
    jacobian, target = jacobian.detach(), level.detach()  # which under forward-mode AD have tangents all the same
    # Newton's steps with this Jacobian don't move z, but each makes one more order of its derivatives right.
    z = _step(z, level, target, jacobian)
    if backends.transformed() is not None:
        return _step(z, _parts(z, log_weights, means, log_sigmas)[3].sum(2), target, jacobian)
    if torch.compiler.is_compiling():  # whose graphs have no second backward
        return z
    return _SecondStep.apply(z, target, jacobian, log_weights, means, log_sigmas)


def _parts(z, log_weights, means, log_sigmas):
    """(standardised z, log N, w, A), each (K, B, C, D), of which F, dF/dz are made.

    With A_cd = w_c(z_<d) Phi_cd, w_c(z_<d) the weights after the features before d and s = d log N/dz: F_d is
    sum_c A_cd, dF_d/dz_d is sum_c w_c(z_<d) N_cd, and for j < d dF_d/dz_j is sum_c A_cd (s_cj - sum_e w_e(z_<d) s_ej).
    """
    standard = (z[:, :, None] - means) * torch.exp(-log_sigmas)
    log_density = -0.5 * standard.square() - log_sigmas - 0.5 * math.log(2.0 * math.pi)
    earlier = torch.cumsum(log_density, 3) - log_density
    weights = torch.softmax(log_weights[..., None] + earlier, 2)
    return standard, log_density, weights, weights * torch.special.ndtr(standard)


def _step(z, level, target, jacobian):
    return z - torch.linalg.solve_triangular(jacobian, (level - target)[..., None], upper=False)[..., 0]


class _SecondStep(torch.autograd.Function):
    """One more step, whose first derivative is 0: made only in a backward that is differentiated itself."""

    @staticmethod
    def forward(ctx, z, target, jacobian, *params):
        ctx.save_for_backward(z, target, jacobian, *params)
        return z.view_as(z)

    @staticmethod
    def backward(ctx, grad):
        if not torch.is_grad_enabled():
            return grad, None, None, None, None, None
        z, target, jacobian, *params = ctx.saved_tensors
        z, *params = (t.view_as(t) for t in (z, *params))  # from where z's own graph does not reach params
        moved = _step(z, _parts(z, *params)[3].sum(2), target, jacobian)
        by_z, *by_params = torch.autograd.grad(moved, (z, *params), grad, create_graph=True)
        return by_z, None, None, *by_params
