"""Likelihoods of real numbers: Gaussian and Laplace."""

import math

import torch

from fastflow import checks
from fastflow.draws import drawn
from fastflow.flows.base import centred
from fastflow.one_number import OneNumber, one_number
from fastflow.vae.likelihoods.base import Likelihood, sum_event

__all__ = ["GaussianLikelihood", "LaplaceLikelihood"]

LOG_SIGMA_BOUND = 5.0


class LocationScale(OneNumber, Likelihood):
    """Location from the decoder; the scale fixed, learned, fitted or from the decoder, as the families say."""

    modes = (None, "decoder")
    scale_name = "scale"

    def __init__(self, scale):
        super().__init__()
        named = isinstance(scale, str) or scale is None
        if not (named or isinstance(scale, torch.Tensor) and scale.dim() == 0):
            checks.number(self.scale_name, scale)
        if scale not in self.modes if named else not 0.0 < scale < math.inf:
            options = " or ".join(map(repr, self.modes))
            raise ValueError(f"{self.scale_name}: expected a positive number, {options}, got {scale!r}")
        self.mode = scale if named else "fixed"
        self.params_per_element = 2 if scale == "decoder" else 1

    def log_density(self, x, location, raw=None):
        log_scale = self._log_scale(raw)
        inverse = math.exp(-log_scale) if isinstance(log_scale, float) else torch.exp(-log_scale)
        return self._standard((x - location) * inverse) - log_scale

    def mean_of(self, location, raw=None):
        return location

    def draw(self, generator, location, raw=None):
        log_scale = self._log_scale(raw)
        scale = math.exp(log_scale) if isinstance(log_scale, float) else torch.exp(log_scale)
        return location + scale * self._noise(location, generator)

    def _log_scale(self, raw):
        """The logarithm of the scale: a number if fixed, (1,) if learned, from the decoder between -5 and 5."""
        return self.log_sigma if raw is None else LOG_SIGMA_BOUND * torch.tanh(raw / LOG_SIGMA_BOUND)


class GaussianLikelihood(LocationScale):
    """Independent Gaussians around the decoder's output.

    Args:
        sigma: the standard deviation. A positive number: fixed. None: one number, learned, parameter ``log_sigma``,
            from 1. "optimal": sigma^2 is the mean squared error, the value that maximises the likelihood: of each batch
            in training; in eval a running average of them (buffer ``mean_square``, momentum 0.1), for a density may not
            look at the x that it is asked about. "decoder": the output has twice x's channels, the mean and r with
            log sigma = 5 tanh(r / 5).

    References:
        Rybkin et al., "Simple and effective VAE training with calibrated decoders", 2021, arXiv:2006.13202.
    """

    modes = (None, "optimal", "decoder")
    scale_name = "sigma"
    MOMENTUM = 0.1

    def __init__(self, sigma=None):
        super().__init__(sigma)
        if sigma is None:
            self.log_sigma = one_number(0.0)
        elif sigma == "optimal":
            self.register_buffer("mean_square", torch.ones(()))
        elif sigma != "decoder":  # a number, for a buffer would be rounded by .to()
            self.log_sigma = math.log(sigma)

    def total(self, x, location, raw=None):
        if raw is not None:
            return super().total(x, location, raw)
        squares = (x - location).square()
        if self.mode == "optimal" and self.training:
            mean_square = squares.mean()
            with torch.no_grad():
                seen = mean_square.to(self.mean_square.dtype)
                # A batch that is not finite, whose step a trainer leaves out, may not spoil the average for good.
                self.mean_square.lerp_(torch.where(seen.isfinite(), seen, self.mean_square), self.MOMENTUM)
            log_sigma = 0.5 * torch.log(mean_square)
        else:
            log_sigma = self._log_scale(None)
        fixed = isinstance(log_sigma, float)
        precision = math.exp(-2.0 * log_sigma) if fixed else torch.exp(-2.0 * log_sigma)
        constant = math.prod(x.shape[1:]) * (log_sigma + 0.5 * math.log(2.0 * math.pi))
        return -0.5 * precision * sum_event(squares, x.dim() - 1) - constant

    def _log_scale(self, raw):
        return 0.5 * torch.log(self.mean_square) if self.mode == "optimal" else super()._log_scale(raw)

    def _standard(self, residual):
        return -0.5 * residual * residual - 0.5 * math.log(2.0 * math.pi)

    def _noise(self, like, generator):
        return drawn(torch.randn, like.shape, like, generator)


class LaplaceLikelihood(LocationScale):
    """Independent Laplace laws exp(-|x - m| / b) / (2 b) around the decoder's output m, an L1 loss.

    Args:
        scale: b. A positive number: fixed. None: one number, learned, parameter ``log_sigma``, from 1. "decoder": the
            output has twice x's channels, m and r with log b = 5 tanh(r / 5).
    """

    def __init__(self, scale=None):
        super().__init__(scale)
        if scale is None:
            self.log_sigma = one_number(0.0)
        elif scale != "decoder":
            self.log_sigma = math.log(scale)

    def _standard(self, residual):
        return -residual.abs() - math.log(2.0)

    def _noise(self, like, generator):
        u = centred(drawn(torch.rand, like.shape, like, generator))
        return -u.sign() * torch.log1p(-2.0 * u.abs())
