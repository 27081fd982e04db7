"""TrainStep over several processes: replicas equal one process with all the data, shards equal a whole model."""

import copy
import datetime

import pytest
import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from fastflow import flows, vae
from fastflow.engine import NonFiniteError, TrainStep, memory
from fastflow.engine.distributed import wrapped

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
WORLD = 2


def glow(seed=0):
    torch.manual_seed(seed)
    model = flows.Glow((1, 8, 8), n_levels=2, n_steps=2, hidden_channels=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.double()


def batches(n, size):
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(size, 1, 8, 8, generator=generator, dtype=torch.float64) - 0.5 for _ in range(n)]


def uneven(rank):
    """Batches of 4 and 1 for one process, of 2 and 3, then 1 for the other."""
    one, two = batches(2, 6)
    parts = ((one[:4], two[:1]), (one[4:], two[1:4]))[rank]
    return (*parts, *((two[4:], one[:1]) if rank == 0 else (two[5:], one[1:2])))


def sgd(model, fused=True):
    return torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9, fused=fused)


def _process(rank, body, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD,
                                         timeout=datetime.timedelta(seconds=60))  # of a process that waits in vain
    try:
        torch.save(body(rank), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def replicas(rank):
    """Plain, accumulated, and late-checked steps of replicas; what happens if one process has a bad batch."""
    found = {}
    for name, options in (("plain", {"clip_grad_norm": 1.0}), ("accumulated", {"accumulate": 2}),
                          ("late", {"check_finite": "late", "ema_decay": 0.5})):
        model = glow()
        step = TrainStep(DistributedDataParallel(model), sgd(model), **options)
        assert "processes: replicas (DistributedDataParallel)" in step.explain()
        for x in batches(4, 4):
            step(x.chunk(WORLD)[rank])
        before = [p.detach().clone() for p in model.parameters()]
        message = None
        try:
            bad = batches(1, 4)[0].chunk(WORLD)[rank]
            for _ in range(step.accumulate):
                step(bad * float("nan") if rank == 1 else bad)
            step.check()
        except NonFiniteError as error:
            message = str(error)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        found[name] = before, message
    model = glow()
    step = TrainStep(DistributedDataParallel(model), sgd(model), accumulate=2)
    for x in uneven(rank):
        step(x)
    found["uneven"] = [p.detach().clone() for p in model.parameters()]
    reductions = []
    model = glow()
    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(None, lambda _, bucket: _counted(reductions, bucket))
    step = TrainStep(ddp, sgd(model), accumulate=4)
    for x in batches(8, 4):
        step(x)
    found["reductions"] = len(reductions)
    return found


def _counted(reductions, bucket):
    reductions.append(bucket.index())
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def shards(rank):
    """FSDP2 with everything, so also all 1x1 weights, in one group."""
    from torch.distributed.fsdp import fully_shard

    model = glow()
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (WORLD,))
    fully_shard(model, mesh=mesh)
    step = TrainStep(model, sgd(model, fused=False), accumulate=2, clip_grad_norm=1.0, ema_decay=0.5)
    text = step.explain()
    assert "processes: sharded (FSDP2)" in text and "layout: as it was (parameters are sharded)" in text
    for x in batches(4, 4):
        step(x.chunk(WORLD)[rank])
    for x in uneven(rank):
        step(x)
    with step.ema.swapped_in():
        averages = [p.detach().full_tensor() for p in model.parameters()]
    parameters = [p.detach().full_tensor() for p in model.parameters()]
    message, refused = None, []
    try:
        for _ in range(2):
            step(batches(1, 2)[0] * (float("nan") if rank == 1 else 1.0))
    except NonFiniteError as error:
        message = str(error)
    for options in ({"capture": True}, {"check_finite": "late"}):
        try:
            TrainStep(model, sgd(model, fused=False), **options)
        except ValueError as error:
            refused.append(str(error))
    now = [p.detach().full_tensor() for p in model.parameters()]
    unchanged = all(torch.equal(a, b) for a, b in zip(parameters, now, strict=True))
    apart = glow()
    fully_shard(apart.transform.levels[0].steps[1], mesh=mesh)
    fully_shard(apart, mesh=mesh)
    try:
        TrainStep(apart, sgd(apart, fused=False))(batches(1, 2)[0])
    except TypeError as error:
        refused.append(str(error))
    return parameters, averages, message, refused, unchanged


