"""Looks at the held-out figures of a run: which is the best, whether it is time to stop, whether training diverged."""

import math

__all__ = ["Watch", "score"]

DIVERGED = 1.0  # bits/dim above what the first step had
ADVICE = "try a lower train.learning_rate, a longer train.warmup_steps or a smaller train.clip_grad_norm"


def score(figures, n_dims):
    """What early stopping minimises, in bits/dim: of images as they are reported, of rows -log_prob / (D log 2)."""
    if "bits_per_dim" in figures:
        return figures["bits_per_dim"]
    return -figures["log_prob"] / (n_dims * math.log(2))


class Watch:
    """The best held-out score so far, and how many evaluations have not been better.

    Args:
        patience: so many in a row end the run; 0 for never.

    Attributes:
        first: bits/dim of the first training step, None before it.
        best, best_step: the lowest finite score and the step of it, None before there is one.
        since: evaluations in a row that have not been better.
        seen: the step of the last one.
        diverged: whether the last score was not finite or above ``first`` by more than one bit/dim.
    """

    def __init__(self, patience=0):
        self.patience = patience
        self.first = self.best = self.best_step = self.seen = None
        self.since, self.diverged = 0, False

    def started(self, bits_per_dim):
        """Hears of a training step; the first one with a finite figure counts."""
        if self.first is None and math.isfinite(bits_per_dim):
            self.first = bits_per_dim

    def see(self, step, value):
        """Takes in the score of an evaluation on the way."""
        self.seen = step
        if math.isfinite(value) and (self.best is None or value < self.best):
            self.best, self.best_step, self.since = value, step, 0
        else:
            self.since += 1

    def warning(self, step, value):
        """What to say of a score if training has diverged, else None."""
        self.diverged = not math.isfinite(value) or (self.first is not None and value > self.first + DIVERGED)
        if not self.diverged:
            return None
        first = "" if self.first is None else f", the first training step had {self.first:.2f}"
        return f"step {step}: held-out bits/dim {value:.4g}{first}: training has diverged ({ADVICE})"

    @property
    def over(self):
        """Whether the patience is at its end."""
        return 0 < self.patience <= self.since

    def state_dict(self):
        """Plain numbers by name."""
        return {"first": self.first, "best": self.best, "best_step": self.best_step, "seen": self.seen,
                "since": self.since}

    def load_state_dict(self, state):
        """Takes up what :meth:`state_dict` gave; a ValueError or TypeError if it is nothing of the kind."""
        numbers = [state[name] for name in ("first", "best")]
        if not all(n is None or (isinstance(n, float) and math.isfinite(n)) for n in numbers):
            raise ValueError(f"watch: expected finite numbers, got {numbers}")
        self.first, self.best = numbers
        self.best_step, self.seen = (None if n is None else int(n) for n in (state["best_step"], state["seen"]))
        self.since = int(state["since"])
