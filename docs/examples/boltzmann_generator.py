"""A Boltzmann generator: samples of exp(-u(x)) from a flow, made exact by importance weights.

The system is two particles on a line in a trap with a double-well bond; its averages are known by quadrature. Training
mixes the two directions: likelihood of configurations from both wells, which a short simulation gives, and the reverse
KL, the energy of the flow's own samples. Reweighting then removes what is left of the flow's error.

Noe et al., "Boltzmann generators", 2019, arXiv:1812.01729.
"""

import math

import torch

from fastflow import flows


def energy(x):
    """u(x1, x2) in units of kT: a trap on the centre of mass, a tilted double well on the bond."""
    centre, bond = 0.5 * (x[:, 0] + x[:, 1]), x[:, 0] - x[:, 1]
    return 2.0 * centre.square() + (bond.square() - 2.0).square() + 0.5 * bond


def quadrature(observable, n=801):
    """<observable> under exp(-u), by the trapezoidal rule."""
    axis = torch.linspace(-4.0, 4.0, n, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    weights = torch.softmax(-energy(x), 0)
    return (weights @ observable(x)).item()


def simulate(n, seed=0):
    """Metropolis chains, half of them started in each well."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.tensor([[0.7, -0.7], [-0.7, 0.7]]).repeat(n // 2, 1)
    for _ in range(100):
        moved = x + 0.4 * torch.randn(x.shape, generator=generator)
        accept = torch.rand(len(x), generator=generator) < torch.exp(energy(x) - energy(moved))
        x = torch.where(accept[:, None], moved, x)
    return x


def fit(steps=250, batch=256, seed=0):
    torch.manual_seed(seed)
    data = simulate(2000, seed)
    flow = flows.NSF(2, n_layers=6, hidden=(32, 32), tail_bound=4.0)
    flow.initialize(data)
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    for _ in range(steps):
        likelihood = -flow(data[torch.randint(len(data), (batch,))]).mean()
        x, log_q = flow.sample_and_log_prob(batch)
        loss = likelihood + 0.5 * (log_q + energy(x)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
    return flow


@torch.no_grad()
def reweighted(flow, observable, n=20_000):
    """(<observable> by self-normalised weights exp(-u)/q, its standard error, effective sample size as a fraction)."""
    x, log_q = flow.sample_and_log_prob(n)
    weights = torch.softmax((-energy(x) - log_q).double(), 0)
    values = observable(x).double()
    mean = weights @ values
    return mean.item(), (weights.square() @ (values - mean).square()).sqrt().item(), 1.0 / (n * weights.square().sum())


def main():
    flow = fit()
    for name, observable in (("bond > 0", lambda x: (x[:, 0] > x[:, 1]).to(x.dtype)), ("energy", energy)):
        exact = quadrature(observable)
        mean, error, ess = reweighted(flow, observable)
        print(f"<{name}> {mean:.4f} +- {error:.4f}, by quadrature {exact:.4f}; effective samples {100 * ess:.0f} %")
        assert abs(mean - exact) < 4.0 * error + 1e-3 and math.isfinite(error) and ess > 0.5


if __name__ == "__main__":
    main()
