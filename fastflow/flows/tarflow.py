"""TarFlow: an autoregressive flow over image patches, each block a causal transformer."""

import torch
import torch.nn.functional as F
from torch import nn

from fastflow import checks, functional
from fastflow.autograd.differentiable import outside_inference_mode
from fastflow.flows import decode
from fastflow.flows.base import StandardNormal
from fastflow.flows.flow import Flow
from fastflow.flows.labels import check_labels
from fastflow.flows.patchify import Patchify
from fastflow.flows.transform import Compose
from fastflow.nn.precision import taken
from fastflow.nn.transformer import TransformerLayer

__all__ = ["CONFIGS", "TarFlow", "TarFlowBlock"]

# Named patch-channels-blocks-layers as in the paper, with the data set that they were trained on.
CONFIGS = {
    "imagenet64-2-768-8-8": {"image_shape": (3, 64, 64), "patch_size": 2, "channels": 768},  # 2.99 bits/dim
    "imagenet64-2-1024-8-8": {"image_shape": (3, 64, 64), "patch_size": 2, "channels": 1024, "num_classes": 1000},
    "imagenet128-4-1024-8-8": {"image_shape": (3, 128, 128), "patch_size": 4, "channels": 1024, "num_classes": 1000},
    "afhq256-8-768-8-8": {"image_shape": (3, 256, 256), "patch_size": 8, "channels": 768, "num_classes": 3},
}


class _CausalTransformer(nn.Module):
    """Tokens (B, T, D) to (B, T, 2D), of which those at i are made of tokens up to i and of the label."""

    def __init__(self, tokens, features, channels, layers, head_dim, expansion, num_classes):
        super().__init__()
        self.takes_context = bool(num_classes)
        self.proj_in = nn.Linear(features, channels)
        self.pos_embed = nn.Parameter(1e-2 * torch.randn(tokens, channels))
        self.class_embed = nn.Parameter(1e-2 * torch.randn(num_classes, channels)) if num_classes else None
        self.layers = nn.ModuleList(TransformerLayer(channels, channels // head_dim, expansion=expansion)
                                    for _ in range(layers))
        self.proj_out = nn.Linear(channels, 2 * features)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x, labels=None, *, rows=None, cache=None, temperature=None):
        """
        Args:
            x: (B, T, D), or the n tokens at the positions ``rows`` (n,) alone, with what came before in ``cache``.
            labels: (B,) int64, -1 for none; or None.
            temperature: of the attention, see :class:`TransformerLayer`.
        """
        place = self.pos_embed if rows is None else self.pos_embed.index_select(0, rows)
        h = self.proj_in(taken(x, self.proj_in.weight)) + place
        if self.class_embed is not None:
            h = h + self._embed(labels)
        for index, layer in enumerate(self.layers):
            remember = None if cache is None else lambda k, v, index=index: cache.extend(index, k, v)
            h = layer(h, causal=True, remember=remember, temperature=temperature)
        return self.proj_out(h)

    def _embed(self, labels):
        mean = self.class_embed.mean(0)
        if labels is None:
            return mean
        known = F.embedding(labels.clamp(min=0), self.class_embed)
        return torch.where(labels[:, None] < 0, mean, known)[:, None]


