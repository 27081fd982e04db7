"""Gaussian posteriors: diagonal, low-rank, full covariance, and the deterministic limit."""

import math

import torch
from torch import nn

from fastflow import checks, functional, reference
from fastflow.nn import GaussianSample
from fastflow.vae.likelihoods.base import promoted
from fastflow.vae.posteriors.closed import dense_moments, is_standard, kl_by_element, kl_to_dense, prior_moments
from fastflow.vae.priors.gaussian import DiagonalGaussian

__all__ = ["DeterministicPosterior", "FullGaussianPosterior", "GaussianPosterior", "LowRankGaussianPosterior"]

LOG_TWO_PI = math.log(2.0 * math.pi)


def standard_noise(like, n_samples, eps, seed, generator):
    """(eps, log density (K, B)): standard normals (K, *like.shape) from the fused stream, or those given."""
    zeros = torch.zeros_like(like)
    noise, _, log_q = functional.gaussian_sample_kl((zeros, zeros), eps=eps, seed=seed, generator=generator,
                                                    n_samples=n_samples, return_logq=True)
    return noise, log_q


def check_params(params, features):
    """``params`` is (B, features)."""
    checks.tensor("params", params)
    if params.dim() != 2 or params.shape[1] != features:
        raise ValueError(f"params: expected shape (B, {features}), got {tuple(params.shape)}")


def check_z(z, mean):
    """``z`` is (K, *mean.shape), a batch of the posterior's with the mean (B, D, *S)."""
    checks.tensor("z", z)
    if z.dim() != mean.dim() + 1 or z.shape[1:] != mean.shape:
        raise ValueError(f"z: expected shape (K, {', '.join(map(str, mean.shape))}), got {tuple(z.shape)}")
    checks.same_device("z", z, "params", mean)
    checks.no_mixed_double([("z", z), ("params", mean)])


class GaussianPosterior(nn.Module):
    """A diagonal Gaussian; params are (B, 2D, *S), mean and raw scale packed along dim 1.

    Args:
        scale: what the raw scale is: "logvar", "logstd", "std", "softplus" or "soft_tanh".
        layout, order: how params are packed, as in functional.gaussian_sample_kl.
    """

    def __init__(self, scale="logvar", *, layout="chunk", order="mean_scale"):
        super().__init__()
        GaussianSample(scale, layout=layout, order=order)  # checks the options
        self.scale = scale
        self.layout = layout
        self.order = order

    def forward(self, params, prior=None, n_samples=1, *, eps=None, seed=None, generator=None, want_log_qz=True):
        """As the other posteriors; with ``want_log_qz=False`` None stands for log q(z | x), and n_samples None gives
        one z (B, D, *S)."""
        params = promoted(params, "params")
        fused = isinstance(prior, DiagonalGaussian) and prior.scale == self.scale
        z, kl, *log_qz = functional.gaussian_sample_kl(
            params, scale=self.scale, layout=self.layout, order=self.order, eps=eps, seed=seed, generator=generator,
            prior=(prior.mean, prior.raw) if fused else None, n_samples=n_samples, return_logq=want_log_qz)
        if not (fused or is_standard(prior)):
            kl = self._kl(params, prior)
        return z, log_qz[0] if want_log_qz else None, kl

    def _kl(self, params, prior):
        """(B,) to a prior that the kernel does not know, None where there is no closed form."""
        if isinstance(prior, DiagonalGaussian):
            checks.no_mixed_double([("params", params), ("prior", prior.mean)])
        mean, log_sigma = GaussianPosterior.moments(self, params)
        if (moments := prior_moments(prior, mean)) is not None:
            return kl_by_element(mean, log_sigma, *moments).flatten(1).sum(1)
        if (moments := dense_moments(prior, mean)) is not None:
            return kl_to_dense(mean, torch.diag_embed(torch.exp(log_sigma)), log_sigma.flatten(1).sum(1), *moments)
        return None

    def n_params(self, features):
        """Channels of params for D = features."""
        return 2 * features

    def packed(self, parts):
        """params of the pair (mean, raw scale), each (B, D, *S), that an encoder gave."""
        if len(parts) != 2:
            raise ValueError("encoder output: expected params (B, 2D, *S) or a pair (mean, raw scale), got "
                             f"{len(parts)} parts")
        named = list(zip(("mean of the encoder output", "raw scale of the encoder output"), parts, strict=True))
        for name, part in named:
            checks.tensor(name, part)
        if parts[0].dim() < 2:
            raise ValueError(f"{named[0][0]}: expected shape (B, D, *S), got {tuple(parts[0].shape)}")
        checks.shape(named[1][0], parts[1], parts[0].shape)
        checks.no_mixed_double(named)
        first, second = parts if self.order == "mean_scale" else reversed(parts)
        if self.layout == "chunk":
            return torch.cat([first, second], 1)
        return torch.stack([first, second], 2).flatten(1, 2)

    def moments(self, params):
        """(mean, log sigma), each (B, D, *S)."""
        mean, raw = self._halves(promoted(params, "params"))
        return mean, reference.sigma_and_log(raw, self.scale)[1]

    def log_prob(self, params, z):
        """log q(z | x) (K, B) in nats of any z (K, B, D, *S)."""
        mean, log_sigma = self.moments(params)
        check_z(z, mean)
        return log_normal(z, mean, log_sigma).flatten(2).sum(2)

    def mean(self, params):
        """The mean (B, D, *S), also the mode."""
        checks.tensor("params", params)
        return self._halves(params)[0]

    def _halves(self, params):
        if params.dim() < 2 or params.shape[1] % 2:
            raise ValueError(f"params: expected shape (B, 2D, *S), got {tuple(params.shape)}")
        return reference.split_params(params, self.layout, self.order == "mean_scale")


