"""FrEIA: AllInOneBlock and the coupling blocks, by themselves and inside SequenceINN and GraphINN. Data to noise, with
``rev`` noise to data. ``jac`` changes nothing in what a block returns."""

import functools

import torch
import torch.nn.functional as F
from FrEIA.framework import sequence_inn
from FrEIA.modules import all_in_one_block, coupling_layers
from torch import nn

from fastflow import functional
from fastflow.adapters.freia_couplings import TwoSided, couple, reverse, small_networks
from fastflow.adapters.layers import fusable, joins, plain, remembered, reorder, worthwhile
from fastflow.adapters.networks import evaluate
from fastflow.adapters.swap import swap
from fastflow.autograd import chain
from fastflow.autograd.mlp_flow import run_steps
from fastflow.functional import ScaleMap


def _clamps(block):
    """Whether a kernel can have the block's clamp."""
    return isinstance(block.clamp, (int, float))


@functools.lru_cache(256)
def _all_in_one(clamp):
    """log s = clamp * tanh(0.1 r), shift 0.1 t: FrEIA 0.2 does not divide by the clamp inside."""
    return ScaleMap("tanh", gain=0.1, clamp=1.0, out_gain=clamp, shift_gain=0.1)


def _order(matrix):
    """(order, its inverse) with W x = x[order] if W is a permutation matrix, else None."""
    order, back = _hard(matrix)
    one_hot = F.one_hot(order, len(order)).to(matrix.dtype)
    return (order, back) if torch.equal(matrix.flatten(1), one_hot) and len(order.unique()) == len(order) else None


def _hard(matrix):
    """(order, its inverse) of a permutation matrix."""
    order = matrix.flatten(1).argmax(1)
    return order, torch.argsort(order)


def _fit_all_in_one(module, fix):
    if not _clamps(module):
        return "its clamp is not a number"
    if not module.householder:
        _order_of(module)
    return None


def _scalings(blocks):
    """The global affine map of each block, of blocks whose scales go through one function: computed together."""
    scale = blocks[0].global_scale_activation(torch.cat([block.global_scale for block in blocks]))
    offset = torch.cat([block.global_offset for block in blocks])
    return [functional.ChannelAffine(*pair) for pair in zip((offset / scale).unbind(), torch.log(scale).unbind(),
                                                            strict=True)]


def _order_of(module):
    if module.householder:
        return None
    return remembered(module, "order", _order, module.w_perm, traced=_hard, maybe=True)


@swap(all_in_one_block.AllInOneBlock, methods=("forward",), fit=_fit_all_in_one, opposite=reverse)
class AllInOneBlock(all_in_one_block.AllInOneBlock):
    """Coupling, global affine map and permutation; a hard permutation moves channels instead of multiplying."""

    def forward(self, x, c=(), rev=False, jac=True):
        (x,) = x
        if not fusable(x, self.global_scale) or not _clamps(self):
            return super().forward((x,), c, rev, jac)
        steps = self._fastflow_steps(x, c)
        if steps is None and not worthwhile(x):
            return super().forward((x,), c, rev, jac)
        if self.householder:
            self.w_perm = self._construct_householder_permutation()
            if rev or self.reverse_pre_permute:
                self.w_perm_inv = self.w_perm.transpose(0, 1).contiguous()
        order = _order_of(self)
        if steps is not None:
            context = c[0] if self.conditional else None
            if order is not None:
                y, logdet = run_steps(x, self._fastflow_permuted(steps, order), context, bool(rev))
                return (y,), logdet
            if rev or self.reverse_pre_permute:
                x = self._fastflow_permute(x, order, True)
            y, logdet = run_steps(x, steps, context, bool(rev))
            if not rev or self.reverse_pre_permute:
                y = self._fastflow_permute(y, order, False)
            return (y,), logdet
        scale = total = None
        if not self.GIN:
            scale = self.global_scale_activation(self.global_scale)
            total = torch.log(scale).sum() * x[0, :1].numel()
        if rev:
            x = self._fastflow_permute(x, order, True) - self.global_offset
            x = x if scale is None else x / scale
        elif self.reverse_pre_permute:
            x = self._fastflow_permute(x, order, True)
        x1, x2 = torch.split(x, self.splits, dim=1)
        params = evaluate(self.subnet, torch.cat([x1, *c], 1) if self.conditional else x1)
        y, logdet = self._fastflow_couple(x1, x2, params, rev)
        if rev:
            if self.reverse_pre_permute:
                y = self._fastflow_permute(y, order, False)
        else:
            y = y + self.global_offset if scale is None else torch.addcmul(self.global_offset, y, scale)
            y = self._fastflow_permute(y, order, False)
        if total is not None:
            logdet = logdet - total if rev else logdet + total
        return (y,), logdet

    def _fastflow_steps(self, x, c, scaling=None):
        """Coupling and global affine map as steps of one kernel, or None. scaling: the latter, if known."""
        found = None if self.GIN or x.dim() != 2 or x.shape[1] % 2 else small_networks(self, x, c, (self.subnet,))
        if found is None:
            return None
        weights, biases, activation = found[0]
        return (functional.MLPCoupling(weights, biases, activation=activation, scale=_all_in_one(self.clamp)),
                scaling or _scalings([self])[0])

    def _fastflow_permuted(self, steps, order):
        """The steps with the permutations around them."""
        first = [functional.Permutation(order[1])] if self.reverse_pre_permute else []
        return [*first, *steps, functional.Permutation(order[0])]

    def _fastflow_permute(self, x, order, inverse):
        if order is None:
            return self.permute_function(x, self.w_perm_inv if inverse else self.w_perm)
        return reorder(x, *order[::-1]) if inverse else reorder(x, *order)

    def _fastflow_couple(self, x1, x2, params, rev):
        scale = _all_in_one(self.clamp)
        if self.GIN:
            raw, shift = params.chunk(2, 1)
            log_scale = self.clamp * torch.tanh(0.1 * raw)
            params, scale = (log_scale - log_scale.mean(self.sum_dims, keepdim=True), 0.1 * shift), "exp"
        return couple(x2, params, scale, rev, None, x1)


