"""A tabular RealNVP against the same model elsewhere: training step, log_prob and sampling, on two moons.

16 couplings with conditioners 1-64-64-2 after one actnorm, batches of 4096. Each library keeps its own scale map; all
get the same fused Adam. Beside them the same in six dimensions against plain PyTorch: there fastflow's CPU kernel can't
have the first two layers from a table, as it has them where a conditioner sees one feature.
"""

import torch

from benchmarks import contest, peers
from benchmarks.cases import Case
from benchmarks.neutral_realnvp import NeutralRealNVP, load_weights
from fastflow import flows, nn
from fastflow.functional import ScaleMap

N_LAYERS, HIDDEN, BATCH, WIDER = 16, (64, 64), 4096, 6
COMPILED = ("eager", "nflows", "normflows", "FrEIA")  # the others' graphs break
DIALECTS = {"nflows": ScaleMap.nflows(), "FrEIA": ScaleMap.freia(1.0, "tanh"), "zuko": ScaleMap.zuko(),
            "torchflows": ScaleMap("exp", gain=0.5)}


def two_moons(n, seed=0):
    """n points (n, 2) on two half circles that interlock, with noise of 0.1."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.pi * torch.rand(n, generator=generator)
    upper = torch.arange(n) % 2 == 0
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return torch.stack([x, y], 1) + 0.1 * torch.randn(n, 2, generator=generator)


def fastflow_realnvp(n_layers=N_LAYERS, hidden=HIDDEN, seed=0, dialect="fastflow"):
    """fastflow's RealNVP, initialised on two moons, no weight zero; ``dialect`` a peer's name for its scale map."""
    torch.manual_seed(seed)
    if dialect == "normflows":  # (x + t) * exp(r): the inverse of normflows' own direction
        layers = [nn.AffineCoupling(nn.MLP(1, 2, hidden), flip=index % 2 == 1, scale="exp", shift_first=True)
                  for index in range(n_layers)]
        flow = flows.Flow(flows.Compose(nn.ActNorm(2), *layers), flows.StandardNormal((2,)))
    else:
        options = {} if dialect == "fastflow" else {"scale": DIALECTS[dialect]}
        flow = flows.RealNVP(2, n_layers=n_layers, hidden=hidden, **options)
    flow.initialize(two_moons(BATCH))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return flow


def peer_realnvp(name, n_layers=N_LAYERS, hidden=HIDDEN, seed=0, **setting):
    """A peer's RealNVP after one pass over two moons, which initialises what is set from data."""
    torch.manual_seed(seed)
    model = peers.module(name).RealNVP(n_layers, hidden, **setting)
    with torch.no_grad():
        model(two_moons(BATCH))
    return model


def neutral_realnvp(flow, hidden=HIDDEN):
    """The plain PyTorch model of a fastflow RealNVP, equal weights."""
    neutral = NeutralRealNVP(len(flow.transform.transforms) - 1, hidden, *flow.base.event_shape)
    load_weights(neutral, flow)
    return neutral


WORK = contest.WORK


def _case(work):
    def build(device):
        x, act = two_moons(BATCH).to(device), WORK[work]
        fused = fastflow_realnvp().to(device)
        own = contest.fastflows(act)
        variants = {"fastflow": own(fused, x), "eager": contest.best({"": lambda: act(neutral_realnvp(fused), x)})}
        for name in peers.REALNVP:
            variants[name] = contest.best({
                setting: lambda n=name, o=options: act(peer_realnvp(n, **o).to(device), x)
                for setting, options in contest.settings(name, "realnvp").items()})
        return variants
    return Case(_name(work), "realnvp", build, ("fastflow", "eager", *peers.REALNVP), peers.FASTEST_REALNVP)


def _name(work):
    return f"RealNVP {work}, 2-D, {N_LAYERS} couplings, MLP 1-64-64-2, batch {BATCH}"


def _wider(work):
    """In WIDER dimensions, on normal data, beside plain PyTorch alone."""
    def build(device):
        torch.manual_seed(0)
        x, act = torch.randn(BATCH, WIDER, device=device), WORK[work]
        fused = flows.RealNVP(WIDER, n_layers=N_LAYERS, hidden=HIDDEN).to(device)
        fused.initialize(x)
        own = contest.fastflows(act)
        return {"fastflow": own(fused, x), "eager": act(neutral_realnvp(fused).to(device), x)}
    name = f"RealNVP {work}, {WIDER}-D, {N_LAYERS} couplings, MLP {WIDER // 2}-64-64-{WIDER}, batch {BATCH}"
    return Case(name, "realnvp wider", build, ("fastflow", "eager"))


def _compiled(work):
    """The same with everybody but fastflow under torch.compile, those whose graph doesn't break."""
    def build(device):
        x, act = two_moons(BATCH).to(device), WORK[work]
        fused = fastflow_realnvp().to(device)
        own = contest.fastflows(act)
        contenders = {"eager": lambda: neutral_realnvp(fused)}
        contenders |= {name: lambda n=name: peer_realnvp(n) for name in COMPILED[1:]}
        variants = {"fastflow": own(fused, x)}
        for name, construct in contenders.items():
            model = construct().to(device)
            model.forward = torch.compile(model.forward, dynamic=False)
            model.sample = torch.compile(model.sample, dynamic=False)
            variants[name] = act(model, x)
        return variants
    return Case(f"{_name(work)}, the others compiled", "realnvp compiled", build, ("fastflow", *COMPILED), COMPILED[1:])


CASES = tuple(_case(work) for work in WORK)
WIDER_CASES = tuple(_wider(work) for work in WORK)
COMPILED_CASES = tuple(_compiled(work) for work in WORK)
