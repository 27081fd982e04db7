"""What a step minimises, in nats per example, and what an evaluation reports."""

import contextlib
import inspect
import math

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastflow import checks
from fastflow.engine.buffers import Buffers
from fastflow.engine.distributed import is_sharded, unwrap
from fastflow.engine.pictures import levels
from fastflow.flows import bits_per_dim, dequantize
from fastflow.flows.labels import check_levels
from fastflow.vae import (
    ELBO,
    VAE,
    BernoulliLikelihood,
    ContinuousBernoulliLikelihood,
    HierarchicalVAE,
    LossTerms,
    Schedule,
    iwae,
)
from fastflow.vae import Objective as VAEObjective
from fastflow.vae.integers import INDICES, embeds

__all__ = ["NegativeELBO", "NegativeLogLikelihood", "levels_of", "objective_for", "record_latent_shape"]


def objective_for(model, *, n_bins=256, n_samples=1, beta=1.0):
    """The objective that suits the model: the negative ELBO if it has ``elbo``, the negative log-likelihood if it has
    ``log_prob``; otherwise a TypeError."""
    inner = unwrap(model)
    if callable(getattr(inner, "elbo", None)):
        return NegativeELBO(n_bins, n_samples, beta)
    if callable(getattr(inner, "log_prob", None)):
        return NegativeLogLikelihood(n_bins)
    raise TypeError(f"model: expected a Flow (with log_prob) or a VAE (with elbo), got {type(inner).__name__}")


class Objective:
    """The mean over the batch of a negative log-likelihood or of a bound on it, in nats.

    For integer images the likelihood is that of the integers: uniform dequantisation bounds it from below, and the
    constant D*log(n_bins) that the change of units costs is counted.
    """

    def __init__(self, n_bins):
        self.n_bins = checks.count("n_bins", n_bins, 2)
        self._embedding = None, False  # the last model, and whether its encoder embeds integers

    def draws(self, model):
        """How many samples of the latents a report takes for each x; 1 where there are none."""
        return 1

    def look(self, model, x, context=None):
        """Finds out what :meth:`prepare` can't inside a graph: whether the model's encoder embeds the integers of x."""
        inner = unwrap(model)
        if self._embedding[0] is not inner and isinstance(x, torch.Tensor) and not x.is_floating_point() \
                and getattr(getattr(inner, "likelihood", None), "takes_integers", False):
            self._embedding = inner, embeds(getattr(inner, "encoder", None), x, _dtype(inner), context)

    def prepare(self, model, x):
        """(x, constant in nats): integer images dequantised to x/n_bins - 0.5 + U/n_bins; for a likelihood of integers
        the same numbers, as floats if the encoder does not embed them; for the bits of a Bernoulli one scaled to
        [0, 1], for a continuous Bernoulli one dequantised to [0, 1]; floating x as it is, as are the integers of a
        model of integers and of a flow that dequantises them itself.

        Raises:
            TypeError: x is no real tensor, or holds integers other than images for a likelihood that does not say
                whether it takes them.
        """
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
        if x.is_floating_point():
            return x, 0.0
        if x.dtype == torch.bool or x.is_complex():
            raise TypeError(f"x: expected a floating or integer dtype, got {x.dtype}")
        inner = unwrap(model)
        if getattr(inner, "dequantizer", None) is not None:
            inner.check_bins(self.n_bins)
            return x, 0.0
        if getattr(inner, "takes_integers", False):
            return x, 0.0
        dtype, likelihood = _dtype(inner), getattr(inner, "likelihood", None)
        if hasattr(likelihood, "log_prob") and not hasattr(likelihood, "takes_integers") and not _are_images(x):
            raise TypeError(f"x: expected a floating dtype for a {type(likelihood).__name__}, which does not say "
                            "whether its x are integers (takes_integers = True: taken as they are) or real numbers "
                            f"(False: integer images are dequantised), got {x.dtype}")
        if getattr(likelihood, "takes_integers", False):
            known, found = self._embedding
            if not (found if known is inner else embeds(getattr(inner, "encoder", None), x, dtype)):
                return x.to(dtype), 0.0
            return x if x.dtype in INDICES else x.to(torch.int64), 0.0
        check_levels("x", x, self.n_bins)
        if isinstance(likelihood, BernoulliLikelihood):
            return x.to(dtype) / (self.n_bins - 1), 0.0
        shift = 0.5 if isinstance(likelihood, ContinuousBernoulliLikelihood) else 0.0
        return dequantize(x, self.n_bins, dtype=dtype) + shift, x[0].numel() * math.log(self.n_bins)


