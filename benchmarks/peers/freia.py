"""Glow and RealNVP in FrEIA (PyPI ``FrEIA``): its AllInOneBlock, the block that its authors recommend.

AllInOneBlock has no learned 1x1 convolution and so no log-determinant of one: a rotation drawn once stands in its
place. It does less work than a Glow step. Its affine part comes after the coupling and is not set from data.
"""

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import numpy as np
import torch
from torch import nn

from benchmarks.peers import common

GLOW_SETTINGS = {"strided squeeze": {"legacy_squeeze": False}, "legacy squeeze": {"legacy_squeeze": True}}
REALNVP_SETTINGS = {"one-sided couplings": {"all_in_one": False}, "AllInOneBlock": {"all_in_one": True}}


class Glow(nn.Module):
    """log p(x) (B,) of images (B, C, H, W); ``sample(n)``."""

    def __init__(self, image_shape, n_levels, n_steps, hidden_channels, legacy_squeeze=False):
        super().__init__()
        np.random.seed(0)  # FrEIA draws its rotations from numpy
        node = Ff.InputNode(*image_shape)
        nodes, channels = [node], image_shape[0]
        for level in range(n_levels):
            channels *= 4
            node = self._add(nodes, node, Fm.IRevNetDownsampling, legacy_backend=legacy_squeeze)
            for _ in range(n_steps):
                node = self._add(nodes, node, Fm.AllInOneBlock, global_affine_type="EXP", permute_soft=True,
                                 subnet_constructor=lambda i, o: common.conv_net(i, o, hidden_channels))
            if level < n_levels - 1:
                node = self._add(nodes, node, Fm.AffineCouplingOneSided, clamp=5.0, clamp_activation="TANH",
                                 subnet_constructor=common.zero_conv)
                node = self._add(nodes, node, Fm.Split)
                nodes.append(Ff.OutputNode(node.out1))
                channels //= 2
        nodes.append(Ff.OutputNode(node))
        self.inn = Ff.GraphINN(nodes)

    @staticmethod
    def _add(nodes, node, module, **options):
        nodes.append(Ff.Node(node.out0, module, options))
        return nodes[-1]

    def forward(self, x):
        z, logdet = self.inn(x)
        return common.standard_normal(torch.cat([part.flatten(1) for part in z], 1)) + logdet

    def sample(self, n):
        device = next(self.parameters()).device
        z = [torch.randn(n, *shape, device=device) for shape in self.inn.global_out_shapes]
        return self.inn(z, rev=True, jac=False)[0]

    def initialize(self, x):
        """Nothing: AllInOneBlock is not set from data."""


class RealNVP(nn.Module):
    """log p(x) (B,) of x (B, 2); ``sample(n)``."""

    def __init__(self, n_layers, hidden, all_in_one=False):
        super().__init__()
        self.inn = Ff.SequenceINN(2)
        self.inn.append(Fm.ActNorm)

        def subnet(inputs, outputs):
            return common.mlp(inputs, outputs, hidden)
        for index in range(n_layers):
            if all_in_one:
                self.inn.append(Fm.AllInOneBlock, subnet_constructor=subnet, permute_soft=True)
                continue
            self.inn.append(Fm.AffineCouplingOneSided, subnet_constructor=subnet, clamp=1.0, clamp_activation="TANH")
            if index < n_layers - 1:
                self.inn.append(Fm.PermuteRandom, seed=SWAP)

    def forward(self, x):
        z, logdet = self.inn(x)
        return common.standard_normal(z) + logdet

    def sample(self, n):
        z = torch.randn(n, 2, device=next(self.parameters()).device)
        return self.inn(z, rev=True, jac=False)[0]


def _swapping_seed():
    """A seed with which PermuteRandom exchanges two features."""
    state = np.random.get_state()
    try:
        for seed in range(64):
            np.random.seed(seed)
            if np.random.permutation(2)[0] == 1:
                return seed
    finally:
        np.random.set_state(state)
    raise RuntimeError("no seed exchanges two features")


SWAP = _swapping_seed()


def load_realnvp(peer, flow):
    """Give its one-sided couplings the weights of realnvp.fastflow_realnvp(dialect="FrEIA")."""
    actnorm, *modules = peer.inn.module_list
    own, *layers = flow.transform.transforms
    with torch.no_grad():
        actnorm.scale.copy_(own.log_scale.view_as(actnorm.scale))
        actnorm.bias.copy_((own.bias * own.log_scale.exp()).view_as(actnorm.bias))
    actnorm.init_on_next_batch = False
    for coupling, layer in zip(modules[0::2], layers, strict=True):
        common.copy_layers(coupling.subnet, layer.conditioner)
