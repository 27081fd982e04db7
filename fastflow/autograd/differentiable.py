"""Gradients by the reference's differentiable formula, for what a kernel's backward can't give.

A fused backward is not differentiable itself. When a backward runs with grad mode on (create_graph), or its incoming
gradients are batched by vmap (is_grads_batched), it computes by this instead.
"""

import functools

import torch
from torch._C._dynamo import eval_frame
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    is_batchedtensor,
    is_legacy_batchedtensor,
)
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

from fastflow import backends
from fastflow.reference.layout import memory_format_of


def outside_inference_mode(function):
    """The function, which makes graphs of its own: torch.inference_mode(), where none can be made, is to it as
    torch.no_grad()."""
    @functools.wraps(function)
    def call(*args, **kwargs):
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*map(_recordable, args), **{name: _recordable(t) for name, t in kwargs.items()})
    return call


def uncompiled(function):
    """The function, which takes gradients of its own in its forward pass and runs until it has converged: torch.compile
    breaks its graph there and leaves it to eager. torch.compiler.disable does the same and imports Dynamo to do it."""
    @functools.wraps(function)
    def call(*args, **kwargs):
        callback = eval_frame.set_eval_frame(None)
        try:
            return function(*args, **kwargs)
        finally:
            eval_frame.set_eval_frame(callback)

    call._torchdynamo_disable = True
    if hasattr(eval_frame, "set_code_exec_strategy"):  # else Dynamo looks at this frame itself, and says so
        skip, default = eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT
        eval_frame.set_code_exec_strategy(call.__code__, eval_frame._FrameExecStrategy(skip, default))
    return call


def _recordable(t):
    """A copy of a tensor of inference mode, which no graph takes."""
    return t.clone() if isinstance(t, torch.Tensor) and t.is_inference() else t


def leaf_of(x):
    """x, or what stands for it where gradients in it are to be taken: with its tangent under forward-mode AD."""
    if x.requires_grad:
        return x
    if forward_ad._current_level < 0:
        return x.detach().requires_grad_()
    primal, tangent = forward_ad.unpack_dual(x)
    leaf = primal.detach().requires_grad_()
    return leaf if tangent is None else forward_ad.make_dual(leaf, tangent)


def detached(x):
    """x.detach(), but with its tangent under forward-mode AD."""
    if forward_ad._current_level < 0:
        return x.detach()
    primal, tangent = forward_ad.unpack_dual(x)
    return primal.detach() if tangent is None else forward_ad.make_dual(primal.detach(), tangent)


def unhooked():
    """Inside, hooks on saved tensors that are in force outside see nothing."""
    return saved_tensors_hooks(_same, _same)


def _same(tensor):
    return tensor


def needs_grad(*tensors):
    """Whether a call with these operands (None among them allowed) is to be recorded."""
    if torch.is_grad_enabled():
        for t in tensors:  # noqa: SIM110 - as in wanted()
            if t is not None and t.requires_grad:
                return True
    return False


def distinct(*tensors):
    """The tensors, under torch.compile with views for repetitions: Dynamo takes no tensor twice in a Function."""
    if not torch.compiler.is_compiling():
        return tensors
    return [t.view_as(t) if t is not None and any(t is u for u in tensors[:i]) else t for i, t in enumerate(tensors)]


class _KeptFormat(torch.autograd.Function):
    """A tensor whose gradient comes in the memory format that the tensor itself suggests."""

    @staticmethod
    def forward(ctx, t):
        ctx.format = memory_format_of(t)
        return t.view_as(t)

    @staticmethod
    def backward(ctx, grad):
        return _in_format(grad, ctx.format)


def keeping_format(t):
    """The tensor (or a pair of tensors), to be given to a reference: the gradient's format is its own, as it is behind
    a kernel. Transforms and compilers have formats of their own."""
    if isinstance(t, (tuple, list)):
        return [keeping_format(part) for part in t]
    wanted = (needs_grad(t) and not torch.compiler.is_compiling()
              and backends.transformed() is None)
    return _KeptFormat.apply(t) if wanted else t


def apply(function, *args):
    """function.apply(*args) of a call that backends.choose has given to a kernel: without Function.apply's own look for
    transforms of torch.func, which costs time for every argument."""
    if torch.compiler.is_compiling():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)


def direct(function):
    """The Function, whose node calls ``backward`` itself. torch's own way there looks each time whether the class has
    a ``vjp`` or takes its gradients in a list, which shows in a small layer's time."""
    function._backward_cls.apply = function.backward
    return function


def wanted(grads):
    """Whether a backward with these incoming gradients must be differentiable or run under a transform: vmap, or what
    differentiates the backward of a graph that was made outside of it."""
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() or backends.transformed() is not None:
        return True
    for g in grads:  # noqa: SIM110 - any() takes longer, and every small layer's backward comes by here
        if g is not None and (is_batchedtensor(g) or is_legacy_batchedtensor(g)):  # as batched()
            return True
    return False


def batched(t):
    """Whether a tensor is a batch of torch.func.vmap, or of the older vmap, under which is_grads_batched runs."""
    return is_batchedtensor(t) or is_legacy_batchedtensor(t)


def reference_grads(forward, inputs, needs, grads):
    """Gradients of ``forward(*inputs)`` with respect to the inputs that ``needs`` marks, None elsewhere.

    Differentiable in inputs and ``grads`` if grad mode is on. Inputs that depend on each other are told apart: each
    gradient is the partial one.
    """
    if _differentiated():
        found = iter(_pulled_back(forward, inputs, needs, grads))
        return [next(found) if need else None for need in needs]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [_alias(t, create_graph) if need else t for t, need in zip(inputs, needs, strict=True)]
        outputs = [(o, g) for o, g in zip(forward(*aliases), grads, strict=True)
                   if o is not None and g is not None and o.requires_grad]
        sources = [a for a, need in zip(aliases, needs, strict=True) if need]
        found = iter(torch.autograd.grad([o for o, _ in outputs], sources, [g for _, g in outputs],
                                         create_graph=create_graph, allow_unused=True) if outputs else
                     [None] * len(sources))
    return [_in_format(next(found), memory_format_of(t)) if need else None
            for t, need in zip(inputs, needs, strict=True)]


def _differentiated():
    """Whether torch.func differentiates what runs here: then autograd's graph is that of another level than its."""
    return backends.transformed() is not None and any(
        level.key() in (TransformType.Grad, TransformType.Jvp) for level in get_interpreter_stack() or ())


def _pulled_back(forward, inputs, needs, grads):
    """The gradients for the inputs that ``needs`` marks, by a level of torch.func within those that are active."""
    incoming = []

    def outputs(*given):
        given = iter(given)
        found = forward(*(next(given) if need else t for t, need in zip(inputs, needs, strict=True)))
        pairs = [(o, g) for o, g in zip(found, grads, strict=True) if o is not None and g is not None]
        incoming.extend(g for _, g in pairs)
        return tuple(o for o, _ in pairs)

    _, pull = torch.func.vjp(outputs, *(t for t, need in zip(inputs, needs, strict=True) if need))
    return pull(tuple(incoming))


def _in_format(grad, memory_format):
    """The gradient in the format of its tensor, as kernels give it; batched ones as they come."""
    if grad is None or batched(grad):
        return grad
    return grad.contiguous(memory_format=memory_format)


def _alias(t, linked):
    if linked or backends.transformed() is not None:  # inside torch.func.vmap no leaf can be made
        return t.view_as(t)
    return t.detach().requires_grad_()