class TarFlowBlock(nn.Module):
    """z_i = (x_i - mu_i) * exp(-alpha_i), with alpha_i and mu_i made by a causal transformer of the tokens before i.

    Tokens are (B, T, D), T >= 2; the first passes unchanged. From x to z it is one pass. The inverse goes token by
    token; without gradients it keeps keys and values in a preallocated cache (:meth:`TarFlow.sample` on a CUDA device
    also replays the step as a CUDA graph). The Jacobian is block-triangular, log|det| = -sum(alpha). It starts as the
    identity.

    Args:
        tokens, features: T and D.
        channels: width of the transformer, a multiple of ``head_dim``.
        layers: its depth.
        flip: whether the sequence is taken from last to first.
        head_dim, expansion: width of an attention head; hidden width of an MLP over ``channels``.
        num_classes: number of labels 0..num_classes-1 that condition the map; 0 for none.

    References:
        Zhai et al., "Normalizing flows are capable generative models", 2025, arXiv:2412.06329.
    """

    def __init__(self, tokens, features, channels, layers, *, flip=False, head_dim=64, expansion=4, num_classes=0):
        super().__init__()
        for name, value, least in (("tokens", tokens, 2), ("features", features, 1), ("channels", channels, 1),
                                   ("layers", layers, 1), ("head_dim", head_dim, 1), ("expansion", expansion, 1),
                                   ("num_classes", num_classes, 0)):
            checks.count(name, value, least)
        if channels % head_dim:
            raise ValueError(f"channels: expected a multiple of head_dim = {head_dim}, got {channels}")
        self.token_shape, self.num_classes, self.flip = (tokens, features), num_classes, bool(flip)
        self.network = _CausalTransformer(tokens, features, channels, layers, head_dim, expansion, num_classes)

    def forward(self, x, context=None):
        """(z, logdet (B,)) of tokens x (B, T, D); ``context``: labels (B,) int64, -1 for none, or None."""
        self.check("x", x, context)
        if self.flip:
            x = x.flip(1)
        params = self.network(x, context)[:, :-1].chunk(2, 2)
        # Tokens stand where channels would: the first one passes, and params need not be shifted.
        z, logdet = functional.affine_coupling(x, params, scale=decode.SCALE, shift_first=True, passive=1)
        return z.flip(1) if self.flip else z, logdet

    def inverse(self, z, context=None):
        """(x, logdet (B,)) of z (B, T, D), with gradients if they are enabled."""
        self.check("z", z, context)
        if not torch.is_grad_enabled():
            return decode.decoder("sequential", 0.0, False)(self, z, context)
        z = z.flip(1) if self.flip else z
        x, logdet = decode.step_by_step_with_gradients(self.network, z, context)
        return x.flip(1) if self.flip else x, logdet

    def check(self, name, value, context):
        """The arguments of both directions fit."""
        checks.tensor(name, value)
        checks.events(name, value, self.token_shape)
        checks.goes_with(name, value, "weight", self.network.proj_in.weight)
        if context is None:
            return
        if self.num_classes == 0:
            raise ValueError("context: expected None, because num_classes is 0")
        checks.tensor("context", context, floating=False)
        checks.shape("context", context, (value.shape[0],))
        checks.same_device("context", context, name, value)
        if context.dtype != torch.int64:
            raise TypeError(f"context: expected labels in int64, got {context.dtype}")
        check_labels("context", context, self.num_classes, "num_classes")

    def extra_repr(self):
        return f"tokens={self.token_shape[0]}, features={self.token_shape[1]}, flip={self.flip}"


