"""Jet 207M and TarFlow 460M: training steps with bfloat16 conditioners, and TarFlow's sampling.

The baseline of training is the same model in plain PyTorch with its transformer layers under torch.compile (one
compilation, which all of them share) and its couplings too; fastflow gets the same compiled layers. The baseline of
sampling does what the published sampler does (github.com/apple/ml-tarflow): token by token, without a graph, keys and
values in lists that every step concatenates.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import contest
from benchmarks.gpu import measuring
from benchmarks.peers.common import standard_normal
from fastflow import flows
from fastflow.nn import AffineCoupling
from fastflow.nn.transformer import TransformerLayer

LOG_2 = 0.6931471805599453
TINY_JET = {"image_shape": (3, 8, 8), "patch_size": 2, "channels": 16, "couplings": 5, "depth": 1, "heads": 2}
TINY_TARFLOW = {"image_shape": (3, 4, 4), "patch_size": 2, "channels": 16, "blocks": 2, "layers_per_block": 1,
                "head_dim": 8}
SAMPLED_SHAPE = (3, 32, 32)  # 256 tokens in place of 1024: the published sampler needs a quarter of the time


def jet(tiny):
    torch.manual_seed(0)
    return perturbed(flows.Jet(**TINY_JET) if tiny else flows.Jet.from_config("imagenet64-207m"))


def tarflow(tiny, **overrides):
    torch.manual_seed(0)
    return perturbed(flows.TarFlow(**TINY_TARFLOW) if tiny else
                     flows.TarFlow.from_config("imagenet64-2-768-8-8", **overrides))


@torch.no_grad()
def perturbed(flow):
    """The flow with last layers that are not zero."""
    for name, parameter in flow.named_parameters():
        if "proj_out" in name:
            parameter.add_(0.01 * torch.randn_like(parameter))
    return flow


def _jet_coupling(x, params):
    """(x2 + b) * 2 sigmoid(s) of the second half along dim 1."""
    passive, active = x.chunk(2, 1)
    shift, raw = params.float().chunk(2, 1)
    z = torch.cat([passive, (active + shift) * (2.0 * torch.sigmoid(raw))], 1)
    return z, (F.logsigmoid(raw) + LOG_2).flatten(1).sum(1)


def _tarflow_coupling(x, params):
    """(x_i - mu_i) * exp(-alpha_i) with params of the token before."""
    alpha, mu = params[:, :-1].float().chunk(2, 2)
    z = torch.cat([x[:, :1], (x[:, 1:] - mu) * torch.exp(-alpha)], 1)
    return z, -alpha.flatten(1).sum(1)


class NeutralTokenFlow(nn.Module):
    """log p(x) (B,) in nats of a Jet or a TarFlow in plain PyTorch, equal weights (the flow's own modules).

    Args:
        flow: whose transformers and permutations it takes.
        dtype: of autocast around the transformers, None for none.
        backend: of torch.compile for the couplings; None does not compile.
    """

    def __init__(self, flow, dtype=None, backend=None):
        super().__init__()
        self.patches, *parts = flow.transform.transforms
        self.parts, self.dtype = nn.ModuleList(parts), dtype
        self._jet, self._tarflow = (part if backend is None else
                                    torch.compile(part, dynamic=False, fullgraph=True, backend=backend)
                                    for part in (_jet_coupling, _tarflow_coupling))

    def _params(self, network, x):
        if self.dtype is None:
            return network(x)
        with torch.autocast(x.device.type, dtype=self.dtype):
            return network(x)

    def forward(self, x):
        z, logdet = self.patches(x)
        for part in self.parts:
            if isinstance(part, AffineCoupling):
                z, term = self._jet(z, self._params(part.conditioner, z.chunk(2, 1)[0]))
                logdet = logdet + term
            elif isinstance(part, flows.TarFlowBlock):
                z = z.flip(1) if part.flip else z
                z, term = self._tarflow(z, self._params(part.network, z))
                z, logdet = z.flip(1) if part.flip else z, logdet + term
            else:
                z = part(z)[0]
        return standard_normal(z) + logdet


def compile_layers(model, backend):
    """The model, each of its transformer layers under torch.compile."""
    for module in model.modules():
        if isinstance(module, TransformerLayer):
            module.compile(dynamic=False, backend=backend)
    return model


def training(kind, construct, batch):
    """``construct(tiny)`` is jet or tarflow."""
    def case(device, tiny):
        with torch.device(device):
            flow, n = construct(tiny), 2 if tiny else batch
        x = torch.rand(n, *flow.image_shape, device=device) - 0.5
        backend = "aot_eager" if tiny else "inductor"
        options = {"conditioner_dtype": torch.bfloat16}

        def own():
            return compile_layers(copy.deepcopy(flow), backend)

        def other():
            return NeutralTokenFlow(compile_layers(copy.deepcopy(flow), backend), torch.bfloat16, backend)
        variants = {
            "fastflow": lambda: measuring.fastflow_step(copy.deepcopy(flow), x, device, **options),
            "fastflow, layers compiled": lambda: measuring.fastflow_step(own(), x, device, **options),
            "fastflow, layers compiled, captured": lambda: measuring.fastflow_step(own(), x, device, capture=True,
                                                                                   **options),
            "compiled": lambda: contest.training_step(other(), x),
            "compiled, captured": lambda: measuring.captured_training_step(other(), x, device)}
        millions = round(sum(p.numel() for p in flow.parameters()) / 1e6)
        shape = "x".join(map(str, flow.image_shape))
        yield measuring.measure(measuring.Contest(
            f"training step of {kind} of {millions}M parameters, batch {n}, {shape}", "tokens", variants, n,
            flops(construct, tiny, n), bf16=tuple(variants), rounds=5, warm_up=5,
            goals={("fastflow, layers compiled, captured", "compiled, captured"): 0.95}), device)
    return case


def flops(construct, tiny, batch):
    """FLOPs of a training step, counted on the plain model; a masked attention counts in full."""
    with torch.device("meta"):
        flow = construct(tiny)
        return batch * measuring.training_flops(NeutralTokenFlow(flow), torch.empty(1, *flow.image_shape))


class _ListCache:
    """Keys and values of earlier tokens in lists, concatenated at every step."""

    def __init__(self):
        self.kept = {}

    def extend(self, layer, keys, values):
        lists = self.kept.setdefault(layer, ([], []))
        for kept, new in zip(lists, (keys, values), strict=True):
            kept.append(new)
        return *(torch.cat(kept, 2) for kept in lists), None


@torch.no_grad()
def published_inverse(flow, z):
    """x (B, C, H, W) of tokens z (B, T, D), as the published sampler computes it."""
    patches, *blocks = flow.transform.transforms
    rows = torch.arange(z.shape[1], device=z.device).split(1)
    for block in reversed(blocks):
        x, cache = (z.flip(1) if block.flip else z).clone(), _ListCache()
        for i in range(z.shape[1] - 1):
            alpha, mu = block.network(x[:, i:i + 1], rows=rows[i], cache=cache)[:, 0].chunk(2, 1)
            x[:, i + 1] = x[:, i + 1] * torch.exp(alpha) + mu
        z = x.flip(1) if block.flip else x
    return patches.inverse(z)[0]


def sampling(device, tiny):
    with torch.device(device):
        flow, n = tarflow(tiny, image_shape=SAMPLED_SHAPE), 2 if tiny else 16
    tokens = flow.transform.transforms[0].token_shape

    def published():
        return published_inverse(flow, torch.randn(n, *tokens, device=device))
    variants = {"fastflow": lambda: lambda: flow.sample(n, capture=False),
                "fastflow, captured": lambda: lambda: flow.sample(n),
                "published sampler": lambda: published}
    yield measuring.measure(measuring.Contest(
        f"sampling of TarFlow, {tokens[0]} tokens, 8 blocks of 8 layers, 768 channels, batch {n}"
        if not tiny else f"sampling of TarFlow, {tokens[0]} tokens, batch {n}", "sampling", variants, n,
        notes={"all": f"float32; images {SAMPLED_SHAPE} for the model's own 3x64x64 and its 1024 tokens"},
        goals={("fastflow, captured", "published sampler"): 5.0}, rounds=1, warm_up=1), device)
