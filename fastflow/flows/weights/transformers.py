"""Published weights of TarFlow and Jet."""

import math

import torch

from fastflow.flows.bases import DiagonalNormal
from fastflow.flows.jet import Jet
from fastflow.flows.tarflow import TarFlow
from fastflow.flows.weights.state import State, copy

__all__ = ["load_jet", "load_tarflow"]


def load_tarflow(state_dict, *, image_shape=None, head_dim=64):
    """The :class:`TarFlow` of a state dict with the keys of apple/ml-tarflow.

    Those are ``blocks.t.{proj_in, pos_embed, class_embed, attn_blocks.k.{attention.{norm, qkv, proj}, mlp.{norm,
    main.0, main.2}}, proj_out}`` and the buffers ``var`` and ``attn_mask``. The model gives, for images x in
    [-0.5, 0.5), the density of 2x under the original; a prior variance ``var`` other than 1 becomes a DiagonalNormal.

    Args:
        state_dict: {key: tensor}; keys may all begin with "module.".
        image_shape: (C, H, W); None for a square image of 3 channels, which the keys do not tell.
        head_dim: width of an attention head, which they do not tell either.

    Returns:
        TarFlow in float32, in float64 if the weights are.

    Raises:
        ValueError: a missing or an unexpected key, or a shape that does not fit; the message names it.
    """
    state = State(state_dict)
    blocks = state.count(r"blocks\.(\d+)\.")
    tokens, channels = state.size("blocks.0.pos_embed", 0), state.size("blocks.0.pos_embed", 1)
    features = state.size("blocks.0.proj_in.weight", 1)
    layers = state.count(r"blocks\.0\.attn_blocks\.(\d+)\.")
    expansion = state.size("blocks.0.attn_blocks.0.mlp.main.0.weight", 0) // channels
    labelled = "blocks.0.class_embed" in state.left
    num_classes = state.size("blocks.0.class_embed", 0) if labelled else 0
    image_shape, patch_size = _image(image_shape, tokens, features)
    model = TarFlow(image_shape, patch_size, channels, blocks, layers, num_classes=num_classes, head_dim=head_dim,
                    expansion=expansion).double()
    for index, block in enumerate(model.transform.transforms[1:]):
        net, prefix = block.network, f"blocks.{index}."
        _linear(state, net.proj_in, prefix + "proj_in")
        positions = state.take(prefix + "pos_embed", (tokens, channels))
        copy(net.pos_embed, positions.flip(0) if block.flip else positions)  # the original flips them with the tokens
        if labelled:
            copy(net.class_embed, state.take(prefix + "class_embed", (num_classes, 1, channels)))
        for number, layer in enumerate(net.layers):
            start = f"{prefix}attn_blocks.{number}."
            for target, name in ((layer.attention_norm, "attention.norm"), (layer.qkv, "attention.qkv"),
                                 (layer.proj, "attention.proj"), (layer.mlp_norm, "mlp.norm"),
                                 (layer.up, "mlp.main.0"), (layer.down, "mlp.main.2")):
                _linear(state, target, start + name)
        _linear(state, net.proj_out, prefix + "proj_out")
        state.discard(prefix + "attn_mask")
    if "var" in state.left:
        variance = state.take("var", (tokens, features))
        if not torch.equal(variance, torch.ones_like(variance)):
            model.base = DiagonalNormal((tokens, features)).double()
            copy(model.base.log_scale, 0.5 * torch.log(variance))
    state.finish()
    return model.to(state.dtype)


