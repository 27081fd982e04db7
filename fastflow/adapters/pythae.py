"""pythae: the latent heads of its VAEs. Sample, KL divergence and log q(z | x) come from one kernel.

The noise is drawn as pythae draws it, so that results are the same under the same seed.
"""

import math

import torch
import torch.nn.functional as F
from pythae import models
from pythae.models.base.base_utils import ModelOutput

from fastflow.adapters.layers import fusable
from fastflow.adapters.swap import swap
from fastflow.autograd.gaussian import sample_kl


def _reconstruction(module, recon_x, x):
    """The batch's mean loss, nats; the shapes are those of pythae's loss_function."""
    if recon_x.shape != x.shape:
        recon_x, x = torch.broadcast_tensors(recon_x, x)
    # Backward of reduction="sum", with one number for all elements, takes longer than that of "none" does.
    if module.model_config.reconstruction_loss == "mse":
        return F.mse_loss(recon_x, x, reduction="none").sum() * 0.5 / len(x)
    return F.binary_cross_entropy(recon_x, x, reduction="none").sum() / len(x)


def _fit(module, fix):
    own = [name for name in ("forward", "loss_function", "_sample_gauss") if name in module.__dict__]
    return f"its {own[0]} is one of its own" if own else None


def _head(host):
    return swap(host, methods=("forward",), fit=_fit, opposite=lambda *call: None)


class _Head:
    """The forward pass up to what comes of sample and divergence."""

    def forward(self, inputs, **kwargs):
        x = inputs["data"]
        encoded = self.encoder(x)
        mean, logvar = encoded.embedding, encoded.log_covariance
        if mean.dim() != 2 or mean.shape != logvar.shape or not fusable(mean, logvar):
            return self._fastflow_original(inputs, encoded, **kwargs)
        return self._fastflow_latent(x, mean, logvar)

    def _fastflow_original(self, inputs, encoded, **kwargs):
        """pythae's own pass, given what the encoder has made already."""
        encoder = self.encoder
        self._modules["encoder"] = _Given(encoded)
        try:
            return super().forward(inputs, **kwargs)
        finally:
            self._modules["encoder"] = encoder

    def _fastflow_output(self, x, z, kl, beta=1.0):
        recon_x = self.decoder(z)["reconstruction"]
        recon_loss = _reconstruction(self, recon_x.reshape(len(x), -1), x.reshape(len(x), -1))
        reg_loss = kl.mean(0)
        return ModelOutput(recon_loss=recon_loss, reg_loss=reg_loss, loss=torch.add(recon_loss, reg_loss, alpha=beta),
                           recon_x=recon_x, z=z)


class _Given(torch.nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output


@_head(models.VAE)
class VAE(_Head, models.VAE):
    """z and its KL divergence to N(0, I)."""

    def _fastflow_latent(self, x, mean, logvar):
        z, kl = sample_kl(mean, logvar, torch.randn_like(logvar))
        return self._fastflow_output(x, z, kl)


@_head(models.BetaVAE)
class BetaVAE(_Head, models.BetaVAE):
    """z and its KL divergence to N(0, I), weighted by beta."""

    def _fastflow_latent(self, x, mean, logvar):
        z, kl = sample_kl(mean, logvar, torch.randn_like(logvar))
        return self._fastflow_output(x, z, kl, self.beta)


def _flow_latent(self, x, mean, logvar):
    z, _, logq = sample_kl(mean, logvar, torch.randn_like(logvar), True)
    zk, logdet = self._fastflow_flow(z)
    # pythae leaves log(2 pi) out of both densities.
    logq = logq + 0.5 * z.shape[1] * math.log(2 * math.pi)
    return self._fastflow_output(x, zk, logq + 0.5 * zk.square().sum(1) - logdet)


@_head(models.VAE_LinNF)
class VAE_LinNF(_Head, models.VAE_LinNF):
    """z and log q(z | x), then planar and radial flows."""

    _fastflow_latent = _flow_latent

    def _fastflow_flow(self, z):
        logdet = torch.zeros(len(z), device=z.device)  # in the default dtype even for float64 data, as pythae's is
        for layer in self.net:
            output = layer(z)
            z = output.out
            logdet += output.log_abs_det_jac
        return z, logdet


@_head(models.VAE_IAF)
class VAE_IAF(_Head, models.VAE_IAF):
    """z and log q(z | x), then an inverse autoregressive flow."""

    _fastflow_latent = _flow_latent

    def _fastflow_flow(self, z):
        output = self.iaf_flow.inverse(z)
        return output.out, output.log_abs_det_jac
