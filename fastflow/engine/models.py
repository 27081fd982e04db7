"""The models that recipes name, and their weights from a checkpoint."""

import torch
from torch import nn

from fastflow.data import DATASETS
from fastflow.engine.errors import CheckpointError, SettingsError

__all__ = ["build_model", "load_weights"]


def build_model(settings):
    """The model of these settings on the CPU, its weights drawn from torch's generator.

    Raises:
        SettingsError: sizes that don't go together.
    """
    image_shape, _ = DATASETS[settings.data.name]
    try:
        return BUILDERS[settings.model.kind](settings.model, image_shape)
    except ValueError as error:
        raise SettingsError(f"model: {error}") from error


def load_weights(model, loaded, stem):
    """Copies the tensors of ``stem`` in a checkpoint into the model.

    Raises:
        CheckpointError: they are missing or of another model.
    """
    if stem not in loaded.tensors:
        raise CheckpointError(f"{loaded.path}: has no {stem}.safetensors")
    try:
        model.load_state_dict(loaded.tensors[stem])
    except RuntimeError as error:
        raise CheckpointError(f"{loaded.path / stem}.safetensors: is of another model ({_first_lines(error)})") from error


def _first_lines(error):
    return " ".join(str(error).split())[:200]


def _glow(options, image_shape):
    from fastflow.flows import Glow

    return Glow(image_shape, n_levels=options.n_levels, n_steps=options.n_steps, hidden_channels=options.hidden_channels)


def _vae(options, image_shape):
    from fastflow.vae import VAE, GaussianLikelihood

    size, width = int(torch.Size(image_shape).numel()), options.hidden_features
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                            nn.Linear(width, 2 * options.latent_features))
    decoder = nn.Sequential(nn.Linear(options.latent_features, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                            nn.Linear(width, size), nn.Unflatten(1, image_shape))
    return VAE(encoder, decoder, likelihood=GaussianLikelihood())


BUILDERS = {"glow": _glow, "vae": _vae}
