"""diffusers: the posterior that AutoencoderKL and its heirs for video encode to. Sample and KL divergence come from one
kernel.

diffusers' own ways stay: log-variances are clamped to [-30, 20], with no gradient outside; noise comes from one
generator, one for each sample, or a CPU's; and ``kl`` and ``nll`` of video (B, C, T, H, W) sum over C, T and H, so that
they have shape (B, W). With ``fix=True`` they sum over all but the batch, whatever the shape, unless ``nll`` is given
other dims.

A swapped model says that it is of the module of diffusers' class, by which a saved pipeline goes.
"""

import torch
from diffusers.models import autoencoders
from diffusers.models.autoencoders import vae
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from fastflow import functional
from fastflow.adapters import swap as swaps
from fastflow.adapters import verify
from fastflow.adapters.layers import fusable, worthwhile
from fastflow.adapters.swap import PREFIX, swap

NAMES = ("AsymmetricAutoencoderKL", "AutoencoderKL", "AutoencoderKLAllegro", "AutoencoderKLCogVideoX",
         "AutoencoderKLFlux2", "AutoencoderKLHunyuanImage", "AutoencoderKLHunyuanImageRefiner",
         "AutoencoderKLHunyuanVideo", "AutoencoderKLHunyuanVideo15", "AutoencoderKLKVAE", "AutoencoderKLKVAEVideo",
         "AutoencoderKLLTX2Video", "AutoencoderKLLTXVideo", "AutoencoderKLMagvit", "AutoencoderKLMiniMaxH3",
         "AutoencoderKLMochi", "AutoencoderKLQwenImage", "AutoencoderKLQwenImage21", "AutoencoderKLTemporalDecoder",
         "AutoencoderKLWan", "AutoencoderVidTok", "ConsistencyDecoderVAE", "Kandinsky6SRVAE")


class Posterior(vae.DiagonalGaussianDistribution):
    """diffusers' distribution, of which ``sample`` also computes the divergence to N(0, I) that ``kl`` then returns."""

    _fastflow_fix, _fastflow_kl = False, None

    def sample(self, generator=None):
        self._fastflow_kl = None
        if self.deterministic or not fusable(self.mean, self.logvar) or not worthwhile(self.mean):
            return super().sample(generator)
        eps = randn_tensor(self.mean.shape, generator=generator, device=self.parameters.device,
                           dtype=self.parameters.dtype)
        per_sample = self.mean.dim() == 4 or self._fastflow_fix
        z, kl = functional.gaussian_sample_kl((self.mean, self.logvar), eps=eps,
                                              reduce="sample" if per_sample else "none")
        self._fastflow_kl = kl if per_sample else kl.sum((1, 2, 3)), self.mean, self.var, self.logvar
        return z

    def kl(self, other=None):
        known = self._fastflow_known() if other is None else None
        if known is not None and not torch.is_grad_enabled():
            return known.detach()
        if known is not None and (known.requires_grad or not self.parameters.requires_grad):
            return known
        if not self._fastflow_fix or self.deterministic:
            return super().kl(other)
        d = self.logvar if other is None else self.logvar - other.logvar
        distance = self.mean.square() if other is None else (self.mean - other.mean).square() / other.var
        return 0.5 * (distance + torch.expm1(d) - d).flatten(1).sum(1)

    def _fastflow_known(self):
        """The divergence that ``sample`` left, None where there is none or the moments are others by now."""
        if self._fastflow_kl is None:
            return None
        known, mean, var, logvar = self._fastflow_kl
        return known if self.mean is mean and self.var is var and self.logvar is logvar else None

    def nll(self, sample, dims=(1, 2, 3)):
        if self._fastflow_fix and tuple(dims) == (1, 2, 3):
            dims = tuple(range(1, self.mean.dim()))
        return super().nll(sample, dims)


class _Moments(nn.Module):
    """The step from the encoder's output to the posterior, which is what verification runs."""

    def forward(self, parameters):
        return vae.DiagonalGaussianDistribution(parameters)


class _FusedMoments(_Moments):
    def forward(self, parameters):
        return _fused(super().forward(parameters), False)


def _observe(module, posterior, args):
    z, kl = posterior.sample(), posterior.kl() if posterior.mean.dim() > 3 else posterior.var
    return [posterior.mean, posterior.std, z, kl]


_MOMENTS = _FusedMoments._fastflow_swap = swaps.Swap(_Moments, _FusedMoments, _FusedMoments, lambda module, fix: None,
                                                    lambda *call: None, _observe)


def _fused(posterior, fix):
    if type(posterior) is vae.DiagonalGaussianDistribution:
        posterior.__class__ = Posterior
        posterior._fastflow_fix = fix
    return posterior


def _posterior(output):
    return output[0]


def _verifying(fused, name):
    def encode(self, *args, **kwargs):
        output = fused.encode(self, *args, **kwargs)
        posterior = _posterior(output)
        if isinstance(self, fused.Checked) and not torch.compiler.is_compiling():
            reason = verify.difference(_FusedMoments(), _MOMENTS, "forward", (posterior.parameters,), {})
            swaps.settle(self, reason)
            if isinstance(reason, str):
                posterior.__class__ = vae.DiagonalGaussianDistribution
        return output
    return encode


class _Autoencoder:
    """The posterior of the host's encoder is a :class:`Posterior`."""

    _fastflow_fix = False  # of models that the class made itself, as from_config does

    def encode(self, *args, **kwargs):
        output = super().encode(*args, **kwargs)
        _fused(_posterior(output), self._fastflow_fix)
        return output


def _fit(module, fix):
    if getattr(module, "regularizer", "kl") != "kl":
        return "its latents are codes, not Gaussian"
    if "encode" in module.__dict__:
        return "its encode is another function than its class's"
    host = next(kind for kind in type(module).__mro__ if kind in swaps.SWAPS)
    return {PREFIX + "fix": fix, "__module__": host.__module__}


for _host in filter(None, (getattr(autoencoders, name, None) for name in NAMES)):
    _body = {"__module__": __name__, "__doc__": _Autoencoder.__doc__}
    globals()[_host.__name__] = swap(_host, methods=("encode",), fit=_fit, verifying=_verifying)(
        type(_host.__name__, (_Autoencoder, _host), _body))
