"""Whether a classifier can tell the aggregate posterior from the prior."""

import contextlib
import math
from typing import NamedTuple

import torch

from fastflow import checks
from fastflow.diagnostics.mode import in_eval
from fastflow.vae.networks import mlp_discriminator
from fastflow.vae.penalties import discriminator_loss

__all__ = ["DensityRatioCheck", "density_ratio_check"]


class DensityRatioCheck(NamedTuple):
    """On samples that the classifier was not trained on.

    Attributes:
        kl: a lower bound of KL(q || p) in nats, E_q T - E_p exp(T) + 1 with T its logit less what makes the mean of
            exp(T) over p's training samples 1. Whatever the classifier, weak or overfitted, the bound's expectation is
            at most the KL, and equal to it for T = log q - log p; a bad one's may be negative.
        accuracy: share of samples told right: 1/2 where q = p; NaN if one of the logits is.
        z_score: (accuracy - 1/2) in its standard errors under q = p; above 3, q and p differ.
        loss: cross-entropy, nats for a pair; 2 log 2 for a classifier that knows nothing.
        kl_error: standard error of kl.
    """

    kl: float
    accuracy: float
    z_score: float
    loss: float
    kl_error: float


def density_ratio_check(q, p, *, discriminator=None, steps=300, batch_size=256, learning_rate=1e-2, seed=0):
    """DensityRatioCheck of samples q (N, D), of the aggregate posterior, against p (M, D), of the prior.

    The first half of each trains the classifier (shuffle samples that come in an order), the second judges it.

    Args:
        discriminator: module from (B, D) to logits (B,) or (B, 1), trained in place in the mode (train or eval) that it
            is in and judged in eval mode; None for a small network.
        steps, batch_size, learning_rate: of its training with Adam.
        seed: of the network and the batches; torch's own generators stay as they are.

    References:
        Rosca, Lakshminarayanan and Mohamed, "Distribution matching in variational inference", 2018, arXiv:1802.06847;
        Nguyen, Wainwright and Jordan, "Estimating divergence functionals and the likelihood ratio by convex risk
        minimization", 2010, for the bound.
    """
    for name, value in (("q", q), ("p", p)):
        checks.tensor(name, value)
        if value.dim() != 2 or len(value) < 4 or value.shape[1] != q.shape[-1]:
            raise ValueError(f"{name}: expected shape (N, D) with N >= 4, got {tuple(value.shape)}")
    steps, batch_size = checks.count("steps", steps), checks.count("batch_size", batch_size, 1)
    with torch.inference_mode(False), _seeded(seed, q.device), torch.enable_grad():
        # Clones, because no graph takes tensors of inference mode.
        q, p = (t.clone() if t.is_inference() else t for t in (q.detach(), p.detach().to(q)))
        if discriminator is None:
            discriminator = mlp_discriminator(q.shape[1], (64, 64)).to(q)
        halves = [t.split([len(t) // 2, len(t) - len(t) // 2]) for t in (q, p)]
        optimizer = torch.optim.Adam(discriminator.parameters(), lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
        for _ in range(steps):
            batches = [half[0][torch.randint(len(half[0]), (batch_size,)).to(q.device)] for half in halves]
            optimizer.zero_grad(set_to_none=True)
            discriminator_loss(*(discriminator(batch) for batch in batches)).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad(), in_eval(discriminator):
        on_q, on_p = (discriminator(half[1]).flatten() for half in halves)
        right = 0.5 * ((on_q > 0).double().mean() + (on_p <= 0).double().mean()).item()
        if on_q.isnan().any() or on_p.isnan().any():
            right = math.nan
        error = 0.25 * math.sqrt(1.0 / len(on_q) + 1.0 / len(on_p))
        trained = discriminator(halves[1][0]).flatten().double()
        shift = torch.logsumexp(trained, 0) - math.log(len(trained))
        ratio, weights = on_q.double() - shift, torch.exp(on_p.double() - shift)
        kl_error = (ratio.var() / len(ratio) + weights.var() / len(weights)).sqrt()
        return DensityRatioCheck((ratio.mean() - weights.mean() + 1.0).item(), right, (right - 0.5) / error,
                                 discriminator_loss(on_q, on_p).item(), kl_error.item())


@contextlib.contextmanager
def _seeded(seed, device):
    """Inside, torch's generators of the CPU and of ``device`` start from ``seed``; afterwards they are where they were.
    torch.manual_seed would reseed those of all other devices too, for good."""
    on = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(on):
        torch.random.default_generator.manual_seed(seed)
        for one in on:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(seed)
        yield
