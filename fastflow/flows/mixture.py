"""Distribution functions of logistic mixtures outside of couplings: learned for each element, or autoregressive."""

import torch
from torch import nn

from fastflow import checks
from fastflow.nn.logistic_mixture import check_mixture, logistic_mixture, mixture_params, mixture_start

__all__ = ["LogisticMixture", "MixtureTransformer"]


class LogisticMixture(nn.Module):
    """z = s*logit(F(x)) + t for every element of the event, with a mixture of logistics F, s and t of its own, learned.

    A flow of it alone over a logistic base is the product of the elements' mixtures. It starts near the identity.

    Args:
        event_shape: (C, *S), the shape of one x.
        n_components: K, logistics of each mixture.
        scale: ScaleMap of s or its name; not "additive".
        log_scale_bound: the log-scales of the components stay within +- this, softly.

    Raises:
        ValueError: an option does not fit; on a call, x of another shape.

    References:
        Ho et al., "Flow++", 2019, arXiv:1902.00275, section 3.2.
    """

    def __init__(self, event_shape, n_components=8, *, scale="tanh", log_scale_bound=7.0):
        super().__init__()
        self.event_shape = torch.Size([event_shape] if isinstance(event_shape, int) else event_shape)
        self.options = {"scale": check_mixture(n_components, scale, log_scale_bound),
                        "log_scale_bound": float(log_scale_bound)}
        self.n_components = n_components
        start = mixture_start(n_components).view(-1, *(1,) * (len(self.event_shape) - 1))
        start = start.repeat(self.event_shape[0], *self.event_shape[1:])
        self.params = nn.Parameter(start)  # (C*(3K + 2), *S)

    def forward(self, x, context=None):
        """(z, logdet) of x (B, C, *S); ``context`` is ignored."""
        return self._run("x", x, inverse=False)

    def inverse(self, z, context=None):
        """(x, logdet) of z."""
        return self._run("z", z, inverse=True)

    def extra_repr(self):
        return f"{tuple(self.event_shape)}, n_components={self.n_components}"

    def _run(self, name, x, inverse):
        checks.tensor(name, x)
        checks.events(name, x, self.event_shape)
        checks.goes_with(name, x, "params", self.params)
        return logistic_mixture(x, self.params.expand(x.shape[0], *self.params.shape), inverse=inverse, **self.options)


class MixtureTransformer:
    """z = s*logit(F(x; params)) + t of every feature, for autoregressive layers: see :class:`AffineTransformer`.

    Args:
        n_components: K, logistics of each mixture; 3K + 2 parameters per feature.
        scale: ScaleMap of s or its name; not "additive".
        log_scale_bound: the log-scales of the components stay within +- this, softly.
    """

    layout = "interleave"

    def __init__(self, n_components=8, *, scale="tanh", log_scale_bound=7.0):
        self.options = {"scale": check_mixture(n_components, scale, log_scale_bound),
                        "log_scale_bound": float(log_scale_bound)}
        self.n_components, self.params_per_feature = n_components, mixture_params(n_components)

    def start_params(self):
        """(params_per_feature,) raw parameters of one feature near the identity, for the bias of a network."""
        return mixture_start(self.n_components)

    def __call__(self, x, params):
        """(z, logdet) of x (B, C)."""
        return logistic_mixture(x, params, **self.options)

    def inverse(self, z, params):
        """(x, logdet) of z (B, C)."""
        return logistic_mixture(z, params, inverse=True, **self.options)

    def __repr__(self):
        return f"MixtureTransformer({self.n_components}, {', '.join(f'{k}={v!r}' for k, v in self.options.items())})"
