"""Ready VAEs with one layer of latents."""

import math

import torch

from fastflow import checks
from fastflow.flows import MAF, RealNVP
from fastflow.vae.labels import Conditioned
from fastflow.vae.model import POSTERIORS, VAE, likelihood_of, named
from fastflow.vae.networks import (
    LogCounts,
    Rescale,
    conv_decoder,
    conv_encoder,
    image_sizes,
    mlp_decoder,
    mlp_discriminator,
    mlp_encoder,
)
from fastflow.vae.objectives import BoundObjective, PenalizedELBO
from fastflow.vae.penalties import DIP, MMD, DensityRatio, FactorTC, TotalCorrelation
from fastflow.vae.posteriors import DeterministicPosterior, FlowPosterior
from fastflow.vae.priors import VampPrior

__all__ = ["DIPVAE", "IWAE", "MLPVAE", "WAE", "AdversarialAutoencoder", "BetaTCVAE", "BetaVAE", "ConditionalVAE",
           "ConvVAE", "FactorVAE", "FlowPosteriorVAE", "FlowPriorVAE", "InfoVAE", "VampVAE"]


def front(likelihood):
    """What stands in front of an encoder whose data are integers."""
    if not getattr(likelihood, "takes_integers", False):
        return []
    levels = levels_of(likelihood)
    return [LogCounts()] if levels is None else [Rescale(levels)]


def levels_of(likelihood):
    """How many levels or classes the integers of a likelihood have; None for counts, and for data of other kinds."""
    levels = getattr(likelihood, "n_bins", None)
    if levels is None and hasattr(likelihood, "probs"):
        levels = likelihood.params_per_element  # classes
    return levels


def networks(kind, event_shape, latent_features, sizes, n_params, likelihood):
    """(encoder, decoder) of a kind, "mlp" or "conv", with hidden sizes or channels from the data inwards."""
    checks.choice("network", kind, ("mlp", "conv"))
    output_shape = likelihood.output_shape(event_shape)
    if kind == "mlp":
        sizes = (256, 256) if sizes is None else tuple(sizes)
        encoder = mlp_encoder(event_shape, latent_features, sizes, n_params=n_params)
        decoder = mlp_decoder(latent_features, output_shape, sizes[::-1])
    else:
        sizes = (32, 64) if sizes is None else tuple(sizes)
        encoder = conv_encoder(event_shape, latent_features, sizes, n_params=n_params)
        decoder = conv_decoder(latent_features, output_shape, sizes[::-1])
    return type(encoder)(*front(likelihood), *encoder), decoder


class ReadyVAE(VAE):
    """A VAE with networks of its own.

    Args:
        event_shape: of one x.
        latent_features: D.
        network: "mlp" or "conv"; the latter for images (C, H, W).
        sizes: hidden sizes or channels of the encoder, those of the decoder reversed; None: (256, 256) or (32, 64).
        posterior, likelihood: as for VAE; the networks get the outputs that they need.
        options: the others of VAE.
    """

    def __init__(self, event_shape, latent_features, *, network="mlp", sizes=None, posterior="gaussian",
                 likelihood="bernoulli", **options):
        event_shape = checks.counts("event_shape", event_shape, 1)
        latent_features = checks.count("latent_features", latent_features, 1)
        posterior = named("posterior", posterior, POSTERIORS)
        likelihood = likelihood_of(likelihood)
        if not hasattr(posterior, "n_params"):
            raise TypeError(f"posterior: expected one of posteriors/, with n_params, got {type(posterior).__name__}")
        encoder, decoder = networks(network, event_shape, latent_features, sizes, posterior.n_params(latent_features),
                                    likelihood)
        super().__init__(encoder, decoder, posterior, likelihood=likelihood, latent_shape=(latent_features,), **options)
        self.event_shape = event_shape


class MLPVAE(ReadyVAE):
    """A VAE with fully connected networks; arguments of :class:`ReadyVAE`, ``hidden`` for sizes."""

    def __init__(self, event_shape, latent_features, hidden=(256, 256), **options):
        super().__init__(event_shape, latent_features, network="mlp", sizes=hidden, **options)


class ConvVAE(ReadyVAE):
    """A VAE with convolutional networks; arguments of :class:`ReadyVAE`, ``channels`` for sizes."""

    def __init__(self, image_shape, latent_features, channels=(32, 64), **options):
        super().__init__(image_sizes(image_shape), latent_features, network="conv", sizes=channels, **options)


