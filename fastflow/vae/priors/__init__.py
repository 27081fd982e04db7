"""Priors p(z). Any object with log_prob(z) over (N, D, *S) and sample(n, generator=, temperature=) can be one, a Flow
or a torch.distributions object among them; N(0, I) and GaussianPrior give the KL in closed form."""

from fastflow.vae.priors.autoregressive import AutoregressivePrior, CodePrior
from fastflow.vae.priors.bits import BitPrior
from fastflow.vae.priors.conditional import ConditionalGaussianPrior
from fastflow.vae.priors.gaussian import GaussianPrior, MixturePrior
from fastflow.vae.priors.vamp import VampPrior

__all__ = ["AutoregressivePrior", "BitPrior", "CodePrior", "ConditionalGaussianPrior", "GaussianPrior", "MixturePrior",
           "VampPrior"]
