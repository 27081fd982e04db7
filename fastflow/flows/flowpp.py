"""Flow++: mixture-of-logistics couplings, attention in the conditioners, variational dequantisation."""

import torch
from torch import nn

from fastflow import checks
from fastflow.flows.base import StandardNormal
from fastflow.flows.flow import Flow
from fastflow.flows.images import check_image_model
from fastflow.flows.multiscale import CheckerboardSqueeze, Squeeze
from fastflow.flows.realnvp_image import image_logit
from fastflow.flows.scalar import Logit
from fastflow.flows.surjections import UniformDequantization, VariationalDequantization
from fastflow.flows.transform import Compose, Inverse, initialize
from fastflow.nn import ActNorm, GatedAttentionNet, InvertibleConv1x1, MixtureCoupling
from fastflow.nn.gated_attention import GatedConv

__all__ = ["CONFIGS", "FlowPP"]

CONFIGS = {
    "cifar10": {"image_shape": (3, 32, 32), "n_components": 32, "hidden_channels": 96, "n_blocks": 10, "dropout": 0.2},
    "cifar10-uniform": {"image_shape": (3, 32, 32), "n_components": 32, "hidden_channels": 96, "n_blocks": 10,
                        "dropout": 0.2, "dequantization": "uniform"},
}
"""The paper's models by name, for :meth:`FlowPP.from_config` (Ho et al. 2019, 3.08 bits/dim with variational and 3.29
with uniform dequantisation): keyword arguments of FlowPP."""