def talking_vae():
    """Its forward in training reduces over processes, and it holds steps of a flow."""
    return vae.MLPVAE((16,), 4, (8,), prior=flows.RealNVP(4, n_layers=2, hidden=(8,)),
                      objective=vae.PenalizedELBO(vae.FreeBits(0.5, "group")))


def tarflow():
    return flows.TarFlow((1, 8, 8), patch_size=4, channels=8, head_dim=4, blocks=2, layers_per_block=1)


def of_several(make, strategy, shape, rank, mode="auto", explained=False, sizes=(8, 3)):
    """(memory line, parameters) of a model that talks in its forward, after two steps of as many examples as one
    process has; explained by the first process between them."""
    torch.manual_seed(0)
    model = make()
    outer = wrapped(model, strategy, torch.device("cpu"))
    step = TrainStep(outer, sgd(model, fused=strategy == "ddp"), memory=mode)
    x = torch.rand(8, *shape, generator=torch.Generator().manual_seed(rank))[:sizes[rank]]
    for seed in range(2):
        torch.manual_seed(seed)
        step(x)
        if explained and rank == 0:
            assert "launches of fastflow's operators" in step.explain(x)
    parameters = [p.detach().full_tensor() if strategy == "fsdp" else p.detach() for p in model.parameters()]
    return step.memory.explain(), parameters, [b.clone() for b in model.buffers()]


def talkers(rank):
    """What "auto" and explain do to models whose forward waits for the other processes."""
    found = {}
    for name, *case in (("shards", tarflow, "fsdp", (1, 8, 8)), ("replicas", talking_vae, "ddp", (16,))):
        found[name] = [of_several(*case, rank, mode) for mode in ("auto", "none")]
    free = memory.free_bytes
    memory.free_bytes = free if rank == 0 else lambda device: 1
    found["short of memory"] = [of_several(tarflow, "fsdp", (1, 8, 8), rank)]
    memory.free_bytes = free
    for name, *case in (("free bits", talking_vae, "ddp", (16,)),
                        ("codebook", lambda: vae.VQVAE((1, 8, 8), 8, 4, (8,)), "ddp", (1, 8, 8))):
        found[name] = [of_several(*case, rank, explained=explained) for explained in (True, False)]
    model = flows.RealNVP(4, n_layers=2, hidden=(8,))
    outer = DistributedDataParallel(model, broadcast_buffers=False)  # which a refused forward would do beforehand
    step, x = TrainStep(outer, sgd(model)), torch.zeros(4, 4)
    if rank == 0:
        with pytest.raises(ValueError, match="context"):
            step(x, x)
    step(x)
    found["tried again"] = step.memory.explain()
    return found


