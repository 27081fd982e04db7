"""Fit a flow to a density known up to a constant, by reverse KL: no data, gradients through the flow's own samples.

KL(q || p) = E_q[log q(x) - log p~(x)] + log Z, so that the minimum of the expectation is -log Z. The target here is a
banana, x1 ~ N(0, 1), x2 | x1 ~ N(x1^2 / 2, 1/4), unnormalised, whose Z is known: 2 pi / 2.
"""

import math

import torch

from fastflow import flows

LOG_Z = math.log(2.0 * math.pi * 0.5)


def log_unnormalised(x):
    return -0.5 * x[:, 0].square() - 2.0 * (x[:, 1] - 0.5 * x[:, 0].square()).square()


def fit(steps=300, batch=256, seed=0):
    torch.manual_seed(seed)
    flow = flows.RealNVP(2, n_layers=6, hidden=(32, 32))
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x, log_q = flow.sample_and_log_prob(batch)  # both with gradients
        loss = (log_q - log_unnormalised(x)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return flow


@torch.no_grad()
def evaluate(flow, n=20_000):
    """(KL(q || p) in nats, an estimate of log Z by importance sampling, second moments of x1 and mean of x2)."""
    x, log_q = flow.sample_and_log_prob(n)
    log_w = log_unnormalised(x) - log_q
    weights = torch.softmax(log_w, 0)
    moments = (weights @ x[:, 0].square()).item(), (weights @ x[:, 1]).item()
    return (LOG_Z - log_w.mean()).item(), (torch.logsumexp(log_w, 0) - math.log(n)).item(), moments


def main():
    kl, log_z, (square, mean) = evaluate(fit())
    print(f"KL {kl:.4f} nats; log Z {log_z:.4f}, exactly {LOG_Z:.4f}; E x1^2 {square:.3f} (1), E x2 {mean:.3f} (1/2)")
    assert -0.003 < kl < 0.05
    assert abs(log_z - LOG_Z) < 0.02 and abs(square - 1.0) < 0.06 and abs(mean - 0.5) < 0.04


if __name__ == "__main__":
    main()
