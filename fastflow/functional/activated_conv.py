"""A convolution of an activated map."""

import torch

from fastflow import backends, checks, reference
from fastflow.autograd import activated_conv as _activated
from fastflow.autograd.differentiable import apply, distinct, needs_grad

__all__ = ["activated_conv"]


def activated_conv(x, weight, bias=None, *, stride=1, padding=0, transposed=False, activation="none",
                   channels_last=None):
    """conv2d(activation(x)) or conv_transpose2d(activation(x)) in one pass, forward and backward.

    The activated map is made sample by sample on its way through the cache and is not kept: backward makes it again.
    A transposed convolution runs as one dense convolution for each residue of the output's position modulo the
    stride, without zeros between its inputs. Square kernels of 2 or 3 taps for each residue (3x3 with stride 1, 4x4
    with stride 2) run in Winograd's form in float32, forward and backward, where both sides have channels in multiples
    of 16, and 32 on the side with fewer positions: it takes about half of the multiplications. The CPU kernel takes
    weights whose first dimension is a multiple of 16, up to a size; for others, on other devices, in half precision
    and under autocast the layers are PyTorch's.

    Args:
        x: (B, I, H, W), any strides.
        weight: (O, I, kh, kw), or (I, O, kh, kw) if transposed.
        bias: (O,) or None.
        stride, padding: of both dimensions, as in torch.nn.functional.conv2d.
        transposed: conv_transpose2d, without output padding.
        activation: "none", "relu" or "silu".
        channels_last: memory format of the result; None: that of x, or what PyTorch's layers answer in.

    Returns:
        (B, O, H', W') in the dtype that all operands share.

    Raises:
        ValueError: a shape, device or option does not fit; the message names the argument.
        TypeError: not a tensor, or a dtype that is not floating or not x's.
    """
    checks.tensor("x", x)
    checks.tensor("weight", weight)
    if x.dim() != 4:
        raise ValueError(f"x: expected shape (B, I, H, W), got {tuple(x.shape)}")
    inputs = 0 if transposed else 1
    if weight.dim() != 4 or weight.shape[inputs] != x.shape[1] or 0 in weight.shape[2:]:
        expected = "(I, O, kh, kw)" if transposed else "(O, I, kh, kw)"
        raise ValueError(f"weight: expected shape {expected} with I = {x.shape[1]}, got {tuple(weight.shape)}")
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an int >= {least}, got {value!r}")
    checks.choice("activation", activation, reference.LAYER_ACTIVATIONS)
    for size, taps in zip(x.shape[2:], weight.shape[2:], strict=True):
        if (size - 1) * stride - 2 * padding + taps < 1 if transposed else size + 2 * padding < taps:
            raise ValueError(f"padding: expected one that leaves an output for x of shape {tuple(x.shape)} and kernel "
                             f"{tuple(weight.shape[2:])}, got {padding}")
    if bias is not None:
        checks.tensor("bias", bias)
        checks.shape("bias", bias, (weight.shape[1 - inputs],))
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        checks.same_device(name, value, "x", x)
        if value.dtype != x.dtype:
            raise TypeError(f"{name}: expected {x.dtype} like x, got {value.dtype}")
    backend = backends.choose("activated_conv", x, weight, bias)
    if backend == "reference":
        return reference.activated_conv(x, weight, bias, stride=stride, padding=padding, transposed=transposed,
                                        activation=activation, channels_last=channels_last)
    if channels_last is None:
        channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    consts = stride, padding, bool(transposed), reference.LAYER_ACTIVATIONS.index(activation), bool(channels_last)
    if needs_grad(x, weight, bias):
        return apply(_activated.ActivatedConvFunction, *distinct(x, weight, bias), backend, consts)
    return _activated.forward(backend, x, weight, bias, consts)