def everything(rank):
    return replicas(rank), shards(rank), talkers(rank)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What two processes found, in order of rank: (of replicas, of shards, of talkers)."""
    folder = tmp_path_factory.mktemp("processes")
    mp.start_processes(_process, (everything, str(folder)), WORLD, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def test_replicas_equal_one_process_with_all_the_data(results):
    first, second = (of_replicas for of_replicas, *_ in results)
    for name, options in (("plain", {"clip_grad_norm": 1.0}), ("accumulated", {"accumulate": 2}), ("late", {})):
        model = glow()
        step = TrainStep(model, sgd(model), **options)
        for x in batches(4, 4):
            step(x)
        assert all(torch.equal(a, b) for a, b in zip(first[name][0], second[name][0], strict=True))
        torch.testing.assert_close(first[name][0], [p.detach() for p in model.parameters()], rtol=1e-8, atol=1e-9)
        assert first[name][1].startswith(("the gradients' norm is nan", "the loss or a gradient is not finite"))
        assert "the batch's x is not finite" in second[name][1]
    model = glow()
    step = TrainStep(model, sgd(model))
    for update in (slice(0, 2), slice(2, 4)):
        step(torch.cat([*uneven(0)[update], *uneven(1)[update]]))
    assert all(torch.equal(a, b) for a, b in zip(first["uneven"], second["uneven"], strict=True))
    torch.testing.assert_close(first["uneven"], [p.detach() for p in model.parameters()], rtol=1e-8, atol=1e-9)
    assert first["reductions"] == 2  # one bucket, two updates in eight calls


def test_shards_equal_a_whole_model(results):
    model = glow()
    step = TrainStep(model, sgd(model), accumulate=2, clip_grad_norm=1.0, ema_decay=0.5)
    for x in batches(4, 4):
        step(x)
    for i in range(4):
        step(torch.cat([uneven(0)[i], uneven(1)[i]]))
    for parameters, averages, message, refused, unchanged in (of_shards for _, of_shards, _ in results):
        torch.testing.assert_close(parameters, [p.detach() for p in model.parameters()], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(averages, list(step.ema.parameters.values()), rtol=1e-8, atol=1e-9)
        assert "the step was not taken" in message and unchanged
        assert refused[0].startswith("capture: ") and refused[1].startswith("check_finite: 'late'")
        assert "levels.0.steps.1.conv.weight: expected a whole tensor" in refused[2]


def test_processes_choose_their_memory_mode_together(results):
    """With 8 and 3 examples, of which a probe alone would make two forwards and one."""
    for rank, (*_, found) in enumerate(results):
        for name in ("shards", "replicas"):
            (line, *auto), (_, *none) = found[name]
            assert line.startswith("none: ") and f"activations of {(8, 3)[rank]} images take" in line
            assert all(map(torch.equal, auto[0], none[0])) and all(map(torch.equal, auto[1], none[1]))
        (line, parameters, _), = found["short of memory"]
        assert line.startswith("save_z: ")
        assert ("more than a quarter of the 1 bytes" in line) == ("of another process" not in line) == (rank == 1)
        torch.testing.assert_close(parameters, found["shards"][1][1])
        assert found["tried again"].startswith("none: ") and "could not be run" in found["tried again"]


def test_one_process_alone_may_ask_for_an_explanation(results):
    for *_, found in results:
        for name in ("free bits", "codebook"):
            (_, *asked), (_, *quiet) = found[name]
            assert all(map(torch.equal, asked[0], quiet[0])) and all(map(torch.equal, asked[1], quiet[1]))


def test_capture_is_refused_for_replicas(process_group, monkeypatch):
    from fastflow.engine import capture

    monkeypatch.setattr(capture, "recorder_for", lambda device: None)
    model = glow()
    with pytest.raises(ValueError, match="capture: not available inside DistributedDataParallel"):
        TrainStep(DistributedDataParallel(model), sgd(model), capture=True)


@pytest.mark.parametrize("options", [{}, pytest.param({"accumulate": 2}, marks=pytest.mark.slow),
                                     pytest.param({"memory": "save_z"}, marks=pytest.mark.slow)], ids=str)
def test_a_compiled_step_of_shards(process_group, options):
    """FSDP2's hooks cut the graph, and losses and parameters are those of the step without one."""
    model = flows.RealNVP(2, n_layers=1, hidden=(4,)).double()
    twin = copy.deepcopy(model)
    compiled, plain = (TrainStep(wrapped(m, "fsdp", torch.device("cpu")), sgd(m, fused=False), compile=c, **options)
                       for m, c in ((model, "aot_eager"), (twin, False)))
    assert "compile: torch.compile on the loss (aot_eager), cut where FSDP2" in compiled.explain()
    for batch in (4, 6):
        x = torch.randn(batch, 2, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-12, atol=0)
    torch.testing.assert_close(*([p.detach().full_tensor() for p in m.parameters()] for m in (model, twin)),
                               rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_a_compiled_replica(process_group):
    model = flows.RealNVP(2, n_layers=1, hidden=(4,))
    twin = copy.deepcopy(model)
    compiled = TrainStep(DistributedDataParallel(model), sgd(model), compile="aot_eager")
    plain = TrainStep(twin, sgd(twin))
    assert "cut where DistributedDataParallel's buckets end" in compiled.explain()
    for batch in (4, 6):
        x = torch.randn(batch, 2)
        torch.testing.assert_close(compiled(x), plain(x))
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()))
