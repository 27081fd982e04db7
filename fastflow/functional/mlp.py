"""Fully connected networks: the public operation."""

from fastflow.autograd import mlp as _mlp

__all__ = ["mlp"]


def mlp(x, weights, biases, *, activation="relu", residual=False):
    """A small fully connected network as one operation, such as a coupling has as its conditioner.

    h = act(x W_0^T + b_0), and so on; no activation after the last layer. With ``residual`` the layers between the
    first and the last come in pairs: h = x W_0^T + b_0, then h += act(act(h) W_1^T + b_1) W_2^T + b_2 for every pair,
    and the last layer takes h itself: the residual network of nflows and normflows. The CPU kernel takes a tile of
    samples through all layers while weights and activations lie in the caches; backward is a second kernel, from the
    hidden activations. On other devices, in half precision and under autocast the products are PyTorch's.

    Args:
        x: (B, I), any strides.
        weights: the network's (out, in) matrices, first to last; an even number for a residual one, whose hidden layers
            are of one width. Any strides.
        biases: its (out,) biases.
        activation: "relu", "silu" or "tanh".
        residual: whether hidden layers are in residual pairs.

    Returns:
        (B, O), contiguous, in the dtype that all operands share.

    Raises:
        ValueError: a shape, device or option does not fit; the message names the argument.
        TypeError: not a tensor, or a dtype that is not floating or not x's.

    References:
        He et al., "Identity mappings in deep residual networks", 2016, arXiv:1603.05027 (activations before layers).
        Durkan et al., "Neural spline flows", 2019, arXiv:1906.04032, appendix B.1.
    """
    _mlp.check(x, weights, biases, activation, residual)
    return _mlp.run(x, weights, biases, activation, bool(residual))
