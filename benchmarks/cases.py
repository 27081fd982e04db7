"""The registry: what is measured, at which sizes, against what.

A case builds {variant: callable}; each callable runs one whole forward and backward (or what the case's name says). The
baselines are careful plain PyTorch, never a crippled one. Variant "fastflow" is compared with every other.
"""

import functools
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastflow import functional, nn, reference


@dataclass(frozen=True)
class Case:
    """One row of the table: ``build(device)`` gives its variants, {name: callable}, named as in ``variants``.

    fastflow is also compared with the fastest of ``peers``, names among the variants. A callable may have an attribute
    ``setting``, which the results then hold.
    """

    name: str
    group: str
    build: object
    variants: tuple = ("fastflow", "eager", "compile")  # compile costs tens of seconds
    peers: tuple = ()


def _leaf(*shape, device, scale=0.5):
    return (scale * torch.randn(*shape, device=device)).requires_grad_()


def _step(function, inputs, grads):
    """Forward and backward with given gradients of the outputs."""
    return lambda: torch.autograd.grad(function(*inputs), inputs, grads)


# affine coupling

def _eager_coupling(kind):
    def coupling(x, params):
        raw, shift = params.chunk(2, 1)
        if kind == "exp":
            log_s, s = raw, raw.exp()
        elif kind == "sigmoid":
            u = raw + 2.0
            log_s, s = F.logsigmoid(u), torch.sigmoid(u)
        else:
            log_s = torch.tanh(raw)
            s = log_s.exp()
        return x * s + shift, log_s.flatten(1).sum(1)
    return coupling


def _affine(kind, shape):
    def build(device):
        torch.manual_seed(0)
        x, params = _leaf(*shape, device=device), _leaf(shape[0], 2 * shape[1], *shape[2:], device=device)
        grads = torch.randn(shape, device=device), torch.randn(shape[0], device=device)
        eager = _eager_coupling(kind)
        return {"fastflow": _step(lambda *a: functional.affine_coupling(*a, scale=kind), (x, params), grads),
                "eager": _step(eager, (x, params), grads),
                "compile": _step(torch.compile(eager, dynamic=False), (x, params), grads)}
    return Case(f"affine_coupling {kind} {tuple(shape)} forward+backward", "affine_coupling", build)


def _affine_forward(kind, shape, inverse):
    def build(device):
        torch.manual_seed(0)
        x, params = torch.randn(shape, device=device), torch.randn(shape[0], 2 * shape[1], *shape[2:], device=device)

        def eager():
            raw, shift = params.chunk(2, 1)
            s = raw.exp()
            return ((x - shift) / s if inverse else x * s + shift), raw.flatten(1).sum(1)
        return {"fastflow": lambda: functional.affine_coupling(x, params, scale=kind, inverse=inverse), "eager": eager}
    direction = "inverse" if inverse else "forward"
    return Case(f"affine_coupling {kind} {tuple(shape)} {direction}", "affine_coupling", build,
                ("fastflow", "eager"))


