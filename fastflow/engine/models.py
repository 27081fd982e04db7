"""The models that recipes name, and their weights from a checkpoint."""

from fastflow.engine.datasets import example_shape
from fastflow.engine.errors import CheckpointError, SettingsError
from fastflow.engine.sections import BOUNDS, PENALTIES

__all__ = ["build_model", "load_weights", "standardize"]


def build_model(settings):
    """The model of these settings, on torch's default device, its weights drawn from torch's generator.

    A model of a table has the table's columns as they stand as data; what standardises them is a part of it, see
    :func:`standardize`.

    Raises:
        SettingsError: sizes that don't go together.
    """
    try:
        return BUILDERS[settings.model.kind](settings.model, example_shape(settings))
    except ValueError as error:
        raise SettingsError(f"model: {error}") from error


def standardize(model, table):
    """Sets the part of a table's model that brings each column to mean 0 and standard deviation 1 over the table's
    training rows; checkpoints keep it.

    Raises:
        SettingsError: a column is constant, so that it has no density.
    """
    mean, deviation = table.moments()
    constant = [name for name, value in zip(table.columns, deviation.tolist(), strict=True) if not value > 0]
    if constant:
        raise SettingsError(f"data: column {constant[0]} of {table.name} is constant over the training rows and has no "
                            f"density; leave it out")
    first = model.transform.transforms[0].transform
    first.shift.copy_(mean)
    first.scale.copy_(deviation)


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


def _likelihood(sigma="shared"):
    """Gaussian, "shared": of the sigma that fits the errors, for one to be learned from 1 begins so wide that latents
    collapse; "pixel": of one for each pixel from the decoder."""
    from fastflow.vae import GaussianLikelihood

    return GaussianLikelihood({"shared": "optimal", "pixel": "decoder"}[sigma])


def _glow(options, image_shape):
    from fastflow.flows import Glow

    return Glow(image_shape, n_levels=options.n_levels, n_steps=options.n_steps,
                hidden_channels=options.hidden_channels, scale=_scale(options), parametrization=options.parametrization)


def _jet(options, image_shape):
    from fastflow.flows import Jet

    return Jet(image_shape, **options.model_dump(exclude={"kind"}))


def _tarflow(options, image_shape):
    from fastflow.flows import TarFlow

    return TarFlow(image_shape, **options.model_dump(exclude={"kind"}))


def _scale(options):
    """The scale as flows take it; the paper's Glow has a dialect of its own."""
    from fastflow.functional import ScaleMap

    return ScaleMap.glow() if options.scale == "glow" else options.scale


def _realnvp(options, shape):
    from fastflow.flows import RealNVP

    return _of_columns(RealNVP(*shape, n_layers=options.n_layers, hidden=options.hidden, scale=_scale(options)))


def _maf(options, shape):
    from torch import nn

    from fastflow.flows import MAF

    return _of_columns(MAF(*shape, n_layers=options.n_layers, hidden=options.hidden, scale=_scale(options),
                           order=options.order, activation=nn.Tanh if options.activation == "tanh" else nn.ReLU))


def _nsf(options, shape):
    from fastflow.flows import NSF

    return _of_columns(NSF(*shape, **options.model_dump(exclude={"kind"})))


def _of_columns(flow):
    """The flow of standardised columns as one of the columns themselves: log-densities are in the data's own units.

    A table's standardisation, z = (x - mean) / deviation, adds -sum(log deviation); see :func:`standardize`.
    """
    import torch

    from fastflow.flows import Affine, Compose, Inverse

    shift, scale = torch.zeros(flow.features), torch.ones(flow.features)
    flow.transform = Compose(Inverse(Affine(shift, scale)), *flow.transform.transforms)
    return flow


def _objective(options):
    """What BoundSettings say is maximised, None for the ELBO."""
    from fastflow.vae import BoundObjective, FreeBits, KLBalance, PenalizedELBO

    if options.objective != "elbo":
        own = BOUNDS[options.objective]
        given = {} if own is None else {own.removeprefix("bound_"): getattr(options, own)}
        return BoundObjective(options.objective, options.n_samples, **given)
    penalties = [FreeBits(options.free_bits, options.free_bits_per)] if options.free_bits else []
    penalties += [KLBalance(options.beta)] if getattr(options, "kl_balance", False) else []
    penalties += [_penalty(options)] if getattr(options, "penalty", "none") != "none" else []
    return PenalizedELBO(*penalties) if penalties else None


