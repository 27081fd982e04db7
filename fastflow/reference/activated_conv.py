"""A convolution of an activated map, in eager PyTorch."""

import torch
import torch.nn.functional as F

__all__ = ["LAYER_ACTIVATIONS", "activated_conv"]

LAYER_ACTIVATIONS = ("none", "relu", "silu")


def activated_conv(x, weight, bias=None, *, stride=1, padding=0, transposed=False, activation="none",
                   channels_last=None):
    """conv2d or conv_transpose2d of activation(x); see functional.activated_conv."""
    h = x if activation == "none" else F.relu(x) if activation == "relu" else F.silu(x)
    convolution = F.conv_transpose2d if transposed else F.conv2d
    result = convolution(h, weight, bias, stride, padding)
    if channels_last is None:
        return result
    return result.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
