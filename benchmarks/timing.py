"""Interleaved timing: every variant once per round, so that a drifting machine hits all alike, and in every other round
in the opposite order, so that none always comes after the same other one, whose leavings are in the caches."""

import ctypes
import functools
import time

import torch

CLOCKS = {"cpu": "process CPU time", "wall": "wall time", "cuda": "CUDA events"}
ROUND_SECONDS = 0.01  # a variant is repeated within a round until it runs about this long
_TRIALS = 3  # calls timed one by one, to find the repeats of a round


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


def cuda_seconds(call, repeats):
    """Seconds of one of ``repeats`` calls, by CUDA events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


_MEASURES = {"cpu": _cpu_seconds, "wall": _wall_seconds, "cuda": cuda_seconds}


@functools.cache
def keep_memory():
    """Lets glibc's malloc keep what is freed, for all contenders alike, and says whether it does. It gives the end of
    its heap back to the system when that grows beyond a bound; whose calls then wait for the pages to be zeroed again
    depends on what the process has allocated before, not on the contender."""
    trim_threshold, mmap_threshold, largest, most_on_heap = -1, -3, 2**31 - 1, 32 << 20
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return bool(mallopt(trim_threshold, largest) and mallopt(mmap_threshold, most_on_heap))


def interleave(variants, clock, rounds=15, warmup=3, round_seconds=None):
    """Seconds per call of each variant, in every round, every other one in reverse order. One that raises is left out
    from then on.

    Args:
        variants: {name: callable without arguments}.
        clock: "cpu" (process CPU time, for one thread on a shared machine), "wall" or "cuda".
        rounds: that count; one more warms up.
        warmup: calls of each variant before any is timed.
        round_seconds: how long a variant is repeated within a round; None for ROUND_SECONDS.

    Returns:
        {name: [seconds, one per round]} of those that ran to the end, {name: what it raised, in a line} of the rest.
    """
    measure = _MEASURES[clock]
    keep_memory()
    repeats, samples, failed = {}, {name: [] for name in variants}, {}
    round_seconds = ROUND_SECONDS if round_seconds is None else round_seconds
    for turn in range(rounds + 1):  # the first warms up and finds the repeats
        for name in list(samples)[::-1 if turn % 2 else 1]:
            try:
                if name in repeats:
                    samples[name].append(measure(variants[name], repeats[name]))
                    continue
                for _ in range(warmup):
                    variants[name]()
                # of the fastest: one call that was held up would leave few repeats, with the caches of another variant
                seconds = min(measure(variants[name], 1) for _ in range(_TRIALS))
                repeats[name] = max(1, min(1000, int(round_seconds / max(seconds, 1e-7))))
            except Exception as error:  # a baseline may lack a size, a library, memory: the others are still measured
                failed[name] = first_line(error)
                del samples[name]
    return samples, failed


def first_line(error):
    """The first line of an exception's message, its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