class TarFlow(Flow):
    """Transformer autoregressive flow for images (B, C, H, W) with values around [-0.5, 0.5].

    Images are multiplied by ``data_scale`` and cut into T = HW / P^2 patches of D = C P^2 values; ``blocks``
    :class:`TarFlowBlock` follow, which take the sequence from first to last and from last to first in turn. The base is
    N(0, I) over tokens z (B, T, D). Densities take one pass through each block, samples one small step per token and
    block. As ``context``, labels (B,) int64 condition the density; -1, or no context, takes the mean of the class
    embeddings, which training teaches by setting some labels to -1 (a tenth in the paper).

    Likelihood models train on dequantised images (integer ones, in ``engine.TrainStep``). For the best samples the
    paper adds Gaussian noise to the images instead, x + s * randn (s = 0.05 with images in [-1, 1], 0.025 here),
    samples under guidance and denoises: ``model.denoise(model.sample(n, guidance=...), s)``.

    Args:
        image_shape: (C, H, W), H and W divisible by ``patch_size``, at least two patches.
        patch_size: P. The defaults are the paper's for likelihoods on ImageNet 64.
        channels: width of the transformers, a multiple of ``head_dim``.
        blocks: number of blocks, T in the paper.
        layers_per_block: depth of each transformer, K in the paper.
        num_classes: number of labels; 0 for an unconditional model.
        head_dim, expansion: width of an attention head; hidden width of an MLP over ``channels``.
        data_scale: multiplies the images; 2 gives the transformers values in [-1, 1], as in the paper.

    Raises:
        ValueError, TypeError: a size that does not fit; the message names the argument.

    References:
        Zhai et al., "Normalizing flows are capable generative models", 2025, arXiv:2412.06329.
    """

    configs = CONFIGS

    def __init__(self, image_shape, patch_size=2, channels=768, blocks=8, layers_per_block=8, *, num_classes=0,
                 head_dim=64, expansion=4, data_scale=2.0):
        patches = Patchify(image_shape, patch_size, scale=data_scale)
        blocks = checks.count("blocks", blocks, 1)
        if patches.token_shape[0] < 2:
            raise ValueError(f"patch_size: expected at least two patches in an image of {patches.image_shape}, "
                             f"got {patch_size}")
        layers = [TarFlowBlock(*patches.token_shape, channels, layers_per_block, flip=index % 2 == 1, head_dim=head_dim,
                               expansion=expansion, num_classes=num_classes) for index in range(blocks)]
        super().__init__(Compose(patches, *layers), StandardNormal(patches.token_shape))
        self.image_shape, self.num_classes = patches.image_shape, num_classes

    def shard_groups(self):
        """The blocks: each is a group of FSDP2's."""
        return list(self.transform.transforms)[1:]

    @torch.no_grad()
    def sample(self, n, context=None, *, generator=None, temperature=1.0, guidance=0.0, method="sequential",
               capture=None):
        """n samples, without gradients.

        Args:
            n: number of samples, for each label if a context is given.
            context: labels (B,) int64, -1 for none, or None.
            generator: torch.Generator of the noise, None for torch's own.
            temperature: factor on the base's standard deviation.
            guidance: weight of classifier-free guidance, or a :class:`Guidance`; 0 for samples of the density.
            method: "sequential", token by token; "jacobi" or a :class:`GaussSeidelJacobi`, by fixed-point iteration.
            capture: whether a token's step is recorded as a CUDA graph and replayed; None: on CUDA devices.

        Returns:
            (n, C, H, W), with a context (n, B, C, H, W).
        """
        solve = decode.decoder(method, guidance, capture)
        z, context, lead = self._noise(n, context, generator, temperature)
        patches, *blocks = self.transform.transforms
        for block in reversed(blocks):
            block.check("z", z, context)
            z = solve(block, z, context)[0]
        return patches.inverse(z)[0].unflatten(0, lead)

    @outside_inference_mode
    def denoise(self, x, noise_std, context=None):
        """The mean of the clean images given noisy ones, x + noise_std^2 * grad log p(x) (Tweedie's formula).

        For a model trained on images with Gaussian noise of that deviation, whose samples are noisy likewise. Gradients
        do not pass through.

        Args:
            x: (*, C, H, W), such as a result of :meth:`sample`.
            noise_std: standard deviation of the noise in units of x.
            context: labels (*,) that broadcast against x's leading dimensions, or None.

        Returns:
            tensor like x.

        References:
            Efron, "Tweedie's formula and selection bias", 2011. Zhai et al., 2025, arXiv:2412.06329, section 2.
        """
        checks.tensor("x", x)
        lead = x.shape[:-3]
        if x.shape[-3:] != torch.Size(self.image_shape):
            raise ValueError(f"x: expected shape (*, {', '.join(map(str, self.image_shape))}), got {tuple(x.shape)}")
        if not 0.0 <= noise_std < float("inf"):
            raise ValueError(f"noise_std: expected a number >= 0, got {noise_std!r}")
        if context is not None:
            context = context.expand(lead).reshape(-1)
        with torch.enable_grad():
            noisy = x.detach().reshape(-1, *self.image_shape).requires_grad_()
            score, = torch.autograd.grad(self.log_prob(noisy, context).sum(), noisy)
        return x.detach() + noise_std**2 * score.reshape(x.shape)
