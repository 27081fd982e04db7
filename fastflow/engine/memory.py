"""The memory mode of a training step: which one, what it saves, and whether inverting is exact enough."""

import contextlib
import os
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor

from fastflow import checks, measured
from fastflow.engine.alone import alone
from fastflow.engine.batch import mapped
from fastflow.engine.buffers import Buffers
from fastflow.engine.distributed import agree, is_compiled, is_sharded, synchronizes, unwrap
from fastflow.engine.errors import DriftError
from fastflow.flows import memory as flow_memory

__all__ = ["DRIFT_BOUND", "MODES", "Memory", "SavedBytes", "free_bytes", "per_image"]

MODES = ("auto", "none", "save_z", "invert")
DRIFT_BOUND = 1e-3  # float32 Glow of 96 steps: 1e-6 to 1e-4 as initialised, and gradients err about as much as z
AUTO_SHARE = 0.25  # of free memory that plain saved activations may take before "auto" saves
PROBE = 2  # images of the smaller probe; the larger has twice as many


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """``with SavedBytes(model) as saved: loss = ...``, then ``saved.total`` is what the graph keeps for backward.

    Unique storages in bytes, those of the model's parameters and buffers excluded. Read it before backward.
    """

    def __init__(self, model):
        self.own = {_key(t) for t in (*model.parameters(), *model.buffers())}
        self.storages = {}
        self._outer = None
        super().__init__(self._pack, self._unpack)

    def __enter__(self):
        self._outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
        super().__enter__()
        return self

    def _unpack(self, kept):
        return kept if self._outer is None else self._outer[1](kept)

    def _pack(self, tensor):
        kept = tensor.detach() if tensor.grad_fn is not None else tensor  # an output that holds its node lives forever
        if _has_storage(tensor):
            self.storages[_key(tensor)] = tensor.untyped_storage().nbytes()
        else:
            self.storages[id(kept)] = tensor.numel() * tensor.element_size()
        return kept if self._outer is None else self._outer[0](tensor)  # hooks that are in force around this

    @property
    def total(self):
        return sum(size for key, size in self.storages.items() if key not in self.own)


def _has_storage(tensor):
    """Whether its storage tells which tensors share memory; a fake tensor's does, at no memory."""
    return tensor.layout == torch.strided and type(tensor) in (torch.Tensor, torch.nn.Parameter, FakeTensor)


def _key(tensor):
    return tensor.untyped_storage()._cdata if _has_storage(tensor) else id(tensor)


def per_image(loss, model, x, *beside, n=PROBE):
    """(bytes per image, bytes whatever the batch) that the graph of ``loss(x, *beside)`` keeps for backward.

    From the first n and the first 2n images of x, exact where the bytes are linear in the batch; from all of x, and 0
    for the rest, where x has fewer. ``beside`` are tensors, or dicts of them, with a row for each x, or None. Random
    generators and the model's buffers are left as they were.
    """
    sizes = (n, 2 * n) if len(x) >= 2 * n else (len(x),)
    found = []
    devices = [x.device] if x.device.type == "cuda" else []
    buffers = Buffers(model)
    with torch.random.fork_rng(devices), torch.enable_grad():
        for size in sizes:
            # Clones, because a slice counts with all of its storage.
            parts = [mapped(value, lambda tensor, size=size: tensor[:size].clone()) for value in (x, *beside)]
            with SavedBytes(model) as saved:
                value = loss(*parts)
            found.append(saved.total)
            del value
    buffers.put_back()
    if len(sizes) == 1:
        return found[0] / len(x), 0
    slope = (found[1] - found[0]) / n
    return slope, found[0] - n * slope


