"""RealNVP in zuko (PyPI ``zuko``): its GeneralCouplingTransform, after an affine map of its own for the actnorm."""

import torch
import zuko
from torch import nn

from benchmarks.peers import common

REALNVP_SETTINGS = {"": {}}


class RealNVP(nn.Module):
    """log p(x) (B,) of x (B, 2); ``sample(n)``."""

    def __init__(self, n_layers, hidden):
        super().__init__()
        parts = [zuko.lazy.UnconditionalTransform(_affine, torch.zeros(2), torch.zeros(2))]
        parts += [zuko.flows.GeneralCouplingTransform(2, mask=torch.tensor([index % 2 == 0, index % 2 == 1]),
                                                      hidden_features=hidden) for index in range(n_layers)]
        for part in parts[1:]:
            nn.init.zeros_(part.hyper[-1].weight)
            nn.init.zeros_(part.hyper[-1].bias)
        base = zuko.lazy.UnconditionalDistribution(zuko.distributions.DiagNormal, torch.zeros(2), torch.ones(2),
                                                   buffer=True)
        self.flow = zuko.flows.Flow(parts, base)

    def forward(self, x):
        return self.flow().log_prob(x)

    def sample(self, n):
        return self.flow().sample((n,))


def _affine(shift, scale):
    return zuko.transforms.DependentTransform(zuko.transforms.MonotonicAffineTransform(shift, scale), 1)


def load_realnvp(peer, flow):
    """Give it the weights of realnvp.fastflow_realnvp(dialect="zuko")."""
    affine, *couplings = peer.flow.transform.transforms
    own, *layers = flow.transform.transforms
    with torch.no_grad():
        shift, scale = affine.parameters()
        log_scale = own.log_scale  # = a / (1 + |a / c|), solved for a
        scale.copy_(log_scale / (1 - (log_scale / torch.log(torch.tensor(1e-3))).abs()))
        shift.copy_(own.bias * log_scale.exp())
    for coupling, layer in zip(couplings, layers, strict=True):
        common.copy_layers(coupling.hyper, layer.conditioner, torch.tensor([1, 0]))
