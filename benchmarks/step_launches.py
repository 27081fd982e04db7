"""The launches of a whole Glow training step by class of work, counted without a GPU.

    python -m benchmarks.step_launches      Glow L=3, K=32: 3x32x32, hidden 512, batch 64, and the neutral one beside it

A launch is an aten operation that is neither a view nor an allocation, or what an operator of fastflow declares
(:mod:`fastflow.launches`). Real launches are more where one aten operation is several kernels (a convolution's backward
is two or three), for all models alike. Counts depend neither on sizes nor on the batch, so that tiny models are
counted, and are linear in the number of steps, so that K is reached from small ones.
"""

import collections
import itertools
import math
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import counting
from benchmarks.neutral_glow import ActNorm as NeutralActNorm
from benchmarks.neutral_glow import Conv1x1, NeutralGlow
from benchmarks.neutral_glow import Coupling as NeutralCoupling
from fastflow import backends, flows, launches
from fastflow.engine import TrainStep
from fastflow.nn import AffineCoupling

CONV, CONDITIONER = "conv/GEMM", "conditioner element-wise"
COUPLING, SPLIT, ACTNORM, CONV1X1, OTHER = "coupling", "split/cat", "actnorm", "1x1 + slogdet", "squeeze, prior, other"
OPTIMIZER = "optimizer"
CLASSES = (CONV, CONDITIONER, COUPLING, SPLIT, ACTNORM, CONV1X1, OTHER, OPTIMIZER)
FLOW = (COUPLING, SPLIT, ACTNORM, CONV1X1, OTHER)

# Neither work nor a launch: they allocate, alias, read metadata or, in eager mode, return their input.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "promote_types",
        "_unsafe_view", "_reshape_alias", "lift_fresh", "_record_function_enter_new", "_record_function_exit",
        "_local_scalar_dense", "resize_"}
GEMM = {"convolution", "convolution_backward", "addmm", "mm", "bmm", "baddbmm"}
UPDATES = ("engine/adam.py", "engine/update.py", "engine/ema.py")
MOVES = {"cat", "stack", "copy_", "clone", "slice_backward", "select_backward", "_to_copy"}


def flow_specific(counts):
    """Launches that a plain network of the same convolutions would not have."""
    return sum(counts[name] for name in FLOW)


