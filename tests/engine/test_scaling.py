"""The arithmetic of docs/scaling.md against the collectives that process 0 of 32 really calls."""

from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from fastflow import flows, nn
from fastflow.engine import TrainStep
from fastflow.engine.distributed import wrapped as as_trained
from fastflow.engine.scaling import traffic

WORLD = 32


class Collectives(TorchDispatchMode):
    """Adds up the bytes of the whole tensor that each collective works on, by its kind."""

    KINDS = {"c10d::allreduce_": "all_reduce", "c10d::_allgather_base_": "all_gather",
             "c10d::_reduce_scatter_base_": "reduce_scatter", "c10d::broadcast_": "broadcast"}

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        if call.namespace == "c10d":
            kind = self.KINDS[call.name()]  # another one is an error
            whole = args[1] if kind == "reduce_scatter" else args[0]
            whole = whole if isinstance(whole, list) else [whole]
            self.calls.append((kind, sum(t.numel() * t.element_size() for t in whole)))
        return call(*args, **(kwargs or {}))

    def bytes(self, kind):
        return sum(size for name, size in self.calls if name == kind)


@pytest.fixture(scope="module")
def fake():
    """Process 0 of 32 whose collectives return at once and move nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (WORLD,))
    torch.distributed.destroy_process_group()

def glow():
    return flows.Glow((1, 8, 8), n_levels=2, n_steps=2, hidden_channels=8), None


def jet():
    return flows.Jet((3, 8, 8), patch_size=4, channels=48, couplings=2, depth=1, heads=2), nn.AffineCoupling


def tarflow():
    return flows.TarFlow((3, 8, 8), patch_size=4, channels=48, head_dim=16, blocks=2,
                         layers_per_block=1), flows.TarFlowBlock


def counted(fake, build, strategy, **options):
    """(collectives of one step after the first two, in which DDP arranges its buckets; what they should be)."""
    torch.manual_seed(0)
    model, kind = build()
    groups = [] if kind is None or strategy == "ddp" else [m for m in model.modules() if isinstance(m, kind)]
    expected = traffic(model, WORLD, strategy, groups)
    if strategy == "ddp":
        wrapped = DistributedDataParallel(model)
        wrapped.register_comm_hook(None, reduced)
    else:
        wrapped = as_trained(model, "fsdp", torch.device("cpu"))
        assert sum(isinstance(m, FSDPModule) for m in model.modules()) == len(groups) + 1
    step = TrainStep(wrapped, torch.optim.SGD(wrapped.parameters(), 1e-4), memory="none", **options)
    x = torch.rand(2, *((1, 8, 8) if build is glow else (3, 8, 8))) - 0.5
    step(x)
    step(x)
    with Collectives() as collectives:
        step(x)
    return collectives, expected, model


def reduced(_, bucket):
    """DDP's own reduction, called from Python, where it can be seen."""
    torch.distributed.all_reduce(bucket.buffer())
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


@pytest.mark.parametrize("build", [glow, jet, tarflow])
def test_replicas_reduce_each_gradient_once(fake, build):
    collectives, expected, model = counted(fake, build, "ddp", check_finite=False)
    assert collectives.bytes("all_reduce") == expected.all_reduce == 4 * sum(p.numel() for p in model.parameters())
    assert collectives.bytes("broadcast") == expected.broadcast
    assert expected.sent == round(31 / 32 * (2 * expected.all_reduce + expected.broadcast))
    assert collectives.bytes("all_gather") == collectives.bytes("reduce_scatter") == 0


@pytest.mark.parametrize("build", [glow, jet, tarflow])
def test_shards_are_gathered_and_scattered(fake, build):
    # what the fake backend gathers is not the parameters, so the values mean nothing and are not looked at
    collectives, expected, model = counted(fake, build, "fsdp2", check_finite=False)
    assert collectives.bytes("all_gather") == expected.all_gather
    assert collectives.bytes("reduce_scatter") == expected.reduce_scatter
    assert collectives.bytes("all_reduce") == collectives.bytes("broadcast") == 0
    # local() of process 0: the largest part
    assert sum(p.to_local().numel() for p in model.parameters()) * 4 == expected.parameters


def test_agreeing_costs_four_bytes(fake):
    collectives, expected, _ = counted(fake, jet, "ddp", check_finite=True)
    assert collectives.bytes("all_reduce") == expected.all_reduce + 4


def test_padding_and_groups_by_hand():
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 40, bias=False))
    found = traffic(model, 32, "fsdp2", [model[0]])
    first, second = 32 * (3 + 1) * 4, 64 * 5 * 4  # 5 rows become 32, 40 become 64
    assert (found.all_gather, found.reduce_scatter) == (second + 2 * first, first + second)
    assert (found.parameters, found.gathered) == ((3 + 1 + 2 * 5) * 4, first + second)
    assert traffic(model, 1, "fsdp2").sent == traffic(model, 1).sent == 0
    assert traffic(model, 4, dtype=torch.bfloat16).all_reduce == (3 * 5 + 5 + 5 * 40) * 2
    for options, reason in (({"strategy": "zero"}, "strategy: expected"), ({"groups": [model[0]]}, "groups: only"),
                            ({"strategy": "fsdp2", "groups": [model, model[0]]}, "groups: a parameter is in two")):
        with pytest.raises(ValueError, match=reason):
            traffic(model, 4, **options)
    assert traffic(model, 4, "fsdp") == traffic(model, 4, "fsdp2")  # as train.strategy calls it
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
        traffic("x", 2)
    with pytest.raises(ValueError, match="n_processes: expected an int >= 1"):
        traffic(model, 0)


def test_the_page_holds_what_the_code_computes(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks import scaling

    page = scaling.PAGE.read_text("utf-8")
    shown = page.partition(scaling.START)[2].partition(scaling.END)[0].strip().splitlines()
    assert shown == scaling.table()
    assert len(shown) == 2 + 4 * len(scaling.MODELS)
