"""From a conditioner's raw output to the scale of an affine coupling."""

import math
import numbers
import sys
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

__all__ = ["KINDS", "ScaleMap", "log_softplus", "softplus"]

KINDS = ("exp", "sigmoid", "tanh", "atan", "softplus", "rational", "additive")


def _check_number(name, value):
    """``value`` is a real number that is finite as a float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not -sys.float_info.max <= value <= sys.float_info.max:
        raise ValueError(f"{name}: expected a finite number, got {value!r}")


@dataclass(frozen=True)
class ScaleMap:
    """How a conditioner's raw output r becomes the scale s of an affine coupling.

    With u = gain*r + offset, log s is

    ========== =====================================
    exp        out_gain * u
    sigmoid    logsigmoid(u) + log(out_gain)
    tanh       clamp * out_gain * tanh(u / clamp)
    atan       clamp * out_gain * atan(u / clamp)
    softplus   log(softplus(u))
    rational   u / (1 + abs(u) / clamp)
    additive   0
    ========== =====================================

    Then ``eps`` is added to s and s is clamped to [hard_min, hard_max] (zero gradient outside, NaN kept). The shift is
    multiplied by ``shift_gain``. ``clamp=None`` means 1.

    Raises:
        ValueError: unknown ``kind``; ``clamp`` or (for sigmoid) ``out_gain`` not positive; ``eps`` negative or not
            finite; ``hard_min`` negative or above ``hard_max``; a parameter that is not finite.
        TypeError: a parameter that is not a number.
    """

    kind: str
    gain: float = 1.0
    offset: float = 0.0
    out_gain: float = 1.0
    clamp: float | None = None
    eps: float = 0.0
    hard_min: float | None = None
    hard_max: float | None = None
    shift_gain: float = 1.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            _check_number(field.name, value)
        if self.clamp is not None and self.clamp <= 0:
            raise ValueError(f"clamp: expected a positive number, got {self.clamp!r}")
        if self.kind == "sigmoid" and self.out_gain <= 0:
            raise ValueError(f"out_gain: expected a positive number for kind 'sigmoid', got {self.out_gain!r}")
        if self.eps < 0:
            raise ValueError(f"eps: expected a non-negative number, got {self.eps!r}")
        if self.hard_min is not None and self.hard_min < 0:
            raise ValueError(f"hard_min: expected a non-negative number (it bounds the scale s), got {self.hard_min!r}")
        if self.hard_max is not None and self.hard_max <= (self.hard_min or 0.0):
            raise ValueError(f"hard_max: expected a number above hard_min, got {self.hard_max!r}")
        # What kernels take: the kind's index and the constants, None spelt out.
        object.__setattr__(self, "scalars", (
            KINDS.index(self.kind), float(self.gain), float(self.offset), float(self.out_gain),
            1.0 if self.clamp is None else float(self.clamp), float(self.eps),
            -math.inf if self.hard_min is None else float(self.hard_min),
            math.inf if self.hard_max is None else float(self.hard_max), float(self.shift_gain)))

    @classmethod
    def of(cls, scale):
        """``scale`` itself if it is a ScaleMap, else the map of that name with its default constants."""
        if isinstance(scale, cls):
            return scale
        if isinstance(scale, str):
            if scale not in _NAMED:
                raise ValueError(f"scale: expected a ScaleMap or one of {', '.join(_NAMED)}, got {scale!r}")
            return _NAMED[scale]
        raise TypeError(f"scale: expected a ScaleMap or a name, got {type(scale).__name__}")

    @classmethod
    def from_scalars(cls, kind, gain, offset, out_gain, clamp, eps, hard_min, hard_max, shift_gain):
        """The map whose ``scalars`` these are."""
        return cls(KINDS[kind], gain, offset, out_gain, clamp, eps, None if hard_min == -math.inf else hard_min,
                   None if hard_max == math.inf else hard_max, shift_gain)

    @classmethod
    def glow(cls):
        """openai/glow, y0ast, chaiyujin (interleaved, shift first) and rosinality (chunked, scale first):
        (x + t) * sigmoid(r + 2); pass ``shift_first=True``."""
        return cls("sigmoid", offset=2.0)

    @classmethod
    def nflows(cls, general=False):
        """nflows AffineCouplingTransform: sigmoid(r + 2) + 1e-3, or with ``general`` clamp(softplus(r) + 1e-3, 0, 3);
        chunked, shift first."""
        if general:
            return cls("softplus", eps=1e-3, hard_min=0.0, hard_max=3.0)
        return cls("sigmoid", offset=2.0, eps=1e-3)

    @classmethod
    def normflows(cls, kind="exp"):
        """normflows AffineCoupling, noise to data, interleaved with the shift first: s is exp(r), for "sigmoid"
        1/sigmoid(r + 2) = 1 + exp(-r - 2), for "sigmoid_inv" sigmoid(r + 2)."""
        if kind == "exp":
            return cls("exp")
        if kind == "sigmoid":
            return cls("exp", gain=-1.0, offset=-2.0, eps=1.0)
        if kind == "sigmoid_inv":
            return cls("sigmoid", offset=2.0)
        raise ValueError(f"kind: expected 'exp', 'sigmoid' or 'sigmoid_inv', got {kind!r}")

    @classmethod
    def freia(cls, clamp=2.0, kind="all_in_one"):
        """FrEIA: "all_in_one" (AllInOneBlock) log s = clamp*tanh(0.1 r/clamp), shift 0.1 t; for the blocks of
        coupling_layers "atan" clamp*0.636*atan(r), "tanh" clamp*tanh(r), "sigmoid" clamp*(2 sigmoid(r) - 1)."""
        _check_number("clamp", clamp)
        if not clamp > 0:
            raise ValueError(f"clamp: expected a positive number, got {clamp!r}")
        name = kind.lower() if isinstance(kind, str) else kind
        if name == "all_in_one":
            return cls("tanh", gain=0.1, clamp=clamp, shift_gain=0.1)
        if name == "atan":
            return cls("atan", clamp=1.0, out_gain=0.636 * clamp)
        if name == "tanh":
            return cls("tanh", clamp=1.0, out_gain=clamp)
        if name == "sigmoid":  # 2 sigmoid(r) - 1 = tanh(r / 2)
            return cls("tanh", gain=0.5, clamp=1.0, out_gain=clamp)
        raise ValueError(f"kind: expected 'all_in_one', 'atan', 'tanh' or 'sigmoid', got {kind!r}")

    @classmethod
    def zuko(cls, slope=1e-3):
        """zuko MonotonicAffineTransform: log s = r / (1 + abs(r / log(slope)))."""
        _check_number("slope", slope)
        if not 0.0 < slope < 1.0:
            raise ValueError(f"slope: expected a number between 0 and 1, got {slope!r}")
        return cls("rational", clamp=-math.log(slope))

    @classmethod
    def jet(cls):
        """Jet: (x + t) * 2 sigmoid(r), chunked, shift first; pass ``shift_first=True``."""
        return cls("sigmoid", out_gain=2.0)

    @classmethod
    def tarflow(cls):
        """TarFlow: (x - mu) * exp(-alpha), chunked, scale first; pass ``shift_first=True``."""
        return cls("exp", gain=-1.0, shift_gain=-1.0)

    @classmethod
    def starflow(cls):
        """STARFlow: noise to data z * softplus(r + 0.5413) + mu; data to noise is its inverse, ``inverse=True``. The
        4*tanh(./4) soft clip of r and mu belongs to the conditioner."""
        return cls("softplus", offset=0.5413)

    @classmethod
    def waveglow(cls):
        """WaveGlow: x * exp(r) + t, chunked, shift first."""
        return cls("exp")

    def scale_and_log(self, r):
        """(s, log s) of a raw tensor r, log s from the pre-activation."""
        u = r if self.gain == 1.0 and self.offset == 0.0 else self.gain * r + self.offset
        clamp = 1.0 if self.clamp is None else self.clamp
        if self.kind == "exp":
            log_s = u if self.out_gain == 1.0 else self.out_gain * u
            s = torch.exp(log_s)
        elif self.kind == "sigmoid":
            s, log_s = torch.sigmoid(u), F.logsigmoid(u)
            if self.out_gain != 1.0:
                s, log_s = self.out_gain * s, log_s + math.log(self.out_gain)
        elif self.kind == "softplus":
            s, log_s = softplus(u), log_softplus(u)
        elif self.kind == "additive":
            s, log_s = torch.ones_like(u), torch.zeros_like(u)
        else:
            if self.kind == "tanh":
                log_s = clamp * self.out_gain * torch.tanh(u / clamp)
            elif self.kind == "atan":
                log_s = clamp * self.out_gain * torch.atan(u / clamp)
            else:
                log_s = u / (1.0 + u.abs() / clamp)
            s = torch.exp(log_s)
        if self.eps != 0.0:
            s = s + self.eps
            # log(exp(log_s) + eps) from its larger part on. torch.logaddexp's second gradient overflows, and that of a
            # softplus loses its digits where the smaller part is small.
            above = log_s - math.log(self.eps)
            high = above > 0.0
            larger, ratio = torch.where(high, log_s, math.log(self.eps)), torch.exp(torch.where(high, -above, above))
            log_s = larger + torch.log1p(ratio)
        # s >= 0 needs no bound of 0, nor one that its dtype can't reach, whose logarithms torch.clamp would refuse.
        if self.hard_min:
            s, log_s = s.clamp(min=self.hard_min), log_s.clamp(min=math.log(self.hard_min))
        if self.hard_max is not None and self.hard_max <= torch.finfo(s.dtype).max:
            s, log_s = s.clamp(max=self.hard_max), log_s.clamp(max=math.log(self.hard_max))
        return s, log_s


_NAMED = {
    "exp": ScaleMap("exp"),
    "sigmoid": ScaleMap("sigmoid", offset=2.0),
    "tanh": ScaleMap("tanh", clamp=1.0),
    "atan": ScaleMap("atan", clamp=1.0, out_gain=2.0 / math.pi),
    "softplus": ScaleMap("softplus", offset=0.5413),
    "rational": ScaleMap("rational", clamp=1.0),
    "additive": ScaleMap("additive"),
}


def softplus(u):
    """log(1 + exp(u)) without a threshold, so that float64 is exact above 20 too."""
    return 0.0 - F.logsigmoid(-u)  # a negation would underflow to -0.0, and 1/softplus to -Inf


def log_softplus(u):
    """log(log(1 + exp(u))), finite where softplus(u) underflows: u - exp(u)/2 for u < -20."""
    low = u < -20.0
    safe = torch.where(low, torch.zeros_like(u), u)
    tail = torch.where(low, u, torch.full_like(u, -20.0))
    return torch.where(low, tail - 0.5 * torch.exp(tail), torch.log(softplus(safe)))
