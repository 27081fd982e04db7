"""Inverses of autoregressive blocks: token by token, with a cache of keys and values, or by fixed-point iteration."""

import dataclasses

import torch

from fastflow import checks, functional
from fastflow.functional import ScaleMap
from fastflow.nn.transformer import GrowingCache, KVCache

__all__ = ["GaussSeidelJacobi", "Guidance", "decoder"]

SCALE = ScaleMap.tarflow()
PARTS = ("both", "scale", "shift")


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Sampling pushed away from a weaker prediction: params = p + weight * (p - q), token by token.

    p are the params under the labels given. q are those without a label, with attention logits divided by
    ``attention_temperature``: with labels that is classifier-free guidance; without, the temperature alone makes q
    weaker. Samples are no longer those of the model's density.

    Args:
        weight: w; 0 guides nothing.
        attention_temperature: of q, positive.
        parts: what is guided, "both", "scale" (alpha) or "shift" (mu).
        annealed: let the weight grow along the sequence, w * i / (T - 1) at token i.

    References:
        Zhai et al., "Normalizing flows are capable generative models", 2025, arXiv:2412.06329, section 3.
        Ho and Salimans, "Classifier-free diffusion guidance", 2022, arXiv:2207.12598.
    """

    weight: float = 0.0
    attention_temperature: float = 1.0
    parts: str = "both"
    annealed: bool = False

    def __post_init__(self):
        if not abs(self.weight) < float("inf"):
            raise ValueError(f"guidance: expected a finite weight, got {self.weight!r}")
        if not 0.0 < self.attention_temperature < float("inf"):
            raise ValueError(f"attention_temperature: expected a positive number, got {self.attention_temperature!r}")
        checks.choice("parts", self.parts, PARTS)


class GaussSeidelJacobi:
    """Solve x = z / s(x) + mu(x) segment after segment, all tokens of a segment at once, in place of one by one.

    The params of a token depend on those before it alone, so that iteration k makes k tokens of a segment exact:
    without a cap the result is that of the sequential inverse to rounding plus ``tolerance``, in at most
    ``segment_length`` passes a segment, and in few where tokens depend weakly on each other. Segments that are done
    stay in a cache of keys and values (Gauss-Seidel between segments, Jacobi inside). Every pass waits for the device
    once, to ask whether to stop.

    Args:
        segment_length: tokens solved at once, >= 1.
        tolerance: stop once no element of the segment changed by more than this in a pass, >= 0.
        max_iterations: passes for a segment at most, then what has been reached is taken; None for its length, which
            is always enough.

    Attributes:
        iterations: of the last call, for each block in the order of sampling the passes of each segment.
        converged: whether every segment of the last call met the tolerance or had as many passes as tokens.

    References:
        Song et al., "Accelerating feedforward computation via parallel nonlinear equation solving", 2021,
        arXiv:2002.03629. Liu and Qin, "Accelerate TarFlow sampling with GS-Jacobi iteration", 2025, arXiv:2505.12849.
    """

    def __init__(self, segment_length=64, *, tolerance=1e-5, max_iterations=None):
        for name, value in (("segment_length", segment_length), ("max_iterations", max_iterations)):
            if value is None and name == "max_iterations":
                continue
            checks.count(name, value, 1)
        if not tolerance >= 0.0:
            raise ValueError(f"tolerance: expected a number >= 0, got {tolerance!r}")
        self.segment_length, self.tolerance, self.max_iterations = segment_length, tolerance, max_iterations
        self.iterations, self.converged = [], True


def decoder(method, guidance, capture):
    """The solver that ``TarFlow.sample`` describes by these arguments: ``solver(block, z, labels)`` is (x, logdet)."""
    guidance = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    if isinstance(method, str):
        checks.choice("method", method, ("sequential", "jacobi"))
        method = GaussSeidelJacobi() if method == "jacobi" else None
    elif not isinstance(method, GaussSeidelJacobi):
        raise TypeError(f"method: expected 'sequential', 'jacobi' or a GaussSeidelJacobi, got {type(method).__name__}")
    if capture not in (None, True, False):
        raise ValueError(f"capture: expected True, False or None, got {capture!r}")
    if method is not None:
        if capture:
            raise ValueError("capture: 'jacobi' asks the device after every pass and can't be captured; use None")
        method.iterations, method.converged = [], True
    return _Decoder(method, guidance, capture)


class _Decoder:
    """One call of sample: the cache is allocated once and serves all blocks."""

    def __init__(self, method, guidance, capture):
        self.method, self.guidance, self.capture = method, guidance, capture
        self.cache = None

    @torch.no_grad()
    def __call__(self, block, z, labels):
        z = z.flip(1) if block.flip else z
        if self.cache is None:
            self.cache = KVCache(z.shape[1] - 1)
        self.cache.clear()
        predict = _Prediction(block.network, labels, self.guidance, z)
        if self.method is not None:
            x, logdet = _iterate(predict, z, self.cache, self.method)
        else:
            x, logdet = _step_by_step(predict, z, self.cache, self.capture)
        return x.flip(1) if block.flip else x, logdet


class _Prediction:
    """Params (B, n, 2D) of the tokens behind those at positions ``rows``, guided or not."""

    def __init__(self, network, labels, guidance, like):
        self.network, self.labels, self.guidance = network, labels, guidance
        if guidance.weight == 0.0:
            return
        batch, length, features = like.shape
        if guidance.attention_temperature == 1.0 and labels is None:
            raise ValueError("guidance: without labels it is attention_temperature that makes a prediction weaker, and "
                             "that is 1")
        if network.class_embed is not None:
            unknown = torch.full((batch,), -1, device=like.device)
            self.labels = torch.cat([unknown if labels is None else labels, unknown])
        # Both predictions are one batch. What they share is made here, for a graph can't be recorded of its making.
        self.temperature = like.new_ones(2 * batch, 1, 1, 1)
        self.temperature[batch:] = guidance.attention_temperature
        self.weight = like.new_full((2, features), guidance.weight)
        if guidance.parts != "both":
            self.weight[1 if guidance.parts == "scale" else 0] = 0.0
        self.weight = self.weight.flatten()
        self.last = length - 1

    def __call__(self, tokens, rows, cache):
        if self.guidance.weight == 0.0:
            return self.network(tokens, self.labels, rows=rows, cache=cache)
        both = self.network(tokens.repeat(2, 1, 1), self.labels, rows=rows, cache=cache, temperature=self.temperature)
        given, weaker = both.to(tokens.dtype).chunk(2)
        weight = self.weight
        if self.guidance.annealed:
            weight = weight * ((rows + 1).to(weight.dtype) / self.last)[:, None]
        return given + weight * (given - weaker)


def _undo(z, params, logdet=None):
    """(x, logdet) of z (B, C) with params (B, 2C), or of z (B, n, C) with params (B, n, 2C)."""
    if z.dim() == 3:
        params = params.chunk(2, 2)
    return functional.affine_coupling(z, params, scale=SCALE, shift_first=True, inverse=True, logdet=logdet)


def _step_by_step(predict, z, cache, capture):
    """Token i + 1 from the params that tokens up to i give: one network pass over a single token, one fused launch."""
    steps = z.shape[1] - 1
    x, rows, here = z.clone(), *torch.arange(2, device=z.device).split(1)
    logdet = z.new_zeros(z.shape[0])

    def step(limit):
        cache.at(rows, limit)
        params = predict(x.index_select(1, rows), rows, cache)[:, 0]
        value, total = _undo(z.index_select(1, here)[:, 0], params, logdet)
        x.index_copy_(1, here, value[:, None])
        logdet.copy_(total)
        rows.add_(1)
        here.add_(1)

    if capture is None:
        capture = z.is_cuda and not torch.cuda.is_current_stream_capturing()
    if not capture:
        for i in range(steps):
            step(i + 1)
        return x, logdet
    replay = _record(lambda: step(steps), z.device)
    for tensor in (rows, logdet):  # the warm-up was a step, which now comes again
        tensor.zero_()
    here.fill_(1)
    for _ in range(steps):
        replay()
    return x, logdet


def _record(body, device):
    """A function that replays what ``body()`` launches, as a CUDA graph. The body runs once before it is recorded."""
    if device.type != "cuda":
        raise ValueError(f"capture: expected a model on a CUDA device, this one is on {device.type}; use None")
    with torch.cuda.device(device):
        current, aside, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            body()
        current.wait_stream(aside)
        with torch.cuda.graph(graph, stream=aside):
            body()
    return graph.replay


def step_by_step_with_gradients(network, z, labels):
    """(x, logdet) as above, as a graph of autograd."""
    cache, tokens = GrowingCache(), [z[:, :1]]
    logdet = z.new_zeros(z.shape[0])
    for i in range(z.shape[1] - 1):
        params = network(tokens[-1], labels, rows=torch.tensor([i], device=z.device), cache=cache)[:, 0]
        value, logdet = _undo(z[:, i + 1], params, logdet)
        tokens.append(value[:, None])
    return torch.cat(tokens, 1), logdet


def _iterate(predict, z, cache, method):
    x, total, passes = z.clone(), z.new_zeros(z.shape[0]), []
    bound = torch.finfo(z.dtype).max ** 0.4
    for start in range(0, z.shape[1] - 1, method.segment_length):
        end = min(start + method.segment_length, z.shape[1] - 1)
        rows = torch.arange(start, end, device=z.device)
        solved, target = x[:, start + 1:end + 1], z[:, start + 1:end + 1]
        most = end - start if method.max_iterations is None else min(method.max_iterations, end - start)
        for count in range(1, most + 1):
            cache.at(rows, end)
            value, logdet = _undo(target, predict(x[:, start:end], rows, cache))
            met = not value.numel() or bool((value - solved).abs().max() <= method.tolerance)
            done = met or count == most
            # An early guess may overflow. It is no result, and must not reach tokens that are right already.
            solved.copy_(value if done else torch.where(value.abs() < bound, value, target))
            if done:
                break
        method.converged &= met or most == end - start
        passes.append(count)
        total = total + logdet
    method.iterations.append(passes)
    return x, total