class BetaVAE(ReadyVAE):
    """-distortion - beta * rate.

    References:
        Higgins et al., "beta-VAE", 2017.
    """

    def __init__(self, event_shape, latent_features, *, beta=4.0, **options):
        super().__init__(event_shape, latent_features, objective=PenalizedELBO(beta=beta), **options)


class BetaTCVAE(ReadyVAE):
    """-distortion - alpha * I(x; z) - beta * TC(z) - gamma * sum_d KL(q(z_d) || p(z_d)), with stratified weights.

    Args:
        dataset_size: examples in the training set.

    References:
        Chen et al., "Isolating sources of disentanglement in VAEs", 2018, arXiv:1802.04942.
    """

    def __init__(self, event_shape, latent_features, dataset_size, *, alpha=1.0, beta=6.0, gamma=1.0,
                 method="stratified", **options):
        penalty = TotalCorrelation(dataset_size, alpha=alpha, beta=beta, gamma=gamma, method=method)
        super().__init__(event_shape, latent_features, objective=PenalizedELBO(penalty, beta=0.0), **options)


class FactorVAE(ReadyVAE):
    """The ELBO less gamma times the total correlation that a discriminator estimates, trained along with the rest.

    References:
        Kim and Mnih, "Disentangling by factorising", 2018, arXiv:1802.05983.
    """

    def __init__(self, event_shape, latent_features, *, gamma=10.0, discriminator_hidden=(256, 256), **options):
        penalty = FactorTC(mlp_discriminator(latent_features, discriminator_hidden), gamma)
        super().__init__(event_shape, latent_features, objective=PenalizedELBO(penalty), **options)


class DIPVAE(ReadyVAE):
    """The ELBO less a penalty on the covariance of the aggregate posterior, DIP-I or DIP-II.

    References:
        Kumar et al., "Variational inference of disentangled latent concepts", 2018, arXiv:1711.00848.
    """

    def __init__(self, event_shape, latent_features, *, kind="ii", diagonal=10.0, off_diagonal=5.0, **options):
        penalty = DIP(kind, diagonal=diagonal, off_diagonal=off_diagonal)
        super().__init__(event_shape, latent_features, objective=PenalizedELBO(penalty), **options)


class InfoVAE(ReadyVAE):
    """-distortion - (1 - alpha) * rate - (alpha + scale - 1) * MMD^2(q(z), p(z)).

    References:
        Zhao et al., "InfoVAE", 2019, arXiv:1706.02262, equation 6.
    """

    def __init__(self, event_shape, latent_features, *, alpha=0.0, scale=10.0, kernel="imq", **options):
        objective = PenalizedELBO(MMD(alpha + scale - 1.0, kernel), beta=1.0 - alpha)
        super().__init__(event_shape, latent_features, objective=objective, **options)


class WAE(ReadyVAE):
    """-distortion - weight * MMD^2(q(z), p(z)) with a deterministic encoder: a Wasserstein autoencoder.

    References:
        Tolstikhin et al., "Wasserstein auto-encoders", 2018, arXiv:1711.01558.
    """

    def __init__(self, event_shape, latent_features, *, weight=10.0, kernel="imq", likelihood="gaussian", **options):
        options.setdefault("posterior", DeterministicPosterior())
        super().__init__(event_shape, latent_features, likelihood=likelihood,
                         objective=PenalizedELBO(MMD(weight, kernel), beta=0.0), **options)


class AdversarialAutoencoder(ReadyVAE):
    """-distortion - weight * KL(q(z) || p(z)), the KL estimated by a discriminator that is trained along.

    References:
        Makhzani et al., "Adversarial autoencoders", 2016, arXiv:1511.05644.
    """

    def __init__(self, event_shape, latent_features, *, weight=1.0, discriminator_hidden=(256, 256), **options):
        penalty = DensityRatio(mlp_discriminator(latent_features, discriminator_hidden), weight)
        super().__init__(event_shape, latent_features, objective=PenalizedELBO(penalty, beta=0.0), **options)


class IWAE(ReadyVAE):
    """The importance-weighted bound of n_samples.

    References:
        Burda et al., "Importance weighted autoencoders", 2016, arXiv:1509.00519.
    """

    def __init__(self, event_shape, latent_features, *, n_samples=50, **options):
        super().__init__(event_shape, latent_features, objective=BoundObjective("iwae", n_samples), **options)


