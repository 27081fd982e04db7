"""Warnings of collapse while a VAE trains."""

from fastflow.diagnostics import CollapseMonitor
from fastflow.engine.aside import aside
from fastflow.engine.distributed import is_sharded
from fastflow.engine.evaluate import is_vae
from fastflow.engine.labels import known

__all__ = ["CollapseWatch"]

IMAGES = 256  # that the latents are measured on
LEAST_ACTIVE = 0.1  # of the latents or codes; fewer in three looks in a row are worth a warning


class CollapseWatch:
    """Looks at a VAE's latents every ``train.collapse_every`` steps, in the first process, and says when fewer than a
    tenth of them, or of the codes, are used. It changes neither the model nor torch's generators; a model in shards,
    which one process can't run alone, is not looked at.

    Args:
        every: steps between looks; 0 for none.
        images: (N, C, H, W) uint8 of the training set.
        device: of the model.
        say: called with the warning.
        labels: (N,) int64 of the images, for models that take them, or None.
    """

    def __init__(self, every, images, device, say, labels=None):
        self.every, self.images, self.device = every, images[:IMAGES], device
        self.labels = None if labels is None else labels[:IMAGES].to(device)
        self.monitor = CollapseMonitor(LEAST_ACTIVE, callback=lambda message: say(
            f"WARNING: {message} (train.kl_warmup_steps anneals; train.collapse_every=0 stops these looks)"))

    def __call__(self, model, objective, step):
        if not self.every or step % self.every or not is_vae(model) or is_sharded(model):
            return
        with aside(model, self.device, 0):
            x, _ = objective.prepare(model, self.images.to(self.device))
            self.monitor.look(model, x, known(model, x, self.labels), when=f"{step} steps")
