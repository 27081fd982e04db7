"""The learning rate, and a VAE's weight of the rate, of every step."""

from fastflow.vae import CosineSchedule, CyclicalSchedule, LinearSchedule, SigmoidSchedule

__all__ = ["LearningRate", "kl_weight"]

DECAYS = {"cosine": CosineSchedule, "linear": LinearSchedule}


class LearningRate:
    """``rate(step)``: what the update after that many steps is taken with.

    A linear warm-up over ``warmup_steps``, times train.schedule's way from ``learning_rate`` at its end down to
    ``end_learning_rate`` at ``decay_steps`` (0: at ``train.steps``), where it stays; "constant" has no such way.

    Args:
        train: a :class:`~fastflow.engine.settings.TrainSettings`.

    References:
        Loshchilov and Hutter, "SGDR: stochastic gradient descent with warm restarts", 2017, arXiv:1608.03983 (cosine).
    """

    def __init__(self, train):
        self.warmup = train.warmup_steps
        self.base, self._decay = train.learning_rate, None
        if train.schedule != "constant":
            length = max((train.decay_steps or train.steps) - self.warmup, 1)
            self._decay = DECAYS[train.schedule](self.base, train.end_learning_rate, length, begin=self.warmup)

    def __call__(self, step):
        rate = self.base if self._decay is None else self._decay.at(step)
        return rate * min(1.0, (step + 1) / self.warmup) if self.warmup else rate


def kl_weight(settings):
    """What a VAE's rate is weighed with: the model's beta, or a :class:`~fastflow.vae.Schedule` that rises to it over
    ``train.kl_warmup_steps`` or ``train.kl_warmup_epochs`` as ``train.kl_schedule`` says. A step is taken with the
    weight at its end: seek(steps + 1, epochs + 1) after so many of both."""
    train, beta = settings.train, getattr(settings.model, "beta", 1.0)
    length = train.kl_warmup_steps or train.kl_warmup_epochs
    if not length:
        return beta
    kind, options = {"linear": (LinearSchedule, {}), "cosine": (CosineSchedule, {}),
                     "sigmoid": (SigmoidSchedule, {"steepness": train.kl_steepness}),
                     "cyclical": (CyclicalSchedule, {"cycles": train.kl_cycles or None, "ratio": train.kl_ratio}),
                     }[train.kl_schedule]
    return kind(train.kl_start, beta, length, begin=train.kl_begin,
                unit="step" if train.kl_warmup_steps else "epoch", **options)
