"""The models that recipes name, and their weights from a checkpoint."""

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
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{loaded.path / stem}.safetensors: is of another model ({reason})") from error


def _likelihood():
    """Gaussian, of the sigma that fits the errors: one to be learned from 1 begins so wide that latents collapse."""
    from fastflow.vae import GaussianLikelihood

    return GaussianLikelihood("optimal")


def _glow(options, image_shape):
    from fastflow.flows import Glow

    return Glow(image_shape, n_levels=options.n_levels, n_steps=options.n_steps,
                hidden_channels=options.hidden_channels, scale=options.scale)


def _vae(options, image_shape):
    from fastflow.vae import MLPVAE, ConvVAE

    if options.network == "conv":
        return ConvVAE(image_shape, options.latent_features, likelihood=_likelihood())
    hidden = (options.hidden_features, options.hidden_features)
    return MLPVAE(image_shape, options.latent_features, hidden, likelihood=_likelihood())


def _iwae(options, image_shape):
    from fastflow.vae import IWAE

    return IWAE(image_shape, options.latent_features, n_samples=options.n_importance, network=options.network,
                likelihood=_likelihood())


def _vqvae(options, image_shape):
    from fastflow.vae import VQVAE

    factor = 2 ** len(options.channels)
    if image_shape[1] % factor or image_shape[2] % factor:
        raise SettingsError(f"model.channels: {len(options.channels)} halvings don't divide {image_shape[1]}x"
                            f"{image_shape[2]} images")
    return VQVAE(image_shape, options.n_codes, options.features, options.channels, likelihood=_likelihood(),
                 restart_below=0.02)


def _discrete_vae(options, image_shape):
    from fastflow.vae import DiscreteVAE, mlp_decoder, mlp_encoder

    hidden = (options.hidden_features, options.hidden_features)
    return DiscreteVAE(mlp_encoder(image_shape, options.latent_bits, hidden, n_params=options.latent_bits),
                       mlp_decoder(options.latent_bits, image_shape, hidden), options.latent_bits,
                       estimator=options.estimator, likelihood=_likelihood())


def _vdvae(options, image_shape):
    from fastflow.vae import VDVAE

    return VDVAE(image_shape, options.groups, channels=options.channels, latent_channels=options.latent_channels,
                 likelihood=_likelihood())


BUILDERS = {"glow": _glow, "vae": _vae, "iwae": _iwae, "vqvae": _vqvae, "discrete_vae": _discrete_vae,
            "vdvae": _vdvae}
