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


PROBLEMS = {"bits": (bits, coupled), "classes": (classes, coupled_classes)}


def tuples(q, k):
    """Every k-tuple of states of the one row of q, as a batch: q repeated (N rows, logits a leaf), samples (k, N,
    *event) and probabilities (N,)."""
    states = q.states()
    index = torch.tensor(list(itertools.product(range(len(states)), repeat=k)))
    log_q = q.log_prob(states[:, None])[:, 0]
    logits = q.logits.detach()[:1].repeat(len(index), *[1] * (q.logits.dim() - 1)).requires_grad_()
    return type(q)(logits), states[index].transpose(0, 1), log_q[index].sum(1).exp()


def moments(gradients, probabilities):
    """Mean and variance of gradients (N, *event) under probabilities (N,)."""
    weights = probabilities.reshape(-1, *[1] * (gradients.dim() - 1))
    mean = (weights * gradients).sum(0)
    return mean, (weights * (gradients - mean) ** 2).sum(0)
