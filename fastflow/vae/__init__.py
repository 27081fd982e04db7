"""Variational autoencoders: posteriors, priors, likelihoods and the ELBO with every constant kept."""

from fastflow.vae.bounds import ciwae, dreg, miwae, piwae, renyi, stl
from fastflow.vae.discrete import DiscreteVAE
from fastflow.vae.elbo import ELBO, iwae
from fastflow.vae.kl_control import ar1_least_rate, capacity, delta_gaussian, free_bits, kl_balance
from fastflow.vae.likelihoods import BernoulliLikelihood, GaussianLikelihood
from fastflow.vae.model import VAE
from fastflow.vae.networks import conv_decoder, conv_encoder, mlp_decoder, mlp_encoder
from fastflow.vae.posteriors import GaussianPosterior
from fastflow.vae.priors import GaussianPrior
from fastflow.vae.schedules import CosineSchedule, CyclicalSchedule, LinearSchedule, Schedule, SigmoidSchedule

__all__ = ["ELBO", "VAE", "BernoulliLikelihood", "CosineSchedule", "CyclicalSchedule", "DiscreteVAE",
           "GaussianLikelihood", "GaussianPosterior", "GaussianPrior", "LinearSchedule", "Schedule", "SigmoidSchedule",
           "ar1_least_rate", "capacity", "ciwae", "conv_decoder", "conv_encoder", "delta_gaussian", "dreg", "free_bits",
           "iwae", "kl_balance", "miwae", "mlp_decoder", "mlp_encoder", "piwae", "renyi", "stl"]
