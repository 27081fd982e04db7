"""Interleaved timing: every variant once per round, medians over rounds, so that a drifting machine hits all alike."""

import statistics
import time

import torch

CLOCKS = {"cpu": "process CPU time", "wall": "wall time", "cuda": "CUDA events"}
ROUND_SECONDS = 0.01  # a variant is repeated within a round until it runs about this long


def _cpu_seconds(call, repeats):
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats


def _wall_seconds(call, repeats):
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _cuda_seconds(call, repeats):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


_MEASURES = {"cpu": _cpu_seconds, "wall": _wall_seconds, "cuda": _cuda_seconds}


def interleave(variants, clock, rounds=15, warmup=3):
    """Median seconds per call of each variant.

    Args:
        variants: {name: callable without arguments}.
        clock: "cpu" (process CPU time, for one thread on a shared machine), "wall" or "cuda".

    Returns:
        {name: seconds}.
    """
    measure = _MEASURES[clock]
    repeats = {}
    for name, call in variants.items():
        for _ in range(warmup):
            call()
        repeats[name] = max(1, min(1000, int(ROUND_SECONDS / max(measure(call, 1), 1e-7))))
    samples = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            samples[name].append(measure(call, repeats[name]))
    return {name: statistics.median(values) for name, values in samples.items()}
