"""Ready models: networks, posterior, prior, likelihood and objective that go together.

Each takes the shape of one x and sizes; for networks of your own use VAE, HierarchicalVAE or QuantizedVAE with the
posteriors, priors, likelihoods and objectives that these are made of.
"""

from fastflow.vae.models.basic import (
    DIPVAE,
    IWAE,
    MLPVAE,
    WAE,
    AdversarialAutoencoder,
    BetaTCVAE,
    BetaVAE,
    ConditionalVAE,
    ConvVAE,
    FactorVAE,
    FlowPosteriorVAE,
    FlowPriorVAE,
    InfoVAE,
    VampVAE,
)
from fastflow.vae.models.hierarchical import HVAE, NVAE, VDVAE
from fastflow.vae.models.quantized import FSQVAE, VQVAE

__all__ = ["DIPVAE", "FSQVAE", "HVAE", "IWAE", "MLPVAE", "NVAE", "VDVAE", "VQVAE", "WAE", "AdversarialAutoencoder",
           "BetaTCVAE", "BetaVAE", "ConditionalVAE", "ConvVAE", "FactorVAE", "FlowPosteriorVAE", "FlowPriorVAE",
           "InfoVAE", "VampVAE"]
