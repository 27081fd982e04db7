"""Small discrete problems whose every state can be listed."""

import itertools

import torch

from fastflow.estimators import Bernoulli, Categorical

P = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
C = torch.tensor([0.2, 0.55, 0.9], dtype=torch.float64)
SLOPES = torch.tensor([[0.4, -1.1, 0.3], [0.9, 0.2, -0.7]], dtype=torch.float64)


def bits():
    return Bernoulli(torch.logit(P)[None])


def quadratic(b):
    """Of three bits: E is 0.5025, its gradient p(1-p)(1-2c)."""
    return ((b - C) ** 2).sum(-1)


def coupled(b):
    """Of three bits, not linear in any given the others as far as relaxed values go."""
    return torch.sin(3 * (b * torch.tensor([1.0, 2.0, -1.5], dtype=b.dtype)).sum(-1)) + b[..., 0] * b[..., 2]


def classes():
    """Two rows of two variables with three classes each."""
    generator = torch.Generator().manual_seed(3)
    return Categorical(torch.randn(2, 2, 3, generator=generator, dtype=torch.float64))


def coupled_classes(b):
    return torch.sin(2 * (b * SLOPES).sum((-1, -2))) + b[..., 0, 0] * b[..., 1, 1]


def drawn(family, shape, seed):
    """One row of random logits (1, *shape), and f of random slopes that is linear in no element."""
    generator = torch.Generator().manual_seed(seed)
    logits, slopes = torch.randn(2, *shape, generator=generator, dtype=torch.float64)

    def f(b):
        total = (b * slopes).flatten(2).sum(2)
        return torch.sin(2.0 * total + 0.3) + 0.5 * total**2

    return lambda: family(logits[None]), f


PROBLEMS = {"bits": (bits, coupled), "classes": (classes, coupled_classes)}
SIZES = PROBLEMS | {"1 bit": drawn(Bernoulli, (1,), 1), "4 bits": drawn(Bernoulli, (4,), 2),
                    "2 x 2 bits": drawn(Bernoulli, (2, 2), 3), "1 of 4 classes": drawn(Categorical, (4,), 4),
                    "3 of 2 classes": drawn(Categorical, (3, 2), 5)}


def tuples(q, k):
    """Every k-tuple of states of the one row of q, as a batch: q repeated (N rows, logits a leaf), samples (k, N,
    *event) and probabilities (N,)."""
    states = q.states()
    index = torch.tensor(list(itertools.product(range(len(states)), repeat=k)))
    log_q = q.log_prob(states[:, None])[:, 0]
    logits = q.logits.detach()[:1].repeat(len(index), *[1] * (q.logits.dim() - 1)).requires_grad_()
    return type(q)(logits), states[index].transpose(0, 1), log_q[index].sum(1).exp()


def moments(gradients, probabilities):
    """Mean, variance and fourth central moment of gradients (N, *event) under probabilities (N,)."""
    weights = probabilities.reshape(-1, *[1] * (gradients.dim() - 1))
    mean = (weights * gradients).sum(0)
    return mean, (weights * (gradients - mean) ** 2).sum(0), (weights * (gradients - mean) ** 4).sum(0)


def assert_variance(measured, variance, fourth, standard_errors=4.0):
    """That a Measurement of one row has the variance (*event), to so many standard errors of a sample variance, which
    the fourth central moment gives."""
    n = measured.n_repeats
    error = ((fourth - variance**2 * (n - 3) / (n - 1)).clamp(min=0) / n).sqrt()
    deviation = ((measured.variance[0] - variance).abs() - 1e-12) / error.clamp(min=1e-300)
    assert deviation.max() < standard_errors, deviation
