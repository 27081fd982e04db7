"""What a context adds to the hidden channels of a convolutional conditioner."""

import torch
from torch import nn

from fastflow import checks

__all__ = ["ContextShift"]


class ContextShift(nn.Module):
    """A linear map of a context vector, the same at every position, or a 3x3 convolution of a conditioning image.

    Built with neither, it stands for a network without a context and returns None.

    Args:
        hidden_channels: of the result.
        context_features: F of a context (B, F), or None.
        context_channels: channels of a context (B, C', H', W'), or None.
        arrange: module that brings a conditioning image to the positions of x, such as nn.PixelUnshuffle, without
            parameters; ``context_channels`` are counted behind it. None leaves it as it is.

    Raises:
        ValueError: both kinds of context; on a call, one of another shape, none where there should be one, or one where
            there should be none.
    """

    def __init__(self, hidden_channels, *, context_features=None, context_channels=None, arrange=None):
        super().__init__()
        if context_features is not None and context_channels is not None:
            raise ValueError("context_channels: expected None beside context_features, because a context is a vector "
                             f"or an image, got {context_channels!r}")
        for name, value in (("context_features", context_features), ("context_channels", context_channels)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: expected a positive int or None, got {value!r}")
        self.context_features, self.context_channels, self.arrange = context_features, context_channels, arrange
        self.takes_context = context_features is not None or context_channels is not None
        self.layer = None
        if context_features is not None:
            self.layer = nn.Linear(context_features, hidden_channels, bias=False)
        elif context_channels is not None:
            self.layer = nn.Conv2d(context_channels, hidden_channels, 3, padding=1, bias=False)

    def forward(self, x, context=None):
        """None, (B, hidden_channels, 1, 1) or (B, hidden_channels, H, W) for x (B, C, H, W)."""
        if self.layer is None:
            if context is not None:
                raise ValueError("context: expected None, because the network was built without context_features and "
                                 f"context_channels, got shape {tuple(context.shape)}")
            return None
        if context is None:
            raise ValueError("context: expected a tensor, because the network was built with context_features or "
                             "context_channels, got None")
        checks.tensor("context", context)
        checks.goes_with("context", context, "x", x)
        context = context.to(self.layer.weight.dtype)
        if self.context_features is not None:
            checks.shape("context", context, (x.shape[0], self.context_features))
            return self.layer(context)[:, :, None, None]
        arranged, cause = self._arranged(context)
        expected = (x.shape[0], self.context_channels, *x.shape[2:])
        if arranged is None or tuple(arranged.shape) != expected:
            raise ValueError(f"context: expected an image whose channels and size fit x of shape {tuple(x.shape)} "
                             f"({expected} once arranged), got shape {tuple(context.shape)}") from cause
        return self.layer(arranged)

    def _arranged(self, context):
        """(the image at the positions of x, None), or (None, the error) of a shape that ``arrange`` does not take."""
        if self.arrange is None:
            return context, None
        try:
            if context.shape[0]:
                return self.arrange(context), None
            # For an empty batch torch's pixel_unshuffle leaves the shape as it was.
            return self.arrange(context.new_zeros(1, *context.shape[1:]))[:0], None
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            return None, error
