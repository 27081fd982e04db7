"""A flow as a torch.distributions object: inside a TransformedDistribution, and as the guide of a Pyro model.

Pyro (pip install pyro-ppl) takes it as one of its own. Stochastic variational inference trains the flow as the guide of
a conjugate model, whose posterior is known.
"""

import math

import torch
from torch import distributions as D

from fastflow import flows


def with_torch():
    """x = exp(y) of a flow y is log-normal: the largest difference of its log-densities from the exact ones."""
    flow = flows.Flow(flows.Affine(0.3, 0.5), flows.StandardNormal(2))  # z = 0.3 + 0.5 x: x ~ N(-0.6, 4)
    law = D.TransformedDistribution(flow.as_distribution(), [D.transforms.ExpTransform()])
    exact = D.Independent(D.LogNormal(torch.full((2,), -0.6), torch.full((2,), 2.0)), 1)
    x = law.sample((1000,))
    return (law.log_prob(x) - exact.log_prob(x)).abs().max().item()


def with_pyro(steps=250, seed=0):
    """theta ~ N(0, I), eight observations y_i ~ N(theta, I): the posterior is N(sum y / 9, I / 9). Returns the KL of
    the trained guide to it, in nats."""
    import pyro
    import pyro.distributions as dist
    from pyro.infer import SVI, Trace_ELBO

    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    y = torch.randn(8, 2) + torch.tensor([1.0, -2.0])
    flow = flows.RealNVP(2, n_layers=4, hidden=(16,))

    def model():
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(theta, 1.0).to_event(1), obs=y)

    def guide():
        pyro.module("flow", flow)
        pyro.sample("theta", flow.as_distribution())

    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.04, "lrd": 0.98}), Trace_ELBO(num_particles=2))
    for _ in range(steps):
        svi.step()
    x, log_q = flow.sample_and_log_prob(20_000)
    exact = D.MultivariateNormal(y.sum(0) / 9, torch.eye(2) / 9)
    return (log_q - exact.log_prob(x)).mean().item()


def main():
    error = with_torch()
    print(f"TransformedDistribution: log-densities within {error:.1e} nats")
    assert error < 1e-3
    kl = with_pyro()
    print(f"Pyro: KL(guide || posterior) {kl:.4f} nats")
    assert math.isfinite(kl) and kl < 0.05


if __name__ == "__main__":
    main()
