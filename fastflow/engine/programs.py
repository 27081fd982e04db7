"""What an exported graph computes: a function of a model, of tensors alone, noise among them."""

import torch
from torch import nn

from fastflow import checks
from fastflow.engine.labels import classes_of
from fastflow.vae import VAE, DiscreteVAE, HamiltonianVAE, HierarchicalVAE, QuantizedVAE

__all__ = ["FUNCTIONS", "default_function", "program"]

FUNCTIONS = ("log_prob", "elbo", "encode", "decode")
KINDS = (VAE, DiscreteVAE, HierarchicalVAE, QuantizedVAE)


def default_function(model):
    """"elbo" for a VAE, "log_prob" for a flow.

    Raises:
        ValueError: the model is neither.
    """
    if isinstance(model, KINDS):
        return "elbo"
    if callable(getattr(model, "log_prob", None)):
        return "log_prob"
    raise ValueError(f"model: expected one with log_prob or a VAE, got {type(model).__name__}; use safetensors")


def program(model, function, n_samples=1, example=None, context=None):
    """(module, {name: example}): a module that computes the function of tensors alone, and its inputs in their order,
    whose batch dimension of 2 may be any other.

    ======== ============== ========================================================================================
    function of             gives
    ======== ============== ========================================================================================
    log_prob x              log p(x) (B,) of a flow, nats
    elbo     x, noise       {"elbo", "rate", "distortion": (B,), "log_w": (K, B)} of a VAE, nats; without noise where
                            latents are quantised
    encode   x              a Gaussian posterior's {"mean", "log_sigma"}; {"probs"} of bits and classes; {"codes"};
                            {"latents"}, a list, at the posteriors' means for a hierarchy
    decode   latents        the likelihood's mean (B, *event); of what encode gives as mean, codes, latents, or of bits
    ======== ============== ========================================================================================

    Of a model that is conditioned on something each function takes that, the context (B, ...), after the others: the
    ELBO is that on log p(x | context), in a SemiSupervisedVAE given the label.

    The noise is standard normal, (K, B, D, *S), of a LowRankGaussianPosterior (K, B, D + rank) and of a
    MixturePosterior (K, B, D + 1), a list for the levels of a hierarchy from the top down; for bits and classes uniform
    on (0, 1), (K, B, D, *S) or (K, B, D, *S, C).

    Args:
        function: one of FUNCTIONS.
        n_samples: K, fixed in the graph.
        example: x (2, *event), None to draw from the model.
        context: for 2 examples, or None: labels for a model that is conditioned on them, for others none.

    Raises:
        ValueError: the model has no such function or none that a graph can hold, or takes no context.
    """
    if function not in FUNCTIONS:
        raise ValueError(f"function: expected one of {', '.join(FUNCTIONS)}, got {function!r}")
    if context is None and (n_classes := classes_of(model)):
        context = torch.arange(2, device=next(model.parameters()).device) % n_classes
    given = {} if context is None else {"context": context}
    if function == "log_prob":
        if not callable(getattr(model, "log_prob", None)):
            raise ValueError(f"function: {type(model).__name__} has no log_prob; use elbo, encode or decode")
        return model, {"x": _example(model, example, context), **given}
    kind = next((kind for kind in KINDS if isinstance(model, kind)), None)
    if kind is None or type(model).elbo is not kind.elbo or (function == "encode" and kind is VAE
                                                            and not hasattr(model.posterior, "moments")):
        raise ValueError(f"function: {function} of a {type(model).__name__} can't be exported; use safetensors")
    if function == "elbo" and isinstance(model, HamiltonianVAE):
        raise ValueError("function: elbo of a HamiltonianVAE can't be exported, because the forces on its z are "
                         "gradients, which no graph traces; use encode, decode or safetensors")
    if given and kind is not VAE:
        raise ValueError(f"context: a {type(model).__name__} takes none")
    n_samples = checks.count("n_samples", n_samples, 1)
    x = _example(model, example, context)
    if function == "elbo":
        noise = _noise(model, x, n_samples, given)
        return _ELBO(model), {"x": x, **({} if noise is None else {"noise": noise}), **given}
    if function == "encode":
        return _Encode(model), {"x": x, **given}
    return _Decode(model), {"latents": _latents(model, x, given), **given}


def _example(model, example, context):
    if example is not None:
        return example
    return model.sample(2) if context is None else model.sample(1, context)[0]


def _noise(model, x, n_samples, given):
    """The noise of n_samples draws for each x, None for quantised latents."""
    if isinstance(model, QuantizedVAE):
        return None
    if isinstance(model, DiscreteVAE):
        return model.posterior(x).noise(n_samples)
    if isinstance(model, HierarchicalVAE):
        return [torch.randn(n_samples, *z.shape, dtype=z.dtype, device=z.device) for z in model.latent_kl(x)]
    z = model.infer(x, n_samples, **given).z
    more = getattr(model.posterior, "more_noise", 0)
    return torch.randn(*z.shape[:2], z.shape[2] + more, *z.shape[3:], dtype=z.dtype, device=z.device)


def _latents(model, x, given):
    """What decode takes, for each x."""
    if isinstance(model, DiscreteVAE):
        return model.posterior(x).mode()
    return model.codes(x) if isinstance(model, QuantizedVAE) else model.encode(x, **given)


class _Function(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model


class _ELBO(_Function):
    def forward(self, x, noise=None, context=None):
        model, given = self.model, {} if context is None else {"context": context}
        if isinstance(model, DiscreteVAE):
            return self._discrete(x, noise)
        if noise is None:
            bound = model.elbo(x)
        else:
            n_samples = (noise[0] if isinstance(noise, (list, tuple)) else noise).shape[0]
            bound = model.elbo(x, n_samples, eps=noise, **given)
        return {name: getattr(bound, name) for name in ("elbo", "rate", "distortion", "log_w")}

    def _discrete(self, x, noise):
        """DiscreteVAE.elbo without gradients, at the samples that the noise makes."""
        q, p = self.model.posterior(x), self.model.prior()
        z = q.harden(q.perturb(noise))
        log_px_z, rate = self.model.log_likelihood(x, z), self.model.kl_at(q, z)
        distortion = -log_px_z.mean(0)
        return {"elbo": -distortion - rate, "rate": rate, "distortion": distortion,
                "log_w": log_px_z + p.log_prob(z) - q.log_prob(z)}


class _Encode(_Function):
    def forward(self, x, context=None):
        model = self.model
        if isinstance(model, DiscreteVAE):
            return {"probs": model.posterior(x).probs}
        if isinstance(model, QuantizedVAE):
            return {"codes": model.codes(x)}
        if isinstance(model, HierarchicalVAE):
            return {"latents": model.encode(x)}
        mean, log_sigma = model.posterior.moments(model._encoded(x, context))
        return {"mean": mean, "log_sigma": log_sigma}


class _Decode(_Function):
    def forward(self, latents, context=None):
        given = {} if context is None else {"context": context}
        return self.model.likelihood.mean(self.model.decode(latents, **given))
