"""What makes no sense raises ValueError or TypeError, and the message begins with the argument's name."""

import re

import pytest
import torch

from fastflow import backends, functional
from fastflow.functional import affine_coupling, gaussian_sample_kl, plu_weight, slogdet, slogdet_inverse, spline


def r(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


X, P = r(2, 3, 4), r(2, 6, 4)
META = {"device": "meta"}
HALF, DOUBLE, LONG = torch.bfloat16, torch.float64, torch.int64

AFFINE = {
    "x not a tensor": (TypeError, "x", lambda: affine_coupling([1.0], P)),
    "x of integers": (TypeError, "x", lambda: affine_coupling(X.long(), P)),
    "x complex": (TypeError, "x", lambda: affine_coupling(X.cfloat(), P)),
    "x sparse": (TypeError, "x", lambda: affine_coupling(r(2, 3).to_sparse(), r(2, 6))),
    "x without channels": (ValueError, "x", lambda: affine_coupling(r(4), r(8))),
    "x 0-d": (ValueError, "x", lambda: affine_coupling(r(), r())),
    "params not a tensor": (TypeError, "params", lambda: affine_coupling(X, None)),
    "params of integers": (TypeError, "params", lambda: affine_coupling(X, P.int())),
    "params with too few channels": (ValueError, "params", lambda: affine_coupling(X, r(2, 3, 4))),
    "params with odd channels": (ValueError, "params", lambda: affine_coupling(X, r(2, 7, 4))),
    "params of another batch": (ValueError, "params", lambda: affine_coupling(X, r(1, 6, 4))),
    "params of another size": (ValueError, "params", lambda: affine_coupling(X, r(2, 6, 1))),
    "params of another rank": (ValueError, "params", lambda: affine_coupling(X, r(2, 6))),
    "params elsewhere": (ValueError, "params", lambda: affine_coupling(X, r(2, 6, 4, **META))),
    "params in float64": (TypeError, "x|params", lambda: affine_coupling(X, P.double())),
    "x in float64": (TypeError, "x|params", lambda: affine_coupling(X.double(), P)),
    "pair of three": (ValueError, "params", lambda: affine_coupling(X, (X, X, X))),
    "pair of one": (ValueError, "params", lambda: affine_coupling(X, (X,))),
    "pair with a wrong raw": (ValueError, "params", lambda: affine_coupling(X, (r(2, 1, 4), X))),
    "pair with a wrong shift": (ValueError, "params", lambda: affine_coupling(X, (X, r(3, 4)))),
    "pair that is half a tensor": (TypeError, "params", lambda: affine_coupling(X, (X, 0.0))),
    "pair of mixed float64": (TypeError, "x|params", lambda: affine_coupling(X, (X, X.double()))),
    "pair elsewhere": (ValueError, "params", lambda: affine_coupling(X, (X, r(2, 3, 4, **META)))),
    "additive with a pair": ((TypeError, ValueError), "params", lambda: affine_coupling(X, (X, X), scale="additive")),
    "additive with 2C channels": (ValueError, "params", lambda: affine_coupling(X, P, scale="additive")),
    "additive elsewhere": (ValueError, "params", lambda: affine_coupling(X, r(2, 3, 4, **META), scale="additive")),
    "unknown scale": (ValueError, "scale", lambda: affine_coupling(X, P, scale="cube")),
    "scale of a wrong type": (TypeError, "scale", lambda: affine_coupling(X, P, scale=2.0)),
    "unknown layout": (ValueError, "layout", lambda: affine_coupling(X, P, layout="split")),
    "unknown order": (ValueError, "order", lambda: affine_coupling(X, P, order="mean_scale")),
    "logdet of another shape": (ValueError, "logdet", lambda: affine_coupling(X, P, logdet=r(1))),
    "logdet 0-d": (ValueError, "logdet", lambda: affine_coupling(X, P, logdet=r())),
    "logdet a column": (ValueError, "logdet", lambda: affine_coupling(X, P, logdet=r(2, 1))),
    "logdet a number": (TypeError, "logdet", lambda: affine_coupling(X, P, logdet=0.0)),
    "logdet of integers": (TypeError, "logdet", lambda: affine_coupling(X, P, logdet=r(2, dtype=LONG))),
    "logdet elsewhere": (ValueError, "logdet", lambda: affine_coupling(X, P, logdet=r(2, **META))),
    "logdet float32 to float64": (TypeError, "logdet", lambda: affine_coupling(X.double(), P.double(), logdet=r(2))),
    "logdet float64 to float32": (TypeError, "x|params|logdet",
                                  lambda: affine_coupling(X, P, logdet=r(2, dtype=DOUBLE))),
    "passive of another batch": (ValueError, "passive", lambda: affine_coupling(X, P, passive=r(3, 3, 4))),
    "passive of another size": (ValueError, "passive", lambda: affine_coupling(X, P, passive=r(2, 3, 5))),
    "passive of another rank": (ValueError, "passive", lambda: affine_coupling(X, P, passive=r(2, 3))),
    "passive of integers": (TypeError, "passive", lambda: affine_coupling(X, P, passive=r(2, 3, 4, dtype=LONG))),
    "passive elsewhere": (ValueError, "passive", lambda: affine_coupling(X, P, passive=r(2, 3, 4, **META))),
    "passive in float64": (TypeError, "x|params|passive",
                           lambda: affine_coupling(X, P, passive=r(2, 3, 4, dtype=DOUBLE))),
    "passive more than all": (ValueError, "passive", lambda: affine_coupling(X, P, passive=4)),
    "passive more than all from the end": (ValueError, "passive", lambda: affine_coupling(X, P, passive=-4)),
    "passive a bool": (TypeError, "passive", lambda: affine_coupling(X, P, passive=True)),
    "params of all channels beside passive": (ValueError, "params", lambda: affine_coupling(X, P, passive=1)),
    "passive a list": (TypeError, "passive", lambda: affine_coupling(X, P, passive=[X])),
}
SLOGDET = {
    f"{function.__name__} {name}": (error, "weight", lambda f=function, w=weight: f(w))
    for function in (slogdet, slogdet_inverse)
    for name, error, weight in (("a vector", ValueError, r(3)), ("a scalar", ValueError, r()),
                                ("not square", ValueError, r(2, 3, 4)), ("of integers", TypeError, r(3, 3, dtype=LONG)),
                                ("complex", TypeError, r(3, 3, dtype=torch.cfloat)), ("a list", TypeError, [[1.0]]),
                                ("None", TypeError, None))}


def plu(**changes):
    operands = {"lower": r(2, 3, 3), "upper": r(2, 3, 3), "log_s": r(2, 3), "sign_s": r(2, 3),
                "perm": torch.arange(3).expand(2, 3)}
    return plu_weight(**{**operands, **changes})


PLU = {
    "lower a matrix": (ValueError, "lower", lambda: plu(lower=r(3, 3))),
    "lower not square": (ValueError, "lower", lambda: plu(lower=r(2, 3, 4))),
    "lower bfloat16": (TypeError, "lower", lambda: plu(lower=r(2, 3, 3, dtype=HALF))),
    "lower a list": (TypeError, "lower", lambda: plu(lower=[1])),
    "upper of another shape": (ValueError, "upper", lambda: plu(upper=r(1, 3, 3))),
    "upper float64": (TypeError, "upper", lambda: plu(upper=r(2, 3, 3, dtype=DOUBLE))),
    "upper elsewhere": (ValueError, "upper", lambda: plu(upper=r(2, 3, 3, **META))),
    "log_s of another shape": (ValueError, "log_s", lambda: plu(log_s=r(2, 1))),
    "log_s None": (TypeError, "log_s", lambda: plu(log_s=None)),
    "sign_s of another shape": (ValueError, "sign_s", lambda: plu(sign_s=r(3))),
    "sign_s of integers": (TypeError, "sign_s", lambda: plu(sign_s=r(2, 3, dtype=LONG))),
    "perm of another shape": (ValueError, "perm", lambda: plu(perm=torch.arange(3))),
    "perm floating": (TypeError, "perm", lambda: plu(perm=r(2, 3))),
    "perm int32": (TypeError, "perm", lambda: plu(perm=r(2, 3, dtype=torch.int32))),
}


def conv(**changes):
    operands = {"x": r(2, 3, 4, 4), "w1": r(16, 3, 3, 3), "b1": r(16), "w2": r(16, 16, 1, 1), "b2": r(16),
                "w3": r(5, 16, 3, 3), "b3": r(5)}
    return functional.conv_net(**{**operands, **changes})


def activated(**changes):
    operands = {"x": r(2, 3, 6, 6), "weight": r(16, 3, 4, 4), "bias": r(16), "stride": 2, "padding": 1}
    return functional.activated_conv(**{**operands, **changes})


ACTIVATED = {
    "x a matrix": (ValueError, "x", lambda: activated(x=r(3, 4))),
    "x of integers": (TypeError, "x", lambda: activated(x=r(2, 3, 6, 6, dtype=LONG))),
    "weight for other channels": (ValueError, "weight", lambda: activated(weight=r(16, 4, 4, 4))),
    "weight for the other direction": (ValueError, "weight", lambda: activated(transposed=True)),
    "weight without taps": (ValueError, "weight", lambda: activated(weight=r(16, 3, 0, 4))),
    "weight float64": (TypeError, "weight", lambda: activated(weight=r(16, 3, 4, 4, dtype=DOUBLE))),
    "weight elsewhere": (ValueError, "weight", lambda: activated(weight=r(16, 3, 4, 4, **META))),
    "bias of another size": (ValueError, "bias", lambda: activated(bias=r(3))),
    "bias bfloat16": (TypeError, "bias", lambda: activated(bias=r(16, dtype=HALF))),
    "stride zero": (ValueError, "stride", lambda: activated(stride=0)),
    "stride a pair": (ValueError, "stride", lambda: activated(stride=(2, 2))),
    "padding negative": (ValueError, "padding", lambda: activated(padding=-1)),
    "padding that leaves nothing": (ValueError, "padding", lambda: activated(x=r(2, 3, 1, 1))),
    "activation unknown": (ValueError, "activation", lambda: activated(activation="gelu")),
}


def wide(**changes):
    operands = {"x": r(2, 3), "weights": [r(4, 3), r(2, 4)], "biases": [r(4), r(2)]}
    return functional.wide_mlp(**{**operands, **changes})


WIDE = {
    "wide: x of one dimension": (ValueError, "x", lambda: wide(x=r(3))),
    "wide: x of whole numbers": (TypeError, "x", lambda: wide(x=r(2, 3, dtype=LONG))),
    "wide: no layers": (ValueError, "biases", lambda: wide(weights=[], biases=[])),
    "wide: a bias too few": (ValueError, "biases", lambda: wide(biases=[r(4)])),
    "wide: a weight that does not follow": (ValueError, r"weights\[1\]", lambda: wide(weights=[r(4, 3), r(2, 5)])),
    "wide: a bias of another size": (ValueError, r"biases\[0\]", lambda: wide(biases=[r(3), r(2)])),
    "wide: a weight in float64": (TypeError, r"weights\[0\]", lambda: wide(weights=[r(4, 3, dtype=DOUBLE), r(2, 4)])),
    "wide: a bias elsewhere": (ValueError, r"biases\[1\]", lambda: wide(biases=[r(4), r(2, **META)])),
    "wide: another activation": (ValueError, "activation", lambda: wide(activation="none")),
}


CONV = {
    "x a matrix": (ValueError, "x", lambda: conv(x=r(3, 4))),
    "x of integers": (TypeError, "x", lambda: conv(x=r(2, 3, 4, 4, dtype=LONG))),
    "w1 for other channels": (ValueError, "w1", lambda: conv(w1=r(16, 4, 3, 3))),
    "w1 5x5": (ValueError, "w1", lambda: conv(w1=r(16, 3, 5, 5))),
    "w1 a list": (TypeError, "w1", lambda: conv(w1=[1.0])),
    "b1 of another size": (ValueError, "b1", lambda: conv(b1=r(15))),
    "b1 None": (TypeError, "b1", lambda: conv(b1=None)),
    "w2 3x3": (ValueError, "w2", lambda: conv(w2=r(16, 16, 3, 3))),
    "w2 bfloat16": (TypeError, "w2", lambda: conv(w2=r(16, 16, 1, 1, dtype=HALF))),
    "b2 float64": (TypeError, "b2", lambda: conv(b2=r(16, dtype=DOUBLE))),
    "w3 for other channels": (ValueError, "w3", lambda: conv(w3=r(5, 8, 3, 3))),
    "w3 elsewhere": (ValueError, "w3", lambda: conv(w3=r(5, 16, 3, 3, **META))),
    "b3 of another size": (ValueError, "b3", lambda: conv(b3=r(1))),
    "negative slope": (ValueError, "negative_slope", lambda: conv(negative_slope=-0.1)),
    "slope a string": (TypeError, "negative_slope", lambda: conv(negative_slope="0.1")),
    "slope NaN": (ValueError, "negative_slope", lambda: conv(negative_slope=float("nan"))),
}
D2 = r(3, 4)


def coupling(**changes):
    settings = {"weights": (r(5, 2), r(4, 5)), "biases": (r(5), r(4))} | changes
    return functional.MLPCoupling(**settings)


def flow(x=D2, steps=None, **kwargs):
    return functional.mlp_flow(x, [coupling()] if steps is None else steps, **kwargs)


def network(x=None, weights=None, biases=None, **options):
    x = r(3, 4) if x is None else x
    weights = [r(6, 4), r(6, 6), r(6, 6), r(2, 6)] if weights is None else weights
    return functional.mlp(x, weights, [r(6), r(6), r(6), r(2)] if biases is None else biases, **options)


MLP = {
    "x a list": (TypeError, "x", lambda: network([1.0])),
    "x an image": (ValueError, "x", lambda: network(r(2, 4, 1, 1))),
    "weights a tensor": (TypeError, "weights", lambda: network(weights=r(6, 4))),
    "weights none": (ValueError, "biases", lambda: network(weights=[], biases=[])),
    "a weight of another width": (ValueError, r"weights\[1\]",
                                  lambda: network(weights=[r(6, 4), r(6, 5), r(6, 6), r(2, 6)])),
    "a weight a vector": (ValueError, r"weights\[0\]", lambda: network(weights=[r(6), r(6, 6), r(6, 6), r(2, 6)])),
    "a weight float64": (TypeError, r"weights\[3\]",
                         lambda: network(weights=[r(6, 4), r(6, 6), r(6, 6), r(2, 6, dtype=DOUBLE)])),
    "a bias of another size": (ValueError, r"biases\[2\]", lambda: network(biases=[r(6), r(6), r(5), r(2)])),
    "a bias elsewhere": (ValueError, r"biases\[0\]", lambda: network(biases=[r(6, **META), r(6), r(6), r(2)])),
    "three biases": (ValueError, "biases", lambda: network(biases=[r(6), r(6), r(6)])),
    "another activation": (ValueError, "activation", lambda: network(activation="gelu")),
    "residual of three layers": (ValueError, "weights", lambda: network(
        weights=[r(6, 4), r(6, 6), r(2, 6)], biases=[r(6), r(6), r(2)], residual=True)),
    "residual of two widths": (ValueError, r"weights\[1\]", lambda: network(
        weights=[r(6, 4), r(5, 6), r(6, 5), r(2, 6)], biases=[r(6), r(5), r(6), r(2)], residual=True)),
}

FLOW = {
    "order of another size": (ValueError, r"steps\[0\].order",
                              lambda: flow(steps=[functional.Permutation(torch.arange(3))])),
    "order floating": (TypeError, r"steps\[0\].order", lambda: flow(steps=[functional.Permutation(r(4))])),
    "order no permutation": (ValueError, r"steps\[0\].order",
                             lambda: flow(steps=[functional.Permutation(torch.tensor([0, 1, 1, 3]))])),
    "order a list": (TypeError, r"steps\[0\].order", lambda: flow(steps=[functional.Permutation([0, 1, 2, 3])])),
    "x a list": (TypeError, "x", lambda: flow([1.0])),
    "x a vector": (ValueError, "x", lambda: flow(r(4))),
    "x bfloat16": (TypeError, "x", lambda: flow(r(3, 4, dtype=HALF))),
    "steps a coupling": (TypeError, "steps", lambda: flow(steps=coupling())),
    "steps of modules": (TypeError, r"steps\[1\]", lambda: flow(steps=[coupling(), torch.nn.Linear(1, 1)])),
    "bias of another size": (ValueError, r"steps\[0\].bias",
                             lambda: flow(steps=[functional.ChannelAffine(r(3), r(4))])),
    "log_scale float64": (TypeError, r"steps\[0\].log_scale",
                          lambda: flow(steps=[functional.ChannelAffine(r(4), r(4, dtype=DOUBLE))])),
    "weights with too few inputs": (ValueError, r"steps\[0\].weights\[0\]",
                                    lambda: flow(steps=[coupling(weights=(r(5, 1), r(4, 5)))])),
    "weights with too many outputs": (ValueError, r"steps\[0\].weights\[1\]",
                                      lambda: flow(steps=[coupling(weights=(r(5, 2), r(5, 5)))])),
    "weights of a pair for a shift": (ValueError, r"steps\[0\].weights\[1\]",
                                      lambda: flow(steps=[coupling(scale="additive")])),
    "weights a number": (TypeError, r"steps\[0\].weights\[0\]", lambda: flow(steps=[coupling(weights=(1, r(4, 5)))])),
    "weights elsewhere": (ValueError, r"steps\[0\].weights\[0\]",
                          lambda: flow(steps=[coupling(weights=(r(5, 2, **META), r(4, 5)))])),
    "no weights": (ValueError, r"steps\[0\].biases", lambda: flow(steps=[coupling(weights=(), biases=())])),
    "biases too few": (ValueError, r"steps\[0\].biases", lambda: flow(steps=[coupling(biases=(r(5),))])),
    "biases of another size": (ValueError, r"steps\[0\].biases\[0\]",
                               lambda: flow(steps=[coupling(biases=(r(4), r(4)))])),
    "unknown activation": (ValueError, r"steps\[0\].activation", lambda: flow(steps=[coupling(activation="gelu")])),
    "unknown scale of a step": (ValueError, "scale", lambda: flow(steps=[coupling(scale="cube")])),
    "unknown order of a step": (ValueError, r"steps\[0\].order", lambda: flow(steps=[coupling(order="s")])),
    "context of another batch": (ValueError, "context", lambda: flow(context=r(2, 1))),
    "context float64": (TypeError, "context", lambda: flow(context=r(3, 1, dtype=DOUBLE))),
    "context not expected": (ValueError, r"steps\[0\].weights\[0\]", lambda: flow(context=r(3, 1))),
}
Q = r(2, 6, 4)
M = r(2, 3, 4)


def sample(params=Q, **kwargs):
    return gaussian_sample_kl(params, **kwargs)


GAUSSIAN = {
    "params not a tensor": (TypeError, "params", lambda: sample(None)),
    "params of integers": (TypeError, "params", lambda: sample(Q.long())),
    "params with odd channels": (ValueError, "params", lambda: sample(r(2, 5, 4))),
    "params a vector": (ValueError, "params", lambda: sample(r(4))),
    "pair of three": (ValueError, "params", lambda: sample((M, M, M))),
    "pair that does not match": (ValueError, "params", lambda: sample((M, r(2, 3, 1)))),
    "pair of vectors": (ValueError, "params", lambda: sample((r(3), r(3)))),
    "pair elsewhere": (ValueError, "params", lambda: sample((M, r(2, 3, 4, **META)))),
    "pair of mixed float64": (TypeError, "params", lambda: sample((M, M.double()))),
    "pair of a tensor and a number": (TypeError, "params", lambda: sample((M, 1.0))),
    "unknown scale": (ValueError, "scale", lambda: sample(scale="variance")),
    "a ScaleMap": ((TypeError, ValueError), "scale", lambda: sample(scale=functional.ScaleMap("exp"))),
    "unknown layout": (ValueError, "layout", lambda: sample(layout="cross")),
    "unknown order": (ValueError, "order", lambda: sample(order="scale_shift")),
    "unknown reduce": (ValueError, "reduce", lambda: sample(reduce="mean")),
    "prior a tensor": (TypeError, "prior", lambda: sample(prior=Q)),
    "prior of one": (TypeError, "prior", lambda: sample(prior=(M,))),
    "prior of numbers": (TypeError, "prior", lambda: sample(prior=(0.0, 1.0))),
    "prior of another batch": (ValueError, "prior", lambda: sample(prior=(r(3, 3, 4), r(3, 3, 4)))),
    "prior broadcasting along a channel": (ValueError, "prior", lambda: sample(prior=(r(2, 1, 4), M))),
    "prior broadcasting along space": (ValueError, "prior", lambda: sample(prior=(M, r(2, 3, 1)))),
    "prior of another rank": (ValueError, "prior", lambda: sample(prior=(r(3, 4), r(3, 4)))),
    "prior elsewhere": (ValueError, "prior", lambda: sample(prior=(M, r(2, 3, 4, **META)))),
    "prior in float64": (TypeError, "params|prior", lambda: sample(prior=(M.double(), M.double()))),
    "eps of another shape": (ValueError, "eps", lambda: sample(eps=r(2, 3))),
    "eps without the samples": (ValueError, "eps", lambda: sample(eps=M, n_samples=2)),
    "eps with too many": (ValueError, "eps", lambda: sample(eps=r(2, 2, 3, 4))),
    "eps of integers": (TypeError, "eps", lambda: sample(eps=M.long())),
    "eps in float64": (TypeError, "params|eps", lambda: sample(eps=M.double())),
    "eps elsewhere": (ValueError, "eps", lambda: sample(eps=r(2, 3, 4, **META))),
    "eps and seed": (ValueError, "eps and seed|seed|eps", lambda: sample(eps=M, seed=1)),
    "seed a float": (TypeError, "seed", lambda: sample(seed=1.0)),
    "seed a bool": (TypeError, "seed", lambda: sample(seed=True)),
    "seed int32": (TypeError, "seed", lambda: sample(seed=torch.tensor(1, dtype=torch.int32))),
    "seed floating": (TypeError, "seed", lambda: sample(seed=torch.tensor(1.0))),
    "seed of another batch": (ValueError, "seed", lambda: sample(seed=torch.arange(3))),
    "seed a matrix": (ValueError, "seed", lambda: sample(seed=torch.ones(2, 1, dtype=LONG))),
    "seed elsewhere": (ValueError, "seed", lambda: sample(seed=torch.ones((), dtype=LONG, **META))),
    "seed a name": (TypeError, "seed", lambda: sample(seed="7")),
    "negative offset": (ValueError, "offset", lambda: sample(seed=1, offset=-1)),
    "offset beyond a counter": (ValueError, "offset", lambda: sample(seed=1, offset=2**63)),
    "seed of more than 64 bits": (ValueError, "seed", lambda: sample(seed=2**64)),
    "seed below 64 bits": (ValueError, "seed", lambda: sample(seed=-2**63 - 1)),
    "offset a float": (TypeError, "offset", lambda: sample(seed=1, offset=1.0)),
    "negative n_samples": (ValueError, "n_samples", lambda: sample(seed=1, n_samples=-1)),
    "n_samples a float": (TypeError, "n_samples", lambda: sample(seed=1, n_samples=2.0)),
    "n_samples a bool": (TypeError, "n_samples", lambda: sample(seed=1, n_samples=True)),
    "generator a seed": (TypeError, "generator", lambda: sample(generator=3)),
}

S = r(2, 15, 4)  # two bins for each of X's channels
SPLINE = {
    "spline of no tensor": (TypeError, "x", lambda: spline([1.0], S)),
    "spline of integers": (TypeError, "x", lambda: spline(X.long(), S)),
    "spline without channels": (ValueError, "x", lambda: spline(r(4), r(4))),
    "spline params not a tensor": (TypeError, "params", lambda: spline(X, None)),
    "spline params 0-d": (ValueError, "params", lambda: spline(X, r())),
    "spline params that are no 3K - 1": (ValueError, "params", lambda: spline(X, r(2, 18, 4))),
    "spline params of part of a channel": (ValueError, "params", lambda: spline(X, r(2, 16, 4))),
    "spline params of no bins": (ValueError, "params", lambda: spline(X, r(2, 0, 4), kind="linear")),
    "spline params of another batch": (ValueError, "params", lambda: spline(X, r(3, 15, 4))),
    "spline params of another size": (ValueError, "params", lambda: spline(X, r(2, 15))),
    "spline params for no channels": (ValueError, "params", lambda: spline(r(2, 0, 4), S)),
    "spline params elsewhere": (ValueError, "params", lambda: spline(X, r(2, 15, 4, **META))),
    "spline params in float64": (TypeError, "x|params", lambda: spline(X, S.double())),
    "spline logdet of another shape": (ValueError, "logdet", lambda: spline(X, S, logdet=r(3))),
    "spline logdet in float64": (TypeError, "x|params|logdet", lambda: spline(X, S, logdet=r(2, dtype=DOUBLE))),
    "spline of an unknown kind": (ValueError, "kind", lambda: spline(X, S, kind="cubic")),
    "spline with unknown tails": (ValueError, "tails", lambda: spline(X, S, tails="round")),
    "spline with params for other tails": (ValueError, "params", lambda: spline(X, S, tails="circular")),
    "linear spline without tails": (ValueError, "tails", lambda: spline(X, S, kind="linear", tails=None)),
    "spline of no interval": (ValueError, "tail_bound", lambda: spline(X, S, tail_bound=0.0)),
    "spline of no number": (TypeError, "tail_bound", lambda: spline(X, S, tail_bound="3")),
    "spline of no number as gain": (TypeError, "gain", lambda: spline(X, S, gain=None)),
    "spline of an endless interval": (ValueError, "tail_bound", lambda: spline(X, S, tail_bound=float("inf"))),
    "spline of bins too wide": (ValueError, "min_width", lambda: spline(X, S, min_width=0.5)),
    "spline of bins too high": (ValueError, "min_height", lambda: spline(X, S, min_height=-0.1)),
    "spline of falling knots": (ValueError, "min_derivative", lambda: spline(X, S, min_derivative=-1.0)),
    "spline of no gain": (ValueError, "gain", lambda: spline(X, S, gain=float("nan"))),
    "spline of no clamp": (ValueError, "clamp", lambda: spline(X, S, clamp=0.0)),
    "spline of flat ends": (ValueError, "end_derivative", lambda: spline(X, S, end_derivative=0.0)),
}


REFUSED = {**AFFINE, **SLOGDET, **PLU, **CONV, **ACTIVATED, **MLP, **WIDE, **FLOW, **GAUSSIAN, **SPLINE}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_named(name):
    error, argument, call = REFUSED[name]
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert re.match(rf"({argument})(?!\w)", message), f"the message does not begin with {argument!r}: {message!r}"
    assert isinstance(caught.value, (TypeError, ValueError)) and not isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize(("call", "came", "expected"), [
    (lambda: affine_coupling(X, r(2, 7, 4)), "(2, 7, 4)", "(2, 6, 4)"),
    (lambda: affine_coupling(X, P, logdet=r(5)), "(5,)", "(2,)"),
    (lambda: affine_coupling(X, P.int()), "torch.int32", "float32"),
    (lambda: affine_coupling(X, P, scale="cube"), "'cube'", "softplus"),
    (lambda: slogdet(r(2, 3, 4)), "(2, 3, 4)", "C"),
    (lambda: sample(eps=r(2, 3)), "(2, 3)", "(2, 3, 4)"),
    (lambda: sample(seed=torch.arange(3)), "(3,)", "(2,)"),
    (lambda: sample(reduce="mean"), "'mean'", "'channel'"),
    (lambda: affine_coupling(X, r(2, 6, 4, **META)), "meta", "cpu")])
def test_messages_say_what_came_and_what_was_expected(call, came, expected):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert came in str(caught.value) and expected in str(caught.value)


def test_keyword_arguments_are_keyword_only():
    for call in (lambda: affine_coupling(X, P, "exp"), lambda: gaussian_sample_kl(Q, "logvar")):
        with pytest.raises(TypeError):
            call()


def test_nothing_is_drawn_or_run_by_a_refused_call():
    """A refused call leaves torch's generator where it was."""
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="^reduce"):
        sample(reduce="mean")
    with pytest.raises(TypeError, match="^(params|prior)"):
        sample(prior=(M.double(), M.double()))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_backend_that_cannot_run_says_why():
    for name in ("triton", "cuda"):
        with backends.use_backend(name), pytest.raises(RuntimeError, match=f"{name}.*affine_coupling.*because|{name}"):
            affine_coupling(X, P)
