"""What the comparisons of whole models share: a training step of anybody's model, and every contender at its best."""

import time

import torch

from benchmarks import peers, timing
from fastflow import engine

LEARNING_RATE = 1e-5  # small, so that a model is much the same after some hundred timed steps


def fused_adam(model, learning_rate=LEARNING_RATE, **options):
    """The optimiser that every contender gets."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.Adam(parameters, lr=learning_rate, fused=True, **options)


def training_step(model, x, **options):
    """A training step of any model whose call is log p(x), as a user writes it; ``options`` are Adam's."""
    optimizer = fused_adam(model, **options)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = -model(x).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()
    return step


def fastflow_step(model, x, **options):
    """The same through engine.TrainStep, without its look at the gradients' norm: the others have none."""
    step = engine.TrainStep(model, fused_adam(model), check_finite=False, **options)
    return lambda: step(x)


def log_prob(model, x):
    """log p(x) without gradients."""
    @torch.no_grad()
    def call():
        return model(x)
    return call


def sampling(model, x):
    """As many samples as x has rows."""
    @torch.no_grad()
    def call():
        return model.sample(len(x))
    return call


WORK = {"training step": training_step, "log_prob": log_prob, "sampling": sampling}


def fastflows(act):
    """What fastflow's own model does for one of WORK."""
    return fastflow_step if act is training_step else act


def best(candidates, tries=5):
    """The fastest of {setting: constructor of a callable}, by the smallest of interleaved times: CPU time under one
    thread, else wall time.

    The callable has the setting as its attribute ``setting``. A setting that raises is out; where all do, the result
    raises what the last one did when it is called, so that the other contenders are still measured.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    calls, seconds, error = {}, {}, None
    for setting, construct in candidates.items():
        try:
            calls[setting] = construct()
            calls[setting]()
        except Exception as raised:
            error = raised
            calls.pop(setting, None)
    if not calls:
        return _raising(error)
    for _ in range(tries if len(calls) > 1 else 0):
        for setting, call in calls.items():
            start = clock()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[setting] = min(seconds.get(setting, float("inf")), clock() - start)
    setting = min(seconds, key=seconds.get) if seconds else next(iter(calls))
    chosen = calls[setting]

    def call():
        return chosen()
    call.setting = setting
    return call


def _raising(error):
    def call():
        raise RuntimeError(timing.first_line(error)) from error
    return call


def settings(name, kind):
    """{setting: its keyword arguments} of a peer, ``kind`` "glow" or "realnvp"; where its library is not installed one
    setting, which raises when it is built."""
    try:
        return getattr(peers.module(name), f"{kind.upper()}_SETTINGS")
    except ImportError:
        return {"": {}}


def joined(*parts):
    """A setting's name from its parts, empty ones left out."""
    return ", ".join(part for part in parts if part)
