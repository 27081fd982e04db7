"""A whole training step as one CUDA graph for each batch shape.

Everything that decides is here and runs on any device; :class:`CudaRecorder` is the little that needs a GPU.
"""

import contextlib

import torch

from fastflow.engine.distributed import is_sharded, replicas, unwrap
from fastflow.engine.update import can_skip

__all__ = ["CapturedSteps", "CudaRecorder", "prepare", "recorder_for"]

WARM_UP = 2  # calls of each shape that run eagerly, on a side stream, before the third is recorded: all are real steps
MAX_SHAPES = 4  # that are recorded; a batch of a further shape runs eagerly


class CudaRecorder:
    """CUDA graphs of one device, with one memory pool for all: they never run at the same time."""

    def __init__(self, device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def aside(self):
        """Work inside runs on the side stream, after what came before and before what comes after."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:  # what puts things back after an error comes after the work, too
            current.wait_stream(self.stream)

    def forget(self):
        """No graph is replayed any more; a pool that something still holds memory of can't serve new ones."""
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, body):
        """(replay, outputs): ``replay()`` runs what ``body()`` launched, and refreshes the outputs that it returned.
        torch's default generator belongs to the graph, so that every replay draws fresh noise."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            outputs = body()
        return graph.replay, outputs


def recorder_for(device):
    """A recorder for a model on this device.

    Raises:
        ValueError: it is no CUDA device.
    """
    if device.type != "cuda":
        raise ValueError(f"capture: expected a model on a CUDA device, this one is on {device.type}; use False")
    return CudaRecorder(device)


def prepare(model, optimizer, device, check):
    """Makes an optimizer's step capturable, its learning rates 0-d tensors on the device.

    Raises:
        ValueError: model or optimizer can't be captured; the message names ``capture``.
    """
    if is_sharded(model):
        raise ValueError("capture: a model sharded by FSDP2 gathers its parameters from the host; use False")
    if replicas(model) is not None:
        raise ValueError("capture: not available inside DistributedDataParallel; use False")
    for name, module in unwrap(model).named_modules():
        reason = getattr(module, "uncapturable", None)
        if reason is not None:
            where = f"{name or 'the model'} ({type(module).__name__})"
            raise ValueError(f"capture: can't record {where}, because {reason}; use False")
    kind, groups = type(optimizer).__name__, optimizer.param_groups
    if check and not can_skip(optimizer):
        raise ValueError(f"capture: this {kind} can't skip an update on the device's word; make it with fused=True, or "
                         "set check_finite=False")
    if not all(group.get("fused") or group.get("capturable") for group in groups):
        raise ValueError(f"capture: this {kind} can't be captured; make it with fused=True or capturable=True")
    _make_capturable(device, groups)


def _make_capturable(device, groups):
    for group in groups:
        if "capturable" in group:
            group["capturable"] = True
        if not (isinstance(group["lr"], torch.Tensor) and group["lr"].device == device):
            group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float32, device=device)


class _Shape:
    """What belongs to one shape of batch."""

    def __init__(self, batch, device):
        self.batch = batch.map(lambda tensor: torch.empty_like(tensor, device=device))
        self.calls, self.replay, self.outputs = 0, None, None


def held(parameters):
    """Index of the first parameter that belongs to an autograd graph which something still refers to, or None."""
    def node(parameter):
        return parameter.expand_as(parameter).grad_fn.next_functions[0][0]

    with torch.enable_grad():
        for index, parameter in enumerate(parameters):
            if not parameter.requires_grad:
                continue
            token = object()
            node(parameter).metadata["fastflow"] = token  # it dies at once, unless a graph holds it
            if node(parameter).metadata.get("fastflow") is token:
                return index
    return None


class CapturedSteps:
    """``steps(batch, last)`` runs ``body(batch, last)`` by replaying what it launched.

    A graph has the addresses of parameters and optimizer state in it, and every hyperparameter but the learning rate.
    Where one of these was exchanged (optimizer.load_state_dict, model.to, a changed weight decay), all graphs are
    recorded anew.

    Args:
        body: function of a :class:`~fastflow.engine.batch.Batch` of static tensors and a bool, that returns nested
            tuples and dicts of tensors, without a host synchronisation.
        optimizer: as :func:`prepare` left it.
        parameters: of the model, whose gradients stay where they are between calls if ``accumulating``.
        recorder: a CudaRecorder or what stands in for one.
        accumulating: whether an update takes several calls.

    Attributes:
        recorded, eager: how many graphs there are, and how many calls ran without one.
    """

    def __init__(self, body, optimizer, parameters, recorder, accumulating):
        self.body, self.optimizer, self.parameters, self.recorder = body, optimizer, parameters, recorder
        self.accumulating = accumulating
        self.device = recorder.device
        self.shapes, self.eager = {}, 0
        self._rates = self._identity = self._state = self._gradients = None

    @property
    def recorded(self):
        return sum(shape.replay is not None for shape in self.shapes.values())

    def __call__(self, batch, last):
        self._follow_optimizer()
        if self.accumulating and self._gradients is not None:
            self._put_gradients_back()
        key = tuple((name, tuple(t.shape), t.stride(), t.dtype) for name, t in batch.named()), last
        shape = self.shapes.get(key)
        if shape is None:
            limit = MAX_SHAPES * (2 if self.accumulating else 1)
            if len(self.shapes) >= limit:
                self.eager += 1
                return self.body(batch, last)
            shape = self.shapes[key] = _Shape(batch, self.device)
        for (_, static), (_, given) in zip(shape.batch.named(), batch.named(), strict=True):
            static.copy_(given, non_blocking=True)
        if shape.calls == 0 and (index := held(self.parameters)) is not None:
            raise RuntimeError(f"capture: parameter {index} of the optimizer is part of an autograd graph from before, "
                               "which a graph of the GPU can't follow; delete the loss or output that still refers to "
                               "it, or detach what you keep")
        if shape.calls < WARM_UP:
            self.eager += 1
            with self.recorder.aside():
                outputs = self.body(shape.batch, last)
            shape.calls += 1
            if self.accumulating:
                self._gradients = [p.grad for p in self.parameters]
            return outputs
        if shape.replay is None:
            shape.replay, shape.outputs = self.recorder.record(lambda: self.body(shape.batch, last))
        shape.replay()
        return _copied(shape.outputs)

    def _put_gradients_back(self):
        """The graphs add to these tensors, whatever zero_grad put in their place, and so must what runs without one."""
        for index, (parameter, gradient) in enumerate(zip(self.parameters, self._gradients, strict=True)):
            if gradient is None:  # no graph knows of it yet
                self._gradients[index] = parameter.grad
            elif parameter.grad is not gradient:
                gradient.zero_() if parameter.grad is None else gradient.copy_(parameter.grad)
                parameter.grad = gradient

    def _follow_optimizer(self):
        """Takes over learning rates that were set, and drops graphs that no longer fit."""
        groups = self.optimizer.param_groups
        identity = (self.parameters[0].data_ptr(), self.parameters[-1].data_ptr(),
                    [{k: v for k, v in group.items() if k not in ("lr", "params") and not isinstance(v, torch.Tensor)}
                     for group in groups])
        if identity != self._identity or self.optimizer.state is not self._state:
            self.shapes.clear()
            self._gradients = None
            self.recorder.forget()
            _make_capturable(self.device, groups)
            self._identity, self._state = identity, self.optimizer.state
            self._rates = [group["lr"] for group in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            if group["lr"] is not rate:
                rate.copy_(group["lr"]) if isinstance(group["lr"], torch.Tensor) else rate.fill_(group["lr"])
                group["lr"] = rate


def _copied(outputs):
    if isinstance(outputs, torch.Tensor):
        return outputs.clone()
    if isinstance(outputs, dict):
        return {name: _copied(value) for name, value in outputs.items()}
    return None if outputs is None else tuple(map(_copied, outputs))
