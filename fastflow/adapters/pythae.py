"""pythae: the latent heads of its VAEs. Sample, KL divergence and log q(z | x) come from one kernel.

The noise is drawn as pythae draws it, so that results are the same under the same seed.
"""

import math

import torch
import torch.nn.functional as F
from pythae import models
from pythae.models.base.base_utils import ModelOutput

from fastflow import functional
from fastflow.adapters import pythae_networks  # noqa: F401 - fills SWAPS
from fastflow.adapters.layers import fusable
from fastflow.adapters.swap import swap
from fastflow.autograd.gaussian import sample_kl
from fastflow.autograd.latent_head import sample_mean_kl


def _reconstruction(module, recon_x, x):
    """(the loss of every number, what it is multiplied with to be nats); the shapes are those of pythae's
    loss_function. Backward of PyTorch's own reduction takes longer than that of a sum of these does."""
    if recon_x.shape != x.shape:
        recon_x, x = torch.broadcast_tensors(recon_x, x)
    if module.model_config.reconstruction_loss == "mse":
        return F.mse_loss(recon_x, x, reduction="none"), 0.5
    return F.binary_cross_entropy(recon_x, x, reduction="none"), 1.0


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
        """pythae's own pass, given what the encoder has made already. Other threads may call the model meanwhile, so
        that another object stands in for it."""
        given = object.__new__(type(self))
        given.__dict__.update(self.__dict__, _modules={**self._modules, "encoder": lambda x: encoded})
        return super(_Head, given).forward(inputs, **kwargs)

    def _fastflow_output(self, x, z, reg_loss, beta=1.0):
        recon_x = self.decoder(z)["reconstruction"]
        losses, factor = _reconstruction(self, recon_x.reshape(len(x), -1), x.reshape(len(x), -1))
        recon_loss = losses.sum() * (factor / len(x))
        return ModelOutput(recon_loss=recon_loss, reg_loss=reg_loss, loss=torch.add(recon_loss, reg_loss, alpha=beta),
                           recon_x=recon_x, z=z)


@_head(models.VAE)
class VAE(_Head, models.VAE):
    """z and its KL divergence to N(0, I)."""

    def _fastflow_latent(self, x, mean, logvar):
        return self._fastflow_output(x, *sample_mean_kl(mean, logvar))


@_head(models.BetaVAE)
class BetaVAE(_Head, models.BetaVAE):
    """z and its KL divergence to N(0, I), weighted by beta."""

    def _fastflow_latent(self, x, mean, logvar):
        return self._fastflow_output(x, *sample_mean_kl(mean, logvar), self.beta)


@_head(models.IWAE)
class IWAE(_Head, models.IWAE):
    """Samples and their log q(z | x); mean and variance are not repeated for them, nor is x."""

    def _fastflow_latent(self, x, mean, logvar):
        count, (batch, features) = self.n_samples, mean.shape
        eps = torch.randn(batch, count, features, dtype=mean.dtype, device=mean.device).transpose(0, 1)
        z, _, logq = functional.gaussian_sample_kl((mean, logvar), eps=eps, n_samples=count, return_logq=True)
        z, logq = z.transpose(0, 1).contiguous(), _without_constant(logq.mT, features)
        recon_x = self.decoder(z.view(-1, features))["reconstruction"].reshape(batch, count, -1)
        losses, factor = _reconstruction(self, recon_x, x.reshape(batch, 1, -1))
        recon_loss = losses.sum(-1) * factor
        kl = logq + 0.5 * z.square().sum(-1)
        log_w = -(recon_loss + kl)
        loss = -(log_w.detach().softmax(1) * log_w).sum(1)
        return ModelOutput(recon_loss=recon_loss.mean(), reg_loss=kl.mean(), loss=loss.mean(),
                           recon_x=recon_x[:, 0].reshape_as(x), z=z[:, 0])


def _without_constant(logq, features):
    """pythae leaves log(2 pi) out of its densities."""
    return logq + 0.5 * features * math.log(2 * math.pi)


def _flow_latent(self, x, mean, logvar):
    z, _, logq = sample_kl(mean, logvar, torch.randn_like(logvar), True)
    zk, logdet = self._fastflow_flow(z)
    kl = _without_constant(logq, z.shape[1]) + 0.5 * zk.square().sum(1) - logdet
    return self._fastflow_output(x, zk, kl.mean(0))


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
