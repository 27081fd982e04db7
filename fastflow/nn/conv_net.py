"""Glow's conditioner for images, with a backward that makes fewer passes over the hidden maps."""

import torch
import torch.nn.functional as F
from torch import nn

from fastflow import backends
from fastflow.autograd import differentiable

__all__ = ["ConvNet"]


class ConvNet(nn.Module):
    """Convolutions 3x3, 1x1 and 3x3 with ReLU between, and plain biases; the last one starts at zero, so that a coupling
    starts simple. It answers in the memory format of its input.

    Args:
        in_channels, out_channels: channels of input and output.
        hidden_channels: channels between.
    """

    def __init__(self, in_channels, out_channels, hidden_channels):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, hidden_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden_channels, hidden_channels, 1)
        self.conv3 = nn.Conv2d(hidden_channels, out_channels, 3, padding=1)
        for layer in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.conv3.weight)
        nn.init.zeros_(self.conv3.bias)

    def forward(self, x, context=None):
        operands = (x, self.conv1.weight, self.conv1.bias, self.conv2.weight, self.conv2.bias, self.conv3.weight,
                    self.conv3.bias)
        # A convolution would make its input dense by itself, but once for each pass.
        if _lean(operands):
            return _ConvNetFunction.apply(*operands)
        return _conv_net(*operands)


def _lean(operands):
    """Whether the hand-written backward applies: eager training on a CPU, where fresh memory is what passes cost."""
    x = operands[0]
    return (x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu") and backends.needs_reference(operands) is None)


def _conv_net(x, w1, b1, w2, b2, w3, b3):
    h = F.relu(F.conv2d(x, w1, b1, padding=1), inplace=True)  # a convolution does not keep its own output
    return F.conv2d(F.relu(F.conv2d(h, w2, b2), inplace=True), w3, b3, padding=1)


def _backward(grad, x, weight, mask):
    return torch.ops.aten.convolution_backward(grad, x, weight, [len(weight)], [1, 1], [weight.shape[2] // 2] * 2, [1, 1],
                                               False, [0, 0], 1, mask)


class _ConvNetFunction(torch.autograd.Function):
    """_conv_net whose backward applies the ReLU's mask in place to the gradients that it made itself."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, w3, b3):
        x = x.contiguous(memory_format=torch._prims_common.suggest_memory_format(x))
        h1 = F.conv2d(x, w1, b1, padding=1).relu_()
        h2 = F.conv2d(h1, w2, b2).relu_()
        ctx.save_for_backward(x, w1, b1, w2, b2, w3, b3, h1, h2)
        return F.conv2d(h2, w3, b3, padding=1)

    @staticmethod
    def backward(ctx, grad):
        *operands, h1, h2 = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if differentiable.wanted((grad,)):
            return tuple(differentiable.reference_grads(lambda *args: (_conv_net(*args),), operands, needs, (grad,)))
        x, w1, _, w2, _, w3, _ = operands
        mask = torch.ops.aten.threshold_backward.grad_input
        g2, grad_w3, grad_b3 = _backward(grad, h2, w3, [True, needs[5], needs[6]])
        mask(g2, h2, 0, grad_input=g2)
        g1, grad_w2, grad_b2 = _backward(g2, h1, w2, [True, needs[3], needs[4]])
        mask(g1, h1, 0, grad_input=g1)
        grad_x, grad_w1, grad_b1 = _backward(g1, x, w1, [needs[0], needs[1], needs[2]])
        return grad_x, grad_w1, grad_b1, grad_w2, grad_b2, grad_w3, grad_b3
