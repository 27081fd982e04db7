"""Ready autoencoders with quantised latents."""

from fastflow.vae.model import likelihood_of
from fastflow.vae.models.basic import front
from fastflow.vae.networks import conv_feature_decoder, conv_feature_encoder, image_sizes
from fastflow.vae.priors import CodePrior
from fastflow.vae.quantizers import FSQ, VectorQuantizer
from fastflow.vae.vqvae import QuantizedVAE

__all__ = ["FSQVAE", "VQVAE"]


class _ConvQuantizedVAE(QuantizedVAE):
    """Convolutional networks around a quantiser of maps."""

    def __init__(self, image_shape, quantizer, channels, likelihood, learned_prior):
        image_shape = image_sizes(image_shape)
        likelihood = likelihood_of(likelihood)
        encoder = conv_feature_encoder(image_shape, quantizer.features, channels)
        decoder = conv_feature_decoder(quantizer.features, likelihood.output_shape(image_shape), channels[::-1])
        factor = 2 ** len(channels)
        super().__init__(type(encoder)(*front(likelihood), *encoder), quantizer, decoder, likelihood,
                         CodePrior(quantizer.n_codes) if learned_prior else None,
                         code_shape=(image_shape[1] // factor, image_shape[2] // factor))
        self.event_shape = image_shape


class VQVAE(_ConvQuantizedVAE):
    """VQ-VAE for images with a map of codes and, by default, an autoregressive prior of them.

    Args:
        image_shape: (C, H, W), H and W divisible by 2**len(channels).
        n_codes, features: of the codebook.
        channels: of the convolutions, each of which halves the sides.
        likelihood: a name as for VAE, or a likelihood object.
        learned_prior: whether a CodePrior is trained along; else the prior is uniform.
        quantizer_options: of VectorQuantizer; by default a moving-average codebook.

    References:
        van den Oord et al., "Neural discrete representation learning", 2017, arXiv:1711.00937.
    """

    def __init__(self, image_shape, n_codes=128, features=16, channels=(32, 64), *, likelihood="gaussian",
                 learned_prior=True, **quantizer_options):
        quantizer_options.setdefault("decay", 0.99)
        super().__init__(image_shape, VectorQuantizer(n_codes, features, **quantizer_options), channels, likelihood,
                         learned_prior)


class FSQVAE(_ConvQuantizedVAE):
    """The same with finite scalar quantisation, whose codebook is fixed.

    Args:
        image_shape, channels, likelihood, learned_prior: as for VQVAE.
        levels: of each latent dimension.

    References:
        Mentzer et al., "Finite scalar quantization: VQ-VAE made simple", 2023, arXiv:2309.15505.
    """

    def __init__(self, image_shape, levels=(8, 5, 5, 5), channels=(32, 64), *, likelihood="gaussian",
                 learned_prior=True):
        super().__init__(image_shape, FSQ(levels), channels, likelihood, learned_prior)
