"""The memory modes inside DistributedDataParallel and FSDP2: two processes over gloo compute what one computes."""

import copy
import traceback

import pytest
import torch
from torch import nn

from fastflow import flows
from fastflow.engine import TrainStep
from fastflow.engine.distributed import wrapped
from fastflow.nn import MLP, AffineCoupling

BATCH = 6


def scattered(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.double()


def glow():
    return scattered(flows.Glow((3, 8, 8), n_levels=2, n_steps=2, hidden_channels=8)), torch.rand(BATCH, 3, 8, 8) - 0.5


def realnvp():
    layers = [AffineCoupling(MLP(2, 4, (8,)), flip=i % 2 == 1, scale="tanh") for i in range(4)]
    return scattered(flows.Flow(flows.Compose(*layers), flows.StandardNormal(4))), torch.randn(BATCH, 4)


def jet():
    made = flows.Jet((3, 8, 8), patch_size=4, channels=8, couplings=4, depth=1, heads=2)
    return scattered(made), torch.rand(BATCH, 3, 8, 8) - 0.5


def tarflow():
    made = flows.TarFlow((3, 8, 8), patch_size=4, channels=8, head_dim=4, blocks=2, layers_per_block=1)
    return scattered(made), torch.rand(BATCH, 3, 8, 8) - 0.5


def as_trained(model, mesh):
    assert model.shard_groups()
    return wrapped(model, "fsdp", torch.device("cpu")), model


def ddp(model, mesh):
    return nn.parallel.DistributedDataParallel(model), model


def fsdp_whole(model, mesh):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=mesh), model


def fsdp_couplings(model, mesh):
    from torch.distributed.fsdp import fully_shard

    for coupling in model.transform.transforms:
        fully_shard(coupling, mesh=mesh)
    return fully_shard(model, mesh=mesh), model


def fsdp_conditioners(model, mesh):
    from torch.distributed.fsdp import fully_shard

    for coupling in model.transform.transforms:
        fully_shard(coupling.conditioner, mesh=mesh)
    return fully_shard(model, mesh=mesh), model


CASES = {"fsdp jet": (jet, as_trained), "fsdp tarflow": (tarflow, as_trained),
         "ddp glow": (glow, ddp), "fsdp glow": (glow, fsdp_whole), "ddp realnvp": (realnvp, ddp),
         "fsdp realnvp, couplings": (realnvp, fsdp_couplings),
         "fsdp realnvp, conditioners": (realnvp, fsdp_conditioners)}
MODES = {"none": {}, "save_z": {}, "invert": {"keep_every": 2}, "auto": {}}


def after(model, step, x):
    """The weights after two steps."""
    for _ in range(2):
        step(x)
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [p.detach().clone() for p in full]


def work(rank, store, queue, cases):
    try:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(store, 2), rank=rank,
                                             world_size=2)
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
        failures = []
        for case in cases:
            make, wrap = CASES[case]
            torch.manual_seed(1)
            model, x = make()
            x = x.double()
            single = copy.deepcopy(model)
            expected = after(single, TrainStep(single, torch.optim.SGD(single.parameters(), 0.01), memory="none"), x)
            for mode, options in MODES.items():
                outer, inner = wrap(copy.deepcopy(model), mesh)
                step = TrainStep(outer, torch.optim.SGD(outer.parameters(), 0.01), memory=mode, **options)
                half = BATCH // 2
                found = after(inner, step, x[rank * half:(rank + 1) * half])
                worst = max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))
                if not worst < 1e-10:
                    failures.append(f"{case}, {mode}: off by {worst:.1e}")
        queue.put(failures)
    except BaseException:
        queue.put([traceback.format_exc()])
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("cases", [("fsdp jet", "ddp glow", "fsdp realnvp, couplings"),
                                   pytest.param(tuple(CASES), marks=pytest.mark.slow)], ids=["some", "all"])
def test_two_processes_compute_what_one_computes(cases, tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [context.Process(target=work, args=(rank, str(tmp_path / "store"), queue, cases)) for rank in range(2)]
    for process in processes:
        process.start()
    found = [queue.get() for _ in processes]
    for process in processes:
        process.join(60)
    assert found == [[], []], "\n".join(line for lines in found for line in lines)