def log_normal(z, mean, log_sigma):
    """log N(z; mean, sigma^2), element by element."""
    return -0.5 * ((z - mean) * torch.exp(-log_sigma)).square() - log_sigma - 0.5 * LOG_TWO_PI


class LowRankGaussianPosterior(nn.Module):
    """N(mean, W W' + diag(sigma^2)) over (D,), z = mean + sigma eps_1 + W eps_2.

    params are (B, D (2 + rank)): mean, log-variances, and W (D, rank) row by row. Densities and the KL go through a QR
    factorisation of [A; -I], A = diag(1 / sigma) W: log det(I + A'A) is that of its R, and the squared distance to the
    mean what is left of the standard normals beyond the span of its Q, which loses no digits for a small sigma.

    Args:
        rank: of W, at least 1.
    """

    def __init__(self, rank=1):
        super().__init__()
        self.rank = self.more_noise = checks.count("rank", rank, 1)

    def forward(self, params, prior=None, n_samples=1, *, eps=None, seed=None, generator=None):
        """As the other posteriors; eps is (K, B, D + rank)."""
        mean, log_variance, factor = self._split(params)
        like = mean.new_empty(mean.shape[0], mean.shape[1] + self.rank)  # len() would fix it in a graph
        noise, _ = standard_noise(like, n_samples, eps, seed, generator)
        own, shared = noise.split([mean.shape[1], self.rank], 2)
        z = mean + torch.exp(0.5 * log_variance) * own + torch.einsum("bdr,kbr->kbd", factor, shared)
        basis, log_det = self._factorised(log_variance, factor)[2:]
        moments = prior_moments(prior, mean)
        kl = None
        if moments is not None:
            mean_p, log_sigma_p = moments
            scaled = (factor * torch.exp(-log_sigma_p)[:, :, None]).square().sum((1, 2))
            difference = log_variance - 2.0 * log_sigma_p
            squares = ((mean - mean_p) * torch.exp(-log_sigma_p)).square()
            kl = 0.5 * ((squares + torch.expm1(difference) - difference).sum(1) + scaled - log_det)
        elif (moments := dense_moments(prior, mean)) is not None:
            root = torch.cat([torch.diag_embed(torch.exp(0.5 * log_variance)), factor], 2)
            kl = kl_to_dense(mean, root, 0.5 * (log_variance.sum(1) + log_det), *moments)
        return z, self._log_density(_beyond(basis, noise), log_variance, log_det), kl

    def n_params(self, features):
        return features * (2 + self.rank)

    def log_prob(self, params, z):
        """log q(z | x) (K, B) in nats of z (K, B, D)."""
        mean, log_variance, factor = self._split(params)
        check_z(z, mean)
        inverse, shift, basis, log_det = self._factorised(log_variance, factor)
        residual = nn.functional.pad((z - mean) * inverse, (0, self.rank))
        return self._log_density(_beyond(basis, residual) * torch.exp(shift), log_variance, log_det)

    def mean(self, params):
        return self._split(params)[0]

    def _split(self, params):
        checks.tensor("params", params)
        d = params.shape[-1] // (2 + self.rank)  # of a (B, n), as the next line checks
        check_params(params, self.n_params(d))
        mean, log_variance, factor = promoted(params).split([d, d, d * self.rank], 1)
        return mean, log_variance, factor.unflatten(1, (d, self.rank))

    def _factorised(self, log_variance, factor):
        """(exp(-shift) / sigma (B, D), shift (B, 1), Q (B, D + rank, rank), log det(I + A'A) (B,)). The shift, and one
        of each column, keep a small sigma from overflowing; no result depends on them."""
        log_inverse = -0.5 * log_variance
        shift = log_inverse.detach().amax(1, keepdim=True).clamp(0.0, 80.0)
        inverse = torch.exp(log_inverse - shift)
        scaled = factor * inverse[:, :, None]
        own = torch.maximum(torch.log(scaled.detach().abs().amax(1)), -shift)
        below = torch.diag_embed(-torch.exp(-own - shift))
        basis, upper = torch.linalg.qr(torch.cat([scaled * torch.exp(-own)[:, None], below], 1))
        log_diagonal = torch.log(upper.diagonal(dim1=1, dim2=2).abs())
        return inverse, shift, basis, 2.0 * (log_diagonal + own + shift).sum(1)

    def _log_density(self, beyond, log_variance, log_det):
        """log q(z | x) (K, B) of z whose whitened distance to the mean is that of ``beyond`` (K, B, D + rank) to 0."""
        return -0.5 * (beyond.square().sum(2) + log_variance.sum(1) + log_det + log_variance.shape[1] * LOG_TWO_PI)


