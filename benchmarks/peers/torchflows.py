"""RealNVP in torchflows (PyPI ``torchflows``): its AffineCoupling layers between permutations.

Its ready RealNVP puts an actnorm without parameters after every layer; that costs time, so the layers are composed here
without, which is the architecture of the others.
"""

import torch
from torch import nn
from torchflows import flows
from torchflows.bijections.base import BijectiveComposition
from torchflows.bijections.finite.autoregressive.layers import AffineCoupling, ElementwiseAffine
from torchflows.bijections.finite.matrix.permutation import ReversePermutationMatrix

from benchmarks.peers import common

REALNVP_SETTINGS = {"": {}}


class RealNVP(nn.Module):
    """log p(x) (B,) of x (B, 2); ``sample(n)``."""

    def __init__(self, n_layers, hidden):
        super().__init__()
        (width,) = set(hidden)  # its conditioner has one width
        event = torch.Size([2])
        parts = [ElementwiseAffine(event)]
        for index in range(n_layers):
            if index:
                parts.append(ReversePermutationMatrix(event))
            parts.append(AffineCoupling(event, conditioner_kwargs={
                "n_hidden": width, "n_layers": len(hidden) + 1, "nonlinearity": nn.ReLU}))
            last = common.linears(parts[-1].conditioner_transform)[-1]
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.flow = flows.Flow(BijectiveComposition(parts))

    def forward(self, x):
        return self.flow.log_prob(x)

    def sample(self, n):
        return self.flow.sample(n, no_grad=True)


def load_realnvp(peer, flow):
    """Give it the weights of realnvp.fastflow_realnvp(dialect="torchflows")."""
    affine, *couplings = peer.flow.bijection.layers
    own, *layers = flow.transform.transforms
    with torch.no_grad():
        affine.value.copy_(torch.stack([2 * own.log_scale, own.bias * own.log_scale.exp()], 1).view_as(affine.value))
    for coupling, layer in zip(couplings[0::2], layers, strict=True):
        common.copy_layers(coupling.conditioner_transform, layer.conditioner)
