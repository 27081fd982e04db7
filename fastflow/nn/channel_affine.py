"""One matrix and one offset along the channels, with weight gradients that a whole size class computes at once."""

import torch
from torch import nn

from fastflow import backends
from fastflow.autograd import differentiable
from fastflow.autograd.channel_affine import images, rows
from fastflow.functional import full_precision

__all__ = ["DEFERRED_ON", "Ledger", "channel_affine", "deferrable", "hand_out"]

# Where a launch saved is worth the two copies it costs; on a CPU a Glow step was 3% slower.
DEFERRED_ON = {"cuda"}


def channel_affine(x, matrix, offset, ledger=None, index=0):
    """matrix @ x + offset along dim 1 of x (B, C, *S), in x's memory format, as one matrix product; matrix (C', C).

    With a ``ledger`` backward computes x's gradient alone, and leaves what the gradients of matrix ``index`` and its
    offset need to the :func:`hand_out` that the matrix came from: four launches for all layers instead of two for each.
    """
    adjacent = x.dim() == 2 or x.stride(1) == 1
    if ledger is not None and adjacent and torch.is_grad_enabled() and deferrable(x, matrix, offset):
        return _DeferredAffine.apply(x, matrix, offset, ledger, index)
    if x.dim() == 2:
        return nn.functional.linear(x, matrix, offset)
    if x.stride(1) == 1:  # channels last: the pixels are the rows of a matrix
        return nn.functional.linear(x.movedim(1, -1), matrix, offset).movedim(-1, 1)
    batched, flat = matrix.expand(x.shape[0], *matrix.shape), x.flatten(2)
    y = torch.bmm(batched, flat) if offset is None else torch.baddbmm(offset[:, None], batched, flat)
    return y.view(x.shape[0], matrix.shape[0], *x.shape[2:])


def hand_out(matrix, shift=None, offset=None):
    """(matrices, offsets, ledger) of N layers y = matrix @ (x + shift), or y = matrix @ x + offset, in the second form;
    matrix (N, C, C), shift or offset (N, C) or neither. ``ledger`` is None where gradients can't be deferred (under
    torch.compile, which fuses and orders them itself, and torch.func) or need not be (:data:`DEFERRED_ON`)."""
    ledger = None
    if matrix.requires_grad and torch.is_grad_enabled() and deferrable(matrix, shift, offset):
        ledger = Ledger()
        matrix, offset = _Collect.apply(matrix, shift, offset, ledger)
    elif shift is not None:
        offset = _offsets(matrix, shift)
    offsets = [None] * len(matrix) if offset is None else offset.unbind(0)
    return matrix.unbind(0), offsets, ledger


def _offsets(matrix, shift):
    return torch.bmm(matrix, shift[:, :, None]).squeeze(-1)


def deferrable(*tensors):
    """Whether these operands are of a device where launches are worth saving, in a pass of torch's own autograd."""
    return (tensors[0].device.type in DEFERRED_ON and not torch.compiler.is_compiling()
            and backends.needs_reference(tensors) is None)


class Ledger:
    """What one backward pass has left to do: (index, gradient rows, input rows) of every layer that ran."""

    def __init__(self):
        self.task, self.entries = None, []

    def put(self, index, grad, x):
        task = torch._C._current_graph_task_id()
        if task != self.task:  # of a pass that asked for no weight's gradient
            self.task, self.entries = task, []
        self.entries.append((index, grad.detach(), x.detach()))

    def take(self):
        """The entries of the current pass, in the order of their layers."""
        entries = self.entries if self.task == torch._C._current_graph_task_id() else []
        self.task, self.entries = None, []
        return sorted(entries, key=lambda entry: entry[0])


class _DeferredAffine(torch.autograd.Function):
    """channel_affine of adjacent channels. The gradients of matrix and offset go through the ledger."""

    @staticmethod
    def forward(ctx, x, matrix, offset, ledger, index):
        ctx.save_for_backward(x, matrix, offset)
        ctx.ledger, ctx.index = ledger, index
        values = rows(x)
        y = values @ matrix.t() if offset is None else torch.addmm(offset, values, matrix.t())
        return images(y, x)

    @staticmethod
    def backward(ctx, grad):
        x, matrix, offset = ctx.saved_tensors
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], offset is not None and ctx.needs_input_grad[2])
        if differentiable.wanted((grad,)):
            grads = differentiable.reference_grads(lambda *inputs: (channel_affine(*inputs),), (x, matrix, offset),
                                                   needs, (grad,))
            return (*grads, None, None)
        values, grad_x = rows(grad), None
        with full_precision(x.device.type):
            if needs[0]:
                grad_x = images(values @ matrix, x)
        ctx.ledger.put(ctx.index, values, rows(x))
        return grad_x, None, None, None, None


class _Collect(torch.autograd.Function):
    """matrix (N, C, C) itself, and the offset itself or the offsets matrix @ shift. Backward adds what the ledger holds
    to the gradients that come the usual way."""

    @staticmethod
    def forward(ctx, matrix, shift, offset, ledger):
        ctx.set_materialize_grads(False)
        ctx.ledger = ledger
        ctx.save_for_backward(matrix, shift)
        if offset is not None:
            return matrix.view_as(matrix), offset.view_as(offset)
        return matrix.view_as(matrix), None if shift is None else _offsets(matrix, shift)

    @staticmethod
    def backward(ctx, grad_matrix, grad_offset):
        matrix, shift = ctx.saved_tensors
        entries, grad_shift = ctx.ledger.take(), None
        with full_precision(matrix.device.type):
            if entries:
                mine, offset = _weight_gradients(entries, matrix)
                grad_matrix = mine if grad_matrix is None else mine + grad_matrix
                grad_offset = offset if grad_offset is None else offset + grad_offset
            if shift is not None and grad_offset is not None:
                column, row = grad_offset[:, :, None], shift[:, None, :]
                if ctx.needs_input_grad[1]:
                    grad_shift = torch.bmm(matrix.mT, column).squeeze(-1)
                grad_matrix = torch.bmm(column, row) if grad_matrix is None else torch.baddbmm(grad_matrix, column, row)
        return grad_matrix, grad_shift, grad_offset if ctx.needs_input_grad[2] else None, None


def _weight_gradients(entries, matrix):
    """The gradients of matrix (N, C, C) and offset (N, C) of what the layers left."""
    indices, grads, inputs = zip(*entries, strict=True)
    if list(indices) == list(range(len(matrix))) and len({x.shape for x in inputs}) == 1:
        grads = torch.stack(grads)
        return torch.bmm(grads.mT, torch.stack(inputs)), grads.sum(1)
    of_matrix, of_offset = torch.zeros_like(matrix), matrix.new_zeros(matrix.shape[:2])
    for index, grad, x in entries:  # layers that did not run, ran twice, or at another size
        of_matrix[index] += grad.t() @ x
        of_offset[index] += grad.sum(0)
    return of_matrix, of_offset
