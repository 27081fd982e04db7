"""How many floating-point operations fastflow's networks take, for torch's counter, which knows none but its own:

    with FlopCounterMode(custom_mapping=fastflow.flops.formulas()) as counted:  # of torch.utils.flop_counter
        model(x).elbo.mean().neg().backward()
    counted.get_total_flops()

Counted as torch counts: two operations for each product of a linear layer or a convolution, nothing for biases,
activations and what is done element by element.
"""

import math

from fastflow import extension

__all__ = ["formulas"]

NAMESPACES = ("fastflow_cpu", "fastflow_triton", "fastflow_cuda")


def formulas():
    """{operator: its formula}, of every backend, for the ``custom_mapping`` of torch.utils.flop_counter's
    FlopCounterMode."""
    spaces = [extension.define(namespace) for namespace in NAMESPACES]
    return {getattr(space, name): formula for space in spaces for name, formula in FORMULAS.items()}


# The arguments are those of the operators, see extension.SCHEMAS, with the shape of each tensor in its place.

def _layers(positions, weights):
    """Of layers whose weights have these shapes, each applied at so many positions."""
    return 2 * positions * sum(map(math.prod, weights))


def _gradients(positions, weights, need_x, need_weights):
    """Of the backward of layers one after the other: the inputs' gradients, the first where it is wanted, and the
    weights'."""
    return _layers(positions, weights if need_x else weights[1:]) + need_weights * _layers(positions, weights)


def _pixels(x):
    return x[0] * math.prod(x[2:])


def _wide_mlp_fwd(x, weights, biases, activation, keep, **_):
    return _layers(x[0], weights)


def _wide_mlp_bwd(grad, grads_hidden, x, weights, kept, activation, need_x, need_params, **_):
    return _gradients(x[0], weights, need_x, need_params)


def _mlp_fwd(x, params, activation, residual, keep, **_):
    return _layers(x[0], params[::2])


def _mlp_bwd(grad, x, kept, params, activation, residual, need_x, need_params, **_):
    return _gradients(x[0], params[::2], need_x, need_params)


def _conv_net_fwd(x, w1, b1, w2, b2, w3, *_, **__):
    return _layers(_pixels(x), (w1, w2, w3))


def _conv_net_bwd(grad, x, w1, w2, w3, h1, h2, slope, need_x, need_weights, **_):
    return _gradients(_pixels(x), (w1, w2, w3), need_x, need_weights)


def _activated_conv_fwd(x, weight, bias, stride, padding, transposed, *_, out_shape, **__):
    return _layers(_pixels(x if transposed else out_shape), [weight])


def _activated_conv_bwd(grad, x, weight, stride, padding, transposed, activation, need_x, need_weights, **_):
    return _layers(_pixels(x if transposed else grad), [weight]) * (need_x + need_weights)


def _weights(params):
    """The matrices among the parameters of a flow."""
    return [shape for shape in params if len(shape) == 2]


def _mlp_flow_fwd(x, context, params, *_, **__):
    return _layers(x[0], _weights(params))


def _mlp_flow_bwd(grad_z, grad_logdet, z, saved, context, params, steps, constants, inverse, need_x, need_context,
                  need_params, **_):
    return _gradients(z[0], _weights(params), True, need_params)  # maps in front of the first network need x's, too


FORMULAS = {name.removeprefix("_"): formula for name, formula in list(globals().items())
            if name.endswith(("_fwd", "_bwd"))}
