"""One matrix and one offset along the channels, as a step of a chain."""

import torch

__all__ = ["ChannelsStep", "images", "rows"]


def rows(x):
    """x (B, C, *S) as (B*S, C), a view where the channels are adjacent."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def images(values, like):
    """Rows of as many channels as ``like`` (B, C, *S) has, in its shape."""
    return values.view(like.shape[0], *like.shape[2:], like.shape[1]).movedim(-1, 1)


class ChannelsStep:
    """matrix @ x + offset along dim 1. Tensors: matrix, offset."""

    @staticmethod
    def forward(x, logdet, tensors, consts, keep):
        matrix, offset = tensors
        values = rows(x)
        y = values @ matrix.t() if offset is None else torch.addmm(offset, values, matrix.t())
        return images(y, x), logdet, x

    @staticmethod
    def backward(grad_y, grad_logdet, tensors, saved, consts, need_x, needs):
        if grad_y is None:
            return None, [None, None]
        (x,), grad = saved, rows(grad_y)
        return (images(grad @ tensors[0], x) if need_x else None,
                [grad.t() @ rows(x) if needs[0] else None, grad.sum(0) if needs[1] else None])

    @staticmethod
    def reference(x, tensors, consts):
        return torch.nn.functional.linear(x.movedim(1, -1), *tensors).movedim(-1, 1), None
