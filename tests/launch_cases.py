"""Calls whose kernel launches are counted, of every way in which an operator's launches depend on its arguments:
(case, launches on Triton forward, backward, on CUDA forward, backward); None where there is no such kernel."""

import itertools

import torch
from cases import Case, conv_case, flow_case

from fastflow import functional

EXP = functional.ScaleMap("exp").scalars
RQ, LINEAR = (0, False, 3.0, 1e-3, 1e-3, 1e-3, 1.0, 0.0, 1.0), (1, True, 1.0, 0.0, 1e-3, 0.0, 0.5, 5.0, 1.0)  # splines

SPLIT = 16400  # elements of a sample: both backends split it, of a coupling and of a Gaussian
PLU = {"lower": (3, 20, 20), "upper": (3, 20, 20), "log_s": (3, 20), "sign_s": (3, 20), "perm": (3, 20)}


def _pair(*shape, prior=None):
    shapes = {"mean": shape, "raw": shape}
    return shapes if prior is None else {**shapes, "prior_mean": (prior, *shape[1:]), "prior_raw": (prior, *shape[1:])}


def _gaussian(name, shapes, **options):
    return Case(name, "gaussian_sample_kl", shapes, {"seed": 1, **options})


LAUNCH_CASES = (
    (Case("passive", "affine_coupling", {"x": (3, 4, 5), "params": (3, 8, 5), "passive": (3, 2, 5)}), 1, 1, 1, 1),
    (Case("whole", "affine_coupling", {"x": (1, 2, 8192), "params": (1, 4, 8192)}), 1, 1, 1, 1),
    (Case("split", "affine_coupling", {"x": (2, 2, SPLIT // 2), "params": (2, 4, SPLIT // 2),
                                       "passive": (2, 3, SPLIT // 2)}, {"inverse": True}), 2, 1, 2, 1),
    (Case("pair", "affine_coupling", {"x": (3, 5), "raw": (3, 5), "shift": (3, 5), "logdet": (3,)}), 1, 1, 1, 1),
    (Case("additive", "affine_coupling", {"x": (3, 5), "params": (3, 5)}, {"scale": "additive"}), 1, 1, 1, 1),
    (Case("kept", "affine_coupling", {"x": (3, 6, 5), "params": (3, 8, 5)}, {"passive": 2}), 1, 1, 1, 1),
    (Case("kept_and_split", "affine_coupling", {"x": (2, 5, SPLIT // 2), "params": (2, 4, SPLIT // 2)},
          {"passive": -3}), 2, 1, 2, 1),
    (Case("half_of_a_long_one", "affine_coupling", {"x": (1, 2, 16384), "params": (1, 2, 16384)}, {"passive": 1}),
     1, 1, 1, 1),
    (Case("all_kept", "affine_coupling", {"x": (2, 3), "params": (2, 0), "logdet": (2,)}, {"passive": 3}), 1, 1, 1, 1),
    (Case("no_rows", "affine_coupling", {"x": (0, 5), "params": (0, 10)}), 0, 0, 0, 0),
    (Case("no_elements", "affine_coupling", {"x": (2, 0), "params": (2, 0), "logdet": (2,)}), 1, 0, 1, 0),
    (Case("slogdet", "slogdet", {"weight": (7, 12, 12)}), 1, 0, 1, 0),
    # The inverse's own gradient is taken through an inverse of the weight in float64.
    (Case("inverse", "slogdet_inverse", {"weight": (2, 3, 5, 5)}), 1, 1, 1, 1),
    (Case("no_matrices", "slogdet", {"weight": (0, 4, 4)}), 0, 0, 0, 0),
    (Case("plu", "plu_weight", PLU), 1, 1, 1, 1),
    (flow_case("realnvp", 2, (3, 3), 16, scale="tanh"), None, None, 1, 2),
    (flow_case("flow_inverse", 4, (), 3, actnorm=False, context=1, scale="tanh", inverse=True), None, None, 1, 2),
    (flow_case("flow_pieces", 2, (3, 3), 22, scale="tanh"), None, None, 2, 3),
    (flow_case("flow_steps", 3, (), 98), None, None, 4, 6),
    (flow_case("flow_no_samples", 2, (3,), 1, batch=0), None, None, 0, 1),
    (Case("whole", "spline", {"x": (1, 2, 2048), "params": (1, 4, 2048)}, {"kind": "linear"}), 1, 1, 1, 1),
    (Case("split", "spline", {"x": (2, 2, 2050), "params": (2, 4, 2050), "logdet": (2,)},
          {"kind": "linear", "inverse": True}), 2, 1, 2, 1),
    (Case("no_rows", "spline", {"x": (0, 5), "params": (0, 10)}), 0, 0, 0, 0),
    (Case("no_elements", "spline", {"x": (2, 0), "params": (2, 0), "logdet": (2,)}), 1, 0, 1, 0),
    (_gaussian("vae", {"params": (5, 40)}), 1, 1, 1, 1),
    (_gaussian("samples", {"params": (5, 40)}, n_samples=3, return_logq=True), 1, 1, 1, 1),
    (_gaussian("elements", {"params": (2, 6, 4)}, reduce="none", return_logq=True), 1, 1, 1, 1),
    (_gaussian("channels", {"params": (3, 4, 6)}, reduce="channel", n_samples=2), 1, 1, 1, 1),
    (_gaussian("channels_logq", {"params": (3, 4, 6)}, reduce="channel", n_samples=2, return_logq=True), 2, 1, 2, 1),
    (_gaussian("channels_alone", {"params": (3, 4)}, reduce="channel", return_logq=True), 1, 1, 1, 1),
    (_gaussian("middle", {"params": (2, 2 * 4100)}, return_logq=True), 3, 1, 1, 1),
    (_gaussian("split", {"params": (2, 2 * SPLIT)}, return_logq=True), 3, 1, 2, 1),
    (_gaussian("split_elements", {"params": (1, 2 * SPLIT)}, reduce="none"), 1, 1, 1, 1),
    (_gaussian("own_prior", _pair(3, 9, prior=3)), 1, 1, 1, 1),
    (_gaussian("shared_prior", _pair(3, 9, prior=1)), 1, 2, 1, 2),
    (_gaussian("one_sample", _pair(1, 9, prior=1)), 1, 1, 1, 1),
    (_gaussian("many_share", _pair(70, 3, prior=1)), 1, 2, 1, 3),
    (_gaussian("very_many_share", _pair(520, 3, prior=1)), 1, 3, 1, 3),
    (conv_case("conv_net", (3, 2, 4, 5), 16, 3), 4, 6, None, None),
    (conv_case("no_images", (0, 2, 4, 5), 16, 3), 0, 1, None, None),
)


def operator_calls(device, batches, events, mixed_priors=False):
    """(operator, arguments) of calls of every operator with these batches and shapes (D, *S), zero sizes among them.

    mixed_priors: whether a prior's mean and raw may differ in batch.
    """
    def zeros(*shape, dtype=torch.float32):
        return torch.zeros(shape, device=device, dtype=dtype)

    for batch, (channels, *s), dtype in itertools.product(batches, events, (torch.float32, torch.float64)):
        x, packed = zeros(batch, channels, *s, dtype=dtype), zeros(batch, 2 * channels, *s, dtype=dtype)
        for passive in (None, x):
            yield "affine_coupling_fwd", (x, packed, None, None, passive, 0, 8, *EXP)
        for needs in itertools.product((False, True), repeat=3):
            yield "affine_coupling_bwd", (x, None, x, x, x, 0, *needs, 0, *EXP)
            yield "affine_coupling_bwd", (x, None, x, packed, None, 0, *needs, 0, *EXP)
        for kept in (channels, -channels):
            whole, rest = zeros(batch, 2 * channels, *s, dtype=dtype), zeros(batch, 0, *s, dtype=dtype)
            yield "affine_coupling_fwd", (whole, packed, None, None, None, kept, 0, *EXP)
            yield "affine_coupling_fwd", (x, rest, None, None, None, kept, 0, *EXP)
            for needs in itertools.product((False, True), repeat=2):
                yield "affine_coupling_bwd", (whole, None, whole, packed, None, kept, *needs, False, 0, *EXP)
                yield "affine_coupling_bwd", (x, None, x, rest, None, kept, *needs, False, 0, *EXP)
        yield "spline_fwd", (x, packed, None, *RQ)
        yield "spline_fwd", (x, packed, zeros(batch, dtype=dtype), *LINEAR)
        for needs in itertools.product((False, True), repeat=2):
            yield "spline_bwd", (x, None, x, packed, *needs, *RQ)
            yield "spline_bwd", (None, zeros(batch, dtype=dtype), x, packed, *needs, *LINEAR)
    for batch, size in itertools.product(((0,), (3,), (2, 0), (2, 3), ()), (0, 1, 5, 32)):
        yield "slogdet_fwd", (zeros(*batch, size, size), size != 5)
    for count, size in itertools.product((0, 1, 3), (0, 1, 40)):
        matrix, vector, perm = zeros(count, size, size), zeros(count, size), zeros(count, size, dtype=torch.int64)
        yield "plu_weight_fwd", (matrix, matrix, vector, vector, perm)
        yield "plu_weight_bwd", (matrix, matrix, matrix, vector, vector, perm)
    for batch, (channels, *s), samples, reduce in itertools.product(batches, events, (None, 0, 2), range(3)):
        mean, packed = zeros(batch, channels, *s), zeros(batch, 2 * channels, *s)
        z = mean if samples is None else zeros(samples, batch, channels, *s)
        kl = zeros(*(batch, channels, *s)[: (1, 2, 2 + len(s))[reduce]])
        for logq in (False, True):
            yield "gaussian_fwd", (packed, None, None, None, None, None, 1, 0, samples, 0, 0, reduce, logq, False)
        own_batches = ((batch, batch), (1, 1), *(((1, batch), (batch, 1)) if mixed_priors else ()))
        for own, incoming, needs in itertools.product(
                own_batches, (None, kl),
                ((True, True, True, True), (False, True, False, False), (False, False, True, True),
                 (False, False, False, True))):
            priors = [zeros(n, channels, *s) for n in own]
            consts = 1, 0, samples, 0, 0, reduce
            yield "gaussian_bwd", (z, incoming, None, mean, mean, *priors, None, None, *consts, *needs)
    for batch, channels, side in itertools.product(batches, (1, 3), (0, 1, 4)):
        x, maps = zeros(batch, channels, side, side), zeros(batch * side * side, 130)
        w1, w2, w3 = zeros(130, channels, 3, 3), zeros(130, 130, 1, 1), zeros(channels + 2, 130, 3, 3)
        yield "conv_net_fwd", (x, w1, w1[:, 0, 0, 0], w2, w2[:, 0, 0, 0], w3, w3[:, 0, 0, 0], 0.1, side == 4)
        for needs in itertools.product((False, True), repeat=2):
            yield "conv_net_bwd", (zeros(batch, channels + 2, side, side), x, w1, w2, w3, maps, maps, 0.1, *needs)
    yield from flow_calls(device, batches)
    for count in (0, 1, 300):
        yield "philox4x32", (zeros(count, 4, dtype=torch.int64), zeros(count, 2, dtype=torch.int64))


def flow_calls(device, batches):
    """Calls of mlp_flow's operators: several scale maps, many steps, no steps, both directions."""
    for batch, count, maps, inverse in itertools.product(batches, (0, 1, 35), (1, 6), (False, True)):
        def zeros(*shape):
            return torch.zeros(shape, device=device)

        if batch > 100:
            continue
        params, code, constants = [zeros(3), zeros(3)], [0] * 6, []
        for index in range(count):
            params += [zeros(4, 1), zeros(4), zeros(4, 4), zeros(4)]
            code += [1, 2, 0, 0, 0, 0]
            constants += [1.0 + index % maps, *EXP[2:]]
        x, saved, described = zeros(batch, 3), zeros(3 + 2 * count, batch), (params, code, constants, inverse)
        yield "mlp_flow_fwd", (x, None, *described, count % 3)
        for need_params in (False, True):
            yield "mlp_flow_bwd", (x, None, x, saved, None, *described, True, False, need_params)
