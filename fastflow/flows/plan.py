"""What :mod:`fastflow.flows.fused` found out about a sequence of layers, kept from call to call.

Looking at every layer anew costs more than a small flow itself takes. What is kept is checked at each call against
what it was read from: the modules and their classes, their hooks, methods and attributes, the shapes of the parameters.
The parameters themselves are read anew each time, so that functional_call, an optimiser or load_state_dict have nothing
to invalidate.
"""

import itertools
import operator

from fastflow.autograd.mlp_flow import program, run_program
from fastflow.functional import ScaleMap
from fastflow.nn import MLP, ActNorm, AffineCoupling

__all__ = ["Call", "Plan", "keep", "kept"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
READ = {AffineCoupling: operator.attrgetter("split", "flip", "scale", "layout", "order", "shift_first"),
        MLP: operator.attrgetter("context_features"), ActNorm: operator.attrgetter("channels")}
METHODS = frozenset(("forward", "inverse"))
PLANS = "_fastflow_plans"  # an attribute of the nn.ModuleList: {what the operands are: Plan}
_DTYPE, _SHAPE = operator.attrgetter("dtype"), operator.attrgetter("shape")
_HOOKS = operator.itemgetter(*HOOKS)


class _Plans(dict):
    """It is not copied or pickled with the modules."""

    def __deepcopy__(self, memo):
        return _Plans()

    def __reduce__(self):
        return _Plans, ()


class Plan:
    """One kernel for all ``transforms``, as long as :meth:`holds`.

    Args:
        transforms: nn.ModuleList of couplings and ActNorms.
        steps: what they are to functional.mlp_flow.
        dtype: of every parameter.
        save: what forward keeps, see :func:`fastflow.autograd.mlp_flow.run_steps`.
    """

    def __init__(self, transforms, steps, dtype, save):
        self.dtype, self.save = dtype, save
        params, self.code, self.constants = program(steps)
        found = list(transforms.modules())
        self.modules = found[1:]
        self.kinds = list(map(type, self.modules))
        self.owns = [m.__dict__ for m in self.modules]
        self.parents = [m.__dict__ for m in found if m._modules]
        self.children = self._children()
        self.read = [(READ[type(m)], m, READ[type(m)](m)) for m in self.modules if type(m) in READ]
        slots = {id(p): (m.__dict__, name) for m in self.modules for name, p in m._parameters.items()}
        self.slots = [slots[id(p)] for p in params]
        self.shapes = list(map(_SHAPE, params))
        # A parameter that two layers share may stop being shared; then one place would stand for both.
        self.certain = len({id(p) for p in params}) == len(params)

    def _children(self):
        return list(itertools.chain.from_iterable([own["_modules"].values() for own in self.parents]))

    def holds(self):
        """Whether the layers still are what the plan was made from."""
        # Modules have no equality of their own, so that == asks whether they are the same ones.
        return (self._children() == self.children and list(map(type, self.modules)) == self.kinds
                and not any(map(any, map(_HOOKS, self.owns))) and all(map(METHODS.isdisjoint, self.owns))
                and all(get(module) == value for get, module, value in self.read))

    def parameters(self):
        """Those of the steps in order, or None where one is missing or of another dtype or shape."""
        try:
            params = [own["_parameters"][name] for own, name in self.slots]
            fit = set(map(_DTYPE, params)) == {self.dtype} and list(map(_SHAPE, params)) == self.shapes
            return params if fit else None
        except (KeyError, AttributeError):
            return None


class Call:
    """A Plan with the parameters of one call: a transform."""

    saves_memory = True

    def __init__(self, plan, params):
        self.plan, self.params = plan, params

    def __call__(self, x, context=None):
        plan = self.plan
        return run_program(x, self.params, plan.code, plan.constants, context, False, plan.save)

    def inverse(self, z, context=None):
        plan = self.plan
        return run_program(z, self.params, plan.code, plan.constants, context, True, plan.save)


def _key(x, context, save):
    return x.dtype, x.device.type, x.shape[1], None if context is None else context.shape[1], save


def kept(transforms, x, context, save):
    """Such a call by a Plan that still holds, or None."""
    plans, key = transforms.__dict__.get(PLANS, {}), _key(x, context, save)
    plan = plans.get(key)
    if plan is None:
        return None
    params = plan.parameters() if plan.holds() else None
    if params is None:
        plans.pop(key, None)
        return None
    return Call(plan, params)


def keep(transforms, steps, x, context, save):
    """Makes a Plan for calls like this one, unless it could not tell later whether it holds."""
    plan = Plan(transforms, steps, x.dtype, save)
    if not plan.certain or any(type(step.scale) is not ScaleMap for step in steps if hasattr(step, "scale")):
        return
    if len(plans := transforms.__dict__.setdefault(PLANS, _Plans())) >= 8:
        plans.clear()
    plans[_key(x, context, save)] = plan
