"""The spline coupling layer: part of the input bends the rest through monotonic splines."""

import math

import torch

from fastflow import functional
from fastflow.functional.spline import check_spline_constants
from fastflow.nn.coupling import Coupling

__all__ = ["SplineCoupling"]


class SplineCoupling(Coupling):
    """z keeps the passive part of x and sends each element of the rest through a monotonic spline of its own.

    x (B, C, *S) is split as by nn.AffineCoupling: along the channels, by their indices, in a checkerboard, or by a
    mask of zeros and ones (1 passive); ``flip`` exchanges the parts. Outside [-tail_bound, tail_bound] an element stays
    as it is; with circular tails it is an angle, which is wrapped into the interval, and without tails, None, it has
    left the domain, where the log-determinant is -inf. Passive elements stay as they are in any case.

    Args:
        conditioner: module, called with the passive part, and with the context as second argument if one is given;
            returns params as functional.spline takes them, (B, C_active * params_per_channel, *S), with a checkerboard
            or a mask (B, C * params_per_channel, *S).
        split, flip: see above.
        n_bins: K, bins of each spline.
        tail_bound, kind, tails, min_width, min_height, min_derivative, gain, clamp: as of functional.spline.
        periodic: the conditioner sees the passive part as angles of period 2*tail_bound, a = pi x/tail_bound: first
            cos a, then sin a of all channels, (B, 2*C_passive, *S), with a checkerboard or a mask (B, 2*C, *S).

    Attributes:
        params_per_channel: 3K - 1 for kind "rq", with circular tails 3K, without tails 3K + 1; K for "linear".

    Raises:
        ValueError: an unknown option, no bins, a mask with other values than 0 and 1; on a call, params of another
            shape and what functional.spline raises.

    References:
        Durkan et al., "Neural spline flows", 2019, arXiv:1906.04032.
        Rezende et al., "Normalizing flows on tori and spheres", 2020, arXiv:2002.02428.
    """

    def __init__(self, conditioner, *, split="channel", flip=False, n_bins=8, tail_bound=3.0, kind="rq", tails="linear",
                 min_width=1e-3, min_height=1e-3, min_derivative=1e-3, gain=1.0, clamp=None, periodic=False):
        super().__init__(conditioner, split, flip)
        self.n_bins, self.periodic = n_bins, bool(periodic)
        self.params_per_channel = functional.spline_params(kind, n_bins, tails)
        self.options = {"kind": kind, "tail_bound": tail_bound, "tails": tails, "min_width": min_width,
                        "min_height": min_height, "min_derivative": min_derivative, "gain": gain, "clamp": clamp}
        check_spline_constants(n_bins, **self.options)

    def extra_repr(self):
        options = ", ".join(f"{name}={self.options[name]!r}" for name in ("kind", "tail_bound", "tails"))
        return (f"split={self.split!r}, flip={self.flip}, n_bins={self.n_bins}, {options}"
                f"{', periodic=True' if self.periodic else ''}")

    def identity_params(self):
        """(params_per_channel,) raw parameters of one channel for which the spline is the identity.

        Raises:
            ValueError: min_derivative is 1 or more, which the identity's slope does not pass.
        """
        params, least, clamp = torch.zeros(self.params_per_channel), *map(self.options.get, ("min_derivative", "clamp"))
        if self.options["kind"] == "rq":
            if least >= 1.0:
                raise ValueError(f"min_derivative: expected less than 1, the identity's slope, got {least}")
            log = math.log1p(-least)
            params[2 * self.n_bins:] = math.log(math.expm1(1.0 - least)) if clamp is None else log / (1 + log / clamp)
        return params

    def _encode(self, seen):
        if not self.periodic:
            return seen
        angle = seen * (math.pi / self.options["tail_bound"])
        return torch.cat([torch.cos(angle), torch.sin(angle)], 1)

    def _elementwise(self, x, params, inverse, logdet):
        return functional.spline(x, params, inverse=inverse, logdet=logdet, **self.options)
