"""What a train step does, in words."""

import collections

import torch

from fastflow import backends, launches
from fastflow.engine.buffers import Buffers
from fastflow.engine.distributed import is_compiled, is_sharded, replicas, unwrap
from fastflow.engine.precision import conditioners
from fastflow.engine.update import is_fused
from fastflow.nn import AffineCoupling, ConvNet, InvertibleConv1x1

__all__ = ["choices", "launched"]


def choices(step):
    """One line per choice of a TrainStep, with the reason."""
    inner = unwrap(step.model)
    return "\n".join([
        f"objective: {_objective(step, inner)} of {type(inner).__name__}, mean over the batch, in nats",
        f"integer images: dequantised with {step.objective.n_bins} levels{_own(step.model)}, floating x taken as it is",
        f"fused: {_fused(inner, step._device)}",
        f"optimizer: {_optimizer(step)}",
        f"precision: {_precision(step, inner)}",
        f"layout: {step.layout}",
        step._convolutions.explain(),
        f"memory: {step.memory.explain()}",
        f"compile: {_compile(step)}",
        f"capture: {_capture(step)}",
        f"accumulation: {'off' if step.accumulate == 1 else f'{step.accumulate} calls make one update'}",
        f"average: {'off' if step.ema is None else f'exponential, decay {step.ema.decay:g}, after every update'}",
        f"clipping: {_clipping(step)}",
        f"non-finite loss: {_check(step)}",
        f"processes: {_processes(step)}",
    ])


def _objective(step, inner):
    own = getattr(inner, "objective", None)
    if own is None:
        return step.objective.name
    penalties = [type(penalty).__name__ for penalty in getattr(own, "penalties", ())]
    return f"minus {type(own).__name__}({', '.join(penalties) or getattr(own, 'name', '')})"


def _own(model):
    return "" if getattr(unwrap(model), "dequantizer", None) is None else " by the flow itself"


def launched(step, batch):
    """The layers that run as one kernel on this batch, and the launches of fastflow's operators in one forward and
    backward of it."""
    inner = unwrap(step.model)
    whole = getattr(getattr(inner, "transform", None), "explain", None)
    x = batch.x
    generator = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices=generator):
        whole = "" if whole is None else f"whole flow: {whole(step.objective.prepare(inner, x)[0], batch.context)}\n"
    parameters = [p for p in inner.parameters() if p.requires_grad]
    buffers = Buffers(inner)
    with torch.random.fork_rng(devices=generator), launches.count() as counted, step._lowered():
        loss = step.objective(inner, *batch)[0]
        torch.autograd.grad(loss, parameters, allow_unused=True)
    buffers.put_back()
    return f"{whole}launches of fastflow's operators on a GPU, forward and backward:\n{counted}"


def _fused(model, device):
    couplings = sum(isinstance(m, AffineCoupling) for m in model.modules())
    convolutions = [m for m in model.modules() if isinstance(m, InvertibleConv1x1)]
    parts = []
    if couplings:
        backend = backends.explain("affine_coupling", torch.empty(1, 1, device=device)).split()[0]
        parts.append(f"{couplings} couplings, each with its log-determinant, on {backend}")
    if convolutions:
        sizes = {m.channels for m in convolutions}
        folded = sum(m.actnorm is not None for m in convolutions)
        parts.append(f"{len(convolutions)} invertible 1x1 convolutions of {len(sizes)} sizes, {folded} with their "
                     "normalisation folded in, factorised together in flows.Glow and nn.WeightBank")
    if not is_sharded(model):  # whose parameters are whole in a forward pass alone
        networks = collections.Counter(m.explain() for m in model.modules() if isinstance(m, ConvNet))
        parts += [f"{count} convolutional conditioners on {where}" for where, count in networks.items()]
    return "; ".join(parts) or "nothing (no coupling or invertible convolution of fastflow.nn inside)"


def _optimizer(step):
    optimizer = step.optimizer
    text = f"{type(optimizer).__name__}, {sum(p.numel() for p in step._parameters):,} parameters, "
    if is_fused(optimizer):
        return text + "fused"
    if "fused" in optimizer.defaults:
        return text + "not fused: make it with fused=True for one kernel instead of several passes"
    return text + "not fused: torch has no fused kernel for it"


def _precision(step, model):
    dtype = next(model.parameters()).dtype
    if step.conditioner_dtype is None:
        return f"{dtype} throughout"
    if dtype == torch.float64:
        return f"{dtype} throughout, which autocast leaves as it is"
    return (f"{len(conditioners(model))} conditioners under autocast to {step.conditioner_dtype}; parameters, z, "
            f"log-determinants and factorisations in {dtype}")


def _compile(step):
    if not step.compile:
        return "by the model's own torch.compile" if is_compiled(step.model) else "off"
    if step.compile == "conditioners":
        return f"{len(step._lowered.modules)} conditioners, one graph for all of one shape"
    backend = "inductor" if step.compile is True else step.compile
    if replicas(step.model) is not None:
        return f"torch.compile on the loss ({backend}), cut where DistributedDataParallel's buckets end"
    return f"torch.compile on the loss ({backend}), one graph for batches of 2 and more"


def _capture(step):
    if not step.capture:
        if step._device.type != "cuda":
            return f"off (the model is on {step._device.type})"
        return "off"
    return f"{step._steps.recorded} graphs recorded, {step._steps.eager} calls ran without one"


def _clipping(step):
    clip = step.clip_grad_norm
    return "off" if clip is None else f"gradients of norm above {clip:g} are scaled down"


def _check(step):
    return {True: "refused before the optimizer runs", False: "not looked for",
            "late": "the update is skipped on the device, the next call says so"}[step.check_finite]


def _processes(step):
    if replicas(step.model) is not None:
        return "replicas (DistributedDataParallel)" + (", reduced once per update" if step.accumulate > 1 else "")
    return "sharded (FSDP2)" if is_sharded(step.model) else "one"
