"""The conditioner of a Glow as for CIFAR-10 alone, forward and backward at each level, as graphs: Triton's kernels
beside cuDNN's convolutions, in TF32 and in bfloat16."""

import torch

from benchmarks.gpu import measuring
from fastflow import backends, functional

FULL, TINY = (64, 32, 512), (2, 8, 16)  # batch, side of the images, hidden channels
LEVELS = 3


def _operands(batch, channels, side, hidden, device, dtype):
    """x and the parameters, channels-last, of a size that keeps the maps' scale."""
    def normal(*shape):
        t = torch.randn(shape, device=device) * (1.0 if len(shape) == 1 else shape[1] ** -0.5)
        return t.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else t

    found = (normal(batch, channels, side, side), normal(hidden, channels, 3, 3), normal(hidden),
             normal(hidden, hidden, 1, 1), normal(hidden), normal(2 * channels, hidden, 3, 3), normal(2 * channels))
    return [t.to(dtype).requires_grad_() for t in found]


def levels(device, tiny):
    """A row for each level and dtype."""
    batch, side, hidden = TINY if tiny else FULL
    for level in range(2 if tiny else LEVELS):
        channels, side = 6 << level, side // 2
        macs = batch * side**2 * hidden * (9 * channels + hidden + 18 * channels)
        for dtype in (torch.float32, torch.bfloat16):
            operands = _operands(batch, channels, side, hidden, device, dtype)
            grad = torch.randn(batch, 2 * channels, side, side, device=device, dtype=dtype).contiguous(
                memory_format=torch.channels_last)

            def step(backend=None, operands=operands, grad=grad):
                with backends.use_backend(backend):
                    return torch.autograd.grad(functional.conv_net(*operands), operands, grad)

            yield measuring.measure(measuring.Contest(
                f"conditioner {channels}-{hidden}-{hidden}-{2 * channels} channels, batch {batch}, {side}x{side}, "
                f"{'TF32' if dtype == torch.float32 else 'bfloat16'}, forward+backward, graphs", "conv_net",
                {"fastflow": lambda step=step: measuring.captured(step, device),
                 "cuDNN": lambda step=step: measuring.captured(lambda: step("reference"), device)},
                batch, 6 * macs, bf16=("fastflow", "cuDNN") if dtype == torch.bfloat16 else ()), device)
