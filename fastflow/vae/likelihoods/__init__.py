"""Likelihoods p(x | z) of a decoder's output. Each is a normalised density, with every constant.

A likelihood has log_prob(x, output) -> (*, B) summed over the event, where x is (B, *event) and output
(*, B, *output_shape(event)); mean(output); and sample(output, generator=None). An object with these three whose output
has x's shape need not have output_shape.

``takes_integers`` says what x is: True, integers, which training steps hand on as they are (counts, classes, levels);
False, real numbers, for which they dequantise integer images. Of an object without it a step takes floating x and
integer images, which it dequantises, and refuses other integers.
"""

from fastflow.vae.likelihoods.base import Likelihood
from fastflow.vae.likelihoods.discrete import (
    BernoulliLikelihood,
    CategoricalLikelihood,
    ContinuousBernoulliLikelihood,
    NegativeBinomialLikelihood,
    PoissonLikelihood,
)
from fastflow.vae.likelihoods.gaussian import GaussianLikelihood, LaplaceLikelihood
from fastflow.vae.likelihoods.logistic import DiscretizedLogisticLikelihood, LogisticMixtureLikelihood

__all__ = ["BernoulliLikelihood", "CategoricalLikelihood", "ContinuousBernoulliLikelihood",
           "DiscretizedLogisticLikelihood", "GaussianLikelihood", "LaplaceLikelihood", "Likelihood",
           "LogisticMixtureLikelihood", "NegativeBinomialLikelihood", "PoissonLikelihood"]