def _beyond(basis, vectors):
    """What of vectors (K, B, N) is orthogonal to the orthonormal columns of ``basis`` (B, N, rank)."""
    return vectors - torch.einsum("bnr,kbr->kbn", basis, torch.einsum("bnr,kbn->kbr", basis, vectors))


class FullGaussianPosterior(nn.Module):
    """N(mean, L L') over (D,), z = mean + L eps.

    params are (B, D + D (D + 1)/2): mean, the logarithms of L's diagonal, and its strict lower triangle row by row.
    """

    def forward(self, params, prior=None, n_samples=1, *, eps=None, seed=None, generator=None):
        mean, log_diagonal, lower = self._split(params)
        noise, log_noise = standard_noise(mean, n_samples, eps, seed, generator)
        z = mean + torch.einsum("bde,kbe->kbd", lower, noise)
        moments = prior_moments(prior, mean)
        kl = None
        if moments is not None:
            mean_p, log_sigma_p = moments
            scaled = lower * torch.exp(-log_sigma_p)[:, :, None]
            strict = torch.tril(scaled, -1).square().sum((1, 2))
            difference = 2.0 * (log_diagonal - log_sigma_p)
            squares = ((mean - mean_p) * torch.exp(-log_sigma_p)).square()
            kl = 0.5 * ((squares + torch.expm1(difference) - difference).sum(1) + strict)
        elif (moments := dense_moments(prior, mean)) is not None:
            kl = kl_to_dense(mean, lower, log_diagonal.sum(1), *moments)
        return z, log_noise - log_diagonal.sum(1), kl

    def n_params(self, features):
        return features + features * (features + 1) // 2

    def log_prob(self, params, z):
        """log q(z | x) (K, B) in nats of z (K, B, D)."""
        mean, log_diagonal, lower = self._split(params)
        check_z(z, mean)
        standard = torch.linalg.solve_triangular(lower, (z - mean)[..., None], upper=False)
        return -0.5 * (standard.square().sum((2, 3)) + mean.shape[1] * LOG_TWO_PI) - log_diagonal.sum(1)

    def mean(self, params):
        return self._split(params)[0]

    def _split(self, params):
        checks.tensor("params", params)
        d = (math.isqrt(9 + 8 * params.shape[-1]) - 3) // 2  # D + D (D + 1)/2 = n
        check_params(params, self.n_params(d))
        mean, log_diagonal, below = promoted(params).split([d, d, d * (d - 1) // 2], 1)
        rows, columns = torch.tril_indices(d, d, -1, device=params.device)
        batch = torch.arange(mean.shape[0], device=params.device)[:, None]
        lower = torch.diag_embed(torch.exp(log_diagonal)).index_put((batch, rows, columns), below)
        return mean, log_diagonal, lower


class DeterministicPosterior(nn.Module):
    """The limit of N(mean, sigma^2 I) for small sigma: z is the mean itself; params are the mean, (B, D, *S).

    Every sample is the mean, bit for bit, and no random number is used. The density and the KL are those of the
    Gaussian with the given sigma, at its mean: the KL to N(0, I) has the gradient of |mean|^2 / 2 and grows, as sigma
    falls, as -D log sigma, the price of ever more digits. log_w is no importance weight here, and its mean over samples
    no bound.

    Args:
        sigma: standard deviation whose density is reported, positive.

    References:
        Ghosh et al., "From variational to deterministic autoencoders", 2020, arXiv:1903.12436.
    """

    def __init__(self, sigma=1e-3):
        super().__init__()
        if not 0.0 < sigma < math.inf:
            raise ValueError(f"sigma: expected a finite positive number, got {sigma!r}")
        self.sigma = sigma

    def forward(self, params, prior=None, n_samples=1, *, eps=None, seed=None, generator=None):
        mean = promoted(params, "params")
        z = mean.expand(n_samples, *mean.shape)
        size = math.prod(mean.shape[1:])
        log_qz = mean.new_full(z.shape[:2], -size * (math.log(self.sigma) + 0.5 * LOG_TWO_PI))
        if not is_standard(prior):
            return z, log_qz, None
        spread = 0.5 * size * (math.expm1(2.0 * math.log(self.sigma)) - 2.0 * math.log(self.sigma))
        return z, log_qz, 0.5 * mean.flatten(1).square().sum(1) + spread

    def n_params(self, features):
        return features

    def log_prob(self, params, z):
        """log N(z; mean, sigma^2 I) (K, B) in nats."""
        mean = promoted(params, "params")
        check_z(z, mean)
        return log_normal(z, mean, torch.full_like(mean, math.log(self.sigma))).flatten(2).sum(2)

    def mean(self, params):
        checks.tensor("params", params)
        return params