def _glow_coupling(shape):
    """Split, sigmoid coupling, concatenation, as inside a Glow step; ``shape`` is the whole tensor's."""
    def eager(x, h):
        passive, active = x.chunk(2, 1)
        raw, shift = h.chunk(2, 1)
        u = raw + 2.0
        return torch.cat([passive, (active + shift) * torch.sigmoid(u)], 1), F.logsigmoid(u).flatten(1).sum(1)

    def fused(x, h):
        return functional.affine_coupling(x, h, scale="sigmoid", shift_first=True, passive=shape[1] // 2)

    def build(device):
        torch.manual_seed(0)
        x, h = _leaf(*shape, device=device), _leaf(*shape, device=device)
        grads = torch.randn(shape, device=device), torch.randn(shape[0], device=device)
        return {"fastflow": _step(fused, (x, h), grads), "eager": _step(eager, (x, h), grads),
                "compile": _step(torch.compile(eager, dynamic=False), (x, h), grads)}
    return Case(f"affine_coupling in a Glow step {tuple(shape)} forward+backward", "affine_coupling", build)


# batched log-determinants

def _slogdet(size, count=96):
    def build(device):
        torch.manual_seed(0)
        stack = torch.linalg.qr(torch.randn(count, size, size, device=device))[0]
        stack = (stack + 0.05 * torch.randn_like(stack)).requires_grad_()
        singles = [w.detach().clone().requires_grad_() for w in stack]

        def loop():
            torch.autograd.grad(sum(torch.linalg.slogdet(w)[1] for w in singles), singles)

        def batched():
            if device == "cpu" and size >= 192 and torch.get_num_threads() > 1:
                raise RuntimeError("oneMKL's threaded sgetrf fails or never ends inside torch's loop over matrices")
            torch.autograd.grad(torch.linalg.slogdet(stack)[1].sum(), stack)
        return {"fastflow": lambda: torch.autograd.grad(functional.slogdet(stack)[1].sum(), stack),
                "torch batched": batched, "torch loop": loop}
    return Case(f"slogdet {count} matrices {size}x{size} forward+backward", "slogdet", build,
                ("fastflow", "torch batched", "torch loop"))


# reparameterised sampling with KL

def _eager_gaussian(params):
    mean, logvar = params.chunk(2, 1)
    z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    return z, 0.5 * (mean.square() + torch.expm1(logvar) - logvar).flatten(1).sum(1)


def _gaussian(shape):
    def build(device):
        torch.manual_seed(0)
        params = _leaf(shape[0], 2 * shape[1], *shape[2:], device=device)
        grads = torch.randn(shape, device=device), torch.randn(shape[0], device=device)
        return {"fastflow": _step(functional.gaussian_sample_kl, (params,), grads),
                "eager": _step(_eager_gaussian, (params,), grads),
                "compile": _step(torch.compile(_eager_gaussian, dynamic=False), (params,), grads)}
    return Case(f"gaussian_sample_kl {tuple(shape)} with its noise, forward+backward", "gaussian_sample_kl", build)


# the Bernoulli log-likelihood

def _eager_bernoulli(x, logits):
    each = F.binary_cross_entropy_with_logits(logits, x.expand(logits.shape), reduction="none")
    return -each.sum(-1)


def _bernoulli(batch, features, samples=None):
    """Of bits, given their logits: for one sample of z, or for K."""
    def build(device):
        torch.manual_seed(0)
        x = torch.bernoulli(torch.rand(batch, features, device=device))
        lead = () if samples is None else (samples,)
        logits = _leaf(*lead, batch, features, device=device, scale=3.0)
        grad = torch.randn(*lead, batch, device=device)
        return {name: _step(lambda t, f=function: f(x, t), (logits,), grad) for name, function in (
            ("fastflow", functional.bernoulli_log_prob), ("eager", _eager_bernoulli),
            ("compile", torch.compile(_eager_bernoulli, dynamic=False)))}
    times = "" if samples is None else f", {samples} samples of z"
    return Case(f"bernoulli_log_prob ({batch}, {features}){times}, forward+backward", "bernoulli_log_prob", build)


# the networks of an MLP VAE

def _wide_mlp(batch, *sizes):
    """Linear layers with ReLU between, every gradient."""
    def eager(x, *params):
        weights, biases = params[::2], params[1::2]
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            x = F.linear(x, weight, bias).relu()
        return F.linear(x, weights[-1], biases[-1])

    def build(device):
        torch.manual_seed(0)
        leaves = [_leaf(batch, sizes[0], device=device)]
        for inputs, outputs in itertools.pairwise(sizes):
            leaves += _leaf(outputs, inputs, device=device, scale=inputs**-0.5), _leaf(outputs, device=device)
        grad = torch.randn(batch, sizes[-1], device=device)
        return {"fastflow": _step(lambda x, *p: functional.wide_mlp(x, p[::2], p[1::2], activation="relu"), leaves,
                                  grad),
                "eager": _step(eager, leaves, grad),
                "compile": _step(torch.compile(eager, dynamic=False), leaves, grad)}
    return Case(f"wide_mlp {'-'.join(map(str, sizes))}, batch {batch}, forward+backward", "wide_mlp", build)


# Glow's conditioner

def _conv_net(batch, channels, size, hidden):
    """From half of Glow's channels to twice as many, in channels_last, which is eager's faster format, too."""
    def build(device):
        torch.manual_seed(0)
        x = _leaf(batch, channels, size, size, device=device).detach()
        net = nn.ConvNet(channels, 2 * channels, hidden).to(device)
        torch.nn.init.normal_(net.conv3.weight, std=0.05)
        convolutions = [p for layer in (net.conv1, net.conv2, net.conv3) for p in (layer.weight, layer.bias)]
        inputs = (x.contiguous(memory_format=torch.channels_last).requires_grad_(), *convolutions)
        grad = torch.randn(batch, 2 * channels, size, size, device=device).contiguous(memory_format=torch.channels_last)
        return {"fastflow": _step(functional.conv_net, inputs, grad), "eager": _step(reference.conv_net, inputs, grad),
                "compile": _step(torch.compile(reference.conv_net, dynamic=False), inputs, grad)}
    widths = f"{channels}-{hidden}-{hidden}-{2 * channels}"
    return Case(f"conv_net {widths} channels, batch {batch}, {size}x{size}, forward+backward", "conv_net", build)


# a VAE's convolutions

def _activated_conv(batch, channels, size, out, transposed, kernel=4, stride=2, padding=1):
    """SiLU and a convolution, of 4x4 and stride 2, in channels_last, which is eager's faster format, too."""
    def build(device):
        torch.manual_seed(0)
        layer = (torch.nn.ConvTranspose2d if transposed else torch.nn.Conv2d)(channels, out, kernel, stride, padding)
        x = _leaf(batch, channels, size, size, device=device).detach()
        inputs = (x.contiguous(memory_format=torch.channels_last).requires_grad_(), *layer.to(device).parameters())
        options = {"stride": stride, "padding": padding, "transposed": transposed, "activation": "silu",
                   "channels_last": True}
        sides = size * stride if transposed else size // stride
        grad = torch.randn(batch, out, sides, sides, device=device).contiguous(memory_format=torch.channels_last)
        eager = functools.partial(reference.activated_conv, **options)
        return {"fastflow": _step(functools.partial(functional.activated_conv, **options), inputs, grad),
                "eager": _step(eager, inputs, grad),
                "compile": _step(torch.compile(eager, dynamic=False), inputs, grad)}
    kind = ("transposed " if transposed else "") + (f"{kernel}x{kernel} stride {stride} " if kernel != 4 else "")
    return Case(f"activated_conv {kind}{channels}-{out} channels, batch {batch}, {size}x{size}, forward+backward",
                "activated_conv", build)


# whole tabular flows

def _eager_flow(layers, x):
    """tanh couplings with ReLU networks that take turns, in careful plain PyTorch."""
    total, half = 0.0, x.shape[1] // 2
    for index, layer in enumerate(layers):
        first, second = x[:, :half], x[:, half:]
        passive, active = (second, first) if index % 2 else (first, second)
        h = passive
        for weight, bias in layer[:-1]:
            h = torch.relu(F.linear(h, weight, bias))
        raw, shift = F.linear(h, *layer[-1]).chunk(2, 1)
        log_s = torch.tanh(raw)
        y = active * log_s.exp() + shift
        x = torch.cat([y, passive] if index % 2 else [passive, y], 1)
        total = total + log_s.sum(1)
    return x, total


def _mlp_flow(features, hidden, batch, couplings=16):
    def build(device):
        torch.manual_seed(0)
        layers = []
        for index in range(couplings):
            active = features // 2 if index % 2 else features - features // 2
            sizes = (features - active, hidden, hidden, 2 * active)
            layers.append([(_leaf(out, size, device=device, scale=max(size, 1) ** -0.5), _leaf(out, device=device))
                           for size, out in zip(sizes, sizes[1:], strict=False)])
        x, leaves = torch.randn(batch, features, device=device), [t for layer in layers for pair in layer for t in pair]
        grads = torch.randn(batch, features, device=device), torch.randn(batch, device=device)

        def fused(*leaves):
            steps = [functional.MLPCoupling(tuple(w for w, _ in layer), tuple(b for _, b in layer), scale="tanh",
                                            flip=bool(index % 2)) for index, layer in enumerate(layers)]
            return functional.mlp_flow(x, steps)
        return {"fastflow": _step(fused, leaves, grads),
                "eager": _step(lambda *_: _eager_flow(layers, x), leaves, grads)}
    name = f"mlp_flow {couplings} couplings of {features} features, hidden {hidden}, batch {batch} forward+backward"
    return Case(name, "mlp_flow", build, ("fastflow", "eager"))


# splines

def _spline(batch, features, bins):
    """Rational-quadratic with linear tails, against the functions of nflows and zuko on the same parameters."""
    def nflows(x, params):
        from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline
        widths, heights, slopes = params.view(batch, features, -1).split((bins, bins, bins - 1), -1)
        y, log = unconstrained_rational_quadratic_spline(x, widths, heights, slopes, tail_bound=3.0)
        return y, log.sum(1)

    def zuko(x, params):
        from zuko.transforms import MonotonicRQSTransform
        raw = params.view(batch, features, -1).split((bins, bins, bins - 1), -1)
        y, log = MonotonicRQSTransform(*raw, bound=3.0).call_and_ladj(x)
        return y, log.sum(1)

    def build(device):
        torch.manual_seed(0)
        inputs = (_leaf(batch, features, device=device, scale=1.0),
                  _leaf(batch, features * (3 * bins - 1), device=device, scale=1.0))
        grads = torch.randn(batch, features, device=device), torch.randn(batch, device=device)
        functions = {"fastflow": functional.spline, "eager": reference.spline,
                     "compile": torch.compile(reference.spline, dynamic=False), "nflows": nflows, "zuko": zuko}
        return {name: _step(function, inputs, grads) for name, function in functions.items()}
    return Case(f"spline ({batch}, {features}) with {bins} bins, forward+backward", "spline", build,
                ("fastflow", "eager", "compile", "nflows", "zuko"))


OP_CASES = (
    *(_affine(kind, shape) for kind in ("exp", "sigmoid", "tanh")
      for shape in ((256, 48, 16, 16), (8, 1024, 768), (64, 512))),
    _affine_forward("exp", (256, 48, 16, 16), False),
    _affine_forward("exp", (256, 48, 16, 16), True),
    *(_glow_coupling(shape) for shape in ((64, 12, 16, 16), (64, 24, 8, 8), (64, 48, 4, 4))),
    *(_slogdet(size) for size in (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)),
    *(_mlp_flow(*sizes) for sizes in ((2, 64, 256), (2, 64, 4096), (10, 64, 4096), (64, 128, 1024))),
    *(_gaussian(shape) for shape in ((4096, 256), (1024, 1024), (16, 4, 64, 64), (128, 64))),
    _bernoulli(128, 784), _bernoulli(128, 784, 50),
    _wide_mlp(128, 784, 400, 40), _wide_mlp(128, 20, 400, 784), _wide_mlp(1600, 20, 400, 784),
    *(_conv_net(32, channels, size, hidden) for hidden in (64, 128) for channels, size in ((6, 16), (12, 8), (24, 4))),
    *(_activated_conv(128, *sizes) for sizes in ((32, 14, 64, False), (64, 7, 32, True), (32, 14, 1, True))),
    # what nn.FusedSequential leaves to PyTorch
    *(_activated_conv(64, 32, 16, 32, False, kernel, stride, kernel // 2)
      for kernel, stride in ((5, 1), (7, 1), (5, 2))),
    *(_spline(batch, features, 8) for batch, features in ((4096, 64), (256, 8))),
)
