"""The coupling layer of Flow++: part of the input sends the rest through distribution functions of mixtures."""

from fastflow.nn.coupling import Coupling
from fastflow.nn.logistic_mixture import check_mixture, logistic_mixture, mixture_params, mixture_start

__all__ = ["MixtureCoupling"]


class MixtureCoupling(Coupling):
    """z keeps the passive part of x and sends each element of the rest through s*logit(F(x)) + t, F the distribution
    function of a mixture of logistics of its own.

    x (B, C, *S) is split as by nn.AffineCoupling: along the channels, by their indices, in a checkerboard, or by a mask
    of zeros and ones (1 passive); ``flip`` exchanges the parts.

    Args:
        conditioner: module, called with the passive part, and with the context as second argument if one is given;
            returns params (B, C_active * params_per_channel, *S), with a checkerboard or a mask
            (B, C * params_per_channel, *S): those of a channel lie side by side, K logits, K means, K log-scales, the
            raw scale and the shift.
        split, flip: see above.
        n_components: K, components of each mixture.
        scale: ScaleMap of s or its name; not "additive".
        log_scale_bound: the log-scales of the components stay within +- this, softly.

    Attributes:
        params_per_channel: 3K + 2.

    Raises:
        ValueError: an option does not fit; on a call, params of another shape.

    References:
        Ho et al., "Flow++: improving flow-based generative models with variational dequantization and architecture
        design", 2019, arXiv:1902.00275.
    """

    def __init__(self, conditioner, *, split="channel", flip=False, n_components=8, scale="tanh", log_scale_bound=7.0):
        super().__init__(conditioner, split, flip)
        self.scale = check_mixture(n_components, scale, log_scale_bound)
        self.n_components, self.log_scale_bound = n_components, float(log_scale_bound)
        self.params_per_channel = mixture_params(n_components)

    def start_params(self):
        """(params_per_channel,) raw parameters of one channel near the identity, for the bias of a conditioner."""
        return mixture_start(self.n_components)

    def extra_repr(self):
        return f"split={self.split!r}, flip={self.flip}, n_components={self.n_components}, scale={self.scale}"

    def _elementwise(self, x, params, inverse, logdet):
        return logistic_mixture(x, params, scale=self.scale, log_scale_bound=self.log_scale_bound, inverse=inverse,
                                logdet=logdet)