def free_bytes(device):
    """Memory that ``device`` has free, in bytes; None where that can't be known.

    On CUDA what the driver reports and what torch holds unused; on a CPU what Linux calls available, less where a
    control group allows less.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    found = [_available(), _left_in_group()]
    return min((size for size in found if size is not None), default=None)


def _available():
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _left_in_group(root="/sys/fs/cgroup"):
    """What the control group of this process, as it sees itself, has left (version 2, then 1)."""
    for limit, used in (("memory.max", "memory.current"),
                        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:
            allowed = int((Path(root) / limit).read_text())
            return max(0, allowed - int((Path(root) / used).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return None


class Memory:
    """The memory mode of one model's training step.

    ``with memory.applied(batch): loss = ...`` runs the loss in the mode, which "auto" chooses at the first batch
    from a probe of 2 and 4 of its images; ``memory.check()`` after that backward refuses what has drifted.

    Args:
        model: as TrainStep got it.
        objective: the loss, called as objective(model, *batch).
        mode, keep_every, drift_bound: as in TrainStep.
        compiled: whether the loss runs through torch.compile.

    Attributes:
        mode: the mode in force: "none", "save_z" or "invert"; "auto" before the first batch.
        saved: bytes that the first step's graph kept, or None: not seen under torch.compile and mode "none".
        drift: largest relative error of a recovered z in the first step, or None.

    Raises:
        ValueError: an argument that can't be, or a mode that this model can't run in; by name.
    """

    def __init__(self, model, objective, mode, keep_every=None, drift_bound=DRIFT_BOUND, *, compiled=False):
        if mode not in MODES:
            raise ValueError(f"memory: expected one of {', '.join(map(repr, MODES))}, got {mode!r}")
        if keep_every is not None and mode != "invert":
            raise ValueError(f"keep_every: expected None, because it belongs to memory='invert', got {keep_every!r}")
        checks.number("drift_bound", drift_bound)
        if not drift_bound > 0:
            raise ValueError(f"drift_bound: expected a positive number, got {drift_bound!r}")
        self.model, self.objective = model, objective
        self.compiled = compiled or is_compiled(model)
        self.mode, self.drift_bound = mode, drift_bound
        self.saved = self.drift = self._flow_mode = None
        self._first = True
        inner = unwrap(model)
        self._holds_steps = steps = any(getattr(module, "saves_memory", False) for module in inner.modules())
        self.why = "asked for"
        if mode in ("save_z", "invert"):
            if not steps:
                raise ValueError(f"memory: {mode!r} is for flows made of steps (flows.Compose, flows.Glow), and "
                                 f"{type(inner).__name__} holds none; use 'none'")
            if mode == "invert" and self.compiled:
                raise ValueError("memory: 'invert' can't be combined with torch.compile; use 'save_z'")
            self._flow_mode = flow_memory.Mode(mode, inner, keep_every)
        elif mode == "auto" and not steps:
            self.mode, self.why = "none", f"'auto': {type(inner).__name__} holds no sequence of flow steps"

    def applied(self, batch):
        """The mode, for the forward pass on the :class:`~fastflow.engine.batch.Batch` inside; its backward may run
        outside."""
        self.choose(batch)
        return self._applied() if self._holds_steps else contextlib.nullcontext()

    @contextlib.contextmanager
    def _applied(self):
        mode = self._flow_mode
        with flow_memory.saving(mode):
            if not self._first or mode is None or self.compiled:
                yield
            else:
                mode.drifts = [] if self.mode == "invert" else None
                with SavedBytes(unwrap(self.model)) as saved:
                    yield
                self.saved = saved.total

    def check(self):
        """After the first backward: the drift that it saw, which may not pass the bound.

        Raises:
            DriftError: it does.
        """
        if not self._first:
            return
        self.refuse_drift(agree_on=self.model)
        if self._flow_mode is not None:
            self._flow_mode.drifts = None
        self._first = False

    def refuse_drift(self, agree_on=None):
        """Raises as :meth:`check` does, and ends nothing; the processes of the model ``agree_on`` do so together."""
        drifts = self._flow_mode.drifts if self._first and self._flow_mode is not None else None
        if drifts:
            drift = torch.stack([d.to(drifts[0].device) for d in drifts]).max()
            drift = torch.where(drift.isnan(), torch.inf, drift)  # which a maximum over processes keeps
            self.drift = (drift if agree_on is None else agree(agree_on, drift)).item()
            if not self.drift <= self.drift_bound:
                raise DriftError(f"memory='invert' recovers z with a relative error of {self.drift:.1e} in the first "
                                 f"step, above drift_bound={self.drift_bound:g}; the step was not taken (keep z more "
                                 f"often with keep_every, or use memory='save_z')")

    def looked_at(self):
        """The mode in force, plain before "auto" has chosen, for a pass that leaves nothing behind here."""
        mode = self._flow_mode
        return flow_memory.saving(mode and flow_memory.Mode(mode.name, unwrap(self.model), mode.keep_every))

    def choose(self, batch):
        """Ends "auto", if that is the mode: the choice for batches like this one, the same in all processes."""
        if self.mode != "auto":
            return
        self.mode = "none"
        x, device = batch.x, next(unwrap(self.model).parameters()).device
        need, free = self._needed(batch, device), free_bytes(x.device)
        much = need is not None and free is not None and need > AUTO_SHARE * free
        found = int(agree(self.model, torch.tensor(2 if need is None else int(much), device=device)))
        if found == 2:  # the step itself will say what is wrong, with the sizes of its own batch
            if synchronizes(self.model):  # a process that then tries again would choose without the others
                self.why = "'auto': of a first batch that could not be run it was not known what activations take"
            else:
                self.mode = "auto"
            return
        if found == 1:
            self.mode = "save_z"
            self._flow_mode = flow_memory.Mode("save_z", unwrap(self.model))
        about = f"activations of {len(x)} images take about {_size(need)}"
        if free is None:
            self.why = f"'auto': {about}, and how much memory is free is not known on {x.device.type}"
        elif much:
            self.why = f"'auto': {about}, more than a quarter of the {_size(free)} that are free"
        else:
            self.why = f"'auto': {about}, within a quarter of the {_size(free)} that are free"
        if found > much:
            self.why += "; those of another process take more than a quarter of what it has"

    def _needed(self, batch, device):
        """Bytes that the activations of a plain pass take, or None where there is none. All processes run it on as
        many images, for a forward may talk to others: that of a sharded model to gather parameters."""
        inner = unwrap(self.model)
        least = -int(agree(self.model, torch.tensor(-len(batch.x), device=device)))
        part = batch.map(lambda tensor: tensor[:least])
        try:
            with measured.paused(), contextlib.nullcontext() if is_sharded(self.model) else alone(inner):
                rate, rest = per_image(lambda *rows: self.objective(inner, *rows)[0], inner, *part)
        except (TypeError, ValueError):
            return None
        return rest + rate * len(batch.x)

    def explain(self):
        """One line: the mode, why, and what the first step has shown."""
        if self.mode == "auto":
            return "auto: chosen at the first batch, 'save_z' if activations would take a quarter of free memory"
        what = {"none": "every activation is kept for backward",
                "save_z": "each step's input is kept, its conditioner runs again in backward",
                "invert": "z is recovered in backward by inverting the steps"}[self.mode]
        if self.mode == "invert":
            every = self._flow_mode.keep_every
            what += ", kept at the end alone" if every is None else f", kept every {every} couplings"
        parts = [f"{self.mode}: {what} ({self.why})"]
        if self.saved is not None:
            parts.append(f"{_size(self.saved)} kept in the first step")
        if self.drift is not None:
            parts.append(f"drift {self.drift:.1e}, bound {self.drift_bound:g}")
        return "; ".join(parts)


def _size(n):
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.3g} {unit}"
    return f"{n:.0f} bytes"
