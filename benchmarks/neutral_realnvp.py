"""RealNVP in plain, careful eager PyTorch: the neutral baseline, as a good user would write it without fastflow.

Parameter by parameter it is the model of ``fastflow.flows.RealNVP(features)``, scale map exp(tanh(r)).
"""

import torch
from torch import nn

from benchmarks.peers import common


class NeutralRealNVP(nn.Module):
    """log p(x) (B,) in nats of x (B, features), an even number; ``sample(n)``."""

    def __init__(self, n_layers, hidden, features=2):
        super().__init__()
        self.half = features // 2
        self.bias, self.log_scale = (nn.Parameter(torch.zeros(features)) for _ in range(2))
        self.nets = nn.ModuleList(common.mlp(self.half, features, hidden) for _ in range(n_layers))

    def forward(self, x):
        x = (x + self.bias) * self.log_scale.exp()
        parts, logdet = list(x.split(self.half, 1)), self.log_scale.sum()
        for index, net in enumerate(self.nets):
            passive, active = index % 2, 1 - index % 2
            raw, shift = net(parts[passive]).split(self.half, 1)
            log_s = torch.tanh(raw)
            parts[active] = parts[active] * log_s.exp() + shift
            logdet = logdet + log_s.sum(1)
        return common.standard_normal(torch.cat(parts, 1)) + logdet

    def sample(self, n):
        parts = list(torch.randn(n, len(self.bias), device=self.bias.device).split(self.half, 1))
        for index, net in reversed(list(enumerate(self.nets))):
            passive, active = index % 2, 1 - index % 2
            raw, shift = net(parts[passive]).split(self.half, 1)
            parts[active] = (parts[active] - shift) * torch.exp(-torch.tanh(raw))
        return torch.cat(parts, 1) * torch.exp(-self.log_scale) - self.bias


@torch.no_grad()
def load_weights(neutral, flow):
    """Give the baseline the weights of a fastflow.flows.RealNVP."""
    actnorm, *layers = flow.transform.transforms
    neutral.bias.copy_(actnorm.bias)
    neutral.log_scale.copy_(actnorm.log_scale)
    for net, layer in zip(neutral.nets, layers, strict=True):
        common.copy_layers(net, layer.conditioner)