class VampVAE(ReadyVAE):
    """A VAE with a VampPrior of n_components pseudo-inputs.

    Args:
        n_components: None: as many as there are ``inputs``, or 100.
        inputs: (n_components, *event_shape) to start from; None: uniform between the bounds, up to low + 1 where high
            is infinite.
        bounds: (low, high) that pseudo-inputs are kept between, or None. "auto": the range of the likelihood's data,
            (0, n - 1) for n levels or classes and (0, inf) for counts; (0, 1) for data that are no integers.

    References:
        Tomczak and Welling, "VAE with a VampPrior", 2018, arXiv:1705.07120.
    """

    def __init__(self, event_shape, latent_features, *, n_components=None, inputs=None, bounds="auto",
                 likelihood="bernoulli", **options):
        likelihood = likelihood_of(likelihood)
        event_shape = checks.counts("event_shape", event_shape, 1)
        if n_components is not None:
            n_components = checks.count("n_components", n_components, 1)
        if isinstance(bounds, str):
            checks.choice("bounds", bounds, ("auto",))
            bounds = _range(likelihood)
        if inputs is None:
            low, high = (0.0, 1.0) if bounds is None else bounds
            if not math.isfinite(low):
                raise ValueError(f"bounds: expected a finite low where no inputs are given, got {bounds!r}")
            width = high - low if math.isfinite(high - low) else 1.0
            inputs = low + width * torch.rand(100 if n_components is None else n_components, *event_shape)
        prior = VampPrior(inputs, bounds=bounds)
        checks.shape("inputs", inputs, (len(inputs) if n_components is None else n_components, *event_shape))
        super().__init__(event_shape, latent_features, prior=prior, likelihood=likelihood, **options)


def _range(likelihood):
    """(low, high) of the data of a likelihood."""
    if not getattr(likelihood, "takes_integers", False):
        return 0.0, 1.0
    levels = levels_of(likelihood)
    return 0.0, math.inf if levels is None else levels - 1.0


class FlowPriorVAE(ReadyVAE):
    """A VAE whose prior is a flow: "maf", autoregressive, dense to evaluate in one pass; "realnvp", quick both ways."""

    def __init__(self, event_shape, latent_features, *, flow="maf", n_layers=4, flow_hidden=(64, 64), **options):
        checks.choice("flow", flow, ("maf", "realnvp"))
        prior = {"maf": MAF, "realnvp": RealNVP}[flow](latent_features, n_layers=n_layers, hidden=flow_hidden)
        super().__init__(event_shape, latent_features, prior=prior, **options)


class FlowPosteriorVAE(ReadyVAE):
    """A VAE with a flow behind its Gaussian posterior: "iaf", "coupling", "planar" or "householder".

    Args:
        context_features: outputs of the encoder that steer the flow; 0: the flow is the same for every x.
        flow_options: of FlowPosterior's constructor of that name.
    """

    def __init__(self, event_shape, latent_features, *, flow="iaf", context_features=16, flow_options=None, **options):
        checks.choice("flow", flow, ("iaf", "coupling", "planar", "householder"))
        posterior = getattr(FlowPosterior, flow)(latent_features, context_features=context_features,
                                                 **(flow_options or {}))
        super().__init__(event_shape, latent_features, posterior=posterior, **options)


class ConditionalVAE(VAE):
    """p(x | label): fully connected networks that see the label (B,) int64, the model's context, as a one-hot.

    Args:
        event_shape, latent_features, hidden: as for :class:`MLPVAE`.
        n_classes: number of labels.
        options: of VAE, such as prior, the same for every label unless it is a ConditionalGaussianPrior.

    References:
        Sohn et al., "Learning structured output representation using deep conditional generative models", 2015.
    """

    def __init__(self, event_shape, latent_features, n_classes, hidden=(256, 256), *, posterior="gaussian",
                 likelihood="bernoulli", **options):
        posterior = named("posterior", posterior, POSTERIORS)
        likelihood = likelihood_of(likelihood)
        event_shape = checks.counts("event_shape", event_shape, 1)
        latent_features = checks.count("latent_features", latent_features, 1)
        n_classes = checks.count("n_classes", n_classes, 1)
        size = math.prod(event_shape)
        n_params = posterior.n_params(latent_features)
        encoder = mlp_encoder((size + n_classes,), latent_features, hidden, n_params=n_params)
        decoder = mlp_decoder(latent_features + n_classes, likelihood.output_shape(event_shape), hidden[::-1])
        scaled, = front(likelihood) or [None]
        super().__init__(Conditioned(encoder, n_classes, flatten=True, front=scaled), Conditioned(decoder, n_classes),
                         posterior, likelihood=likelihood, latent_shape=(latent_features,), **options)
        self.n_classes = n_classes
        self.event_shape = event_shape
