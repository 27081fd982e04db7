"""The top-down pass of a hierarchy of latents as a torch.autograd.Function."""

import torch

from fastflow import backends, checks, extension, reference
from fastflow.autograd import differentiable


def check(h, features, levels, eps):
    """State, features, levels and noise go together."""
    checks.tensor("h", h)
    if h.dim() != 2:
        raise ValueError(f"h: expected shape (B, H), got {tuple(h.shape)}")
    if h.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"h: expected float32 or float64, got {h.dtype}")
    if not isinstance(levels, (tuple, list)) or not levels:
        got = type(levels).__name__ if levels else "none"
        raise ValueError(f"levels: expected a sequence of one or more LatentLevel, got {got}")
    for name, values in (("features", features), *([] if eps is None else [("eps", eps)])):
        if not isinstance(values, (tuple, list)) or len(values) != len(levels):
            got = len(values) if isinstance(values, (tuple, list)) else type(values).__name__
            raise ValueError(f"{name}: expected a sequence of {len(levels)} tensors, one for each level, got {got}")
    width = h.shape[1]
    for index, (level, d) in enumerate(zip(levels, features, strict=True)):
        if not isinstance(level, reference.LatentLevel):
            raise TypeError(f"levels[{index}]: expected a LatentLevel, got {type(level).__name__}")
        checks.choice(f"levels[{index}].mode", level.mode, reference.LEVEL_MODES)
        checks.choice(f"levels[{index}].scale", level.scale, reference.SCALES)
        _check_matrix(f"features[{index}]", d, h)
        twice = _check_network(f"levels[{index}].prior", level.prior, width, h)
        if twice % 2:
            raise ValueError(f"levels[{index}].prior: expected an even number of outputs, got {twice}")
        seen = d.shape[1] + (0 if level.mode == "ladder" else width)
        _check_network(f"levels[{index}].posterior", level.posterior, seen, h, twice)
        if eps is not None:
            _check_matrix(f"eps[{index}]", eps[index], h, twice // 2)
        width = _check_network(f"levels[{index}].merge", level.merge, width + twice // 2, h)


def _check_matrix(name, value, h, columns=None):
    checks.tensor(name, value)
    if value.dim() != 2 or value.shape[0] != h.shape[0] or columns not in (None, value.shape[1]):
        wanted = "F" if columns is None else columns
        raise ValueError(f"{name}: expected shape ({h.shape[0]}, {wanted}), got {tuple(value.shape)}")
    _check_like(name, value, h)


def _check_like(name, value, h):
    checks.same_device(name, value, "h", h)
    if value.dtype != h.dtype:
        raise TypeError(f"{name}: expected {h.dtype} like h, got {value.dtype}")


def _check_network(name, network, width, h, outputs=None):
    """The number of outputs of an MLPBlock on ``width`` inputs."""
    if not isinstance(network, reference.MLPBlock):
        raise TypeError(f"{name}: expected an MLPBlock, got {type(network).__name__}")
    checks.choice(f"{name}.activation", network.activation, reference.ACTIVATIONS)
    if not network.weights or len(network.weights) != len(network.biases):
        raise ValueError(f"{name}.biases: expected one for each of one or more weights, got {len(network.weights)} "
                         f"weights and {len(network.biases)} biases")
    seen = width
    for layer, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
        checks.tensor(f"{name}.weights[{layer}]", weight)
        last = outputs if layer == len(network.weights) - 1 else None
        if weight.dim() != 2 or weight.shape[1] != width or last not in (None, weight.shape[0]):
            raise ValueError(f"{name}.weights[{layer}]: expected shape ({last or 'out'}, {width}), got "
                             f"{tuple(weight.shape)}")
        checks.tensor(f"{name}.biases[{layer}]", bias)
        checks.shape(f"{name}.biases[{layer}]", bias, (weight.shape[0],))
        _check_like(f"{name}.weights[{layer}]", weight, h)
        _check_like(f"{name}.biases[{layer}]", bias, h)
        width = weight.shape[0]
    if network.residual and width > seen:
        raise ValueError(f"{name}: expected at most {seen} outputs of a residual network, got {width}")
    return width


def program(levels):
    """(parameters, integers) of the levels, as the operator takes them."""
    params, code = [], []
    for level in levels:
        code += (reference.LEVEL_MODES.index(level.mode), reference.SCALES.index(level.scale))
        for network in level.networks:
            params += network.parameters
            code += (len(network.weights), reference.ACTIVATIONS.index(network.activation), int(network.residual))
    return params, code


def levels_of(params, code):
    """The levels that :func:`program` took apart."""
    params, levels = iter(params), []
    for mode, scale, *networks in zip(*[iter(code)] * 11, strict=True):
        blocks = []
        for count, activation, residual in zip(*[iter(networks)] * 3, strict=True):
            pairs = [(next(params), next(params)) for _ in range(count)]
            blocks.append(reference.MLPBlock(tuple(w for w, _ in pairs), tuple(b for _, b in pairs),
                                             reference.ACTIVATIONS[activation], bool(residual)))
        levels.append(reference.LatentLevel(*blocks, reference.LEVEL_MODES[mode], reference.SCALES[scale]))
    return levels


@differentiable.direct
class TopDownFunction(torch.autograd.Function):
    """(next h, latents of all levels in one vector, kl, log q, log p) of h, ``count`` features, where given as many
    tensors of noise, and the parameters of the levels, which ``code`` describes. noise: (seed, its value, offset).

    Forward saves what backward needs: the values of every layer, silu's slopes, the noise.
    """

    @staticmethod
    def forward(ctx, h, backend, code, count, noise, has_eps, seed, *tensors):
        ctx.set_materialize_grads(False)
        features, eps, params = _split(tensors, count, has_eps)
        *results, saved = extension.kernel(backend, "top_down_fwd")(h, features, eps, seed, *noise, params, code, True)
        ctx.save_for_backward(h, seed, saved, *tensors)
        ctx.consts = backend, code, count, noise, has_eps
        return tuple(results)

    @staticmethod
    def backward(ctx, *grads):
        h, seed, saved, *tensors = ctx.saved_tensors
        backend, code, count, noise, has_eps = ctx.consts
        features, eps, params = _split(tensors, count, has_eps)
        needs = ctx.needs_input_grad
        need_h, need_features, need_params = needs[0], needs[7:7 + count], needs[-len(params):]
        wanted = (need_h, *need_features, *need_params)
        if all(g is None for g in grads) or not any(wanted):
            found = [None] * len(wanted)
        elif differentiable.wanted(grads):
            if not eps:
                eps = _drawn(backend, h, params, code, seed, *noise)

            def again(h, *tensors):
                out, latents, *terms = reference.top_down(h, tensors[:count], levels_of(tensors[count:], code), eps=eps)
                return out, torch.cat([z.flatten() for z in latents]), *terms
            found = differentiable.reference_grads(again, (h, *features, *params), wanted, grads)
        else:
            grad_h, of_features, of_params = extension.kernel(backend, "top_down_bwd")(
                *grads, h, features, saved, params, code, need_h, any(need_features), any(need_params))
            found = (grad_h, *(of_features or [None] * count), *(of_params or [None] * len(params)))
            found = [g if need else None for g, need in zip(found, wanted, strict=True)]
        return (found[0], *[None] * 6, *found[1:1 + count], *[None] * len(eps if has_eps else ()), *found[1 + count:])


def _split(tensors, count, has_eps):
    """(features, noise, parameters)."""
    tensors = list(tensors)
    end = count * (2 if has_eps else 1)
    return tensors[:count], tensors[count:end], tensors[end:]


def _drawn(backend, h, params, code, seed, seed_value, offset):
    """The noise that forward drew."""
    found = []
    with torch.no_grad():
        for level in levels_of(params, code):
            zeros = h.new_zeros(h.shape[0], level.prior.biases[-1].shape[0])
            found.append(extension.kernel(backend, "gaussian_fwd")(
                zeros, None, None, None, None, seed, seed_value, offset, None, 0, 0, 0, False, True)[3])
            offset += -(-found[-1].numel() // 4)
    return found


def run_levels(h, features, levels, eps, seed, offset):
    """functional.top_down without its checks, for levels whose operands fit by construction; seed or eps is given."""
    params, code = program(levels)
    features, eps = list(features), [] if eps is None else [e.detach() for e in eps]
    key = seed if isinstance(seed, torch.Tensor) else None
    backend = backends.choose("top_down", h, key, *features, *eps, *params)
    if backend == "reference":
        return reference.top_down(h, features, levels, eps=eps or None, seed=seed, offset=offset)
    noise = (0 if seed is None or key is not None else reference.to_int64(seed), offset)
    if differentiable.needs_grad(h, *features, *params):
        h, *tensors = differentiable.distinct(h, *features, *eps, *params)
        out, flat, *terms = differentiable.apply(TopDownFunction, h, backend, code, len(features), noise, len(eps) > 0,
                                                 key, *tensors)
    else:
        out, flat, *terms, _ = extension.kernel(backend, "top_down_fwd")(h, features, eps, key, *noise, params, code,
                                                                         False)
    widths = [level.prior.biases[-1].shape[0] // 2 for level in levels]
    parts = flat.split([h.shape[0] * width for width in widths])
    return (out, [z.view(h.shape[0], width) for z, width in zip(parts, widths, strict=True)], *terms)
