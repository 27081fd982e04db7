"""Posteriors made of a Gaussian and a flow behind it."""

import torch
from torch import nn

from fastflow import checks
from fastflow.flows import IAF, Compose, Inverse, Planar, RealNVP
from fastflow.flows.amortised import Amortised, vectors
from fastflow.flows.transform import check_transform
from fastflow.vae.likelihoods.base import promoted
from fastflow.vae.posteriors.closed import is_standard
from fastflow.vae.posteriors.gaussian import GaussianPosterior, check_z

__all__ = ["FlowPosterior", "HouseholderReflections"]


class FlowPosterior(nn.Module):
    """z = transform.inverse(z0, context) with z0 from a diagonal Gaussian: log q(z) = log q(z0) - log|det dz/dz0|.

    As in a Flow, the transform maps data (here z) to noise (here z0); sampling, which training does, is its inverse.
    The KL is left to Monte Carlo, except where the transform is ``orthogonal``: that leaves N(0, I) as it is, and with
    this prior the KL is the Gaussian's.

    Args:
        transform: any Transform over (B, D, *S).
        context_features: the encoder's output is (B, 2D + context_features), the last of which go to the transform as
            context, or 0; with them S must be empty.
        base: the GaussianPosterior of z0; None for the default one.

    ``iaf``, ``coupling``, ``planar`` and ``householder`` make the usual ones.

    References:
        Rezende and Mohamed, "Variational inference with normalizing flows", 2015, arXiv:1505.05770.
    """

    def __init__(self, transform, *, context_features=0, base=None):
        super().__init__()
        check_transform("transform", transform)
        context_features = checks.count("context_features", context_features)
        base = GaussianPosterior() if base is None else base
        if not isinstance(base, GaussianPosterior):
            raise TypeError(f"base: expected a GaussianPosterior, got {type(base).__name__}")
        self.transform = transform
        self.context_features = context_features
        self.base = base

    @classmethod
    def iaf(cls, features, n_layers=2, hidden=(64,), *, context_features=0, **options):
        """Inverse autoregressive layers: every sample in one pass.

        References:
            Kingma et al., "Improving variational inference with inverse autoregressive flow", 2016, arXiv:1606.04934.
        """
        flow = IAF(features, n_layers=n_layers, hidden=hidden, context_features=context_features or None, actnorm=False,
                   **options)
        return cls(flow.transform, context_features=context_features)

    @classmethod
    def coupling(cls, features, n_layers=4, hidden=(64,), *, context_features=0, **options):
        """Affine couplings that take turns on the halves of z."""
        flow = RealNVP(features, n_layers=n_layers, hidden=hidden, context_features=context_features or None, **options)
        return cls(flow.transform, context_features=context_features)

    @classmethod
    def planar(cls, features, n_layers=4, *, context_features=0, hidden=(64,)):
        """Planar layers, run in their closed direction."""
        layers = [Inverse(Planar(features, context_features=context_features or None, hidden=hidden))
                  for _ in range(n_layers)]
        return cls(Compose(*layers), context_features=context_features)

    @classmethod
    def householder(cls, features, n_reflections=None, *, context_features=0, hidden=(64,)):
        """Reflections, by default as many as features: a Gaussian with a full covariance; see
        :class:`HouseholderReflections`."""
        transform = HouseholderReflections(features, n_reflections, context_features=context_features or None,
                                           hidden=hidden)
        return cls(transform, context_features=context_features)

    def forward(self, params, prior=None, n_samples=1, *, eps=None, seed=None, generator=None):
        """As the other posteriors; eps is the Gaussian's noise."""
        params, context = self._split(params)
        z0, log_qz, kl = self.base(params, None, n_samples, eps=eps, seed=seed, generator=generator)
        z, logdet = self._run(self.transform.inverse, z0, context)
        closed = is_standard(prior) and getattr(self.transform, "orthogonal", False)
        return z, log_qz - logdet, kl if closed else None

    def n_params(self, features):
        return self.base.n_params(features) + self.context_features

    def packed(self, parts):
        """params of the Gaussian's mean and raw scale, each (B, D, *S), and of the context where there is one."""
        if not self.context_features or len(parts) == 2:
            return self.base.packed(parts)
        checks.tensor("context of the encoder output", parts[-1])
        return torch.cat([self.base.packed(parts[:-1]), parts[-1]], 1)

    def log_prob(self, params, z):
        """log q(z | x) (K, B) in nats of any z (K, B, D, *S), by the transform's other direction."""
        params, context = self._split(params)
        check_z(z, self.base.mean(params))
        z0, logdet = self._run(self.transform, z, context)
        return self.base.log_prob(params, z0) + logdet

    def mean(self, params):
        """What the flow makes of the Gaussian's mean, (B, D, *S): a central point, not the mean of z."""
        params, context = self._split(params)
        return self.transform.inverse(self.base.mean(params), context)[0]

    def _split(self, params):
        params = promoted(params, "params")
        if not self.context_features:
            return params, None
        if params.dim() != 2 or params.shape[1] <= self.context_features:
            raise ValueError(f"params: expected shape (B, 2D + {self.context_features}), got {tuple(params.shape)}")
        return params[:, :-self.context_features], params[:, -self.context_features:]

    def _run(self, function, z, context):
        lead = z.shape[:2]
        if context is not None:
            context = context.expand(lead[0], *context.shape).flatten(0, 1)
        z, logdet = function(z.flatten(0, 1), context)
        return z.unflatten(0, lead), logdet.unflatten(0, lead)


class HouseholderReflections(nn.Module):
    """z = H_1 ... H_n x with H_i = I - 2 v_i v_i'/|v_i|^2; log|det| = 0. The vectors may depend on a context.

    Args:
        features: D >= 1; x and z are (B, D).
        n_reflections: n; None for D.
        context_features: size of a context (B, context_features) of which the vectors are made, or None.
        hidden: sizes of the hidden layers of the network that makes them.

    References:
        Tomczak and Welling, "Improving variational auto-encoders using Householder flow", 2016, arXiv:1611.09630.
    """

    orthogonal = True

    def __init__(self, features, n_reflections=None, *, context_features=None, hidden=(64,)):
        super().__init__()
        count = features if n_reflections is None else n_reflections
        for name, value in (("features", features), ("n_reflections", count)):
            checks.count(name, value, 1)
        self.features = features
        self.vectors = Amortised([torch.randn(count, features)], context_features, hidden)

    def forward(self, x, context=None):
        """(z, logdet) of x (B, D)."""
        return self._reflect("x", x, context, reverse=True)

    def inverse(self, z, context=None):
        """(x, logdet) of z (B, D)."""
        return self._reflect("z", z, context, reverse=False)

    def _reflect(self, name, x, context, reverse):
        checks.tensor(name, x)
        vectors(name, x, self.features, self.vectors.start)
        found, = self.vectors(x, context)
        found = found / torch.linalg.vector_norm(found, dim=2, keepdim=True)
        for v in reversed(found.unbind(1)) if reverse else found.unbind(1):
            x = x - 2.0 * (x * v).sum(1, keepdim=True) * v
        return x, x.new_zeros(x.shape[0])
