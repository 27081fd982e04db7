"""Launches of a Glow training step and the bytes that its forward keeps, beside other people's libraries.

    python -m benchmarks.peer_launches [--results FOLDER]

Glow 3x32x32, 3 levels x 32 steps, with fused Adam. Launches are dispatched aten operators that are neither views nor
allocations, fastflow's own operators as the kernels that they declare (benchmarks/counting.py): exact, on any machine.
They depend neither on the batch nor, from as many hidden channels on as here, on those. "Of the flow" leaves out the
optimiser and what the conditioners dispatch, each run alone. Bytes are per image: unique storages of two images less
those of one, on the CPU, parameters excluded, hidden channels as said.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

from benchmarks import contest, counting, glow, peers, run
from fastflow import backends

N_STEPS = 32
FEW = backends.CONV_NET_HIDDEN  # hidden channels where bytes don't matter, enough for a GPU's kernels
HIDDEN = (64, 512)


def contenders():
    """{name: constructor from keyword arguments} of fastflow, plain PyTorch and every setting of every peer."""
    found = {"fastflow": glow.fastflow_glow, "eager": lambda **sizes: glow.neutral_glow(glow.fastflow_glow(**sizes))}
    for name in peers.GLOW:
        for setting, options in contest.settings(name, "glow").items():
            found[contest.joined(name, setting)] = (
                lambda n=name, o=options, **sizes: glow.peer_glow(n, **sizes, **o))
    return found


def conditioners(model):
    """The conditioners: the innermost modules that hold three convolutions."""
    def convolutions(module):
        return sum(isinstance(m, nn.Conv2d) for m in module.modules())
    return [m for m in model.modules()
            if convolutions(m) == 3 and all(convolutions(child) < 3 for child in m.children())]


def launches(construct, n_steps=N_STEPS, hidden_channels=FEW, batch=2):
    """{"launches", "of_flow", "of_conditioners", "of_optimizer", "reads"} of a training step."""
    model = construct(n_steps=n_steps, hidden_channels=hidden_channels)
    x = torch.rand(batch, 3, 32, 32) - 0.5
    make = contest.fastflow_step if hasattr(model, "transform") else contest.training_step
    step = make(model, x)
    with counting.as_on_a_gpu():
        step()
        with counting.Dispatched() as whole:
            step()
    nets, calls = conditioners(model), []
    hooks = [net.register_forward_pre_hook(lambda net, args: calls.append((net, args[0].detach()))) for net in nets]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    if len(calls) != len(nets):
        raise RuntimeError(f"{len(nets)} conditioners, called {len(calls)} times")
    own = sum(_alone(net, given) for net, given in calls)
    optimizer = sum(count for name, count in whole.by_op.items() if "adam" in name)
    return {"launches": whole.launches, "of_flow": whole.launches - own - optimizer, "of_conditioners": own,
            "of_optimizer": optimizer, "reads": whole.reads}


def _alone(net, given):
    """Launches of a conditioner's forward and backward."""
    given.requires_grad_()
    grad = torch.ones_like(net(given))
    with counting.Dispatched() as counted:
        torch.autograd.grad(net(given), [given, *net.parameters()], grad)
    return counted.launches


def saved_bytes(construct, n_steps=N_STEPS, hidden_channels=512):
    """Bytes that a forward pass keeps for backward, per image."""
    model = construct(n_steps=n_steps, hidden_channels=hidden_channels)
    kept = []
    for batch in (1, 2):
        with counting.saved_for_backward(model) as saved:
            loss = model(torch.rand(batch, 3, 32, 32) - 0.5).mean()
        kept.append(saved.bytes)
        del loss
    return kept[1] - kept[0]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="folder for the JSON; none is written without it")
    args = parser.parse_args(argv)
    rows = []
    print(f"{'model':<28} {'launches':>8} {'of flow':>8} {'reads':>6}   MB per image at {HIDDEN} hidden channels")
    for name, construct in contenders().items():
        row = {"model": name, **launches(construct)}
        row["saved_bytes_per_image"] = {str(h): saved_bytes(construct, hidden_channels=h) for h in HIDDEN}
        rows.append(row)
        megabytes = "  ".join(f"{saved / 1e6:8.2f}" for saved in row["saved_bytes_per_image"].values())
        print(f"{name:<28} {row['launches']:>8} {row['of_flow']:>8} {row['reads']:>6}   {megabytes}", flush=True)
    if args.results:
        run.save(args.results, "cpu-peer-launches", {"machine": run.machine("cpu"), "n_steps": N_STEPS, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
