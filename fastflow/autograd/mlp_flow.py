"""A whole flow of couplings with small networks as a torch.autograd.Function."""

import torch

from fastflow import backends, checks, extension, reference
from fastflow.autograd import differentiable
from fastflow.autograd.affine_coupling import INTERLEAVED, SHIFT_FIRST, SHIFT_IN_FRONT, flags_of

OPTIONS = {"activation": reference.ACTIVATIONS, "layout": ("chunk", "interleave"),
           "order": ("scale_shift", "shift_scale")}


def check(x, steps, context):
    """Data, context and steps go together."""
    checks.tensor("x", x)
    if x.dim() != 2:
        raise ValueError(f"x: expected shape (B, D), got {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x: expected float32 or float64, got {x.dtype}")
    if context is not None:
        checks.tensor("context", context)
        if context.dim() != 2 or context.shape[0] != x.shape[0]:
            raise ValueError(f"context: expected shape ({x.shape[0]}, K), got {tuple(context.shape)}")
        _check_like("context", context, x)
    _check_steps(x, steps, context)


def _check_like(name, value, x):
    """``value`` has x's dtype and device."""
    checks.same_device(name, value, "x", x)
    if value.dtype != x.dtype:
        raise TypeError(f"{name}: expected {x.dtype} like x, got {value.dtype}")


def _check_steps(x, steps, context):
    """The steps are ones that (B, D) data and the context can go through."""
    if not isinstance(steps, (tuple, list)):
        raise TypeError("steps: expected a sequence of ChannelAffine, Permutation and MLPCoupling, got "
                        f"{type(steps).__name__}")
    features = (x.shape[1],)
    for index, step in enumerate(steps):
        if isinstance(step, reference.ChannelAffine):
            for name, value in (("bias", step.bias), ("log_scale", step.log_scale)):
                if not _fits(value, features, x):
                    _refuse(f"steps[{index}].{name}", value, features, x)
        elif isinstance(step, reference.Permutation):
            _check_order(f"steps[{index}].order", step.order, x)
        elif isinstance(step, reference.MLPCoupling):
            _check_coupling(index, step, x, 0 if context is None else context.shape[1])
        else:
            raise TypeError(f"steps[{index}]: expected a ChannelAffine, Permutation or MLPCoupling, got "
                            f"{type(step).__name__}")


def _check_order(name, order, x):
    checks.tensor(name, order, floating=False)
    checks.shape(name, order, x.shape[1:])
    checks.same_device(name, order, "x", x)
    if order.dtype is not torch.int64:
        raise TypeError(f"{name}: expected torch.int64, got {order.dtype}")
    # Elsewhere a look at the values would be a synchronisation, or there are none to look at.
    readable = (order.device.type == "cpu" and type(order) in (torch.Tensor, torch.nn.Parameter)
                and not torch.compiler.is_compiling() and not torch._C._functorch.is_functorch_wrapped_tensor(order))
    if readable and not torch.equal(order.sort().values, torch.arange(len(order))):
        raise ValueError(f"{name}: expected each of 0 ... {len(order) - 1} once, got {order.tolist()}")


def _check_coupling(index, step, x, context_features):
    for name, options in OPTIONS.items():
        if getattr(step, name) not in options:
            checks.choice(f"steps[{index}].{name}", getattr(step, name), options)
    if not step.weights or len(step.weights) != len(step.biases):
        raise ValueError(f"steps[{index}].biases: expected one for each of one or more weights, got "
                         f"{len(step.weights)} weights and {len(step.biases)} biases")
    active = x.shape[1] // 2 if step.flip else x.shape[1] - x.shape[1] // 2
    width = x.shape[1] - active + context_features
    additive = reference.ScaleMap.of(step.scale).kind == "additive"
    for layer, (weight, bias) in enumerate(zip(step.weights, step.biases, strict=True)):
        last = layer == len(step.weights) - 1
        out = (1 if additive else 2) * active
        if not last and isinstance(weight, torch.Tensor) and weight.dim() == 2:
            out = weight.shape[0]
        if not _fits(weight, (out, width), x):
            _refuse(f"steps[{index}].weights[{layer}]", weight, (out, width), x)
        if not _fits(bias, (out,), x):
            _refuse(f"steps[{index}].biases[{layer}]", bias, (out,), x)
        width = out


def _fits(value, shape, x):
    return isinstance(value, torch.Tensor) and value.shape == shape and value.dtype is x.dtype \
        and value.device == x.device and value.layout is torch.strided


def _refuse(name, value, shape, x):
    checks.tensor(name, value)
    checks.shape(name, value, shape)
    _check_like(name, value, x)


def program(steps):
    """(parameters, integers, constants) of the steps, as the operator takes them."""
    params, code, constants = [], [], []
    for step in steps:
        if isinstance(step, reference.Permutation):
            params.append(step.order.contiguous())
            code += (PERMUTATION, 0, 0, 0, 0, 0)
            continue
        params += step.parameters
        if isinstance(step, reference.ChannelAffine):
            code += (0, 0, 0, 0, 0, 0)
            continue
        kind, *numbers = reference.ScaleMap.of(step.scale).scalars
        flags = flags_of(step.layout, step.order, step.shift_first)
        code += (1, len(step.weights), int(step.flip), reference.ACTIVATIONS.index(step.activation), flags, kind)
        constants += numbers
    return params, code, constants