def _are_images(x):
    """Whether integers are images rather than counts or classes: bytes, or of shape (B, C, H, W)."""
    return x.dtype == torch.uint8 or x.dim() == 4


def _dtype(model):
    """The dtype in which the model takes numbers, float32 at least."""
    parameter = next(model.parameters(), None)
    return torch.float64 if parameter is not None and parameter.dtype == torch.float64 else torch.float32


def levels_of(model, x, n_bins):
    """Integer levels, uint8, of what the model generates: the way back from :meth:`Objective.prepare`."""
    likelihood = getattr(unwrap(model), "likelihood", None)
    if getattr(likelihood, "takes_integers", False):
        return levels((x.float() + 0.5) / n_bins - 0.5, n_bins)
    if isinstance(likelihood, BernoulliLikelihood):
        return levels((x.float() * (n_bins - 1) + 0.5) / n_bins - 0.5, n_bins)
    return levels(x - 0.5 if isinstance(likelihood, ContinuousBernoulliLikelihood) else x, n_bins)


def record_latent_shape(model, objective, x, context=None):
    """Tells a VAE that is to be compiled the shape of its z, which eager training sees by itself: from an encoder run
    on no data, which leaves random numbers alone. What can't run so is left to VAE(latent_shape=)."""
    inner = unwrap(model)
    if not isinstance(inner, VAE) or inner.latent_shape is not None or is_sharded(model):
        return
    buffers = Buffers(inner)
    with contextlib.suppress(Exception), FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
        x, context = (t if t is None else fake.from_tensor(t, static_shapes=True) for t in (x, context))
        inner.latent_shape = torch.Size(inner.encode(objective.prepare(inner, x)[0], context).shape[1:])
    buffers.put_back()  # a counter of batches is counted even so


class NegativeLogLikelihood(Objective):
    """-log p(x), the loss of a flow."""

    name = "negative log-likelihood"

    def __call__(self, model, x, context=None, targets=None):
        """(loss, parts): 0-d tensors; parts is empty."""
        x, constant = self.prepare(model, x)
        return constant - self._log_prob(model, x, context, targets).mean(), {}

    def report(self, model, x, context=None, targets=None):
        """{name: (B,) tensor} over a batch of integer images: bits_per_dim; over one of real numbers: log_prob, in nats
        and in the units of x."""
        if x.is_floating_point():
            return {"log_prob": self._log_prob(model, x, context, targets)}
        x, constant = self.prepare(model, x)
        log_prob = self._log_prob(model, x, context, targets)
        if not x.is_floating_point():
            return {"bits_per_dim": (constant - log_prob) / (x[0].numel() * math.log(2.0))}
        return {"bits_per_dim": bits_per_dim(log_prob, x[0].numel(), self.n_bins)}

    def _log_prob(self, model, x, context, targets):
        if targets is not None:
            raise ValueError(f"targets: a {type(unwrap(model)).__name__} takes none")
        return model(x) if context is None else model(x, context)


