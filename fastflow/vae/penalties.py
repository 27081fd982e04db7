"""Terms beyond rate and distortion: total correlation, information, moments and aggregate of the posterior,
discriminators.

The functions are of tensors; the modules around them are penalties of an objective (objectives.py).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from fastflow import checks
from fastflow.draws import drawn
from fastflow.estimators.mutual_information import barber_agakov, info_nce, leave_one_out_upper, nwj
from fastflow.vae.generation import for_network
from fastflow.vae.likelihoods.base import promoted
from fastflow.vae.model import draws_from_posterior
from fastflow.vae.posteriors.gaussian import log_normal

__all__ = ["DIP", "MMD", "DensityRatio", "FactorTC", "KLTerms", "MutualInformation", "TotalCorrelation", "decompose_kl",
           "dip_penalty", "discriminator_loss", "minibatch_weights", "mmd", "permute_dims"]


class KLTerms(NamedTuple):
    """E log q(z|x) - log p(z) in three, each (K, B) in nats; they add up to log q(z|x) - log p(z) exactly.

    Attributes:
        mutual_information: log q(z|x) - log q(z), of x and z.
        total_correlation: log q(z) - sum_d log q(z_d), among the latents.
        dimension_kl: sum_d log q(z_d) - log p(z).
    """

    mutual_information: torch.Tensor
    total_correlation: torch.Tensor
    dimension_kl: torch.Tensor


def minibatch_weights(batch, dataset_size, method="stratified", device=None):
    """Weights (B, B), float64, on ``device``: q(z_i) is estimated by sum_j w_ij q(z_i | x_j), x_i the example that z_i
    came from.

    "stratified": 1/N on the diagonal, (N - M)/(N M) for one other example of each row (the next) and 1/M for the rest,
    with M = B - 1. The rows sum to 1 and the estimate of q(z_i) is unbiased over the choice of the other examples.
    "weighted": 1/(N B) everywhere, which is biased low by far.

    Args:
        batch: B; at least 2 for "stratified", unless N is 1.
        dataset_size: N >= B, the examples that the batch was drawn from.

    References:
        Chen et al., "Isolating sources of disentanglement in VAEs", 2018, arXiv:1802.04942, appendix C.
    """
    checks.choice("method", method, ("stratified", "weighted"))
    if dataset_size < batch:
        raise ValueError(f"dataset_size: expected at least the batch's size {batch}, got {dataset_size}")
    n, others = dataset_size, batch - 1
    if method == "weighted":
        return torch.full((batch, batch), 1.0 / (n * batch), dtype=torch.float64, device=device)
    if others < 1:
        if n > 1:
            raise ValueError("batch: expected at least 2 examples for stratified weights, got 1")
        return torch.ones(1, 1, dtype=torch.float64, device=device)
    weights = torch.full((batch, batch), 1.0 / others, dtype=torch.float64, device=device)
    own = torch.eye(batch, dtype=torch.bool, device=device)
    return weights.masked_fill(own.roll(1, 1), (n - others) / (n * others)).masked_fill(own, 1.0 / n)


def decompose_kl(z, mean, log_sigma, log_pz, dataset_size, method="stratified"):
    """KLTerms at samples of diagonal Gaussian posteriors, the aggregate posterior estimated from the batch.

    Args:
        z: (K, B, D).
        mean, log_sigma: (B, D) of the posteriors.
        log_pz: (K, B) log p(z).
        dataset_size, method: see :func:`minibatch_weights`.
    """
    for name, value in (("z", z), ("mean", mean), ("log_sigma", log_sigma), ("log_pz", log_pz)):
        checks.tensor(name, value)
    if mean.dim() != 2:
        raise ValueError(f"mean: expected shape (B, D), got {tuple(mean.shape)}")
    checks.shape("log_sigma", log_sigma, mean.shape)
    checks.events("z", z, mean.shape)
    checks.shape("log_pz", log_pz, z.shape[:2])
    checks.no_mixed_double([("z", z), ("mean", mean), ("log_sigma", log_sigma), ("log_pz", log_pz)])
    table = log_normal(z[:, :, None], mean, log_sigma)  # (K, i, j, D): z_i under the posterior of x_j
    weights = minibatch_weights(z.shape[1], dataset_size, method, table.device).log().to(table)
    log_q = torch.logsumexp(table.sum(3) + weights, 2)
    log_q_dims = torch.logsumexp(table + weights[:, :, None], 2).sum(2)
    log_qz_x = table.sum(3).diagonal(dim1=1, dim2=2)
    return KLTerms(log_qz_x - log_q, log_q - log_q_dims, log_q_dims - log_pz)


def _moments(model, inference, name):
    """(mean, log sigma) (B, D) of diagonal Gaussian posteriors."""
    _check_draws(model, name)
    if not hasattr(model.posterior, "moments"):
        raise TypeError(f"posterior: expected a GaussianPosterior for {name}, got {type(model.posterior).__name__}")
    return (t.flatten(1) for t in model.posterior.moments(inference.params))


def _check_draws(model, name):
    if not draws_from_posterior(model):
        raise TypeError(f"model: {name} needs a VAE whose z is drawn from its posterior, got {type(model).__name__}")


class TotalCorrelation(nn.Module):
    """alpha * mutual information + beta * total correlation + gamma * dimension-wise KL: with the rate's own weight
    at 0 the beta-TC-VAE.

    Args:
        dataset_size: N of the training set, at least 1; when called, at least the batch's size.
        alpha, beta, gamma: weights.
        method: "stratified" or "weighted", see :func:`minibatch_weights`.

    References:
        Chen et al., as for :func:`minibatch_weights`.
    """

    def __init__(self, dataset_size, *, alpha=1.0, beta=6.0, gamma=1.0, method="stratified"):
        super().__init__()
        dataset_size = checks.count("dataset_size", dataset_size, 1)
        checks.choice("method", method, ("stratified", "weighted"))
        self.dataset_size, self.method = dataset_size, method
        self.alpha, self.beta, self.gamma = alpha, beta, gamma

    def forward(self, model, inference, bound, **_):
        terms = decompose_kl(inference.z.flatten(2), *_moments(model, inference, "the total correlation"), bound.log_pz,
                             self.dataset_size, self.method)
        cost = (self.alpha * terms.mutual_information + self.beta * terms.total_correlation
                + self.gamma * terms.dimension_kl)
        return cost.mean(0), {name: term.mean() for name, term in terms._asdict().items()}


class MutualInformation(nn.Module):
    """-weight * a bound on I(x; z) in nats, whose critics are the model's own densities; reports "information", the
    bound. Over the samples of one x the bound is averaged. An upper bound can be pressed down and a lower one raised,
    hence the weights' signs.

    Args:
        bound: lower bounds are "info_nce", critic log q(z | x), at most log B; "nwj", critic 1 + log q(z | x) -
            log p(z), tight where the aggregate posterior is the prior; "barber_agakov", entropy + E log p(x | z). An
            upper one is "leave_one_out", whose r(z) is the mean of q(z | x) over the other examples.
        weight: factor; positive for a lower bound, negative for the upper one.
        entropy: H(x) in nats, which moves the value of "barber_agakov" and no gradient.

    Raises:
        TypeError: when called for a model whose posterior has no log_prob(params, z), or whose z is moved after it was
            drawn; "barber_agakov" takes any.

    References:
        Poole et al., "On variational bounds of mutual information", 2019, arXiv:1905.06922; Zhao et al., "InfoVAE",
        2019, arXiv:1706.02262.
    """

    def __init__(self, bound="info_nce", weight=1.0, *, entropy=0.0):
        super().__init__()
        checks.choice("bound", bound, ("info_nce", "nwj", "barber_agakov", "leave_one_out"))
        if not (weight < 0.0 if bound == "leave_one_out" else weight > 0.0):
            raise ValueError(f"weight: expected a {'negative' if bound == 'leave_one_out' else 'positive'} number for "
                             f"{bound}, got {weight!r}")
        self.bound, self.weight, self.entropy = bound, weight, entropy

    def forward(self, model, inference, bound, **_):
        if self.bound == "barber_agakov":
            information = barber_agakov(bound.log_px_z.mean(0), self.entropy)
        else:
            _check_draws(model, "the information")
            scores = _posterior_table(model.posterior, inference)
            if self.bound == "nwj":
                scores = 1.0 + scores - bound.log_pz[:, None]
            of = {"info_nce": info_nce, "nwj": nwj, "leave_one_out": leave_one_out_upper}[self.bound]
            information = torch.stack([of(table) for table in scores]).mean()
        return -self.weight * information, {"information": information}

    def extra_repr(self):
        return f"bound={self.bound!r}, weight={self.weight}"


def _posterior_table(posterior, inference):
    """(K, B, B): log q(z_kj | x_i) in nats, i before j."""
    if not hasattr(posterior, "log_prob"):
        raise TypeError(f"posterior: expected log_prob(params, z), which {type(posterior).__name__} has not")
    n = inference.params.shape[0]
    z = inference.z.repeat(1, n, *[1] * (inference.z.dim() - 2))
    return posterior.log_prob(inference.params.repeat_interleave(n, 0), z).unflatten(1, (n, n))


def dip_penalty(mean, variance=None, *, diagonal=10.0, off_diagonal=5.0):
    """off_diagonal * sum_{i != j} C_ij^2 + diagonal * sum_i (C_ii - 1)^2, 0-d, with C the batch's covariance of the
    posteriors' means (DIP-I), plus their mean variances if given (DIP-II).

    Args:
        mean, variance: (B, D).

    References:
        Kumar et al., "Variational inference of disentangled latent concepts", 2018, arXiv:1711.00848.
    """
    checks.tensor("mean", mean)
    if mean.dim() != 2:
        raise ValueError(f"mean: expected shape (B, D), got {tuple(mean.shape)}")
    if variance is not None:
        checks.tensor("variance", variance)
        checks.shape("variance", variance, mean.shape)
    centred = mean - mean.mean(0)
    covariance = centred.mT @ centred / mean.shape[0]
    own = covariance.diagonal()
    between = covariance.square().sum() - own.square().sum()
    if variance is not None:
        own = own + variance.mean(0)
    return off_diagonal * between + diagonal * (own - 1.0).square().sum()


class DIP(nn.Module):
    """:func:`dip_penalty` of the batch.

    Args:
        kind: "i", of the means; "ii", with the variances.
        diagonal, off_diagonal: weights.
    """

    def __init__(self, kind="ii", *, diagonal=10.0, off_diagonal=5.0):
        super().__init__()
        checks.choice("kind", kind, ("i", "ii"))
        self.kind, self.diagonal, self.off_diagonal = kind, diagonal, off_diagonal

    def forward(self, model, inference, bound, **_):
        mean, log_sigma = _moments(model, inference, "DIP")
        cost = dip_penalty(mean, torch.exp(2.0 * log_sigma) if self.kind == "ii" else None, diagonal=self.diagonal,
                           off_diagonal=self.off_diagonal)
        return cost, {"dip": cost}


def mmd(x, y, kernel="rbf", scales=None, *, biased=False):
    """The squared maximum mean discrepancy of two samples, 0-d: E k(x, x') + E k(y, y') - 2 E k(x, y).

    Unbiased by default (pairs of one element with itself left out), and so at times negative; ``biased=True`` keeps
    them.

    Args:
        x: (N, D). y: (M, D). Unbiased, N and M are at least 2.
        kernel: "rbf", exp(-|x - y|^2 / (2 s^2)); "imq", C / (C + |x - y|^2) with C = 2 D s^2.
        scales: the s whose kernels are averaged, finite positive numbers; None for (1,) times sqrt(D) with "rbf", and
            for the square roots of 0.1, 0.2, 0.5, 1, 2, 5, 10 with "imq".
        biased: whether pairs of one element with itself count.

    References:
        Gretton et al., "A kernel two-sample test", 2012, lemma 6.
        Tolstikhin et al., "Wasserstein auto-encoders", 2018, arXiv:1711.01558.
    """
    checks.choice("kernel", kernel, ("rbf", "imq"))
    for name, value in (("x", x), ("y", y)):
        checks.tensor(name, value)
        if value.dim() != 2 or value.shape[1] != x.shape[1] or value.shape[0] < (1 if biased else 2):
            raise ValueError(f"{name}: expected shape (N, D) with N >= {1 if biased else 2}, got {tuple(value.shape)}")
    d = x.shape[1]
    _check_scales(scales)
    if scales is None:
        scales = [math.sqrt(s) for s in ((d,) if kernel == "rbf" else (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0))]

    def average(a, b, same):
        squares = (a[:, None] - b).square().sum(2)
        if kernel == "rbf":
            values = sum(torch.exp(-squares / (2.0 * s * s)) for s in scales)
        else:
            values = sum(2.0 * d * s * s / (2.0 * d * s * s + squares) for s in scales)
        if same and not biased:
            n = a.shape[0]
            return (values.sum() - values.diagonal().sum()) / (n * (n - 1) * len(scales))
        return values.mean() / len(scales)

    return average(x, x, True) + average(y, y, True) - 2.0 * average(x, y, False)


def _check_scales(scales):
    """None, or at least one finite positive number."""
    if scales is None:
        return
    if isinstance(scales, str) or not hasattr(scales, "__len__"):
        raise TypeError(f"scales: expected None or a sequence of numbers, got {type(scales).__name__}")
    if not len(scales) or not all(0.0 < s < math.inf for s in scales):
        raise ValueError(f"scales: expected at least one finite positive number, got {scales!r}")


class MMD(nn.Module):
    """weight * MMD^2 between the samples of the batch's posteriors and as many of the prior, B * K at least 2.

    Args:
        weight: factor; of the size of the distortion's changes, since MMD^2 is below 2.
        kernel, scales: see :func:`mmd`.
    """

    def __init__(self, weight=10.0, kernel="imq", scales=None):
        super().__init__()
        checks.choice("kernel", kernel, ("rbf", "imq"))
        _check_scales(scales)
        self.weight, self.kernel, self.scales = weight, kernel, scales

    def forward(self, model, inference, bound, *, context=None, generator=None, **_):
        z = inference.z.flatten(0, 1).flatten(1)
        distance = mmd(z, _prior_samples(model, inference, context, generator), self.kernel, self.scales)
        return self.weight * distance, {"mmd": distance}


def _prior_samples(model, inference, context, generator):
    """(K*B, D) from the prior."""
    k, b = inference.z.shape[:2]
    if context is not None:
        context = context.expand(k, *context.shape).flatten(0, 1)
    return model.sample_latents(k * b, context, generator=generator).to(inference.z).flatten(1)


def discriminator_loss(logits_q, logits_p):
    """Cross-entropy of telling q's samples (class 1) from p's, 0-d nats: -E_q log s(T) - E_p log s(-T).

    At its minimum over all functions T = log q - log p, so that E_q T = KL(q || p); where q = p it is 2 log 2.

    References:
        Mescheder et al., "Adversarial variational Bayes", 2017, arXiv:1701.04722, proposition 1.
    """
    return F.softplus(-logits_q).mean() + F.softplus(logits_p).mean()


def permute_dims(z, generator=None):
    """z (N, D) with every column shuffled on its own: samples of the product of the marginals."""
    order = drawn(torch.rand, z.shape, z, generator, torch.float32).argsort(0)
    return z.gather(0, order)


class DensityRatio(nn.Module):
    """weight * E_q T(z), T a discriminator of the aggregate posterior against the prior, which estimates their
    log-density ratio: at its optimum the cost is weight * KL(q(z) || p(z)). With the rate's weight at 0 it makes an
    adversarial autoencoder.

    One optimiser trains both: the value that is maximised also holds the discriminator's negative loss, at samples
    without gradient, and in the cost the discriminator's parameters are held fixed, so that each parameter's gradient
    is that of its own game.

    Args:
        discriminator: module from z flattened, (N, D), to logits (N,) or (N, 1).
        weight: factor.

    References:
        Makhzani et al., "Adversarial autoencoders", 2016, arXiv:1511.05644.
    """

    name = "density_ratio"

    def __init__(self, discriminator, weight=1.0):
        super().__init__()
        self.discriminator = discriminator
        self.weight = weight

    def forward(self, model, inference, bound, *, context=None, generator=None, **_):
        z = for_network(inference.z.flatten(0, 1).flatten(1), self.discriminator)
        fixed = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        ratio = promoted(functional_call(self.discriminator, fixed, (z,))).view(inference.z.shape[:2])
        own = z.detach()
        other = self._others(model, inference, own, context, generator).detach().to(own.dtype)
        loss = discriminator_loss(*(promoted(self.discriminator(one)) for one in (own, other)))
        return self.weight * ratio.mean(0) + loss, {self.name: ratio.mean(), "discriminator_loss": loss}

    def _others(self, model, inference, z, context, generator):
        return _prior_samples(model, inference, context, generator)


class FactorTC(DensityRatio):
    """weight * E_q T(z), T a discriminator of the aggregate posterior against the product of its marginals: at its
    optimum the cost is weight * total correlation, as in FactorVAE.

    Arguments and training as for :class:`DensityRatio`.

    References:
        Kim and Mnih, "Disentangling by factorising", 2018, arXiv:1802.05983.
    """

    name = "total_correlation"

    def _others(self, model, inference, z, context, generator):
        return permute_dims(z, generator)
