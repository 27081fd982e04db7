"""How a weight such as beta, or a capacity, moves over training."""

import math

import torch

from fastflow import checks

__all__ = ["CosineSchedule", "CyclicalSchedule", "LinearSchedule", "Schedule", "SigmoidSchedule"]


class Schedule:
    """A number that depends on how many steps, or epochs, have passed.

    Call :meth:`step` after every training step and :meth:`epoch` after every epoch, or :meth:`seek` before one; what is
    not in the schedule's unit changes nothing. ``value`` is the number now; ``at(t)`` the number at any t.
    ``TrainStep(beta=)`` and :class:`~fastflow.vae.Capacity` take a schedule and go by its value.

    Args:
        start, end: before and after the change.
        length: how many steps (epochs) the change takes, positive.
        begin: how many pass before it begins.
        unit: "step" or "epoch".
    """

    def __init__(self, start=0.0, end=1.0, length=1, *, begin=0, unit="step"):
        for name, value in (("start", start), ("end", end), ("length", length), ("begin", begin)):
            checks.number(name, value)
        if not (math.isfinite(start) and math.isfinite(end)):
            raise ValueError(f"start, end: expected finite numbers, got {start!r}, {end!r}")
        if not 0 < length < math.inf:
            raise ValueError(f"length: expected a positive number, got {length!r}")
        if not 0 <= begin < math.inf:
            raise ValueError(f"begin: expected a number >= 0, got {begin!r}")
        checks.choice("unit", unit, ("step", "epoch"))
        self.start, self.end, self.length, self.begin, self.unit = float(start), float(end), length, begin, unit
        self.count = 0
        self._tensors = {}

    def __repr__(self):
        return (f"{type(self).__name__}({self.start:g} to {self.end:g} in {self.length} {self.unit}s, "
                f"now {self.value:g} at {self.count})")

    def fraction(self, progress):
        """Share of the way from start to end, after ``progress`` in [0, 1] of the length."""
        raise NotImplementedError

    def at(self, t):
        """The number after t steps (epochs)."""
        fraction = self.fraction(min(max((t - self.begin) / self.length, 0.0), 1.0))
        # Exact at both ends.
        return self.end if fraction == 1.0 else self.start + (self.end - self.start) * fraction

    @property
    def value(self):
        return self.at(self.count)

    def __float__(self):
        return self.value

    def step(self, n=1):
        """n training steps have passed."""
        self._advance("step", n)

    def epoch(self, n=1):
        """n epochs have passed."""
        self._advance("epoch", n)

    def seek(self, steps, epochs):
        """So many training steps and epochs have passed."""
        steps, epochs = checks.count("steps", steps), checks.count("epochs", epochs)
        self.count = {"step": steps, "epoch": epochs}[self.unit]
        self._follow()

    def tensor(self, device=None, dtype=torch.float32):
        """A 0-d tensor that follows ``value`` from now on, in place, the same for a device and dtype: for compiled or
        captured steps, which would take a number for a constant."""
        key = str(device), dtype
        if key not in self._tensors:
            self._tensors[key] = torch.tensor(self.value, device=device, dtype=dtype)
        return self._tensors[key]

    def state_dict(self):
        """{"count": steps or epochs so far}."""
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = checks.count("count", state["count"])
        self._follow()

    def _advance(self, unit, n):
        n = checks.count("n", n)
        if unit == self.unit:
            self.count += n
            self._follow()

    def _follow(self):
        for tensor in self._tensors.values():
            tensor.fill_(self.value)


class LinearSchedule(Schedule):
    """In a straight line."""

    def fraction(self, progress):
        return progress


class CosineSchedule(Schedule):
    """(1 - cos(pi progress)) / 2: level at both ends."""

    def fraction(self, progress):
        return 0.5 * (1.0 - math.cos(math.pi * progress))


class SigmoidSchedule(Schedule):
    """A logistic curve, scaled so that it begins at start and ends at end exactly.

    Args:
        steepness: of the curve, its slope in the middle being about steepness / 4 of the way per length.
    """

    def __init__(self, start=0.0, end=1.0, length=1, *, begin=0, unit="step", steepness=10.0):
        super().__init__(start, end, length, begin=begin, unit=unit)
        checks.number("steepness", steepness)
        if not 0.0 < steepness < math.inf:
            raise ValueError(f"steepness: expected a positive number, got {steepness!r}")
        self.steepness = steepness

    def fraction(self, progress):
        # The logistic function is (1 + tanh(t/2))/2.
        return 0.5 * (1.0 + math.tanh(0.25 * self.steepness * (2.0 * progress - 1.0))
                      / math.tanh(0.25 * self.steepness))


class CyclicalSchedule(Schedule):
    """From start to end over and over: each cycle of ``length`` rises linearly during its first ``ratio`` and stays at
    end for the rest. After ``cycles`` of them it stays at end.

    References:
        Fu et al., "Cyclical annealing schedule", 2019, arXiv:1903.10145.
    """

    def __init__(self, start=0.0, end=1.0, length=1, *, begin=0, unit="step", cycles=4, ratio=0.5):
        super().__init__(start, end, length, begin=begin, unit=unit)
        if cycles is not None and (isinstance(cycles, bool) or not isinstance(cycles, int) or cycles < 1):
            raise ValueError(f"cycles: expected a positive integer, or None for ever, got {cycles!r}")
        checks.number("ratio", ratio)
        if not 0.0 < ratio <= 1.0:
            raise ValueError(f"ratio: expected a number in (0, 1], got {ratio!r}")
        self.cycles, self.ratio = cycles, ratio

    def fraction(self, progress):
        return min(progress / self.ratio, 1.0)

    def at(self, t):
        passed = max(t - self.begin, 0)
        if self.cycles is not None and passed >= self.cycles * self.length:
            return self.end
        return super().at(self.begin + passed % self.length)
