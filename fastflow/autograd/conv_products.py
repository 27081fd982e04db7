"""Glow's conditioner on a GPU as matrix products over the pixels.

Its 3x3 convolutions have few channels on one side, and a library's kernels for them reach a fraction of the speed at
which the hidden maps come from memory. Here the first is a product with the nine taps of every pixel as columns, and
the last a product whose columns are then added up where they belong; with the 1x1 in the middle all the work is in
torch's matrix products, two of which add the bias and rectify.
"""

import contextlib

import torch

from fastflow import backends, extension, reference
from fastflow.autograd import differentiable
from fastflow.reference import taps

__all__ = ["ConvNetProducts", "recorded", "serves"]

MOST_CHANNELS = 64  # of input and output: beyond them the columns outweigh the hidden maps
LEAST_HIDDEN = 128
# Elements of a hidden map from which on the GPU, not its host, takes the time; below it only a recorded graph gains,
# for there are more calls to make than with a library's convolutions.
LARGE_MAP = 2**25
ALIGNED = 8  # columns: rows of every dtype begin at 16 bytes


_recorded = 0  # how many are inside recorded(), of all threads: backward may recompute in one of its own


@contextlib.contextmanager
def recorded():
    """What runs inside is recorded as a CUDA graph, or warms up for it: then calls cost their host nothing later."""
    global _recorded
    _recorded += 1
    try:
        yield
    finally:
        _recorded -= 1


