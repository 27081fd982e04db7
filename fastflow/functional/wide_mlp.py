"""A fully connected network."""

from fastflow import backends, checks, reference
from fastflow.autograd import wide_mlp as _wide_mlp
from fastflow.autograd.differentiable import distinct, needs_grad

__all__ = ["wide_mlp"]


def wide_mlp(x, weights, biases, *, activation="silu"):
    """Linear layers with an activation between two of them: W_n a(... a(W_1 x + b_1) ...) + b_n.

    The matrix products are torch's; on a CPU bias and activation are one pass over a product in the cache, as are, on
    the way back, the activation's slope and the bias's gradient, and the whole network is one node of autograd.

    Args:
        x: (B, features), any strides.
        weights: at least one (out, in), as of torch.nn.Linear.
        biases: as many (out,).
        activation: "relu" or "silu".

    Returns:
        (B, out features) in the dtype that all operands share.

    Raises:
        ValueError: a shape, a device, the number of biases or the activation does not fit; the message names the
            argument.
        TypeError: not a tensor, or a dtype that is not floating or not x's.
    """
    checks.tensor("x", x)
    if x.dim() != 2:
        raise ValueError(f"x: expected shape (B, features), got {tuple(x.shape)}")
    checks.choice("activation", activation, ("relu", "silu"))
    weights, biases = tuple(weights), tuple(biases)
    if not weights or len(weights) != len(biases):
        raise ValueError(f"biases: expected as many as weights, at least one, got {len(biases)} for {len(weights)}")
    features = x.shape[1]
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        checks.tensor(f"weights[{index}]", weight)
        if weight.dim() != 2 or weight.shape[1] != features:
            raise ValueError(f"weights[{index}]: expected shape (out, {features}), got {tuple(weight.shape)}")
        features = weight.shape[0]
        checks.tensor(f"biases[{index}]", bias)
        checks.shape(f"biases[{index}]", bias, (features,))
        for name, value in ((f"weights[{index}]", weight), (f"biases[{index}]", bias)):
            checks.same_device(name, value, "x", x)
            if value.dtype != x.dtype:
                raise TypeError(f"{name}: expected {x.dtype} like x, got {value.dtype}")
    backend = backends.choose("wide_mlp", x, *weights, *biases)
    if backend == "reference":
        return reference.wide_mlp(x, weights, biases, activation=activation)
    return run_wide_mlp(backend, x, weights, biases, activation)


def run_wide_mlp(backend, x, weights, biases, activation):
    """:func:`wide_mlp` on a kernel's backend, for callers that know that the operands fit."""
    kind = reference.LAYER_ACTIVATIONS.index(activation)
    if needs_grad(x, *weights, *biases):
        x, *params = distinct(x, *weights, *biases)
        return _wide_mlp.WideMLPFunction.apply(x, backend, kind, *params)
    return _wide_mlp.forward(backend, x, weights, biases, kind)[0]
