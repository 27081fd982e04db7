"""How a contest on a GPU is measured: interleaved, in CUDA events, beside the device's peak."""

import dataclasses
import gc
import statistics
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import contest, timing
from fastflow.engine.capture import CudaRecorder

# Dense FLOP/s of an H200 as its data sheet has them (with sparsity twice as much).
PEAK_FLOPS = {"tf32": 494e12, "bf16": 989e12}
ROUND_SECONDS = 0.03  # a variant is repeated within a round until it runs about this long
WARM_UP = 5  # TrainStep records its graph at the fourth call


@dataclasses.dataclass
class Contest:
    """One row: what is compared.

    Attributes:
        name, group: of the case.
        variants: {name: constructor of a callable}; those whose name starts with "fastflow" are compared to the others.
        examples: that a call handles.
        flops: of a call's multiplications and additions, None where they are not counted.
        bf16: names of the variants whose networks run in bfloat16.
        notes: settings worth knowing, by name.
        goals: {(own variant, other variant): wanted ratio}.
        rounds: that count.
        warm_up: calls of each variant before any is timed.
    """

    name: str
    group: str
    variants: dict[str, Callable]
    examples: int
    flops: float | None = None
    bf16: tuple[str, ...] = ()
    notes: dict[str, str] = dataclasses.field(default_factory=dict)
    goals: dict[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    rounds: int = 7
    warm_up: int = WARM_UP

    def precision(self, name):
        return "bf16" if name in self.bf16 else "tf32"


def measure(case, device):
    """The row of a Contest: medians and quartiles in ms, ratios, examples per second and, on a GPU, MFU. A variant that
    raises is under "failed", and the others are measured."""
    calls, failed = {}, {}
    for name, construct in case.variants.items():
        try:
            calls[name] = construct()
        except Exception as error:  # a library may be missing, a graph not be recordable, memory be short
            failed[name] = timing.first_line(error)
    settings = {name: call.setting for name, call in calls.items() if getattr(call, "setting", "")}
    clock = "cuda" if device == "cuda" else "wall"
    samples, raised = timing.interleave(calls, clock, case.rounds, case.warm_up, ROUND_SECONDS)
    medians = {name: statistics.median(seconds) for name, seconds in samples.items()}
    row = {"case": case.name, "group": case.group,
           "median_ms": {name: round(1e3 * seconds, 4) for name, seconds in medians.items()},
           "quartiles_ms": {name: _quartiles(seconds) for name, seconds in samples.items()},
           "examples_per_s": {name: round(case.examples / seconds, 1) for name, seconds in medians.items()},
           "ratios": _ratios(medians), "settings": settings, "notes": case.notes, "failed": failed | raised}
    row["goals"] = [{"of": own, "over": other, "wanted": wanted, "ratio": row["ratios"].get(own, {}).get(other)}
                    for (own, other), wanted in case.goals.items()]
    if case.flops is not None:
        row["flops"] = case.flops
        if device == "cuda":
            row["mfu"] = {name: round(case.flops / seconds / PEAK_FLOPS[case.precision(name)], 4)
                          for name, seconds in medians.items()}
            row["peak_flops"] = {name: PEAK_FLOPS[case.precision(name)] for name in medians}
    return row


def _quartiles(seconds):
    found = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return [round(1e3 * found[0], 4), round(1e3 * found[2], 4)]


def _ratios(medians):
    """{own: {other: how many times faster own is}}."""
    return {own: {other: round(theirs / ours, 3) for other, theirs in medians.items() if not _is_own(other)}
            for own, ours in medians.items() if _is_own(own)}


def _is_own(name):
    return name.startswith("fastflow")


def captured(call, device):
    """The call as one CUDA graph, recorded after three that run eagerly on the same stream; without a GPU the call.

    What the call closes over must be all that it reads: the graph has its addresses.
    """
    if device != "cuda":
        return call
    recorder = CudaRecorder(torch.device("cuda", torch.cuda.current_device()))
    with recorder.aside():
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    replay, outputs = recorder.record(call)

    def replayed():
        replay()
        return outputs
    replayed.kept = call, recorder
    return replayed


def captured_training_step(model, x, device):
    """contest.training_step as one CUDA graph, its optimizer capturable."""
    return captured(contest.training_step(model, x, capturable=device == "cuda"), device)


def fastflow_step(model, x, device, **options):
    """contest.fastflow_step keeping all activations; ``capture`` counts on a GPU alone."""
    if options.get("capture"):
        options["capture"] = device == "cuda"
    return contest.fastflow_step(model, x, memory="none", **options)


def flags_on_host(model):
    """The model, with the flags by which peers' actnorms ask in every pass whether they are initialised on the CPU,
    where asking waits for nothing: moving a model to a GPU takes them along."""
    for module in model.modules():
        for name in ("data_dep_init_done", "initialized"):
            flag = module._buffers.get(name)
            if flag is not None and flag.numel() == 1:
                module._buffers[name] = flag.cpu()
    return model


def training_flops(model, x):
    """FLOPs of a forward and a backward pass of a model whose call is log p(x), both on the meta device: those of
    matrix products and convolutions, a multiplication and an addition counting two."""
    with FlopCounterMode(display=False) as counted:
        model(x).mean().backward()
    return counted.get_total_flops()


def release():
    """Give back what the last case left on the GPU, graphs and their memory included."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