def serves(x, w1, w3, slope):
    """Whether a call of functional.conv_net with these operands runs as products: on a GPU, in a pass of torch's own
    autograd, with as many hidden channels and as few others as make it worth it, for a graph or with large maps."""
    return (x.is_cuda and slope == 0.0 and not torch.compiler.is_compiling() and x.dtype == w1.dtype == w3.dtype
            and (_recorded > 0 or x.numel() // max(x.shape[1], 1) * w1.shape[0] >= LARGE_MAP)
            and w1.shape[0] >= LEAST_HIDDEN and max(x.shape[1], w3.shape[0]) <= MOST_CHANNELS and x.numel() > 0
            and backends.requested() is None and backends.needs_reference((x, w1, w3)) is None)


def _tool(name, t):
    """The Triton kernel of this name, or the reference where there is none for t."""
    if backends.refusal("triton", "affine_coupling", (t,)) is None:
        return extension.kernel("triton", name)
    return getattr(taps, name)


def _columns(channels):
    return -(-9 * channels // ALIGNED) * ALIGNED


def _padded(weight, rows=0, columns=0):
    return torch.nn.functional.pad(weight, (0, columns, 0, rows)) if rows or columns else weight


def _first(w1, columns):
    """(N, columns): w1 (N, I, 3, 3), taps before channels."""
    matrix = w1.permute(0, 2, 3, 1).reshape(len(w1), -1)
    return _padded(matrix, columns=columns - matrix.shape[1])


def _last(w3, columns):
    """(columns, N): w3 (O, N, 3, 3), channels before taps."""
    matrix = w3.permute(0, 2, 3, 1).reshape(-1, w3.shape[1])
    return _padded(matrix, rows=columns - len(matrix))


@contextlib.contextmanager
def _as_convolutions(device):
    """Products outside autocast, in TF32 where convolutions may be, as torch's older names for both say."""
    with reference.full_precision(device.type):
        matmul = torch.backends.cuda.matmul
        try:
            before, wanted = matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        except RuntimeError:  # set by torch's newer names, which the older ones refuse to read
            before = wanted = None
        if before == wanted or device.type != "cuda":
            yield
            return
        matmul.allow_tf32 = wanted
        try:
            yield
        finally:
            matmul.allow_tf32 = before


_keeps_nan = {}  # {size of a product, and whether in TF32: whether its kernel does}


def _rectified(bias, rows, weight):
    """max(rows @ weight.T + bias, 0), NaN kept.

    torch._addmm_activation leaves both to the product's kernel, and what that does with NaN is its own affair: it is
    asked once for each size, where the device may be asked, which it may not while a graph is recorded.
    """
    size = rows.device, rows.dtype, *rows.shape, len(weight), _tf32()
    keeps = _keeps_nan.get(size)
    if keeps is None and type(rows) is torch.Tensor and not (rows.is_cuda
                                                             and torch.cuda.is_current_stream_capturing()):
        keeps = _keeps_nan[size] = _epilogue_keeps_nan(bias, rows, weight)
    if keeps:
        return torch._addmm_activation(bias, rows, weight.t())
    return torch.addmm(bias, rows, weight.t()).relu_()


def _tf32():
    try:
        return torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # set by torch's newer names
        return None


def _epilogue_keeps_nan(bias, rows, weight):
    rows = torch.ones_like(rows)
    rows[len(rows) // 2] = float("nan")
    result = torch._addmm_activation(torch.ones_like(bias), rows, torch.ones_like(weight).t())
    return bool(result[len(rows) // 2].isnan().all())


@differentiable.direct
class ConvNetProducts(torch.autograd.Function):
    """The output for x, w1, b1, w2, b2, w3, b3, computed in ``dtype``. Saves the input's taps and both hidden maps."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, w3, b3, dtype):
        batch, channels, height, width = x.shape
        out, inner = len(w3), _columns(channels)
        with _as_convolutions(x.device):
            first, second = _first(w1.to(dtype), inner), w2.to(dtype).flatten(1)
            last = _last(w3.to(dtype), _columns(out))
            columns = _tool("gather_taps", x)(x.to(dtype), 1, False, inner)
            h1 = _rectified(b1.to(dtype), columns, first)
            h2 = _rectified(b2.to(dtype), h1, second)
            y = _tool("sum_taps", x)(h2 @ last.t(), b3, batch, out, height, width, 1, True)
        ctx.save_for_backward(x, w1, b1, w2, b2, w3, b3, columns, h1, h2, first, second, last)
        ctx.dtype = dtype
        # In the memory format of x, of which a slice of channels has the strides.
        return y if x.stride(1) == 1 or channels == 1 else y.contiguous()

    @staticmethod
    def backward(ctx, grad):
        *inputs, columns, h1, h2, first, second, last = ctx.saved_tensors
        needs = ctx.needs_input_grad[:7]
        if differentiable.wanted((grad,)):
            grads = differentiable.reference_grads(lambda *operands: (reference.conv_net(*operands),), inputs, needs,
                                                   (grad,))
            return (*grads, None)
        x, w1, _, w2, _, w3, b3 = inputs
        batch, channels, height, width = x.shape
        out, hidden = len(w3), len(w1)
        with _as_convolutions(x.device):
            gathered = _tool("gather_taps", x)(grad.to(ctx.dtype), -1, True, _columns(out))
            g_x = g_w1 = g_w2 = g_w3 = g_b3 = None
            if needs[5]:
                g_w3 = (gathered.t() @ h2)[:9 * out].view(out, 3, 3, hidden).permute(0, 3, 1, 2)
            if needs[6]:
                g_b3 = grad.sum((0, 2, 3), dtype=b3.dtype)
            grad_h, g_b2 = _tool("rectified_sum", x)(gathered @ last, h2)
            if needs[3]:
                g_w2 = (grad_h.t() @ h1).view_as(w2)
            grad_h, g_b1 = _tool("rectified_sum", x)(grad_h @ second, h1)
            if needs[1]:
                g_w1 = (grad_h.t() @ columns)[:, :9 * channels].view(hidden, 3, 3, channels).permute(0, 3, 1, 2)
            if needs[0]:
                g_x = _tool("sum_taps", x)(grad_h @ first, None, batch, channels, height, width, -1, False)
        grads = (g_x, g_w1, g_b1, g_w2, g_b2, g_w3, g_b3)
        return (*(g.to(t.dtype) if need else None for g, t, need in zip(grads, inputs, needs, strict=True)), None)