class StepCounter(TorchDispatchMode):
    """Counts launches by class. A forward's class comes from the modules and files on the stack; a backward's from its
    node's forward. A sum of gradients at a branch counts where the last of them was computed."""

    def __init__(self, model):
        super().__init__()
        self.counts = collections.Counter()
        self.operators = collections.Counter()
        self._of_node = {}
        self._conditioners = {id(module): CONDITIONER for owner in model.modules()
                              for module in _conditioner_of(owner).modules()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        node = torch._C._current_autograd_node()
        if node is None:
            kind = self._class_on_stack()
            self._of_node.setdefault(torch._C._autograd._get_sequence_nr() - 1, kind)
        else:
            kind = self._class_of(node)
        name = func._schema.name.partition("::")[2]
        if not (func.is_view or name in FREE or func.namespace.startswith("fastflow")):
            self.add(kind, name)
        return func(*args, **(kwargs or {}))

    def add(self, kind, name, launches=1):
        if kind == CONDITIONER and name in GEMM:
            kind = CONV
        elif kind == COUPLING and name in MOVES:
            kind = SPLIT
        self.counts[kind] += launches
        self.operators[kind, name] += launches

    def _class_of(self, node):
        if "AccumulateGrad" in node.name():
            return OPTIMIZER
        if "_Seen" in node.name():  # the conditioner's gradient joins the coupling's, as at any branch
            return CONDITIONER
        number = node._sequence_nr()
        while number >= 0 and number not in self._of_node:
            number -= 1
        return self._of_node.get(number, OTHER)

    def _class_on_stack(self):
        frame, found = sys._getframe(2), OTHER
        while frame is not None:
            owner, file = frame.f_locals.get("self"), frame.f_code.co_filename
            if id(owner) in self._conditioners:
                return CONDITIONER
            if isinstance(owner, torch.optim.Optimizer) or "clip_grad" in file or file.endswith(UPDATES):
                return OPTIMIZER
            if file.endswith(("nn/factors.py", "nn/invertible_conv.py", "nn/channel_affine.py")):
                return CONV1X1
            if found == OTHER:
                found = _class_of_module(owner)
            frame = frame.f_back
        return found


def _conditioner_of(module):
    if isinstance(module, AffineCoupling):
        return module.conditioner
    return module.net if isinstance(module, NeutralCoupling) else torch.nn.ModuleList()


def _class_of_module(owner):
    kinds = ((AffineCoupling, COUPLING), (NeutralCoupling, COUPLING), (NeutralActNorm, ACTNORM), (Conv1x1, CONV1X1))
    return next((kind for known, kind in kinds if isinstance(owner, known)), OTHER)


def count(model, step):
    """The StepCounter of one call of ``step``, after one that warms it up."""
    counter = StepCounter(model)
    with counting.as_on_a_gpu():
        step()
        with launches.count() as ours, counter:
            step()
    split_priors = sum(isinstance(m, flows.Split) and m.prior is not None for m in model.modules())
    for name, number in ours.by_operator.items():
        if name.startswith("affine_coupling"):
            counter.add(OTHER, name, split_priors)
            counter.add(COUPLING, name, number - split_priors)
        else:
            kinds = {"conv_net": CONV, "slogdet": CONV1X1, "plu_weight": CONV1X1}
            counter.add(next((kind for stem, kind in kinds.items() if name.startswith(stem)), OTHER), name, number)
    return counter


def of_fastflow(n_steps, n_levels=3, parametrization="plain", **options):
    """The StepCounter of TrainStep on uint8 images with fused Adam; ``options`` are TrainStep's. With so many hidden
    channels conditioners run in a kernel here as on a GPU, where they are other launches."""
    side = 2 * 2**n_levels
    model = flows.Glow((3, side, side), n_levels, n_steps, hidden_channels=backends.CONV_NET_HIDDEN,
                       parametrization=parametrization)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    step = TrainStep(model, optimizer, **options)
    x = torch.randint(256, (2, 3, side, side), dtype=torch.uint8)
    return count(model, lambda: step(x))


def of_neutral(n_steps, n_levels=3):
    """The same of the plain eager model, written as its user would, with PyTorch's foreach Adam."""
    side = 2 * 2**n_levels
    model = NeutralGlow((3, side, side), n_levels, n_steps, hidden_channels=4)
    optimizer = torch.optim.Adam(model.parameters(), foreach=True)
    x = torch.randint(256, (2, 3, side, side), dtype=torch.uint8)

    def step():
        optimizer.zero_grad(set_to_none=True)
        noisy = (x.float() + torch.rand(x.shape)) / 256 - 0.5
        loss = -(model(noisy).mean() - x[0].numel() * math.log(256))
        loss.backward()
        optimizer.step()
    return count(model, step)


def extrapolated(build, n_steps, **options):
    """{class: launches} at ``n_steps``, exact because each step adds the same: counted at 1 and 2 steps.

    Raises:
        RuntimeError: a third count does not lie on the line.
    """
    one, two, three = (build(k, **options).counts for k in (1, 2, 3))
    bent = [name for name in CLASSES if three[name] - two[name] != two[name] - one[name]]
    if bent:
        raise RuntimeError(f"launches are not linear in the number of steps: {bent}")
    return collections.Counter({name: one[name] + (n_steps - 1) * (two[name] - one[name]) for name in CLASSES})


def rows(n_steps=32):
    """[(what, counts)] of the table."""
    made = [("neutral eager, foreach Adam", extrapolated(of_neutral, n_steps))]
    for parametrization, clip in itertools.product(("plain", "plu"), (None, 1.0)):
        options = {"check_finite": False} if clip is None else {"clip_grad_norm": clip}
        name = f"fastflow, {parametrization}" + ("" if clip is None else ", clipped and checked")
        made.append((name, extrapolated(of_fastflow, n_steps, parametrization=parametrization, **options)))
    return made


def main(n_steps=32):
    print(f"Glow L=3, K={n_steps}: launches per training step")
    print("| model | " + " | ".join(CLASSES) + " | flow-specific | all |")
    print("|---" * (len(CLASSES) + 3) + "|")
    for name, counts in rows(n_steps):
        cells = [counts[c] for c in CLASSES] + [flow_specific(counts), counts.total()]
        print(f"| {name} | " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
