"""What a train step does, in words."""

import collections

import torch

from fastflow import backends, launches
from fastflow.engine.alone import alone
from fastflow.engine.distributed import is_compiled, is_sharded, replicas, unwrap
from fastflow.engine.precision import conditioners
from fastflow.engine.update import check_gradient, is_fused
from fastflow.nn import AffineCoupling, ConvNet, InvertibleConv1x1
from fastflow.vae import BernoulliLikelihood, ContinuousBernoulliLikelihood

__all__ = ["choices", "launched"]


def choices(step):
    """One line per choice of a TrainStep, with the reason."""
    inner = unwrap(step.model)
    return "\n".join([
        f"objective: {_objective(step, inner)} of {type(inner).__name__}, mean over the batch, in nats",
        f"integer images: {_integers(step.objective.n_bins, inner)}, floating x taken as it is",
        f"fused: {_fused(inner, step._device)}",
        f"optimizer: {_optimizer(step)}",
        f"precision: {_precision(step, inner)}",
        f"layout: {step.layout}",
        step._convolutions.explain(),
        f"memory: {step.memory.explain()}",
        f"compile: {_compile(step)}",
        f"capture: {_capture(step)}",
        f"accumulation: {'off' if step.accumulate == 1 else f'{step.accumulate} calls make one update'}",
        f"average: {_average(step.ema)}",
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


def _integers(n_bins, model):
    """What Objective.prepare makes of them."""
    likelihood = getattr(model, "likelihood", None)
    if getattr(model, "dequantizer", None) is not None:
        return f"dequantised with {n_bins} levels by the flow itself"
    if getattr(model, "takes_integers", False):
        return f"taken as they are by the {type(model).__name__}"
    if hasattr(likelihood, "log_prob") and not hasattr(likelihood, "takes_integers"):
        return (f"dequantised with {n_bins} levels, other integers than bytes and (B, C, H, W) refused, because the "
                f"{type(likelihood).__name__} has no takes_integers")
    if getattr(likelihood, "takes_integers", False):
        return f"taken as they are by the {type(likelihood).__name__}"
    if isinstance(likelihood, BernoulliLikelihood):
        return f"scaled to x/{n_bins - 1} for the {type(likelihood).__name__}"
    place = " to [0, 1]" if isinstance(likelihood, ContinuousBernoulliLikelihood) else ""
    return f"dequantised with {n_bins} levels{place}"


def _average(ema):
    if ema is None:
        return "off"
    warmup = f"; (1 + n)/({ema.warmup:g} + n) after n of them, while that is less" if ema.warmup else ""
    return f"exponential, decay {ema.decay:g}, after every update{warmup}"


def launched(step, batch):
    """The layers that run as one kernel on this batch, and the launches of fastflow's operators in one forward and
    backward of it."""
    inner = unwrap(step.model)
    devices = [batch.x.device] if batch.x.device.type == "cuda" else []
    with alone(inner), torch.random.fork_rng(devices=devices), torch.enable_grad():
        whole = _whole(step, inner, batch)
        with launches.count() as counted, step._lowered(), step.memory.looked_at():
            loss = step.objective(inner, *batch)[0]
            check_gradient(loss)
            torch.autograd.grad(loss, [p for p in inner.parameters() if p.requires_grad], allow_unused=True)
    return f"{whole}launches of fastflow's operators on a GPU, forward and backward:\n{counted}"


def _whole(step, model, batch):
    """The line about the whole flow, "" for what has nothing to say of it."""
    explained = getattr(getattr(model, "transform", None), "explain", None)
    if explained is None:
        return ""
    if step.memory.mode == "invert":
        return "whole flow: layer by layer: memory='invert' recovers the z of each\n"
    return f"whole flow: {explained(step.objective.prepare(model, batch.x)[0], batch.context)}\n"


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
    if is_sharded(step.model):
        return f"torch.compile on the loss ({backend}), cut where FSDP2 gathers parameters"
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
