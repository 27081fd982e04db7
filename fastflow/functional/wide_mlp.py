"""A fully connected network."""

from fastflow import backends, checks, reference
from fastflow.autograd import mlp as _mlp
from fastflow.autograd import wide_mlp as _wide_mlp
from fastflow.autograd.differentiable import apply, distinct, needs_grad

__all__ = ["wide_mlp"]


def wide_mlp(x, weights, biases, *, activation="silu", hidden=False):
    """A fully connected network as :func:`mlp` computes it, of layers too wide for its kernel's caches.

    On a CPU the matrix products are fastflow's own, with bias and ReLU within, on Intel's processors and on x86
    without AVX-512 torch's, whose library is faster there; the activation's slope and the bias's gradient are one pass
    on the way back, and the whole network is one node of autograd.

    Args:
        x: (B, features), any strides.
        weights: at least one (out, in), as of torch.nn.Linear.
        biases: as many (out,).
        activation: "relu" or "silu".
        hidden: also return the activations of the hidden layers, as a ladder's way up needs them.

    Returns:
        (B, out features) in the dtype that all operands share; with ``hidden`` the pair of it and a tuple of (B, out
        features) of every layer but the last.

    Raises:
        ValueError: a shape, a device, the number of biases or the activation does not fit; the message names the
            argument.
        TypeError: not a tensor, or a dtype that is not floating or not x's.
    """
    checks.choice("activation", activation, ("relu", "silu"))
    _mlp.check(x, weights, biases, activation, False)
    backend = backends.choose("wide_mlp", x, *weights, *biases)
    if backend == "reference":
        return reference.wide_mlp(x, weights, biases, activation=activation, hidden=hidden)
    return run_wide_mlp(backend, x, weights, biases, activation, hidden)


def run_wide_mlp(backend, x, weights, biases, activation, hidden=False):
    """:func:`wide_mlp` on a kernel's backend, for callers that know that the operands fit."""
    kind = reference.LAYER_ACTIVATIONS.index(activation)
    if needs_grad(x, *weights, *biases):
        x, *params = distinct(x, *weights, *biases)
        results = apply(_wide_mlp.WideMLPFunction, x, backend, kind, hidden, *params)
        return (results[0], results[1:]) if hidden else results
    out, kept = _wide_mlp.forward(backend, x, weights, biases, kind, hidden)
    return (out, tuple(_wide_mlp.hidden_values(kept, kind))) if hidden else out
