"""Glow's convolutional conditioner in one pass."""

import functools

import torch

from fastflow import backends, checks, measured, reference
from fastflow.autograd import conv_net as _conv_net
from fastflow.autograd.differentiable import apply, distinct, needs_grad

__all__ = ["conv_net"]


def conv_net(x, w1, b1, w2, b2, w3, b3, *, negative_slope=0.0):
    """Glow's conditioner in one pass: convolutions 3x3, 1x1 and 3x3, padded with zeros, rectified after the first two.

    out = conv(r(conv(r(conv(x, w1) + b1), w2) + b2), w3) + b3 with r(h) = max(h, 0) + negative_slope * min(h, 0). The
    CPU kernel takes a sample through all three while its hidden maps lie in the cache, for hidden channels in multiples
    of 16. On a GPU, with 128 hidden channels or more and at most 64 others, Triton's kernels compute them as products
    over the pixels, with bias, rectifier and what the gradients share within: four launches forward and up to six
    backward. They multiply in TF32 where torch lets convolutions do that (where not, and in float64, cuDNN is left to
    it), and under autocast in its dtype. Else, and on a GPU before compute capability 8.0, the convolutions are
    PyTorch's.

    In float32, for images of even height and width above 2 and I + O >= 12, the CPU kernel's 3x3 convolutions run in
    Winograd's form F(2x2, 3x3), within the same bound on the error; samples with a result that is not finite, and
    gradients of weights that are not, are computed again from plain sums.

    Within :func:`fastflow.measured.trying`, as in engine.TrainStep, Triton's kernels are tried beside the library's
    convolutions on a GPU, and the faster ones serve each shape.

    Args:
        x: (B, I, H, W), any strides.
        w1, b1: (N, I, 3, 3) and (N,), N the hidden channels.
        w2, b2: (N, N, 1, 1) and (N,).
        w3, b3: (O, N, 3, 3) and (O,).
        negative_slope: slope of the rectifier below zero, 0 <= negative_slope.

    Returns:
        (B, O, H, W) in x's memory format and in the dtype that all operands share.

    Raises:
        ValueError: a shape or device does not fit, or the slope is negative; the message names the argument.
        TypeError: not a tensor, or a dtype that is not floating or not x's.

    References:
        Kingma and Dhariwal, "Glow", 2018, arXiv:1807.03039, section 5. Lavin and Gray, "Fast Algorithms for
        Convolutional Neural Networks", 2016, arXiv:1509.09308.
    """
    checks.tensor("x", x)
    if x.dim() != 4:
        raise ValueError(f"x: expected shape (B, I, H, W), got {tuple(x.shape)}")
    checks.number("negative_slope", negative_slope)
    if not negative_slope >= 0.0:
        raise ValueError(f"negative_slope: expected a number >= 0, got {negative_slope!r}")
    checks.tensor("w1", w1)
    checks.tensor("w3", w3)
    hidden, out = w1.shape[:1], w3.shape[:1]
    for name, value, expected in (("w1", w1, (*hidden, x.shape[1], 3, 3)), ("b1", b1, hidden),
                                  ("w2", w2, (*hidden, *hidden, 1, 1)), ("b2", b2, hidden),
                                  ("w3", w3, (*out, *hidden, 3, 3)), ("b3", b3, out)):
        checks.tensor(name, value)
        checks.shape(name, value, expected)
        checks.same_device(name, value, "x", x)
        if value.dtype != x.dtype:
            raise TypeError(f"{name}: expected {x.dtype} like x, got {value.dtype}")
    operands = (x, w1, b1, w2, b2, w3, b3)
    backend = backends.choose("conv_net", *operands)
    if backend == "triton":
        backend = measured.fastest(backend, operands, {
            name: functools.partial(_run, name, float(negative_slope)) for name in ("triton", "reference")}, "conv_net")
    return _run(backend, float(negative_slope), *operands)


def _run(backend, slope, x, *params):
    if backend == "reference":
        return reference.conv_net(x, *params, negative_slope=slope)
    if backend == "triton" and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if needs_grad(x, *params):
        return apply(_conv_net.ConvNetFunction, *distinct(x, *params), backend, slope)
    return _conv_net.forward(backend, (x, *params), slope)[0]
