"""A training step of Glow against the same model elsewhere: in plain eager PyTorch and in other people's libraries.

All of them get the same fused Adam. Every contender but fastflow runs in the fastest of its settings, memory formats
among them; which that was stands in the results.
"""

import torch

from benchmarks import contest, peers
from benchmarks.cases import Case
from benchmarks.neutral_glow import NeutralGlow, load_weights
from fastflow import flows
from fastflow.functional import ScaleMap

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def fastflow_glow(n_levels=3, n_steps=8, hidden_channels=64, image_shape=(3, 32, 32), device="cpu", seed=0,
                  dialect="fastflow", perturb=True):
    """fastflow's Glow, initialised on noise, with ``perturb`` no weight zero; its coupling is its own or, with dialect
    "nflows", that of nflows."""
    torch.manual_seed(seed)
    options = {"scale": ScaleMap.nflows(), "shift_first": False} if dialect == "nflows" else {}
    glow = flows.Glow(image_shape, n_levels, n_steps, hidden_channels, **options).to(device)
    glow.initialize(torch.rand(32, *image_shape, device=device) - 0.5)
    with torch.no_grad():
        for parameter in glow.parameters() if perturb else ():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return glow


def neutral_glow(glow):
    """The plain PyTorch model of a fastflow Glow, equal weights."""
    levels = glow.transform.levels
    first = levels[0].steps[0].coupling.conditioner.conv1
    neutral = NeutralGlow(glow.image_shape, len(levels), len(levels[0].steps), first.out_channels)
    load_weights(neutral, glow)
    return neutral.to(first.weight.device)


def models(n_levels=3, n_steps=8, hidden_channels=64, image_shape=(3, 32, 32), device="cpu", seed=0):
    """(fastflow's Glow, the neutral one), equal weights, none of them zero."""
    fused = fastflow_glow(n_levels, n_steps, hidden_channels, image_shape, device, seed)
    return fused, neutral_glow(fused)


def peer_glow(name, n_levels=3, n_steps=8, hidden_channels=64, image_shape=(3, 32, 32), device="cpu", seed=0,
              **setting):
    """A peer's Glow, initialised on the same noise as fastflow's."""
    torch.manual_seed(seed)
    model = peers.module(name).Glow(image_shape, n_levels, n_steps, hidden_channels, **setting).to(device)
    model.initialize(torch.rand(32, *image_shape, device=device) - 0.5)
    return model


def settings(name):
    """{setting: (keyword arguments of the peer's Glow, memory format)} in which a peer is tried; name "eager" too."""
    own = {"": {}} if name == "eager" else contest.settings(name, "glow")
    return {contest.joined(setting, name): (options, memory_format)
            for setting, options in own.items() for name, memory_format in FORMATS.items()}


def fastest(act, name, construct, x, tries=5):
    """One of contest.WORK on x by the fastest setting of a peer, timed ``tries`` times each; ``construct(**options)``
    builds its model."""
    def build(options, memory_format):
        model = construct(**options).to(memory_format=memory_format)
        return act(model, x.contiguous(memory_format=memory_format))
    return contest.best({setting: lambda c=choice: build(*c) for setting, choice in settings(name).items()}, tries)


def _glow(work, n_steps, hidden_channels, batch):
    act = contest.WORK[work]
    contenders, rated = ((peers.SAMPLING_GLOW, [name for name in peers.FASTEST_GLOW if name in peers.SAMPLING_GLOW])
                         if work == "sampling" else (peers.GLOW, peers.FASTEST_GLOW))

    def build(device):
        sizes = {"n_steps": n_steps, "hidden_channels": hidden_channels, "device": device}
        fused = fastflow_glow(**sizes)
        x = torch.rand(batch, 3, 32, 32, device=device) - 0.5
        variants = {"fastflow": contest.fastflows(act)(fused, x),
                    "eager": fastest(act, "eager", lambda: neutral_glow(fused), x)}
        for name in contenders:
            variants[name] = fastest(act, name, lambda n=name, **options: peer_glow(n, **sizes, **options), x)
        return variants
    name = f"Glow {work}, 3 levels x {n_steps} steps, {hidden_channels} hidden channels, batch {batch}, 3x32x32"
    return Case(name, "glow", build, ("fastflow", "eager", *contenders), tuple(rated))


CASES = tuple(_glow(work, 8, hidden, 32) for work in contest.WORK for hidden in (64, 128))