def _kind(block):
    """Which of FrEIA's own functions a block's scale goes through; None where it is another one, or has a module with
    hooks in it, which would miss a block."""
    function = block.global_scale_activation
    if getattr(function, "__module__", None) != all_in_one_block.__name__:
        return None
    softplus = block._modules.get("softplus")
    if softplus is None:
        return function.__code__, None, None
    return (function.__code__, softplus.beta, softplus.threshold) if plain(softplus, nn.Softplus) else None


def _alike(blocks):
    """Whether the blocks' scales go through one function."""
    kinds = {_kind(block) for block in blocks}
    return len(kinds) == 1 and None not in kinds


TWO_SIDED = (coupling_layers.GLOWCouplingBlock, coupling_layers.RNVPCouplingBlock, coupling_layers.GINCouplingBlock,
             coupling_layers.NICECouplingBlock)
VOLUME_PRESERVING = (coupling_layers.GINCouplingBlock, coupling_layers.NICECouplingBlock)


def _fit_sequence(module, fix):
    kinds = [isinstance(block, (all_in_one_block.AllInOneBlock, *TWO_SIDED)) for block in module.module_list]
    pairs = any(a and b for a, b in zip(kinds, kinds[1:], strict=False))
    return None if pairs else "no two of its blocks in a row go together"


def _chained(steps):
    """Whether they are of autograd.chain, in the order in which they run, and not of one kernel."""
    return isinstance(steps[0], chain.Step)


def _reverse_sequence(method, args, kwargs, result):
    names = ("x_or_z", "c", "rev", "jac")
    call = dict(zip(names, args, strict=False)) | kwargs
    return method, (), call | {"x_or_z": result[0], "rev": not call.get("rev", False)}


@swap(sequence_inn.SequenceINN, methods=("forward",), fit=_fit_sequence, opposite=_reverse_sequence)
class SequenceINN(sequence_inn.SequenceINN):
    """Blocks in a row whose networks are small, and their permutations, as one kernel or one node of autograd; the
    others one by one."""

    def forward(self, x_or_z, c=None, rev=False, jac=True):
        x = x_or_z if torch.is_tensor(x_or_z) else x_or_z[0]
        runs = self._fastflow_runs(x, c, rev)
        if not any(steps for steps, *_ in runs):
            return super().forward(x_or_z, c, rev, jac)
        x, total = (x,), 0
        for steps, index, context, keeps_volume in reversed(runs) if rev else runs:
            if steps is not None:
                y, logdet = (chain.run(x[0], steps) if _chained(steps) else
                             run_steps(x[0], steps, context, bool(rev)))
                x, logdet = (y,), 0.0 if logdet is None or keeps_volume else logdet
            else:
                given = {} if self.conditions[index] is None else {"c": [c[self.conditions[index]]]}
                x, logdet = self.module_list[index](x, jac=jac, rev=rev, **given)
            total = logdet + total
        return x if self.force_tuple_output else x[0], total

    def _fastflow_runs(self, x, c, rev):
        """(steps, None, context, whether all its blocks keep volume, whose log-det is the number 0) of each run of
        blocks and (None, index, None, False) of those that stay by themselves."""
        blocks = list(self.module_list)
        same = [tuple(self.shapes[index]) == x.shape[1:] for index in range(len(blocks))]
        whole = [fits and isinstance(block, AllInOneBlock) and joins(block) and not block.GIN
                 and _clamps(block) and _order_of(block) is not None for fits, block in zip(same, blocks, strict=True)]
        scaled = [block for block, fits in zip(blocks, whole, strict=True) if fits]
        together = x.dim() == 2 and len(scaled) > 1 and _alike(scaled)
        scalings = dict(zip(scaled, _scalings(scaled), strict=True)) if together else {}
        runs, last = [], None
        for index, (block, condition) in enumerate(zip(blocks, self.conditions, strict=True)):
            context = () if condition is None else (c[condition],)
            steps = None
            if whole[index]:
                steps = block._fastflow_steps(x, context, scalings.get(block))
                steps = steps and block._fastflow_permuted(steps, _order_of(block))
            elif same[index] and isinstance(block, TwoSided) and joins(block):
                steps = block._fastflow_steps(x, context) or block._fastflow_chain(x, rev)
            keeps_volume = steps is not None and isinstance(block, VOLUME_PRESERVING)
            if (steps is not None and runs and runs[-1][0] is not None and last == condition
                    and _chained(steps) == _chained(runs[-1][0])):
                known = runs[-1][0]
                known[:] = [*steps, *known] if rev and _chained(steps) else [*known, *steps]
                runs[-1] = (*runs[-1][:3], keeps_volume and runs[-1][3])
            else:
                runs.append((steps and list(steps), None if steps else index, context[0] if context else None,
                             keeps_volume))
            last = condition
        return runs