def _penalty(options):
    """What model.penalty names."""
    from fastflow.vae import (
        DIP,
        MMD,
        DensityRatio,
        FactorTC,
        MutualInformation,
        TotalCorrelation,
        mlp_discriminator,
    )

    name, weight = options.penalty, options.penalty_weight
    weight = PENALTIES[name] if weight is None else weight
    if name == "tc":
        return TotalCorrelation(options.dataset_size, alpha=0.0, beta=weight, gamma=0.0)
    if name in ("dip_i", "dip_ii"):
        return DIP(name.removeprefix("dip_"), diagonal=2.0 * weight, off_diagonal=weight)
    if name in ("factor", "adversarial"):
        kind = FactorTC if name == "factor" else DensityRatio
        return kind(mlp_discriminator(options.latent_features, (256, 256)), weight)
    return MMD(weight) if name == "mmd" else MutualInformation(name, weight)


def _vae(options, image_shape):
    from fastflow.vae import MLPVAE, ConvVAE

    given = _latents(options) | {"objective": _objective(options)}
    if options.network == "conv":
        return ConvVAE(image_shape, options.latent_features, **given)
    return MLPVAE(image_shape, options.latent_features, (options.hidden_features, options.hidden_features), **given)


def _latents(options):
    """Prior and likelihood of a VAE with one layer of Gaussian latents."""
    from fastflow.flows import RealNVP

    n, prior = options.latent_features, None
    if options.prior == "flow":
        prior = RealNVP(n, n_layers=4, hidden=(max(64, 2 * n),) * 2)
    return {"prior": prior, "likelihood": _likelihood(options.sigma)}


def _conditional_vae(options, image_shape):
    from fastflow.vae import ConditionalVAE

    hidden = (options.hidden_features, options.hidden_features)
    return ConditionalVAE(image_shape, options.latent_features, options.n_classes, hidden,
                          likelihood=_likelihood(options.sigma))


def _semi_supervised_vae(options, image_shape):
    from fastflow.vae import SemiSupervisedVAE, mlp_encoder

    parts, n_classes = _conditional_vae(options, image_shape), options.n_classes
    hidden = (options.hidden_features, options.hidden_features)
    classifier = mlp_encoder(image_shape, n_classes, hidden, n_params=n_classes)
    return SemiSupervisedVAE(parts.encoder, parts.decoder, classifier, n_classes, alpha=options.alpha,
                             likelihood=parts.likelihood, latent_shape=options.latent_features)


def _task_vae(options, image_shape):
    from torch import nn

    from fastflow.vae import MLPVAE, CategoricalLikelihood, PenalizedELBO, Task

    head = nn.Linear(options.latent_features, options.n_classes)
    objective = PenalizedELBO(Task(head, CategoricalLikelihood(options.n_classes), weight=options.task_weight))
    hidden = (options.hidden_features, options.hidden_features)
    return MLPVAE(image_shape, options.latent_features, hidden, objective=objective, **_latents(options))


def _iwae(options, image_shape):
    from fastflow.vae import IWAE

    return IWAE(image_shape, options.latent_features, n_samples=options.n_importance, network=options.network,
                **_latents(options))


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

    bits, hidden = options.latent_bits, (options.hidden_features, options.hidden_features)
    likelihood = _likelihood(options.sigma)
    return DiscreteVAE(mlp_encoder(image_shape, bits, hidden, n_params=bits),
                       mlp_decoder(bits, likelihood.output_shape(image_shape), hidden), bits,
                       estimator=options.estimator, likelihood=likelihood, prior=options.prior)


def _vdvae(options, image_shape):
    from fastflow.vae import VDVAE

    return VDVAE(image_shape, options.groups, channels=options.channels, latent_channels=options.latent_channels,
                 likelihood=_likelihood(options.sigma), objective=_objective(options))


BUILDERS = {"glow": _glow, "jet": _jet, "tarflow": _tarflow, "realnvp": _realnvp, "maf": _maf, "nsf": _nsf, "vae": _vae,
            "conditional_vae": _conditional_vae, "semi_supervised_vae": _semi_supervised_vae, "task_vae": _task_vae,
            "iwae": _iwae, "vqvae": _vqvae, "discrete_vae": _discrete_vae, "vdvae": _vdvae}
