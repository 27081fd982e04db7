"""What a model does, measured: how a flow inverts, what a VAE's latents carry, what its messages cost."""

from fastflow.diagnostics.bits_back import BitsBack, Message
from fastflow.diagnostics.density_ratio import DensityRatioCheck, density_ratio_check
from fastflow.diagnostics.discrete import CodeUsage, code_information, code_usage, discrete_information
from fastflow.diagnostics.inversion import InversionError, inversion_error
from fastflow.diagnostics.kl import kl_per_latent
from fastflow.diagnostics.latents import (
    InformationTerms,
    active_units,
    aggregate_log_prob,
    dimension_kl,
    information,
    marginal_kl,
    minibatch_information,
    posterior_moments,
)
from fastflow.diagnostics.linear import LinearOptimum, data_eigenvalues, linear_optimum
from fastflow.diagnostics.monitor import CollapseMonitor, CollapseWarning
from fastflow.diagnostics.rate_distortion import (
    RateDistortion,
    Traversal,
    rate_distortion,
    rate_distortion_sweep,
    traversal_grid,
)
from fastflow.diagnostics.report import Diagnosis, diagnose
from fastflow.diagnostics.self_consuming import Chain, GaussianChain, augment, self_consuming_chain

__all__ = ["BitsBack", "Chain", "CodeUsage", "CollapseMonitor", "CollapseWarning", "DensityRatioCheck", "Diagnosis",
           "GaussianChain", "InformationTerms", "InversionError", "LinearOptimum", "Message", "RateDistortion",
           "Traversal", "active_units", "aggregate_log_prob", "augment", "code_information", "code_usage",
           "data_eigenvalues", "density_ratio_check", "diagnose", "dimension_kl", "discrete_information",
           "information", "inversion_error", "kl_per_latent", "linear_optimum", "marginal_kl", "minibatch_information",
           "posterior_moments", "rate_distortion", "rate_distortion_sweep", "self_consuming_chain", "traversal_grid"]
