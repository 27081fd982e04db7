"""Variational bounds on the mutual information I(x; y), in nats.

``scores`` is the (N, N) matrix of a critic at all pairs of N joint draws: row i has x_i, column j has y_j, so that the
diagonal holds the joint pairs. In a VAE log q(z_j | x_i) is such a critic.

References:
    Poole et al., "On variational bounds of mutual information", 2019, arXiv:1905.06922.
"""

import math

import torch

from fastflow import checks

__all__ = ["barber_agakov", "barber_agakov_upper", "info_nce", "leave_one_out_upper", "nwj", "pairwise_scores"]


def pairwise_scores(critic, x, y):
    """(N, N): critic(x_i, y_j) -> (N*N,) at all pairs of x (N, *) and y (N, *)."""
    n = x.shape[0]
    if y.shape[0] != n:
        raise ValueError(f"y: expected {n} rows like x, got {y.shape[0]}")
    scores = critic(x.repeat_interleave(n, 0), y.repeat(n, *[1] * (y.dim() - 1)))
    checks.shape("critic output", scores, (n * n,))
    return scores.unflatten(0, (n, n))


def info_nce(scores):
    """0-d lower bound: log N plus the mean over i of log softmax over the x's, at the joint pair; at most log N.

    The softmax of each column's y runs over the x's, so that the critic log q(y | x) needs no normalisation over y.
    In expectation it is below I for any critic and any N.

    References:
        van den Oord et al., "Representation learning with contrastive predictive coding", 2018, arXiv:1807.03748.
    """
    _check_scores(scores, 1)
    return (scores.diagonal() - torch.logsumexp(scores, 0)).mean() + _log(scores.shape[0], scores)


def nwj(scores):
    """0-d lower bound: mean of the joint pairs' scores less the mean of exp(score - 1) over the other pairs. Tight, in
    expectation and for every N, at the critic 1 + log p(y | x) - log p(y); its variance grows as exp(I).

    References:
        Nguyen, Wainwright and Jordan, "Estimating divergence functionals", 2010, arXiv:0809.0853.
    """
    _check_scores(scores, 2)
    n = scores.shape[0]
    # Clamped, because the gradient of a logsumexp of nothing but -inf is NaN; their exp is 0 either way.
    others = _off_diagonal(scores).flatten().clamp_min(torch.finfo(scores.dtype).min)
    log_mean = torch.logsumexp(others, 0) - _log(n * (n - 1), scores)
    return scores.diagonal().mean() - torch.exp(log_mean - 1.0)


def barber_agakov(log_q, entropy):
    """0-d lower bound: H(x) + E log q(x | y), tight at the true conditional.

    Args:
        log_q: (N,) log q(x_i | y_i) at joint draws.
        entropy: H(x) in nats, a number or 0-d tensor.

    References:
        Barber and Agakov, "The IM algorithm", 2003.
    """
    checks.tensor("log_q", log_q)
    return log_q.mean() + entropy


def barber_agakov_upper(log_p, log_r):
    """0-d upper bound: E log p(y | x) - log r(y), tight at r = p(y). With the encoder as p and the prior as r it is a
    VAE's rate.

    Args:
        log_p: (N,) log p(y_i | x_i), the true conditional, at joint draws.
        log_r: (N,) log r(y_i).
    """
    checks.tensor("log_p", log_p)
    checks.shape("log_r", log_r, log_p.shape)
    return (log_p - log_r).mean()


def leave_one_out_upper(log_p):
    """0-d upper bound from the true conditional alone: r(y_j) is the mean of p(y_j | x_i) over the other x's.

    Args:
        log_p: (N, N) log p(y_j | x_i), N at least 2.
    """
    _check_scores(log_p, 2, "log_p")
    n = log_p.shape[0]
    masked = log_p.masked_fill(torch.eye(n, dtype=torch.bool, device=log_p.device), -math.inf)
    return (log_p.diagonal() - torch.logsumexp(masked, 0)).mean() + _log(n - 1, log_p)


def _log(count, like):
    """log(count) of a number that depends on N, 0-d in like's dtype: math.log would compile a graph for every N."""
    return torch.log(like.new_full((), count, dtype=torch.promote_types(like.dtype, torch.float32))).to(like.dtype)


def _off_diagonal(scores):
    return scores.flatten()[1:].unflatten(0, (scores.shape[0] - 1, scores.shape[0] + 1))[:, :-1]


def _check_scores(scores, least, name="scores"):
    checks.tensor(name, scores)
    if scores.dim() != 2 or scores.shape[0] != scores.shape[1] or scores.shape[0] < least:
        raise ValueError(f"{name}: expected shape (N, N) with N >= {least}, got {tuple(scores.shape)}")