class _Halves(nn.Module):
    """One transform for each half of the channels."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x, context=None):
        (a, one), (b, other) = (t(half, context) for t, half in self._pairs(x))
        return torch.cat([a, b], 1), one + other

    def inverse(self, z, context=None):
        (a, one), (b, other) = (t.inverse(half, context) for t, half in self._pairs(z))
        return torch.cat([a, b], 1), one + other

    def initialize(self, x, context=None):
        return torch.cat([initialize(t, half, context) for t, half in self._pairs(x)], 1)

    def _pairs(self, x):
        return zip((self.first, self.second), x.chunk(2, 1), strict=True)


class _Arranged(nn.Module):
    """A conditioning image brought to the positions at which a stage of the flow works."""

    def __init__(self, *moves):
        super().__init__()
        self.moves = nn.ModuleList(moves)

    def forward(self, image):
        for move in self.moves:
            image = move(image)[0]
        return image


def _couplings(shape, n, n_components, scale, net):
    """``n`` steps on data of that shape (2C, H, W), the halves taking turns: ActNorm and 1x1 convolution of each half,
    and a mixture coupling with the conditioner net(in_channels, out_channels, size)."""
    half, layers = shape[0] // 2, []
    for index in range(n):
        convs = [InvertibleConv1x1(half, actnorm=ActNorm(half)) for _ in range(2)]
        conditioner = net(half, half * (3 * n_components + 2), shape[1:])
        coupling = MixtureCoupling(conditioner, flip=index % 2 == 1, n_components=n_components, scale=scale)
        with torch.no_grad():
            conditioner.last.bias.copy_(coupling.start_params().repeat(half))
        layers += [_Halves(*convs), coupling]
    return layers


class FlowPP(Flow):
    """Flow++ for images (B, C, H, W) with values in [-0.5, 0.5); the base is N(0, I) over z (B, 4C, H/2, W/2).

    Pixels go through a logit, ``n_checkerboard`` couplings on the colours of a checkerboard, and with 2x2 blocks as
    channels ``n_channel`` couplings on the halves of the channels and ``n_final`` in a checkerboard. Each coupling is
    an nn.MixtureCoupling with an nn.GatedAttentionNet, behind an ActNorm and a 1x1 convolution of each half.

    Integers are dequantised by the model's own ``dequantization``: ``log_prob`` of an integer tensor is a lower bound
    of log P(x) in expectation, in nats, which engine.TrainStep trains and :meth:`bits_per_dim` reports; that of a
    floating tensor is the density. The variational one draws u = sigmoid of a flow of ``dequantization_couplings``
    mixture couplings in a checkerboard, conditioned on x through a gated convolution. Call :meth:`initialize` on a
    batch of integer images before training.

    Args:
        image_shape: (C, H, W), H even, W divisible by 4.
        n_checkerboard, n_channel, n_final: numbers of couplings.
        n_components: of each mixture.
        hidden_channels, n_blocks, n_heads, dropout: of the conditioners.
        alpha: of the logit, 0 <= alpha < 1/2; None for no logit.
        scale: ScaleMap of the couplings or its name; not "additive".
        dequantization: "variational", "uniform", or None: then bits_per_dim and TrainStep dequantise uniformly.
        dequantization_couplings, dequantization_blocks: couplings of the dequantising flow, blocks of its conditioners.
        n_bins: values of a pixel.
        context_features: F of a context (B, F) that conditions the density, or None.
        context_channels: channels of a conditioning image (B, C', H, W) that does, or None.

    Raises:
        ValueError: a size or option that does not fit; the message names the argument.

    References:
        Ho et al., "Flow++: improving flow-based generative models with variational dequantization and architecture
        design", 2019, arXiv:1902.00275.
    """

    configs = CONFIGS

    def __init__(self, image_shape, *, n_checkerboard=4, n_channel=2, n_final=3, n_components=32, hidden_channels=96,
                 n_blocks=10, n_heads=4, dropout=0.2, alpha=0.05, scale="tanh", dequantization="variational",
                 dequantization_couplings=4, dequantization_blocks=2, n_bins=256, context_features=None,
                 context_channels=None):
        channels, height, width = image_shape = check_image_model(image_shape, 2, hidden_channels=hidden_channels)
        if width % 4:
            raise ValueError(f"image_shape: expected a width divisible by 4, got {image_shape}")
        checks.choice("dequantization", dequantization, ("variational", "uniform", None))

        def stage(shape, n, growth, *moves):
            def net(in_channels, out_channels, size):
                context = {"context_features": context_features}
                if context_channels is not None:
                    context |= {"context_channels": context_channels * growth, "arrange": _Arranged(*moves)}
                return GatedAttentionNet(in_channels, out_channels, size, hidden_channels, n_blocks, n_heads, dropout,
                                         **context)

            return _couplings(shape, n, n_components, scale, net)

        fine = (2 * channels, height, width // 2)
        coarse = (4 * channels, height // 2, width // 2)
        mixed = (8 * channels, height // 2, width // 4)
        transform = Compose(
            *image_logit(alpha),
            CheckerboardSqueeze(), *stage(fine, n_checkerboard, 2, CheckerboardSqueeze()),
            Inverse(CheckerboardSqueeze()), Squeeze(), *stage(coarse, n_channel, 4, Squeeze()),
            CheckerboardSqueeze(), *stage(mixed, n_final, 8, Squeeze(), CheckerboardSqueeze()),
            Inverse(CheckerboardSqueeze()), event_shape=image_shape)
        noise = None
        if dequantization == "variational":
            def noise_net(in_channels, out_channels, size):
                return GatedAttentionNet(in_channels, out_channels, size, hidden_channels, dequantization_blocks,
                                         n_heads, dropout, context_channels=hidden_channels)

            # The other way round: training draws u, which must not take a search for roots.
            steps = [Inverse(step) for step in reversed(_couplings(fine, dequantization_couplings, n_components, scale,
                                                                   noise_net))]
            encoder = nn.Sequential(_Arranged(CheckerboardSqueeze()),
                                    nn.Conv2d(2 * channels, hidden_channels, 3, padding=1),
                                    GatedConv(hidden_channels, dropout))
            noise = VariationalDequantization(Flow(Compose(Logit(), CheckerboardSqueeze(), *steps),
                                                   StandardNormal(fine)), encoder, n_bins, event_shape=image_shape)
        elif dequantization == "uniform":
            noise = UniformDequantization(n_bins)
        super().__init__(transform, StandardNormal(coarse), noise)
        self.image_shape = image_shape
