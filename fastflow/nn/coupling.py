"""What couplings of every kind share: part of the input decides, by way of a conditioner, what the rest becomes."""

import torch
from torch import nn

from fastflow import checks
from fastflow.nn.masks import checkerboard, partition
from fastflow.reference.layout import memory_format_of

__all__ = ["Coupling"]


class Coupling(nn.Module):
    """The split into a passive and an active part, both directions, and masks.

    A kind of coupling adds ``params_per_channel`` and either ``_elementwise``, for params that lie side by side for
    each channel, or ``_couple_channels``, ``_transform`` and ``_select``.

    Args:
        conditioner: module, called with the passive part, and with the context as second argument if one is given.
        split: "channel", "checkerboard", the indices of the passive channels (a list, tuple or range) or a mask of
            zeros and ones. Indices and masks are kept as buffers, so that a state dict brings its own, be it one of
            another number of ones: the first half of a random permutation makes a permuted split. One without the mask
            loads as well, and leaves the layer's.
        flip: exchanges the two parts.
    """

    def __init__(self, conditioner, split, flip):
        super().__init__()
        self.conditioner = conditioner
        self.flip = bool(flip)
        mask = index = None
        if isinstance(split, (list, tuple, range)):
            index, self.split = list(split), "index"
            if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in index) or len({*index}) < len(index):
                raise ValueError(f"split: expected indices of channels, each once, got {split!r}")
            index = torch.tensor(index, dtype=torch.int64)
        elif isinstance(split, torch.Tensor):
            mask, self.split = _bools("split", split), "mask"
        else:
            checks.choice("split", split, ("channel", "checkerboard"))
            self.split = split
        self.register_buffer("mask", mask)
        self.register_buffer("index", index)
        self.mask_ones = self.index_end = 0
        self._count()

    def forward(self, x, context=None, *, logdet=None):
        """(z, logdet) of x (B, C, *S): data to noise. A running ``logdet`` (B,) is added to the result."""
        return self._run(x, context, False, logdet)

    def inverse(self, z, context=None, *, logdet=None):
        """(x, logdet) of z: noise to data."""
        return self._run(z, context, True, logdet)

    def recompute(self, z, context=None, *, needs=True, dtype=None):
        """The x that forward made z of, and on the way forward's graph, as far as it holds what backward needs.

        Params depend on the passive part alone, which z holds unchanged, so one run of the conditioner serves the
        inverse and the graph. For passes that keep no activations (flows.memory): the graph hangs on nothing.

        Args:
            z: (B, C, *S) as forward returned it.
            needs: whether forward's x required a gradient.
            dtype: of forward's x; None for z's.
        """
        with torch.enable_grad():
            known = z.detach().requires_grad_(needs)
            parts = self._parts(known)
            params = self._condition(known, parts, context)
            with torch.no_grad():
                x = self._couple(z, parts, params, True, None)[0].to(z.dtype if dtype is None else dtype)
            x_leaf = x.detach().requires_grad_(needs)
            self._couple(x_leaf, self._parts(x_leaf), params, False, None)
        return x

    def _count(self):
        """What is known of mask and index without a look at the device: the ones, and the channels that it takes."""
        if self.mask is not None and not self.mask.is_meta:
            self.mask_ones = int(self.mask.sum())
        if self.index is not None and not self.index.is_meta:
            self.index_end = max(self.index.tolist(), default=-1) + 1

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        key = prefix + "mask"
        if self.mask is not None and isinstance(state_dict.get(key), torch.Tensor):
            try:
                state_dict[key] = _bools(key, state_dict[key])
            except ValueError as error:
                errors.append(str(error))
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if key in missing:  # of before masks were kept
            missing.remove(key)
        self._count()

    def _couple_channels(self, x, parts, params, inverse, logdet):
        """(y, logdet) of x, whose passive and active channels are ``parts``."""
        passive, active = parts
        channels = active.shape[1] * self.params_per_channel
        checks.tensor("conditioner output", params)
        checks.shape("conditioner output", params, (x.shape[0], channels, *x.shape[2:]))
        y, logdet = self._transform(active, params, inverse, logdet, None if self.flip else passive)
        return torch.cat([y, passive.to(y.dtype)], 1) if self.flip else y, logdet

    def _transform(self, x, params, inverse, logdet, passive):
        """(y, logdet) of the active elements x, behind ``passive`` along dim 1 if there is one."""
        y, logdet = self._elementwise(x, params, inverse, logdet)
        return y if passive is None else torch.cat([passive.to(y.dtype), y], 1), logdet

    def _elementwise(self, x, params, inverse, logdet):
        """(y, logdet) of the active elements x."""
        raise NotImplementedError

    def _select(self, params, active):
        """The params (B, C * params_per_channel, *S) of the elements with these indices of the flattened C*S."""
        per_element = params.unflatten(1, (-1, self.params_per_channel)).movedim(2, -1)
        return per_element.flatten(1, -2).index_select(1, active).flatten(1)

    def _run(self, x, context, inverse, logdet):
        checks.tensor("x", x)
        if x.dim() < 2:
            raise ValueError(f"x: expected shape (B, C, *S), got {tuple(x.shape)}")
        parts = self._parts(x)
        return self._couple(x, parts, self._condition(x, parts, context), inverse, logdet)

    def _parts(self, x):
        """The channels (passive, active) of x; None where a mask tells them apart."""
        if self.split == "index":
            order, _ = self._order(x)
            parts = x.index_select(1, order).split([len(self.index), x.shape[1] - len(self.index)], 1)
            return parts[::-1] if self.flip else parts
        if self.split != "channel":
            return None
        half = x.shape[1] // 2
        first, second = torch.split(x, [half, x.shape[1] - half], 1)
        return (second, first) if self.flip else (first, second)

    def _order(self, x):
        """The channels with the indexed ones in front, and the way back."""
        if x.shape[1] < self.index_end:
            raise ValueError(f"x: expected at least {self.index_end} channels for the indices of split, got shape "
                             f"{tuple(x.shape)}")
        first = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device).index_fill_(0, self.index, True)
        order = torch.cat([self.index, partition(first)[0][len(self.index):]])
        return order, torch.argsort(order)

    def _condition(self, x, parts, context):
        """The params, of x or of z: the conditioner sees what both have in common."""
        seen = parts[0] if parts is not None else torch.where(self._passive(x)[0], x, torch.zeros_like(x))
        seen = self._encode(seen)
        return self.conditioner(seen) if context is None else self.conditioner(seen, context)

    def _encode(self, seen):
        """The passive part as the conditioner sees it."""
        return seen

    def _couple(self, x, parts, params, inverse, logdet):
        if parts is None:
            return self._couple_masked(x, params, inverse, logdet)
        if self.split == "index":
            y, logdet = self._transform(parts[1], params, inverse, logdet, None)
            parts = (y, parts[0].to(y.dtype)) if self.flip else (parts[0].to(y.dtype), y)
            return torch.cat(parts, 1).index_select(1, self._order(x)[1]), logdet
        return self._couple_channels(x, parts, params, inverse, logdet)

    def _couple_masked(self, x, params, inverse, logdet):
        passive, count = self._passive(x)
        channels = x.shape[1] * self.params_per_channel
        checks.tensor("conditioner output", params)
        checks.shape("conditioner output", params, (x.shape[0], channels, *x.shape[2:]))
        # The active elements are gathered, so that the log-determinant counts them alone whatever the map.
        if x.dim() > 2 and passive.shape[0] == 1:
            order, restore = partition(passive.expand(1, *x.shape[2:]))
            values = x.flatten(2).index_select(2, order)
            y, logdet = self._transform(values[..., count:], params.flatten(2).index_select(2, order[count:]), inverse,
                                        logdet, None)
            z = torch.cat([values[..., :count].to(y.dtype), y], 2).index_select(2, restore)
        else:
            order, restore = partition(passive.expand(x.shape[1:]))
            values, active = x.flatten(1).index_select(1, order), order[count:]
            y, logdet = self._transform(values[:, count:], self._select(params, active), inverse, logdet,
                                        values[:, :count])
            z = y.index_select(1, restore)
        return z.view(x.shape).contiguous(memory_format=memory_format_of(x)), logdet

    def _passive(self, x):
        """(mask, count): passive places as (1 or C, *S), broadcasting, and their number: of the S positions if the mask
        has one row for all channels, else of the C*S elements."""
        event = tuple(x.shape[1:])
        if self.split == "checkerboard":
            spatial = event[1:] or event
            mask = checkerboard(spatial, x.device)
            size = mask.numel()
            ones = (size + 1) // 2
            mask = mask[None] if event[1:] else mask
        else:
            mask = self.mask
            if mask.dim() == x.dim() and mask.shape[0] == 1:
                mask = mask[0]
            mask = mask.view((1,) * (len(event) - mask.dim()) + tuple(mask.shape))
            # Not `in`: Dynamo takes a size that it knows by a symbol for none of them.
            if mask.dim() != len(event) or any(m != 1 and m != e for m, e in zip(mask.shape, event, strict=False)):
                raise ValueError(f"x: expected x.shape[1:] to go with the mask {tuple(self.mask.shape)}, got {event}")
            size = 1
            for dim in (event[1:] if len(event) > 1 and mask.shape[0] == 1 else event):
                size *= dim
            ones = self.mask_ones * size // mask.numel()
        return (~mask, size - ones) if self.flip else (mask, ones)


def _bools(name, mask):
    """The ``mask`` of zeros and ones as one of bools."""
    values = mask.detach()
    bools = values != 0
    if not (values.is_meta or torch.equal(bools.to(values.dtype), values)):
        raise ValueError(f"{name}: expected a mask of zeros and ones, got other values")
    return bools
