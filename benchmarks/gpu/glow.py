"""Glow as for CIFAR-10 (3 levels x 32 steps, 512 hidden channels, 3x32x32): a training step, and its kernels."""

import copy
import math
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import contest, glow, step_launches, timing
from benchmarks.gpu import measuring
from benchmarks.gpu.unfused import UnfusedGlow
from benchmarks.neutral_glow import NeutralGlow
from fastflow import backends
from fastflow.engine import TrainStep

FULL = {"n_levels": 3, "n_steps": 32, "hidden_channels": 512, "image_shape": (3, 32, 32)}
TINY = {"n_levels": 2, "n_steps": 2, "hidden_channels": 8, "image_shape": (3, 8, 8)}
PEERS = ("nflows", "normflows")
TRIES = 2  # of each of a peer's settings
LIBRARY = "fastflow, captured, library convolutions"  # in place of Triton's
LAUNCHING = ("cudaLaunchKernel", "cuLaunchKernel")


def _sizes(tiny):
    return TINY if tiny else FULL


def _name(batch, sizes):
    shape = "x".join(map(str, sizes["image_shape"]))
    return (f"Glow training step, {sizes['n_levels']} levels x {sizes['n_steps']} steps, {sizes['hidden_channels']} "
            f"hidden channels, batch {batch}, {shape}")


def _x(batch, sizes, device):
    return torch.rand(batch, *sizes["image_shape"], device=device) - 0.5


def flops(batch, sizes):
    """FLOPs of a training step, counted on the neutral model: fastflow computes the same."""
    shape = sizes["image_shape"]
    with torch.device("meta"):
        model = NeutralGlow(shape, sizes["n_levels"], sizes["n_steps"], sizes["hidden_channels"])
        return batch * measuring.training_flops(model, torch.empty(1, *shape))


def _with_library_convolutions(construct):
    """A captured step, recorded while conditioners leave their convolutions to torch."""
    with mock.patch.object(backends, "CONV_NET_HIDDEN", math.inf):
        step = construct()
        for _ in range(5):
            step()
    return step


def against_peers(batch):
    """fastflow uncaptured and captured against eager models."""
    def case(device, tiny):
        sizes, n = _sizes(tiny), 2 if tiny else batch
        x, fused = _x(n, sizes, device), glow.fastflow_glow(**sizes, device=device)
        variants = {
            "fastflow": lambda: measuring.fastflow_step(copy.deepcopy(fused), x, device),
            "fastflow, captured": lambda: measuring.fastflow_step(copy.deepcopy(fused), x, device, capture=True),
            "fastflow, captured, bf16": lambda: measuring.fastflow_step(copy.deepcopy(fused), x, device, capture=True,
                                                                        conditioner_dtype=torch.bfloat16),
            LIBRARY: lambda: _with_library_convolutions(
                lambda: measuring.fastflow_step(copy.deepcopy(fused), x, device, capture=True)),
            "eager": lambda: glow.fastest(contest.training_step, "eager", lambda: glow.neutral_glow(fused), x, TRIES)}
        for name in PEERS:
            variants[name] = lambda n=name: glow.fastest(
                contest.training_step, n,
                lambda **options: measuring.flags_on_host(glow.peer_glow(n, **sizes, device=device, **options)), x,
                TRIES)
        wanted = 5.0 if batch == 64 else 2.0
        yield measuring.measure(measuring.Contest(
            _name(n, sizes), "glow", variants, n, flops(n, sizes), bf16=("fastflow, captured, bf16",),
            goals={("fastflow, captured", name): wanted for name in PEERS},
            rounds=7 if batch == 64 else 3), device)
    return case


def against_unfused(batch, dtype=None):
    """fastflow captured against the unfused model compiled and captured, both in the same precision."""
    def case(device, tiny):
        sizes, n = _sizes(tiny), 2 if tiny else batch
        x, fused = _x(n, sizes, device), glow.fastflow_glow(**sizes, device=device)
        backend = "aot_eager" if tiny else "inductor"
        plain, own = "fastflow, captured", "fastflow, conditioners compiled, captured"
        other = "unfused, compiled and captured"

        def fastflow_step(**options):
            return measuring.fastflow_step(copy.deepcopy(fused), x, device, capture=True, conditioner_dtype=dtype,
                                           **options)
        variants = {
            plain: fastflow_step,
            own: lambda: fastflow_step(**({} if tiny else {"compile": "conditioners"})),
            other: lambda: measuring.captured_training_step(
                UnfusedGlow(glow.neutral_glow(fused).cpu(), dtype, backend).to(device), x, device)}
        precision = "float32" if dtype is None else "conditioners in bfloat16"
        yield measuring.measure(measuring.Contest(
            f"{_name(n, sizes)}, {precision}, graphs", "glow unfused", variants, n, flops(n, sizes),
            bf16=() if dtype is None else (plain, own, other),
            notes={other: "LU form of the 1x1 weights, batched by level; one compilation for each level's flow step; "
                          "channels-last; the whole step one CUDA graph"},
            goals={(plain, other): 1.3, (own, other): 1.3}), device)
    return case


def kernels(device, tiny):
    """Kernels of an uncaptured step as the profiler counts them, beside the launches counted without a GPU."""
    sizes, n = _sizes(tiny), 2 if tiny else 64
    x = torch.randint(256, (n, *sizes["image_shape"]), dtype=torch.uint8, device=device)
    fused = glow.fastflow_glow(**sizes, device=device)
    neutral = glow.neutral_glow(fused)
    step = TrainStep(fused, contest.fused_adam(fused), memory="none", check_finite=False)
    floating = x / 256 - 0.5
    calls = {"fastflow": lambda: step(x), "eager": contest.training_step(neutral, floating)}
    row = {"case": f"kernels of an uncaptured step: {_name(n, sizes)}", "group": "launches", "profiled": {},
           "failed": {}}
    for name, call in calls.items():
        try:
            row["profiled"][name] = profiled(call, device)
        except Exception as error:
            row["failed"][name] = timing.first_line(error)
    counts = step_launches.extrapolated(step_launches.of_fastflow, sizes["n_steps"], n_levels=sizes["n_levels"],
                                        check_finite=False)
    row["expected"] = {"fastflow": {"all": counts.total(), "of the flow": step_launches.flow_specific(counts)}}
    yield row


def profiled(call, device, warm_up=3):
    """{"launch calls", "kernels", "copies and fills"} of one call: what the host launched, and what the device ran."""
    for _ in range(warm_up):
        call()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as found:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    events = found.events()
    on_device = [event.name for event in events if event.device_type == torch.autograd.DeviceType.CUDA
                 and not getattr(event, "is_user_annotation", False)]  # torch 2.10 may lack it
    launching = sum(event.name.startswith(LAUNCHING) for event in events)
    moved = sum(name.startswith(("Memcpy", "Memset")) for name in on_device)
    return {"launch calls": launching, "kernels": len(on_device) - moved, "copies and fills": moved}