def steps_of(params, code, constants):
    """The steps that :func:`program` took apart."""
    params, constants, steps = iter(params), iter(constants), []
    for coupling, count, flip, activation, flags, kind in zip(*[iter(code)] * 6, strict=True):
        if coupling == PERMUTATION:
            steps.append(reference.Permutation(next(params)))
            continue
        if not coupling:
            steps.append(reference.ChannelAffine(next(params), next(params)))
            continue
        pairs = [(next(params), next(params)) for _ in range(count)]
        scale = reference.ScaleMap.from_scalars(kind, *(next(constants) for _ in range(8)))
        steps.append(reference.MLPCoupling(
            tuple(w for w, _ in pairs), tuple(b for _, b in pairs), flip=bool(flip),
            activation=reference.ACTIVATIONS[activation], scale=scale,
            layout="interleave" if flags & INTERLEAVED else "chunk",
            order="shift_scale" if flags & SHIFT_IN_FRONT else "scale_shift", shift_first=bool(flags & SHIFT_FIRST)))
    return steps


PERMUTATION = 2  # the first integer of a step: 0 a ChannelAffine, 1 an MLPCoupling
SAVE_NOTHING, SAVE_OVERWRITTEN, SAVE_ACTIVATIONS = range(3)  # what the kernel saves


def forward(backend, x, context, params, code, constants, inverse):
    """The kernel's (z, logdet), without a graph."""
    return extension.kernel(backend, "mlp_flow_fwd")(x, context, params, code, constants, inverse, SAVE_NOTHING)[:2]


@differentiable.direct
class MLPFlowFunction(torch.autograd.Function):
    """(z, logdet) of x, context and the parameters of the steps, which ``code`` and ``constants`` describe.

    Saves what every step overwrites and, where asked to, the activations that a CPU reads faster than it computes them;
    backward computes the others again.
    """

    @staticmethod
    def forward(ctx, x, context, backend, code, constants, inverse, save, *params):
        ctx.set_materialize_grads(False)
        z, logdet, saved = extension.kernel(backend, "mlp_flow_fwd")(x, context, list(params), code, constants, inverse,
                                                                     save)
        ctx.save_for_backward(x, context, z, saved, *params)
        ctx.consts = backend, code, constants, inverse
        return z, logdet

    @staticmethod
    def backward(ctx, grad_z, grad_logdet):
        x, context, z, saved, *params = ctx.saved_tensors
        backend, code, constants, inverse = ctx.consts
        need_x, need_context = ctx.needs_input_grad[:2]
        need_context = need_context and context is not None
        need_params = ctx.needs_input_grad[7:]
        needs = (need_x, need_context, *need_params)
        if (grad_z is None and grad_logdet is None) or not any(needs):
            grads = [None] * len(needs)
        elif differentiable.wanted((grad_z, grad_logdet)):
            def again(x, context, *params):
                return reference.mlp_flow(x, steps_of(params, code, constants), context=context, inverse=inverse)
            grads = differentiable.reference_grads(again, (x, context, *params), needs, (grad_z, grad_logdet))
        else:
            grad_x, grad_context, of_params = extension.kernel(backend, "mlp_flow_bwd")(
                grad_z, grad_logdet, z, saved, context, params, code, constants, inverse, need_x, need_context,
                any(need_params))
            found = (grad_x, grad_context, *(of_params if any(need_params) else [None] * len(params)))
            grads = [g if need else None for g, need in zip(found, needs, strict=True)]
        return (*grads[:2], None, None, None, None, None, *grads[2:])


def run_steps(x, steps, context, inverse, save=SAVE_ACTIVATIONS):
    """functional.mlp_flow without its checks, for layers whose operands fit by construction.

    With ``save=SAVE_OVERWRITTEN`` backward has no more than what the steps overwrite.
    """
    return run_program(x, *program(steps), context, inverse, save)


def run_program(x, params, code, constants, context, inverse, save):
    """The same of steps that :func:`program` took apart."""
    backend = backends.choose("mlp_flow", x, context, *params)
    if backend == "cuda" and PERMUTATION in code[::6]:
        return _in_pieces(x, steps_of(params, code, constants), context, inverse, save)
    if backend == "reference":
        return reference.mlp_flow(x, steps_of(params, code, constants), context=context, inverse=inverse)
    if differentiable.needs_grad(x, context, *params):
        operands = differentiable.distinct(x, context, *params)
        return differentiable.apply(MLPFlowFunction, *operands[:2], backend, code, constants, inverse, save,
                                    *operands[2:])
    return forward(backend, x, context, params, code, constants, inverse)


def _in_pieces(x, steps, context, inverse, save):
    """Runs of steps without permutations, and the features moved between them."""
    total, pieces = x.new_zeros(x.shape[0]), [[]]
    for step in steps:
        if isinstance(step, reference.Permutation):
            pieces += [step], []
        else:
            pieces[-1].append(step)
    for piece in reversed(pieces) if inverse else pieces:
        if piece and isinstance(piece[0], reference.Permutation):
            x, _ = piece[0](x, context, inverse)
        elif piece:
            x, logdet = run_steps(x, piece, context, inverse, save)
            total = total + logdet
    return x.contiguous(), total
