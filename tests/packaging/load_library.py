"""Loads the CPU library built here into whatever torch runs this script, and holds every operation against the
reference.

One binary serves every torch from 2.10; run it with each:

    PYTHONPATH=. /path/to/python-with-torch-2.10 tests/packaging/load_library.py
"""

import sys

import torch

from fastflow import backends, functional, reference


def main():
    torch.manual_seed(0)
    x, params = torch.randn(4, 6, 5, 5), torch.randn(4, 12, 5, 5)
    weight, n = torch.randn(3, 12, 12), torch.arange(12).repeat(3, 1)
    weights, biases = (torch.randn(8, 2), torch.randn(4, 8)), (torch.randn(8), torch.randn(4))
    step = functional.MLPCoupling(weights, biases, scale="tanh")
    calls = {
        "mlp_flow": lambda f: f.mlp_flow(x[:, :4, 0, 0], [step]),
        "affine_coupling": lambda f: f.affine_coupling(x, params, scale="sigmoid"),
        "slogdet": lambda f: f.slogdet(weight),
        "slogdet_inverse": lambda f: f.slogdet_inverse(weight),
        "gaussian_sample_kl": lambda f: f.gaussian_sample_kl(params, seed=7, return_logq=True),
        "plu_weight": lambda f: f.plu_weight(weight, weight, weight[..., 0], weight[..., 1].sign(), n),
        "spline": lambda f: f.spline(x[:, :2], params[:, :10]),
    }
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}")
    with backends.use_backend("cpu"):
        for name, call in calls.items():
            for got, expected in zip(call(functional), call(reference), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
            print(f"  {name}: cpu equals the reference")
        leaf = params.clone().requires_grad_()
        functional.affine_coupling(x, leaf)[1].sum().backward()
        torch.testing.assert_close(leaf.grad[:, :6], torch.ones_like(x))
        print("  backward: right")


if __name__ == "__main__":
    main()
