"""Maps as rows of channels, for products along them."""

__all__ = ["images", "rows"]


def rows(x):
    """x (B, C, *S) as (B*S, C), a view where the channels are adjacent."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def images(values, like):
    """Rows of as many channels as ``like`` (B, C, *S) has, in its shape."""
    return values.view(like.shape[0], *like.shape[2:], like.shape[1]).movedim(-1, 1)
