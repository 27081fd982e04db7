"""The buffers that a pass moves (running statistics, counters), as a second run of its steps has to find them."""

import contextlib
import dataclasses

import torch
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["MovingBuffers"]

STILL = ("fastflow.nn.", "fastflow.flows.")  # whose modules move no buffer in a pass
VERSIONED = ("torch.",)  # whose modules that are looked at here move buffers in sight of the version counters


@dataclasses.dataclass(slots=True, eq=False)
class _Kept:
    """A buffer at one time: the tensor, its version, and a copy; None where the module had none."""

    tensor: torch.Tensor | None
    version: int
    value: torch.Tensor | None

    def is_still(self, tensor):
        return tensor is self.tensor and _version(tensor) == self.version


def _version(tensor):
    return -1 if tensor is None else tensor._version


def _kept(tensor):
    return _Kept(tensor, _version(tensor), _copy(tensor))


def _copy(tensor):
    return None if tensor is None else tensor.detach().clone()


class _Pass:
    """What is kept during one: of ``followed`` places the last copies, of all others the versions."""

    def __init__(self, followed, others):
        self.followed, self.others = followed, others
        self.first, self.last = {}, {}  # copies by place


class MovingBuffers:
    """Which buffers of a model the passes move, and copies of them for the steps of the pass in progress.

    The first pass that a module goes through in training shows it, and so its buffers are copied then. Later passes
    copy those alone that have been seen to move. Tensors that were exchanged and version counters tell of most; what
    foreign modules write past these (``.data``, F.batch_norm) a comparison of values does, once.

    Args:
        model: the nn.Module.
        apart: {(id of a module, name of a buffer)} that are seen to elsewhere.
        flags: whether boolean buffers count. They say that something has been done once, in the first pass.
    """

    def __init__(self, model, apart, flags=True):
        self._places = [
            (where, module, name) for where, module in model.named_modules()
            for name, buffer in module._buffers.items()
            if not type(module).__module__.startswith(STILL) and (id(module), name) not in apart
            and (flags or buffer is None or buffer.dtype != torch.bool)]
        self._unseen = set(range(len(self._places)))
        self._moving, self._unversioned = set(), set()
        self._pass = None

    def named(self, place):
        """(name of the module, module, name of the buffer)."""
        return self._places[place]

    def step(self):
        """A :class:`_Step` that begins here, in the pass in progress or the one that begins with it."""
        if self._pass is None and self._places:
            training = {i for i in self._unseen if self._places[i][1].training}
            followed = sorted(self._moving | training)
            others = {i: self._read(i) for i in set(range(len(self._places))).difference(followed)}
            self._pass = _Pass(followed, {i: (tensor, _version(tensor)) for i, tensor in others.items()})
        return _Step(self, self._copies() if self._places else {})

    def close(self):
        """Ends the pass in progress. Returns the places that it has moved past the version counters."""
        ended, self._pass = self._pass, None
        if ended is None:
            return set()
        self._moving |= {i for i, (tensor, version) in ended.others.items()
                         if self._read(i) is not tensor or _version(tensor) != version}
        found = set()
        for i in self._unseen.intersection(ended.followed):
            known = self._is_versioned(i) or self._equal(i, ended.first[i])
            if known is None:
                continue  # the next pass will tell
            self._unseen.discard(i)
            if known is False and not self._is_flag(i):
                found.add(i)
        self._unversioned |= found
        self._moving |= found
        return found

    def floating(self, places):
        """Those of the places whose buffers hold floating-point numbers, in order."""
        return sorted(i for i in places if (tensor := self._read(i)) is not None and tensor.is_floating_point())

    def _read(self, place):
        _, module, name = self._places[place]
        return module._buffers.get(name)

    def _is_versioned(self, place):
        return type(self._places[place][1]).__module__.startswith(VERSIONED)

    def _is_flag(self, place):
        tensor = self._read(place)
        return tensor is not None and tensor.dtype == torch.bool

    def _equal(self, place, kept):
        """Whether a buffer that looks untouched is what it was; None where its values can't be read."""
        now, before = self._read(place), kept.value
        if now is None or not kept.is_still(now):
            return True  # seen to move without this
        if now.is_meta or isinstance(before, FakeTensor) or now.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        now = now.detach()
        return now.shape == before.shape and bool(((now == before) | (now != now) & (before != before)).all())

    def _copies(self):
        """{place: _Kept} of the followed places now; what has not moved since it was last copied isn't again."""
        last = self._pass.last
        for i in self._pass.followed:
            tensor = self._read(i)
            if i not in last or not last[i].is_still(tensor) or self.may_move_unseen(i):
                last[i] = _kept(tensor)
                self._pass.first.setdefault(i, last[i])
        return dict(last)

    def may_move_unseen(self, place):
        """Whether a step may move it past its version counter."""
        return place in self._unversioned or place in self._unseen and not self._is_versioned(place)

    def moved_by(self, before):
        """The places that are no longer as in ``before``, from now on followed."""
        moved = {i for i, kept in before.items() if not kept.is_still(self._read(i))}
        self._moving |= {i for i in moved if not self._is_flag(i)}
        return moved

    @contextlib.contextmanager
    def as_in(self, before, moved):
        """Buffers have the values that they had ``before``, and afterwards are the tensors that they were, untouched:
        autograd may have saved them."""
        now, own = {}, {}
        for i in self._moving.union(before):
            tensor, kept = self._read(i), before.get(i)
            if kept is None:  # first seen to move in that pass
                value = own.setdefault(id(tensor), _copy(tensor))
            elif i in moved or self.may_move_unseen(i):
                if id(kept.tensor) not in own:
                    own[id(kept.tensor)] = _copy(kept.value)
                value = own[id(kept.tensor)]  # modules may share a buffer
            elif kept.is_still(tensor):
                continue
            else:
                value = kept.value
            now[i] = tensor
            self._places[i][1]._buffers[self._places[i][2]] = value
        try:
            yield
        finally:
            for i, tensor in now.items():
                self._places[i][1]._buffers[self._places[i][2]] = tensor


class _Step:
    """What one step of a pass found and moved."""

    def __init__(self, buffers, before):
        self.buffers, self.before, self.moved = buffers, before, set()

    def end(self):
        """The step has run. Returns the places that it was seen to move."""
        if self.before:
            self.moved = self.buffers.moved_by(self.before)
        return self.moved

    def again(self):
        """A context for its second run."""
        return self.buffers.as_in(self.before, self.moved)
