"""Variational autoencoders: posteriors, priors, likelihoods and the ELBO with every constant kept."""

from fastflow.vae.bounds import ciwae, dreg, miwae, piwae, renyi, stl
from fastflow.vae.discrete import DiscreteVAE
from fastflow.vae.elbo import ELBO, Inference, LossTerms, iwae
from fastflow.vae.generation import lerp, slerp
from fastflow.vae.hamiltonian import HamiltonianVAE
from fastflow.vae.hierarchy import HierarchicalVAE, HierarchyTerms
from fastflow.vae.kl_control import Capacity, FreeBits, KLBalance, capacity, free_bits, kl_balance
from fastflow.vae.labels import Conditioned, SemiSupervisedVAE, Task
from fastflow.vae.level import Level
from fastflow.vae.likelihoods import (
    BernoulliLikelihood,
    CategoricalLikelihood,
    ContinuousBernoulliLikelihood,
    DiscretizedLogisticLikelihood,
    GaussianLikelihood,
    LaplaceLikelihood,
    Likelihood,
    LogisticMixtureLikelihood,
    NegativeBinomialLikelihood,
    PoissonLikelihood,
)
from fastflow.vae.model import VAE
from fastflow.vae.models import (
    DIPVAE,
    FSQVAE,
    HVAE,
    IWAE,
    MLPVAE,
    NVAE,
    VDVAE,
    VQVAE,
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
from fastflow.vae.networks import conv_decoder, conv_encoder, mlp_decoder, mlp_discriminator, mlp_encoder
from fastflow.vae.objectives import BoundObjective, Objective, PenalizedELBO
from fastflow.vae.penalties import (
    DIP,
    MMD,
    DensityRatio,
    FactorTC,
    MutualInformation,
    TotalCorrelation,
    decompose_kl,
    dip_penalty,
    discriminator_loss,
    mmd,
)
from fastflow.vae.posteriors import (
    DeltaGaussianPosterior,
    DeterministicPosterior,
    FlowPosterior,
    FullGaussianPosterior,
    GaussianPosterior,
    LowRankGaussianPosterior,
    MixturePosterior,
)
from fastflow.vae.posteriors.delta import ar1_least_rate, delta_gaussian
from fastflow.vae.priors import (
    AutoregressivePrior,
    BitPrior,
    CodePrior,
    ConditionalGaussianPrior,
    GaussianPrior,
    MixturePrior,
    VampPrior,
)
from fastflow.vae.quantizers import FSQ, Quantized, VectorQuantizer
from fastflow.vae.schedules import CosineSchedule, CyclicalSchedule, LinearSchedule, Schedule, SigmoidSchedule
from fastflow.vae.vqvae import QuantizedVAE

__all__ = ["DIP", "DIPVAE", "ELBO", "FSQ", "FSQVAE", "HVAE", "IWAE", "MLPVAE", "MMD", "NVAE", "VAE", "VDVAE", "VQVAE",
           "WAE", "AdversarialAutoencoder", "AutoregressivePrior", "BernoulliLikelihood", "BetaTCVAE",
           "BetaVAE", "BitPrior", "BoundObjective", "Capacity", "CategoricalLikelihood", "CodePrior",
           "ConditionalGaussianPrior", "ConditionalVAE", "Conditioned", "ContinuousBernoulliLikelihood",
           "ConvVAE", "CosineSchedule", "CyclicalSchedule", "DeltaGaussianPosterior", "DensityRatio",
           "DeterministicPosterior", "DiscreteVAE", "DiscretizedLogisticLikelihood", "FactorTC",
           "FactorVAE", "FlowPosterior", "FlowPosteriorVAE", "FlowPriorVAE", "FreeBits",
           "FullGaussianPosterior", "GaussianLikelihood", "GaussianPosterior", "GaussianPrior",
           "HamiltonianVAE", "HierarchicalVAE", "HierarchyTerms", "Inference", "InfoVAE", "KLBalance",
           "LaplaceLikelihood", "Level", "Likelihood", "LinearSchedule", "LogisticMixtureLikelihood",
           "LossTerms", "LowRankGaussianPosterior", "MixturePosterior", "MixturePrior", "MutualInformation",
           "NegativeBinomialLikelihood", "Objective", "PenalizedELBO", "PoissonLikelihood", "Quantized",
           "QuantizedVAE", "Schedule", "SemiSupervisedVAE", "SigmoidSchedule", "Task", "TotalCorrelation",
           "VampPrior", "VampVAE", "VectorQuantizer", "ar1_least_rate", "capacity", "ciwae", "conv_decoder",
           "conv_encoder", "decompose_kl", "delta_gaussian", "dip_penalty", "discriminator_loss", "dreg",
           "free_bits", "iwae", "kl_balance", "lerp", "miwae", "mlp_decoder", "mlp_discriminator",
           "mlp_encoder", "mmd", "piwae", "renyi", "slerp", "stl"]
