"""Labels of a run's images: what a model takes of them, and what it says of their classes."""

import torch

from fastflow.engine.distributed import unwrap
from fastflow.engine.errors import SettingsError
from fastflow.vae import ConditionalVAE, SemiSupervisedVAE, Task

__all__ = ["check_labels", "classes_of", "given", "known", "predicted", "training_labels"]


def task_of(model):
    """The first task among the penalties of a VAE's objective, or None."""
    return next((m for m in unwrap(model).modules() if isinstance(m, Task)), None)


def classes_of(model):
    """How many classes what the model generates is conditioned on; 0 if on none."""
    inner = unwrap(model)
    return inner.n_classes if isinstance(inner, (ConditionalVAE, SemiSupervisedVAE)) else 0


def given(model, labels):
    """The labels (B,) as keywords for a training step, or for a report of a model's ELBO; {} where it takes none."""
    if labels is None:
        return {}
    if classes_of(model):
        return {"context": labels}
    return {} if task_of(model) is None else {"targets": labels}


def known(model, x, labels):
    """The context (B,) under which images are encoded and reconstructed: their labels, of a semi-supervised model what
    it thinks likeliest; None where the model takes none."""
    if isinstance(unwrap(model), SemiSupervisedVAE):
        return predicted(model, x)
    return labels if classes_of(model) else None


def predicted(model, x):
    """The likeliest class (B,) of each x, of a task at the posterior's mean; None from a model that does not say."""
    inner, task = unwrap(model), task_of(model)
    if isinstance(inner, SemiSupervisedVAE):
        return inner.classify(x).argmax(1)
    return None if task is None else task.predict(inner.encode(x))[:, 0]


def check_labels(settings, data):
    """Refuses data without the labels that the settings' model needs.

    Raises:
        SettingsError: by name.
    """
    n_classes, count = getattr(settings.model, "n_classes", None), getattr(settings.model, "n_labelled", 0)
    if n_classes is None:
        return
    if count > len(data.train):
        raise SettingsError(f"model.n_labelled: {count}, and {data.name} has {len(data.train)} training images")
    for part in ("train", "test", "validation"):
        labels = getattr(data, f"{part}_labels", None)
        if labels is None and getattr(data, part) is not None:
            raise SettingsError(f"model.kind: {settings.model.kind} needs labels, and the {part} part of {data.name} "
                                f"brings none")
        if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < n_classes:
            raise SettingsError(f"model.n_classes: {data.name} has labels from {int(labels.min())} to "
                                f"{int(labels.max())}, got {n_classes}")


def training_labels(settings, data):
    """(N,) int64 of the training images, -1 for those that model.n_labelled leaves unknown: all but so many, as even
    over the classes as can be, the same in every run; None where the model takes no labels."""
    if not hasattr(settings.model, "n_classes"):
        return None
    labels, count = data.train_labels, getattr(settings.model, "n_labelled", 0)
    if not count:
        return labels
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    one_hot = torch.nn.functional.one_hot(labels[order], settings.model.n_classes)
    turn = (one_hot.cumsum(0) * one_hot).sum(1)  # the first of each class come first, then the second of each, ...
    kept = order[turn.argsort(stable=True)[:count]]
    return torch.full_like(labels, -1).index_put((kept,), labels[kept])
