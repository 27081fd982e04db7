"""Models of other libraries, as they are and after fastflow.accelerate: a training step each, interleaved, one thread.

Every model is the library's own, with the library's own conditioners, and gets the same fused Adam. "small" cases hold
the overhead of a swapped layer on inputs of 64 x 8. Steps run several in a row, as in training.
"""

import argparse
import copy
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

import fastflow
from benchmarks import contest, run
from benchmarks.cases import Case
from fastflow.autograd.latent_head import sample_mean_kl

PYTHAE_STEP, LATENT_HEAD = "pythae VAE, 784-512-16, batch 100", "pythae latent head alone"
ROUND_SECONDS = 0.1  # of steps in a row: the first after another model's finds cold caches


def _dense(hidden):
    return lambda i, o: nn.Sequential(nn.Linear(i, hidden), nn.ReLU(), nn.Linear(hidden, o))


def normflows_glow(n_steps=8, hidden=64, levels=3, channels=3, size=32):
    """normflows' example of a multi-scale Glow, after the pass that initialises its ActNorms."""
    import normflows as nf

    q0, merges, layers = [], [], []
    for i in range(levels):
        layers.append([nf.flows.GlowBlock(channels * 2**(levels + 1 - i), hidden) for _ in range(n_steps)]
                      + [nf.flows.Squeeze()])
        if i > 0:
            merges.append(nf.flows.Merge())
        scale = 2**levels if i == 0 else 2**(levels - i)
        q0.append(nf.distributions.DiagGaussian((channels * 2**(levels + 1 if i == 0 else levels - i), size // scale,
                                                 size // scale)))
    model = nf.MultiscaleFlow(q0, layers, merges, class_cond=False)
    with torch.no_grad():
        model.log_prob(torch.randn(32, channels, size, size), None)
    return model


def normflows_realnvp(features, hidden, n_layers=8):
    import normflows as nf

    layers = []
    for _ in range(n_layers):
        layers.append(nf.flows.AffineCouplingBlock(nf.nets.MLP([features // 2, hidden, hidden, features])))
        layers.append(nf.flows.Permute(features, mode="swap"))
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(features), layers)


def normflows_nsf(features, hidden, n_layers=6):
    import normflows as nf

    layers = []
    for _ in range(n_layers):
        layers += [nf.flows.CoupledRationalQuadraticSpline(features, 2, hidden), nf.flows.LULinearPermute(features)]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(features), layers)


def freia(block, features, hidden, n_blocks):
    import FrEIA.framework
    import FrEIA.modules

    net = FrEIA.framework.SequenceINN(features)
    for _ in range(n_blocks):
        net.append(getattr(FrEIA.modules, block), subnet_constructor=_dense(hidden))
    return net


def nflows_realnvp(features, hidden, n_layers=8):
    from nflows.flows.realnvp import SimpleRealNVP

    return SimpleRealNVP(features, hidden, n_layers, 2)


def nflows_nsf(features, hidden, n_layers=5, autoregressive=False):
    from nflows import distributions, flows, transforms
    from nflows.nn.nets import ResidualNet

    layers, spline = [], {"num_bins": 8, "tails": "linear", "tail_bound": 3.0}
    for index in range(n_layers):
        if autoregressive:
            layers.append(transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                features, hidden, **spline))
        else:
            mask = (torch.arange(features) % 2 == index % 2).int()
            layers.append(transforms.PiecewiseRationalQuadraticCouplingTransform(
                mask, lambda i, o: ResidualNet(i, o, hidden_features=hidden, num_blocks=2), **spline))
        layers.append(transforms.LULinear(features))
    return flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([features]))


def zuko(kind, features, hidden, n_layers, **options):
    import zuko as library

    return getattr(library.flows, kind)(features, transforms=n_layers, hidden_features=(hidden, hidden), **options)


def torchflows(kind, features, depth=4, **conditioner):
    from torchflows import flows
    from torchflows.bijections.finite.autoregressive import architectures

    bijection = getattr(architectures, kind)(features, n_layers=depth, conditioner_kwargs=conditioner)
    model = flows.Flow(bijection)
    model.log_prob(torch.randn(256, features))  # its ActNorms take their statistics from the first batch
    return model


def pyro_spline_coupling(features, hidden, n_bins=8):
    """One quadratic spline coupling as a density."""
    from pyro.distributions import transforms
    from pyro.nn import DenseNN

    half = features // 2
    sizes = [(features - half) * n for n in (n_bins, n_bins, n_bins - 1)]
    return transforms.SplineCoupling(features, half, DenseNN(half, [hidden], sizes), n_bins, order="quadratic")


def pythae_vae(latent, shape=(1, 28, 28)):
    from pythae import models

    return models.VAE(models.VAEConfig(input_dim=shape, latent_dim=latent))


def _pyro_log_prob(transform, x):
    x = x.clone()  # Pyro's transforms know their last argument by identity
    z = transform(x)
    return transform.log_abs_det_jacobian(x, z) - 0.5 * z.square().sum(1)


def _bound(model, x):
    return -model({"data": x.sigmoid()}).loss


def _log_prob(model, x):
    return model.log_prob(x)


def _lazy_log_prob(model, x):
    return model().log_prob(x)


def _multiscale_log_prob(model, x):
    return model.log_prob(x, None)


def _invertible_log_prob(model, x):
    z, logdet = model(x)
    return logdet - 0.5 * z.square().sum(1)


def _step(model, log_prob, x):
    """contest.training_step of a model whose call is not log p(x)."""
    optimizer = contest.fused_adam(model)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = -log_prob(model, x).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()
    return step


def _build(make, log_prob, shape):
    def build(device):
        torch.manual_seed(0)
        warnings.simplefilter("ignore")  # of the libraries, about functions that torch will drop
        model, x = make().to(device), torch.randn(*shape, device=device)
        model, fused = copy.deepcopy(model), copy.deepcopy(model)  # laid out alike in memory
        report = fastflow.accelerate(fused)
        variants = {"fastflow": _step(fused, log_prob, x), "original": _step(model, log_prob, x)}
        log_prob(fused, x)
        if not report.verified:
            raise RuntimeError("no layer was swapped and verified")
        conditioners = [m for m in fused.modules() if type(m).__name__ == "ConvNet2d"]
        if conditioners:
            couplings = copy.deepcopy(fused)
            for name, module in fused.named_modules():
                if module in conditioners:
                    fastflow.restore(couplings.get_submodule(name))
            variants["couplings alone"] = _step(couplings, log_prob, x)
        return variants
    return build


def _latent_head(batch, latent):
    """What a pythae VAE does between encoder and decoder, forward and backward, as pythae has it and as the swapped
    one does. Both draw torch's noise."""
    def original(mean, logvar):
        std = torch.exp(0.5 * logvar)
        z = mean + torch.randn_like(std) * std
        return z, (-0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp(), dim=-1)).mean(dim=0)

    def build(device):
        torch.manual_seed(0)
        leaves = [torch.randn(batch, latent, device=device, requires_grad=True) for _ in range(2)]
        grads = torch.randn(batch, latent, device=device), torch.ones((), device=device)
        return {name: lambda head=head: torch.autograd.grad(head(*leaves), leaves, grads)
                for name, head in (("fastflow", sample_mean_kl), ("original", original))}
    return Case(f"{LATENT_HEAD}, {batch} x {latent}", "heads", build, ("fastflow", "original"))


def _case(name, make, log_prob, shape, group="models"):
    return Case(name, group, _build(make, log_prob, shape), ("fastflow", "original"))


CASES = (
    _case("normflows Glow, 3 levels x 8 steps, 64 hidden channels, 32 images 3x32x32", normflows_glow,
          _multiscale_log_prob, (32, 3, 32, 32)),
    _case("FrEIA AllInOneBlock x 16, 64-D, hidden 128, batch 1024", lambda: freia("AllInOneBlock", 64, 128, 16),
          _invertible_log_prob, (1024, 64)),
    _case("FrEIA GLOWCouplingBlock x 8, 16-D, hidden 64, batch 512", lambda: freia("GLOWCouplingBlock", 16, 64, 8),
          _invertible_log_prob, (512, 16)),
    _case("nflows SimpleRealNVP, 8 layers, 6-D, hidden 64, batch 512", lambda: nflows_realnvp(6, 64), _log_prob,
          (512, 6)),
    _case("nflows NSF coupling, 5 layers, 8-D, hidden 32, batch 512", lambda: nflows_nsf(8, 32), _log_prob, (512, 8)),
    _case("nflows NSF autoregressive, 5 layers, 8-D, hidden 32, batch 512",
          lambda: nflows_nsf(8, 32, autoregressive=True), _log_prob, (512, 8)),
    _case("normflows RealNVP, 8 layers, 16-D, hidden 64, batch 512", lambda: normflows_realnvp(16, 64), _log_prob,
          (512, 16)),
    _case("normflows NSF coupling, 6 layers, 8-D, hidden 32, batch 512", lambda: normflows_nsf(8, 32), _log_prob,
          (512, 8)),
    _case("zuko RealNVP, 8 layers, 6-D, hidden 64, batch 512", lambda: zuko("RealNVP", 6, 64, 8), _lazy_log_prob,
          (512, 6)),
    _case("zuko MAF, 5 layers, 6-D, hidden 64, batch 512", lambda: zuko("MAF", 6, 64, 5), _lazy_log_prob, (512, 6)),
    _case("zuko NSF, 5 layers, 8-D, hidden 64, batch 512", lambda: zuko("NSF", 8, 64, 5), _lazy_log_prob, (512, 8)),
    _case("zuko NSF coupling, 5 layers, 8-D, hidden 64, batch 512", lambda: zuko("NSF", 8, 64, 5, passes=2),
          _lazy_log_prob, (512, 8)),
    _case("torchflows RealNVP, 8 layers, 16-D, hidden 64, batch 512",
          lambda: torchflows("RealNVP", 16, 8, n_hidden=64, n_layers=3), _log_prob, (512, 16)),
    _case("torchflows NSF coupling, 5 layers, 8-D, hidden 32, batch 512",
          lambda: torchflows("CouplingRQNSF", 8, 5, n_hidden=32), _log_prob, (512, 8)),
    _case("Pyro spline coupling, 8-D, hidden 32, batch 512", lambda: pyro_spline_coupling(8, 32), _pyro_log_prob,
          (512, 8)),
    _case(PYTHAE_STEP, lambda: pythae_vae(16), _bound, (100, 1, 28, 28)),
    *(_latent_head(*sizes) for sizes in ((100, 16), (512, 64), (4096, 256))),
    *(_case(f"small: FrEIA {block} x 4, 64 x 8", lambda block=block: freia(block, 8, 16, 4), _invertible_log_prob,
            (64, 8), "small") for block in ("AllInOneBlock", "GLOWCouplingBlock", "RNVPCouplingBlock",
                                            "GINCouplingBlock", "NICECouplingBlock")),
    _case("small: nflows SimpleRealNVP, 64 x 8", lambda: nflows_realnvp(8, 16, 4), _log_prob, (64, 8), "small"),
    _case("small: nflows NSF coupling, 64 x 8", lambda: nflows_nsf(8, 16, 4), _log_prob, (64, 8), "small"),
    _case("small: normflows RealNVP, 64 x 8", lambda: normflows_realnvp(8, 16, 4), _log_prob, (64, 8), "small"),
    _case("small: zuko RealNVP, 64 x 8", lambda: zuko("RealNVP", 8, 16, 4), _lazy_log_prob, (64, 8), "small"),
    *(_case(f"small: torchflows {kind}, 64 x 8", lambda kind=kind: torchflows(kind, 8), _log_prob, (64, 8), "small")
      for kind in ("RealNVP", "InverseRealNVP", "NICE", "MAF", "CouplingRQNSF")),
    _case("small: zuko MAF, 64 x 8", lambda: zuko("MAF", 8, 16, 4), _lazy_log_prob, (64, 8), "small"),
    _case("small: pythae VAE, 64 x 8", lambda: pythae_vae(2, (8,)), _bound, (64, 8), "small"),
)


def main(argv=None):
    """Run the cases; returns the exit status, 1 where one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filter", default="", help="only the cases whose name holds this")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--results", type=Path, help="folder for the JSON; none is written without it")
    args = parser.parse_args(argv)
    rows = []
    for case in CASES:
        if args.filter in case.name:
            for row in run.measure(case, args.device, args.rounds, one_thread=True, round_seconds=ROUND_SECONDS):
                run.show(row)
                rows.append(row)
    if args.results:
        run.save(args.results, f"{args.device}-adapters", {"machine": run.machine(args.device), "rows": rows})
    return 1 if not rows or any(row["failed"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
