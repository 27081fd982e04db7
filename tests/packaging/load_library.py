"""Loads the CPU library built here into whatever torch runs this script, and holds every operation, forward and
backward, called and compiled, against the reference.

One binary serves every torch from 2.10; run it with each:

    PYTHONPATH=. /path/to/python-with-torch-2.10 tests/packaging/load_library.py
"""

import sys

import torch

from fastflow import backends, functional, reference


def _network(*sizes):
    """(weights, biases) of layers between ``sizes`` features."""
    weights = [torch.randn(o, i) / i**0.5 for i, o in zip(sizes, sizes[1:], strict=False)]
    return weights, [torch.randn(o) for o in sizes[1:]]


def _calls(x, params, weight):
    """{operation: its call on a module that has it, functional or reference}."""
    permutation, logits = torch.arange(12).repeat(3, 1), torch.randn(4, 6, 5, 5)
    coupling = functional.MLPCoupling(*_network(2, 8, 4), scale="tanh")
    level = functional.LatentLevel(*(functional.MLPBlock(*_network(*sizes))
                                     for sizes in ((5, 7, 6), (9, 7, 6), (8, 7, 5))))
    conv = torch.randn(32, 6, 3, 3) / 7, torch.randn(32), torch.randn(32, 32, 1, 1) / 6, torch.randn(32)
    last = torch.randn(12, 32, 3, 3) / 17, torch.randn(12)
    return {
        "activated_conv": lambda f: (f.activated_conv(x, *conv[:2], padding=1, activation="silu"),),
        "affine_coupling": lambda f: f.affine_coupling(x, params, scale="sigmoid"),
        "bernoulli_log_prob": lambda f: (f.bernoulli_log_prob(x.sigmoid(), logits),),
        "conv_net": lambda f: (f.conv_net(x, *conv, *last),),
        "gaussian_sample_kl": lambda f: f.gaussian_sample_kl(params, seed=7, return_logq=True),
        "mlp": lambda f: (f.mlp(x[:, :, 0, 0], *_network(6, 16, 4)),),
        "mlp_flow": lambda f: f.mlp_flow(x[:, :4, 0, 0], [coupling]),
        "plu_weight": lambda f: f.plu_weight(weight, weight, weight[..., 0], weight[..., 1].sign(), permutation),
        "slogdet": lambda f: f.slogdet(weight),
        "slogdet_inverse": lambda f: f.slogdet_inverse(weight),
        "spline": lambda f: f.spline(x[:, :2], params[:, :10]),
        "top_down": lambda f: f.top_down(x[:, :5, 0, 0], [x[:, :4, 1, 1]], [level], seed=7),
        "wide_mlp": lambda f: (f.wide_mlp(x.flatten(1), *_network(150, 96, 20)),),
    }


def _evaluate(call, module, leaves):
    """(results, gradients of the leaves) of one call."""
    torch.manual_seed(1)
    results = []
    for result in call(module):
        results += result if isinstance(result, list | tuple) else [result]
    differentiable = [r for r in results if r.requires_grad]
    grads = torch.autograd.grad(differentiable, leaves, [torch.cos(r.detach()) for r in differentiable],
                                allow_unused=True)
    return results, [g for g in grads if g is not None]


def main():
    torch.manual_seed(0)
    leaves = torch.randn(4, 6, 5, 5), torch.randn(4, 12, 5, 5), torch.randn(3, 12, 12)
    calls = _calls(*(leaf.requires_grad_() for leaf in leaves))
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}")
    if set(calls) != set(backends.OPS):
        raise SystemExit(f"no call of {', '.join(set(backends.OPS) - set(calls))}")
    for name, call in calls.items():
        expected, expected_grads = _evaluate(call, reference, leaves)
        for how in call, torch.compile(call, backend="aot_eager", fullgraph=True):
            with backends.use_backend("cpu"):
                results, grads = _evaluate(how, functional, leaves)
            torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(grads, expected_grads, rtol=1e-3, atol=1e-3)
        print(f"  {name}: cpu equals the reference, compiled too, {len(results)} results and {len(grads)} gradients")


if __name__ == "__main__":
    main()