class NegativeELBO(Objective):
    """distortion + beta*rate, the loss of a VAE; of one with an objective of its own, minus that objective's value."""

    name = "negative ELBO"

    def __init__(self, n_bins, n_samples=1, beta=1.0):
        super().__init__(n_bins)
        self.n_samples = checks.count("n_samples", n_samples, 1)
        follows = isinstance(beta, Schedule) or (isinstance(beta, torch.Tensor) and beta.ndim == 0)
        if not follows:
            checks.number("beta", beta)
        if not follows and not (math.isfinite(beta) and beta >= 0):
            raise ValueError(f"beta: expected a finite number, not negative, got {beta!r}")
        self.beta = beta
        self._asked = None, {}  # the last model, and what its forward is asked for

    def __call__(self, model, x, context=None, targets=None):
        """(loss, parts): 0-d tensors; parts holds the mean rate and distortion, and what the objective adds."""
        self.look(model, x, context)
        x, constant = self.prepare(model, x)
        beta = self.beta.value if isinstance(self.beta, Schedule) else self.beta
        bound = model(x, n_samples=self.n_samples, beta=beta, **self._asks(model),
                      **_given(model, context=context, targets=targets))
        terms = bound.bound if isinstance(bound, VAEObjective) else bound  # not every Dynamo traces its properties
        rate, distortion = terms.rate.mean(), terms.distortion.mean()
        distortion = distortion + constant if constant else distortion
        if isinstance(bound, LossTerms):
            # A tensor's value is the device's: asking for it would end a graph.
            weighed = bound.beta * rate if isinstance(bound.beta, torch.Tensor) or bound.beta != 1.0 else rate
            loss = distortion + weighed
            return loss, {"rate": rate.detach(), "distortion": distortion.detach()}
        if isinstance(bound, ELBO):  # of which not every Dynamo traces a look for ``parts``
            value, further = bound.elbo, {}
        else:
            value = bound.value if hasattr(bound, "value") else bound.elbo
            further = getattr(bound, "parts", {})
        return constant - value.mean(), {"rate": rate.detach(), "distortion": distortion.detach(), **further}

    def _asks(self, model):
        """What the model's forward is asked for, beyond the ELBO's arguments."""
        if self._asked[0] is model:
            return self._asked[1]
        inner = unwrap(model)
        asks = {"loss_only": True} if type(inner).forward is VAE.forward and "forward" not in vars(inner) else {}
        if not torch.compiler.is_compiling():  # what a graph changes, it is compiled anew for
            self._asked = model, asks
        return asks

    def draws(self, model):
        """Its own number, or where that is 1 the number that the model's objective has."""
        return getattr(getattr(unwrap(model), "objective", None), "n_samples", 1) if self.n_samples == 1 \
            else self.n_samples

    def report(self, model, x, context=None, targets=None):
        """{name: (B,) tensor} over a batch of integer images, the ELBO unweighted whatever is trained; with K > 1
        samples of the latents also "iwae_K", the importance-weighted bound of them."""
        self.look(model, x, context)
        x, constant = self.prepare(model, x)
        asks = {"bound_only": True} if type(unwrap(model)).forward in (VAE.forward, HierarchicalVAE.forward) else {}
        bound = model(x, n_samples=self.draws(model), beta=1.0, **asks,
                      **_given(model, context=context, targets=targets))
        elbo = -bound.distortion - bound.rate - constant
        found = {"elbo": elbo, "rate": bound.rate, "distortion": bound.distortion + constant,
                 "bits_per_dim": -elbo / (x[0].numel() * math.log(2))}
        log_w = getattr(bound, "bound", bound).log_w
        if len(log_w) > 1:
            found[f"iwae_{len(log_w)}"] = iwae(log_w) - constant
        return found


def _given(model, **values):
    """Those of the values that are not None, as keywords for a model whose forward takes them."""
    given = {name: value for name, value in values.items() if value is not None}
    if given:
        known = inspect.signature(unwrap(model).forward).parameters
        for name in given:
            if name not in known:
                raise ValueError(f"{name}: a {type(unwrap(model)).__name__} takes none")
    return given
