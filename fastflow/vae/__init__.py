"""Variational autoencoders: posteriors, priors, likelihoods and the ELBO with every constant kept."""

from fastflow.vae.elbo import ELBO, iwae
from fastflow.vae.likelihoods import BernoulliLikelihood, GaussianLikelihood
from fastflow.vae.model import VAE
from fastflow.vae.networks import conv_decoder, conv_encoder, mlp_decoder, mlp_encoder
from fastflow.vae.posteriors import GaussianPosterior
from fastflow.vae.priors import GaussianPrior

__all__ = ["ELBO", "VAE", "BernoulliLikelihood", "GaussianLikelihood", "GaussianPosterior", "GaussianPrior",
           "conv_decoder", "conv_encoder", "iwae", "mlp_decoder", "mlp_encoder"]