def load_jet(state_dict, *, image_shape=None, patch_size=4):
    """The :class:`Jet` of flattened keys of google-research/big_vision.

    Those are, under "params/" or not, ``couplings/dnn/{init_proj, posemb, vit/encoderblock_k/{LayerNorm_0,
    MultiHeadDotProductAttention_0/{query, key, value, out}, LayerNorm_1, MlpBlock_0/{Dense_0, Dense_1}},
    vit/encoder_norm, final_proj}``, each with the couplings along a first axis, and the permutation matrices
    ``channel_coupling_masks-FREEZE_ME`` and ``spatial_coupling_masks-FREEZE_ME``, zero where a coupling is of the other
    kind. The model gives, for images x, the density of 2x under the original, whose values v of 0..255 are v/127.5 - 1.

    Args:
        state_dict: {key: NumPy array or tensor}.
        image_shape: (C, H, W); None for a square image, whose channels ``patch_size`` tells.
        patch_size: P, which the keys do not tell.

    Returns:
        Jet in float32, in float64 if the weights are.

    Raises:
        ValueError: a missing or an unexpected key, or a shape that does not fit; the message names it.
    """
    state = State(state_dict, "params/")
    root = "couplings/dnn/"
    couplings, features = (state.size("channel_coupling_masks-FREEZE_ME", dim) for dim in (0, 1))
    tokens = state.size("spatial_coupling_masks-FREEZE_ME", 1)
    channel_masks = state.take("channel_coupling_masks-FREEZE_ME", (couplings, features, features))
    spatial_masks = state.take("spatial_coupling_masks-FREEZE_ME", (couplings, tokens, tokens))
    channels = state.size(root + "init_proj/kernel", 2)
    depth = state.count(root + r"vit/encoderblock_(\d+)/")
    heads = state.size(root + "vit/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel", 2)
    image_shape, patch_size = _image(image_shape, tokens, features, patch_size)
    kinds = tuple("channel" if mask.any() else "spatial" for mask in channel_masks)
    model = Jet(image_shape, patch_size=patch_size, channels=channels, couplings=couplings, depth=depth, heads=heads,
                kinds=kinds, spatial=("checkerboard",)).double()
    stacked = _stacked(state, root, depth, couplings, tokens, features, channels, heads)
    state.finish()
    layers = model.transform.transforms[1:]
    for index, (gather, coupling, back) in enumerate(zip(layers[0::3], layers[1::3], layers[2::3], strict=True)):
        kind = "channel" if gather.channel else "spatial"
        order = _order((channel_masks if gather.channel else spatial_masks)[index],
                       f"{state.prefix}{kind}_coupling_masks-FREEZE_ME", index)
        gather.order.copy_(order)
        back.order.copy_(order)
        for name, parameter in coupling.conditioner.named_parameters():
            copy(parameter, stacked[name][index])
    return model.to(state.dtype)


def _stacked(state, root, depth, couplings, tokens, features, channels, heads):
    """{parameter of a conditioner: its values for all couplings}."""
    found, width = {}, channels // heads

    def dense(name, key, rows, columns):
        kernel = state.take(key + "/kernel", (couplings, *rows, *columns))
        found[name + ".weight"] = kernel.reshape(couplings, math.prod(rows), math.prod(columns)).mT
        found[name + ".bias"] = state.take(key + "/bias", (couplings, *columns)).flatten(1)

    def norm(name, key):
        found[name + ".weight"] = state.take(key + "/scale", (couplings, channels))
        found[name + ".bias"] = state.take(key + "/bias", (couplings, channels))

    dense("proj_in", root + "init_proj", (features // 2,), (channels,))
    found["pos_embed"] = state.take(root + "posemb", (couplings, 1, tokens, channels))
    for layer in range(depth):
        name, key = f"layers.{layer}.", f"{root}vit/encoderblock_{layer}/"
        norm(name + "attention_norm", key + "LayerNorm_0")
        attention = key + "MultiHeadDotProductAttention_0/"
        for part in ("query", "key", "value"):
            dense(part, attention + part, (channels,), (heads, width))
        for kind in ("weight", "bias"):
            found[f"{name}qkv.{kind}"] = torch.cat([found.pop(f"{part}.{kind}") for part in ("query", "key", "value")],
                                                   1)
        dense(name + "proj", attention + "out", (heads, width), (channels,))
        norm(name + "mlp_norm", key + "LayerNorm_1")
        dense(name + "up", key + "MlpBlock_0/Dense_0", (channels,), (4 * channels,))
        dense(name + "down", key + "MlpBlock_0/Dense_1", (4 * channels,), (channels,))
    norm("norm", root + "vit/encoder_norm")
    dense("proj_out", root + "final_proj", (channels,), (features,))
    return found


def _order(mask, key, index):
    """The indices that a permutation matrix, applied from the right, gathers."""
    order = mask.argmax(0)
    if not torch.equal(mask, torch.zeros_like(mask).index_put_((order, torch.arange(len(order))), mask.new_ones(()))) \
            or len(order.unique()) < len(order):
        raise ValueError(f"state_dict: expected a permutation matrix at {index} of {key!r}, got another one")
    return order


def _image(image_shape, tokens, features, patch_size=None):
    """(image_shape, patch_size) of T tokens of D features each."""
    if image_shape is None:
        size = math.isqrt(features // 3) if patch_size is None else patch_size
        side = math.isqrt(tokens)
        image_shape, patch_size = (features // size**2, side * size, side * size), size
    else:
        channels, height, width = image_shape
        patch_size = math.isqrt(features // channels) if patch_size is None else patch_size
    channels, height, width = image_shape
    if channels * patch_size**2 != features or height * width != tokens * patch_size**2:
        raise ValueError(f"image_shape: expected one that {tokens} patches of {features} values make, got "
                         f"{tuple(image_shape)} with patch_size = {patch_size}")
    return tuple(image_shape), patch_size


def _linear(state, layer, key):
    copy(layer.weight, state.take(key + ".weight", layer.weight.shape))
    copy(layer.bias, state.take(key + ".bias", layer.bias.shape))
